"""The registry: lookup by name, refusals, and modules that register themselves on import."""

import sys
from pathlib import Path

import pytest
from refusals import refused

from rlpjepa_zoo.core.registry import Registry
from rlpjepa_zoo.errors import UsageError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable package whose module `good` registers an entry."""
    name = f"registered_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(f"from rlpjepa_zoo.core.registry import Registry\nTHINGS = Registry('thing', '{name}')\n")
    (tmp_path / name / "good.py").write_text("from . import THINGS\nTHINGS.register('good')(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def registry(package: str) -> Registry[int]:
    return __import__(package).THINGS


def test_every_module_of_the_package_registers_its_entries(package: str) -> None:
    things = registry(package)
    assert list(things) == ["good"] and things["good"] == 1 and "good" in things and len(things) == 1
    assert things.items() == [("good", 1)] and things.values() == [1]


def test_unknown_name_is_refused_with_the_nearest(package: str) -> None:
    with refused(UsageError, match="thing 'goood' does not exist. Did you mean 'good'?"):
        registry(package)["goood"]


def test_name_cannot_be_registered_twice() -> None:
    things = Registry[int]("thing")
    things.register("one")(1)
    with pytest.raises(ValueError, match="thing 'one' is registered twice"):
        things.register("one")(2)


def test_failed_import_fails_again_on_the_next_lookup(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "broken.py").write_text("raise RuntimeError('broken')\n")
    things = registry(package)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            list(things)
        sys.modules.pop(f"{package}.broken", None)
