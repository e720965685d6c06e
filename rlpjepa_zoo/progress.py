"""Progress bars on stderr: redrawn in a terminal and in a notebook, whole lines at most every half minute in a file or a pipe."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm

from .text import printable

__all__ = ["is_redrawn", "progress_bar"]

_SECONDS = {True: 0.5, False: 30.0}
"""Seconds between two updates, by whether the bar can be redrawn."""


class _Lines:
    """A text file for a bar: each update becomes a line of its own, without the codes that redraw it."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():
            self.file.write(line + "\n")

    def flush(self) -> None:
        self.file.flush()


def is_redrawn() -> bool:
    """Whether bars are redrawn in place, as in a terminal and in a notebook, rather than written line after line."""
    notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    return notebook or (sys.stderr is not None and sys.stderr.isatty())  # pythonw and services have no stderr


def progress_bar(title: str, total: int | None, *, hidden: bool = False, unit: str = "image", done: int = 0, leave: bool = True) -> Any:
    """A context with a tqdm bar.

    Args:
        title: what is going on.
        total: number of items; None if it is not known.
        hidden: show nothing, as where there is no stderr.
        unit: what the bar counts.
        done: items that were done before.
        leave: keep the finished bar in the terminal.
    """
    hidden = hidden or sys.stderr is None
    redrawn = is_redrawn()
    seconds = _SECONDS[redrawn]
    return tqdm(
        total=total, initial=done, unit=unit, unit_scale=(total or 0) > 9999, desc=printable(title, 40), disable=hidden, leave=leave,
        file=None if redrawn else _Lines(sys.stderr), mininterval=seconds, maxinterval=max(10.0, 2 * seconds),
    )  # fmt: skip
