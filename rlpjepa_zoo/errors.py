"""Errors that a user can cause, and their exit codes on the command line.

Every message is one line of at most 500 printable characters: what was given, what was expected, how to fix it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from .text import LINE, printable


class ZooError(Exception):
    """Base of all errors a user can cause. `exit_code` is the exit code of the command line."""

    exit_code = 70

    def __str__(self) -> str:
        return printable(super().__str__(), LINE)  # it may quote names of files, and other errors


class UsageError(ZooError, ValueError):
    """A wrong argument or option."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be used: unknown key, wrong type, value out of range, contradiction."""


class DataError(ZooError, ValueError):
    """Missing, empty or unreadable images or labels."""

    exit_code = 3


class ModelError(ZooError, ValueError):
    """An unknown backbone, or a checkpoint that is damaged, from elsewhere, or does not fit."""

    exit_code = 4


class HubError(ZooError, OSError):
    """A refusal of the Hub or a failure of the network."""

    exit_code = 5


class OutputError(ZooError, OSError):
    """Disk full, no permission, output already in use."""

    exit_code = 6


class NonFiniteError(ZooError, ArithmeticError):
    """NaN or infinity where a finite number is needed."""

    exit_code = 7


class StoppedBySignal(ZooError):
    """A signal stopped training after a checkpoint was saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or its type if it has no message.

    Example:
        >>> first_line(ValueError("no such file\\nwith a long story")), first_line(KeyError())
        ('no such file', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest known name, or an empty string.

    Example:
        >>> did_you_mean("resnet81", ["resnet18", "vit_tiny"])
        " Did you mean 'resnet18'?"
    """
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def no_such(path: Path, more: int = 0) -> str:
    """Message about a path that does not exist: what is missing, and where to look.

    Args:
        path: the path.
        more: number of other paths that do not exist either.
    """
    parent = path.parent
    text = f"{path}: no such file or folder" + (f" (and {more} more)" if more else "")
    if not os.path.isdir(parent):
        return f"{text}; there is no folder {parent} either"
    try:
        hint = did_you_mean(path.name, os.listdir(parent))
    except OSError:
        hint = ""
    return text + (f".{hint}" if hint else "; check the path" if path.is_absolute() else f"; check the path, which starts in {Path.cwd()}")


def no_folder(path: Path) -> str:
    """Message about a path that is no folder: it does not exist, or is a file."""
    return f"{path}: is a file; expected a folder" if os.path.exists(path) else no_such(path)
