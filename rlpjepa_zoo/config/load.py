"""Recipes as text: find the file, read its YAML, apply overrides.

In a file, YAML says where a value begins and ends. In an override, the text after `=` is the value as it was typed, whatever it holds: `#`,
`: `, quotes, spaces. Only a list `[...]` or a mapping `{...}` for a key that does not hold text is read as YAML. The type of the key then
decides what the text means, see `rlpjepa_zoo.config.pretrain`. An empty value or `null` is null, in both; in a file also `~`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from ..core import package
from ..errors import RecipeError, UsageError, did_you_mean
from .base import Plain, holds_text, parse_scalars

__all__ = ["find_recipe", "list_recipes", "override", "overrides_of", "read_text", "read_yaml", "write_yaml"]


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in package.resource("recipes").glob("*.yaml"))


def find_recipe(source: str | Path) -> Path:
    """Return the file of a recipe.

    Args:
        source: path of a YAML file, or name of a shipped recipe.

    Raises:
        RecipeError: neither; the message names the nearest recipe.
    """
    path = Path(source)
    with contextlib.suppress(OSError):  # the text is too long for a file name
        if path.is_file():
            return path
    named = package.resource("recipes") / f"{source}.yaml"
    if str(source) in list_recipes():
        return named
    known = list_recipes()
    hint = did_you_mean(str(source), known) or f" Known recipes: {', '.join(known)}"
    raise RecipeError(f"'{source}' is neither a file nor a recipe.{hint}")


def read_text(source: str | Path) -> str:
    """Return the YAML text of a recipe; `source` as for `find_recipe`."""
    path = find_recipe(source)
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a UTF-8 text file ({error})") from error


class _Loader(yaml.BaseLoader):
    """Reads scalars as text, and null as None; refuses duplicate keys and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not used in recipes", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        if node.style is None:
            return None if node.value in ("", "null", "~") else Plain(node.value)
        return node.value or None

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in lines:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key '{key.value}' is given twice, in lines {lines[key.value] + 1} and {key.start_mark.line + 1}",
                    key.start_mark,
                )
            lines[key.value] = key.start_mark.line
        return {key.value: self.construct_object(value, deep) for key, value in node.value}


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """Parse YAML text whose root is a mapping. Scalars stay text: the type of a field decides what they mean.

    Args:
        text: at most 1 MiB.
        where: name of the recipe, for error messages.

    Raises:
        RecipeError: not valid YAML, duplicate keys or aliases, with the line; or no mapping.
    """
    if len(text) > 1 << 20:
        raise RecipeError(f"{where}: {len(text)} characters; a recipe has at most {1 << 20}")
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f"line {mark.line + 1}: " if mark is not None else ""
        raise RecipeError(f"{where}: {at}{getattr(error, 'problem', None) or 'not valid YAML'}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: expected 'key: value' lines, got {type(values).__name__}")
    return values


class _Dumper(yaml.SafeDumper):
    """Quotes text that `read_yaml` and `parse_scalars` would take for a number, and escapes the line breaks of Unicode, which YAML folds."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None if parse_scalars(Plain(text)) == text else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def write_yaml(values: dict[str, Any]) -> str:
    """Return YAML text that `read_yaml` reads back, in the order of the values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def override(values: dict[str, Any], given: str, recipe: type[BaseModel]) -> None:
    """Apply one override ``"section.key=value"`` to the values of a recipe, in place.

    Args:
        values: as from `read_yaml`.
        given: the override.
        recipe: class of the recipe; the type of the key decides how the value is read.

    Raises:
        UsageError: not of this form.
        RecipeError: the key lies below one that is not a section.
    """
    name, equals, text = given.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
        raise UsageError(f"override '{given}': expected section.key=value")
    *parents, last = name.split(".")
    for parent in parents:
        if values.get(parent) is None:  # a section that is off is turned on by one of its keys
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise RecipeError(f"{name}: '{parent}' is not a section")
    values[last] = _typed_value(text, holds_text(recipe, [*parents, last]))


def _typed_value(text: str, is_text: bool) -> Any:
    """Value of an override, as typed; a list or mapping if the key does not hold text."""
    if text in ("", "null"):
        return None
    if is_text:
        return text
    if text == "~":
        return None
    if text.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(yaml.YAMLError, RecursionError):
            node = yaml.compose(text, _Loader)
            if node is not None and node.end_mark.index == len(text.rstrip()):  # nothing follows, such as a comment
                return yaml.load(text, _Loader)
    return Plain(text)


def overrides_of(section: str, overrides: Sequence[str]) -> dict[str, str]:
    """Values of the overrides ``"section.key=value"`` of one section, by key.

    Example:
        >>> overrides_of("target", ["target.mu=0", "train.epochs=3"])
        {'mu': '0'}
    """
    pairs = (text.partition("=") for text in overrides)
    return {name.partition(".")[2]: value for name, _, value in pairs if name.partition(".")[0] == section}
