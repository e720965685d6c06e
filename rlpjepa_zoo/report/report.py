"""`rlpjepa report`: one page about a run, in one file that is readable without a network: curves, law of z, firing rates, neighbours, units.

What is measured here is measured on the encoder the run published last, in evaluation mode, on up to `images` evaluation images. A run
that goes on, one without an encoder and one whose images are not there get the page of what there is.
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
from ..core import rng
from ..core.files import whole_file
from ..data.images import Images
from ..data.sources import open_source
from ..errors import DataError, HubError, ModelError, NonFiniteError, OutputError, UsageError, did_you_mean
from ..evaluation import diagnostics
from ..evaluation.metrics import alarms
from ..models.pretrained import load_encoder
from ..training.run_dir import RunFiles, is_number, read_run
from .sections import Codes, render

__all__ = ["report", "write"]

log = logging.getLogger("rlpjepa_zoo")

_OPENING = ("source", "name", "path", "split", "eval_split", "image_column", "label_column", "streaming", "length", "download", "limit")


def report(
    run: str | Path, out: str | Path | None = None, overrides: Sequence[str] = (), images: int = 2000, batch_size: int = 256,
    num_workers: int = 0, device: str = "cpu", progress: bool = False,
) -> Path:  # fmt: skip
    """Write a page about a run and return its path.

    Args:
        run: folder that `train` writes, finished or not.
        out: HTML file; `run/report.html` when None. It takes its name when it is complete.
        overrides: ``"data.key=value"``, where the images are now.
        images: evaluation images that are measured, at most, drawn with a fixed seed; >= 2.
        batch_size, num_workers, device: how they are embedded.
        progress: show a progress bar on stderr.

    Raises:
        UsageError: no run in that folder, no measurement in it yet, or an override of something else than where the images are.
        RecipeError: the recipe of the run, with the overrides, is not valid.
        OutputError: the page cannot be written.

    Example:
        >>> report("no/such/run")
        Traceback (most recent call last):
        rlpjepa_zoo.errors.UsageError: no/such/run: no such folder; expected the folder of a run, which `rlpjepa train --out` writes
    """
    return Path(write(run, out, overrides, images, batch_size, num_workers, device, progress)["page"])


def write(
    run: str | Path, out: str | Path | None = None, overrides: Sequence[str] = (), images: int = 2000, batch_size: int = 256,
    num_workers: int = 0, device: str = "cpu", progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`report`, and the main figures: a JSON-able dict with the path as `page`."""
    if images < 2:
        raise UsageError(f"images: expected at least 2, as a neighbour is another image, got {images}")
    found = read_run(Path(run))
    moved = _moved(found, overrides)
    place = found.path / "report.html" if out is None else Path(out)
    if not place.parent.is_dir():
        raise OutputError(f"{place}: no folder {place.parent}")
    codes, missing = None, ""
    try:
        codes = _embed(found, moved, images, batch_size, num_workers, device, progress)
    except (DataError, HubError, ModelError, NonFiniteError) as error:
        missing = str(error)
        log.warning("%s; the report holds the curves only", missing)
    figures = _figures(found, codes)
    command = ["rlpjepa", "report", str(run), *overrides, *(["--images", str(images)] if images != 2000 else [])]
    text = render(found, codes, missing, figures, shlex.join(command))
    with whole_file(place) as aside:
        aside.write_text(text, "utf-8")
    return {"page": str(place), **figures, "missing": missing or None}


# --- measuring ------------------------------------------------------------------------------------------------------------------------


def _moved(run: RunFiles, overrides: Sequence[str]) -> Recipe:
    for override in overrides:
        part, _, key = override.partition("=")[0].partition(".")
        if part != "data" or key not in _OPENING:
            near = did_you_mean(key, _OPENING)
            raise UsageError(f"override '{override}': the run is over; expected where its images are, such as data.path=DIR.{near}")
    return Recipe.load(run.path / "recipe.yaml", ["hub={}", *overrides])


