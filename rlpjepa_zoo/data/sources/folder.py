"""Image files: a folder of them (`data.source: folder`), or a list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...config.sections import Data
from ...errors import DataError
from ..files.listing import data_path, files_identity, list_images
from ..images import Images
from .base import SOURCES, ImageSource, Options
from .classes import warn_of_unknown_classes

HELD_OUT = ("val", "valid", "validation", "test")
"""Sub-folders that hold evaluation images; the first that exists is used."""


def labelled_folder(
    root: Path, classes: Sequence[str] | None = None, files: Sequence[Path] | None = None, identity: dict[str, Any] | None = None
) -> Images:
    """All images below a folder; ids are paths below it. If every image lies in a sub-folder and there are several, they are the classes,
    unless they are the numbered shards of img2dataset.

    Args:
        root: the folder.
        classes: class names of the training set, which give the numbers; images in other sub-folders get label -1, and a warning names these.
        files: its images, where they are listed already.
        identity: identity of the images, see `rlpjepa_zoo.data.images.ImageRows`.
    """
    files = list_images(root) if files is None else files
    ids = [file.relative_to(root).as_posix() for file in files]
    tops = [id.partition("/")[0] for id in ids]
    names = list(classes) if classes is not None else sorted(set(tops)) if all("/" in id for id in ids) else []
    read = partial(_file_below, root, ids)
    if len(names) < 2 or all((root / f"{name}_stats.json").is_file() for name in names):
        return Images(read, ids, identity=identity)
    number = {name: k for k, name in enumerate(names)}
    warn_of_unknown_classes(str(root), set(tops) - number.keys(), names)
    return Images(read, ids, [number.get(top, -1) for top in tops], names, identity)


def _file_below(root: Path, ids: Sequence[str], i: int) -> Path:
    return root / ids[i]


def _listed_file(names: Sequence[str], i: int) -> Path:
    """File i of a list, which may be missing if the user asked to leave such images out.

    Raises:
        DataError: there is no such file.
    """
    path = Path(names[i])
    if not os.path.isfile(path):
        raise DataError("a folder or no regular file; expected an image file" if os.path.exists(path) else "no such file")
    return path


@SOURCES.register("folder")
class Folder(ImageSource):
    """A folder of images, with train/ and val/ inside or all for training."""

    def open(self, data: Data) -> tuple[Images, Images | None]:
        root = data_path(data, "images")
        names = [data.eval_split] if data.eval_split else HELD_OUT
        held_out = next((root / name for name in names if (root / name).is_dir()), None)
        if data.eval_split and held_out is None:
            raise DataError(f"data.eval_split: no folder {root / data.eval_split}")
        split = (root / data.split).is_dir()
        if held_out is not None and not split:
            raise DataError(
                f"data.path: {held_out} holds evaluation images but there is no {root / data.split}; move the training images there"
            )
        train = labelled_folder(root / data.split if split else root)
        return train, None if held_out is None else labelled_folder(held_out, train.classes)

    def open_files(self, files: Sequence[Path], folder: Path | None, options: Options) -> Images:
        """Images of a folder, with their sub-folders as classes; else of the files, whose ids are their paths as given."""
        options.refuse_columns("image files")
        if folder is not None:
            name = os.fsencode(folder.resolve().name).decode("utf-8", "backslashreplace")  # JSON holds no other bytes
            return labelled_folder(folder, files=files, identity={"folder": name, **files_identity(files, folder)})
        names = [str(file) for file in files]
        return Images(partial(_listed_file, names), names, identity=files_identity(files))
