"""The two laws as `torch.distributions.Distribution`. Closed forms are computed in float64 whatever the dtype of the parameters."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from . import standard

__all__ = ["GeneralizedGaussian", "RectifiedGeneralizedGaussian"]

Number = float | Tensor
LARGEST = 1e300  # of |loc| / scale; a quotient of two float64 can overflow


def _broadcast(**parameters: Number) -> list[Tensor]:
    """Parameters as tensors of one shape and one floating dtype, to which all given tensors promote: integers become the default dtype."""
    tensors = [x for x in parameters.values() if isinstance(x, Tensor)]
    dtype, device = functools.reduce(torch.promote_types, [x.dtype for x in tensors]), tensors[0].device
    if dtype.is_complex:
        name = next(name for name, x in parameters.items() if isinstance(x, Tensor) and x.is_complex())
        raise ValueError(f"{name}: expected real numbers, got a complex tensor")
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    given = (x.to(dtype) if isinstance(x, Tensor) else torch.tensor(float(x), dtype=dtype, device=device) for x in parameters.values())
    return list(torch.broadcast_tensors(*given))


class GeneralizedGaussian(Distribution):
    """GN_p(loc, scale), the generalized Gaussian with shape `p`.

    Args:
        loc: mean mu, any real; scalar or tensor.
        scale: sigma > 0, same unit as `loc`; scalar or tensor. The variance is p^(2/p) sigma^2 Gamma(3/p) / Gamma(1/p).
        p: shape > 0 (1 Laplace, 2 normal, < 1 heavier tails); scalar or tensor. The three broadcast together, in the dtype to
            which the tensors among them promote; integers become torch's default dtype. Three Python numbers are stored in float64, so that
            the closed forms lose nothing; samples then have torch's default dtype.
        validate_args: check parameters and values unless False. None checks too, whatever torch's global default is: importing torch._dynamo
            (torch.compile) turns that default off.

    Raises:
        ValueError: a parameter out of its range.

    Example:
        >>> from rlpjepa_zoo.distributions import sigma_gn
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
        one = p.detach() if isinstance(p, Tensor) else p
        # one p for all elements has fast sampling paths
        self._shape_is = float(one) if not isinstance(one, Tensor) or one.numel() == 1 else None
        self._sample_dtype: torch.dtype | None = None
        if any(isinstance(x, Tensor) for x in (loc, scale, p)):
            self.loc, self.scale, self.p = _broadcast(loc=loc, scale=scale, p=p)
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

    def _float64(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """loc, scale, p and a = loc/scale in float64."""
        loc, scale, p = self.loc.double(), self.scale.double(), self.p.double()
        return loc, scale, p, (loc / scale).clamp(-LARGEST, LARGEST)

    def _like(self, result: Tensor, value: Tensor | None = None) -> Tensor:
        """A float64 result in the dtype to which parameters (and value) promote."""
        return result.to(self.loc.dtype if value is None else torch.result_type(value, self.loc))

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        _, scale, p, _ = self._float64()
        return self._like(scale**2 * standard.variance(p))

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
        loc, scale, p, dtype = self.loc, self.scale, self.p, torch.result_type(value, self.loc)
        if dtype.itemsize < 4:  # half precision keeps two or three digits of a logarithm
            loc, scale, p, value = loc.float(), scale.float(), p.float(), value.float()
        norm = (1 - 1 / p) * p.log() - math.log(2) - scale.log() - torch.lgamma(1 / p)
        return (norm - standard.abs_power((value - loc) / scale, p) / p).to(dtype)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), relatively precise in the left tail."""
        if self._validate_args:
            self._validate_sample(value)
        loc, scale, p, _ = self._float64()
        return self._like(standard.partial_moment((value.double() - loc) / scale, p), value)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile of a probability in [0, 1] (not differentiable; computed by scipy in float64)."""
        loc, scale, p, _ = self._float64()
        value = torch.as_tensor(value)
        q = value.double().to(loc.device)
        if self._validate_args and not ((q >= 0) & (q <= 1)).all():
            raise ValueError("icdf: expected probabilities in [0, 1]")
        return self._like(loc + scale * standard.icdf(q, p), value)

    def entropy(self) -> Tensor:
        """Differential entropy in nats."""
        _, scale, p, _ = self._float64()
        return self._like(_log_z(scale, p) + 1 / p)


