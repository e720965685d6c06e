"""The sliced distance at every size and for every family of directions against float64; its sorts, memory, compilation and precision."""

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from multiprocessing import get_context

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from rlpjepa_zoo.distributions import RectifiedGeneralizedGaussian, sigma_gn
from rlpjepa_zoo.ops import sliced_wasserstein as module
from rlpjepa_zoo.ops.directions import FAMILIES, DirectionBlock, direction_blocks, directions, select_directions
from rlpjepa_zoo.ops.sliced_wasserstein import sliced_wasserstein

MIX = "axes:5+hadamard:9+random"


def is_slow(batch: int, dim: int, family: str) -> bool:
    """Decompositions of the largest width run at one batch size; the largest batch and width together with one family."""
    return dim == 2048 and (batch != 64 if family.startswith("eigen") else batch == 4096 and family != "random")


TABLE = [
    pytest.param(batch, dim, family, marks=[pytest.mark.slow] if is_slow(batch, dim, family) else [])
    for batch, dim, family in product([2, 64, 256, 1000, 4096], [8, 100, 512, 2048], [*FAMILIES, MIX])
]


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def law(rows: int, dim: int, seed: int = 0) -> Tensor:
    return RectifiedGeneralizedGaussian(0.0, sigma_gn(1.0), 1.0).sample((rows, dim), source(seed))


def near(batch: int, dim: int) -> Tensor:
    """Embeddings close to the target, with ties: a few rows twice, one of them zero, one dimension constant."""
    z = law(batch, dim, 1) * 1.1
    z[-1] = z[0]
    if batch > 8:
        z[1:3] = 0.0
        z[4] = z[5]
    z[:, -1] = 0.25
    return z


def gradient(z: Tensor, y: Tensor, c: Tensor | list[DirectionBlock], chunk: int | None = None) -> tuple[Tensor, Tensor]:
    x = z.clone().requires_grad_()
    loss = sliced_wasserstein(x, y, c, chunk)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def exact(z: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    x = z.double().requires_grad_()
    loss = oracles.sliced_autograd(x, y.double(), c.double())
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def merged(grad: Tensor, z: Tensor) -> Tensor:
    """The mean gradient of rows that are equal: ranks among them are arbitrary, their sum is not."""
    _, group, count = torch.unique(z, dim=0, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(count), z.shape[1], dtype=torch.float64).index_add_(0, group, grad.double())
    return sums / count[:, None]


@pytest.mark.parametrize(("batch", "dim", "family"), TABLE)
def test_value_and_gradient_agree_with_float64_at_every_size(batch: int, dim: int, family: str) -> None:
    n = 16 if batch * dim > 1 << 20 else 40
    z, y = near(batch, dim), law(batch, dim, 2)
    features = law(min(batch, 64), dim, 3)
    blocks = direction_blocks(family, n, dim, source(), features)
    c = torch.cat([replace(block, table=block.table.double()).matrix() for block in blocks])
    value, grad = exact(z, y, c)
    got, slope = gradient(z, y, blocks)
    assert got.dtype == torch.float32 and float(got) == pytest.approx(float(value), rel=1e-5)
    assert error(merged(slope, z), merged(grad, z)) < 5e-3
    if batch * dim <= 1 << 18:  # the float64 path sorts by another way
        for form in (c, blocks):
            got, slope = gradient(z.double(), y.double(), form)
            assert float(got) == pytest.approx(float(value), rel=1e-12) and error(merged(slope, z), merged(grad, z)) < 1e-10


@pytest.mark.parametrize("family", ["random", "hadamard"])
@pytest.mark.parametrize("views", [1, 2, 5])
@pytest.mark.parametrize("make", [lambda b, d: torch.zeros(b, d), lambda b, d: torch.ones(b, d), lambda b, d: law(b, d)[:1].expand(b, d)])
def test_constant_features_and_any_number_of_views(family: str, views: int, make: Callable[[int, int], Tensor]) -> None:
    z = torch.stack([make(64, 96), *[law(64, 96, seed) for seed in range(views - 1)]])
    y, blocks, c = law(64, 96, 9), direction_blocks(family, 200, 96, source()), directions(family, 200, 96, source())
    value, grad = exact(z, y, c)
    got, slope = gradient(z, y, blocks)
    assert float(got) == pytest.approx(float(value), rel=1e-5)
    assert error(slope.sum(1), grad.sum(1)) < 1e-4, "ties may swap ranks, but not what their rows get together"


@pytest.mark.parametrize("cuts", [(0, 300), (0, 100, 300), (0, 75, 150, 225, 300), (0, 1, 129, 299, 300)])
@pytest.mark.parametrize("chunk", [7, None, 1000])
def test_shares_of_the_directions_add_up(cuts: tuple[int, ...], chunk: int | None) -> None:
    z, y = law(32, 128, 1), law(32, 128, 2)
    blocks = direction_blocks("axes:40+hadamard+random:20", 300, 128, source())
    value, grad = gradient(z, y, blocks)
    shares = [(high - low, *gradient(z, y, select_directions(blocks, low, high), chunk)) for low, high in zip(cuts, cuts[1:], strict=False)]
    assert float(sum(n * v for n, v, _ in shares)) / 300 == pytest.approx(float(value), rel=1e-5)
    assert error(sum(n * g for n, _, g in shares) / 300, grad.double()) < 1e-5
    joined = torch.cat(
        [block.matrix() for low, high in zip(cuts, cuts[1:], strict=False) for block in select_directions(blocks, low, high)]
    )
    assert torch.equal(joined, directions("axes:40+hadamard+random:20", 300, 128, source()))


def test_numpy_sort_equals_torch_for_every_kind_of_number() -> None:
    tiny = float(torch.finfo(torch.float32).tiny)
    row = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, tiny, -tiny, tiny / 4, -tiny / 4, 3e38, -3e38, float("inf"), -float("inf"), 1.0, 0.5, -0.5, 2.0]
    )
    views = torch.stack([row, row.flip(0), torch.zeros(16)])[None]
    target = torch.linspace(-1, 1, 16).flip(0)[None, None]
    values, order = module._sorted_by_numpy(target, views)
    expected, _ = module._sorted_by_torch(target, views)
    assert torch.equal(values, expected)
    assert torch.equal(views.gather(2, order), views.sort(dim=2).values)
    assert torch.equal(order.sort(dim=2).values, torch.arange(16).expand_as(order)), "each index once"


