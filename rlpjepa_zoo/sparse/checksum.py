"""A checksum inside a file: the sha256 of all its bytes, where the 64 digits of the checksum itself count as zeros.

The digits stand in the header of a safetensors file or in the footer of a parquet file, after a mark. So one flipped bit anywhere in the file is
noticed, in numbers, ids and header alike, and a reader that does not know the checksum reads the file as before.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

__all__ = ["BLANK", "KEY", "add_checksum", "is_intact"]

_MARK = b"sha256-of-this-file:"
_DIGITS = 64
BLANK = _MARK.decode() + "0" * _DIGITS
"""Text that a writer puts under a key into the header; `add_checksum` fills it in."""
KEY = "rlpjepa_zoo.sha256"
"""The key: in safetensors, of the JSON header; in parquet, of the metadata."""
_PLACES = (rb"\"%b\": \"%b" % (KEY.encode(), _MARK), b"%b\x18%c%b" % (KEY.encode(), len(BLANK), _MARK))
"""Key and mark as the two formats write them: JSON inside JSON, and two fields of Thrift. Text of the user is escaped differently."""
_MOST_HEADER = 1 << 27
"""Largest header that is searched, in bytes; safetensors allows 100 MB."""
_CHUNK = 1 << 20


def add_checksum(path: Path) -> None:
    """Fill in the checksum of a file that holds `BLANK`."""
    with open(path, "r+b") as file:
        place = _place(file)
        if place is None:
            raise ValueError(f"{path}: holds no place for a checksum")
        digest = _digest(file, place)
        file.seek(place)
        file.write(digest)


def is_intact(file: BinaryIO) -> bool | None:
    """Return whether a file has the bytes of its checksum; None if it holds no checksum. The file is read from its start to its end."""
    place = _place(file)
    if place is None:
        return None
    digest = _digest(file, place)
    file.seek(place)
    return file.read(_DIGITS) == digest


def _place(file: BinaryIO) -> int | None:
    """Offset of the digits."""
    size = file.seek(0, os.SEEK_END)
    if size < 16:
        return None
    file.seek(0)
    start = file.read(8)
    if start[:4] == b"PAR1":
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        begin = size - 8 - length
    else:
        length, begin = int.from_bytes(start, "little"), 8
    if begin < 8 or length > min(_MOST_HEADER, size - begin):
        return None
    file.seek(begin)
    header = file.read(length)
    ends = [found + len(place) for place in _PLACES if (found := header.rfind(place)) >= 0]
    return begin + ends[-1] if ends and ends[-1] + _DIGITS <= length else None


def _digest(file: BinaryIO, place: int) -> bytes:
    digest = hashlib.sha256()
    file.seek(0)
    left = place
    while left > 0 and (chunk := file.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    digest.update(b"0" * _DIGITS)
    file.seek(place + _DIGITS)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest().encode()
