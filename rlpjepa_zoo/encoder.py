"""`SparseEncoder`: a timm backbone, a projector that ends in ReLU, and the preprocessing that belongs to them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from . import card, folder, hub, images, resnet, streams, zoo
from .errors import DataError, ModelError, NonFiniteError, OutputError, UsageError, did_you_mean, first_line
from .preprocess import Preprocess, preprocessed
from .sparse import SparseEmbeddings

__all__ = ["EncoderConfig", "Output", "Preprocess", "SparseEncoder", "create_encoder", "load_encoder"]


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


class SparseEncoder(nn.Module):
    """Images to sparse, non-negative embeddings. Made by `create_encoder` and `load_encoder`.

    Attributes:
        backbone: timm model with num_classes = 0.
        projector: `nn.Sequential` that ends in ReLU.
        transform: PIL image -> tensor (3, H, W), the evaluation preprocessing that travels with the weights.
        config: `EncoderConfig`.

    Example:
        >>> enc = create_encoder("test_resnet", dim=16, hidden_dim=32).eval()
        >>> z = enc(torch.zeros(2, 3, 64, 64))
        >>> tuple(z.shape), bool((z >= 0).all()), tuple(enc.features(torch.zeros(2, 3, 64, 64)).shape)
        ((2, 16), True, (2, 96))
    """

    def __init__(self, backbone: nn.Module, projector: nn.Sequential, config: EncoderConfig, freeze_backbone: bool = False) -> None:
        super().__init__()
        self.backbone, self.projector, self.config = backbone, projector, config
        self.transform = config.preprocess.transform()
        self.freeze_backbone = freeze_backbone
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
        return Output(features, self.projector(features))

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings z (B, D), >= 0 with exact zeros, of a float batch x (B, 3, H, W)."""
        return self.both(x).z

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode for a while; every module gets its own mode back."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device

    def fingerprint(self) -> str:
        """Hex digest of weights and preprocessing: two encoders with equal fingerprints give the same codes."""
        digest = hashlib.blake2b(repr(self.config.preprocess).encode(), digest_size=16)
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # --- embedding -------------------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def embed(
        self,
        images: Any,
        batch_size: int = 256,
        num_workers: int = 0,
        max_active: int | None = None,
        progress: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        failures: list[tuple[Any, str]] | None = None,
    ) -> SparseEmbeddings:
        """Sparse embeddings of many images, in input order, computed in evaluation mode (the mode is put back afterwards).

        Args:
            images: a folder, paths, PIL images, a Hugging Face dataset, or a float tensor (B, 3, H, W) that is already preprocessed.
            batch_size: images at a time, >= 1.
            num_workers: processes that decode images; 0 decodes in this one.
            max_active: keep only this many largest values of each row.
            progress: show a progress bar on stderr.
            on_error: what an unreadable image does: ``raise``, or ``skip`` its row and append (id, reason) to `failures`.
            failures: list that receives what was skipped.

        Returns:
            `SparseEmbeddings` with the ids of the images (paths or row numbers) and the encoder's fingerprint in `meta["model"]`.

        Raises:
            DataError: no such images, or an unreadable one.
            NonFiniteError: the encoder gave NaN or infinity.

        Example:
            >>> enc = create_encoder("test_resnet", dim=16)
            >>> enc.embed([Image.new("RGB", (80, 60)), Image.new("L", (40, 40))], max_active=4).shape
            (2, 16)
        """
        if batch_size < 1 or (max_active is not None and max_active < 1) or on_error not in ("raise", "skip"):
            raise UsageError(
                f"embed: expected batch_size >= 1, max_active >= 1, on_error 'raise' or 'skip', got {batch_size}, {max_active}, {on_error!r}"
            )
        meta = {"model": self.fingerprint(), "architecture": self.config.architecture}
        parts = [SparseEmbeddings.from_dense(np.zeros((0, self.config.dim)), meta=meta)]
        found = self._batches(images, batch_size, num_workers, progress, on_error, failures)
        with self.evaluating(), closing(found):
            for ids, x in found:
                z = self(x.to(self.device)).float()
                if not torch.isfinite(z).all():
                    raise NonFiniteError(
                        f"the encoder gave NaN or infinity for the batch that starts at {ids[0]!r}; its weights are damaged or diverged"
                    )
                part = SparseEmbeddings.from_dense(z, ids, meta)
                parts.append(part if max_active is None else part.top_k(max_active))
        return SparseEmbeddings.concat(parts if len(parts) == 1 else parts[1:])

    def _batches(
        self, source: Any, batch_size: int, num_workers: int, progress: bool, on_error: str, failures: list[tuple[Any, str]] | None
    ) -> Generator[tuple[list[Any], Tensor], None, None]:
        if isinstance(source, Tensor):
            if source.dim() != 4 or source.shape[1] != 3 or not source.is_floating_point():
                raise DataError(
                    f"expected a float tensor (B, 3, H, W), got {source.dtype} of shape {tuple(source.shape)}; pass PIL images for uint8 pixels"
                )
            for start in tqdm(range(0, len(source), batch_size), desc="embed", unit="batch", disable=not progress):
                rows = source[start : start + batch_size]
                yield list(range(start, start + len(rows))), rows
            return
        opened = images.open_images(source)
        loader = preprocessed(opened, self.transform, batch_size, num_workers)
        with tqdm(total=len(opened), desc="embed", unit="image", disable=not progress) as bar, images.running(loader) as batches:
            for items in batches:
                bar.update(len(items))
                for i, _, reason in items:
                    if reason is not None and on_error == "raise":
                        raise DataError(f"{reason}; leave such images out with on_error='skip' (--skip-bad)")
                    if reason is not None and failures is not None:
                        failures.append((opened.ids[i], reason))
                good = [(i, x) for i, x, reason in items if reason is None]
                if good:
                    yield [opened.ids[i] for i, _ in good], torch.stack([x for _, x in good])

    # --- the published folder --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, path: str | Path, recipe: str | None = None, info: Mapping[str, Any] | None = None, name: str = "owner/repo"
    ) -> Path:
        """Write the published folder (see `rlpjepa_zoo.folder`): timm's format plus projector, golden codes and card.

        Args:
            path: folder; made if missing. Its own files of an earlier save are replaced, others are left alone.
            recipe: YAML text that replaces `config.recipe`.
            info: JSON-able record that replaces `config.info`.
            name: what the examples on the card load.

        Raises:
            OutputError: the folder cannot be written.
            NonFiniteError: a weight is NaN or infinite.
        """
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
        if bad:
            raise NonFiniteError(f"{bad[0]} holds NaN or infinity; an encoder like that is not saved")
        other = [k for k, v in state.items() if v.is_floating_point() and v.dtype != torch.float32]
        if other:
            raise UsageError(f"{other[0]} is {state[other[0]].dtype}; encoders are published in float32, so call .float() first")
        config = self._timm_config()
        config.get("model_args", {}).pop("num_classes", None)  # transformers' AutoModel passes it itself
        config[folder.BLOCK] = {
            "format": folder.FORMAT,
            "projector": {"dim": self.config.dim, "hidden_dim": self.config.hidden_dim, "depth": self.config.projector_depth},
            "preprocess": dataclasses.asdict(self.config.preprocess),
            "needs_package": self.config.architecture in resnet.SMALL_RESNETS,
            "fingerprint": self.fingerprint(),
            "info": dict(self.config.info if info is None else info),
            "versions": zoo.versions(),
        }
        files = {
            "model.safetensors": _pack({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}),
            "head.safetensors": _pack({k.removeprefix("projector."): v for k, v in state.items() if k.startswith("projector.")}),
            "golden.safetensors": _pack(_golden(self)),
            "README.md": card.render(config, name).encode(),
        }
        recipe = self.config.recipe if recipe is None else recipe
        if recipe is not None:
            files["recipe.yaml"] = recipe.encode()
        return folder.write_folder(path, files, config)

    def _timm_config(self) -> dict[str, Any]:
        """config.json as timm writes it."""
        try:
            with tempfile.TemporaryDirectory() as scratch:
                twin = copy.deepcopy(self.backbone).cpu().to(memory_format=torch.contiguous_format)  # safetensors takes no channels_last
                timm.models.save_for_hf(
                    twin, scratch, safe_serialization=True, data_config=self.config.preprocess.data_config(),
                    model_config={"pretrained_cfg": {"tag": "rlpjepa", "license": "apache-2.0"}},
                )  # fmt: skip
                return folder.parse_json((Path(scratch) / "config.json").read_bytes(), "config.json")
        except OSError as error:
            raise OutputError(f"{tempfile.gettempdir()}: cannot write: {error.strerror or error}") from error
        except ValueError as error:  # an argument such as act_layer=nn.GELU
            raise UsageError(f"the backbone cannot be described in config.json: {error}") from error

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        recipe: str | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> str:
        """Save and upload to the Hugging Face Hub in one commit; returns the commit's address.

        Args:
            repo_id: ``"owner/name"``; made if missing.
            private: of a new repository.
            revision: branch to commit to; made if missing.
            token: Hub token with write permission; the stored login when None.
            recipe, info: those of `save_pretrained`.

        Raises:
            HubError: one line with the mend.
        """
        with tempfile.TemporaryDirectory() as scratch:
            published = self.save_pretrained(Path(scratch) / "encoder", name=repo_id, recipe=recipe, info=info)
            return hub.push(published, repo_id, private=private, revision=revision, token=token)


