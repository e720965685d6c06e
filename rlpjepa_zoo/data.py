"""Training data: the random views of each image, and batches that are a function of (seed, step) alone.

Sampler, substitutes for unreadable images and augmentation are keyed by (seed, purpose, epoch, row, view), so what a step sees does
not depend on the number of processes, of workers, or on where a run was resumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision.transforms import InterpolationMode, v2

from . import images, streams
from .errors import DataError
from .images import Images
from .recipe import Data, Recipe, Views
from .sources import Source

__all__ = ["Batch", "Batches", "make_loader", "make_views"]

_SUBSTITUTES = 50


class Batch(NamedTuple):
    """One rank's share of a step: x (V, b, 3, H, W) float32, labels (b,) with -1 for unknown, rows (b,), and what could not be read."""

    x: Tensor
    labels: Tensor
    rows: Tensor
    bad: list[tuple[int, str]]


# --- views --------------------------------------------------------------------------------------------------------------------------


def make_views(views: Views, data: Data) -> v2.Compose:
    """The random transform of one view: RGB PIL image -> normalised float32 tensor (3, H, W); draws from torch's global generator."""
    size = (data.image_size, data.image_size)
    mode = InterpolationMode(data.interpolation)
    ops: list[Any] = [
        v2.Resize(size, mode) if views.crop_scale is None else v2.RandomResizedCrop(size, views.crop_scale, views.crop_ratio, mode)
    ]
    if views.rotate or views.translate or views.zoom != (1.0, 1.0):
        ops.append(v2.RandomAffine(views.rotate, (views.translate, views.translate), views.zoom, interpolation=InterpolationMode.BILINEAR))
    if views.jitter:
        ops.append(v2.RandomApply([v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)], views.jitter))
    if views.grayscale:
        ops.append(v2.RandomGrayscale(views.grayscale))
    if views.blur:
        ops.append(v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], views.blur))  # 13 taps: three sigma of the widest
    if views.solarize:
        ops.append(v2.RandomSolarize(128, views.solarize))
    if views.equalize:
        ops.append(v2.RandomEqualize(views.equalize))
    if views.flip:
        ops.append(v2.RandomHorizontalFlip(views.flip))
    ops += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    if views.noise:
        ops.append(v2.GaussianNoise(0.0, views.noise, clip=False))
    return v2.Compose(ops)


class _Augment:
    """The views of one image at an epoch, each on its own stream."""

    def __init__(self, recipe: Recipe) -> None:
        self.transform, self.views, self.seed = make_views(recipe.views, recipe.data), recipe.views.count, recipe.seed

    def __call__(self, image: Image.Image, epoch: int, row: int) -> Tensor:
        made = []
        for view in range(self.views):
            with streams.seeded(self.seed, "view", epoch, row, view):
                made.append(self.transform(image).as_subclass(torch.Tensor))
        return torch.stack(made)


Item = tuple[Tensor, int, int, list[tuple[int, str]]]


class _Augmented(Dataset[Item]):
    """Items by (epoch, row): views, label, row, and the rows that could not be read (their place is taken by another image)."""

    def __init__(self, source: Images, recipe: Recipe) -> None:
        self.source, self.augment, self.seed = source, _Augment(recipe), recipe.seed

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, row = key
        bad: list[tuple[int, str]] = []
        for attempt in range(_SUBSTITUTES):
            take = row if attempt == 0 else streams.key(self.seed, "substitute", epoch, row, attempt) % len(self.source)
            try:
                picture = self.source.read(take)
            except DataError as error:
                bad.append((take, str(error)))
                continue
            label = -1 if self.source.labels is None else int(self.source.labels[take])
            return self.augment(picture, epoch, take), label, take, bad
        raise DataError(f"{_SUBSTITUTES} images in a row cannot be read; the last: {bad[-1][1]}")


def _unsharded(source: Any) -> Iterator[dict[str, Any]]:
    """All rows: iterating the data set itself inside a worker would give that worker's shards only."""
    for block in source.iter(batch_size=1):
        yield {name: column[0] for name, column in block.items()}


