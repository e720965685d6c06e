"""Local parquet files (`data.source: parquet`), read directly: row after row for embedding, by row group for training and evaluation."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...config.sections import Data
from ...errors import DataError, first_line
from ..files.listing import common_folder, data_path, files_below, files_identity, files_of_split
from ..images import ImageRows, Images, Row
from .base import SOURCES, ImageSource, Options
from .classes import match_classes, number_classes
from .columns import Cells, Columns, image_column

log = logging.getLogger("rlpjepa_zoo")

_ROWS = 256
"""Rows of a file that are in memory at a time when it is read row after row."""
_GROUPS = 4
"""Row groups that random access keeps in memory."""
_LARGE_GROUP = 1 << 26
"""Bytes of a row group above which random access is slow enough for a warning."""


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A parquet file. Arrow receives an open file, because it takes some names for addresses (``run:1/x.parquet``)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pa.OSFile(os.fsencode(path))  # bytes, because names need not be UTF-8
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from error
    with file:
        try:
            opened = pq.ParquetFile(file, memory_map=False, buffer_size=1 << 20, pre_buffer=False)
        except Exception as error:
            raise DataError(f"{path}: cannot be read as parquet ({first_line(error)})") from error
        yield opened


def read_schema(path: Path) -> Any:
    """The Arrow schema of a parquet file.

    Raises:
        DataError: the file cannot be read.
    """
    with _opened(path) as file:
        return file.schema_arrow


def table_features(schema: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Columns of a table as Hugging Face features, and name -> type of those that the `datasets` library has no feature for (maps, UUID)."""
    import datasets
    import pyarrow as pa

    features, unknown = dict[str, Any](), dict[str, str]()
    for column in schema:
        try:
            features[column.name] = datasets.Features.from_arrow_schema(pa.schema([column], metadata=schema.metadata))[column.name]
        except Exception:
            unknown[column.name] = str(column.type)
    return features, unknown


class _Table:
    """The rows of several parquet files, one file after another.

    Args:
        files: the files, in order.
        options: columns.

    Raises:
        DataError: a file that cannot be read, or whose columns differ from those of the first.
    """

    def __init__(self, files: Sequence[Path], options: Options) -> None:
        features, unknown = table_features(read_schema(files[0]))
        types = {**features, **unknown}
        self.files, self.columns = list(files), Columns(features, options, unknown)
        self.cells = [Cells(self.columns.image_feature, options, file.parent) for file in files]
        """What turns the image cells of each file into images; relative paths begin at its folder."""
        self.groups: list[np.ndarray[Any, Any]] = []
        """Rows of each row group, file by file."""
        largest = 0
        for file in files:
            with _opened(file) as one:
                known, others = table_features(one.schema_arrow)
                here, metadata = {**known, **others}, one.metadata
                groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
                self.groups.append(np.array([group.num_rows for group in groups], dtype=np.int64))
                largest = max([largest, *(group.total_byte_size for group in groups)])
            for name in self.columns.all:
                if name not in here:
                    raise DataError(f"{file}: no column '{name}', which {files[0]} has")
                if here[name] != types[name]:
                    raise DataError(
                        f"{file}: column '{name}' is {here[name]}, in {files[0]} it is {types[name]}; embed them into two folders"
                    )
        self.largest_group = largest
        self.counts = [int(groups.sum()) for groups in self.groups]

    def __len__(self) -> int:
        return sum(self.counts)

    def rows(self, start: int) -> Iterator[Row]:
        """All rows from one on, a few in memory at a time."""
        first = 0
        for file, cells, groups, count in zip(self.files, self.cells, self.groups, self.counts, strict=True):
            if first + count > start:
                records = _records(file, groups, max(0, start - first), self.columns.all)
                for position, record in enumerate(records, max(first, start)):
                    yield self.columns.row(record, position, cells)
            first += count

    def labels(self) -> tuple[list[int] | None, list[str] | None]:
        """Class numbers, -1 where there is no label, and class names; None if there is no label column."""
        values: list[Any] = []
        if self.columns.label is None:
            return None, None
        for file in self.files:
            with _opened(file) as one:
                try:
                    values += one.read(columns=[self.columns.label]).column(self.columns.label).to_pylist()
                except (OSError, ValueError) as error:
                    raise DataError(f"{file}: column '{self.columns.label}' cannot be read ({first_line(error)})") from error
        return number_classes(values, self.columns.classes, f"column '{self.columns.label}'")


