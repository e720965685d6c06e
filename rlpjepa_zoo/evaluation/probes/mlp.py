"""A network with one hidden layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import PROBES
from .base import Array, Probe, Scores, Split, fit, rows, seeds_text, sklearn_seed, spread

__all__ = ["MLP", "mlp"]

HIDDEN, EPOCHS = 256, 50


@PROBES.register("mlp")
@dataclass(frozen=True)
class MLP(Probe):
    """Accuracy of `mlp`, for each seed of its first weights."""

    order = 40

    def describe(self, n_train: int, n_test: int, seeds: int, skipped: Collection[str]) -> str:
        return f"MLP: one hidden layer of {HIDDEN}, Adam, {EPOCHS} epochs, {seeds_text(seeds)}"

    def score(self, split: Split, seeds: int, scores: Scores) -> None:
        right = [(mlp(split.x, split.y, split.test_x, seed) == split.test_y).astype(np.float64) for seed in range(seeds)]
        scores.per_image["mlp"] = np.mean(right, axis=0)
        scores.add("mlp", [values.mean() for values in right])


def mlp(x: Any, y: Any, test_x: Any, seed: int = 0) -> Array:
    """Classes of test rows by a network with one hidden layer of 256 ReLUs: scikit-learn's MLPClassifier, Adam, 50 epochs, batches of 200.

    Rows are divided by one number as in `rlpjepa_zoo.evaluation.probes.linear.linear`.

    Args:
        x, y: (m, C), (m,) training rows and labels.
        test_x: (n, C).
        seed: of the first weights and the order of batches.

    Returns:
        (n,) predicted labels.
    """
    from sklearn.neural_network import MLPClassifier

    x, test_x, y = rows(x), rows(test_x), np.asarray(y)
    scale = np.float32(spread(x))
    network = MLPClassifier((HIDDEN,), max_iter=EPOCHS, random_state=sklearn_seed(seed, "mlp"))
    predicted: Array = fit(network, x / scale, y).predict(test_x / scale)
    return predicted
