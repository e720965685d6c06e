"""The sliced 2-Wasserstein distance: value and gradient in one pass over the directions.

Shapes: B batch, D embedding width, N directions, V views. On each direction the sorted projections of the embeddings are matched with the
sorted projections of the target. The permutation is constant almost everywhere, so the gradient of a projection is twice its distance to the
target value of the same rank. Backward keeps only the gradient itself, (V, B, D). The directions are processed in chunks, so that the working
set stays in cache and memory does not grow with N.

Source: arXiv 2602.01456, section 4 (RDMReg): the mean over directions of the squared differences of sorted projections.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import triton_sort
from .directions import DirectionBlock, DirectionMatrix
from .hadamard import Rotations
from .precision import full_float32

__all__ = ["sliced_wasserstein"]


def sliced_wasserstein(
    z: Tensor, y: Tensor, directions: Tensor | DirectionBlock | Sequence[DirectionBlock], chunk: int | None = None
) -> Tensor:
    """Sliced squared 2-Wasserstein distance between two samples of equal size.

    mean over directions c, over ranks i and over views of (sort(Z c)_i - sort(Y c)_i)^2.

    Args:
        z: (B, D) or (V, B, D) embeddings; receives the gradient. float16 / bfloat16 are computed in float32.
        y: (B, D) sample of the target, same device, without gradient; one sample serves all views.
        directions: (N, D), rows of unit length, or blocks from `direction_blocks`.
        chunk: directions per chunk (complete bases of `hadamard`); by default 128 for each thread of a CPU and 4096 elsewhere. Peak extra
            memory is about 10 * chunk * V * B numbers and a few times the size of z, whatever N.

    Returns:
        Scalar >= 0, float32 (float64 for float64 `z`). For Z = 0 its expectation is mean(y^2); for matched samples it is a
        floor proportional to 1/B, not zero.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty batch, or a target that requires a gradient.
        RuntimeError: when differentiated twice; the permutation is constant in the first derivative only.

    Example:
        >>> from rlpjepa_zoo import directions
        >>> y = torch.rand(8, 3)
        >>> float(sliced_wasserstein(y.flip(0), y, directions("axes", 3, 3)))  # the order of rows does not matter
        0.0
    """
    if isinstance(directions, Tensor):
        directions = DirectionMatrix(directions.detach())
    blocks: list[DirectionBlock]
    blocks = [directions] if isinstance(directions, DirectionMatrix | Rotations) else list(directions)  # type: ignore[arg-type]
    _check(z, y, blocks, chunk)
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        z = z.unsqueeze(0) if z.dim() == 2 else z
        y, count, total = y.to(z.dtype), sum(map(len, blocks)), z.new_zeros(())
        for block in blocks:
            table, rotated = block.table.to(z.device, z.dtype), isinstance(block, Rotations)
            low, high = (block.low, block.high) if isinstance(block, Rotations) else (0, len(block))
            wanted = z.requires_grad and torch.is_grad_enabled()
            value, _ = _distance(z, y, table, rotated, low, high, chunk or 0, wanted)
            total = total + value * (len(block) / count)
        return total


def _check(z: Tensor, y: Tensor, blocks: Sequence[DirectionBlock], chunk: int | None) -> None:
    tables = [block.table for block in blocks]
    shapes = ", ".join(str(tuple(table.shape)) for table in tables)
    if z.dim() not in (2, 3) or y.dim() != 2 or any(table.dim() != 2 for table in tables):
        raise ValueError(
            f"sliced_wasserstein: expected z (B, D) or (V, B, D), y (B, D), directions (N, D), got {tuple(z.shape)}, {tuple(y.shape)}, {shapes}"
        )
    if z.shape[-2:] != y.shape or any(table.shape[1] != y.shape[1] for table in tables):
        raise ValueError(f"sliced_wasserstein: sizes differ: z {tuple(z.shape)}, y {tuple(y.shape)}, directions {shapes}")
    if not z.is_floating_point() or y.device != z.device:
        raise ValueError(
            f"sliced_wasserstein: expected floating-point z and y on one device, got {z.dtype} on {z.device} and y on {y.device}"
        )
    if z.numel() == 0 or not sum(map(len, blocks)):
        raise ValueError("sliced_wasserstein: empty batch or no directions")
    if y.requires_grad:
        raise ValueError("sliced_wasserstein: the target must not require a gradient; pass y.detach()")
    if chunk is not None and chunk < 1:
        raise ValueError(f"sliced_wasserstein: chunk must be >= 1, got {chunk}")


# --- the operator -------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("rlpjepa_zoo::sliced_wasserstein", mutates_args=())
def _distance(z: Tensor, y: Tensor, table: Tensor, rotated: bool, low: int, high: int, chunk: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """Mean squared distance for z (V, B, D), and its gradient (empty if not wanted); opaque to torch.compile. A chunk of 0 means the default."""
    chunk = chunk or (128 * torch.get_num_threads() if z.device.type == "cpu" else 4096)  # fits the caches of the cores
    with full_float32():
        if not rotated and triton_sort.supported(z):
            value, grad = triton_sort.loss_and_gradient(z.contiguous(), y.contiguous(), table.contiguous(), chunk, gradient)
            return value, z.new_empty(0) if grad is None else grad
        return _sum_over_chunks(z, y, Rotations(table, low, high) if rotated else DirectionMatrix(table), chunk, gradient)


def _sum_over_chunks(z: Tensor, y: Tensor, block: DirectionBlock, chunk: int, gradient: bool) -> tuple[Tensor, Tensor]:
    views, batch, dim = z.shape
    prepared = block.prepare(torch.cat([y.unsqueeze(0), z]).view(-1, dim).T.contiguous())  # (D, (1 + V) B), the target first
    grad = z.new_zeros(dim, views * batch) if gradient else None
    total = torch.zeros((), dtype=_sum_dtype(z), device=z.device)
    for first, last in block.chunks(chunk):
        projected = block.project(prepared, first, last).view(-1, 1 + views, batch)
        gaps = projected.new_empty(last - first, views, batch)
        for rows, out in zip(projected.split(chunk), gaps.split(chunk), strict=True):
            _match(rows, out)
            total += out.square().sum(dim=(1, 2)).sum(dtype=total.dtype)
        if grad is not None:
            grad += block.project_back(gaps.view(len(gaps), -1), first, last)
    count = len(block) * views * batch
    value = (total / count).to(z.dtype)
    if grad is None:
        return value, z.new_empty(0)
    return value, block.prepare_back(grad).mul_(2 / count).T.reshape(z.shape).contiguous()


@_distance.register_fake
def _(z: Tensor, y: Tensor, table: Tensor, rotated: bool, low: int, high: int, chunk: int, gradient: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty(()), torch.empty_like(z, memory_format=torch.contiguous_format) if gradient else z.new_empty(0)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, value: Tensor | None, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is not None:
        raise RuntimeError("sliced_wasserstein: has no second derivative; its gradient was differentiated")
    (saved,) = ctx.saved_tensors
    return None if value is None else saved * value, *[None] * 7


_distance.register_autograd(_backward, setup_context=_save_gradient)


def _sum_dtype(z: Tensor) -> torch.dtype:
    """The dtype of sums of squares."""
    return torch.float32 if z.device.type == "mps" else torch.float64  # Apple's GPUs have no float64


# --- matching by rank ---------------------------------------------------------------------------------------------------------------


def _match(projected: Tensor, out: Tensor) -> None:
    """Signed distance of each projection to the target's projection of the same rank.

    Args:
        projected: (n, 1 + V, B), the target's projections first, then those of each view.
        out: (n, V, B), receives the distances, in batch order.
    """
    if triton_sort.supported(projected.mT):  # `supported` expects B in the last dimension but one
        triton_sort.match(projected, out)
        return
    target, views = projected[:, :1], projected[:, 1:]
    fast = projected.device.type == "cpu" and projected.dtype == torch.float32
    values, order = (_sorted_by_numpy if fast else _sorted_by_torch)(target, views)
    torch.sub(views, out.scatter_(2, order, values.expand_as(order)), out=out)


def _sorted_by_torch(target: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted values of the target, and the order of the views, for any dtype and device; the reference of the faster sorts."""
    return target.sort(dim=2).values, views.sort(dim=2, stable=True).indices


