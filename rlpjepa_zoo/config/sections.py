"""Sections of recipes: every key with its type, its default and its meaning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from ..core import source as source_names
from ..errors import RecipeError, UsageError
from .load import explain, override, read_yaml, replace_rivals, text_of

Probability = Annotated[float, Field(ge=0, le=1)]


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


Finite = Annotated[float, Field(allow_inf_nan=False)]


Count = Annotated[int, Field(ge=1)]


def plain(value: Any) -> Any:
    """Text scalars of a free-form mapping, as YAML would read them."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, str):
        try:
            return float(value) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) else yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            return value
    return value


class Section(BaseModel):
    """Frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null(cls, values: Any) -> Any:
        """`key:` and `key: null` mean None where the field is optional."""
        return (
            {k: None if isinstance(v, str) and v in ("", "null", "~") else v for k, v in values.items()}
            if isinstance(values, dict)
            else values
        )


class Data(Section):
    """Which images, and how they are brought to the input of the backbone."""

    source: Literal["digits", "torchvision", "folder", "hf"]
    """digits (embedded in scikit-learn), a torchvision data set, a folder of images, or a Hugging Face data set."""
    name: str | None = None
    """torchvision class (CIFAR10), or Hub id of a Hugging Face data set (uoft-cs/cifar10)."""
    path: str | None = None
    """folder: the images (train/ and val/ inside, or all for training). torchvision: where the files are. hf: a local copy (parquet
    files, save_to_disk, image folder), read instead of the Hub."""
    split: str = "train"
    """Training split (hf), or name of its sub-folder (folder)."""
    eval_split: str | None = None
    """Evaluation split; for folders the first of val, valid, validation, test that exists when null."""
    image_column: str | None = None
    label_column: str | None = None
    """hf only; found by type when null. label_column: none says there are no labels."""
    streaming: bool = False
    """hf only: read without downloading first; needs `length`."""
    length: Count | None = None
    """Images in an epoch of a stream."""
    shuffle_buffer: Count = 10_000
    """Images of a stream that are shuffled among each other."""
    download: bool = True
    """torchvision only: fetch the files when they are missing."""
    cache_gb: NonNegative = 2.0
    """Training images are decoded once and kept in memory (of each process) if they need no more than this, and so are those for
    evaluation; 0 never keeps them."""
    limit: Count | None = None
    """Use only this many training images, chosen at random (by the seed of the run)."""
    image_size: Count = 32
    mean: tuple[Finite, Finite, Finite] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Evaluation: the centre crop covers this share of the resized short side (0.875 for 224 of 256)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        allowed = {
            "digits": set(),
            "torchvision": {"name", "path", "download", "split", "eval_split"},
            "folder": {"path", "split", "eval_split"},
            "hf": {"name", "path", "split", "eval_split", "image_column", "label_column", "streaming", "length", "shuffle_buffer"},
        }[self.source]
        of_some_source = {
            "name",
            "path",
            "split",
            "eval_split",
            "image_column",
            "label_column",
            "streaming",
            "length",
            "shuffle_buffer",
            "download",
        }
        changed = {k for k in of_some_source - allowed if getattr(self, k) != type(self).model_fields[k].default}
        if changed:
            raise ValueError(f"data.{min(changed)}: has no meaning for source '{self.source}'; remove it")
        if self.source == "torchvision" and self.name is None:
            raise ValueError("data.name: needed for source 'torchvision', the class name such as CIFAR10")
        if self.source == "hf" and self.name is None and self.path is None:
            raise ValueError("data.name: needed for source 'hf': the Hub id in data.name, or a local folder in data.path")
        if self.streaming != (self.length is not None):
            raise ValueError("data.length: images in an epoch; needed with data.streaming=true and only then")
        if self.streaming and self.limit is not None:
            raise ValueError("data.limit: has no meaning with data.streaming=true; use data.length")
        if self.streaming and self.cache_gb != type(self).model_fields["cache_gb"].default:
            raise ValueError("data.cache_gb: has no meaning with data.streaming=true; remove it")
        return self

    def label(self) -> str:
        """How the data set is called on cards."""
        if self.path is None:
            return self.name or self.source
        return f"{self.name} (local copy)" if self.name else Path(self.path).name


class Local(Section):
    """More views of an image, smaller ones: the local views of multi-crop. They are drawn, encoded and matched like the others."""

    count: Annotated[int, Field(ge=1, le=32)]
    size: Count
    """Pixels; a ViT needs encoder.args.dynamic_img_size=true to take a second size."""
    crop_scale: tuple[Positive, Positive] = (0.05, 0.3)


class Views(Section):
    """Random views of an image, in this order: crop or resize, affine, colour jitter, greyscale, blur, solarize, equalize, flip, noise."""

    count: Annotated[int, Field(ge=1, le=16)] = 2
    crop_scale: tuple[Positive, Positive] | None = (0.2, 1.0)
    """Share of the area that a random resized crop takes; null resizes the whole image."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Degrees, either way."""
    translate: Probability = 0.0
    """Share of the size, either way."""
    zoom: tuple[Positive, Positive] = (1.0, 1.0)
    jitter: Probability = 0.8
    """Probability of colour jitter."""
    brightness: NonNegative = 0.4
    contrast: NonNegative = 0.4
    saturation: NonNegative = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    grayscale: Probability = 0.2
    blur: Probability = 0.0
    """Gaussian, sigma uniform in 0.1 .. 2 pixels."""
    solarize: Probability = 0.0
    """Inverts grey levels above 128."""
    equalize: Probability = 0.0
    flip: Probability = 0.5
    noise: NonNegative = 0.0
    """Standard deviation of Gaussian noise added after normalisation."""
    local: Local | None = None

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        pairs = {name: getattr(self, name) for name in ("crop_scale", "crop_ratio", "zoom")}
        if self.local is not None:
            pairs["local.crop_scale"] = self.local.crop_scale
        for name, pair in pairs.items():
            share = name.endswith("crop_scale")
            if pair is not None and (pair[0] > pair[1] or (share and pair[1] > 1)):
                raise ValueError(f"views.{name}: expected [low, high] with low <= high{' <= 1' if share else ''}, got {list(pair)}")
        return self

    def describe(self) -> str:
        """In one line, for cards."""
        parts = [
            f"{self.count} view{'s' if self.count > 1 else ''}"
            if self.local is None
            else f"{self.count} views and {self.local.count} local ones of {self.local.size} pixels",
            "whole image" if self.crop_scale is None else "crop of {:g} to {:g} of the area".format(*self.crop_scale),
        ]
        if self.rotate or self.translate or self.zoom != (1.0, 1.0):
            parts.append("affine (rotate {:g} degrees, translate {:g}, zoom {:g} to {:g})".format(self.rotate, self.translate, *self.zoom))
        if self.jitter:
            strengths = f"brightness {self.brightness:g}, contrast {self.contrast:g}, saturation {self.saturation:g}, hue {self.hue:g}"
            parts.append(f"colour jitter p = {self.jitter:g} ({strengths})")
        parts += [
            f"{name} p = {value:g}" for name in ("grayscale", "blur", "solarize", "equalize", "flip") if (value := getattr(self, name))
        ]
        return ", ".join(parts + ([f"noise {self.noise:g}"] if self.noise else []))


