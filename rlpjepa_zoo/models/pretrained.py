"""Making and loading encoders. What a stranger wrote is checked before it costs anything: names, values, shapes, then memory."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook

from ..core import files as _files
from ..core import rng
from ..data.preprocess import Preprocess
from ..errors import ModelError, UsageError, ZooError, did_you_mean, first_line
from ..hub import download as hub
from ..hub import format as hub_format
from ..hub import zoo
from ..sparse.topk import Dial
from . import golden
from .classifier import Classifier, ClassifierConfig, head_name, plain_timm, split_head
from .encoder import EncoderConfig, SparseEncoder, make_projector

__all__ = ["create_encoder", "load_classifier", "load_encoder", "load_published", "refused_arguments", "verify_entry"]


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
    config = hub_format.read_config(path)
    if hub_format.is_classifier(config):
        raise ModelError(f"{path}: holds a classifier, not an encoder; use load_classifier")
    hub_format.verify(path, config)
    where = f"{path}/config.json"
    options = _options(config, where)
    headers = {name: _files.tensor_shapes(path / name) for name in ("model.safetensors", "head.safetensors", "golden.safetensors")}
    # No memory yet: a config that asks for more than the files hold ends here.
    with _bounded(sum(map(len, headers.values())), where), torch.device("meta"):
        skeleton = create_encoder(config["architecture"], **options)
    _compare(skeleton.backbone, headers["model.safetensors"], path / "model.safetensors")
    _compare(skeleton.projector, headers["head.safetensors"], path / "head.safetensors")
    golden.check_header(headers["golden.safetensors"], skeleton.config, path / "golden.safetensors")
    with _BUILDING, rng.seeded(0, "load"), _float32():  # the caller's random numbers and default type are not touched
        encoder = create_encoder(config["architecture"], **options)
    block = config[hub_format.BLOCK]
    text = (path / "recipe.yaml").read_text("utf-8", "replace") if "recipe.yaml" in block["files"] else None
    dial = _dial(block.get("dial"), where)
    encoder.config = dataclasses.replace(encoder.config, info=block.get("info", {}), recipe=text, dial=dial)
    _load_weights(encoder.backbone, path / "model.safetensors")
    _load_weights(encoder.projector, path / "head.safetensors")
    encoder.eval()
    golden.check(encoder, _read(path / "golden.safetensors"), path / "golden.safetensors")
    return encoder.to(device)


def load_classifier(
    source: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Classifier:
    """A classifier from the Hub or a folder, verified like an encoder, in evaluation mode; arguments and errors as of `load_encoder`.

    Every file is compared with its sha256 in config.json, and the golden images must give their golden logits.
    """
    path = hub.resolve(source, revision, token, cache_dir)
    config = hub_format.read_config(path)
    if not hub_format.is_classifier(config):
        raise ModelError(f"{path}: holds an encoder, not a classifier; use load_encoder, or `rlpjepa finetune` to make one")
    hub_format.verify(path, config)
    where, from_z = f"{path}/config.json", bool(config[hub_format.BLOCK]["projector"])
    options, (input, classes) = _options(config, where), _labels(config, where)
    names = ["model.safetensors", "golden.safetensors", *(["head.safetensors"] if from_z else [])]
    headers = {name: _files.tensor_shapes(path / name) for name in names}

    def build() -> Classifier:
        encoder = create_encoder(config["architecture"], **options)
        info, recipe = config[hub_format.BLOCK].get("info", {}), path / "recipe.yaml"
        text = recipe.read_text("utf-8", "replace") if "recipe.yaml" in config[hub_format.BLOCK]["files"] else None
        made = ClassifierConfig(encoder.config, input, classes, info, text)
        return Classifier(encoder.backbone, encoder.projector if from_z else None, nn.Linear(made.features, len(classes)), made)

    with _bounded(sum(map(len, headers.values())) + 2, where), torch.device("meta"):  # the unused projector is one layer
        skeleton = build()
        body, rest = headers["model.safetensors"], headers.get("head.safetensors", {})
    with torch.device("meta"):
        head = "" if from_z else head_name(plain_timm(skeleton.config.encoder, len(classes)), skeleton.backbone.state_dict())
    if not from_z:
        body, rest = split_head(head, body)
    _compare(skeleton.backbone, body, path / "model.safetensors")
    _compare(_beside(skeleton), rest, path / ("head.safetensors" if from_z else "model.safetensors"))
    golden.check_header(headers["golden.safetensors"], skeleton.config, path / "golden.safetensors")
    with _BUILDING, rng.seeded(0, "load"), _float32():
        classifier = build()
    if from_z:
        _load_weights(classifier.backbone, path / "model.safetensors")
        _load_weights(_beside(classifier), path / "head.safetensors")
    else:
        _load_weights(classifier.backbone, path / "model.safetensors", lambda tensors: split_head(head, tensors)[0])
        _load_weights(_beside(classifier), path / "model.safetensors", lambda tensors: split_head(head, tensors)[1])
    classifier.eval()
    golden.check(classifier, _read(path / "golden.safetensors"), path / "golden.safetensors")
    return classifier.to(device)


def _beside(classifier: Classifier) -> nn.ModuleDict:
    """All but the backbone."""
    parts: dict[str, nn.Module] = {} if classifier.projector is None else {"projector": classifier.projector}
    return nn.ModuleDict({**parts, "head": classifier.head})


def load_published(path: str | Path) -> SparseEncoder | Classifier:
    """The encoder or the classifier in a published folder, verified."""
    found = hub.resolve(path)
    return load_classifier(found) if hub_format.is_classifier(hub_format.read_config(found)) else load_encoder(found)


def verify_entry(name: str, root: str | Path | None = None, online: bool = False) -> Path:
    """Check one encoder of the zoo: the manifest's figures, the sha256 of every file, and the golden codes; returns the checked folder.

    Args:
        name: of the zoo.
        root: look at ROOT/NAME instead of the copy that ships (or, where none ships, the Hub).
        online: look at the repository and commit that the manifest pins.

    Raises:
        UsageError: no such encoder, or it is not published on the Hub.
        ModelError: what differs.
        HubError: the Hub refused or could not be reached.
    """
    entry = zoo.entry(name)
    if online and not (entry.get("repo") and entry.get("commit")):
        raise UsageError(f"{name} is not published yet, so there is nothing to check on the Hub; leave out --hub")
    source = f"hf-hub:{entry['repo']}@{entry['commit']}" if online else name if root is None else f"local-dir:{Path(root) / name}"
    path = hub.resolve(source)
    found = zoo.describe(path)
    differing = [key for key, value in found.items() if key not in ("repo", "commit") and entry.get(key) != value]
    if differing:
        key = differing[0]
        raise ModelError(f"the manifest says {key} = {entry.get(key)}, {path} says {found[key]}")
    load_encoder(path)
    return path


# --- what is checked before it costs anything ----------------------------------------------------------------------------------------


def _options(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of `create_encoder` in a config.json that anybody may have written."""
    block = config[hub_format.BLOCK]
    try:
        saved: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in block["preprocess"].items()}
        none = {"dim": 1, "hidden_dim": 1, "depth": 1} if hub_format.is_classifier(config) else {}  # of features
        head = block["projector"] or none
        options: dict[str, Any] = {
            "preprocess": Preprocess(**saved),
            "dim": head["dim"],
            "hidden_dim": head["hidden_dim"],
            "projector_depth": head["depth"],
        }
        for key, top in (("dim", 2**20), ("hidden_dim", 2**20), ("projector_depth", 64)):
            if type(options[key]) is not int or not 1 <= options[key] <= top:
                raise ValueError(f"{key}: expected an integer in 1 .. {top}, got {options[key]!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where}: {hub_format.BLOCK}.preprocess or .projector is not what this version expects ({error})") from error
    if ":" in config["architecture"]:
        raise ModelError(f"{where}: architecture '{config['architecture']}' points to another model; expected a plain timm name")
    arguments = config.get("model_args", {})
    _check_arguments(arguments, where)
    return {**options, **arguments}


