"""Evaluation preprocessing: from an RGB image to the input of a backbone, one by one or through a loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import images, streams
from .errors import DataError

__all__ = ["Preprocess", "Preprocessed", "preprocessed"]


@dataclass(frozen=True)
class Preprocess:
    """From an RGB image to the input of the backbone: resize, centre crop, scale to [0, 1], normalise; timm's evaluation transform.

    Args:
        size: (height, width) of the input.
        mean, std: of each channel, on the 0..1 scale.
        interpolation: ``bilinear`` or ``bicubic``.
        crop_pct: the image is first resized so that the crop covers this share of its short side.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def data_config(self) -> dict[str, Any]:
        """As timm names it."""
        return {
            "input_size": (len(self.mean), *self.size), "mean": self.mean, "std": self.std,
            "interpolation": self.interpolation, "crop_pct": self.crop_pct, "crop_mode": "center",
        }  # fmt: skip

    def transform(self) -> Any:
        """A callable: PIL image -> float32 tensor (3, H, W)."""
        return timm.data.create_transform(**self.data_config(), is_training=False)

    def __post_init__(self) -> None:
        lists = (self.size, self.mean, self.std)
        numbers = [x for values in lists for x in values] + [self.crop_pct] if all(isinstance(x, tuple) for x in lists) else [""]
        if not all(type(x) in (int, float) for x in numbers):
            raise ValueError("expected size, mean and std as lists of numbers and crop_pct as a number")
        if [len(x) for x in lists] != [2, 3, 3] or not all(isinstance(s, int) and 1 <= s <= 4096 for s in self.size):
            raise ValueError("expected size as two integers in 1 .. 4096, mean and std of three channels")
        if not all(s >= 1e-6 for s in self.std) or not all(abs(m) <= 1e6 for m in self.mean) or not 0.1 <= self.crop_pct <= 2:
            raise ValueError("expected std >= 1e-6, mean in -1e6 .. 1e6 and crop_pct in 0.1 .. 2")
        if self.interpolation not in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"):
            raise ValueError(f"unknown interpolation {self.interpolation!r}; expected bilinear or bicubic")

    @classmethod
    def of(cls, backbone: nn.Module, img_size: Any = None) -> Preprocess:
        """What timm says the backbone wants, at the asked image size where one was asked for."""
        found = timm.data.resolve_model_data_config(backbone)
        if img_size is not None:
            found["input_size"] = (found["input_size"][0], *((img_size, img_size) if isinstance(img_size, int) else img_size))
        return cls(
            tuple(found["input_size"][1:]), tuple(found["mean"]), tuple(found["std"]), found["interpolation"], float(found["crop_pct"])
        )


class Preprocessed(Dataset[tuple[int, Tensor | None, str | None]]):
    """Items (row number, input or None, reason why it could not be read)."""

    def __init__(self, source: images.Images, transform: Any) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[int, Tensor | None, str | None]:
        try:
            return i, self.transform(self.source.read(i)), None
        except DataError as error:
            return i, None, str(error)


def preprocessed(source: images.Images, transform: Any, batch_size: int, num_workers: int) -> DataLoader[Any]:
    """Lists of items of `Preprocessed`, in order."""
    quiet = streams.generator(0, "loader")  # else every pass draws a seed from the global generator
    return DataLoader(
        Preprocessed(source, transform), batch_size=batch_size, num_workers=num_workers, collate_fn=list, generator=quiet,
        worker_init_fn=images.deaf_worker if num_workers else None,
    )  # fmt: skip
