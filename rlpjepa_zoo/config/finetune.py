"""Recipe of a fine-tuning run; the rules are those of `rlpjepa_zoo.config.pretrain`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..core.schema import Count, Finite, NonNegative, Positive, Probability, Section, Seed
from ..core.source import ModelSource
from .base import OneOf, parse_scalars
from .load import overrides_of
from .plan import Plan, command_of
from .pretrain import Recipe
from .sections import Data, ImageSize, Views
from .training_sections import OPTIMIZER_KEYS, Hub, Optim, Train

__all__ = ["Lora", "Start", "TuningRecipe", "load_any"]


class TuningData(Data):
    """Labelled images; images without a label are left out. Preprocessing keys that are null take the value of the starting encoder."""

    image_size: ImageSize | None = None  # type: ignore[assignment]
    """Height and width of the input of the backbone, in pixels; null takes those of the encoder."""
    mean: tuple[Finite, Finite, Finite] | None = None  # type: ignore[assignment]
    """Mean of each channel for normalisation, on the 0..1 scale; null takes that of the encoder."""
    std: tuple[Positive, Positive, Positive] | None = None  # type: ignore[assignment]
    """Standard deviation of each channel for normalisation, on the 0..1 scale; null takes that of the encoder."""
    interpolation: Literal["bilinear", "bicubic"] | None = None  # type: ignore[assignment]
    """Interpolation of every resize; null takes that of the encoder."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None  # type: ignore[assignment]
    """Evaluation: share of the resized short side that the centre crop covers; null takes that of the encoder."""
    per_class: Count | None = None
    """Number of labelled training images of each class to use, drawn at random by the seed of the run; null uses all."""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.streaming:
            raise ValueError(
                "data.streaming: fine-tuning counts and draws labelled images, so it needs all of them at once; set it to false"
            )
        if self.limit is not None and self.per_class is not None:
            raise ValueError("data.per_class: has no meaning together with data.limit; give one of them")
        return self


class TuningViews(Views):
    """Random view of an image that a step trains on. The defaults are mild, so that the label stays true."""

    count: Annotated[int, Field(ge=1, le=1)] = 1
    """Number of views of each image in a step; always 1 in fine-tuning."""
    crop_scale: tuple[Positive, Positive] | None = (0.5, 1.0)
    """Smallest and largest share of the image area that a random resized crop takes; null resizes the whole image."""
    jitter: Probability = 0.0
    """Probability of colour jitter."""
    grayscale: Probability = 0.0
    """Probability of conversion to greyscale."""
    local: None = None
    """Local views; always null in fine-tuning."""


class Start(Section):
    """Model that fine-tuning starts from."""

    source: str | None = None
    """Encoder (zoo name, owner/repo on the Hub, folder of a run or of an encoder), or timm:NAME for a timm model with its pretrained weights."""
    revision: str | None = None
    """Branch, tag or commit of the encoder on the Hub; not for timm:NAME."""
    args: Annotated[dict[str, Any], BeforeValidator(parse_scalars)] = {}
    """timm:NAME only: arguments of timm.create_model, such as {img_size: 32, patch_size: 4}."""
    random: bool = False
    """Use the architecture of the source with random weights: the control that learns from the labels only."""
    input: Literal["features", "z"] = "features"
    """Input of the linear layer: the dense features of the backbone, or z, which keeps the rectified projector."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.args and not self.of_timm:
            raise ValueError("start.args: an encoder brings its own arguments; remove it, or start from timm:NAME")
        if self.of_timm and self.revision is not None:
            raise ValueError("start.revision: has no meaning for timm:NAME; remove it")
        if self.of_timm and self.input == "z":
            raise ValueError(f"start.input: {self.source} has no rectified projector, so no z; use features, or start from an encoder")
        return self

    @property
    def of_timm(self) -> bool:
        """Whether the source is a plain timm model."""
        return self.source is not None and ModelSource.parse(self.source).timm

    @property
    def name(self) -> str:
        """The source without folders of this machine."""
        return ModelSource.parse(self.source).shareable() if self.source else ""


class Lora(Section):
    """Low-rank adapters; needs the package peft. They are merged into the weights before publishing."""

    rank: Count = 8
    """Rank of the adapters."""
    alpha: Count = 16
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Endings of the names of the modules that get an adapter, such as [qkv, proj]. Null takes all linear layers of the backbone, or all
    ungrouped convolutions if it has none."""


class ClassifierOptions(Section):
    """Which weights are trained, and how labels are smoothed or mixed."""

    train: Literal["full", "linear", "lora"] = "full"
    """full: all weights. linear: the linear layer only, on a frozen body in evaluation mode. lora: the linear layer and low-rank adapters."""
    linear_epochs: NonNegative = 0.0
    """train: full only: number of first epochs in which only the linear layer is trained, so that its random start does not disturb the body."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the label mass that is spread evenly over all classes."""
    mixup: NonNegative = 0.0
    """MixUp: alpha of the Beta(alpha, alpha) distribution of the mixing weight; 0 switches it off. With cutmix, each step draws one of the two."""
    cutmix: NonNegative = 0.0
    """CutMix: alpha of the Beta(alpha, alpha) distribution of the area that is kept; 0 switches it off."""
    lora: Lora | None = None
    """train: lora only: options of the adapters, a section of their own; null takes the defaults."""

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        if self.linear_epochs and self.train != "full":
            raise ValueError(f"classifier.linear_epochs: has no meaning with classifier.train={self.train}; remove it")
        if self.lora is not None and self.train != "lora":
            raise ValueError(f"classifier.lora: has no meaning with classifier.train={self.train}; set that to lora, or remove it")
        return self


