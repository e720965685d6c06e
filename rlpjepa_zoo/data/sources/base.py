"""Shared by the image sources: their registry, selection of columns, class numbers and ids."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from ...config.sections import Data
from ...core.registry import Registry
from ...errors import DataError, UsageError
from ..decode import decode
from ..images import ImageRows, Images, Row

log = logging.getLogger("rlpjepa_zoo")

RESERVED = ("id", "indices", "values", "scale")
"""Names of columns that embeddings have themselves."""


class Options(NamedTuple):
    """What to read: columns of a table, split and revision of a data set."""

    columns: tuple[str, ...] = ()
    """Columns passed along beside the class label."""
    id: str | None = None
    """Column of the ids; row numbers if None."""
    image: str | None = None
    """Column of the images; found by type if None."""
    label: str | None = None
    """Column of the class labels; found by type if None, ``"none"`` if there is none."""
    split: str | None = None
    revision: str | None = None
    skip_bad: bool = False
    """Whether files that are missing or damaged are rows that cannot be read, instead of errors when the source is opened."""

    def refuse_columns(self, noun: str) -> None:
        """Raise UsageError if columns were asked for of images that have none."""
        if self.columns or self.id or self.image:
            raise UsageError(f"columns: {noun} have none; leave the options for columns out")

    def refuse_split(self, name: str) -> None:
        """Raise UsageError if a revision or split was asked for of images that have none."""
        for option, value in (("revision", self.revision), ("split", self.split)):
            if value is not None:
                raise UsageError(f"'{name}' is not a data set on the Hub, so it has no {option}; leave it out")


class ImageSource(ABC):
    """One kind of image source. A new kind is one file in this folder with one registered subclass,
    and a row of `SOURCE_KEYS` in `rlpjepa_zoo.config.sections` with the recipe keys it uses.

    Example:
        >>> from rlpjepa_zoo.config.sections import Data
        >>> train, evaluation = SOURCES["digits"]().open(Data(source="digits"))
        >>> len(train.ids), len(evaluation.ids)
        (1437, 360)
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    """File name suffixes, in lower case, by which files of this kind are recognised."""

    def holds_images(self, file: Path, options: Options) -> bool:
        """Whether a file with one of the suffixes holds images, rather than only text about images beside it."""
        return True

    @abstractmethod
    def open(self, data: Data) -> tuple[ImageRows, Images | None]:
        """Training and evaluation images of a recipe's data section.

        Raises:
            DataError: not there, empty, or without the asked columns or splits.
        """

    def open_files(self, files: Sequence[Path], folder: Path | None, options: Options) -> ImageRows:
        """Images of files of this kind, for embedding.

        Args:
            files: the files, in order, which exist unless ``options.skip_bad``; for a saved data set its folder.
            folder: the folder that holds them all, if one folder was given; None for a list of files.
            options: columns, split and revision.

        Raises:
            DataError: files that cannot be read, or without the asked columns.
            UsageError: options that have no meaning for this kind.
        """
        raise NotImplementedError

    def open_object(self, source: Any, options: Options) -> ImageRows | None:
        """Images of a Python object or of a remote name, for embedding; None if this kind does not know it."""
        return None


SOURCES: Registry[type[ImageSource]] = Registry("data source", "rlpjepa_zoo.data.sources")
"""Kinds of image sources by the value of `data.source` in a recipe."""


# --- columns --------------------------------------------------------------------------------------------------------------------------


def image_column(features: Any, asked: str | None = None) -> str:
    """The column that holds images: the asked one, else the first of type Image or {bytes, path}.

    Raises:
        DataError: no such column.
    """
    names = [n for n, f in features.items() if type(f).__name__ == "Image" or (isinstance(f, dict) and "bytes" in f)]
    if asked is not None and asked not in features:
        raise DataError(f"no column '{asked}'; the data set has {', '.join(features)}")
    if asked is None and not names:
        raise DataError(f"no image column among {', '.join(features)}; name it with data.image_column")
    return asked or names[0]


def label_column(features: Any, asked: str | None = None) -> str | None:
    """The column of class labels: the asked one, else the first ClassLabel, else None. ``"none"`` means there is none.

    Raises:
        DataError: no such column.
    """
    if asked is None:
        return next((n for n, f in features.items() if type(f).__name__ == "ClassLabel"), None)
    if asked == "none":
        return None
    if asked not in features:
        raise DataError(f"no column '{asked}'; the data set has {', '.join(features)}")
    return asked


