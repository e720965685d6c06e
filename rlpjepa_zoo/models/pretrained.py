"""Making and loading encoders. What a stranger wrote is checked before it costs anything: names, values, shapes, then memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn as nn
from torch import Tensor

from ..core import files as _files
from ..core import rng
from ..data.preprocess import Preprocess
from ..errors import ModelError, UsageError, first_line
from ..hub import download as hub
from ..hub import format as hub_format
from ..hub import zoo
from ..sparse.topk import Dial
from . import golden
from .classifier import Classifier, ClassifierConfig, head_name, plain_timm, split_head
from .encoder import SparseEncoder
from .factory import _BUILDING, _bounded, _check_arguments, _float32, create_encoder

__all__ = ["load_classifier", "load_encoder", "load_published", "verify_entry"]


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
