"""docs/recipes.md is generated from the section classes, and every recipe key has a description."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from rlpjepa_zoo.config.finetune import TuningRecipe
from rlpjepa_zoo.config.load import list_recipes
from rlpjepa_zoo.config.pretrain import Recipe

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def reference() -> Iterator[object]:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import recipe_reference

        yield recipe_reference
    finally:
        sys.path.pop(0)


def keys(section: type[BaseModel], prefix: str, reference: object) -> Iterator[tuple[str, str]]:
    """Dotted name and description of every key; of a section its docstring."""
    for name, field in section.model_fields.items():
        inner = reference.field_sections(prefix + name, field)  # type: ignore[attr-defined]
        yield prefix + name, inner[0].__doc__ or "" if inner else field.description or ""
        for part in inner:
            yield from keys(part, f"{prefix}{name}.", reference)


def test_the_page_is_up_to_date(reference: object) -> None:
    page = reference.page()  # type: ignore[attr-defined]
    assert (ROOT / "docs/recipes.md").read_text() == page, "run python tools/recipe_reference.py --write"


@pytest.mark.parametrize("recipe", [Recipe, TuningRecipe])
def test_every_key_has_a_description(reference: object, recipe: type[BaseModel]) -> None:
    descriptions = dict(keys(recipe, "", reference))
    assert len(descriptions) > 60
    assert [name for name, text in descriptions.items() if len(text.split()) < 3] == []


@pytest.mark.parametrize("recipe", [Recipe, TuningRecipe])
def test_the_page_names_every_key(reference: object, recipe: type[BaseModel]) -> None:
    page = (ROOT / "docs/recipes.md").read_text()
    assert [name for name, _ in keys(recipe, "", reference) if f"`{name}`" not in page] == []


def test_the_page_lists_every_shipped_recipe_with_its_comment(reference: object) -> None:
    page = (ROOT / "docs/recipes.md").read_text()
    for name in list_recipes():
        comment = reference.first_comment(name)  # type: ignore[attr-defined]
        assert comment.endswith((".", ").")) and f"| `{name}` |" in page and comment in page
