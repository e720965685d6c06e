"""The sliced 2-Wasserstein distance: value and gradient in one sweep over the directions.

Shapes: B batch, D embedding width, N directions, V views. On each direction the sorted projections of the embeddings are matched with the
sorted projections of the target; the permutation is constant almost everywhere, so the gradient of a projection is twice its distance to the
target value of the same rank. Nothing is kept for backward but the gradient itself, (V, B, D), and the work goes span by span over the
directions, so that what is at hand stays in cache and memory does not grow with N.

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

from . import triton_sort as kernels
from .directions import Part, Rotations, Rows
from .precision import full_float32

__all__ = ["sliced_wasserstein"]


def sliced_wasserstein(z: Tensor, y: Tensor, directions: Tensor | Part | Sequence[Part], chunk: int | None = None) -> Tensor:
    """Sliced squared 2-Wasserstein distance between two samples of equal size.

    mean over directions c, over ranks i and over views of (sort(Z c)_i - sort(Y c)_i)^2.

    Args:
        z: (B, D) or (V, B, D) embeddings; receives the gradient. float16 / bfloat16 are computed in float32.
        y: (B, D) sample of the target, same device, without gradient; one sample serves all views.
        directions: (N, D), rows of unit length, or the parts that `slices` makes.
        chunk: directions worked on at once (whole bases of `hadamard`); 128 for each thread of a CPU and 4096 elsewhere unless given. Peak extra
            memory is about 10 * chunk * V * B numbers and a few times the size of z, whatever N.

    Returns:
        Scalar >= 0, float32 (float64 for float64 `z`). For Z = 0 its expectation is mean(y^2); for matched samples it is not zero
        but a floor proportional to 1/B.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty batch, or a target that requires a gradient.
        RuntimeError: when differentiated twice; the permutation is a constant of the first derivative alone.

    Example:
        >>> from rlpjepa_zoo import directions
        >>> y = torch.rand(8, 3)
        >>> float(sliced_wasserstein(y.flip(0), y, directions("axes", 3, 3)))  # order of rows does not matter
        0.0
    """
    if isinstance(directions, Tensor):
        directions = Rows(directions.detach())
    parts: list[Part] = [directions] if isinstance(directions, Rows | Rotations) else list(directions)  # type: ignore[arg-type]
    _check(z, y, parts, chunk)
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        z = z.unsqueeze(0) if z.dim() == 2 else z
        y, count, total = y.to(z.dtype), sum(map(len, parts)), z.new_zeros(())
        for part in parts:
            table, rotated = part.table.to(z.device, z.dtype), isinstance(part, Rotations)
            low, high = (part.low, part.high) if isinstance(part, Rotations) else (0, len(part))
            wanted = z.requires_grad and torch.is_grad_enabled()
            value, _ = _distance(z, y, table, rotated, low, high, chunk or 0, wanted)
            total = total + value * (len(part) / count)
        return total


def _check(z: Tensor, y: Tensor, parts: Sequence[Part], chunk: int | None) -> None:
    tables = [part.table for part in parts]
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
    if z.numel() == 0 or not sum(map(len, parts)):
        raise ValueError("sliced_wasserstein: empty batch or no directions")
    if y.requires_grad:
        raise ValueError("sliced_wasserstein: the target must not require a gradient; pass y.detach()")
    if chunk is not None and chunk < 1:
        raise ValueError(f"sliced_wasserstein: chunk must be >= 1, got {chunk}")


# --- the operator -------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("rlpjepa_zoo::sliced_wasserstein", mutates_args=())
def _distance(z: Tensor, y: Tensor, table: Tensor, rotated: bool, low: int, high: int, chunk: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """Mean squared distance for z (V, B, D), and its gradient (empty if not wanted); opaque to torch.compile. A chunk of 0 is for us to choose."""
    chunk = chunk or (128 * torch.get_num_threads() if z.device.type == "cpu" else 4096)  # what stays in the caches of the cores
    with full_float32():
        if not rotated and kernels.supported(z):
            value, grad = kernels.loss_and_gradient(z.contiguous(), y.contiguous(), table.contiguous(), chunk, gradient)
            return value, z.new_empty(0) if grad is None else grad
        return _sweep(z, y, Rotations(table, low, high) if rotated else Rows(table), chunk, gradient)


def _sweep(z: Tensor, y: Tensor, part: Part, chunk: int, gradient: bool) -> tuple[Tensor, Tensor]:
    views, batch, dim = z.shape
    spread = part.spread(torch.cat([y.unsqueeze(0), z]).view(-1, dim).T.contiguous())  # (D, (1 + V) B): the target first
    grad = z.new_zeros(dim, views * batch) if gradient else None
    total = torch.zeros((), dtype=_wide(z), device=z.device)
    for first, last in part.spans(chunk):
        projected = part.project(spread, first, last).view(-1, 1 + views, batch)
        gaps = projected.new_empty(last - first, views, batch)
        for rows, out in zip(projected.split(chunk), gaps.split(chunk), strict=True):
            _match(rows, out)
            total += out.square().sum(dim=(1, 2)).sum(dtype=total.dtype)
        if grad is not None:
            grad += part.back(gaps.view(len(gaps), -1), first, last)
    count = len(part) * views * batch
    value = (total / count).to(z.dtype)
    if grad is None:
        return value, z.new_empty(0)
    return value, part.gather(grad).mul_(2 / count).T.reshape(z.shape).contiguous()


@_distance.register_fake
def _(z: Tensor, y: Tensor, table: Tensor, rotated: bool, low: int, high: int, chunk: int, gradient: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty(()), torch.empty_like(z, memory_format=torch.contiguous_format) if gradient else z.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, value: Tensor | None, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is not None:
        raise RuntimeError("sliced_wasserstein: has no second derivative; its gradient was differentiated")
    (kept,) = ctx.saved_tensors
    return None if value is None else kept * value, *[None] * 7


_distance.register_autograd(_backward, setup_context=_keep)


def _wide(z: Tensor) -> torch.dtype:
    """In which sums of squares add up."""
    return torch.float32 if z.device.type == "mps" else torch.float64  # Apple's GPUs have no float64


# --- matching by rank ---------------------------------------------------------------------------------------------------------------


def _match(projected: Tensor, out: Tensor) -> None:
    """Signed distance of every projection to the target's projection of the same rank.

    Args:
        projected: (n, 1 + V, B), the target's projections first, then those of each view.
        out: (n, V, B), where they are written, in the order of the batch.
    """
    if kernels.supported(projected.mT):  # which looks for B in the last place but one
        kernels.match(projected, out)
        return
    target, views = projected[:, :1], projected[:, 1:]
    fast = projected.device.type == "cpu" and projected.dtype == torch.float32
    values, order = (_sorted_by_numpy if fast else _sorted_by_torch)(target, views)
    torch.sub(views, out.scatter_(2, order, values.expand_as(order)), out=out)


def _sorted_by_torch(target: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the target in order, and the order of the views: any dtype and device; the oracle of the faster ways."""
    return target.sort(dim=2).values, views.sort(dim=2, stable=True).indices


