"""Probes of the frozen evaluation. Each module registers one probe in `PROBES`; a new file is a new probe."""

from __future__ import annotations

from ...core.registry import Registry
from .base import Probe

__all__ = ["PROBES"]

PROBES: Registry[type[Probe]] = Registry("probe", "rlpjepa_zoo.evaluation.probes")