def test_nan_row_makes_the_value_nan() -> None:
    z, y = law(16, 8, 1), law(16, 8, 2)
    z[3, 2] = float("nan")
    for c in (directions("random", 8, 8, source()), directions("random", 8, 8, source()).double()):
        assert torch.isnan(sliced_wasserstein(z.to(c.dtype), y, c))


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_sorted_on_several_threads(threads: int) -> None:
    before = torch.get_num_threads()
    x = torch.rand(700, 1000, generator=source()).numpy()
    expected = np.sort(x, axis=1)
    try:
        torch.set_num_threads(threads)
        module._sort_rows(x)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(x, expected)
    assert (threads == 1) or any(thread.name.startswith("sort") for thread in threading.enumerate())


def _sorted_in_a_child() -> bool:
    torch.set_num_threads(2)
    x = torch.rand(700, 1000, generator=source()).numpy()
    module._sort_rows(x)
    return bool((np.diff(x, axis=1) >= 0).all())


def test_forked_process_sorts_on_its_own_threads() -> None:
    list(module._pool(2).map(abs, [1, 2]))
    with get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_sorted_in_a_child).get(timeout=60)


def test_distance_compiles_without_a_graph_break() -> None:
    y, blocks = law(16, 64, 2), direction_blocks("axes:8+hadamard:64", 72, 64, source())

    def loss(x: Tensor) -> Tensor:
        return 3 * sliced_wasserstein((x * 1.5).relu(), y, blocks)

    x = law(16, 64, 1).requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), x)
    assert torch.allclose(got, expected, atol=1e-7)


def test_operator_passes_torch_s_checks() -> None:
    z, y = law(12, 64, 1)[None].requires_grad_(), law(12, 64, 2)
    (block,) = direction_blocks("hadamard", 70, 64, source())
    tests = ("test_schema", "test_faketensor")  # the others differentiate the gradient, which is refused
    torch.library.opcheck(module._distance, (z, y, block.table, True, 0, 70, 16, True), test_utils=tests)
    torch.library.opcheck(module._distance, (z, y, block.matrix(), False, 0, 70, 16, True), test_utils=tests)


