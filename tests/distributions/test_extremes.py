"""The laws at extreme parameters, dtypes and values, against arithmetic of 50 digits."""

import math
from typing import Any

import mpmath as mp
import pytest
import torch
from torch import Tensor

from rlpjepa_zoo.distributions import GeneralizedGaussian, RectifiedGeneralizedGaussian, mu_for_density, sigma_gn, sigma_rgn

LAWS = (GeneralizedGaussian, RectifiedGeneralizedGaussian)
RATIOS = (-400.0, -40.0, -10.0, -2.0, -1.01, -0.9, -1e-8, 0.0, 0.5, 1.1, 10.0, 40.0, 1e8)
CASES = [(p, a) for p in (0.05, 0.5, 1.0, 2.0, 8.0, 100.0) for a in RATIOS] + [(1e4, a) for a in (-1.01, -1.0, -0.99, 0.0, 0.999, 1.01)]


def f64(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def fifty_digits() -> Any:
    with mp.workdps(50):
        yield


def cdf(a: float, p: float) -> tuple[Any, Any]:
    """P(U <= a) and P(U > a) of GN_p(0, 1), each from the smaller tail."""
    size, shape = abs(mp.mpf(a)), mp.mpf(p)
    tail = mp.gammainc(1 / shape, size**shape / shape, mp.inf, regularized=True) / 2
    return (1 - tail, tail) if a > 0 else (tail, 1 - tail)


def exact(a: float, p: float) -> dict[str, Any]:
    """Figures of max(U + a, 0)."""
    shape, t = mp.mpf(p), abs(mp.mpf(a)) ** mp.mpf(p) / mp.mpf(p)
    active, zero = cdf(a, p)
    upper = [mp.gammainc((k + 1) / shape, t, mp.inf, regularized=True) for k in range(3)]
    first, second = (shape ** (k / shape) * mp.gamma((k + 1) / shape) / mp.gamma(1 / shape) / 2 for k in (1, 2))
    mean = a * active + first * upper[1]
    square = mp.mpf(a) ** 2 * active + 2 * a * first * upper[1] + second * (2 - upper[2] if a > 0 else upper[2])
    log_peak = (1 - 1 / shape) * mp.log(shape) - mp.log(2) - mp.loggamma(1 / shape)
    log_zero = mp.log1p(-active) if a < 0 else mp.log(zero)
    return {
        "l0": active,
        "mean": mean,
        "second_moment": square,
        "variance": square - mean**2,
        "log_zero": log_zero,
        "entropy": active * (1 / shape - log_peak) - a / shape * mp.exp(log_peak - t) - (zero * log_zero if zero else 0),
    }


def relative(got: Tensor | float, expected: Any, tolerance: float) -> None:
    expected = float(expected)  # 0 and infinity beyond the range of float64
    assert float(got) == pytest.approx(expected, rel=tolerance, abs=1e-300)


@pytest.mark.parametrize(("p", "a"), CASES)
def test_figures_at_extreme_ratios_and_shapes(p: float, a: float) -> None:
    law, expected = RectifiedGeneralizedGaussian(a, 1.0, p), exact(a, p)
    relative(law.l0, expected["l0"], 1e-10)
    relative(law.mean, expected["mean"], 1e-9)
    relative(law.entropy(), expected["entropy"], 1e-10)
    relative(law.second_moment, expected["second_moment"], 2e-8)
    relative(law.variance, expected["variance"], 2e-8)


@pytest.mark.parametrize(("p", "a"), [*CASES, (0.25, -1e4), (0.5, 1e8), (2.0, -1e6), (2.0, 1e6)])
def test_the_logarithm_of_the_atom_is_exact_when_the_atom_is_tiny_or_nearly_one(p: float, a: float) -> None:
    """-8.7e-17 and -1993 rather than 0 and -inf."""
    relative(RectifiedGeneralizedGaussian(a, 1.0, p).log_prob(f64(0.0)), exact(a, p)["log_zero"], 1e-9)


@pytest.mark.parametrize("p", [99.0, 100.0, 1e3, 1e4, 1e6, 1e12])
@pytest.mark.parametrize("density", [1e-12, 0.01, 0.25, 0.499999, 0.5, 0.7, 1 - 1e-12])
def test_large_shapes_have_the_density_that_was_asked(p: float, density: float) -> None:
    mu, sigma = mu_for_density(density, p), sigma_gn(p)
    assert float(RectifiedGeneralizedGaussian(mu, sigma, p).l0) == pytest.approx(density, rel=2e-4 * max(p / 1e4, 1e-6), abs=0)
    if p >= 1e3 and 0.01 <= density <= 0.99:  # uniform in the limit, up to the smooth edge of relative width 1/p
        assert mu == pytest.approx((2 * density - 1) * math.sqrt(3), rel=10 / p)


@pytest.mark.parametrize(
    ("p", "q"), [(p, q) for p in (20.0, 100.0, 1e3) for q in (1e-12, 0.02, 0.3, 0.49, 1 - 1e-9)] + [(1e4, 1e-12), (1e4, 0.002)]
)
def test_quantiles_of_large_shapes(p: float, q: float) -> None:
    x = float(GeneralizedGaussian(0.0, 1.0, p).icdf(f64(q)))
    step = mp.mpf(10) ** -11
    low, high = cdf(x * (1 - step), p)[0], cdf(x * (1 + step), p)[0]
    assert min(low, high) <= q <= max(low, high)


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("density", [1e-300, 1e-12, 1e-3, 1 - 1e-12])
def test_location_of_extreme_densities(p: float, density: float) -> None:
    law = RectifiedGeneralizedGaussian(mu_for_density(density, p), sigma_gn(p), p)
    assert float(law.l0) == pytest.approx(density, rel=1e-9, abs=0)
    assert 1 - float(law.l0) == pytest.approx(1 - density, rel=1e-3, abs=1e-15)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 100.0])
