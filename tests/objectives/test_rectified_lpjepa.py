"""Invariance and loss of Rectified LpJEPA against loops, numpy and plain autograd; its floor and its draws."""

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.objectives.base import Terms, invariance
from rlpjepa_zoo.objectives.rectified_lpjepa import RectifiedLpJEPALoss


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=source(seed), dtype=dtype)


def target(p: float = 1.0, mu: float = 0.0) -> RectifiedGeneralizedGaussian:
    return RectifiedGeneralizedGaussian(mu, sigma_gn(p), p)


# --- invariance -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 2, 3, 5])
def test_invariance_equals_the_mean_over_pairs(views: int) -> None:
    z = uniform(views, 9, 7, seed=views)
    assert float(invariance(z)) == pytest.approx(oracles.invariance(z.numpy()), rel=1e-12)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_invariance_gradient_equals_finite_differences(views: int) -> None:
    assert torch.autograd.gradcheck(invariance, [uniform(views, 4, 3).requires_grad_()])


@pytest.mark.parametrize("views", [2, 3])
def test_invariance_of_equal_views_is_zero(views: int) -> None:
    z = uniform(1, 9, 7).expand(views, 9, 7)
    assert float(invariance(z)) == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize("views", [2, 3])
def test_invariance_of_half_precision_is_computed_in_float32(views: int) -> None:
    z = uniform(views, 32, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = invariance(z)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(oracles.invariance(z.double().numpy()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_invariance_of_one_view_is_a_float32_zero(dtype: torch.dtype) -> None:
    got = invariance(torch.ones(1, 256, 512, dtype=dtype))
    assert float(got) == 0.0
    assert got.dtype == torch.float32


@pytest.mark.parametrize("views", [1, 2, 3])
def test_invariance_does_not_hide_nan(views: int) -> None:
    z = uniform(views, 4, 3)
    z[0, 1, 2] = torch.nan
    assert bool(invariance(z).isnan())


# --- the objective --------------------------------------------------------------------------------------------------------------------


def objective(kind: str = "random", n: int = 64, seed: int = 3, p: float = 1.0) -> RectifiedLpJEPALoss:
    return RectifiedLpJEPALoss(target(p), kind=kind, n=n, seed=seed)


@pytest.mark.parametrize("kind", ["random", "orthogonal", "axes+random", "eigen+random"])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_loss_is_a_function_of_seed_step_and_embedding(kind: str, p: float) -> None:
    z = uniform(2, 16, 8, seed=1, dtype=torch.float32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = objective(kind, p=p)(z, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(11)
    objective(kind, p=p)(z, 4)
    again = objective(kind, p=p)
    again(z, 1)
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again(z, 5)), strict=True))
    assert float(first.parts["matching"]) != float(objective(kind, p=p)(z, 6).parts["matching"])
    assert float(first.parts["matching"]) != float(objective(kind, seed=4, p=p)(z, 5).parts["matching"])
    assert float(first.parts["invariance"]) == float(objective(kind, seed=4, p=p)(z, 6).parts["invariance"])


def tensors(terms: Terms) -> list[Tensor]:
    return [terms.total, *terms.parts.values()]


DRAWN = [(seed, step) for seed in range(3) for step in range(3)]


def test_each_seed_and_step_draws_its_own_target() -> None:
    zeros = torch.zeros(1, 16, 8)
    values = {float(objective("axes", 8, seed)(zeros, step).parts["matching"]) for seed, step in DRAWN}
    assert len(values) == len(DRAWN)


@pytest.mark.parametrize("kind", ["random", "orthogonal"])
def test_each_seed_and_step_draws_its_own_directions(kind: str) -> None:
    negligible = RectifiedGeneralizedGaussian(0.0, 1e-20, 1.0)
    ones = torch.ones(1, 16, 8)
    values = {float(RectifiedLpJEPALoss(negligible, kind=kind, n=3, seed=seed)(ones, step).parts["matching"]) for seed, step in DRAWN}
    assert len(values) == len(DRAWN)


def test_targets_and_directions_are_independent() -> None:
    loss = RectifiedLpJEPALoss(target(2.0), kind="random", n=1000, seed=0)
    drawn: list[Tensor] = []
    y = loss._draw("target", 0, 1000, 8, torch.device("cpu"))
    drawn.append(loss._draw("directions", 0, 1000, 8, torch.device("cpu")))
    drawn.append(loss._draw("target", 1, 1000, 8, torch.device("cpu")))
    for other in drawn:
        assert abs(float(torch.corrcoef(torch.stack([y.flatten(), other.flatten()]))[0, 1])) < 4 / 8000**0.5


def test_terms_are_the_weighted_sum_of_their_parts() -> None:
    z = uniform(3, 16, 8, seed=1).requires_grad_()
    terms = RectifiedLpJEPALoss(target(), 3.0, 7.0, n=64)(z, 0)
    assert terms.parts["invariance"].item() == pytest.approx(oracles.invariance(z.detach().numpy()), rel=1e-12)
    assert terms.total.item() == pytest.approx(3 * terms.parts["invariance"].item() + 7 * terms.parts["matching"].item(), rel=1e-12)
    gradient = torch.autograd.grad(terms.total, z, retain_graph=True)[0]
    parts = [torch.autograd.grad(part, z, retain_graph=True)[0] for part in (terms.parts["invariance"], terms.parts["matching"])]
    torch.testing.assert_close(gradient, 3 * parts[0] + 7 * parts[1], rtol=1e-12, atol=1e-15)


def test_default_weights_are_those_of_the_paper() -> None:
    terms = RectifiedLpJEPALoss(target(), n=64)(uniform(2, 16, 8), 0)
    assert float(terms.total) == pytest.approx(25 * float(terms.parts["invariance"]) + 125 * float(terms.parts["matching"]), rel=1e-12)


def test_matching_is_the_mean_over_views_against_one_target() -> None:
    z = uniform(3, 16, 8, seed=1)
    each = [float(objective()(view[None], 0).parts["matching"]) for view in z]
    assert float(objective()(z, 0).parts["matching"]) == pytest.approx(np.mean(each), rel=1e-12)


def test_matching_of_zeros_is_the_second_moment() -> None:
    law = target(1.0, -1.0)
    loss = RectifiedLpJEPALoss(law, kind="orthogonal", n=64)
    values = [float(loss(torch.zeros(1, 512, 64), step).parts["matching"]) for step in range(4)]
    assert np.mean(values) == pytest.approx(float(law.second_moment), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_under_autocast_has_the_float32_value(dtype: torch.dtype) -> None:
    z = uniform(2, 16, 8, seed=1).to(dtype)
    expected = objective("eigen+random")(z.float(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = objective("eigen+random")(z, 0)
    assert got.total.dtype == torch.float32
    assert [float(x) for x in tensors(got)] == [float(x) for x in tensors(expected)]


def test_nan_embedding_gives_a_nan_loss() -> None:
    z = uniform(2, 16, 8, seed=1)
    z[1, 3, 2] = torch.nan
    terms = objective()(z, 0)
    assert bool(terms.total.isnan()) and bool(terms.parts["matching"].isnan())


def test_gradient_descent_on_free_embeddings_reaches_the_floor() -> None:
    loss = RectifiedLpJEPALoss(target(), 0.0, 1.0, n=64)
    z = torch.zeros(1, 64, 8).add_(uniform(1, 64, 8, dtype=torch.float32), alpha=0.01).requires_grad_()
    start = loss(z, 0).parts["matching"].item()
    optimizer = torch.optim.Adam([z], lr=0.03)
    for step in range(150):
        optimizer.zero_grad()
        loss(z, step).total.backward()
        optimizer.step()
    end = np.mean([float(loss(z.detach(), step).parts["matching"]) for step in range(1000, 1010)])
    assert start > 0.3
    assert end < 1.3 * loss.floor(64, 8, repeats=10)


@pytest.mark.parametrize(("batch", "expected"), [(64, 0.0321), (128, 0.0166), (256, 0.0087)])
def test_floor_method_equals_the_reference_values(batch: int, expected: float) -> None:
    loss = RectifiedLpJEPALoss(target())
    assert loss.floor(batch, 512, repeats=6) == pytest.approx(expected, rel=0.05)
    assert loss.floor(16, 8, n=32) == loss.floor(16, 8, n=32)


def test_floor_of_a_very_wide_run_is_that_of_a_narrower_one() -> None:
    """A million dimensions would take gigabytes and minutes before the first step; beyond some thousand the floor no longer changes."""
    loss = RectifiedLpJEPALoss(target())
    loss.shape = (64, 1 << 20)
    assert loss.run_floor == pytest.approx(loss.floor(64, 4096), rel=0.05)
