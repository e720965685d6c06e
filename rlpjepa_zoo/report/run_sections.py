"""Blocks of a report that come from the files of the run: header, key figures, training curves, origin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..config.finetune import TuningRecipe
from ..config.pretrain import Recipe
from ..evaluation.intervals import share_interval
from ..hub.card_figures import ACCENT, INK, SECOND
from ..training.run_dir import RunFiles
from .charts import Level, Line, curves
from .encoder_sections import Sample
from .page import Figure, Header, Key, Origin, Section, Table, percent, three_digits

__all__ = ["classifier_header", "header", "origin", "training_section"]


def header(run: RunFiles[Recipe], sample: Sample | None, missing: str, figures: dict[str, Any]) -> Header:
    """Name and state of a pretraining run, warnings and key figures.

    Args:
        run: files of the run.
        sample: embeddings of evaluation images; None if there are none.
        missing: why there are none, in one line.
        figures: main figures, see `rlpjepa_zoo.report.report.write_report`.
    """
    encoder = run.recipe.encoder
    lead = f"{encoder.backbone}, {encoder.dim:,} dimensions; {_state(run, figures)}"
    warnings = [*_warnings(run, sample.unreadable if sample is not None else 0, sample.split if sample is not None else "", figures)]
    return Header(run.recipe.name, lead, warnings, missing, list(_keys(run, sample, figures)))


def classifier_header(run: RunFiles[TuningRecipe], missing: str, unreadable: int, figures: dict[str, Any]) -> Header:
    """Name and state of a fine-tuning run, warnings and key figures.

    Args:
        run: files of the run.
        missing: why the classifier was not measured, in one line.
        unreadable: images that were chosen for the page and cannot be read.
        figures: main figures, see `rlpjepa_zoo.report.report.write_report`.
    """
    lead = f"{run.recipe.start.input} of {run.recipe.start.name}; {_state(run, figures)}"
    warnings = [*_warnings(run, unreadable, figures.get("split", ""), figures)]
    return Header(run.recipe.name, lead, warnings, missing, [*_accuracy_keys(figures), *_progress_keys(run, figures)])


def _state(run: RunFiles[Any], figures: dict[str, Any]) -> str:
    """Data, length and state of a run."""
    recipe, step, steps = run.recipe, figures["step"], figures["steps"]
    if figures["finished"]:
        state = f"finished after {step:,} steps"
    else:
        state = f"at step {step:,} of {steps:,} ({100 * step / steps:.0f}\N{NO-BREAK SPACE}%), not finished"
    return f"{recipe.data.label()}; {recipe.train.epochs:g} epochs; {state}"


def _warnings(run: RunFiles[Any], unreadable: int, split: str, figures: dict[str, Any]) -> Iterator[str]:
    for sentence in figures["alarms"]:
        yield f"{sentence[0].upper()}{sentence[1:]}."
    if run.damaged:
        lines = "1 line" if run.damaged == 1 else f"{run.damaged} lines"
        yield f"{lines} of metrics.jsonl cannot be read and are left out (a run that is killed may leave its last line cut short)."
    if unreadable:
        yield f"{unreadable:,} of the {split} images chosen for this page cannot be read and are left out."
    measured_step = figures.get("measured_step")
    if measured_step is not None and measured_step != figures["step"]:
        noun = "classifier" if isinstance(run.recipe, TuningRecipe) else "encoder"
        yield f"The {noun} measured here was published at step {measured_step:,}; the curves go to step {figures['step']:,}."


def _keys(run: RunFiles[Recipe], sample: Sample | None, figures: dict[str, Any]) -> Iterator[Key]:
    yield from _density_keys(run, sample, figures)
    scored = f"{_scored(run, figures)} images"
    for key, name in (("knn_z", "kNN accuracy of z"), ("knn_features", "kNN accuracy of features")):
        if figures[key] is not None:
            note = f"k = {run.recipe.probe.knn_k}; {scored}, by the run itself"
            if figures["scored"]:
                low, high = share_interval(figures[key], figures["scored"])
                note = f"95 % interval {100 * low:.1f} to {100 * high:.1f}; {note}"
            yield Key(name, percent(figures[key]), note)
    if figures["excess"] is not None:
        note = f"sliced W2², last batch logged, n = {run.recipe.train.batch_size:,} images"
        yield Key("Distance above its floor", f"{figures['excess']:.2g}", note)
    yield from _progress_keys(run, figures)


def _accuracy_keys(figures: dict[str, Any]) -> Iterator[Key]:
    """Accuracy of a classifier: measured for the page, and by the run."""
    if "accuracy" in figures:
        interval = f"95 % interval {100 * figures['accuracy_low']:.1f} to {100 * figures['accuracy_high']:.1f}"
        yield Key("Top-1 accuracy", percent(figures["accuracy"]), f"{interval}; n = {figures['images']:,} {figures['split']} images")
        yield Key(
            "Mean of the classes", percent(figures["mean_per_class"]), f"accuracy of each of {figures['classes']:,} classes, averaged"
        )
    noted = "" if figures["n_test"] is None else f"n = {figures['n_test']:,} images, "
    for key, name in (("top1", "Top-1"), ("top5", "Top-5")):
        if figures[key] is not None:
            yield Key(f"{name} of the run", percent(figures[key]), f"{noted}by the run itself")
    if figures["loss"] is not None:
        yield Key("Cross-entropy", three_digits(figures["loss"]), f"nats; {noted}by the run itself")


def _progress_keys(run: RunFiles[Any], figures: dict[str, Any]) -> Iterator[Key]:
    """Speed, skipped steps and unreadable images."""
    if figures["images_per_second"] is not None:
        rows = len(run.series("images_per_second", "train")[1])
        yield Key("Images per second", f"{figures['images_per_second']:,.0f}", f"median of n = {rows:,} log rows")
    if figures["skipped"]:
        yield Key("Steps skipped", f"{figures['skipped']:,}", "of the optimiser, so far")
    if figures["bad_images"]:
        yield Key("Images that cannot be read", f"{figures['bad_images']:,}", "each counted once; see bad_images.jsonl")


def _density_keys(run: RunFiles[Recipe], sample: Sample | None, figures: dict[str, Any]) -> Iterator[Key]:
    asked = figures["density_asked"]
    if asked is not None:
        yield Key("Density asked for", f"{asked:.3g}", "target.density")
    if (target := run.recipe.target) is not None:
        mu, sigma = target.law()
        note = f"P(Y > 0) of the law p = {target.p:g}, mu = {mu:.4g}, sigma = {sigma:.4g}"
        yield Key(
            "Density in theory", three_digits(figures["density_theory"]), note + ("" if asked is not None else "; the recipe gives mu")
        )
    if sample is not None:
        interval = f"95 % interval {three_digits(figures['density_low'])} to {three_digits(figures['density_high'])}"
        yield Key("Density measured", three_digits(figures["density"]), f"{interval}; {sample.size}, evaluation mode")
        yield Key("Dead dimensions", f"{figures['dead']:,} of {figures['dim']:,}", f"zero in all {len(sample.z):,} {sample.split} images")
        return
    scored = f"{_scored(run, figures)} images"
    if figures["density_eval"] is not None:
        yield Key("Density measured", three_digits(figures["density_eval"]), f"{scored}, evaluation mode, by the run itself")
    if figures["dead_eval"] is not None:
        yield Key("Dead dimensions", percent(figures["dead_eval"]), f"zero in {scored}, by the run itself")


def _scored(run: RunFiles[Recipe], figures: dict[str, Any]) -> str:
    """Number of images in the run's own evaluation, or its upper bound."""
    return f"n = {figures['scored']:,}" if figures["scored"] else f"n ≤ {max(run.recipe.probe.eval_images, run.recipe.probe.bank):,}"