class Columns:
    """The columns of a table of images that are read: image, class label, those passed along, id.

    Args:
        features: name -> Hugging Face feature of all columns of the table.
        options: which columns were asked for.

    Raises:
        DataError: the table has no such column.
        UsageError: a column that cannot be passed along.
    """

    def __init__(self, features: Any, options: Options) -> None:
        self.image, self.label, self.id = image_column(features, options.image), label_column(features, options.label), options.id
        for name in (*options.columns, *([options.id] if options.id else [])):
            if name not in features:
                raise DataError(f"no column '{name}'; the data set has {', '.join(features)}")
        for name in options.columns:
            if name in RESERVED:
                raise UsageError(f"columns: '{name}' is a name of the embeddings themselves; use it as the id column, or rename it")
            if type(features[name]).__name__ in ("Image", "Audio", "Video"):
                kind = type(features[name]).__name__.lower()
                raise UsageError(f"columns: '{name}' holds {kind}s, which are not passed along; name columns of text or numbers")
        self.passed = list(dict.fromkeys([*([self.label] if self.label else []), *options.columns]))
        self.all = list(dict.fromkeys([self.image, *self.passed, *([options.id] if options.id else [])]))
        self._features = features

    @property
    def classes(self) -> list[str] | None:
        """Class names of the label column, where it has them."""
        return getattr(self._features[self.label], "names", None) if self.label else None

    def described(self) -> dict[str, dict[str, Any]]:
        """Features of the passed columns as dictionaries."""
        import datasets

        return {name: datasets.Features({name: self._features[name]}).to_dict()[name] for name in self.passed}

    def identity(self) -> dict[str, Any]:
        """The read columns, as an entry of an identity."""
        return {"image column": self.image, "id column": self.id, "columns": list(self.passed)}

    def row(self, record: dict[str, Any], position: int) -> Row:
        """A row from a record of the table.

        Raises:
            DataError: the id is neither text nor an integer.
        """
        id = record[self.id] if self.id else position
        if not isinstance(id, str | int) or isinstance(id, bool):
            raise DataError(f"row {position}: column '{self.id}' is to hold ids, but there is {id!r}; expected text or an integer")
        name = f"row {id}" if isinstance(id, int) else id
        return Row(id, partial(_decode_cell, record[self.image], name), {k: record[k] for k in self.passed})


def _decode_cell(value: Any, name: str) -> Image.Image:
    try:
        return decode(image_of_cell(value), name)
    except DataError as error:
        raise error if str(error).startswith(name) else DataError(f"{name}: {error}") from error


def image_of_cell(value: Any) -> Any:
    """Encoded bytes, path or PIL image in a cell of an image column.

    Raises:
        DataError: the cell is empty.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise DataError("no image in this row")
    return value


# --- classes --------------------------------------------------------------------------------------------------------------------------


def warn_of_unknown_classes(part: str, unknown: Iterable[str], classes: Sequence[str]) -> None:
    """Log the classes of evaluation images that the training images do not have.

    Args:
        part: name of the evaluation part.
        unknown: class names that the training images do not have.
        classes: class names of the training images.
    """
    if names := sorted(unknown):
        shown, known = (", ".join(some[:5]) + (" ..." if len(some) > 5 else "") for some in (names, list(classes)))
        fix = "their images are not scored; name the classes of both parts alike"
        log.warning("%s: %s: no class of the training images (%s), so %s", part, shown, known, fix)


def match_classes(evaluation: Images | None, classes: Sequence[str] | None, part: str) -> Images | None:
    """Evaluation images with the class numbers of the training images: equal names get equal numbers, other names get -1.

    The images are returned unchanged if either part has no class names.

    Args:
        evaluation: the evaluation images.
        classes: class names of the training images.
        part: name of the evaluation part in a warning.
    """
    if evaluation is None or evaluation.labels is None or not evaluation.classes or not classes or evaluation.classes == list(classes):
        return evaluation
    number, names = {name: k for k, name in enumerate(classes)}, evaluation.classes
    warn_of_unknown_classes(part, {names[k] for k in np.unique(evaluation.labels) if k >= 0} - number.keys(), classes)
    matched = copy.copy(evaluation)
    matched.labels = np.array([number.get(names[k], -1) if k >= 0 else -1 for k in evaluation.labels], dtype=np.int64)
    matched.classes = list(classes)
    return matched
