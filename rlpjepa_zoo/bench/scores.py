"""Scores of each test image, as text, so that an interrupted comparison can go on."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..evaluation.probes.base import Array

__all__ = ["PerImage", "packed", "unpacked"]

PerImage = dict[tuple[str, str], dict[str, list[Array]]]
"""Scores of each test image in each repetition, by (measure, k) and method."""


def packed(scores: PerImage) -> list[dict[str, Any]]:
    """The same for JSON: for each measure, k and method the repetitions, float64, compressed, in base64.

    Example:
        >>> one = packed({("knn", "8"): {"pca": [np.array([1.0, 0.0])]}})
        >>> unpacked(one)["knn", "8"]["pca"]
        [array([1., 0.])]
    """
    return [
        {"measure": measure, "k": k, "method": method, "repetitions": [_text(each) for each in repetitions]}
        for (measure, k), of in scores.items()
        for method, repetitions in of.items()
    ]


def _text(values: Array) -> str:
    return base64.b64encode(zlib.compress(np.asarray(values, dtype="<f8").tobytes())).decode()


def unpacked(entries: Iterable[Mapping[str, Any]]) -> PerImage:
    """What `packed` was given."""
    found: PerImage = {}
    for entry in entries:
        repetitions = [np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<f8") for text in entry["repetitions"]]
        found.setdefault((entry["measure"], entry["k"]), {})[entry["method"]] = repetitions
    return found
