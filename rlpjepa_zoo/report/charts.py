"""Charts of a report as inline SVG: text stays text, nothing is loaded from outside, equal numbers give equal bytes."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from markupsafe import Markup

from ..distributions import RectifiedGeneralizedGaussian
from ..evaluation.diagnostics import Array, Quantiles
from ..hub.card_figures import ACCENT, INK, SECOND, SOFT

__all__ = ["Chart", "Level", "Line", "curves", "density", "histogram", "quantile_plot", "ranked", "thin"]

_STYLE = {
    "svg.hashsalt": "rlpjepa_zoo", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5, "text.color": INK, "axes.linewidth": 0.8,
    "axes.edgecolor": "#7b8794", "axes.labelcolor": "#5d6b7a", "xtick.color": "#5d6b7a", "ytick.color": "#5d6b7a", "axes.axisbelow": True,
}  # fmt: skip
_QUIET = "#5d6b7a"


class Chart(NamedTuple):
    """A chart as the parts of an SVG element."""

    alt: str
    """Content of the chart in words."""
    view_box: str
    content: Markup
    """Child elements; their ids differ from those of every other chart."""


class Line(NamedTuple):
    """Points of one curve."""

    label: str
    x: Sequence[float] | Array
    y: Sequence[float] | Array
    color: str = ACCENT
    dots: bool = False
    """Whether the points are drawn as dots instead of being joined."""


class Level(NamedTuple):
    """A dashed line at a value: horizontal, in a histogram vertical."""

    label: str
    value: float
    color: str = SECOND


def thin(x: Array, y: Array, most: int = 500) -> tuple[Array, Array]:
    """At most `most` points of a curve: the first, the last, and the lowest and highest of every interval between.

    Args:
        x, y: (n,), in the order of x.
        most: at least 4.

    Example:
        >>> x = np.arange(10_000.0)
        >>> y = np.where(x == 1234, 9.0, np.sin(x))
        >>> a, b = thin(x, y)
        >>> len(a) <= 500, float(b.max())
        (True, 9.0)
    """
    if len(x) <= most:
        return x, y
    chosen = {0, len(x) - 1}
    edges = np.linspace(0, len(x), (most - 2) // 2 + 1).astype(int)
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        chosen |= {start + int(np.argmin(y[start:stop])), start + int(np.argmax(y[start:stop]))}
    rows = np.array(sorted(chosen))
    return x[rows], y[rows]


def curves(alt: str, lines: Sequence[Line], levels: Sequence[Level] = (), log: bool = False, zero: bool = False) -> Chart:
    """Lines over steps.

    Args:
        alt: content of the chart in words.
        lines, levels: curves and horizontal lines; a level on a logarithmic scale must be above 0.
        log: logarithmic scale; values that are not above 0 are left out.
        zero: the scale starts at 0.
    """
    with _drawing() as (figure, axes):
        for line in lines:
            x, y = np.asarray(line.x, float), np.asarray(line.y, float)
            x, y = (x[y > 0], y[y > 0]) if log else (x, y)
            x, y = (x, y) if line.dots else thin(x, y)
            dots = line.dots or len(x) < 2
            axes.plot(x, y, "o" if dots else "-", color=line.color, ms=3.5, lw=1.4, label=line.label, zorder=3 if dots else 2)
        for level in levels:
            axes.axhline(level.value, color=level.color, ls="--", lw=1.2, label=level.label)
        if log:
            axes.set_yscale("log")
            _log_ticks(axes)
        if zero:
            axes.set_ylim(0, None)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(_ticks())
        _legend(figure, axes)
        return _svg(figure, alt)


def density(alt: str, z: Array, law: RectifiedGeneralizedGaussian) -> Chart:
    """Two panels, measured and of the law: the share of zeros, and the probability density of the values above zero."""
    values = z[z > 0]
    top = max(float(np.quantile(values, 0.999)) if len(values) else 0.0, float(law.icdf(torch.tensor(0.999, dtype=torch.float64))), 1e-6)
    heights, edges = np.histogram(values, np.linspace(0, top, 45))
    with _drawing(2, (1, 2.1)) as (figure, zeros, axes):
        shares = [float((z == 0).mean()), 1 - float(law.l0)]
        for x, share, color in zip((0, 1), shares, (SOFT, SECOND), strict=True):
            zeros.bar(x, share, 0.62, color=color)
            zeros.text(x, share + 0.02, f"{share:.3f}", ha="center", va="bottom", fontsize=8.5)
        zeros.set_xticks((0, 1), ("z", "law"))
        zeros.set(xlim=(-0.55, 1.55), ylim=(0, 1.12), ylabel="share of zeros")
        width = edges[1] - edges[0]
        axes.bar(edges[:-1], heights / z.size / width, width, align="edge", color=SOFT, label="measured")
        at = torch.linspace(top * 1e-3, top, 200, dtype=torch.float64)
        axes.plot(at.numpy(), law.log_prob(at).exp().numpy(), color=SECOND, lw=1.8, label="target law")
        axes.set(xlabel="value above 0", ylabel="probability density", yscale="log", xlim=(0, top))
        _log_ticks(axes)
        _legend(figure, axes)
        return _svg(figure, alt)


def quantile_plot(alt: str, quantiles: Quantiles) -> Chart:
    """Quantiles of all coordinates against those of the law, with the diagonal of equality."""
    with _drawing() as (figure, axes):
        top = float(max(quantiles.target.max(), quantiles.measured.max(), 1e-6)) * 1.04
        axes.plot([0, top], [0, top], color=SECOND, ls="--", lw=1.2, label="equal")
        axes.plot(quantiles.target, quantiles.measured, "-", color=ACCENT, lw=1.8, label="quantiles of z")
        for share, name in ((0.1, "90 %"), (0.01, "99 %"), (0.001, "99.9 %"), (0.0001, "99.99 %")):
            near = int(np.argmin(np.abs(np.log(quantiles.above / share))))
            if abs(np.log(quantiles.above[near] / share)) < 0.2 and quantiles.target[near] > 0.03 * top:
                axes.plot(quantiles.target[near], quantiles.measured[near], "o", color=INK, ms=4, zorder=4)
                axes.annotate(
                    name, (quantiles.target[near], quantiles.measured[near]), (7, -9), textcoords="offset points", fontsize=9, color=_QUIET
                )
        axes.set(xlabel="quantile of the target law", ylabel="quantile of z, measured", xlim=(0, top), ylim=(0, top))
        _legend(figure, axes)
        return _svg(figure, alt)


def ranked(alt: str, values: Array, level: Level | None, label: str, ranks: str) -> Chart:
    """Values from the largest to the smallest, with a level if given."""
    with _drawing() as (figure, axes):
        x, y = thin(np.arange(1.0, len(values) + 1), np.sort(values)[::-1])
        axes.fill_between(x, y, color=SOFT, alpha=0.55, lw=0)
        axes.plot(x, y, "-" if len(x) > 1 else "o", color=INK, lw=1.4, label="measured")
        if level is not None:
            axes.axhline(level.value, color=level.color, ls="--", lw=1.2, label=level.label)
        axes.set(xlabel=ranks, ylabel=label, ylim=(0, None), xlim=(1, max(2, len(values))))
        axes.xaxis.set_major_locator(_ticks())
        _legend(figure, axes)
        return _svg(figure, alt)


def histogram(alt: str, values: Array, edges: Array, level: Level | None, label: str, counted: str, expected: Line | None = None) -> Chart:
    """A histogram with a level and the expected counts, each if given.

    Args:
        alt: content of the chart in words.
        values, edges: what is counted, and the edges of its bins.
        level: vertical line.
        label, counted: names of the axes.
        expected: curve of expected counts.
    """
    with _drawing() as (figure, axes):
        heights, edges = np.histogram(values, edges)
        axes.bar(edges[:-1], heights, np.diff(edges), align="edge", color=SOFT, label="measured", edgecolor="white", lw=0.4)
        if expected is not None:
            axes.plot(expected.x, expected.y, color=expected.color, lw=1.6, label=expected.label)
        if level is not None:
            axes.axvline(level.value, color=level.color, ls="--", lw=1.2, label=level.label)
        axes.set(xlabel=label, ylabel=counted)
        axes.yaxis.set_major_locator(_ticks())
        _legend(figure, axes)
        return _svg(figure, alt)


@contextmanager
def _drawing(panels: int = 1, ratios: tuple[float, ...] | None = None) -> Iterator[tuple[Any, ...]]:
    """A figure and its panels from left to right, in the style of the report; write the figure inside the context."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.15, 2.75), layout="constrained", facecolor="none")
        row = figure.subplots(1, panels, squeeze=False, width_ratios=ratios)[0]
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#e3e8ed", lw=0.7)
        yield figure, *row


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(6, integer=True)


def _log_ticks(axes: Any) -> None:
    """Plain numbers on a logarithmic scale, also between the powers of ten if the range has few of those."""
    from matplotlib.ticker import FuncFormatter

    low, high = axes.get_ylim()

    def between(value: float, position: Any) -> str:
        return f"{value:.2g}" if high / low < 30 and round(value / 10 ** np.floor(np.log10(value))) in (2, 5) else ""

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(between))


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9, handlelength=1.6, columnspacing=1.4)


def _svg(figure: Any, alt: str) -> Chart:
    """The figure as SVG without addresses, without page-wide style, and with ids that no other chart has."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    start, view_box = text.index("<svg"), re.search(r'viewBox="([^"]*)"', text)
    content = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index(">", start) + 1 :], flags=re.S)
    prefix = "c" + hashlib.sha256(content.encode()).hexdigest()[:8]
    content = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", content)
    content = re.sub(r">\s+<", "><", content).strip().removesuffix("</svg>")
    return Chart(alt, view_box[1] if view_box else "", Markup(content))
