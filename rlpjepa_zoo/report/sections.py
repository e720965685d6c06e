"""The parts of a report: what was measured on a run, in words, drawings and thumbnails."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.images import Images
from ..distributions import RectifiedGeneralizedGaussian
from ..evaluation import diagnostics
from ..evaluation.diagnostics import Array
from ..evaluation.evaluate import knn_accuracy
from ..hub.card_figures import ACCENT, INK, SECOND
from ..training.run_dir import RunFiles
from . import charts, html, plots
from .charts import Level, Line
from .html import Html, Key, figure, section, tag

__all__ = ["Codes", "render"]


class Codes(NamedTuple):
    """Embeddings of the images that the page measures."""

    z: Array
    """(n, D) float32"""
    images: Images
    """Those n images."""
    of: int
    """Images there were to choose from."""
    split: str
    """evaluation or training"""
    unreadable: int
    info: dict[str, Any]
    """The encoder's own record."""

    @property
    def n(self) -> str:
        """What was measured, for captions."""
        return f"n = {len(self.z):,} {self.split} images"


def render(run: RunFiles, codes: Codes | None, missing: str, figures: dict[str, Any], command: str) -> str:
    """The page.

    Args:
        run: what its folder says.
        codes: embeddings of evaluation images; None when there are none.
        missing: why there are none, in one line.
        figures: main figures, see `rlpjepa_zoo.report.report.write`.
        command: what makes this page.
    """
    parts = [_header(run, codes, missing, figures), _curves(run, figures)]
    if codes is not None:
        law = RectifiedGeneralizedGaussian(*run.recipe.target.law(), run.recipe.target.p)
        parts += [_law(codes, law, figures), _rates(codes, figures), _neighbours(codes), _units(codes)]
    return html.document(f"{run.recipe.name}: training report", *parts, _origin(run, codes, command))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _three(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 or value == 0 else f"{value:.2g}"


# --- what the folder says -------------------------------------------------------------------------------------------------------------


def _header(run: RunFiles, codes: Codes | None, missing: str, figures: dict[str, Any]) -> Html:
    recipe, step, steps = run.recipe, figures["step"], figures["steps"]
    status = (
        f"finished after {step:,} steps"
        if figures["finished"]
        else f"at step {step:,} of {steps:,} ({100 * step / steps:.0f}\N{NO-BREAK SPACE}%), not finished"
    )
    lead = f"{recipe.encoder.backbone}, {recipe.encoder.dim:,} dimensions; {recipe.data.label()}; {recipe.train.epochs:g} epochs; {status}"
    warnings = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in figures["alarms"]]
    if run.damaged:
        lines = "1 line" if run.damaged == 1 else f"{run.damaged} lines"
        warnings.append(
            f"{lines} of metrics.jsonl cannot be read and are left out (a run that is killed may leave its last line cut short)."
        )
    if codes is not None and codes.unreadable:
        warnings.append(f"{codes.unreadable:,} of the {codes.split} images chosen for this page cannot be read and are left out.")
    of_step = figures.get("encoder_step")
    if of_step is not None and of_step != step:
        warnings.append(f"The encoder measured here was published at step {of_step:,}; the curves go to step {step:,}.")
    return tag(
        "header", tag("h1", recipe.name), tag("p", lead, class_="lead"), *[tag("p", text, class_="alarm") for text in warnings],
        *([tag("p", f"Curves only: {missing}", class_="missing")] if missing else []), html.keys(_keys(run, codes, figures)),
    )  # fmt: skip


