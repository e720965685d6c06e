"""Local parquet files (`data.source: parquet`), read directly: row after row for embedding, by row group for training and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...config.sections import Data
from ...errors import DataError, first_line
from ..files.listing import common_folder, data_path, files_below, files_identity, files_of_split
from ..images import ImageRows, Images, Row
from .base import SOURCES, Columns, ImageSource, Options, image_column, image_of_cell, match_classes

log = logging.getLogger("rlpjepa_zoo")

_ROWS = 256
"""Rows of a file that are in memory at a time when it is read row after row."""
_GROUPS = 4
"""Row groups that random access keeps in memory."""
_LARGE_GROUP = 1 << 26
"""Bytes of a row group above which random access is slow enough for a warning."""


def _open(path: Path) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, memory_map=False, buffer_size=1 << 20, pre_buffer=False)
    except Exception as error:
        raise DataError(f"{path}: cannot be read as parquet ({first_line(error)})") from error


def _features(schema: Any) -> Any:
    """Columns as Hugging Face features, without map columns, which have no feature type."""
    import datasets
    import pyarrow as pa

    known = [column for column in schema if not pa.types.is_map(column.type)]
    return datasets.Features.from_arrow_schema(pa.schema(known, metadata=schema.metadata))


class _Table:
    """The rows of several parquet files, one file after another.

    Args:
        files: the files, in order.
        options: columns.

    Raises:
        DataError: a file that cannot be read, or whose columns differ from those of the first.
    """

    def __init__(self, files: Sequence[Path], options: Options) -> None:
        with _open(files[0]) as first:
            features = _features(first.schema_arrow)
        self.files, self.columns = list(files), Columns(features, options)
        self.groups: list[np.ndarray[Any, Any]] = []
        """Rows of each row group, file by file."""
        largest = 0
        for file in files:
            with _open(file) as one:
                here, metadata = _features(one.schema_arrow), one.metadata
                groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
                self.groups.append(np.array([group.num_rows for group in groups], dtype=np.int64))
                largest = max([largest, *(group.total_byte_size for group in groups)])
            for name in self.columns.all:
                if name not in here:
                    raise DataError(f"{file}: no column '{name}', which {files[0]} has")
                if here[name] != features[name]:
                    raise DataError(
                        f"{file}: column '{name}' is {here[name]}, in {files[0]} it is {features[name]}; embed them into two folders"
                    )
        self.largest_group = largest
        self.counts = [int(groups.sum()) for groups in self.groups]

    def __len__(self) -> int:
        return sum(self.counts)

    def rows(self, start: int) -> Iterator[Row]:
        """All rows from one on, a few in memory at a time."""
        first = 0
        for file, groups, count in zip(self.files, self.groups, self.counts, strict=True):
            if first + count > start:
                records = _records(file, groups, max(0, start - first), self.columns.all)
                for position, record in enumerate(records, max(first, start)):
                    yield self.columns.row(record, position)
            first += count

    def labels(self) -> list[int] | None:
        """Values of the label column, -1 where there is none."""
        values: list[int] = []
        if self.columns.label is None:
            return None
        for file in self.files:
            with _open(file) as one:
                try:
                    column = one.read(columns=[self.columns.label]).column(0).to_pylist()
                except (OSError, ValueError) as error:
                    raise DataError(f"{file}: column '{self.columns.label}' cannot be read ({first_line(error)})") from error
            values += [-1 if value is None else value for value in column]
        return values


def _records(file: Path, groups: np.ndarray[Any, Any], start: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file from one on; row groups before it are not read."""
    skipped = int(np.searchsorted(groups.cumsum(), start, side="right"))
    position = int(groups[:skipped].sum())
    with _open(file) as one:
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
        self.files, self.column = table.files, table.columns.image
        self.places = [(file, group) for file, groups in enumerate(table.groups) for group in range(len(groups))]
        self.ends = np.concatenate(table.groups).cumsum()
        self._kept: dict[int, Any] = {}

    def __call__(self, i: int) -> Any:
        number = int(np.searchsorted(self.ends, i, side="right"))
        kept = self._kept
        if number not in kept:
            kept = {**dict([*kept.items()][1 - _GROUPS :]), number: self._group(*self.places[number])}
            self._kept = kept
        cells = kept[number]
        return image_of_cell(cells[i - int(self.ends[number]) + len(cells)].as_py())

    def _group(self, file: int, group: int) -> Any:
        with _open(self.files[file]) as one:
            try:
                return one.read_row_group(group, columns=[self.column]).column(0)
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
            with _open(file) as one:
                image_column(_features(one.schema_arrow), options.image)
        except DataError:  # no such column, or damaged
            return False
        return True

    def open(self, data: Data) -> tuple[Images, Images | None]:
        train = self._indexed(data, data.split)
        evaluation = None if data.eval_split is None else self._indexed(data, data.eval_split)
        return train, match_classes(evaluation, train.classes, f"{data.path}, data.eval_split={data.eval_split}")

    def _indexed(self, data: Data, split: str) -> Images:
        root = data_path(data, "parquet files")
        if not (files := files_below(root, self.suffixes)):
            raise DataError(f"data.path: {root}: no parquet files in it")
        chosen = files_of_split(files, split, data.eval_split, root, "parquet")
        table = _Table(chosen, Options(image=data.image_column, label=data.label_column))
        if table.largest_group > _LARGE_GROUP:
            log.warning(
                "%s: row groups of up to %d MB are read for single images unless all images fit in memory (data.cache_gb); "
                "write smaller row groups, or use data.source=hf, which keeps an indexed copy",
                root,
                table.largest_group >> 20,
            )
        return Images(_Cells(table), range(len(table)), table.labels(), table.columns.classes)

    def open_files(self, files: Sequence[Path], folder: Path | None, options: Options) -> ImageRows:
        table = _Table(files, options)
        identity = {**files_identity(files, common_folder(files)), "rows": len(table), **table.columns.identity()}
        return ImageRows(table.rows, len(table), identity, table.columns.described(), classes=table.columns.classes)
