"""Functions of the standard law GN_p(0, 1), in float64.

They are computed from the regularised incomplete gamma function (P or Q) of the small tail, so they keep their relative precision
far from the mode. Arguments: a (float64 tensor, any real) and p (float64 tensor, > 0), which broadcast. Derivatives are those in a.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.special import gammainc, gammaincc

__all__ = ["abs_power", "icdf", "log_cdf", "log_normaliser", "partial_moment", "variance"]

TINY = 1e-17  # below it the first term of the series of P is exact in float64
FAR = 1e-280  # below it Q comes near the smallest float64 and is replaced by its logarithm
TERMS = 64  # of the continued fraction of Q, which is used for t > 600 only


def abs_power(a: Tensor, p: Tensor) -> Tensor:
    """|a|^p, with derivative 0 at a = 0, where p < 1 has none."""
    zero = a == 0
    return torch.where(zero, 0, torch.where(zero, 1, a).abs() ** p)


def log_normaliser(p: Tensor) -> Tensor:
    """ln of 2 Gamma(1/p) p^(1/p - 1), the integral of exp(-|u|^p / p)."""
    return math.log(2) + torch.lgamma(1 / p) + (1 / p - 1) * p.log()


def variance(p: Tensor) -> Tensor:
    """E[U^2] = p^(2/p) Gamma(3/p) / Gamma(1/p)."""
    return torch.exp(2 * p.log() / p + torch.lgamma(3 / p) - torch.lgamma(1 / p))


def partial_moment(a: Tensor, p: Tensor, k: int = 0) -> Tensor:
    """E[U^k; U > -a] for k = 0, 1 or 2; k = 0 is the distribution function at a."""
    return _PartialMoment.apply(a, p, k)


def log_cdf(a: Tensor, p: Tensor) -> Tensor:
    """ln P(U <= a), relatively precise for probabilities near 0, below the smallest float64, and near 1."""
    return _LogCdf.apply(a, p)


def icdf(q: Tensor, p: Tensor) -> Tensor:
    """Quantile of probabilities in [0, 1]. Not differentiable: torch has no inverse of the incomplete gamma function, scipy's is used."""
    q_, p_ = np.broadcast_arrays(q.cpu().numpy(), p.detach().cpu().numpy())
    tail = 2 * np.minimum(q_, 1 - q_)
    t = special.gammainccinv(1 / p_, tail)
    with np.errstate(divide="ignore"):
        near = np.exp(np.log(1 - tail) + special.gammaln(1 + 1 / p_) + np.log(p_) / p_)  # first term of the series: t underflows at large p
    size = np.where(t > TINY, (p_ * t) ** (1 / p_), near)
    return torch.as_tensor(np.where(q_ < 0.5, -size, size)).to(q.device)


def _density(a: Tensor, p: Tensor) -> Tensor:
    return torch.exp(-log_normaliser(p) - abs_power(a, p) / p)


def _incomplete_gamma(a: Tensor, p: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """P(s, t) and Q(s, t) at t = |a|^p / p, also where t underflows and t^s does not."""
    t = a.abs() ** p / p
    series = torch.exp(s * (p * a.abs().log() - p.log()) - torch.lgamma(1 + s))
    tiny = t < TINY
    return torch.where(tiny, series, gammainc(s, t)), torch.where(tiny, 1 - series, gammaincc(s, t))


def _continued_fraction(s: Tensor, t: Tensor) -> Tensor:
    """t^s exp(-t) / Gamma(s, t) for t well above s (Legendre)."""
    value = t + 2 * TERMS + 1 - s
    for n in range(TERMS, 0, -1):
        value = t + 2 * n - 1 - s - n * (n - s) / value
    return value


class _PartialMoment(torch.autograd.Function):
    """Its derivative (-a)^k f(a) is written out: that of the incomplete gamma function is 0 or NaN at a = 0."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, p: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(a, p)
        ctx.k = k
        lower, upper = _incomplete_gamma(a, p, (k + 1) / p)
        half = torch.exp(k * p.log() / p + torch.lgamma((k + 1) / p) - torch.lgamma(1 / p)) / 2
        return half * (upper if k % 2 else torch.where(a > 0, 1 + lower, upper))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        a, p = ctx.saved_tensors
        _no_gradient(ctx.needs_input_grad[1])
        return gradient * (-a) ** ctx.k * _density(a, p), None, None


class _LogCdf(torch.autograd.Function):
    """ln F and its derivative f / F, which far out is a ratio of two numbers that underflow."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, p: Tensor) -> Tensor:
        size, s = a.abs(), 1 / p
        tail = partial_moment(-size, p)
        log_f = -log_normaliser(p) - size**p / p
        far = tail < FAR
        hazard = torch.where(far, p * _continued_fraction(s, size**p / p) / size, log_f.exp() / tail)
        ctx.save_for_backward(torch.where(a > 0, log_f.exp() / (1 - tail), hazard))
        return torch.where(a > 0, torch.log1p(-tail), torch.where(far, log_f - hazard.log(), tail.log()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _no_gradient(ctx.needs_input_grad[1])
        return gradient * ctx.saved_tensors[0], None


def _no_gradient(wanted: bool) -> None:
    if wanted:
        raise NotImplementedError("p: the closed forms are differentiable in loc and scale only; give p without requires_grad")
