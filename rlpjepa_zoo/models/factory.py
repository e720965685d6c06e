"""Making encoders: any timm backbone with a fresh rectified projector. An untrusted config.json is checked before it costs memory."""

from __future__ import annotations

import inspect
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook

from ..core import files as _files
from ..data.preprocess import Preprocess
from ..errors import ModelError, UsageError, ZooError, did_you_mean, first_line
from ..hub import download as hub
from .encoder import EncoderConfig, SparseEncoder, make_projector


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
    backbone = _backbone(name, pretrained, timm_kwargs)
    features = int(backbone.head_hidden_size)
    try:
        preprocess = preprocess or Preprocess.of(backbone, timm_kwargs.get("img_size"))
    except (KeyError, TypeError, ValueError) as error:  # of a stranger's config.json
        raise ModelError(f"backbone '{name}': its preprocessing cannot be used: {first_line(error)}") from error
    config = EncoderConfig(
        architecture=backbone.pretrained_cfg.get("architecture", name),
        features=features, dim=dim, hidden_dim=hidden_dim, projector_depth=projector_depth, preprocess=preprocess, model_args=dict(timm_kwargs),
    )  # fmt: skip
    return SparseEncoder(backbone, make_projector(features, hidden_dim, dim, projector_depth), config, freeze_backbone)


def _backbone(name: str, pretrained: bool, timm_kwargs: dict[str, Any]) -> Any:
    if timm_kwargs.get("in_chans", 3) != 3:
        raise ModelError(f"in_chans: images are RGB, so it must be 3, got {timm_kwargs['in_chans']!r}")
    if timm_kwargs.get("global_pool", "avg") in ("", None, False):
        raise ModelError("global_pool: the projector needs pooled features, so it must not be empty")
    if timm_kwargs.get("features_only"):
        raise ModelError("features_only gives feature maps; the projector needs pooled features, so leave it out")
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise ModelError(f"backbone '{name}' is not a timm model.{did_you_mean(name.split('.')[0], timm.list_models())}")
    try:
        where, overlay = _weights(name, pretrained, timm_kwargs)
        return timm.create_model(where, pretrained=pretrained, num_classes=0, pretrained_cfg_overlay=overlay, **timm_kwargs)
    except ZooError:
        raise
    except Exception as error:
        arguments = ", ".join(f"{k}={v!r}" for k, v in {"pretrained": pretrained, **timm_kwargs}.items())
        raise ModelError(f"backbone '{name}' with {arguments[:200]}: {first_line(error)}") from error


