"""Evaluation preprocessing: from an RGB image to the input of a backbone, for one image or many.

Pillow resizes and crops; it releases the interpreter lock while it works, so this is done in threads. The rest is arithmetic on batches, on
the device that encodes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import timm
import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor

from ..errors import DataError
from .decode import MAX_PIXELS

__all__ = ["Preprocess", "Ready", "batched", "ready"]

T = TypeVar("T")
_CHUNK = 32
"""Largest number of images in one task of a thread."""


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
        """The settings under timm's names."""
        return {
            "input_size": (len(self.mean), *self.size), "mean": self.mean, "std": self.std,
            "interpolation": self.interpolation, "crop_pct": self.crop_pct, "crop_mode": "center",
        }  # fmt: skip

    def transform(self) -> Any:
        """A callable: PIL image -> float32 tensor (3, H, W)."""
        return timm.data.create_transform(**self.data_config(), is_training=False)

    @cached_property
    def _shape(self) -> Any:
        """The steps of `transform` that work on the PIL image."""
        *steps, _, _ = self.transform().transforms  # the last two make a tensor and normalise it
        return steps

    def pixels(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """An RGB image resized and cropped: (H, W, 3) uint8. `normalised` does the rest of `transform`.

        Raises:
            DataError: the image is so long and thin that the resized image, before the crop, would have more than `MAX_PIXELS` pixels.
        """
        grown = max(self.size) / self.crop_pct / min(image.size)
        if image.width * image.height * grown**2 > MAX_PIXELS:
            raise DataError(f"{image.width} x {image.height} pixels: too long and thin to be resized to {self.size[1]} x {self.size[0]}")
        if image.size != self.size[::-1] or self.crop_pct != 1:
            for step in self._shape:
                image = step(image)
        return np.asarray(image)

    def normalised(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in the memory format channels_last from (B, H, W, 3) uint8; bit-equal to `transform`."""
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)

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
        """The preprocessing that timm gives for a backbone, at another image size if `img_size` is given."""
        config = timm.data.resolve_model_data_config(backbone)
        own = timm.models.get_model_input_config(backbone)
        if own["fixed_input_size"]:  # timm's data configuration of vitamin_xlarge_336 has another size than the model
            config["input_size"] = own["input_size"]
        height, width = config["input_size"][1:]
        if img_size is not None:
            height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        return cls((height, width), tuple(config["mean"]), tuple(config["std"]), config["interpolation"], float(config["crop_pct"]))


class Ready(NamedTuple, Generic[T]):
    """A group of items and the pixels of those whose images can be read."""

    items: list[T]
    """The group."""
    good: list[int]
    """Indices of the items whose images can be read, ascending."""
    pixels: Tensor
    """(len(good), H, W, 3) uint8."""
    bad: list[tuple[int, str]]
    """Index and reason of each image that cannot be read."""


def batched(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` rows; the last may be shorter."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def ready(
    groups: Iterable[list[T]], read: Callable[[T], Image.Image], preprocess: Preprocess, num_workers: int = 0
) -> Generator[Ready[T], None, None]:
    """Decode, resize and crop groups of items in order; threads work some groups ahead of the consumer.

    Args:
        groups: lists of items; the images of a few groups are in memory at a time.
        read: function that returns the RGB image of an item, called in any thread; it raises DataError if there is none.
        preprocess: preprocessing of the encoder.
        num_workers: threads; 0 works in the calling thread, on demand.
    """
    height, width = preprocess.size

    def pixels_or_reasons(items: list[T]) -> list[np.ndarray[Any, Any] | str]:
        results: list[np.ndarray[Any, Any] | str] = []
        for item in items:
            try:
                results.append(preprocess.pixels(read(item)))
            except DataError as error:
                results.append(str(error))
        return results

    def joined(items: list[T], results: list[np.ndarray[Any, Any] | str]) -> Ready[T]:
        good = [i for i, x in enumerate(results) if not isinstance(x, str)]
        stack = np.stack([results[i] for i in good]) if good else np.zeros((0, height, width, 3), np.uint8)
        return Ready(items, good, torch.from_numpy(stack), [(i, x) for i, x in enumerate(results) if isinstance(x, str)])

    if not num_workers:
        yield from (joined(items, pixels_or_reasons(items)) for items in groups)
        return
    pool, waiting = ThreadPoolExecutor(num_workers, "decode"), deque[tuple[list[T], list[Future[Any]]]]()

    def first() -> Ready[T]:
        items, tasks = waiting.popleft()
        return joined(items, [x for task in tasks for x in task.result()])

    try:
        for items in groups:
            size = max(1, min(_CHUNK, -(-len(items) // num_workers)))
            waiting.append((items, [pool.submit(pixels_or_reasons, items[i : i + size]) for i in range(0, len(items), size)]))
            if len(waiting) > 2 and sum(len(tasks) for _, tasks in waiting) > 2 * num_workers:
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
