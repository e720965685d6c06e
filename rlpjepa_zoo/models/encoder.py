"""`SparseEncoder`: a timm backbone, a projector that ends in ReLU, and the preprocessing that belongs to them."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn as nn
from torch import Tensor
from tqdm.auto import tqdm

from ..core import files as _files
from ..core import package
from ..data.images import Row, reason_with_id
from ..data.preprocess import Preprocess, Ready, batched, ready
from ..data.sources import open_images
from ..errors import DataError, NonFiniteError, OutputError, UsageError
from ..hub import card
from ..hub import format as hub_format
from ..hub import push as publish
from ..sparse.embeddings import SparseEmbeddings
from ..sparse.topk import Dial, keep_largest
from . import golden
from . import small_resnet as resnet
from .base import Served, digest

__all__ = ["OutputOptions", "EncoderConfig", "Output", "SparseEncoder", "make_projector"]


@dataclass(frozen=True)
class EncoderConfig:
    """All that is needed to build the encoder again, and what is known about it.

    Attributes:
        architecture: timm name of the backbone.
        model_args: arguments of `timm.create_model`, beyond num_classes = 0.
        features: F, width of the backbone's pooled features.
        dim: D, width of the embedding.
        hidden_dim: H, width of the projector's hidden layers.
        projector_depth: linear layers of the projector; 1 is a single rectified layer, 3 is the paper's.
        preprocess: the evaluation preprocessing.
        info: JSON-able record of target, density, results; filled by training, shown on the card.
        recipe: YAML text of the recipe that trained it.
        dial: makes the embeddings sparser than they were trained to be; None leaves them as they are.
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


@dataclass(frozen=True)
class OutputOptions:
    """What of each embedding is kept when many are made, and the precision they are made in.

    Attributes:
        max_active: at most this many largest values.
        min_value: no values below this.
        precision: ``float32`` or ``bf16``.

    Raises:
        UsageError: values out of range.
    """

    max_active: int | None = None
    min_value: float = 0.0
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.max_active is not None and self.max_active < 1:
            raise UsageError(f"max_active: expected >= 1, got {self.max_active}")
        if not 0 <= self.min_value < float("inf"):
            raise UsageError(f"min_value: expected a number >= 0, got {self.min_value}")
        if self.precision not in ("float32", "bf16"):
            raise UsageError(f"precision: expected 'float32' or 'bf16', got {self.precision!r}")


class Output(NamedTuple):
    """Dense backbone features (B, F) and sparse embeddings z (B, D)."""

    features: Tensor
    z: Tensor


def make_projector(features: int, hidden_dim: int, dim: int, depth: int) -> nn.Sequential:
    """(depth - 1) x [Linear, BatchNorm, ReLU], then Linear and ReLU: no normalisation before the last ReLU."""
    widths = [features] + [hidden_dim] * (depth - 1)
    layers: list[nn.Module] = []
    for inside, outside in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inside, outside), nn.BatchNorm1d(outside), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], dim), nn.ReLU())


