"""Create encoders: any timm backbone with a new rectified projector. Untrusted config.json files are checked before memory is used."""

from __future__ import annotations

import inspect
import json
import math
import operator
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook

from ..core.files import MAX_JSON, parse_json
from ..core.source import ModelSource
from ..data.preprocess import Preprocess
from ..errors import ModelError, UsageError, ZooError, did_you_mean, first_line
from ..hub.card import MOST_NOTES, Start
from ..hub.download import fetch
from ..hub.format import BACKBONE, CONFIG, NOTICE, Projector
from ..ops.modules import make_projector
from ..ops.tensors import tensor_shapes
from .encoder import EncoderConfig, SparseEncoder

__all__ = [
    "BUILDING",
    "bounded_construction",
    "create_encoder",
    "float32_default",
    "fresh_copy",
    "pretraining_data",
    "refused_arguments",
    "validate_arguments",
]

BUILDING = threading.Lock()
"""Held while a model is built with a seeded global generator and a changed default dtype, which all threads share."""


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
    """A timm backbone with a new rectified projector, in training mode.

    Args:
        name: any timm name (``"resnet50"``, ``"vit_small_patch16_224.augreg_in1k"``, ``"hf-hub:owner/repo"``), or a small-image ResNet of
            this package: ``resnet18_small``, ``resnet34_small``, ``resnet50_small``, ``resnet10_small_narrow``,
            ``resnet18_small_narrow``. A prefix ``timm:`` is ignored.
        dim: D, width of the embedding, 1 .. 2^20.
        hidden_dim: H, width of the projector's hidden layers, 1 .. 2^20.
        pretrained: load timm's weights for the name.
        projector_depth: linear layers of the projector, 1 .. 64.
        freeze_backbone: no gradient, and evaluation mode, for the backbone.
        preprocess: evaluation preprocessing; timm's for the backbone when None.
        timm_kwargs: arguments of `timm.create_model`, such as ``img_size=32, patch_size=4``.

    Whatever is made here can be saved and loaded again: sizes and arguments that a load would refuse are refused.

    Raises:
        ModelError: unknown name (with the nearest), or arguments that the backbone does not take or that config.json cannot hold.
        UsageError: dim, hidden_dim or projector_depth out of range.

    Example:
        >>> create_encoder("resnet10_small_narrow", dim=64, hidden_dim=64).config.features
        256
    """
    sizes = _projector_sizes(dim, hidden_dim, projector_depth)
    source = ModelSource.parse(name, timm=True)
    name = source.timm_name
    arguments = _as_saved(timm_kwargs, f"backbone '{name}'")
    backbone = _backbone(source, pretrained, arguments)
    try:
        features = int(backbone.head_hidden_size if hasattr(backbone, "head_hidden_size") else backbone.num_features)
        preprocess = preprocess or Preprocess.of(backbone, arguments.get("img_size"))
        architecture = backbone.pretrained_cfg.get("architecture") or name
    except AttributeError as error:  # of a module that is registered with timm but lacks what timm's models have
        raise ModelError(f"backbone '{name}': a timm model is to have num_features and pretrained_cfg: {first_line(error)}") from error
    except (KeyError, TypeError, ValueError) as error:  # of an untrusted config.json
        raise ModelError(f"backbone '{name}': its preprocessing cannot be used: {first_line(error)}") from error
    config = EncoderConfig(
        architecture=architecture, features=features, dim=sizes.dim, hidden_dim=sizes.hidden_dim, projector_depth=sizes.depth,
        preprocess=preprocess, model_args=arguments, info=_start_record(source, backbone.pretrained_cfg if pretrained else None, freeze_backbone),
    )  # fmt: skip
    projector = make_projector(features, sizes.hidden_dim, sizes.dim, sizes.depth)
    return SparseEncoder(backbone, projector, config, freeze_backbone)


