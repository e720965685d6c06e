"""Figures of a model card, as PNG, and its tables of results, as Markdown."""

from __future__ import annotations

import io
from typing import Any

from ..core.measures import measure_label, measures_of
from ..text import code, cut, markdown

__all__ = [
    "ACCENT",
    "ACCURACIES",
    "INK",
    "SECOND",
    "SOFT",
    "SPACES",
    "accuracy",
    "classifier_results",
    "codes_tables",
    "draw_accuracy",
    "draw_training",
    "encoder_results",
    "hide_spines",
    "new_figure",
    "training",
    "transfer_tables",
]

INK, ACCENT, SECOND, SOFT = "#1b2a41", "#c8553d", "#2a7f9e", "#b8c4d0"

_MEASURES = {"linear": ("linear", ACCENT), "knn": ("kNN", INK), "one_shot": ("1-shot", SECOND)}


def training(history: list[dict[str, Any]], theory: float) -> bytes:
    """PNG: density of z and distance to the target over the steps of a run.

    Args:
        history: rows with step and, where measured, l0 (training batches), excess (distance above its floor) and l0_eval.
        theory: density of the target law, drawn as a line.
    """
    figure = new_figure(7.2, 3.8)
    draw_training(figure.add_subplot(), history, theory)
    return _png(figure)


def accuracy(results: dict[str, Any]) -> bytes:
    """PNG: accuracy of z against the number of largest values kept, with the full representations as lines.

    Args:
        results: report of `rlpjepa_zoo.evaluation.evaluate` with its `curve`.
    """
    figure = new_figure(7.2, 3.8)
    draw_accuracy(figure.add_subplot(), results)
    return _png(figure)


