"""The generalized Gaussian and its rectification against scipy, quadrature and reference tables."""

import math
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from rlpjepa_zoo.distributions import GeneralizedGaussian, RectifiedGeneralizedGaussian, mu_for_density, sigma_gn, sigma_rgn

SHAPES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
PLACES = (-3.0, -2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0)
LAWS = (GeneralizedGaussian, RectifiedGeneralizedGaussian)
GRID = [(p, mu) for p in SHAPES for mu in PLACES]
SAMPLED = [(0.5, -1.0), (0.5, 0.0), (0.7, -0.5), (0.7, 1.0), (1.0, -2.0), (1.0, 0.25), (1.5, 0.0), (2.0, -1.0), (2.0, 0.5), (8.0, -0.3)]
DRAWS = 200_000


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def gg(p: float, mu: float, sigma: float | None = None) -> GeneralizedGaussian:
    return GeneralizedGaussian(f64(mu), sigma_gn(p) if sigma is None else sigma, p)


def rgg(p: float, mu: float, sigma: float | None = None) -> RectifiedGeneralizedGaussian:
    return RectifiedGeneralizedGaussian(f64(mu), sigma_gn(p) if sigma is None else sigma, p)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative(expected: float, tolerance: float = 1e-9) -> Any:
    return pytest.approx(expected, rel=tolerance, abs=0)


def close(got: Tensor | float, expected: float, tolerance: float = 1e-9) -> None:
    assert float(got) == pytest.approx(expected, rel=tolerance, abs=tolerance)


# --- closed forms ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [None, 1.7])
@pytest.mark.parametrize(("p", "mu"), GRID)
def test_unrectified_closed_forms_equal_scipy(p: float, mu: float, sigma: float | None) -> None:
    ours, theirs = gg(p, mu, sigma), oracles.law(p, mu, sigma or oracles.sigma_gn(p))
    close(ours.mean, theirs.mean())
    close(ours.variance, theirs.var())
    close(ours.stddev, theirs.std())
    close(ours.entropy(), theirs.entropy())
    x = np.linspace(mu - 6, mu + 6, 41)
    np.testing.assert_allclose(ours.log_prob(torch.from_numpy(x)), theirs.logpdf(x), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.cdf(torch.from_numpy(x)), theirs.cdf(x), rtol=1e-9, atol=0)
    q = np.array([1e-12, 1e-6, 0.01, 0.2, 0.5, 0.7, 0.99, 1 - 1e-6])
    np.testing.assert_allclose(ours.icdf(torch.from_numpy(q)), theirs.ppf(q), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", [None, 1.7])
@pytest.mark.parametrize(("p", "mu"), GRID)
def test_rectified_closed_forms_equal_quadrature(p: float, mu: float, sigma: float | None) -> None:
    ours, theirs = rgg(p, mu, sigma), oracles.rectified(p, mu, sigma or oracles.sigma_gn(p))
    close(ours.l0, theirs["l0"])
    close(ours.mean, theirs["mean"])
    close(ours.second_moment, theirs["second"])
    close(ours.variance, theirs["variance"])
    close(ours.entropy(), theirs["entropy"])


@pytest.mark.parametrize(("p", "mu"), GRID)
def test_rectified_functions_equal_scipy(p: float, mu: float) -> None:
    ours, theirs = rgg(p, mu), oracles.law(p, mu, oracles.sigma_gn(p))
    y = np.linspace(0.01, 6, 31)
    np.testing.assert_allclose(ours.log_prob(torch.from_numpy(y)), theirs.logpdf(y), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.cdf(torch.from_numpy(y)), theirs.cdf(y), rtol=1e-9)
    close(ours.log_prob(f64(0.0)), theirs.logcdf(0.0))
    close(ours.cdf(f64(0.0)), theirs.cdf(0.0))
    q = np.array([0.0, 0.01, 0.3, 0.6, 0.95, 1 - 1e-6])
    np.testing.assert_allclose(ours.icdf(torch.from_numpy(q)), np.maximum(theirs.ppf(q), 0), rtol=1e-9, atol=1e-9)


def test_rectified_law_puts_nothing_below_zero() -> None:
    free = RectifiedGeneralizedGaussian(0.5, 1.0, 1.0, validate_args=False)
    assert float(free.log_prob(torch.tensor(-0.1))) == -math.inf
    assert float(rgg(1.0, 0.5).cdf(f64(-0.1))) == 0.0
    with pytest.raises(ValueError, match="support"):
        rgg(1.0, 0.5).log_prob(f64(-0.1))


@pytest.mark.parametrize("p", SHAPES)
@pytest.mark.parametrize("sigma", [0.1, 1.0, 5.0])
def test_l0_of_a_centred_law_is_one_half(p: float, sigma: float) -> None:
    assert float(rgg(p, 0.0, sigma).l0) == 0.5


@pytest.mark.parametrize("p", SHAPES)
def test_quantile_inverts_the_distribution_function(p: float) -> None:
    q = torch.tensor([1e-15, 1e-4, 0.3, 0.5, 0.8, 0.999], dtype=torch.float64)
    torch.testing.assert_close(gg(p, -0.7).cdf(gg(p, -0.7).icdf(q)), q, rtol=1e-9, atol=0)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("q", [-0.01, 1.01, math.nan])
def test_quantile_outside_zero_and_one_is_refused(law: type, q: float) -> None:
    with pytest.raises(ValueError, match="probabilities"):
        law(0.0, 1.0, 1.0).icdf(torch.tensor(q))


def test_quantiles_of_zero_and_one_bound_the_support() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert gg(1.5, 0.3).icdf(ends).tolist() == [-math.inf, math.inf]
    assert rgg(1.5, 0.3).icdf(ends).tolist() == [0.0, math.inf]


@pytest.mark.parametrize("p", [0.7, 1.0, 2.0, 3.0])
def test_log_prob_is_differentiable_in_value_loc_and_scale(p: float) -> None:
    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([0.4, 2.0], [-0.3, 0.1], [0.8, 1.2])]
    for law in LAWS:
        assert torch.autograd.gradcheck(lambda y, mu, sigma, law=law: law(mu, sigma, p).log_prob(y), inputs)


