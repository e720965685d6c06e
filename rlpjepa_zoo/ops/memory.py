"""Memory of tensors on the CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["reused_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
"""Numbers of the parameters of mallopt, from glibc's malloc.h."""
_INSIDE = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 1 << 28}
"""No allocation has a mapping of its own, freed memory is not given back, and the heap grows by 256 MB at a time."""
_OUTSIDE = {_MMAP_MAX: 1 << 16, _TRIM_THRESHOLD: 1 << 26, _TOP_PAD: 1 << 17, _MMAP_THRESHOLD: 1 << 25}
"""What glibc has, or comes to after it has freed a large block."""
_CHOSEN = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")
"""Environment variables by which a user sets the same parameters."""
_LONG = 5.0
"""Seconds after which a block gives memory back at its end. After a shorter one glibc does it by its own rule, so that many short blocks cost little."""
_lock = threading.RLock()
_blocks = 0
"""Blocks of `reused_memory` that are entered."""


@functools.cache
def _glibc() -> Any:
    """The C library of this process if it is glibc, else None; also None if the user has chosen how it allocates."""
    if any(name in os.environ for name in _CHOSEN) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None


def _set(library: Any, parameters: dict[int, int]) -> None:
    for number, value in parameters.items():
        library.mallopt(number, value)


@contextmanager
def reused_memory(device: torch.device) -> Iterator[None]:
    """Keep memory that is freed inside the block for the next tensors; give it back at the end of the block.

    glibc maps every tensor above 32 MB anew and unmaps it when it is freed, so the kernel zeroes each page of each activation of each step. That
    takes up to half of the time of a forward pass on a CPU. In return the process may keep some times the size of its largest tensor.
    Nothing is done without glibc, for another device, if environment variables of glibc's malloc are set, or outside of the main thread,
    whose heap alone can hold tensors of any size.

    Args:
        device: where the tensors are.

    Example:
        >>> with reused_memory(torch.device("cpu")):
        ...     float(torch.ones(3).sum())
        3.0
    """
    global _blocks
    library = _glibc() if device.type == "cpu" and threading.current_thread() is threading.main_thread() else None
    if library is None:
        yield
        return
    started = time.monotonic()
    try:
        with _lock:
            _blocks += 1
            if _blocks == 1:
                _set(library, _INSIDE)
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                _set(library, _OUTSIDE)
                if time.monotonic() - started > _LONG:
                    library.malloc_trim(0)
