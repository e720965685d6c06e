"""Open images: `open_source` for the data section of a recipe, `open_images` for anything that can be embedded."""

from __future__ import annotations

import codecs
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from ...config.sections import Data
from ...core.rng import generator
from ...core.source import expanded, is_repository
from ...errors import DataError, no_such
from ..files.listing import files_below, list_images
from ..images import ImageRows, Images
from .base import SOURCES, Options
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
        digest.update(f"{source.train.stream.dataset.num_shards} {source.train.stream.dataset.features}".encode())
        return digest.hexdigest()
    digest.update(b"".join(str(name).encode("utf-8", "surrogatepass") + b"\0" for name in source.train.ids))
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
            yield i, str(error).encode("utf-8", "surrogatepass")


# --- anything that can be embedded ----------------------------------------------------------------------------------------------------


def open_images(
    source: Any, *, split: str | None = None, columns: Sequence[str] = (), id_column: str | None = None, image_column: str | None = None,
    revision: str | None = None, allow_paths: bool = False, prefix: str = "", on_error: Literal["raise", "skip"] = "raise",
) -> ImageRows:  # fmt: skip
    """Images of a folder (or several), files, a list of files (.txt), parquet or tar files, a Hugging Face data set (also saved, or by its id on
    the Hub, which is streamed), PIL images, encoded bytes or arrays of pixels (as `decode` takes them), or `ImageRows` (returned as they are).

    Ids are paths (below a single folder, else as given), keys of a tar file, or row numbers.

    Args:
        source: the images. A path that exists is taken as a path; another ``owner/name`` is looked up on the Hub.
        split: split of a data set on the Hub or of a saved one; train if None.
        columns: columns of parquet files and data sets that are passed along beside the class label; for tar files, suffixes of text members.
        id_column: its values are the ids, instead of row numbers.
        image_column: column of the images; found by type and name if None. For tar files with several images in a sample, the suffix.
        revision: revision of a data set on the Hub; its commit is looked up once and used for all reads.
        allow_paths: open files that cells of a table name outside of the folder of the table. Those in its folder, where relative paths begin,
            are always opened, and those of a `Dataset` object as the `datasets` library does.
        prefix: what messages write before the names of these options, such as ``"--"``.
        on_error: ``skip`` makes missing image files of a list, and damaged tar files, rows that cannot be read; ``raise`` refuses them here.

    Raises:
        DataError: nothing there, or not images.
        UsageError: options that have no meaning for this source.
        HubError: the Hub refused or cannot be reached.

    Example:
        >>> images = open_images([Image.new("L", (8, 8)), Image.new("RGB", (4, 4))])
        >>> [row.read().mode for row in images.rows()], images.length
        (['RGB', 'RGB'], 2)
    """
    options = Options(
        tuple(columns),
        id_column,
        image_column,
        split=split,
        revision=revision,
        allow_paths=allow_paths,
        prefix=prefix,
        skip_bad=on_error == "skip",
    )
    if isinstance(source, ImageRows):
        options.refuse_columns("images in memory")
        return source
    if isinstance(source, str | Path):
        return _open_paths([expanded(source)], str(source), options)
    if isinstance(source, Image.Image):
        source = [source]
    opened = _open_object(source, options)
    if opened is not None:
        return opened
    if isinstance(source, dict):
        raise DataError(f"expected one data set, got a {type(source).__name__} with the splits {', '.join(map(str, source))}; choose one")
    if not hasattr(source, "__iter__"):
        raise DataError(
            f"expected a folder, files, a list of PIL images, a float tensor (B, 3, H, W) or a dataset, got {type(source).__name__}"
        )
    items = list(source)
    if all(isinstance(item, str | Path) for item in items):
        return _open_paths([expanded(item) for item in items], str(items[0]) if items else "an empty list", options)
    if other := sorted({type(item).__name__ for item in items if not _is_picture(item)}):
        raise DataError(f"expected only paths, or only PIL images, encoded bytes and integer arrays of pixels, got {', '.join(other)}")
    options.refuse_columns("images in memory")
    return Images(items.__getitem__, range(len(items)))


