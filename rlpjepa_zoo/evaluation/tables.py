"""Results of an evaluation as plain text."""

from __future__ import annotations

from typing import Any

from ..core.measures import SPACES, measure_label, measures_of

__all__ = ["accuracy_table", "classifier_table"]

_CLASSES = 50
"""Classes that `classifier_table` lists, at most."""


def accuracy_table(report: dict[str, Any]) -> str:
    """Text of a report: every measure of each representation, the comparisons, the measures left out, the curve and the protocol.

    Args:
        report: what `rlpjepa_zoo.evaluate` returns.
    """
    heads = {measure: _head(measure) for measure in measures_of(report)}
    lines = [f"{'':<17}" + "".join(f"{head:>9}" for head in heads.values())]
    lines += [_row(label, report, space, heads) for space, label in SPACES.items() if _has(report, space, heads)]
    for name, other in report.get("against", {}).items():
        lines.append(f"{name}:")
        lines += [_row(f"  {SPACES[space]}", other, space, heads) for space in ("z", "features") if _has(other, space, heads)]
        lines += [
            f"  {d['space']} - its {d['minus']}, {measure_label(d['measure'])}: "
            f"{d['difference']:+.3f} (95 % {d['low']:+.3f} to {d['high']:+.3f}, n = {d['n']})"
            for d in other["differences"]
        ]
    lines += [f"left out: {measure_label(name) or name}: {reason}" for name, reason in report.get("skipped", {}).items()]
    if curve := report.get("curve"):
        lines += ["", f"{'active of z':<17}" + "".join(f"{k:>7}" for k in curve["active"])]
        lines += [f"{head:<17}" + "".join(f"{value:>7.3f}" for value in curve[m]) for m, head in heads.items() if m in curve]
        lines.append("")
    return "\n".join([*lines, f"{report['n_train']} training and {report['n_test']} test images; {report['protocol']}"])


def classifier_table(report: dict[str, Any]) -> str:
    """Text of a classifier's report: accuracy with its 95 % interval, of all images and of each class, the least accurate classes first.

    Args:
        report: what `evaluate_classifier` returns.
    """
    width = max(24, *(len(name) + 1 for name in report["classes"]))
    lines = [f"{'':<{width}}{'accuracy':>9}{'95 % interval':>18}{'images':>9}"]

    def row(name: str, share: float, low: float, high: float, n: int) -> str:
        return f"{name:<{width}}{share:>9.3f}{f'{low:.3f} to {high:.3f}':>18}{n:>9,}"

    for key, name in (("top1", "top-1"), ("top5", "top-5")):
        if key in report:
            lines.append(row(name, report[key], report[f"{key}_low"], report[f"{key}_high"], report["n_test"]))
    lines += [
        f"{name:<{width}}{report[key]:>9.3f}"
        for key, name in (("mean_per_class", "mean of the classes"), ("most_frequent", "most frequent class"))
    ]
    lines += [f"{'cross-entropy, nats':<{width}}{report['loss']:>9.3f}", ""]
    worst = sorted(report["classes"].items(), key=lambda entry: entry[1]["accuracy"])
    lines += [row(name, entry["accuracy"], entry["low"], entry["high"], entry["n"]) for name, entry in worst[:_CLASSES]]
    if len(worst) > _CLASSES:
        lines.append(f"and {len(worst) - _CLASSES} classes that are more accurate; --json and --out list all")
    return "\n".join([*lines, "", f"{report['n_test']} test images; {report['protocol']}"])


def _head(measure: str) -> str:
    """Short label of a measure, for the head of a column."""
    label = measure_label(measure) or measure
    for before, after in ((" probe", ""), ("retrieval ", ""), ("clustering ", ""), ("precision at ", "prec@")):
        label = label.replace(before, after)
    return label


def _has(scores: dict[str, Any], space: str, measures: dict[str, str]) -> bool:
    return any(f"{measure}_{space}" in scores for measure in measures)


def _row(label: str, scores: dict[str, Any], space: str, measures: dict[str, str]) -> str:
    cells = (scores.get(f"{measure}_{space}") for measure in measures)
    return f"{label:<17}" + "".join(f"{'-':>9}" if cell is None else f"{cell:>9.3f}" for cell in cells)