@pytest.mark.parametrize("mu", [-1e20, -1e6, -40.0, 40.0, 1e6, 1e150, 1e300])
def test_unit_variance_after_rectification_at_extreme_locations(p: float, mu: float) -> None:
    sigma = sigma_rgn(p, mu)
    if mu > 1e5:
        assert sigma == pytest.approx(sigma_gn(p), rel=1e-12)
    else:
        assert sigma**2 * float(exact(mu / sigma, p)["variance"]) == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize("scale", [5e-324, 1e-200, 1e-30, 1e30, 1e150, 1e300])
@pytest.mark.parametrize("loc", [-1e300, -1.0, 0.0, 1.0, 1e300])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 100.0])
def test_no_figure_is_nan_at_any_scale(p: float, loc: float, scale: float) -> None:
    law = RectifiedGeneralizedGaussian(loc, scale, p)
    results = [law.l0, law.mean, law.variance, law.second_moment, law.entropy(), law.log_prob(f64(0.0, 1.0)), law.cdf(f64(0.0, 1.0))]
    assert not any(bool(torch.isnan(x).any()) for x in results)
    assert float(law.variance) >= 0 and float(law.second_moment) >= float(law.variance)


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
def test_figures_follow_the_scale(scale: float) -> None:
    unit, scaled = RectifiedGeneralizedGaussian(-0.7, 1.3, 1.5), RectifiedGeneralizedGaussian(-0.7 * scale, 1.3 * scale, 1.5)
    assert float(scaled.l0) == pytest.approx(float(unit.l0), rel=1e-14)
    assert float(scaled.mean) == pytest.approx(float(unit.mean) * scale, rel=1e-13)
    assert float(scaled.variance) == pytest.approx(float(unit.variance) * scale**2, rel=1e-13)
    assert float(scaled.entropy()) - float(unit.entropy()) == pytest.approx(float(unit.l0) * math.log(scale), rel=1e-12)


# --- dtypes -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integer_parameters_become_the_default_dtype(law: type, dtype: torch.dtype) -> None:
    """An integer location must not cut the scale 0.7 to 0, or 1.7 to 1."""
    for arguments in (
        (torch.tensor([0, 1], dtype=dtype), 0.7, 1.5),
        (0.25, torch.tensor(1, dtype=dtype), 1.5),
        (0.0, 0.7, torch.tensor(1).to(dtype)),
    ):
        mixed, plain = law(*arguments), law(*(torch.as_tensor(x).float() for x in arguments))
        for name in ("loc", "scale", "p"):
            assert getattr(mixed, name).dtype == torch.float32 and torch.equal(getattr(mixed, name), getattr(plain, name))
        assert torch.equal(mixed.cdf(torch.tensor(0.5)), plain.cdf(torch.tensor(0.5)))


