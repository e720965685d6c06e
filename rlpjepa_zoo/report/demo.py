"""`rlpjepa demo`: the main job on scikit-learn's digits, end to end: pretrain, publish, load, embed, evaluate, draw."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, cast

import torch

from ..config.pretrain import Recipe
from ..config.sections import Target
from ..core.source import ModelSource
from ..errors import UsageError
from ..evaluation.datasets import open_set
from ..evaluation.evaluate import evaluate, with_results
from ..evaluation.tables import accuracy_table
from ..models.pretrained import load_encoder
from ..sparse.embeddings import SparseEmbeddings
from ..training.tasks.pretrain import train
from .plots import overview


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
