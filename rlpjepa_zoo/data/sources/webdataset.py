"""Tar files of WebDataset (`data.source: webdataset`): members of one sample follow each other and share their name up to its first dot.

Embedding reads them one after another, compressed ones too. Training and evaluation read the bytes of single members of plain .tar files by
an index of offsets. Nothing is ever written to disk.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ...config.sections import Data
from ...errors import DataError, UsageError, first_line
from ..decode import SUFFIXES, decode
from ..images import ImageRows, Images, Row, label_feature
from .base import (
    RESERVED,
    SOURCES,
    ImageSource,
    Options,
    common_folder,
    data_path,
    files_below,
    files_identity,
    files_of_split,
)
from .classes import match_classes, number_classes

T = TypeVar("T")

MAX_MEMBER_BYTES = 1 << 28
"""Largest member that is read."""

_TEXT = {"dtype": "string", "_type": "Value"}


# --- samples of an archive ------------------------------------------------------------------------------------------------------------


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> bytes | DataError:
    """Bytes of a member, or why they are not read."""
    if member.size > MAX_MEMBER_BYTES:
        return DataError(f"{member.size} bytes, the limit is {MAX_MEMBER_BYTES}")
    opened = archive.extractfile(member)
    return opened.read() if opened is not None else b""


def _nothing(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> None:
    """Counts samples without reading their members."""


def _samples(file: Path, read: Callable[[tarfile.TarFile, tarfile.TarInfo, str], T], mode: Any = "r") -> Iterator[tuple[str, dict[str, T]]]:
    """Key, and what `read` returns of each member by suffix, of every sample that has an image.

    Raises:
        DataError: not a tar file, cut short, or two images of one name.
    """
    key, members = "", dict[str, T]()
    try:
        with tarfile.open(file, mode) as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                stem = f"{folder}/{stem}" if folder else stem
                if stem != key:
                    if _image_suffix(members) is not None:
                        yield key, members
                    key, members = stem, {}
                suffix = suffix.lower()
                if suffix in members or (_is_image(suffix) and _image_suffix(members) is not None):
                    raise DataError(
                        f"{file}: '{member.name}' belongs to the sample '{key}', which has an image already: WebDataset cuts names at their first dot; "
                        "rename the members, or unpack the archive and use the folder"
                    )
                members[suffix] = read(archive, member, suffix)
                archive.members = []  # type: ignore[attr-defined]  # the archive would keep a record of every member
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{file}: cannot be read as a tar file after '{key}' ({first_line(error)})") from error
    if _image_suffix(members) is not None:
        yield key, members


def _is_image(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2]}" in SUFFIXES


def _image_suffix(members: dict[str, Any]) -> str | None:
    return next((suffix for suffix in members if _is_image(suffix)), None)


def _id(file: Path, files: Sequence[Path], root: Path, key: str) -> str:
    """Id of a sample: its key, preceded by the archive's path without suffix if there are several archives."""
    if len(files) == 1:
        return key
    path = file.relative_to(root).as_posix()
    return f"{path[: path.lower().rindex('.t')]}/{key}"


def _text(member: Any) -> str | None:
    return member.decode("utf-8", "replace").strip() if isinstance(member, bytes) else None


def _is_number(text: str) -> bool:
    return re.fullmatch("-?[0-9]{1,18}", text) is not None


# --- one after another ----------------------------------------------------------------------------------------------------------------


def _sample_row(id: str, members: dict[str, bytes | DataError], label: dict[str, Any] | None, suffixes: Sequence[str]) -> Row:
    columns: dict[str, Any] = {suffix: _text(members.get(suffix)) for suffix in suffixes}
    if label is not None:
        text = _text(members.get("cls"))
        try:
            columns["label"] = text if text is None or label == _TEXT else int(text)
        except ValueError as error:
            raise DataError(f"{id}.cls: expected a class number, as in the first sample, got {str(text)[:40]!r}") from error
    return Row(id, partial(_decode_member, members[_image_suffix(members) or ""], id), columns)


def _decode_member(content: bytes | DataError, name: str) -> Image.Image:
    if isinstance(content, DataError):
        raise DataError(f"{name}: {content}")
    return decode(content, name)


def _check_suffixes(suffixes: Sequence[str], first: dict[str, Any], file: Path) -> None:
    for suffix in suffixes:
        if suffix in (*RESERVED, "label"):
            raise UsageError(f"columns: '{suffix}' is a name of the embeddings themselves; rename the members")
        if suffix not in first:
            raise DataError(f"{file}: the first sample has no member '.{suffix}'; it has {', '.join(first) or 'none'}")


# --- in any order ---------------------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where the bytes of a member lie in its archive."""

    offset: int
    size: int


