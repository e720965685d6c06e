"""Resuming: finds the checkpoint and checks that recipe, images, weights and processes are those of the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core import distributed, package
from ..core.files import sha256
from ..data.images import Images
from ..data.sources import Source, verified_pixels
from ..errors import DataError, RecipeError, UsageError, did_you_mean
from .checkpoint import Checkpoint, latest

__all__ = ["check_images", "check_recipe", "check_same_on_all_ranks", "environment", "find_checkpoint", "warn_of_other_environment"]

log = logging.getLogger("rlpjepa_zoo")

DATA = "data"
"""Value of --allow-change that permits different images."""

PER_MACHINE = ("data.path", "data.download", "train.num_workers")
"""Recipe keys that processes on different machines may set differently."""

MAY_CHANGE = (
    "name",
    "objective.chunk",
    "train.log_every",
    "train.num_workers",
    "train.keep",
    "train.stop_after",
    "train.processes",
    "train.timeout_minutes",
    "train.loader_timeout_minutes",
    "train.checkpoint_minutes",
    "train.trackers",
    "data.path",
    "data.download",
    "hub.repo",
    "hub.private",
    "hub.revision",
    "hub.license",
)
"""Recipe keys that may change within a run without --allow-change."""


def find_checkpoint(out: Path, resume: bool) -> Checkpoint | None:
    """The newest checkpoint that verifies; None for a new run.

    Raises:
        UsageError: the directory holds a run and `resume` is not set.
        ModelError: there are checkpoints and none verifies.
    """
    checkpoint, damaged = latest(out)
    if checkpoint is None:
        return None
    if not resume:
        raise UsageError(f"{out}: holds a run at step {checkpoint.step}; add --resume to go on, or choose another --out")
    for line in damaged:
        log.warning("damaged checkpoint left out: %s", line)
    return checkpoint


def check_recipe(before: Mapping[str, Any], now: Mapping[str, Any], allow_change: Sequence[str], out: Path) -> None:
    """Refuse a recipe that differs from that of the run.

    Args:
        before, now: values by dotted key, of the run and of the recipe given now.
        allow_change: keys that may differ; ``data`` allows other images.
        out: run directory, for the message.

    Raises:
        UsageError: `allow_change` names an unknown key.
        RecipeError: lists the keys that differ, with both values.
    """
    known, absent = before.keys() | now.keys() | {DATA}, object()
    if unknown := [k for k in allow_change if k not in known]:
        raise UsageError(f"--allow-change {unknown[0]}: no such key in the recipe.{did_you_mean(unknown[0], known)}")
    differing = (k for k in sorted(known) if before.get(k, absent) != now.get(k, absent))
    changed = [k for k in differing if k not in MAY_CHANGE and k not in allow_change]
    if changed:
        lines = ", ".join(f"{k}: {before.get(k, 'absent')!r} -> {now.get(k, 'absent')!r}" for k in changed)
        raise RecipeError(f"the recipe differs from the run in {out}: {lines}; undo, or allow each with --allow-change KEY")


def check_images(state: Mapping[str, Any], images: int, fingerprint: str, allow_change: Sequence[str], out: Path) -> None:
    """Refuse images that differ from those of the run.

    Args:
        state: of the checkpoint.
        images, fingerprint: number and fingerprint of the images now.
        allow_change: ``data`` allows another fingerprint.
        out: run directory, for the message.

    Raises:
        DataError: another number of images, or another fingerprint that is not allowed.
    """
    if state["images"] != images:
        counts = f"the run in {out} trained on {state['images']} images, the data now holds {images}"
        raise DataError(f"{counts}; the number of images cannot change within a run: restore them, or start another --out")
    if state["data"] != fingerprint and DATA not in allow_change:
        raise DataError(
            f"the images are not those that the run in {out} trained on (names or contents differ); "
            f"restore them, or go on with --allow-change {DATA}"
        )


def check_same_on_all_ranks(step: int, source: Source, fingerprint: str, weights: str, recipe: Mapping[str, Any]) -> None:
    """Refuse ranks that have other checkpoints, images, initial weights or recipes than rank 0. All ranks call it.

    Args:
        step: of the checkpoint; 0 for a new run.
        source, fingerprint: the images and their fingerprint.
        weights: fingerprint of the initial weights.
        recipe: values by dotted key.

    Raises:
        UsageError: names what differs, with the value of each rank.
    """
    names = ("checkpoint (step)", "images (count)", "images (fingerprint)", "weights (fingerprint)")
    for name, *values in zip(names, *distributed.gather_objects((step, source.length, fingerprint, weights)), strict=True):
        if len(set(values)) > 1:
            detail = _first_difference(source) if "fingerprint" in name and "images" in name else str(values)
            raise UsageError(f"processes see different {name}: {detail}; put --out and the data on a shared disk")
    recipes = distributed.gather_objects({k: v for k, v in recipe.items() if k not in PER_MACHINE})
    for key, *values in ((key, *(recipe[key] for recipe in recipes)) for key in recipes[0]):
        if any(value != values[0] for value in values):
            raise UsageError(f"processes have different recipes: {key} is {values}; give all the same file and overrides")


def _first_difference(source: Source) -> str:
    """The first image that differs by process: by its name, else by its pixels among those that `verified_pixels` reads."""
    images = source.train
    if not isinstance(images, Images):
        return "columns or number of shards"
    for i, names in enumerate(zip(*distributed.gather_objects([str(name) for name in images.ids]), strict=True)):
        if len(set(names)) > 1:
            return f"image {i} is {' on one process and '.join(sorted(set(names)))} on another"
    own = [(i, sha256(pixels)) for i, pixels in verified_pixels(images)]
    differing = (here[0] for here, *others in zip(*distributed.gather_objects(own), strict=True) if any(other != here for other in others))
    row = next(differing, None)
    return "pixels" if row is None else f"the pixels of image {row}, {images.ids[row]}, differ"


def environment() -> dict[str, Any]:
    """What bit-equal resuming depends on beside the recipe: versions, number of processes and threads."""
    return {"versions": package.versions(), "world_size": distributed.world_size(), "threads": torch.get_num_threads()}


def warn_of_other_environment(state: Mapping[str, Any]) -> None:
    """Warn when a run is resumed with other versions, or another number of processes or threads.

    Args:
        state: of the checkpoint.
    """
    now = environment()
    for name, label in (("world_size", "processes"), ("threads", "threads")):
        if state[name] != now[name]:
            log.warning("%d %s before, %d now: equal up to rounding, not bit for bit", state[name], label, now[name])
    if state["versions"] != now["versions"]:
        changed = [f"{k} {v} -> {now['versions'].get(k)}" for k, v in state["versions"].items() if now["versions"].get(k) != v]
        log.warning("package versions changed; results may not be bit-equal: %s", ", ".join(changed))