def _embed(run: RunFiles, moved: Recipe, most: int, batch_size: int, num_workers: int, device: str, progress: bool) -> Codes:
    """Embeddings of evaluation images by the published encoder."""
    folder = run.path / "encoder"
    if not folder.is_dir():
        raise ModelError(f"{folder}: the run has not published an encoder yet; it does after probe.every_epochs epochs")
    for attempt in range(3):
        try:
            encoder = load_encoder(folder, device=device)
            break
        except ModelError:  # the run may be replacing it
            if attempt == 2:
                raise
            time.sleep(0.2)
    source = open_source(moved.data, moved.seed)
    pool = source.eval if source.eval is not None else source.train
    if not isinstance(pool, Images):
        raise DataError("the stream has no evaluation images; name a split of them with data.eval_split")
    drawn = torch.randperm(len(pool), generator=rng.generator(0, "report"))[:most].sort().values.numpy()
    chosen = pool.take(drawn)
    failures: list[tuple[Any, str]] = []
    numbered = Images(chosen.read, range(len(chosen)))  # ids that are rows, whatever the images are called
    found = encoder.embed(numbered, batch_size, num_workers, progress=progress, on_error="skip", failures=failures)
    if len(found) < 2:
        raise DataError(f"{len(found)} of {len(chosen)} evaluation images can be read; a report needs two")
    split = "evaluation" if source.eval is not None else "training"
    return Codes(found.to_dense(), chosen.take(found.ids), len(pool), split, len(failures), encoder.config.info)


# --- figures --------------------------------------------------------------------------------------------------------------------------


def _steps(run: RunFiles, info: dict[str, Any]) -> int:
    """Steps of the whole run: from the number of its images where that is recorded, else from the epochs that its rows count."""
    seen = (info.get("training") or {}).get("images") or run.recipe.data.length
    if isinstance(seen, int):
        return run.recipe.steps(seen)[0]
    row = next((r for r in reversed(run.rows) if is_number(r.get("epoch")) and r["epoch"] > 0), None)
    return max(1, round(run.recipe.train.epochs * round(row["step"] / row["epoch"]))) if row else int(run.rows[-1]["step"])


def _figures(run: RunFiles, codes: Codes | None) -> dict[str, Any]:
    """The main figures, JSON-able; None where a thing was not measured."""
    theory = run.recipe.target.density_in_theory()
    info = codes.info if codes is not None else run.info
    step, steps = int(run.rows[-1]["step"]), _steps(run, info)
    speed = run.series("images_per_second", "train")[1]
    found: dict[str, Any] = {
        "finished": bool(run.summary) and step >= steps, "step": step, "steps": steps, "density_asked": run.recipe.target.density,
        "density_theory": theory, "density_eval": run.last("l0_eval", "eval"), "dead_eval": run.last("dead_eval", "eval"),
        "knn_z": run.last("knn_z", "eval"), "knn_features": run.last("knn_features", "eval"), "excess": run.last("excess"), "scored": _scored(run, codes),
        "images_per_second": float(np.median(speed)) if speed else None,
        "skipped": int(max(run.series("skipped", "train")[1], default=0)), "bad_images": int(max(run.series("bad_images", "train")[1], default=0)),
    }  # fmt: skip
    if codes is not None:
        rates = (codes.z > 0).mean(0)
        density, low, high = diagnostics.mean_interval((codes.z > 0).mean(1))
        found |= {"images": len(codes.z), "density": density, "density_low": low, "density_high": high}
        found |= {"dim": codes.z.shape[1], "dead": int((rates == 0).sum()), "always_on": int((rates == 1).sum())}
        found["encoder_step"] = (info.get("training") or {}).get("steps")
    seen = {"l0_eval": found["density_eval"], "dead_eval": found["dead_eval"]}
    if codes is not None and seen["l0_eval"] is None:
        seen = {"l0_eval": found["density"], "dead_eval": found["dead"] / found["dim"]}
    seen = {key: value for key, value in seen.items() if value is not None}
    found["alarms"] = alarms(seen, theory)
    return found


def _scored(run: RunFiles, codes: Codes | None) -> int | None:
    """How many images the run's own evaluation looked at, where that is known."""
    if codes is not None:
        return min(run.recipe.probe.eval_images if codes.split == "evaluation" else run.recipe.probe.bank, codes.of)
    results = run.info.get("results") or {}
    found = results.get("n_test", results.get("n_train"))
    return found if isinstance(found, int) else None
