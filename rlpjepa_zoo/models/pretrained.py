"""Load published encoders and classifiers. Names, values and shapes of untrusted files are checked before memory is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
import torch.nn as nn
from torch import Tensor

from ..core import rng
from ..core.source import ModelSource
from ..data.preprocess import Preprocess
from ..errors import ModelError, UsageError, first_line
from ..hub import zoo
from ..hub.download import resolve
from ..hub.folder import read_folder, read_recipe, verify_folder
from ..hub.format import CONFIG, GOLDEN, LinearLayer, Projector, Published, tensor_place
from ..ops.tensors import load_tensors, tensor_shapes
from . import golden
from .base import is_matrix
from .classifier import Classifier, ClassifierConfig, head_name, plain_timm
from .encoder import SparseEncoder
from .factory import BUILDING, bounded_construction, create_encoder, float32_default, validate_arguments

__all__ = ["load_classifier", "load_encoder", "load_published", "verify_entry"]

Model = TypeVar("Model", SparseEncoder, Classifier)


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
        cache_dir: folder of the download cache; that of the Hub client when None.
        device: of the loaded encoder.

    Raises:
        UsageError: `source` is none of these.
        ModelError: damaged, foreign or newer files; the message names the file.
        HubError: the Hub refused or cannot be reached.
    """
    path = resolve(source, revision, token, cache_dir)
    published = read_folder(path)
    if published.classifier is not None:
        start = published.info.get("start")
        origin = f", such as the one that it was tuned from ({start})" if isinstance(start, str) else ""
        raise ModelError(
            f"{path}: holds a classifier, not an encoder; use load_classifier in Python or `rlpjepa predict`, or give an encoder{origin}"
        )
    verify_folder(path, published)
    build = partial(build_encoder, published, f"{path}/{CONFIG}", read_recipe(path, published))
    return _load(path, published, build).to(device)


def build_encoder(published: Published, where: str, recipe: str | None) -> SparseEncoder:
    """The encoder that a config.json describes, with random weights; `where` is the path of that file, for messages.

    Raises:
        ModelError: an argument, size or name that is not accepted from files.
    """
    encoder = create_encoder(published.architecture, **_encoder_options(published, where))
    encoder.config = dataclasses.replace(encoder.config, info=published.info, recipe=recipe, dial=published.dial)
    return encoder


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
    path = resolve(source, revision, token, cache_dir)
    published = read_folder(path)
    if published.classifier is None:
        raise ModelError(f"{path}: holds an encoder, not a classifier; use load_encoder, or `rlpjepa finetune` to make one")
    verify_folder(path, published)
    head: LinearLayer = published.classifier
    options = _encoder_options(published, f"{path}/{CONFIG}")
    recipe = read_recipe(path, published)

    def build() -> Classifier:
        encoder = create_encoder(published.architecture, **options)
        config = ClassifierConfig(encoder.config, head.input, head.classes, published.info, recipe)
        projector = None if published.projector is None else encoder.projector
        return Classifier(encoder.backbone, projector, nn.Linear(config.features, len(head.classes)), config)

    return _load(path, published, build).to(device)


