"""`rlpjepa demo`: the main job on scikit-learn's digits, end to end: pretrain, publish, load, embed, evaluate, draw."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from ..config.pretrain import Recipe
from ..data.images import Images
from ..data.sources import open_source
from ..distributions import RectifiedGeneralizedGaussian
from ..errors import UsageError
from ..evaluation.evaluate import accuracy_table, evaluate, with_results
from ..models.pretrained import load_encoder
from ..sparse.embeddings import SparseEmbeddings
from ..training.tasks.pretrain import train
from .plots import overview


def run(out: Path, density: float = 0.12, epochs: float = 50, progress: bool = True) -> dict[str, Any]:
    """Everything the demo does; returns what it found, JSON-able, with a text to print.

    Args:
        out: folder; the run of an earlier demo in it is replaced, any other content is refused.
        density: asked fraction of non-zeros in (0, 1).
        epochs: passes over the training digits.
    """
    started = time.monotonic()
    recipe = Recipe.load("digits", [f"target.density={density}", f"train.epochs={epochs}", f"optim.warmup_epochs={min(4.0, epochs / 4)}"])
    _make_room(out)
    folder = train(recipe, out / "run", progress=progress)

    encoder = load_encoder(folder)
    source = open_source(recipe.data)
    test = source.eval or Images(lambda i: None, [])  # the digits always have a test split
    report = evaluate(encoder, source.train, test, budgets="auto", shots=[1], seeds=1)
    encoder.save_pretrained(folder, info=with_results(encoder.config.info, report, "digits"), name=f"local-dir:{folder}")
    embeddings = encoder.embed(test)
    file = embeddings.save(out / "test-embeddings.safetensors")
    again = SparseEmbeddings.load(file)

    mu, sigma = recipe.target.law()
    law = RectifiedGeneralizedGaussian(mu, sigma, recipe.target.p)
    picture = overview(
        out / "overview.png", encoder.config.info["history"], law, torch.from_numpy(embeddings.to_dense()), test, report,
        f"Rectified LpJEPA on 1437 digits without labels: {embeddings.dim} dimensions, {embeddings.l0:.1%} active",
    )  # fmt: skip

    n, dim = embeddings.shape
    found = {
        "asked": density, "theory": recipe.target.density_in_theory(), "measured": embeddings.l0,
        **{k: v for k, v in report.items() if not isinstance(v, str | dict)}, "encoder": str(folder), "embeddings": str(file), "picture": str(picture),
        "bytes_sparse": file.stat().st_size, "bytes_dense": 4 * n * dim, "reloaded_equal": again == embeddings, "seconds": time.monotonic() - started,
    }  # fmt: skip
    found["text"] = _text(found, report, embeddings)
    return found


def _make_room(out: Path) -> None:
    ours = {"run", "test-embeddings.safetensors", "overview.png"}
    if out.is_dir() and (foreign := sorted(p.name for p in out.iterdir() if p.name not in ours)):
        raise UsageError(f"--out {out}: holds '{foreign[0]}', which is not of the demo; choose another folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; choose a folder")
    shutil.rmtree(out / "run", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)


def _text(found: dict[str, Any], report: dict[str, Any], embeddings: SparseEmbeddings) -> str:
    ratio = found["bytes_dense"] / found["bytes_sparse"]
    size = f"{embeddings.shape[0]} x {embeddings.dim}, {found['bytes_sparse']:,}"
    return f"""
density of z      asked {found["asked"]:.3f}   theory of the target {found["theory"]:.3f}   measured on test images {found["measured"]:.3f}

{accuracy_table(report)}

encoder           {found["encoder"]}   (timm's format: config.json, model.safetensors, head.safetensors, ...)
embeddings        {found["embeddings"]}   {size} bytes; dense float32: {found["bytes_dense"]:,} ({ratio:.1f} x)
picture           {found["picture"]}
{found["seconds"]:.0f} seconds in all. Next:

    rlpjepa embed {found["encoder"]} YOUR_IMAGES --out embeddings.parquet
    rlpjepa push {found["encoder"]} YOU/NAME --dry-run
    rlpjepa list --recipes"""
