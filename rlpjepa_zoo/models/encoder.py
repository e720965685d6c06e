"""`SparseEncoder`: a timm backbone, a projector that ends in ReLU, and their evaluation preprocessing."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ..data.images import Row
from ..data.preprocess import Preprocess
from ..data.sources import open_images
from ..errors import NonFiniteError, UsageError
from ..hub.format import MEASURED, Projector
from ..ops.modules import as_weights, contents_key, make_projector, unwrapped
from ..ops.tensors import unit_rows
from ..sparse.columns import columns_of
from ..sparse.embeddings import SparseEmbeddings
from ..sparse.topk import Dial, between, keep_largest
from .base import Layers, PublishedModel, check_float_batch
from .inference import OnError, OutputOptions, source_batches

__all__ = ["EncoderConfig", "Output", "SparseEncoder"]


@dataclass(frozen=True)
class EncoderConfig:
    """Arguments that build the encoder again, and the record of its training.

    Attributes:
        architecture: timm name of the backbone.
        model_args: arguments of `timm.create_model`, without num_classes, which is 0.
        features: F, width of the backbone's pooled features.
        dim: D, width of the embedding.
        hidden_dim: H, width of the projector's hidden layers.
        projector_depth: linear layers of the projector; 1 is a single rectified layer, 3 is the paper's.
        preprocess: the evaluation preprocessing.
        info: JSON-able record of target, density and results; training fills it, the card shows it.
        recipe: YAML text of the recipe that trained it.
        dial: makes the embeddings sparser after training; None leaves them unchanged.
    """

    architecture: str
    features: int
    dim: int
    hidden_dim: int
    projector_depth: int
    preprocess: Preprocess
    model_args: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    dial: Dial | None = None


class Output(NamedTuple):
    """Dense backbone features (B, F) and sparse embeddings z (B, D)."""

    features: Tensor
    z: Tensor


class SparseEncoder(PublishedModel):
    """Images to sparse, non-negative embeddings. `create_encoder` and `load_encoder` make encoders.

    Attributes:
        backbone: timm model with num_classes = 0.
        projector: `nn.Sequential` that ends in ReLU.
        transform: PIL image -> tensor (3, H, W), the evaluation preprocessing that travels with the weights.
        config: `EncoderConfig`.

    Example:
        >>> import rlpjepa_zoo
        >>> enc = rlpjepa_zoo.create_encoder("test_resnet", dim=16, hidden_dim=32).eval()
        >>> z = enc(torch.zeros(2, 3, 64, 64))
        >>> tuple(z.shape), bool((z >= 0).all()), tuple(enc.features(torch.zeros(2, 3, 64, 64)).shape)
        ((2, 16), True, (2, 96))
    """

    noun = "encoder"
    config: EncoderConfig

    def __init__(self, backbone: nn.Module, projector: nn.Sequential, config: EncoderConfig, freeze_backbone: bool = False) -> None:
        super().__init__()
        self.backbone, self.projector, self.config = backbone, projector, config
        self.transform = config.preprocess.transform()
        self.freeze_backbone = freeze_backbone
        self._hashed: tuple[Any, str] | None = None
        if freeze_backbone:
            backbone.requires_grad_(False)
        self.train()

    def _steady(self) -> Sequence[nn.Module]:
        return [self.backbone] if self.freeze_backbone else []  # its batch statistics stay as they were

    def features(self, x: Tensor) -> Tensor:
        """Dense pooled backbone features.

        Args:
            x: (B, 3, H, W) float of any precision, preprocessed.

        Returns:
            (B, F), in the dtype the backbone computes in.
        """
        check_float_batch(x, UsageError, "preprocess images with enc.transform")
        return self.backbone(as_weights(x, self.backbone))

    def both(self, x: Tensor) -> Output:
        """Features and embeddings in one pass."""
        features = self.features(x)
        z = self.outputs(features)
        return Output(features, z if self.config.dial is None else self.config.dial(z))

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings z (B, D), >= 0 with exact zeros, of a preprocessed float batch x (B, 3, H, W)."""
        return self.both(x).z

    def outputs(self, features: Tensor) -> Tensor:
        """Codes (B, D) before the dial, from features (B, F)."""
        return self.projector(as_weights(features, self.projector))

    def before_relu(self, features: Tensor) -> Tensor:
        """Values (B, D) of the last layer before its ReLU, from features (B, F)."""
        return self.projector[:-1](as_weights(features, self.projector))

    @property
    def last_layer(self) -> nn.Linear:
        """The layer before the last ReLU."""
        return cast(nn.Linear, self.projector[-2])

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device

    def fingerprint(self) -> str:
        """Hex digest of weights, buffers, preprocessing and dial: two encoders with equal fingerprints give equal codes."""
        now = (self.config.preprocess, self.config.dial, contents_key(self._tensors().values()))
        if self._hashed is None or self._hashed[0] != now:  # hashing takes longer than embedding one image
            self._hashed = now, super().fingerprint()
        return self._hashed[1]

    # --- the dial --------------------------------------------------------------------------------------------------------------------

    def with_budget(self, k: int) -> SparseEncoder:
        """An encoder that keeps the k largest values of each image: at most k active dimensions. Weights are shared, not copied.

        Raises:
            UsageError: k is not in 1 .. D.
        """
        if not 1 <= k <= self.config.dim:
            raise UsageError(f"with_budget: expected 1 to {self.config.dim} active dimensions, got {k}")
        return self._dialled(Dial("top_k", int(k)))

    def with_density(
        self, density: float, mode: Literal["top_k", "threshold", "shift"] = "top_k", images: Any = None, **options: Any
    ) -> SparseEncoder:
        """An encoder with another density, without training; saved with the encoder. Weights are shared, not copied.

        Args:
            density: fraction of active dimensions, in (0, 1).
            mode: ``top_k`` keeps the round(density * D) largest values of each image, so all images have the same number of values.
                ``threshold`` keeps values of at least one number, which gives the density on `images` on average, so the number of values
                differs between images. ``shift`` subtracts one number from the biases of all units, as `target.hold` does, which gives the
                density on `images` on average, also a higher one.
            images: images to calibrate a threshold or shift on, as `embed` takes them; similar to later images.
            options: further arguments of `embed`, such as num_workers.

        Raises:
            UsageError: a density that is not in (0, 1) or, unless by a shift, above the encoder's own; no images for a threshold or shift.

        Example:
            >>> import rlpjepa_zoo
            >>> enc = rlpjepa_zoo.create_encoder("test_resnet", dim=100).with_density(0.05)
            >>> int((enc(torch.randn(8, 3, 64, 64)) > 0).sum(1).max())
            5
        """
        if mode not in (modes := ("top_k", "threshold", "shift")) or not 0 < density < 1:
            raise UsageError(f"with_density: expected a density between 0 and 1 and a mode of {modes}, got {density!r} and {mode!r}")
        top_k = Dial("top_k", max(1, round(density * self.config.dim)), float(density))
        own = (self.config.info.get("density") or {}).get("eval") if self.config.dial is None else None
        if mode == "top_k" and images is None:
            if own is not None and density > own:
                raise UsageError(f"with_density: {density:g} asked, but the encoder gives {own:.3g} by itself, and a dial only lowers it")
            return self._dialled(top_k)
        if images is None:
            raise UsageError(f"with_density: a {mode} is calibrated on images; give some, like those to come, or use mode 'top_k'")
        if changed := sorted({"max_active", "min_value", "normalize"} & options.keys()):
            raise UsageError(f"with_density: {changed[0]} changes codes after the {mode}; give it to embed")
        plain = self._dialled(None)
        codes = plain.embed(images, **options)
        if not 1 <= (keep := round(density * len(codes) * codes.dim)):
            raise UsageError(f"with_density: {density:g} of {len(codes)} x {codes.dim} values is less than one; give more images")
        if mode == "shift":
            plain.config.info["density"] = {"asked": float(density), "shift_images": len(codes)}
            if keep <= codes.nnz:
                return plain.shifted(between(codes.values, keep))
            layer = self.last_layer  # values below zero are those of the negative layer
            below = plain._with_last_layer(-layer.weight, -layer.bias).embed(images, **options)
            return plain.shifted(-between(below.values, len(codes) * codes.dim - keep))
        if keep > codes.nnz:
            own = f"the encoder gives {codes.l0:.3g} on these {len(codes)} images"
            raise UsageError(f"with_density: {density:g} asked, but {own}, and a dial only lowers it; mode 'shift' can raise it")
        if mode == "top_k":
            return self._dialled(top_k)
        return self._dialled(Dial("threshold", between(codes.values, keep), float(density), len(codes)))

    def shifted(self, shift: float) -> SparseEncoder:
        """An encoder with a number subtracted from all biases of the last layer. All other weights are shared."""
        return self._with_last_layer(self.last_layer.weight, self.last_layer.bias - shift)

    def _with_last_layer(self, weight: Tensor, bias: Tensor) -> SparseEncoder:
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        projector = nn.Sequential(*self.projector[:-2], layer, self.projector[-1])
        layer.training, projector.training = self.last_layer.training, self.projector.training
        twin = copy.copy(self)
        twin.__dict__ |= {"_hashed": None, "_modules": {**self._modules, "projector": projector}}
        return twin

    def _dialled(self, dial: Dial | None) -> SparseEncoder:
        """This encoder with another dial. Its record has no results, which were measured without that dial."""
        info = {k: v for k, v in self.config.info.items() if k not in MEASURED}
        info["density"] = {k: v for k, v in (info.get("density") or {}).items() if k in ("asked", "theory")}
        twin = copy.copy(self)
        twin.__dict__ |= {"_hashed": None, "config": dataclasses.replace(self.config, dial=dial, info=info)}
        return twin

    # --- embedding -------------------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def embed(
        self,
        images: Any,
        batch_size: int | None = None,
        num_workers: int = 4,
        max_active: int | None = None,
        progress: bool = False,
        on_error: OnError = "raise",
        failures: list[tuple[Any, str]] | None = None,
        *,
        min_value: float = 0.0,
        precision: Literal["float32", "bf16"] = "float32",
        normalize: bool = False,
        image_column: str | None = None,
        allow_paths: bool = False,
    ) -> SparseEmbeddings:
        """Sparse embeddings of many images, in input order, computed in evaluation mode; afterwards the mode is as before.

        Bit-equal to ``enc(x)`` of batches in the memory format channels_last; equal up to rounding to ``enc(x)`` in another format.

        Args:
            images: a folder, paths, PIL images, a Hugging Face dataset (also streamed), parquet or tar files (see
                `rlpjepa_zoo.data.sources.open_images`), a float tensor (B, 3, H, W) of any precision that is already preprocessed, or a uint8
                tensor (B, 3, H, W) of RGB pixels.
            batch_size: images in a batch, >= 1; None chooses by the image size, see `rlpjepa_zoo.models.inference.default_batch_size`.
                Embeddings of other batches are equal up to rounding.
            num_workers: threads that decode images; 0 decodes in the calling thread.
            max_active: keep only this many largest values of each row.
            progress: show a progress bar on stderr.
            on_error: at an unreadable image, ``raise``, or ``skip`` its row and append (id, reason) to `failures`.
            failures: list that receives the ids of skipped images and the reasons.
            min_value: values below this become zero.
            precision: ``bf16`` computes in bfloat16 (autocast), which is faster on many processors; codes differ by its rounding.
            normalize: rows of length one (L2), so that inner products are cosines.
            image_column, allow_paths: for tables of images, see `rlpjepa_zoo.data.sources.open_images`.

        Returns:
            `SparseEmbeddings` with the ids of the images (paths or row numbers), the class label and other columns of the source, and the
            encoder's fingerprint in `meta["model"]`; `meta["classes"]` is a JSON list of the class names, where known.

        Raises:
            DataError: no such images, or an unreadable one.
            NonFiniteError: the encoder gave NaN or infinity.

        Example:
            >>> import rlpjepa_zoo
            >>> from PIL import Image
            >>> enc = rlpjepa_zoo.create_encoder("test_resnet", dim=16)
            >>> enc.embed([Image.new("RGB", (80, 60)), Image.new("L", (40, 40))], max_active=4).shape
            (2, 16)
        """
        options = OutputOptions(max_active, min_value, precision, normalize)
        if not isinstance(images, Tensor):
            images = open_images(images, image_column=image_column, allow_paths=allow_paths, on_error=on_error)
        self._check_size(images)
        meta = {"model": self.fingerprint(), "architecture": self.config.architecture}
        if classes := getattr(images, "classes", None):
            meta["classes"] = json.dumps(classes)
        parts = []
        batches = source_batches(
            images, self.config.preprocess, self.device, batch_size=batch_size, num_workers=num_workers, on_error=on_error,
            fix="; leave such images out with on_error='skip' (--skip-bad)", progress="embed" if progress else None,
        )  # fmt: skip
        with self.evaluating(), closing(batches):
            for batch in batches:
                if failures is not None:
                    failures += batch.failures
                if batch.ids:
                    columns = columns_of([row.columns for row in batch.items if isinstance(row, Row)])
                    parts.append(SparseEmbeddings.from_dense(self.codes(batch.x, batch.ids[0], options), batch.ids, meta, columns))
        return SparseEmbeddings.concat(parts or [SparseEmbeddings.from_dense(np.zeros((0, self.config.dim)), meta=meta)])

    def codes(self, x: Tensor, first: Any, options: OutputOptions) -> Tensor:
        """Embeddings of one batch.

        Args:
            x: (B, 3, H, W) float of any precision, preprocessed.
            first: id of the first image, for the error message.
            options: values to keep, and precision.

        Returns:
            (B, D) float32.

        Raises:
            NonFiniteError: NaN or infinity among them.
        """
        x = x.to(self.device, memory_format=torch.channels_last)  # faster: benchmarks/embedding.py
        single = all(p.dtype == torch.float32 for p in self.parameters())  # others compute in their own precision
        with torch.autocast(x.device.type, torch.bfloat16, enabled=options.precision == "bf16" and single):
            z = self(x)
        z = z.float()
        if not torch.isfinite(z).all():
            raise NonFiniteError(
                f"the encoder gave NaN or infinity for the batch that starts at {first!r}; its weights are damaged or diverged"
            )
        if options.min_value > 0:
            z = torch.where(z >= options.min_value, z, torch.zeros_like(z))
        if options.max_active is not None:
            z = keep_largest(z, options.max_active)
        return unit_rows(z) if options.normalize else z

    # --- the published folder --------------------------------------------------------------------------------------------------------

    def _timm_model(self) -> Any:
        return unwrapped(self.backbone)

    def _layers(self, timm_model: Any) -> Layers:
        config = self.config
        return Layers(Projector(config.dim, config.hidden_dim, config.projector_depth), dial=config.dial)

    def _fresh(self, backbone: nn.Module) -> SparseEncoder:
        config = self.config
        return SparseEncoder(backbone, make_projector(config.features, config.hidden_dim, config.dim, config.projector_depth), config)
