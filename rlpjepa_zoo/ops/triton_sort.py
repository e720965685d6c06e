"""The sliced distance on a GPU, by Triton: sort projections in registers, write differences in batch order, take one product for the gradient.

There are two kernels: `match_kernel` sorts projections that a matrix product left in memory, `project_kernel` also computes them. Each program
owns a few directions for the whole batch. So a target is sorted once for all views, sorting uses only registers (shared memory where a row
spans several warps), and each output is written once, by one program, without atomics.

**Why the gradient is a product over a buffer.** The gradient is sum_n g[n]^T c[n], a matrix product of 2 N V B D operations. If the kernel
added it up, every program would add a full (V, B, D) array into memory: N / BLOCK_N times V B D atomic additions (134 million for N = 8192,
V = 2, B = 256, D = 512, BLOCK_N = 16), in an order that changes from run to run, and the differences would pass through memory anyway to get
from sorted to batch order. So the differences of one chunk of directions go to a buffer, which the library's product reads: 4 chunk V B
bytes (4 MB for chunk 2048, V = 2, B = 256), small enough for the second-level cache.

**The tuner does not change the result.** Differences are elementwise, projections add coordinates in order, and sums of squares are halved
in a fixed order without fused multiply-adds. Block sizes and warps change which thread computes a number, not its bits.

**Keys.** A row of B numbers is padded to P, a power of two, and sorted as integers in the order of the float32 values. A view's key carries
its batch index in the low half, so a sorted key tells where the difference belongs: no argsort, no second pass, and stores never collide
because no index occurs twice. Padding has the largest key. A NaN has at most the same high half and a lower index, so the first B places of
a sorted row are always the B real ones, and no store leaves the row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and CPU wheels: `supported` returns False, and this file must still be importable
    triton = None

LARGEST = 4096
"""Largest batch that one program of `match_kernel` sorts: 16 keys for each of 256 threads."""
FUSED = 512
"""Largest batch for `project_kernel`: above it, too few directions fit the registers to reuse a loaded row."""


def supported(z: Tensor) -> bool:
    """Whether these kernels take z (..., B, D): float32 on an NVIDIA device (Ampere or newer) with Triton installed, B <= 4096.

    With TRITON_INTERPRET=1 in the environment (set before this module is imported) they also take CPU tensors, slowly: for tests.

    Example:
        >>> supported(torch.zeros(4, 2, dtype=torch.float64))
        False
    """
    if z.dtype != torch.float32 or z.dim() < 2 or z.shape[-2] > LARGEST:
        return False
    if z.is_cuda:
        return torch.version.hip is None and torch.cuda.get_device_capability(z.device) >= (8, 0) and _installed()
    return z.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and _installed()


def _installed() -> bool:
    return triton is not None


@torch.no_grad()
def match(projected: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Differences to the target of the same rank, in batch order.

    Args:
        projected: (n, 1 + V, B) contiguous float32, 1 <= B <= 4096; for each direction the target's projections, then each view's. Not changed.
        out: (n, V, B) contiguous, receives g; allocated when None.

    Returns:
        g (n, V, B): projection minus the target's projection of the same rank (equal projections are ranked in batch order), and its
        sums of squares (n,). A NaN projection makes its g and its sum NaN. The host does not wait and nothing is raised.

    Raises:
        ValueError: another dtype, shape or memory layout.

    Example:
        >>> projected = torch.tensor([[[0.0, 1.0, 2.0], [5.0, 4.0, 3.0]]], device="cuda")  # doctest: +SKIP
        >>> match(projected)[0]  # doctest: +SKIP
        tensor([[[3., 3., 3.]]], device='cuda:0')
    """
    _require(projected=projected)
    if projected.dim() != 3 or min(projected.shape) < 1 or projected.shape[1] < 2 or projected.shape[2] > LARGEST:
        raise ValueError(f"match: expected (n, 1 + V, B) with V >= 1 and 1 <= B <= {LARGEST}, got {tuple(projected.shape)}")
    n, rows, batch = projected.shape
    g, sums = projected.new_empty(n, rows - 1, batch) if out is None else out, projected.new_empty(n)
    _require(projected=projected, out=g)
    _match(projected, g, sums)
    return g, sums


