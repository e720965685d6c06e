"""Accelerate: starting it, checking what it was given, preparing model and optimiser. The only module that imports it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor

from ..config.sections import Data
from ..config.training_sections import Train
from ..core import distributed
from ..data.sources import Source, open_source
from ..errors import HubError, OutputError, RecipeError, ZooError, did_you_mean, first_line
from .checkpoint import optimizer_state, restore_optimizer
from .run_dir import run_id

__all__ = [
    "TrainedModel",
    "check_trackers",
    "explain_errors",
    "finish_trackers",
    "open_images",
    "start_accelerator",
    "start_trackers",
]

log = logging.getLogger("rlpjepa_zoo")

_EMA = "ema."
"""Prefix of averaged weights in a checkpoint."""
_CONNECTION_ERRORS = ("Timed out", "timeout", "Connection closed", "Connection reset", "Broken pipe")


def start_accelerator(options: Train, out: Path, unused_parameters: bool = False) -> Accelerator:
    """An Accelerator for this device and the processes of the launch.

    Args:
        options: the section `train` of the recipe.
        out: run directory, for trackers.
        unused_parameters: whether some steps give no gradient to some trained parameters.

    Raises:
        RecipeError: the recipe does not fit the device, the processes, the launcher or the installed trackers.
        HubError: the processes do not find each other.
    """
    check_trackers(options.trackers)
    AcceleratorState._reset_state()  # precision belongs to the run, not to the process
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if options.precision == "fp16" and cpu:
        raise RecipeError("train.precision: fp16 needs a GPU; use bf16 or no")
    try:
        accelerator = Accelerator(
            mixed_precision=options.precision, cpu=cpu, project_dir=str(out), log_with=list(options.trackers) or None,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(minutes=options.timeout_minutes)),
                DistributedDataParallelKwargs(find_unused_parameters=unused_parameters),
            ],
        )  # fmt: skip
    except ValueError as error:
        fix = "; set train.precision to fp16 or no" if "bf16" in str(error) else ""
        raise RecipeError(f"train: {first_line(error)}{fix}") from error
    except distributed.DistError as error:
        raise HubError(
            f"the processes did not find each other: {first_line(error)}; check the port and address given to the launcher"
        ) from error
    _check(accelerator, options)
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Accelerate does not know, or that are not installed.

    Args:
        names: `train.trackers`.

    Raises:
        RecipeError: names the first.
    """
    known = {*LOGGER_TYPE_TO_CLASS, *map(str, LoggerType)}
    installed = {str(tracker) for tracker in get_available_trackers()} | (known - set(LoggerType.list())) | {"all"}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f" Known: {', '.join(sorted(known))}"
            raise RecipeError(f"train.trackers: '{name}' is not a tracker.{hint}")
        if name not in installed:
            raise RecipeError(f"train.trackers: {name} is not installed; pip install it, or leave it out")


