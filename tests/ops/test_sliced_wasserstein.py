"""The sliced distance at every size and for every family of directions against float64, and what it leaves in memory and to the compiler."""

import re
import subprocess
import sys
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
from rlpjepa_zoo.ops.hadamard import Rotations
from rlpjepa_zoo.ops.precision import full_float32
from rlpjepa_zoo.ops.sliced_wasserstein import sliced_wasserstein

MIX = "axes:5+hadamard:9+random"
TABLE = [
    pytest.param(batch, dim, family, marks=[pytest.mark.slow] if family.startswith("eigen") and dim == 2048 and batch != 64 else [])
    for batch, dim, family in product([2, 64, 256, 1000, 4096], [8, 100, 512, 2048], [*FAMILIES, MIX])
]
"""Decompositions of the largest width but one are slow."""


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


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def merged(grad: Tensor, z: Tensor) -> Tensor:
    """The mean gradient of rows that are equal: which of them gets which rank is open, what they get together is not."""
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


@pytest.mark.parametrize("chunk", [1, 250])
@pytest.mark.parametrize("dim", [64, 96, 100, 127, 512])
def test_rotations_are_orthonormal_bases_and_go_back_by_their_transpose(dim: int, chunk: int) -> None:
    (block,) = direction_blocks("hadamard", 2 * dim + 7, dim, source())
    assert isinstance(block, Rotations) and block.table.shape == (5, dim)
    c = block.matrix().double()
    assert c.shape == (2 * dim + 7, dim)
    for basis in (c[:dim], c[dim : 2 * dim]):
        assert float((basis @ basis.T - torch.eye(dim)).abs().max()) < 1e-5
    x, g = torch.randn(dim, 6, generator=source(1)), torch.randn(len(c), 6, generator=source(2))
    prepared, back = block.prepare(x), torch.zeros(dim, 6)
    for low, high in block.chunks(chunk):
        assert torch.allclose(block.project(prepared, low, high), (c[low:high] @ x.double()).float(), atol=1e-5)
        back += block.project_back(g[low:high].clone(), low, high)
    assert torch.allclose(block.prepare_back(back), (c.T @ g.double()).float(), atol=1e-4)


@pytest.mark.parametrize(("dim", "draws"), [(64, 500), (96, 500), (768, 100)])
def test_rotations_have_the_moments_of_uniform_directions(dim: int, draws: int) -> None:
    c = torch.cat([directions("hadamard", dim, dim, source(seed)) for seed in range(draws)]).double()
    x = torch.zeros(dim, 4, dtype=torch.float64)
    x[0, 0], x[:, 1] = 1.0, dim**-0.5  # sparse vectors are the hardest for a fast transform,
    x[:2, 2], x[[0, dim // 3], 3] = 0.5**0.5, 0.5**0.5  # and coordinates that differ in one digit for an uneven one
    p = c @ x
    assert torch.allclose(p.square().mean(0), torch.full((4,), 1 / dim, dtype=torch.float64), rtol=1e-5)
    fourth = 3 / (dim * (dim + 2))
    blocks = p.pow(4).view(draws, dim, 4).mean(1)
    assert float((blocks.std(0) / draws**0.5 / fourth).max()) < 0.01, "differences of a few percent would be seen"
    assert ((blocks.mean(0) - fourth).abs() < 4 * blocks.std(0) / draws**0.5).all()
    assert float((p.sum(0) / len(p)).abs().max()) < 4 / len(p) ** 0.5


@pytest.mark.parametrize("cuts", [(0, 300), (0, 100, 300), (0, 75, 150, 225, 300), (0, 1, 129, 299, 300)])
@pytest.mark.parametrize("chunk", [7, None, 1000])
def test_shares_of_the_directions_add_up(cuts: tuple[int, ...], chunk: int | None) -> None:
    z, y = law(32, 128, 1), law(32, 128, 2)
    blocks = direction_blocks("axes:40+hadamard+random:20", 300, 128, source())
    value, grad = gradient(z, y, blocks)
    shares = [(high - low, *gradient(z, y, select_directions(blocks, low, high), chunk)) for low, high in zip(cuts, cuts[1:], strict=False)]
    assert float(sum(n * v for n, v, _ in shares)) / 300 == pytest.approx(float(value), rel=1e-5)
    assert error(sum(n * g for n, _, g in shares) / 300, grad.double()) < 1e-5
    whole = torch.cat([block.matrix() for low, high in zip(cuts, cuts[1:], strict=False) for block in select_directions(blocks, low, high)])
    assert torch.equal(whole, directions("axes:40+hadamard+random:20", 300, 128, source()))


def test_the_fast_sort_equals_torch_for_every_kind_of_number() -> None:
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


def test_a_row_that_is_not_a_number_makes_the_value_one_and_hurts_nobody() -> None:
    z, y = law(16, 8, 1), law(16, 8, 2)
    z[3, 2] = float("nan")
    for c in (directions("random", 8, 8, source()), directions("random", 8, 8, source()).double()):
        assert torch.isnan(sliced_wasserstein(z.to(c.dtype), y, c))


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_sorted_on_several_threads(threads: int) -> None:
    before = torch.get_num_threads()
    x = torch.rand(700, 1000, generator=source()).numpy()
    wanted = np.sort(x, axis=1)
    try:
        torch.set_num_threads(threads)
        module._sort_rows(x)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(x, wanted)
    assert (threads == 1) or any(thread.name.startswith("sort") for thread in threading.enumerate())


def _sorted_in_a_child() -> bool:
    torch.set_num_threads(2)
    x = torch.rand(700, 1000, generator=source()).numpy()
    module._sort_rows(x)
    return bool((np.diff(x, axis=1) >= 0).all())


def test_a_forked_process_makes_threads_of_its_own() -> None:
    list(module._pool(2).map(abs, [1, 2]))
    with get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_sorted_in_a_child).get(timeout=60)


def test_it_compiles_without_a_break_in_the_graph() -> None:
    y, blocks = law(16, 64, 2), direction_blocks("axes:8+hadamard:64", 72, 64, source())

    def loss(x: Tensor) -> Tensor:
        return 3 * sliced_wasserstein((x * 1.5).relu(), y, blocks)

    x = law(16, 64, 1).requires_grad_()
    (wanted,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), x)
    assert torch.allclose(got, wanted, atol=1e-7)


