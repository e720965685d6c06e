"""Matrix products of float32 in full float32, whatever is allowed elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_float32"]

_lock = threading.Lock()
_inside = 0
_before: list[tuple[Any, str]] = []


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, TF32 and bfloat16 do not stand in for float32 products: they would move projections past each other.

    torch keeps the choice for the whole process. So it is changed only where something else is allowed, by the first thread that comes in,
    and given back by the last that leaves.
    """
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            for place in (torch.backends.cuda.matmul, vars(torch.backends)["mkldnn"].matmul):
                if place.fp32_precision not in ("ieee", "none"):
                    _before.append((place, place.fp32_precision))
                    place.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            while not _inside and _before:
                place, value = _before.pop()
                place.fp32_precision = "none"
                if place.fp32_precision != value:  # it was not inherited from a more general setting
                    place.fp32_precision = value
