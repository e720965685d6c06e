"""Output of the command line: results on stdout, log and errors on stderr, whatever their encoding, and whether or not somebody reads them."""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import OutputError
from ..text import LINE, printable

__all__ = ["ReaderGone", "results_on_stdout", "set_up", "show_error", "show_traceback"]

_LOG_LINE = 1000
"""Largest number of characters of a log line."""
_PLAIN = {"±": "+-", "×": "x", "–": "-", "—": "-", "…": "...", "‘": "'", "’": "'", "“": '"', "”": '"', "‹": "<", "›": ">", "\xa0": " "}
"""Signs of our own output in encodings that do not have them; others are escaped."""


class ReaderGone(Exception):
    """The program that reads stdout has closed it, as `head` does."""


class _Stream:
    """A text stream whose writes can be changed; everything else is that of the stream."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def attempt(self, work: Callable[[], Any]) -> None:
        raise NotImplementedError

    def write(self, text: str) -> int:
        if text:  # click writes an empty text as a test, and swallows what that raises
            self.attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)


class _Results(_Stream):
    """stdout without control characters. A failure to write is an error of its own, so that it is told from those of other files."""

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # click tries whether the stream takes bytes
            raise TypeError(f"expected text, got {type(text).__name__}")
        return super().write(printable(text, keep="\n\t"))

    def attempt(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except OSError as error:
            with contextlib.suppress(
                OSError, ValueError
            ):  # print nothing more, not even at exit, where a second failure changes the exit code
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if isinstance(error, BrokenPipeError):
                raise ReaderGone from error
            raise OutputError(f"stdout: cannot be written: {error.strerror or error}") from error


class _Messages(_Stream):
    """stderr that nobody needs to read: a log line or a progress bar that cannot be written must not end a run."""

    def attempt(self, work: Callable[[], Any]) -> None:
        with contextlib.suppress(OSError):
            work()


class _OneLine(logging.Formatter):
    """One printable line for each message; only a traceback has more."""

    def format(self, record: logging.LogRecord) -> str:
        line = printable(record.getMessage(), _LOG_LINE)
        return line if record.exc_info is None else f"{line}\n{printable(self.formatException(record.exc_info), keep=chr(10))}"


@contextlib.contextmanager
def results_on_stdout() -> Iterator[None]:
    """Context in which `print` writes results: escaped, and complete at its end.

    Raises:
        ReaderGone: the reader of stdout has closed it.
        OutputError: stdout cannot be written, for example because the disk is full.
    """
    stream = _Results(sys.stdout)
    with contextlib.redirect_stdout(stream):
        yield
        stream.flush()


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(_PLAIN.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in signs), error.end


def set_up() -> None:
    """Make stdout and stderr safe to write, and send the log of the package to stderr. For a whole process, once."""
    for number in range(3):  # a closed stream: give its number to /dev/null, before a file that is opened later gets it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)
    codecs.register_error("rlpjepa-plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="rlpjepa-plain")
    sys.stderr = _Messages(sys.stderr)
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    log = logging.getLogger("rlpjepa_zoo")
    log.addHandler(handler)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    log.propagate = False


def show_error(message: str, hint: str = "") -> None:
    """Print one line of at most 500 characters on stderr: the error, and a hint that is never cut."""
    hint = f" ({hint})" if hint else ""
    print(printable(f"error: {' '.join(message.split())}", LINE - len(hint)) + hint, file=sys.stderr)


def show_traceback() -> None:
    """Print the traceback of the current exception on stderr."""
    import traceback

    print(printable(traceback.format_exc(), keep="\n"), end="", file=sys.stderr)
