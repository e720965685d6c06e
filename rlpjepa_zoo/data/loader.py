"""Loaders of training data: batches that are a function of (seed, step) alone.

Row order, substitutes for unreadable images and views are keyed by (seed, purpose, epoch, row, view), so the batch of a step does not depend
on the number of processes or workers, or on where a run was resumed.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config.plan import Plan
from ..core import rng
from ..errors import DataError, OutputError, first_line
from .batch import Batch, IndexedBatches, concatenate
from .images import Images
from .memory import Decoded
from .sources import Source
from .streaming import StreamedBatches

__all__ = ["Batches", "ignore_signals", "make_loader", "rows_loader", "steps_of_an_epoch", "views_of"]

_MAX_PREFETCH = 4
"""Batches that each worker may have ready or in work."""
_NAMED = 4
"""Images that a message names."""
_SHARED_MEMORY = Path("/dev/shm")


# --- workers --------------------------------------------------------------------------------------------------------------------------


def ignore_signals(worker: int) -> None:
    """Start a loader process: one thread, and it ignores the signals that end or checkpoint a run. They are sent to whole process groups, and
    only the main process answers them."""
    torch.set_num_threads(1)
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)


def _end_workers(iterator: Any) -> None:
    """End the processes of a loader's iterator; processes that ignore signals would keep the program from ending."""
    if not hasattr(iterator, "_shutdown_workers"):
        return
    try:
        iterator._shutdown_workers()  # torch may raise in it, from its handler of SIGCHLD
    finally:
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()


class Batches:
    """Context manager that iterates over a loader; on leaving it ends the loader's workers, whatever happened."""

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self._loader = loader
        self._pieces = getattr(loader.dataset, "pieces", 1)
        self._dataset: Any = loader.dataset

    def __enter__(self) -> Batches:
        self.iterator = iter(self._loader)
        return self

    def __exit__(self, *error: Any) -> None:
        raised: BaseException | None = error[1]
        worker_ended = any(self._exit_codes()) if isinstance(raised, EOFError | ConnectionError | FileNotFoundError) else False
        try:
            _end_workers(self.iterator)
        except RuntimeError as again:
            if "DataLoader worker" not in str(again):
                raise
        # a dead worker leaves an incomplete batch behind, or torch raises from its signal handler at any line of the program
        if raised is not None and (worker_ended or (isinstance(raised, RuntimeError) and "DataLoader worker" in str(raised))):
            raise self._worker_died(raised) from raised

    def _exit_codes(self) -> set[int | None]:
        """Exit codes of the workers; None for those that run."""
        workers = getattr(self.iterator, "_workers", [])
        for worker in workers:
            with contextlib.suppress(RuntimeError):  # raised by torch's signal handler
                worker.join(0.2)
        return {worker.exitcode for worker in workers}

    def _worker_died(self, error: BaseException) -> DataError:
        codes, text = self._exit_codes(), first_line(error)
        text = text if "DataLoader worker" in text else f"a DataLoader worker died ({text})"
        where = "shared memory, /dev/shm: enlarge it, or lower" if -signal.SIGBUS in codes else "memory? Lower"
        died = [number for number, worker in enumerate(getattr(self.iterator, "_workers", [])) if worker.exitcode]
        return DataError(f"{text}{self._images_read(died)}; out of {where} train.num_workers, or set it to 0 to see the error itself")

    def _images_read(self, workers: Iterable[int]) -> str:
        """The images that these workers were reading, to name in a message."""
        reading = getattr(self._dataset, "reading", None)
        rows = [] if reading is None else [int(reading[number]) for number in workers]
        names = [str(self._dataset.source.ids[row]) for row in rows if row >= 0]
        return f" while it read {' or '.join(names[:_NAMED])}{' or another' if len(names) > _NAMED else ''}" if names else ""

    def next(self) -> Batch:
        """The next batch.

        Raises:
            StopIteration: there is none.
            DataError: unreadable data, or a worker that died or does not answer; the message is one line.
        """
        try:
            batches = [next(self.iterator) for _ in range(self._pieces)]
        except DataError as error:  # torch wraps the traceback of the worker around the message
            raise DataError(str(error.args[0]).strip().splitlines()[-1].removeprefix("rlpjepa_zoo.errors.DataError: ")) from error
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            if "DataLoader timed out" in reason:
                fix = "does a file hang? Set train.num_workers=0 to see where, or raise train.loader_timeout_minutes"
                read = self._images_read(range(self._loader.num_workers))
                raise DataError(f"no batch from the workers: {reason}{read.replace('it read', 'they read')}; {fix}") from error
            if "DataLoader worker" not in reason:
                raise
            raise self._worker_died(error) from error
        return batches[0] if len(batches) == 1 else concatenate(batches)


