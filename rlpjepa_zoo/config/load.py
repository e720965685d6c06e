"""Recipes as text: find the file, read its YAML, apply overrides."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..core import package
from ..errors import RecipeError, UsageError, did_you_mean

__all__ = ["find_recipe", "list_recipes", "override", "overrides_of", "read_text", "read_yaml"]


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
    """Reads scalars as text; refuses duplicate keys and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not used in recipes", self.peek_event().start_mark)
        return super().compose_node(parent, index)

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
        return super().construct_mapping(node, deep)


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


def override(values: dict[str, Any], given: str) -> None:
    """Apply one override ``"section.key=value"`` to the values of a recipe, in place."""
    name, equals, text = given.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
        raise UsageError(f"override '{given}': expected section.key=value")
    *parents, last = name.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(f"{name}: '{parent}' is not a section")
        values = child
    try:
        values[last] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        values[last] = text
    if values[last] is None:
        values[last] = ""


def overrides_of(section: str, overrides: Sequence[str]) -> dict[str, str]:
    """Values of the overrides ``"section.key=value"`` of one section, by key.

    Example:
        >>> overrides_of("target", ["target.mu=0", "train.epochs=3"])
        {'mu': '0'}
    """
    pairs = (text.partition("=") for text in overrides)
    return {name.partition(".")[2]: value for name, _, value in pairs if name.partition(".")[0] == section}
