"""Validation errors of recipes, each in one line."""

from __future__ import annotations

import math
import re

from pydantic import BaseModel, ValidationError

from ..errors import did_you_mean
from .base import section_at

__all__ = ["explain"]

_ACCUMULATION = (
    "gradient accumulation is refused: the loss compares the whole batch with the target, and accumulated parts would each be compared "
    "alone; use more processes or a smaller train.batch_size"
)


def explain(error: ValidationError, recipe: type[BaseModel]) -> str:
    """Describe the first problem in one line: dotted key, what was given, what was expected.

    Args:
        error: from pydantic.
        recipe: the class whose validation failed; gives the known keys.
    """
    problems = error.errors()
    first = problems[0]
    location = [str(part) for part in first["loc"]]
    if location[:2] == ["target", "sigma"]:
        location = location[:2]  # pydantic appends the members of the union
    name, more = ".".join(location), f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        if "accum" in location[-1]:
            return f"{name}: {_ACCUMULATION}"
        section = section_at(recipe, location[:-1]) or recipe
        hint = did_you_mean(location[-1], section.model_fields) or f" Known keys: {', '.join(section.model_fields)}"
        return f"{name}: unknown key.{hint}{more}"
    if first["type"] == "missing":
        return f"{name}: missing; it has no default{more}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"]) + more
    if name == "target.sigma":
        return f"target.sigma: got {first['input']!r}, expected gn, rgn or a number greater than 0"
    if name == "target.density":
        return f"target.density: got {first['input']!r}, expected a number strictly between 0 and 1{more}"
    expected = re.sub(r"^Input should be ", "", first["msg"]).split(", unable")[0]
    given = first["input"]
    if isinstance(given, float) and not math.isfinite(given):
        expected = "a finite number"
    return f"{name}: got {given!r}, expected {expected}{more}"
