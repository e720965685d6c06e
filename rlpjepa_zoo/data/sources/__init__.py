"""Open images: `open_source` for the data section of a recipe, `open_images` for anything that can be embedded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ...config.sections import Data
from ...core.rng import generator
from ...core.source import is_repository
from ...errors import DataError
from ..images import ImageRows, Images
from .base import SOURCES, Options, files_below
from .folder import list_images
from .huggingface import is_saved_dataset

log = logging.getLogger("rlpjepa_zoo")


class Source(NamedTuple):
    """Images of a recipe: for training, and for evaluation where there are any."""

    train: ImageRows
    """`Images`, or the rows of a stream."""
    eval: Images | None
    length: int
    """Images in an epoch."""
    classes: int
    """Number of classes, 0 without labels."""

    @property
    def images(self) -> Images:
        """The training images with random access.

        Raises:
            DataError: they are a stream.
        """
        if not isinstance(self.train, Images):
            raise DataError("data.streaming: images of a stream can only be read in order; set data.streaming=false and data.length=null")
        return self.train


def open_source(data: Data, seed: int = 0) -> Source:
    """Open the images of a recipe's data section.

    Args:
        data: the section.
        seed: seed of the run, which chooses the images if `data.limit` is set.

    Raises:
        DataError: not there, empty, or without the asked columns or splits.
        HubError: the Hub refused or cannot be reached.

    Example:
        >>> source = open_source(Data(source="digits"))
        >>> source.length, len(source.eval), source.classes
        (1437, 360, 10)
    """
    train, evaluation = SOURCES[data.source]().open(data)
    classes = _count_classes(train, evaluation)
    length = data.length or train.length or 0
    if data.limit is not None and data.limit < length and isinstance(train, Images):
        rows = torch.randperm(length, generator=generator(seed, "limit"))[: data.limit].sort().values
        train, length = train.take(rows.numpy()), data.limit
    return Source(train, evaluation, length, classes)


def _count_classes(train: ImageRows, evaluation: Images | None) -> int:
    names = len(train.classes or ())
    if not isinstance(train, Images):
        return names
    labels = [part.labels.max(initial=-1) + 1 for part in (train, evaluation) if part is not None and part.labels is not None]
    return max(names, int(max(labels, default=0))) if train.labels is not None else 0


def fingerprint(source: Source, verify: str = "sample") -> str:
    """A hash that differs for other training images: of their number, their ids and the pixels of 32 of them, or of all; for a stream, of its
    columns and number of shards. Checkpoints hold it.

    Args:
        verify: `data.verify`.
    """
    digest = hashlib.sha256(str(source.length).encode())
    if not isinstance(source.train, Images):
        digest.update(f"{source.train.stream.num_shards} {source.train.stream.features}".encode())
        return digest.hexdigest()
    digest.update(b"".join(str(name).encode() + b"\0" for name in source.train.ids))
    for _, pixels in verified_pixels(source.train, verify):
        digest.update(pixels)
    return digest.hexdigest()


def verified_pixels(images: Images, verify: str = "sample") -> Iterator[tuple[int, bytes]]:
    """Row and pixels, or why they cannot be read, of the images that `data.verify` reads: 32 of them, or all."""
    count = min(len(images), 32) if verify == "sample" else len(images)
    for i in np.linspace(0, len(images) - 1, count).astype(int).tolist():
        try:
            yield i, images.read(i).tobytes()
        except DataError as error:
            yield i, str(error).encode()


# --- anything that can be embedded ----------------------------------------------------------------------------------------------------


def open_images(
    source: Any, *, split: str | None = None, columns: Sequence[str] = (), id_column: str | None = None, image_column: str | None = None,
    revision: str | None = None,
) -> ImageRows:  # fmt: skip
    """Images of a folder (or several), files, a list of files (.txt), parquet or tar files, a Hugging Face data set (also saved, or by its id on
    the Hub, which is streamed), PIL images, or `ImageRows` (returned as they are).

    Ids are paths (below a single folder, else as given), keys of a tar file, or row numbers.

    Args:
        source: the images. A path that exists is taken as a path; another ``owner/name`` is looked up on the Hub.
        split: split of a data set on the Hub or of a saved one; train if None.
        columns: columns of parquet files and data sets that are passed along beside the class label; for tar files, suffixes of text members.
        id_column: its values are the ids, instead of row numbers.
        image_column: column of the images; the first that holds images if None.
        revision: revision of a data set on the Hub; its commit is looked up once and used for all reads.

    Raises:
        DataError: nothing there, or not images.
        UsageError: options that have no meaning for this source.
        HubError: the Hub refused or cannot be reached.

    Example:
        >>> images = open_images([Image.new("L", (8, 8)), Image.new("RGB", (4, 4))])
        >>> [row.read().mode for row in images.rows()], images.length
        (['RGB', 'RGB'], 2)
    """
    options = Options(tuple(columns), id_column, image_column, split=split, revision=revision)
    if isinstance(source, ImageRows):
        options.refuse_columns("images in memory")
        return source
    if isinstance(source, str | Path):
        return _open_paths([Path(source).expanduser()], str(source), options)
    if isinstance(source, Image.Image):
        source = [source]
    opened = _open_object(source, options)
    if opened is not None:
        return opened
    if isinstance(source, dict):
        raise DataError(f"expected one data set, got a {type(source).__name__} with the splits {', '.join(map(str, source))}; choose one")
    if not hasattr(source, "__iter__"):
        raise DataError(f"expected a folder, files, PIL images, a float tensor (B, 3, H, W) or a dataset, got {type(source).__name__}")
    items = list(source)
    if all(isinstance(item, str | Path) for item in items):
        return _open_paths([Path(item).expanduser() for item in items], str(items[0]) if items else "an empty list", options)
    if not all(isinstance(item, Image.Image) for item in items):
        raise DataError(f"expected only paths or only PIL images, got {sorted({type(item).__name__ for item in items})}")
    options.refuse_columns("images in memory")
    return Images(items.__getitem__, range(len(items)))


def _open_object(source: Any, options: Options) -> ImageRows | None:
    """Images from the first kind of source that knows the object or name."""
    return next((opened for kind in SOURCES.values() if (opened := kind().open_object(source, options)) is not None), None)


def _open_paths(paths: list[Path], name: str, options: Options) -> ImageRows:
    """Images of files and folders; `name` is the first path as it was given."""
    if len(paths) == 1 and not paths[0].exists() and is_repository(name) and (opened := _open_object(name, options)) is not None:
        return opened
    saved = len(paths) == 1 and options.split is not None and is_saved_dataset(paths[0])
    (options._replace(split=None) if saved else options).refuse_split(name)
    if missing := [str(path) for path in paths if not path.exists()]:
        raise DataError(f"{missing[0]}: no such file or folder" + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""))
    if len(paths) == 1 and paths[0].suffix == ".txt":
        options.refuse_columns("lists of files")
        return SOURCES["folder"]().open_files(_listed_files(paths[0]), None, options)
    groups = [folder_contents(path) if path.is_dir() else (_file_kind(path), [path]) for path in paths]
    kinds = {kind for kind, _ in groups}
    if len(kinds) > 1:
        raise DataError(f"{name}: parquet files, tar files and images are not embedded together; name those of one kind")
    folder = paths[0] if len(paths) == 1 and paths[0].is_dir() else None
    kind = kinds.pop() if kinds else "folder"
    return SOURCES[kind]().open_files([file for _, files in groups for file in files], folder, options)


def folder_contents(folder: Path) -> tuple[str, list[Path]]:
    """What a folder holds: the kind of its images, as a value of `data.source`, and its files of that kind.

    Images come first, with a warning if there are parquet or tar files beside them; then a data set of `save_to_disk` (`hf`, whose only file
    is the folder); then parquet files; then tar files.

    Raises:
        DataError: none of these.
    """
    others = {name: files_below(folder, kind.suffixes) for name, kind in SOURCES.items() if kind.suffixes and name != "folder"}
    try:
        images = list_images(folder)
    except DataError:
        if is_saved_dataset(folder):
            return "hf", [folder]
        kind = next((name for name, files in others.items() if files), None)
        if kind is None:
            raise
        return kind, others[kind]
    if count := sum(map(len, others.values())):
        message = "%s: %d images are taken; %d parquet or tar files beside them are not: name those to embed them"
        log.warning(message, folder, len(images), count)
    return "folder", images


def _file_kind(file: Path) -> str:
    """Kind of a single file by its suffix; every other file is taken for an image."""
    return next((name for name, kind in SOURCES.items() if kind.suffixes and file.name.lower().endswith(kind.suffixes)), "folder")


def _listed_files(path: Path) -> list[Path]:
    try:
        files = [Path(line) for line in path.read_text("utf-8", "surrogateescape").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not files:
        raise DataError(f"{path}: lists no files; expected one path in each line")
    return files
