"""What is measured of one representation: a chosen set of protocols, their seeds, and the sentences that say how it was done."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.measures import SPACES, measure_label, measures_of
from ..errors import DataError, UsageError, did_you_mean
from . import probes
from .probes import GRID, Array, Rows

__all__ = ["DEFAULT_PROBES", "PROBES", "Protocol", "Scores", "accuracy_table", "measure", "shot_name"]

PROBES = ("knn", "linear", "few_shot", "mlp", "retrieval", "clustering")
DEFAULT_PROBES = PROBES[:3]


@dataclass(frozen=True)
class Protocol:
    """How representations are measured.

    Args:
        probes: names of `PROBES`, or ("all",).
        shots: images per class of the few-shot protocol, each >= 1.
        seeds: repetitions of what is random (held-out images of the linear probe, draws of few-shot, first weights and centres), >= 1.
        k, temperature: of kNN.
        grid: C of the linear probe, see `probes.choose_c`; one number is used as it is.
        draws: of few-shot, for each seed.
        queries: of retrieval, at most.

    Raises:
        UsageError: an unknown probe, with the nearest, or a number out of range.
    """

    probes: tuple[str, ...] = DEFAULT_PROBES
    shots: tuple[int, ...] = (1, 5, 10)
    seeds: int = 3
    k: int = 20
    temperature: float = 0.07
    grid: tuple[float, ...] = GRID
    draws: int = 100
    queries: int = 2000

    def __post_init__(self) -> None:
        asked = PROBES if "all" in self.probes else self.probes
        for name in asked:
            if name not in PROBES:
                hint = did_you_mean(name, PROBES) or f" Known probes: {', '.join(PROBES)}, all."
                raise UsageError(f"probes: '{name}' is none.{hint}")
        if not asked:
            raise UsageError(f"probes: expected at least one of {', '.join(PROBES)}, or all")
        object.__setattr__(self, "probes", tuple(name for name in PROBES if name in asked))
        object.__setattr__(self, "shots", tuple(sorted(set(self.shots))))
        if not self.shots or self.shots[0] < 1:
            raise UsageError(f"shots: expected numbers of images per class >= 1, got {', '.join(map(str, self.shots)) or 'none'}")
        for name in ("seeds", "k", "draws", "queries"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected >= 1, got {getattr(self, name)}")
        if not self.temperature > 0 or not self.grid or min(self.grid) <= 0:
            raise UsageError("temperature and every C of the grid: expected numbers > 0")

    def describe(self, images: int, queries: int, skipped: Collection[str] = ()) -> str:
        """One sentence for each protocol that was followed.

        Args:
            images: training images, which bound k.
            queries: test images, which bound those of retrieval.
            skipped: measures that were left out.
        """
        mean = f"mean of {self.seeds} seeds (± their standard deviation)" if self.seeds > 1 else "one seed"
        asked = min(self.queries, queries)
        shots = [n for n in self.shots if shot_name(n) not in skipped]
        silent = {*skipped, *(() if shots else ("few_shot",))}
        said = {
            "knn": f"kNN: k = {min(self.k, images)}, cosine, T = {self.temperature:g}, deterministic",
            "linear": f"linear: logistic regression, L-BFGS of at most 300 iterations, {self._chosen(mean)}",
            "few_shot": f"{', '.join(map(str, shots))}-shot: nearest by cosine of the class means of so many random training images per class, "
            f"mean of {self.seeds * self.draws} draws (± their standard deviation)",
            "mlp": f"MLP: one hidden layer of {probes.HIDDEN}, Adam, {probes.EPOCHS} epochs, {mean}",
            "retrieval": f"mAP: all training images ranked by cosine for each of {asked} test images{' drawn at random' if asked < queries else ''}",
            "clustering": f"NMI: k-means of the test images by direction, as many clusters as classes, {mean}",
        }
        return "; ".join(said[name] for name in self.probes if name not in silent)

    def _chosen(self, mean: str) -> str:
        if len(self.grid) == 1:
            return f"C = {self.grid[0]:g}"
        return f"C of {', '.join(f'{c:g}' for c in self.grid)} chosen on a held-out stratified fifth of the training images, refitted on all, {mean}"


@dataclass
class Scores:
    """Of one representation: means and spreads by measure, how often each test image was classified rightly (of map: the average
    precision of each query), the chosen C, what was left out."""

    mean: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    right: dict[str, Array] = field(default_factory=dict)
    chosen_c: list[float] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, measure: str, values: Sequence[float] | Array) -> None:
        """A measure from its repetitions."""
        self.mean[measure] = float(np.mean(values))
        if len(values) > 1:
            self.spread[measure] = float(np.std(values, ddof=1))

    def flat(self, space: str) -> dict[str, float]:
        """Under the keys of a report: measure_space and measure_std_space."""
        found = {}
        for measure, value in self.mean.items():
            found[f"{measure}_{space}"] = value
            if measure in self.spread:
                found[f"{measure}_std_{space}"] = self.spread[measure]
        return found


def shot_name(shots: int) -> str:
    """Key of a few-shot measure."""
    return "one_shot" if shots == 1 else f"shot_{shots}"


def measure(x: Rows, y: Array, test_x: Rows, test_y: Array, protocol: Protocol) -> Scores:
    """All protocols asked for, of one representation; see `rlpjepa_zoo.evaluation.probes`.

    Args:
        x, test_x: (m, C), (n, C) what `probes.rows` takes.
        y, test_y: (m,), (n,) labels; rows with a label < 0 are left out.

    Raises:
        DataError: no labelled images, or fewer than two classes.
    """
    y, test_y = np.asarray(y), np.asarray(test_y)
    if not (y >= 0).any() or not (test_y >= 0).any():
        raise DataError("evaluation: no labelled images for training, or none for testing")
    x, test_x = probes.rows(x)[y >= 0], probes.rows(test_x)[test_y >= 0]
    y, test_y = y[y >= 0], test_y[test_y >= 0]
    found = Scores()
    steps = {"knn": _knn, "linear": _linear, "few_shot": _few_shot, "mlp": _mlp, "retrieval": _retrieval, "clustering": _clustering}
    for name in protocol.probes:
        steps[name](found, x, y, test_x, test_y, protocol)
    return found


def _knn(found: Scores, x: Rows, y: Array, test_x: Rows, test_y: Array, protocol: Protocol) -> None:
    found.right["knn"] = (probes.knn(x, y, test_x, protocol.k, protocol.temperature) == test_y).astype(np.float64)
    found.add("knn", [found.right["knn"].mean()])


def _linear(found: Scores, x: Rows, y: Array, test_x: Rows, test_y: Array, protocol: Protocol) -> None:
    seeds = range(protocol.seeds) if len(protocol.grid) > 1 else range(1)
    if np.unique(y, return_counts=True)[1].max() < 2 and len(protocol.grid) > 1:
        found.skipped["linear"] = "no class has two training images, so C cannot be chosen on held-out ones"
        return
    found.chosen_c = [probes.choose_c(x, y, protocol.grid, seed) for seed in seeds]
    fits = {c: (probes.linear(x, y, test_x, c) == test_y).astype(np.float64) for c in sorted(set(found.chosen_c))}
    found.right["linear"] = np.mean([fits[c] for c in found.chosen_c], axis=0)
    found.add("linear", [fits[c].mean() for c in found.chosen_c])


def _few_shot(found: Scores, x: Rows, y: Array, test_x: Rows, test_y: Array, protocol: Protocol) -> None:
    for shots in protocol.shots:
        try:
            found_of = [probes.few_shot_shares(x, y, test_x, test_y, shots, protocol.draws, seed) for seed in range(protocol.seeds)]
        except DataError as error:
            found.skipped[shot_name(shots)] = str(error).removeprefix(f"{shots}-shot: ")
        else:
            draws, shares = zip(*found_of, strict=True)
            found.add(shot_name(shots), np.concatenate(draws))
            found.right[shot_name(shots)] = np.mean(shares, axis=0)


def _mlp(found: Scores, x: Rows, y: Array, test_x: Rows, test_y: Array, protocol: Protocol) -> None:
    rights = [(probes.mlp(x, y, test_x, seed) == test_y).astype(np.float64) for seed in range(protocol.seeds)]
    found.right["mlp"] = np.mean(rights, axis=0)
    found.add("mlp", [right.mean() for right in rights])


def _retrieval(found: Scores, x: Rows, y: Array, test_x: Rows, test_y: Array, protocol: Protocol) -> None:
    ranked = probes.retrieval_each(x, y, test_x, test_y, protocol.queries)
    for name, values in zip(("map", "precision_at_1", "precision_at_10"), ranked, strict=True):
        found.add(name, [values.mean()])
    found.right["map"] = ranked[0]


def _clustering(found: Scores, x: Rows, y: Array, test_x: Rows, test_y: Array, protocol: Protocol) -> None:
    found.add("nmi", [probes.clustering(test_x, test_y, seed) for seed in range(protocol.seeds)])


def accuracy_table(report: dict[str, Any]) -> str:
    """Every measure of each representation, what was compared, and how it was measured, as text."""
    measures = measures_of(report)
    heads = {m: (measure_label(m) or m).removesuffix(" probe").removeprefix("retrieval ").removeprefix("clustering ") for m in measures}
    heads = {m: head.replace("precision at ", "prec@") for m, head in heads.items()}
    lines = [f"{'':<17}" + "".join(f"{heads[m]:>9}" for m in measures)]

    def line(label: str, scores: dict[str, Any], space: str) -> None:
        if any(f"{m}_{space}" in scores for m in measures):
            cells = (scores.get(f"{m}_{space}") for m in measures)
            lines.append(f"{label:<17}" + "".join(f"{'-':>9}" if cell is None else f"{cell:>9.3f}" for cell in cells))

    for space, label in SPACES.items():
        line(label, report, space)
    for name, other in report.get("against", {}).items():
        lines.append(f"{name}:")
        for space in ("z", "features"):
            line(f"  {SPACES[space]}", other, space)
        lines += [
            f"  {d['space']} - its {d['minus']}, {measure_label(d['measure'])}: "
            f"{d['difference']:+.3f} (95 % {d['low']:+.3f} to {d['high']:+.3f}, n = {d['n']})"
            for d in other["differences"]
        ]
    lines += [f"left out: {measure_label(name) or name}: {why}" for name, why in report.get("skipped", {}).items()]
    if curve := report.get("curve"):
        lines += ["", f"{'active of z':<17}" + "".join(f"{k:>7}" for k in curve["active"])]
        lines += [f"{heads[m]:<17}" + "".join(f"{v:>7.3f}" for v in curve[m]) for m in measures if m in curve]
        lines.append("")
    return "\n".join([*lines, f"{report['n_train']} training and {report['n_test']} test images; {report['protocol']}"])