def _place(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> _Place | bytes | DataError:
    """Offset and size of a member; the content of a class label."""
    if member.issparse():
        raise DataError(f"{archive.name!s}: '{member.name}' is stored as a sparse file; write the archive without --sparse")
    return _content(archive, member, suffix) if suffix == "cls" else _Place(member.offset_data, member.size)


class _Members:
    """Reads the bytes of image i at its offset. Files are opened for each read, so processes and threads share no position."""

    def __init__(self, files: Sequence[Path], archives: Sequence[int], places: Sequence[_Place]) -> None:
        self.files, self.archives = list(files), np.array(archives, dtype=np.int64)
        self.places = np.array(places, dtype=np.int64).reshape(-1, 2)

    def __call__(self, i: int) -> bytes:
        file, (offset, size) = self.files[self.archives[i]], self.places[i].tolist()
        if size > MAX_MEMBER_BYTES:
            raise DataError(f"{size} bytes, the limit is {MAX_MEMBER_BYTES}")
        try:
            with open(file, "rb") as archive:
                archive.seek(offset)
                return archive.read(size)
        except OSError as error:
            raise DataError(f"{file}: {error.strerror or error}") from error


def _labels(texts: Sequence[str | None], ids: Sequence[str]) -> tuple[list[int] | None, list[str] | None]:
    """Class numbers and names from the text of `.cls` members: numbers as they are, or names numbered in sorted order; -1 without label.

    Raises:
        DataError: some labels are numbers and some are names.
    """
    known = {text for text in texts if text is not None}
    if not known:
        return None, None
    numbers = {text for text in known if _is_number(text)}
    if numbers == known:
        return number_classes([None if text is None else int(text) for text in texts], column="classes")
    if numbers:
        examples = [next(id for id, text in zip(ids, texts, strict=True) if text in some) for some in (numbers, known - numbers)]
        raise DataError("{}.cls is a class number and {}.cls is a class name; write all as numbers or all as names".format(*examples))
    return number_classes(texts, column="classes")


def _indexed(files: Sequence[Path]) -> Images:
    """Images of plain tar files with random access.

    Raises:
        DataError: a compressed file, or no sample with an image.
    """
    if compressed := [file for file in files if file.suffix.lower() != ".tar"]:
        raise DataError(
            f"data.path: {compressed[0]} is compressed, so single images cannot be read from it; unpack it to a .tar file (gunzip) and use that"
        )
    root = common_folder(files)
    ids, archives, places, texts = list[str](), list[int](), list[_Place](), list[str | None]()
    for number, file in enumerate(files):
        for key, members in _samples(file, _place, "r:"):
            ids.append(_id(file, files, root, key))
            archives.append(number)
            places.append(members[_image_suffix(members) or ""])  # type: ignore[arg-type]
            texts.append(_text(members.get("cls")))
    if not ids:
        raise DataError(f"{files[0]}: no images in it (looked for {' '.join(SUFFIXES)})")
    labels, classes = _labels(texts, ids)
    return Images(_Members(files, archives, places), ids, labels, classes)


@SOURCES.register("webdataset")
class WebDataset(ImageSource):
    """Tar files; those of a split have names that start with it, or lie in a folder named so."""

    suffixes = (".tar", ".tar.gz", ".tgz")

    def open(self, data: Data) -> tuple[Images, Images | None]:
        root = data_path(data, "tar files")
        if not (files := files_below(root, self.suffixes)):
            raise DataError(f"data.path: {root}: no tar files in it")
        train = _indexed(files_of_split(files, data.split, data.eval_split, root, "tar"))
        if data.eval_split is None:
            return train, None
        evaluation = _indexed(files_of_split(files, data.eval_split, data.eval_split, root, "tar"))
        if train.labels is not None and evaluation.labels is not None:
            kinds = ["numbers" if all(name.isdecimal() for name in part.classes or ()) else "names" for part in (train, evaluation)]
            if len(set(kinds)) > 1:
                raise DataError(
                    f"data.eval_split: {root}: labels are {kinds[0]} in '{data.split}' and {kinds[1]} in '{data.eval_split}'; write both alike"
                )
        return train, match_classes(evaluation, train, f"{root}, data.eval_split={data.eval_split}")

    def open_files(self, files: Sequence[Path], folder: Path | None, options: Options) -> ImageRows:
        """Images read one after another. Which members are passed along, and whether a class is a number, is taken from the first sample."""
        if options.id or options.image:
            raise UsageError(
                "columns: tar files have members, not columns; name passed-along ones by suffix (json, txt) with the option for columns"
            )
        first = next(_samples(files[0], _content), ("", {}))[1]
        suffixes = [suffix.lower().removeprefix(".") for suffix in options.columns]
        _check_suffixes(suffixes, first, files[0])
        text = first.get("cls")
        number = isinstance(text, bytes) and _is_number(_text(text) or "")
        label = None if text is None else label_feature(None) if number else _TEXT
        root = common_folder(files)

        def rows(start: int) -> Iterator[Row]:
            position = 0
            for file in files:
                for key, members in _samples(file, _content):
                    if position >= start:
                        yield _sample_row(_id(file, files, root, key), members, label, suffixes)
                    position += 1

        columns = ({} if label is None else {"label": label}) | {suffix: _TEXT for suffix in suffixes}
        plain = all(file.suffix.lower() == ".tar" for file in files)  # the headers are found without reading what lies between them
        length = sum(1 for file in files for _ in _samples(file, _nothing)) if plain else None
        return ImageRows(rows, length, {**files_identity(files, root), "rows": length, "columns": list(columns)}, columns)
