"""Where the images of a recipe come from: embedded digits, torchvision, folders, Hugging Face data sets."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..config.sections import Data
from ..core import rng
from ..errors import DataError, HubError, first_line
from ..hub import retry
from . import images
from .images import Images

__all__ = ["Source", "fingerprint", "labelled_folder", "open_source"]

log = logging.getLogger("rlpjepa_zoo")


class Source(NamedTuple):
    """Training images (or a stream of rows) and, where there are any, evaluation images."""

    train: Images | Any
    eval: Images | None
    length: int
    """Images in an epoch."""
    classes: int
    """Number of classes, 0 without labels."""


def open_source(data: Data, seed: int = 0) -> Source:
    """Open the images of a recipe's data section.

    Raises:
        DataError: not there, empty, or without the asked columns or splits.
    """
    opener = {"digits": _open_digits, "torchvision": _open_torchvision, "folder": _open_folder, "hf": _open_hf}[data.source]
    train, evaluation, classes = opener(data, seed)
    length = data.length or len(train)
    if data.limit is not None and data.limit < length:
        rows = torch.randperm(length, generator=rng.generator(seed, "limit"))[: data.limit].sort().values
        train, length = train.take(rows.numpy()), data.limit
    return Source(train, evaluation, length, classes)


def fingerprint(source: Source) -> str:
    """Which images these are: a hash of their number and names and of the pixels of 32 of them; of a stream, of its columns and shards."""
    digest = hashlib.sha256(str(source.length).encode())
    if not isinstance(source.train, Images):
        digest.update(f"{source.train.num_shards} {source.train.features}".encode())
        return digest.hexdigest()
    digest.update(b"".join(str(name).encode() + b"\0" for name in source.train.ids))
    for i in np.linspace(0, len(source.train) - 1, min(len(source.train), 32)).astype(int):
        try:
            digest.update(source.train.read(int(i)).tobytes())
        except DataError as error:
            digest.update(str(error).encode())
    return digest.hexdigest()


def _count(train: Images, evaluation: Images | None = None) -> int:
    found = [part.labels.max(initial=-1) + 1 for part in (train, evaluation) if part is not None and part.labels is not None]
    return max(len(train.classes or ()), int(max(found, default=0))) if train.labels is not None else 0


def _open_digits(data: Data, seed: int) -> tuple[Images, Images, int]:
    """1437 training and 360 test digits of 8x8 pixels, a fixed stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(pixels)), test_size=360, stratify=bunch.target, random_state=0)
    whole = Images(partial(_pixels, pixels), [f"digit-{i:04d}" for i in range(len(pixels))], bunch.target, [str(i) for i in range(10)])
    return whole.take(train), whole.take(test), 10


def _pixels(stack: np.ndarray[Any, Any], i: int) -> Image.Image:
    return Image.fromarray(stack[i])


def _first(dataset: Any, i: int) -> Any:
    return dataset[i][0]


def _open_torchvision(data: Data, seed: int) -> tuple[Images, Images | None, int]:
    import torchvision

    kind = getattr(torchvision.datasets, data.name or "", None)
    if not (inspect.isclass(kind) and issubclass(kind, torchvision.datasets.VisionDataset)):
        raise DataError(f"data.name: '{data.name}' is not a data set of torchvision; expected a class name such as CIFAR10")
    parameters = inspect.signature(kind).parameters
    if "train" in parameters and (data.split != "train" or data.eval_split is not None):
        raise DataError(
            f"data.split: torchvision's {data.name} has a training and a test part only; leave data.split and data.eval_split out"
        )

    def one(split: str | None, training: bool) -> Images:
        options: dict[str, Any] = {"root": data.path or "data"}
        if "train" in parameters:
            options["train"] = training
        elif "split" in parameters and split is not None:
            options["split"] = split
        if "download" in parameters:
            options["download"] = data.download
        try:
            found: Any = kind(**options)
        except Exception as error:
            raise DataError(f"data: torchvision {data.name} in '{options['root']}': {first_line(error)}") from error
        labels = next((getattr(found, n) for n in ("targets", "labels", "_labels") if hasattr(found, n)), None)
        return Images(partial(_first, found), range(len(found)), labels, getattr(found, "classes", None))

    train = one(data.split, True)
    evaluation = one(data.eval_split, False) if "train" in parameters or data.eval_split else None
    return train, evaluation, _count(train, evaluation)


def _open_folder(data: Data, seed: int) -> tuple[Images, Images | None, int]:
    if data.path is None:
        raise DataError("data.path: the folder of images is not given; add data.path=DIR")
    root = Path(data.path).expanduser()
    names = [data.eval_split] if data.eval_split else ["val", "valid", "validation", "test"]
    held_out = next((root / name for name in names if (root / name).is_dir()), None)
    if data.eval_split and held_out is None:
        raise DataError(f"data.eval_split: no folder {root / data.eval_split}")
    inside = (root / data.split).is_dir()
    if held_out is not None and not inside:
        raise DataError(
            f"data.path: {held_out} holds evaluation images but there is no {root / data.split}; move the training images there"
        )
    train = labelled_folder(root / data.split if inside else root)
    evaluation = labelled_folder(held_out, train.classes) if held_out is not None else None
    return train, evaluation, _count(train)


