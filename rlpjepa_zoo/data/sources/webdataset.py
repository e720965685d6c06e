"""Tar files of WebDataset (`data.source: webdataset`): members of one sample follow each other and share their name up to its first dot.

Embedding reads them one after another, compressed ones too. Training and evaluation read the bytes of single members of plain .tar files by
an index of offsets. Nothing is ever written to disk.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ...config.sections import Data
from ...errors import DataError, UsageError, first_line
from ...sparse.columns import RESERVED
from ..decode import decode
from ..files.archives import MAX_MEMBER_BYTES, TAR_SUFFIXES, Archives, content, is_compressed, member_at, open_archive
from ..files.listing import LeftOut, data_path, files_below, files_identity, files_of_split
from ..images import ImageRows, Images, Row, label_feature
from .base import SOURCES, ImageSource, Options
from .classes import match_classes, number_classes

_TEXT = {"dtype": "string", "_type": "Value"}


def _text(member: Any) -> str | None:
    """Text of a member; None if it is missing, empty or too large."""
    return (member.decode("utf-8", "replace").strip() or None) if isinstance(member, bytes) else None


def _is_number(text: str) -> bool:
    return re.fullmatch("-?[0-9]{1,18}", text) is not None


# --- one after another ----------------------------------------------------------------------------------------------------------------


class _Facts(NamedTuple):
    """What is known of archives before their images are read."""

    rows: int
    label: dict[str, Any] | None
    """Feature of the class labels: integers if all are; None without labels."""


def _survey(archives: Archives, columns: Sequence[str]) -> _Facts:
    """Read the headers and class labels of all samples.

    Raises:
        UsageError: a column that has another meaning.
        DataError: no sample has a member of that suffix; or see `Archives.samples`.
    """
    if taken := next((suffix for suffix in columns if suffix in (*RESERVED, "label")), None):
        raise UsageError(f"columns: '{taken}' is a name of the embeddings themselves; rename the members")
    left, first, missing = LeftOut(), dict[str, Any](), set(columns)
    rows, labels, numbers = 0, False, True
    for _, _, _, members in archives.samples(lambda *member: content(*member) if member[2] == "cls" else b"", left):
        rows += 1
        first = first or members
        missing -= members.keys()
        text = _text(members.get("cls"))
        labels, numbers = labels or text is not None, numbers and (text is None or _is_number(text))
    _check_rows(archives.files, rows, left)
    if missing:
        raise DataError(f"{archives.files[0]}: no sample has a member '.{min(missing)}'; the first has {', '.join(first) or 'none'}")
    return _Facts(rows, (label_feature(None) if numbers else _TEXT) if labels else None)


def _check_rows(files: Sequence[Path], rows: int, left: LeftOut) -> None:
    """Log what was left out.

    Raises:
        DataError: there are no images.
    """
    where = str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    if not rows:
        raise DataError(f"{where}: no images in it" + (f"; {left}" if left else ""))
    left.warn(where)


def _row(id: str, image: bytes | DataError, members: dict[str, Any], label: dict[str, Any] | None, columns: Sequence[str]) -> Row:
    cells: dict[str, Any] = {suffix: _text(members.get(suffix)) for suffix in columns}
    if label is not None:
        text = _text(members.get("cls"))
        cells["label"] = text if text is None or label == _TEXT else int(text)
    return Row(id, partial(_decode_member, image, id), cells)


def _decode_member(content: bytes | DataError, name: str) -> Image.Image:
    if isinstance(content, DataError):
        raise content if str(content).startswith(f"{name}:") else DataError(f"{name}: {content}")
    return decode(content, name)


# --- in any order ---------------------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a member lies in its archive."""

    offset: int
    """Of its bytes; of its header if it is a sparse file."""
    size: int
    """-1 for a sparse file, whose bytes do not lie together."""


