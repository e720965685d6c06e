"""What a run keeps: decoded images in memory, and features of random views that a frozen backbone has encoded once, in memory and on disk.

Features on disk serve a resume and the next run with the same backbone, images and views, such as one with another density. They are below
RLPJEPA_CACHE (default ~/.cache/rlpjepa_zoo) and take at most RLPJEPA_CACHE_GB (default 20; 0 keeps none); the ones used longest ago go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...config.pretrain import Recipe
from ...core import distributed, files, rng
from ...data.batch import Batch
from ...data.images import Images
from ...data.loader import Batches, views_of
from ...data.memory import decode_to_memory
from ...data.sources import Source, fingerprint
from ...errors import DataError, OutputError, RecipeError, UsageError, first_line
from ...ops.memory import reused_memory
from ...ops.tensors import hash_tensors
from ...progress import progress_bar
from ..resume import environment
from .task import Autocast

__all__ = ["CachedViews", "cache_views", "decode_small_sets"]

log = logging.getLogger("rlpjepa_zoo")


def decode_small_sets(source: Source, gigabytes: float, progress: bool) -> Source:
    """Images for training and evaluation, each decoded in memory if it needs at most so many gigabytes; streams stay as they are."""
    if not isinstance(source.train, Images):
        return source
    held_out = source.eval and decode_to_memory(source.eval, gigabytes * 2**30, progress)
    return source._replace(train=decode_to_memory(source.train, gigabytes * 2**30, progress), eval=held_out)


class CachedViews(Dataset[Batch]):
    """Batches of features (V, b, F) float32 instead of views.

    Args:
        features: (N, n, F) of the n views of each image, float32 or float16.
        labels: (N,), -1 where unknown.
        views: V, number of views of each image in a step, at most n.
        seed: of the run; the views drawn are a function of (seed, epoch, row).

    Example:
        >>> cached = CachedViews(torch.zeros(10, 8, 4), torch.zeros(10, dtype=torch.long), views=2, seed=0)
        >>> cached[3, [5, 7, 1]].images[0].shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, features: Tensor, labels: Tensor, views: int, seed: int) -> None:
        self.features, self.labels, self.views, self.seed = features, labels, views, seed

    def __getitem__(self, key: tuple[int, list[int]]) -> Batch:
        epoch, numbers = key
        rows = torch.tensor(numbers)
        features = self.features[rows[:, None], self.drawn(epoch, rows)]
        return Batch([features.transpose(0, 1).float().contiguous()], self.labels[rows], rows, epoch, [])

    def drawn(self, epoch: int, rows: Tensor) -> Tensor:
        """Numbers (b, V) of the views of these rows in an epoch, all different; all of them in order if V = n."""
        n = self.features.shape[1]
        if n == self.views:
            return torch.arange(n).expand(len(rows), n)
        return rng.mix(rng.key(self.seed, "cached", epoch), rows[:, None], torch.arange(n)).argsort(1)[:, : self.views]


