"""Commands that train: `demo`, `check`, `train`, `finetune`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import AllowChange, AsJson, Overrides, Quiet, RecipeName, Resume, RunFolder, format_value, path_option, print_values

if TYPE_CHECKING:
    from ..config.finetune import TuningRecipe
    from ..config.pretrain import Recipe
    from ..training.tasks.task import Task


def demo(
    out: Annotated[Path, path_option(help="Folder for all results of the demo.")] = Path("rlpjepa-demo"),
    density: Annotated[float, typer.Option(help="Expected fraction of non-zero values, between 0 and 1.")] = 0.12,
    epochs: Annotated[float, typer.Option(help="Epochs over the 1437 training digits.")] = 50,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Pretrain on scikit-learn's digits, save, load, embed, evaluate and plot (one to two minutes on a CPU)."""
    from ..report.demo import run_demo

    print_values(run_demo(out, density, epochs, progress=not quiet), as_json)


def check(recipe: RecipeName, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Validate a recipe as a run would, and print it in full, with derived numbers. Trains and downloads nothing.

    Images on this machine are opened; those that may have to be downloaded are not.
    """
    from ..config.finetune import TuningRecipe, load_any

    resolved = load_any(recipe, overrides or [])
    if isinstance(resolved, TuningRecipe):
        resolved, facts = _tuning_facts(resolved)
    else:
        resolved, facts = _pretraining_facts(resolved)
    if as_json:
        print_values({**facts, "recipe": resolved.model_dump(mode="json")}, True)
        return
    print("\n".join(f"# {name}: {format_value(value)}" for name, value in facts.items()))
    print(resolved.dump(), end="")


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: RunFolder = Path("runs/latest"),
    resume: Resume = False,
    allow_change: AllowChange = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Pretrain an encoder from a recipe; also under `accelerate launch -m rlpjepa_zoo train ...` and torchrun."""
    from ..config.pretrain import Recipe
    from ..training.tasks.pretrain import train as run

    resolved = Recipe.load(recipe, overrides or [])
    _run_and_print("encoder", out, lambda: run(resolved, out, resume, allow_change or [], progress=not quiet), as_json)


def finetune(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: RunFolder = Path("runs/latest"),
    resume: Resume = False,
    allow_change: AllowChange = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune an encoder to a classifier of labelled images; also under `accelerate launch -m rlpjepa_zoo finetune ...` and torchrun."""
    from ..config.finetune import TuningRecipe
    from ..training.tasks.finetune import finetune as run

    resolved = TuningRecipe.load(recipe, overrides or [])
    _run_and_print("classifier", out, lambda: run(resolved, out, resume, allow_change or [], progress=not quiet), as_json)


def _run_and_print(artifact: str, out: Path, run: Callable[[], Path], as_json: bool) -> None:
    """Run the training and print, on rank 0, the folder of the artifact and the numbers of summary.json."""
    from ..core import distributed

    try:
        folder = run()
        if distributed.rank() == 0:
            summary = json.loads((out / "summary.json").read_text())
            numbers = {k: v for k, v in summary.items() if not isinstance(v, dict | list)}
            measured_on = (summary["info"].get("density") or {}).get("eval_images")
            print_values({artifact: str(folder), **numbers, **({"measured on": measured_on} if measured_on else {})}, as_json)
    finally:
        distributed.shut_down()


def _pretraining_facts(recipe: Recipe) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe with the preprocessing of its backbone, and derived numbers. Sets the task up as a run does, on the meta device."""
    from ..training.tasks.encoders import preprocessing_warnings, with_backbone_preprocess
    from ..training.tasks.pretrain import PretrainTask, build_objective

    recipe = with_backbone_preprocess(recipe)
    without_weights = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"pretrained": False})})
    task = PretrainTask(without_weights)
    images, encoder = _set_up(task, "meta"), task.core
    for sentence in preprocessing_warnings(recipe, encoder):
        logging.getLogger("rlpjepa_zoo").warning("%s", sentence)
    facts: dict[str, Any] = {}
    if recipe.target is not None:
        mu, sigma = recipe.target.law()
        facts["target"] = f"rectified generalized Gaussian, p = {recipe.target.p:g}, mu = {mu:.6g}, sigma = {sigma:.6g}"
        facts["expected density"] = recipe.target.density_in_theory()
    return recipe, facts | {
        "parameters, backbone": sum(p.numel() for p in encoder.backbone.parameters()),
        "parameters, projector": sum(p.numel() for p in encoder.projector.parameters()),
        "features": encoder.config.features,
        "peak learning rate": recipe.lr,
        "objective": build_objective(recipe).describe(),
        **images,
    }


def _tuning_facts(recipe: TuningRecipe) -> tuple[TuningRecipe, dict[str, Any]]:
    """Return the recipe with the preprocessing of the encoder that it starts from, and derived numbers. Sets the task up as a run does."""
    from ..training.tasks.finetune import FinetuneTask

    task = FinetuneTask(recipe)
    images = _set_up(task)
    encoder = task.encoder
    return task.recipe, {
        "starts from": f"{encoder.config.architecture}{', fresh weights' if recipe.start.random else ''}",
        "parameters, backbone": sum(p.numel() for p in encoder.backbone.parameters()),
        "classifies": f"{recipe.start.input} ({encoder.config.features if recipe.start.input == 'features' else encoder.config.dim})",
        "peak learning rate": recipe.lr,
        **images,
    }


def _set_up(task: Task, device: str = "cpu") -> dict[str, Any]:
    """Set a task up with its images, as a run does, and return their numbers. Images that would have to be downloaded are left out."""
    import torch

    from ..data.loader import steps_of_an_epoch
    from ..data.sources import open_source
    from ..training.setup import check_trackers

    recipe = task.recipe
    check_trackers(recipe.train.trackers)
    source = None if recipe.data.is_remote else open_source(recipe.data, recipe.seed)
    with torch.device(device):
        if source is None:
            task.set_up_core()
            return {"images": "not opened, as they may have to be downloaded"}
        task.setup(source)
    steps_of_an_epoch(task.source, task.recipe)
    evaluation = 0 if task.source.eval is None else len(task.source.eval)
    return {"training images": task.source.length, "evaluation images": evaluation, "steps": task.recipe.steps(task.source.length)[0]}
