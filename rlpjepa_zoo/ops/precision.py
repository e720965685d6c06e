"""Float32 matrix products in full float32, whatever precision the process allows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_float32"]

_lock = threading.Lock()
_inside = 0
"""Number of threads inside the context."""
_before: list[tuple[Any, str]] = []
"""Backends whose precision was changed, and the precision to restore."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Context in which float32 products use neither TF32 nor bfloat16: those would change the order of close projections.

    torch keeps the setting for the whole process. So the first thread that enters changes it, only where another precision is allowed, and
    the last thread that leaves restores it.
    """
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            for backend in (torch.backends.cuda.matmul, vars(torch.backends)["mkldnn"].matmul):
                if backend.fp32_precision not in ("ieee", "none"):
                    _before.append((backend, backend.fp32_precision))
                    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            while not _inside and _before:
                backend, value = _before.pop()
                backend.fp32_precision = "none"
                if backend.fp32_precision != value:  # the value was not inherited from a more general setting
                    backend.fp32_precision = value