def _weights(name: str, pretrained: bool, timm_kwargs: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """timm's name to build, and where its weights are: safetensors on this machine, never a pickle."""
    files = ["config.json", "model.safetensors"] if pretrained else ["config.json"]
    if name.startswith("hf-hub:"):
        repo, _, revision = name.removeprefix("hf-hub:").partition("@")
        name = f"local-dir:{hub.fetch(repo, files, revision or None)}"
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")).expanduser()
        for file in files:
            if not (path / file).is_file():
                raise ModelError(f"{path}: no {file}" + ("; pickles are not read" if file.endswith(".safetensors") else ""))
        _validate_untrusted_config(path, pretrained, timm_kwargs)
        return f"local-dir:{path}", None
    if not pretrained:
        return name, None
    found = timm.models.get_pretrained_cfg(name)
    if found is None or not found.has_weights:
        raise ModelError(f"backbone '{name}' has no pretrained weights in timm; use pretrained=False")
    if not found.hf_hub_id:
        raise ModelError(f"backbone '{name}': its weights are published as a pickle only ({found.url}), which is refused; use another tag")
    file = found.hf_hub_filename or "pytorch_model.bin"
    known = {"pytorch_model.bin": "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    file = known.get(file) or re.sub(r"\.bin$", ".safetensors", file)
    repo, _, revision = found.hf_hub_id.partition("@")
    return name, {"file": str(hub.fetch(repo, [file], revision or None) / file), "custom_load": False}


def _validate_untrusted_config(path: Path, pretrained: bool, timm_kwargs: dict[str, Any]) -> None:
    """Refuse what a timm model's config.json should not ask for, and what its weights cannot hold."""
    where = f"{path}/config.json"
    with open(path / "config.json", "rb") as file:
        config = _files.parse_json(file.read(_files.MAX_JSON + 1), where)
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or ":" in architecture or not timm.is_model(architecture.split(".")[0]):
        raise ModelError(f"{where}: architecture {architecture!r} is not a timm model")
    arguments = config.get("model_args") or {}
    _check_arguments(arguments, where, allowed={"num_classes"})
    if {**arguments, **timm_kwargs}.get("global_pool", "avg") in ("", None, False):
        raise ModelError(f"{where}: global_pool is empty; the projector needs pooled features, so give one, such as global_pool='avg'")
    if pretrained:
        tensors = _files.tensor_shapes(path / "model.safetensors")
        options = {k: v for k, v in {**arguments, **timm_kwargs}.items() if k != "num_classes"}
        with _bounded(len(tensors), where), torch.device("meta"):
            skeleton = timm.create_model(architecture, num_classes=0, **options)
        held = sum(math.prod(shape) for _, shape in tensors.values())
        asked = sum(p.numel() for p in skeleton.parameters())
        if asked > 4 * held:
            raise ModelError(f"{where}: asks for {asked:,} parameters, model.safetensors holds {held:,}")


def _check_arguments(arguments: Any, where: str, allowed: Iterable[str] = ()) -> None:
    """Arguments and values that a real backbone may have: short texts and lists, numbers of a sane size."""
    if not isinstance(arguments, dict):
        raise ModelError(f"{where}: model_args: expected an object, got {type(arguments).__name__}")
    if taken := set(refused_arguments(arguments)) - set(allowed):
        raise ModelError(f"{where}: model_args: '{min(taken)}' is not an argument of a backbone")
    for key, value in _leaves(arguments, "model_args"):
        top = next((top for word, top in _TOPS.items() if re.search(word, key)), 16384)
        if isinstance(value, str) and not re.fullmatch(r"[\w.+-]{0,64}", value):
            raise ModelError(f"{where}: {key}: expected a short plain name, got {value[:40]!r}")
        if isinstance(value, int | float) and not -1 <= value <= top:
            raise ModelError(f"{where}: {key}: expected a number in -1 .. {top}, got {str(value)[:40]}")


def refused_arguments(arguments: Iterable[str]) -> list[str]:
    """Which of some names belong to `create_encoder` or to timm's own machinery (what is loaded, from where), not to a backbone; sorted.

    Example:
        >>> refused_arguments(["img_size", "checkpoint_path", "dim"])
        ['checkpoint_path', 'dim']
    """
    reserved = {"num_classes", "features_only", "out_indices", "feature_cls"}.union(
        *(inspect.signature(f).parameters for f in (create_encoder, timm.create_model, timm.models.build_model_with_cfg))
    )
    return sorted(reserved & set(arguments))


_TOPS = {"depth|layers|blocks": 256, "window": 64}
"""Words in the names of arguments that mean loops, and the most that a real backbone asks for."""


_BUILDING = threading.Lock()


@contextmanager
def _float32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _bounded(tensors: int, where: str) -> Iterator[None]:
    """Stop building a network as soon as it has more parameters than there are tensors for, or very many modules."""
    me, left = threading.get_ident(), {"parameters": tensors + 1, "modules": 50 * tensors + 1000}

    def count(what: str) -> Callable[..., None]:
        def seen(*_: Any) -> None:
            if threading.get_ident() == me:
                left[what] -= 1
                if left[what] < 0:
                    raise ModelError(f"{where}: model_args ask for more {what} than the files hold tensors ({tensors}) for")

        return seen

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
    if depth > 4 or (isinstance(value, dict | list) and len(value) > 128):
        raise ModelError(f"{where}: nested more than 4 deep, or longer than 128")
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{where}.{key}", depth + 1)
    else:
        yield where, value
