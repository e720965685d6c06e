"""What a run keeps in memory: decoded images, and features of random views that a frozen backbone has encoded once."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ...config.pretrain import Recipe
from ...core import distributed, rng
from ...data.batch import Batch
from ...data.images import Images
from ...data.loader import Batches, views_of
from ...data.memory import decode_to_memory
from ...data.sources import Source
from ...errors import DataError, RecipeError
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
) -> tuple[CachedViews, list[tuple[int, str]]]:
    """Encode `encoder.cached_views` views of every training image, those of epoch 0. Each rank encodes its share; all ranks keep all.

    Args:
        encoder: with a frozen backbone.
        source, recipe: of the run.
        autocast: context for the precision of the forward passes.
        memory_format: of the images.
        progress: show a progress bar on stderr.

    Returns:
        The features, and (row, reason) of the images that this rank could not read; another image takes the place of each.

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
    started, world = time.monotonic(), distributed.world_size()
    mine = range(distributed.rank(), n, world)
    failure, bad = None, list[tuple[int, str]]()
    features, labels = torch.empty(len(mine), count, width, dtype=dtype), torch.empty(len(mine), dtype=torch.long)
    try:
        chunk = max(1, recipe.train.batch_size // count)
        loader, at = views_of(source.images, recipe.with_views(count), mine, chunk), 0
        with Batches(loader) as batches, tqdm(total=len(mine), desc="encode", unit="image", disable=not progress) as bar, torch.no_grad():
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
    log.info(
        "cached features: %d views of %d images, %d wide, %s, %.3g GB, in %.0f s",
        count, n, width, str(dtype).removeprefix("torch."), features.nbytes / 2**30, time.monotonic() - started,
    )  # fmt: skip
    return CachedViews(features, labels, recipe.views.count, recipe.seed), bad