class _Stream(IterableDataset[Batch]):
    """Batches of a streamed data set, the same whatever the number of ranks and workers.

    Every worker reads the whole stream without decoding it, and decodes only its rank's rows of every num_workers-th step.
    """

    def __init__(self, source: Any, recipe: Recipe, steps: range, per_epoch: int, rank: int, world: int) -> None:
        self.image = images.image_column(source.features, recipe.data.image_column)
        self.label = images.label_column(source.features, recipe.data.label_column)
        self.source = images.undecoded(source, self.image)
        self.recipe, self.steps, self.per_epoch, self.rank, self.world = recipe, steps, per_epoch, rank, world
        self.augment = _Augment(recipe)

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        mine, of = (worker.id, worker.num_workers) if worker else (0, 1)
        batch = self.recipe.train.batch_size
        share = batch // self.world
        for epoch in range(self.steps.start // self.per_epoch, -(-self.steps.stop // self.per_epoch)):
            first = max(self.steps.start, epoch * self.per_epoch)
            last = min(self.steps.stop, (epoch + 1) * self.per_epoch)
            source = self.source.shuffle(
                seed=streams.key(self.recipe.seed, "stream", epoch) % 2**32, buffer_size=self.recipe.data.shuffle_buffer
            )
            rows = enumerate(_unsharded(source))
            for step in range(epoch * self.per_epoch, last):
                taken = list(itertools.islice(rows, batch))
                if len(taken) < batch:
                    raise DataError(
                        f"data.length: the stream ended after {step % self.per_epoch * batch + len(taken)} images, {self.recipe.data.length} were promised"
                    )
                if step >= first and (step - self.steps.start) % of == mine:
                    yield _collate(self._items(taken, self.rank * share, share, epoch))

    def _items(self, taken: list[tuple[int, dict[str, Any]]], start: int, share: int, epoch: int) -> list[Item]:
        """This rank's rows; an unreadable one is replaced by the next readable one of the step."""
        items: list[Item] = []
        bad: list[tuple[int, str]] = []
        for row, record in taken[start:] + taken[:start]:
            if len(items) == share:
                break
            try:
                picture = images.decode(images.cell(record[self.image]), name=f"row {row} of the stream")
            except DataError as error:
                bad.append((row, str(error)))
                continue
            label = record[self.label] if self.label else -1
            items.append((self.augment(picture, epoch, row), -1 if label is None else label, row, bad))
            bad = []
        if not items:
            raise DataError(f"no readable image in one batch of the stream; the last: {bad[-1][1]}")
        while len(items) < share:  # too few readable: some stand in twice
            views, label, row, _ = items[streams.key(self.recipe.seed, "stand-in", epoch, taken[0][0], len(items)) % len(items)]
            items.append((views, label, row, bad))
            bad = []
        return items


def _collate(items: list[Item]) -> Batch:
    x = torch.stack([views for views, _, _, _ in items], dim=1)
    return Batch(x, torch.tensor([i[1] for i in items]), torch.tensor([i[2] for i in items]), [record for i in items for record in i[3]])


class _Steps(Sampler[list[tuple[int, int]]]):
    """For each step of a range, this rank's share of the global batch, as (epoch, row)."""

    def __init__(self, n: int, recipe: Recipe, steps: range, rank: int, world: int) -> None:
        self.n, self.batch, self.seed, self.steps, self.rank, self.world = n, recipe.train.batch_size, recipe.seed, steps, rank, world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch, share = self.n // self.batch, self.batch // self.world
        order: list[int] = []
        for step in self.steps:
            epoch, at = divmod(step, per_epoch)
            if not order or at == 0:
                order = torch.randperm(self.n, generator=streams.generator(self.seed, "order", epoch)).tolist()
            start = at * self.batch + self.rank * share
            yield [(epoch, row) for row in order[start : start + share]]


class Batches:
    """Iterate over a loader; on leaving, its workers are gone, whatever happened."""

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self._running = images.running(loader)

    def __enter__(self) -> Batches:
        self.iterator = self._running.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._running.__exit__(*error)

    def next(self) -> Batch:
        """The next batch; what went wrong in a worker becomes one line.

        Raises:
            DataError: unreadable data, or a worker that died.
        """
        try:
            return next(self.iterator)
        except DataError as error:  # torch wraps the traceback of the worker around the message
            raise DataError(str(error.args[0]).strip().splitlines()[-1].removeprefix("rlpjepa_zoo.errors.DataError: ")) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{reason}; out of memory? Lower train.num_workers, or set it to 0 to see the error itself") from error


def make_loader(source: Source, recipe: Recipe, steps: range, rank: int = 0, world: int = 1) -> DataLoader[Batch]:
    """Batches of the given steps, across epochs, for one rank; iterate inside `Batches`, which ends the workers.

    Raises:
        DataError: fewer images than one batch.
    """
    per_epoch = source.length // recipe.train.batch_size
    if per_epoch < 1:
        raise DataError(f"{source.length} training images are fewer than one batch; lower train.batch_size = {recipe.train.batch_size}")
    workers = recipe.train.num_workers
    common: dict[str, Any] = {
        "num_workers": workers, "pin_memory": torch.cuda.is_available(), "worker_init_fn": images.deaf_worker if workers else None,
        "prefetch_factor": 4 if workers else None, "generator": torch.Generator(),
    }  # fmt: skip
    if recipe.data.streaming:
        return DataLoader(_Stream(source.train, recipe, steps, per_epoch, rank, world), batch_size=None, **common)
    sampler: Any = _Steps(source.length, recipe, steps, rank, world)
    items: Any = _Augmented(source.train, recipe)
    return DataLoader(items, batch_sampler=sampler, collate_fn=_collate, **common)