@pytest.mark.parametrize("law", LAWS)
def test_tensors_of_several_dtypes_promote(law: type) -> None:
    x = law(torch.tensor([1, 2]), torch.tensor(0.7, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float16))
    assert {x.loc.dtype, x.scale.dtype, x.p.dtype, x.mean.dtype, x.sample().dtype} == {torch.float64}
    with pytest.raises(ValueError, match="loc: expected real numbers"):
        law(torch.tensor(1j), 1.0, 1.0)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_parameters_give_the_rounded_result(law: type, dtype: torch.dtype, tolerance: float) -> None:
    mu, sigma, y = (torch.tensor(x, dtype=dtype) for x in ([-1.0, 0.25, 2.0], 0.75, [0.01, 1.0, 7.0]))
    half, double = law(mu, sigma, 1.5), law(mu.double(), sigma.double(), 1.5)
    for got, expected in (
        (half.log_prob(y), double.log_prob(y.double())),
        (half.log_prob(y * 0), double.log_prob(y.double() * 0)),
        (half.cdf(y), double.cdf(y.double())),
        (half.icdf(y / 8), double.icdf(y.double() / 8)),
        (half.mean, double.mean),
        (half.variance, double.variance),
        (half.entropy(), double.entropy()),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=1e-7)


# --- values -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_the_distribution_function_refuses_what_is_no_number(law: type) -> None:
    x = law(torch.zeros(2), 1.0, 1.5)
    with pytest.raises(ValueError, match="support"):
        x.cdf(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="Tensor"):
        x.cdf(0.5)
    with pytest.raises(ValueError, match="broadcast"):
        x.cdf(torch.zeros(3))
    assert x.cdf(torch.tensor([-math.inf, math.inf])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_integers_beyond_float64_are_refused(number: int) -> None:
    for call in (lambda: sigma_gn(number), lambda: sigma_rgn(1.0, number), lambda: mu_for_density(0.1, 1.0, number)):
        with pytest.raises(ValueError, match="finite"):
            call()


# --- derivatives ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.0, 8.0])
@pytest.mark.parametrize("loc", [-3.0, 0.0, 0.7])
def test_closed_forms_are_differentiable_in_loc_and_scale(p: float, loc: float) -> None:
    inputs = [f64(loc).requires_grad_(), f64(0.9).requires_grad_()]
    forms = {
        "l0": lambda x: x.l0,
        "mean": lambda x: x.mean,
        "second moment": lambda x: x.second_moment,
        "variance": lambda x: x.variance,
        "cdf": lambda x: x.cdf(f64(0.4, 2.0)),
        "log of the atom": lambda x: x.log_prob(f64(0.0)),
    }
    if loc or p >= 2:  # at the cusp of the density, the entropy is no polynomial to first order
        forms["entropy"] = lambda x: x.entropy()
    for name, form in forms.items():
        law = lambda mu, sigma, form=form: form(RectifiedGeneralizedGaussian(mu, sigma, p))  # noqa: E731
        assert torch.autograd.gradcheck(law, inputs, eps=1e-7, atol=1e-4), name


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("loc", [-1e6, -40.0, 0.0, 40.0])
def test_derivatives_are_finite_at_the_atom_and_at_the_mode(p: float, loc: float) -> None:
    mu, sigma, y = f64(loc).requires_grad_(), f64(1.0).requires_grad_(), f64(0.0, max(loc, 0.0)).requires_grad_()
    law = RectifiedGeneralizedGaussian(mu, sigma, p)
    for total in (law.log_prob(y).sum(), law.l0, law.mean, law.variance, law.entropy(), law.cdf(y).sum()):
        assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(total, [mu, sigma, y], allow_unused=True) if g is not None)


@pytest.mark.parametrize("a", [-1e4, -100.0, -38.0, -5.0, 3.0])
def test_the_derivative_of_the_atom_is_right_where_its_mass_underflows(a: float) -> None:
    """d/dmu ln P(X <= 0) is minus the hazard rate; P itself is below the smallest float64 at mu = 100."""
    mu = f64(-a).requires_grad_()
    (gradient,) = torch.autograd.grad(RectifiedGeneralizedGaussian(mu, 1.0, 2.0).log_prob(f64(0.0)), mu)
    relative(gradient, -mp.npdf(a) / mp.ncdf(a), 1e-9)


def test_a_shape_that_wants_a_gradient_is_refused_by_the_closed_forms() -> None:
    p = f64(1.5).requires_grad_()
    with pytest.raises(NotImplementedError, match="p: "):
        RectifiedGeneralizedGaussian(0.3, 1.0, p).l0.backward()