# --- curves ---------------------------------------------------------------------------------------------------------------------------


class _Panel(NamedTuple):
    """One chart of the training curves."""

    title: str
    note: str
    lines: list[Line]
    levels: list[Level]
    log: bool = False
    zero: bool = True


_WITHOUT_PANEL = {"step", "epoch", "l1", "mean", "variance", "covariance", "excess", "floor", "probe_loss", "skipped", "bad_images"}
"""Numbers of training rows that have no chart of their own."""
_IN_PANELS = {"loss", "invariance", "matching", "l0", "dead", "probe_z", "probe_features", "grad_norm", "lr", "images_per_second"}
"""Numbers of training rows that the charts below show. Any other number is a term of the objective and gets a chart under its own name."""


def training_section(run: RunFiles[Any], figures: dict[str, Any]) -> Section:
    """One small chart per quantity that the run logged."""
    if isinstance(run.recipe, TuningRecipe):
        measured = [*_classifier_panels(run, figures)]
    else:
        measured = [*_objective_panels(run), *_measure_panels(run, figures)]
    panels = [panel for panel in (*measured, *_speed_panels(run)) if panel.lines]
    charts = [Figure(p.title, curves(_in_words(p), p.lines, p.levels, p.log, p.zero), p.note) for p in panels]
    return Section("Training", figures=charts)


def _line(run: RunFiles[Any], key: str, label: str, color: str = ACCENT, kind: str = "train") -> list[Line]:
    """The curve of a logged number, if there are values."""
    steps, values = run.series(key, kind)
    return [Line(label, steps, values, color, dots=kind == "eval")] if steps else []


