"""Cases for the Triton kernels, on a CUDA device or under Triton's interpreter; `ops/test_triton_sort.py` runs this file in a separate process.

Separate, because Triton reads TRITON_INTERPRET while it is imported, and other tests import it earlier.
"""

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from rlpjepa_zoo.ops import triton_sort

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


if INTERPRETED:  # two detours of the interpreter are shortened; the results are the same
    from triton import language
    from triton.language import standard
    from triton.runtime import interpreter
    from triton.runtime.interpreter import ReduceOps

    # It replaces triton.language by its own functions anew for every call of a function in a kernel: half of the time. Once is enough.
    unchanged = type(interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core})))
    interpreter._patch_lang = lambda _: unchanged()

    # It applies xor in a Python loop over all elements, 78 times in tl.sort for 4096; numpy does it at once.
    slowly = ReduceOps.generic_reduce

    def generic_reduce(self: Any, given: Any) -> Any:
        if self.combine_fn is not standard._xor_combine:
            return slowly(self, given)
        return self.to_tensor(np.bitwise_xor.reduce(given[0].handle.data, axis=self.axis, keepdims=self.keep_dims), given[0].dtype)

    ReduceOps.generic_reduce = generic_reduce


def rand(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def unit(n: int, dim: int, seed: int = 3) -> Tensor:
    return torch.nn.functional.normalize(rand(n, dim, seed=seed) - 0.5, dim=1)


def dyadic(*shape: int, seed: int, values: int = 4) -> Tensor:
    """Few small multiples of 1/8: their products and sums are exact in float32, so ties are exact and results are bit-equal."""
    return torch.randint(-values, values, shape, generator=torch.Generator().manual_seed(seed)).div(8).to(DEVICE)


def ranked(projected: np.ndarray) -> np.ndarray:
    """Differences (n, V, B) in batch order; equal projections are ranked in batch order."""
    n, rows, batch = projected.shape
    g = np.empty((n, rows - 1, batch), projected.dtype)
    for i, v in np.ndindex(n, rows - 1):
        order = np.argsort(projected[i, v + 1], kind="stable")
        g[i, v, order] = projected[i, v + 1, order] - np.sort(projected[i, 0])
    return g


def check(batch: int, dim: int, views: int) -> None:
    """Against float64, which may rank projections less than a float32 step apart differently from float32 (seen: 1.0e-7 apart at 1.1).

    One such swap is 7e-3 of the gradient of 5 directions and 256 rows: 64 directions show what the bound is about. In larger
    batches neighbours of the target lie closer, and a swap weighs less (torch's own float32: below 1e-3 with 5 directions).
    """
    n, chunk = (64, 24) if batch <= 512 else (5, 3)
    z, y, c = rand(views, batch, dim, seed=1), rand(batch, dim, seed=2), unit(n, dim)
    value, gradient = triton_sort.loss_and_gradient(z, y, c, chunk, gradient=True)
    a, b, k = (t.double().cpu() for t in (z, y, c))
    exact = a.clone().requires_grad_()
    oracles.sliced_autograd(exact, b, k).backward()
    expected = np.mean([oracles.sliced(v.numpy(), b.numpy(), k.numpy()) for v in a])
    assert value.dtype == gradient.dtype == torch.float32 and value.device == z.device and gradient.shape == z.shape
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float((gradient.double().cpu() - exact.grad).norm() / exact.grad.norm()) < 5e-3


@pytest.mark.parametrize(("batch", "views", "dim"), [(2, 3, 100), (64, 2, 512), (256, 1, 8)])
def test_value_and_gradient_match_the_oracle(batch: int, views: int, dim: int) -> None:
    check(batch, dim, views)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [8, 100, 512, 2048])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("batch", [2, 64, 256, 1000, 4096, 1, 3, 17, 511, 512, 513, 4095])
def test_value_and_gradient_match_the_oracle_at_every_size(batch: int, views: int, dim: int) -> None:
    check(batch, dim, views)