def labelled_folder(root: Path, classes: Sequence[str] | None = None) -> Images:
    """All images below a folder; when every one lies in a sub-folder and there are several, their names are the classes.

    Args:
        root: the folder.
        classes: names to number by, those of the training set; images of other folders get label -1, and a warning names the folders.
    """
    found = images.list_images(root)
    parts = [file.relative_to(root).parts for file in found]
    names = list(classes) if classes is not None else sorted({p[0] for p in parts}) if all(len(p) > 1 for p in parts) else []
    ids = ["/".join(p) for p in parts]
    if len(names) < 2:
        return Images(found.__getitem__, ids)
    number = {name: k for k, name in enumerate(names)}
    _warn_of_strangers(str(root), {p[0] for p in parts} - number.keys(), names)
    return Images(found.__getitem__, ids, [number.get(p[0], -1) for p in parts], names)


def _warn_of_strangers(where: str, strangers: Iterable[str], classes: Sequence[str]) -> None:
    """Say which names of evaluation images are no class of the training images."""
    if names := sorted(strangers):
        shown, known = (", ".join(some[:5]) + (" ..." if len(some) > 5 else "") for some in (names, list(classes)))
        mend = "their images are not scored; name the classes of both parts alike"
        log.warning("%s: %s: no class of the training images (%s), so %s", where, shown, known, mend)


def _numbered_alike(evaluation: Images, classes: Sequence[str] | None, where: str) -> Images:
    """Evaluation images with the numbers that the training images give to the same names, -1 for other names; as they are when one of the
    two parts has no names."""
    if evaluation.labels is None or not evaluation.classes or not classes or evaluation.classes == list(classes):
        return evaluation
    number, names = {name: k for k, name in enumerate(classes)}, evaluation.classes
    _warn_of_strangers(where, {names[k] for k in np.unique(evaluation.labels) if k >= 0} - number.keys(), classes)
    found = copy.copy(evaluation)
    found.labels = np.array([number.get(names[k], -1) if k >= 0 else -1 for k in evaluation.labels], dtype=np.int64)
    found.classes = list(classes)
    return found


def _open_hf(data: Data, seed: int) -> tuple[Images | Any, Images | None, int]:
    import datasets

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        train = _hf_split(data, data.split, data.streaming)
        evaluation = None if data.eval_split is None else _hf_split(data, data.eval_split, False)
    except DataError:
        raise
    except Exception as error:
        where = data.path or data.name
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):  # says nothing of its cause
            mend = "check data.name, or run `hf auth login` with an account that may see it"
            raise HubError(f"data: {where}: not found, private or gated; {mend}") from error
        raise retry.trouble(error, f"data: {where}") or DataError(f"data: '{where}': {first_line(error)}") from error
    finally:
        datasets.logging.set_verbosity(level)
    held_out = None if evaluation is None else images.from_dataset(evaluation, data.image_column, data.label_column)
    if data.streaming:
        if train.features is None:
            raise DataError(f"data: the stream '{data.path or data.name}' does not tell its columns; download it, or give parquet files")
        label = images.label_column(train.features, data.label_column)
        names = getattr(train.features[label], "names", None) if label else None
        opened, classes = train, len(names or ())
    else:
        opened = images.from_dataset(train, data.image_column, data.label_column)
        names, classes = opened.classes, 0
    if held_out is not None:
        held_out = _numbered_alike(held_out, names, f"{data.path or data.name}, data.eval_split={data.eval_split}")
    return opened, held_out, classes if data.streaming else _count(opened, held_out)


def _hf_split(data: Data, split: str, streaming: bool) -> Any:
    import datasets

    if data.path is None:
        return datasets.load_dataset(data.name, split=split, streaming=streaming)
    root = Path(data.path).expanduser()
    if not root.exists():
        raise DataError(f"data.path: {root}: no such file or folder")
    if root.is_dir() and ((root / "dataset_dict.json").is_file() or (root / "state.json").is_file()):
        loaded = datasets.load_from_disk(str(root))
        if not isinstance(loaded, datasets.DatasetDict) and split == data.eval_split:
            raise DataError(f"data.eval_split: {root} has no splits, so no '{split}'; save a DatasetDict, or set data.eval_split=null")
        part = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return part.to_iterable_dataset() if streaming else part
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*.parquet") if not p.name.startswith("."))
    if files:
        of_split = [
            str(f) for f in files if f.name.startswith(split) or f.parent.name == split or (len(files) == 1 and split != data.eval_split)
        ]
        if not of_split:
            raise DataError(f"data.path: no parquet file of the split '{split}' in {root}; found {', '.join(f.name for f in files[:4])}")
        return datasets.load_dataset("parquet", data_files={split: of_split}, split=split, streaming=streaming)
    return datasets.load_dataset(str(root), split=split, streaming=streaming)
