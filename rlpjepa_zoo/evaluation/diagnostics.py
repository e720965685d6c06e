"""A set of embeddings compared with its target law: quantiles, distances, neighbours, selective units.

Shapes: z (n, D) >= 0. The inputs are plain numpy arrays, so anyone can recompute the figures of a report from the embeddings.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from ..core import rng
from ..distributions import RectifiedGeneralizedGaussian

__all__ = [
    "Neighbour", "Quantiles", "choose_queries", "coordinate_distances", "distance_floor", "neighbours", "quantiles", "selective_units",
]  # fmt: skip

Array = np.ndarray[Any, Any]


class Quantiles(NamedTuple):
    """Quantiles of all coordinates and of the law, (points,) float64 each."""

    above: Array
    """Share of coordinates above each quantile."""
    target: Array
    measured: Array


def quantiles(z: Array, law: RectifiedGeneralizedGaussian, points: int = 160) -> Quantiles:
    """Quantiles of the n D coordinates of z and of the law, from the range where both are zero to ten coordinates below the maximum.

    Args:
        z: (n, D).
        law: the target; its `icdf` gives the quantiles.
        points: number of quantiles, equally spaced in the logarithm of the share above.

    Returns:
        `Quantiles`; the measured ones are order statistics (no interpolation).
    """
    values = np.sort(z, axis=None)[::-1].astype(np.float64)
    most = min(1.0, 1.05 * max(float((values > 0).mean()), float(law.l0)))
    ranks = np.unique(np.geomspace(min(10, len(values)), max(most * len(values), 10), points).astype(np.int64).clip(1, len(values)))
    above = (ranks - 0.5) / len(values)  # the value of rank k represents the share (k - 1/2) / N above it
    target = law.icdf(torch.from_numpy(1 - above)).double().numpy()
    return Quantiles(above, target, values[ranks - 1])


def coordinate_distances(z: Array, law: RectifiedGeneralizedGaussian) -> Array:
    """1-Wasserstein distance of each coordinate to the law, (D,): the integral of |F_j^-1(q) - F^-1(q)| over q (Vallender 1974).

    The integral is computed by the midpoint rule at the n order statistics, so n draws of the law itself have a distance above zero; see
    `distance_floor`.
    """
    midpoints = (torch.arange(len(z), dtype=torch.float64) + 0.5) / len(z)
    target = law.icdf(midpoints).double().numpy()
    return np.asarray(np.abs(np.sort(z, axis=0) - target[:, None]).mean(0), dtype=np.float64)


def distance_floor(n: int, law: RectifiedGeneralizedGaussian, coordinates: int = 256) -> float:
    """Mean of `coordinate_distances` over coordinates that are n draws of the law: distances up to this are not distinguishable from zero."""
    draws = law.sample((n, coordinates), generator=rng.generator(0, "diagnostics-floor"))
    return float(coordinate_distances(draws.double().numpy(), law).mean())


class Neighbour(NamedTuple):
    """A neighbour of a query."""

    row: int
    cosine: float
    shared: int
    """Dimensions in which both are active."""


def choose_queries(z: Array, labels: Array | None, count: int = 8) -> list[int]:
    """Rows to show, drawn with a fixed seed: of different classes as long as there are any, never a row of zeros."""
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


def neighbours(z: Array, queries: list[int], count: int = 6) -> list[list[Neighbour]]:
    """The rows nearest to each query by cosine, without the query itself; equal cosines by row number, rows of zeros have cosine 0."""
    unit = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    nearest = []
    for query in queries:
        cosine = unit @ unit[query]
        cosine[query] = -np.inf
        rows = np.argsort(-cosine, kind="stable")[: min(count, len(z) - 1)]
        shared = ((z[rows] > 0) & (z[query] > 0)).sum(1)
        nearest.append([Neighbour(int(r), float(cosine[r]), int(s)) for r, s in zip(rows, shared, strict=True)])
    return nearest


def selective_units(z: Array, labels: Array | None, count: int = 12, rows_each: int = 8) -> list[tuple[int, list[int]]]:
    """Units and the rows in which each of them is strongest, strongest first.

    With labels, units are ranked by how many of these rows share a class, at most two units per class; without labels, by mean activation.
    A unit that is zero in all rows is left out.

    Args:
        z: (n, D).
        labels: (n,), -1 where unknown.
        count: units, at most.
        rows_each: rows of a unit, at most.
    """
    strength, top_rows = torch.from_numpy(z).topk(min(rows_each, len(z)), dim=0)
    active = (strength[-1] > 0).float() + (strength[0] > 0).float()
    common = torch.full((z.shape[1],), -1)
    purity = torch.zeros(z.shape[1])
    if labels is not None:
        top_labels = torch.from_numpy(labels)[top_rows]
        common = top_labels.mode(0).values
        purity = ((top_labels == common) & (common >= 0)).float().mean(0)
    order = torch.argsort(active * 100 + purity * 10 + strength.mean(0) / strength.mean().clamp(min=1e-9), descending=True)
    chosen: list[tuple[int, list[int]]] = []
    per_class: dict[int, int] = {}
    for unit in order.tolist():
        label = int(common[unit])
        if len(chosen) < count and active[unit] > 0 and (label < 0 or per_class.get(label, 0) < 2):
            chosen.append((unit, [int(i) for i, s in zip(top_rows[:, unit], strength[:, unit], strict=True) if s > 0]))
            per_class[label] = per_class.get(label, 0) + 1
    return chosen
