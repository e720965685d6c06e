"""Evaluation preprocessing: from an RGB image to the input of a backbone, one by one or many at a time.

Resizing and cropping are Pillow's, which leaves the interpreter to others while it works, so threads do it; the rest is arithmetic on whole
batches, on the device that encodes them.
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
"""Images that a thread takes at a time."""


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

    @cached_property
    def _shape(self) -> Any:
        """The part of `transform` that is done on the image itself."""
        *steps, _, _ = self.transform().transforms  # the last two make a tensor and normalise it
        return steps

    def pixels(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """An RGB image resized and cropped: (H, W, 3) uint8. `normalised` is the rest of `transform`.

        Raises:
            DataError: so long and thin that resizing it, before the crop, would take more memory than any image is given.
        """
        grown = max(self.size) / self.crop_pct / min(image.size)
        if image.width * image.height * grown**2 > MAX_PIXELS:
            raise DataError(f"{image.width} x {image.height} pixels: too long and thin to be resized to {self.size[1]} x {self.size[0]}")
        if image.size != self.size[::-1] or self.crop_pct != 1:
            for step in self._shape:
                image = step(image)
        return np.asarray(image)

    def normalised(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in the memory format channels_last; equal to `transform` bit for bit."""
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
        """What timm says the backbone wants, at the asked image size where one was asked for."""
        found = timm.data.resolve_model_data_config(backbone)
        if img_size is not None:
            found["input_size"] = (found["input_size"][0], *((img_size, img_size) if isinstance(img_size, int) else img_size))
        return cls(
            tuple(found["input_size"][1:]), tuple(found["mean"]), tuple(found["std"]), found["interpolation"], float(found["crop_pct"])
        )


class Ready(NamedTuple, Generic[T]):
    """Some items and their images, as far as those can be read."""

    items: list[T]
    good: list[int]
    """Places of those that can be read, rising."""
    pixels: Tensor
    """(len(good), H, W, 3) uint8"""
    bad: list[tuple[int, str]]
    """Places of the others, and why."""


def batched(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` rows, the last perhaps shorter."""
    rows = iter(rows)
    while found := list(islice(rows, size)):
        yield found


def ready(
    groups: Iterable[list[T]], read: Callable[[T], Image.Image], preprocess: Preprocess, num_workers: int = 0
) -> Generator[Ready[T], None, None]:
    """Decode, resize and crop groups of items in order, some groups ahead of the one that is asked for.

    Args:
        groups: lists of items; of few of them at a time the images are in memory.
        read: from an item to its RGB image, in any thread; DataError where there is none.
        preprocess: of the encoder.
        num_workers: threads; 0 works in this one, when asked.
    """
    height, width = preprocess.size

    def some(items: list[T]) -> list[np.ndarray[Any, Any] | str]:
        found: list[np.ndarray[Any, Any] | str] = []
        for item in items:
            try:
                found.append(preprocess.pixels(read(item)))
            except DataError as error:
                found.append(str(error))
        return found

    def joined(items: list[T], found: list[np.ndarray[Any, Any] | str]) -> Ready[T]:
        good = [i for i, x in enumerate(found) if not isinstance(x, str)]
        stack = np.stack([found[i] for i in good]) if good else np.zeros((0, height, width, 3), np.uint8)
        return Ready(items, good, torch.from_numpy(stack), [(i, x) for i, x in enumerate(found) if isinstance(x, str)])

    if not num_workers:
        yield from (joined(items, some(items)) for items in groups)
        return
    pool, waiting = ThreadPoolExecutor(num_workers, "decode"), deque[tuple[list[T], list[Future[Any]]]]()

    def first() -> Ready[T]:
        items, parts = waiting.popleft()
        return joined(items, [x for part in parts for x in part.result()])

    try:
        for items in groups:
            size = max(1, min(_CHUNK, -(-len(items) // num_workers)))
            waiting.append((items, [pool.submit(some, items[i : i + size]) for i in range(0, len(items), size)]))
            if len(waiting) > 2 and sum(len(parts) for _, parts in waiting) > 2 * num_workers:
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
