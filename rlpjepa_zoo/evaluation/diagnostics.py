"""What a set of embeddings looks like beside the law it was trained to have: intervals, quantiles, distances, neighbours, units.

Shapes: z (n, D) >= 0. Plain numpy, so that a report's figures can be computed again from the embeddings by anybody.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from ..core import rng
from ..distributions import RectifiedGeneralizedGaussian

__all__ = [
    "Neighbour", "Quantiles", "choose_queries", "coordinate_distances", "distance_floor", "mean_interval", "neighbours", "quantiles",
    "selective_units", "share_interval",
]  # fmt: skip

Array = np.ndarray[Any, Any]
_NORMAL = 1.959963984540054
"""Half width of a 95 % interval in standard errors."""


def mean_interval(values: Array) -> tuple[float, float, float]:
    """Mean of independent values and its 95 % interval by the normal approximation, mean -+ 1.96 s / sqrt(n).

    Args:
        values: (n,); of a single value nothing is known of the spread, and the interval is NaN.

    Example:
        >>> [round(x, 3) for x in mean_interval(np.array([0.1, 0.2, 0.3]))]
        [0.2, 0.087, 0.313]
    """
    mean = float(np.mean(values))
    half = _NORMAL * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean, mean - half, mean + half


def share_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share that was counted in n trials (Wilson 1927), which stays in [0, 1] and is not empty at 0 and 1.

    Example:
        >>> [round(x, 3) for x in share_interval(1.0, 360)]
        [0.989, 1.0]
    """
    square = _NORMAL**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = _NORMAL / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return middle - half, middle + half


class Quantiles(NamedTuple):
    """Quantiles of all coordinates beside those of the law; `above` is the share of coordinates beyond each of them."""

    above: Array
    target: Array
    measured: Array


def quantiles(z: Array, law: RectifiedGeneralizedGaussian, points: int = 160) -> Quantiles:
    """Quantiles of the n D coordinates of z and of the law, from where both are zero to where ten coordinates are left above.

    Args:
        z: (n, D).
        law: the target; its `icdf` gives the quantiles.
        points: how many, equally spaced in the logarithm of the share above.

    Returns:
        `Quantiles` of (points,), float64; the measured ones are order statistics (no interpolation).
    """
    values = np.sort(z, axis=None)[::-1].astype(np.float64)
    most = min(1.0, 1.05 * max(float((values > 0).mean()), float(law.l0)))
    ranks = np.unique(np.geomspace(min(10, len(values)), max(most * len(values), 10), points).astype(np.int64).clip(1, len(values)))
    above = (ranks - 0.5) / len(values)  # the value of rank k stands for the share (k - 1/2) / N above it
    target = law.icdf(torch.from_numpy(1 - above)).double().numpy()
    return Quantiles(above, target, values[ranks - 1])


def coordinate_distances(z: Array, law: RectifiedGeneralizedGaussian) -> Array:
    """1-Wasserstein distance of each coordinate to the law, (D,): the integral of |F_j^-1(q) - F^-1(q)| over q (Vallender 1974).

    By the midpoint rule at the n order statistics, so n draws of the law itself have a distance above zero: see `distance_floor`.
    """
    middles = (torch.arange(len(z), dtype=torch.float64) + 0.5) / len(z)
    wanted = law.icdf(middles).double().numpy()
    return np.asarray(np.abs(np.sort(z, axis=0) - wanted[:, None]).mean(0), dtype=np.float64)


def distance_floor(n: int, law: RectifiedGeneralizedGaussian, coordinates: int = 256) -> float:
    """Mean of `coordinate_distances` over coordinates that are n draws of the law: what n images cannot tell from the target."""
    drawn = law.sample((n, coordinates), generator=rng.generator(0, "diagnostics-floor"))
    return float(coordinate_distances(drawn.double().numpy(), law).mean())


class Neighbour(NamedTuple):
    """Row of a neighbour, its cosine with the query, and the number of dimensions in which both are active."""

    row: int
    cosine: float
    shared: int


def choose_queries(z: Array, labels: Array | None, count: int = 8) -> list[int]:
    """Rows to show, drawn with a fixed seed: of different classes as far as there are any, never a row of zeros."""
    order = [int(i) for i in torch.randperm(len(z), generator=rng.generator(0, "diagnostics-queries")) if z[int(i)].any()]
    first: list[int] = []
    if labels is not None:
        seen: set[int] = set()
        for i in order:
            if labels[i] >= 0 and int(labels[i]) not in seen:
                seen.add(int(labels[i]))
                first.append(i)
        first = sorted(first[:count], key=lambda i: int(labels[i]))
    return (first + [i for i in order if i not in set(first)])[:count]


def neighbours(z: Array, queries: list[int], deep: int = 6) -> list[list[Neighbour]]:
    """The rows nearest to each query by cosine, the query itself left out; equal cosines in the order of rows, rows of zeros have cosine 0."""
    unit = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    found = []
    for query in queries:
        cosine = unit @ unit[query]
        cosine[query] = -np.inf
        rows = np.argsort(-cosine, kind="stable")[: min(deep, len(z) - 1)]
        shared = ((z[rows] > 0) & (z[query] > 0)).sum(1)
        found.append([Neighbour(int(r), float(cosine[r]), int(s)) for r, s in zip(rows, shared, strict=True)])
    return found


def selective_units(z: Array, labels: Array | None, show: int = 12, deep: int = 8) -> list[tuple[int, list[int]]]:
    """Units and the rows that excite each of them most, strongest first.

    Units come by how many of these rows share a class, at most two of a class, or without labels by how strongly they fire; one that no
    row excites is not among them.
    """
    strength, which = torch.from_numpy(z).topk(min(deep, len(z)), dim=0)
    alive = (strength[-1] > 0).float() + (strength[0] > 0).float()
    common = torch.full((z.shape[1],), -1)
    purity = torch.zeros(z.shape[1])
    if labels is not None:
        of_rows = torch.from_numpy(labels)[which]
        common = of_rows.mode(0).values
        purity = ((of_rows == common) & (common >= 0)).float().mean(0)
    order = torch.argsort(alive * 100 + purity * 10 + strength.mean(0) / strength.mean().clamp(min=1e-9), descending=True)
    chosen: list[tuple[int, list[int]]] = []
    seen: dict[int, int] = {}
    for unit in order.tolist():
        label = int(common[unit])
        if len(chosen) < show and alive[unit] > 0 and (label < 0 or seen.get(label, 0) < 2):
            chosen.append((unit, [int(i) for i, s in zip(which[:, unit], strength[:, unit], strict=True) if s > 0]))
            seen[label] = seen.get(label, 0) + 1
    return chosen
