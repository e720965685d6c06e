"""`rlpjepa report`: one HTML file about a run, readable without a network: curves; of an encoder the law of z, firing rates, neighbours and
units; of a classifier the accuracy of each class, confusions and mistakes.

Measurements are made with the model that the run published last, in evaluation mode, on up to `images` evaluation images. The page of a
run that continues, of one without a model, or of one whose images are not available holds what there is.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from ..config.finetune import TuningRecipe, load_any
from ..config.pretrain import Recipe
from ..core.files import atomic_file, check_replaceable
from ..core.rng import generator
from ..data.images import Images
from ..data.sources import open_source
from ..data.sources.classes import with_class_numbers
from ..errors import DataError, HubError, ModelError, NonFiniteError, OutputError, UsageError, did_you_mean
from ..evaluation.intervals import mean_interval, share_interval
from ..evaluation.metrics import alarms
from ..models.pretrained import load_classifier, load_encoder
from ..training.run_dir import RunFiles, is_number, read_run
from ..training.tasks.accuracy import classify
from .classifier_sections import ClassifiedSample, classes_section, confusions_section, mistakes_section
from .encoder_sections import Sample, law_section, neighbours_section, rates_section, units_section
from .page import Header, Section, render
from .run_sections import classifier_header, header, origin, training_section

__all__ = ["write_report"]

log = logging.getLogger("rlpjepa_zoo")

T = TypeVar("T")

_DATA_KEYS = (
    "source", "name", "path", "split", "eval_split", "image_column", "label_column", "allow_paths", "streaming", "length", "download", "limit",
)  # fmt: skip
"""Keys of the data section that say where the images are; the others would change what was trained."""


def write_report(
    run: str | Path, out: str | Path | None = None, overrides: Sequence[str] = (), images: int = 2000, batch_size: int | None = None,
    num_workers: int = 0, device: str = "cpu", progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a page about a run.

    Args:
        run: folder that `train` or `finetune` writes, finished or not.
        out: HTML file; `run/report.html` when None. The file appears when it is complete.
        overrides: ``"data.key=value"``, where the images are now.
        images: evaluation images that are measured, at most, drawn with a fixed seed; >= 2.
        batch_size: images of a forward pass; chosen by the size of the input when None.
        num_workers, device: threads that decode, and where the model computes.
        progress: show a progress bar on stderr.

    Returns:
        The path as `page`, the main figures (None where a figure was not measured), and `missing`, why the page has curves only.

    Raises:
        UsageError: the folder is not a run, it has no measurement yet, or an override does not say where the images are.
        RecipeError: the recipe of the run, with the overrides, is not valid.
        OutputError: the page cannot be written.

    Example:
        >>> write_report("run", images=1)
        Traceback (most recent call last):
        rlpjepa_zoo.errors.UsageError: images: expected at least 2, as a neighbour is another image, got 1
    """
    if images < 2:
        raise UsageError(f"images: expected at least 2, as a neighbour is another image, got {images}")
    files = read_run(Path(run))
    recipe = _with_overrides(files, overrides)
    path = files.path / "report.html" if out is None else Path(out)
    if not os.path.isdir(path.parent):
        raise OutputError(f"{path}: no folder {path.parent}")
    check_replaceable(path)
    how = _How(images, batch_size, num_workers, device, progress)
    page = _classifier_page(files, recipe, how) if isinstance(recipe, TuningRecipe) else _encoder_page(files, recipe, how)
    command = shlex.join(["rlpjepa", "report", str(run), *overrides, *(["--images", str(images)] if images != 2000 else [])])
    text = render(page.header, [training_section(files, page.figures), *page.sections], origin(files, page.info, command))
    with atomic_file(path) as aside:
        aside.write_text(text, "utf-8")
    return {"page": str(path), **page.figures, "missing": page.header.missing or None}


class _How(NamedTuple):
    """How images are measured."""

    images: int
    """Largest number."""
    batch_size: int | None
    num_workers: int
    device: str
    progress: bool


class _Page(NamedTuple):
    """What a page shows beside the curves."""

    figures: dict[str, Any]
    header: Header
    sections: list[Section]
    info: dict[str, Any]
    """Record of the measured model; without one, of the run."""


