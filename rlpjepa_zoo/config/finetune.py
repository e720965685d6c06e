"""Recipes for fine-tuning: what `rlpjepa_zoo.config.pretrain` is for pretraining, with the same rules."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..errors import RecipeError
from .load import read_yaml, text_of
from .pretrain import Recipe
from .sections import Count, Data, Finite, Hub, NonNegative, Optim, Plan, Positive, Probability, Section, Train, Views, kind_of, plain

__all__ = ["Start", "TuningRecipe", "load_any"]


class TuningData(Data):
    """Labelled images; those without a label are left out. Preprocessing that is null is that of the encoder one starts from."""

    image_size: Count | None = None  # type: ignore[assignment]
    mean: tuple[Finite, Finite, Finite] | None = None  # type: ignore[assignment]
    std: tuple[Positive, Positive, Positive] | None = None  # type: ignore[assignment]
    interpolation: Literal["bilinear", "bicubic"] | None = None  # type: ignore[assignment]
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None  # type: ignore[assignment]
    per_class: Count | None = None
    """Use only this many labelled training images of each class, chosen at random (by the seed of the run)."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.streaming:
            raise ValueError("data.streaming: fine-tuning counts and draws labelled images, so it needs them all; set it to false")
        if self.limit is not None and self.per_class is not None:
            raise ValueError("data.per_class: has no meaning together with data.limit; give one of them")
        return self


class TuningViews(Views):
    """The random view of an image that a step sees: mild by default, since labels are to stay true."""

    count: Annotated[int, Field(ge=1, le=1)] = 1
    crop_scale: tuple[Positive, Positive] | None = (0.5, 1.0)
    jitter: Probability = 0.0
    grayscale: Probability = 0.0
    local: None = None


class Start(Section):
    """Where fine-tuning starts from."""

    source: str | None = None
    """An encoder (zoo name, owner/repo on the Hub, folder of a run or of an encoder), or timm:NAME with timm's weights."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; not for timm:NAME."""
    args: Annotated[dict[str, Any], BeforeValidator(plain)] = {}
    """timm:NAME only: arguments of timm.create_model, such as {img_size: 32, patch_size: 4}."""
    random: bool = False
    """Take the architecture of the source and fresh weights: the control that learns from the labels alone."""
    input: Literal["features", "z"] = "features"
    """What is classified: the dense features of the backbone, or z, which keeps the rectified bottleneck."""

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
        return self.source is not None and self.source.startswith("timm:")

    @property
    def name(self) -> str:
        """The source, without where it lies on this machine."""
        kind, mark, place = (self.source or "").rpartition("local-dir:")
        if not mark and (self.of_timm or not Path(place).expanduser().exists()):
            return place
        return (f"{kind}{mark}" if kind else "") + Path(place).name


class Lora(Section):
    """Low-rank adapters (needs peft); merged into the weights before anything is published."""

    rank: Count = 8
    alpha: Count = 16
    targets: tuple[str, ...] | None = None
    """Ends of the names of modules that get an adapter, such as [qkv, proj]; all linear layers of the backbone, else all convolutions of one
    group, when null."""


class Classes(Section):
    """What is trained, and on which labels."""

    train: Literal["full", "linear", "lora"] = "full"
    """All weights; the linear layer alone, on a frozen body in evaluation mode; or the linear layer and adapters."""
    linear_epochs: NonNegative = 0.0
    """full only: first epochs in which the body is frozen, so that the fresh linear layer does not tear at it."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: NonNegative = 0.0
    """alpha of the Beta law of the mixing weight; 0 does not mix. With cutmix too, each step draws one of the two."""
    cutmix: NonNegative = 0.0
    lora: Lora | None = None

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.linear_epochs and self.train != "full":
            raise ValueError(f"classifier.linear_epochs: has no meaning with classifier.train={self.train}; remove it")
        if self.lora is not None and self.train != "lora":
            raise ValueError(f"classifier.lora: has no meaning with classifier.train={self.train}; set that to lora, or remove it")
        return self


class TuningOptim(Optim):
    """Optimiser and learning-rate schedule: linear warm-up, then cosine."""

    name: Literal["adamw", "sgd"] = "adamw"  # type: ignore[assignment]
    weight_decay: NonNegative = 0.05
    warmup_epochs: NonNegative = 1.0
    warmup_start_lr: NonNegative = 1e-6
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the rate from each layer of the backbone to the one below it; 1 trains all alike."""
    head_lr: Positive = 1.0
    """Factor of the rate of the linear layer."""


