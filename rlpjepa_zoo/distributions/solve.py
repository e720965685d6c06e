"""Scale of unit variance, and location of a given density."""

from __future__ import annotations

import math

import torch
from scipy import optimize

from . import standard
from .laws import RectifiedGeneralizedGaussian

__all__ = ["mu_for_density", "sigma_gn", "sigma_rgn"]


def _real(name: str, value: float) -> float:
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def _positive(name: str, value: float) -> float:
    number = _real(name, value)
    if number <= 0:
        raise ValueError(f"{name}: expected a finite number > 0, got {number}")
    return number


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
    p, mu = _positive("p", p), _real("mu", mu)

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
    quantile = standard.icdf(torch.tensor(density, dtype=torch.float64), torch.tensor(p, dtype=torch.float64))
    return sigma * float(quantile)
