"""The protocol of a frozen evaluation: which probes run, with which hyper-parameters and how many seeds, and how that is described."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import numpy as np

from ..errors import DataError, UsageError, did_you_mean
from ..progress import is_redrawn, progress_bar
from ..text import printable
from .probes import PROBES
from .probes.base import Array, Probe, Rows, Scores, Split, at_least_one, rows

__all__ = ["ProbeBar", "Protocol", "default_probes", "measure", "probe_names"]

log = logging.getLogger("rlpjepa_zoo")


def probe_names() -> tuple[str, ...]:
    """All registered probes, in the order of reports."""
    return tuple(sorted(PROBES, key=lambda name: PROBES[name].order))


def default_probes() -> tuple[str, ...]:
    """Probes that run when none is named, in the order of reports."""
    return tuple(name for name in probe_names() if PROBES[name].default)


class Protocol:
    """How representations are measured.

    Args:
        probes: names of `rlpjepa_zoo.evaluation.probes.PROBES`, or ("all",); or a mapping of such names to hyper-parameters, the fields of the
            probe's class, such as ``{"knn": {"k": 5}, "linear": {}}``. None for `default_probes`.
        seeds: repetitions of what is random (held-out images of the linear probe, draws of few-shot, first weights and centres), >= 1.
        options: hyper-parameters by name, for every probe that has a field of this name: k and temperature (kNN), grid (linear), shots and
            draws (few-shot), queries (retrieval).

    Raises:
        UsageError: an unknown probe or hyper-parameter, with the nearest name, or a value out of range, also of a probe that is not named.
        TypeError: an option that no probe has.

    Example:
        >>> Protocol({"linear": {}, "knn": {"k": 5}}).describe(n_train=100, n_test=50).split(";")[0]
        'kNN: k = 5, cosine, T = 0.07, deterministic'
    """

    def __init__(self, probes: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None, seeds: int = 3, **options: Any) -> None:
        registered, own = probe_names(), probes if isinstance(probes, Mapping) else {}
        names = default_probes() if probes is None else registered if "all" in probes else tuple(probes)
        for name in names:
            if name not in PROBES:
                hint = did_you_mean(name, registered) or f" Known probes: {', '.join(registered)}, all."
                raise UsageError(f"probes: '{name}' is not a probe.{hint}")
        if not names:
            raise UsageError(f"probes: expected at least one of {', '.join(registered)}, or all")
        known = {name: [parameter.name for parameter in fields(PROBES[name])] for name in registered}
        if unknown := options.keys() - {parameter for of_probe in known.values() for parameter in of_probe}:
            raise TypeError(f"options of no probe: {', '.join(sorted(unknown))}")
        for name, given in own.items():
            for option in sorted(given.keys() - set(known[name])):
                hint = did_you_mean(option, known[name]) or f" It has {', '.join(known[name]) or 'none'}."
                raise UsageError(f"probes.{name}: no option '{option}'.{hint}")
        at_least_one(seeds=seeds)
        # all probes are built, so that every option is checked
        built = {name: PROBES[name].from_options({**options, **own.get(name, {})}) for name in registered}
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


class ProbeBar:
    """A progress bar of measurements that names the one in work: a probe of a representation. Where it cannot be redrawn, each is logged.

    Args:
        total: number of measurements.
        hidden: show nothing.

    Example:
        >>> with ProbeBar(2, hidden=True) as bar:
        ...     with bar.measuring("kNN of z"):
        ...         pass
    """

    def __init__(self, total: int, hidden: bool) -> None:
        self.logs = not hidden and not is_redrawn()
        self.bar = progress_bar("measure", total, hidden=hidden or self.logs, unit="probe", leave=False)

    def __enter__(self) -> ProbeBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    @contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        """One measurement."""
        self.bar.set_description(f"measure {printable(name, 40)}")
        start = time.monotonic()
        yield
        self.bar.update()
        if self.logs:
            log.info("measured %s in %.1f s", name, time.monotonic() - start)


def measure(x: Rows, y: Array, test_x: Rows, test_y: Array, protocol: Protocol, bar: ProbeBar | None = None, name: str = "") -> Scores:
    """Measure one representation by all probes of a protocol.

    Args:
        x, test_x: (m, C), (n, C) representations that `rlpjepa_zoo.evaluation.probes.base.rows` accepts.
        y, test_y: (m,), (n,) labels; rows with a label < 0 are left out. Their size does not matter: probes count distinct labels.
        protocol: the probes.
        bar, name: progress bar, and the name of the representation on it.

    Raises:
        DataError: no labelled images, or fewer than two classes.
    """
    y, test_y = np.asarray(y), np.asarray(test_y)
    if not (y >= 0).any() or not (test_y >= 0).any():
        raise DataError("evaluation: no labelled images for training, or none for testing")
    (x, y), (test_x, test_y) = _labelled(rows(x), y), _labelled(rows(test_x), test_y)
    split = Split(x, y, test_x, test_y)
    scores = Scores()
    for probe_name, probe in protocol.probes.items():
        with bar.measuring(f"{probe_name} of {name}") if bar is not None else nullcontext():
            probe.score(split, protocol.seeds, scores)
    return scores


def _labelled(x: Rows, y: Array) -> tuple[Rows, Array]:
    """The rows with a label, without a copy if all have one."""
    known = y >= 0
    return (x, y) if known.all() else (x[known], y[known])