class Encoder(Section):
    """timm backbone and projector."""

    backbone: str
    """Any timm name, or resnet18_small, resnet34_small, resnet50_small, resnet10_small_narrow."""
    args: Annotated[dict[str, Any], BeforeValidator(plain)] = {}
    """Arguments of timm.create_model, such as {img_size: 32, patch_size: 4}."""
    pretrained: bool = False
    freeze_backbone: bool = False
    """Train the projector only."""
    cached_views: Count | None = None
    """With a frozen backbone: encode so many random views of each image once, keep their features in memory (within data.cache_gb), and
    draw views.count of them in every step. Null encodes new views in every step."""
    dim: Annotated[int, Field(ge=1, le=1 << 20)] = 512
    hidden_dim: Count = 512
    projector_depth: Count = 3
    """Linear layers; 1 is a single rectified layer."""


class Target(Section):
    """Rectified generalized Gaussian RGN_p(mu, sigma); give mu, or the density it should have."""

    p: Positive = 1.0
    mu: Finite | None = None
    density: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Wanted fraction of non-zeros; solved for mu."""
    sigma: Literal["gn", "rgn"] | Positive = "gn"
    """gn: unit variance before rectification (the paper's default). rgn: unit variance after it. Or a number."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.mu is None) == (self.density is None):
            raise ValueError("target.mu: give exactly one of target.mu and target.density (set the other to null)")
        return self

    def law(self) -> tuple[float, float]:
        """(mu, sigma)."""
        from scipy import optimize

        from ..distributions import mu_for_density, sigma_gn, sigma_rgn

        try:
            if self.sigma != "rgn":
                sigma = sigma_gn(self.p) if self.sigma == "gn" else float(self.sigma)
                mu = self.mu if self.mu is not None else mu_for_density(self.density or 0.5, self.p, sigma)
                return mu, sigma
            if self.mu is not None:
                return self.mu, sigma_rgn(self.p, self.mu)
            density = self.density or 0.5
            mu = optimize.brentq(lambda m: m - mu_for_density(density, self.p, sigma_rgn(self.p, m)), -200.0, 10.0, xtol=1e-10)
            return mu, sigma_rgn(self.p, mu)
        except ValueError as error:
            raise RecipeError(f"target: {error}") from error

    def density_in_theory(self) -> float:
        """P(Y > 0) of the target."""
        import torch

        from ..distributions import RectifiedGeneralizedGaussian

        mu, sigma = self.law()
        return float(RectifiedGeneralizedGaussian(torch.tensor(mu, dtype=torch.float64), sigma, self.p).l0)


def _objective(values: Any) -> Any:
    """The options of the objective that `name` selects, see `rlpjepa_zoo.objectives`."""
    from ..objectives import OBJECTIVES
    from ..objectives.base import Options

    if isinstance(values, Options):
        return values
    if not isinstance(values, dict):
        raise ValueError(f"objective: got {values!r}, expected a valid dictionary")
    try:
        options = OBJECTIVES[values.get("name", DEFAULT_OBJECTIVE)].Options
    except UsageError as error:
        raise ValueError(f"objective.name: {error}") from error
    try:
        return options.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"objective.{explain(error, options)}") from error


