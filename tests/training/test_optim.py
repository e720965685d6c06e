"""The schedule is a function of the step, LARS equals the reference, and parameters are in the right groups."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.config.training_sections import OPTIMIZER_KEYS
from rlpjepa_zoo.models.factory import create_encoder
from rlpjepa_zoo.training.optim import OPTIMIZERS, build_optimizer, learning_rate, set_learning_rates
from rlpjepa_zoo.training.tasks.pretrain import param_groups


def recipe(*overrides: str) -> Recipe:
    plain = ["train.batch_size=256", "optim.warmup_epochs=2", "train.epochs=10", "optim.weight_decay=1e-4"]
    return Recipe.load("digits", [*plain, *overrides])


def optimizer_of(encoder: nn.Module, probes: nn.Module | None, options: Recipe) -> torch.optim.Optimizer:
    """The optimiser of pretraining."""
    return build_optimizer(options.optim.name, param_groups(encoder, probes, options), options.optim)


def lars(lr: float, *overrides: str) -> Recipe:
    return recipe("optim.name=lars", f"optim.lr={lr!r}", *overrides)


def test_every_optimizer_has_a_row_of_recipe_keys() -> None:
    assert sorted(OPTIMIZER_KEYS) == list(OPTIMIZERS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(3)
        self.matrix = nn.Parameter(torch.randn(6, 5, generator=source))
        self.kernel = nn.Parameter(torch.randn(4, 3, 2, 2, generator=source) * 3)
        self.bias = nn.Parameter(torch.randn(5, generator=source))


def push(net: nn.Module, optimizer: torch.optim.Optimizer, gradients: dict[str, torch.Tensor]) -> None:
    for name, parameter in net.named_parameters():
        parameter.grad = gradients[name].clone()
    optimizer.step()


def gradients(net: nn.Module, seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(p.shape, generator=source) for name, p in net.named_parameters()}


def first_step(options: Recipe, scale: float = 1.0) -> tuple[Net, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    net = Net()
    start, given = copy.deepcopy(net), gradients(net, 0, scale)
    push(net, optimizer_of(net, None, options), given)
    moved = {name: (old - new).detach() for (name, old), new in zip(start.named_parameters(), net.parameters(), strict=True)}
    return start, given, moved


# --- schedule -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "total", "peak"), [(10, 100, 0.3), (2, 7, 1.0), (195 * 10, 195 * 1000, 0.03)])
def test_schedule_peaks_at_the_last_warmup_step_and_ends_near_zero(warmup: int, total: int, peak: float) -> None:
    assert learning_rate(0, peak, warmup, total) == 3e-5
    assert learning_rate(warmup - 1, peak, warmup, total) == pytest.approx(peak, rel=1e-12)
    assert learning_rate(warmup, peak, warmup, total) == pytest.approx(peak, rel=1e-12)
    assert learning_rate(total, peak, warmup, total) == pytest.approx(0.0, abs=1e-15)
    assert 0 < learning_rate(total - 1, peak, warmup, total) < peak * 2.5 / (total - warmup) ** 2 * 1.01


def test_schedule_rises_linearly_then_falls_as_half_a_cosine() -> None:
    rates = [learning_rate(s, 0.2, 11, 111) for s in range(112)]
    assert np.allclose(np.diff(rates[:11]), (0.2 - 3e-5) / 10, rtol=1e-12)
    assert all(a > b for a, b in zip(rates[11:], rates[12:], strict=False))
    assert rates[11 + 50] == pytest.approx(0.1, rel=1e-12) and rates[11 + 25] == pytest.approx(0.1 * (1 + math.sqrt(0.5)), rel=1e-12)
    assert max(rates) == pytest.approx(0.2, rel=1e-12)


def test_schedule_ends_at_the_final_rate_and_stays_there() -> None:
    assert learning_rate(50, 1.0, 5, 50, final=0.01) == pytest.approx(0.01, rel=1e-12)
    assert learning_rate(5000, 1.0, 5, 50, final=0.01) == pytest.approx(0.01, rel=1e-12)
    assert all(learning_rate(s, 1.0, 5, 50, final=0.01) >= 0.01 for s in range(5, 60))


def test_schedule_with_at_most_one_warmup_step_starts_at_the_peak() -> None:
    assert learning_rate(0, 0.5, 0, 10) == 0.5 and learning_rate(0, 0.5, 1, 10) == 0.5 and learning_rate(1, 0.5, 1, 10) == 0.5


def test_schedule_of_groups_depends_on_the_step_alone() -> None:
    options, net, probes = recipe("optim.lr=0.1", "probe.lr=0.5"), Net(), nn.Linear(3, 2)
    forward, shuffled = optimizer_of(net, probes, options), optimizer_of(net, probes, options)
    total, per_epoch = options.steps(256 * 5)
    assert (total, per_epoch) == (50, 5)
    seen = {}
    for step in range(total):
        returned = set_learning_rates(forward, options.optim, step, total, per_epoch)
        seen[step] = [group["lr"] for group in forward.param_groups]
        assert returned == seen[step][0]
    for step in np.random.default_rng(0).permutation(total).tolist():
        set_learning_rates(shuffled, options.optim, step, total, per_epoch)
        assert [group["lr"] for group in shuffled.param_groups] == seen[step]
    assert seen[0] == [3e-5] * 3
    assert seen[9] == pytest.approx([0.1, 0.1, 0.5], rel=1e-12)
    assert seen[49][0] < 1e-3 * 0.1 * 2.5 and seen[49][2] == pytest.approx(5 * seen[49][0], rel=1e-9)


def test_warmup_never_starts_above_the_peak() -> None:
    options = recipe("optim.lr=1e-5", "probe.lr=1e-3", "optim.warmup_start_lr=1e-4")
    optimizer = optimizer_of(Net(), nn.Linear(3, 2), options)
    set_learning_rates(optimizer, options.optim, 0, 50, 5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-5, 1e-5, 1e-4], rel=1e-12)


# --- LARS ---------------------------------------------------------------------------------------------------------------------------


def test_unclipped_lars_step_does_not_depend_on_the_rate() -> None:
    start, given, small = first_step(lars(0.5))
    _, _, large = first_step(lars(7.0))
    for name in ("matrix", "kernel"):
        w, g = getattr(start, name).detach(), given[name]
        trust = 0.02 * w.norm() / (g.norm() + 1e-4 * w.norm())
        assert trust < 0.5
        assert torch.allclose(small[name], trust * (g + 1e-4 * w), rtol=1e-5, atol=1e-7)
        assert torch.allclose(small[name], large[name], rtol=1e-5, atol=1e-7)


def test_clipped_lars_step_is_the_rate_times_gradient_and_decay() -> None:
    decay = 0.1
    start, given, moved = first_step(lars(1e-3, f"optim.weight_decay={decay}"))
    for name in ("matrix", "kernel"):
        w, g = getattr(start, name).detach(), given[name]
        assert 0.02 * w.norm() / (g.norm() + decay * w.norm()) > 1e-3
        assert torch.allclose(moved[name], 1e-3 * (g + decay * w), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("lr", [1e-3, 0.5])
def test_lars_takes_plain_momentum_steps_for_vectors(lr: float) -> None:
    net, options = Net(), lars(lr, "optim.weight_decay=0.3", "optim.trust_coefficient=1e-6", "optim.momentum=0.8")
    start = net.bias.detach().clone()
    optimizer = optimizer_of(net, None, options)
    first, second = gradients(net, 0), gradients(net, 1)
    push(net, optimizer, first)
    push(net, optimizer, second)
    expected = start - lr * first["bias"] - lr * (0.8 * first["bias"] + second["bias"])
    assert torch.allclose(net.bias.detach(), expected, rtol=1e-5, atol=1e-7)


def test_lars_without_decay_still_scales_weights_by_trust() -> None:
    start, given, moved = first_step(lars(0.5, "optim.weight_decay=0"))
    w, g = start.matrix.detach(), given["matrix"]
    assert torch.allclose(moved["matrix"], 0.02 * w.norm() / g.norm() * g, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("scale", "regime"), [(0.01, "clipped"), (0.2, "mixed"), (50.0, "unclipped")])
def test_lars_matches_a_float64_implementation_for_20_steps(scale: float, regime: str) -> None:
    options = lars(0.3, "optim.weight_decay=1e-2", "optim.trust_coefficient=0.02", "optim.momentum=0.9", "optim.warmup_start_lr=1e-3")
    net = Net()
    optimizer = optimizer_of(net, None, options)
    weights = {name: p.detach().numpy().astype(np.float64) for name, p in net.named_parameters()}
    buffers = {name: np.zeros_like(w) for name, w in weights.items()}
    clipped = 0
    for step in range(20):
        lr = set_learning_rates(optimizer, options.optim, step, 20, 2)
        given = gradients(net, 100 + step, scale * (1 + step % 3))
        push(net, optimizer, given)
        for name, w in weights.items():
            d = given[name].numpy().astype(np.float64)
            if w.ndim != 1:
                size, slope = np.sqrt((w**2).sum()), np.sqrt((d**2).sum())
                trust = 0.02 * size / (slope + 1e-2 * size + 1e-8)
                clipped += trust >= lr
                d = (d + 1e-2 * w) * min(trust / lr, 1.0)
            buffers[name] = 0.9 * buffers[name] + d
            w -= lr * buffers[name]
    assert {"clipped": clipped == 40, "mixed": 10 < clipped < 30, "unclipped": clipped < 8}[regime], clipped
    for name, parameter in net.named_parameters():
        assert np.abs(parameter.detach().numpy() - weights[name]).max() < 1e-5 * np.abs(weights[name]).max(), name


@pytest.mark.parametrize("zero", ["weight", "gradient", "both"])
def test_lars_of_zero_norms_stays_finite(zero: str) -> None:
    net, options = Net(), lars(0.1)
    optimizer = optimizer_of(net, None, options)
    if zero != "gradient":
        nn.init.zeros_(net.matrix)
    before = net.matrix.detach().clone()
    given = gradients(net, 0)
    if zero != "weight":
        given["matrix"] = torch.zeros_like(given["matrix"])
    push(net, optimizer, given)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    expected = before - 0.1 * (given["matrix"] + 1e-4 * before)
    assert torch.allclose(net.matrix.detach(), expected, atol=1e-6)


def test_lars_at_rate_zero_moves_nothing() -> None:
    net, options = Net(), lars(0.1, "optim.warmup_start_lr=0")
    optimizer, before = optimizer_of(net, None, options), copy.deepcopy(net)
    assert set_learning_rates(optimizer, options.optim, 0, 50, 5) == 0
    push(net, optimizer, gradients(net, 0))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))


# --- groups -------------------------------------------------------------------------------------------------------------------------


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, object]:
    groups = [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
    assert len(groups) == 1
    return groups[0]


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_decay_falls_on_matrices_only(name: str) -> None:
    encoder = create_encoder("test_resnet", dim=8, hidden_dim=8)
    optimizer = optimizer_of(encoder, None, recipe(f"optim.name={name}", "optim.weight_decay=0.03"))
    for parameter in encoder.parameters():
        assert group_of(optimizer, parameter)["weight_decay"] == (0.03 if parameter.dim() > 1 else 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(encoder.parameters()))


def test_decay_of_biases_and_norms_can_be_asked_for() -> None:
    net = Net()
    optimizer = optimizer_of(net, None, recipe("optim.weight_decay=0.03", "optim.decay_bias_and_norm=true"))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.03}


def test_adamw_decay_reaches_the_weights_and_spares_the_biases() -> None:
    net = Net()
    start = copy.deepcopy(net)
    optimizer = optimizer_of(net, None, recipe("optim.lr=0.01", "optim.weight_decay=0.5", "optim.betas=[0.8, 0.99]"))
    assert all(group["betas"] == (0.8, 0.99) for group in optimizer.param_groups)
    push(net, optimizer, {name: torch.zeros_like(p) for name, p in net.named_parameters()})
    assert torch.allclose(net.matrix, start.matrix * (1 - 0.01 * 0.5), rtol=1e-6) and not torch.equal(net.matrix, start.matrix)
    assert torch.equal(net.bias, start.bias)


def test_adamw_matches_torch_for_20_steps() -> None:
    net, other = Net(), Net()
    ours = optimizer_of(net, None, recipe("optim.lr=0.02", "optim.weight_decay=0.1", "optim.decay_bias_and_norm=true"))
    theirs = torch.optim.AdamW(other.parameters(), lr=0.02, weight_decay=0.1, betas=(0.9, 0.999), foreach=False)
    for step in range(20):
        push(net, ours, gradients(net, step))
        push(other, theirs, gradients(net, step))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_probes_have_their_own_rate_and_no_decay(name: str) -> None:
    net, probes = Net(), nn.ModuleDict({"features": nn.Linear(3, 2), "z": nn.Linear(4, 2)})
    options = recipe(f"optim.name={name}", "optim.lr=0.4", "probe.lr=0.1", "train.batch_size=64", "optim.weight_decay=0.3")
    optimizer = optimizer_of(net, probes, options)
    for parameter in probes.parameters():
        assert group_of(optimizer, parameter)["weight_decay"] == 0.0
        assert group_of(optimizer, parameter)["peak"] == pytest.approx(0.025, rel=1e-12)
    assert group_of(optimizer, net.matrix)["peak"] == group_of(optimizer, net.bias)["peak"] == pytest.approx(0.1, rel=1e-12)


def test_probe_weights_take_plain_momentum_steps_under_lars() -> None:
    probes = nn.Linear(3, 2)
    start = probes.weight.detach().clone()
    optimizer = optimizer_of(Net(), probes, lars(0.5, "probe.lr=0.2", "optim.trust_coefficient=1e-6"))
    set_learning_rates(optimizer, lars(0.5, "probe.lr=0.2").optim, 9, 50, 5)
    probes.weight.grad = torch.ones_like(start)
    optimizer.step()
    assert torch.allclose(probes.weight.detach(), start - 0.2, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_frozen_backbone_is_in_no_group(name: str) -> None:
    encoder = create_encoder("test_resnet", dim=8, hidden_dim=8, freeze_backbone=True)
    optimizer = optimizer_of(encoder, nn.Linear(8, 2), recipe(f"optim.name={name}"))
    inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not inside & {id(p) for p in encoder.backbone.parameters()}
    assert inside >= {id(p) for p in encoder.projector.parameters()}


def test_single_layer_on_a_frozen_backbone_has_no_empty_group() -> None:
    encoder = create_encoder("test_resnet", dim=8, hidden_dim=8, projector_depth=1, freeze_backbone=True)
    optimizer = optimizer_of(encoder, None, recipe())
    assert sorted(len(group["params"]) for group in optimizer.param_groups) == [1, 1]
