"""`rlpjepa demo`: the main job on scikit-learn's digits, end to end: pretrain, publish, load, embed, evaluate, draw."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..config.pretrain import Recipe
from ..config.sections import Target
from ..core.source import ModelSource
from ..data.images import Images
from ..distributions import RectifiedGeneralizedGaussian
from ..errors import UsageError
from ..evaluation.datasets import open_set
from ..evaluation.diagnostics import selective_units
from ..evaluation.evaluate import evaluate, with_results
from ..evaluation.tables import accuracy_table
from ..hub.card_figures import INK, SECOND, SOFT, draw_accuracy, draw_training, hide_spines, new_figure
from ..models.pretrained import load_encoder
from ..sparse.embeddings import SparseEmbeddings
from ..training.tasks.pretrain import train
from .page import sheet


def run_demo(out: Path, density: float = 0.12, epochs: float = 50, progress: bool = True) -> dict[str, Any]:
    """Pretrain on the digits, publish to a folder, load, embed, evaluate and draw.

    Args:
        out: folder; the run of an earlier demo in it is replaced, any other content is refused.
        density: fraction of non-zeros to ask for, in (0, 1).
        epochs: passes over the training digits.
        progress: show progress bars on stderr.

    Returns:
        Densities, figures of `rlpjepa_zoo.evaluate`, paths and sizes, and `text` to print; JSON-able.

    Raises:
        UsageError: `out` has content that is not from a demo.
    """
    started = time.monotonic()
    recipe = Recipe.load("digits", [f"target.density={density}", f"train.epochs={epochs}", f"optim.warmup_epochs={min(4.0, epochs / 4)}"])
    _clear(out)
    folder = train(recipe, out / "run", progress=progress)

    encoder = load_encoder(folder)
    digits = open_set("digits")
    report = evaluate(encoder, digits.train, digits.test, budgets="auto", shots=[1], seeds=1)
    encoder.save_pretrained(folder, info=with_results(encoder.config.info, report, "digits"), name=ModelSource.folder(folder).text)
    embeddings = encoder.embed(digits.test)
    file = embeddings.save(out / "test-embeddings.safetensors")
    reloaded = SparseEmbeddings.load(file)

    target = cast(Target, recipe.target)  # the recipe digits has one
    picture = overview(
        out / "overview.png", encoder.config.info["history"], target.distribution(), torch.from_numpy(embeddings.to_dense()), digits.test, report,
        f"Rectified LpJEPA on 1437 digits without labels: {embeddings.dim} dimensions, {embeddings.l0:.1%} active",
    )  # fmt: skip

    n, dim = embeddings.shape
    results = {
        "asked": density, "theory": target.density_in_theory(), "measured": embeddings.l0,
        **{k: v for k, v in report.items() if not isinstance(v, str | dict)}, "encoder": str(folder), "embeddings": str(file), "picture": str(picture),
        "bytes_sparse": file.stat().st_size, "bytes_dense": 4 * n * dim, "reloaded_equal": reloaded == embeddings, "seconds": time.monotonic() - started,
    }  # fmt: skip
    results["text"] = _text(results, report, embeddings)
    return results


def _clear(out: Path) -> None:
    """Create the folder, or remove the run of an earlier demo."""
    own = {"run", "test-embeddings.safetensors", "overview.png"}
    if out.is_dir() and (foreign := sorted(p.name for p in out.iterdir() if p.name not in own)):
        raise UsageError(f"--out {out}: holds '{foreign[0]}', which is not from a demo; choose another folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; choose a folder")
    shutil.rmtree(out / "run", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)


def _text(results: dict[str, Any], report: dict[str, Any], embeddings: SparseEmbeddings) -> str:
    ratio = results["bytes_dense"] / results["bytes_sparse"]
    size = f"{embeddings.shape[0]} x {embeddings.dim}, {results['bytes_sparse']:,}"
    return f"""
density of z      asked {results["asked"]:.3f}   theory of the target {results["theory"]:.3f}   measured on test images {results["measured"]:.3f}

{accuracy_table(report)}

encoder           {results["encoder"]}   (timm's format: config.json, model.safetensors, head.safetensors, ...)
embeddings        {results["embeddings"]}   {size} bytes; dense float32: {results["bytes_dense"]:,} ({ratio:.1f} x)
picture           {results["picture"]}
{results["seconds"]:.0f} seconds in all. Next:

    rlpjepa embed {results["encoder"]} YOUR_IMAGES --out embeddings.parquet
    rlpjepa push {results["encoder"]} YOU/NAME --dry-run
    rlpjepa list --recipes"""


# --- the picture ---------------------------------------------------------------------------------------------------------------------


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
