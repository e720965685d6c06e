"""Class numbers: of the labels of one part of a data set, of its evaluation part beside the training part, and of a classifier."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from ...errors import DataError
from ..images import ImageRows, Images

log = logging.getLogger("rlpjepa_zoo")

_MANY = 1000
"""Classes above which a warning is logged if most have one image."""


def number_classes(values: Any, names: Sequence[str] | None = None, column: str = "labels") -> tuple[list[int], list[str] | None]:
    """Class numbers 0 to n - 1 of labels of any kind, and the class names.

    Labels that are such numbers already, without a gap, stay as they are and need no names. Other integers, text and true/false are numbered
    in sorted order; their values are the class names. None, NaN and integers below 0 mean no label and become -1. A float or
    decimal is an integer if it has no fraction, because tables with missing labels store integers so.

    Args:
        values: one label per image; a sequence, array or tensor.
        names: class names, where the data set has them; the labels are indices of it then.
        column: name of the labels in messages.

    Raises:
        DataError: labels with a fraction, of several kinds, or of another type.

    Example:
        >>> number_classes(["dog", "cat", None, "dog"])
        ([1, 0, -1, 1], ['cat', 'dog'])
        >>> number_classes([1_000_000, 7, 7])
        ([1, 0, 0], ['7', '1000000'])
        >>> number_classes([2, 0, 1, -1])
        ([2, 0, 1, -1], None)
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    labels: list[Any] = [_label(value, column) for value in values]
    kinds = {type(label) for label in labels if label is not None}
    if len(kinds) > 1:
        examples = " and ".join(repr(next(label for label in labels if type(label) is kind)) for kind in sorted(kinds, key=str))
        raise DataError(f"{column}: class labels of several kinds, such as {examples}; expected integers, text, or true/false")
    if kinds <= {int}:
        labels = [None if label is None or label < 0 else label for label in labels]
    known = sorted({label for label in labels if label is not None})
    if names or known == list(range(len(known))) and kinds <= {int}:
        if not kinds <= {int}:
            raise DataError(f"{column}: expected class numbers, as the data set has class names; there is {known[0]!r}")
        return [-1 if label is None else label for label in labels], list(names) if names else None
    if len(known) > max(_MANY, len(labels) // 2):
        log.warning("%s: %d classes of %d images; if it does not hold classes, set data.label_column=none", column, len(known), len(labels))
    if kinds == {int}:
        log.info("%s: %d classes with labels from %d to %d are numbered from 0", column, len(known), known[0], known[-1])
    number = {label: k for k, label in enumerate(known)}
    return [-1 if label is None else number[label] for label in labels], [str(label) for label in known]


def _label(value: Any, column: str) -> int | str | bool | None:
    value = value.item() if hasattr(value, "item") else value
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return int(value)
    if not isinstance(value, int | str):
        shown = repr(value)[:40]
        raise DataError(f"{column}: expected class labels that are integers, text, or true/false; there is {shown}")
    return value


def warn_of_unknown_classes(part: str, unknown: Iterable[str], classes: Sequence[str]) -> None:
    """Log the classes of evaluation images that the training images do not have.

    Args:
        part: name of the evaluation part.
        unknown: class names that the training images do not have.
        classes: class names of the training images.
    """
    if names := sorted(unknown):
        shown, known = (", ".join(some[:5]) + (" ..." if len(some) > 5 else "") for some in (names, list(classes)))
        fix = "their images are not scored; name the classes of both parts alike"
        log.warning("%s: %s: no class of the training images (%s), so %s", part, shown, known, fix)


def match_classes(evaluation: Images | None, train: ImageRows, part: str) -> Images | None:
    """Evaluation images with the class numbers of the training images: equal names get equal numbers, other names get -1.

    If one part has class names and the other has none, numbers are matched with names that are numbers, and are left as they are beside
    other names.

    Args:
        evaluation: the evaluation images.
        train: the training images.
        part: name of the evaluation part in a warning.
    """
    if evaluation is None or evaluation.labels is None or evaluation.classes == train.classes:
        return evaluation
    classes, names = train.classes or _numbers(train, evaluation.classes), evaluation.classes or _numbers(evaluation, train.classes)
    if classes is None or names is None:
        return evaluation
    number = {name: k for k, name in enumerate(classes)}
    warn_of_unknown_classes(part, {names[k] for k in np.unique(evaluation.labels) if k >= 0} - number.keys(), classes)
    matched = copy.copy(evaluation)
    matched.labels = _renumbered(evaluation.labels, dict(enumerate(names)), number)
    matched.classes = train.classes
    return matched


def _numbers(images: ImageRows, others: Sequence[str] | None) -> list[str] | None:
    """The class numbers of images without class names, as text, if the names in the other part are numbers too."""
    if not isinstance(images, Images) or images.labels is None or not all(name.isdecimal() for name in others or ()):
        return None
    return [str(number) for number in range(int(images.labels.max(initial=-1)) + 1)]


def _renumbered(labels: np.ndarray[Any, Any], names: Mapping[int, str], number: Mapping[str, int]) -> np.ndarray[Any, Any]:
    """Labels with the numbers that other images or a classifier give to the names of their classes; -1 for unknown names and no label."""
    return np.array([number.get(names[k], -1) if k >= 0 else -1 for k in labels.tolist()], dtype=np.int64)


def with_class_numbers(images: Images, classes: Sequence[str]) -> Images:
    """The labelled images of classes that a classifier knows, with its class numbers and names.

    Classes are matched by name; where the images have no class names, their numbers are the names. If no name matches and one of the two has
    only numbers, classes are matched by number, provided that there are equally many.

    Args:
        images: the images.
        classes: names, in the order of the logits.

    Raises:
        DataError: no labels, or no class in common.

    Example:
        >>> images = Images([].__getitem__, ["a", "b", "c"], [0, 1, 2], ["bee", "ant", "cow"])
        >>> matched = with_class_numbers(images, ["ant", "bee"])
        >>> matched.ids, matched.labels.tolist()
        (['a', 'b'], [1, 0])
    """
    if images.labels is None or not (images.labels >= 0).any():
        raise DataError("evaluation needs labels; put the images of each class into a folder of its own, or name data.label_column")
    present = [int(k) for k in np.unique(images.labels) if k >= 0]
    names = {k: images.classes[k] if images.classes else str(k) for k in present}
    number = {name: k for k, name in enumerate(classes)}
    if not number.keys() & set(names.values()):
        count = len(images.classes) if images.classes else present[-1] + 1
        only_numbers = not images.classes or list(classes) == [str(k) for k in range(len(classes))]
        if not only_numbers or count != len(classes):
            ours = _some(images.classes or [*names.values()])
            raise DataError(f"no class in common: the images have {ours}, the classifier {_some(classes)}; name the classes of both alike")
        log.info("only one side has class names, so the %d classes of the images and of the classifier are matched by number", count)
        number = {name: k for k, name in names.items()}
    labels = _renumbered(images.labels, names, number)
    if unknown := sorted({names[int(k)] for k in images.labels[(labels < 0) & (images.labels >= 0)]}):
        count = int(((labels < 0) & (images.labels >= 0)).sum())
        log.warning("%d of %d test images are left out: the classifier does not know %s", count, len(labels), _some(unknown))
    if without := int((images.labels < 0).sum()):
        log.info("%d of %d test images have no label and are left out", without, len(labels))
    if not (labels >= 0).any():
        raise DataError(f"none of the {len(images)} test images is of a class of the classifier ({_some(classes)})")
    rows = np.flatnonzero(labels >= 0)
    chosen = images.take(rows)
    return Images(chosen.read, chosen.ids, labels[rows], classes)


def _some(names: Sequence[str]) -> str:
    """Number of classes and the first names."""
    return f"{len(names)} classes: {', '.join(map(str, names[:5]))}{' ...' if len(names) > 5 else ''}"
