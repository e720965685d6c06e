"""Methods that turn features of a frozen backbone into sparse codes. Each class registers itself in `METHODS`; a new class is a new method."""

from __future__ import annotations

from ...core.registry import Registry
from .base import Method

__all__ = ["METHODS"]

METHODS: Registry[type[Method]] = Registry("method", "rlpjepa_zoo.bench.methods")
"""Methods by the name that `rlpjepa bench codes --methods` takes."""
