"""Batches of a streamed data set: the same for any number of processes and workers, and after a resume."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from ..config.plan import Plan
from ..core import rng
from ..errors import DataError, first_line
from .batch import Assemble, Batch
from .decode import decode
from .sources.huggingface import Stream

__all__ = ["StreamedBatches", "shard_groups"]

_MAX_GROUPS = 64
_ROWS_PER_EPOCH = 10**12
"""Offset added per epoch to the row numbers in the bad-image log."""
_SHORTEST_GROUP = 0.85
"""Smallest allowed length of a shard group, as a share of the images it supplies per epoch. A shorter group is read again from its start."""


def shard_groups(batch: int, shards: int) -> int:
    """Number of groups that the files (shards) of a stream are dealt into; every batch takes as many images from each group.

    It divides the batch, so it does not depend on the number of processes. It is the largest number for which the groups are about equally
    long.

    Example:
        >>> shard_groups(256, 1024), shard_groups(256, 1)
        (64, 1)
    """
    fit = (n for n in range(1, min(batch, shards, _MAX_GROUPS) + 1) if batch % n == 0 and (shards % n == 0 or shards >= 8 * n))
    return max(fit, default=1)


def _records(dataset: Any) -> Iterator[dict[str, Any]]:
    """All rows. Plain iteration inside a worker would give only that worker's shards."""
    for block in dataset.iter(batch_size=1):
        yield {name: column[0] for name, column in block.items()}


@contextmanager
def _one_pause() -> Iterator[None]:
    """`datasets` sleeps five seconds when a reader ends, so that no thread of Arrow is left when the process ends. Sleep once, after all readers."""
    from datasets import config

    pause, config.SLEEP_TIME_ON_THREADS_SHUTDOWN = config.SLEEP_TIME_ON_THREADS_SHUTDOWN, 0
    try:
        yield
    finally:
        config.SLEEP_TIME_ON_THREADS_SHUTDOWN = pause
        time.sleep(pause)


class StreamedBatches(IterableDataset[Batch]):
    """Batches of a streamed data set.

    The files are dealt into shard groups. A rank reads the groups that its rows of the batch come from, and its workers share them: `pieces`
    workers make one step together, and teams of that many workers take turns. Rows are decoded only where they are used.

    Args:
        stream: the data set and its columns.
        recipe: batch size, workers, views, data section and seed.
        steps: the steps to make.
        per_epoch: steps of an epoch.
        rank, world: number of this process, and how many there are.
        finish: whether to make finished views.
    """

    def __init__(self, stream: Stream, recipe: Plan, steps: range, per_epoch: int, rank: int, world: int, finish: bool) -> None:
        self.image, self.label, self.cells = stream.image, stream.label, stream.cells
        self.dataset, self.recipe, self.steps, self.per_epoch = stream.rows, recipe, steps, per_epoch
        self.assemble = Assemble(recipe, finish)
        batch = recipe.train.batch_size
        self.groups = shard_groups(batch, stream.rows.num_shards)
        self.width = batch // self.groups
        self.first, self.last = rank * batch // world, (rank + 1) * batch // world
        mine = range(self.first // self.width, -(-self.last // self.width))
        self.pieces = math.gcd(len(mine), recipe.train.num_workers) if recipe.train.num_workers else 1
        self.mine = [mine[len(mine) * i // self.pieces : len(mine) * (i + 1) // self.pieces] for i in range(self.pieces)]

    def __iter__(self) -> Iterator[Batch]:
        with _one_pause():
            yield from self._batches()

    def _batches(self) -> Iterator[Batch]:
        worker = get_worker_info()
        team, piece = divmod(worker.id, self.pieces) if worker else (0, 0)
        teams = worker.num_workers // self.pieces if worker else 1
        for epoch in range(self.steps.start // self.per_epoch, -(-self.steps.stop // self.per_epoch)):
            first = max(self.steps.start, epoch * self.per_epoch)
            last = min(self.steps.stop, (epoch + 1) * self.per_epoch)
            running = [(group, self._group(group, epoch)) for group in self.mine[piece]]
            for step in range(epoch * self.per_epoch, last):
                rows = [(group, list(itertools.islice(records, self.width))) for group, records in running]
                if step >= first and (step - self.steps.start) % teams == team:
                    yield self._batch(rows, epoch)

    def _group(self, group: int, epoch: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows of one shard group in the order of an epoch, with their numbers."""
        shards = self.dataset if self.groups == 1 else self.dataset.shard(self.groups, group)
        seed = rng.key(self.recipe.seed, "stream", epoch) % 2**32
        shards = shards.shuffle(seed=seed, buffer_size=max(1, self.recipe.data.shuffle_buffer // self.groups))
        needed = self.per_epoch * self.width
        count = 0
        while True:
            for record in self._read(shards, group):
                yield self.groups * count + group, record
                count += 1
            if count < needed * (1.0 if self.groups == 1 else _SHORTEST_GROUP):
                name = "the stream" if self.groups == 1 else f"shard group {group} of {self.groups} of the stream"
                promised = (self.recipe.data.length or 0) // self.groups
                raise DataError(f"data.length: {name} ended after {count} images, {promised} were promised")

    def _read(self, shards: Any, group: int) -> Iterator[dict[str, Any]]:
        try:
            yield from _records(shards)
        except Exception as error:  # a file cut short, the network, ...
            raise DataError(f"stream, shard group {group} of {self.groups}: {first_line(error)}") from error

    def _batch(self, rows_of_groups: list[tuple[int, list[tuple[int, dict[str, Any]]]]], epoch: int) -> Batch:
        """This rank's batch. An unreadable row is replaced by the next readable one of its shard group in this step."""
        pictures, labels, numbers, bad = [], [], [], list[tuple[int, str]]()
        for group, rows in rows_of_groups:
            decoded: dict[int, Image.Image | None] = {}
            for place in range(max(self.first - group * self.width, 0), min(self.last - group * self.width, self.width)):
                for i in ((place + k) % self.width for k in range(self.width)):
                    if i not in decoded:
                        decoded[i] = self._decode(epoch, *rows[i], bad)
                    picture = decoded[i]
                    if picture is not None:
                        break
                else:
                    raise DataError(f"no readable image in one batch of the stream; the last: {bad[-1][1]}")
                label = rows[i][1][self.label] if self.label else -1
                pictures.append(picture)
                labels.append(-1 if label is None else label)
                numbers.append(rows[place][0] if i == place else -1 - rows[place][0])
        return self.assemble(pictures, labels, numbers, epoch, bad)

    def _decode(self, epoch: int, row: int, record: dict[str, Any], bad: list[tuple[int, str]]) -> Image.Image | None:
        try:
            return decode(self.cells(record[self.image]), name=f"row {row} of the stream")
        except DataError as error:
            bad.append((epoch * _ROWS_PER_EPOCH + row, str(error)))  # another image has this number in another epoch
            return None