class SparseEncoder(Served):
    """Images to sparse, non-negative embeddings. Made by `create_encoder` and `load_encoder` of `rlpjepa_zoo.models.pretrained`.

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

    def __init__(self, backbone: nn.Module, projector: nn.Sequential, config: EncoderConfig, freeze_backbone: bool = False) -> None:
        super().__init__()
        self.backbone, self.projector, self.config = backbone, projector, config
        self.transform = config.preprocess.transform()
        self.freeze_backbone = freeze_backbone
        self._known: tuple[Any, str] | None = None
        if freeze_backbone:
            backbone.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> SparseEncoder:
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()  # batch statistics stay as they were
        return self

    def features(self, x: Tensor) -> Tensor:
        """Dense pooled backbone features.

        Args:
            x: (B, 3, H, W) float, preprocessed.

        Returns:
            (B, F), in the dtype the backbone computes in.
        """
        if x.dim() != 4 or x.shape[1] != 3 or not x.is_floating_point():
            raise UsageError(
                f"expected a float batch (B, 3, H, W), got {x.dtype} of shape {tuple(x.shape)}; preprocess images with enc.transform"
            )
        return self.backbone(x)

    def both(self, x: Tensor) -> Output:
        """Features and embeddings in one pass."""
        features = self.features(x)
        z = self.projector(features)
        return Output(features, z if self.config.dial is None else self.config.dial(z))

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings z (B, D), >= 0 with exact zeros, of a float batch x (B, 3, H, W)."""
        return self.both(x).z

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device

    def fingerprint(self) -> str:
        """Hex digest of weights, preprocessing and dial: two encoders with equal fingerprints give the same codes."""
        tensors = sorted(self.state_dict().items())
        now = (self.config.preprocess, self.config.dial, *((t.data_ptr(), 0 if t.is_inference() else t._version) for _, t in tensors))
        if self._known is None or self._known[0] != now:  # hashing takes longer than embedding one image
            self._known = now, digest(self, self.config.preprocess, self.config.dial)
        return self._known[1]

    # --- the dial --------------------------------------------------------------------------------------------------------------------

    def with_budget(self, k: int) -> SparseEncoder:
        """The same encoder, whose embeddings keep each image's k largest values: at most k active dimensions. Weights are shared, not copied.

        Raises:
            UsageError: k is not in 1 .. D.
        """
        if not 1 <= k <= self.config.dim:
            raise UsageError(f"with_budget: expected 1 to {self.config.dim} active dimensions, got {k}")
        return self._dialled(Dial("top_k", int(k)))

    def with_density(
        self, density: float, mode: Literal["top_k", "threshold"] = "top_k", images: Any = None, **options: Any
    ) -> SparseEncoder:
        """The same encoder at a lower density, without training. Weights are shared, not copied; the dial is saved with the encoder.

        Args:
            density: wanted fraction of active dimensions, in (0, 1).
            mode: ``top_k`` keeps each image's round(density * D) largest values: all images alike. ``threshold`` keeps values above one
                number that gives the density on `images` on average: the density then adapts to the image.
            images: what a threshold is calibrated on, as `embed` takes them; images like those to come.
            options: further arguments of `embed`, such as num_workers.

        Raises:
            UsageError: a density that is not in (0, 1) or is above what the encoder gives by itself; no images for a threshold.

        Example:
            >>> import rlpjepa_zoo
            >>> enc = rlpjepa_zoo.create_encoder("test_resnet", dim=100).with_density(0.05)
            >>> int((enc(torch.randn(8, 3, 64, 64)) > 0).sum(1).max())
            5
        """
        if not 0 < density < 1 or mode not in ("top_k", "threshold"):
            raise UsageError(
                f"with_density: expected a density between 0 and 1 and mode 'top_k' or 'threshold', got {density!r} and {mode!r}"
            )
        own = (self.config.info.get("density") or {}).get("eval") if self.config.dial is None else None
        if mode == "top_k" and images is None:
            if own is not None and density > own:
                raise UsageError(f"with_density: {density:g} asked, but the encoder gives {own:.3g} by itself, and a dial only lowers it")
            return self._dialled(Dial("top_k", max(1, round(density * self.config.dim)), float(density)))
        if images is None:
            raise UsageError("with_density: a threshold is calibrated on images; give some, like those to come, or use mode 'top_k'")
        bare = self._dialled(None)
        found = bare.embed(images, **options)
        cells = len(found) * found.dim
        keep = round(density * cells)
        if not 1 <= keep <= found.nnz:
            raise UsageError(
                f"with_density: {density:g} asked, but the encoder gives {found.l0:.3g} on these {len(found)} images, and a dial only lowers it"
            )
        if mode == "top_k":
            return self._dialled(Dial("top_k", max(1, round(density * self.config.dim)), float(density)))
        least = float(np.partition(found.values, found.nnz - keep)[found.nnz - keep])
        return self._dialled(Dial("threshold", least, float(density), len(found)))

    def _dialled(self, dial: Dial | None) -> SparseEncoder:
        """This encoder behind another dial; what was measured without it is no longer said of it."""
        info = {k: v for k, v in self.config.info.items() if k != "results"}
        info["density"] = {k: v for k, v in (info.get("density") or {}).items() if k in ("asked", "theory")}
        twin = copy.copy(self)
        twin.__dict__ |= {"_known": None, "config": dataclasses.replace(self.config, dial=dial, info=info)}
        return twin

    # --- embedding -------------------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def embed(
        self,
        images: Any,
        batch_size: int = 256,
        num_workers: int = 4,
        max_active: int | None = None,
        progress: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        failures: list[tuple[Any, str]] | None = None,
        *,
        min_value: float = 0.0,
        precision: Literal["float32", "bf16"] = "float32",
    ) -> SparseEmbeddings:
        """Sparse embeddings of many images, in input order, computed in evaluation mode (the mode is put back afterwards).

        Equal to ``enc(x)`` of batches in the memory format channels_last, bit for bit; to any other, up to rounding.

        Args:
            images: a folder, paths, PIL images, a Hugging Face dataset (also streamed), parquet or tar files (see `rlpjepa_zoo.data.sources.open_images`), a
                `ImageRows`, or a float tensor (B, 3, H, W) that is already preprocessed.
            batch_size: images at a time, >= 1.
            num_workers: threads that decode images; 0 decodes in this one.
            max_active: keep only this many largest values of each row.
            progress: show a progress bar on stderr.
            on_error: what an unreadable image does: ``raise``, or ``skip`` its row and append (id, reason) to `failures`.
            failures: list that receives what was skipped.
            min_value: leave out values below this.
            precision: ``bf16`` computes in bfloat16 (autocast), which many processors do faster; codes differ by its rounding.

        Returns:
            `SparseEmbeddings` with the ids of the images (paths or row numbers) and the encoder's fingerprint in `meta["model"]`.

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
        if batch_size < 1 or (max_active is not None and max_active < 1) or on_error not in ("raise", "skip") or num_workers < 0:
            raise UsageError(
                f"embed: expected batch_size >= 1, max_active >= 1, num_workers >= 0, on_error 'raise' or 'skip', got "
                f"{batch_size}, {max_active}, {num_workers}, {on_error!r}"
            )
        budget = OutputOptions(max_active, min_value, precision)
        meta = {"model": self.fingerprint(), "architecture": self.config.architecture}
        parts = [SparseEmbeddings.from_dense(np.zeros((0, self.config.dim)), meta=meta)]
        with self.evaluating():
            if isinstance(images, Tensor):
                if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
                    raise DataError(
                        f"expected a float tensor (B, 3, H, W), got {images.dtype} of shape {tuple(images.shape)}; pass PIL images for uint8 pixels"
                    )
                for start in tqdm(range(0, len(images), batch_size), desc="embed", unit="batch", disable=not progress):
                    x = images[start : start + batch_size]
                    parts.append(SparseEmbeddings.from_dense(self.codes(x, start, budget), list(range(start, start + len(x))), meta))
                return SparseEmbeddings.concat(parts if len(parts) == 1 else parts[1:])
            rows = open_images(images)
            bar = tqdm(total=rows.length, desc="embed", unit="image", disable=not progress)
            groups = ready(batched(rows.rows(0), batch_size), lambda row: row.read(), self.config.preprocess, num_workers)
            with bar, closing(groups):
                for group in groups:
                    ids = [group.items[i].id for i in group.good]
                    self.refused(group, on_error, failures)
                    if ids:
                        x = self.config.preprocess.normalised(group.pixels.to(self.device))
                        parts.append(SparseEmbeddings.from_dense(self.codes(x, ids[0], budget), ids, meta))
                    bar.update(len(group.items))
        return SparseEmbeddings.concat(parts if len(parts) == 1 else parts[1:])

    def codes(self, x: Tensor, first: Any, budget: OutputOptions) -> Tensor:
        """Embeddings (B, D) float32 of preprocessed images, within a budget; `first` names the batch in errors.

        Raises:
            NonFiniteError: NaN or infinity among them.
        """
        x = x.to(self.device, memory_format=torch.channels_last)  # faster: benchmarks/embedding.py
        with torch.autocast(x.device.type, torch.bfloat16, enabled=budget.precision == "bf16"):
            z = self(x)
        z = z.float()
        if not torch.isfinite(z).all():
            raise NonFiniteError(
                f"the encoder gave NaN or infinity for the batch that starts at {first!r}; its weights are damaged or diverged"
            )
        if budget.min_value > 0:
            z = torch.where(z >= budget.min_value, z, torch.zeros_like(z))
        return z if budget.max_active is None else keep_largest(z, budget.max_active)

    @staticmethod
    def refused(group: Ready[Row], on_error: str, failures: list[tuple[Any, str]] | None) -> None:
        """Raise for, or note, images of a group that cannot be read."""
        for i, reason in group.bad:
            name = group.items[i].id
            reason = reason_with_id(name, reason)
            if on_error == "raise":
                raise DataError(f"{reason}; leave such images out with on_error='skip' (--skip-bad)")
            if failures is not None:
                failures.append((name, reason))

    # --- the published folder --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, path: str | Path, recipe: str | None = None, info: Mapping[str, Any] | None = None, name: str = "owner/repo"
    ) -> Path:
        """Write the published folder (see `rlpjepa_zoo.hub.format`): timm's format plus projector, golden codes and card.

        Args:
            path: folder; made if missing. Its own files of an earlier save are replaced, others are left alone.
            recipe: YAML text that replaces `config.recipe`.
            info: JSON-able record that replaces `config.info`.
            name: what the examples on the card load.

        Raises:
            OutputError: the folder cannot be written.
            NonFiniteError: a weight is NaN or infinite.
        """
        return hub_format.write_folder(path, self.contents(recipe, info, name))

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        recipe: str | None = None,
        info: Mapping[str, Any] | None = None,
        *,
        tag: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> str:
        """Publish on the Hugging Face Hub in one commit that holds only what changed; returns the address of the commit or pull request.

        Args:
            repo_id: ``"owner/name"``; made if missing.
            private: visibility, which an existing repository must have; when None, any, and a new one is made as the Hub does by default.
            revision: branch to commit to; made if missing.
            token: Hub token with write permission; the stored login when None.
            recipe, info: those of `save_pretrained`.
            tag: name for the commit.
            create_pr: open a pull request instead.
            commit_message: of the commit.

        Raises:
            UsageError: a malformed name or contradictory options.
            HubError: one line with the mend.
        """
        contents = self.contents(recipe, info, repo_id)
        return publish.push(
            contents, repo_id, private=private, revision=revision, tag=tag, create_pr=create_pr, message=commit_message, token=token
        ).url

    def contents(self, recipe: str | None = None, info: Mapping[str, Any] | None = None, name: str = "owner/repo") -> dict[str, bytes]:
        """The files of the published folder; arguments as of `save_pretrained`."""
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
        if bad:
            raise NonFiniteError(f"{bad[0]} holds NaN or infinity; an encoder like that is not saved")
        other = [k for k, v in state.items() if v.is_floating_point() and v.dtype != torch.float32]
        if other:
            raise UsageError(f"{other[0]} is {state[other[0]].dtype}; encoders are published in float32, so call .float() first")
        config = self._timm_config()
        config.get("model_args", {}).pop("num_classes", None)  # transformers' AutoModel passes it itself
        info = card.checked(self.config.info if info is None else info)
        card.set_license(config, info.get("license"))
        config[hub_format.BLOCK] = {
            "name": name,
            "projector": {"dim": self.config.dim, "hidden_dim": self.config.hidden_dim, "depth": self.config.projector_depth},
            "preprocess": dataclasses.asdict(self.config.preprocess),
            "needs_package": self.config.architecture in resnet.SMALL_RESNETS,
            "fingerprint": self.fingerprint(),
            **({} if self.config.dial is None else {"dial": self.config.dial.saved()}),
            "info": info,
            "versions": info.get("versions") or package.versions(),
        }
        files: dict[str, bytes] = {
            "model.safetensors": _pack({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}),
            "head.safetensors": _pack({k.removeprefix("projector."): v for k, v in state.items() if k.startswith("projector.")}),
            "golden.safetensors": _pack(golden.make(self)),
            **card.files(config, name),
        }
        recipe = self.config.recipe if recipe is None else recipe
        if recipe is not None:
            files["recipe.yaml"] = recipe.encode()
        return hub_format.seal(files, config)

    def _timm_config(self) -> dict[str, Any]:
        """config.json as timm writes it."""
        try:
            with tempfile.TemporaryDirectory() as scratch:
                twin = copy.deepcopy(self.backbone).cpu().to(memory_format=torch.contiguous_format)  # safetensors takes no channels_last
                timm.models.save_for_hf(
                    twin, scratch, safe_serialization=True, data_config=self.config.preprocess.data_config(),
                    model_config={"pretrained_cfg": {"tag": "rlpjepa"}},
                )  # fmt: skip
                return _files.parse_json((Path(scratch) / "config.json").read_bytes(), "config.json")
        except OSError as error:
            raise OutputError(f"{tempfile.gettempdir()}: cannot write: {error.strerror or error}") from error
        except ValueError as error:  # an argument such as act_layer=nn.GELU
            raise UsageError(f"the backbone cannot be described in config.json: {error}") from error


def _pack(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata={"format": "pt"})