def _check(accelerator: Accelerator, options: Train) -> None:
    """Refuse accumulation, other kinds of parallelism, and batches that the processes do not divide."""
    if accelerator.gradient_accumulation_steps != 1:
        raise RecipeError("gradient_accumulation_steps: accumulation is refused, as the loss would see parts of the batch; set it to 1")
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU") and not (kind == "FSDP" and accelerator.is_fsdp2):
        raise RecipeError(f"accelerate: expected data parallelism or FSDP version 2, got {kind}; use recipes/accelerate/")
    batch, world = options.batch_size, distributed.world_size()
    if options.processes not in (None, world):
        fix = f"start {options.processes} (torchrun --nproc_per_node, or the config file of accelerate launch), or set it to null"
        raise RecipeError(f"train.processes: the recipe asks for {options.processes} processes, {world} run; {fix}")
    if batch % world:
        near = " or ".join(str(n) for n in (batch // world * world, -(-batch // world) * world) if n)
        raise RecipeError(f"train.batch_size: {batch} is not divisible by {world} processes; use {near}")


def open_images(accelerator: Accelerator, options: Data, seed: int) -> Source:
    """The images of a recipe. One process of each machine opens them first, so that only one downloads.

    Args:
        accelerator: of the run.
        options: the section `data` of the recipe.
        seed: of the run.

    Raises:
        DataError: on all ranks, if one of them cannot open the images.
    """
    source: Source | None = None
    failure = None
    with accelerator.local_main_process_first():
        try:
            source = open_source(options, seed)
        except Exception as error:  # raised below on all ranks, as the others would wait for this one
            failure = error
    distributed.raise_on_all_ranks(failure)
    return cast(Source, source)


@contextmanager
def explain_errors(options: Train, memory_keys: Sequence[str] = ()) -> Iterator[None]:
    """Replace a torch error that a user can fix by one line that says how.

    Args:
        options: the section `train` of the recipe.
        memory_keys: further recipe keys that reduce memory.

    Raises:
        OutputError: out of memory.
        HubError: another process has ended or does not answer.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (clear := _explained(error, options, memory_keys)) is None:
            raise
        raise clear from error


def _explained(error: BaseException, options: Train, memory_keys: Sequence[str]) -> ZooError | None:
    text = first_line(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        keys = ", ".join([f"train.batch_size = {options.batch_size}", *memory_keys])
        return OutputError(f"out of memory ({text}); lower {keys} or train.num_workers; the last checkpoint is whole")
    if distributed.world_size() > 1 and any(hint in text for hint in _CONNECTION_ERRORS):
        waited = f"train.timeout_minutes = {options.timeout_minutes:g}"
        silent = distributed.silent_ranks()
        named = ", ".join(f"process {rank} began {doing} and is gone or hangs" for rank, doing in silent.items())
        reason = named or "another process is gone or does not answer"
        reason = f"process {distributed.rank()}: {reason}; waited for {waited} ({text})"
        return HubError(f"{reason}; see the error of that process, then continue with --resume")
    return None


# --- trackers ----------------------------------------------------------------------------------------------------------------------------


def start_trackers(accelerator: Accelerator, names: Sequence[str], values: Mapping[str, Any], out: Path, step: int) -> None:
    """Start the trackers of a run. After a resume, a tracker continues its earlier run: the id is in the run directory.

    Args:
        accelerator: of the run.
        names: `train.trackers`.
        values: all values of the recipe by dotted key.
        out: run directory.
        step: number of steps already made.

    Raises:
        RecipeError: a tracker does not start.
    """
    if not names:
        return
    identifier = run_id(out) if accelerator.is_main_process else ""
    title = f"{values['name']}-{identifier[:6]}"
    options: dict[str, dict[str, Any]] = {
        "wandb": {"id": identifier, "resume": "allow", "name": title, "dir": str(out)},
        "trackio": {"name": title, "resume": "allow"},
        "tensorboard": {"purge_step": step + 1},
    }
    simple = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values.items()}
    try:
        accelerator.init_trackers("rlpjepa_zoo", simple, {t: options[t] for t in names if t in options})
    except Exception as error:
        raise RecipeError(f"train.trackers: {type(error).__name__}: {first_line(error)}; log in to it, or leave it out") from error


def finish_trackers(accelerator: Accelerator) -> None:
    """Close the trackers. A failure of a tracker is logged as a warning."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # for example, its server is down
            log.warning("tracker: %s: %s", type(error).__name__, error)


# --- model and optimiser -----------------------------------------------------------------------------------------------------------------


class TrainedModel:
    """Module and optimiser as they are trained on this device, together with the other processes.

    Args:
        core: the part that is averaged, measured and published.
        module: the trained module around the core.
        optimizer: of the parameters of the module.
        options: the section `train` of the recipe.
        accelerator: of the run.
        forward_methods: methods of the core, other than forward, that a step calls.
    """

    def __init__(
        self, core: Any, module: nn.Module, optimizer: torch.optim.Optimizer, options: Train, accelerator: Accelerator,
        forward_methods: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.core, self.accelerator = core, accelerator
        sharded = accelerator.distributed_type.value == "FSDP"  # FSDP takes contiguous weights only
        self.full_copy = copy.deepcopy(core).to(accelerator.device) if sharded else None
        """With FSDP: an unsharded copy to measure and publish."""
        self.memory_format = torch.channels_last if options.channels_last and not sharded else torch.contiguous_format
        module = module.to(memory_format=self.memory_format)
        if distributed.world_size() > 1 and accelerator.device.type == "cuda":
            module = convert_sync_batchnorm(module)  # timm's keeps the activation inside its fused norms; torch's drops it
        self.module = module.to(accelerator.device)
        self.ema = None if options.ema is None else ModelEmaV3(core, decay=options.ema, use_warmup=True)
        if options.compile:
            core.backbone.compile()
        if sharded:
            accelerator.state.fsdp_plugin.mixed_precision_policy = None  # autocast alone, in `forward`, gives the numbers of DDP
        self.wrapped, self.optimizer = accelerator.prepare(self.module, optimizer)
        of_core = {id(p) for p in core.parameters()}
        self.other_parameters = [p for p in self.module.parameters() if id(p) not in of_core]
        """Parameters outside the core, such as probes; their gradient is not part of the norm."""
        if not self.sharded:
            self.full_copy = None
            return
        if self.ema is not None:
            raise RecipeError("train.ema: not kept for sharded weights; use data parallelism, or set it to null")
        for name in forward_methods:
            distributed.gather_before(core, name)

    @property
    def sharded(self) -> bool:
        """Whether FSDP has sharded the parameters."""
        return any(hasattr(p, "full_tensor") for p in self.module.parameters())

    def forward(self, *inputs: Any) -> Any:
        """Forward pass in the precision of the run."""
        with self.accelerator.autocast():  # Accelerate's own wrapper leaves it out for FSDP 2
            return self.wrapped(*inputs)

    def gradient_norm(self, clip: float | None) -> Tensor:
        """Norm of the gradient of the core over all ranks, before clipping.

        Args:
            clip: `optim.clip_grad`; the gradient is clipped to this norm, in place.
        """
        parameters = [p for p in self.core.parameters() if p.grad is not None]
        if clip is not None:
            norm = self.accelerator.clip_grad_norm_(parameters, clip)
        else:
            self.accelerator.unscale_gradients()
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return distributed.full_tensor(norm)

    def other_gradients_finite(self) -> Tensor | None:
        """Whether the gradients outside the core are finite; None if there are none."""
        gradients = [p.grad for p in self.other_parameters if p.grad is not None]
        return distributed.full_tensor(nn.utils.get_total_norm(gradients)).isfinite() if gradients else None

    def update(self, step: int, skip: bool) -> None:
        """Update the weights from their gradients, and the averaged weights; then remove the gradients.

        Args:
            step: number of the step, from 1.
            skip: leave the weights as they are. The loss scale of fp16 is updated all the same.
        """
        if skip:
            self.optimizer.zero_grad(set_to_none=True)  # without gradients the scaler of fp16 can step and changes the loss scale only
        if not skip or self.accelerator.scaler is not None:
            self.optimizer.step()
        if not skip and self.ema is not None:
            self.ema.update(self.core, step)
        self.optimizer.zero_grad(set_to_none=True)

    def current_core(self) -> Any:
        """The core to measure and publish: the averaged weights if there are any, all weights if they are sharded. All ranks call it."""
        if self.full_copy is None:
            return self.core if self.ema is None else self.ema.module
        self.full_copy.load_state_dict({k: distributed.full_tensor(v) for k, v in self.core.state_dict().items()})
        return self.full_copy

    def checkpoint_bytes(self, moments: int) -> int:
        """Bytes of a checkpoint.

        Args:
            moments: tensors of the size of the parameters that the state of the optimiser holds.
        """
        held = sum(t.numel() * t.element_size() for m in (self.module, self.ema) if m is not None for t in m.state_dict().values())
        return held + sum(moments * p.numel() * p.element_size() for p in self.module.parameters() if p.requires_grad)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """(tensors of the module, tensors of the optimiser, other state of the optimiser). All ranks call it if weights are sharded."""
        tensors, scalars = optimizer_state(self.optimizer.optimizer)
        averaged = {} if self.ema is None else {f"{_EMA}{k}": v for k, v in self.ema.module.state_dict().items()}
        states = self.module.state_dict() | averaged
        return {k: distributed.full_tensor(v.detach()).cpu().contiguous() for k, v in states.items()}, tensors, scalars

    def scaler_state(self) -> dict[str, Any]:
        """State of the loss scale of fp16; empty in other precisions."""
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}

    def load_state(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], scalars: dict[str, Any], scaler: dict[str, Any]) -> None:
        """Restore what `state` and `scaler_state` returned."""
        own = {k: v for k, v in model.items() if not k.startswith(_EMA)}
        current = self.module.state_dict()
        self.module.load_state_dict({k: distributed.copy_with_layout(v, current[k]) if k in current else v for k, v in own.items()})
        if self.ema is not None:
            averaged = {k.removeprefix(_EMA): v for k, v in model.items() if k not in own}
            self.ema.module.load_state_dict(averaged or self.core.state_dict())
        restore_optimizer(self.optimizer.optimizer, optimizer, scalars)
        if self.accelerator.scaler is not None and scaler:
            self.accelerator.scaler.load_state_dict(scaler)