def new_figure(width: float, height: float) -> Any:
    """An empty white figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, facecolor="white")


def hide_spines(figure: Any) -> None:
    """Hide the upper and right borders of all axes; the right one stays where it carries the y label."""
    for axes in figure.axes:
        axes.spines["top"].set_visible(False)
        axes.spines["right"].set_visible(axes.yaxis.get_label_position() == "right")


def _png(figure: Any) -> bytes:
    hide_spines(figure)
    figure.tight_layout()
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})  # equal figures have equal bytes
    return file.getvalue()


def draw_training(axes: Any, history: list[dict[str, Any]], theory: float) -> None:
    """Draw density of z and distance to the target over the steps; arguments as of `training`."""
    rows = [r for r in history if r.get("l0") is not None]
    axes.plot([r["step"] for r in rows], [r["l0"] for r in rows], color=ACCENT, lw=1.8, label="density of z, training")
    evaluated = [r for r in history if r.get("l0_eval") is not None]
    axes.plot(
        [r["step"] for r in evaluated], [r["l0_eval"] for r in evaluated], "o", color=INK, ms=5, label="density of z, evaluation mode"
    )
    axes.axhline(theory, color=SECOND, ls="--", lw=1.4, label=f"theory of the target: {theory:.3f}")
    axes.set(xlabel="step", ylim=(0, None), title="Density while training")
    distances = [r for r in rows if r.get("excess") is not None]
    if distances:
        other = axes.twinx()
        other.plot([r["step"] for r in distances], [max(r["excess"], 1e-9) for r in distances], color=SOFT, lw=1.4)
        other.set_yscale("log")
        other.yaxis.set_label_position("right")
        other.tick_params(axis="y", which="both", colors="#7b8794", labelsize=7)
        other.spines["right"].set_color(SOFT)
        axes.plot([], [], color=SOFT, lw=1.4, label="distance above its floor (right)")
        axes.set_zorder(other.get_zorder() + 1)
        axes.patch.set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def draw_accuracy(axes: Any, results: dict[str, Any]) -> None:
    """Draw accuracy of z against the number of largest values kept; arguments as of `accuracy`."""
    curve = results["curve"]
    for kind, (label, color) in _MEASURES.items():
        if not curve.get(kind):
            continue
        axes.plot(curve["active"], curve[kind], "o-", color=color, ms=4, lw=1.8, label=f"sparse z, {label}")
        if spread := curve.get(f"{kind}_std"):
            low, high = ([v + sign * s for v, s in zip(curve[kind], spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(curve["active"], low, high, color=color, alpha=0.15, lw=0)
        for space, style in (("features", ":"), ("pixels", "--")):
            if results.get(f"{kind}_{space}") is not None:
                axes.axhline(results[f"{kind}_{space}"], color=color, ls=style, lw=1, alpha=0.7, label=f"{space}, {label}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(curve["active"], [str(k) for k in curve["active"]])
    axes.minorticks_off()
    axes.set(xlabel="largest values kept per image", ylabel="accuracy", title="Accuracy against active dimensions")
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))


# --- tables ------------------------------------------------------------------------------------------------------------------------------

SPACES = {"z": "sparse embedding z", "features": "dense backbone features", "pixels": "raw pixels"}
"""Representations that are measured, by the suffix of their keys in results."""
ACCURACIES = ("knn", "linear", "one_shot")
CODE_MEASURES = {"one_nn": "1-NN", "knn": "kNN", "map": "retrieval mAP", "linear": "linear probe"}
"""Measures of codes of k values (`bench/measures.py`), as short labels."""


def encoder_results(results: dict[str, Any], figures: tuple[str, ...]) -> list[str]:
    """Paragraphs and tables of the section "Results" of an encoder."""
    kinds = measures_of(results)
    if not kinds:
        return []
    labels = {kind: measure_label(kind) or kind for kind in kinds}
    heading = "top-1 accuracy" if set(kinds) <= set(ACCURACIES) else "representation"
    rows = _rows(results, kinds, "")
    for name, other in (results.get("against") or {}).items():
        rows += _rows(other, kinds, f"{_other(name)}: ")
    counts = [f"{results[key]:,} {noun}" for key, noun in (("n_train", "training images"), ("n_test", "test images")) if key in results]
    note = "; ".join(text for text in (", ".join(counts), markdown(results.get("protocol", ""))) if text)
    shown = [f"`{code(results['command'])}`"] if results.get("command") else []
    paragraphs = [_table([heading, *(labels[kind] for kind in kinds)], rows), *([note] if note else []), *shown, *_differences(results)]
    if curve := results.get("curve"):
        rows = []
        for kind in kinds:
            if curve.get(kind):
                spreads = curve.get(f"{kind}_std") or [None] * len(curve["active"])
                rows.append([labels[kind], *(_percent(value, spread) for value, spread in zip(curve[kind], spreads, strict=True))])
        paragraphs.append("Accuracy of z when only the largest values of each image are kept:")
        paragraphs.append(_table(["active dimensions", *map(str, curve["active"])], rows))
    if "accuracy.png" in figures:
        paragraphs.append("![Accuracy against active dimensions](accuracy.png)")
    return paragraphs


def codes_tables(codes: dict[str, Any]) -> list[str]:
    """A table for each measure of codes of k values: a row for each method, a column for each k."""
    if not codes:
        return []
    measures = dict.fromkeys(name for of_method in codes["rows"].values() for name in of_method)
    paragraphs = [f"On {markdown(codes['data'])}. {markdown(codes['protocol'])}."]
    for name in measures:
        rows = [
            [markdown(method), *(_percent(value, None) for value in of_method[name])]
            for method, of_method in codes["rows"].items()
            if name in of_method
        ]
        paragraphs.append(_table([f"{CODE_MEASURES.get(name) or markdown(name)}, k =", *map(str, codes["k"])], rows))
    return paragraphs


def transfer_tables(transfer: dict[str, dict[str, Any]]) -> list[str]:
    """One table of the results on other data sets, with the density and the number of images of each."""
    kinds = measures_of({key: value for scores in transfer.values() for key, value in scores.items()})
    if not kinds:
        return []
    rows = []
    for name, scores in transfer.items():
        density = f"{scores['l0']:.3f}" if "l0" in scores else "-"
        counts = f"{scores.get('n_train') or 0:,} / {scores.get('n_test') or 0:,}"
        for row in _rows(scores, kinds, ""):
            rows.append([markdown(name), counts, density, *row])
            name = counts = density = ""
    head = ["data", "training / test images", "density of z", "", *(measure_label(kind) or kind for kind in kinds)]
    protocols = [
        f"{markdown(name)}: {markdown(scores['protocol'])}." + (f" `{code(scores['command'])}`" if scores.get("command") else "")
        for name, scores in transfer.items()
        if scores.get("protocol")
    ]
    return [_table(head, rows), *protocols]


def classifier_results(results: dict[str, Any]) -> list[str]:
    """Paragraphs and tables of the section "Results" of a classifier."""
    if "top1" not in results:
        return []
    cells = {"top-1": f"{100 * results['top1']:.2f} %"}
    cells |= {"top-5": f"{100 * results['top5']:.2f} %"} if "top5" in results else {}
    cells |= {"cross-entropy": f"{results['loss']:.4f} nats"}
    table = "\n".join(
        f"|{space}{' | '.join(row)}{space}|" for row, space in ((cells, " "), (["---"] * len(cells), ""), (cells.values(), " "))
    )
    counts = f"n = {results.get('n_test', 0):,} held-out images; trained on n = {results.get('n_train', 0):,} labelled images"
    return [table, f"{counts}; {markdown(results.get('protocol', 'one seed'))}."]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _cell(text: str) -> str:
    """Free text as code, so that it stays in its cell and is not read as markup."""
    return f"`{cut(code(' '.join(text.split())), 100)}`"


def _other(name: str) -> str:
    """What an encoder is compared with, as a table shows it."""
    return "random weights" if name == "random" else _cell(name)


def _rows(scores: dict[str, Any], kinds: list[str], prefix: str) -> list[list[str]]:
    """A row of cells for each representation that was measured."""
    spaces = [space for space in SPACES if any(f"{kind}_{space}" in scores for kind in kinds)]
    return [
        [f"{prefix}{SPACES[space]}", *(_percent(scores.get(f"{kind}_{space}"), scores.get(f"{kind}_std_{space}")) for kind in kinds)]
        for space in spaces
    ]


def _differences(results: dict[str, Any]) -> list[str]:
    """The paired differences between this encoder and others."""
    rows = []
    for name, other in (results.get("against") or {}).items():
        for row in other.get("differences", []):
            subtrahend = _other(name) if row["minus"] == name else f"{_other(name)}, {_cell(row['minus'])}"
            interval = " to ".join(f"{100 * row[end]:+.1f}" for end in ("low", "high"))
            measure = measure_label(row["measure"]) or _cell(row["measure"])
            rows.append([_cell(row["space"]), subtrahend, measure, f"{100 * row['difference']:+.1f} %", f"{interval} %", f"{row['n']:,}"])
    if not rows:
        return []
    head = ["this encoder", "minus", "measure", "difference", "95 % interval", "n"]
    return ["Differences on the same test images, with 95 % intervals of a paired bootstrap over images:", _table(head, rows)]


def _percent(value: float | None, spread: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %" + (f" ± {100 * spread:.1f}" if spread is not None else "")