def _keys(run: RunFiles, codes: Codes | None, figures: dict[str, Any]) -> list[Key]:
    target, asked = run.recipe.target, figures["density_asked"]
    mu, sigma = target.law()
    law = f"P(Y > 0) of the law p = {target.p:g}, mu = {mu:.4g}, sigma = {sigma:.4g}"
    found = [Key("Density asked for", f"{asked:.3g}", "target.density")] if asked is not None else []
    found.append(Key("Density in theory", _three(figures["density_theory"]), law + ("" if asked is not None else "; mu was asked for")))
    scored = f"{_scored(run, figures)} images"
    if codes is not None:
        between = f"95 % interval {_three(figures['density_low'])} to {_three(figures['density_high'])}; {codes.n}, evaluation mode"
        found.append(Key("Density measured", _three(figures["density"]), between))
        found.append(Key("Dead dimensions", f"{figures['dead']:,} of {figures['dim']:,}", f"zero in all {codes.n[4:]}"))
    else:
        if figures["density_eval"] is not None:
            found.append(Key("Density measured", _three(figures["density_eval"]), f"{scored}, evaluation mode, by the run itself"))
        if figures["dead_eval"] is not None:
            found.append(Key("Dead dimensions", _percent(figures["dead_eval"]), f"zero in {scored}, by the run itself"))
    for key, name in (("knn_z", "kNN accuracy of z"), ("knn_features", "kNN accuracy of features")):
        if figures[key] is not None:
            note = f"k = {run.recipe.probe.knn_k}; {scored}, by the run itself"
            if figures["scored"]:
                low, high = diagnostics.share_interval(figures[key], figures["scored"])
                note = f"95 % interval {100 * low:.1f} to {100 * high:.1f}; {note}"
            found.append(Key(name, _percent(figures[key]), note))
    if figures["excess"] is not None:
        views = run.recipe.train.batch_size
        found.append(Key("Distance above its floor", f"{figures['excess']:.2g}", f"sliced W2², last batch logged, n = {views:,} images"))
    if figures["images_per_second"] is not None:
        rows = len(run.series("images_per_second", "train")[1])
        found.append(Key("Images per second", f"{figures['images_per_second']:,.0f}", f"median of n = {rows:,} log rows"))
    if figures["skipped"]:
        found.append(Key("Steps skipped", f"{figures['skipped']:,}", "of the optimiser, so far"))
    if figures["bad_images"]:
        found.append(Key("Images that cannot be read", f"{figures['bad_images']:,}", "each counted once; see bad_images.jsonl"))
    return found


def _curves(run: RunFiles, figures: dict[str, Any]) -> Html:
    """One small drawing per quantity; those that the run did not measure are left out."""

    def line(key: str, label: str, color: str = ACCENT, kind: str = "train") -> list[Line]:
        x, y = run.series(key, kind)
        return [Line(label, x, y, color, dots=kind == "eval")] if x else []

    theory = figures["density_theory"]
    law = [Level(f"target law{', as asked' if figures['density_asked'] is not None else ''}: {_three(theory)}", theory)]
    floor = run.last("floor")
    above = [Level("floor of a finite batch", floor)] if floor is not None and floor > 0 else []
    n = f"n = {run.recipe.train.batch_size:,} images a batch"
    plans: list[tuple[str, str, list[Line], list[Level], bool, bool]] = [
        ("Loss", n, line("loss", "loss"), [], False, False),
        ("Invariance", f"mean squared difference of views; {n}", line("invariance", "invariance"), [], False, True),
        ("Matching and its floor", f"sliced W2² to the target; {n}", line("matching", "matching"), above, True, False),
        (
            "Density of z", f"share of coordinates above 0; {n}",
            line("l0", "training batches") + line("l0_eval", "evaluation mode", INK, "eval"), law, False, True,
        ),
        (
            "Accuracy", f"online probes: {n}; kNN: {_scored(run, figures)}",
            line("probe_z", "probe, z") + line("probe_features", "probe, features", SECOND)
            + line("knn_z", "kNN, z", ACCENT, "eval") + line("knn_features", "kNN, features", SECOND, "eval"), [], False, True,
        ),
        (
            "Dead dimensions", f"share that is 0 in every image; {n}, {_scored(run, figures)} in evaluation",
            line("dead", "training batches") + line("dead_eval", "evaluation mode", INK, "eval"), [], False, True,
        ),
        ("Norm of the gradient", "before clipping, if there is any", line("grad_norm", "norm"), [], True, False),
        ("Learning rate", "", line("lr", "learning rate"), [], False, True),
        ("Images per second", "between log rows, evaluation left out", line("images_per_second", "images per second"), [], False, True),
    ]  # fmt: skip
    shown = [
        figure(title, charts.curves(_spoken(title, lines), lines, levels, log, zero), note)
        for title, note, lines, levels, log, zero in plans if lines
    ]  # fmt: skip
    return section("Training", tag("div", *shown, class_="grid"))


def _scored(run: RunFiles, figures: dict[str, Any]) -> str:
    """How many images the run's own evaluation looked at, or at most can have."""
    return f"n = {figures['scored']:,}" if figures["scored"] else f"n ≤ {max(run.recipe.probe.eval_images, run.recipe.probe.bank):,}"


def _spoken(title: str, lines: list[Line]) -> str:
    """The drawing for those who do not see it: where each line starts and ends."""
    return f"{title} over steps. " + "; ".join(
        f"{a.label}: {a.y[0]:.4g} at step {a.x[0]:g}, {a.y[-1]:.4g} at step {a.x[-1]:g}" for a in lines
    )