def _labels(config: dict[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """What the linear layer of a classifier sees, and the names of its classes."""
    block, from_z = config[hub_format.BLOCK]["classifier"], bool(config[hub_format.BLOCK]["projector"])
    classes = block.get("classes")
    if block.get("input") != ("z" if from_z else "features"):
        raise ModelError(
            f"{where}: {hub_format.BLOCK}.classifier.input: expected {'z' if from_z else 'features'}, got {block.get('input')!r}"
        )
    if not isinstance(classes, list) or not 2 <= len(classes) <= 2**20 or not all(isinstance(name, str) for name in classes):
        raise ModelError(f"{where}: {hub_format.BLOCK}.classifier.classes: expected a list of at least two names")
    return block["input"], tuple(classes)


def _dial(saved: Any, where: str) -> Dial | None:
    try:
        return None if saved is None else Dial(**saved)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where}: {hub_format.BLOCK}.dial is not what this version expects ({first_line(error)})") from error


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


_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def _compare(module: nn.Module, found: dict[str, tuple[str, tuple[int, ...]]], path: Path) -> None:
    """Names, dtypes and shapes in a file's header against those of a module."""
    expected = module.state_dict()
    for what, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            raise ModelError(f"{path}: {what} tensors: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}")
    for name, (dtype, shape) in found.items():
        wanted = _DTYPES.get(expected[name].dtype, "F32")
        if shape != tuple(expected[name].shape) or dtype != wanted:
            raise ModelError(f"{path}: {name} is {dtype} of shape {shape}, expected {wanted} of shape {tuple(expected[name].shape)}")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({first_line(error)})") from error


def _load_weights(module: nn.Module, path: Path, part: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict) -> None:
    tensors = part(_read(path))
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"{path}: {name} holds NaN or infinity")
    module.load_state_dict(tensors)
