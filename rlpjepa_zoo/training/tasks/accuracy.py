"""Accuracy of a classifier on labelled images."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import torch
import torch.nn as nn

from ...core import distributed
from ...data.images import Images
from ...data.preprocess import batched
from ...errors import DataError
from ...models.classifier import Classifier
from ...models.inference import image_batches

__all__ = ["TOP", "accuracy"]

TOP = 5
"""Number of most probable classes that top-5 accuracy considers; with at most so many classes it is always 1."""


@torch.no_grad()
def accuracy(classifier: Classifier, images: Images, batch_size: int = 256, num_workers: int = 0) -> dict[str, float]:
    """Accuracy and loss of a classifier; each rank classifies its share of the images, and the counts are exact.

    Args:
        classifier: used in evaluation mode.
        images: all with a label.
        batch_size, num_workers: of reading and classifying.

    Returns:
        top1; top5 with more than five classes; loss, the mean cross-entropy in nats; n_test, the number of readable images.

    Raises:
        DataError: no image can be read.
    """
    mine = images.take(np.arange(distributed.rank(), len(images), distributed.world_size()))
    n, first, top, loss = 0, 0, 0, 0.0
    rows = batched(mine.rows(), batch_size)
    loop = image_batches(rows, classifier.config.preprocess, classifier.device, num_workers=num_workers, on_error="skip")
    with classifier.evaluating(), closing(loop) as batches:
        for batch in batches:
            if batch.items:
                logits = classifier(batch.x).float().cpu().double()
                y = torch.tensor([row.columns.get("label", -1) for row in batch.items])
                correct = logits.topk(min(TOP, logits.shape[1])).indices == y[:, None]
                n, first, top = n + len(y), first + int(correct[:, 0].sum()), top + int(correct.sum())
                loss += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
    n, first, top, loss = (sum(values) for values in zip(*distributed.gather_objects((n, first, top, loss)), strict=True))
    if not n:
        raise DataError("none of the images for evaluation can be read")
    return {"top1": first / n, **({"top5": top / n} if len(classifier.classes) > TOP else {}), "loss": loss / n, "n_test": n}
