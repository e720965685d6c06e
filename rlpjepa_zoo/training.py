"""Pretraining: one readable loop on Accelerate, exact to resume; the only module that imports accelerate.

    run/recipe.yaml  metrics.jsonl  bad_images.jsonl  checkpoints/  encoder/ (published format)  summary.json

Everything random is a function of (seed, step), so a resumed run continues bit for bit what the unbroken one would have done (same
machine, same number of processes and threads). Gradient accumulation is refused: see `rlpjepa_zoo.recipe`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.layers import convert_sync_batchnorm
from torch import Tensor
from tqdm.auto import tqdm

from . import checkpoint, collectives, record, streams, zoo
from .checkpoint import Checkpoint
from .data import Batch, Batches, make_loader
from .distributions import RectifiedGeneralizedGaussian
from .encoder import SparseEncoder
from .errors import DataError, NonFiniteError, OutputError, RecipeError, StoppedBySignal, UsageError, did_you_mean
from .evaluation import encode, knn_accuracy
from .images import Images
from .loading import create_encoder
from .metrics import alarms, batch_metrics, dead, l0, l1
from .objectives import RectifiedLpJEPALoss, Terms
from .optim import make_optimizer, set_learning_rates
from .preprocess import Preprocess
from .recipe import Recipe
from .sources import Source, open_source

__all__ = ["build_encoder", "train"]

log = logging.getLogger("rlpjepa_zoo")

_MAY_CHANGE = (
    "name",
    "train.log_every",
    "train.num_workers",
    "train.keep",
    "train.checkpoint_minutes",
    "train.trackers",
    "data.path",
    "data.download",
    "hub.repo",
    "hub.private",
    "hub.revision",
    "hub.license",
)


def build_encoder(recipe: Recipe) -> SparseEncoder:
    """The encoder a recipe describes, initialised from the recipe's seed."""
    options, data = recipe.encoder, recipe.data
    size = (data.image_size, data.image_size)
    with streams.seeded(recipe.seed, "init"):
        return create_encoder(
            options.backbone, options.dim, options.hidden_dim, options.pretrained,
            projector_depth=options.projector_depth, freeze_backbone=options.freeze_backbone,
            preprocess=Preprocess(size, data.mean, data.std, data.interpolation, data.crop_pct), **options.args,
        )  # fmt: skip


def train(recipe: Recipe, out: str | Path, resume: bool = False, allow_change: Sequence[str] = (), progress: bool = True) -> Path:
    """Pretrain an encoder; returns the folder it is published in (`out/encoder`).

    Args:
        recipe: the run.
        out: folder of the run; one run at a time may hold it.
        resume: go on from the newest checkpoint that verifies; from the start if there is none.
        allow_change: dotted recipe keys that may differ from the run that is resumed.
        progress: show a progress bar on stderr.

    Raises:
        UsageError: the folder is in use, or holds a run and `resume` is not set.
        RecipeError: the recipe differs from that of the run, or does not fit the processes or device.
        DataError, ModelError, OutputError: as their names say.
        NonFiniteError: loss or gradient became NaN or infinite; the last checkpoint is from before.
        StoppedBySignal: SIGTERM or SIGINT; a checkpoint was saved.
    """
    out = Path(out)
    AcceleratorState._reset_state()  # precision is a property of the run, not of the process
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if recipe.train.precision == "fp16" and cpu:
        raise RecipeError("train.precision: fp16 needs a GPU; use bf16 or no")
    try:
        accelerator = Accelerator(
            mixed_precision=recipe.train.precision, cpu=cpu, project_dir=str(out), log_with=list(recipe.train.trackers) or None
        )
    except ValueError as error:
        raise RecipeError(f"train: {str(error).splitlines()[0]}") from error
    if accelerator.gradient_accumulation_steps != 1:
        raise RecipeError("gradient_accumulation_steps: accumulation is refused, as the loss would see parts of the batch; set it to 1")
    if missing := set(recipe.train.trackers) - {str(getattr(t, "value", t)) for t in accelerator.log_with} - {"all"}:
        raise RecipeError(f"train.trackers: {min(missing)} is not installed; pip install it, or leave it out")
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise RecipeError(f"accelerate: expected plain data parallelism, got {accelerator.distributed_type.value}; use recipes/accelerate/")
    if recipe.train.batch_size % collectives.world_size():
        raise RecipeError(f"train.batch_size: {recipe.train.batch_size} is not divisible by {collectives.world_size()} processes")
    global_state = torch.get_rng_state()
    try:
        if not accelerator.is_main_process:
            return _Run(recipe, out, accelerator, resume, allow_change, False).go()
        with checkpoint.lock(out):
            return _Run(recipe, out, accelerator, resume, allow_change, progress).go()
    finally:
        torch.set_rng_state(global_state)


