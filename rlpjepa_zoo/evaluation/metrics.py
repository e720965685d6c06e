"""Densities and moments of embeddings, for the training log and for the evaluation.

`l0` and `l1` are *densities*: lower is sparser. Shapes: z (B, D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..sparse.embeddings import SparseEmbeddings

__all__ = ["alarms", "always_on", "batch_metrics", "covariance", "dead", "l0", "l1", "sparse_densities", "variance"]


def l0(z: Tensor) -> Tensor:
    """Mean over rows of the fraction of non-zeros (exact test), in [0, 1].

    Example:
        >>> float(l0(torch.tensor([[0.0, 2.0], [0.0, 0.0]])))
        0.25
    """
    return (z != 0).float().mean()


def l1(z: Tensor) -> Tensor:
    """Mean over rows of (|z|_1 / |z|_2)^2 / D in [1/D, 1], the effective fraction of active dimensions; 0 for a row of zeros.

    For independent coordinates of law Y it tends to E[Y]^2 / E[Y^2] as D grows; never above `l0`.

    Example:
        >>> float(l1(torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]])))
        0.5
    """
    z = z if z.dtype == torch.float64 else z.float()
    scale = z.abs().amax(1, keepdim=True)
    unit = z / torch.where(scale > 0, scale, 1)  # so that squares neither overflow nor vanish
    square = unit.square().sum(1)
    return torch.where(square > 0, unit.abs().sum(1) ** 2 / torch.where(square > 0, square, 1), 0).mean() / z.shape[1]


def dead(z: Tensor) -> Tensor:
    """Fraction of dimensions that are zero in every row."""
    return (z == 0).all(0).float().mean()


def always_on(z: Tensor) -> Tensor:
    """Fraction of dimensions that are non-zero in every row."""
    return (z != 0).all(0).float().mean()


def variance(z: Tensor) -> Tensor:
    """Mean over dimensions of the (unbiased) variance over rows."""
    return z.float().var(0).mean()


def covariance(z: Tensor) -> Tensor:
    """Sum of squared off-diagonal covariances (unbiased) divided by D: zero for uncorrelated dimensions."""
    z = z.float() - z.float().mean(0)
    c = z.T @ z / max(1, len(z) - 1)
    return (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]


def sparse_densities(z: SparseEmbeddings) -> dict[str, float]:
    """`l0`, `l1` and `dead` of sparse rows, computed in float64 without making them dense."""
    n, dim = z.shape
    row_of, values = np.repeat(np.arange(n), np.diff(z.indptr)), z.values.astype(np.float64)
    sums, squares = np.bincount(row_of, values, n), np.bincount(row_of, values**2, n)
    effective = sums**2 / np.where(squares > 0, squares, 1)
    return {"l0": z.l0, "l1": float(effective.mean() / dim), "dead": 1 - len(np.unique(z.indices)) / dim}


@torch.no_grad()
def batch_metrics(z: Tensor) -> dict[str, float]:
    """l0, l1, dead, mean, variance and covariance of z, as numbers."""
    named = {"l0": l0(z), "l1": l1(z), "dead": dead(z), "mean": z.float().mean(), "variance": variance(z), "covariance": covariance(z)}
    return dict(zip(named, torch.stack([value.float() for value in named.values()]).tolist(), strict=True))


_MANY = 0.05
"""Share of dead or always active dimensions that is worth an alarm."""


def alarms(metrics: Mapping[str, float], theory: float | None, still_training: bool = False, held: bool = False) -> list[str]:
    """Sentences about what is wrong with an encoder according to its metrics, and the cure; empty if nothing is.

    Args:
        metrics: l0_eval (density of z in evaluation mode), dead_eval and always_on_eval (fraction of dimensions that no image, or every image,
            activates), n_eval (number of those images), each if measured.
        theory: density of the target law; None for an objective without one, of which only extremes are judged.
        held: whether the run held its density (`target.hold`).
        still_training: leave out what more training may correct: a density that is off by a factor, and all but many dead dimensions.

    Example:
        >>> alarms({"l0_eval": 0.11, "dead_eval": 0.02}, theory=0.12)
        []
    """
    sentences = []
    density, silent, loud = (metrics.get(name) for name in ("l0_eval", "dead_eval", "always_on_eval"))
    if density is not None and theory:
        if density < 0.05 * theory:
            sentences.append(
                f"collapsed: {density:.2g} of the coordinates are active, the target asks for {theory:.3g}; lower the learning rate"
            )
        elif not still_training and not 2 / 3 <= density / theory <= 1.5:
            cure = "" if held else "train with target.hold=true, or "
            cure += f"shift the trained encoder: rlpjepa dial --density {theory:.3g} --mode shift"
            sentences.append(f"density missed: {density:.3g} measured, {theory:.3g} in theory; {cure}")
    # a dimension with the asked rate may be zero in all of few images
    by_chance = 0.0 if theory is None else (1 - theory) ** metrics.get("n_eval", math.inf)
    if silent is not None and silent - by_chance > (0.5 if still_training or theory is None else _MANY):
        hold = "" if theory is None or held else "with target.hold=true, which brings dimensions back, or "
        cure = f"train {hold}with a lower learning rate or encoder.dim"
        sentences.append(f"{silent:.0%} of the dimensions are dead (no evaluation image activates them); {cure}")
    if loud is not None and theory is not None and theory < 0.5 and not still_training and loud > _MANY:
        sentences.append(f"{loud:.0%} of the dimensions are always on (every evaluation image activates them); raise objective.matching")
    return sentences
