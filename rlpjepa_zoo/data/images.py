"""The data set types: images in a fixed order, read one after another (`ImageRows`) or in any order (`Images`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..errors import DataError, first_line
from .decode import decode

__all__ = ["ImageRows", "Images", "Row", "label_feature", "reason_with_id", "spans"]


class Row(NamedTuple):
    """One image of a data set."""

    id: str | int
    """Path, key, row number, or value of the id column."""
    read: Callable[[], Image.Image]
    """Decodes the image to RGB; safe in any thread. Raises DataError if the image cannot be read."""
    columns: dict[str, Any]
    """Class label and further columns of this row."""


class ImageRows:
    """Images in a fixed order that can be read from any row on. No image is kept in memory.

    Args:
        rows: function of a row number; returns an iterator over all rows from that one on.
        length: number of rows; None if it is not known before they are read.
        identity: JSON-able; differs for other images. It holds names and sizes, not pixels.
        columns: name -> feature of each column of a row, as a Hugging Face data set describes it.
        classes: class names, where known.
        seekable: whether `rows(n)` costs no more than `rows(0)`.
        expected: number of rows according to a data set card; it may be wrong and serves progress bars only.
        stream: for a streamed data set, what training reads, see `rlpjepa_zoo.data.sources.huggingface.Stream`.
    """

    def __init__(
        self,
        rows: Callable[[int], Iterator[Row]],
        length: int | None,
        identity: dict[str, Any],
        columns: dict[str, dict[str, Any]] | None = None,
        *,
        classes: Sequence[str] | None = None,
        seekable: bool = False,
        expected: int | None = None,
        stream: Any = None,
    ) -> None:
        self._rows, self.length, self.identity, self.columns = rows, length, identity, columns or {}
        self.classes = list(classes) if classes else None
        self.seekable, self.expected, self.stream = seekable, expected, stream

    def rows(self, start: int = 0) -> Iterator[Row]:
        """All rows from row `start` on."""
        return self._rows(start)


class Images(ImageRows):
    """n images with random access: `read(i)` decodes image i, `ids[i]` names it, `labels[i]` is its class number or -1.

    Args:
        read: function of an index that returns what `rlpjepa_zoo.data.decode.decode` takes.
        ids: n strings or n integers.
        labels: (n,) integers, -1 where unknown; None if there are no labels.
        classes: class names, where known.
        identity: JSON-able; differs for other images, see `ImageRows`.

    Raises:
        DataError: labels that are not integers. `rlpjepa_zoo.data.sources.classes.number_classes` numbers labels of any kind.

    Example:
        >>> images = Images([Image.new("L", (8, 8)), Image.new("RGB", (4, 4))].__getitem__, ["first", "second"], [1, 0])
        >>> len(images), images.read(0).mode, images.take([1]).ids
        (2, 'RGB', ['second'])
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        ids: Sequence[str] | Sequence[int],
        labels: Sequence[int] | np.ndarray[Any, Any] | None = None,
        classes: Sequence[str] | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        identity = {**({"images": "in memory"} if identity is None else identity), "rows": len(ids)}
        columns = {} if labels is None else {"label": label_feature(classes)}
        super().__init__(self._rows_from, len(ids), identity, columns, classes=classes, seekable=True)
        self._read, self.ids = read, ids
        self.labels = None if labels is None else _integers(labels)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> Image.Image:
        """Image i in RGB.

        Raises:
            DataError: the image cannot be read; the message starts with its id.
        """
        name = str(self.ids[i])
        try:
            source = self._read(i)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        return decode(source, name=name)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self.read(i) for i in range(len(self)))

    def take(self, rows: Sequence[int] | np.ndarray[Any, Any]) -> Images:
        """The images of these row numbers, in this order."""
        rows = np.asarray(rows)
        ids: Any = [self.ids[int(i)] for i in rows]
        return Images(_Subset(self._read, rows), ids, None if self.labels is None else self.labels[rows], self.classes)

    def _rows_from(self, start: int) -> Iterator[Row]:
        for i in range(start, len(self)):
            yield Row(self.ids[i], partial(self.read, i), {} if self.labels is None else {"label": int(self.labels[i])})


def _integers(labels: Any) -> np.ndarray[Any, Any]:
    """Labels as int64.

    Raises:
        DataError: they are no integers, or have a fraction.
    """
    try:
        given = np.asarray(labels)
        with np.errstate(invalid="ignore"):
            numbers = given.astype(np.int64)
        if len(given) and not (given == numbers).all():
            raise ValueError("some have a fraction or are not finite")
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"labels: expected integers ({first_line(error)})") from error
    return numbers


class _Subset:
    """Reads image `rows[i]` for index i. A class, because loader processes that are not forked receive it pickled."""

    def __init__(self, read: Callable[[int], Any], rows: Any) -> None:
        self.read, self.rows = read, rows

    def __call__(self, i: int) -> Any:
        return self.read(int(self.rows[i]))


def label_feature(classes: Sequence[str] | None) -> dict[str, Any]:
    """Class numbers as a Hugging Face data set describes them: a ClassLabel if the names are known, else an integer."""
    return {"names": list(classes), "_type": "ClassLabel"} if classes else {"dtype": "int64", "_type": "Value"}


def reason_with_id(id: str | int, reason: str) -> str:
    """Why an image cannot be read, preceded by its id unless the reason contains it."""
    return reason if str(id) in reason else f"{id}: {reason}"


def spans(images: ImageRows, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Iterator[Row]]]:
    """Cut a data set into spans of `size` rows (the last may be shorter); yield number and rows of each wanted span.

    Use up the rows of a span before asking for the next. A data set that is not seekable is read once, unwanted spans included.
    If its length is not known, one empty span may end it.

    Args:
        images: the data set.
        size: rows of a span.
        wanted: whether the span with this number is to be read.
    """
    rows: Iterator[Row] | None = None
    position = 0
    for number in itertools.count():
        start = number * size
        if images.length is not None and start >= images.length:
            return
        if not wanted(number):
            continue
        if rows is None or images.seekable:
            rows, position = images.rows(start), start
        for _ in itertools.islice(rows, start - position):
            pass
        count = 0

        def counted(rows: Iterator[Row] = rows) -> Iterator[Row]:
            nonlocal count
            for row in itertools.islice(rows, size):
                count += 1
                yield row

        yield number, counted()
        position = start + count
        if count < size:
            return
