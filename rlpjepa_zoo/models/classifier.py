"""`Classifier`: an encoder's backbone (from z: and its rectified projector) with a linear layer on top, and the folder it is published in.

From features the folder is a timm classifier like any other: plain timm opens it and gives the same logits. From z, model.safetensors holds
the backbone and head.safetensors the projector (``projector.*``) and the linear layer (``head.*``).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn as nn
from torch import Tensor
from tqdm.auto import tqdm

from ..core import files as _files
from ..core import package
from ..data.images import reason_with_id
from ..data.preprocess import Preprocess, batched, ready
from ..data.sources import open_images
from ..errors import DataError, NonFiniteError, OutputError, UsageError, first_line
from ..hub import card
from ..hub import format as hub_format
from . import golden
from . import small_resnet as resnet
from .base import Served, digest
from .encoder import EncoderConfig, SparseEncoder

__all__ = ["Classifier", "ClassifierConfig", "Prediction", "head_name", "make_classifier", "plain_timm", "split_head"]


@dataclass(frozen=True)
class ClassifierConfig:
    """All that is needed to build the classifier again, and what is known about it.

    Attributes:
        encoder: of the body.
        input: what the linear layer sees, ``"features"`` or ``"z"``.
        classes: names, in the order of the logits.
        info: JSON-able record of training and results, shown on the card.
        recipe: YAML text of the recipe that trained it.
    """

    encoder: EncoderConfig
    input: str
    classes: tuple[str, ...]
    info: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None

    @property
    def preprocess(self) -> Preprocess:
        return self.encoder.preprocess

    @property
    def features(self) -> int:
        """Width of what the linear layer sees."""
        return self.encoder.features if self.input == "features" else self.encoder.dim

    @property
    def dim(self) -> int:
        """Number of classes."""
        return len(self.classes)


class Prediction(NamedTuple):
    """What `Classifier.predict` says of n images, in their order."""

    ids: list[Any]
    labels: list[str]
    """The most probable class of each."""
    probabilities: np.ndarray[Any, Any]
    """(n, C) float32, rows sum to 1."""


class Classifier(Served):
    """Images to logits. Made by `rlpjepa_zoo.finetune` and loaded by `rlpjepa_zoo.load_classifier`.

    Attributes:
        backbone: timm model with num_classes = 0.
        projector: ends in ReLU; None from features.
        head: the linear layer.
        transform: PIL image -> tensor (3, H, W), the evaluation preprocessing that travels with the weights.
        config: `ClassifierConfig`.
        frozen: no gradient and evaluation mode for all but `head`.
        steady: evaluation mode for all but `head`, with gradients (for adapters).

    Example:
        >>> import rlpjepa_zoo
        >>> encoder = rlpjepa_zoo.create_encoder("test_resnet", dim=16)
        >>> classifier = make_classifier(encoder, ["cat", "dog"]).eval()
        >>> classifier(torch.zeros(2, 3, 64, 64)).shape, classifier.classes
        (torch.Size([2, 2]), ('cat', 'dog'))
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module | None, head: nn.Linear, config: ClassifierConfig) -> None:
        super().__init__()
        self.backbone, self.projector, self.head, self.config = backbone, projector, head, config
        self.transform = config.preprocess.transform()
        self.frozen = self.steady = False

    @property
    def classes(self) -> tuple[str, ...]:
        return self.config.classes

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.frozen or self.steady:
            for part in (self.backbone, self.projector):
                if part is not None:
                    part.eval()  # batch statistics stay as they were
        return self

    def features(self, x: Tensor) -> Tensor:
        """What the linear layer sees, (B, F) from features and (B, D) from z."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone(x)
            if self.projector is not None:
                features = self.projector(features)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of a preprocessed float batch x (B, 3, H, W)."""
        if x.dim() != 4 or x.shape[1] != 3 or not x.is_floating_point():
            given = f"{x.dtype} of shape {tuple(x.shape)}"
            raise UsageError(f"expected a float batch (B, 3, H, W), got {given}; preprocess images with classifier.transform")
        return self.head(self.features(x))

    def fingerprint(self) -> str:
        """Hex digest of weights and preprocessing: two classifiers with equal fingerprints give the same logits."""
        return digest(self, self.config.preprocess)

    @torch.inference_mode()
    def predict(self, source: Any, batch_size: int = 256, num_workers: int = 0, progress: bool = False) -> Prediction:
        """Classify images, in evaluation mode.

        Args:
            source: what `SparseEncoder.embed` takes: a folder, paths, PIL images, a Hugging Face dataset, a preprocessed float tensor (B, 3, H, W), ...
            batch_size: images at a time, >= 1.
            num_workers: threads that decode images; 0 decodes in this one.
            progress: show a progress bar on stderr.

        Raises:
            DataError: no such images, or an unreadable one.
            NonFiniteError: the classifier gave NaN or infinity.
        """
        ids, parts = [], [torch.zeros(0, len(self.classes))]
        batches = self._batches(source, batch_size, num_workers, progress)
        with self.evaluating(), closing(batches):
            for names, x in batches:
                logits = self(x.to(self.device)).float().cpu()
                if not logits.isfinite().all():
                    raise NonFiniteError(f"the classifier gave NaN or infinity for the batch that starts at {names[0]!r}")
                ids += names
                parts.append(logits.softmax(1))
        found = torch.cat(parts)
        return Prediction(ids, [self.classes[i] for i in found.argmax(1).tolist()], found.numpy())

    def _batches(self, source: Any, batch_size: int, num_workers: int, progress: bool) -> Generator[tuple[list[Any], Tensor], None, None]:
        if isinstance(source, Tensor):
            for start in range(0, len(source), batch_size):
                x = source[start : start + batch_size]
                yield list(range(start, start + len(x))), x
            return
        images = open_images(source)
        groups = ready(batched(images.rows(0), batch_size), lambda row: row.read(), self.config.preprocess, num_workers)
        with tqdm(total=images.length, desc="predict", unit="image", disable=not progress) as bar, closing(groups):
            for group in groups:
                if group.bad:
                    place, reason = group.bad[0]
                    raise DataError(reason_with_id(group.items[place].id, reason))
                bar.update(len(group.items))
                yield [row.id for row in group.items], self.config.preprocess.normalised(group.pixels.to(self.device))

    # --- the published folder --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, path: str | Path, recipe: str | None = None, info: Mapping[str, Any] | None = None, name: str = "owner/repo"
    ) -> Path:
        """Write the published folder, see `rlpjepa_zoo.hub.format`.

        Raises:
            OutputError: the folder cannot be written.
            NonFiniteError: a weight is NaN or infinite.
            UsageError: the architecture has no plain linear classifier in timm.
        """
        return hub_format.write_folder(path, self.contents(recipe, info, name))

    def contents(self, recipe: str | None = None, info: Mapping[str, Any] | None = None, name: str = "owner/repo") -> dict[str, bytes]:
        """The files of the published folder; arguments as of `save_pretrained`."""
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        for key, value in state.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise NonFiniteError(f"{key} holds NaN or infinity; a classifier like that is not saved")
            if value.is_floating_point() and value.dtype != torch.float32:
                raise UsageError(f"{key} is {value.dtype}; classifiers are published in float32, so call .float() first")
        config, encoder = self.config, self.config.encoder
        body = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        rest = {k: v for k, v in state.items() if not k.startswith("backbone.")}
        files: dict[str, bytes] = {"golden.safetensors": _pack(golden.make(self))}
        if config.input == "features":
            model = plain_timm(encoder, len(config.classes))
            name_there = head_name(model, body)
            body |= {f"{name_there}.{k.removeprefix('head.')}": v for k, v in rest.items()}
            model.load_state_dict(body)
        else:
            model = timm.create_model(encoder.architecture, num_classes=0, **encoder.model_args)
            files["head.safetensors"] = _pack(rest)
        files["model.safetensors"] = _pack(body)
        sealed = _timm_config(model, encoder.preprocess, config.classes if config.input == "features" else ())
        info = card.checked(config.info if info is None else info)
        card.set_license(sealed, info.get("license"))
        projector = {"dim": encoder.dim, "hidden_dim": encoder.hidden_dim, "depth": encoder.projector_depth}
        sealed[hub_format.BLOCK] = {
            "name": name, "classifier": {"input": config.input, "classes": list(config.classes)},
            "projector": projector if config.input == "z" else {}, "preprocess": dataclasses.asdict(encoder.preprocess),
            "needs_package": encoder.architecture in resnet.SMALL_RESNETS, "fingerprint": self.fingerprint(), "info": info,
            "versions": info.get("versions") or package.versions(),
        }  # fmt: skip
        recipe = config.recipe if recipe is None else recipe
        if recipe is not None:
            files["recipe.yaml"] = recipe.encode()
        return hub_format.seal({**files, **card.files(sealed, name)}, sealed)


