"""Files on disk: which ones of a folder are taken, which are hidden, which look like images but cannot be used, and which belong to a split."""

from __future__ import annotations

import functools
import hashlib
import logging
import mimetypes
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...config.sections import Data
from ...core.source import expanded
from ...errors import DataError, did_you_mean
from ..decode import image_format, suffixes, unreadable_format

log = logging.getLogger("rlpjepa_zoo")

_OF_SYSTEMS = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini"}
)
"""Folders and files that operating systems and storage devices leave behind. Some hold small copies of images."""
_COPIES = ("~", ".bak", ".tmp", ".part", ".crdownload")
"""Endings of backup copies and of unfinished downloads."""
_IMAGE_ENDINGS = frozenset(".avif .heic .heif .hif .jxl .webp .psd .arw .cr2 .cr3 .dng .nef .orf .pef .raf .rw2 .srw".split())
"""Endings of images that the tables of Python and Pillow lack in some versions, and those of camera raw files."""


# --- what is taken --------------------------------------------------------------------------------------------------------------------


def is_hidden(path: str) -> bool:
    """Whether a path below the root of a folder or archive is left out without a word: a part of it is hidden or left behind by a system.

    Example:
        >>> [is_hidden(path) for path in ("a/b.jpg", "./a.jpg", "a/._b.jpg", ".ipynb_checkpoints/a.parquet", "__MACOSX/a.jpg")]
        [False, False, True, True, True]
    """
    return any(part in _OF_SYSTEMS or (part.startswith(".") and part not in (".", "..")) for part in path.split("/"))


class LeftOut:
    """Images and other things of one source that are left out, by reason.

    Example:
        >>> left = LeftOut()
        >>> left.add("a camera raw file", "b.cr3"), left.add("a camera raw file", "c.cr3"), str(left)
        (None, None, 'left out: 2 x a camera raw file (b.cr3, ...)')
    """

    def __init__(self) -> None:
        self._counts, self._first = Counter[str](), dict[str, str]()

    def add(self, reason: str, name: str) -> None:
        self._counts[reason] += 1
        self._first.setdefault(reason, name)

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        parts = [f"{n} x {reason} ({self._first[reason]}{', ...' if n > 1 else ''})" for reason, n in self._counts.items()]
        return f"left out: {'; '.join(parts)}"

    def warn(self, source: object) -> None:
        """Log the numbers and reasons, if there are any."""
        if self:
            log.warning("%s: %s", source, self)


@functools.lru_cache(1 << 12)
def is_image_ending(ending: str) -> bool:
    """Whether an ending, in lower case with its dot, is that of an image, which may be of a format that cannot be decoded here.

    Example:
        >>> [is_image_ending(ending) for ending in (".jfif", ".heic", ".svg", ".json", "")]
        [True, True, True, False, False]
    """
    if ending in suffixes() or ending in _IMAGE_ENDINGS:
        return True
    kind = _types().get(ending) or Image.MIME.get(Image.registered_extensions().get(ending, ""), "")
    return kind.startswith("image/")


@functools.cache
def _types() -> dict[str, str]:
    return mimetypes.MimeTypes().types_map[True]  # the table of Python alone, equal on all machines


def why_unusable(name: str, content: bytes | Path) -> str | None:
    """Why an image cannot be decoded here, by its ending and content; None if it can.

    TIFF also contains camera raw files, whose first picture is a thumbnail, so it needs its own ending.
    """
    found, ending = image_format(content), os.path.splitext(name)[1].lower()
    if found is not None and (found != "TIFF" or ending in suffixes()):
        return None
    if found is not None:
        return "TIFF under another ending, as of camera raw files"
    return unreadable_format(content) or f"{ending.removeprefix('.').upper() or 'a file'}, which is not decoded"


