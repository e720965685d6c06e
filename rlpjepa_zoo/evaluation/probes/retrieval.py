"""Ranking of training images by cosine with each test image."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ...core import rng
from . import PROBES
from .base import Array, Probe, Scores, Split, at_least_one, tiles, unit

__all__ = ["Retrieval", "RetrievalProbe", "retrieval"]


@PROBES.register("retrieval")
@dataclass(frozen=True)
class RetrievalProbe(Probe):
    """Mean average precision and precision at 1 and at 10 of `retrieval`; deterministic.

    Args:
        queries: test images that search, at most; >= 1.
    """

    order = 50

    queries: int = 2000

    def __post_init__(self) -> None:
        at_least_one(queries=self.queries)

    def describe(self, n_train: int, n_test: int, seeds: int, skipped: Collection[str]) -> str:
        n = min(self.queries, n_test)
        return f"mAP: all training images ranked by cosine for each of {n} test images{' drawn at random' if n < n_test else ''}"

    def score(self, split: Split, seeds: int, scores: Scores) -> None:
        result = retrieval(*split, self.queries)
        scores.add("map", [result.average_precision.mean()])
        scores.add("precision_at_1", [result.precision_at_1.mean()])
        scores.add("precision_at_10", [result.precision_at_10.mean()])
        scores.per_image["map"] = result.average_precision


class Retrieval(NamedTuple):
    """Measures of each query, (queries,) float64 in [0, 1]."""

    average_precision: Array
    precision_at_1: Array
    precision_at_10: Array


def retrieval(x: Any, y: Any, test_x: Any, test_y: Any, queries: int | None = None, seed: int = 0) -> Retrieval:
    """Precision of the ranking of all training rows by cosine with a test row; the rows with the label of the test row are relevant.

    Equally near rows, which are many for codes of few values, stand in one random order, so that a bank that is sorted by class gains nothing.
    A query without relevant rows counts as 0.

    Args:
        x, y: (m, C), (m,) rows that are searched, and their labels.
        test_x, test_y: (n, C), (n,) queries.
        queries: use at most this many, drawn at random; the draw does not depend on x.
        seed: of the draws.

    Example:
        >>> retrieval(torch.eye(2), [0, 1], torch.eye(2), [0, 0]).average_precision.mean()
        np.float64(0.75)
    """
    y, test_y = np.asarray(y), np.asarray(test_y)
    x, test_x = unit(x), unit(test_x)
    if queries is not None and queries < len(test_y):
        chosen = torch.randperm(len(test_y), generator=rng.generator(seed, "queries"))[:queries].sort().values.numpy()
        test_x, test_y = test_x[chosen], test_y[chosen]
    order = torch.randperm(len(y), generator=rng.generator(seed, "ties")).numpy()
    x, labels, blocks = x[order], torch.as_tensor(y[order]), []
    rank = torch.arange(1, len(y) + 1, dtype=torch.float64)
    for start, cosine in tiles(test_x, x):
        wanted = torch.as_tensor(test_y[start : start + len(cosine)])[:, None]
        relevant = labels[cosine.sort(dim=1, descending=True, stable=True).indices] == wanted
        precision = relevant.cumsum(1) / rank
        average = (precision * relevant).sum(1) / relevant.sum(1).clamp(min=1)
        blocks.append(torch.stack([average, precision[:, 0], precision[:, min(10, len(y)) - 1]]))
    return Retrieval(*torch.cat(blocks, dim=1).numpy())