def _pack(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata={"format": "pt"})


# --- golden codes --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _golden(encoder: SparseEncoder) -> dict[str, Tensor]:
    """Two images (one smooth, one noise) larger than the input and not square, and what the encoder makes of them in float32."""
    encoder = copy.deepcopy(encoder).float().cpu()  # on a GPU, TF32 convolutions differ by more than loading allows
    height, width = (s + s // 4 for s in encoder.config.preprocess.size)
    rows, columns = np.mgrid[0:height, 0 : width + 8] / max(height, width)
    smooth = np.stack([rows, columns, (np.sin(9 * rows) * np.cos(7 * columns) + 1) / 2], -1) * 200
    noise = torch.rand(height, width + 8, 3, generator=streams.generator(0, "golden")).numpy() * 255
    pixels = torch.from_numpy(np.stack([smooth, noise]).round().clip(0, 255).astype(np.uint8))
    inputs = torch.stack([encoder.transform(Image.fromarray(p.numpy())) for p in pixels])
    features, z = _evaluate(encoder, inputs)
    return {"images": pixels, "inputs": inputs, "features": features, "codes": z}


def _evaluate(encoder: SparseEncoder, inputs: Tensor) -> Output:
    with encoder.evaluating(), torch.no_grad(), torch.autocast(encoder.device.type, enabled=False):
        out = encoder.both(inputs.to(encoder.device))
    return Output(out.features.float().cpu(), out.z.float().cpu())


def _check_golden(encoder: SparseEncoder, golden: dict[str, Tensor], where: Path) -> None:
    """Refuse an encoder that does not reproduce its codes, and say which station differs."""
    missing = {"images", "inputs", "features", "codes"} - set(golden)
    if missing:
        raise ModelError(f"{where}: no tensor '{min(missing)}'")
    pixels, size = golden["images"], encoder.config.preprocess.size
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[-1] != 3 or not len(pixels):
        raise ModelError(f"{where}: images: expected uint8 (n, H, W, 3) with n >= 1, got {pixels.dtype} of shape {tuple(pixels.shape)}")
    inputs = torch.stack([encoder.transform(Image.fromarray(p.numpy())) for p in pixels])
    if golden["inputs"].shape != (len(pixels), 3, *size) or not golden["inputs"].is_floating_point():
        raise ModelError(f"{where}: inputs: expected floats of shape {(len(pixels), 3, *size)}, got {tuple(golden['inputs'].shape)}")
    features, z = _evaluate(encoder, golden["inputs"])
    for station, got, expected, tolerance in (
        ("preprocessing", inputs, golden["inputs"], 0.05),  # two grey levels of 255: decoders and resizers differ by that
        ("backbone features", features, golden["features"], 1e-3),
        ("codes", z, golden["codes"], 1e-3),
    ):
        if got.shape != expected.shape:
            raise ModelError(f"{where}: {station} have shape {tuple(got.shape)}, the saved ones {tuple(expected.shape)}")
        error = float((got - expected).abs().max()) / max(1.0, float(expected.abs().max()))
        if not error <= tolerance:
            raise ModelError(
                f"{where}: {station} differ from the saved ones by {error:.2g} (allowed {tolerance:g}); other versions of torch, timm or Pillow?"
            )


# --- making and loading --------------------------------------------------------------------------------------------------------------


def create_encoder(
    name: str,
    dim: int = 512,
    hidden_dim: int = 512,
    pretrained: bool = False,
    *,
    projector_depth: int = 3,
    freeze_backbone: bool = False,
    preprocess: Preprocess | None = None,
    **timm_kwargs: Any,
) -> SparseEncoder:
    """A timm backbone with a fresh rectified projector, in training mode.

    Args:
        name: any timm name (``"resnet50"``, ``"vit_small_patch16_224.augreg_in1k"``, ``"hf-hub:owner/repo"``), or a small-image ResNet of
            this package: ``resnet18_small``, ``resnet34_small``, ``resnet50_small``, ``resnet10_small_narrow``.
        dim: D, width of the embedding, >= 1.
        hidden_dim: H, width of the projector's hidden layers, >= 1.
        pretrained: load timm's weights for the name.
        projector_depth: linear layers of the projector, >= 1.
        freeze_backbone: no gradient, and evaluation mode, for the backbone.
        preprocess: evaluation preprocessing; what timm says of the backbone when None.
        timm_kwargs: arguments of `timm.create_model`, such as ``img_size=32, patch_size=4``.

    Raises:
        ModelError: unknown name (with the nearest), or arguments that the backbone does not take.
        UsageError: dim, hidden_dim or projector_depth below 1.

    Example:
        >>> create_encoder("resnet10_small_narrow", dim=64, hidden_dim=64).config.features
        256
    """
    for argument, value in (("dim", dim), ("hidden_dim", hidden_dim), ("projector_depth", projector_depth)):
        if value < 1:
            raise UsageError(f"{argument}: expected >= 1, got {value}")
    backbone = _create_backbone(name, pretrained, timm_kwargs)
    features = int(backbone.head_hidden_size)
    config = EncoderConfig(
        architecture=backbone.pretrained_cfg.get("architecture", name),
        features=features, dim=dim, hidden_dim=hidden_dim, projector_depth=projector_depth,
        preprocess=preprocess or Preprocess.of(backbone, timm_kwargs.get("img_size")), model_args=dict(timm_kwargs),
    )  # fmt: skip
    return SparseEncoder(backbone, make_projector(features, hidden_dim, dim, projector_depth), config, freeze_backbone)


def _create_backbone(name: str, pretrained: bool, timm_kwargs: dict[str, Any]) -> Any:
    if timm_kwargs.get("in_chans", 3) != 3:
        raise ModelError(f"in_chans: images are RGB, so it must be 3, got {timm_kwargs['in_chans']!r}")
    if timm_kwargs.get("global_pool", "avg") in ("", None, False):
        raise ModelError("global_pool: the projector needs pooled features, so it must not be empty")
    if timm_kwargs.get("features_only"):
        raise ModelError("features_only gives feature maps; the projector needs pooled features, so leave it out")
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise ModelError(f"backbone '{name}' is not a timm model.{did_you_mean(name.split('.')[0], timm.list_models())}")
    try:
        backbone = timm.create_model(name, pretrained=pretrained, num_classes=0, **timm_kwargs)
    except Exception as error:
        reason = first_line(error)
        arguments = ", ".join(f"{k}={v!r}" for k, v in {"pretrained": pretrained, **timm_kwargs}.items())
        raise ModelError(f"backbone '{name}' with {arguments}: {reason}") from error
    return backbone


def load_encoder(
    source: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> SparseEncoder:
    """An encoder from the zoo, the Hub or a folder, verified, in evaluation mode.

    Every file is compared with its sha256 in config.json, and the golden images must give their golden codes.

    Args:
        source: zoo name (see `list_encoders`), ``"hf-hub:owner/repo[@revision]"``, ``"owner/repo"``, ``"local-dir:path"`` or a folder.
        revision: branch, tag or commit on the Hub.
        token: Hub token for private repositories.
        cache_dir: where downloads are kept.
        device: where the encoder goes.

    Raises:
        UsageError: a name that is none of these.
        ModelError: damaged, foreign or newer files; the message names the file.
        HubError: the Hub refused or cannot be reached.
    """
    path = hub.resolve(source, revision, token, cache_dir)
    config = folder.read_config(path)
    folder.verify(path, config)
    block = config[folder.BLOCK]
    try:
        saved: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in block["preprocess"].items()}
        preprocess = Preprocess(**saved)
        head = {
            "dim": block["projector"]["dim"],
            "hidden_dim": block["projector"]["hidden_dim"],
            "projector_depth": block["projector"]["depth"],
        }
        for key, top in (("dim", 2**20), ("hidden_dim", 2**20), ("projector_depth", 64)):
            if type(head[key]) is not int or not 1 <= head[key] <= top:
                raise ValueError(f"{key}: expected an integer in 1 .. {top}, got {head[key]!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path}/config.json: {folder.BLOCK}.preprocess or .projector is not what this version expects ({error})"
        ) from error
    if ":" in config["architecture"]:
        raise ModelError(f"{path}/config.json: architecture '{config['architecture']}' points to another model; expected a plain timm name")
    model_args = config.get("model_args", {})
    reserved = {*inspect.signature(create_encoder).parameters, "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
    if reserved & set(model_args):
        raise ModelError(f"{path}/config.json: model_args: '{min(reserved & set(model_args))}' is not an argument of a backbone")
    encoder = create_encoder(config["architecture"], preprocess=preprocess, **head, **model_args)
    text = (path / "recipe.yaml").read_text("utf-8", "replace") if "recipe.yaml" in block["files"] else None
    encoder.config = dataclasses.replace(encoder.config, info=block.get("info", {}), recipe=text)
    _load_weights(encoder.backbone, path / "model.safetensors")
    _load_weights(encoder.projector, path / "head.safetensors")
    encoder.eval()
    _check_golden(encoder, _read(path / "golden.safetensors"), path / "golden.safetensors")
    return encoder.to(device)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error})") from error


def _load_weights(module: nn.Module, path: Path) -> None:
    found, expected = _read(path), module.state_dict()
    for what, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            raise ModelError(f"{path}: {what} tensors: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"{path}: {name} holds NaN or infinity")
    module.load_state_dict(found)
