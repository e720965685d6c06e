"""Control of the density: the shift after a step, and the exact shift."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from processes import run_ranks

from rlpjepa_zoo.core import distributed
from rlpjepa_zoo.objectives.density import DensityControl, without_common_gradient
from rlpjepa_zoo.sparse.topk import between


def steps(density: float, start: float, draw: str, n: int = 40) -> float:
    """Density after n steps on noise, for a layer whose biases start at a number."""
    torch.manual_seed(0)
    layer, law = nn.Linear(16, 48), {"normal": torch.randn, "uniform": lambda *size: 4 * torch.rand(*size) - 2}[draw]
    nn.init.constant_(layer.bias, start)
    control = DensityControl(layer)
    z = torch.zeros(1)
    for _ in range(n):
        z = layer(law(256, 16)).relu()
        control.observe(z, density)
        control.apply()
    return float((layer(law(4096, 16)) > 0).float().mean())


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
@pytest.mark.parametrize(("start", "draw"), [(0.0, "normal"), (3.0, "uniform"), (-8.0, "normal")])
def test_density_is_reached_from_any_start(density: float, start: float, draw: str) -> None:
    """Also where every unit is always active, or none ever."""
    assert steps(density, start, draw) == pytest.approx(density, rel=0.15)


def test_a_shift_is_the_same_for_all_units_and_applied_once() -> None:
    layer = nn.Linear(4, 6)
    control, before = DensityControl(layer), layer.bias.detach().clone()
    control.apply()
    assert torch.equal(layer.bias, before)  # nothing observed yet
    control.observe(torch.ones(3, 2, 6), 0.25)
    control.apply()
    control.apply()
    assert torch.allclose(before - layer.bias, torch.full((6,), 0.3 * np.log(4.0)), atol=1e-6)


def test_dead_units_come_back_unless_the_batch_is_too_small_to_tell() -> None:
    for rows, back in ((256, True), (8, False)):
        torch.manual_seed(0)
        layer = nn.Linear(16, 48)
        with torch.no_grad():
            layer.bias[:5] = -3
        control = DensityControl(layer)
        for _ in range(250):
            control.observe(layer(torch.randn(rows, 16)).relu(), 0.1)
            control.apply()
        rates = (layer(torch.randn(4096, 16)) > 0).float().mean(0)
        assert bool((rates > 0).all()) == back and float(rates.mean()) == pytest.approx(0.1, rel=0.3)
        assert back or not rates[:5].any()


def gradient_on_rank() -> list[float]:
    """Of a weight, averaged over ranks; the halves of the batch have different means."""
    x, factor = torch.arange(40.0).view(8, 5).sin() + 0.5, torch.arange(48.0).view(8, 6).cos() + torch.arange(8)[:, None]
    weight = torch.arange(30.0).view(5, 6).cos().requires_grad_()
    share = 8 // distributed.world_size()
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    (without_common_gradient((x[mine] @ weight).relu()) * factor[mine]).mean().backward()
    assert weight.grad is not None
    return distributed.mean_over_ranks(weight.grad.flatten()).tolist()


def test_common_gradient_is_that_of_the_batch_of_all_processes() -> None:
    for rank in run_ranks(gradient_on_rank, 2):
        assert rank == pytest.approx(gradient_on_rank(), rel=1e-4, abs=1e-6)


def test_common_gradient_is_removed_and_nothing_else() -> None:
    z = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)).relu().requires_grad_()
    weight = torch.randn(20, 7, generator=torch.Generator().manual_seed(1))
    same = without_common_gradient(z)
    assert torch.equal(same, z)
    (same * weight).sum().backward()
    assert z.grad is not None
    active = z.detach() > 0
    assert not z.grad[~active].any() and float(z.grad.sum()) == pytest.approx(0, abs=1e-5)
    difference = (weight - z.grad)[active]
    assert torch.allclose(difference, difference.mean().expand_as(difference), atol=1e-6)
    (
        torch.where(same > 0, weight, torch.inf) * without_common_gradient(z)
    ).sum().backward()  # infinite where nothing is active, as may be in half precision
    assert bool(z.grad.isfinite().all())
    zeros = torch.zeros(3, 2, requires_grad=True)
    without_common_gradient(zeros).sum().backward()
    assert zeros.grad is not None and not zeros.grad.any()


def shifted_on_rank() -> list[float]:
    layer = nn.Linear(4, 6)
    nn.init.zeros_(layer.bias)
    z = torch.arange(48.0).view(8, 6).remainder(5) * torch.arange(8)[:, None].gt(4) * torch.arange(6).ne(2)
    share = 8 // distributed.world_size()
    control = DensityControl(layer)
    control.observe(z[distributed.rank() * share :][:share], 0.4)
    control.apply()
    return layer.bias.tolist()


def test_two_processes_shift_as_one_does_on_the_whole_batch() -> None:
    first, second = run_ranks(shifted_on_rank, 2)
    assert first == second == pytest.approx(alone := shifted_on_rank(), rel=1e-6)
    assert alone[2] > alone[0] == alone[1] == alone[5]  # the third unit is dead


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=60, unique=True), st.floats(0.01, 0.99))
def test_between_leaves_the_asked_number_above(values: list[float], share: float) -> None:
    array = np.array(values, np.float32)
    keep = min(max(1, round(share * len(values))), len(values) - 1)
    assert (array > between(array, keep)).sum() in (keep, keep + 1)  # float32 neighbours may round to one of them
