"""The engine of every run: one readable loop on Accelerate, exact to resume; the only module that imports accelerate.

    run/recipe.yaml  metrics.jsonl  bad_images.jsonl  checkpoints/  <task.name>/ (published format)  <task.name>-best/  summary.json

What is trained, by which loss, and what is measured and published, a `Task` says; `Run` does the rest. Everything random is a function of
(seed, step), so a resumed run continues bit for bit what the unbroken one would have done (same machine, same number of processes and
threads). Gradient accumulation is refused: see `rlpjepa_zoo.config.pretrain`.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from tqdm.auto import tqdm

from ..config.plan import Plan
from ..core import distributed, files, package, rng
from ..core.signals import Interrupts
from ..data.batch import Batch
from ..data.images import Images
from ..data.loader import Batches, steps_of_an_epoch
from ..data.memory import decode_to_memory
from ..data.sources import Source, fingerprint, open_source
from ..data.views import Augment
from ..errors import DataError, HubError, OutputError, RecipeError, StoppedBySignal, UsageError, ZooError, did_you_mean, first_line
from . import checkpoint, publisher, run_dir
from .checkpoint import Checkpoint
from .nonfinite import Guard
from .optim import set_learning_rates
from .task import Loss, Task, agree

__all__ = ["Run", "run"]

log = logging.getLogger("rlpjepa_zoo")

_DATA = "data"
"""What --allow-change takes, beside keys of the recipe, for images that are not those of the run before."""

_OF_A_NODE = ("data.path", "data.download", "train.num_workers")
"""What processes on different machines may have of their own."""

_MAY_CHANGE = (
    "name",
    "objective.chunk",
    "train.log_every",
    "train.num_workers",
    "train.keep",
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


def run(task: Task, out: Path, resume: bool = False, allow_change: Sequence[str] = (), progress: bool = True) -> Path:
    """Do a task; returns the folder of what it published. See `rlpjepa_zoo.train` for arguments and errors."""
    recipe: Plan = task.recipe
    AcceleratorState._reset_state()  # precision is a property of the run, not of the process
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if recipe.train.precision == "fp16" and cpu:
        raise RecipeError("train.precision: fp16 needs a GPU; use bf16 or no")
    try:
        accelerator = Accelerator(
            mixed_precision=recipe.train.precision, cpu=cpu, project_dir=str(out), log_with=list(recipe.train.trackers) or None,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(minutes=recipe.train.timeout_minutes)),
                DistributedDataParallelKwargs(find_unused_parameters=task.some_unused),
            ],
        )  # fmt: skip
    except ValueError as error:
        mend = "; set train.precision to fp16 or no" if "bf16" in str(error) else ""
        raise RecipeError(f"train: {first_line(error)}{mend}") from error
    except distributed.DistError as error:
        raise HubError(
            f"the processes did not find each other: {first_line(error)}; check the port and address given to the launcher"
        ) from error
    if accelerator.gradient_accumulation_steps != 1:
        raise RecipeError("gradient_accumulation_steps: accumulation is refused, as the loss would see parts of the batch; set it to 1")
    if missing := set(recipe.train.trackers) - {str(getattr(t, "value", t)) for t in accelerator.log_with} - {"all"}:
        raise RecipeError(f"train.trackers: {min(missing)} is not installed; pip install it, or leave it out")
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU") and not (kind == "FSDP" and accelerator.is_fsdp2):
        raise RecipeError(f"accelerate: expected data parallelism or FSDP version 2, got {kind}; use recipes/accelerate/")
    if recipe.train.batch_size % distributed.world_size():
        batch, world = recipe.train.batch_size, distributed.world_size()
        near = " or ".join(str(n) for n in (batch // world * world, -(-batch // world) * world) if n)
        raise RecipeError(f"train.batch_size: {batch} is not divisible by {world} processes; use {near}")
    global_state = torch.get_rng_state()
    try:
        with ExitStack() as held:
            with distributed.fail_together():
                if accelerator.is_main_process:
                    held.enter_context(files.lock(out))
                    checkpoint.remove_leftovers(out)
            return Run(task, out, accelerator, resume, allow_change, progress and accelerator.is_main_process).go()
    except (MemoryError, RuntimeError) as error:
        explained = _explained(error, task)
        if explained is None:
            raise
        raise explained from error
    finally:
        torch.set_rng_state(global_state)
        for tracker in accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # its server is down; the run is not to fail for that
                log.warning("tracker: %s: %s", type(error).__name__, error)


def _explained(error: BaseException, task: Task) -> ZooError | None:
    """What a user can mend among the errors that torch raises in a step: no memory left, another process that is gone or hangs."""
    recipe, text = task.recipe, first_line(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        mend = f"lower train.batch_size = {recipe.train.batch_size}{task.lighter} or train.num_workers; the last checkpoint is whole"
        return OutputError(f"out of memory ({text}); {mend}")
    if distributed.world_size() > 1 and any(
        hint in text for hint in ("Timed out", "timeout", "Connection closed", "Connection reset", "Broken pipe")
    ):
        waited = f"train.timeout_minutes = {recipe.train.timeout_minutes:g}"
        reason = f"process {distributed.rank()}: another process is gone or does not answer within {waited} ({text})"
        return HubError(f"{reason}; look for its own error, then go on with --resume")
    return None


class Run:
    """State of one run; `go` is the story."""

    def __init__(self, task: Task, out: Path, accelerator: Accelerator, resume: bool, allow_change: Sequence[str], progress: bool) -> None:
        self.task, self.out, self.accelerator, self.progress = task, out, accelerator, progress
        self.main = accelerator.is_main_process
        with distributed.fail_together():
            task.resolve_defaults()
            self.recipe: Plan = task.recipe
            found = self._find(resume, allow_change)
        self._open_images()
        with distributed.fail_together():
            self.core = task.build()
        self._same_everywhere(found.step if found else 0)
        self._decode_images()
        self.augment = Augment(self.recipe.views, self.recipe.data, self.recipe.seed)
        self._prepare()
        self.step, self.seconds, self.bad = 0, 0.0, dict[int, str]()
        self.guard = Guard(self.inner, self.recipe)
        self.last_metrics: dict[str, float] = {}
        self.best: tuple[int, float] | None = None
        self.trouble: DataError | None = None
        self.asked = Interrupts()
        self.saved = self.logged = (0, 0.0)
        self.publication = publisher.Publication(self.recipe, out, task.name)
        if found is not None:
            self._restore(found, allow_change)
        self.journal = run_dir.Journal(out, self.recipe, self.main)
        with distributed.fail_together():
            self._check_space()
            self.journal.open(self.step if found else None, self.bad)
            self._start_trackers()

    def _open_images(self) -> None:
        trouble = None
        with self.accelerator.local_main_process_first():  # one process downloads
            try:
                self.source: Source = open_source(self.recipe.data, self.recipe.seed)
            except Exception as error:  # not to leave the others waiting for this one
                trouble = error
        distributed.raise_on_all_ranks(trouble)
        with distributed.fail_together():
            self.source = self.task.accept(self.source)
            self.data = fingerprint(self.source)
            self.per_epoch = steps_of_an_epoch(self.source, self.recipe)
            self.total, _ = self.recipe.steps(self.source.length)

    def _decode_images(self) -> None:
        """Keep small sets in memory."""
        if isinstance(self.source.train, Images) and self.recipe.train.epochs > 1:
            most = self.recipe.data.cache_gb * 2**30
            held_out = self.source.eval and decode_to_memory(self.source.eval, most, self.progress)
            self.source = self.source._replace(train=decode_to_memory(self.source.train, most, self.progress), eval=held_out)

    def _prepare(self) -> None:
        """Model and optimiser, as they are trained on this device among the others."""
        recipe, accelerator = self.recipe, self.accelerator
        model = self.task.wrap(self.core, self.source)
        optimizer = self.task.optimizer(self.core, model)
        sharded = accelerator.distributed_type.value == "FSDP"  # which takes contiguous weights only
        self.memory = torch.channels_last if recipe.train.channels_last and not sharded else torch.contiguous_format
        model = model.to(memory_format=self.memory)
        if distributed.world_size() > 1 and accelerator.device.type == "cuda":
            model = convert_sync_batchnorm(model)  # timm's keeps the activation that its fused norms hold; torch's drops it
        model = model.to(accelerator.device)
        self.ema = None if recipe.train.ema is None else ModelEmaV3(self.core, decay=recipe.train.ema, use_warmup=True)
        if recipe.train.compile:
            self.core.backbone.compile()
        self.inner = model
        if sharded:
            accelerator.state.fsdp_plugin.mixed_precision_policy = None  # autocast alone, in `_forward`: the numbers of data parallelism
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        own = {id(p) for p in self.core.parameters()}
        self.beside = [p for p in model.parameters() if id(p) not in own]  # probes: their gradient is not part of the norm
        self.whole: Any = None
        if any(hasattr(p, "full_tensor") for p in model.parameters()):  # FSDP: measured and published is a copy that is not sharded
            if self.ema is not None:
                raise RecipeError("train.ema: not kept for sharded weights; use data parallelism, or set it to null")
            self.whole = self.task.build().to(accelerator.device)
            for name in self.task.calls:
                distributed.gather_before(self.core, name)

    # --- the loop ----------------------------------------------------------------------------------------------------------------

    def go(self) -> Path:
        recipe = self.recipe
        if self.step >= self.total:
            log.warning("%s: already complete after %d steps", self.out, self.step)
            self._publish(again=True)
            return self._finish()
        on_device = self.accelerator.device.type != "cpu"
        steps = range(self.step, self.total)
        self._note_bad(self.task.ready(self.core, self.source, self.accelerator.autocast, self.memory, self.progress))
        with distributed.fail_together():
            loader = self.task.loader(self.source, steps, finish=not on_device)
        if self.best is not None and self.best[0] == self.step:
            self._publish(again=True)  # in case that the run was killed between this checkpoint and its publication
        self.model.train()
        self._announce()
        self.saved = self.logged = (self.step, time.monotonic())
        with self.asked, Batches(loader) as batches, self._bar() as bar:
            while self.step < self.total:
                started = time.monotonic()
                batch = self._next(batches)
                self.task.before(self.core, self.step, self.per_epoch)
                lr = set_learning_rates(self.optimizer, recipe, self.step, self.total, self.per_epoch)
                torch.manual_seed(rng.key(recipe.seed, "dropout", self.step, distributed.rank()))
                self.guard.remember()
                output = self._forward(batch)
                loss = self.task.loss(output, self.step)
                self.accelerator.backward(loss.total)
                norm = self._update(loss, batch)
                self.step += 1
                self.seconds += time.monotonic() - started
                bar.update(recipe.train.batch_size)
                self._note_bad(batch.bad)

                last = self.step == self.total
                if last or self.step % recipe.train.log_every == 0:
                    self._log_step(loss, output, lr, norm, bar)
                if last or self.step % max(1, self.per_epoch * self.task.every_epochs) == 0:
                    self._look(bar)
        distributed.raise_on_all_ranks(self.trouble)
        return self._finish()

    def _next(self, batches: Batches) -> Batch:
        """The next batch; before it, all ranks together save, stop, or fail because one of them cannot go on."""
        found: Batch | DataError
        try:
            found = batches.next()
        except DataError as error:
            found = error
        trouble = self.trouble or (found if isinstance(found, DataError) else None)
        minutes = (time.monotonic() - self.saved[1]) / 60
        wanted = (trouble is not None, self.asked.save or minutes >= self.recipe.train.checkpoint_minutes, self.asked.stop or 0)
        failed, save, code = agree(self.accelerator.device, *wanted)
        if failed:
            distributed.raise_on_all_ranks(trouble)  # raises
        if (save or code) and self.saved[0] != self.step:
            self._save()
        if code:
            reason = f"stopped by a signal after step {self.step} of {self.total}; go on with --resume --out {self.out}"
            raise StoppedBySignal(reason, int(code))
        if isinstance(found, DataError):
            raise found
        return found

    def _forward(self, batch: Batch) -> Any:
        device = self.accelerator.device
        views = self.augment([x.to(device, non_blocking=True) for x in batch.images], batch.epoch, batch.rows)
        flat, labels = [x.flatten(0, 1) for x in views], batch.labels.to(device, non_blocking=True)
        groups = [x.contiguous(memory_format=self.memory) if x.dim() == 4 else x for x in flat]
        with self.accelerator.autocast():  # which Accelerate's own wrapper leaves out for FSDP 2
            return self.model(*self.task.inputs(groups, labels, self.step))

    def _update(self, loss: Loss, batch: Batch) -> float:
        """One step of the optimiser, unless loss or gradient is not finite on any rank; returns the norm of the gradient (clipped if asked)."""
        parameters = [p for p in self.core.parameters() if p.grad is not None]
        if self.recipe.optim.clip_grad is not None:
            norm = self.accelerator.clip_grad_norm_(parameters, self.recipe.optim.clip_grad)
        else:
            self.accelerator.unscale_gradients()
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = distributed.full_tensor(norm)
        broken = ~(loss.total.detach().isfinite() & norm.isfinite())
        if beside := [p.grad for p in self.beside if p.grad is not None]:
            broken |= ~distributed.full_tensor(nn.utils.get_total_norm(beside)).isfinite()
        stop, size = distributed.max_over_ranks(torch.stack([broken.float(), norm.detach().float().nan_to_num()])).tolist()
        if stop:
            parts = ", ".join(f"{name} {float(value.detach()):.3g}" for name, value in loss.terms.items())
            self.guard.skip(self.step + 1, parts, lambda: self._forward(batch))
            self.optimizer.zero_grad(set_to_none=True)  # so that the scaler of fp16 may step below
        else:
            self.guard.in_a_row = 0
        if not stop or self.accelerator.scaler is not None:  # without gradients nothing but the loss scale of fp16 changes
            self.optimizer.step()
        if not stop and self.ema is not None:
            self.ema.update(self.core, self.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        return math.nan if stop else float(size)

    def _look(self, bar: Any) -> None:
        """Measure, save, publish."""
        shown = self._shown()
        for buffer in shown.buffers():
            distributed.from_main(buffer)  # what is saved and published: batch norm on CPU processes keeps statistics of each share
        found = self.task.measure(shown, self.source, self.accelerator.autocast)
        self.last_metrics |= found
        metric = self.recipe.train.best
        better = metric in self.last_metrics and self._is_best(metric)
        self._log({"kind": "eval", **found}, bar)
        if self.step < self.total:  # at the end all alarms are said
            for sentence in self.task.alarms(found, still_training=True):
                log.warning("step %d: %s", self.step, sentence)
        self._save()
        self._publish(best=better)
        self.logged = (self.step, time.monotonic())

    def _shown(self) -> Any:
        """What is measured and published. All ranks call it."""
        if self.whole is None:
            return self.task.shown(self.core if self.ema is None else self.ema.module)
        self.whole.load_state_dict({k: distributed.full_tensor(v) for k, v in self.core.state_dict().items()})
        return self.task.shown(self.whole)

    def _is_best(self, metric: str) -> bool:
        value, before = self.last_metrics[metric], self.best
        if not math.isfinite(value):  # nothing compares with NaN, so it would stay the best
            return False
        better = before is None or (value > before[1] if self.task.best[metric] else value < before[1])
        if better:
            self.best = (self.step, value)
        return better

    # --- starting and stopping ---------------------------------------------------------------------------------------------------

    def _find(self, resume: bool, allow_change: Sequence[str]) -> Checkpoint | None:
        found, damaged = checkpoint.latest(self.out)
        if found is None:
            return None
        if not resume:
            raise UsageError(f"{self.out}: holds a run at step {found.step}; add --resume to go on, or choose another --out")
        for line in damaged:
            log.warning("damaged checkpoint left out: %s", line)
        before, now = type(self.recipe).parse(found.state["recipe"]).flat(), self.recipe.flat()
        known, absent = before.keys() | now.keys() | {_DATA}, object()
        if useless := [k for k in allow_change if k not in known]:
            raise UsageError(f"--allow-change {useless[0]}: no such key in the recipe.{did_you_mean(useless[0], known)}")
        differing = (k for k in sorted(known) if before.get(k, absent) != now.get(k, absent))
        changed = [k for k in differing if k not in _MAY_CHANGE and k not in allow_change]
        if changed:
            lines = ", ".join(f"{k}: {before.get(k, 'absent')!r} -> {now.get(k, 'absent')!r}" for k in changed)
            raise RecipeError(f"the recipe differs from the run in {self.out}: {lines}; undo, or allow each with --allow-change KEY")
        return found

    def _same_everywhere(self, step: int) -> None:
        """Refuse ranks that see other checkpoints or images, or start from other weights: they would train something nobody asked for."""
        names = ("checkpoint (step)", "images (count)", "images (fingerprint)", "weights (fingerprint)")
        seen = distributed.gather_objects((step, self.source.length, self.data, self.core.fingerprint()))
        for name, *values in zip(names, *seen, strict=True):
            if len(set(values)) > 1:
                raise UsageError(f"processes see different {name}: {values}; put --out and the data on a shared disk")
        recipes = distributed.gather_objects({k: v for k, v in self.recipe.flat().items() if k not in _OF_A_NODE})
        for key, *values in ((key, *(recipe[key] for recipe in recipes)) for key in recipes[0]):
            if any(value != values[0] for value in values):
                raise UsageError(f"processes have different recipes: {key} is {values}; give all the same file and overrides")

    def _restore(self, found: Checkpoint, allow_change: Sequence[str]) -> None:
        state = found.state
        if state["images"] != self.source.length:
            counts = f"the run in {self.out} trained on {state['images']} images, the data now holds {self.source.length}"
            raise DataError(f"{counts}; the number of images cannot change within a run: restore them, or start another --out")
        if state["data"] != self.data and _DATA not in allow_change:
            raise DataError(
                f"the images are not those that the run in {self.out} trained on (names or contents differ); "
                f"restore them, or go on with --allow-change {_DATA}"
            )
        own = {k: v for k, v in found.model.items() if not k.startswith("ema.")}
        current = self.inner.state_dict()
        self.inner.load_state_dict({k: distributed.copy_with_layout(v, current[k]) if k in current else v for k, v in own.items()})
        if self.ema is not None:
            self.ema.module.load_state_dict(
                {k.removeprefix("ema."): v for k, v in found.model.items() if k not in own} or self.core.state_dict()
            )
        checkpoint.restore_optimizer(self.optimizer.optimizer, found.optimizer, state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = found.step, state["seconds"]
        self.bad = {int(row): reason for row, reason in state["bad"].items()}
        self.last_metrics, self.best = state["metrics"], state["best"] and tuple(state["best"])
        self.task.restore(state)
        self.guard.skipped, self.guard.in_a_row = state["skipped"]
        for name, now in (("world_size", distributed.world_size()), ("threads", torch.get_num_threads())):
            if state[name] != now:
                log.warning(
                    "%d %s before, %d now: equal up to rounding, not bit for bit", state[name], name.replace("world_size", "processes"), now
                )
        if state["versions"] != package.versions():
            changed = [f"{k} {v} -> {package.versions().get(k)}" for k, v in state["versions"].items() if package.versions().get(k) != v]
            log.warning("other versions than before, perhaps not bit for bit: %s", ", ".join(changed))

    def _save(self) -> None:
        self._share_bad()
        if self.main or self.whole is not None:
            tensors, scalars = checkpoint.optimizer_state(self.optimizer.optimizer)
            averaged = {} if self.ema is None else {f"ema.{k}": v for k, v in self.ema.module.state_dict().items()}
            model = {k: distributed.full_tensor(v.detach()).cpu().contiguous() for k, v in (self.inner.state_dict() | averaged).items()}
        if self.main:
            state = {
                "recipe": self.recipe.dump(), "optimizer": scalars, "images": self.source.length, "data": self.data, "seconds": self.seconds,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
                "bad": self.bad, "metrics": self.last_metrics, "best": self.best,
                "skipped": [self.guard.skipped, self.guard.in_a_row], "versions": package.versions(),
                "world_size": distributed.world_size(), "threads": torch.get_num_threads(), **self.task.state(),
            }  # fmt: skip
            also = [self.best[0]] if self.best else []
        with distributed.fail_together():
            if self.main:
                if not (self.out / ".lock").exists():
                    raise OutputError(f"{self.out}: moved or removed while the run went on; go on from its last checkpoint with --resume")
                checkpoint.save(self.out, Checkpoint(self.step, model, tensors, state), self.recipe.train.keep, also)
        self.saved, self.asked.save = (self.step, time.monotonic()), False

    def _check_space(self) -> None:
        if self.main:
            held = sum(t.numel() * t.element_size() for m in (self.inner, self.ema) if m is not None for t in m.state_dict().values())
            moments = {"adamw": 2, "lars": 1, "sgd": 1}[self.recipe.optim.name]
            held += sum(moments * p.numel() * p.element_size() for p in self.inner.parameters() if p.requires_grad)
            checkpoint.check_space(self.out, held)

    # --- measuring and telling ---------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        recipe = self.recipe
        normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in self.core.modules())
        if distributed.world_size() > 1 and self.accelerator.device.type == "cpu" and normed:
            log.warning("batch norm on CPU processes sees each process's share of the batch only; on GPUs it is synchronised")
        parameters = sum(p.numel() for p in self.core.parameters()) / 1e6
        log.info(
            "%s: %s; %.2f M parameters, %d images, %d classes; %d steps (%d an epoch) of %d images, %d on each of %d x %s, %s; "
            "peak lr %.3g = %g * %d / %d%s",
            recipe.name, self.task.aim(self.source), parameters, self.source.length, self.source.classes, self.total, self.per_epoch,
            recipe.train.batch_size, recipe.train.batch_size // distributed.world_size(), distributed.world_size(), self.accelerator.device,
            recipe.train.precision, recipe.lr, recipe.optim.lr, recipe.train.batch_size, recipe.optim.reference_batch,
            f"; resumed at step {self.step}" if self.step else "",
        )  # fmt: skip

    def _bar(self) -> Any:
        size = self.recipe.train.batch_size
        return tqdm(
            total=self.total * size,
            initial=self.step * size,
            unit="image",
            unit_scale=True,
            desc=self.recipe.name,
            disable=not self.progress,
            mininterval=0.5,
        )

    def _log_step(self, loss: Loss, output: Any, lr: float, norm: float, bar: Any) -> None:
        rate = (self.step - self.logged[0]) * self.recipe.train.batch_size / max(1e-9, time.monotonic() - self.logged[1])
        self.logged = (self.step, time.monotonic())
        row: dict[str, Any] = {"kind": "train", **self.task.numbers(loss, output), "lr": lr, "grad_norm": norm, "images_per_second": rate}
        self._share_bad()
        row |= {k: v for k, v in (("bad_images", len(self.bad)), ("skipped", self.guard.skipped)) if v}
        self._log(row, bar)
        self.last_metrics |= self.task.noted(self.step, row)
        bar.set_postfix(self.task.brief(row, self.last_metrics), refresh=False)

    def _note_bad(self, found: Iterable[tuple[int, str]]) -> None:
        """Count unreadable images (each once) and write them down; more than the recipe allows are trouble for the next step."""
        new = [record for record in found if record[0] not in self.bad]
        for row, reason in new:
            self.bad[row] = reason
            self.journal.bad_image(row, reason, quiet=len(self.bad) > 5)
        epochs = -(-self.step // self.per_epoch) if self.recipe.data.streaming else 1  # a stream's images are counted in each epoch
        if new and len(self.bad) > self.recipe.train.max_bad_fraction * self.source.length * max(1, epochs):
            allowed = f"train.max_bad_fraction = {self.recipe.train.max_bad_fraction:g}"
            counted = f"{len(self.bad)} of {self.source.length} images cannot be read"
            self.trouble = DataError(f"{counted}, more than {allowed}; see {self.out / 'bad_images.jsonl'}")

    def _share_bad(self) -> None:
        """Let every rank know what the others could not read."""
        for part in distributed.gather_objects(list(self.bad.items())):
            self._note_bad(part)

    def _start_trackers(self) -> None:
        """The recipe's trackers; a resumed run goes on in the tracker's run, by an id that the folder keeps."""
        if not self.recipe.train.trackers:
            return
        name = run_dir.run_id(self.out) if self.main else ""
        label = f"{self.recipe.name}-{name[:6]}"
        options: dict[str, dict[str, Any]] = {
            "wandb": {"id": name, "resume": "allow", "name": label, "dir": str(self.out)},
            "trackio": {"name": label, "resume": "allow"},
            "tensorboard": {"purge_step": self.step + 1},
        }
        flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in self.recipe.flat().items()}
        try:
            self.accelerator.init_trackers("rlpjepa_zoo", flat, {t: options[t] for t in self.recipe.train.trackers if t in options})
        except Exception as error:
            raise RecipeError(f"train.trackers: {type(error).__name__}: {first_line(error)}; log in to it, or leave it out") from error

    def _log(self, row: dict[str, Any], bar: Any) -> None:
        if not self.main:
            return
        row = {"step": self.step, "epoch": round(self.step / self.per_epoch, 4), **row}
        self.journal.row(row)
        if self.recipe.train.trackers:
            try:
                self.accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}, step=self.step)
            except Exception as error:  # a tracker's server that is down does not end a run; metrics.jsonl has the row
                self.journal.once(f"tracker: {type(error).__name__}: {error}")
        if row["kind"] == "eval" and not bar.disable:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float) and k != "epoch")
            bar.write(f"step {self.step}: {shown}", file=sys.stderr)

    def info(self) -> dict[str, Any]:
        """What the card tells of the run."""
        training = {
            "images": self.source.length, "epochs": round(self.step / self.per_epoch, 3), "steps": self.step,
            "batch": self.recipe.train.batch_size, "minutes": round(self.seconds / 60, 2),
            "hardware": f"{distributed.world_size()} x {_hardware(self.accelerator.device)}",
            "precision": self.recipe.train.precision, "seed": self.recipe.seed,
        }  # fmt: skip
        training |= {"ema": self.recipe.train.ema} if self.ema is not None else {}
        return self.task.describe(self.core, self.source, self.last_metrics, training, self.out / "metrics.jsonl")

    def _publish(self, again: bool = False, best: bool = False) -> None:
        shown = self._shown()
        with distributed.fail_together():
            if self.main:
                self.publication.write(shown, self.info(), self.step, self.total, again)
                if best or (again and self.best is not None and self.best[0] == self.step):
                    self.publication.copy_as(f"{self.task.name}-best", self.task.chosen(str(self.recipe.train.best)))

    def _finish(self) -> Path:
        with distributed.fail_together():
            if self.main:
                self._summarise()
                self.publication.finish()
        return self.publication.path

    def _summarise(self) -> None:
        wrong = self.task.alarms(self.last_metrics)
        for sentence in wrong:
            log.warning("%s", sentence)
        summary = {
            "steps": self.step, **self.last_metrics, "bad_images": len(self.bad), "skipped": self.guard.skipped,
            "best": self.best and {"step": self.best[0], str(self.recipe.train.best): self.best[1]}, "alarms": wrong, "info": self.info(),
            "versions": package.versions(),
        }  # fmt: skip
        with files.whole_file(self.out / "summary.json") as aside:
            aside.write_text(json.dumps(summary, indent=1) + "\n")


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {platform.machine()} CPU"
