"""Measures of a batch of embeddings; the same functions serve the training log and the evaluation.

`l0` and `l1` are *densities*: lower is sparser. Shapes: z (B, D).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["alarms", "batch_metrics", "covariance", "dead", "l0", "l1", "variance"]


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


def variance(z: Tensor) -> Tensor:
    """Mean over dimensions of the (unbiased) variance over rows."""
    return z.float().var(0).mean()


def covariance(z: Tensor) -> Tensor:
    """Sum of squared off-diagonal covariances (unbiased) divided by D: zero for uncorrelated dimensions."""
    z = z.float() - z.float().mean(0)
    c = z.T @ z / max(1, len(z) - 1)
    return (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]


@torch.no_grad()
def batch_metrics(z: Tensor) -> dict[str, float]:
    """All of the above and the mean, as numbers."""
    named = {"l0": l0(z), "l1": l1(z), "dead": dead(z), "mean": z.float().mean(), "variance": variance(z), "covariance": covariance(z)}
    return dict(zip(named, torch.stack([value.float() for value in named.values()]).tolist(), strict=True))


def alarms(found: Mapping[str, float], theory: float, still_training: bool = False) -> list[str]:
    """What is wrong with an encoder by its own figures, in sentences; an empty list when nothing is.

    Args:
        found: l0_eval (density of z in evaluation mode) and dead_eval (fraction of dimensions that no image activates), where measured.
        theory: density of the target law.
        still_training: leave out what more training may mend: a density that is off by a factor.

    Example:
        >>> alarms({"l0_eval": 0.11, "dead_eval": 0.02}, theory=0.12)
        []
    """
    sentences = []
    density, silent = found.get("l0_eval"), found.get("dead_eval")
    if density is not None and density < 0.05 * theory:
        sentences.append(
            f"collapsed: {density:.2g} of the coordinates are active, the target asks for {theory:.3g}; lower the learning rate"
        )
    elif density is not None and not still_training and not 2 / 3 <= density / theory <= 1.5:
        sentences.append(f"density missed: {density:.3g} measured, {theory:.3g} in theory; train longer or try another learning rate")
    if silent is not None and silent > 0.5:
        sentences.append(
            f"{silent:.0%} of the dimensions are dead (no evaluation image activates them); lower the learning rate or encoder.dim"
        )
    return sentences
