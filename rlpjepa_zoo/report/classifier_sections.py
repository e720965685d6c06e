"""Sections of a report that measure the published classifier: accuracy of each class, confusions, mistakes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..data.images import Images
from ..evaluation.diagnostics import Array
from ..evaluation.intervals import share_interval
from ..training.tasks.accuracy import Classified
from .charts import Level, ranked
from .page import Figure, Section, Table, Tile, TileRow, percent, picture, thumbnail

__all__ = ["ClassifiedSample", "classes_section", "confusions_section", "mistakes_section"]

_ROWS = 30
"""Classes and confusions in a table, at most."""


class ClassifiedSample(NamedTuple):
    """Predictions for the images that the report measures."""

    found: Classified
    images: Images
    """The n classified images."""
    classes: tuple[str, ...]
    """Names."""
    split: str
    """evaluation or training."""
    unreadable: int
    """Drawn images that cannot be read."""
    info: dict[str, Any]
    """`config.info` of the classifier."""

    @property
    def size(self) -> str:
        """Number and kind of images, for captions."""
        return f"n = {len(self.images):,} {self.split} images"

    @property
    def right(self) -> Array:
        """(n,) whether the most probable class is the class."""
        return np.asarray(self.found.predicted == self.found.y)

    @property
    def numbers(self) -> Array:
        """Classes with an image, ascending."""
        return np.unique(self.found.y)

    @property
    def counts(self) -> Array:
        """Images of each of `numbers`."""
        return np.unique(self.found.y, return_counts=True)[1]

    @property
    def accuracies(self) -> Array:
        """Accuracy of each of `numbers`."""
        return np.array([self.right[self.found.y == k].mean() for k in self.numbers])


def classes_section(sample: ClassifiedSample) -> Section:
    """Accuracy of each class, least accurate first."""
    accuracies, counts, rows = sample.accuracies, sample.counts, []
    order = np.argsort(accuracies, kind="stable")
    for k in order[:_ROWS]:
        low, high = share_interval(float(accuracies[k]), int(counts[k]))
        rows.append(
            [sample.classes[sample.numbers[k]], percent(float(accuracies[k])), f"{100 * low:.1f} to {100 * high:.1f}", f"{counts[k]:,}"]
        )
    left = f"; {len(order) - _ROWS:,} classes that are more accurate are not listed" if len(order) > _ROWS else ""
    share = float(sample.right.mean())
    chart = ranked(
        f"Accuracies of {len(order)} classes from {accuracies.max():.3f} down to {accuracies.min():.3f}; all images {share:.3f}.",
        accuracies, Level(f"all images: {share:.3f}", share), "accuracy", "classes, most accurate first",
    )  # fmt: skip
    table = Table(["class", "accuracy", "95 % interval", "images"], rows, f"Least accurate first; {sample.size}{left}")
    return Section(
        "Accuracy of each class", f"{sample.size}.", figures=[Figure("Accuracies, sorted", chart, f"{sample.size}.")], table=table
    )


def confusions_section(sample: ClassifiedSample) -> Section:
    """Pairs of classes that are taken for each other most often."""
    wrong = ~sample.right
    pairs, counts = np.unique(np.stack([sample.found.y[wrong], sample.found.predicted[wrong]], 1), axis=0, return_counts=True)
    if not len(pairs):
        return Section("Confusions", f"Every image was classified correctly; {sample.size}.")
    of_class = dict(zip(sample.numbers.tolist(), sample.counts.tolist(), strict=True))
    rows = [
        [sample.classes[y], sample.classes[taken], f"{count:,}", percent(count / of_class[y])]
        for (y, taken), count in [(pairs[k].tolist(), int(counts[k])) for k in np.argsort(-counts, kind="stable")[:_ROWS]]
    ]
    head = ["class", "taken for", "images", "of the class"]
    return Section("Confusions", f"{int(wrong.sum()):,} mistakes; {sample.size}.", table=Table(head, rows, "Most frequent first"))


def mistakes_section(sample: ClassifiedSample) -> Section:
    """The mistakes of which the classifier was surest."""
    wrong = np.flatnonzero(~sample.right)
    chosen = wrong[np.argsort(-sample.found.probability[wrong], kind="stable")][:21].tolist()
    if not chosen:
        return Section("Mistakes", "There are none.")
    rows = [
        TileRow("Mistakes of which the classifier was surest", [_tile(sample, row) for row in chosen[k : k + 7]])
        for k in range(0, len(chosen), 7)
    ]
    return Section(
        "Mistakes",
        f"The mistakes of which the classifier was surest: the class it took the image for, and the true class; {sample.size}.",
        tiles=rows,
    )


def _tile(sample: ClassifiedSample, row: int) -> Tile:
    taken, true = (sample.classes[part[row]] for part in (sample.found.predicted, sample.found.y))
    alt = f"image {sample.images.ids[row]}: {true}, taken for {taken}"
    return Tile(
        "wrong", picture(thumbnail(sample.images, row), alt), f"\u2717 {taken}", [f"is {true}", f"p = {sample.found.probability[row]:.2f}"]
    )