def _is_image(path: Path, left: LeftOut, name: str) -> bool:
    """Whether a file of a folder is an image to use. One that only looks like an image is added to `left`.

    Endings of images that can be decoded, and those of other files, are believed, so that large folders are listed without opening files.
    """
    ending = path.suffix.lower()
    image = is_image_ending(ending)
    if not image and _types().get(ending, "application/octet-stream") != "application/octet-stream":
        return False
    if not os.path.isfile(path):
        if image:
            left.add("a link to a missing file" if os.path.islink(path) else "a pipe or device", name)
        return False
    if ending in suffixes():
        return True
    if not image and image_format(path) is None and unreadable_format(path) is None:
        return False
    reason = why_unusable(path.name, path)
    if reason is None and name.lower().endswith(_COPIES):
        reason = "a backup copy or unfinished download"
    if reason is not None:
        left.add(reason, name)
    return reason is None


def _walk(root: Path, left: LeftOut) -> Iterator[tuple[str, Path]]:
    """Name below the root and path of all files that are not hidden; a linked folder is entered once."""

    def unreadable(error: OSError) -> None:
        left.add(f"a folder that cannot be read ({error.strerror})", str(error.filename))

    seen = set()
    for here, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        below = os.path.relpath(here, root)
        yield from ((os.path.normpath(os.path.join(below, name)), Path(here, name)) for name in files if not is_hidden(name))


def list_images(folder: str | Path) -> list[Path]:
    """All image files below a folder, sorted by path. Hidden files and folders are left out, a linked folder is entered once.

    What looks like an image and cannot be used is counted in one warning.

    Raises:
        DataError: no such folder, or no image in it.
    """
    root, left = Path(folder), LeftOut()
    if not root.is_dir():
        raise DataError(f"{root} is a file; expected a folder of images" if root.exists() else no_such(root))
    images = sorted(path for name, path in _walk(root, left) if _is_image(path, left, name))
    if not images:
        raise DataError(f"{root}: no images found in it and its sub-folders" + (f"; {left}" if left else ""))
    left.warn(root)
    return images


def files_below(root: Path, endings: tuple[str, ...]) -> list[Path]:
    """The file itself, or all files with these endings (in lower case) below a folder, sorted by path; hidden ones are left out."""
    if not root.is_dir():
        return [root]
    return sorted(path for name, path in _walk(root, LeftOut()) if name.lower().endswith(endings) and os.path.isfile(path))


# --- paths that are given -------------------------------------------------------------------------------------------------------------


def no_such(path: Path, more: int = 0) -> str:
    """What is said of a path that does not exist: what is missing, and where to look.

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


def data_path(data: Data, noun: str) -> Path:
    """The path of a recipe's data section.

    Raises:
        DataError: it is not given, or does not exist.
    """
    if data.path is None:
        raise DataError(f"data.path: the folder of {noun} is not given; add data.path=DIR")
    root = expanded(data.path)
    if not os.path.exists(root):
        raise DataError(f"data.path: {no_such(root)}")
    return root


def files_of_split(files: Sequence[Path], split: str, eval_split: str | None, root: Path, noun: str) -> list[Path]:
    """The files whose name starts with the split, or whose folder is named so. A single file is the training split.

    Raises:
        DataError: there is none.
    """
    chosen = [f for f in files if f.name.startswith(split) or f.parent.name == split or (len(files) == 1 and split != eval_split)]
    if not chosen:
        names = ", ".join(f.name for f in files[:4])
        fix = "set data.split and data.eval_split to how the names start"
        raise DataError(f"data.path: no {noun} file of the split '{split}' in {root}; there are {names}; {fix}")
    return chosen


def common_folder(files: Sequence[Path]) -> Path:
    """The deepest folder that holds all files."""
    mixed = len({file.is_absolute() for file in files}) > 1
    return Path(os.path.commonpath([file.absolute().parent if mixed else file.parent for file in files]))


def files_identity(files: Iterable[Path], root: Path | None = None) -> dict[str, Any]:
    """Number and total size of files, and a hash of their names (below `root`) and sizes; a missing file has size 0."""
    digest, count, total = hashlib.sha256(), 0, 0
    for file in files:
        size = file.stat().st_size if os.path.exists(file) else 0
        name = os.fsencode(os.path.relpath(file, root) if root else file)
        digest.update(b"%d %b\0" % (size, name))
        count, total = count + 1, total + size
    return {"files": count, "bytes": total, "sha256 of names and sizes": digest.hexdigest()}