def _is_picture(item: Any) -> bool:
    """Whether an item of a list is one picture. An array of floats may have been preprocessed, so it is none."""
    return isinstance(item, Image.Image | bytes) or (isinstance(item, np.ndarray) and item.dtype.kind in "uib")


def _open_object(source: Any, options: Options) -> ImageRows | None:
    """Images from the first kind of source that knows the object or name."""
    return next((opened for kind in SOURCES.values() if (opened := kind().open_object(source, options)) is not None), None)


def _open_paths(paths: list[Path], name: str, options: Options) -> ImageRows:
    """Images of files and folders; `name` is the first path as it was given."""
    alone = paths[0] if len(paths) == 1 else None
    if alone and _is_remote(alone, name) and (opened := _open_object(name, options)) is not None:
        return opened
    saved = alone is not None and options.split is not None and is_saved_dataset(alone)
    (options._replace(split=None) if saved else options).refuse_split(name)
    if listed := alone is not None and alone.suffix.lower() == ".txt" and os.path.isfile(alone):
        paths = _listed_files(paths[0])
    if (bad := [path for path in paths if not _usable(path, listed)]) and (not options.skip_bad or (alone and not listed)):
        raise DataError(
            f"{bad[0]}: a folder or no regular file; expected files" if os.path.exists(bad[0]) else no_such(bad[0], len(bad) - 1)
        )
    groups = [folder_contents(path, options) if os.path.isdir(path) and not listed else (_file_kind(path), [path]) for path in paths]
    kinds = {kind for kind, _ in groups}
    if len(kinds) > 1:
        raise DataError(f"{name}: parquet files, tar files and images are not embedded together; name those of one kind")
    folder = alone if alone and os.path.isdir(alone) else None
    kind = kinds.pop() if kinds else "folder"
    return SOURCES[kind]().open_files([file for _, files in groups for file in files], folder, options)


def _is_remote(path: Path, name: str) -> bool:
    """Whether a path that does not exist can be a data set on the Hub: its first part is no folder here."""
    return not os.path.exists(path) and not os.path.isdir(path.parent) and is_repository(name)


def _usable(path: Path, listed: bool) -> bool:
    return os.path.isfile(path) or (not listed and os.path.isdir(path))


def folder_contents(folder: Path, options: Options | None = None) -> tuple[str, list[Path]]:
    """What a folder holds: the kind of its images, as a value of `data.source`, and its files of that kind.

    Images come first; then a data set of `save_to_disk` (`hf`, whose only file is the folder); then parquet files with a column of images;
    then tar files. A warning tells the number of files with images that are not taken.

    Raises:
        DataError: none of these.
    """
    files = {name: below for name, kind in SOURCES.items() if kind.suffixes and (below := files_below(folder, kind.suffixes))}
    found = {name: below for name, below in files.items() if SOURCES[name]().holds_images(below[0], options or Options())}
    try:
        found = {"folder": list_images(folder), **found}
    except DataError:
        if is_saved_dataset(folder):
            return "hf", [folder]
        found = found or files  # whose error tells what is missing in them
        if not found:
            raise
    (kind, taken), *others = found.items()
    for other, left in others:
        names = {"folder": "image", "webdataset": "tar"}
        log.warning(
            "%s: its %d %s files are taken, and %d %s files beside them are not; name those to use them",
            folder, len(taken), names.get(kind, kind), len(left), names.get(other, other),
        )  # fmt: skip
    return kind, taken


def _file_kind(file: Path) -> str:
    """Kind of a single file by its suffix, or by its first bytes where it has none; every other file is taken for an image."""
    by_suffix = next((name for name, kind in SOURCES.items() if kind.suffixes and file.name.lower().endswith(kind.suffixes)), None)
    if by_suffix or file.suffix or not os.path.isfile(file):
        return by_suffix or "folder"
    try:
        with open(file, "rb") as opened:
            start = opened.read(262)
    except OSError:
        return "folder"
    return "parquet" if start.startswith(b"PAR1") else "webdataset" if start.endswith(b"ustar") else "folder"


def _listed_files(path: Path) -> list[Path]:
    try:
        text = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    files = [expanded(line) for row in text.split("\n") if (line := row.rstrip("\r")).strip()]
    if not files:
        raise DataError(f"{path}: lists no files; expected one path in each line")
    return files