def _place(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> _Place | bytes | DataError:
    """Place of a member; the content of a class label."""
    if suffix == "cls":
        return content(archive, member)
    return _Place(member.offset, -1) if member.issparse() else _Place(member.offset_data, member.size)


class _Members:
    """Reads the bytes of image i at its offset. Files are opened for each read, so processes and threads share no position."""

    def __init__(self, files: Sequence[Path], archives: Sequence[int], places: Sequence[_Place], bad: dict[int, DataError]) -> None:
        self.files, self.archives, self.bad = list(files), np.array(archives, dtype=np.int64), bad
        self.places = np.array(places, dtype=np.int64).reshape(-1, 2)

    def __call__(self, i: int) -> bytes:
        if i in self.bad:
            raise self.bad[i]
        file, (offset, size) = self.files[self.archives[i]], self.places[i].tolist()
        try:
            if size < 0:
                with open_archive(file) as archive:
                    encoded = content(archive, member_at(archive, offset) or tarfile.TarInfo())
            elif size > MAX_MEMBER_BYTES:
                encoded = DataError(f"{size} bytes, the limit is {MAX_MEMBER_BYTES}")
            else:
                with open(file, "rb") as opened:
                    opened.seek(offset)
                    encoded = opened.read(size)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise DataError(f"{file}: {first_line(error)}") from error
        if isinstance(encoded, DataError):
            raise encoded
        return encoded


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


def _indexed(files: Sequence[Path], image: str | None) -> Images:
    """Images of plain tar files with random access.

    Raises:
        DataError: a compressed file, or no sample with an image.
    """
    if compressed := next((file for file in files if is_compressed(file)), None):
        raise DataError(
            f"data.path: {compressed} is compressed, so single images cannot be read from it; unpack it to a .tar file (gunzip) and use that"
        )
    ids, numbers, places, texts = list[str](), list[int](), list[_Place](), list[str | None]()
    bad, left = dict[int, DataError](), LeftOut()
    for number, id, place, members in Archives(files, image).samples(_place, left):
        if isinstance(place, DataError):
            bad[len(ids)] = place
        ids.append(id)
        numbers.append(number)
        places.append(place if isinstance(place, _Place) else _Place(0, 0))
        texts.append(_text(members.get("cls")))
    _check_rows(files, len(ids), left)
    labels, classes = _labels(texts, ids)
    return Images(_Members(files, numbers, places, bad), ids, labels, classes)


@SOURCES.register("webdataset")
class WebDataset(ImageSource):
    """Tar files; those of a split have names that start with it, or lie in a folder named so."""

    suffixes = TAR_SUFFIXES

    def open(self, data: Data) -> tuple[Images, Images | None]:
        root = data_path(data, "tar files")
        if not (files := files_below(root, self.suffixes)):
            raise DataError(f"data.path: {root}: no tar files in it")
        train = _indexed(files_of_split(files, data.split, data.eval_split, root, "tar"), data.image_column)
        if data.eval_split is None:
            return train, None
        evaluation = _indexed(files_of_split(files, data.eval_split, data.eval_split, root, "tar"), data.image_column)
        if train.labels is not None and evaluation.labels is not None:
            kinds = ["numbers" if all(name.isdecimal() for name in part.classes or ()) else "names" for part in (train, evaluation)]
            if len(set(kinds)) > 1:
                raise DataError(
                    f"data.eval_split: {root}: labels are {kinds[0]} in '{data.split}' and {kinds[1]} in '{data.eval_split}'; write both alike"
                )
        return train, match_classes(evaluation, train, f"{root}, data.eval_split={data.eval_split}")

    def open_files(self, files: Sequence[Path], folder: Path | None, options: Options) -> ImageRows:
        """Images read one after another. Headers and labels are read before, so that the type of the labels is that of all of them."""
        if options.id:
            raise UsageError("columns: samples of tar files are named by their keys, so they have no id column; leave it out")
        archives, columns = (
            Archives(files, options.image, options.skip_bad),
            [suffix.lower().removeprefix(".") for suffix in options.columns],
        )
        facts = _survey(archives, columns)

        def rows(start: int) -> Iterator[Row]:
            for position, (_, id, image, members) in enumerate(archives.samples(content, LeftOut())):
                if position >= start:
                    yield _row(id, image, members, facts.label, columns)

        described = ({} if facts.label is None else {"label": facts.label}) | {suffix: _TEXT for suffix in columns}
        plain = all(file.suffix.lower() == ".tar" for file in files)
        identity = {**files_identity(files, archives.root), "rows": facts.rows if plain else None, "columns": list(described)}
        if archives.image is not None:
            identity["image column"] = archives.image
        return ImageRows(rows, facts.rows, identity, described)
