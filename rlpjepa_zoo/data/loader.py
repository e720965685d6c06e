"""Training data: batches that are a function of (seed, step) alone.

Sampler, substitutes for unreadable images and views are keyed by (seed, purpose, epoch, row, view), so what a step sees does not depend on
the number of processes, of workers, or on where a run was resumed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from tqdm.auto import tqdm

from ..config.plan import Plan
from ..core import rng
from ..errors import DataError, OutputError, first_line
from . import images
from .images import Images
from .sources import Source
from .views import Augment

__all__ = ["Batch", "Batches", "Decoded", "decoded", "shard_groups", "make_loader", "rows_loader", "steps_of_an_epoch", "views_of"]

_SUBSTITUTES = 50
_MOST_LANES = 64
_PREFETCH = 4
"""Batches that each worker has on their way, at most."""
_SHARED_MEMORY = Path("/dev/shm")
_EPOCH_OF_ROWS = 10**12
_SHORTEST_LANE = 0.85
"""Of its share of an epoch, that a lane of a stream must hold; it begins again for the rest."""


class Batch(NamedTuple):
    """One rank's share of a step."""

    images: list[Tensor]
    """At one of the stations of `rlpjepa_zoo.data.views.Augment`; finished: for each group of views (V, b, 3, S, S) float32."""
    labels: Tensor
    """(b,) with -1 for unknown."""
    rows: Tensor
    """(b,) numbers of the images; of one that cannot be read -1 - number, another stands in its place."""
    epoch: int
    bad: list[tuple[int, str]]
    """Images that could not be read, and why."""


# --- images kept in memory ----------------------------------------------------------------------------------------------------------


class Decoded(Images):
    """Images decoded once, in one block of memory; `stack` is (m, H, W, 3) uint8, the m that can be read, when those have one size.

    Args:
        pixels: (N,) uint8, image after image.
        sizes: (n, 2) height and width, zero for those that cannot be read.
        reasons: why, by row.
        of: where they come from.
    """

    def __init__(self, pixels: Tensor, sizes: np.ndarray[Any, Any], reasons: dict[int, str], of: Images) -> None:
        super().__init__(self._picture, of.ids, of.labels, of.classes)
        self.pixels, self.sizes, self.reasons = pixels, sizes, reasons
        self.ends = np.cumsum(3 * sizes.prod(1))
        good = np.unique(sizes[sizes[:, 0] > 0], axis=0)
        self.stack = pixels.view(-1, *good[0].tolist(), 3) if len(good) == 1 else None
        self.places = np.cumsum(sizes[:, 0] > 0) - 1

    def _picture(self, i: int) -> Image.Image:
        if i in self.reasons:
            raise DataError(self.reasons[i].removeprefix(f"{self.ids[i]}: "))
        height, width = self.sizes[i].tolist()
        start = int(self.ends[i]) - 3 * height * width
        return Image.fromarray(self.pixels[start : int(self.ends[i])].view(height, width, 3).numpy())

    def read(self, i: int) -> Image.Image:
        """Image i; DataError with the reason it could not be decoded for."""
        if i in self.reasons:
            raise DataError(self.reasons[i])
        return self._picture(i)


def decoded(source: Images, most_bytes: float, progress: bool = False) -> Images:
    """The images decoded and in memory, or as they are if they would need more than `most_bytes` (judged by 64 of them, give or take a quarter)."""
    n, sample = len(source), []
    for i in np.linspace(0, n - 1, min(n, 64)).astype(int):
        try:
            picture = source.read(int(i))
            sample.append(3 * picture.width * picture.height)
        except DataError:
            pass
    if not sample or sum(sample) / len(sample) * n > most_bytes:
        return source
    block, sizes, reasons = bytearray(), np.zeros((n, 2), np.int64), dict[int, str]()
    for i in tqdm(range(n), desc="decode", unit="image", leave=False, disable=not progress):
        try:
            picture = source.read(i)
        except DataError as error:
            reasons[i] = str(error)
            continue
        sizes[i] = picture.height, picture.width
        block += picture.tobytes()
        if len(block) > 1.25 * most_bytes:  # the sample was of small ones
            return source
    return Decoded(torch.frombuffer(block, dtype=torch.uint8), sizes, reasons, source)


