"""Nearest class mean of a few random training images per class."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...core import rng
from ...errors import DataError, UsageError
from . import PROBES
from .base import Array, Probe, Scores, Split, at_least_one, dense, rows_per_tile, tiles, unit

__all__ = ["FewShot", "few_shot"]


@PROBES.register("few_shot")
@dataclass(frozen=True)
class FewShot(Probe):
    """Accuracy of `few_shot` over random draws.

    Args:
        shots: numbers of images per class, each >= 1.
        draws: random draws for each seed, >= 1.
    """

    order = 30
    default = True

    shots: tuple[int, ...] = (1, 5, 10)
    draws: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "shots", tuple(sorted(set(self.shots))))
        if not self.shots or self.shots[0] < 1:
            raise UsageError(f"shots: expected numbers of images per class >= 1, got {', '.join(map(str, self.shots)) or 'none'}")
        at_least_one(draws=self.draws)

    def describe(self, n_train: int, n_test: int, seeds: int, skipped: Collection[str]) -> str:
        measured = [str(shots) for shots in self.shots if _measure(shots) not in skipped]
        if not measured:
            return ""
        return (
            f"{', '.join(measured)}-shot: nearest by cosine of the class means of so many random training images per class, "
            f"mean of {seeds * self.draws} draws (± their standard deviation)"
        )

    def score(self, split: Split, seeds: int, scores: Scores) -> None:
        for shots in self.shots:
            try:
                repetitions = [few_shot(*split, shots, self.draws, seed) for seed in range(seeds)]
            except DataError as error:
                scores.skipped[_measure(shots)] = str(error).removeprefix(f"{shots}-shot: ")
            else:
                of_draws, of_images = zip(*repetitions, strict=True)
                scores.add(_measure(shots), np.concatenate(of_draws))
                scores.per_image[_measure(shots)] = np.mean(of_images, axis=0)


def _measure(shots: int) -> str:
    """Key of a few-shot measure."""
    return "one_shot" if shots == 1 else f"shot_{shots}"


def few_shot(x: Any, y: Any, test_x: Any, test_y: Any, shots: int = 1, draws: int = 100, seed: int = 0) -> tuple[Array, Array]:
    """Accuracy of the nearest class mean (cosine) of a few random images per class, for many draws.

    The mean is taken over rows scaled to length 1. The draws do not depend on x, so representations of one data set compare pairwise.

    Args:
        x, y: (m, C), (m,) training rows and labels, from which the shots are drawn.
        test_x, test_y: (n, C), (n,).
        shots: images per class, >= 1.
        draws: >= 1.

    Returns:
        (draws,) accuracy of each draw, and (n,) share of draws that classify each test row correctly; both in [0, 1].

    Raises:
        DataError: no rows, or a class has fewer images.

    Example:
        >>> of_draws, of_images = few_shot(torch.eye(2), [0, 1], torch.eye(2), [0, 1], draws=3)
        >>> of_draws.tolist(), of_images.tolist()
        ([1.0, 1.0, 1.0], [1.0, 1.0])
    """
    from scipy.sparse import csr_array

    y, test_y = np.asarray(y), np.asarray(test_y)
    if not len(y) or not len(test_y):
        raise DataError(f"{shots}-shot: no labelled images")
    classes, counts = np.unique(y, return_counts=True)
    if counts.min() < shots:
        raise DataError(f"{shots}-shot: class {classes[counts.argmin()]} has {counts.min()} training images")
    members = [np.flatnonzero(y == c) for c in classes]
    picks = np.stack([_draw(members, shots, draw, seed) for draw in range(draws)])  # (draws, classes, shots)
    x, test_x = unit(x), unit(test_x)
    of_draws, of_images = np.zeros(draws), np.zeros(len(test_y))
    group = rows_per_tile(len(classes) * x.shape[1])
    for first in range(0, draws, group):
        chosen = picks[first : first + group]
        ends = np.arange(0, chosen.size + 1, shots)
        sums = csr_array((np.ones(chosen.size, np.float32), chosen.ravel(), ends), shape=(len(ends) - 1, len(y))) @ x
        for start, cosine in tiles(test_x, unit(dense(sums))):
            predicted = classes[cosine.numpy().reshape(len(cosine), len(chosen), len(classes)).argmax(2)]
            right = predicted == test_y[start : start + len(cosine), None]
            of_draws[first : first + len(chosen)] += right.sum(0)
            of_images[start : start + len(cosine)] += right.sum(1)
    return of_draws / len(test_y), of_images / draws


def _draw(members: Sequence[Array], shots: int, draw: int, seed: int) -> Array:
    """(classes, shots) rows of one draw, without repetition."""
    if shots == 1:
        source = rng.generator(seed, "one-shot", draw)
        return np.array([[m[int(torch.randint(len(m), (1,), generator=source))]] for m in members])
    source = rng.generator(seed, "few-shot", shots, draw)
    return np.stack([m[torch.randperm(len(m), generator=source)[:shots].numpy()] for m in members])
