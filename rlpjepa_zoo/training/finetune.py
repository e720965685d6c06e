"""Fine-tuning: an encoder becomes a classifier, as a task of `rlpjepa_zoo.training.trainer`."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torchvision.transforms import v2

from ..config.finetune import Lora, TuningRecipe
from ..core import distributed, package, rng
from ..data.images import Images
from ..data.preprocess import Preprocess, batched, ready
from ..data.sources import Source
from ..errors import DataError, RecipeError, UsageError, did_you_mean, first_line
from ..models.classifier import Classifier, make_classifier
from ..models.encoder import SparseEncoder
from ..models.factory import create_encoder
from ..models.pretrained import load_encoder
from .online_probes import check_arguments
from .optim import make_tuner
from .task import Loss, Task
from .trainer import run

__all__ = ["choose", "count_right", "finetune", "merged", "mixed", "start_encoder", "with_adapters"]

log = logging.getLogger("rlpjepa_zoo")

_NEAR = 5
"""Of the most probable classes, one that must be right for top-5; it says nothing of as many classes."""


def finetune(recipe: TuningRecipe, out: str | Path, resume: bool = False, allow_change: Sequence[str] = (), progress: bool = True) -> Path:
    """Fine-tune an encoder on labelled images; returns the folder its classifier is published in (`out/classifier`).

    Signals, steps that are not finite, checkpoints and exact resuming are those of `rlpjepa_zoo.train`.

    Args:
        recipe: the run; `recipe.start.source` is loaded and verified.
        out, resume, allow_change, progress: as of `rlpjepa_zoo.train`.

    Raises:
        UsageError, RecipeError, DataError, ModelError, HubError, OutputError, NonFiniteError, StoppedBySignal: as of `rlpjepa_zoo.train`;
            DataError also when there are no labels, or fewer than `data.per_class` of a class.
    """
    return run(_Tuning(recipe), Path(out), resume, allow_change, progress)


# --- where it starts from ---------------------------------------------------------------------------------------------------------------


def start_encoder(recipe: TuningRecipe) -> SparseEncoder:
    """The encoder that a recipe starts from; with start.random a fresh one of the same architecture, drawn by the seed of the run.

    Raises:
        RecipeError: no source, or arguments that are not the backbone's.
        UsageError, ModelError, HubError: as of `load_encoder` and `create_encoder`.
    """
    start = recipe.start
    check_arguments("start.args", start.args)
    if start.source is None:
        raise RecipeError(
            "start.source: what to start from is not given; add start.source=ENCODER (a zoo name, owner/repo, a folder) or timm:NAME"
        )
    with rng.seeded(recipe.seed, "init"):
        if start.of_timm:
            return create_encoder(start.source.removeprefix("timm:"), 1, 1, not start.random, projector_depth=1, **start.args)
        encoder = load_encoder(start.source, start.revision)
        config = encoder.config
        return encoder if not start.random else create_encoder(
            config.architecture, config.dim, config.hidden_dim, projector_depth=config.projector_depth,
            preprocess=config.preprocess, **config.model_args,
        )  # fmt: skip


def with_adapters(classifier: Classifier, options: Lora) -> None:
    """Put low-rank adapters into the backbone, in place; only they and the linear layer keep their gradient.

    Raises:
        UsageError: peft is missing, or cannot adapt these modules.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError("classifier.train=lora needs peft; pip install 'rlpjepa-zoo[lora]'") from error
    exact = "|".join(map(re.escape, _adapted(classifier.backbone, options.targets)))  # ends alone would match other modules too
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=exact, lora_dropout=0.0)
    try:
        peft.inject_adapter_in_model(config, classifier.backbone)
    except ValueError as error:
        raise UsageError(f"classifier.lora.targets: {first_line(error)}") from error
    if classifier.projector is not None:
        classifier.projector.requires_grad_(False)
    classifier.steady = True


