"""Noise of the gradient from a finite number of directions, and the number of directions for a given error.

The sliced distance is an average over directions; N of them give its gradient up to noise. m independent draws of n directions give
gradients G_1 ... G_m with a mean and a scatter S^2 = sum |G_i - mean|^2 / (m - 1). The error of one draw relative to the gradient of all
directions is sqrt(S^2 / (|mean|^2 - S^2 / m)). It falls like 1 / sqrt(N) for independent draws or complete bases.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from ..core import rng
from ..distributions import RectifiedGeneralizedGaussian
from .directions import INDEPENDENT, direction_blocks
from .sliced_wasserstein import sliced_wasserstein

__all__ = ["MOST", "directions_needed", "gradient_error", "matched"]

MOST = 1 << 20
"""Largest number of directions that `directions_needed` returns."""


def matched(law: RectifiedGeneralizedGaussian, batch: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings that are a sample of the target, and a sample of the target: (B, D) each.

    Perfect training ends here, and here directions are noisiest relative to the gradient, which is only the difference of two samples: at an
    error of 0.5 the directions add a quarter to the variance that the draw of the target has anyway.
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
        blocks = direction_blocks(kind, n, z.shape[1], rng.generator(seed, "gradient-error", draw, device=z.device))
        (grad,) = torch.autograd.grad(sliced_wasserstein(x, y, blocks), x)
        total += grad
        squares += float(grad.double().square().sum())
    mean = float((total / draws).square().sum())
    scatter = max(squares - draws * mean, 0.0) / (draws - 1)  # rounding makes it negative where all draws agree
    return math.sqrt(scatter / max(mean - scatter / draws, 1e-12 * mean, sys.float_info.min))


def directions_needed(kind: str, error: float, z: Tensor, y: Tensor, seed: int = 0, draws: int = 8) -> int:
    """Fewest directions whose gradient error is at most `error`; a multiple of D for families made of bases.

    Args:
        kind: a family of `INDEPENDENT`.
        error: relative, > 0.
        z, y, seed, draws: see `gradient_error`.

    Raises:
        ValueError: a mix, a family whose error does not fall with its number, or an error that needs more than `MOST` directions.
    """
    if kind not in INDEPENDENT:
        raise ValueError(f"directions_needed: expected one of {', '.join(INDEPENDENT)}, got '{kind}'")
    dim = z.shape[1]
    ratio = gradient_error(kind, dim, z, y, seed, draws) / error
    if ratio > 1e3 or ratio**2 * dim > MOST:
        raise ValueError(f"an error of {error:g} takes more than {MOST:,} directions; ask for a larger one, or give num_directions")
    return max(1, math.ceil(ratio**2 * dim)) if kind == "random" else dim * max(1, math.ceil(ratio**2))