def _projector_sizes(dim: Any, hidden_dim: Any, depth: Any) -> Projector:
    """Sizes within the limits of the published format, as plain integers."""
    try:
        return Projector(*(operator.index(value) for value in (dim, hidden_dim, depth)))
    except TypeError as error:
        raise UsageError(f"dim, hidden_dim, projector_depth: expected integers, got {dim!r}, {hidden_dim!r}, {depth!r}") from error
    except ValueError as error:
        raise UsageError(str(error).replace("depth:", "projector_depth:", 1)) from error


def _as_saved(arguments: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of a backbone as config.json gives them back.

    Raises:
        ModelError: names, types or numbers that a load would refuse.
    """
    for key, value in arguments.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            fix = "expected text, finite numbers, booleans, lists or objects, such as act_layer='gelu'"
            raise ModelError(f"{where}: {key}: config.json cannot hold {str(value)[:60]} ({type(value).__name__}); {fix}") from error
    plain: dict[str, Any] = json.loads(json.dumps(arguments))
    validate_arguments(plain, where)
    return plain


_DATA = {
    "in1k": "ImageNet-1k", "in12k": "ImageNet-12k", "in21k": "ImageNet-21k", "in22k": "ImageNet-22k", "inw21k": "ImageNet-W21k",
    "inat21": "iNaturalist 2021", "jft": "JFT-300M", "lvd142m": "LVD-142M", "lvd1689m": "LVD-1689M", "laion2b": "LAION-2B",
    "laion400m": "LAION-400M", "laiona": "LAION-Aesthetic", "webli": "WebLI", "datacompxl": "DataComp-XL", "datacomp1b": "DataComp-1B",
    "dfndr2b": "DFNDR-2B", "dfn2b": "DFN-2B", "dfn5b": "DFN-5B", "metaclip": "MetaCLIP", "metaclip2": "MetaCLIP 2", "merged2b": "Merged-2B",
    "openai": "the image-text pairs of OpenAI's CLIP", "yfcc15m": "YFCC-15M", "yfcc100m": "YFCC-100M", "ig1b": "Instagram images",
}  # fmt: skip
"""Data sets by their names in timm's tags of weights."""


def pretraining_data(tag: str | None) -> str | None:
    """Data sets that a tag of timm's weights names, in order; None if it names none.

    Example:
        >>> pretraining_data("augreg_in21k_ft_in1k"), pretraining_data("fb_dist")
        ('ImageNet-21k, then ImageNet-1k', None)
    """
    named = [_DATA[word] for word in (tag or "").split("_") if word in _DATA]
    return ", then ".join(dict.fromkeys(named)) or None


def _start_record(source: ModelSource, weights: dict[str, Any] | None, frozen: bool) -> dict[str, Any]:
    """What a card says about the weights that a backbone starts from: base_model, backbone and notice of `rlpjepa_zoo.hub.card.Info`.

    Args:
        source: of the backbone.
        weights: timm's configuration of the pretrained weights; None for random ones.
        frozen: whether the backbone is not trained.
    """
    if weights is None:
        return {"backbone": {"frozen": True}} if frozen else {}
    tag = weights.get("tag") if isinstance(weights.get("tag"), str) else None
    full = ".".join(filter(None, (weights.get("architecture"), tag)))
    known = timm.models.get_pretrained_cfg(full) if timm.models.is_model_pretrained(full) else None
    license = weights.get("license") or (known and known.license)
    repo = source.value if source.kind == "hub" else known and known.hf_hub_id
    start = Start(
        name=full if known else source.label.removeprefix("hf-hub:"), data=pretraining_data(tag),
        license=license if isinstance(license, str) else None, frozen=frozen,
    )  # fmt: skip
    record = {"backbone": start.model_dump(exclude_none=True)} | ({"base_model": repo} if repo else {})
    notice = source.path / NOTICE if source.kind == "folder" else None
    return record | ({"notice": notice.read_text("utf-8", "replace").strip()[:MOST_NOTES]} if notice and notice.is_file() else {})


def fresh_copy(encoder: SparseEncoder) -> SparseEncoder:
    """A new encoder of the same architecture and preprocessing, with fresh weights, on the CPU, in training mode."""
    config = encoder.config
    return create_encoder(
        config.architecture, config.dim, config.hidden_dim, projector_depth=config.projector_depth, preprocess=config.preprocess,
        **config.model_args,
    )  # fmt: skip


def _backbone(source: ModelSource, pretrained: bool, timm_kwargs: dict[str, Any]) -> Any:
    if timm_kwargs.get("in_chans", 3) != 3:
        raise ModelError(f"in_chans: images are RGB, so it must be 3, got {timm_kwargs['in_chans']!r}")
    if timm_kwargs.get("global_pool", "avg") in ("", None, False):
        raise ModelError("global_pool: the projector needs pooled features, so it must not be empty")
    if timm_kwargs.get("features_only"):
        raise ModelError("features_only gives feature maps; the projector needs pooled features, so leave it out")
    name = source.timm_name
    if source.kind == "name" and not timm.is_model(name.split(".")[0]):
        hint = did_you_mean(name.split(".")[0], timm.list_models())
        module = "If a module of yours registers it with timm, import that module first (--import MODULE on the command line)."
        raise ModelError(f"backbone '{name}' is not a timm model.{hint} {module}")
    try:
        timm_name, overlay = _locate_weights(source, pretrained, timm_kwargs)
        return timm.create_model(timm_name, pretrained=pretrained, num_classes=0, pretrained_cfg_overlay=overlay, **timm_kwargs)
    except ZooError:
        raise
    except Exception as error:
        arguments = ", ".join(f"{k}={v!r}" for k, v in {"pretrained": pretrained, **timm_kwargs}.items())
        raise ModelError(f"backbone '{name}' with {arguments[:200]}: {first_line(error)}") from error


def _locate_weights(source: ModelSource, pretrained: bool, timm_kwargs: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The name to build, and an overlay of timm's configuration that points to weights in a local safetensors file, never a pickle."""
    files = [CONFIG, BACKBONE] if pretrained else [CONFIG]
    if source.kind != "name":
        path = source.path if source.kind == "folder" else fetch(source.value, files, source.revision)
        for file in files:
            if not (path / file).is_file():
                raise ModelError(f"{path}: no {file}" + ("; pickles are not read" if file.endswith(".safetensors") else ""))
        _validate_untrusted_config(path, pretrained, timm_kwargs)
        return ModelSource.folder(path).timm_name, None
    name = source.value
    if not pretrained:
        return name, None
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ModelError(f"backbone '{name}' has no pretrained weights in timm; use pretrained=False")
    if not config.hf_hub_id:
        raise ModelError(f"backbone '{name}': its weights are published as a pickle only ({config.url}), which is refused; use another tag")
    file = config.hf_hub_filename or "pytorch_model.bin"
    safetensors = {"pytorch_model.bin": "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    file = safetensors.get(file) or re.sub(r"\.bin$", ".safetensors", file)
    weights = ModelSource.repository(config.hf_hub_id)
    return name, {"file": str(fetch(weights.value, [file], weights.revision) / file), "custom_load": False}


def _validate_untrusted_config(path: Path, pretrained: bool, timm_kwargs: dict[str, Any]) -> None:
    """Refuse a timm model's config.json with unsafe arguments, or with many more parameters than its weights file holds."""
    where = f"{path}/{CONFIG}"
    with open(path / CONFIG, "rb") as file:
        config = parse_json(file.read(MAX_JSON + 1), where)
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or ":" in architecture or not timm.is_model(architecture.split(".")[0]):
        raise ModelError(f"{where}: architecture {architecture!r} is not a timm model")
    arguments = config.get("model_args") or {}
    validate_arguments(arguments, where, allowed={"num_classes"})
    if {**arguments, **timm_kwargs}.get("global_pool", "avg") in ("", None, False):
        raise ModelError(f"{where}: global_pool is empty; the projector needs pooled features, so give one, such as global_pool='avg'")
    if pretrained:
        tensors = tensor_shapes(path / BACKBONE)
        options = {k: v for k, v in {**arguments, **timm_kwargs}.items() if k != "num_classes"}
        with bounded_construction(len(tensors), where), torch.device("meta"):
            skeleton = timm.create_model(architecture, num_classes=0, **options)
        saved = sum(math.prod(shape) for _, shape in tensors.values())
        asked = sum(p.numel() for p in skeleton.parameters())
        if asked > 4 * saved:
            raise ModelError(f"{where}: asks for {asked:,} parameters, model.safetensors holds {saved:,}")


def validate_arguments(arguments: Any, where: str, allowed: Iterable[str] = ()) -> None:
    """Check untrusted arguments of a backbone: known kinds of names, short strings and lists, numbers within limits.

    Args:
        arguments: `model_args` of a config.json.
        where: path of the file, for error messages.
        allowed: reserved names that are accepted.

    Raises:
        ModelError: another argument or value; the message names it.
    """
    if not isinstance(arguments, dict):
        raise ModelError(f"{where}: model_args: expected an object, got {type(arguments).__name__}")
    if taken := set(refused_arguments(arguments)) - set(allowed):
        raise ModelError(f"{where}: model_args: '{min(taken)}' is not an argument of a backbone")
    for key, value in _leaves(arguments, "model_args"):
        top = next((top for word, top in _LIMITS.items() if re.search(word, key)), 16384)
        if isinstance(value, str) and not re.fullmatch(r"[\w.+-]{0,64}", value):
            raise ModelError(f"{where}: {key}: expected a short plain name, got {value[:40]!r}")
        if isinstance(value, int | float) and not -1 <= value <= top:
            raise ModelError(f"{where}: {key}: expected a number in -1 .. {top}, got {str(value)[:40]}")


def refused_arguments(arguments: Iterable[str]) -> list[str]:
    """The names that are arguments of `create_encoder` or of timm's loading code, not of a backbone; sorted.

    Example:
        >>> refused_arguments(["img_size", "checkpoint_path", "dim"])
        ['checkpoint_path', 'dim']
    """
    reserved = {"num_classes", "features_only", "out_indices", "feature_cls", "device", "dtype"}.union(
        *(inspect.signature(f).parameters for f in (create_encoder, timm.create_model, timm.models.build_model_with_cfg))
    )
    return sorted(reserved & set(arguments))


_LIMITS = {"depth|layers|blocks": 256, "window": 64}
"""Largest values of arguments that count layers or set window sizes, by words in their names; real backbones stay below."""


@contextmanager
def float32_default() -> Iterator[None]:
    """float32 as torch's default dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def bounded_construction(tensors: int, where: str) -> Iterator[None]:
    """Stop the construction of a network inside the block at the first parameter beyond the limit.

    Args:
        tensors: in the weight files. The network may register four times as many parameters, as some models replace layers while they are
            built, and 50 modules for each.
        where: path of the config.json, for the error message.

    Raises:
        ModelError: more parameters or modules.
    """
    me, left = threading.get_ident(), {"parameters": 4 * tensors + 1, "modules": 50 * tensors + 1000}

    def count(what: str) -> Callable[..., None]:
        def registered(*_: Any) -> None:
            if threading.get_ident() == me:
                left[what] -= 1
                if left[what] < 0:
                    raise ModelError(f"{where}: model_args ask for more {what} than the files hold tensors ({tensors}) for")

        return registered

    hooks = [
        register_module_parameter_registration_hook(count("parameters")),
        register_module_module_registration_hook(count("modules")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _leaves(value: Any, where: str, depth: int = 0) -> Iterable[tuple[str, Any]]:
    """The values inside nested lists and objects, with their keys."""
    if depth > 4 or (isinstance(value, dict | list) and len(value) > 128):
        raise ModelError(f"{where}: nested more than 4 deep, or longer than 128")
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{where}.{key}", depth + 1)
    else:
        yield where, value