# --- reference tables ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "sigma"),
    [(0.25, 0.099252), (0.5, 0.365148), (0.75, 0.566148), (1, 0.707107), (1.5, 0.888043), (2, 1.0), (3, 1.134857)],
)
def test_sigma_gn_equals_the_table(p: float, sigma: float) -> None:
    assert sigma_gn(p) == pytest.approx(sigma, abs=6e-7)


@pytest.mark.parametrize("p", [0.05, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 8.0, 50.0])
def test_sigma_gn_gives_unit_variance(p: float) -> None:
    close(gg(p, 0.0).variance, 1.0, 1e-12)
    close(oracles.law(p, 0.0, sigma_gn(p)).var(), 1.0)


SIGMA_RGN = {
    0.5: ".4753/.893/1.131 .5125/.794/.728 .5601/.500/.420 .6254/.233/.302 .6877/.153/.247 .7979/.088/.189 .8946/.060/.157",
    1.0: ".8812/.839/1.142 1.0010/.697/.804 1.1547/.500/.577 1.3265/.343/.455 1.4960/.256/.383 1.8129/.166/.301 2.1041/.120/.253",
    2.0: "1.2046/.797/1.137 1.4313/.637/.856 1.7129/.500/.683 2.0078/.402/.576 2.3003/.332/.503 2.8641/.243/.410 3.3999/.189/.353",
}
SIGMA_RGN_CELLS = [
    (p, mu, cell) for p, row in SIGMA_RGN.items() for mu, cell in zip((1, 0.5, 0, -0.5, -1, -2, -3), row.split(), strict=True)
]