def _origin(run: RunFiles, codes: Codes | None, command: str) -> Html:
    info = codes.info if codes is not None else run.info
    facts = [(str(key), str(value)) for key, value in (info.get("training") or {}).items()]
    versions = run.summary.get("versions") or info.get("versions") or {}
    facts += [("versions", ", ".join(f"{key} {value}" for key, value in versions.items()))] if versions else []
    parts: list[str] = [html.table([], facts, "Recorded by the run")] if facts else []
    parts += [tag("details", tag("summary", "recipe.yaml"), tag("pre", (run.path / "recipe.yaml").read_text("utf-8")))]
    return section("Origin", *parts, tag("p", "This page: ", tag("code", command)))


# --- what the encoder says ------------------------------------------------------------------------------------------------------------


def _law(codes: Codes, law: RectifiedGeneralizedGaussian, figures: dict[str, Any]) -> Html:
    z, theory, density = codes.z, figures["density_theory"], figures["density"]
    n, dim = z.shape
    found = diagnostics.quantiles(z, law)
    apart = density / theory - 1
    inside = figures["density_low"] <= theory <= figures["density_high"]
    sentence = (
        f"Measured density {_three(density)} against {_three(theory)} in theory: {_percent(abs(apart))} {'above' if apart > 0 else 'below'}"
    )
    sentence += ", within the 95 % interval." if inside else ", more than the choice of images explains."
    distances, floor = diagnostics.coordinate_distances(z, law), diagnostics.distance_floor(n, law)
    worst = np.argsort(-distances, kind="stable")[:6]
    size = f"{codes.n}, D = {dim:,} coordinates each"
    top = f"99.9 % quantile {float(np.quantile(z, 0.999)):.3g} measured, {float(law.icdf(torch.tensor(0.999, dtype=torch.float64))):.3g} in theory"
    drawings = [
        figure(
            "Zeros, and values above zero", charts.density(f"Share of zeros {1 - density:.3f} measured, {1 - theory:.3f} in theory; {top}.", z, law),
            f"{size}. The atom at zero is the share of coordinates that are exactly 0.",
        ),
        figure(
            "Q-Q plot of all coordinates", charts.versus(f"Quantiles of z against those of the target law; {top}.", found),
            f"{size}. Zeros end at the {100 * (1 - density):.1f} % quantile of z and at {100 * (1 - theory):.1f} % of the law; the curve ends where ten "
            "coordinates are left above it.",
        ),
        figure(
            "Distance of each coordinate to the law",
            charts.ranked(
                f"1-Wasserstein distances from {distances.max():.3g} down to {distances.min():.3g}; {floor:.3g} for draws of the law.",
                distances, Level(f"draws of the law: {floor:.2g}", floor), "1-Wasserstein distance", "coordinates, worst first",
            ),
            f"{size}. Mean {distances.mean():.3g}; n draws of the law itself are at {floor:.2g}.",
        ),
    ]  # fmt: skip
    rows = [[str(j), *map(_three, (distances[j], (z[:, j] > 0).mean(), z[:, j].mean(), z[:, j].std()))] for j in worst]
    rows.append(["target law", *map(_three, (floor, theory, float(law.mean), float(law.variance) ** 0.5))])
    head = ["coordinate", "distance", "density", "mean", "std. dev."]
    return section(
        "Law of z", tag("p", sentence, class_="alarm" if abs(apart) > 0.1 and not inside else "lead"), tag("div", *drawings, class_="grid"),
        html.table(head, rows, f"The coordinates farthest from the law (1-Wasserstein); {codes.n}"),
    )  # fmt: skip


def _rates(codes: Codes, figures: dict[str, Any]) -> Html:
    from scipy import stats

    z, theory = codes.z, figures["density_theory"]
    n, dim = z.shape
    rates, active = (z > 0).mean(0), (z > 0).sum(1)
    mean, spread = float(active.mean()), float(active.std())
    alone = stats.binom(dim, figures["density"])
    low, high = min(active.min(), alone.ppf(0.001)), max(active.max(), alone.ppf(0.999))
    width = max(1, int(np.ceil((high - low + 1) / 40)))
    edges = np.arange(low, high + width + 1, width) - 0.5
    middles = (edges[:-1] + edges[1:]) / 2
    expected = Line("independent coordinates", middles, n * np.diff(alone.cdf(edges)), ACCENT)
    note = f"{figures['dead']:,} of {dim:,} dimensions are dead (0 in every image), {figures['always_on']:,} always on (above 0 in every image)"
    bins = np.linspace(0, max(float(rates.max()), theory) * 1.02, 31)
    at = Level(f"target law: {_three(theory)}", theory)
    drawings = [
        figure(
            "Firing rates, sorted",
            charts.ranked(f"Rates from {rates.max():.3f} down to {rates.min():.3f}; target {theory:.3f}.", rates, at, "share of images", "dimensions, most active first"),
            f"{codes.n}; D = {dim:,}. Median {np.median(rates):.3f}, 5 % to 95 %: {np.quantile(rates, 0.05):.3f} to {np.quantile(rates, 0.95):.3f}.",
        ),
        figure(
            "Firing rates, histogram",
            charts.counts(f"Histogram of {dim} firing rates.", rates, bins, at, "share of images in which a dimension is above 0", "dimensions"),
            f"{codes.n}; D = {dim:,}.",
        ),
        figure(
            "Active dimensions of an image",
            charts.counts(
                f"Histogram: mean {mean:.1f}, standard deviation {spread:.1f}, of {dim}.", active, edges,
                Level(f"target: {theory * dim:.4g}", theory * dim), "dimensions above 0", "images", expected,
            ),
            f"{codes.n}. Mean {mean:.1f} of {dim:,}, standard deviation {spread:.1f}; independent coordinates of the same density: {float(alone.std()):.1f}.",
        ),
    ]  # fmt: skip
    return section("Firing rates", tag("p", f"{note}; {codes.n}.", class_="lead"), tag("div", *drawings, class_="grid"))