def _prefetch_factor(recipe: Plan, share: int, finish: bool) -> int:
    """Batches that each worker may have ready: as many as fit into shared memory. A worker that finds it full never answers.

    Args:
        recipe: views, image sizes and number of workers.
        share: images of a batch.
        finish: whether the workers make finished views (float32) or crops (uint8).

    Raises:
        OutputError: not one batch for each worker fits.
    """
    views, workers = recipe.views, recipe.train.num_workers
    pixels = views.count * recipe.data.image_size**2 + (views.local.count * views.local.size**2 if views.local else 0)
    batch = share * 3 * pixels * (4 if finish else 1) + (1 << 16)  # labels and row numbers
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this machine share the memory
    free = shutil.disk_usage(_SHARED_MEMORY).free / ranks if _SHARED_MEMORY.is_dir() else math.inf
    fit = int(min(_MAX_PREFETCH, (free / batch - 2) // workers))  # the training loop holds two
    if fit < 1:
        room = f"{(workers + 2) * batch / 1e6:.1f} MB are needed for batches of {workers} workers, {free / 1e6:.1f} MB are free"
        raise OutputError(
            f"{_SHARED_MEMORY}: too little shared memory: {room}; enlarge it (docker run --shm-size), or lower train.num_workers"
        )
    return fit


# --- loaders --------------------------------------------------------------------------------------------------------------------------


class _Steps(Sampler[tuple[int, list[int]]]):
    """Epoch and row numbers of this rank's share of the global batch, for each step of a range."""

    def __init__(self, n: int, recipe: Plan, steps: range, rank: int, world: int) -> None:
        self.n, self.batch, self.seed, self.steps, self.rank, self.world = n, recipe.train.batch_size, recipe.seed, steps, rank, world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        per_epoch, share = self.n // self.batch, self.batch // self.world
        order: list[int] = []
        for step in self.steps:
            epoch, position = divmod(step, per_epoch)
            if not order or position == 0:
                order = torch.randperm(self.n, generator=rng.generator(self.seed, "order", epoch)).tolist()
            start = position * self.batch + self.rank * share
            yield epoch, order[start : start + share]


def steps_of_an_epoch(source: Source, recipe: Plan) -> int:
    """Number of whole batches in an epoch.

    Raises:
        DataError: there is none.
    """
    steps = source.length // recipe.train.batch_size
    if steps < 1:
        raise DataError(f"{source.length} training images are fewer than one batch; lower train.batch_size = {recipe.train.batch_size}")
    return steps


def make_loader(source: Source, recipe: Plan, steps: range, rank: int = 0, world: int = 1, finish: bool = True) -> DataLoader[Batch]:
    """Batches of the given steps, across epochs, for one rank. Iterate inside `Batches`, which ends the workers.

    Args:
        source: training images.
        recipe: batch size, workers, views, data section and seed.
        steps: the steps to make.
        rank, world: number of this process, and how many there are.
        finish: make finished views; otherwise only what single images need, and `Augment` makes the rest on a device.

    Raises:
        DataError: fewer images than one batch.
        OutputError: too little shared memory for the batches of the workers.

    Example:
        >>> from rlpjepa_zoo import Recipe
        >>> from rlpjepa_zoo.data.sources import open_source
        >>> recipe = Recipe.load("digits", ["train.num_workers=0", "train.batch_size=16", "data.image_size=8"])
        >>> with Batches(make_loader(open_source(recipe.data), recipe, range(1))) as batches:
        ...     batches.next().images[0].shape
        torch.Size([2, 16, 3, 8, 8])
    """
    per_epoch = steps_of_an_epoch(source, recipe)
    idle = not finish and isinstance(source.train, Decoded) and source.train.stack is not None  # batches are slices of memory
    workers = 0 if idle else recipe.train.num_workers
    common: dict[str, Any] = {
        "num_workers": workers, "pin_memory": torch.cuda.is_available(), "worker_init_fn": ignore_signals if workers else None,
        "prefetch_factor": _prefetch_factor(recipe, recipe.train.batch_size // world, finish) if workers else None,
        "generator": torch.Generator(), "batch_size": None,
    }  # fmt: skip
    if not isinstance(source.train, Images):
        return DataLoader(StreamedBatches(source.train.stream, recipe, steps, per_epoch, rank, world, finish), **common)
    sampler: Any = _Steps(source.length, recipe, steps, rank, world)
    limit = 60 * recipe.train.loader_timeout_minutes if workers else 0  # not for streams: a resumed one may skip rows for hours
    return DataLoader(IndexedBatches(source.train, recipe, finish), sampler=sampler, timeout=limit, **common)


def views_of(source: Images, recipe: Plan, rows: range, batch: int) -> DataLoader[Batch]:
    """Finished views of these rows as in epoch 0, in order, `batch` images at a time. Iterate inside `Batches`, which ends the workers."""
    keys: Any = [(0, list(rows[i : i + batch])) for i in range(0, len(rows), batch)]
    workers = recipe.train.num_workers
    return DataLoader(
        IndexedBatches(source, recipe, True), batch_size=None, sampler=keys, num_workers=workers, generator=torch.Generator(),
        worker_init_fn=ignore_signals if workers else None, prefetch_factor=_prefetch_factor(recipe, batch, True) if workers else None,
    )  # fmt: skip


def rows_loader(dataset: Dataset[Batch], n: int, recipe: Plan, steps: range, rank: int, world: int) -> DataLoader[Batch]:
    """Batches of the given steps, for one rank, from a data set that makes them of (epoch, rows) without workers."""
    sampler: Any = _Steps(n, recipe, steps, rank, world)
    return DataLoader(dataset, batch_size=None, sampler=sampler, generator=torch.Generator())