def test_saved_memory_does_not_grow_with_the_directions() -> None:
    saved: list[int] = []
    z, y = law(64, 128, 1).requires_grad_(), law(64, 128, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        sliced_wasserstein(z, y, directions("random", 4096, 128, source()))
    assert sum(saved) < 3 * z.numel()


def test_second_derivative_is_refused() -> None:
    z, y, c = law(16, 8, 1).requires_grad_(), law(16, 8, 2), directions("random", 8, 8, source())
    (grad,) = torch.autograd.grad(sliced_wasserstein(z, y, c), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    ("z", "y", "message"),
    [
        (torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3), "expected floating-point z and y on one device, got torch.int64"),
        (torch.ones(4, 3, dtype=torch.complex64), torch.ones(4, 3), "got torch.complex64"),
        (torch.ones(4, 3), torch.ones(4, 3, device="meta"), "and y on meta"),
    ],
)
def test_other_dtypes_and_devices_are_refused(z: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sliced_wasserstein(z, y, torch.eye(3))


def test_single_block_is_accepted() -> None:
    z, y, blocks = law(16, 64, 1), law(16, 64, 2), direction_blocks("hadamard", 64, 64, source())
    assert torch.equal(sliced_wasserstein(z, y, blocks[0]), sliced_wasserstein(z, y, blocks))


# --- closed forms, gradients and odd inputs -------------------------------------------------------------------------------------------

KINDS = [*FAMILIES, "axes+random", "eigen+random", "eigen-bottom+orthogonal", "eigen:3+axes:5+random", "random+orthogonal"]


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=source(seed), dtype=dtype)


def target(p: float = 1.0, mu: float = 0.0) -> RectifiedGeneralizedGaussian:
    return RectifiedGeneralizedGaussian(mu, sigma_gn(p), p)


def drawn(n: int, dim: int, kind: str = "random", seed: int = 9) -> Tensor:
    return directions(kind, n, dim, source(seed), features=uniform(4 * dim, dim, seed=seed, dtype=torch.float32)).double()


