"""Old module names of 0.1 development versions. They keep working, with a DeprecationWarning, until 0.2."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "install"]

MOVED = {
    "recipe.Data": "config.sections.Data",
    "recipe.Recipe": "config.pretrain.Recipe",
    "sources.open_source": "data.sources.open_source",
    "images.decode": "data.decode.decode",
    "images.Images": "data.images.Images",
    "feeds.Feed": "data.images.ImageRows",
    "feeds.Row": "data.images.Row",
}
"""Old dotted name -> new dotted name, both inside the package."""


class _MovedModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        package, _, module = self.__name__.partition(".")
        new = MOVED.get(f"{module}.{name}")
        if new is None:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        home, _, new_name = new.rpartition(".")
        warnings.warn(f"{self.__name__}.{name} is now {package}.{new}", DeprecationWarning, stacklevel=3)
        return getattr(import_module(f"{package}.{home}"), new_name)


def install(package: str) -> None:
    """Make the old modules importable. No module is imported before one of its names is used.

    Example:
        >>> from rlpjepa_zoo.feeds import Row
        >>> Row.__module__
        'rlpjepa_zoo.data.images'
    """
    for old in {name.partition(".")[0] for name in MOVED}:
        name = f"{package}.{old}"
        sys.modules.setdefault(name, _MovedModule(name, doc=f"Moved; see {package}.moved"))
