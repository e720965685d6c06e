"""Measures of an evaluation: their keys in reports, labels and order."""

from __future__ import annotations

import re
from typing import Any

SPACES = {"z": "z (sparse)", "features": "features (dense)", "pixels": "raw pixels"}
"""Representations in a report, by the suffix of their keys, with labels."""


def measure_label(measure: str) -> str | None:
    """Label of a measure in tables; None if the name is no measure.

    Example:
        >>> [measure_label(name) for name in ("knn", "one_shot", "shot_5", "l0")]
        ['kNN', '1-shot', '5-shot', None]
    """
    labels = {
        "knn": "kNN",
        "linear": "linear probe",
        "one_shot": "1-shot",
        "mlp": "MLP probe",
        "map": "retrieval mAP",
        "nmi": "clustering NMI",
    }
    if shots := re.fullmatch(r"shot_(\d{1,6})", measure):
        return f"{shots[1]}-shot"
    if rank := re.fullmatch(r"precision_at_(\d{1,6})", measure):
        return f"precision at {rank[1]}"
    return labels.get(measure)


def measures_of(report: dict[str, Any]) -> list[str]:
    """Measures in a report, or in one entry of its "against", in table order.

    Example:
        >>> measures_of({"n_test": 5, "shot_5_z": 0.5, "linear_z": 0.4, "linear_std_z": 0.1, "knn_pixels": 0.3})
        ['knn', 'linear', 'shot_5']
    """
    stems = {key.removesuffix(f"_{space}") for key in report for space in SPACES if key.endswith(f"_{space}")}
    order = ["knn", "linear", "one_shot", "shot", "mlp", "map", "precision", "nmi"]

    def position(measure: str) -> tuple[int, int]:
        number = measure.rpartition("_")[2]
        return order.index(measure if measure in order else measure.partition("_")[0]), int(number) if number.isdigit() else 0

    return sorted((stem for stem in stems if measure_label(stem)), key=position)