DEFAULT_OBJECTIVE = "rectified_lpjepa"

Objective = Annotated[SerializeAsAny[Any], BeforeValidator(_objective)]
"""Section of the training objective: `name`, and the keys of that objective's `Options`."""


class Optim(Section):
    """Optimiser and learning-rate schedule: linear warm-up, then cosine."""

    name: Literal["adamw", "lars"] = "adamw"
    lr: Annotated[float, Field(gt=0, le=1e6)]
    """At a batch of `reference_batch`; the rate used is lr * train.batch_size / reference_batch."""
    reference_batch: Count = 256
    weight_decay: NonNegative = 1e-4
    decay_bias_and_norm: bool = False
    """Also decay biases and normalisation parameters (adamw only; lars never does)."""
    momentum: Probability = 0.9
    trust_coefficient: Positive = 0.02
    """lars only."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """adamw only."""
    warmup_epochs: NonNegative = 10.0
    warmup_start_lr: NonNegative = 3e-5
    min_lr: NonNegative = 0.0
    backbone_lr: Positive = 1.0
    """Factor of the rate of the backbone, such as 0.01 for one that is pretrained and is to stay nearly what it is."""
    clip_grad: Positive | None = None
    """Largest norm of the gradient; null does not clip."""

    @model_validator(mode="after")
    def _used(self) -> Self:
        others = {
            "adamw": ("momentum", "trust_coefficient"),
            "lars": ("betas", "decay_bias_and_norm"),
            "sgd": ("betas", "trust_coefficient"),
        }[self.name]
        for name in others:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"optim.{name}: has no meaning for {self.name}; remove it")
        return self


class Probe(Section):
    """Measurements during training; they never change the encoder."""

    online: bool = True
    """Linear classifiers on detached features and z, trained along when labels exist."""
    lr: Positive = 5e-3
    """Scaled by the batch like optim.lr."""
    every_epochs: Count = 10
    """How often kNN and evaluation-mode density are measured (and at the end)."""
    knn_k: Count = 20
    knn_temperature: Positive = 0.07
    bank: Count = 10_000
    """Training images kNN votes with, at most."""
    eval_images: Count = 10_000
    """Evaluation images used, at most."""


class Train(Section):
    """Length, batch, precision, and what is kept."""

    epochs: Annotated[float, Field(gt=0, le=1e9)]
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images per step over all processes (each gives `views.count` views)."""
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Mixed precision of the network; the loss is always float32."""
    channels_last: bool = True
    compile: bool = False
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Processes per rank that decode and augment."""
    log_every: Count = 20
    """Steps."""
    checkpoint_minutes: NonNegative = 10.0
    """Minutes between checkpoints; one is always saved at the end of an evaluation and of the run."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; never fewer than two, as the newest may be the damaged one."""
    best: Literal["knn_z", "knn_features", "excess"] | None = None
    """Also keep the checkpoint and the encoder (in encoder-best/) of the evaluation where this was best; excess is the distance above its
    floor of the last training batches."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, which is then what is measured and published; it warms up from 0 as
    1 - (1 + t)^(-2/3) at update t. Null publishes the weights themselves."""
    max_skipped: Annotated[int, Field(ge=0)] = 5
    """Steps in a row with a loss or gradient that is not finite: they are skipped; one more ends the run."""
    timeout_minutes: Annotated[float, Field(gt=0, le=1440)] = 30.0
    """How long processes wait for each other before they give up."""
    loader_timeout_minutes: Annotated[float, Field(gt=0, le=1440)] = 10.0
    """How long a step waits for a batch from its workers before the run ends; has no meaning without workers, or for streams."""
    max_bad_fraction: Probability = 1.0
    """Stop when more than this share of the training images cannot be read."""
    trackers: tuple[str, ...] = ()
    """Accelerate trackers (tensorboard, wandb, trackio, ...) beside metrics.jsonl, which is always written."""


