"""Generalized Gaussian and its rectification: the target law of the embeddings.

Density of GN_p(mu, sigma):  f(x) = p^(1-1/p) / (2 sigma Gamma(1/p)) * exp(-|x - mu|^p / (p sigma^p)),  p > 0, sigma > 0.
p = 1 is Laplace(mu, scale=sigma), p = 2 is Normal(mu, std=sigma); `scipy.stats.gennorm(p, loc=mu, scale=p**(1/p) * sigma)` is the same law.
The rectified law is the law of Y = max(X, 0): an atom of mass P(X <= 0) at zero and the density f on (0, inf).

Closed forms are computed in float64 whatever the dtype of the parameters, from the regularised incomplete gamma function
(P or Q) of the small tail, so that they keep their relative precision at large negative mu.
Source: arXiv 2602.01456, section 3 and appendices; the d(xi)-entropy and the moments were checked against quadrature.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import optimize, special
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all
from torch.special import gammainc, gammaincc

__all__ = ["GeneralizedGaussian", "RectifiedGeneralizedGaussian", "mu_for_density", "sigma_gn", "sigma_rgn"]

Number = float | Tensor


class GeneralizedGaussian(Distribution):
    """GN_p(loc, scale), the generalized Gaussian with shape `p`.

    Args:
        loc: mean mu, any real; scalar or tensor.
        scale: sigma > 0, same unit as `loc`; scalar or tensor. The variance is p^(2/p) sigma^2 Gamma(3/p) / Gamma(1/p).
        p: shape > 0 (1 Laplace, 2 normal, < 1 heavier tails); scalar or tensor. The three broadcast together. Three Python numbers are
            stored in float64, so that the closed forms lose nothing; samples then have torch's default dtype.
        validate_args: check parameters and values unless False. None checks too, whatever torch's global default is: importing torch._dynamo
            (torch.compile) turns that default off.

    Raises:
        ValueError: a parameter out of its range.

    Example:
        >>> law = GeneralizedGaussian(0.0, sigma_gn(1.0), 1.0)
        >>> round(float(law.variance), 6)
        1.0
        >>> tuple(law.sample((3, 2), generator=torch.Generator().manual_seed(0)).shape)
        (3, 2)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive, "p": constraints.positive}
    support: Any = constraints.real
    has_rsample = False

    def __init__(self, loc: Number, scale: Number, p: Number, validate_args: bool | None = None) -> None:
        self._shape_is = float(p) if not isinstance(p, Tensor) or p.numel() == 1 else None  # one p for all elements has fast sampling paths
        self._sample_dtype: torch.dtype | None = None
        if any(isinstance(x, Tensor) for x in (loc, scale, p)):
            self.loc, self.scale, self.p = broadcast_all(loc, scale, p)
        else:
            self.loc, self.scale, self.p = (torch.tensor(float(x), dtype=torch.float64) for x in (loc, scale, p))
            self._sample_dtype = torch.get_default_dtype()
        super().__init__(self.loc.shape, validate_args=validate_args is not False)
        if self._validate_args:
            for name, value in (("loc", self.loc), ("scale", self.scale), ("p", self.p)):
                if not torch.isfinite(value).all():  # torch's constraints allow infinity
                    raise ValueError(f"{name}: expected finite numbers, got {value.tolist()}")

    def expand(self, batch_shape: Any, _instance: Any = None) -> GeneralizedGaussian:
        new = self._get_checked_instance(type(self), _instance)
        batch_shape = torch.Size(batch_shape)
        new._shape_is, new._sample_dtype = self._shape_is, self._sample_dtype
        new.loc, new.scale, new.p = (x.expand(batch_shape) for x in (self.loc, self.scale, self.p))
        super(GeneralizedGaussian, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _float64(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """loc, scale, p in float64, with a = loc/scale and t = |a|^p / p."""
        loc, scale, p = self.loc.double(), self.scale.double(), self.p.double()
        a = loc / scale
        return loc, scale, p, a, a.abs() ** p / p

    def _like(self, result: Tensor, value: Tensor | None = None) -> Tensor:
        """A float64 result in the dtype to which parameters (and value) promote."""
        return result.to(self.loc.dtype if value is None else torch.result_type(value, self.loc))

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        _, scale, p, _, _ = self._float64()
        return self._like(scale**2 * torch.exp(2 * p.log() / p + torch.lgamma(3 / p) - torch.lgamma(1 / p)))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        """Draw on the device of the parameters.

        Args:
            sample_shape: leading shape of the draw.
            generator: source of randomness on the same device; torch's global generator when None.

        Returns:
            Tensor of `sample_shape + batch_shape`, in the dtype of the parameters (half parameters are
            drawn in float32 and then cast, as half-precision uniforms cut the tails).
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        asked = self._sample_dtype or self.loc.dtype
        dtype = torch.promote_types(asked, torch.float32)
        options: dict[str, Any] = {"dtype": dtype, "device": self.loc.device}
        if self._shape_is == 2.0:
            unit = torch.empty(shape, **options).normal_(generator=generator)
        elif self._shape_is == 1.0:
            u = torch.empty(shape, **options).uniform_(torch.finfo(dtype).eps - 1, 1, generator=generator)
            unit = -u.sign() * torch.log1p(-u.abs())
        else:
            # Scale mixture of uniforms: U(-1, 1) * (p G)^(1/p), G ~ Gamma(1 + 1/p). Against the usual S * (p Gamma(1/p))^(1/p) it
            # needs no sign draw and does not underflow at large p, where Gamma(1/p) is mostly below the smallest float.
            p = self.p.to(dtype).expand(shape)
            gamma = torch._standard_gamma(1 + 1 / p, generator=generator)
            unit = torch.empty(shape, **options).uniform_(-1, 1, generator=generator) * (p * gamma) ** (1 / p)
        return (self.loc.to(dtype) + self.scale.to(dtype) * unit).to(asked)

    def log_prob(self, value: Tensor) -> Tensor:
        """Logarithm of the density (nats) with respect to Lebesgue measure; differentiable in value, loc and scale."""
        if self._validate_args:
            self._validate_sample(value)
        p = self.p
        norm = (1 - 1 / p) * p.log() - math.log(2) - self.scale.log() - torch.lgamma(1 / p)
        return norm - ((value - self.loc) / self.scale).abs() ** p / p

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), relatively precise in the left tail."""
        if self._validate_args:
            self._validate_sample(value)
        loc, scale, p, _, _ = self._float64()
        return self._like(_standard_cdf((value.double() - loc) / scale, p), value)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile of a probability in [0, 1] (not differentiable; computed by scipy in float64)."""
        loc, scale, p, _, _ = self._float64()
        value = torch.as_tensor(value)
        q = value.double().to(loc.device)
        if self._validate_args and not ((q >= 0) & (q <= 1)).all():
            raise ValueError("icdf: expected probabilities in [0, 1]")
        return self._like(loc + scale * _standard_icdf(q, p), value)

    def entropy(self) -> Tensor:
        """Differential entropy in nats."""
        _, scale, p, _, _ = self._float64()
        return self._like(_log_z(scale, p) + 1 / p)


class RectifiedGeneralizedGaussian(GeneralizedGaussian):
    """RGN_p(loc, scale): the law of max(X, 0) for X ~ GN_p(loc, scale), a mixture of an atom at zero and a density above it.

    Args: those of `GeneralizedGaussian`; `loc` and `scale` are those of X, before rectification.

    Attributes:
        l0: P(Y > 0), the expected density (fraction of non-zeros) in (0, 1); one half at loc = 0 for every p and scale.

    Example:
        >>> law = RectifiedGeneralizedGaussian(-1.0, sigma_gn(1.0), 1.0)
        >>> round(float(law.l0), 4), round(float(law.mean), 4), round(float(law.variance), 4), round(float(law.entropy()), 3)
        (0.1216, 0.086, 0.1142, 0.449)
        >>> bool((law.sample((1000,)) >= 0).all())
        True
    """

    support = constraints.nonnegative

    @property
    def l0(self) -> Tensor:
        _, _, p, a, _ = self._float64()
        return self._like(_standard_cdf(a, p))

    def _moments(self) -> tuple[Tensor, Tensor]:
        """E[Y] and E[Y^2] in float64."""
        loc, scale, p, a, t = self._float64()
        active = _standard_cdf(a, p)
        first = torch.exp(p.log() / p + torch.lgamma(2 / p) - torch.lgamma(1 / p)) * gammaincc(2 / p, t) / 2
        second = torch.exp(2 * p.log() / p + torch.lgamma(3 / p) - torch.lgamma(1 / p)) / 2
        upper = torch.where(loc > 0, 1 + gammainc(3 / p, t), gammaincc(3 / p, t))
        return loc * active + scale * first, loc**2 * active + 2 * loc * scale * first + scale**2 * second * upper

    @property
    def mean(self) -> Tensor:
        return self._like(self._moments()[0])

    @property
    def variance(self) -> Tensor:
        mean, square = self._moments()
        return self._like(square - mean**2)

    @property
    def second_moment(self) -> Tensor:
        """E[Y^2], the value of RDMReg for an embedding that is zero everywhere."""
        return self._like(self._moments()[1])

    def sample(self, sample_shape: Any = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        return super().sample(sample_shape, generator).clamp_(min=0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to (Lebesgue measure + point mass at 0): log f(y) for y > 0, log P(Y = 0) at 0, -inf below."""
        continuous = super().log_prob(value)
        _, _, p, a, _ = self._float64()
        atom = self._like(_standard_cdf(-a, p).log(), value)
        below = torch.full_like(continuous, -math.inf)
        return torch.where(value > 0, continuous, torch.where(value == 0, atom, below))

    def cdf(self, value: Tensor) -> Tensor:
        """P(Y <= value): zero below 0, a jump of 1 - l0 at 0."""
        loc, scale, p, _, _ = self._float64()
        below = self._like(_standard_cdf((value.double() - loc) / scale, p), value)
        return torch.where(value < 0, torch.zeros_like(below), below)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile: 0 up to probability 1 - l0, above it the quantile of X."""
        return super().icdf(value).clamp(min=0)

    def entropy(self) -> Tensor:
        """d(xi)-entropy in nats: binary entropy of the atom plus l0 times the differential entropy of the truncated part."""
        _, scale, p, a, t = self._float64()
        active, zero = _standard_cdf(a, p), _standard_cdf(-a, p)
        edge = a / p * torch.exp((1 - 1 / p) * p.log() - math.log(2) - torch.lgamma(1 / p) - t)
        # (1 - l0) ln(1 - l0); at negative mu 1 - l0 itself would round to 1
        atom = torch.where(a < 0, torch.special.xlog1py(zero, -active), torch.special.xlogy(zero, zero))
        return self._like(active * (_log_z(scale, p) + 1 / p) - edge - atom)


def _standard_cdf(a: Tensor, p: Tensor) -> Tensor:
    """Distribution function of GN_p(0, 1), float64."""
    t = a.abs() ** p / p
    return torch.where(a > 0, 1 + gammainc(1 / p, t), gammaincc(1 / p, t)) / 2


def _standard_icdf(q: Tensor, p: Tensor) -> Tensor:
    """Quantile of GN_p(0, 1), float64; torch has no inverse of the incomplete gamma function."""
    q_, p_ = np.broadcast_arrays(q.cpu().numpy(), p.detach().cpu().numpy())
    tail = 2 * np.minimum(q_, 1 - q_)
    size = (p_ * special.gammainccinv(1 / p_, tail)) ** (1 / p_)
    return torch.as_tensor(np.where(q_ < 0.5, -size, size)).to(q.device)


def _log_z(scale: Tensor, p: Tensor) -> Tensor:
    """ln of the normalising constant 2 sigma Gamma(1/p) p^(1/p - 1)."""
    return math.log(2) + scale.log() + torch.lgamma(1 / p) + (1 / p - 1) * p.log()


def _positive(name: str, value: float) -> float:
    value = float(value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return value


def sigma_gn(p: float) -> float:
    """The scale that gives GN_p(mu, sigma) unit variance, before rectification: Gamma(1/p)^(1/2) / (p^(1/p) Gamma(3/p)^(1/2)).

    Args:
        p: shape > 0.

    Returns:
        sigma; it does not depend on mu.

    Raises:
        ValueError: `p` is not a finite positive number, or so small (below about 0.01) that sigma is no longer a float64.

    Example:
        >>> round(sigma_gn(1.0), 6), round(sigma_gn(2.0), 6)
        (0.707107, 1.0)
    """
    p = _positive("p", p)
    log_sigma = 0.5 * (math.lgamma(1 / p) - math.lgamma(3 / p)) - math.log(p) / p if p > 1e-300 else -math.inf
    if not -700 < log_sigma < 700:
        raise ValueError(f"p: {p} is too small; unit variance needs a scale outside the range of float64 (use p >= 0.01)")
    return math.exp(log_sigma)


def sigma_rgn(p: float, mu: float) -> float:
    """The scale that gives RGN_p(mu, sigma) unit variance, *after* rectification (root of a function increasing in sigma).

    With it, negative mu gives far denser codes than with `sigma_gn`: it is not a drop-in replacement.

    Args:
        p: shape > 0.
        mu: location before rectification, finite.

    Raises:
        ValueError: a parameter out of range, or no root in float64.

    Example:
        >>> round(sigma_rgn(1.0, 0.0), 4)
        1.1547
    """
    p, mu = _positive("p", p), float(mu)
    if not math.isfinite(mu):
        raise ValueError(f"mu: expected a finite number, got {mu}")

    def excess(log_sigma: float) -> float:
        law = RectifiedGeneralizedGaussian(torch.tensor(mu, dtype=torch.float64), math.exp(log_sigma), p, validate_args=False)
        return float(law.variance) - 1.0

    start = math.log(sigma_gn(p))
    low, high = start - 1.0, start + 1.0
    for _ in range(60):
        if excess(low) > 0:
            low -= 1.0
        elif excess(high) < 0:
            high += 1.0
        else:
            return math.exp(optimize.brentq(excess, low, high, xtol=1e-14, rtol=1e-14))
    raise ValueError(f"sigma_rgn: no scale gives unit variance for p = {p}, mu = {mu}")


def mu_for_density(density: float, p: float, scale: float | None = None) -> float:
    """The location mu at which RGN_p(mu, scale) has the asked density P(Y > 0).

    Args:
        density: expected fraction of non-zeros, strictly between 0 and 1.
        p: shape > 0.
        scale: sigma > 0; `sigma_gn(p)` when None.

    Raises:
        ValueError: a parameter out of range.

    Example:
        >>> round(mu_for_density(0.1, 1.0), 3), round(mu_for_density(0.05, 2.0), 3)
        (-1.138, -1.645)
    """
    density, p = float(density), _positive("p", p)
    if not 0 < density < 1:
        raise ValueError(f"density: expected a number strictly between 0 and 1, got {density}")
    sigma = sigma_gn(p) if scale is None else _positive("scale", scale)
    quantile = _standard_icdf(torch.tensor(density, dtype=torch.float64), torch.tensor(p, dtype=torch.float64))
    return sigma * float(quantile)