def _encoder_page(run: RunFiles[Recipe], recipe: Recipe, how: _How) -> _Page:
    sample, missing = _measured(lambda: _embed(run, recipe, how))
    law = None if run.recipe.target is None else run.recipe.target.distribution()
    figures, sections = _figures(run, sample), []
    if sample is not None:
        sections += [law_section(sample, law, figures)] if law is not None else []
        sections += [rates_section(sample, figures), neighbours_section(sample), units_section(sample)]
    return _Page(figures, header(run, sample, missing, figures), sections, sample.info if sample is not None else run.info)


def _classifier_page(run: RunFiles[TuningRecipe], recipe: TuningRecipe, how: _How) -> _Page:
    sample, missing = _measured(lambda: _classify(run, recipe, how))
    figures = _classifier_figures(run, sample)
    sections = [] if sample is None else [classes_section(sample), confusions_section(sample), mistakes_section(sample)]
    unreadable = 0 if sample is None else sample.unreadable
    return _Page(figures, classifier_header(run, missing, unreadable, figures), sections, sample.info if sample is not None else run.info)


def _measured(measure: Callable[[], T]) -> tuple[T | None, str]:
    """What a measurement gives, or None and why there is none, which is logged."""
    try:
        return measure(), ""
    except (DataError, HubError, ModelError, NonFiniteError) as error:
        log.warning("%s; the report holds the curves only", error)
        return None, str(error)


# --- measuring ------------------------------------------------------------------------------------------------------------------------


def _with_overrides(run: RunFiles[Any], overrides: Sequence[str]) -> Recipe | TuningRecipe:
    """Recipe of the run with overrides that say where the images are."""
    for override in overrides:
        section, _, key = override.partition("=")[0].partition(".")
        if section != "data" or key not in _DATA_KEYS:
            hint = did_you_mean(key, _DATA_KEYS)
            raise UsageError(f"override '{override}': the run is over; expected where its images are, such as data.path=DIR.{hint}")
    return load_any(run.path / "recipe.yaml", ["hub={}", *overrides])


def _embed(run: RunFiles[Recipe], recipe: Recipe, how: _How) -> Sample:
    """Embeddings of evaluation images by the published encoder."""
    encoder = _published(run, "encoder", how.device)
    chosen, available, split = _drawn(recipe, how.images)
    failures: list[tuple[Any, str]] = []
    numbered = Images(chosen.read, range(len(chosen)))  # row numbers as ids, whatever the names of the images
    embeddings = encoder.embed(numbered, how.batch_size, how.num_workers, progress=how.progress, on_error="skip", failures=failures)
    if len(embeddings) < 2:
        raise DataError(f"{len(embeddings)} of {len(chosen)} evaluation images can be read; a report needs two")
    return Sample(embeddings.to_dense(), chosen.take(embeddings.ids), available, split, len(failures), encoder.config.info)


def _classify(run: RunFiles[TuningRecipe], recipe: TuningRecipe, how: _How) -> ClassifiedSample:
    """Classes of evaluation images by the published classifier."""
    classifier = _published(run, "classifier", how.device)
    chosen, _, split = _drawn(recipe, how.images)
    chosen = with_class_numbers(chosen, classifier.classes)
    found = classify(classifier, chosen, how.batch_size, how.num_workers, how.progress)
    return ClassifiedSample(
        found, chosen.take(found.rows), classifier.classes, split, len(chosen) - len(found.rows), classifier.config.info
    )


def _drawn(recipe: Recipe | TuningRecipe, most: int) -> tuple[Images, int, str]:
    """Evaluation images drawn with a fixed seed, the number from which they are drawn, and whether they are evaluation or training images."""
    source = open_source(recipe.data, recipe.seed)
    pool = source.eval if source.eval is not None else source.train
    if not isinstance(pool, Images):
        raise DataError("the stream has no evaluation images; name a split of them with data.eval_split")
    drawn = torch.randperm(len(pool), generator=generator(0, "report"))[:most].sort().values.numpy()
    return pool.take(drawn), len(pool), "evaluation" if source.eval is not None else "training"


def _published(run: RunFiles[Any], kind: str, device: str) -> Any:
    """The encoder or the classifier that the run published last."""
    folder = run.path / kind
    if not folder.is_dir():
        after = "probe.every_epochs" if kind == "encoder" else "train.every_epochs"
        article = "an" if kind == "encoder" else "a"
        raise ModelError(f"{folder}: the run has not published {article} {kind} yet; it does after {after} epochs")
    load = load_encoder if kind == "encoder" else load_classifier
    for _ in range(2):
        try:
            return load(folder, device=device)
        except ModelError:  # the run may be replacing it
            time.sleep(0.2)
    return load(folder, device=device)


