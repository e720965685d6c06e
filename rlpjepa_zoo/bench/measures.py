"""Accuracy and density of the codes of one method."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..evaluation.probes.base import Array, Scores, Split, rows
from ..evaluation.probes.knn import KNN
from ..evaluation.probes.linear import Linear
from ..evaluation.probes.retrieval import RetrievalProbe
from ..sparse.embeddings import SparseEmbeddings

__all__ = ["DENSE", "MEASURES", "PROTOCOL", "Measured", "densities", "measure"]

MEASURES = {"one_nn": "1-NN accuracy", "knn": "kNN accuracy", "map": "retrieval mAP", "linear": "linear probe accuracy"}
"""Label of each measure, in the order of tables."""
DENSE = "features"
"""The method whose codes with all values are the dense features."""
_QUERIES = 2000
PROTOCOL = (
    f"Search by cosine among training images. 1-NN: class of the nearest; kNN: k = {KNN.k}, T = {KNN.temperature:g}; mAP: at most {_QUERIES} test images "
    "search; linear probe: logistic regression, C chosen on a held-out fifth of the training images"
)


class Measured(NamedTuple):
    """Measures of the codes of one fit."""

    values: dict[str, float]
    per_image: dict[str, Array]
    """(n,) in [0, 1] for each measure: of each test image, or of each query."""


def measure(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, linear: bool) -> Measured:
    """Measure codes, or dense features.

    Args:
        x, y: (m, D) codes of training images, and their labels (m,); images with a label < 0 are left out.
        test_x, test_y: those of test images.
        linear: also train a linear probe, which is slow.
    """
    split = Split(*_labelled(x, y), *_labelled(test_x, test_y))
    scores = {
        "one_nn": ("knn", _scores(KNN(k=1), split)),
        "knn": ("knn", _scores(KNN(), split)),
        "map": ("map", _scores(RetrievalProbe(_QUERIES), split)),
    }
    if linear:
        scores["linear"] = "linear", _scores(Linear(), split)
    found = {name: (of.mean[key], of.per_image[key]) for name, (key, of) in scores.items() if key in of.mean}
    return Measured({name: mean for name, (mean, _) in found.items()}, {name: each for name, (_, each) in found.items()})


def _labelled(x: Tensor, y: Tensor) -> tuple[Any, Array]:
    """Rows with known labels, sparse unless some are negative, and the labels."""
    x, y = x[y >= 0], y[y >= 0]
    return rows(x if bool((x < 0).any()) else SparseEmbeddings.from_dense(x)), y.numpy()


def _scores(probe: Any, split: Split) -> Scores:
    scores = Scores()
    probe.score(split, 1, scores)
    return scores


def densities(x: Tensor, test_x: Tensor) -> dict[str, float]:
    """Density of codes.

    Args:
        x, test_x: (m, D), (n, D) codes, or dense features, of training and test images.

    Returns:
        ``l0``, share of non-zero values of test images; ``dead``, share of units that are zero for all images; ``max_rate``, largest share of
        images for which a unit is not zero.

    Example:
        >>> import torch
        >>> densities(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]]))
        {'l0': 0.6667, 'dead': 0.3333, 'max_rate': 1.0}
    """
    counts = (x != 0).sum(0) + (test_x != 0).sum(0)
    values = {
        "l0": float((test_x != 0).float().mean()),
        "dead": float((counts == 0).float().mean()),
        "max_rate": float(counts.max() / (len(x) + len(test_x))),
    }
    return {name: float(np.round(value, 4)) for name, value in values.items()}