def make_classifier(encoder: SparseEncoder, classes: Sequence[str], input: str = "features") -> Classifier:
    """A fresh linear layer (weights N(0, 0.01^2) from torch's generator, biases 0) on the body of an encoder, which it shares.

    Args:
        encoder: whose backbone (and, for z, projector) is taken, not copied.
        classes: names, at least two.
        input: ``"features"`` or ``"z"``.

    Raises:
        UsageError: fewer than two classes, or an architecture that has no plain linear classifier in timm.
    """
    if len(classes) < 2:
        raise UsageError(f"classes: expected at least two, got {len(classes)}")
    if input == "z" and encoder.config.dial is not None:
        raise UsageError("start.input: the encoder has a dial, behind which nothing learns; use features, or the encoder as it was before")
    config = ClassifierConfig(dataclasses.replace(encoder.config, dial=None), input, tuple(map(str, classes)))
    if input == "features":
        with torch.device("meta"):
            head_name(plain_timm(encoder.config, len(classes)), encoder.backbone.state_dict())
    head = nn.Linear(config.features, len(classes))
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return Classifier(encoder.backbone, encoder.projector if input == "z" else None, head, config)


def plain_timm(encoder: EncoderConfig, classes: int) -> Any:
    """The timm classifier whose body is an encoder's backbone."""
    return timm.create_model(encoder.architecture, num_classes=classes, **encoder.model_args)