@pytest.mark.parametrize(("p", "mu", "cell"), SIGMA_RGN_CELLS)
def test_sigma_rgn_equals_the_table(p: float, mu: float, cell: str) -> None:
    sigma, l0, mean = map(float, cell.split("/"))
    law = rgg(p, mu, sigma_rgn(p, mu))
    assert float(law.scale) == pytest.approx(sigma, abs=6e-5)
    assert float(law.l0) == pytest.approx(l0, abs=6e-4)
    assert float(law.mean) == pytest.approx(mean, abs=6e-4)
    close(oracles.rectified(p, float(mu), float(law.scale))["variance"], 1.0)


THEORY = {
    1: ".9213 .6486 1.0796 .6315 .914|.8784 .6278 1.0860 .6991 1.267|.8413 .6098 1.0833 .7511 1.365",
    0.5: ".8392 .4295 .6362 .5377 .863|.7535 .4531 .6743 .5487 1.186|.6915 .4680 .6978 .5534 1.256",
    0.25: ".7463 .2825 .4367 .4845 .827|.6489 .3490 .4983 .4631 1.117|.5987 .3926 .5363 .4451 1.168",
    0: ".5000 .1500 .2739 .4250 .843|.5000 .2500 .3536 .3750 1.020|.5000 .3183 .3989 .3408 1.056",
    -0.5: ".1608 .0604 .1362 .2889 .571|.2465 .1233 .1743 .2161 .720|.3085 .1866 .1978 .1705 .781",
    -1: ".0787 .0313 .0796 .1965 .354|.1216 .0608 .0860 .1142 .449|.1587 .0921 .0833 .0684 .492",
    -2: ".0263 .0110 .0330 .0976 .154|.0296 .0148 .0209 .0291 .153|.0228 .0125 .0085 .0057 .109",
    -3: ".0109 .0047 .0157 .0523 .075|.0072 .0036 .0051 .0072 .047|.0013 .0007 .0004 .0002 .010",
}
THEORY_CELLS = [(p, mu, cell) for mu, row in THEORY.items() for p, cell in zip((0.5, 1.0, 2.0), row.split("|"), strict=True)]


@pytest.mark.parametrize(("p", "mu", "cell"), THEORY_CELLS)
def test_rectified_law_equals_the_theory_table(p: float, mu: float, cell: str) -> None:
    l0, m_l1, mean, variance, entropy = map(float, cell.split())
    law = rgg(p, mu)
    assert float(law.l0) == pytest.approx(l0, abs=6e-5)
    assert float(law.mean**2 / law.second_moment) == pytest.approx(m_l1, abs=6e-5)
    assert float(law.mean) == pytest.approx(mean, abs=6e-5)
    assert float(law.variance) == pytest.approx(variance, abs=6e-5)
    assert float(law.entropy()) == pytest.approx(entropy, abs=6e-4)


@pytest.mark.parametrize(
    ("p", "mu", "l0"),
    [(1, -1.5, 0.0599), (1, -2.5, 0.0146)]
    + list(zip([0.75] * 7, (1, 0.5, 0, -0.5, -1, -2, -3), (0.8958, 0.7873, 0.5, 0.2127, 0.1042, 0.0295, 0.0094), strict=True)),
)
def test_density_equals_the_other_table_values(p: float, mu: float, l0: float) -> None:
    assert float(rgg(p, mu).l0) == pytest.approx(l0, abs=6e-5)


MU_FOR_DENSITY = [
    (1, 0.9, 1.138), (1, 0.75, 0.490), (1, 0.25, -0.490), (1, 0.1, -1.138), (1, 0.05, -1.628), (1, 0.03, -1.989), (1, 0.01, -2.766),
    (2, 0.1, -1.2816), (2, 0.05, -1.645), (2, 0.01, -2.326), (0.5, 0.1, -0.819), (0.5, 0.05, -1.381), (0.5, 0.01, -3.107),
]  # fmt: skip


