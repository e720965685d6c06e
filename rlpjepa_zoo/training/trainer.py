"""The training loop of every run, exact to resume.

    run/recipe.yaml  metrics.jsonl  bad_images.jsonl  checkpoints/  <task.name>/ (published format)  <task.name>-best/  summary.json

A `Task` says what is trained, by which loss, and what is measured and published; `Trainer` does the rest. Every random draw is a function of
(seed, step), so a resumed run continues bit for bit as the uninterrupted run would have (same machine, same number of processes and threads).
Gradient accumulation is refused, as the loss would see parts of the batch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..config.plan import Plan
from ..core import distributed, files, package, rng
from ..core.signals import Interrupts
from ..data.batch import Batch
from ..data.loader import Batches, make_loader, rows_loader, steps_of_an_epoch
from ..data.sources import fingerprint
from ..data.views import Augment
from ..errors import DataError, NonFiniteError, OutputError, RecipeError, StoppedBySignal
from ..ops.memory import reused_memory
from . import checkpoint
from .announce import announce, record, slow_save
from .checkpoint import Checkpoint
from .nonfinite import NonFiniteGuard
from .optim import OPTIMIZERS, build_optimizer, set_learning_rates
from .publisher import Publisher
from .resume import check_images, check_recipe, check_same_on_all_ranks, environment, find_checkpoint, warn_of_other_environment
from .run_dir import BadImages, RunLog
from .setup import TrainedModel, explain_errors, finish_trackers, open_images, start_accelerator, start_trackers
from .tasks.feature_cache import cache_views, decode_small_sets
from .tasks.task import Step, Task, largest_over_ranks

__all__ = ["Trainer", "run_task"]

log = logging.getLogger("rlpjepa_zoo")


def run_task(task: Task, out: Path, resume: bool = False, allow_change: Sequence[str] = (), progress: bool = True) -> Path:
    """Run a task; returns the folder of its artifact. Arguments and errors as of `rlpjepa_zoo.train`."""
    options = task.recipe.train
    accelerator = start_accelerator(options, out, task.unused_parameters)
    global_state = torch.get_rng_state()
    try:
        with explain_errors(options, task.memory_keys), reused_memory(accelerator.device), ExitStack() as held:
            with distributed.fail_together():
                if accelerator.is_main_process:
                    held.enter_context(files.lock(out))
                    checkpoint.remove_leftovers(out)
            return Trainer(task, out, accelerator, resume, allow_change, progress and accelerator.is_main_process).run()
    finally:
        torch.set_rng_state(global_state)
        finish_trackers(accelerator)


class Trainer:
    """State of one run; `run` is the loop.

    Args:
        task: what is trained, measured and published.
        out: run directory; this process or the main process holds its lock.
        accelerator: from `start_accelerator`.
        resume, allow_change: as of `rlpjepa_zoo.train`.
        progress: show a progress bar on stderr.
    """

    def __init__(self, task: Task, out: Path, accelerator: Any, resume: bool, allow_change: Sequence[str], progress: bool) -> None:
        self.task, self.out, self.accelerator, self.progress = task, out, accelerator, progress
        self.main, self.device = accelerator.is_main_process, accelerator.device
        with distributed.fail_together():
            saved = find_checkpoint(out, resume)
        source = open_images(accelerator, task.recipe.data, task.recipe.seed)
        with distributed.fail_together():
            task.setup(source)
            self.recipe: Plan = task.recipe
            if saved is not None:
                check_recipe(type(self.recipe).parse(saved.state["recipe"]).flat(), self.recipe.flat(), allow_change, out)
            self.data = fingerprint(task.source, self.recipe.data.verify)
            self.per_epoch = steps_of_an_epoch(task.source, self.recipe)
            self.total, _ = self.recipe.steps(task.source.length)
            self.end = min(self.total, self.recipe.train.stop_after or self.total)
        step = saved.step if saved is not None else 0
        check_same_on_all_ranks(step, task.source, self.data, task.core.fingerprint(), self.recipe.flat())
        if self.recipe.train.epochs > 1:
            task.source = decode_small_sets(task.source, self.recipe.data.cache_gb, progress)
        self.core, self.source = task.core, task.source
        self.augment = Augment(self.recipe.views, self.recipe.data, self.recipe.seed, self.recipe.train.epochs)
        options = self.recipe.train
        module = task.module()
        optimizer = build_optimizer(self.recipe.optim.name, task.param_groups(), self.recipe.optim)
        self.trained = TrainedModel(self.core, module, optimizer, options, accelerator, task.forward_methods)
        self.guard = NonFiniteGuard(self.trained.module, options.max_skipped, options.precision, self.recipe.optim.lr)
        self.step, self.seconds = 0, 0.0
        self.last_metrics: dict[str, float] = {}
        self.best: tuple[int, float] | None = None
        """Step and value of the best evaluation by `train.best`."""
        self.signals = Interrupts()
        self.saved_at = self.logged_at = (0, 0.0)
        """Step and time of the last checkpoint, and of the last row of the log."""
        self.publisher = Publisher(out, task.name, self.recipe.hub, self.recipe.shareable())
        self.run_log = RunLog(out, self.main, accelerator.log if options.trackers else None)
        stream_steps = self.per_epoch if self.recipe.data.streaming else None
        self.bad = BadImages(self.run_log, self.source.length, options.max_bad_fraction, stream_steps)
        if saved is not None:
            check_images(saved.state, self.source.length, self.data, allow_change, out)
            self._restore(saved)
        with distributed.fail_together():
            if self.main:
                checkpoint.check_space(out, self.trained.checkpoint_bytes(OPTIMIZERS[self.recipe.optim.name].moments))
            self.run_log.open(self.recipe.dump(), saved and saved.step, self.bad.reasons)
            start_trackers(accelerator, options.trackers, self.recipe.flat(), out, self.step)

    # --- the loop ------------------------------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the last step; returns the folder of the artifact."""
        recipe, task = self.recipe, self.task
        if self.step >= self.end:
            log.warning("%s: already complete after %d steps", self.out, self.step)
            self._publish(again=True)
            return self._finish()
        loader = self._loader(range(self.step, self.end))
        if self.best is not None and self.best[0] == self.step:
            self._publish(again=True)  # the run may have been killed between this checkpoint and its publication
        self.trained.wrapped.train()
        announce(self.recipe, task.describe({}).sentence, self.core, self.source, self.step, self.device)
        if self.step == 0:
            self._measure_start()
        self.saved_at = self.logged_at = (self.step, time.monotonic())
        progress_bar = self.run_log.progress_bar(recipe.name, self.step, self.end, not self.progress)
        with self.signals, Batches(loader) as batches, progress_bar:
            while self.step < self.end:
                started = time.monotonic()
                batch = self._next(batches)
                lr = set_learning_rates(self.trained.optimizer, recipe.optim, self.step, self.total, self.per_epoch)
                torch.manual_seed(rng.key(recipe.seed, "dropout", self.step, distributed.rank()))
                self.guard.remember()
                output = self._forward(batch)
                self.accelerator.backward(output.loss)
                norm = self._update(output, batch)
                self.step += 1
                self.seconds += time.monotonic() - started
                progress_bar.update()
                self.bad.add(batch.bad, self.step)

                last = self.step == self.end
                if last or self.step % recipe.train.log_every == 0:
                    self._log_step(output, lr, norm)
                if last or self.step % max(1, self.per_epoch * task.every_epochs) == 0:
                    self._evaluate()
        distributed.raise_on_all_ranks(self.bad.error)
        return self._finish()

    def _loader(self, steps: range) -> DataLoader[Batch]:
        """This rank's batches of some steps: images, or features that are computed here first."""
        rank, world = distributed.rank(), distributed.world_size()
        if self.task.cached_views is None:
            with distributed.fail_together():
                return make_loader(self.source, self.recipe, steps, rank, world, finish=self.device.type == "cpu")
        if self.trained.sharded:
            raise RecipeError("encoder.cached_views: not for sharded weights; use data parallelism, or set it to null")
        autocast, memory_format = self.accelerator.autocast, self.trained.memory_format
        features, bad, seconds = cache_views(self.core, self.source, self.task.recipe, autocast, memory_format, self.progress)
        self.seconds = self.seconds or seconds  # those of a checkpoint have them
        self.bad.add(bad, self.step)
        return rows_loader(features, self.source.length, self.recipe, steps, rank, world)

    def _next(self, batches: Batches) -> Batch:
        """The next batch. Before it, all ranks together save a checkpoint, stop, or fail because one of them cannot go on."""
        result: Batch | DataError
        distributed.report(f"to read the images of step {self.step + 1}")
        try:
            result = batches.next()
        except DataError as error:
            result = error
        distributed.report(f"to compute step {self.step + 1}")
        failure = self.bad.error or (result if isinstance(result, DataError) else None)
        minutes = (time.monotonic() - self.saved_at[1]) / 60
        save_now = self.signals.save or minutes >= self.recipe.train.checkpoint_minutes
        failed, save, code = largest_over_ranks(self.device, failure is not None, save_now, self.signals.stop or 0)
        if failed:
            distributed.raise_on_all_ranks(failure)  # raises
        if (save or code) and self.saved_at[0] != self.step:
            self._save()
        if code:
            reason = f"stopped by a signal after step {self.step} of {self.end}; go on with --resume --out {self.out}"
            raise StoppedBySignal(reason, int(code))
        if isinstance(result, DataError):
            raise result
        return result

    def _forward(self, batch: Batch) -> Step:
        views = self.augment([x.to(self.device, non_blocking=True) for x in batch.images], batch.epoch, batch.rows)
        flat, labels = [x.flatten(0, 1) for x in views], batch.labels.to(self.device, non_blocking=True)
        groups = [x.contiguous(memory_format=self.trained.memory_format) if x.dim() == 4 else x for x in flat]
        return self.task.step(self.trained.forward, groups, labels, self.step)

    def _update(self, output: Step, batch: Batch) -> float:
        """Update the weights unless loss or gradient is non-finite on any rank; returns the norm of the gradient before clipping."""
        norm = self.trained.gradient_norm(self.recipe.optim.clip_grad)
        broken = ~(output.loss.detach().isfinite() & norm.isfinite())
        if (finite := self.trained.other_gradients_finite()) is not None:
            broken |= ~finite
        skip, size = distributed.max_over_ranks(torch.stack([broken.float(), norm.detach().float().nan_to_num()])).tolist()
        if skip:
            terms = ", ".join(f"{name} {float(value.detach()):.3g}" for name, value in output.terms.items())
            rows = [row for share in distributed.gather_objects(batch.rows.tolist()) for row in share]
            self.run_log.non_finite(self.step + 1, self.recipe.seed, batch.epoch, rows, terms)
            self.guard.skip(self.step + 1, terms, lambda: self._forward(batch))
        else:
            self.guard.in_a_row = 0
        self.trained.update(self.step + 1, bool(skip))
        if not skip:
            self.task.after_update()
        return math.nan if skip else float(size)

    # --- evaluating and publishing --------------------------------------------------------------------------------------------------------

    def _measure_start(self) -> None:
        if metrics := self.task.baseline(self._artifact(), self.accelerator.autocast):
            self.last_metrics |= metrics
            self._log({"kind": "start", **metrics})
            log.info("before the first step: %s", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    def _evaluate(self) -> None:
        """Evaluate, save a checkpoint, publish."""
        distributed.report(f"to evaluate after step {self.step}")
        artifact = self._artifact()
        for buffer in artifact.buffers():
            distributed.from_main(buffer)  # batch norm on CPU processes keeps statistics of each share; those of rank 0 are published
        metrics = self.task.evaluate(artifact, self.accelerator.autocast)
        self.last_metrics |= metrics
        metric = str(self.recipe.train.best)
        better = (
            self.task.settled
            and metric in self.last_metrics
            and self.task.best[metric].improves(self.last_metrics[metric], self.best and self.best[1])
        )
        if better:
            self.best = (self.step, self.last_metrics[metric])
        self._log({"kind": "eval", **metrics})
        if self.step < self.end:  # `_finish` logs the alarms of the last evaluation
            for sentence in self.task.describe(metrics, final=False).alarms:
                log.warning("step %d: %s", self.step, sentence)
        self._save()
        self._publish(best=better)
        self.logged_at = (self.step, time.monotonic())

    def _artifact(self) -> Any:
        """What is measured and published now. All ranks call it."""
        return self.task.artifact(self.trained.current_core())

    def info(self) -> dict[str, Any]:
        """The record of the artifact for its card."""
        training = record(self.recipe, self.source, self.step, self.seconds, self.device)
        return self.task.describe(self.last_metrics, training, self.out / "metrics.jsonl").record

    def _publish(self, again: bool = False, best: bool = False) -> None:
        artifact = self._artifact()
        with distributed.fail_together():
            if self.main:
                self.publisher.write(artifact, self.info(), self.step, self.total, again)
                if best or (again and self.best is not None and self.best[0] == self.step):
                    metric = str(self.recipe.train.best)
                    self.publisher.copy_as(f"{self.task.name}-best", self.task.best[metric].note.format(metric=metric))

    def _finish(self) -> Path:
        """Log the alarms, write summary.json and wait for the last push."""
        with distributed.fail_together():
            if self.main:
                alarms = self.task.describe(self.last_metrics).alarms
                for sentence in alarms:
                    log.warning("%s", sentence)
                self.run_log.summary({
                    "steps": self.step, **self.last_metrics, "bad_images": len(self.bad.reasons), "skipped": self.guard.skipped,
                    "best": self.best and {"step": self.best[0], str(self.recipe.train.best): self.best[1]}, "alarms": alarms,
                    "info": self.info(), "versions": package.versions(),
                })  # fmt: skip
                self.publisher.finish()
        return self.publisher.path

    # --- checkpoints -----------------------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        started = time.monotonic()
        distributed.report(f"to save the checkpoint of step {self.step}")
        self.bad.share(self.step)
        if self.main or self.trained.sharded:
            model, optimizer, scalars = self.trained.state()
        with distributed.fail_together():
            if self.main:
                state = {
                    "recipe": self.recipe.dump(), "optimizer": scalars, "images": self.source.length, "data": self.data,
                    "seconds": self.seconds, "scaler": self.trained.scaler_state(), "bad": self.bad.reasons, "metrics": self.last_metrics,
                    "best": self.best, "skipped": [self.guard.skipped, self.guard.in_a_row], **environment(), "task": self.task.state(),
                }  # fmt: skip
                if not (self.out / ".lock").exists():
                    raise OutputError(f"{self.out}: moved or removed while the run went on; go on from its last checkpoint with --resume")
                also = [self.best[0]] if self.best else []
                checkpoint.save(self.out, Checkpoint(self.step, model, optimizer, state), self.recipe.train.keep, also)
        self.saved_at, self.signals.save = (self.step, time.monotonic()), False
        if self.main and (sentence := slow_save(self.saved_at[1] - started)):
            self.run_log.warn_once(sentence)

    def _restore(self, saved: Checkpoint) -> None:
        state = saved.state
        self.trained.load_state(saved.model, saved.optimizer, state["optimizer"], state["scaler"])
        self.step, self.seconds = saved.step, state["seconds"]
        self.bad.reasons = {int(row): reason for row, reason in state["bad"].items()}
        self.last_metrics, self.best = state["metrics"], state["best"] and tuple(state["best"])
        self.task.load_state(state.get("task", state))  # older checkpoints have the state of the task among the other keys
        self.guard.skipped, self.guard.in_a_row = state["skipped"]
        warn_of_other_environment(state)

    # --- logging ---------------------------------------------------------------------------------------------------------------------------

    def _log_step(self, output: Step, lr: float, norm: float) -> None:
        """Write the row of a step; raises if the task says that the run cannot go on."""
        rate = (self.step - self.logged_at[0]) * self.recipe.train.batch_size / max(1e-9, time.monotonic() - self.logged_at[1])
        self.logged_at = (self.step, time.monotonic())
        numbers, failure = output.log()
        row: dict[str, Any] = {"kind": "train", **numbers, "lr": lr, "grad_norm": norm, "images_per_second": rate}
        self.bad.share(self.step)
        row |= {k: v for k, v in (("bad_images", len(self.bad.reasons)), ("skipped", self.guard.skipped)) if v}
        self._log(row)
        if failure is not None:
            raise NonFiniteError(f"step {self.step}: {failure}")
        remembered = {name: numbers[key] for key, name in self.task.remember.items() if key in numbers}
        if all(map(math.isfinite, remembered.values())):
            self.last_metrics |= remembered
        values = self.last_metrics | numbers
        self.run_log.bar.set_postfix({label: f"{values[k]:.3f}" for label, k in self.task.progress.items() if k in values}, refresh=False)

    def _log(self, row: dict[str, Any]) -> None:
        self.run_log.row({"step": self.step, "epoch": round(self.step / self.per_epoch, 4), **row})
