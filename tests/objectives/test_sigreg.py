"""SIGReg, strong and weak, and LeJEPA's loss against float64 numpy: direct cosines and sines, complex exponentials, plain covariances."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rlpjepa_zoo as rz
from rlpjepa_zoo.core import distributed, rng
from rlpjepa_zoo.objectives.lejepa import LeJEPALoss
from rlpjepa_zoo.objectives.sigreg import KINDS, SIGReg, sketch, strong_sigreg, weak_sigreg
from rlpjepa_zoo.ops.directions import directions

RULES = [(17, 5.0), (33, 3.0)]
SIZES = [(b, c) for b in (2, 64, 256, 1000) for c in (8, 100, 512)]


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=source(seed), dtype=dtype)


def drawn(n: int, dim: int, seed: int = 9) -> Tensor:
    return directions("random", n, dim, source(seed)).double()


# --- oracles: float64 numpy and plain autograd, nothing of the package -----------------------------------------------------------------


def strong(x: np.ndarray, c: np.ndarray, knots: int = 17, limit: float = 5.0) -> float:
    """One direction at a time, all knots on [-limit, limit]."""
    t = np.linspace(-limit, limit, knots)
    phi, values = np.exp(-(t**2) / 2), []
    for row in c:
        p = np.outer(t, x @ row)
        error = (np.cos(p).mean(1) - phi) ** 2 + np.sin(p).mean(1) ** 2
        values.append(len(x) * np.trapezoid(error * phi, t))
    return float(np.mean(values))


def strong_complex(x: np.ndarray, c: np.ndarray, knots: int = 17, limit: float = 5.0) -> float:
    t = np.linspace(-limit, limit, knots)
    phi = np.exp(-(t**2) / 2)
    ecf = np.exp(1j * (x @ c.T)[:, :, None] * t).mean(0)
    return float(len(x) * np.trapezoid(np.abs(ecf - phi) ** 2 * phi, t, axis=1).mean())


def lejepa(x: np.ndarray, c: np.ndarray) -> float:
    """As LeJEPA writes it: 17 knots on [0, 3], doubled inside."""
    t = np.linspace(0, 3, 17)
    weights = np.full(17, 2 * t[1])
    weights[[0, -1]] = t[1]
    phi = np.exp(-(t**2) / 2)
    p = (x @ c.T)[:, :, None] * t
    error = (np.cos(p).mean(0) - phi) ** 2 + np.sin(p).mean(0) ** 2
    return float((error @ (weights * phi)).mean() * len(x))


def strong_autograd(x: Tensor, c: Tensor, knots: int = 17, limit: float = 5.0) -> Tensor:
    t = torch.linspace(-limit, limit, knots, dtype=x.dtype)
    phi = torch.exp(-(t**2) / 2)
    p = (x @ c.T).unsqueeze(-1) * t
    error = (p.cos().mean(0) - phi).square() + p.sin().mean(0).square()
    return len(x) * torch.trapezoid(error * phi, t).mean()


def weak(x: np.ndarray) -> float:
    x = x - x.mean(0)
    return float(np.linalg.norm(x.T @ x / (len(x) - 1 + 1e-6) - np.eye(x.shape[1])))


def weak_autograd(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    return (x.T @ x / (len(x) - 1 + 1e-6) - torch.eye(x.shape[1], dtype=x.dtype)).square().sum().sqrt()


def with_gradient(f: Callable[..., Tensor], x: Tensor, *args: Any) -> tuple[float, Tensor]:
    x = x.detach().requires_grad_()
    value = f(x, *args)
    return value.item(), torch.autograd.grad(value, x)[0]


def apart(got: tuple[float, Tensor], expected: tuple[float, Tensor]) -> tuple[float, float]:
    """Relative difference of the values, and of the gradients in Frobenius norm."""
    return abs(got[0] - expected[0]) / expected[0], float((got[1].double() - expected[1]).norm() / expected[1].norm())


# --- strong: value and gradient --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("batch", "dim"), SIZES)
def test_strong_equals_the_oracles_in_both_precisions(batch: int, dim: int, rule: tuple[int, float]) -> None:
    x, c = 0.3 + 1.3 * normal(batch, dim, dtype=torch.float32), drawn(24, dim).float()
    expected = with_gradient(strong_autograd, x.double(), c.double(), *rule)
    assert expected[0] == pytest.approx(strong(x.double().numpy(), c.double().numpy(), *rule), rel=1e-12)
    value, gradient = apart(with_gradient(strong_sigreg, x.double(), c, *rule), expected)
    assert value < 1e-12 and gradient < 1e-11
    value, gradient = apart(with_gradient(strong_sigreg, x, c, *rule), expected)
    assert value < 1e-5 and gradient < 1e-4


@pytest.mark.parametrize("rule", [*RULES, (3, 1.0), (5, 2.0), (65, 8.0)])
def test_real_and_complex_characteristic_functions_agree(rule: tuple[int, float]) -> None:
    x, c = normal(50, 6).abs(), drawn(20, 6)
    got = float(strong_sigreg(x, c, *rule))
    assert got == pytest.approx(strong_complex(x.numpy(), c.numpy(), *rule), rel=1e-12)
    assert got == pytest.approx(strong(x.numpy(), c.numpy(), *rule), rel=1e-12)


def test_doubled_knots_on_one_side_equal_knots_on_both() -> None:
    x, c = normal(40, 7) - 0.5, drawn(16, 7)
    assert float(strong_sigreg(x, c, *KINDS["lejepa"])) == pytest.approx(lejepa(x.numpy(), c.numpy()), rel=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_strong_pass_gradcheck(rule: tuple[int, float]) -> None:
    c = drawn(5, 4)
    for x in (normal(6, 4), normal(2, 6, 4)):
        assert torch.autograd.gradcheck(lambda z: strong_sigreg(z, c, *rule), x.requires_grad_())


@pytest.mark.parametrize(("batch", "dim"), [(32, 4), (128, 64), (512, 16)])
def test_strong_of_gaussian_samples_is_the_null_value(batch: int, dim: int) -> None:
    values = [float(strong_sigreg(normal(batch, dim, seed=i), drawn(64, dim, seed=i))) for i in range(100)]
    assert np.mean(values) == pytest.approx(math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3)), abs=0.05)


@pytest.mark.parametrize("batch", [1, 2, 128])
def test_strong_of_zeros_grows_with_the_batch_and_has_no_gradient(batch: int) -> None:
    value, gradient = with_gradient(strong_sigreg, torch.zeros(batch, 10, dtype=torch.float64), drawn(12, 10))
    assert value == pytest.approx(batch * 0.4089, rel=1e-4)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_strong_of_half_normals_equals_the_reference_value() -> None:
    values = [float(strong_sigreg(normal(128, 512, seed=i).clamp(min=0), drawn(64, 512, seed=i))) for i in range(10)]
    assert np.mean(values) == pytest.approx(27.5, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_change_nothing_beyond_rounding(dtype: torch.dtype) -> None:
    x, c = normal(33, 9, dtype=dtype), drawn(50, 9)
    reference = with_gradient(strong_sigreg, x, c)
    eps = torch.finfo(dtype).eps
    for chunk in (1, 7, 50, 1000):
        value, gradient = apart(with_gradient(lambda z, chunk=chunk: strong_sigreg(z, c, chunk=chunk), x), reference)
        assert value < 100 * eps and gradient < 100 * eps


def test_order_of_rows_does_not_matter() -> None:
    x, c, order = normal(40, 60), drawn(30, 60), torch.randperm(40, generator=source())
    for f, args in ((strong_sigreg, (c,)), (weak_sigreg, ()), (weak_sigreg, (sketch(8, 60, source()),))):
        value, gradient = with_gradient(f, x, *args)
        shuffled, moved = with_gradient(f, x[order], *args)
        assert shuffled == pytest.approx(value, rel=1e-12)
        assert torch.allclose(moved, gradient[order], rtol=1e-9, atol=1e-14)


def test_views_are_averaged() -> None:
    x, c, s = normal(3, 20, 8), drawn(30, 8), sketch(5, 8, source())
    for f, args in ((strong_sigreg, (c,)), (weak_sigreg, ()), (weak_sigreg, (s,))):
        value, gradient = with_gradient(f, x, *args)
        each = [with_gradient(f, view, *args) for view in x]
        assert value == pytest.approx(np.mean([v for v, _ in each]), rel=1e-12)
        assert torch.allclose(gradient, torch.stack([g for _, g in each]) / 3, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("rule", RULES)
def test_strong_moves_samples_towards_the_gaussian(rule: tuple[int, float]) -> None:
    x, c = (0.5 + 0.5 * normal(64, 2).abs()).requires_grad_(), drawn(16, 2)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        strong_sigreg(x, c, *rule).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(strong_sigreg(x, c, *rule)) < 0.3
        assert float(x.mean(0).abs().max()) < 0.1 and float((x.std(0) - 1).abs().max()) < 0.05


@pytest.mark.parametrize("rule", RULES)
def test_strong_is_periodic_in_projections_with_its_knots(rule: tuple[int, float]) -> None:
    x, axes = normal(20, 3), torch.eye(3, dtype=torch.float64)
    moved = x.clone()
    moved[4] += math.pi * (rule[0] - 1) / rule[1]
    assert float(strong_sigreg(moved, axes, *rule)) == pytest.approx(float(strong_sigreg(x, axes, *rule)), rel=1e-9)
    moved[4] += 1
    assert float(strong_sigreg(moved, axes, *rule)) != pytest.approx(float(strong_sigreg(x, axes, *rule)), rel=1e-3)


# --- weak -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "dim"), SIZES)
def test_weak_equals_the_oracle_in_both_precisions_and_forms(batch: int, dim: int) -> None:
    x = 0.3 + 1.3 * normal(batch, dim, dtype=torch.float32)
    expected = with_gradient(weak_autograd, x.double())
    assert expected[0] == pytest.approx(weak(x.double().numpy()), rel=1e-12)
    value, gradient = apart(with_gradient(weak_sigreg, x.double()), expected)
    assert value < 1e-12 and gradient < 1e-11
    value, gradient = apart(with_gradient(weak_sigreg, x), expected)
    assert value < 1e-5 and gradient < 1e-4


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5), (2, 7, 4), (2, 4, 7)])
def test_gradients_of_weak_pass_gradcheck(shape: tuple[int, ...]) -> None:
    s = sketch(3, shape[-1], source())
    for f in (weak_sigreg, lambda z: weak_sigreg(z, s)):
        assert torch.autograd.gradcheck(f, normal(*shape).requires_grad_())


@pytest.mark.parametrize(("batch", "dim"), [(16, 4), (4, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weak_of_equal_rows_is_the_root_of_the_width(batch: int, dim: int, dtype: torch.dtype) -> None:
    for x in (torch.zeros(batch, dim, dtype=dtype), torch.full((batch, dim), 0.5, dtype=dtype)):
        value, gradient = with_gradient(weak_sigreg, x)
        assert value == math.sqrt(dim)
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert float(weak_sigreg(torch.zeros(batch, dim), sketch(9, dim, source()))) == 3.0


def test_weak_of_identity_covariance_is_zero_with_finite_gradient() -> None:
    x = torch.zeros(50, 8)  # squares of each column sum to 49 = B - 1, exactly in float32
    for column in range(8):
        x[6 * column : 6 * column + 6, column] = torch.tensor([4.5, -4.5, 2.0, -2.0, 0.5, -0.5])
    value, gradient = with_gradient(weak_sigreg, x)
    assert value == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    value, gradient = with_gradient(weak_sigreg, x.double())
    assert value < 1e-6 and bool(torch.isfinite(gradient).all()) and float(gradient.norm()) < 1


@pytest.mark.parametrize(("dim", "expected"), [(256, 7.0), (512, 6.4), (1024, 6.1)])
def test_weak_of_sketched_gaussians_equals_the_reference_value(dim: int, expected: float) -> None:
    values = [float(weak_sigreg(normal(128, dim, seed=i), sketch(64, dim, source(i)))) for i in range(40)]
    assert np.mean(values) == pytest.approx(expected, abs=0.1)


def test_sketch_multiplies_before_the_covariance() -> None:
    x, s = normal(20, 30), sketch(6, 30, source()).double()
    value, gradient = apart(with_gradient(weak_sigreg, x, s), with_gradient(lambda z: weak_autograd(z @ s.T), x))
    assert value < 1e-12 and gradient < 1e-12
    assert float(sketch(2000, 100, source()).var()) == pytest.approx(0.01, rel=0.02)


# --- both -------------------------------------------------------------------------------------------------------------------------------


def loss(kind: str) -> Callable[[Tensor], Tensor]:
    c, s = drawn(32, 12), sketch(6, 12, source())
    return (lambda x: strong_sigreg(x, c)) if kind == "strong" else (lambda x: weak_sigreg(x, s))


@pytest.mark.parametrize("kind", ["strong", "weak"])
def test_autocast_and_half_precision_are_computed_in_float32(kind: str) -> None:
    f, x = loss(kind), normal(40, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under = with_gradient(f, x)
    plain = with_gradient(f, x)
    assert under[0] == plain[0] and torch.equal(under[1], plain[1])
    half = x.bfloat16()
    value, gradient = with_gradient(f, half)
    assert f(half).dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert value == with_gradient(f, half.float())[0]


@pytest.mark.parametrize("kind", ["strong", "weak"])
def test_value_and_gradient_survive_compile(kind: str) -> None:
    f, x = loss(kind), normal(16, 12, dtype=torch.float32)
    scaled = torch.compile(lambda z: f(1.5 * z.relu()) * 2, backend="aot_eager")  # traced as by the default, without its minute of C++
    value, gradient = apart(with_gradient(scaled, x), with_gradient(lambda z: f(1.5 * z.relu()) * 2, x.double()))
    assert value < 1e-5 and gradient < 1e-4


@pytest.mark.parametrize("kind", ["strong", "weak"])
def test_gradient_passes_through_later_operations_and_is_optional(kind: str) -> None:
    f, x = loss(kind), normal(16, 12)
    assert torch.allclose(with_gradient(lambda z: -3 * f(z), x)[1], -3 * with_gradient(f, x)[1])
    with torch.no_grad():
        assert f(x).requires_grad is False
    assert float(f(x)) == with_gradient(f, x)[0]
    assert float(f(x.T.contiguous().T)) == pytest.approx(float(f(x)), rel=1e-12)


def strong_with(x: Tensor, c: Tensor, **more: Any) -> Callable[[], Tensor]:
    return lambda: strong_sigreg(x, c, **more)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (strong_with(torch.zeros(4), torch.ones(1, 4)), "strong_sigreg: expected x (B, C) or (V, B, C), got (4,)"),
        (strong_with(torch.zeros(0, 4), torch.ones(1, 4)), "strong_sigreg: empty batch, x is (0, 4)"),
        (strong_with(torch.zeros(2, 4), torch.ones(1, 3)), "strong_sigreg: expected directions (K, 4) for x (2, 4), got (1, 3)"),
        (strong_with(torch.zeros(2, 4), torch.ones(0, 4)), "strong_sigreg: expected directions (K, 4) for x (2, 4), got (0, 4)"),
        (strong_with(torch.zeros(2, 4), torch.ones(4)), "strong_sigreg: expected directions (K, 4) for x (2, 4), got (4,)"),
        (strong_with(torch.zeros(2, 4), torch.ones(1, 4), knots=1), "knots must be odd and >= 3"),
        (strong_with(torch.zeros(2, 4), torch.ones(1, 4), knots=16), "knots must be odd and >= 3"),
        (strong_with(torch.zeros(2, 4), torch.ones(1, 4), limit=0.0), "limit must be > 0 and finite, got 0.0"),
        (strong_with(torch.zeros(2, 4), torch.ones(1, 4), limit=math.inf), "limit must be > 0 and finite, got inf"),
        (strong_with(torch.zeros(2, 4), torch.ones(1, 4), chunk=0), "chunk must be >= 1, got 0"),
        (lambda: weak_sigreg(torch.zeros(1, 4)), "weak_sigreg: expected at least 2 rows"),
        (lambda: weak_sigreg(torch.zeros(3, 0)), "weak_sigreg: empty batch, x is (3, 0)"),
        (lambda: weak_sigreg(torch.zeros(2, 3, 4, 5)), "weak_sigreg: expected x (B, C) or (V, B, C), got (2, 3, 4, 5)"),
        (lambda: weak_sigreg(torch.zeros(3, 4), torch.ones(2, 3)), "weak_sigreg: expected sketch (K, 4) for x (3, 4), got (2, 3)"),
        (lambda: sketch(0, 4), "sketch: expected n >= 1 and dim >= 1, got n = 0, dim = 4"),
        (lambda: SIGReg("stronger"), "SIGReg: unknown kind 'stronger'; expected strong, lejepa, weak"),
        (lambda: SIGReg(n=0), "SIGReg: n must be >= 1, got 0"),
        (lambda: SIGReg("weak", family="axes"), "SIGReg: family 'axes' is not for kind 'weak'"),
        (lambda: SIGReg("strong", family="eigen+random"), "SIGReg: family 'eigen+random' is not for kind 'strong'"),
        (lambda: SIGReg("strong", family="cubes")(torch.zeros(2, 4), 0), "directions: unknown family 'cubes'"),
        (lambda: SIGReg()([], 0), "SIGReg: no hidden states"),
        (lambda: SIGReg()(torch.zeros(()), 0), "SIGReg: expected x (B, C) or (V, B, C), got ()"),
        (lambda: LeJEPALoss(weight=1.5), "LeJEPALoss: weight must lie in [0, 1], got 1.5"),
        (lambda: LeJEPALoss()(torch.zeros(4, 5), 0), "LeJEPALoss: expected z (V, B, D), got (4, 5)"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        call()
    assert "\n" not in str(refused.value)


# --- regulariser and objective ----------------------------------------------------------------------------------------------------------


def test_regulariser_depends_on_seed_and_step_only() -> None:
    x = normal(16, 100, dtype=torch.float32)
    state = torch.get_rng_state()
    for kind in KINDS:
        value = float(SIGReg(kind, 8, seed=3)(x, 5))
        assert value == float(SIGReg(kind, 8, seed=3)(x, 5))
        assert value not in (float(SIGReg(kind, 8, seed=4)(x, 5)), float(SIGReg(kind, 8, seed=3)(x, 6)))
    assert torch.equal(torch.get_rng_state(), state)
    c = directions("random", 8, 100, rng.generator(3, "sigreg-directions", 5))
    assert float(SIGReg("strong", 8, seed=3)(x, 5)) == float(strong_sigreg(x, c))
    assert float(SIGReg("lejepa", 8, seed=3)(x, 5)) == pytest.approx(lejepa(x.double().numpy(), c.double().numpy()), rel=1e-5)
    s = sketch(8, 100, rng.generator(3, "sigreg-directions", 5))
    assert float(SIGReg("weak", 8, seed=3)(x, 5)) == float(weak_sigreg(x, s))


def test_hidden_states_are_averaged_and_narrow_ones_not_sketched() -> None:
    narrow, wide = normal(16, 8, dtype=torch.float32), normal(16, 40, dtype=torch.float32)
    s = sketch(32, 40, rng.generator(0, "sigreg-directions", 1))
    got = float(SIGReg("weak", 32)([narrow, wide], 1))
    assert got == pytest.approx((weak(narrow.double().numpy()) + weak((wide @ s.T).double().numpy())) / 2, rel=1e-5)
    c = drawn(6, 8).float()
    layers = [narrow, wide, normal(2, 16, 5, dtype=torch.float32)]
    got = float(SIGReg("strong", 6, family="orthogonal")(layers, 2))
    stream = rng.generator(0, "sigreg-directions", 2)
    expected = [strong_sigreg(x, directions("orthogonal", 6, x.shape[-1], stream)) for x in layers]
    assert got == pytest.approx(float(sum(expected) / 3), rel=1e-6)
    assert got != pytest.approx(float(strong_sigreg(narrow, c)))


def test_sigreg_names_are_public() -> None:
    assert (rz.SIGReg, rz.LeJEPALoss, rz.strong_sigreg, rz.weak_sigreg) == (SIGReg, LeJEPALoss, strong_sigreg, weak_sigreg)


# --- many processes ---------------------------------------------------------------------------------------------------------------------

BATCH, INPUTS, WIDTH = 12, 5, 8
OBJECTIVES = {
    "strong": LeJEPALoss(0.3, SIGReg("strong", 20)),
    "lejepa": LeJEPALoss(0.3, SIGReg("lejepa", 20)),
    "weak, more rows": LeJEPALoss(0.3, SIGReg("weak", 16)),
    "weak, sketched": LeJEPALoss(0.3, SIGReg("weak", 4)),
}


def train_step(objective: LeJEPALoss, batch: int, dim: int) -> dict[str, Any]:
    """Terms averaged over ranks and parameter gradients of one step, on one process or on many."""
    net = nn.Linear(INPUTS, dim).double()
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=10 + i))
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    images = normal(2, batch, INPUTS, seed=1).chunk(distributed.world_size(), 1)[distributed.rank()]
    terms = objective(model(images.flatten(0, 1)).unflatten(0, images.shape[:2]), step=3)
    terms.total.backward()
    return {
        "terms": [distributed.mean_over_ranks(term).item() for term in (terms.total, *terms.parts.values())],
        "same": [float(distributed.max_over_ranks(sign * terms.parts["matching"])) for sign in (1, -1)],
        "gradient": torch.cat([parameter.grad.flatten() for parameter in net.parameters()]),
    }


def every_step() -> dict[str, dict[str, Any]]:
    steps = {name: train_step(objective, BATCH, WIDTH) for name, objective in OBJECTIVES.items()}
    return steps | {"weak, fewer rows": train_step(LeJEPALoss(0.3, SIGReg("weak", 64)), BATCH, 2 * BATCH + 1)}


def steps_with_own_means() -> dict[str, dict[str, Any]]:
    """A planted mistake: each rank uses its own means."""
    right = distributed.mean_over_ranks
    step = train_step
    distributed.mean_over_ranks = lambda x: x.detach().clone()
    try:
        return {name: step(objective, BATCH, WIDTH) for name, objective in OBJECTIVES.items()}
    finally:
        distributed.mean_over_ranks = right


def on_a_rank() -> list[dict[str, dict[str, Any]]]:
    return [every_step(), steps_with_own_means()]


def test_two_processes_equal_one_and_a_planted_mistake_fails() -> None:
    alone, (first, second) = every_step(), run_ranks(on_a_rank, 2)
    for name, expected in alone.items():
        for result in (first[0][name], second[0][name]):
            assert result["terms"] == pytest.approx(expected["terms"], rel=1e-10)
            assert result["same"][0] == -result["same"][1]
            assert float((result["gradient"] - expected["gradient"]).norm() / expected["gradient"].norm()) < 1e-10
    for name in OBJECTIVES:
        mistaken, expected = first[1][name]["gradient"], alone[name]["gradient"]
        assert float((mistaken - expected).norm() / expected.norm()) > 1e-3