class Hub(Section):
    """Publishing while training: after every evaluation, in the background. A Hub that is down costs a line in the log and nothing else."""

    repo: str | None = None
    """owner/name; nothing is sent when null."""
    private: bool | None = None
    """Visibility, which an existing repository must have; when null, any, and a new one is private."""
    revision: str | None = None
    """Branch; main when null."""
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")] | None = None
    """SPDX identifier on the card, such as apache-2.0; the card says "not stated" when null."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.repo is not None and not source_names.is_repository(self.repo):
            raise ValueError(f"hub.repo: expected owner/name, got '{self.repo}'")
        if self.repo is None and (self.revision is not None or self.private is not None):
            raise ValueError("hub.repo: needed with hub.revision and hub.private; set it, or remove them")
        return self


KINDS = {"train": ("encoder", "target", "objective", "probe"), "finetune": ("start", "classifier")}
"""Commands that take a recipe, and the sections that such a recipe alone has."""


def kind_of(values: dict[str, Any]) -> str:
    """The command that a recipe is for, by its sections."""
    return max(KINDS, key=lambda kind: sum(section in values for section in KINDS[kind]))


class Plan(Section):
    """What the recipes of all kinds of run have in common."""

    kind: ClassVar[str]
    """Command that takes such a recipe."""

    if TYPE_CHECKING:
        name: str
        seed: int
        data: Data
        views: Views
        optim: Optim
        train: Train
        hub: Hub

        def shareable(self) -> str: ...

    @property
    def lr(self) -> float:
        """Peak learning rate used: optim.lr * batch / reference batch."""
        return self.optim.lr * self.train.batch_size / self.optim.reference_batch

    def steps(self, images: int) -> tuple[int, int]:
        """(steps of the run, steps of an epoch) for a number of training images; the incomplete last batch is dropped."""
        per_epoch = images // self.train.batch_size
        return max(1, round(self.train.epochs * per_epoch)), per_epoch

    def dump(self) -> str:
        """Canonical YAML, every field written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, Any]:
        """Every value under its dotted key."""

        def dotted(values: dict[str, Any], prefix: str) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for key, value in values.items():
                found |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            return found

        return dotted(self.model_dump(mode="json"), "")

    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = ()) -> Self:
        """A recipe by path or by name (see `list_recipes`), with ``"section.key=value"`` overrides (target.mu replaces target.density).

        Raises:
            RecipeError: naming the key, what was given and what was expected.
        """
        return cls.parse(text_of(source), overrides, where=str(source))

    @classmethod
    def parse(cls, text: str, overrides: Sequence[str] = (), where: str = "recipe") -> Self:
        """A recipe from YAML text; see `load`."""
        values = read_yaml(text, where)
        for given in overrides:
            override(values, given)
        replace_rivals(values, overrides)
        if (kind := kind_of(values)) != cls.kind:
            mark = next(section for section in KINDS[kind] if section in values)
            raise RecipeError(f"{where}: has the section '{mark}', so it is a recipe for `rlpjepa {kind}`, not for `rlpjepa {cls.kind}`")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError(f"{where}: {explain(error, cls)}") from error
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error


def data_section(values: dict[str, str], overrides: Sequence[str] = ()) -> Data:
    """A data section alone, with ``"data.key=value"`` overrides.

    Raises:
        RecipeError: naming the key, what was given and what was expected.

    Example:
        >>> data_section({"source": "hf", "name": "uoft-cs/cifar10"}, ["data.eval_split=test"]).eval_split
        'test'
    """
    whole: dict[str, Any] = {"data": dict(values)}
    for given in overrides:
        override(whole, given)
    if extra := sorted(whole.keys() - {"data"}):
        raise UsageError(
            f"override of '{extra[0]}': only data.KEY=VALUE has a meaning here; overrides of other sections belong to a recipe"
        )
    try:
        return _DataAlone.model_validate(whole).data
    except ValidationError as error:
        raise RecipeError(explain(error, _DataAlone)) from error


class _DataAlone(Section):
    data: Data
