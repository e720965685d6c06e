"""How noisy a finite number of directions makes the gradient, and how many of them an asked error takes.

The sliced distance is an average over directions; N of them give its gradient up to noise. With independent draws of n directions,
gradients G_1 ... G_m have a mean and a scatter S^2 = sum |G_i - mean|^2 / (m - 1) around it, and the error of one draw relative to the
gradient of all directions is sqrt(S^2 / (|mean|^2 - S^2 / m)). It falls like 1 / sqrt(N) for independent draws or whole bases.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from ..core import rng
from ..distributions import RectifiedGeneralizedGaussian
from .directions import INDEPENDENT, slices
from .sliced_wasserstein import sliced_wasserstein

__all__ = ["MOST", "directions_needed", "gradient_error", "matched"]

MOST = 1 << 20
"""Directions that are still thought to be meant."""


def matched(law: RectifiedGeneralizedGaussian, batch: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings that are a sample of the target, and the target's own sample: (B, D) each.

    It is where perfect training ends, and where directions are noisiest compared with the gradient, which here is nothing but the
    difference of two samples: an error of 0.5 says that directions add a quarter to the variance that the draw of the target has anyway.
    """
    z, y = (law.sample((batch, dim), generator=rng.generator(seed, f"matched-{name}")) for name in "zy")
    return z, y


def gradient_error(kind: str, n: int, z: Tensor, y: Tensor, seed: int = 0, draws: int = 8) -> float:
    """Expected relative error (Frobenius norm) of the gradient from n directions, against that from all directions.

    Args:
        kind: a family of `INDEPENDENT`.
        n: directions of one draw.
        z, y: (B, D) embeddings and target.
        seed: of the draws.
        draws: gradients compared, >= 2.

    Raises:
        ValueError: fewer than two draws.

    Example:
        >>> from rlpjepa_zoo import RectifiedGeneralizedGaussian, sigma_gn
        >>> z, y = matched(RectifiedGeneralizedGaussian(0.0, sigma_gn(1.0), 1.0), 32, 64)
        >>> gradient_error("orthogonal", 64, z, y) < gradient_error("random", 64, z, y)
        True
    """
    if draws < 2:
        raise ValueError(f"gradient_error: expected draws >= 2, got {draws}")
    total, squares = torch.zeros_like(z, dtype=torch.float64), 0.0
    for draw in range(draws):
        x = z.detach().clone().requires_grad_()
        parts = slices(kind, n, z.shape[1], rng.generator(seed, "gradient-error", draw, device=z.device))
        (grad,) = torch.autograd.grad(sliced_wasserstein(x, y, parts), x)
        total += grad
        squares += float(grad.double().square().sum())
    mean = float((total / draws).square().sum())
    scatter = max(squares - draws * mean, 0.0) / (draws - 1)  # where all draws agree, rounding leaves it either side of 0
    return math.sqrt(scatter / max(mean - scatter / draws, 1e-12 * mean, sys.float_info.min))


def directions_needed(kind: str, error: float, z: Tensor, y: Tensor, seed: int = 0, draws: int = 8) -> int:
    """Fewest directions whose gradient error is at most `error`: whole bases of the families that have them.

    Args:
        kind: a family of `INDEPENDENT`.
        error: relative, > 0.
        z, y, seed, draws: see `gradient_error`.

    Raises:
        ValueError: a mix, a family whose error does not fall with its number, or an error that takes more than `MOST` directions.
    """
    if kind not in INDEPENDENT:
        raise ValueError(f"directions_needed: expected one of {', '.join(INDEPENDENT)}, got '{kind}'")
    dim = z.shape[1]
    ratio = gradient_error(kind, dim, z, y, seed, draws) / error
    if ratio > 1e3 or ratio**2 * dim > MOST:
        raise ValueError(f"an error of {error:g} takes more than {MOST:,} directions; ask for a larger one, or give num_directions")
    return max(1, math.ceil(ratio**2 * dim)) if kind == "random" else dim * max(1, math.ceil(ratio**2))
