"""Agreement of k-means clusters with labels."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import PROBES
from .base import Probe, Scores, Split, fit, seeds_text, sklearn_seed, unit

__all__ = ["Clustering", "clustering"]


@PROBES.register("clustering")
@dataclass(frozen=True)
class Clustering(Probe):
    """`clustering` of the test images, for each seed of the first centres."""

    order = 60

    def describe(self, n_train: int, n_test: int, seeds: int, skipped: Collection[str]) -> str:
        return f"NMI: k-means of the test images by direction, as many clusters as classes, {seeds_text(seeds)}"

    def score(self, split: Split, seeds: int, scores: Scores) -> None:
        scores.add("nmi", [clustering(split.test_x, split.test_y, seed) for seed in range(seeds)])


def clustering(x: Any, y: Any, seed: int = 0) -> float:
    """Normalised mutual information (arithmetic mean) of labels and k-means clusters of rows scaled to length 1, one cluster per label.

    Args:
        x, y: (n, C), (n,); n >= number of labels.
        seed: of the first centres (k-means++, one start).
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    y = np.asarray(y)
    clusters = fit(KMeans(len(np.unique(y)), n_init=1, random_state=sklearn_seed(seed, "clustering")), unit(x), y).labels_
    return float(normalized_mutual_info_score(y, clusters))