def _adapted(backbone: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Names of the modules that get an adapter: those asked for by their ends, else all linear layers, else all convolutions of one group
    (a convolution of several has no product of two small ones that is like it)."""
    named = dict(backbone.named_modules())
    if targets is not None:
        ends = {target: [name for name in named if name == target or name.endswith(f".{target}")] for target in targets}
        if missing := [target for target, found in ends.items() if not found]:
            hint = did_you_mean(missing[0], {name.rpartition(".")[2] for name in named})
            raise UsageError(f"classifier.lora.targets: no module of the backbone ends in '{missing[0]}'.{hint}")
        chosen = [name for name in named if any(name in found for found in ends.values())]
        for name in chosen:
            if getattr(named[name], "groups", 1) > 1:
                raise UsageError(f"classifier.lora.targets: {name} is a convolution of several groups, which gets no adapter; leave it out")
        return chosen
    chosen = [name for name, m in named.items() if isinstance(m, nn.Linear)]
    chosen = chosen or [name for name, m in named.items() if isinstance(m, nn.Conv2d) and m.groups == 1]
    if not chosen:
        raise UsageError(
            "classifier.lora.targets: the backbone has neither linear layers nor plain convolutions; use classifier.train=full"
        )
    return chosen


def merged(classifier: Classifier) -> Classifier:
    """A copy with its adapters added to the weights they adapt."""
    from peft.tuners.lora import LoraLayer

    whole = copy.deepcopy(classifier)
    for name, module in list(whole.backbone.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(whole.backbone.get_submodule(parent), last, module.get_base_layer())
    return whole.requires_grad_(False)


def choose(images: Images, per_class: int | None, seed: int) -> Images:
    """The labelled ones of some images; of each class only `per_class`, drawn by the seed, when that is given.

    Raises:
        DataError: no labels, or too few of a class.
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


# --- a step -----------------------------------------------------------------------------------------------------------------------------


def mixed(x: Tensor, labels: Tensor, classes: int, recipe: TuningRecipe, step: int) -> tuple[Tensor, Tensor]:
    """MixUp or CutMix of a batch (of each process's share with itself), the draws a function of (seed, step).

    Returns:
        Images (b, 3, S, S), and targets: (b, C) shares, or the labels as they are when nothing is mixed.
    """
    options = recipe.classifier
    kinds = [(v2.MixUp, options.mixup), (v2.CutMix, options.cutmix)]
    kinds = [(kind, alpha) for kind, alpha in kinds if alpha]
    if not kinds:
        return x, labels
    with rng.seeded(recipe.seed, "mix", step):
        kind, alpha = kinds[int(torch.randint(len(kinds), ()))]
        images, targets = kind(alpha=alpha, num_classes=classes)(x, labels)
    return images, targets


class _Scores(NamedTuple):
    logits: Tensor
    targets: Tensor
    """(b,) labels, or (b, C) shares of mixed ones."""
    labels: Tensor


class _Scored(nn.Module):
    """A classifier, called with what its loss needs."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor, targets: Tensor, labels: Tensor) -> _Scores:
        return _Scores(self.classifier(x), targets, labels)


@torch.no_grad()
def count_right(classifier: Classifier, images: Images, batch_size: int = 256, num_workers: int = 0) -> dict[str, float]:
    """Top-1 and (of more than five classes) top-5 accuracy and mean cross-entropy in nats; each rank classifies its share, counts are exact.

    Raises:
        DataError: none of the images can be read.
    """
    mine = images.take(np.arange(distributed.rank(), len(images), distributed.world_size()))
    labels = np.full(len(mine), -1) if mine.labels is None else mine.labels
    n, right, near, loss = 0, 0, 0, 0.0
    prepare = classifier.config.preprocess
    groups = ready(batched(range(len(mine)), batch_size), mine.read, prepare, num_workers)
    with classifier.evaluating(), closing(groups):
        for group in groups:
            if group.good:
                logits = classifier(prepare.normalised(group.pixels.to(classifier.device))).float().cpu().double()
                y = torch.from_numpy(labels[[group.items[i] for i in group.good]])
                best = logits.topk(min(_NEAR, logits.shape[1])).indices == y[:, None]
                n, right, near = n + len(y), right + int(best[:, 0].sum()), near + int(best.sum())
                loss += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
    n, right, near, loss = (sum(part) for part in zip(*distributed.gather_objects((n, right, near, loss)), strict=True))
    if not n:
        raise DataError("none of the images for evaluation can be read")
    return {"top1": right / n, **({"top5": near / n} if len(classifier.classes) > _NEAR else {}), "loss": loss / n, "n_test": n}


# --- the task ---------------------------------------------------------------------------------------------------------------------------


class _Tuning(Task):
    """Labels are told from images."""

    name = "classifier"
    best = {"top1": True, "top5": True, "loss": False}

    def __init__(self, recipe: TuningRecipe) -> None:
        self.recipe = recipe
        self.some_unused = recipe.classifier.linear_epochs > 0

    @property
    def every_epochs(self) -> int:
        return self.recipe.train.every_epochs

    def resolve_defaults(self) -> None:
        self.encoder = start_encoder(self.recipe)
        self.recipe = self.recipe.with_preprocess(dataclasses.asdict(self.encoder.config.preprocess))

    def accept(self, source: Source) -> Source:
        best, names = self.recipe.train.best, source.train.classes or []
        if best is not None and source.eval is None:
            raise RecipeError(f"train.best: {best} needs evaluation images; give data.eval_split, or set it to null")
        train = choose(source.images, self.recipe.data.per_class, self.recipe.seed)
        if source.eval is not None and (source.eval.labels is None or not (source.eval.labels >= 0).any()):
            other = "move them out of data.path" if self.recipe.data.source == "folder" else "set data.eval_split=null"
            mend = f"name the classes of both parts alike, or {other}"
            raise DataError(f"data.eval_split: none of the {len(source.eval)} evaluation images has the label of a training class; {mend}")
        held_out = None if source.eval is None else choose(source.eval, None, self.recipe.seed)
        images: Any
        for part, images in (("training", source.train), ("evaluation", source.eval)):
            without = 0 if images is None else int((images.labels < 0).sum())
            if without:
                log.info("%d of %d %s images have no label and are left out", without, len(images), part)
        self.classes = [*names, *map(str, range(len(names), source.classes))]
        if best == "top5" and len(self.classes) <= _NEAR:
            raise RecipeError(f"train.best: top5 is always 1 with {len(self.classes)} classes; use top1 or loss")
        self.n_train = len(train)
        frequent = 0 if held_out is None or held_out.labels is None else int(np.bincount(held_out.labels).max())
        self.most = frequent / max(1, len(held_out or ()))  # share of the most frequent class
        return Source(train, held_out, len(train), len(self.classes))

    def build(self) -> Classifier:
        recipe, encoder, data = self.recipe, copy.deepcopy(self.encoder), self.recipe.data
        preprocess = Preprocess((data.image_size,) * 2, data.mean, data.std, data.interpolation, data.crop_pct)
        encoder.config = dataclasses.replace(encoder.config, preprocess=preprocess)
        with rng.seeded(recipe.seed, "init-head"):
            classifier = make_classifier(encoder, self.classes, recipe.start.input)
        if recipe.classifier.train == "lora":
            with rng.seeded(recipe.seed, "init-adapters"):
                with_adapters(classifier, recipe.classifier.lora or Lora())
        elif recipe.classifier.train == "linear":
            classifier.frozen = True
            classifier.requires_grad_(False).head.requires_grad_(True)
        else:
            classifier.requires_grad_(True)
        try:
            with classifier.evaluating(), torch.no_grad():
                classifier(torch.zeros(1, 3, *preprocess.size))
        except (AssertionError, RuntimeError, ValueError) as error:
            name = encoder.config.architecture
            raise RecipeError(f"data.image_size: {name} does not take {data.image_size} pixels ({first_line(error)})") from error
        return classifier.train()

    def wrap(self, core: Classifier, source: Source) -> _Scored:
        return _Scored(core)

    def optimizer(self, core: Classifier, module: nn.Module) -> torch.optim.Optimizer:
        return make_tuner(core.head, core.backbone, core.projector, self.recipe)

    def before(self, core: Classifier, step: int, per_epoch: int) -> None:
        frozen = self.recipe.classifier.train == "linear" or step < round(self.recipe.classifier.linear_epochs * per_epoch)
        if frozen != core.frozen:
            core.frozen = frozen
            core.train()

    def inputs(self, groups: list[Tensor], labels: Tensor, step: int) -> tuple[Any, ...]:
        return *mixed(groups[0], labels, len(self.classes), self.recipe, step), labels

    def loss(self, output: _Scores, step: int) -> Loss:
        smoothing = self.recipe.classifier.label_smoothing
        loss = nn.functional.cross_entropy(output.logits.float(), output.targets, label_smoothing=smoothing)
        return Loss(loss, {"loss": loss})

    def numbers(self, loss: Loss, output: _Scores) -> dict[str, float]:
        right = (output.logits.detach().argmax(1) == output.labels).float().mean()
        found = distributed.mean_over_ranks(torch.stack([loss.total.detach(), right]))
        return dict(zip(("loss", "top1_train"), found.tolist(), strict=True))

    def brief(self, row: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, str]:
        return super().brief(row, metrics) | ({"top1": f"{metrics['top1']:.3f}"} if "top1" in metrics else {})

    def shown(self, core: Classifier) -> Classifier:
        return merged(core) if self.recipe.classifier.train == "lora" else core

    def measure(self, shown: Classifier, source: Source, autocast: Callable[[], AbstractContextManager[Any]]) -> dict[str, float]:
        if source.eval is None:
            return {}
        with autocast():
            return count_right(shown, source.eval, max(64, self.recipe.train.batch_size), self.recipe.train.num_workers)

    def alarms(self, metrics: Mapping[str, float], still_training: bool = False) -> list[str]:
        top1, chance = metrics.get("top1", 1.0), self.most
        error = math.sqrt(chance * (1 - chance) / metrics.get("n_test", 1))
        if still_training or top1 == 1 or top1 > chance + 3 * error:
            return []
        share = f"the most frequent class has a share of {chance:.3f}"
        return [f"hardly better than chance: top-1 {top1:.3f}, and {share} of the evaluation images; try another learning rate"]

    def aim(self, source: Source) -> str:
        return f"{self.encoder.config.architecture} from {self.method()}"

    def method(self) -> str:
        """How it is trained, in a few words for log and card."""
        recipe, options = self.recipe, self.recipe.classifier
        start = f"{'fresh weights like ' if recipe.start.random else ''}{recipe.start.name}"
        body = {"full": "all weights", "linear": "a linear layer on the frozen body", "lora": "a linear layer and low-rank adapters"}
        found = [f"{start}, {recipe.start.input}: {body[options.train]}"]
        found += [f"first {options.linear_epochs:g} epochs with a frozen body"] if options.linear_epochs else []
        found += [f"layer decay {recipe.optim.layer_decay:g}"] if recipe.optim.layer_decay != 1 else []
        named = {"label smoothing": options.label_smoothing, "mixup": options.mixup, "cutmix": options.cutmix}
        return ", ".join(found + [f"{name} {value:g}" for name, value in named.items() if value])

    def describe(
        self, core: Classifier, source: Source, metrics: Mapping[str, float], training: Mapping[str, Any], log_file: Path
    ) -> dict[str, Any]:
        recipe = self.recipe
        results: dict[str, Any] = {k: metrics[k] for k in ("top1", "top5", "loss", "n_test") if k in metrics}
        if results:
            precision = "float32" if recipe.train.precision == "no" else recipe.train.precision
            results |= {"n_train": self.n_train, "protocol": f"measured in training, in {precision}, one seed"}
        cfg: Any = core.backbone.pretrained_cfg
        return {
            "recipe": recipe.name, "data": recipe.data.label(), "dataset": recipe.data.name if recipe.data.source == "hf" else None,
            "license": recipe.hub.license, "base_model": cfg.get("hf_hub_id") if recipe.start.of_timm else None,
            "start": f"fresh weights, the architecture of {recipe.start.name}" if recipe.start.random else recipe.start.name,
            "method": self.method().partition(", ")[2], "augmentations": recipe.views.describe(), "results": results,
            "versions": package.versions(), "training": dict(training),
        }  # fmt: skip