# --- figures --------------------------------------------------------------------------------------------------------------------------


def _progress_figures(run: RunFiles[Any], info: dict[str, Any]) -> dict[str, Any]:
    """How far a run is, how fast, and what it left out."""
    step, steps = int(run.rows[-1]["step"]), _steps(run, info)
    speed = run.series("images_per_second", "train")[1]
    return {
        "finished": bool(run.summary) and step >= steps, "step": step, "steps": steps,
        "images_per_second": float(np.median(speed)) if speed else None,
        "skipped": int(max(run.series("skipped", "train")[1], default=0)), "bad_images": int(max(run.series("bad_images", "train")[1], default=0)),
    }  # fmt: skip


def _classifier_figures(run: RunFiles[TuningRecipe], sample: ClassifiedSample | None) -> dict[str, Any]:
    """The main figures of a fine-tuning run, JSON-able; None where a figure was not measured."""
    figures = _progress_figures(run, sample.info if sample is not None else run.info)
    figures |= {key: run.last(key, "eval") for key in ("top1", "top5", "loss", "n_test")}
    figures["n_test"] = None if figures["n_test"] is None else int(figures["n_test"])
    alarms_of_run = run.summary.get("alarms")
    figures["alarms"] = [str(text) for text in alarms_of_run] if isinstance(alarms_of_run, list) else []
    if sample is not None:
        low, high = share_interval(float(sample.right.mean()), len(sample.right))
        figures |= {"images": len(sample.right), "split": sample.split, "accuracy": float(sample.right.mean()), "accuracy_low": low}
        figures |= {"accuracy_high": high, "classes": len(sample.counts), "mean_per_class": float(sample.accuracies.mean())}
        figures["measured_step"] = (sample.info.get("training") or {}).get("steps")
    return figures


def _figures(run: RunFiles[Recipe], sample: Sample | None) -> dict[str, Any]:
    """The main figures, JSON-able; None where a figure was not measured."""
    target = run.recipe.target
    theory = None if target is None else target.density_in_theory()
    info = sample.info if sample is not None else run.info
    figures: dict[str, Any] = _progress_figures(run, info) | {
        "density_asked": target and target.density,
        "density_theory": theory, "density_eval": run.last("l0_eval", "eval"), "dead_eval": run.last("dead_eval", "eval"),
        "knn_z": run.last("knn_z", "eval"), "knn_features": run.last("knn_features", "eval"), "excess": run.last("excess"),
        "scored": _scored(run, sample),
    }  # fmt: skip
    if sample is not None:
        rates = (sample.z > 0).mean(0)
        density, low, high = mean_interval((sample.z > 0).mean(1))
        figures |= {"images": len(sample.z), "density": density, "density_low": low, "density_high": high}
        figures |= {"dim": sample.z.shape[1], "dead": int((rates == 0).sum()), "always_on": int((rates == 1).sum())}
        figures["measured_step"] = (info.get("training") or {}).get("steps")
    measured = {"l0_eval": figures["density_eval"], "dead_eval": figures["dead_eval"], "n_eval": run.last("n_eval", "eval")}
    if sample is not None and measured["l0_eval"] is None:
        measured = {"l0_eval": figures["density"], "dead_eval": figures["dead"] / figures["dim"], "n_eval": len(sample.z)}
    figures["alarms"] = alarms({key: value for key, value in measured.items() if value is not None}, theory)
    return figures


def _steps(run: RunFiles[Any], info: dict[str, Any]) -> int:
    """Steps of the whole run: from its number of images if that is recorded, else from the epochs of its rows."""
    images = (info.get("training") or {}).get("images") or run.recipe.data.length
    if isinstance(images, int):
        return run.recipe.steps(images)[0]
    row = next((r for r in reversed(run.rows) if is_number(r.get("epoch")) and r["epoch"] > 0), None)
    return max(1, round(run.recipe.train.epochs * round(row["step"] / row["epoch"]))) if row else int(run.rows[-1]["step"])


def _scored(run: RunFiles[Recipe], sample: Sample | None) -> int | None:
    """Number of images in the run's own evaluation, if known."""
    if sample is not None:
        return min(run.recipe.probe.eval_images if sample.split == "evaluation" else run.recipe.probe.bank, sample.available)
    results = run.info.get("results") or {}
    count = results.get("n_test", results.get("n_train"))
    return count if isinstance(count, int) else None