# --- batches ------------------------------------------------------------------------------------------------------------------------


class _Assemble:
    """A batch from images: views finished here, or as far as single images need it, when a device is to do the rest."""

    def __init__(self, recipe: Plan, finish: bool) -> None:
        self.augment, self.finish = Augment(recipe.views, recipe.data, recipe.seed), finish

    def __call__(
        self, pictures: Sequence[Image.Image] | Tensor, labels: Sequence[int], rows: Sequence[int], epoch: int, bad: list[tuple[int, str]]
    ) -> Batch:
        number = torch.tensor(rows)
        if isinstance(pictures, Tensor):
            found = [pictures]
        else:
            single = [self.augment.crop_one(picture, epoch, row) for picture, row in zip(pictures, rows, strict=True)]
            found = [torch.stack(views, dim=1) for views in zip(*single, strict=True)]
        return Batch(self.augment(found, epoch, number) if self.finish else found, torch.tensor(labels), number, epoch, bad)


class _Indexed(Dataset[Batch]):
    """Batches of images by their rows; the place of one that cannot be read is taken by another."""

    def __init__(self, source: Images, recipe: Plan, finish: bool) -> None:
        self.source, self.seed, self.assemble = source, recipe.seed, _Assemble(recipe, finish)

    def __getitem__(self, key: tuple[int, list[int]]) -> Batch:
        epoch, rows = key
        stack = self.source.stack if isinstance(self.source, Decoded) else None
        read = self.source.read if stack is None else self._place
        bad: list[tuple[int, str]] = []
        found = [self._first(read, epoch, row, bad) for row in rows]
        taken = [row for _, row in found]
        numbers = [row if row == instead else -1 - row for row, instead in zip(rows, taken, strict=True)]
        pictures = [picture for picture, _ in found]
        labels = [-1] * len(rows) if self.source.labels is None else self.source.labels[taken].tolist()
        return self.assemble(pictures if stack is None else stack[pictures].permute(0, 3, 1, 2), labels, numbers, epoch, bad)

    def _place(self, row: int) -> int:
        """Where an image is in the stack."""
        source: Any = self.source
        if row in source.reasons:
            raise DataError(source.reasons[row])
        return int(source.places[row])

    def _first(self, read: Callable[[int], Any], epoch: int, row: int, bad: list[tuple[int, str]]) -> tuple[Any, int]:
        """What `read` gives for this row, or for the first that can be read of those drawn in its place; and which row that is."""
        for attempt in range(_SUBSTITUTES):
            take = row if attempt == 0 else rng.key(self.seed, "substitute", epoch, row, attempt) % len(self.source)
            try:
                return read(take), take
            except DataError as error:
                bad.append((take, str(error)))
        raise DataError(f"{_SUBSTITUTES} images in a row cannot be read; the last: {bad[-1][1]}")


class _Steps(Sampler[tuple[int, list[int]]]):
    """For each step of a range, this rank's share of the global batch: the epoch and rows."""

    def __init__(self, n: int, recipe: Plan, steps: range, rank: int, world: int) -> None:
        self.n, self.batch, self.seed, self.steps, self.rank, self.world = n, recipe.train.batch_size, recipe.seed, steps, rank, world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        per_epoch, share = self.n // self.batch, self.batch // self.world
        order: list[int] = []
        for step in self.steps:
            epoch, at = divmod(step, per_epoch)
            if not order or at == 0:
                order = torch.randperm(self.n, generator=rng.generator(self.seed, "order", epoch)).tolist()
            start = at * self.batch + self.rank * share
            yield epoch, order[start : start + share]


# --- streams ------------------------------------------------------------------------------------------------------------------------


