"""The sliced distance on a GPU, by Triton: projections sorted in registers, differences written in batch order, one product for the gradient.

Two kernels (`triton_kernels`): `match` sorts projections that a matrix product left in memory, `project_and_match` makes them itself.
Each program owns a few directions for the whole batch, so a target is sorted once for all views, sorting needs no memory but registers
(shared memory where a row spans several warps), and every output number is written once, by one program: no atomics, no order of events.

**Why the gradient is a product over a buffer.** It is sum_n g[n]^T c[n], a matrix product of 2 N V B D operations. Added up inside the
kernel, every program would have to add a full (V, B, D) array into memory, and programs would meet there: N / BLOCK_N times V B D atomic
additions (134 million for N = 8192, V = 2, B = 256, D = 512, BLOCK_N = 16), in an order that changes from run to run, after the
differences had gone from sorted to batch order through memory anyway. So the differences of one chunk of directions go to a buffer, which
the library's product reads back: 4 chunk V B bytes (4 MB for chunk 2048, V = 2, B = 256), small enough to stay in the second-level cache.

**Same numbers whatever the tuner picks.** Differences are elementwise, projections add coordinates in order, and sums of squares are
halved in a fixed order without fused multiply-adds; block sizes and warps change who computes a number, not its bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

LARGEST = 4096  # batch that `match` sorts in one program: 16 keys for each of 256 threads
FUSED = 512  # batch up to which projecting in the kernel pays: above, too few directions fit the registers to use a loaded row again


def supported(z: Tensor) -> bool:
    """Whether these kernels can work on z (..., B, D): float32 on an NVIDIA device (Ampere or newer) with Triton at hand, B <= 4096.

    With TRITON_INTERPRET=1 in the environment (set before Triton is first imported) tensors on the CPU can too, slowly: for tests.

    Example:
        >>> supported(torch.zeros(4, 2, dtype=torch.float64))
        False
    """
    if z.dtype != torch.float32 or z.dim() < 2 or z.shape[-2] > LARGEST:
        return False
    if z.is_cuda:
        return torch.version.hip is None and torch.cuda.get_device_capability(z.device) >= (8, 0) and _installed()
    return z.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@torch.no_grad()
def match(projected: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Differences to the target of the same rank, in batch order.

    Args:
        projected: (n, 1 + V, B) contiguous float32, 1 <= B <= 4096; in each direction the target's projections, then each view's. Kept.
        out: (n, V, B) contiguous, where g is written; made if not given.

    Returns:
        g (n, V, B): projection minus the target's of the same rank (equal projections are ranked in batch order), and its sums of
        squares (n,). A projection that is NaN makes its g and its sum NaN; nothing raises and nothing is waited for.

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
def project_and_match(z: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """`match` of the projections of y and z on c, which for B <= 512 never reach memory.

    Larger batches go through one matrix product, which follows torch's TF32 setting (`sliced` sees to it that it is off), and
    (n, 1 + V, B) numbers of memory.

    Args:
        z: (V, B, D) views. y: (B, D) target. c: (n, D) directions. Contiguous float32 on one device, B <= 4096, any D.

    Returns:
        g (n, V, B) and its sums of squares (n,), as `match`.

    Raises:
        ValueError: another dtype, shape or memory layout.

    Example:
        >>> g, sums = project_and_match(torch.rand(2, 8, 3).cuda(), torch.rand(8, 3).cuda(), torch.eye(3).cuda())  # doctest: +SKIP
    """
    samples = _samples(z, y, c)
    g, sums = z.new_empty(len(c), *z.shape[:2]), z.new_empty(len(c))
    _project_and_match(samples, c, g, sums)
    return g, sums


@torch.no_grad()
def loss_and_gradient(z: Tensor, y: Tensor, c: Tensor, chunk: int, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sliced squared 2-Wasserstein distance, mean over directions, views and batch, and its gradient in z.

    The host waits for nothing, so this may lie in an opaque operator under torch.compile; the first call for a new (padded B, D, V,
    power of two of N) times block sizes, so make it before a CUDA graph is captured. The gradient is a product in torch's float32
    precision: TF32 where TF32 products are allowed, which `sliced` does not let happen and which would leave an error of about 1e-3; value
    and ranks are float32 for B <= 512 and follow the same setting above. Autocast changes nothing here.

    Args:
        z: (V, B, D) views. y: (B, D) target. c: (N, D) directions. Contiguous float32 on one device, B <= 4096, any D.
        chunk: directions at once, >= 1; memory is 4 chunk V B bytes (and 4 chunk (1 + V) B above B = 512) besides a copy of y and z.
        gradient: whether to make it; without, differences are not written.

    Returns:
        Scalar float32 (added up in float64), and 2 / (N V B) sum_n g[n]^T c[n] of z's shape, or None.

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
    """Pointer arithmetic knows no strides."""
    for name, x in tensors.items():
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"kernels: expected {name} contiguous and float32, got {x.dtype} with strides {x.stride()}; pass .contiguous()"
            )
    if len({x.device for x in tensors.values()}) > 1:
        raise ValueError(f"kernels: expected one device, got {', '.join(f'{name} on {x.device}' for name, x in tensors.items())}")


def _samples(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """(1 + V, B, D), the target first, of inputs that fit together."""
    _require(z=z, y=y, c=c)
    fits = z.dim() == 3 and c.dim() == 2 and z.shape[1:] == y.shape and c.shape[1] == z.shape[2]
    if not fits or min(*z.shape, len(c)) < 1 or z.shape[1] > LARGEST:
        shapes = ", ".join(str(tuple(x.shape)) for x in (z, y, c))
        raise ValueError(f"kernels: expected z (V, B, D), y (B, D), c (N, D), none empty, B <= {LARGEST}, got {shapes}")
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
    n, log = len(sums), max(4, (batch - 1).bit_length())  # every version of `tl.dot` takes 16 columns
    size = 1 << (n - 1).bit_length()  # block sizes are chosen anew for each power of two of directions
    with torch.cuda.device_of(sums):  # Triton launches on the current device
        kernel[lambda meta: (-(-n // meta["BLOCK_N"]),)](
            *inputs, sums if g is None else g, sums, n, batch, size, **sizes, WRITE=g is not None, P=1 << log, LOG_P=log, enable_fp_fusion=False
        )  # fmt: skip


@cache
def _kernels() -> tuple[Any, Any]:
    """`match_kernel` and `project_kernel` under their tuners; made on first use, since Triton is slow to import and not everywhere."""
    import triton

    from . import triton_kernels

    def tuned(kernel: Any, configs: list[Any], key: list[str]) -> Any:
        if triton.knobs.runtime.interpret:  # there is nothing to time
            configs = [triton.Config({name: 16 if name == "BLOCK_N" else 64 for name in configs[0].kwargs})]
        return triton.autotune(configs, key=key, prune_configs_by={"early_config_prune": _fitting}, cache_results=True)(kernel)

    rows = [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (1, 4), (2, 4), (4, 4), (8, 4), (1, 8), (1, 16)]
    tiles = [(32, 1), (32, 2), (16, 4), (32, 4), (8, 4), (16, 8), (8, 8), (16, 16)]
    depths = [(16, 3), (32, 2)]  # coordinates at once, and stages of the pipeline that fetches them
    match = [triton.Config({"BLOCK_N": n}, num_warps=warps) for n, warps in rows]
    project = [
        triton.Config({"BLOCK_N": n, "BLOCK_D": d}, num_warps=warps, num_stages=stages) for n, warps in tiles for d, stages in depths
    ]
    return (
        tuned(triton_kernels.match_kernel, match, ["P", "VIEWS", "size"]),
        tuned(triton_kernels.project_kernel, project, ["P", "DIM", "VIEWS", "size"]),
    )


def _fitting(configs: Iterable[Any], named: dict[str, Any], *, P: int, **_: Any) -> list[Any]:
    """Configurations that give each thread 8 to 16 numbers of a row: 64-bit keys, targets and what a tile needs then fit 255 registers."""
    return [config for config in configs if 8 <= config.kwargs["BLOCK_N"] * P / (32 * config.num_warps) <= 16]
