"""Overview picture of a run, and thumbnails of images; matplotlib is imported on first use and needs no display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..data.images import Images
from ..distributions import RectifiedGeneralizedGaussian
from ..evaluation.diagnostics import selective_units
from ..hub.card_figures import INK, SECOND, SOFT, draw_accuracy, draw_training, hide_spines, new_figure


def overview(
    path: str | Path, history: list[dict[str, Any]], law: RectifiedGeneralizedGaussian, z: Tensor, images: Images, results: dict[str, Any], title: str
) -> Path:  # fmt: skip
    """Draw one picture of a run: density over time, the law of z against its target, accuracy against active dimensions, selective units.

    Args:
        path: .png or .svg.
        history: rows of the training log, see `rlpjepa_zoo.hub.card_figures.training`.
        law: the target.
        z: (n, D) embeddings of `images`, evaluation mode.
        results: report of `rlpjepa_zoo.evaluate` with its curve.
        title: printed on top.

    Returns:
        The path.
    """
    figure = new_figure(13, 7.8)
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 0.92), hspace=0.4, wspace=0.42, left=0.05, right=0.985, top=0.885, bottom=0.02)
    figure.suptitle(title, x=0.05, ha="left", fontsize=14, color=INK, fontweight="bold")
    draw_training(figure.add_subplot(grid[0, 0]), history, float(law.l0))
    _law(figure.add_subplot(grid[0, 1]), law, z)
    draw_accuracy(figure.add_subplot(grid[0, 2]), results)
    _units(figure, grid[1, :], z, images)
    hide_spines(figure)
    figure.savefig(path)
    return Path(path)


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


def _units(figure: Any, area: Any, z: Tensor, images: Images) -> None:
    """The images that activate each of twelve units most."""
    chosen = selective_units(z.numpy(), images.labels)
    heading = area.get_position(figure)
    text = f"What single units see: the 8 test images that excite each of {len(chosen)} units most"
    figure.text(heading.x0, heading.y1 + 0.035, text, color=INK, fontsize=11.5)
    inner = area.subgridspec(2, 6, hspace=0.3, wspace=0.08)
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
    """The middle square of an image, scaled to side x side pixels; small images are enlarged without smoothing."""
    image = images.read(row)
    method = Image.Resampling.NEAREST if min(image.size) <= side else Image.Resampling.BICUBIC
    return ImageOps.fit(image, (side, side), method)


def sheet(images: Images, rows: Sequence[int], across: int = 4, down: int = 2, side: int = 64) -> Image.Image:
    """Thumbnails of some images on white, from left to right and top to bottom."""
    canvas = Image.new("RGB", (across * (side + 2), down * (side + 2)), "white")
    for cell, row in enumerate(rows[: across * down]):
        canvas.paste(thumbnail(images, row, side), (cell % across * (side + 2) + 1, cell // across * (side + 2) + 1))
    return canvas