@pytest.mark.parametrize(("p", "density", "mu"), MU_FOR_DENSITY)
def test_mu_for_density_equals_the_table(p: float, density: float, mu: float) -> None:
    assert mu_for_density(density, p) == pytest.approx(mu, abs=6e-4)


@pytest.mark.parametrize("density", [1e-8, 0.003, 0.05, 0.3, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("p", SHAPES)
def test_mu_for_density_inverts_l0(p: float, density: float) -> None:
    for sigma in (None, 1.7):
        law = rgg(p, mu_for_density(density, p, sigma), sigma)
        assert float(law.l0) == relative(density)


# --- the tail -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [-5.0, -15.0, -50.0])
@pytest.mark.parametrize("quantity", ["l0", "mean", "variance", "entropy"])
def test_far_negative_mu_keeps_relative_precision(quantity: str, mu: float) -> None:
    sigma = math.sqrt(0.5)
    value = getattr(rgg(1.0, mu, sigma), quantity)
    assert float(value() if callable(value) else value) == relative(oracles.laplace_tail(mu, sigma)[quantity])


@pytest.mark.parametrize("a", [-5.0, -10.0, -30.0])
def test_far_negative_mu_of_the_normal_keeps_relative_precision(a: float) -> None:
    assert float(rgg(2.0, a).l0) == relative(float(special.ndtr(a)))
    assert float(rgg(2.0, a).log_prob(f64(0.5))) == relative(float(stats.norm(a).logpdf(0.5)), 1e-12)


@pytest.mark.parametrize("p", [0.5, 0.75, 1.5, 3.0])
def test_far_negative_mu_agrees_with_relative_quadrature(p: float) -> None:
    mu = mu_for_density(1e-12, p)
    law, expected = rgg(p, mu), oracles.rectified(p, mu, sigma_gn(p))
    assert float(law.l0) == relative(expected["l0"])
    assert float(law.mean) == relative(expected["mean"])
    assert float(law.variance) == relative(expected["variance"])


def test_float32_parameters_do_not_lose_the_tail() -> None:
    law = RectifiedGeneralizedGaussian(torch.tensor(-20.0), 0.75, 1.0)
    assert float(law.l0) == relative(oracles.laplace_tail(-20.0, 0.75)["l0"], 1e-6)


# --- sampling -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "mu"), SAMPLED)
def test_sample_moments_fit_four_standard_errors(p: float, mu: float) -> None:
    expected = oracles.rectified(p, mu, oracles.sigma_gn(p))
    y = RectifiedGeneralizedGaussian(mu, sigma_gn(p), p).sample((DRAWS,), source()).double()
    assert bool((y >= 0).all())
    spread = (y - expected["mean"]).square()
    for values, key in ((y, "mean"), (spread, "variance"), (y.square(), "second"), ((y > 0).double(), "l0")):
        assert abs(float(values.mean()) - expected[key]) < 4 * float(values.std()) / DRAWS**0.5


@pytest.mark.parametrize(("p", "mu"), SAMPLED)
def test_unrectified_sample_moments_fit_four_standard_errors(p: float, mu: float) -> None:
    x = GeneralizedGaussian(mu, sigma_gn(p), p).sample((DRAWS,), source(1)).double()
    for values, expected in ((x, mu), ((x - mu).square(), 1.0), ((x - mu).sign(), 0.0)):
        assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / DRAWS**0.5


@pytest.mark.parametrize(("p", "mu"), SAMPLED)
def test_sample_passes_kolmogorov_smirnov(p: float, mu: float) -> None:
    theirs = oracles.law(p, mu, oracles.sigma_gn(p))
    x = GeneralizedGaussian(mu, sigma_gn(p), p).sample((50_000,), source(2)).double().numpy()
    assert stats.kstest(x, theirs.cdf).pvalue > 1e-3
    y = RectifiedGeneralizedGaussian(mu, sigma_gn(p), p).sample((50_000,), source(3)).double().numpy()
    assert stats.kstest(y[y > 0], lambda v: (theirs.cdf(v) - theirs.cdf(0)) / theirs.sf(0)).pvalue > 1e-3


@pytest.mark.parametrize(("p", "mu"), SAMPLED)
def test_rectified_sample_is_the_clamped_unrectified_one(p: float, mu: float) -> None:
    x, y = (law(mu, sigma_gn(p), p).sample((1000,), source()) for law in LAWS)
    assert torch.equal(x.clamp(min=0), y)


@pytest.mark.parametrize("p", [0.7, 1.0, 2.0])
def test_batched_p_draws_the_law_of_the_fast_paths(p: float) -> None:
    batched = GeneralizedGaussian(0.0, sigma_gn(p), torch.tensor([p, p])).sample((40_000,), source(4))
    assert stats.kstest(batched.double().flatten().numpy(), oracles.law(p, 0.0, oracles.sigma_gn(p)).cdf).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_laplace_tail_is_not_cut(dtype: torch.dtype) -> None:
    x = GeneralizedGaussian(torch.tensor(0.0, dtype=dtype), 1.0, 1.0).sample((2_000_000,), source())
    assert x.dtype == dtype
    assert 12 < float(x.abs().max()) < 25
    assert bool(torch.isfinite(x).all())
    beyond = float((x.double().abs() > 9.03).double().mean())
    assert beyond == relative(math.exp(-9.03), 0.25)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 8.0])
