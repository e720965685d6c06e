"""`rlpjepa report`: one HTML file about a run, readable without a network: curves, law of z, firing rates, neighbours, units.

Measurements are made with the encoder that the run published last, in evaluation mode, on up to `images` evaluation images. The page of a
run that continues, of one without an encoder, or of one whose images are not available holds what there is.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.pretrain import Recipe
from ..core.files import atomic_file
from ..core.rng import generator
from ..data.images import Images
from ..data.sources import open_source
from ..errors import DataError, HubError, ModelError, NonFiniteError, OutputError, UsageError, did_you_mean
from ..evaluation.intervals import mean_interval
from ..evaluation.metrics import alarms
from ..models.encoder import SparseEncoder
from ..models.pretrained import load_encoder
from ..training.run_dir import RunFiles, is_number, read_run
from .encoder_sections import Sample, law_section, neighbours_section, rates_section, units_section
from .page import render
from .run_sections import header, origin, training_section

__all__ = ["write_report"]

log = logging.getLogger("rlpjepa_zoo")

_DATA_KEYS = (
    "source", "name", "path", "split", "eval_split", "image_column", "label_column", "allow_paths", "streaming", "length", "download", "limit",
)  # fmt: skip
"""Keys of the data section that say where the images are; the others would change what was trained."""


def write_report(
    run: str | Path, out: str | Path | None = None, overrides: Sequence[str] = (), images: int = 2000, batch_size: int = 256,
    num_workers: int = 0, device: str = "cpu", progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a page about a run.

    Args:
        run: folder that `train` writes, finished or not.
        out: HTML file; `run/report.html` when None. The file appears when it is complete.
        overrides: ``"data.key=value"``, where the images are now.
        images: evaluation images that are measured, at most, drawn with a fixed seed; >= 2.
        batch_size, num_workers, device: how they are embedded.
        progress: show a progress bar on stderr.

    Returns:
        The path as `page`, the main figures (None where a figure was not measured), and `missing`, why the page has curves only.

    Raises:
        UsageError: the folder is not a run, it has no measurement yet, or an override does not say where the images are.
        RecipeError: the recipe of the run, with the overrides, is not valid.
        OutputError: the page cannot be written.

    Example:
        >>> write_report("no/such/run")
        Traceback (most recent call last):
        rlpjepa_zoo.errors.UsageError: no/such/run: no such folder; expected the folder of a run, which `rlpjepa train --out` writes
    """
    if images < 2:
        raise UsageError(f"images: expected at least 2, as a neighbour is another image, got {images}")
    files = read_run(Path(run))
    recipe = _with_overrides(files, overrides)
    path = files.path / "report.html" if out is None else Path(out)
    if not path.parent.is_dir():
        raise OutputError(f"{path}: no folder {path.parent}")
    sample, missing = None, ""
    try:
        sample = _embed(files, recipe, images, batch_size, num_workers, device, progress)
    except (DataError, HubError, ModelError, NonFiniteError) as error:
        missing = str(error)
        log.warning("%s; the report holds the curves only", missing)
    law = None if files.recipe.target is None else files.recipe.target.distribution()
    figures = _figures(files, sample)
    sections = [training_section(files, figures)]
    if sample is not None:
        sections += [law_section(sample, law, figures)] if law is not None else []
        sections += [rates_section(sample, figures), neighbours_section(sample), units_section(sample)]
    command = shlex.join(["rlpjepa", "report", str(run), *overrides, *(["--images", str(images)] if images != 2000 else [])])
    text = render(header(files, sample, missing, figures), sections, origin(files, sample, command))
    with atomic_file(path) as aside:
        aside.write_text(text, "utf-8")
    return {"page": str(path), **figures, "missing": missing or None}


# --- embedding ------------------------------------------------------------------------------------------------------------------------


def _with_overrides(run: RunFiles, overrides: Sequence[str]) -> Recipe:
    """Recipe of the run with overrides that say where the images are."""
    for override in overrides:
        section, _, key = override.partition("=")[0].partition(".")
        if section != "data" or key not in _DATA_KEYS:
            hint = did_you_mean(key, _DATA_KEYS)
            raise UsageError(f"override '{override}': the run is over; expected where its images are, such as data.path=DIR.{hint}")
    return Recipe.load(run.path / "recipe.yaml", ["hub={}", *overrides])


