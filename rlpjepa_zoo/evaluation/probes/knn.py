"""Votes of the nearest neighbours by cosine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError, UsageError
from . import PROBES
from .base import Array, Probe, Scores, Split, at_least_one, rows, tiles, unit

__all__ = ["KNN", "knn", "knn_accuracy"]


@PROBES.register("knn")
@dataclass(frozen=True)
class KNN(Probe):
    """Accuracy of `knn`; deterministic.

    Args:
        k: voters, >= 1.
        temperature: T > 0 of the weights.
    """

    order = 10
    default = True

    k: int = 20
    temperature: float = 0.07

    def __post_init__(self) -> None:
        at_least_one(k=self.k)
        if not self.temperature > 0:
            raise UsageError(f"temperature: expected a number > 0, got {self.temperature}")

    def describe(self, n_train: int, n_test: int, seeds: int, skipped: Collection[str]) -> str:
        return f"kNN: k = {min(self.k, n_train)}, cosine, T = {self.temperature:g}, deterministic"

    def score(self, split: Split, seeds: int, scores: Scores) -> None:
        right = (knn(split.x, split.y, split.test_x, self.k, self.temperature) == split.test_y).astype(np.float64)
        scores.per_image["knn"] = right
        scores.add("knn", [right.mean()])


def knn(bank: Any, bank_labels: Any, x: Any, k: int = 20, temperature: float = 0.07, leave_one_out: bool = False) -> Array:
    """Class of each row of x by a vote of its k nearest rows of the bank by cosine, weighted by exp(cosine / T); deterministic.

    Among equally near rows those with lower index vote; among classes with equal votes the lower label wins.

    Args:
        bank, bank_labels: (m, C), (m,) voters.
        x: (n, C) queries.
        k: voters, at most m.
        temperature: T > 0.
        leave_one_out: x is the bank itself; no row votes for itself.

    Returns:
        (n,) predicted labels.

    Raises:
        DataError: no row is left to vote.

    Source: k, T and weights are the defaults of solo-learn, on which the paper's code is built.

    Example:
        >>> knn(torch.eye(2), [3, 7], torch.tensor([[0.1, 0.9]]), k=1).tolist()
        [7]
    """
    bank, x = unit(bank), unit(x)
    classes, numbers = np.unique(np.asarray(bank_labels), return_inverse=True)
    class_of = torch.from_numpy(numbers)
    k = min(k, bank.shape[0] - int(leave_one_out))
    if k < 1:
        raise DataError("kNN: a single labelled image has no neighbour that can vote")
    predicted = np.empty(x.shape[0], dtype=np.int64)
    for start, cosine in tiles(x, bank):
        if leave_one_out:
            cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -torch.inf
        near, columns = _nearest(cosine, k)
        weights = ((near - near.amax(1, keepdim=True)) / temperature).exp()
        votes = torch.zeros(len(cosine), len(classes)).scatter_add_(1, class_of[columns], weights)
        predicted[start : start + len(cosine)] = classes[votes.numpy().argmax(1)]
    return predicted


def _nearest(cosine: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and their columns, in any order; among equal values those of lower column, which topk leaves open."""
    near, columns = cosine.topk(k, dim=1)
    last = near[:, -1:]
    tied_rows = torch.nonzero((cosine == last).sum(1) > (near == last).sum(1)).flatten()
    if len(tied_rows):
        tied, last = cosine[tied_rows], last[tied_rows]
        above, equal = tied > last, tied == last
        chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= k - above.sum(1, keepdim=True)))
        columns[tied_rows] = torch.nonzero(chosen)[:, 1].view(-1, k)
        near[tied_rows] = tied.gather(1, columns[tied_rows])
    return near, columns


def knn_accuracy(
    bank: Any, bank_labels: Any, x: Any, labels: Any, k: int = 20, temperature: float = 0.07, leave_one_out: bool = False
) -> float:
    """Share of rows of x whose label `knn` predicts; rows with a label < 0 are left out.

    Raises:
        DataError: no labelled rows.
    """
    bank_labels, labels = np.asarray(bank_labels), np.asarray(labels)
    if not (bank_labels >= 0).any() or not (labels >= 0).any():
        raise DataError("kNN: no labelled images")
    bank, x = rows(bank)[bank_labels >= 0], rows(x)[labels >= 0]
    return float((knn(bank, bank_labels[bank_labels >= 0], x, k, temperature, leave_one_out) == labels[labels >= 0]).mean())
