"""Measures of an evaluation: keys, labels and order."""

from __future__ import annotations

import re
from typing import Any

SPACES = {"z": "z (sparse)", "features": "features (dense)", "pixels": "raw pixels"}
"""Representations of a report."""

MEASURES = {
    "knn": "kNN",
    "linear": "linear probe",
    "one_shot": "1-shot",
    "shot": "{}-shot",
    "mlp": "MLP probe",
    "map": "retrieval mAP",
    "precision_at": "precision at {}",
    "nmi": "clustering NMI",
}
"""Label of each measure, in the order of tables. {} in a label stands for the number at the end of the key, as in shot_5 or precision_at_10."""


def _split(measure: str) -> tuple[str, str | None]:
    """A measure without its number, and the digits of the number."""
    parts = re.fullmatch(r"(.+)_(\d{1,6})", measure)
    return (parts[1], parts[2]) if parts else (measure, None)


def measure_label(measure: str) -> str | None:
    """Label of a measure in tables; None if it is not a measure.

    Example:
        >>> [measure_label(name) for name in ("knn", "one_shot", "shot_5", "l0")]
        ['kNN', '1-shot', '5-shot', None]
    """
    stem, number = _split(measure)
    label = MEASURES.get(stem)
    return None if label is None or ("{}" in label) != (number is not None) else label.format(number)


def measures_of(report: dict[str, Any]) -> list[str]:
    """The measures of a report or of one entry of its "against", in the order of tables.

    Example:
        >>> measures_of({"n_test": 5, "shot_5_z": 0.5, "linear_z": 0.4, "linear_std_z": 0.1, "knn_pixels": 0.3})
        ['knn', 'linear', 'shot_5']
    """
    stems = {key.removesuffix(f"_{space}") for key in report for space in SPACES if key.endswith(f"_{space}")}
    order = list(MEASURES)

    def position(measure: str) -> tuple[int, int]:
        stem, number = _split(measure)
        return order.index(stem), int(number or 0)

    return sorted((stem for stem in stems if measure_label(stem)), key=position)
