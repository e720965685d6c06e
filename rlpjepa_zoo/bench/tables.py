"""The result of `rlpjepa bench codes` as Markdown tables that are also readable as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .measures import DENSE, MEASURES

__all__ = ["codes_table", "means", "measure_table"]

Report = Mapping[str, Any]

_COST = (
    "Seconds: of all fits of one seed, their median times their number. Density: share of non-zero values of test images. Dead: share of units that no image activates. "
    "Largest rate: share of images that activate the most active unit."
)


def means(report: Report, measure: str) -> dict[str, dict[str, float]]:
    """Means over seeds of a measure, by method and k; methods in the order of the report."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in report["rows"]:
        if measure in row:
            found.setdefault(row["method"], {}).setdefault(str(row["k"]), []).append(row[measure])
    return {name: {k: float(np.mean(values)) for k, values in of.items()} for name, of in found.items()}


def measure_table(report: Report, measure: str) -> str:
    """One line for each method, one column for each k. The best of a column is bold; * marks those that are not significantly below it."""
    values, differences = means(report, measure), report["differences"].get(measure, {})
    columns = [k for k in [*map(str, report["asked"]["k"]), "all"] if any(k in of for of in values.values())]
    lines = [[name, *(_cell(of.get(k), differences.get(k, {}).get(name)) for k in columns)] for name, of in values.items()]
    return _table([f"{MEASURES[measure]}, k =", *columns], lines)


def _cell(value: float | None, to_best: Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    if to_best is None or to_best["low"] > 0:
        return f"{value:.3f}"
    return f"**{value:.3f}**" if to_best["difference"] == 0 else f"{value:.3f}*"


def _dense_table(report: Report) -> str:
    """What codes lose against the dense features: one line for each method, for the codes with its most values."""
    against, lines = report.get("against_dense", {}), []
    for name in report["methods"]:
        rows = [row for row in report["rows"] if row["method"] == name]
        if not rows or name == DENSE:
            continue
        k = str(rows[-1]["k"])
        lines.append([name, k, *(_points(against.get(measure, {}).get(k, {}).get(name)) for measure in MEASURES)])
    shown = any(any(line[2:]) for line in lines)
    return _table(["minus dense features, points", "at k =", *MEASURES.values()], lines) if shown else ""


def _points(interval: Mapping[str, float] | None) -> str:
    """A difference and its interval in points.

    Example:
        >>> _points({"difference": -0.0125, "low": -0.02, "high": 0.001})
        '-1.2 [-2.0, +0.1]'
    """
    return "" if interval is None else "{difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**{n: 100 * v for n, v in interval.items()})


def _cost_table(report: Report) -> str:
    """Seconds of the fits of one seed, and density of the codes with most values."""
    lines = []
    for name in report["methods"]:
        fits = [fit for fit in report["fits"] if fit["method"] == name]
        if not fits:
            continue
        seeds = {fit["seed"] for fit in fits}
        rows = [row for row in report["rows"] if row["method"] == name]
        most = [row for row in rows if row["k"] == rows[-1]["k"] and "l0" in row]
        seconds = float(np.median([fit["seconds"] for fit in fits])) * len(fits) / len(seeds)  # a fit that was held up does not count
        cells = [f"{np.mean([row[key] for row in most]):.3f}" if most else "" for key in ("l0", "dead", "max_rate")]
        lines.append([name, f"{seconds:.1f}", str(len(fits) // len(seeds)), str(rows[-1]["k"]), *cells])
    return _table(["cost and density", "seconds", "fits", "at k =", "density", "dead", "largest rate"], lines)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first is on the left."""
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]

    def joined(cells: Sequence[str]) -> str:
        return "| " + " | ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]) + " |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([joined(heads), f"|{rule}|", *map(joined, lines)])


def codes_table(report: Report, methods: bool = True) -> str:
    """All tables of a report, what their marks mean, and what was compared.

    Args:
        report: what `compare_codes` returns.
        methods: end with a line about each method.
    """
    tables = [measure_table(report, measure) for measure in MEASURES if means(report, measure)]
    seeds = len(report["asked"]["seeds"])
    marks = (
        f"{f'Means over {seeds} seeds' if seeds > 1 else 'One seed'}. Bold: the best of a column. *: not significantly below it (95 % interval of "
        f"the paired difference over test images{', whose scores are averaged over seeds' if seeds > 1 else ''}). Empty: not measured, or no such code."
    )
    about = (
        f"{report['data']}, {report['backbone']}: {report['n_train']:,} training and {report['n_test']:,} test images of {report['classes']} "
        f"classes, {report['features']} features, {report['units']} units. {report['protocol']}."
    )
    names = "\n".join(f"- {name}: {text}" for name, text in report["methods"].items())
    dense = [text for text in [_dense_table(report)] if text]
    return "\n\n".join([*tables, marks, *dense, _cost_table(report), _COST, about, *([names] if methods else [])])
