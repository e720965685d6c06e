"""Training objectives by name; each other file of this folder may register one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.registry import Registry

if TYPE_CHECKING:
    from .base import Objective

__all__ = ["OBJECTIVES", "list_objectives"]

OBJECTIVES: Registry[type[Objective]] = Registry("objective", __name__)


def list_objectives() -> list[str]:
    """Names that `objective.name` of a recipe can have.

    Example:
        >>> "rectified_lpjepa" in list_objectives()
        True
    """
    return list(OBJECTIVES)
