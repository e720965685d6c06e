"""Sections of a report that measure the published encoder: law of z, firing rates, nearest neighbours, units."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.images import Images
from ..distributions import RectifiedGeneralizedGaussian
from ..evaluation.diagnostics import (
    Array,
    choose_queries,
    coordinate_distances,
    distance_floor,
    neighbours,
    quantiles,
    selective_units,
)  # fmt: skip
from ..evaluation.intervals import share_interval
from ..evaluation.probes.knn import knn_accuracy
from ..hub.card_figures import ACCENT
from .charts import Chart, Level, Line, density, histogram, quantile_plot, ranked
from .page import Figure, Section, Table, Tile, TileRow, percent, picture, sheet, three_digits, thumbnail

__all__ = ["Sample", "law_section", "neighbours_section", "rates_section", "units_section"]


class Sample(NamedTuple):
    """Embeddings of the images that the report measures."""

    z: Array
    """(n, D) float32."""
    images: Images
    """Those n images."""
    available: int
    """Number of images from which they were drawn."""
    split: str
    """evaluation or training."""
    unreadable: int
    """Drawn images that cannot be read."""
    info: dict[str, Any]
    """`config.info` of the encoder."""

    @property
    def size(self) -> str:
        """Number and kind of images, for captions."""
        return f"n = {len(self.z):,} {self.split} images"

    def class_name(self, row: int) -> str:
        """Class of an image; empty if unknown."""
        labels, names = self.images.labels, self.images.classes
        if labels is None or labels[row] < 0:
            return ""
        return names[labels[row]] if names is not None and labels[row] < len(names) else str(labels[row])


def law_section(sample: Sample, law: RectifiedGeneralizedGaussian, figures: dict[str, Any]) -> Section:
    """Measured against theoretical density, and the distribution of the coordinates against the law."""
    theory, measured = figures["density_theory"], figures["density"]
    relative = measured / theory - 1
    inside = figures["density_low"] <= theory <= figures["density_high"]
    sentence = (
        f"Measured density {three_digits(measured)} against {three_digits(theory)} in theory: "
        f"{percent(abs(relative))} {'above' if relative > 0 else 'below'}"
    )
    sentence += ", within the 95 % interval." if inside else ", outside the 95 % interval, so sampling does not explain it."
    distances, floor = coordinate_distances(sample.z, law), distance_floor(len(sample.z), law)
    return Section(
        "Law of z", sentence, alarm=abs(relative) > 0.1 and not inside, figures=_law_figures(sample, law, figures, distances, floor),
        table=_farthest(sample, law, theory, distances, floor),
    )  # fmt: skip


def _law_figures(
    sample: Sample, law: RectifiedGeneralizedGaussian, figures: dict[str, Any], distances: Array, floor: float
) -> list[Figure]:
    z, theory, measured = sample.z, figures["density_theory"], figures["density"]
    size = f"{sample.size}, D = {z.shape[1]:,} coordinates each"
    law_top = float(law.icdf(torch.tensor(0.999, dtype=torch.float64)))
    top = f"99.9 % quantile {float(np.quantile(z, 0.999)):.3g} measured, {law_top:.3g} in theory"
    return [
        Figure(
            "Zeros, and values above zero",
            density(f"Share of zeros {1 - measured:.3f} measured, {1 - theory:.3f} in theory; {top}.", z, law),
            f"{size}. The atom at zero is the share of coordinates that are exactly 0.",
        ),
        Figure(
            "Q-Q plot of all coordinates",
            quantile_plot(f"Quantiles of z against those of the target law; {top}.", quantiles(z, law)),
            f"{size}. Zeros end at the {100 * (1 - measured):.1f} % quantile of z and at {100 * (1 - theory):.1f} % of the law; the curve ends "
            "where ten coordinates are left above it.",
        ),
        Figure(
            "Distance of each coordinate to the law",
            ranked(
                f"1-Wasserstein distances from {distances.max():.3g} down to {distances.min():.3g}; {floor:.3g} for draws of the law.",
                distances, Level(f"draws of the law: {floor:.2g}", floor), "1-Wasserstein distance", "coordinates, worst first",
            ),
            f"{size}. Mean {distances.mean():.3g}; n draws of the law itself are at {floor:.2g}.",
        ),
    ]  # fmt: skip


def _farthest(sample: Sample, law: RectifiedGeneralizedGaussian, theory: float, distances: Array, floor: float) -> Table:
    """The six coordinates with the largest distance, and the law itself."""
    z = sample.z
    worst = np.argsort(-distances, kind="stable")[:6]
    rows = [[str(j), *map(three_digits, (distances[j], (z[:, j] > 0).mean(), z[:, j].mean(), z[:, j].std()))] for j in worst]
    rows.append(["target law", *map(three_digits, (floor, theory, float(law.mean), float(law.variance) ** 0.5))])
    head = ["coordinate", "distance", "density", "mean", "std. dev."]
    return Table(head, rows, f"The coordinates farthest from the law (1-Wasserstein); {sample.size}")


def rates_section(sample: Sample, figures: dict[str, Any]) -> Section:
    """How often each dimension is active, and how many dimensions are active in an image."""
    z, theory = sample.z, figures["density_theory"]
    dim, rates = z.shape[1], (z > 0).mean(0)
    target = "" if theory is None else f"; target {theory:.3f}"
    level = None if theory is None else Level(f"target law: {three_digits(theory)}", theory)
    bins = np.linspace(0, max(float(rates.max()), theory or 0.0) * 1.02, 31)
    counted = "share of images in which a dimension is above 0"
    charts = [
        Figure(
            "Firing rates, sorted",
            ranked(
                f"Rates from {rates.max():.3f} down to {rates.min():.3f}{target}.", rates, level, "share of images", "dimensions, most active first"
            ),
            f"{sample.size}; D = {dim:,}. Median {np.median(rates):.3f}, 5 % to 95 %: {np.quantile(rates, 0.05):.3f} to {np.quantile(rates, 0.95):.3f}.",
        ),
        Figure(
            "Firing rates, histogram", histogram(f"Histogram of {dim} firing rates.", rates, bins, level, counted, "dimensions"),
            f"{sample.size}; D = {dim:,}.",
        ),
        _active_figure(sample, figures),
    ]  # fmt: skip
    note = f"{figures['dead']:,} of {dim:,} dimensions are dead (0 in every image), {figures['always_on']:,} always on (above 0 in every image)"
    return Section("Firing rates", f"{note}; {sample.size}.", figures=charts)


def _active_figure(sample: Sample, figures: dict[str, Any]) -> Figure:
    """Histogram of active dimensions per image, with the counts expected of independent coordinates of the same density."""
    from scipy import stats

    (n, dim), theory = sample.z.shape, figures["density_theory"]
    active = (sample.z > 0).sum(1)
    mean, spread = float(active.mean()), float(active.std())
    independent = stats.binom(dim, figures["density"])
    low, high = min(active.min(), independent.ppf(0.001)), max(active.max(), independent.ppf(0.999))
    width = max(1, int(np.ceil((high - low + 1) / 40)))
    edges = np.arange(low, high + width + 1, width) - 0.5
    expected = Line("independent coordinates", (edges[:-1] + edges[1:]) / 2, n * np.diff(independent.cdf(edges)), ACCENT)
    chart: Chart = histogram(
        f"Histogram: mean {mean:.1f}, standard deviation {spread:.1f}, of {dim}.", active, edges,
        None if theory is None else Level(f"target: {theory * dim:.4g}", theory * dim), "dimensions above 0", "images", expected,
    )  # fmt: skip
    note = f"{sample.size}. Mean {mean:.1f} of {dim:,}, standard deviation {spread:.1f}; "
    return Figure(
        "Active dimensions of an image", chart, f"{note}independent coordinates of the same density: {float(independent.std()):.1f}."
    )


def neighbours_section(sample: Sample) -> Section:
    """Random queries with their six nearest neighbours, and the share of images whose nearest neighbour has their class."""
    labels = sample.images.labels
    queries = choose_queries(sample.z, labels)
    rows = []
    for query, nearest in zip(queries, neighbours(sample.z, queries), strict=True):
        name = sample.class_name(query)
        tiles = [_tile(sample, query, "query", name or "query", [f"{int((sample.z[query] > 0).sum())} active"])]
        for neighbour in nearest:
            other = sample.class_name(neighbour.row)
            kind = "plain" if not (name and other) else "right" if name == other else "wrong"
            mark = {"right": "✓ ", "wrong": "✗ ", "plain": ""}[kind]
            tiles.append(_tile(sample, neighbour.row, kind, mark + other, [f"cos {neighbour.cosine:.2f}", f"{neighbour.shared} shared"]))
        rows.append(TileRow(f"Nearest neighbours of {sample.images.ids[query]}", tiles))
    text = (
        f"Queries (left, framed) are drawn with a fixed seed from {sample.size}, of different classes where there are labels. Then the six "
        "nearest by cosine of z, with the number of dimensions in which both are active."
    )
    return Section("Nearest neighbours", text + _same_class(sample), tiles=rows)


def _same_class(sample: Sample) -> str:
    """Sentence about the nearest neighbours of all labelled images; empty if fewer than two have labels."""
    labels = sample.images.labels
    if labels is None or (labels >= 0).sum() < 2:
        return ""
    z, y = torch.from_numpy(sample.z), torch.from_numpy(labels)
    count = int((labels >= 0).sum())
    share = knn_accuracy(z, y, z, y, k=1, leave_one_out=True)
    low, high = share_interval(share, count)
    return (
        f" Of all n = {count:,} labelled images, {percent(share)} (95 % interval {100 * low:.1f} to {100 * high:.1f}) have a nearest neighbour "
        "of their own class."
    )


def _tile(sample: Sample, row: int, kind: str, title: str, lines: list[str]) -> Tile:
    words = {"query": "query", "right": "same class", "wrong": "other class", "plain": "neighbour"}[kind]
    alt = f"{words}: image {sample.images.ids[row]} {sample.class_name(row)}".rstrip()
    return Tile(kind, picture(thumbnail(sample.images, row), alt), title, lines)


def units_section(sample: Sample) -> Section:
    """The images that activate selected units most."""
    figures = []
    for unit, rows in selective_units(sample.z, sample.images.labels):
        names = [sample.class_name(row) for row in rows]
        common = max(sorted(set(names)), key=names.count)
        title = f"Unit {unit}" + (f": {names.count(common)} of {len(rows)} are {common}" if common else "")
        drawing = picture(sheet(sample.images, rows), f"The {len(rows)} images that excite unit {unit} most")
        figures.append(Figure(title, drawing, f"fires on {percent(float((sample.z[:, unit] > 0).mean()))} of images"))
    if not figures:
        return Section("Units", "No unit is above 0 for any image.")
    text = f"The images that excite a unit most, strongest first; {sample.size}. "
    if sample.images.labels is not None:
        text += "Units are selected for showing one class, at most two for each; these are the most selective units, not typical ones."
    else:
        text += "Units that fire most strongly."
    return Section("What selective units see", text, figures=figures, small=True)
