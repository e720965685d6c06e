"""Fine-tuning: an encoder becomes a classifier, as a task of the trainer."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm.optim
import torch
import torch.nn as nn
from torch import Tensor
from torchvision.transforms import v2

from ...config.finetune import Lora, TuningOptim, TuningRecipe
from ...core import distributed, package, rng
from ...core.source import ModelSource
from ...data.images import Images
from ...data.loader import steps_of_an_epoch
from ...data.preprocess import Preprocess
from ...data.sources import Source
from ...errors import DataError, RecipeError
from ...models.classifier import Classifier, make_classifier
from ..optim import ParamGroup, split_by_dimension
from ..trainer import run_task
from .accuracy import TOP, accuracy
from .baseline import nearest_mean
from .encoders import check_sizes, start_encoder, start_weights
from .lora import add_adapters, merge_adapters
from .task import Autocast, Best, Description, Logged, Step, Task

__all__ = ["FinetuneTask", "finetune", "mix_images", "param_groups", "select_labelled", "smoothed_cross_entropy"]

log = logging.getLogger("rlpjepa_zoo")

BASELINE = "top1_nearest_mean"
"""Metric of a run: accuracy of the nearest class mean of the features it starts from."""


def finetune(recipe: TuningRecipe, out: str | Path, resume: bool = False, allow_change: Sequence[str] = (), progress: bool = True) -> Path:
    """Fine-tune an encoder on labelled images; returns the folder its classifier is published in (`out/classifier`).

    Signals, non-finite steps, checkpoints and exact resuming are those of `rlpjepa_zoo.train`.

    Args:
        recipe: the run; `recipe.start.source` is loaded and verified.
        out, resume, allow_change, progress: as of `rlpjepa_zoo.train`.

    Raises:
        UsageError, RecipeError, DataError, ModelError, HubError, OutputError, NonFiniteError, StoppedBySignal: as of `rlpjepa_zoo.train`;
            DataError also when there are no labels, or fewer than `data.per_class` of a class.
    """
    return run_task(FinetuneTask(recipe), Path(out), resume, allow_change, progress)


class FinetuneTask(Task):
    """Predicts labels from images."""

    name = "classifier"
    best = {"top1": Best(True), "top5": Best(True), "loss": Best(False)}
    progress = {"loss": "loss", "top1": "top1"}

    def __init__(self, recipe: TuningRecipe) -> None:
        self.recipe = recipe
        self.unused_parameters = recipe.classifier.linear_epochs > 0
        self.every_epochs = recipe.train.every_epochs

    def setup(self, source: Source) -> None:
        """Load the encoder, take its preprocessing where the recipe gives none, select the labelled images, build the classifier.

        Also sets `encoder`, `classes` (names of the classes), `n_train` (number of training images), `most_frequent` (share of the most
        frequent class among the evaluation images) and `frozen_steps` (first steps in which only the linear layer is trained).
        """
        self.set_up_core()
        self.select_images(source)
        self._lengthen()
        self.frozen_steps = round(self.recipe.classifier.linear_epochs * steps_of_an_epoch(self.source, self.recipe))
        self.core = self._classifier()

    def set_up_core(self) -> None:
        self.encoder = start_encoder(self.recipe.start, self.recipe.seed)
        self.recipe = self.recipe.with_preprocess(dataclasses.asdict(self.encoder.config.preprocess))

    def select_images(self, source: Source) -> None:
        """Select the labelled images; sets `source`, `classes`, `n_train` and `most_frequent`.

        Raises:
            DataError: no labels, too few images of a class, or no evaluation image of a training class.
            RecipeError: `train.best` needs evaluation images or more classes.
        """
        recipe = self.recipe
        best, names = recipe.train.best, source.train.classes or []
        if best is not None and source.eval is None:
            raise RecipeError(f"train.best: {best} needs evaluation images; give data.eval_split, or set it to null")
        train = select_labelled(source.images, recipe.data.per_class, recipe.seed)
        if source.eval is not None and (source.eval.labels is None or not (source.eval.labels >= 0).any()):
            other = "move them out of data.path" if recipe.data.source == "folder" else "set data.eval_split=null"
            fix = f"name the classes of both parts alike, or {other}"
            raise DataError(f"data.eval_split: none of the {len(source.eval)} evaluation images has the label of a training class; {fix}")
        held_out = None if source.eval is None else select_labelled(source.eval, None, recipe.seed)
        images: Any
        for split, images in (("training", source.train), ("evaluation", source.eval)):
            unlabelled = 0 if images is None else int((images.labels < 0).sum())
            if unlabelled:
                log.info("%d of %d %s images have no label and are left out", unlabelled, len(images), split)
        self.classes = [*names, *map(str, range(len(names), source.classes))]
        if best == "top5" and len(self.classes) <= TOP:
            raise RecipeError(f"train.best: top5 is always 1 with {len(self.classes)} classes; use top1 or loss")
        self.n_train = len(train)
        most = 0 if held_out is None or held_out.labels is None else int(np.bincount(held_out.labels).max())
        self.most_frequent = most / max(1, len(held_out or ()))
        self.source = Source(train, held_out, len(train), len(self.classes))

    def _lengthen(self) -> None:
        """Give a run on few images the steps that `train.min_steps` asks for."""
        given, self.recipe = self.recipe, self.recipe.lengthened(self.n_train)
        self.every_epochs = self.recipe.train.every_epochs
        if self.recipe is not given:
            log.info(
                "%g epochs of %d images are %d steps; train.min_steps = %d makes them %g epochs",
                given.train.epochs, self.n_train, given.steps(self.n_train)[0], given.train.min_steps, self.recipe.train.epochs,
            )  # fmt: skip

    def _classifier(self) -> Classifier:
        recipe, encoder, data = self.recipe, copy.deepcopy(self.encoder), self.recipe.data
        preprocess = Preprocess((data.image_size,) * 2, data.mean, data.std, data.interpolation, data.crop_pct)
        encoder.config = dataclasses.replace(encoder.config, preprocess=preprocess)
        with rng.seeded(recipe.seed, "init-head"):
            classifier = make_classifier(encoder, self.classes, recipe.start.input)
        if recipe.classifier.train == "lora":
            with rng.seeded(recipe.seed, "init-adapters"):
                add_adapters(classifier, recipe.classifier.lora or Lora())
        elif recipe.classifier.train == "linear":
            classifier.frozen = True
            classifier.requires_grad_(False).head.requires_grad_(True)
        else:
            classifier.requires_grad_(True)
        check_sizes(classifier, recipe.sizes, "start.args" if recipe.start.of_timm else None)
        return classifier.train()

    def module(self) -> nn.Module:
        return _Wrapped(self.core)

    def param_groups(self) -> list[ParamGroup]:
        """The linear layer, the projector, then the backbone by its layers."""
        return param_groups(self.core, self.recipe.lr, self.recipe.optim)

    def step(self, forward: Callable[..., Any], views: list[Tensor], labels: Tensor, step: int) -> Step:
        options = self.recipe.classifier
        frozen = options.train == "linear" or step < self.frozen_steps
        if frozen != self.core.frozen:
            self.core.frozen = frozen
            self.core.train()
        images, targets = mix_images(views[0], labels, len(self.classes), options.mixup, options.cutmix, self.recipe.seed, step)
        logits = forward(images)
        loss = smoothed_cross_entropy(logits, targets, options.label_smoothing)

        def logged() -> Logged:
            correct = (logits.detach().argmax(1) == labels).float().mean()
            means = distributed.mean_over_ranks(torch.stack([loss.detach(), correct]))
            return Logged(dict(zip(("loss", "top1_train"), means.tolist(), strict=True)))

        return Step(loss, {"loss": loss}, logged)

    def baseline(self, artifact: Classifier, autocast: Autocast) -> dict[str, float]:
        """Accuracy of the nearest class mean on the evaluation images, without training; not of random weights."""
        if self.source.eval is None or self.recipe.start.random:
            return {}
        train = self.recipe.train
        with autocast():
            accuracy = nearest_mean(
                artifact, self.source.images, self.source.eval, self.recipe.seed, max(64, train.batch_size), train.num_workers
            )
        return {BASELINE: accuracy}

    def evaluate(self, artifact: Classifier, autocast: Autocast) -> dict[str, float]:
        if self.source.eval is None:
            return {}
        with autocast():
            return accuracy(artifact, self.source.eval, max(64, self.recipe.train.batch_size), self.recipe.train.num_workers)

    def artifact(self, core: Classifier) -> Classifier:
        """The classifier, with its adapters merged."""
        return merge_adapters(core) if self.recipe.classifier.train == "lora" else core

    def describe(
        self, metrics: Mapping[str, float], training: Mapping[str, Any] | None = None, log_file: Path | None = None, final: bool = True
    ) -> Description:
        recipe, precision = self.recipe, self.recipe.train.precision
        start = f"{'fresh weights like ' if recipe.start.random else ''}{recipe.start.name}"
        results: dict[str, Any] = {k: metrics[k] for k in ("top1", "top5", "loss", "n_test") if k in metrics}
        if results:
            precision = "float32" if precision == "no" else precision
            results |= {"n_train": self.n_train, "protocol": f"measured in training, in {precision}, one seed"}
        record = {
            "recipe": recipe.name, "data": recipe.data.label(), "dataset": recipe.data.name if recipe.data.source == "hf" else None,
            "license": recipe.hub.license, "base_model": None, **self._start_weights(),
            "start": f"fresh weights, the architecture of {recipe.start.name}" if recipe.start.random else recipe.start.name,
            "method": self._method(), "augmentations": recipe.views.describe(), "results": results,
            "versions": package.versions(), "training": dict(training or {}),
        }  # fmt: skip
        return Description(f"{self.encoder.config.architecture} from {start}, {self._method()}", record, self.alarms(metrics, final))

    def _start_weights(self) -> dict[str, Any]:
        """What the card says about the pretrained weights behind the encoder, and the repository of the encoder."""
        if self.recipe.start.random:
            return {}
        record = start_weights(self.encoder)
        if "backbone" in record:
            record["backbone"] = {**record["backbone"], "frozen": self.recipe.classifier.train == "linear"}
        place = ModelSource.parse(str(self.recipe.start.source))
        return record | ({"base_model": place.value} if place.kind == "hub" else {})

    def _method(self) -> str:
        """Short description of the training method, for log and card."""
        recipe, options = self.recipe, self.recipe.classifier
        trained = {"full": "all weights", "linear": "a linear layer on the frozen body", "lora": "a linear layer and low-rank adapters"}
        words = [f"{recipe.start.input}: {trained[options.train]}"]
        words += [f"first {options.linear_epochs:g} epochs with a frozen body"] if options.linear_epochs else []
        words += [f"layer decay {recipe.optim.layer_decay:g}"] if recipe.optim.layer_decay != 1 else []
        named = {"label smoothing": options.label_smoothing, "mixup": options.mixup, "cutmix": options.cutmix}
        return ", ".join(words + [f"{name} {value:g}" for name, value in named.items() if value])

    def alarms(self, metrics: Mapping[str, float], final: bool = True) -> list[str]:
        """Sentences if the final top-1 accuracy is not three standard errors above the share of the most frequent class, or not above what the
        start reaches without training."""
        top1, chance, untrained = metrics.get("top1", 1.0), self.most_frequent, metrics.get(BASELINE, 0.0)
        error = math.sqrt(chance * (1 - chance) / metrics.get("n_test", 1))
        sentences = []
        if final and top1 < 1 and top1 <= chance + 3 * error:
            share = f"the most frequent class has a share of {chance:.3f}"
            sentences.append(
                f"hardly better than chance: top-1 {top1:.3f}, and {share} of the evaluation images; try another learning rate"
            )
        if final and top1 < untrained:
            steps = self.recipe.steps(self.n_train)[0]
            sentences.append(
                f"training lost to no training: top-1 {top1:.3f}, and the nearest class mean of the features it started from reaches "
                f"{untrained:.3f} on the same images; make more than {steps} steps (train.min_steps), or train less (classifier.train=linear)"
            )
        return sentences


class _Wrapped(nn.Module):
    """Wraps the classifier, so that the tensor names in checkpoints start with ``classifier.``"""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x)


def select_labelled(images: Images, per_class: int | None, seed: int) -> Images:
    """The labelled images.

    Args:
        images: images with a label < 0 are left out.
        per_class: number of images to draw from each class; None selects all.
        seed: of the run.

    Raises:
        DataError: no labels, or too few images of a class.
    """
    known = np.flatnonzero(images.labels >= 0) if images.labels is not None else np.zeros(0, np.int64)
    if images.labels is None or not len(known):
        raise DataError("fine-tuning needs labelled images: a folder for each class, or a label column")
    if per_class is None:
        return images if len(known) == len(images) else images.take(known)
    rows = []
    for number in np.unique(images.labels[known]).tolist():
        of_class = np.flatnonzero(images.labels == number)
        if len(of_class) < per_class:
            name = images.classes[number] if images.classes else number
            raise DataError(f"data.per_class: {per_class} images of each class are asked for, '{name}' has {len(of_class)}")
        rows.append(of_class[torch.randperm(len(of_class), generator=rng.generator(seed, "per_class", number))[:per_class].numpy()])
    return images.take(np.sort(np.concatenate(rows)))


def mix_images(x: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """MixUp or CutMix of a batch; the draws depend on (seed, step) only. Each process mixes its own images.

    Args:
        x: (b, 3, S, S).
        labels: (b,).
        classes: C.
        mixup, cutmix: alpha of the Beta distribution of the mixing weight; 0 disables the method. If both are given, each step draws one.
        seed, step: of the run.

    Returns:
        Images (b, 3, S, S) and targets: (b, C) class probabilities, or the labels if nothing is mixed.
    """
    kinds = [(kind, alpha) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    if not kinds:
        return x, labels
    with rng.seeded(seed, "mix", step):
        kind, alpha = kinds[int(torch.randint(len(kinds), ()))]
        images, targets = kind(alpha=alpha, num_classes=classes)(x, labels)
    return images, targets


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy in float32.

    Args:
        logits: (b, C).
        targets: (b,) labels, or (b, C) class probabilities.
        smoothing: share of each target that is spread evenly over all classes.
    """
    return nn.functional.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def param_groups(classifier: Classifier, lr: float, options: TuningOptim) -> list[ParamGroup]:
    """Parameter groups of fine-tuning: the linear layer, the projector, then the backbone by its layers.

    Args:
        classifier: parameters without gradient are left out.
        lr: peak learning rate.
        options: `head_lr` scales the rate of the linear layer, `backbone_lr` that of the backbone; each layer of the backbone has
            `layer_decay` times the rate of the layer above (timm's `param_groups_layer_decay`). One-dimensional parameters are decayed only
            if `decay_bias_and_norm`.
    """
    decay_others = options.weight_decay if options.decay_bias_and_norm else 0.0
    groups = []
    for module, peak in ((classifier.head, lr * options.head_lr), (classifier.projector, lr)):
        if module is not None:
            weights, others = split_by_dimension(p for p in module.parameters() if p.requires_grad)
            groups += [ParamGroup(weights, options.weight_decay, peak), ParamGroup(others, decay_others, peak)]
    backbone = classifier.backbone
    if any(p.requires_grad for p in backbone.parameters()):
        never: set[str] = getattr(backbone, "no_weight_decay", set)()
        for group in timm.optim.param_groups_layer_decay(backbone, 1.0, never, layer_decay=options.layer_decay):
            decay = options.weight_decay if group["weight_decay"] > 0 else decay_others
            groups.append(ParamGroup(group["params"], decay, lr * options.backbone_lr * group["lr_scale"]))
    return groups
