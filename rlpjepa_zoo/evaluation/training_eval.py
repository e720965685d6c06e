"""The evaluation that a training run does between epochs: density of z, and kNN if there are labels; and the shift for an exact density."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.pretrain import Recipe
from ..core import distributed, rng
from ..data.images import Images
from ..data.sources import Source
from ..errors import DataError
from ..models.encoder import SparseEncoder
from ..sparse.topk import between
from .encoding import FrozenFeatures, encode
from .metrics import always_on, dead, l0, l1
from .probes.knn import knn_accuracy

__all__ = ["density_shift", "during_training", "has_labels", "shift_on"]

_MOST_VALUES = 1 << 26
"""Values of z that `density_shift` looks at; with more, it takes every second image, every third, ..."""
Context = Callable[[], AbstractContextManager[Any]]
"""Opens a context for the precision of forward passes."""


def has_labels(source: Source) -> bool:
    """Whether the images of a source have the labels that `during_training` needs to measure kNN."""
    bank = source.train if isinstance(source.train, Images) else source.eval
    queries = source.eval if source.eval is not None else bank
    return all(images is not None and images.labels is not None and bool((images.labels >= 0).any()) for images in (bank, queries))


@torch.no_grad()
def density_shift(
    encoder: SparseEncoder, source: Source, recipe: Recipe, density: float, autocast: Context = nullcontext, cache: FrozenFeatures | None = None
) -> float:  # fmt: skip
    """Number to subtract from the biases of the last layer for a density on the images that vote in `during_training`.

    Args:
        encoder, source, recipe, autocast, cache: as of `during_training`.
        density: share of active dimensions, in (0, 1).

    Returns:
        The shift, equal on all ranks; 0 for a stream without evaluation images.

    Raises:
        DataError: none of the images can be read.
    """
    if (bank := _bank(source, recipe)) is None:
        return 0.0
    features, _, _ = _encode_on_ranks(encoder, bank, "bank", recipe, autocast, cache)
    shift = torch.tensor(shift_on(encoder, features, density), device=encoder.device)
    distributed.from_main(shift)
    return float(shift)


@torch.no_grad()
def shift_on(encoder: SparseEncoder, features: Tensor, density: float) -> float:
    """Number to subtract from the biases of the last layer for a density on images, from their features (n, F); computed in float32."""
    rows = features[:: math.ceil(len(features) * encoder.config.dim / _MOST_VALUES)]
    with encoder.evaluating():
        before = torch.cat([encoder.before_relu(block.to(encoder.device)).cpu() for block in rows.split(1024)]).flatten()
    return between(before.numpy(), round(density * len(before)))


@torch.no_grad()
def during_training(
    encoder: SparseEncoder, source: Source, recipe: Recipe, autocast: Context = nullcontext, cache: FrozenFeatures | None = None
) -> dict[str, float]:
    """Density in evaluation mode and, if there are labels, kNN accuracy of features and z; every rank encodes its share of the rows.

    Args:
        encoder, source, recipe: of the run.
        autocast: context for the precision of the forward passes.
        cache: of a run with a frozen backbone, the features of earlier calls.

    Returns:
        l0_eval, l1_eval, dead_eval, always_on_eval, n_eval (images of these), knn_features, knn_z; empty for a stream without evaluation images.

    Raises:
        DataError: none of the evaluation images can be read.
    """
    probe = recipe.probe
    if (bank := _bank(source, recipe)) is None:
        return {}
    features, z, y = _encode_on_ranks(encoder, bank, "bank", recipe, autocast, cache)
    queries = source.eval if isinstance(source.train, Images) else None
    leave_one_out = queries is None
    test_features, test_z, test_y = (features, z, y)
    if queries is not None:
        queries = _sample(queries, probe.eval_images, recipe, "eval")
        test_features, test_z, test_y = _encode_on_ranks(encoder, queries, "queries", recipe, autocast, cache)
    measures = {"l0": l0, "l1": l1, "dead": dead, "always_on": always_on}
    results = {f"{name}_eval": float(measure(test_z)) for name, measure in measures.items()} | {"n_eval": len(test_z)}
    if int((y >= 0).sum()) > 1 and bool((test_y >= 0).any()):
        for name, rows, test_rows in (("features", features, test_features), ("z", z, test_z)):
            results[f"knn_{name}"] = knn_accuracy(rows, y, test_rows, test_y, probe.knn_k, probe.knn_temperature, leave_one_out)
    return results


def _bank(source: Source, recipe: Recipe) -> Images | None:
    """The images that vote: of a sample of the training images; of a stream, the evaluation images, if there are any."""
    if isinstance(source.train, Images):
        return _sample(source.train, recipe.probe.bank, recipe, "bank")
    return None if source.eval is None else _sample(source.eval, recipe.probe.eval_images, recipe, "eval")


def _sample(images: Images, most: int, recipe: Recipe, purpose: str) -> Images:
    if len(images) <= most:
        return images
    return images.take(torch.randperm(len(images), generator=rng.generator(recipe.seed, purpose))[:most].sort().values.numpy())


def _encode_on_ranks(
    encoder: SparseEncoder, images: Images, part: str, recipe: Recipe, autocast: Context, cache: FrozenFeatures | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, z and labels of all images on every rank, on the CPU."""
    mine = images.take(np.arange(distributed.rank(), len(images), distributed.world_size()))
    with autocast():
        options: Any = {"allow_empty": True, "cache": cache, "part": part}  # this rank's share may be empty
        encoded = encode(encoder, mine, max(64, recipe.train.batch_size // 2), recipe.train.num_workers, **options)
    features, z, labels = (distributed.gather_rows(tensor.to(encoder.device)).cpu() for tensor in encoded)
    if not len(z):
        raise DataError("none of the images for evaluation can be read")
    return features, z, labels
