"""What a run says about its size: the first line of its log, and the record of its training for the card."""

from __future__ import annotations

import logging
import os
import platform
from typing import Any

import torch
import torch.nn as nn

from ..config.plan import Plan
from ..core import distributed
from ..data.sources import Source

__all__ = ["announce", "record", "slow_save"]

log = logging.getLogger("rlpjepa_zoo")

_PATIENCE = 30
"""Seconds that torchrun waits, unless told otherwise, between the signal that ends a process and the one that kills it."""


def announce(recipe: Plan, sentence: str, core: nn.Module, source: Source, step: int, device: torch.device) -> None:
    """Log what is trained, on what, for how long.

    Args:
        recipe: of the run.
        sentence: what is trained and for what.
        core: the part that is measured and published, in training mode.
        source: images of the run.
        step: number of steps already made.
        device: of the run.
    """
    world, batch = distributed.world_size(), recipe.train.batch_size
    total, per_epoch = recipe.steps(source.length)
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in core.modules())
    if world > 1 and device.type == "cpu" and normed:
        log.warning("batch norm on CPU processes sees each process's share of the batch only; on GPUs it is synchronised")
    log.info(
        "%s: %s; %.2f M parameters, %d images, %d classes; %d steps (%d an epoch) of %d images, %d on each of %d x %s, %s; "
        "peak lr %.3g = %g * %d / %d%s",
        recipe.name, sentence, sum(p.numel() for p in core.parameters()) / 1e6, source.length, source.classes, total, per_epoch,
        batch, batch // world, world, device, recipe.train.precision, recipe.lr, recipe.optim.lr, batch, recipe.optim.reference_batch,
        f"; resumed at step {step}" if step else "",
    )  # fmt: skip


def record(recipe: Plan, source: Source, step: int, seconds: float, device: torch.device) -> dict[str, Any]:
    """What the section "Training" of the card lists.

    Args:
        recipe, source, device: of the run.
        step: number of steps made.
        seconds: time of the steps, and of encoding the views that are kept.
    """
    training = {
        "images": source.length, "epochs": round(step / recipe.steps(source.length)[1], 3), "steps": step,
        "batch": recipe.train.batch_size, "minutes": round(seconds / 60, 2), "hardware": f"{distributed.world_size()} x {_hardware(device)}",
        "precision": recipe.train.precision, "seed": recipe.seed,
    }  # fmt: skip
    return training | ({"ema": recipe.train.ema} if recipe.train.ema is not None else {})


def slow_save(seconds: float) -> str | None:
    """A warning for processes of torchrun whose save took more than half of the time that torchrun waits; None for others."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or seconds <= _PATIENCE / 2:
        return None
    return (
        f"a checkpoint takes {seconds:.0f} s to save, and torchrun kills its processes {_PATIENCE} s after a signal: "
        "give it --shutdown-timeout SECONDS; the last complete checkpoint stays"
    )


def _hardware(device: torch.device) -> str:
    """Name of the GPU, or number of threads and architecture of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} of {platform.machine()} CPU"
