"""Triton kernels of the sliced distance: sort in registers, take the difference, write it in batch order. Launched by `kernels`.

A row of B numbers is padded to P, a power of two, and sorted as integers whose order is that of the float32 values. A view's key carries
its batch index in the low half, so a sorted key says which number it is and where the difference belongs: no argsort, no second pass, and
since no index occurs twice, stores never collide. Padding has the largest key: a real NaN has at most the same high half and a lower
index, so the first B places of a sorted row are always the B real ones, NaN or not, and no store leaves the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, CPU wheels: `kernels.supported` says no, and this file only has to be importable
    triton = None


def _jit(function: Callable[..., Any]) -> Any:
    return triton.jit(function) if triton else function


@_jit
def _flip(bits):  # type: ignore[no-untyped-def]
    """Bits of a float32 as the int32 of the same order, and back: the low bits of negative numbers are inverted."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@_jit
def _keys(x, real):  # type: ignore[no-untyped-def]
    """Integers in the order of x (-0 is made +0, so that equal numbers stay in batch order); places that are not real come last."""
    return tl.where(real, _flip((x + 0.0).to(tl.int32, bitcast=True)), 0x7FFFFFFF)


@_jit
def _values(keys):  # type: ignore[no-untyped-def]
    return _flip(keys).to(tl.float32, bitcast=True)


@_jit
def _row_sums(x, P: tl.constexpr, LOG_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of rows by halving: always in one order, while that of `tl.sum` depends on the block size and warps the tuner chose."""
    for i in tl.static_range(LOG_P):
        x = tl.sum(tl.reshape(x, (x.shape[0], P >> (i + 1), 2)), axis=2)
    return tl.reshape(x, (x.shape[0],))


@_jit
def _difference(view, target, column, real, place, WRITE: tl.constexpr, P: tl.constexpr, LOG_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """View minus the target of the same rank: stored, if wanted, at the view's index in the row at `place`; its sums of squares."""
    keys = tl.sort((_keys(view, real).to(tl.int64) << 32) | column)
    difference = tl.where(real, _values((keys >> 32).to(tl.int32)) - target, 0.0)
    if WRITE:
        tl.store(place + keys.to(tl.int32), difference, mask=real)  # the cast keeps the low half, the index
    return _row_sums(difference * difference, P, LOG_P)


@_jit
def match_kernel(  # type: ignore[no-untyped-def]
    projected, g, sums, n, batch, size, VIEWS: tl.constexpr, WRITE: tl.constexpr, P: tl.constexpr, LOG_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """projected (n, 1 + VIEWS, batch), target first -> g (n, VIEWS, batch) if WRITE, sums (n,); `size` is only a key of the tuner."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known, column = row < n, tl.arange(0, P)[None, :]
    real = known[:, None] & (column < batch)
    source = projected + row.to(tl.int64)[:, None] * ((1 + VIEWS) * batch) + column  # n * views * batch may pass 2^31
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
    """(BLOCK_N, P) products of the directions whose rows c points to and the rows of x (batch, DIM), in float32 throughout."""
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
    """`match_kernel` of x (1 + VIEWS, batch, DIM), target first, projected on c (n, DIM) without the projections reaching memory."""
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
