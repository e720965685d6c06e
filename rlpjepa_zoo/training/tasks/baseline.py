"""What fine-tuning has to beat: the nearest class mean of the features it starts from, which needs no training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ...core import distributed, rng
from ...data.images import Images
from ...data.preprocess import batched
from ...errors import DataError
from ...models.classifier import Classifier
from ...models.inference import image_batches

__all__ = ["nearest_mean"]

_MOST = 5000
"""Training images that the means are taken over; more change them little."""


@torch.no_grad()
def nearest_mean(
    classifier: Classifier, train: Images, evaluation: Images, seed: int = 0, batch_size: int = 256, num_workers: int = 0
) -> float:
    """Top-1 accuracy of the nearest class mean (cosine) of the input of the linear layer; each rank encodes its share.

    Args:
        classifier: before the first step; used in evaluation mode.
        train: labelled images, of which at most 5,000 are drawn for the means.
        evaluation: labelled images; all of them are classified.
        seed: of the draw.
        batch_size, num_workers: of reading and encoding.

    Raises:
        DataError: no image can be read.
    """
    if len(train) > _MOST:
        train = train.take(torch.randperm(len(train), generator=rng.generator(seed, "baseline"))[:_MOST].sort().values.numpy())
    sums = torch.zeros(len(classifier.classes), classifier.config.features)
    for features, labels in _encoded(classifier, train, batch_size, num_workers):
        sums.index_add_(0, labels, nn.functional.normalize(features))
    sums = distributed.mean_over_ranks(sums.to(classifier.device)).cpu()
    known = sums.any(1).nonzero()[:, 0]
    means, right, n = nn.functional.normalize(sums[known]), 0, 0
    for features, labels in _encoded(classifier, evaluation, batch_size, num_workers) if len(known) else ():
        right += int((known[(features @ means.T).argmax(1)] == labels).sum())
        n += len(labels)
    right, n = (sum(values) for values in zip(*distributed.gather_objects((right, n)), strict=True))
    if not n:
        raise DataError("none of the images for training, or none for evaluation, can be read")
    return right / n


def _encoded(classifier: Classifier, images: Images, batch_size: int, num_workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (n, F) float32 and (n,) of this rank's readable images, on the CPU."""
    mine = images.take(np.arange(distributed.rank(), len(images), distributed.world_size()))
    rows = batched(mine.rows(), batch_size)
    loop = image_batches(rows, classifier.config.preprocess, classifier.device, num_workers=num_workers, on_error="skip")
    with classifier.evaluating(), closing(loop) as batches:
        for batch in batches:
            if batch.items:
                yield classifier.features(batch.x).float().cpu(), torch.tensor([row.columns["label"] for row in batch.items])