@pytest.mark.parametrize("batch", [1, 2, 7, 100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("state", ["few values", "rows twice", "rows of zeros", "constant", "axes"])
def test_ties_are_ranked_in_batch_order_bit_for_bit(batch: int, state: str) -> None:
    z, y, c = dyadic(2, batch, 11, seed=1), dyadic(batch, 11, seed=2), dyadic(5, 11, seed=3)
    if state == "rows twice":
        z = z[:, torch.arange(batch) % max(1, batch // 2)].contiguous()
    elif state == "rows of zeros":
        z[:, ::3] = 0.0
    elif state == "constant":
        z[:] = z[:, :1].clone()
    elif state == "axes":
        z, c = z.relu(), torch.eye(11, device=DEVICE)
    samples = torch.cat([y[None], z]).double().cpu().numpy()
    expected = ranked(np.einsum("vbd,nd->nvb", samples, c.double().cpu().numpy()))
    g, sums = z.new_empty(len(c), *z.shape[:2]), z.new_empty(len(c))
    triton_sort._project_and_match(triton_sort._samples(z, y, c), c, g, sums)
    assert np.array_equal(g.cpu().numpy(), expected)
    assert np.allclose(sums.cpu().numpy(), np.square(expected).sum((1, 2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch", [1, 2, 16, 17, 255, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (512, 2049))])
def test_match_sorts_any_batch_and_treats_signed_zeros_as_equal(batch: int) -> None:
    projected = rand(6, 3, batch, seed=1) - 0.5
    projected[:, 1, ::2] = 0.0
    projected[:, 1, ::4] = -0.0
    g, sums = triton_sort.match(projected.clone())
    expected = ranked(projected.cpu().numpy())
    assert np.array_equal(g.cpu().numpy(), expected)
    assert np.allclose(sums.cpu().numpy(), np.square(expected.astype(float)).sum((1, 2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, -0x400000, 0x7F800000, -0x800000])  # NaN of either sign, infinities
@pytest.mark.parametrize("batch", [5, 16, 100])
def test_non_finite_values_stay_in_their_row(batch: int, bits: int) -> None:
    bad = torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(DEVICE)
    projected = rand(5, 3, batch, seed=1)
    projected[2, 1, batch // 2] = bad
    projected[3, 0, 0] = bad
    projected[4, 2] = bad
    guarded, sums = torch.full((9, 2, batch), 7.0, device=DEVICE), torch.full((9,), 7.0, device=DEVICE)
    triton_sort._match(projected, guarded[2:7], sums[2:7])
    assert bool((guarded[[0, 1, 7, 8]] == 7.0).all()) and bool((sums[[0, 1, 7, 8]] == 7.0).all())
    g, sums = guarded[2:7].cpu(), sums[2:7].cpu()
    assert np.array_equal(g[:2].numpy(), ranked(projected[:2].cpu().numpy()))
    assert torch.isfinite(sums).tolist() == [True, True, False, False, False]
    assert torch.isfinite(g[2, 1]).all() and not torch.isfinite(g[2, 0, batch // 2])
    assert (~torch.isfinite(g[3])).sum(1).tolist() == [1, 1] and torch.isfinite(g[4, 0]).all() and not torch.isfinite(g[4, 1]).any()


def test_non_finite_embedding_reaches_value_and_gradient() -> None:
    z, y, c = rand(2, 20, 6, seed=1), rand(20, 6, seed=2), unit(5, 6)
    z[1, 3, 2] = torch.nan
    value, gradient = triton_sort.loss_and_gradient(z, y, c, 8, gradient=True)
    assert bool(value.isnan()) and bool(gradient[1, 3].isnan().all()) and bool(gradient[0].isfinite().all())


@pytest.mark.parametrize("batch", [33, pytest.param(513, marks=pytest.mark.slow)])
def test_chunks_change_rounding_only_and_no_gradient_no_bit(batch: int) -> None:
    z, y, c = rand(2, batch, 10, seed=1), rand(batch, 10, seed=2), unit(5, 10)
    value, gradient = triton_sort.loss_and_gradient(z, y, c, 100, gradient=True)
    again, other = triton_sort.loss_and_gradient(z, y, c, 3, gradient=True)
    assert torch.allclose(again, value, rtol=1e-6) and torch.allclose(other, gradient, rtol=1e-4, atol=1e-8)
    alone, none = triton_sort.loss_and_gradient(z, y, c, 3, gradient=False)
    assert torch.equal(alone, again) and none is None


@pytest.mark.parametrize("batch", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_tuner_choice_changes_no_bit(batch: int) -> None:
    projected, n, log = rand(9, 3, batch, seed=1), 9, max(4, (batch - 1).bit_length())
    results = []
    for block in (2, 16):
        g, sums = torch.empty(n, 2, batch, device=DEVICE), torch.empty(n, device=DEVICE)
        triton_sort.match_kernel[(-(-n // block),)](
            projected, g, sums, n, batch, 16, VIEWS=2, WRITE=True, P=1 << log, LOG_P=log, BLOCK_N=block,
            enable_fp_fusion=False, num_warps=4,
        )  # fmt: skip
        results.append((g, sums))
    for g, sums in results[1:]:
        assert torch.equal(g, results[0][0]) and torch.equal(sums, results[0][1])


@pytest.mark.slow
def test_kernels_run_as_an_opaque_operator_under_compile() -> None:
    @torch.library.custom_op("rlpjepa_tests::value", mutates_args=())
    def value(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
        return triton_sort.loss_and_gradient(z, y, c, 4, gradient=False)[0]

    value.register_fake(lambda z, y, c: z.new_empty(()))
    z, y, c = rand(2, 20, 6, seed=1), rand(20, 6, seed=2), unit(5, 6)
    compiled = torch.compile(lambda z: 2 * value(z * 3, y, c), fullgraph=True, backend="eager" if INTERPRETED else "inductor")
    assert torch.allclose(compiled(z), 2 * triton_sort.loss_and_gradient(z * 3, y, c, 4, gradient=False)[0])


@pytest.mark.parametrize("batch", [20, pytest.param(513, marks=pytest.mark.slow)])
def test_autocast_changes_nothing(batch: int) -> None:
    z, y, c = rand(2, batch, 6, seed=1), rand(batch, 6, seed=2), unit(5, 6)
    plain = triton_sort.loss_and_gradient(z, y, c, 4, gradient=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = triton_sort.loss_and_gradient(z, y, c, 4, gradient=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_kernels_are_supported_here() -> None:
    assert triton_sort.supported(rand(2, 4096, 3, seed=1)) and not triton_sort.supported(rand(2, 4097, 3, seed=1))


# --- the sliced distance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "family", "n"),
    [
        (64, "random", 70),
        (64, "axes:20+hadamard", 120),
        *(pytest.param(520, *more, marks=pytest.mark.slow) for more in (("hadamard", 70), ("random", 30))),
    ],
)
def test_distance_uses_the_kernels_and_agrees_with_float64(family: str, n: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlpjepa_zoo.ops.directions import direction_blocks
    from rlpjepa_zoo.ops.sliced_wasserstein import sliced_wasserstein

    launched: list[int] = []
    launch = triton_sort._launch
    monkeypatch.setattr(triton_sort, "_launch", lambda *args, **more: launched.append(1) or launch(*args, **more))
    z, y = rand(2, batch, 64, seed=1).requires_grad_(), rand(batch, 64, seed=2)
    blocks = direction_blocks(family, n, 64, torch.Generator(DEVICE).manual_seed(3))
    value = sliced_wasserstein(z, y, blocks, chunk=100)
    (grad,) = torch.autograd.grad(value, z)
    x = z.detach().double().requires_grad_()
    exact = oracles.sliced_autograd(x, y.double(), torch.cat([block.matrix() for block in blocks]).double())
    (expected,) = torch.autograd.grad(exact, x)
    assert len(launched) >= len(blocks), "torch did the work"
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    assert float((grad - expected).norm() / expected.norm()) < 5e-3


def test_batch_too_large_for_the_kernels_uses_torch() -> None:
    from rlpjepa_zoo.ops.sliced_wasserstein import sliced_wasserstein

    y = rand(triton_sort.LARGEST + 1, 8, seed=1)
    assert float(sliced_wasserstein(y.flip(0) + 1, y, torch.eye(8, device=DEVICE))) == pytest.approx(1, rel=1e-4)
