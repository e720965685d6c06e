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
from ..data.files.listing import no_such
from ..data.images import Images
from ..data.sources import folder_contents, open_source
from ..errors import DataError, UsageError, did_you_mean
from .probes.base import held_out

__all__ = ["SETS", "EvalSet", "data_section_of", "open_set"]

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
        UsageError: `data` is none of these (the message has the nearest name).

    Example:
        >>> data_section_of("cifar100").name, data_section_of("cifar10", ["data.path=copy"]).path
        ('uoft-cs/cifar100', 'copy')
    """
    if data in SETS:
        return data_section(SETS[data], overrides)
    if Path(data).is_dir():
        kind, _ = folder_contents(Path(data))
        if kind == "folder":
            return data_section({"source": kind, "path": data}, overrides)
        kind = "hf" if kind == "parquet" else kind  # hf reads rows of parquet files in any order
        return data_section({"source": kind, "path": data, "eval_split": "test"}, overrides)
    known = [*SETS, *list_recipes()]
    if not Path(data).is_file() and data not in known:
        if os.sep in data or data.startswith((".", "~")):
            raise DataError(f"--data {no_such(Path(data))}")
        hint = did_you_mean(data, known) or f" Known sets: {', '.join(SETS)}."
        raise UsageError(f"--data {data}: neither a named set, a folder, a recipe nor a file.{hint}")
    return Recipe.load(data, overrides).data


def open_set(data: str, overrides: Sequence[str] = ()) -> EvalSet:
    """Open labelled data as training and test images.

    A folder with one folder for each class but no val/ or test/ is split: a random fifth of each class, always the same, is for testing.

    Args:
        data, overrides: as of `data_section_of`.

    Raises:
        DataError: the data do not exist or have no test images.
        UsageError: see `data_section_of`; or the data are streamed.

    Example:
        >>> digits = open_set("digits")
        >>> len(digits.train), len(digits.test), digits.name
        (1437, 360, 'digits')
    """
    section = data_section_of(data, overrides)
    if section.streaming:
        raise UsageError(f"--data {data}: evaluation needs all images at once; set data.streaming=false and data.length=null")
    source = open_source(section)
    name = section.name or section.label()
    if source.eval is not None:
        return EvalSet(source.images, source.eval, name, "")
    labels = source.images.labels
    if section.source != "folder" or labels is None:
        raise DataError(
            f"--data {data}: no test images with labels; expected a folder for each class, in train/ and val/ or test/, or a set with data.eval_split"
        )
    test = held_out(labels, 0.2, purpose="test-split")
    if not test.any():
        raise DataError(f"--data {data}: no class has two images, so none can be held out for testing")
    note = f"no test part in the folder, so a stratified random fifth ({test.sum()} of {len(test)} images) was held out for testing"
    return EvalSet(source.images.take(np.flatnonzero(~test)), source.images.take(np.flatnonzero(test)), name, note)