def _embed(run: RunFiles, recipe: Recipe, most: int, batch_size: int, num_workers: int, device: str, progress: bool) -> Sample:
    """Embeddings of evaluation images by the published encoder."""
    encoder = _published_encoder(run, device)
    source = open_source(recipe.data, recipe.seed)
    pool = source.eval if source.eval is not None else source.train
    if not isinstance(pool, Images):
        raise DataError("the stream has no evaluation images; name a split of them with data.eval_split")
    drawn = torch.randperm(len(pool), generator=generator(0, "report"))[:most].sort().values.numpy()
    chosen = pool.take(drawn)
    failures: list[tuple[Any, str]] = []
    numbered = Images(chosen.read, range(len(chosen)))  # row numbers as ids, whatever the names of the images
    embeddings = encoder.embed(numbered, batch_size, num_workers, progress=progress, on_error="skip", failures=failures)
    if len(embeddings) < 2:
        raise DataError(f"{len(embeddings)} of {len(chosen)} evaluation images can be read; a report needs two")
    split = "evaluation" if source.eval is not None else "training"
    return Sample(embeddings.to_dense(), chosen.take(embeddings.ids), len(pool), split, len(failures), encoder.config.info)


def _published_encoder(run: RunFiles, device: str) -> SparseEncoder:
    folder = run.path / "encoder"
    if not folder.is_dir():
        raise ModelError(f"{folder}: the run has not published an encoder yet; it does after probe.every_epochs epochs")
    for _ in range(2):
        try:
            return load_encoder(folder, device=device)
        except ModelError:  # the run may be replacing it
            time.sleep(0.2)
    return load_encoder(folder, device=device)


# --- figures --------------------------------------------------------------------------------------------------------------------------


def _figures(run: RunFiles, sample: Sample | None) -> dict[str, Any]:
    """The main figures, JSON-able; None where a figure was not measured."""
    target = run.recipe.target
    theory = None if target is None else target.density_in_theory()
    info = sample.info if sample is not None else run.info
    step, steps = int(run.rows[-1]["step"]), _steps(run, info)
    speed = run.series("images_per_second", "train")[1]
    figures: dict[str, Any] = {
        "finished": bool(run.summary) and step >= steps, "step": step, "steps": steps,
        "density_asked": target and target.density,
        "density_theory": theory, "density_eval": run.last("l0_eval", "eval"), "dead_eval": run.last("dead_eval", "eval"),
        "knn_z": run.last("knn_z", "eval"), "knn_features": run.last("knn_features", "eval"), "excess": run.last("excess"),
        "scored": _scored(run, sample), "images_per_second": float(np.median(speed)) if speed else None,
        "skipped": int(max(run.series("skipped", "train")[1], default=0)), "bad_images": int(max(run.series("bad_images", "train")[1], default=0)),
    }  # fmt: skip
    if sample is not None:
        rates = (sample.z > 0).mean(0)
        density, low, high = mean_interval((sample.z > 0).mean(1))
        figures |= {"images": len(sample.z), "density": density, "density_low": low, "density_high": high}
        figures |= {"dim": sample.z.shape[1], "dead": int((rates == 0).sum()), "always_on": int((rates == 1).sum())}
        figures["encoder_step"] = (info.get("training") or {}).get("steps")
    measured = {"l0_eval": figures["density_eval"], "dead_eval": figures["dead_eval"]}
    if sample is not None and measured["l0_eval"] is None:
        measured = {"l0_eval": figures["density"], "dead_eval": figures["dead"] / figures["dim"]}
    figures["alarms"] = alarms({key: value for key, value in measured.items() if value is not None}, theory)
    return figures


def _steps(run: RunFiles, info: dict[str, Any]) -> int:
    """Steps of the whole run: from its number of images if that is recorded, else from the epochs of its rows."""
    images = (info.get("training") or {}).get("images") or run.recipe.data.length
    if isinstance(images, int):
        return run.recipe.steps(images)[0]
    row = next((r for r in reversed(run.rows) if is_number(r.get("epoch")) and r["epoch"] > 0), None)
    return max(1, round(run.recipe.train.epochs * round(row["step"] / row["epoch"]))) if row else int(run.rows[-1]["step"])


def _scored(run: RunFiles, sample: Sample | None) -> int | None:
    """Number of images in the run's own evaluation, if known."""
    if sample is not None:
        return min(run.recipe.probe.eval_images if sample.split == "evaluation" else run.recipe.probe.bank, sample.available)
    results = run.info.get("results") or {}
    count = results.get("n_test", results.get("n_train"))
    return count if isinstance(count, int) else None
