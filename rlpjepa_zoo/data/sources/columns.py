"""Columns of a table of images: which hold images, class labels and ids, and how a cell becomes an image."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import DataError, UsageError, first_line
from ...hub.retry import trouble
from ...sparse.columns import RESERVED
from ..decode import decode
from ..images import Row
from .base import Options

log = logging.getLogger("rlpjepa_zoo")

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "image_data")
"""Names of image columns, in lower case. They choose among several columns of images, and among columns of bytes or arrays."""
LABEL_NAMES = (
    "label",
    "labels",
    "fine_label",
    "class",
    "class_label",
    "class_id",
    "category",
    "category_id",
    "target",
    "targets",
    "y",
    "cls",
)
"""Names of columns of class labels, in lower case. They choose among several class columns, and among columns of integers or text."""

_LARGEST_FILE = 1 << 28
"""Bytes that are read of a file at an address or in an archive."""


# --- which column ---------------------------------------------------------------------------------------------------------------------


def image_column(features: Mapping[str, Any], options: Options, unknown: Mapping[str, str] | None = None) -> str:
    """The column that holds images: the asked one, else the only one of type Image or {bytes, path}, else the only one of bytes or arrays
    with one of `IMAGE_NAMES`. The names also choose among several.

    Args:
        features: name -> Hugging Face feature of the columns.
        options: the asked column, and how messages call it.
        unknown: name -> type of columns that have no feature.

    Raises:
        DataError: no such column, or several.
    """
    if options.image is not None:
        return _existing(options.image, features, unknown)
    found = [n for n, f in features.items() if type(f).__name__ == "Image" or (isinstance(f, dict) and "bytes" in f)]
    found = found or [n for n, f in features.items() if n.lower() in IMAGE_NAMES and _may_hold_images(f)]
    if not found:
        texts = [n for n, f in features.items() if n.lower() in IMAGE_NAMES and "string" in str(getattr(f, "dtype", ""))]
        hint = f"'{texts[0]}' is text: if it holds paths of images, name it" if texts else "name it"
        raise DataError(f"no image column among {', '.join([*features, *(unknown or ())])}; {hint} with {options.name('image_column')}")
    return _only(found, IMAGE_NAMES, "hold images", f"; choose one with {options.name('image_column')}")


def _may_hold_images(feature: Any) -> bool:
    return "binary" in str(getattr(feature, "dtype", "")) or type(feature).__name__ in ("Array2D", "Array3D")


def label_column(features: Mapping[str, Any], options: Options, stream: bool = False) -> str | None:
    """The column of class labels: the asked one, else the only ClassLabel, else the only one of integers or text with one of `LABEL_NAMES`,
    else None. The names also choose among several. ``"none"`` means there is none.

    Args:
        features: name -> Hugging Face feature of the columns.
        options: the asked column, and how messages call it.
        stream: whether training reads the rows one after another, so that only a ClassLabel tells the classes.

    Raises:
        DataError: no such column, several, or one of a type that a stream cannot have.
    """
    if options.label == "none":
        return None
    if options.label is not None:
        name = _existing(options.label, features)
        if stream and type(features[name]).__name__ != "ClassLabel":
            fix = f"cast it to ClassLabel, or set {options.name('label_column')}=none"
            raise DataError(f"{options.name('label_column')}: '{name}' has no class names, which labels of a stream need; {fix}")
        return name
    found = [n for n, f in features.items() if type(f).__name__ == "ClassLabel"]
    if not found and not stream:
        found = [n for n, f in features.items() if n.lower() in LABEL_NAMES and _may_hold_labels(f)]
    if not found:
        _say_of_other_labels(features, options)
        return None
    if options.from_recipe:
        return _only(found, LABEL_NAMES, "hold class labels", f"; choose one with {options.name('label_column')}, or set it to none")
    try:  # embedding copies labels beside the embeddings and does not need them
        return _only(found, LABEL_NAMES, "hold class labels")
    except DataError as error:
        if not set(found) <= set(options.columns):
            log.warning("%s; none is copied unless it is named with %s", error, options.name("columns"))
        return None


def _say_of_other_labels(features: Mapping[str, Any], options: Options) -> None:
    """Name columns that are called like labels and are not copied beside the embeddings."""
    others = [name for name in features if name.lower() in LABEL_NAMES and name not in options.columns]
    if others and not options.from_recipe:
        what = ", ".join(f"'{name}' ({getattr(features[name], 'dtype', None) or type(features[name]).__name__})" for name in others)
        log.warning("%s: not copied as a class label; name it with %s to copy it", what, options.name("columns"))


def _may_hold_labels(feature: Any) -> bool:
    kind = str(getattr(feature, "dtype", "")) if type(feature).__name__ == "Value" else ""
    return kind.startswith(("int", "uint")) or kind in ("bool", "string", "large_string", "string_view")


def _existing(name: str, features: Mapping[str, Any], unknown: Mapping[str, str] | None = None) -> str:
    if name in features:
        return name
    if unknown and name in unknown:
        raise DataError(f"column '{name}' is of the type {unknown[name]}, which cannot be read; convert it to text or numbers")
    raise DataError(f"no column '{name}'; the data set has {', '.join([*features, *(unknown or ())])}")


def _only(found: list[str], names: tuple[str, ...], verb: str, fix: str = "") -> str:
    """The only column, or the only one of several that has one of the names."""
    named = found if len(found) == 1 else [name for name in found if name.lower() in names]
    if len(named) != 1:
        raise DataError(f"several columns may {verb}: {', '.join(named or found)}{fix}")
    return named[0]


# --- cells ----------------------------------------------------------------------------------------------------------------------------


class Cells:
    """Turns a cell of an image column into what `rlpjepa_zoo.data.decode.decode` takes: bytes, a path, a PIL image or an array.

    A cell that holds only a path names a file of somebody else's choice. It is opened if it lies in the folder of the table, where relative
    paths begin, or if paths are allowed.

    Args:
        feature: Hugging Face feature of the column.
        options: whether paths are allowed, and how messages call that.
        folder: folder of the table; None if it has none.
        own: whether the paths are the user's own or made by the `datasets` library; they are opened as the library does.
    """

    def __init__(self, feature: Any, options: Options, folder: Path | None = None, own: bool = False) -> None:
        self.mode, self.folder, self.any = getattr(feature, "mode", None), folder, own or options.allow_paths
        self.fix = options.name("allow_paths") + {"data.": "=true", "--": ""}.get(options.prefix, "=True")

    def __call__(self, value: Any) -> Any:
        """The content of a cell.

        Raises:
            DataError: the cell is empty, or names a file that is not there or may not be opened.
        """
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise DataError("no image in this row")
        if isinstance(value, str):
            value = self._file(value)
        elif isinstance(value, list):
            if value and not isinstance(value[0], list | int | float):
                raise DataError(f"a list of {len(value)} in one row; expected one image")
            value = np.asarray(value)
        return value if self.mode is None else decode(value, mode=self.mode)

    def _file(self, name: str) -> Path | bytes:
        address = "://" in name
        try:
            path = Path(name) if self.folder is None or address else self.folder / name
            inside = not address and self.folder is not None and path.resolve().is_relative_to(self.folder.resolve())
        except (OSError, ValueError) as error:
            raise DataError(f"{name!r} is no path ({first_line(error)})") from error
        if not self.any and not inside:
            raise DataError(f"the row names the file '{name}', which is not in the folder of the table; to open such files, use {self.fix}")
        return _content(name) if address else path


def _content(address: str) -> bytes:
    """Bytes of a file in an archive (``zip://a.png::b.zip``) or at a remote address, which the `datasets` library opens.

    Raises:
        DataError: it is not there or too large.
        HubError: the network failed.
    """
    from datasets.utils.file_utils import xopen

    archive = address.rpartition("::")[2]
    if "://" not in archive and not os.path.isfile(archive):
        raise DataError(f"{archive}: no such file")
    try:
        with xopen(address, "rb") as file:
            content = bytes(file.read(_LARGEST_FILE + 1))
    except Exception as error:  # not in the archive, a damaged archive, the network, ...
        failure = trouble(error, address) if "hf://" in address else None
        raise failure or DataError(f"{address}: cannot be read ({first_line(error)})") from error
    if len(content) > _LARGEST_FILE:
        raise DataError(f"{address}: over {_LARGEST_FILE >> 20} MB")
    return content


class Columns:
    """The columns of a table of images that are read: image, class label, those passed along, id.

    Args:
        features: name -> Hugging Face feature of the columns of the table.
        options: which columns were asked for.
        unknown: name -> type of columns that have no feature. They may be ids only.
        stream: whether the rows are a stream.

    Raises:
        DataError: the table has no such column, or several.
        UsageError: a column that cannot be passed along.
    """

    def __init__(
        self, features: Mapping[str, Any], options: Options, unknown: Mapping[str, str] | None = None, stream: bool = False
    ) -> None:
        self.image, self.id = image_column(features, options, unknown), options.id
        self.label = label_column(features, options, stream and options.from_recipe)
        if self.id is not None:
            _existing(self.id, {**features, **(unknown or {})})
        for name in options.columns:
            _existing(name, features, unknown)
            if name in RESERVED:
                raise UsageError(
                    f"{options.name('columns')}: '{name}' is a name of the embeddings themselves; use it as the id column, or rename it"
                )
            if type(features[name]).__name__ in ("Image", "Audio", "Video"):
                kind = type(features[name]).__name__.lower()
                raise UsageError(
                    f"{options.name('columns')}: '{name}' holds {kind}s, which are not passed along; name columns of text or numbers"
                )
        self.passed = list(dict.fromkeys([*([self.label] if self.label else []), *options.columns]))
        self.all = list(dict.fromkeys([self.image, *self.passed, *([options.id] if options.id else [])]))
        self._features = features

    @property
    def classes(self) -> list[str] | None:
        """Class names of the label column, where it has them."""
        return getattr(self._features[self.label], "names", None) if self.label else None

    @property
    def image_feature(self) -> Any:
        """Hugging Face feature of the image column."""
        return self._features[self.image]

    def described(self) -> dict[str, dict[str, Any]]:
        """Features of the passed columns as dictionaries."""
        import datasets

        return {name: datasets.Features({name: self._features[name]}).to_dict()[name] for name in self.passed}

    def identity(self) -> dict[str, Any]:
        """The read columns, as an entry of an identity."""
        return {"image column": self.image, "id column": self.id, "columns": list(self.passed)}

    def row(self, record: Mapping[str, Any], position: int, cells: Cells) -> Row:
        """A row from a record of the table.

        Raises:
            DataError: the id is neither text nor an integer.
        """
        id = _plain(record[self.id]) if self.id else position
        if not isinstance(id, str | int) or isinstance(id, bool):
            raise DataError(f"row {position}: column '{self.id}' is to hold ids, but there is {id!r}; expected text or an integer")
        name = f"row {id}" if isinstance(id, int) else id
        return Row(id, partial(_decode_cell, cells, record[self.image], name), {k: _plain(record[k]) for k in self.passed})


def _plain(value: Any) -> Any:
    """A value of a row without the array type that a format of the data set gave it; a UUID as text."""
    return str(value) if isinstance(value, uuid.UUID) else value.tolist() if hasattr(value, "tolist") else value


def _decode_cell(cells: Cells, value: Any, name: str) -> Image.Image:
    try:
        return decode(cells(value), name)
    except DataError as error:
        raise error if str(error).startswith(name) else DataError(f"{name}: {error}") from error