def cache_views(
    encoder: Any, source: Source, recipe: Recipe, autocast: Autocast, memory_format: torch.memory_format, progress: bool
) -> tuple[CachedViews, list[tuple[int, str]], float]:
    """Encode `encoder.cached_views` views of every training image, those of epoch 0. Each rank encodes its share; all ranks keep all.

    Args:
        encoder: with a frozen backbone.
        source, recipe: of the run.
        autocast: context for the precision of the forward passes.
        memory_format: of the images.
        progress: show a progress bar on stderr.

    Returns:
        The features; (row, reason) of the images that this rank could not read, another image takes the place of each; and the seconds
        that encoding took, in this run or in the one whose features are read from disk.

    Raises:
        RecipeError: the features need more than `data.cache_gb`.
        DataError: no image can be read.
    """
    count, n, width = recipe.encoder.cached_views or 0, len(source.images), encoder.config.features
    size, allowed = 4 * n * count * width / 2**30, recipe.data.cache_gb
    if size / 2 > allowed:
        needed = f"{count} views of {n} images with {width} features need {size / 2:.3g} GB in float16, data.cache_gb is {allowed:g}"
        raise RecipeError(f"encoder.cached_views: {needed}; raise that, lower encoder.cached_views, or set it to null")
    dtype = torch.float32 if size <= allowed else torch.float16
    _limit()
    chunk = max(1, recipe.train.batch_size // count)
    path = _folder() / f"{_key(encoder, source, recipe, chunk, dtype, memory_format)}.safetensors"
    started, found = time.monotonic(), _read(path)
    if all(distributed.gather_objects(found is not None)) and found is not None:
        result, how = found, f"read from {path}"
    else:
        result = _encode(encoder, source, recipe, autocast, memory_format, progress, chunk, dtype)
        result = result._replace(seconds=time.monotonic() - started)
        how = f"in {result.seconds:.0f} s"
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of each machine
            _write(path, result)
    log.info(
        "cached features: %d views of %d images, %d wide, %s, %.3g GB, %s",
        count, n, width, str(dtype).removeprefix("torch."), result.features.nbytes / 2**30, how,
    )  # fmt: skip
    return CachedViews(result.features, result.labels, recipe.views.count, recipe.seed), result.bad, result.seconds


class _Encoded(NamedTuple):
    """Features (N, n, F) and labels (N,) of all images, the unreadable ones, and the seconds that encoding took."""

    features: Tensor
    labels: Tensor
    bad: list[tuple[int, str]]
    seconds: float = 0.0


def _encode(
    encoder: Any, source: Source, recipe: Recipe, autocast: Autocast, memory_format: torch.memory_format, progress: bool, chunk: int,
    dtype: torch.dtype,
) -> _Encoded:  # fmt: skip
    """Encode the views, `chunk` images at a time; arguments as of `cache_views`."""
    count, n, width, world = recipe.encoder.cached_views or 0, len(source.images), encoder.config.features, distributed.world_size()
    mine = range(distributed.rank(), n, world)
    failure, bad = None, list[tuple[int, str]]()
    features, labels = torch.empty(len(mine), count, width, dtype=dtype), torch.empty(len(mine), dtype=torch.long)
    try:
        loader, at = views_of(source.images, recipe.with_views(count), mine, chunk), 0
        bar = progress_bar(f"encode {count} views of each", len(mine), hidden=not progress)
        with Batches(loader) as batches, bar, torch.no_grad(), reused_memory(encoder.device):
            while at < len(mine):
                batch = batches.next()
                x = batch.images[0].flatten(0, 1).to(encoder.device).contiguous(memory_format=memory_format)
                with autocast():
                    encoded = encoder.features(x).unflatten(0, (count, -1)).transpose(0, 1)
                stop = at + len(batch.labels)
                features[at:stop], labels[at:stop], at = encoded.to("cpu", dtype), batch.labels, stop
                bad += batch.bad
                bar.update(len(batch.labels))
    except DataError as error:
        failure = error
    distributed.raise_on_all_ranks(failure)
    order = torch.from_numpy(np.concatenate([np.arange(rank, n, world) for rank in range(world)])).argsort()
    features, labels = (distributed.gather_rows(rows.to(encoder.device)).cpu()[order] for rows in (features, labels))
    return _Encoded(features, labels, [entry for entries in distributed.gather_objects(bad) for entry in entries])


# --- features on disk -------------------------------------------------------------------------------------------------------------------


def _folder() -> Path:
    return Path(os.environ.get("RLPJEPA_CACHE") or "~/.cache/rlpjepa_zoo").expanduser() / "features"


def _limit() -> float:
    """Bytes that the folder may take."""
    given = os.environ.get("RLPJEPA_CACHE_GB") or "20"
    try:
        return float(given) * 2**30
    except ValueError:
        raise UsageError(f"RLPJEPA_CACHE_GB: expected a number of GB, got '{given}'") from None


def _key(encoder: Any, source: Source, recipe: Recipe, chunk: int, dtype: torch.dtype, memory_format: torch.memory_format) -> str:
    """Names all that the bits of the features depend on."""
    digest, data = hashlib.sha256(), recipe.data
    about = {
        "views": recipe.with_views(recipe.encoder.cached_views or 0).views.model_dump(mode="json"), "seed": recipe.seed,
        "preprocessing": [data.image_size, data.mean, data.std, data.interpolation], "precision": recipe.train.precision,
        "computed": [chunk, str(dtype), str(memory_format), encoder.device.type, environment()],
        "images": [fingerprint(source), source.images.identity], "backbone": [encoder.config.architecture, encoder.config.model_args],
    }  # fmt: skip
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    hash_tensors(digest, encoder.backbone.state_dict())
    return digest.hexdigest()[:32]


def _digest(features: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256()
    hash_tensors(digest, {"features": features, "labels": labels})
    return digest.hexdigest()


def _read(path: Path) -> _Encoded | None:
    """Features that an earlier run has kept, if they are whole."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            about, features, labels = file.metadata() or {}, file.get_tensor("features"), file.get_tensor("labels")
        if _digest(features, labels) != about.get("sha256"):
            raise ValueError("differs from its sha256")
        path.touch()  # used now
        bad = [(int(row), str(reason)) for row, reason in json.loads(about["bad"])]
        return _Encoded(features, labels, bad, float(about.get("seconds", 0)))
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        log.warning("%s: not used, the views are encoded again (%s)", path, first_line(error))
        return None


def _write(path: Path, result: _Encoded) -> None:
    """Keep features on disk, if the cache may hold them and the disk has room for twice as much; a failure is a warning."""
    limit, size = _limit(), result.features.nbytes
    if size > limit:
        log.info("features are not kept on disk: %.3g GB are more than RLPJEPA_CACHE_GB = %.3g", size / 2**30, limit / 2**30)
        return
    about = {"sha256": _digest(result.features, result.labels), "bad": json.dumps(result.bad), "seconds": f"{result.seconds:.1f}"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < 2 * size:
            raise OutputError(f"{path.parent}: less than {2 * size / 2**30:.3g} GB are free")
        with files.atomic_file(path) as aside:
            safetensors.torch.save_file({"features": result.features, "labels": result.labels}, aside, about)
        others = sorted((p for p in path.parent.glob("*.safetensors") if p != path), key=lambda p: p.stat().st_mtime, reverse=True)
        for other in others:
            size += other.stat().st_size
            if size > limit:
                with contextlib.suppress(FileNotFoundError):  # another run has removed it
                    other.unlink()
    except (OSError, safetensors.SafetensorError) as error:
        log.warning("features are not kept on disk: %s", first_line(error))
