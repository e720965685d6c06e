"""Hugging Face data sets (`data.source: hf`): `Dataset` objects, ids on the Hub, folders of `save_to_disk`, local copies; also streamed."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ...config.sections import Data
from ...errors import DataError, HubError, UsageError, first_line
from ...hub.download import dataset_commit
from ...hub.retry import trouble
from ...progress import is_redrawn
from ..files.listing import common_folder, data_path, files_below, files_of_split
from ..images import ImageRows, Images, Row
from .base import SOURCES, ImageSource, Options
from .classes import match_classes, number_classes
from .columns import Cells, Columns, image_column, label_column
from .parquet import read_schema, table_features

_PEEKED = 8
"""Rows that are read to tell the columns of a data set that does not describe them."""


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the datasets library."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def encoded_images(dataset: Any, column: str) -> Any:
    """The data set with images as {bytes, path}, so that one damaged image does not fail its whole batch."""
    import datasets

    return dataset.cast_column(column, datasets.Image(decode=False)) if type(dataset.features[column]).__name__ == "Image" else dataset


class _Reader:
    """Reads image i of a `Dataset`."""

    def __init__(self, dataset: Any, column: str, cells: Cells) -> None:
        self.dataset, self.column, self.cells = dataset, column, cells

    def __call__(self, i: int) -> Any:
        return self.cells(self.dataset[i][self.column])


def indexed_images(dataset: Any, options: Options | None = None, folder: Path | None = None, own: bool = True) -> Images:
    """Images of a `Dataset` with random access; ids are row numbers.

    Args:
        dataset: a map-style Hugging Face data set.
        options: columns.
        folder, own: whose paths are in its cells, see `rlpjepa_zoo.data.sources.columns.Cells`.
    """
    dataset, options = dataset.with_format(None), options or Options()
    image, label = image_column(dataset.features, options), label_column(dataset.features, options)
    encoded = encoded_images(dataset.select_columns([image]), image)
    reader = _Reader(encoded, image, Cells(dataset.features[image], options, folder, own))
    if label is None:
        return Images(reader, range(len(dataset)))
    names = getattr(dataset.features[label], "names", None)
    return Images(reader, range(len(dataset)), *number_classes(dataset[label][:], names, f"column '{label}'"))


class Stream(NamedTuple):
    """What training reads of a streamed data set."""

    dataset: Any
    """The `IterableDataset`, with all columns."""
    rows: Any
    """The same with the read columns only, and with encoded images."""
    image: str
    label: str | None
    """Names of the columns."""
    cells: Cells
    """Turns a cell of the image column into an image."""


def image_rows(
    dataset: Any, options: Options, identity: dict[str, Any] | None = None, expected: int | None = None, folder: Path | None = None, own: bool = True
) -> ImageRows:  # fmt: skip
    """Images of a `Dataset` or `IterableDataset`, read one after another with their columns.

    A data set with a transform gives the transformed images. A format such as torch or numpy changes nothing.

    Args:
        dataset: map-style or streamed.
        options: columns.
        identity: what names the data set; its fingerprint if None.
        expected: number of rows according to its card.
        folder, own: whose paths are in its cells, see `rlpjepa_zoo.data.sources.columns.Cells`.

    Raises:
        DataError: no such column.
    """
    length = len(dataset) if hasattr(dataset, "__len__") else None
    transformed = length is not None and dataset.format["type"] == "custom"
    plain = dataset if transformed else dataset.with_format(None)
    features = dataset.features
    if transformed or features is None:
        features = _peeked(_transformed(plain, 0, length) if length is not None else plain, features or {}, options)
    columns = Columns(features, options, stream=length is None)
    cells = Cells(None if transformed else columns.image_feature, options, folder, own)
    if not transformed:
        plain = plain.select_columns(columns.all)
        plain = plain if dataset.features is None else encoded_images(plain, columns.image)

    def rows(start: int) -> Iterator[Row]:
        if length is not None:
            records: Iterable[Any] = _transformed(plain, start, length) if transformed else (plain[i] for i in range(start, length))
        else:
            records = plain.skip(start) if start else plain
        try:
            for position, record in enumerate(records, start):
                yield Row(position, partial(_fail, record), {}) if isinstance(record, DataError) else columns.row(record, position, cells)
        except DataError:
            raise
        except Exception as error:  # a file cut short, the network, ...
            raise trouble(error, "data") or DataError(f"data: {first_line(error)}") from error

    identity = identity or {"dataset": getattr(dataset, "_fingerprint", None) or str(features)}
    return ImageRows(
        rows, length, {**identity, "rows": length, **columns.identity()}, columns.described(), classes=columns.classes,
        seekable=length is not None, expected=expected,
        stream=Stream(dataset, plain, columns.image, columns.label, cells) if length is None else None,
    )  # fmt: skip


def _fail(error: DataError) -> Any:
    raise error


def _transformed(dataset: Any, start: int, length: int) -> Iterator[dict[str, Any] | DataError]:
    """Rows of a `Dataset` with a transform, or why a row fails in it."""
    for i in range(start, length):
        try:
            yield dataset[i]
        except Exception as error:  # of the user's transform, or of the image that it receives
            yield DataError(f"row {i}: the transform of the data set failed ({first_line(error)})")


def _peeked(rows: Iterable[Any], known: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Columns of a data set that does not describe them (a stream after `map`, a transform), told by its first rows.

    Args:
        rows: the rows; some may be errors.
        known: features of columns that are described.
        options: the image column.

    Raises:
        DataError: no row can be read.
    """
    import datasets

    values, failures = dict[str, Any](), list[DataError]()
    try:
        for row in itertools.islice(rows, _PEEKED):
            if isinstance(row, DataError):
                failures.append(row)
                continue
            values |= {name: value for name, value in row.items() if values.get(name) is None}
            if all(value is not None for value in values.values()):
                break
    except Exception as error:
        raise trouble(error, "data") or DataError(f"data: the first rows cannot be read ({first_line(error)})") from error
    if not values:
        raise failures[0] if failures else DataError("data: no rows, so the columns are not known")
    return {
        name: datasets.Image() if name == options.image or _is_image(value) else known.get(name) or _feature(value)
        for name, value in values.items()
    }


