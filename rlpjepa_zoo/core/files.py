"""Files: atomic writes, digests, strict JSON, headers of safetensors files, locks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import ModelError, OutputError, UsageError, first_line

MAX_JSON = 1 << 20


MAX_HEADER = 1 << 22


def parse_json(text: bytes, name: str, limit: int = MAX_JSON) -> Any:
    """Strict JSON: UTF-8, at most 1 MiB, no duplicate keys, no NaN or Infinity.

    Raises:
        ModelError: with the line where parsing stopped.
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
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name}: not valid JSON ({error})") from error


def sha256(content: bytes | Path) -> str:
    """Hex digest of bytes, or of a file."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until renames inside a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name by one rename when all went well, and nothing is left of it otherwise.

    Raises:
        OutputError: disk full, no permission, no such folder.
    """
    aside = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            aside.unlink()


def tensor_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes in a safetensors file, from its header alone.

    Raises:
        ModelError: not a safetensors file, or a header of more than 4 MiB.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= MAX_HEADER:
                raise ModelError(f"{path}: not a safetensors file (header of {length} bytes, at most {MAX_HEADER} are read)")
            header = parse_json(file.read(length), str(path), MAX_HEADER)
        return {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({first_line(error)})") from error


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Hold a run folder; a second run into it is refused, and a killed one frees it at once.

    Raises:
        UsageError: somebody holds it; the message says who.
        OutputError: the folder cannot be made or written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"{run}: cannot be written: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            raise UsageError(f"{run}: in use by {owner}; choose another --out, or wait for it to end") from error
        except OSError as error:
            raise OutputError(f"{run}: cannot be locked: {error.strerror or error}; choose an --out on a file system with locks") from error
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        home = run / "checkpoints"
        for left in [*home.glob(".tmp-*"), *home.glob(".del-*")] if home.is_dir() else []:
            shutil.rmtree(left, ignore_errors=True)  # of a run that was killed
        yield
    finally:
        os.close(handle)
