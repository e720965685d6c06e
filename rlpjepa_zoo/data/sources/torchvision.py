"""Data sets of torchvision by class name (`data.source: torchvision`)."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from ...config.sections import Data
from ...errors import DataError, first_line
from ..images import Images
from .base import SOURCES, ImageSource
from .classes import match_classes, number_classes


@SOURCES.register("torchvision")
class Torchvision(ImageSource):
    """A class of torchvision.datasets with a `train` switch or a `split` argument."""

    def open(self, data: Data) -> tuple[Images, Images | None]:
        import torchvision

        kind = getattr(torchvision.datasets, data.name or "", None)
        if not (inspect.isclass(kind) and issubclass(kind, torchvision.datasets.VisionDataset)):
            raise DataError(f"data.name: '{data.name}' is not a data set of torchvision; expected a class name such as CIFAR10")
        has_train_switch = "train" in inspect.signature(kind).parameters
        if has_train_switch and (data.split != "train" or data.eval_split is not None):
            raise DataError(
                f"data.split: torchvision's {data.name} has a training and a test part only; leave data.split and data.eval_split out"
            )
        train = _open_part(kind, data, data.split, train=True)
        evaluation = _open_part(kind, data, data.eval_split, train=False) if has_train_switch or data.eval_split else None
        return train, match_classes(evaluation, train, f"torchvision {data.name}, evaluation part")


def _open_part(kind: Any, data: Data, split: str | None, train: bool) -> Images:
    parameters = inspect.signature(kind).parameters
    options: dict[str, Any] = {"root": data.path or "data"}
    if "train" in parameters:
        options["train"] = train
    elif "split" in parameters and split is not None:
        options["split"] = split
    if "download" in parameters:
        options["download"] = data.download
    try:
        dataset: Any = kind(**options)
    except Exception as error:
        raise DataError(f"data: torchvision {data.name} in '{options['root']}': {first_line(error)}") from error
    labels = next((getattr(dataset, n) for n in ("targets", "labels", "_labels") if hasattr(dataset, n)), None)
    names = getattr(dataset, "classes", None)
    numbers, classes = (None, names) if labels is None else number_classes(labels, names, f"labels of torchvision {data.name}")
    return Images(partial(_image, dataset), range(len(dataset)), numbers, classes)


def _image(dataset: Any, i: int) -> Any:
    return dataset[i][0]
