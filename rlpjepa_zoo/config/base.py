"""Types of recipe values that depend on tables, and the conversion of free-form mappings."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from ..errors import did_you_mean

__all__ = ["OneOf", "Plain", "holds_text", "parse_scalars", "section_at"]


_LONGEST_NUMBER = 400
"""Longer scalars of a free-form mapping are text."""


class Plain(str):
    """A scalar without quotes, as `rlpjepa_zoo.config.load` reads it: text that may stand for a number. Quoted scalars are plain `str`."""


def parse_scalars(value: Any) -> Any:
    """Convert the unquoted scalars of a free-form mapping to the numbers, booleans and nulls that YAML reads in them.

    ``1e-3`` is a number too. Other text stays as it is.
    """
    if isinstance(value, dict):
        return {k: parse_scalars(v) for k, v in value.items()}
    if isinstance(value, list):
        return [parse_scalars(v) for v in value]
    if isinstance(value, Plain):
        with suppress(yaml.YAMLError, ValueError, RecursionError):
            if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
                return float(value)
            node = yaml.compose(value, yaml.SafeLoader) if len(value) <= _LONGEST_NUMBER else None
            if isinstance(node, yaml.ScalarNode) and node.value == value:  # else it has quotes or a comment
                number = yaml.safe_load(value)
                return number if isinstance(number, int | float | None) else str(value)
        return str(value)
    return value


def section_at(recipe: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """Return the class of the section that dotted keys lead to; None if there is none, or if it depends on values.

    Args:
        recipe: class of the recipe.
        path: keys from the root; empty for the recipe itself.
    """
    section: Any = recipe
    for key in path:
        field = section.model_fields.get(key)
        kinds = () if field is None else _members(field.annotation)  # a section may be optional
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is None:
            return None
    return section


def holds_text(recipe: type[BaseModel], path: Sequence[str]) -> bool:
    """Whether a key takes text of any kind, such as a path or a name. False for keys of numbers, lists and choices, and for unknown keys.

    Example:
        >>> from rlpjepa_zoo.config.pretrain import Recipe
        >>> holds_text(Recipe, ["data", "path"]), holds_text(Recipe, ["data", "limit"])
        (True, False)
    """
    section = section_at(recipe, path[:-1])
    field = None if section is None else section.model_fields.get(path[-1])
    return field is not None and str in _members(field.annotation)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; of another type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


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