class TuningTrain(Train):
    """Length, batch, precision, and what is kept."""

    batch_size: Annotated[int, Field(ge=2)] = 128
    every_epochs: Count = 1
    """How often the evaluation images are classified (and at the end)."""
    best: Literal["top1", "top5", "loss"] | None = None  # type: ignore[assignment]
    """Also keep the checkpoint and the classifier (in classifier-best/) of the evaluation where this was best. Chosen on the evaluation
    images, so their figures are then too good."""


class TuningRecipe(Plan):
    """A complete fine-tuning run.

    Example:
        >>> recipe = TuningRecipe.load("finetune-digits", ["train.epochs=5"])
        >>> recipe.start.source, recipe.train.epochs, TuningRecipe.parse(recipe.dump()) == recipe
        ('test_resnet.digits', 5.0, True)
    """

    kind = "finetune"

    name: str
    seed: Annotated[int, Field(ge=0)] = 0
    data: TuningData
    views: TuningViews = TuningViews()
    start: Start
    classifier: Classes = Classes()
    optim: TuningOptim
    train: TuningTrain
    hub: Hub = Hub()

    @model_validator(mode="after")
    def _together(self) -> Self:
        for name, epochs in (
            ("optim.warmup_epochs", self.optim.warmup_epochs),
            ("classifier.linear_epochs", self.classifier.linear_epochs),
        ):
            if epochs >= self.train.epochs:
                raise ValueError(f"{name}: {epochs:g} must be fewer than train.epochs = {self.train.epochs:g}")
        if self.optim.min_lr > self.lr:
            raise ValueError(f"optim.min_lr: {self.optim.min_lr:g} is above the rate used, {self.lr:g}")
        if self.views.blur and self.data.image_size is not None and self.data.image_size < 7:
            raise ValueError(f"views.blur: its 13 taps need images of at least 7 pixels, data.image_size is {self.data.image_size}")
        if self.classifier.train == "linear" and self.optim.layer_decay != 1:
            raise ValueError("optim.layer_decay: has no meaning with classifier.train=linear; remove it")
        if self.classifier.train == "linear" and self.optim.backbone_lr != 1:
            raise ValueError("optim.backbone_lr: has no meaning with classifier.train=linear; remove it")
        return self

    def settled(self, preprocess: Mapping[str, Any]) -> TuningRecipe:
        """The recipe with the preprocessing of an encoder where it gives none itself.

        Raises:
            RecipeError: views cannot have it.
        """
        height, width = preprocess["size"]
        if self.data.image_size is None and height != width:
            raise RecipeError(f"data.image_size: the encoder takes {height} x {width} pixels; give one size, as views are square")
        found = {**preprocess, "image_size": height}
        values = self.model_dump(mode="json")
        values["data"] |= {k: found[k] for k in ("image_size", "mean", "std", "interpolation", "crop_pct") if values["data"][k] is None}
        return TuningRecipe.parse(json.dumps(values), where=self.name)

    def shareable(self) -> str:
        """`dump` without what is of one person or machine."""
        data = self.data
        path = None if data.path is None or data.name is not None else Path(data.path).name
        parts: dict[str, Any] = {
            "data": data.model_copy(update={"path": path}),
            "start": self.start.model_copy(update={"source": self.start.name or None}),
            "hub": Hub(license=self.hub.license),
        }
        return self.model_copy(update=parts).dump()


def load_any(source: str | Path, overrides: Sequence[str] = ()) -> Recipe | TuningRecipe:
    """A recipe of whatever kind, told by its sections; arguments and errors as of `Recipe.load`."""
    text = text_of(source)
    kind: type[Recipe | TuningRecipe] = TuningRecipe if kind_of(read_yaml(text, str(source))) == TuningRecipe.kind else Recipe
    return kind.parse(text, overrides, where=str(source))
