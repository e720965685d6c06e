"""Accuracy of a classifier on labelled images: during training, and as a report with intervals and classes."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ...core import distributed
from ...data.images import Images
from ...data.preprocess import batched
from ...data.sources.classes import with_class_numbers
from ...errors import DataError, NonFiniteError
from ...evaluation.intervals import share_interval
from ...models.classifier import Classifier
from ...models.inference import default_batch_size, image_batches
from ...progress import progress_bar

__all__ = ["TOP", "Classified", "accuracy", "classify", "evaluate_classifier"]

log = logging.getLogger("rlpjepa_zoo")

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
    with closing(_logits(classifier, mine, batch_size, num_workers)) as batches:
        for logits, y, _ in batches:
            correct = logits.topk(min(TOP, logits.shape[1])).indices == y[:, None]
            n, first, top = n + len(y), first + int(correct[:, 0].sum()), top + int(correct.sum())
            loss += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
    n, first, top, loss = (sum(values) for values in zip(*distributed.gather_objects((n, first, top, loss)), strict=True))
    if not n:
        raise DataError("none of the images for evaluation can be read")
    return {"top1": first / n, **({"top5": top / n} if len(classifier.classes) > TOP else {}), "loss": loss / n, "n_test": n}


class Classified(NamedTuple):
    """What a classifier says about n labelled images."""

    rows: np.ndarray[Any, Any]
    """Numbers of the images that can be read, ascending."""
    y: np.ndarray[Any, Any]
    """(n,) classes."""
    predicted: np.ndarray[Any, Any]
    """(n,) most probable classes."""
    probability: np.ndarray[Any, Any]
    """(n,) of the most probable class."""
    in_top: np.ndarray[Any, Any]
    """(n,) whether the class is among the `TOP` most probable."""
    loss: np.ndarray[Any, Any]
    """(n,) cross-entropy in nats."""


@torch.no_grad()
def classify(
    classifier: Classifier, images: Images, batch_size: int | None = None, num_workers: int = 0, progress: bool = False
) -> Classified:
    """Classify labelled images in evaluation mode; unreadable ones are left out and logged.

    Args:
        classifier: the classifier.
        images: with class numbers of the classifier, see `rlpjepa_zoo.data.sources.classes.with_class_numbers`.
        batch_size: images of a forward pass; chosen by the size of the input when None.
        num_workers: threads that decode.
        progress: show a progress bar on a terminal.

    Raises:
        DataError: no image can be read.
        NonFiniteError: the classifier gave NaN or infinity.
    """
    numbered, parts = Images(images.read, range(len(images)), images.labels), list[tuple[Any, ...]]()
    failures = list[tuple[Any, str]]()
    size = batch_size or default_batch_size(classifier.config.preprocess.size, classifier.device)
    with closing(_logits(classifier, numbered, size, num_workers, progress, failures)) as batches:
        for logits, y, rows in batches:
            if not logits.isfinite().all():
                raise NonFiniteError("the classifier gave NaN or infinity; its weights are damaged or diverged")
            top, loss = logits.topk(min(TOP, logits.shape[1])).indices, nn.functional.cross_entropy(logits, y, reduction="none")
            parts.append((rows, y, top[:, 0], logits.softmax(1).amax(1), (top == y[:, None]).any(1), loss))
    first = failures[0][1].removeprefix(f"{failures[0][0]}: ") if failures else ""
    if not parts:
        raise DataError(f"none of the images can be read; the first: {first}")
    if failures:
        log.warning("%d of %d test images cannot be read and are left out; the first: %s", len(failures), len(images), first)
    return Classified(*(np.concatenate([np.asarray(part) for part in column]) for column in zip(*parts, strict=True)))


def _logits(
    classifier: Classifier, images: Images, batch_size: int, num_workers: int, progress: bool = False,
    failures: list[tuple[Any, str]] | None = None,
) -> Generator[tuple[Tensor, Tensor, list[Any]], None, None]:  # fmt: skip
    """Logits (n, C) float64, labels (n,) and ids of the readable images of each batch; `failures` receives the others."""
    bar = progress_bar("classify", len(images), hidden=not progress, leave=False)
    options: dict[str, Any] = {"num_workers": num_workers, "on_error": "skip", "progress": bar.update}
    loop = image_batches(batched(images.rows(), batch_size), classifier.config.preprocess, classifier.device, **options)
    with classifier.evaluating(), bar, closing(loop) as batches:
        for batch in batches:
            if failures is not None:
                failures += batch.failures
            if batch.items:
                y = torch.tensor([row.columns.get("label", -1) for row in batch.items])
                yield classifier(batch.x).float().cpu().double(), y, batch.ids


# --- the report -----------------------------------------------------------------------------------------------------------------------


def evaluate_classifier(
    classifier: Classifier, images: Images, batch_size: int | None = None, num_workers: int = 0, progress: bool = False, note: str = ""
) -> dict[str, Any]:
    """Accuracy of a classifier on labelled images, with 95 % intervals (Wilson), of all images and of each class.

    Args:
        classifier: used in evaluation mode.
        images: labelled test images; classes are matched by name, see `rlpjepa_zoo.data.sources.classes.with_class_numbers`.
        batch_size, num_workers, progress: as of `classify`.
        note: where the images come from, for the protocol.

    Returns:
        A dict that JSON can hold: n_test; top1, top1_low, top1_high; top5 and its interval with more than five classes; loss, the mean
        cross-entropy in nats; mean_per_class, the mean of the accuracies of the classes; most_frequent, the share of the most frequent
        class; classes: name -> n, accuracy, low, high; protocol.

    Raises:
        DataError: no labels, no image of a class of the classifier, or no readable image.
        NonFiniteError: the classifier gave NaN or infinity.
    """
    images = with_class_numbers(images, classifier.classes)
    found = classify(classifier, images, batch_size, num_workers, progress)
    right, n, number = found.predicted == found.y, len(found.y), len(classifier.classes)
    counts = np.bincount(found.y, minlength=number)
    of_class = np.bincount(found.y, right, number)
    report: dict[str, Any] = {"n_test": n, **_share("top1", right), **(_share("top5", found.in_top) if number > TOP else {})}
    report |= {"loss": float(found.loss.mean()), "mean_per_class": float((of_class[counts > 0] / counts[counts > 0]).mean())}
    report["most_frequent"] = int(counts.max()) / n
    report["classes"] = {
        classifier.classes[k]: {"n": int(counts[k])} | _share("accuracy", np.arange(counts[k]) < of_class[k], "")
        for k in np.flatnonzero(counts)
    }
    sentences = ["every image classified once, evaluation mode, 95 % intervals of shares by Wilson", *([note] if note else [])]
    return report | {"protocol": "; ".join([*sentences, "one training run"])}


def _share(name: str, right: np.ndarray[Any, Any], prefix: str | None = None) -> dict[str, float]:
    """A share of images and its interval under the keys of a report."""
    share, prefix = float(right.mean()), f"{name}_" if prefix is None else prefix
    low, high = share_interval(share, len(right))
    return {name: share, f"{prefix}low": low, f"{prefix}high": high}