class TuningOptim(Optim):
    """Optimiser and learning-rate schedule: linear warm-up, then cosine decay."""

    name: Annotated[str, OneOf(OPTIMIZER_KEYS, without={"lars"})] = "adamw"
    """Optimiser: AdamW, or SGD with momentum."""
    weight_decay: NonNegative = 0.05
    """Weight decay of the optimiser."""
    warmup_epochs: NonNegative = 1.0
    """Epochs of linear warm-up; fewer than train.epochs."""
    warmup_start_lr: NonNegative = 1e-6
    """Learning rate at the first step of the warm-up."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from each layer of the backbone to the layer below it; 1 gives all layers the same rate."""
    head_lr: Positive = 1.0
    """Factor on the learning rate of the linear layer."""


class TuningTrain(Train):
    """Length of the run, batch, precision, checkpoints and limits."""

    batch_size: Annotated[int, Field(ge=2, le=10**9)] = 128
    """Images per step over all processes."""
    every_epochs: Count = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    min_steps: Count | None = None
    """Fewest steps of the run. With few images an epoch has few steps; then train.epochs, train.every_epochs, optim.warmup_epochs and
    classifier.linear_epochs grow by one factor, until the run has so many. Null changes nothing."""
    best: Literal["top1", "top5", "loss"] | None = None  # type: ignore[assignment]
    """Also keep the checkpoint and the classifier (in classifier-best/) of the evaluation with the best value of this metric. It is chosen on
    the evaluation images, so its metrics on them are too optimistic."""


class TuningRecipe(Plan):
    """A complete fine-tuning run.

    Example:
        >>> recipe = TuningRecipe.load("finetune-digits", ["train.epochs=5"])
        >>> recipe.start.source, recipe.train.epochs, TuningRecipe.parse(recipe.dump()) == recipe
        ('test_resnet.digits', 5.0, True)
    """

    kind = "finetune"

    name: str
    """Name of the run, used in logs and on cards."""
    seed: Seed = 0
    """Seed of all random draws of the run."""
    data: TuningData
    views: TuningViews = TuningViews()
    start: Start
    classifier: ClassifierOptions = ClassifierOptions()
    optim: TuningOptim
    train: TuningTrain
    hub: Hub = Hub()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        linear, epochs = self.classifier.linear_epochs, self.train.epochs
        if linear >= epochs:
            raise ValueError(f"classifier.linear_epochs: {linear:g} must be fewer than train.epochs = {epochs:g}")
        if self.classifier.train == "linear" and self.optim.layer_decay != 1:
            raise ValueError("optim.layer_decay: has no meaning with classifier.train=linear; remove it")
        if self.classifier.train == "linear" and self.optim.backbone_lr != 1:
            raise ValueError("optim.backbone_lr: has no meaning with classifier.train=linear; remove it")
        return self

    def lengthened(self, images: int) -> TuningRecipe:
        """Return the recipe with as many epochs as `train.min_steps` asks for, for a number of training images."""
        steps, per_epoch = self.steps(images)
        if self.train.min_steps is None or steps >= self.train.min_steps or not per_epoch:
            return self
        epochs = self.train.min_steps / per_epoch
        factor = epochs / self.train.epochs
        train = self.train.model_copy(update={"epochs": epochs, "every_epochs": round(self.train.every_epochs * factor)})
        optim = self.optim.model_copy(update={"warmup_epochs": self.optim.warmup_epochs * factor})
        classifier = self.classifier.model_copy(update={"linear_epochs": self.classifier.linear_epochs * factor})
        return self.model_copy(update={"train": train, "optim": optim, "classifier": classifier})

    @classmethod
    def _drop_replaced(cls, values: dict[str, Any], overrides: Sequence[str]) -> None:
        trained = overrides_of("classifier", overrides).get("train")
        replaced = {
            "linear": {"classifier": {"linear_epochs"}, "optim": {"layer_decay", "backbone_lr"}},
            "lora": {"classifier": {"linear_epochs"}},
        }
        for section, keys in replaced.get(trained or "", {}).items():
            for key in keys - overrides_of(section, overrides).keys() if isinstance(values.get(section), dict) else ():
                values[section].pop(key, None)

    def _shareable_model(self) -> dict[str, Section]:
        return {"start": self.start.model_copy(update={"source": self.start.name or None})}


def load_any(source: str | Path, overrides: Sequence[str] = ()) -> Recipe | TuningRecipe:
    """Read a recipe of any kind, told by its sections; arguments and errors as for `Recipe.load`."""
    kind: type[Recipe | TuningRecipe] = TuningRecipe if command_of(source) == TuningRecipe.kind else Recipe
    return kind.load(source, overrides)