class _Result(NamedTuple):
    z: Tensor
    """(V, b, D)"""
    probe_loss: Tensor
    probe_right: Tensor
    """Accuracy of the probes on features and on z over this batch."""


class _Model(nn.Module):
    """Encoder and online probes as one module, so that one wrapper (DDP, autocast) covers both."""

    def __init__(self, encoder: SparseEncoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        widths = {"features": encoder.config.features, "z": encoder.config.dim} if classes > 1 else {}
        self.probes = nn.ModuleDict({name: nn.Linear(width, classes) for name, width in widths.items()})

    def forward(self, x: Tensor, labels: Tensor) -> _Result:
        views = x.shape[0]
        out = self.encoder.both(x.flatten(0, 1))
        z = out.z.unflatten(0, (views, -1))
        loss, right = out.z.new_zeros((), dtype=torch.float32), []
        known = (labels >= 0).repeat(views)
        count = known.sum().clamp(min=1)
        target = labels.clamp(min=0).repeat(views)
        for name, source in (("features", out.features), ("z", out.z)) if self.probes else ():
            scores = self.probes[name](source.detach().float()).float()
            loss = loss + (nn.functional.cross_entropy(scores, target, reduction="none") * known).sum() / count
            right.append(((scores.argmax(1) == target) & known).sum() / count)
        return _Result(z, loss, torch.stack(right) if right else loss.new_zeros(0))


class _Run:
    """State of one run; `go` is the story."""

    def __init__(
        self, recipe: Recipe, out: Path, accelerator: Accelerator, resume: bool, allow_change: Sequence[str], progress: bool
    ) -> None:
        self.recipe, self.out, self.accelerator, self.progress = recipe, out, accelerator, progress
        self.main = accelerator.is_main_process
        found = self._find(resume, allow_change)
        with accelerator.local_main_process_first():  # one process downloads
            self.source: Source = open_source(recipe.data, recipe.seed)
        seen = collectives.gather_objects((found.step if found else 0, self.source.length))
        if len(set(seen)) > 1:
            raise UsageError(
                f"processes see different checkpoints or images (step, images): {seen}; put --out and the data on a shared disk"
            )
        self.total, self.per_epoch = recipe.steps(self.source.length)
        self.encoder = build_encoder(recipe)
        with streams.seeded(recipe.seed, "init-probes"):
            model = _Model(self.encoder, self.source.classes if recipe.probe.online else 0)
        optimizer = make_optimizer(self.encoder, model.probes, recipe)
        if recipe.train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if collectives.world_size() > 1 and accelerator.device.type == "cuda":
            model = convert_sync_batchnorm(model)  # timm's keeps the activation that its fused norms hold; torch's drops it
        if recipe.train.compile:
            self.encoder.backbone.compile()
        self.inner = model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        mu, sigma = recipe.target.law()
        law = RectifiedGeneralizedGaussian(mu, sigma, recipe.target.p)
        weights = recipe.objective
        self.objective = RectifiedLpJEPALoss(
            law, weights.invariance, weights.matching, weights.directions, weights.num_directions, recipe.seed, weights.chunk
        )
        self.floor = self.objective.floor(recipe.train.batch_size, recipe.encoder.dim)
        self.step, self.seconds, self.bad = 0, 0.0, dict[int, str]()
        self.last_metrics: dict[str, float] = {}
        self.stop_with: int | None = None
        self.asked_at = 0.0
        self.save_now = False
        self.saved = self.logged = (0, 0.0)
        self.publication = record.Publication(recipe, out, self.encoder)
        if found is not None:
            self._restore(found)
        self._open_logs(found is not None)

    # --- the loop ----------------------------------------------------------------------------------------------------------------

    def go(self) -> Path:
        recipe = self.recipe
        if self.step >= self.total:
            log.warning("%s: already complete after %d steps", self.out, self.step)
            self._publish(again=True)
            return self._finish()
        loader = make_loader(self.source, recipe, range(self.step, self.total), collectives.rank(), collectives.world_size())
        self.model.train()
        self._announce()
        self.saved = self.logged = (self.step, time.monotonic())
        with self._signals(), Batches(loader) as batches, self._bar() as bar:
            while self.step < self.total:
                started = time.monotonic()
                batch = batches.next()
                lr = set_learning_rates(self.optimizer, recipe, self.step, self.total, self.per_epoch)
                torch.manual_seed(streams.key(recipe.seed, "dropout", self.step, collectives.rank()))
                result = self._forward(batch)
                terms = self.objective(result.z, self.step)
                self.accelerator.backward(terms.loss + result.probe_loss)
                norm = self._check_gradient(terms)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1
                self.seconds += time.monotonic() - started
                bar.update(recipe.train.batch_size)
                self._note_bad(batch)

                last = self.step == self.total
                if last or self.step % recipe.train.log_every == 0:
                    self._log_step(terms, result, lr, norm, bar)
                if last or self.step % max(1, self.per_epoch * recipe.probe.every_epochs) == 0:
                    self._log({"kind": "eval", **self._evaluate()}, bar)
                    self._save()
                    self._publish()
                    self.logged = (self.step, time.monotonic())
                minutes = (time.monotonic() - self.saved[1]) / 60
                save, code = self._agree(self.save_now or minutes >= recipe.train.checkpoint_minutes, self.stop_with or 0)
                if (save or code) and self.saved[0] != self.step:
                    self._save()
                if code and not last:
                    reason = f"stopped by a signal after step {self.step} of {self.total}; go on with --resume --out {self.out}"
                    raise StoppedBySignal(reason, int(code))
        return self._finish()

    def _forward(self, batch: Batch) -> _Result:
        x = batch.x.to(self.accelerator.device, non_blocking=True)
        if self.recipe.train.channels_last:
            x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
        return self.model(x, batch.labels.to(self.accelerator.device, non_blocking=True))

    def _check_gradient(self, terms: Terms) -> float:
        """Norm of the gradient (clipped if asked); stops all ranks together, before the update, when loss or gradient is not finite."""
        parameters = [p for p in self.inner.encoder.parameters() if p.grad is not None]
        if self.recipe.optim.clip_grad is not None:
            norm = self.accelerator.clip_grad_norm_(parameters, self.recipe.optim.clip_grad)
        else:
            self.accelerator.unscale_gradients()
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        scaled = self.accelerator.scaler is not None  # the scaler of fp16 skips such steps by itself and lowers its scale
        broken = ~terms.loss.detach().isfinite() | (~norm.isfinite() if not scaled else torch.zeros_like(norm, dtype=torch.bool))
        stop, size = collectives.max_over_ranks(torch.stack([broken.float(), norm.detach().float().nan_to_num()])).tolist()
        if stop:
            parts = f"invariance {float(terms.invariance.detach()):.3g}, matching {float(terms.matching.detach()):.3g}"
            raise NonFiniteError(
                f"step {self.step + 1}: loss or gradient is not finite ({parts}); "
                f"lower optim.lr = {self.recipe.optim.lr:g}, set optim.clip_grad, or use train.precision=no; the last checkpoint is from before"
            )
        return float(size)

    def _agree(self, *flags: float) -> list[float]:
        """The largest of each flag over ranks, so that all save and stop at the same step."""
        if collectives.world_size() == 1:
            return [float(flag) for flag in flags]
        return collectives.max_over_ranks(torch.tensor([float(flag) for flag in flags], device=self.accelerator.device)).tolist()

    # --- starting and stopping ---------------------------------------------------------------------------------------------------

    def _find(self, resume: bool, allow_change: Sequence[str]) -> Checkpoint | None:
        found, damaged = checkpoint.latest(self.out)
        if found is None:
            return None
        if not resume:
            raise UsageError(f"{self.out}: holds a run at step {found.step}; add --resume to go on, or choose another --out")
        for line in damaged:
            log.warning("damaged checkpoint left out: %s", line)
        before, now = _flatten(Recipe.parse(found.state["recipe"]).model_dump(mode="json")), _flatten(self.recipe.model_dump(mode="json"))
        known, absent = before.keys() | now.keys(), object()
        if useless := [k for k in allow_change if k not in known]:
            raise UsageError(f"--allow-change {useless[0]}: no such key in the recipe.{did_you_mean(useless[0], known)}")
        differing = (k for k in sorted(known) if before.get(k, absent) != now.get(k, absent))
        changed = [k for k in differing if k not in _MAY_CHANGE and k not in allow_change]
        if changed:
            lines = ", ".join(f"{k}: {before.get(k, 'absent')!r} -> {now.get(k, 'absent')!r}" for k in changed)
            raise RecipeError(f"the recipe differs from the run in {self.out}: {lines}; undo, or allow each with --allow-change KEY")
        return found

    def _restore(self, found: Checkpoint) -> None:
        if found.state["images"] != self.source.length:
            raise DataError(f"the run in {self.out} trained on {found.state['images']} images, the data now holds {self.source.length}")
        self.inner.load_state_dict(found.model)
        checkpoint.restore_optimizer(self.optimizer.optimizer, found.optimizer, found.state["optimizer"])
        if self.accelerator.scaler is not None and found.state["scaler"]:
            self.accelerator.scaler.load_state_dict(found.state["scaler"])
        self.step, self.seconds = found.step, found.state["seconds"]
        self.bad = {int(row): reason for row, reason in found.state["bad"].items()}
        self.last_metrics = found.state["metrics"]
        if found.state["world_size"] != collectives.world_size():
            log.warning(
                "%d processes before, %d now: equal up to rounding, not bit for bit", found.state["world_size"], collectives.world_size()
            )
        if found.state["threads"] != torch.get_num_threads():
            log.warning("%d threads before, %d now: equal up to rounding, not bit for bit", found.state["threads"], torch.get_num_threads())

    def _save(self) -> None:
        if self.main:
            tensors, scalars = checkpoint.optimizer_state(self.optimizer.optimizer)
            state = {
                "recipe": self.recipe.dump(), "optimizer": scalars, "images": self.source.length, "seconds": self.seconds,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
                "bad": self.bad, "metrics": self.last_metrics, "versions": zoo.versions(),
                "world_size": collectives.world_size(), "threads": torch.get_num_threads(),
            }  # fmt: skip
            model = {k: v.detach().cpu().contiguous() for k, v in self.inner.state_dict().items()}
            checkpoint.save(self.out, Checkpoint(self.step, model, tensors, state), self.recipe.train.keep)
        collectives.barrier()
        self.saved, self.save_now = (self.step, time.monotonic()), False

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C finish the step, save and stop (one more, seconds later, stops at once); SIGUSR1 saves and goes on."""

        def stop(number: int, frame: Any) -> None:
            if self.stop_with is None:
                self.stop_with, self.asked_at = 128 + number, time.monotonic()
            elif time.monotonic() - self.asked_at > 3:  # a person; launchers and schedulers echo a signal at once
                raise KeyboardInterrupt

        def save(number: int, frame: Any) -> None:
            self.save_now = True

        handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGUSR1: save}
        try:
            before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        except ValueError:  # not the main thread: the caller handles signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- measuring and telling ---------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        recipe = self.recipe
        normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in self.encoder.modules())
        if collectives.world_size() > 1 and self.accelerator.device.type == "cpu" and normed:
            log.warning("batch norm on CPU processes sees each process's share of the batch only; on GPUs it is synchronised")
        parameters = sum(p.numel() for p in self.encoder.parameters()) / 1e6
        log.info(
            "%s: %s + projector, %.2f M parameters, %d images, %d classes; %d steps of %d images on %d x %s, %s; peak lr %.3g; target l0 %.3f, floor %.4g%s",
            recipe.name, recipe.encoder.backbone, parameters, self.source.length, self.source.classes, self.total, recipe.train.batch_size,
            collectives.world_size(), self.accelerator.device, recipe.train.precision, recipe.lr, recipe.target.density_in_theory(), self.floor,
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

    def _log_step(self, terms: Terms, result: _Result, lr: float, norm: float, bar: Any) -> None:
        rate = (self.step - self.logged[0]) * self.recipe.train.batch_size / max(1e-9, time.monotonic() - self.logged[1])
        self.logged = (self.step, time.monotonic())
        z = result.z.detach().flatten(0, 1)
        numbers = torch.stack([terms.loss.detach(), terms.invariance.detach(), terms.matching.detach(), result.probe_loss.detach()]).float()
        numbers = collectives.mean_over_ranks(torch.cat([numbers, result.probe_right.detach().float()]))
        loss, invariance, matching, probe_loss, *right = numbers.tolist()
        row = {
            "kind": "train",
            "loss": loss,
            "invariance": invariance,
            "matching": matching,
            "floor": self.floor,
            "excess": matching - self.floor,
        }
        row |= {"lr": lr, "grad_norm": norm, "images_per_second": rate, **batch_metrics(z)}
        row |= dict(zip(("probe_features", "probe_z"), right, strict=False)) | ({"probe_loss": probe_loss} if right else {})
        if self.bad:
            row["bad_images"] = len(self.bad)
        self.last_metrics["l0_train"] = row["l0"]
        self._log(row, bar)
        shown = {"knn": f"{self.last_metrics['knn_features']:.3f}"} if "knn_features" in self.last_metrics else {}
        bar.set_postfix(loss=f"{loss:.3f}", l0=f"{row['l0']:.3f}", refresh=False, **shown)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Density in evaluation mode, and kNN on features and z where labels exist; every rank encodes its share of the rows."""
        probe = self.recipe.probe
        if not isinstance(self.source.train, Images):
            bank, held_out = self.source.eval and self._some(self.source.eval, probe.eval_images, "eval"), None
        else:
            bank, held_out = self._some(self.source.train, probe.bank, "bank"), self.source.eval
        if bank is None:
            return {}
        with self.accelerator.autocast():
            features, z, y = self._encode(bank)
            others = None if held_out is None else self._encode(self._some(held_out, probe.eval_images, "eval"))
        seen = z if others is None else others[1]
        found = {"l0_eval": float(l0(seen)), "l1_eval": float(l1(seen)), "dead_eval": float(dead(seen))}
        if int((y >= 0).sum()) > 1:
            pairs = ((features, z), (features, z) if others is None else others[:2])
            for name, a, b in (("features", pairs[0][0], pairs[1][0]), ("z", pairs[0][1], pairs[1][1])):
                labels = y if others is None else others[2]
                found[f"knn_{name}"] = knn_accuracy(a, y, b, labels, probe.knn_k, probe.knn_temperature, leave_one_out=others is None)
        self.last_metrics |= found
        return found

    def _some(self, images: Images, most: int, purpose: str) -> Images:
        if len(images) <= most:
            return images
        return images.take(torch.randperm(len(images), generator=streams.generator(self.recipe.seed, purpose))[:most].sort().values.numpy())

    def _encode(self, images: Images) -> tuple[Tensor, Tensor, Tensor]:
        mine = images.take(range(collectives.rank(), len(images), collectives.world_size()))
        parts = encode(self.encoder, mine, max(64, self.recipe.train.batch_size // 2), self.recipe.train.num_workers)
        features, z, labels = (collectives.gather_rows(part.to(self.accelerator.device)).cpu() for part in parts)
        return features, z, labels

    def _note_bad(self, batch: Batch) -> None:
        """Count unreadable images (each once), write them down, and stop if there are more than the recipe allows."""
        new = [record for record in batch.bad if record[0] not in self.bad]
        if collectives.world_size() > 1 and self.step % self.per_epoch == 0:
            new = [r for part in collectives.gather_objects(list(self.bad.items())) for r in part if r[0] not in self.bad] + new
        for row, reason in new:
            self.bad[row] = reason
            if self.main:
                log.warning("image left out: %s", reason) if len(self.bad) <= 5 else None
                with open(self.out / "bad_images.jsonl", "a") as file:
                    file.write(json.dumps({"row": row, "reason": reason}) + "\n")
        epochs = (
            -(-self.step // self.per_epoch) if self.recipe.data.streaming else 1
        )  # a stream has no image that is the same in two epochs
        if new and len(self.bad) > self.recipe.train.max_bad_fraction * self.source.length * epochs:
            allowed = f"train.max_bad_fraction = {self.recipe.train.max_bad_fraction:g}"
            raise DataError(
                f"{len(self.bad)} of {self.source.length} images cannot be read, more than {allowed}; see {self.out / 'bad_images.jsonl'}"
            )

    def _open_logs(self, resumed: bool) -> None:
        """Write the recipe; cut metrics written after the checkpoint that is resumed, so that the file is one unbroken record."""
        if self.main:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                (self.out / "recipe.yaml").write_text(self.recipe.dump())
                path = self.out / "metrics.jsonl"
                lines = (
                    [line for line in path.read_text().splitlines() if resumed and _step_of(line) <= self.step] if path.is_file() else []
                )
                partial = path.with_suffix(".partial")
                partial.write_text("".join(line + "\n" for line in lines))
                os.replace(partial, path)
            except OSError as error:
                raise OutputError(f"{self.out}: cannot be written: {error.strerror or error}") from error
        if self.recipe.train.trackers:
            flat = {
                k: v if isinstance(v, int | float | str | bool) else str(v)
                for k, v in _flatten(self.recipe.model_dump(mode="json")).items()
            }
            self.accelerator.init_trackers("rlpjepa_zoo", config=flat)

    def _log(self, row: dict[str, Any], bar: Any) -> None:
        if not self.main:
            return
        row = {"step": self.step, "epoch": round(self.step / self.per_epoch, 4), **row}
        try:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            log.warning("metrics.jsonl: %s", error.strerror or error)  # a full disk for logs does not end a run
        if self.recipe.train.trackers:
            self.accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=self.step)
        if row["kind"] == "eval" and not bar.disable:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float) and k != "epoch")
            bar.write(f"step {self.step}: {shown}", file=sys.stderr)

    def info(self) -> dict[str, Any]:
        """What the card tells of the run."""
        training = {
            "images": self.source.length, "epochs": round(self.step / self.per_epoch, 3), "steps": self.step,
            "batch": self.recipe.train.batch_size, "minutes": round(self.seconds / 60, 2),
            "hardware": f"{collectives.world_size()} x {_hardware(self.accelerator.device)}",
            "precision": self.recipe.train.precision, "seed": self.recipe.seed,
        }  # fmt: skip
        return record.describe(self.recipe, self.source, self.encoder, self.last_metrics, training, self.out / "metrics.jsonl")

    def _publish(self, again: bool = False) -> None:
        if self.main:
            self.publication.write(self.info(), self.step, self.total, again)
        collectives.barrier()

    def _finish(self) -> Path:
        if self.main:
            wrong = alarms(self.last_metrics, self.recipe.target.density_in_theory())
            for sentence in wrong:
                log.warning("%s", sentence)
            summary = {
                "steps": self.step,
                **self.last_metrics,
                "bad_images": len(self.bad),
                "alarms": wrong,
                "info": self.info(),
                "versions": zoo.versions(),
            }
            (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
            self.publication.finish()
        if self.recipe.train.trackers:
            self.accelerator.end_training()
        collectives.barrier()
        return self.out / "encoder"


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a run that was killed
        return math.inf


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {platform.machine()} CPU"


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
