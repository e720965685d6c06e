"""Types of recipe values that depend on tables, and the conversion of free-form mappings."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import yaml
from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from ..errors import did_you_mean

__all__ = ["OneOf", "parse_scalars"]


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


class OneOf:
    """Annotation of a text field whose value must be a key of a table. The table is read at validation, so rows can be added.

    Args:
        table: the values by name.
        without: keys that this field does not accept.
    """

    def __init__(self, table: Mapping[str, Any], without: Collection[str] = ()) -> None:
        self.table, self.without = table, without

    def names(self) -> list[str]:
        """Accepted values."""
        return [name for name in self.table if name not in self.without]

    def _check(self, value: str) -> str:
        if value not in self.names():
            expected = f"one of {', '.join(self.names())}.{did_you_mean(value, self.names())}"
            raise PydanticCustomError("one_of", "{expected}", {"expected": expected.rstrip(".")})
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))