@torch.no_grad()
def loss_and_gradient(z: Tensor, y: Tensor, c: Tensor, chunk: int, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sliced squared 2-Wasserstein distance, mean over directions, views and batch, and its gradient in z.

    The host does not wait for the device, so this may run in an opaque operator under torch.compile. The first call for a new (padded B, D,
    V, power of two of N) times block sizes, so make it before a CUDA graph is captured. The gradient is a product in torch's float32
    precision. Where TF32 is allowed its error is about 1e-3; `sliced_wasserstein` turns TF32 off. Value and ranks are float32 for B <= 512
    and follow the same setting above. Autocast has no effect.

    Args:
        z: (V, B, D) views. y: (B, D) target. c: (N, D) directions. Contiguous float32 on one device, B <= 4096, any D.
        chunk: directions per launch, >= 1; memory is 4 chunk V B bytes (and 4 chunk (1 + V) B above B = 512) plus a copy of y and z.
        gradient: whether to compute the gradient; without it, differences are not written.

    Returns:
        Scalar float32 (summed in float64), and 2 / (N V B) sum_n g[n]^T c[n] of z's shape, or None.

    Raises:
        ValueError: another dtype, shape or memory layout, or chunk < 1.

    Example:
        >>> y = torch.rand(8, 3, device="cuda")  # doctest: +SKIP
        >>> loss_and_gradient(y.flip(0)[None], y, torch.eye(3, device="cuda"), 2048, gradient=False)  # doctest: +SKIP
        (tensor(0., device='cuda:0'), None)
    """
    if chunk < 1:
        raise ValueError(f"loss_and_gradient: chunk must be >= 1, got {chunk}")
    samples = _samples(z, y, c)
    (views, batch, dim), n = z.shape, len(c)
    sums = z.new_empty(n)
    grad = z.new_zeros(views * batch, dim) if gradient else None
    buffer = z.new_empty(min(chunk, n), views, batch) if gradient else None
    for start in range(0, n, chunk):
        block = c[start : start + chunk]
        g = None if buffer is None else buffer[: len(block)]
        _project_and_match(samples, block, g, sums[start : start + chunk])
        if g is not None and grad is not None:
            grad.addmm_(g.view(len(block), -1).T, block)
    count = n * views * batch
    value = (sums.sum(dtype=torch.float64) / count).float()
    return value, None if grad is None else grad.mul_(2 / count).view_as(z)


# --- launching -----------------------------------------------------------------------------------------------------------------------


def _require(**tensors: Tensor) -> None:
    """Require contiguous float32 on one device, because the kernels' pointer arithmetic ignores strides."""
    for name, x in tensors.items():
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"triton_sort: expected {name} contiguous and float32, got {x.dtype} with strides {x.stride()}; pass .contiguous()"
            )
    if len({x.device for x in tensors.values()}) > 1:
        raise ValueError(f"triton_sort: expected one device, got {', '.join(f'{name} on {x.device}' for name, x in tensors.items())}")


