"""Logistic regression, with its regularisation chosen on held-out training images."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DataError, UsageError
from . import PROBES
from .base import Array, Probe, Scores, Split, fit, held_out, rows, seeds_text, spread

__all__ = ["GRID", "Linear", "choose_c", "linear"]

GRID = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Inverse strengths C that `choose_c` tries."""


@PROBES.register("linear")
@dataclass(frozen=True)
class Linear(Probe):
    """Accuracy of `linear` at the C that `choose_c` finds, for each seed.

    Args:
        grid: values of C > 0, rising; a single value is used as it is, with one seed.
    """

    order = 20
    default = True

    grid: tuple[float, ...] = GRID

    def __post_init__(self) -> None:
        if not self.grid or min(self.grid) <= 0:
            raise UsageError(f"grid: expected values of C > 0, got {', '.join(map(str, self.grid)) or 'none'}")

    def describe(self, n_train: int, n_test: int, seeds: int, skipped: Collection[str]) -> str:
        if "linear" in skipped:
            return ""
        values = ", ".join(f"{c:g}" for c in self.grid)
        if len(self.grid) == 1:
            choice = f"C = {values}"
        else:
            choice = f"C of {values} chosen on a held-out stratified fifth of the training images, refitted on all, {seeds_text(seeds)}"
        return f"linear: logistic regression, L-BFGS of at most 300 iterations, {choice}"

    def score(self, split: Split, seeds: int, scores: Scores) -> None:
        x, y, test_x, test_y = split
        repetitions = range(seeds) if len(self.grid) > 1 else range(1)
        if np.unique(y, return_counts=True)[1].max() < 2 and len(self.grid) > 1:
            scores.skipped["linear"] = "no class has two training images, so C cannot be chosen on held-out ones"
            return
        scores.chosen_c = [choose_c(x, y, self.grid, seed) for seed in repetitions]
        right = {c: (linear(x, y, test_x, c) == test_y).astype(np.float64) for c in sorted(set(scores.chosen_c))}
        scores.per_image["linear"] = np.mean([right[c] for c in scores.chosen_c], axis=0)
        scores.add("linear", [right[c].mean() for c in scores.chosen_c])


def choose_c(x: Any, y: Any, grid: Sequence[float] = GRID, seed: int = 0, max_iter: int = 100) -> float:
    """C of the grid with the best accuracy on a random fifth of the training images, held out by class; the smallest among equals.

    The search starts at the smallest C, starts each fit from the previous one, and stops after two values in a row are worse than the best.

    Args:
        x, y: (m, C), (m,) training rows and labels.
        grid: rising; a single value is returned as it is.
        seed: of the held-out images.
        max_iter: iterations of L-BFGS for each fit.

    Raises:
        DataError: fewer than two classes, or no class with two images.
    """
    x, y, grid = rows(x), np.asarray(y), tuple(grid)
    _check_two_classes(y)
    if len(grid) == 1:
        return grid[0]
    out = held_out(y, seed=seed)
    if not out.any():
        raise DataError("linear probe: no class has two training images, so C cannot be chosen; give one C")
    scale = np.float32(spread(x[~out]))
    train, test = x[~out] / scale, x[out] / scale
    probe = _logistic_regression(grid[0], max_iter, warm_start=True)
    best, chosen, worse = -1.0, grid[0], 0
    for c in grid:
        probe.C = c
        score = float((fit(probe, train, y[~out]).predict(test) == y[out]).mean())
        worse = worse + 1 if score < best else 0
        if score > best:
            best, chosen = score, c
        if worse == 2:
            break
    return chosen


def linear(x: Any, y: Any, test_x: Any, c: float = 1.0, max_iter: int = 300) -> Array:
    """Classes of test rows by multinomial logistic regression: scikit-learn's L-BFGS, L2 with inverse strength C.

    It minimises |W|^2 / 2 + C * sum of cross entropies over W and unregularised intercepts. Rows are divided by one number, the standard
    deviation of the training rows around the means of their columns; they are not centred, so zeros stay zeros.

    Args:
        x, y: (m, C), (m,) training rows and labels of at least two classes.
        test_x: (n, C).
        c: C > 0, see `choose_c`.
        max_iter: iterations of L-BFGS.

    Returns:
        (n,) predicted labels.

    Raises:
        DataError: fewer than two classes.

    Example:
        >>> linear([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1], [[-1.0], [4.0]]).tolist()
        [0, 1]
    """
    x, test_x, y = rows(x), rows(test_x), np.asarray(y)
    _check_two_classes(y)
    scale = np.float32(spread(x))
    predicted: Array = fit(_logistic_regression(c, max_iter), x / scale, y).predict(test_x / scale)
    return predicted


def _check_two_classes(y: Array) -> None:
    if len(np.unique(y)) < 2:
        raise DataError("linear probe: needs labelled training images of at least two classes")


def _logistic_regression(c: float, max_iter: int, warm_start: bool = False) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, max_iter=max_iter, warm_start=warm_start)
