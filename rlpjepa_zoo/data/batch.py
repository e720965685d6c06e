"""Batches of training data: their type, and how they are made from decoded images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ..config.plan import Plan
from ..core import rng
from ..errors import DataError
from .images import Images
from .memory import Decoded
from .views import Augment

__all__ = ["Assemble", "Batch", "IndexedBatches", "concatenate"]

_SUBSTITUTES = 50
"""Images tried for one place of a batch before the run ends."""


class Batch(NamedTuple):
    """One rank's share of a step."""

    images: list[Tensor]
    """At one of the stages of `rlpjepa_zoo.data.views.Augment`; finished: for each group of views (V, b, 3, S, S) float32."""
    labels: Tensor
    """(b,) class numbers, -1 for unknown."""
    rows: Tensor
    """(b,) row numbers. If row n cannot be read, its place holds -1 - n and another image."""
    epoch: int
    bad: list[tuple[int, str]]
    """Row and reason of each image that could not be read."""


def concatenate(batches: list[Batch]) -> Batch:
    """Join the pieces of one step into one batch."""
    images = [torch.cat(views, dim=1) for views in zip(*(batch.images for batch in batches), strict=True)]
    labels, rows = torch.cat([batch.labels for batch in batches]), torch.cat([batch.rows for batch in batches])
    return Batch(images, labels, rows, batches[0].epoch, [entry for batch in batches for entry in batch.bad])


class Assemble:
    """Makes a batch from images: finished views, or only the crops of single images if a device makes the rest.

    Args:
        recipe: views, data section and seed.
        finish: whether to make finished views.
    """

    def __init__(self, recipe: Plan, finish: bool) -> None:
        self.augment, self.finish = Augment(recipe.views, recipe.data, recipe.seed, recipe.train.epochs), finish

    def __call__(
        self, pictures: Sequence[Image.Image] | Tensor, labels: Sequence[int], rows: Sequence[int], epoch: int, bad: list[tuple[int, str]]
    ) -> Batch:
        """A batch; `pictures` are b PIL images, or (b, 3, H, W) uint8 if all have one size."""
        numbers = torch.tensor(rows)
        if isinstance(pictures, Tensor):
            views = [pictures]
        else:
            crops = [self.augment.crop_one(picture, epoch, row) for picture, row in zip(pictures, rows, strict=True)]
            views = [torch.stack(group, dim=1) for group in zip(*crops, strict=True)]
        return Batch(self.augment(views, epoch, numbers) if self.finish else views, torch.tensor(labels), numbers, epoch, bad)


class IndexedBatches(Dataset[Batch]):
    """Batches by epoch and row numbers. An image that cannot be read is replaced by one drawn at random.

    Args:
        source: the images.
        recipe: views, data section and seed.
        finish: whether to make finished views.
    """

    def __init__(self, source: Images, recipe: Plan, finish: bool) -> None:
        self.source, self.seed, self.assemble = source, recipe.seed, Assemble(recipe, finish)
        self.reading = torch.full((max(1, recipe.train.num_workers),), -1).share_memory_()
        """Row of the image that each worker reads now, -1 for none; the main process sees it."""

    def __getitem__(self, key: tuple[int, list[int]]) -> Batch:
        epoch, rows = key
        stack = self.source.stack if isinstance(self.source, Decoded) else None
        read = self.source.read if stack is None else self._position
        bad: list[tuple[int, str]] = []
        results = [self._read(read, epoch, row, bad) for row in rows]
        used = [row for _, row in results]
        numbers = [row if row == instead else -1 - row for row, instead in zip(rows, used, strict=True)]
        pictures = [picture for picture, _ in results]
        labels = [-1] * len(rows) if self.source.labels is None else self.source.labels[used].tolist()
        self._note(-1)
        return self.assemble(pictures if stack is None else stack[pictures].permute(0, 3, 1, 2), labels, numbers, epoch, bad)

    def _note(self, row: int) -> None:
        worker = get_worker_info()
        if worker is not None:
            self.reading[worker.id] = row

    def _position(self, row: int) -> int:
        """Index of an image in the stack."""
        source: Any = self.source
        if row in source.reasons:
            raise DataError(source.reasons[row])
        return int(source.positions[row])

    def _read(self, read: Callable[[int], Any], epoch: int, row: int, bad: list[tuple[int, str]]) -> tuple[Any, int]:
        """What `read` returns for this row, or for the first substitute that can be read; and the row that was read."""
        for attempt in range(_SUBSTITUTES):
            chosen = row if attempt == 0 else rng.key(self.seed, "substitute", epoch, row, attempt) % len(self.source)
            self._note(chosen)
            try:
                return read(chosen), chosen
            except DataError as error:
                bad.append((chosen, str(error)))
        raise DataError(f"{_SUBSTITUTES} images in a row cannot be read; the last: {bad[-1][1]}")
