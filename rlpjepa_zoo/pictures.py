"""Pictures of a run, drawn with matplotlib without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .distributions import RectifiedGeneralizedGaussian
from .images import Images

INK, ACCENT, SECOND, SOFT = "#1b2a41", "#c8553d", "#2a7f9e", "#b8c4d0"


def overview(
    path: str | Path, rows: list[dict[str, Any]], law: RectifiedGeneralizedGaussian, z: Tensor, images: Images, curve: dict[int, tuple[float, float]],
    scores: dict[str, dict[str, float]], title: str,
) -> Path:  # fmt: skip
    """One page about a run: density over time, the law of z against its target, accuracy against active dimensions, what units see.

    Args:
        path: .png or .svg.
        rows: lines of metrics.jsonl.
        law: the target.
        z: (n, D) embeddings of `images`, evaluation mode.
        curve: active dimensions -> (linear, 1-shot) accuracy.
        scores: representation -> {"linear": ..., "1-shot": ...} drawn as reference lines in the curve.
        title: printed on top.
    """
    figure = Figure(figsize=(13, 7.8), dpi=130, facecolor="white")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 0.92), hspace=0.4, wspace=0.36, left=0.05, right=0.985, top=0.885, bottom=0.02)
    figure.suptitle(title, x=0.05, ha="left", fontsize=14, color=INK, fontweight="bold")
    _training(figure.add_subplot(grid[0, 0]), rows, law)
    _law(figure.add_subplot(grid[0, 1]), law, z)
    _curve(figure.add_subplot(grid[0, 2]), curve, scores)
    _units(figure, grid[1, :], z, images)
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path)
    return Path(path)


def _training(axes: Any, rows: list[dict[str, Any]], law: RectifiedGeneralizedGaussian) -> None:
    steps = [r["step"] for r in rows if r["kind"] == "train"]
    axes.plot(steps, [r["l0"] for r in rows if r["kind"] == "train"], color=ACCENT, lw=1.8, label="density of z, training")
    tested = [r for r in rows if r["kind"] == "eval"]
    axes.plot([r["step"] for r in tested], [r["l0_eval"] for r in tested], "o", color=INK, ms=5, label="density of z, test images")
    axes.axhline(float(law.l0), color=SECOND, ls="--", lw=1.4, label=f"theory of the target: {float(law.l0):.3f}")
    other = axes.twinx()
    other.plot(steps, [r["excess"] for r in rows if r["kind"] == "train"], color=SOFT, lw=1.4)
    other.set_yscale("log")
    other.set_ylabel("distance to the target above its floor (log)", color="#7b8794", fontsize=8)
    other.tick_params(labelright=False, right=False, which="both")
    axes.set(xlabel="step", ylim=(0, None), title="Density while training")
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


def _curve(axes: Any, curve: dict[int, tuple[float, float]], scores: dict[str, dict[str, float]]) -> None:
    active = list(curve)
    for i, (kind, color) in enumerate((("linear", ACCENT), ("1-shot", SECOND))):
        axes.plot(active, [curve[k][i] for k in active], "o-", color=color, ms=4, lw=1.8, label=f"sparse z, {kind}")
        for name, style in (("features", ":"), ("pixels", "--")):
            axes.axhline(scores[name][kind], color=color, ls=style, lw=1, alpha=0.7, label=f"{name}, {kind}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(active, [str(k) for k in active])
    axes.minorticks_off()
    axes.set(xlabel="largest values kept per image", ylabel="accuracy", title="Accuracy against active dimensions")
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="lower right")


def _units(figure: Figure, place: Any, z: Tensor, images: Images) -> None:
    """The images that excite twelve units most; units are chosen by how pure they are, or by how strongly they fire without labels."""
    show, deep = 12, 8
    strength, which = z.topk(deep, dim=0)
    alive = strength[-1] > 0
    if images.labels is not None:
        labels = torch.from_numpy(images.labels)[which]
        purity = (labels == labels.mode(0).values).float().mean(0)
    else:
        purity = torch.zeros(z.shape[1])
    order = torch.argsort(purity * 10 + strength.mean(0) / strength.mean().clamp(min=1e-9) + alive * 100, descending=True)
    chosen: list[int] = []
    seen: dict[int, int] = {}
    for unit in order.tolist():  # spread over classes, so that the page is not one digit twelve times
        label = int(labels[:, unit].mode().values) if images.labels is not None else unit
        if seen.get(label, 0) < 2:
            chosen.append(unit)
            seen[label] = seen.get(label, 0) + 1
        if len(chosen) == show:
            break
    heading = place.get_position(figure)
    text = f"What single units see: the {deep} test images that excite each of {show} units most"
    figure.text(heading.x0, heading.y1 + 0.035, text, color=INK, fontsize=11.5)
    inner = place.subgridspec(2, 6, hspace=0.3, wspace=0.08)
    for cell, unit in enumerate(chosen):
        axes = figure.add_subplot(inner[cell // 6, cell % 6])
        tiles = [
            np.pad(np.asarray(images.read(int(i)).resize((32, 32))), ((1, 1), (1, 1), (0, 0)), constant_values=255) for i in which[:, unit]
        ]
        sheet = np.concatenate([np.concatenate(tiles[:4], axis=1), np.concatenate(tiles[4:], axis=1)], axis=0)
        axes.imshow(sheet)
        fires = float((z[:, unit] > 0).float().mean())
        axes.set_title(f"unit {unit}, fires on {fires:.0%}", fontsize=8, color=INK, pad=3)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(SOFT)
