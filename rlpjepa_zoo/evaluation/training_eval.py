"""The evaluation that a training run does between epochs: density of z, and kNN if there are labels."""

from __future__ import annotations

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
from .encoding import FrozenFeatures, encode
from .metrics import dead, l0, l1
from .probes.knn import knn_accuracy

__all__ = ["during_training", "has_labels"]


def has_labels(source: Source) -> bool:
    """Whether the images of a source have the labels that `during_training` needs to measure kNN."""
    bank = source.train if isinstance(source.train, Images) else source.eval
    queries = source.eval if source.eval is not None else bank
    return all(images is not None and images.labels is not None and bool((images.labels >= 0).any()) for images in (bank, queries))


@torch.no_grad()
def during_training(
    encoder: SparseEncoder, source: Source, recipe: Recipe, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    cache: FrozenFeatures | None = None,
) -> dict[str, float]:  # fmt: skip
    """Density in evaluation mode and, if there are labels, kNN accuracy of features and z; every rank encodes its share of the rows.

    Args:
        encoder, source, recipe: of the run.
        autocast: context for the precision of the forward passes.
        cache: of a run with a frozen backbone, the features of earlier calls.

    Returns:
        l0_eval, l1_eval, dead_eval, knn_features, knn_z; empty for a stream without evaluation images.

    Raises:
        DataError: none of the evaluation images can be read.
    """
    probe, batch = recipe.probe, max(64, recipe.train.batch_size // 2)

    def sample(images: Images, most: int, purpose: str) -> Images:
        if len(images) <= most:
            return images
        return images.take(torch.randperm(len(images), generator=rng.generator(recipe.seed, purpose))[:most].sort().values.numpy())

    def encode_on_ranks(images: Images, part: str) -> tuple[Tensor, Tensor, Tensor]:
        mine = images.take(np.arange(distributed.rank(), len(images), distributed.world_size()))
        with autocast():
            options: Any = {"allow_empty": True, "cache": cache, "part": part}  # this rank's share may be empty
            encoded = encode(encoder, mine, batch, recipe.train.num_workers, **options)
        features, z, labels = (distributed.gather_rows(tensor.to(encoder.device)).cpu() for tensor in encoded)
        if not len(z):
            raise DataError("none of the images for evaluation can be read")
        return features, z, labels

    if not isinstance(source.train, Images):
        bank, queries = source.eval and sample(source.eval, probe.eval_images, "eval"), None
    else:
        bank, queries = sample(source.train, probe.bank, "bank"), source.eval
    if bank is None:
        return {}
    features, z, y = encode_on_ranks(bank, "bank")
    leave_one_out = queries is None
    test_features, test_z, test_y = (features, z, y)
    if queries is not None:
        test_features, test_z, test_y = encode_on_ranks(sample(queries, probe.eval_images, "eval"), "queries")
    results = {"l0_eval": float(l0(test_z)), "l1_eval": float(l1(test_z)), "dead_eval": float(dead(test_z))}
    if int((y >= 0).sum()) > 1 and bool((test_y >= 0).any()):
        for name, rows, test_rows in (("features", features, test_features), ("z", z, test_z)):
            results[f"knn_{name}"] = knn_accuracy(rows, y, test_rows, test_y, probe.knn_k, probe.knn_temperature, leave_one_out)
    return results
