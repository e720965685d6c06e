"""Files: atomic writes, digests, strict JSON, headers of safetensors files, folder locks."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import ModelError, OutputError, UsageError, first_line

MAX_JSON = 1 << 20
"""Largest JSON file that is read, in bytes."""
MAX_DEPTH = 64
"""Deepest nesting of JSON that is read."""
MAX_HEADER = 1 << 22
"""Largest header of a safetensors file that is read, in bytes."""


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


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path in the same folder, which is renamed to `path` on success and removed on error.

    Raises:
        OutputError: disk full, no permission, no such folder.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def tensor_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes in a safetensors file by tensor name, from its header only.

    Raises:
        ModelError: not a safetensors file, or a header of more than 4 MiB.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= MAX_HEADER:
                raise ModelError(f"{path}: not a safetensors file (its header has {length} bytes, the limit is {MAX_HEADER})")
            header = parse_json(file.read(length), str(path), MAX_HEADER)
        return {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({first_line(error)})") from error


def load_tensors(path: Path) -> dict[str, Any]:
    """Torch tensors of a safetensors file by name."""
    import safetensors.torch

    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # safetensors maps only files whose names are UTF-8
        return dict(safetensors.torch.load(path.read_bytes()))
    return dict(safetensors.torch.load_file(path))


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
