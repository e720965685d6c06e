"""Pictures of a run, drawn with matplotlib (imported when the first is drawn) without a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .diagnostics import selective_units
from .distributions import RectifiedGeneralizedGaussian
from .images import Images

INK, ACCENT, SECOND, SOFT = "#1b2a41", "#c8553d", "#2a7f9e", "#b8c4d0"
_MEASURES = {"linear": ("linear", ACCENT), "knn": ("kNN", INK), "one_shot": ("1-shot", SECOND)}


def overview(
    path: str | Path, history: list[dict[str, Any]], law: RectifiedGeneralizedGaussian, z: Tensor, images: Images, results: dict[str, Any], title: str
) -> Path:  # fmt: skip
    """One page about a run: density over time, the law of z against its target, accuracy against active dimensions, what units see.

    Args:
        path: .png or .svg.
        history: what `training` takes.
        law: the target.
        z: (n, D) embeddings of `images`, evaluation mode.
        results: what `accuracy` takes.
        title: printed on top.
    """
    figure = _figure(13, 7.8)
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 0.92), hspace=0.4, wspace=0.42, left=0.05, right=0.985, top=0.885, bottom=0.02)
    figure.suptitle(title, x=0.05, ha="left", fontsize=14, color=INK, fontweight="bold")
    _training(figure.add_subplot(grid[0, 0]), history, float(law.l0))
    _law(figure.add_subplot(grid[0, 1]), law, z)
    _curve(figure.add_subplot(grid[0, 2]), results)
    _units(figure, grid[1, :], z, images)
    _tidy(figure)
    figure.savefig(path)
    return Path(path)


def training(history: list[dict[str, Any]], theory: float) -> bytes:
    """PNG: density of z and distance to the target over the steps of a run.

    Args:
        history: rows with step and, where measured, l0 (training batches), excess (distance above its floor) and l0_eval.
        theory: density of the target law, drawn as a line.
    """
    figure = _figure(7.2, 3.8)
    _training(figure.add_subplot(), history, theory)
    return _png(figure)


def accuracy(results: dict[str, Any]) -> bytes:
    """PNG: accuracy of z against the number of largest values kept, with the full representations as lines.

    Args:
        results: report of `rlpjepa_zoo.evaluation.evaluate` with its `curve`.
    """
    figure = _figure(7.2, 3.8)
    _curve(figure.add_subplot(), results)
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, facecolor="white")


def _tidy(figure: Any) -> None:
    for axes in figure.axes:
        axes.spines["top"].set_visible(False)
        axes.spines["right"].set_visible(axes.yaxis.get_label_position() == "right")


def _png(figure: Any) -> bytes:
    _tidy(figure)
    figure.tight_layout()
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})  # the same picture, the same bytes
    return file.getvalue()


def _training(axes: Any, history: list[dict[str, Any]], theory: float) -> None:
    rows = [r for r in history if r.get("l0") is not None]
    axes.plot([r["step"] for r in rows], [r["l0"] for r in rows], color=ACCENT, lw=1.8, label="density of z, training")
    tested = [r for r in history if r.get("l0_eval") is not None]
    axes.plot([r["step"] for r in tested], [r["l0_eval"] for r in tested], "o", color=INK, ms=5, label="density of z, evaluation mode")
    axes.axhline(theory, color=SECOND, ls="--", lw=1.4, label=f"theory of the target: {theory:.3f}")
    axes.set(xlabel="step", ylim=(0, None), title="Density while training")
    far = [r for r in rows if r.get("excess") is not None]
    if far:
        other = axes.twinx()
        other.plot([r["step"] for r in far], [max(r["excess"], 1e-9) for r in far], color=SOFT, lw=1.4)
        other.set_yscale("log")
        other.yaxis.set_label_position("right")
        other.tick_params(axis="y", which="both", colors="#7b8794", labelsize=7)
        other.spines["right"].set_color(SOFT)
        axes.plot([], [], color=SOFT, lw=1.4, label="distance above its floor (right)")
        axes.set_zorder(other.get_zorder() + 1)
        axes.patch.set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _law(axes: Any, law: RectifiedGeneralizedGaussian, z: Tensor) -> None:
    values = z.flatten().numpy()
    positive = values[values > 0]
    top = float(np.quantile(positive, 0.995)) if len(positive) else 1.0
    edges = np.linspace(0, top, 50)
    counts, _ = np.histogram(positive, edges)
    width = edges[1] - edges[0]
    axes.bar(edges[:-1], counts / len(values) / width, width, align="edge", color=SOFT, label="measured, z > 0")
    x = torch.linspace(1e-3, top, 300)
    axes.plot(x, law.log_prob(x).exp(), color=SECOND, lw=2, label="target")
    measured = (values == 0).mean()
    axes.text(
        0.97,
        0.62,
        f"zeros\nmeasured {measured:.1%}\ntarget {1 - float(law.l0):.1%}",
        transform=axes.transAxes,
        ha="right",
        color=INK,
        fontsize=9,
    )
    axes.set(xlabel="value of a coordinate", ylabel="probability density", title="Law of the embedding (test images)", yscale="log")
    axes.legend(frameon=False, fontsize=8)


def _curve(axes: Any, results: dict[str, Any]) -> None:
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


def _units(figure: Any, place: Any, z: Tensor, images: Images) -> None:
    """The images that excite twelve units most."""
    chosen = selective_units(z.numpy(), images.labels)
    heading = place.get_position(figure)
    text = f"What single units see: the 8 test images that excite each of {len(chosen)} units most"
    figure.text(heading.x0, heading.y1 + 0.035, text, color=INK, fontsize=11.5)
    inner = place.subgridspec(2, 6, hspace=0.3, wspace=0.08)
    for cell, (unit, rows) in enumerate(chosen):
        axes = figure.add_subplot(inner[cell // 6, cell % 6])
        axes.imshow(sheet(images, rows))
        fires = float((z[:, unit] > 0).float().mean())
        axes.set_title(f"unit {unit}, fires on {fires:.0%}", fontsize=8, color=INK, pad=3)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(SOFT)


def thumbnail(images: Images, row: int, side: int = 64) -> Image.Image:
    """The middle square of an image; small ones are enlarged without smoothing, so that their pixels stay what they are."""
    image = images.read(row)
    method = Image.Resampling.NEAREST if min(image.size) <= side else Image.Resampling.BICUBIC
    return ImageOps.fit(image, (side, side), method)


def sheet(images: Images, rows: Sequence[int], across: int = 4, down: int = 2, side: int = 64) -> Image.Image:
    """Thumbnails of some images on white, from left to right and top to bottom."""
    page = Image.new("RGB", (across * (side + 2), down * (side + 2)), "white")
    for place, row in enumerate(rows[: across * down]):
        page.paste(thumbnail(images, row, side), (place % across * (side + 2) + 1, place // across * (side + 2) + 1))
    return page