def load_published(
    source: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> SparseEncoder | Classifier:
    """An encoder or a classifier, whichever the source holds, verified; arguments and errors as of `load_encoder`."""
    folder = resolve(source, revision, token, cache_dir)
    load = load_encoder if read_folder(folder).classifier is None else load_classifier
    return load(folder, device=device)


def verify_entry(name: str, root: str | Path | None = None, online: bool = False) -> Path:
    """Check one encoder of the zoo: the manifest's figures, the sha256 of every file, and the golden codes; returns the checked folder.

    Args:
        name: of the zoo.
        root: check ROOT/NAME instead of the shipped copy (or, where none ships, the Hub).
        online: check the repository and commit that the manifest pins.

    Raises:
        UsageError: no such encoder, or it is not published on the Hub.
        ModelError: a difference; the message names it.
        HubError: the Hub refused or could not be reached.
    """
    entry = zoo.entry(name)
    if online and not (entry.get("repo") and entry.get("commit")):
        raise UsageError(f"{name} is not published yet, so there is nothing to check on the Hub; leave out --hub")
    path = resolve(ModelSource.repository(entry["repo"], entry["commit"]).text if online else name if root is None else Path(root) / name)
    record = zoo.describe(path)
    differing = [key for key, value in record.items() if key not in ("repo", "commit") and entry.get(key) != value]
    if differing:
        key = differing[0]
        raise ModelError(f"the manifest says {key} = {entry.get(key)}, {path} says {record[key]}")
    load_encoder(path)
    return path


# --- checks before memory is used ----------------------------------------------------------------------------------------------------


Header = dict[str, tuple[str, tuple[int, ...]]]
"""Type and shape of each tensor in a file."""


def _load(path: Path, published: Published, build: Callable[[], Model]) -> Model:
    """Build a model and load its weights from a verified folder; a skeleton without memory is compared with the file headers first."""
    headers = {name: tensor_shapes(path / name) for name in published.tensor_files}
    places = skeleton(published, headers, path, build)
    with BUILDING, rng.seeded(0, "load"), float32_default(), torch.device("cpu"):  # whatever the caller's defaults are
        model = build()
    contents = {name: _read(path / name) for name in published.tensor_files}
    for name, place in places.values():
        tensor = contents[name][place]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"{path / name}: {place} holds NaN or infinity")
    model.load_state_dict({key: contents[name][place] for key, (name, place) in places.items()})
    model.eval()
    golden.check(model, contents[GOLDEN], path / GOLDEN)
    return model


def skeleton(published: Published, headers: dict[str, Header], path: Path, build: Callable[[], Model]) -> dict[str, tuple[str, str]]:
    """Build a model without memory and compare it with the headers of the files.

    Args:
        published: what config.json describes.
        headers: of each file in `published.tensor_files`.
        path: folder, for messages.
        build: builds the model.

    Returns:
        File and name in that file of each tensor of the model.

    Raises:
        ModelError: a tensor is missing, unexpected, or of another type or shape; the message names it.
    """
    tensors = sum(map(len, headers.values())) + 2  # a classifier on features drops the encoder's projector of one layer
    with bounded_construction(tensors, f"{path}/{CONFIG}"), torch.device("meta"):
        model = build()
    linear = ""
    if isinstance(model, Classifier) and published.projector is None:
        with torch.device("meta"):
            linear = head_name(plain_timm(model.config.encoder, len(model.classes)), model.backbone.state_dict())
    state = model.state_dict()
    places = {key: tensor_place(key, published, linear) for key in state}
    for name in published.tensor_files:
        if name != GOLDEN:
            expected = {place: state[key] for key, (file, place) in places.items() if file == name}
            _compare(expected, headers[name], path / name, published.float16)
    golden.check_header(headers[GOLDEN], model.config, path / GOLDEN)
    return places


def _encoder_options(published: Published, where: str) -> dict[str, Any]:
    """Arguments of `create_encoder`. Values of an untrusted config.json are checked."""
    saved: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in published.preprocess.items()}
    try:
        preprocess = Preprocess(**saved)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where}: preprocess is not what this version expects ({error})") from error
    if ":" in published.architecture:
        raise ModelError(f"{where}: architecture '{published.architecture}' points to another model; expected a plain timm name")
    validate_arguments(published.model_args, where)
    sizes = published.projector or Projector(1, 1, 1)  # a classifier on features has none
    return {
        "preprocess": preprocess,
        "dim": sizes.dim,
        "hidden_dim": sizes.hidden_dim,
        "projector_depth": sizes.depth,
        **published.model_args,
    }


_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def _compare(expected: dict[str, Tensor], header: Header, path: Path, float16: bool) -> None:
    """Refuse a file whose header has other names, dtypes or shapes than the expected tensors; with float16, matrices are of that type."""
    for problem, names in (("missing", expected.keys() - header.keys()), ("unexpected", header.keys() - expected.keys())):
        if names:
            raise ModelError(f"{path}: {problem} tensors: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}")
    for name, (dtype, shape) in header.items():
        wanted = "F16" if float16 and is_matrix(expected[name]) else _DTYPES.get(expected[name].dtype, "F32")
        if shape != tuple(expected[name].shape) or dtype != wanted:
            raise ModelError(f"{path}: {name} is {dtype} of shape {shape}, expected {wanted} of shape {tuple(expected[name].shape)}")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
