"""The protocol of a frozen evaluation: which probes run, with which hyper-parameters and how many seeds, and how that is described."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from ..errors import DataError, UsageError, did_you_mean
from .probes import PROBES
from .probes.base import Array, Probe, Rows, Scores, Split, at_least_one, rows

__all__ = ["Protocol", "default_probes", "measure", "probe_names"]


def probe_names() -> tuple[str, ...]:
    """All registered probes, in the order of reports."""
    return tuple(sorted(PROBES, key=lambda name: PROBES[name].order))


def default_probes() -> tuple[str, ...]:
    """Probes that run when none is named, in the order of reports."""
    return tuple(name for name in probe_names() if PROBES[name].default)


class Protocol:
    """How representations are measured.

    Args:
        probes: names of `rlpjepa_zoo.evaluation.probes.PROBES`, or ("all",); None for `default_probes`.
        seeds: repetitions of what is random (held-out images of the linear probe, draws of few-shot, first weights and centres), >= 1.
        options: hyper-parameters of the probes by name: k and temperature (kNN), grid (linear), shots and draws (few-shot), queries (retrieval).

    Raises:
        UsageError: an unknown probe, with the nearest name, or a value out of range, also of a probe that is not named.
        TypeError: an option that no probe has.

    Example:
        >>> Protocol(("linear", "knn"), k=5).describe(n_train=100, n_test=50).split(";")[0]
        'kNN: k = 5, cosine, T = 0.07, deterministic'
    """

    def __init__(self, probes: Sequence[str] | None = None, seeds: int = 3, **options: Any) -> None:
        registered = probe_names()
        names = default_probes() if probes is None else registered if "all" in probes else tuple(probes)
        for name in names:
            if name not in PROBES:
                hint = did_you_mean(name, registered) or f" Known probes: {', '.join(registered)}, all."
                raise UsageError(f"probes: '{name}' is not a probe.{hint}")
        if not names:
            raise UsageError(f"probes: expected at least one of {', '.join(registered)}, or all")
        known = {parameter.name for name in registered for parameter in fields(PROBES[name])}
        if unknown := options.keys() - known:
            raise TypeError(f"options of no probe: {', '.join(sorted(unknown))}")
        at_least_one(seeds=seeds)
        # all probes are built, so that every option is checked
        built = {name: PROBES[name].from_options(options) for name in registered}
        self.probes: dict[str, Probe] = {name: probe for name, probe in built.items() if name in names}
        self.seeds = seeds

    def describe(self, n_train: int, n_test: int, skipped: Collection[str] = ()) -> str:
        """One sentence for each probe that was measured.

        Args:
            n_train: training images, an upper bound of k.
            n_test: test images, an upper bound of the queries of retrieval.
            skipped: measures that were left out.
        """
        sentences = (probe.describe(n_train, n_test, self.seeds, skipped) for probe in self.probes.values())
        return "; ".join(sentence for sentence in sentences if sentence)


def measure(x: Rows, y: Array, test_x: Rows, test_y: Array, protocol: Protocol) -> Scores:
    """Measure one representation by all probes of a protocol.

    Args:
        x, test_x: (m, C), (n, C) representations that `rlpjepa_zoo.evaluation.probes.base.rows` accepts.
        y, test_y: (m,), (n,) labels; rows with a label < 0 are left out.

    Raises:
        DataError: no labelled images, or fewer than two classes.
    """
    y, test_y = np.asarray(y), np.asarray(test_y)
    if not (y >= 0).any() or not (test_y >= 0).any():
        raise DataError("evaluation: no labelled images for training, or none for testing")
    split = Split(rows(x)[y >= 0], y[y >= 0], rows(test_x)[test_y >= 0], test_y[test_y >= 0])
    scores = Scores()
    for probe in protocol.probes.values():
        probe.score(split, protocol.seeds, scores)
    return scores