def _sorted_by_numpy(target: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    """`_sorted_by_torch` for float32 on a CPU. numpy sorts with vector instructions only without indices, so a 64-bit key carries the index in
    its low half and an integer in the order of the float in its high half."""
    bits = views.view(torch.int32)
    keys = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).to(torch.int64)  # as integers, negative floats have the reverse order
    keys.bitwise_left_shift_(32).bitwise_or_(torch.arange(views.shape[2], device=views.device))
    values = target.contiguous()
    _sort_rows(values.numpy())
    _sort_rows(keys.numpy())
    return values, keys.bitwise_and_(0xFFFFFFFF)


def _sort_rows(x: np.ndarray[Any, Any]) -> None:
    """Sort along the last axis in place, on as many threads as torch uses; numpy releases the interpreter lock while it sorts."""
    rows, threads = x.reshape(-1, x.shape[-1]), torch.get_num_threads()
    if threads == 1 or rows.size <= 1 << 17:  # for fewer numbers, threads cost more than they save
        rows.sort(axis=1)
        return
    try:
        list(_pool(threads).map(lambda share: share.sort(axis=1), np.array_split(rows, threads)))
    except RuntimeError:  # the interpreter is shutting down and takes no more work; rows already sorted stay sorted
        rows.sort(axis=1)


@lru_cache(1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sort")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of its parent's threads
