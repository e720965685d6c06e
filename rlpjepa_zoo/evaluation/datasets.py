"""Labelled data to evaluate on, as training and test images: named sets, folders, parquet files, or the data section of a recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config.load import list_recipes
from ..config.plan import data_section
from ..config.pretrain import Recipe
from ..config.sections import Data
from ..core.files import parse_json
from ..core.source import expanded
from ..data.files.listing import is_of_split
from ..data.images import Images
from ..data.sources import Source, folder_contents, open_source
from ..data.sources.folder import HELD_OUT
from ..errors import DataError, UsageError, did_you_mean, no_such
from .probes.base import held_out

__all__ = ["SETS", "EvalSet", "data_section_of", "open_set", "open_test_images"]

SETS: dict[str, dict[str, str]] = {
    "digits": {"source": "digits"},
    "cifar10": {"source": "hf", "name": "uoft-cs/cifar10", "eval_split": "test"},
    "cifar100": {"source": "hf", "name": "uoft-cs/cifar100", "eval_split": "test"},
    "dtd": {"source": "torchvision", "name": "DTD", "split": "train", "eval_split": "test"},
    "flowers102": {"source": "torchvision", "name": "Flowers102", "split": "train", "eval_split": "test"},
    "food101": {"source": "torchvision", "name": "Food101", "split": "train", "eval_split": "test"},
    "pets": {"source": "torchvision", "name": "OxfordIIITPet", "split": "trainval", "eval_split": "test"},
}
"""Named sets as data sections: CIFAR from the Hugging Face Hub (or a local copy, data.path=DIR), the others from torchvision."""


TEST_SPLITS = HELD_OUT[::-1]
"""Names of the split of test images in a folder of parquet files, tar files or of a saved data set; the first that exists is used. Test comes
first here, and validation in a folder of images, whose held-out images training measures."""


class EvalSet(NamedTuple):
    """Labelled images for `rlpjepa_zoo.evaluate`."""

    train: Images
    test: Images
    name: str
    """Name of the data set, for a card."""
    note: str
    """How the split was made, if the data set has none of its own; else empty."""


def data_section_of(data: str, overrides: Sequence[str] = ()) -> Data:
    """The data section that describes a named set, a folder or the data of a recipe.

    Args:
        data: one of `SETS`; a folder (images, one folder for each class; or parquet files, or a data set saved by `datasets`); or a recipe's name or file.
        overrides: ``"data.key=value"``, or any key of a recipe.

    Raises:
        DataError: `data` is written as a path, which does not exist.
        UsageError: `data` is none of these; the message has the nearest name.

    Example:
        >>> data_section_of("cifar100").name, data_section_of("cifar10", ["data.path=copy"]).path
        ('uoft-cs/cifar100', 'copy')
    """
    if data in SETS:
        return data_section(SETS[data], overrides)
    path = expanded(data)
    if os.path.isdir(path):
        kind, files = folder_contents(path)
        values = {"source": kind, "path": data}
        if kind != "folder":  # its own rule finds the evaluation images of a folder of images
            values = {"source": "hf" if kind == "parquet" else kind, "path": data}  # hf reads rows of parquet files in any order
            if (split := _test_split(files)) is not None:
                values["eval_split"] = split
        return data_section(values, overrides)
    known = [*SETS, *list_recipes()]
    if not os.path.isfile(path) and data not in known:
        if os.sep in data or data.startswith((".", "~")):
            raise DataError(f"--data {no_such(path)}")
        hint = did_you_mean(data, known) or f" Known sets: {', '.join(SETS)}."
        raise UsageError(f"--data {data}: neither a named set, a folder, a recipe nor a file.{hint}")
    return Recipe.load(path if os.path.isfile(path) else data, overrides).data


def _test_split(files: Sequence[Path]) -> str | None:
    """Split of the test images among parquet or tar files, or in a data set saved by `datasets`; None if it has only one part."""
    saved = files[0] / "dataset_dict.json"
    if files[0].is_dir():
        names = parse_json(saved.read_bytes(), str(saved)).get("splits", []) if saved.is_file() else []
        return next((split for split in TEST_SPLITS if split in names), None)
    return next((split for split in TEST_SPLITS if len(files) > 1 and any(is_of_split(file, split) for file in files)), None)


def open_set(data: str, overrides: Sequence[str] = ()) -> EvalSet:
    """Open labelled data as training and test images.

    Data without test images (a folder with one folder for each class but no val/ or test/, parquet files of one split) are split: a random
    fifth of each class, always the same, is for testing.

    Args:
        data, overrides: as of `data_section_of`.

    Raises:
        DataError: the data do not exist, have no labels or no class of two images.
        UsageError: see `data_section_of`; or the data are streamed.

    Example:
        >>> digits = open_set("digits")
        >>> len(digits.train), len(digits.test), digits.name
        (1437, 360, 'digits')
    """
    source, name = _open(data, overrides)
    if source.eval is not None:
        return EvalSet(source.images, source.eval, name, "")
    labels = source.images.labels
    if labels is None or not (labels >= 0).any():
        raise DataError(f"--data {data}: no labels; expected a folder for each class, or a column of class labels (data.label_column)")
    known = np.flatnonzero(labels >= 0)
    test = np.zeros(len(labels), bool)
    test[known] = held_out(labels[known], 0.2, purpose="test-split")
    if not test.any():
        raise DataError(f"--data {data}: no class has two images, so none can be held out for testing")
    note = f"no test part in the data, so a stratified random fifth ({test.sum()} of {len(test)} images) was held out for testing"
    return EvalSet(source.images.take(np.flatnonzero(~test)), source.images.take(np.flatnonzero(test)), name, note)


def open_test_images(data: str, overrides: Sequence[str] = ()) -> EvalSet:
    """Open labelled data to test a classifier on, which needs no training images: the test part, or all images of data without one.

    Args and errors as of `open_set`; the training images of the result are those of the data.

    Example:
        >>> len(open_test_images("digits").test)
        360
    """
    source, name = _open(data, overrides)
    if source.eval is not None:
        return EvalSet(source.images, source.eval, name, f"test images of {name}")
    note = (
        f"all {len(source.images)} images of {name}, which has no test part; the accuracy is too high if the classifier was trained on them"
    )
    return EvalSet(source.images, source.images, name, note)


def _open(data: str, overrides: Sequence[str]) -> tuple[Source, str]:
    """The images of a data set, and its name."""
    section = data_section_of(data, overrides)
    if section.streaming:
        raise UsageError(f"--data {data}: evaluation needs all images at once; set data.streaming=false and data.length=null")
    return open_source(section), section.name or section.label()
