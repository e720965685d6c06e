"""Base class and number types of recipe sections."""

from __future__ import annotations

import re
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Count", "Finite", "NonNegative", "Positive", "Probability", "Section", "parse_scalars"]

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def parse_scalars(value: Any) -> Any:
    """Convert the text scalars of a free-form mapping to the values that YAML gives them, and ``1e-3`` to a number."""
    if isinstance(value, dict):
        return {k: parse_scalars(v) for k, v in value.items()}
    if isinstance(value, list):
        return [parse_scalars(v) for v in value]
    if isinstance(value, str):
        try:
            return float(value) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) else yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            return value
    return value


class Section(BaseModel):
    """Base of all recipe sections: frozen, refuses unknown keys. The docstring under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_none(cls, values: Any) -> Any:
        """Read `key:` and `key: null` as None."""
        return (
            {k: None if isinstance(v, str) and v in ("", "null", "~") else v for k, v in values.items()}
            if isinstance(values, dict)
            else values
        )
