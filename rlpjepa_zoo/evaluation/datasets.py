"""Labelled data to evaluate on: named sets, folders, parquet files, or the data section of a recipe, as a training and a test part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import load as recipe_text
from ..config.plan import data_section
from ..config.pretrain import Recipe
from ..config.sections import Data
from ..data.images import Images
from ..data.sources import open_source
from ..errors import DataError, UsageError, did_you_mean
from . import probes

__all__ = ["SETS", "EvalSet", "open_set", "section"]

SETS: dict[str, dict[str, str]] = {
    "digits": {"source": "digits"},
    "cifar10": {"source": "hf", "name": "uoft-cs/cifar10", "eval_split": "test"},
    "cifar100": {"source": "hf", "name": "uoft-cs/cifar100", "eval_split": "test", "label_column": "fine_label"},
    "dtd": {"source": "torchvision", "name": "DTD", "split": "train", "eval_split": "test"},
    "flowers102": {"source": "torchvision", "name": "Flowers102", "split": "train", "eval_split": "test"},
    "food101": {"source": "torchvision", "name": "Food101", "split": "train", "eval_split": "test"},
    "pets": {"source": "torchvision", "name": "OxfordIIITPet", "split": "trainval", "eval_split": "test"},
}
"""Named sets as data sections: CIFAR from the Hugging Face Hub (or a local copy, data.path=DIR), the others as torchvision defines them."""


class EvalSet(NamedTuple):
    """What `rlpjepa_zoo.evaluation.evaluate` takes, the name of the set for a card, and how the split was made where that is worth saying."""

    train: Images
    test: Images
    name: str
    note: str


def section(data: str, overrides: Sequence[str] = ()) -> Data:
    """The data section that a name, a folder or a recipe stands for.

    Args:
        data: one of `SETS`; a folder (images, one folder for each class; or parquet files, or a data set saved by `datasets`); or a recipe's name or file.
        overrides: ``"data.key=value"``, or any key of a recipe; none for a folder.

    Raises:
        UsageError: neither, with the nearest name, or overrides of a folder.

    Example:
        >>> section("cifar100").label_column, section("cifar10", ["data.path=copy"]).path
        ('fine_label', 'copy')
    """
    if data in SETS:
        return data_section(SETS[data], overrides)
    if Path(data).is_dir():
        if overrides:
            raise UsageError(f"'{overrides[0]}': overrides belong to a named set or a recipe, and --data {data} is a folder")
        saved = any((Path(data) / name).is_file() for name in ("dataset_dict.json", "state.json"))
        if saved or any(Path(data).rglob("*.parquet")):
            return Data(source="hf", path=data, eval_split="test")
        return Data(source="folder", path=data)
    known = [*SETS, *recipe_text.list_recipes()]
    if not Path(data).is_file() and data not in known:
        hint = did_you_mean(data, known) or f" Known sets: {', '.join(SETS)}."
        raise UsageError(f"--data {data}: neither a named set, a folder, a recipe nor a file.{hint}")
    return Recipe.load(data, overrides).data


def open_set(data: str, overrides: Sequence[str] = ()) -> EvalSet:
    """Open labelled data with its training and test part; arguments as of `section`.

    A folder with a folder for each class but no val/ or test/ is split: a random fifth of each class is for testing, always the same.

    Raises:
        DataError: not there, or without a test part.

    Example:
        >>> digits = open_set("digits")
        >>> len(digits.train), len(digits.test), digits.name
        (1437, 360, 'digits')
    """
    asked = section(data, overrides)
    if asked.streaming:
        raise UsageError(f"--data {data}: evaluation needs all images at once; set data.streaming=false and data.length=null")
    opened = open_source(asked)
    name = asked.name or asked.label()
    if opened.eval is not None:
        return EvalSet(opened.images, opened.eval, name, "")
    labels = opened.images.labels
    if asked.source != "folder" or labels is None:
        raise DataError(
            f"--data {data}: no test images with labels; expected a folder for each class, in train/ and val/ or test/, or a set with data.eval_split"
        )
    test = probes.held_out(labels, 0.2, purpose="test-split")
    if not test.any():
        raise DataError(f"--data {data}: no class has two images, so none can be held out for testing")
    note = f"no test part in the folder, so a stratified random fifth ({test.sum()} of {len(test)} images) was held out for testing"
    return EvalSet(opened.images.take(np.flatnonzero(~test)), opened.images.take(np.flatnonzero(test)), name, note)
