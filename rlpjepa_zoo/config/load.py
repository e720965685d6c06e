"""Recipes as text: found by name or path, read, changed from the command line; what is wrong with one is said in a line."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ..core import package
from ..errors import RecipeError, UsageError, did_you_mean

__all__ = ["explain", "find_recipe", "list_recipes", "override", "read_yaml", "replace_rivals", "text_of"]

# --- finding ------------------------------------------------------------------------------------------------------------------------


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in package.resource("recipes").glob("*.yaml"))


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe given by path or by name."""
    path = Path(source)
    with contextlib.suppress(OSError):  # a name too long to be one
        if path.is_file():
            return path
    named = package.resource("recipes") / f"{source}.yaml"
    if str(source) in list_recipes():
        return named
    known = list_recipes()
    hint = did_you_mean(str(source), known) or f" Known recipes: {', '.join(known)}"
    raise RecipeError(f"'{source}' is neither a file nor a recipe.{hint}")


def text_of(source: str | Path) -> str:
    """The YAML of a recipe given by path or by name."""
    path = find_recipe(source)
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a UTF-8 text file ({error})") from error


# --- reading ------------------------------------------------------------------------------------------------------------------------


class _Loader(yaml.BaseLoader):
    """Scalars as text; duplicate keys and aliases refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not used in recipes", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key '{key.value}' is given twice, in lines {seen[key.value] + 1} and {key.start_mark.line + 1}",
                    key.start_mark,
                )
            seen[key.value] = key.start_mark.line
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> dict[str, Any]:
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
    """Put the value of ``"section.key=value"`` into the values of a file."""
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


def replace_rivals(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """What is on the command line takes out of the file what excludes it: target.mu and target.density each other, directions=paper another number."""
    given = dict(o.partition("=")[::2] for o in overrides)
    rivals = {"target.mu": ["target.density"], "target.density": ["target.mu"]}
    if given.get("objective.directions") == "paper":
        rivals["objective.directions"] = ["objective.num_directions", "objective.gradient_error"]
    if given.get("objective.num_directions", "auto") != "auto":
        rivals["objective.num_directions"] = ["objective.gradient_error"]
    objective = values.get("objective")
    if isinstance(objective, dict) and objective.get("directions") == "paper" and "objective.directions" not in given:
        if "objective.num_directions" in given:
            objective["directions"] = "random"  # the paper's, but for their number
    for key in rivals.keys() & given.keys():
        for rival in set(rivals[key]) - given.keys():
            section, _, name = rival.partition(".")
            if isinstance(values.get(section), dict):
                values[section].pop(name, None)


_ACCUMULATION = (
    "gradient accumulation is refused: the loss compares the whole batch with the target, and accumulated parts would each be compared "
    "alone; use more processes or a smaller train.batch_size"
)


def explain(error: ValidationError, recipe: type[BaseModel]) -> str:
    """The first problem in one line: dotted key, what was given, what was expected."""
    problems = error.errors()
    first = problems[0]
    location = [str(part) for part in first["loc"]]
    if location[:2] == ["target", "sigma"]:
        location = location[:2]  # the members of the union follow
    name, more = ".".join(location), f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        if "accum" in location[-1]:
            return f"{name}: {_ACCUMULATION}"
        section: Any = recipe
        for part in location[:-1]:
            section = section.model_fields[part].annotation
            section = next((kind for kind in get_args(section) if kind is not type(None)), section)  # of an optional one
        hint = did_you_mean(location[-1], section.model_fields) or f" Known keys: {', '.join(section.model_fields)}"
        return f"{name}: unknown key.{hint}{more}"
    if first["type"] == "missing":
        return f"{name}: missing; it has no default{more}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"]) + more
    if name == "target.sigma":
        return f"target.sigma: got {first['input']!r}, expected gn, rgn or a number greater than 0"
    if name.startswith("objective.num_directions."):
        return f"objective.num_directions: got {first['input']!r}, expected a whole number above 0, or auto"
    if name == "target.density":
        return f"target.density: got {first['input']!r}, expected a number strictly between 0 and 1{more}"
    expected = re.sub(r"^Input should be ", "", first["msg"]).split(", unable")[0]
    given = first["input"]
    if isinstance(given, float) and not math.isfinite(given):
        expected = "a finite number"
    return f"{name}: got {given!r}, expected {expected}{more}"