def _class(codes: Codes, row: int) -> str:
    """Name of a row's class; empty where it has none."""
    labels, names = codes.images.labels, codes.images.classes
    if labels is None or labels[row] < 0:
        return ""
    return names[labels[row]] if names is not None and labels[row] < len(names) else str(labels[row])


def _neighbours(codes: Codes) -> Html:
    labels = codes.images.labels
    queries = diagnostics.choose_queries(codes.z, labels)
    rows = []
    for query, near in zip(queries, diagnostics.neighbours(codes.z, queries), strict=True):
        name = _class(codes, query)
        line = [_tile(codes, query, "query", [tag("b", name or "query"), f"{int((codes.z[query] > 0).sum())} active"])]
        for found in near:
            other = _class(codes, found.row)
            kind = "" if not (name and other) else "right" if name == other else "wrong"
            mark = {"right": "✓ ", "wrong": "✗ ", "": ""}[kind]
            line.append(_tile(codes, found.row, kind, [tag("b", mark + other), f"cos {found.cosine:.2f}", f"{found.shared} shared"]))
        rows.append(tag("div", *line, class_="near", role="group", aria_label=f"Nearest neighbours of {codes.images.ids[query]}"))
    text = f"Queries (left, framed) are drawn with a fixed seed from {codes.n}, of different classes where there are labels. Then the six nearest by cosine of z, "
    text += "with the number of dimensions in which both are active."
    if labels is not None and (labels >= 0).sum() > 1:
        z, y = torch.from_numpy(codes.z), torch.from_numpy(labels)
        count = int((labels >= 0).sum())
        same = knn_accuracy(z, y, z, y, k=1, leave_one_out=True)
        low, high = diagnostics.share_interval(same, count)
        text += (
            f" Of all n = {count:,} labelled images, {_percent(same)} (95 % interval {100 * low:.1f} to {100 * high:.1f}) have a nearest "
        )
        text += "neighbour of their own class."
    return section("Nearest neighbours", tag("p", text, class_="lead"), *rows)


def _tile(codes: Codes, row: int, kind: str, lines: list[str]) -> Html:
    words = {"query": "query", "right": "same class", "wrong": "other class", "": "neighbour"}[kind]
    image = html.picture(plots.thumbnail(codes.images, row), f"{words}: image {codes.images.ids[row]} {_class(codes, row)}".rstrip())
    parts = [part for line in lines if line for part in (line, tag("br"))][:-1]
    return tag("figure", image, tag("figcaption", *parts), class_=kind or "plain")


def _units(codes: Codes) -> Html:
    tiles = []
    for unit, rows in diagnostics.selective_units(codes.z, codes.images.labels):
        names = [_class(codes, row) for row in rows]
        most = max(sorted(set(names)), key=names.count)
        drawn = html.picture(plots.sheet(codes.images, rows), f"The {len(rows)} images that excite unit {unit} most")
        title = f"Unit {unit}" + (f": {names.count(most)} of {len(rows)} are {most}" if most else "")
        tiles.append(figure(title, drawn, f"fires on {_percent(float((codes.z[:, unit] > 0).mean()))} of images", "unit"))
    text = f"The images that excite a unit most, strongest first; {codes.n}. "
    text += "Units are chosen for showing one class, at most two for each; they are the clearest, not typical." if codes.images.labels is not None else (
        "Units that fire most strongly."
    )  # fmt: skip
    if not tiles:
        return section("Units", tag("p", "No unit is above 0 for any image.", class_="lead"))
    return section("What selective units see", tag("p", text, class_="lead"), tag("div", *tiles, class_="grid units"))