def test_sample_depends_on_its_generator_only(p: float) -> None:
    law = RectifiedGeneralizedGaussian(0.2, 1.0, p)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = law.sample((64,), source(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, law.sample((64,), source(5)))
    assert not torch.equal(first, law.sample((64,), source(6)))


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_sample_without_generator_follows_the_global_one(p: float) -> None:
    law = GeneralizedGaussian(0.0, 1.0, p)
    torch.manual_seed(7)
    first, second = law.sample((64,)), law.sample((64,))
    torch.manual_seed(7)
    assert torch.equal(first, law.sample((64,)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0, 2.0, 8.0])
def test_sample_stays_on_the_device_of_its_parameters(p: float) -> None:
    law = RectifiedGeneralizedGaussian(torch.zeros(3, device="meta"), 1.0, p, validate_args=False)
    drawn = law.sample((5,))
    assert drawn.device.type == "meta" and drawn.shape == (5, 3)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_sample_has_no_gradient(p: float) -> None:
    law = RectifiedGeneralizedGaussian(torch.zeros(3, requires_grad=True), 1.0, p)
    assert not law.sample((2,)).requires_grad
    with pytest.raises(NotImplementedError):
        law.rsample((2,))


# --- shapes and dtypes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_parameters(law: type, dtype: torch.dtype) -> None:
    x = law(torch.tensor([0.3, -1.0], dtype=dtype), 1.0, 1.5)
    value = torch.tensor([0.5, 1.0], dtype=dtype)
    results = [x.mean, x.variance, x.entropy(), x.log_prob(value), x.cdf(value), x.icdf(value / 2), x.sample(generator=source())]
    if law is RectifiedGeneralizedGaussian:
        results += [x.l0, x.second_moment]
    assert {r.dtype for r in results} == {dtype}
    assert {r.shape for r in results} == {torch.Size([2])}


@pytest.mark.parametrize("law", LAWS)
def test_parameters_broadcast(law: type) -> None:
    mu, sigma, p = torch.tensor([[-1.0], [0.5]], dtype=torch.float64), 0.9, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    batched = law(mu, sigma, p)
    assert batched.batch_shape == (2, 3) and batched.event_shape == ()
    assert batched.sample((4,), source()).shape == (4, 2, 3)
    value = torch.tensor(0.7, dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            one = law(mu[i, 0], sigma, p[j])
            for get in (
                lambda x: x.mean,
                lambda x: x.variance,
                lambda x: x.entropy(),
                lambda x: x.cdf(value),
                lambda x: x.log_prob(value),
                lambda x: x.icdf(value),
            ):
                close(get(batched)[i, j], float(get(one)), 1e-14)


def test_batched_sample_follows_each_law() -> None:
    mu, p = torch.tensor([-0.5, 0.0, 0.5]), torch.tensor([0.5, 1.0, 3.0])
    sigma = torch.tensor([sigma_gn(float(x)) for x in p])
    y = RectifiedGeneralizedGaussian(mu, sigma, p).sample((DRAWS,), source()).double()
    for column, m, shape in zip(y.T, mu, p, strict=True):
        expected = oracles.rectified(float(shape), float(m), oracles.sigma_gn(float(shape)))
        assert abs(float(column.mean()) - expected["mean"]) < 4 * float(column.std()) / DRAWS**0.5
        assert abs(float((column > 0).double().mean()) - expected["l0"]) < 2 / DRAWS**0.5


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_expand_keeps_the_law(law: type, p: float) -> None:
    x = law(f64(-0.3), 0.8, p)
    wide = x.expand((4, 2))
    assert type(wide) is law and wide.batch_shape == (4, 2)
    assert torch.equal(wide.variance, x.variance.expand(4, 2))
    assert torch.equal(wide.sample((3,), source()), x.sample((3, 4, 2), source()))
    with pytest.raises(ValueError, match="support"):
        wide.log_prob(torch.full((4, 2), math.nan, dtype=torch.float64))


# --- refusals -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    ("position", "bad"),
    [(i, bad) for i in range(3) for bad in (math.nan, math.inf, -math.inf)] + [(i, bad) for i in (1, 2) for bad in (0.0, -1.0)],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_invalid_parameter_is_refused(law: type, position: int, bad: float, tensor: bool) -> None:
    arguments: list[float | Tensor] = [0.0, 1.0, 1.0]
    arguments[position] = torch.tensor([1.0, bad]) if tensor else bad
    with pytest.raises(ValueError, match=("loc", "scale", "p")[position]):
        law(*arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0, 1e-4])
def test_sigma_refuses_an_impossible_shape(bad: float) -> None:
    with pytest.raises(ValueError, match="p"):
        sigma_gn(bad)
    with pytest.raises(ValueError, match="p"):
        sigma_rgn(bad, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sigma_rgn_refuses_an_infinite_location(bad: float) -> None:
    with pytest.raises(ValueError, match="mu"):
        sigma_rgn(1.0, bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, 1.0, -0.1, 1.1])
def test_density_outside_the_open_unit_interval_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="density"):
        mu_for_density(bad, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_mu_for_density_refuses_a_bad_shape_or_scale(bad: float) -> None:
    with pytest.raises(ValueError, match="p"):
        mu_for_density(0.1, bad)
    with pytest.raises(ValueError, match="scale"):
        mu_for_density(0.1, 1.0, bad)


@pytest.mark.parametrize("law", LAWS)
def test_arguments_are_validated_when_torch_s_default_is_off(law: type) -> None:
    """torch.compile turns the default off for the whole process."""
    default = torch.distributions.Distribution._validate_args
    try:
        torch.distributions.Distribution.set_default_validate_args(False)
        with pytest.raises(ValueError, match="scale"):
            law(0.0, -1.0, 1.0)
        with pytest.raises(ValueError, match="p: expected finite"):
            law(0.0, 1.0, math.inf)
        with pytest.raises(ValueError, match="support"):
            law(0.0, 1.0, 1.0).expand((2,)).log_prob(torch.tensor([math.nan, 1.0]))
        law(0.0, -1.0, 1.0, validate_args=False)
    finally:
        torch.distributions.Distribution.set_default_validate_args(default)
