"""Pretraining without labels, as a task of the trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from ...config.pretrain import DEFAULT_OBJECTIVE, Recipe
from ...config.sections import Reconstruction, Target
from ...core import distributed, package, rng
from ...data.images import Images
from ...data.sources import Source
from ...errors import RecipeError
from ...evaluation.encoding import FrozenFeatures
from ...evaluation.metrics import alarms, batch_metrics
from ...evaluation.training_eval import density_shift, during_training, has_labels
from ...models.encoder import SparseEncoder
from ...objectives import OBJECTIVES
from ...objectives.base import Objective
from ...objectives.density import DensityControl
from ..optim import ParamGroup, split_by_dimension
from ..run_dir import history
from ..trainer import run_task
from .encoders import build_encoder, start_weights, with_backbone_preprocess
from .heads import EncoderWithHeads, HeadsOutput
from .task import Autocast, Best, Description, Logged, Step, Task

__all__ = ["PretrainTask", "build_objective", "train"]

log = logging.getLogger("rlpjepa_zoo")

_SETTLED = 50
"""Steps after which a dimension that no image activates rarely recovers."""
_MANY_DEAD = 0.05
"""Share of dead dimensions that is worth a warning."""
_MAX_ALL_ZERO = 3
"""Logged steps in a row with all embeddings zero that end a run: ReLU passes no gradient at zero."""


def train(recipe: Recipe, out: str | Path, resume: bool = False, allow_change: Sequence[str] = (), progress: bool = True) -> Path:
    """Pretrain an encoder; returns the folder it is published in (`out/encoder`).

    Args:
        recipe: the run.
        out: run directory; only one run at a time can use it.
        resume: continue from the newest checkpoint that verifies; start if there is none.
        allow_change: dotted recipe keys that may differ from the run that is resumed; ``data`` for other images under the same name.
        progress: show a progress bar on stderr.

    Raises:
        UsageError: the directory is in use, or holds a run and `resume` is not set.
        RecipeError: the recipe differs from that of the run, or does not fit the processes or device.
        DataError, ModelError, OutputError: as their names say.
        NonFiniteError: loss or gradient was not finite in more than `train.max_skipped` steps in a row, or every embedding became zero.
        StoppedBySignal: SIGTERM or SIGINT; a checkpoint was saved.
    """
    return run_task(PretrainTask(recipe), Path(out), resume, allow_change, progress)


def build_objective(recipe: Recipe) -> Objective:
    """The objective of a recipe. All ranks call this together.

    Raises:
        RecipeError: options that cannot be used.
    """
    target = None if recipe.target is None else recipe.target.distribution()
    objective = OBJECTIVES[recipe.objective.name]
    return objective.build(recipe.objective, target=target, dim=recipe.encoder.dim, batch_size=recipe.train.batch_size, seed=recipe.seed)


class PretrainTask(Task):
    """Trains an encoder without labels by the objective of the recipe; linear probes on detached embeddings measure it along the way."""

    name = "encoder"
    best = {"knn_z": Best(True), "knn_features": Best(True), "excess": Best(False, "chosen by the {metric} of training batches")}
    progress = {"loss": "loss", "l0": "l0", "knn": "knn_features"}
    remember = {"l0": "l0_train", "excess": "excess"}
    forward_methods = ("both",)
    memory_keys = ("objective.chunk",)

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.cached_views = recipe.encoder.cached_views
        self.every_epochs = recipe.probe.every_epochs
        self.all_zero = 0
        """Logged steps in a row with all embeddings zero."""
        self.warned = False
        """Whether the share of dead dimensions was looked at."""
        self.frozen_features = FrozenFeatures() if recipe.encoder.freeze_backbone else None
        """Features of the images that measure a frozen backbone's projector."""
        self.control: DensityControl | None = None
        """Holds the density, if the target asks for it."""
        self.density = 0.0
        """Density to hold at the last step."""
        self.shift = 0.0
        """Subtracted from the biases of the last layer in what is measured and published, for the exact density."""

    def setup(self, source: Source) -> None:
        """Refuse `train.best` by kNN without labels; build the encoder."""
        best = self.recipe.train.best
        if best in ("knn_z", "knn_features") and not has_labels(source):
            raise RecipeError(f"train.best: {best} needs evaluation images with labels; use excess, or set it to null")
        self.source, self.recipe = source, with_backbone_preprocess(self.recipe)
        if source.eval is None and not isinstance(source.train, Images) and self.recipe.target is not None and self.recipe.target.hold:
            log.warning(
                "target.hold: a stream without evaluation images has none to make the density exact on; it is held in training only"
            )
        if source.eval is None and isinstance(source.train, Images):
            log.info("no evaluation images: density and kNN are measured on training images, each scored by the votes of the others")
        self.set_up_core()

    def set_up_core(self) -> None:
        self.core = build_encoder(self.recipe)

    def module(self) -> nn.Module:
        """Encoder, probes and decoder. Creates the objective, whose number of directions all ranks agree on."""
        recipe = self.recipe
        self.objective = build_objective(recipe)
        if recipe.target is not None and recipe.target.anneal:
            self.objective.schedule = lambda step: self._target_at(step).distribution()
        if recipe.target is not None and recipe.target.hold:
            self.control = DensityControl(self.core.last_layer)
        with rng.seeded(recipe.seed, "init-probes"):
            active = [] if recipe.reconstruction is None else recipe.reconstruction.active
            self.heads = EncoderWithHeads(self.core, self.source.classes if recipe.probe.online else 0, active, self.control is not None)
        return self.heads

    def _target_at(self, step: int) -> Target:
        """The target at a step; called for runs that have one."""
        target, (total, _) = cast(Target, self.recipe.target), self.recipe.steps(self.source.length)
        return target.at(step / total)

    def param_groups(self) -> list[ParamGroup]:
        """Weights, then biases and normalisation; those of a backbone with its own rate apart; then the probes."""
        return param_groups(self.core, self.heads.probes, self.recipe, self.heads.reconstruction)

    def step(self, forward: Callable[..., Any], views: list[Tensor], labels: Tensor, step: int) -> Step:
        output: HeadsOutput = forward(views, labels)
        terms = self.objective(output.z, step)
        self.settled = self.recipe.target is None or self._target_at(step) is self.recipe.target
        total, parts = terms.total, terms.parts
        if output.reconstruction is not None:
            total = total + cast(Reconstruction, self.recipe.reconstruction).weight * output.reconstruction
            parts = {**parts, "reconstruction": output.reconstruction}
        if self.control is not None:
            self.density = self._target_at(step).density_in_theory()
            self.control.observe(output.z, self.density)
        parts = {"loss": total, **parts}
        return Step(total + output.probe_loss, parts, lambda: self._logged(parts, output, step))

    def after_update(self) -> None:
        """Shift the biases for the density, if the target holds it."""
        if self.control is not None:
            self.control.apply()

    def _logged(self, parts: Mapping[str, Tensor], output: HeadsOutput, step: int) -> Logged:
        """The row of a step (counted from 0): terms of the loss, statistics of the embeddings and accuracy of the probes; fails when the embeddings stay zero."""
        values = torch.stack([*(value.detach() for value in parts.values()), output.probe_loss.detach()]).float()
        means = distributed.mean_over_ranks(torch.cat([values, output.probe_accuracy.detach().float()]))
        numbers = means.tolist()
        row = dict(zip(parts, numbers, strict=False))
        probe_loss, *accuracy = numbers[len(parts) :]
        row |= self.objective.monitor(row, step)
        row |= batch_metrics(distributed.gather_with_grad(output.z.detach(), dim=1).flatten(0, 1))  # of all ranks, as the loss is
        row |= dict(zip(("probe_features", "probe_z"), accuracy, strict=False)) | ({"probe_loss": probe_loss} if accuracy else {})
        self._warn_of_dead(row["dead"], step + 1)
        self.all_zero = self.all_zero + 1 if row["l0"] == 0 else 0
        if self.all_zero < _MAX_ALL_ZERO:
            return Logged(row)
        return Logged(row, (
            "every embedding is zero; ReLU passes no gradient there, so training cannot recover; "
            f"lower optim.lr = {self.recipe.optim.lr:g}{' or raise the density of the target' if self.recipe.target else ''}; "
            "the last checkpoint is from before"
        ))  # fmt: skip

    def _warn_of_dead(self, dead: float, step: int) -> None:
        """Warn once, at the first logged step from 50 on, of dimensions that no image of the batch activates, beyond what the target expects."""
        if step < _SETTLED or self.warned:
            return
        self.warned = True
        held = self.recipe.target is not None and self.recipe.target.hold
        density = 0.0 if self.recipe.target is None else self.recipe.target.density_in_theory()
        expected = (1 - density) ** self.recipe.train.batch_size if density else 0.0
        if dead - expected > _MANY_DEAD:
            log.warning(
                "step %d: %.0f%% of the dimensions are zero for every image of the batch; %s; start again with %s",
                step, 100 * dead, "few have come back" if held else "ReLU passes no gradient there, so most of them stay so", self._fix_of_dead(),
            )  # fmt: skip

    def _fix_of_dead(self) -> str:
        """A held density, which raises the biases of dead dimensions; else a longer warm-up, which keeps them alive and still reaches the density; after a
        long one, a lower rate."""
        if self.recipe.target is not None and not self.recipe.target.hold:
            return "target.hold=true, which brings them back"
        optim, per_epoch = self.recipe.optim, self.recipe.steps(self.source.length)[1]
        longer = math.ceil(_SETTLED / per_epoch)
        if optim.warmup_epochs < longer < self.recipe.train.epochs:
            return (
                f"a longer warm-up: optim.warmup_epochs={longer}, which is {longer * per_epoch} steps, instead of {optim.warmup_epochs:g}"
            )
        return f"a lower rate, such as optim.lr={optim.lr / 4:.2g}, and more epochs"

    def artifact(self, core: SparseEncoder) -> SparseEncoder:
        """The encoder; for a held density with the shift that the last evaluation found."""
        return core if self.control is None else core.shifted(self.shift)

    def evaluate(self, artifact: SparseEncoder, autocast: Autocast) -> dict[str, float]:
        """Density and kNN accuracy. A held density is first made exact on training images."""
        features = self.frozen_features
        if self.control is not None:
            features = features or FrozenFeatures()  # encoded once for both
            more = density_shift(artifact, self.source, self.recipe, self.density, autocast, features)
            artifact, self.shift = artifact.shifted(more), self.shift + more
        return during_training(artifact, self.source, self.recipe, autocast, features)

    def describe(
        self, metrics: Mapping[str, float], training: Mapping[str, Any] | None = None, log_file: Path | None = None, final: bool = True
    ) -> Description:
        target = self.recipe.target
        density = None if target is None else target.density_in_theory()
        sentence = f"{self.recipe.encoder.backbone} + projector, {self.objective.describe()}"
        record = self._record(metrics, density) | {
            "history": [] if log_file is None else history(log_file), "versions": package.versions(), "training": dict(training or {}),
        }  # fmt: skip
        return Description(sentence, record, alarms(metrics, density, not final, target is not None and target.hold))

    def _record(self, metrics: Mapping[str, float], density: float | None) -> dict[str, Any]:
        """What the card says about recipe, data, target, density and kNN accuracy."""
        recipe = self.recipe
        held_out = self.source.eval is not None
        law: dict[str, Any] = {}
        if recipe.target is not None:
            mu, sigma = recipe.target.law()
            law = {"target": {"p": recipe.target.p, "mu": mu, "sigma": sigma}}
        if recipe.objective.name != DEFAULT_OBJECTIVE:  # the card describes the default objective itself
            law["method"] = f"objective {recipe.objective.name}: {self.objective.describe()}"
        return {
            "recipe": recipe.name, "data": recipe.data.label(), "dataset": recipe.data.name if recipe.data.source == "hf" else None,
            "license": recipe.hub.license, "base_model": None, **start_weights(self.core),
            "augmentations": recipe.views.describe(), **law,
            "density": {
                "asked": recipe.target and recipe.target.density, "theory": density, "train": metrics.get("l0_train"), "eval": metrics.get("l0_eval"),
                "eval_images": "held-out images" if held_out else "training images", "dead": metrics.get("dead_eval"),
                "always_on": metrics.get("always_on_eval"), "held": recipe.target is not None and recipe.target.hold,
                "held_on": "training images" if isinstance(self.source.train, Images) else "evaluation images" if held_out else None,
            },
            "results": self._results(metrics),
        }  # fmt: skip

    def _results(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """kNN accuracy, the numbers of images it was measured with, and the protocol; empty if it was not measured."""
        results: dict[str, Any] = {k: v for k, v in metrics.items() if k.startswith("knn")}
        if not results:
            return {}
        source, probe, precision, held_out = self.source, self.recipe.probe, self.recipe.train.precision, self._held_out()
        bank = source.train if isinstance(source.train, Images) else source.eval
        results["n_train"] = min(probe.bank, len(bank or ()))
        results |= {"n_test": min(probe.eval_images, len(held_out))} if held_out is not None else {}
        results["protocol"] = (
            f"kNN: k = {probe.knn_k}, cosine, T = {probe.knn_temperature:g}; measured in training, "
            f"{'in float32' if precision == 'no' else 'in ' + precision}, one seed"
        )
        results["protocol"] += "" if held_out is not None else "; every image was scored by the votes of the others"
        return results

    def _held_out(self) -> Images | None:
        """Evaluation images; None for a stream, whose evaluation images both vote and are scored."""
        return self.source.eval if isinstance(self.source.train, Images) else None

    def state(self) -> dict[str, Any]:
        return {"zeros": self.all_zero, "shift": self.shift, "objective": self.objective.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.all_zero, self.shift = state["zeros"], state.get("shift", 0.0)
        self.objective.load_state(state.get("objective", state))


def param_groups(encoder: nn.Module, probes: nn.Module | None, recipe: Recipe, decoder: nn.Module | None = None) -> list[ParamGroup]:
    """Parameter groups of pretraining.

    Args:
        encoder: its `backbone` gets groups of its own if `optim.backbone_lr` is not 1.
        probes: have their own rate and no weight decay.
        decoder: of a reconstruction; trained as the projector is.
        recipe: of the run. Biases and normalisation (one-dimensional) are decayed only if `optim.decay_bias_and_norm`.
    """
    options = recipe.optim
    decay_others = options.weight_decay if options.decay_bias_and_norm else 0.0
    of_backbone = {id(p) for p in encoder.get_submodule("backbone").parameters()} if options.backbone_lr != 1 else set()
    groups = []
    trained = [p for module in (encoder, decoder) if module is not None for p in module.parameters() if p.requires_grad]
    for peak, among in ((recipe.lr, False), (recipe.lr * options.backbone_lr, True)):
        weights, others = split_by_dimension(p for p in trained if (id(p) in of_backbone) == among)
        groups += [ParamGroup(weights, options.weight_decay, peak, use_trust_ratio=True), ParamGroup(others, decay_others, peak)]
    return groups + ([ParamGroup(list(probes.parameters()), 0.0, recipe.probe_lr)] if probes is not None else [])