def value_and_gradient(z: Tensor, y: Tensor, c: Tensor, chunk: int = 2048) -> tuple[float, Tensor]:
    z = z.detach().requires_grad_()
    loss = sliced_wasserstein(z, y, c, chunk)
    return loss.item(), torch.autograd.grad(loss, z)[0]


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest expected entry."""
    return float((got - expected).abs().max() / expected.abs().max())


# --- sliced distance: value -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_copy_is_at_distance_zero(kind: str) -> None:
    y = target().sample((50, 12), source()).double()
    shuffled = torch.stack([y[torch.randperm(50, generator=source(i))] for i in range(3)])
    assert float(sliced_wasserstein(shuffled, y, drawn(48, 12, kind))) < 1e-28
    assert float(sliced_wasserstein(y.flip(0) + 0.1, y, drawn(48, 12, kind))) > 1e-4


@pytest.mark.parametrize("kind", ["axes", "orthogonal", "eigen"])
def test_zero_embedding_gives_the_mean_square_of_the_target(kind: str) -> None:
    y = target().sample((64, 16), source()).double()
    assert float(sliced_wasserstein(torch.zeros_like(y), y, drawn(32, 16, kind))) == pytest.approx(float(y.square().mean()), rel=1e-6)


def test_zero_embedding_gives_the_second_moment_for_random_directions() -> None:
    y = target(1.0, -0.5).sample((256, 64), source())
    got = sliced_wasserstein(torch.zeros_like(y), y, directions("random", 4096, 64, source()))
    assert float(got) == pytest.approx(float(y.square().mean()), rel=0.05)


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 3.0])
def test_scaled_target_gives_the_squared_excess(s: float) -> None:
    y = target().sample((64, 16), source()).double()
    expected = (s - 1) ** 2 * float(y.square().mean())
    assert float(sliced_wasserstein(s * y, y, drawn(32, 16, "orthogonal"))) == pytest.approx(expected, rel=1e-6, abs=1e-25)


@pytest.mark.parametrize("delta", [-0.7, 0.3, 2.0])
def test_shifted_target_gives_the_squared_shift(delta: float) -> None:
    y = target().sample((64, 16), source()).double()
    assert float(sliced_wasserstein(y + delta, y, drawn(16, 16, "axes"))) == pytest.approx(delta**2, rel=1e-12)
    assert float(sliced_wasserstein(y + delta, y, drawn(4096, 16))) == pytest.approx(delta**2, rel=0.1)


@pytest.mark.parametrize(("p", "mu", "low", "high"), [(1.0, 0.0, 2.1, 2.4), (2.0, 0.0, 1.9, 2.1), (1.0, -1.0, 0.65, 0.75)])
@pytest.mark.parametrize("batch", [64, 128, 256])
def test_floor_of_matched_samples_is_kappa_over_batch(p: float, mu: float, low: float, high: float, batch: int) -> None:
    values = []
    for seed in range(6):
        g = source(100 * batch + seed)
        a, b = target(p, mu).sample((batch, 512), g), target(p, mu).sample((batch, 512), g)
        values.append(float(sliced_wasserstein(a, b, directions("random", 1024, 512, g))))
    assert 0.85 * low < batch * np.mean(values) < 1.15 * high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 33])
def test_value_equals_the_brute_force(kind: str, batch: int) -> None:
    z, y, c = uniform(batch, 10, seed=1), uniform(batch, 10, seed=2), drawn(40, 10, kind)
    assert float(sliced_wasserstein(z, y, c)) == pytest.approx(oracles.sliced(z.numpy(), y.numpy(), c.numpy()), rel=1e-12)


def test_each_projection_is_an_optimal_transport() -> None:
    z, y, c = uniform(21, 6, seed=1), 2 * uniform(21, 6, seed=2), drawn(8, 6)
    for row in c:
        expected = oracles.transport((z @ row).numpy(), (y @ row).numpy())
        assert float(sliced_wasserstein(z, y, row[None])) == pytest.approx(expected, rel=1e-12)


def test_many_views_give_the_mean_over_views() -> None:
    z, y, c = uniform(3, 20, 5, seed=1), uniform(20, 5, seed=2), drawn(16, 5)
    each = [float(sliced_wasserstein(view, y, c)) for view in z]
    assert len(set(each)) == 3
    assert float(sliced_wasserstein(z, y, c)) == pytest.approx(np.mean(each), rel=1e-12)
    assert float(sliced_wasserstein(z[:1], y, c)) == each[0]


# --- sliced distance: gradient --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 4), (1, 7, 4), (3, 7, 4)])
@pytest.mark.parametrize("chunk", [3, 100])
def test_gradient_equals_finite_differences(shape: tuple[int, ...], chunk: int) -> None:
    z, y, c = uniform(*shape, seed=1).requires_grad_(), uniform(7, 4, seed=2), drawn(11, 4)
    assert torch.autograd.gradcheck(lambda x: sliced_wasserstein(x, y, c, chunk), [z], eps=1e-7, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(30, 10), (1, 30, 10), (2, 30, 10), (3, 30, 10)])
def test_gradient_equals_plain_autograd(kind: str, shape: tuple[int, ...]) -> None:
    z, y, c = uniform(*shape, seed=1).requires_grad_(), uniform(30, 10, seed=2), drawn(41, 10, kind)
    expected = oracles.sliced_autograd(z, y, c)
    value, gradient = value_and_gradient(z, y, c, chunk=16)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    assert difference(gradient, torch.autograd.grad(expected, z)[0]) < 1e-10


def test_gradient_passes_through_operations_before_and_after() -> None:
    w, x, y, c = uniform(6, 5, seed=3), uniform(2, 12, 6, seed=1), uniform(12, 5, seed=2), drawn(9, 5)
    gradients = []
    for loss in (sliced_wasserstein, oracles.sliced_autograd):
        leaf = w.clone().requires_grad_()
        (7 * loss((x @ leaf - 1).relu(), y, c).sqrt()).backward()
        gradients.append(leaf.grad)
    assert difference(gradients[0], gradients[1]) < 1e-10


@pytest.mark.parametrize("chunk", [1, 7, 50, 99, 100, 4096])
def test_chunk_changes_neither_value_nor_gradient(chunk: int) -> None:
    z, y, c = uniform(2, 20, 8, seed=1), uniform(20, 8, seed=2), drawn(100, 8)
    expected, expected_gradient = value_and_gradient(z, y, c, 33)
    value, gradient = value_and_gradient(z, y, c, chunk)
    assert value == pytest.approx(expected, rel=1e-12)
    assert difference(gradient, expected_gradient) < 1e-12


def test_small_step_against_the_gradient_lowers_the_loss() -> None:
    z, y, c = uniform(2, 40, 8, seed=1), target().sample((40, 8), source()).double(), drawn(64, 8)
    value, gradient = value_and_gradient(z, y, c)
    assert value_and_gradient(z - gradient, y, c)[0] < value - 0.4 * float(gradient.square().sum())


def test_input_without_gradient_gives_a_value_without_gradient() -> None:
    z, y, c = uniform(20, 8, seed=1), uniform(20, 8, seed=2), drawn(10, 8)
    assert not sliced_wasserstein(z, y, c).requires_grad
    expected = value_and_gradient(z, y, c)[0]
    with torch.no_grad():
        inside = sliced_wasserstein(z.requires_grad_(), y, c)
    assert not inside.requires_grad and inside.item() == expected


# --- sliced distance: precision and odd inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    z, y, c = uniform(2, 32, 16, seed=1).to(dtype), target().sample((32, 16), source()), directions("random", 64, 16, source())
    expected, expected_gradient = value_and_gradient(z.float(), y, c)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        leaf = z.clone().requires_grad_()
        loss = sliced_wasserstein(leaf, y, c)
    assert loss.dtype == torch.float32 and loss.item() == expected
    loss.backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, expected_gradient.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    z, y, c = uniform(2, 32, 16, seed=1, dtype=dtype), uniform(32, 16, seed=2, dtype=dtype), drawn(64, 16).to(dtype)
    expected, expected_gradient = value_and_gradient(z, y, c)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = value_and_gradient(z, y, c)
    assert value == expected and torch.equal(gradient, expected_gradient)
    assert sliced_wasserstein(z, y, c).dtype == dtype


def test_inputs_are_not_modified() -> None:
    tensors = uniform(2, 20, 8, seed=1), uniform(20, 8, seed=2), drawn(10, 8)
    copies = [t.clone() for t in tensors]
    value_and_gradient(*tensors, chunk=4)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("fill", [0.0, 0.7])
def test_collapsed_embedding_gets_a_finite_gradient_with_the_right_sum(fill: float) -> None:
    z, y, c = torch.full((16, 6), fill, dtype=torch.float64).requires_grad_(), target().sample((16, 6), source()).double(), drawn(40, 6)
    expected = oracles.sliced_autograd(z, y, c)
    value, gradient = value_and_gradient(z, y, c)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    assert bool(torch.isfinite(gradient).all())
    assert difference(gradient.sum(0), torch.autograd.grad(expected, z)[0].sum(0)) < 1e-10


def test_ties_between_rows_do_not_change_the_value() -> None:
    z, y, c = uniform(12, 6, seed=1).relu(), uniform(24, 6, seed=2), drawn(40, 6)
    doubled = torch.cat([z, z])
    doubled[:, 2] = 0.25
    value, gradient = value_and_gradient(doubled, y, c)
    assert value == pytest.approx(oracles.sliced(doubled.numpy(), y.numpy(), c.numpy()), rel=1e-12)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["z", "y"])
def test_non_finite_input_gives_a_non_finite_value(bad: float, where: str) -> None:
    z, y, c = uniform(2, 8, 4, seed=1), uniform(8, 4, seed=2), drawn(10, 4)
    (z[1] if where == "z" else y)[3, 2] = bad
    value, gradient = value_and_gradient(z, y, c)
    assert not np.isfinite(value)
    assert not bool(torch.isfinite(gradient).all())


REFUSED = [
    ((4, 3), (5, 3), (2, 3), 8, "sizes differ"),
    ((2, 4, 3), (2, 4, 3), (2, 3), 8, "expected z"),
    ((4, 3), (4, 3), (2, 4), 8, "sizes differ"),
    ((4,), (4, 3), (2, 3), 8, "expected z"),
    ((4, 3), (4, 3), (3,), 8, "expected z"),
    ((0, 3), (0, 3), (2, 3), 8, "empty"),
    ((0, 4, 3), (4, 3), (2, 3), 8, "empty"),
    ((4, 3), (4, 3), (0, 3), 8, "no directions"),
    ((4, 3), (4, 3), (2, 3), 0, "chunk"),
]


@pytest.mark.parametrize(("z", "y", "c", "chunk", "message"), REFUSED)
def test_inputs_that_do_not_fit_are_refused(z: tuple[int, ...], y: tuple[int, ...], c: tuple[int, ...], chunk: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(torch.zeros(z), torch.zeros(y), torch.zeros(c), chunk)


def test_target_with_a_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="detach"):
        sliced_wasserstein(torch.zeros(4, 3), torch.zeros(4, 3, requires_grad=True), torch.eye(3))
