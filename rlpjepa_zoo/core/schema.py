"""Base class and number types of recipe sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Count", "Finite", "NonNegative", "Positive", "Probability", "Section"]

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all recipe sections: frozen, refuses unknown keys. The docstring under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _text_to_none(cls, values: Any) -> Any:
        """Read `key:` and `key: null` as None: values arrive as text, see `rlpjepa_zoo.config.load`."""
        if not isinstance(values, dict):
            return values
        return {k: None if isinstance(v, str) and v in ("", "null", "~") else v for k, v in values.items()}
