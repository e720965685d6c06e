"""`PublishedModel`: fingerprint, evaluation mode and saving, which encoders and classifiers share."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import timm
import torch
import torch.nn as nn
from torch import Tensor

from ..core import package
from ..core.files import parse_json
from ..data.preprocess import Preprocess
from ..errors import NonFiniteError, OutputError, UsageError, ZooError, first_line
from ..hub import card
from ..hub.folder import write_folder
from ..hub.format import CONFIG, GOLDEN, RECIPE, LinearLayer, Projector, Published, pack, tensor_place
from ..hub.push import push
from ..sparse.topk import Dial
from . import golden
from .small_resnet import SMALL_RESNETS

__all__ = ["Layers", "PublishedModel", "check_float_batch"]


def check_float_batch(x: Tensor, error: type[ZooError], fix: str) -> None:
    """Raise `error`, with `fix`, if `x` is not a float batch (B, 3, H, W)."""
    if x.dim() != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise error(f"expected a float batch (B, 3, H, W), got {x.dtype} of shape {tuple(x.shape)}; {fix}")


class PublishedModel(nn.Module):
    """A backbone with layers on top that is trained, saved and used on images.

    A subclass sets the attributes and overrides `device`, `outputs`, `_timm_model` and `_layers`.

    Attributes:
        backbone: timm model with num_classes = 0.
        transform: PIL image -> tensor (3, H, W), the evaluation preprocessing that travels with the weights.
        config: with preprocess, info, recipe, and the numbers F and D of its golden codes as features and dim.
        noun: of the model, in messages.
    """

    noun: ClassVar[str] = "model"
    backbone: nn.Module
    transform: Any
    config: Any

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        raise NotImplementedError

    def outputs(self, features: Tensor) -> Tensor:
        """Codes of an encoder, before a dial, or logits of a classifier, from `features(x)`."""
        raise NotImplementedError

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside the block; afterwards every module is in its own mode again."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    def fingerprint(self) -> str:
        """Hex digest of weights, buffers, preprocessing and dial: two models with equal fingerprints give equal outputs."""
        digest = hashlib.blake2b(repr(self.config.preprocess).encode(), digest_size=16)
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        if (dial := getattr(self.config, "dial", None)) is not None:
            digest.update(repr(dial).encode())
        return digest.hexdigest()

    # --- the published folder --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, path: str | Path, recipe: str | None = None, info: Mapping[str, Any] | None = None, name: str = "owner/repo"
    ) -> Path:
        """Write the published folder (see `rlpjepa_zoo.hub.format`): timm's format plus the other layers, golden codes and card.

        Args:
            path: folder; made if missing. Files of an earlier save are replaced, other files are not touched.
            recipe: YAML text that replaces `config.recipe`.
            info: JSON-able record that replaces `config.info`.
            name: source name in the examples on the card.

        Raises:
            OutputError: the folder cannot be written.
            NonFiniteError: a weight is NaN or infinite.
            UsageError: weights that are not float32, or an info that the card cannot show.
        """
        return write_folder(path, self.contents(recipe, info, name))

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
        """Publish on the Hugging Face Hub in one commit of the changed files; returns the address of the commit or pull request.

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
            HubError: one line with the fix.
        """
        contents = self.contents(recipe, info, repo_id)
        return push(
            contents, repo_id, private=private, revision=revision, tag=tag, create_pr=create_pr, message=commit_message, token=token
        ).url

    def contents(self, recipe: str | None = None, info: Mapping[str, Any] | None = None, name: str = "owner/repo") -> dict[str, bytes]:
        """The files of the published folder by name; arguments as of `save_pretrained`."""
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        for key, value in state.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise NonFiniteError(f"{key} holds NaN or infinity; the {self.noun} is not saved")
            if value.is_floating_point() and value.dtype != torch.float32:
                raise UsageError(f"{key} is {value.dtype}; a published {self.noun} is float32, so call .float() first")
        timm_model = self._timm_model()
        layers = self._layers(timm_model)
        timm_config = _timm_config(timm_model, self.config.preprocess, layers.label_names)
        record = card.checked_info(self.config.info if info is None else info)
        published = Published(
            timm=timm_config,
            preprocess=dataclasses.asdict(self.config.preprocess),
            projector=layers.projector,
            classifier=layers.classifier,
            dial=layers.dial,
            name=name,
            needs_package=timm_config["architecture"] in SMALL_RESNETS,
            fingerprint=self.fingerprint(),
            info=record,
            versions=record.get("versions") or package.versions(),
        )
        tensors: dict[str, dict[str, Tensor]] = {file: {} for file in published.tensor_files}
        for key, value in state.items():
            file, place = tensor_place(key, published, layers.linear)
            tensors[file][place] = value
        tensors[GOLDEN] = golden.make(self)
        files = {file: _serialized(content) for file, content in tensors.items()} | card.files(published)
        recipe = self.config.recipe if recipe is None else recipe
        if recipe is not None:
            files[RECIPE] = recipe.encode()
        return pack(published, files)

    def _timm_model(self) -> Any:
        """The timm model that config.json describes, on the CPU."""
        raise NotImplementedError

    def _layers(self, timm_model: Any) -> Layers:
        """The layers above the backbone; `timm_model` is the model that config.json describes."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers above the backbone, as the published folder describes them.

    Attributes:
        projector: None without one.
        classifier: None for encoders.
        dial: None without one.
        linear: timm's name of the linear layer, for classifiers on features.
    """

    projector: Projector | None = None
    classifier: LinearLayer | None = None
    dial: Dial | None = None
    linear: str = ""

    @property
    def label_names(self) -> list[str]:
        """Class names for timm's config.json: of a classifier on features, which timm opens as one of its own."""
        return list(self.classifier.classes) if self.classifier is not None and self.linear else []


def _timm_config(model: nn.Module, preprocess: Preprocess, label_names: list[str]) -> dict[str, Any]:
    """config.json as timm writes it."""
    extra: dict[str, Any] = {"pretrained_cfg": {"tag": "rlpjepa"}} | ({"label_names": label_names} if label_names else {})
    try:
        with tempfile.TemporaryDirectory() as scratch:
            timm.models.save_for_hf(model, scratch, safe_serialization=True, data_config=preprocess.data_config(), model_config=extra)
            config: dict[str, Any] = parse_json((Path(scratch) / CONFIG).read_bytes(), CONFIG)
    except OSError as error:
        raise OutputError(f"{tempfile.gettempdir()}: cannot write: {error.strerror or error}") from error
    except ValueError as error:  # an argument such as act_layer=nn.GELU
        raise UsageError(f"the backbone cannot be described in config.json: {first_line(error)}") from error
    config.get("model_args", {}).pop("num_classes", None)  # transformers' AutoModel passes it itself
    return config


def _serialized(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
