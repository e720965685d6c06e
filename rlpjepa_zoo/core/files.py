"""Files: atomic writes, errors of the disk, digests, strict JSON, folder locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import ModelError, OutputError, UsageError, ZooError, first_line

MAX_JSON = 1 << 20
"""Largest JSON file that is read, in bytes."""
MAX_DEPTH = 64
"""Deepest nesting of JSON that is read."""


def parse_json(text: bytes, name: str, limit: int = MAX_JSON) -> Any:
    """Parse strict JSON: UTF-8, at most `limit` bytes, no duplicate keys, no NaN or Infinity, at most 64 levels.

    Raises:
        ModelError: names the file and the place where parsing stopped.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError(f"key '{next(k for k in keys if keys.count(k) > 1)}' is given twice")
        return dict(pairs)

    def constant(value: str) -> Any:
        raise ValueError(f"{value} is not a JSON number")

    if len(text) > limit:
        raise ModelError(f"{name}: {len(text)} bytes, the limit is {limit}")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        if _deeper(value, MAX_DEPTH):
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        return value
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name}: not valid JSON ({error})") from error


def _deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested deeper than `limit`; comparing or printing them would end in a RecursionError."""
    level = [value]
    for _ in range(limit + 1):
        level = [child for v in level if isinstance(v, dict | list) for child in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return False
    return True


def sha256(content: bytes | Path) -> str:
    """Hex digest of bytes, or of a file."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk (fsync)."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until renames inside a folder are on disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- unfinished files ------------------------------------------------------------------------------------------------------------------


_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)(?:-(?P<host>[0-9a-f]{8}))?\.partial(?:\..*)?", re.DOTALL)
"""Name of an unfinished file or folder. Earlier versions wrote it without the host."""


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _partial(path: Path, suffix: str = "") -> Path:
    """Where this process writes `path` before it is complete: in the same folder, so that a rename publishes it."""
    return path.with_name(f".{path.name.removesuffix(suffix)}.{os.getpid()}-{_host()}.partial{suffix}")


def unfinished(name: str) -> str | None:
    """Return the name that an unfinished file was to get, without its suffix, or that of a folder; None for other files.

    Example:
        >>> unfinished(".part-000001.4711-0a1b2c3d.partial.parquet"), unfinished("part-000001.parquet")
        ('part-000001', None)
    """
    match = _PARTIAL.fullmatch(name)
    return None if match is None else match["name"]


def remove_partials(folder: Path, name: str | None = None) -> None:
    """Remove unfinished files and folders of processes that were killed; those of running processes and of other machines stay.

    Args:
        folder: where to look; not below it.
        name: only those of this file (without its suffix) or folder.
    """
    with suppress(OSError):
        for hidden in [entry for entry in os.listdir(folder) if entry.startswith(f".{name or ''}")]:
            match, path = _PARTIAL.fullmatch(hidden), folder / hidden
            if match is None or name not in (None, match["name"]) or match["host"] not in (None, _host()) or _runs(int(match["process"])):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether a process of this machine runs; True where that cannot be told."""
    if os.name != "posix":  # signal 0 would end the process on Windows
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError) as error:  # not ours; or no number of a process
        return isinstance(error, OSError)
    return True


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` for files that are not complete yet; removed afterwards, unless it was renamed.

    Raises:
        OutputError: disk full, no permission, no such folder.
    """
    remove_partials(path.parent, path.name)
    partial = _partial(path)
    try:
        with disk_errors(path):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(path: Path) -> None:
    """Refuse to replace what is no regular file. A rename over /dev/null would remove the device, for all programs, if root does it.

    Raises:
        OutputError: a device, a pipe, a folder, a link to one of them, or a link to a stream of a process, such as /dev/stdout.
    """
    with disk_errors(path), suppress(FileNotFoundError):
        stream = path.is_symlink() and os.readlink(path).startswith("/proc/")
        if stream or not stat.S_ISREG(os.stat(path).st_mode):
            raise OutputError(f"{path}: exists and is not a regular file; expected the name of a file to write")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path in the same folder, which is renamed to `path` on success and removed on error.

    Raises:
        OutputError: disk full, no permission, no such folder, or something other than a file is in the place of `path`.
    """
    check_replaceable(path)
    remove_partials(path.parent, path.stem)
    temporary = _partial(path, path.suffix)
    try:
        with disk_errors(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


# --- files of other programs -----------------------------------------------------------------------------------------------------------

_LEFT_BEHIND = frozenset(
    "__macosx @eadir #recycle $recycle.bin lost+found thumbs.db ehthumbs.db desktop.ini icon\r".split(" ") + ["system volume information"]
)
"""Files and folders, in lower case, that operating systems and storage devices leave in any folder. Some hold small copies of images."""


def left_behind(name: str) -> bool:
    """Whether a file or folder is hidden, or one that desktops, editors, version control or upload tools leave anywhere.

    Example:
        >>> [left_behind(name) for name in (".DS_Store", "__MACOSX", "Thumbs.db", "..", "cats")]
        [True, True, True, False, False]
    """
    return name.lower() in _LEFT_BEHIND or (name.startswith(".") and name not in (".", ".."))


# --- errors of the disk ----------------------------------------------------------------------------------------------------------------

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_WRITERS = tuple(os.strerror(code) for code in (*_NO_ROOM, errno.EFBIG, errno.EROFS, errno.EIO)) + ("PytorchStreamWriter failed",)
"""What the messages of writers with error classes of their own contain (safetensors, torch's zip files)."""


@contextmanager
def disk_errors(path: Path, needed: int | None = None, what: str = "cannot write") -> Iterator[None]:
    """Turn the errors of all writers inside the block into one line.

    Args:
        path: what is written, for the message.
        needed: bytes to write, where known.
        what: the words before the reason.

    Raises:
        OutputError: disk full, no permission, and the like, with the bytes needed and free.
    """
    try:
        yield
    except ZooError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not any(text in str(error) for text in _WRITERS):
            raise
        raise OutputError(f"{path}: {what}: {disk_reason(error, path, needed)}") from error


def disk_reason(error: Exception, path: Path, needed: int | None = None) -> str:
    """The reason why a writer failed; of a full disk with the bytes needed (where known) and free."""
    reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    full = any(os.strerror(code) in reason for code in _NO_ROOM)
    if not full:
        return reason
    free = f"{shutil.disk_usage(existing_parent(path)).free / 1e6:.1f} MB are free"
    return f"disk full ({reason}; {f'it needs {needed / 1e6:.1f} MB, ' if needed is not None else ''}{free})"


def existing_parent(path: Path) -> Path:
    """The path itself or its nearest parent that is a folder."""
    return next(p for p in (path, *path.absolute().parents) if os.path.isdir(p))


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder, so that a second run into it is refused. The lock of a killed process is free at once.

    Raises:
        UsageError: another process holds it; the message names the process.
        OutputError: the folder cannot be created, written or locked.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from error
    held = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout as error:
        raise UsageError(f"{folder}: in use by {_holder(path)}; choose another --out, or wait for it to end") from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot be locked: {error.strerror or error}; choose an --out on a file system with locks") from error
    try:
        with suppress(OSError):  # Windows refuses a second handle on a locked file; the text is only for the message above
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        held.release()


def _holder(path: Path) -> str:
    """Who holds a lock file, as its holder wrote it."""
    try:
        return path.read_text(errors="replace")[:200].strip() or "another process"
    except OSError:
        return "another process"