def _is_image(value: Any) -> bool:
    """Whether a value is a PIL image, an encoded image, or an array of pixels."""
    return isinstance(value, Image.Image | bytes) or (isinstance(value, dict) and "bytes" in value) or getattr(value, "ndim", 0) > 1


def _feature(value: Any) -> Any:
    """Feature of a value that is no image."""
    import datasets

    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        return datasets.Dataset.from_dict({"value": [value]}).features["value"]
    except Exception:
        return datasets.Value("null")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of the datasets library, and its progress bars unless somebody watches them."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    if not is_redrawn():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


@SOURCES.register("hf")
class HuggingFace(ImageSource):
    """A data set on the Hub, or a local copy: parquet files, a folder of `save_to_disk`, an image folder."""

    def open(self, data: Data) -> tuple[ImageRows, Images | None]:
        import datasets

        name = data.path or data.name
        try:
            with _quiet():
                train, folder = _load_split(data, data.split, data.streaming)
                held_out, its_folder = (None, None) if data.eval_split is None else _load_split(data, data.eval_split, False)
        except DataError:
            raise
        except Exception as error:
            if isinstance(error, datasets.exceptions.DatasetNotFoundError):  # its message does not name the cause
                fix = "check data.name, or run `hf auth login` with an account that may see it"
                raise HubError(f"data: {name}: not found, private or gated; {fix}") from error
            raise trouble(error, f"data: {name}") or DataError(f"data: '{name}': {first_line(error)}") from error
        options = Options.of(data)
        evaluation = None if held_out is None else indexed_images(held_out, options, its_folder, _made_paths(held_out, its_folder))
        open_train = image_rows if data.streaming else indexed_images
        opened: ImageRows = open_train(train, options, folder=folder, own=_made_paths(train, folder))
        return opened, match_classes(evaluation, opened, f"{name}, data.eval_split={data.eval_split}")

    def open_files(self, files: Sequence[Path], folder: Path | None, options: Options) -> ImageRows:
        """Images of a folder of `save_to_disk`."""
        import datasets

        path = files[0]
        try:
            loaded = datasets.load_from_disk(str(path.absolute()))  # a relative path with a colon would be an address
        except Exception as error:
            raise DataError(f"{path}: cannot be read as a saved data set ({first_line(error)})") from error
        if isinstance(loaded, datasets.DatasetDict):
            split = options.split or "train"
            if split not in loaded:
                raise DataError(f"{path}: no split '{split}'; it has {', '.join(loaded)}")
            loaded = loaded[split]
        elif options.split is not None:
            raise UsageError(f"'{path}' was saved without splits; leave the split out")
        return image_rows(loaded, options, folder=path, own=False)

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
    return image_rows(stream, options, {"dataset": name, "revision": commit, "split": split}, expected, own=_made_paths(stream, None))


def _made_paths(dataset: Any, folder: Path | None) -> bool:
    """Whether the paths in a loaded data set come from the `datasets` library, which lists an image folder, and not from the files of a table."""
    return folder is None and dataset.info.builder_name == "imagefolder"


def _load_split(data: Data, split: str, streaming: bool) -> tuple[Any, Path | None]:
    """The data set of a split, and the folder of the table that its cells come from."""
    import datasets

    if data.path is None:
        return datasets.load_dataset(data.name, split=split, streaming=streaming), None
    root = data_path(data, "images").absolute()  # a relative path with a colon would be an address
    if is_saved_dataset(root):
        loaded = datasets.load_from_disk(str(root))
        if not isinstance(loaded, datasets.DatasetDict) and split == data.eval_split:
            raise DataError(f"data.eval_split: {root} has no splits, so no '{split}'; save a DatasetDict, or set data.eval_split=null")
        part = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return part.to_iterable_dataset() if streaming else part, root
    if files := files_below(root, (".parquet",)):
        chosen = files_of_split(files, split, data.eval_split, root, "parquet")
        features, unknown = table_features(read_schema(chosen[0]))
        known = {"features": datasets.Features(features), "columns": list(features)} if unknown else {}
        names = {split: [glob.escape(str(file)) for file in chosen]}  # the library takes names for patterns
        return datasets.load_dataset("parquet", data_files=names, split=split, streaming=streaming, **known), common_folder(chosen)
    return datasets.load_dataset(str(root), split=split, streaming=streaming), None
