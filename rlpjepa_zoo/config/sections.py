"""Recipe sections for images, views, encoder and target: every key with its type, default and meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..core.schema import Count, Finite, NonNegative, Positive, Probability, Section
from ..core.source import shareable_path
from ..errors import RecipeError
from .base import OneOf, parse_scalars

if TYPE_CHECKING:
    from ..distributions import RectifiedGeneralizedGaussian

__all__ = ["ADOPTED", "SOURCE_KEYS", "Data", "Encoder", "Local", "Target", "Views"]


ImageSize = Annotated[int, Field(ge=1, le=4096)]

SOURCE_KEYS: dict[str, set[str]] = {
    "digits": set(),
    "torchvision": {"name", "path", "download", "split", "eval_split"},
    "folder": {"path", "split", "eval_split"},
    "hf": {"name", "path", "split", "eval_split", "image_column", "label_column", "allow_paths", "streaming", "length", "shuffle_buffer"},
    "parquet": {"path", "split", "eval_split", "image_column", "label_column", "allow_paths"},
    "webdataset": {"path", "split", "eval_split", "image_column"},
}
"""Values of `data.source`, and the keys of the section that each one uses; `rlpjepa_zoo.data.sources` opens them."""


ADOPTED = ("image_size", "mean", "std", "interpolation", "crop_pct")
"""Keys of the section `data` that null takes from the model a run starts from."""


class Data(Section):
    """Images, labels and preprocessing."""

    source: Annotated[str, OneOf(SOURCE_KEYS)]
    """Where the images come from: digits (scikit-learn, no download), a torchvision data set, a folder of images, a Hugging Face data set (hf),
    local parquet files, or tar files (webdataset)."""
    name: str | None = None
    """torchvision: class name, such as CIFAR10. hf: repository on the Hub, such as uoft-cs/cifar10."""
    path: str | None = None
    """folder: folder of the images; those in train/ and val/, or all of them for training. torchvision: folder of the files. hf: local copy
    (parquet files, save_to_disk, image folder) that is read instead of the Hub. parquet, webdataset: the file, or the folder of the files."""
    split: str = "train"
    """Training split. folder: name of its sub-folder. parquet, webdataset: start of the file names, or name of their sub-folder."""
    eval_split: str | None = None
    """Evaluation split. For folders, null takes the first sub-folder of val, valid, validation and test that exists."""
    image_column: str | None = None
    """hf and parquet: column of the images; null finds it by its type, and by its name (image, img, jpg, ...) where the type does not
    tell. webdataset: suffix of the images, such as left.png; null takes the image whose suffix has no further dot."""
    label_column: str | None = None
    """hf and parquet only: column of the class labels; null takes the column of type ClassLabel, else one of integers or text that is named
    label, fine_label, class, target or the like. Labels of any kind are numbered in sorted order. none: the images have no labels."""
    allow_paths: bool = False
    """hf and parquet only: open files that rows of a table name outside of the table's folder. Relative paths begin at this folder."""
    streaming: bool = False
    """hf only: read images while training, without downloading the data set first. Needs data.length."""
    length: Count | None = None
    """Streams only: images in an epoch."""
    shuffle_buffer: Count = 10_000
    """Streams only: size of the buffer that images are drawn from at random."""
    download: bool = True
    """torchvision only: download the files if they are missing."""
    cache_gb: NonNegative = 2.0
    """Memory limit in GB for decoded images, per process. Training images that fit are decoded once and kept in memory; the same holds for
    evaluation images. 0 keeps none."""
    verify: Literal["sample", "all"] = "sample"
    """Training images whose pixels the fingerprint of the data reads at the start, so that a resume notices other ones: 32 of them, or all, which
    decodes every image once more. The names of all images are always compared."""
    limit: Count | None = None
    """Number of training images to use, drawn at random by the seed of the run; null uses all."""
    image_size: ImageSize = 32
    """Height and width of the input of the backbone, in pixels."""
    mean: tuple[Finite, Finite, Finite] = (0.485, 0.456, 0.406)
    """Mean of each channel for normalisation, on the 0..1 scale."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel for normalisation, on the 0..1 scale."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Interpolation of every resize."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Evaluation: share of the resized short side that the centre crop covers, such as 0.875 for 224 of 256 pixels."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        others = set().union(*SOURCE_KEYS.values()) - SOURCE_KEYS[self.source]
        changed = {k for k in others if getattr(self, k) != type(self).model_fields[k].default}
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
        if self.streaming and self.verify != "sample":
            raise ValueError("data.verify: has no meaning with data.streaming=true; remove it")
        if self.streaming and self.cache_gb != type(self).model_fields["cache_gb"].default:
            raise ValueError("data.cache_gb: has no meaning with data.streaming=true; remove it")
        return self

    @model_validator(mode="after")
    def _preprocessing_in_range(self) -> Self:
        for name, low, high in (("mean", -1e6, 1e6), ("std", 1e-6, 1e6), ("crop_pct", 0.1, 1.0)):  # the limits of Preprocess
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if any(not low <= number <= high for number in numbers):
                raise ValueError(f"data.{name}: got {value}, expected numbers in {low:g} .. {high:g}")
        return self

    @property
    def is_remote(self) -> bool:
        """Whether opening the images may download them."""
        return (self.source == "torchvision" and self.download) or (self.source == "hf" and self.path is None)

    def label(self) -> str:
        """Name of the data set on cards."""
        if self.path is not None and self.name:
            return f"{self.name} (local copy)"
        return shareable_path(self.path, self.name) or self.name or self.source


class Local(Section):
    """Local views of multi-crop: additional, smaller views of each image. The loss treats them like the other views."""

    count: Annotated[int, Field(ge=1, le=32)]
    """Number of local views of each image."""
    size: ImageSize
    """Height and width in pixels. A ViT needs encoder.args.dynamic_img_size=true to accept a second size."""
    crop_scale: tuple[Positive, Positive] = (0.05, 0.3)
    """Smallest and largest share of the image area that a random resized crop takes."""


class Views(Section):
    """Random views of an image. Order of the steps: crop or resize, affine, colour jitter, greyscale, blur, solarize, equalize, flip, noise."""

    count: Annotated[int, Field(ge=1, le=16)] = 2
    """Number of views of each image in a step."""
    crop_scale: tuple[Positive, Positive] | None = (0.2, 1.0)
    """Smallest and largest share of the image area that a random resized crop takes; null resizes the whole image."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of the random crop."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest random rotation, in degrees, in either direction."""
    translate: Probability = 0.0
    """Largest random shift, as a share of the image size, in either direction."""
    zoom: tuple[Positive, Positive] = (1.0, 1.0)
    """Smallest and largest factor of the random zoom."""
    jitter: Probability = 0.8
    """Probability of colour jitter."""
    brightness: NonNegative = 0.4
    """Strength of the brightness change: a factor in 1 +- this."""
    contrast: NonNegative = 0.4
    """Strength of the contrast change: a factor in 1 +- this."""
    saturation: NonNegative = 0.2
    """Strength of the saturation change: a factor in 1 +- this."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Strength of the hue change: a shift in +- this, as a share of the colour circle."""
    grayscale: Probability = 0.2
    """Probability of conversion to greyscale."""
    blur: Probability = 0.0
    """Probability of Gaussian blur; its sigma is uniform in 0.1 .. 2 pixels."""
    solarize: Probability = 0.0
    """Probability of solarization, which inverts grey levels above 128."""
    equalize: Probability = 0.0
    """Probability of histogram equalization."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    noise: NonNegative = 0.0
    """Standard deviation of Gaussian noise added after normalisation."""
    start_size: ImageSize | None = None
    """Height and width in pixels of the views in the first epoch; they grow in multiples of 4 to data.image_size, which null gives to all epochs."""
    growth: Annotated[float, Field(gt=0, le=1)] = 0.75
    """views.start_size only: share of the epochs after which the views have data.image_size."""
    local: Local | None = None
    """Local views of multi-crop, a section of their own; null draws none."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        pairs = {name: getattr(self, name) for name in ("crop_scale", "crop_ratio", "zoom")}
        if self.local is not None:
            pairs["local.crop_scale"] = self.local.crop_scale
        if self.start_size is None and self.growth != Views.model_fields["growth"].default:
            raise ValueError(f"views.growth: {self.growth:g} has no meaning without views.start_size; give that too")
        for name, pair in pairs.items():
            share = name.endswith("crop_scale")
            if pair is not None and (pair[0] > pair[1] or (share and pair[1] > 1)):
                raise ValueError(f"views.{name}: expected [low, high] with low <= high{' <= 1' if share else ''}, got {list(pair)}")
        return self

    def size_at(self, epoch: int, epochs: float, full: int) -> int:
        """Return height and width of the views in an epoch.

        Args:
            epoch: number of the epoch, from 0.
            epochs: length of the run.
            full: data.image_size.

        Example:
            >>> [Views(start_size=16).size_at(epoch, 8, 32) for epoch in range(8)]
            [16, 16, 20, 24, 24, 28, 32, 32]
        """
        if self.start_size is None:
            return full
        grown = self.start_size + (full - self.start_size) * epoch / (self.growth * epochs)
        return full if grown >= full else max(self.start_size, int(grown) // 4 * 4)

    def describe(self) -> str:
        """Describe the views in one line, for cards."""
        parts = [
            f"{self.count} view{'s' if self.count > 1 else ''}"
            if self.local is None
            else f"{self.count} views and {self.local.count} local ones of {self.local.size} pixels",
            "whole image" if self.crop_scale is None else "crop of {:g} to {:g} of the area".format(*self.crop_scale),
        ]
        if self.rotate or self.translate or self.zoom != (1.0, 1.0):
            parts.append("affine (rotate {:g} degrees, translate {:g}, zoom {:g} to {:g})".format(self.rotate, self.translate, *self.zoom))
        if self.start_size is not None:
            parts.append(f"{self.start_size} pixels in the first epoch, all after {self.growth:.0%} of the epochs")
        if self.jitter:
            strengths = f"brightness {self.brightness:g}, contrast {self.contrast:g}, saturation {self.saturation:g}, hue {self.hue:g}"
            parts.append(f"colour jitter p = {self.jitter:g} ({strengths})")
        parts += [
            f"{name} p = {value:g}" for name in ("grayscale", "blur", "solarize", "equalize", "flip") if (value := getattr(self, name))
        ]
        return ", ".join(parts + ([f"noise {self.noise:g}"] if self.noise else []))


class Encoder(Section):
    """timm backbone and rectified projector."""

    backbone: str
    """Any timm model name, or resnet18_small, resnet34_small, resnet50_small, and the narrow resnet10_small_narrow and resnet18_small_narrow."""
    args: Annotated[dict[str, Any], BeforeValidator(parse_scalars)] = {}
    """Arguments of timm.create_model, such as {img_size: 32, patch_size: 4}."""
    pretrained: bool = False
    """Start from the pretrained weights of timm instead of random ones."""
    freeze_backbone: bool = False
    """Train the projector only; the backbone stays in evaluation mode."""
    cached_views: Count | None = None
    """Frozen backbone only: encode this many random views of each image once, keep the features in memory (at most data.cache_gb), and draw
    views.count of them in every step. Null encodes new views in every step."""
    dim: Annotated[int, Field(ge=1, le=1 << 20)] = 512
    """Dimension of the embedding z."""
    hidden_dim: Annotated[int, Field(ge=1, le=1 << 20)] = 512
    """Width of the hidden layers of the projector."""
    projector_depth: Annotated[int, Field(ge=1, le=64)] = 3
    """Number of linear layers of the projector; 1 is a single linear layer and the ReLU."""


class Reconstruction(Section):
    """Reconstruction of the backbone's features from z by a linear decoder, which is trained along with the encoder and then dropped. It keeps in z what the
    features tell of each image. Off unless a key of this section is given."""

    weight: Positive = 5.0
    """Weight of the term: mean squared error, where the features have mean 0 and variance 1 over the batch and all dimensions."""
    active: Annotated[tuple[Count, ...], Field(min_length=1)] = (2, 8, 32)
    """Numbers k: the features are reconstructed from the k largest values of z; mean over the numbers. encoder.dim or more means all values."""


class Target(Section):
    """Target distribution of z: the rectified generalized Gaussian RGN_p(mu, sigma). Give mu or density. Needed if and only if the objective
    has a target."""

    p: Positive = 1.0
    """Shape of the generalized Gaussian: 1 is Laplace, 2 is Gaussian."""
    mu: Finite | None = None
    """Location before rectification; a lower mu gives a sparser z."""
    density: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Expected fraction of non-zero values of z; mu is solved from it."""
    sigma: Literal["gn", "rgn"] | Positive = "gn"
    """Scale before rectification. gn: unit variance before rectification (default of the paper). rgn: unit variance after it. Or a number."""
    anneal: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps over which the density of the target goes from 0.5 to its value, at a constant ratio from step to step; 0 for none. Units
    stay alive at low densities."""
    hold: bool = False
    """Shift all biases of the last layer by one number, so that z has the density of the target: a little after every step, and exactly on training
    images at every evaluation. Also raise the biases of dimensions that no image of a batch activates."""

    @classmethod
    def drop_replaced(cls, values: dict[str, Any], overrides: Mapping[str, str]) -> None:
        """Remove mu if an override gives density, and the other way round; arguments as of `rlpjepa_zoo.objectives.base.Options.drop_replaced`."""
        for key, other in (("mu", "density"), ("density", "mu")):
            if key in overrides and other not in overrides:
                values.pop(other, None)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.mu is None) == (self.density is None):
            raise ValueError("target.mu: give exactly one of target.mu and target.density (set the other to null)")
        return self

    def law(self) -> tuple[float, float]:
        """Return (mu, sigma) before rectification."""
        import torch

        from ..distributions import RectifiedGeneralizedGaussian, mu_for_density, sigma_gn, sigma_rgn

        try:
            if self.sigma != "rgn":
                sigma = sigma_gn(self.p) if self.sigma == "gn" else float(self.sigma)
                mu = self.mu if self.mu is not None else mu_for_density(self.density or 0.5, self.p, sigma)
                return mu, sigma
            if self.mu is not None:
                return self.mu, sigma_rgn(self.p, self.mu)
            ratio = mu_for_density(self.density or 0.5, self.p, 1.0)  # the density fixes mu / sigma, and the variance then sigma
            variance = float(RectifiedGeneralizedGaussian(torch.tensor(ratio, dtype=torch.float64), 1.0, self.p).variance)
            if variance <= 0:
                raise ValueError(f"no scale gives unit variance at density {self.density} with p = {self.p:g}; use sigma: gn or a number")
            return ratio / math.sqrt(variance), 1 / math.sqrt(variance)
        except ValueError as error:
            raise RecipeError(f"target: {error}") from error

    def distribution(self) -> RectifiedGeneralizedGaussian:
        """Return the law of one coordinate of z."""
        from ..distributions import RectifiedGeneralizedGaussian

        mu, sigma = self.law()
        return RectifiedGeneralizedGaussian(mu, sigma, self.p)

    def at(self, progress: float) -> Target:
        """Return the target at a point of the training, for `anneal`.

        Args:
            progress: share of the steps that are done, in [0, 1].
        """
        if progress >= self.anneal:
            return self
        density = 0.5 ** (1 - progress / self.anneal) * self.density_in_theory() ** (progress / self.anneal)
        return self.model_copy(update={"density": density, "mu": None})

    def density_in_theory(self) -> float:
        """Return P(Y > 0) of the target."""
        if self.density is not None:  # what mu is solved from
            return self.density
        import torch

        from ..distributions import RectifiedGeneralizedGaussian

        mu, sigma = self.law()
        return float(RectifiedGeneralizedGaussian(torch.tensor(mu, dtype=torch.float64), sigma, self.p).l0)