class RectifiedGeneralizedGaussian(GeneralizedGaussian):
    """RGN_p(loc, scale): the law of max(X, 0) for X ~ GN_p(loc, scale), a mixture of an atom at zero and a density above it.

    Args: those of `GeneralizedGaussian`; `loc` and `scale` are those of X, before rectification.

    Attributes:
        l0: P(Y > 0), the expected density (fraction of non-zeros) in (0, 1); one half at loc = 0 for every p and scale.

    Example:
        >>> from rlpjepa_zoo.distributions import sigma_gn
        >>> law = RectifiedGeneralizedGaussian(-1.0, sigma_gn(1.0), 1.0)
        >>> round(float(law.l0), 4), round(float(law.mean), 4), round(float(law.variance), 4), round(float(law.entropy()), 3)
        (0.1216, 0.086, 0.1142, 0.449)
        >>> bool((law.sample((1000,)) >= 0).all())
        True
    """

    support = constraints.nonnegative

    @property
    def l0(self) -> Tensor:
        _, _, p, a = self._float64()
        return self._like(standard.partial_moment(a, p))

    @property
    def mean(self) -> Tensor:
        loc, scale, p, a = self._float64()
        return self._like(loc * standard.partial_moment(a, p) + scale * standard.partial_moment(a, p, 1))

    def _unit_moments(self) -> tuple[Tensor, Tensor]:
        """Variance and second moment of Y / scale.

        For a > 0 they are those of X plus W = max(-X, 0), which is the law at -a: no difference of large squares is taken.
        """
        _, _, p, a = self._float64()
        left = torch.where(a > 0, -a, a)
        zeroth, first, second = (standard.partial_moment(left, p, k) for k in range(3))
        mean, square = left * zeroth + first, left * zeroth * left + 2 * left * first + second
        v = standard.variance(p)
        return (
            torch.where(a > 0, v - square + 2 * left * mean - mean**2, square - mean**2),
            torch.where(a > 0, a**2 + v - square, square),
        )

    @property
    def variance(self) -> Tensor:
        scale = self.scale.double()
        return self._like(scale * self._unit_moments()[0] * scale)

    @property
    def second_moment(self) -> Tensor:
        """E[Y^2], the value of RDMReg for an embedding that is zero everywhere."""
        scale = self.scale.double()
        return self._like(scale * self._unit_moments()[1] * scale)

    def sample(self, sample_shape: Any = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        return super().sample(sample_shape, generator).clamp_(min=0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to (Lebesgue measure + point mass at 0): log f(y) for y > 0, log P(Y = 0) at 0, -inf below."""
        continuous = super().log_prob(value)
        _, _, p, a = self._float64()
        atom = self._like(standard.log_cdf(-a, p), value)
        below = torch.full_like(continuous, -math.inf)
        return torch.where(value > 0, continuous, torch.where(value == 0, atom, below))

    def cdf(self, value: Tensor) -> Tensor:
        """P(Y <= value): zero below 0, a jump of 1 - l0 at 0."""
        inside = super().cdf(value.clamp(min=0) if isinstance(value, Tensor) else value)
        return torch.where(value < 0, torch.zeros_like(inside), inside)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile: 0 up to probability 1 - l0, above it the quantile of X."""
        return super().icdf(value).clamp(min=0)

    def entropy(self) -> Tensor:
        """d(xi)-entropy in nats: binary entropy of the atom plus l0 times the differential entropy of the truncated part."""
        _, scale, p, a = self._float64()
        active, zero = standard.partial_moment(a, p), standard.partial_moment(-a, p)
        power = standard.abs_power(a, p) / p
        edge = a / p * torch.exp((1 - 1 / p) * p.log() - math.log(2) - torch.lgamma(1 / p) - power)
        atom = zero * standard.log_cdf(-a, p).clamp(min=-LARGEST)  # 0 times a finite number where the atom underflows
        return self._like(active * (_log_z(scale, p) + 1 / p) - edge - atom)


def _log_z(scale: Tensor, p: Tensor) -> Tensor:
    """ln of the normalising constant 2 sigma Gamma(1/p) p^(1/p - 1)."""
    return math.log(2) + scale.log() + torch.lgamma(1 / p) + (1 / p - 1) * p.log()
