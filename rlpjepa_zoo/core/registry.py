"""Registries: entries that a recipe or a command can name, each defined in a file of its own."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Generic, TypeVar

from ..errors import UsageError, did_you_mean

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name. Every module of one sub-package is imported before the first lookup, so a new file registers itself.

    Args:
        what: noun for error messages, such as ``"objective"``.
        package: dotted name of the sub-package whose modules register entries; None if entries are only registered by code.

    Example:
        >>> shapes = Registry("shape")
        >>> @shapes.register("square")
        ... class Square: ...
        >>> list(shapes), shapes["square"].__name__
        (['square'], 'Square')
    """

    def __init__(self, what: str, package: str | None = None) -> None:
        self.what, self.package = what, package
        self._entries: dict[str, T] = {}
        self._complete = package is None

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry.

        Raises:
            ValueError: the name is taken.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.what} '{name}' is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def _load(self) -> dict[str, T]:
        if not self._complete and self.package is not None:
            for module in pkgutil.iter_modules(import_module(self.package).__path__):
                import_module(f"{self.package}.{module.name}")
            self._complete = True
        return self._entries

    def __getitem__(self, name: str) -> T:
        """The entry of a name.

        Raises:
            UsageError: no such entry; the message names the nearest one.
        """
        entries = self._load()
        if name not in entries:
            hint = did_you_mean(name, entries) or f" Known: {', '.join(sorted(entries))}."
            raise UsageError(f"{self.what} '{name}' does not exist.{hint}")
        return entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._load()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._load()))

    def __len__(self) -> int:
        return len(self._load())

    def items(self) -> list[tuple[str, T]]:
        """Names and entries, sorted by name."""
        return sorted(self._load().items(), key=lambda item: item[0])

    def values(self) -> list[T]:
        """Entries, sorted by name."""
        return [entry for _, entry in self.items()]