def _sorted_by_numpy(target: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    """The same for float32 on a CPU. numpy sorts numbers with vector instructions, but not while it carries indices, so the index rides in the
    low half of a 64-bit key whose high half orders like the float."""
    bits = views.view(torch.int32)
    keys = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).to(torch.int64)  # negative floats order backwards as integers
    keys.bitwise_left_shift_(32).bitwise_or_(torch.arange(views.shape[2], device=views.device))
    values = target.contiguous()
    _sort_rows(values.numpy())
    _sort_rows(keys.numpy())
    return values, keys.bitwise_and_(0xFFFFFFFF)


def _sort_rows(x: np.ndarray[Any, Any]) -> None:
    """Sort along the last axis in place, on as many threads as torch uses; numpy lets go of the interpreter meanwhile."""
    rows, threads = x.reshape(-1, x.shape[-1]), torch.get_num_threads()
    if threads == 1 or rows.size <= 1 << 17:  # less is sorted sooner than handed out
        rows.sort(axis=1)
        return
    try:
        list(_pool(threads).map(lambda part: part.sort(axis=1), np.array_split(rows, threads)))
    except RuntimeError:  # the interpreter is ending and takes no more work; what is sorted already stays so
        rows.sort(axis=1)


@lru_cache(1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sort")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