def head_name(model: Any, body: Collection[str]) -> str:
    """Name of the one linear layer that turns pooled features into the logits of a timm classifier.

    Args:
        model: the timm classifier.
        body: names of the tensors of its backbone alone.

    Raises:
        UsageError: it has another kind of head.
    """
    name = model.pretrained_cfg.get("classifier")
    whole = model.state_dict()
    if not isinstance(name, str) or whole.keys() ^ set(body) != {f"{name}.weight", f"{name}.bias"} or whole[f"{name}.weight"].dim() != 2:
        architecture = model.pretrained_cfg.get("architecture")
        raise UsageError(f"{architecture}: its classifier in timm is not one linear layer on pooled features; use start.input=z")
    return name


def split_head(name: str, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of a timm classifier's file as those of the backbone and of the linear layer (``head.*``)."""
    head = {f"head.{k.removeprefix(f'{name}.')}": v for k, v in tensors.items() if k.startswith(f"{name}.")}
    return {k: v for k, v in tensors.items() if not k.startswith(f"{name}.")}, head


def _timm_config(model: nn.Module, preprocess: Preprocess, classes: Sequence[str]) -> dict[str, Any]:
    """config.json as timm writes it."""
    more: dict[str, Any] = {"pretrained_cfg": {"tag": "rlpjepa"}} | ({"label_names": list(classes)} if classes else {})
    try:
        with tempfile.TemporaryDirectory() as scratch:
            timm.models.save_for_hf(model, scratch, safe_serialization=True, data_config=preprocess.data_config(), model_config=more)
            config = _files.parse_json((Path(scratch) / "config.json").read_bytes(), "config.json")
    except OSError as error:
        raise OutputError(f"{tempfile.gettempdir()}: cannot write: {error.strerror or error}") from error
    except ValueError as error:  # an argument such as act_layer=nn.GELU
        raise UsageError(f"the backbone cannot be described in config.json: {first_line(error)}") from error
    config.get("model_args", {}).pop("num_classes", None)  # transformers passes it itself
    return config


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata={"format": "pt"})