def _batch(run: RunFiles[Any]) -> str:
    return f"n = {run.recipe.train.batch_size:,} images a batch"


def _objective_panels(run: RunFiles[Recipe]) -> Iterator[_Panel]:
    """The loss and its terms, as the objective names them."""
    n, floor = _batch(run), run.last("floor")
    floors = [Level("floor of a finite batch", floor)] if floor is not None and floor > 0 else []
    yield _Panel("Loss", n, _line(run, "loss", "loss"), [], zero=False)
    yield _Panel("Invariance", f"mean squared difference of views; {n}", _line(run, "invariance", "invariance"), [])
    yield _Panel(
        "Matching and its floor", f"sliced W2² to the target; {n}", _line(run, "matching", "matching"), floors, log=True, zero=False
    )
    logged = {key for row in run.rows if row.get("kind") == "train" for key in row}
    for key in sorted(logged - _IN_PANELS - _WITHOUT_PANEL):
        yield _Panel(key, f"term of the objective; {n}", _line(run, key, key), [], zero=False)


def _measure_panels(run: RunFiles[Recipe], figures: dict[str, Any]) -> Iterator[_Panel]:
    """Density, accuracy and dead dimensions."""
    n, scored, theory = _batch(run), _scored(run, figures), figures["density_theory"]
    asked = ", as asked" if figures["density_asked"] is not None else ""
    levels = [] if theory is None else [Level(f"target law{asked}: {three_digits(theory)}", theory)]
    density = _line(run, "l0", "training batches") + _line(run, "l0_eval", "evaluation mode", INK, "eval")
    yield _Panel("Density of z", f"share of coordinates above 0; {n}", density, levels)
    probes = _line(run, "probe_z", "probe, z") + _line(run, "probe_features", "probe, features", SECOND)
    knn = _line(run, "knn_z", "kNN, z", ACCENT, "eval") + _line(run, "knn_features", "kNN, features", SECOND, "eval")
    yield _Panel("Accuracy", f"online probes: {n}; kNN: {scored}", probes + knn, [])
    dead = _line(run, "dead", "training batches") + _line(run, "dead_eval", "evaluation mode", INK, "eval")
    yield _Panel("Dead dimensions", f"share that is 0 in every image; {n}, {scored} in evaluation", dead, [])


def _classifier_panels(run: RunFiles[TuningRecipe], figures: dict[str, Any]) -> Iterator[_Panel]:
    """Loss and accuracy of a classifier."""
    noted = f"{_batch(run)}; evaluation: " + ("-" if figures["n_test"] is None else f"n = {figures['n_test']:,} images")
    loss = _line(run, "loss", "training batches") + _line(run, "loss", "evaluation", INK, "eval")
    yield _Panel("Loss", f"cross-entropy in nats; {noted}", loss, [], zero=False)
    top1 = _line(run, "top1_train", "top-1, training batches") + _line(run, "top1", "top-1, evaluation", INK, "eval")
    yield _Panel("Accuracy", noted, top1 + _line(run, "top5", "top-5, evaluation", SECOND, "eval"), [])


def _speed_panels(run: RunFiles[Any]) -> Iterator[_Panel]:
    """Gradient norm, learning rate and throughput."""
    yield _Panel("Norm of the gradient", "before clipping, if there is any", _line(run, "grad_norm", "norm"), [], log=True, zero=False)
    yield _Panel("Learning rate", "", _line(run, "lr", "learning rate"), [])
    yield _Panel("Images per second", "between log rows, evaluation left out", _line(run, "images_per_second", "images per second"), [])


def _in_words(panel: _Panel) -> str:
    """Text for readers who do not see the chart: first and last value of each line."""
    lines = (f"{a.label}: {a.y[0]:.4g} at step {a.x[0]:g}, {a.y[-1]:.4g} at step {a.x[-1]:g}" for a in panel.lines)
    return f"{panel.title} over steps. {'; '.join(lines)}"


# --- origin ---------------------------------------------------------------------------------------------------------------------------


def origin(run: RunFiles[Any], info: dict[str, Any], command: str) -> Origin:
    """Recorded facts and versions, the recipe, and the command that makes the page."""
    facts = [(str(key), str(value)) for key, value in (info.get("training") or {}).items()]
    versions = run.summary.get("versions") or info.get("versions") or {}
    facts += [("versions", ", ".join(f"{key} {value}" for key, value in versions.items()))] if versions else []
    return Origin(Table([], facts, "Recorded by the run"), (run.path / "recipe.yaml").read_text("utf-8"), command)