def _samples(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """(1 + V, B, D), the target first; refuses inputs that do not fit together."""
    _require(z=z, y=y, c=c)
    fits = z.dim() == 3 and c.dim() == 2 and z.shape[1:] == y.shape and c.shape[1] == z.shape[2]
    if not fits or min(*z.shape, len(c)) < 1 or z.shape[1] > LARGEST:
        shapes = ", ".join(str(tuple(x.shape)) for x in (z, y, c))
        raise ValueError(f"triton_sort: expected z (V, B, D), y (B, D), c (N, D), none empty, B <= {LARGEST}, got {shapes}")
    return torch.cat([y.unsqueeze(0), z])


def _project_and_match(samples: Tensor, c: Tensor, g: Tensor | None, sums: Tensor) -> None:
    rows, batch, dim = samples.shape
    if batch > FUSED:
        projected = samples.new_empty(len(c), rows, batch)
        torch.mm(c, samples.view(-1, dim).T, out=projected.view(len(c), -1))  # `out` also keeps autocast away
        _match(projected, g, sums)
    else:
        _launch(_kernels()[1], (samples, c), g, sums, batch, VIEWS=rows - 1, DIM=dim)


def _match(projected: Tensor, g: Tensor | None, sums: Tensor) -> None:
    _launch(_kernels()[0], (projected,), g, sums, projected.shape[2], VIEWS=projected.shape[1] - 1)


def _launch(kernel: Any, inputs: tuple[Tensor, ...], g: Tensor | None, sums: Tensor, batch: int, **sizes: int) -> None:
    n, log = len(sums), max(4, (batch - 1).bit_length())  # `tl.dot` takes 16 columns in every version
    size = 1 << (n - 1).bit_length()  # the tuner chooses block sizes for each power of two
    with torch.cuda.device_of(sums):  # Triton launches on the current device
        kernel[lambda meta: (-(-n // meta["BLOCK_N"]),)](
            *inputs, sums if g is None else g, sums, n, batch, size, **sizes, WRITE=g is not None, P=1 << log, LOG_P=log, enable_fp_fusion=False
        )  # fmt: skip


@cache
def _kernels() -> tuple[Any, Any]:
    """`match_kernel` and `project_kernel` under their tuners; built on first use, when Triton is known to be installed."""

    def tuned(kernel: Any, configs: list[Any], key: list[str]) -> Any:
        if triton.knobs.runtime.interpret:  # nothing to time
            configs = [triton.Config({name: 16 if name == "BLOCK_N" else 64 for name in configs[0].kwargs})]
        return triton.autotune(configs, key=key, prune_configs_by={"early_config_prune": _fitting}, cache_results=True)(kernel)

    rows = [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (1, 4), (2, 4), (4, 4), (8, 4), (1, 8), (1, 16)]
    tiles = [(32, 1), (32, 2), (16, 4), (32, 4), (8, 4), (16, 8), (8, 8), (16, 16)]
    depths = [(16, 3), (32, 2)]  # coordinates per step, and stages of the pipeline that loads them
    match = [triton.Config({"BLOCK_N": n}, num_warps=warps) for n, warps in rows]
    project = [
        triton.Config({"BLOCK_N": n, "BLOCK_D": d}, num_warps=warps, num_stages=stages) for n, warps in tiles for d, stages in depths
    ]
    return (
        tuned(match_kernel, match, ["P", "VIEWS", "size"]),
        tuned(project_kernel, project, ["P", "DIM", "VIEWS", "size"]),
    )


def _fitting(configs: Iterable[Any], named: dict[str, Any], *, P: int, **_: Any) -> list[Any]:
    """Configurations with 8 to 16 numbers of a row per thread, so that 64-bit keys, targets and a tile fit 255 registers."""
    return [config for config in configs if 8 <= config.kwargs["BLOCK_N"] * P / (32 * config.num_warps) <= 16]


# --- kernels --------------------------------------------------------------------------------------------------------------------


def _jit(function: Callable[..., Any]) -> Any:
    return triton.jit(function) if triton else function


@_jit
def _flip(bits):  # type: ignore[no-untyped-def]
    """Bits of a float32 as the int32 of the same order, and back: the low bits of negative numbers are inverted."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@_jit
def _keys(x, real):  # type: ignore[no-untyped-def]
    """Integers in the order of x (-0 becomes +0, so that equal numbers stay in batch order); padding sorts last."""
    return tl.where(real, _flip((x + 0.0).to(tl.int32, bitcast=True)), 0x7FFFFFFF)


@_jit
def _values(keys):  # type: ignore[no-untyped-def]
    return _flip(keys).to(tl.float32, bitcast=True)


@_jit
def _row_sums(x, P: tl.constexpr, LOG_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of rows by halving, in a fixed order; the order of `tl.sum` depends on the block size and warps that the tuner chose."""
    for i in tl.static_range(LOG_P):
        x = tl.sum(tl.reshape(x, (x.shape[0], P >> (i + 1), 2)), axis=2)
    return tl.reshape(x, (x.shape[0],))


@_jit
def _difference(view, target, column, real, place, WRITE: tl.constexpr, P: tl.constexpr, LOG_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of squares of view minus the target of the same rank; if WRITE, stores the difference at the view's index in the row `place`."""
    keys = tl.sort((_keys(view, real).to(tl.int64) << 32) | column)
    difference = tl.where(real, _values((keys >> 32).to(tl.int32)) - target, 0.0)
    if WRITE:
        tl.store(place + keys.to(tl.int32), difference, mask=real)  # the cast keeps the low half: the index
    return _row_sums(difference * difference, P, LOG_P)


@_jit
def match_kernel(  # type: ignore[no-untyped-def]
    projected, g, sums, n, batch, size, VIEWS: tl.constexpr, WRITE: tl.constexpr, P: tl.constexpr, LOG_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """projected (n, 1 + VIEWS, batch), target first -> g (n, VIEWS, batch) if WRITE, sums (n,); `size` is used by the tuner only."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known, column = row < n, tl.arange(0, P)[None, :]
    real = known[:, None] & (column < batch)
    source = projected + row.to(tl.int64)[:, None] * ((1 + VIEWS) * batch) + column  # n * views * batch may exceed 2^31
    place = g + row.to(tl.int64)[:, None] * (VIEWS * batch)
    target = _values(tl.sort(_keys(tl.load(source, mask=real, other=0.0), real)))
    total = tl.zeros((BLOCK_N,), tl.float32)
    for _ in range(VIEWS):
        source += batch
        total += _difference(tl.load(source, mask=real, other=0.0), target, column, real, place, WRITE, P, LOG_P)
        place += batch
    tl.store(sums + row, total, mask=known)


@_jit
def _project(x, c, column, known, batch, DIM: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """(BLOCK_N, P) products of the directions at c and the rows of x (batch, DIM), in float32 throughout."""
    depth = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, P), tl.float32)
    for start in range(0, DIM, BLOCK_D):
        d = start + depth
        a = tl.load(c + d[None, :], mask=known[:, None] & (d < DIM)[None, :], other=0.0)
        b = tl.load(x + column * DIM + d[:, None], mask=(column < batch) & (d < DIM)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@_jit
def project_kernel(  # type: ignore[no-untyped-def]
    x, c, g, sums, n, batch, size, VIEWS: tl.constexpr, DIM: tl.constexpr, WRITE: tl.constexpr, P: tl.constexpr, LOG_P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`match_kernel` of x (1 + VIEWS, batch, DIM), target first, projected on c (n, DIM); projections are not written to memory."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known, column = row < n, tl.arange(0, P)[None, :]
    real = known[:, None] & (column < batch)
    c += row.to(tl.int64)[:, None] * DIM
    place = g + row.to(tl.int64)[:, None] * (VIEWS * batch)
    target = _values(tl.sort(_keys(_project(x, c, column, known, batch, DIM, P, BLOCK_N, BLOCK_D), real)))
    total = tl.zeros((BLOCK_N,), tl.float32)
    for _ in range(VIEWS):
        x += batch * DIM
        projected = _project(x, c, column, known, batch, DIM, P, BLOCK_N, BLOCK_D)
        total += _difference(projected, target, column, real, place, WRITE, P, LOG_P)
        place += batch
    tl.store(sums + row, total, mask=known)