def test_the_operator_is_what_torch_expects_of_one() -> None:
    z, y = law(12, 64, 1)[None].requires_grad_(), law(12, 64, 2)
    (block,) = direction_blocks("hadamard", 70, 64, source())
    tests = ("test_schema", "test_faketensor")  # the others differentiate the gradient, which is refused
    torch.library.opcheck(module._distance, (z, y, block.table, True, 0, 70, 16, True), test_utils=tests)
    torch.library.opcheck(module._distance, (z, y, block.matrix(), False, 0, 70, 16, True), test_utils=tests)


def test_memory_for_backward_does_not_grow_with_the_directions() -> None:
    saved: list[int] = []
    z, y = law(64, 128, 1).requires_grad_(), law(64, 128, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        sliced_wasserstein(z, y, directions("random", 4096, 128, source()))
    assert sum(saved) < 3 * z.numel()


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    z, y, c = law(16, 8, 1).requires_grad_(), law(16, 8, 2), directions("random", 8, 8, source())
    (grad,) = torch.autograd.grad(sliced_wasserstein(z, y, c), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    ("z", "y", "said"),
    [
        (torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3), "expected floating-point z and y on one device, got torch.int64"),
        (torch.ones(4, 3, dtype=torch.complex64), torch.ones(4, 3), "got torch.complex64"),
        (torch.ones(4, 3), torch.ones(4, 3, device="meta"), "and y on meta"),
    ],
)
def test_numbers_that_are_not_real_or_elsewhere_are_refused(z: Tensor, y: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        sliced_wasserstein(z, y, torch.eye(3))


def test_one_part_alone_is_taken_too() -> None:
    z, y, blocks = law(16, 64, 1), law(16, 64, 2), direction_blocks("hadamard", 64, 64, source())
    assert torch.equal(sliced_wasserstein(z, y, blocks[0]), sliced_wasserstein(z, y, blocks))


def test_directions_are_float32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert {directions(family, 70, 64, source(), law(9, 64).float()).dtype for family in FAMILIES} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


# --- precision of the products --------------------------------------------------------------------------------------------------------

PLACES = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def test_products_are_full_float32_inside_and_what_they_were_after() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        allowed = [place.fp32_precision for place in PLACES]
        with full_float32(), full_float32():
            assert [place.fp32_precision for place in PLACES] == ["ieee", "ieee"]
        assert [place.fp32_precision for place in PLACES] == allowed and torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyError), full_float32():
            raise KeyError
        assert [place.fp32_precision for place in PLACES] == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_threads_that_come_and_go_leave_the_precision_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    z, y, c = law(16, 8, 1), law(16, 8, 2), directions("random", 8, 8, source())
    try:
        torch.set_float32_matmul_precision("high")
        threads = [threading.Thread(target=lambda: [sliced_wasserstein(z, y, c) for _ in range(60)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_inherited_precision_stays_inherited() -> None:
    code = """
import torch
from rlpjepa_zoo.ops.precision import full_float32
torch.backends.fp32_precision = "tf32"
with full_float32():
    print(torch.backends.cuda.matmul.fp32_precision)
torch.backends.fp32_precision = "ieee"
print(torch.backends.cuda.matmul.fp32_precision)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ieee", "ieee"]