def _records(file: Path, groups: np.ndarray[Any, Any], start: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file from one on; row groups before it are not read."""
    skipped = int(np.searchsorted(groups.cumsum(), start, side="right"))
    position = int(groups[:skipped].sum())
    with _opened(file) as one:
        batches = one.iter_batches(_ROWS, row_groups=list(range(skipped, len(groups))), columns=list(columns))
        while True:
            try:
                batch = next(batches, None)
                records = [] if batch is None else batch.slice(min(max(start - position, 0), batch.num_rows)).to_pylist()
            except (OSError, ValueError) as error:  # damaged pages, text that is not UTF-8
                raise DataError(f"{file}: row {position} or one after it cannot be read ({first_line(error)})") from error
            if batch is None:
                return
            position += batch.num_rows
            yield from records


class _Cells:
    """Reads image cell i by its row group; the last few row groups stay in memory. Safe in threads: `_kept` is only ever replaced."""

    def __init__(self, table: _Table) -> None:
        self.files, self.cells, self.column = table.files, table.cells, table.columns.image
        self.places = [(file, group) for file, groups in enumerate(table.groups) for group in range(len(groups))]
        self.ends = np.concatenate(table.groups).cumsum()
        self._kept: dict[int, Any] = {}

    def __call__(self, i: int) -> Any:
        number = int(np.searchsorted(self.ends, i, side="right"))
        kept = self._kept
        if number not in kept:
            kept = {**dict([*kept.items()][1 - _GROUPS :]), number: self._group(*self.places[number])}
            self._kept = kept
        column = kept[number]
        return self.cells[self.places[number][0]](column[i - int(self.ends[number]) + len(column)].as_py())

    def _group(self, file: int, group: int) -> Any:
        with _opened(self.files[file]) as one:
            try:
                return one.read_row_group(group, columns=[self.column]).column(self.column)
            except (OSError, ValueError) as error:
                raise DataError(f"{self.files[file]}: row group {group} cannot be read ({first_line(error)})") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


@SOURCES.register("parquet")
class Parquet(ImageSource):
    """Parquet files of one table; the files of a split have names that start with it, or lie in a folder named so."""

    suffixes = (".parquet",)

    def holds_images(self, file: Path, options: Options) -> bool:
        try:
            image_column(table_features(read_schema(file))[0], options)
        except DataError:  # no such column, or damaged
            return False
        return True

    def open(self, data: Data) -> tuple[Images, Images | None]:
        train = self._indexed(data, data.split)
        evaluation = None if data.eval_split is None else self._indexed(data, data.eval_split)
        return train, match_classes(evaluation, train, f"{data.path}, data.eval_split={data.eval_split}")

    def _indexed(self, data: Data, split: str) -> Images:
        root = data_path(data, "parquet files")
        if not (files := files_below(root, self.suffixes)):
            raise DataError(f"data.path: {root}: no parquet files in it")
        chosen = files_of_split(files, split, data.eval_split, root, "parquet")
        table = _Table(chosen, Options.of(data))
        if table.largest_group > _LARGE_GROUP:
            log.warning(
                "%s: row groups of up to %d MB are read for single images unless all images fit in memory (data.cache_gb); "
                "write smaller row groups, or use data.source=hf, which keeps an indexed copy",
                root,
                table.largest_group >> 20,
            )
        return Images(_Cells(table), range(len(table)), *table.labels())

    def open_files(self, files: Sequence[Path], folder: Path | None, options: Options) -> ImageRows:
        table = _Table(files, options)
        identity = {**files_identity(files, common_folder(files)), "rows": len(table), **table.columns.identity()}
        return ImageRows(table.rows, len(table), identity, table.columns.described(), classes=table.columns.classes)
