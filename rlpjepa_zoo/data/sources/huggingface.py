"""Hugging Face data sets (`data.source: hf`): `Dataset` objects, ids on the Hub, folders of `save_to_disk`, local copies; also streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...config.sections import Data
from ...errors import DataError, HubError, UsageError, first_line
from ...hub.download import dataset_commit
from ...hub.retry import trouble
from ..files.listing import data_path, files_below, files_of_split
from ..images import ImageRows, Images, Row
from .base import SOURCES, Columns, ImageSource, Options, image_column, image_of_cell, label_column, match_classes


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the datasets library."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def encoded_images(dataset: Any, column: str) -> Any:
    """The data set with images as {bytes, path}, so that one damaged image does not fail its whole batch."""
    import datasets

    return dataset.cast_column(column, datasets.Image(decode=False)) if type(dataset.features[column]).__name__ == "Image" else dataset


class _Cells:
    """Reads cell i of the image column of a `Dataset`."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __call__(self, i: int) -> Any:
        return image_of_cell(self.dataset[i][self.column])


def indexed_images(dataset: Any, image: str | None = None, label: str | None = None) -> Images:
    """Images of a `Dataset` with random access; ids are row numbers.

    Args:
        dataset: a map-style Hugging Face data set.
        image, label: columns; found by type if None.
    """
    column, label = image_column(dataset.features, image), label_column(dataset.features, label)
    cells = _Cells(encoded_images(dataset.select_columns([column]), column), column)
    labels = None if label is None else [-1 if value is None else value for value in dataset[label][:]]
    return Images(cells, range(len(dataset)), labels, getattr(dataset.features[label], "names", None) if label else None)


def image_rows(dataset: Any, options: Options, identity: dict[str, Any] | None = None, expected: int | None = None) -> ImageRows:
    """Images of a `Dataset` or `IterableDataset`, read one after another with their columns.

    Args:
        dataset: map-style or streamed.
        options: columns.
        identity: what names the data set; its fingerprint if None.
        expected: number of rows according to its card.

    Raises:
        DataError: a stream without known columns, or no such column.
    """
    if dataset.features is None:
        raise DataError("the stream does not tell its columns; give parquet files, or a data set that is not streamed")
    columns = Columns(dataset.features, options)
    encoded = encoded_images(dataset.select_columns(columns.all).with_format(None), columns.image)
    length = len(dataset) if hasattr(dataset, "__len__") else None

    def rows(start: int) -> Iterator[Row]:
        if length is not None:
            records: Iterable[dict[str, Any]] = (encoded[i] for i in range(start, len(encoded)))
        else:
            records = encoded.skip(start) if start else encoded
        try:
            for position, record in enumerate(records, start):
                yield columns.row(record, position)
        except DataError:
            raise
        except Exception as error:  # a file cut short, the network, ...
            raise trouble(error, "data") or DataError(f"data: {first_line(error)}") from error

    identity = identity or {"dataset": getattr(dataset, "_fingerprint", None) or str(dataset.features)}
    return ImageRows(
        rows, length, {**identity, "rows": length, **columns.identity()}, columns.described(), classes=columns.classes,
        seekable=length is not None, expected=expected, stream=dataset if length is None else None,
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of the datasets library."""
    import datasets

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


@SOURCES.register("hf")
class HuggingFace(ImageSource):
    """A data set on the Hub, or a local copy: parquet files, a folder of `save_to_disk`, an image folder."""

    def open(self, data: Data) -> tuple[ImageRows, Images | None]:
        import datasets

        name = data.path or data.name
        try:
            with _quiet():
                train = _load_split(data, data.split, data.streaming)
                held_out = None if data.eval_split is None else _load_split(data, data.eval_split, False)
        except DataError:
            raise
        except Exception as error:
            if isinstance(error, datasets.exceptions.DatasetNotFoundError):  # its message does not name the cause
                fix = "check data.name, or run `hf auth login` with an account that may see it"
                raise HubError(f"data: {name}: not found, private or gated; {fix}") from error
            raise trouble(error, f"data: {name}") or DataError(f"data: '{name}': {first_line(error)}") from error
        evaluation = None if held_out is None else indexed_images(held_out, data.image_column, data.label_column)
        opened: ImageRows
        if data.streaming:
            if train.features is None:
                raise DataError(f"data: the stream '{name}' does not tell its columns; download it, or give parquet files")
            opened = image_rows(train, Options(image=data.image_column, label=data.label_column))
        else:
            opened = indexed_images(train, data.image_column, data.label_column)
        return opened, match_classes(evaluation, opened.classes, f"{name}, data.eval_split={data.eval_split}")

    def open_files(self, files: Sequence[Path], folder: Path | None, options: Options) -> ImageRows:
        """Images of a folder of `save_to_disk`."""
        import datasets

        path = files[0]
        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:
            raise DataError(f"{path}: cannot be read as a saved data set ({first_line(error)})") from error
        if isinstance(loaded, datasets.DatasetDict):
            split = options.split or "train"
            if split not in loaded:
                raise DataError(f"{path}: no split '{split}'; it has {', '.join(loaded)}")
            loaded = loaded[split]
        elif options.split is not None:
            raise UsageError(f"'{path}' was saved without splits; leave the split out")
        return image_rows(loaded, options)

    def open_object(self, source: Any, options: Options) -> ImageRows | None:
        """Images of a `Dataset` or `IterableDataset`, or of a data set id on the Hub, which is streamed at a fixed commit."""
        if isinstance(source, str):
            return _open_hub(source, options)
        if type(source).__module__.split(".")[0] == "datasets" and hasattr(source, "features"):
            return image_rows(source, options)
        return None


def _open_hub(name: str, options: Options) -> ImageRows:
    import datasets

    split = options.split or "train"
    try:
        with _quiet():
            commit = dataset_commit(name, options.revision)
            stream = datasets.load_dataset(name, split=split, revision=commit, streaming=True)
            info = (stream.info.splits or {}).get(split)
    except (DataError, HubError):
        raise
    except Exception as error:
        raise trouble(error, f"data: {name}") or DataError(f"data: '{name}': {first_line(error)}") from error
    expected = info.num_examples if info is not None and info.num_examples else None
    return image_rows(stream, options, {"dataset": name, "revision": commit, "split": split}, expected)


def _load_split(data: Data, split: str, streaming: bool) -> Any:
    import datasets

    if data.path is None:
        return datasets.load_dataset(data.name, split=split, streaming=streaming)
    root = data_path(data, "images")
    if is_saved_dataset(root):
        loaded = datasets.load_from_disk(str(root))
        if not isinstance(loaded, datasets.DatasetDict) and split == data.eval_split:
            raise DataError(f"data.eval_split: {root} has no splits, so no '{split}'; save a DatasetDict, or set data.eval_split=null")
        part = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return part.to_iterable_dataset() if streaming else part
    if files := files_below(root, (".parquet",)):
        chosen = [str(file) for file in files_of_split(files, split, data.eval_split, root, "parquet")]
        return datasets.load_dataset("parquet", data_files={split: chosen}, split=split, streaming=streaming)
    return datasets.load_dataset(str(root), split=split, streaming=streaming)