def shard_groups(batch: int, shards: int) -> int:
    """Into how many lanes the files of a stream are dealt; every batch takes as many images from each.

    A divisor of the batch, so that it does not depend on the number of processes; the most for which lanes are about equally long.
    """
    fit = (n for n in range(1, min(batch, shards, _MOST_LANES) + 1) if batch % n == 0 and (shards % n == 0 or shards >= 8 * n))
    return max(fit, default=1)


def _unsharded(source: Any) -> Iterator[dict[str, Any]]:
    """All rows: iterating the data set itself inside a worker would give that worker's shards only."""
    for block in source.iter(batch_size=1):
        yield {name: column[0] for name, column in block.items()}


class _Stream(IterableDataset[Batch]):
    """Batches of a streamed data set, the same whatever the number of ranks and workers.

    The stream runs in lanes, each with its own files. A rank reads the lanes that its rows of the batch lie in, and its workers share them:
    `pieces` of them work on one step, and groups of that many take turns. Rows are decoded only where they are used.
    """

    def __init__(self, source: Any, recipe: Plan, steps: range, per_epoch: int, rank: int, world: int, finish: bool) -> None:
        self.image = images.image_column(source.features, recipe.data.image_column)
        self.label = images.label_column(source.features, recipe.data.label_column)
        self.source, self.recipe, self.steps, self.per_epoch = images.undecoded(source, self.image), recipe, steps, per_epoch
        self.assemble = _Assemble(recipe, finish)
        batch = recipe.train.batch_size
        self.lanes = shard_groups(batch, source.num_shards)
        self.width = batch // self.lanes
        self.first, self.last = rank * batch // world, (rank + 1) * batch // world
        mine = range(self.first // self.width, -(-self.last // self.width))
        self.pieces = math.gcd(len(mine), recipe.train.num_workers) if recipe.train.num_workers else 1
        self.mine = [mine[len(mine) * i // self.pieces : len(mine) * (i + 1) // self.pieces] for i in range(self.pieces)]

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        turn, piece = divmod(worker.id, self.pieces) if worker else (0, 0)
        turns = worker.num_workers // self.pieces if worker else 1
        for epoch in range(self.steps.start // self.per_epoch, -(-self.steps.stop // self.per_epoch)):
            first = max(self.steps.start, epoch * self.per_epoch)
            last = min(self.steps.stop, (epoch + 1) * self.per_epoch)
            running = [(lane, self._lane(lane, epoch)) for lane in self.mine[piece]]
            for step in range(epoch * self.per_epoch, last):
                taken = [(lane, list(itertools.islice(rows, self.width))) for lane, rows in running]
                if step >= first and (step - self.steps.start) % turns == turn:
                    yield self._batch(taken, epoch)

    def _lane(self, lane: int, epoch: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows of one lane in the order of an epoch, with numbers of their own."""
        source = self.source if self.lanes == 1 else self.source.shard(self.lanes, lane)
        seed = rng.key(self.recipe.seed, "stream", epoch) % 2**32
        source = source.shuffle(seed=seed, buffer_size=max(1, self.recipe.data.shuffle_buffer // self.lanes))
        needed = self.per_epoch * self.width
        given = 0
        while True:
            for record in self._rows(source, lane):
                yield self.lanes * given + lane, record
                given += 1
            if given < needed * (1.0 if self.lanes == 1 else _SHORTEST_LANE):
                of = "the stream" if self.lanes == 1 else f"lane {lane} of {self.lanes} of the stream"
                promised = self.recipe.data.length or 0
                raise DataError(f"data.length: {of} ended after {given} images, {promised // self.lanes} were promised")

    def _rows(self, source: Any, lane: int) -> Iterator[dict[str, Any]]:
        try:
            yield from _unsharded(source)
        except Exception as error:  # a file cut short, the network, ...
            raise DataError(f"stream, lane {lane} of {self.lanes}: {first_line(error)}") from error

    def _batch(self, taken: list[tuple[int, list[tuple[int, dict[str, Any]]]]], epoch: int) -> Batch:
        """Decode this rank's rows; an unreadable one is replaced by the next readable one of its lane in this step."""
        pictures, labels, numbers, bad = [], [], [], list[tuple[int, str]]()
        for lane, rows in taken:
            read: dict[int, Image.Image | None] = {}
            for place in range(max(self.first - lane * self.width, 0), min(self.last - lane * self.width, self.width)):
                for at in ((place + i) % self.width for i in range(self.width)):
                    if at not in read:
                        read[at] = self._decode(epoch, *rows[at], bad)
                    picture = read[at]
                    if picture is not None:
                        break
                else:
                    raise DataError(f"no readable image in one batch of the stream; the last: {bad[-1][1]}")
                label = rows[at][1][self.label] if self.label else -1
                pictures.append(picture)
                labels.append(-1 if label is None else label)
                numbers.append(rows[place][0] if at == place else -1 - rows[place][0])
        return self.assemble(pictures, labels, numbers, epoch, bad)

    def _decode(self, epoch: int, row: int, record: dict[str, Any], bad: list[tuple[int, str]]) -> Image.Image | None:
        try:
            return images.decode(images.cell(record[self.image]), name=f"row {row} of the stream")
        except DataError as error:
            bad.append((epoch * _EPOCH_OF_ROWS + row, str(error)))  # another image has this number in another epoch
            return None


# --- the loader ---------------------------------------------------------------------------------------------------------------------


class Batches:
    """Iterate over a loader; on leaving, its workers are gone, whatever happened."""

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self._running = images.running(loader)
        self._pieces = getattr(loader.dataset, "pieces", 1)

    def __enter__(self) -> Batches:
        self.iterator = self._running.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        found: BaseException | None = error[1]
        lost = isinstance(found, EOFError | ConnectionError | FileNotFoundError) and any(self._ended())  # half a batch of a dead worker
        try:
            self._running.__exit__(*error)
        except RuntimeError as again:
            if "DataLoader worker" not in str(again):
                raise
        if found is not None and (lost or (isinstance(found, RuntimeError) and "DataLoader worker" in str(found))):
            raise self._died(found) from found  # torch raises it from a signal handler, wherever the program is

    def _ended(self) -> set[int | None]:
        """Exit codes of the workers; None for those that run."""
        workers = getattr(self.iterator, "_workers", [])
        for worker in workers:
            with contextlib.suppress(RuntimeError):  # of the handler, see above
                worker.join(0.2)
        return {worker.exitcode for worker in workers}

    def _died(self, error: BaseException) -> DataError:
        ended, text = self._ended(), first_line(error)
        text = text if "DataLoader worker" in text else f"a DataLoader worker died ({text})"
        where = "shared memory, /dev/shm: enlarge it, or lower" if -signal.SIGBUS in ended else "memory? Lower"
        return DataError(f"{text}; out of {where} train.num_workers, or set it to 0 to see the error itself")

    def next(self) -> Batch:
        """The next batch; what went wrong in a worker becomes one line.

        Raises:
            DataError: unreadable data, or a worker that died or hangs.
        """
        try:
            parts = [next(self.iterator) for _ in range(self._pieces)]
        except DataError as error:  # torch wraps the traceback of the worker around the message
            raise DataError(str(error.args[0]).strip().splitlines()[-1].removeprefix("rlpjepa_zoo.errors.DataError: ")) from error
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            if "DataLoader timed out" in reason:
                mend = "does a file hang? Set train.num_workers=0 to see where, or raise train.loader_timeout_minutes"
                raise DataError(f"no batch from the workers: {reason}; {mend}") from error
            if "DataLoader worker" not in reason:
                raise
            raise self._died(error) from error
        return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: list[Batch]) -> Batch:
    found = [torch.cat(views, dim=1) for views in zip(*(part.images for part in parts), strict=True)]
    labels, rows = torch.cat([part.labels for part in parts]), torch.cat([part.rows for part in parts])
    return Batch(found, labels, rows, parts[0].epoch, [record for part in parts for record in part.bad])


def steps_of_an_epoch(source: Source, recipe: Plan) -> int:
    """Whole batches in an epoch; DataError when there is none."""
    found = source.length // recipe.train.batch_size
    if found < 1:
        raise DataError(f"{source.length} training images are fewer than one batch; lower train.batch_size = {recipe.train.batch_size}")
    return found


def _prefetch(recipe: Plan, share: int, finish: bool) -> int:
    """How many batches each worker may have on their way: what fits into the shared memory, for a worker that finds it full never answers."""
    views, workers = recipe.views, recipe.train.num_workers
    pixels = views.count * recipe.data.image_size**2 + (views.local.count * views.local.size**2 if views.local else 0)
    batch = share * 3 * pixels * (4 if finish else 1) + (1 << 16)  # labels and numbers
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this machine, which share it
    free = shutil.disk_usage(_SHARED_MEMORY).free / ranks if _SHARED_MEMORY.is_dir() else math.inf
    fit = int(min(_PREFETCH, (free / batch - 2) // workers))  # two are in the hands of the loop
    if fit < 1:
        room = f"{(workers + 2) * batch / 1e6:.1f} MB are needed for batches of {workers} workers, {free / 1e6:.1f} MB are free"
        raise OutputError(
            f"{_SHARED_MEMORY}: too little shared memory: {room}; enlarge it (docker run --shm-size), or lower train.num_workers"
        )
    return fit


def make_loader(source: Source, recipe: Plan, steps: range, rank: int = 0, world: int = 1, finish: bool = True) -> DataLoader[Batch]:
    """Batches of the given steps, across epochs, for one rank; iterate inside `Batches`, which ends the workers.

    Args:
        source: training images, perhaps `decoded`.
        finish: make the views here; otherwise go only as far as single images need it, `Augment` on a device does the rest.

    Raises:
        DataError: fewer images than one batch.
        OutputError: no shared memory for what the workers send.
    """
    per_epoch = steps_of_an_epoch(source, recipe)
    nothing_to_do = not finish and isinstance(source.train, Decoded) and source.train.stack is not None
    workers = 0 if nothing_to_do else recipe.train.num_workers
    common: dict[str, Any] = {
        "num_workers": workers, "pin_memory": torch.cuda.is_available(), "worker_init_fn": images.ignore_signals if workers else None,
        "prefetch_factor": _prefetch(recipe, recipe.train.batch_size // world, finish) if workers else None, "generator": torch.Generator(), "batch_size": None,
    }  # fmt: skip
    if recipe.data.streaming:
        return DataLoader(_Stream(source.train, recipe, steps, per_epoch, rank, world, finish), **common)
    sampler: Any = _Steps(source.length, recipe, steps, rank, world)
    limit = 60 * recipe.train.loader_timeout_minutes if workers else 0  # not for streams, which may skip for hours when they are resumed
    return DataLoader(_Indexed(source.train, recipe, finish), sampler=sampler, timeout=limit, **common)


def views_of(source: Images, recipe: Plan, rows: range, batch: int) -> DataLoader[Batch]:
    """Finished views of the named rows as in epoch 0, in order, so many images at a time; iterate inside `Batches`."""
    keys: Any = [(0, list(rows[i : i + batch])) for i in range(0, len(rows), batch)]
    workers = recipe.train.num_workers
    common: dict[str, Any] = {
        "num_workers": workers,
        "worker_init_fn": images.ignore_signals if workers else None,
        "generator": torch.Generator(),
    }
    ahead = _prefetch(recipe, batch, True) if workers else None
    return DataLoader(_Indexed(source, recipe, True), batch_size=None, sampler=keys, prefetch_factor=ahead, **common)


def rows_loader(dataset: Dataset[Batch], n: int, recipe: Plan, steps: range, rank: int, world: int) -> DataLoader[Batch]:
    """Batches of the given steps, for one rank, from a data set that makes them of (epoch, rows) in no time."""
    sampler: Any = _Steps(n, recipe, steps, rank, world)
    return DataLoader(dataset, batch_size=None, sampler=sampler, generator=torch.Generator())
