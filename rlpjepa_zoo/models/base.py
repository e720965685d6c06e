"""`PublishedModel`: fingerprint, evaluation mode and saving, which encoders and classifiers share."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import timm
import torch
import torch.nn as nn
from timm.models._hub import save_config_for_hf
from torch import Tensor

from ..core import package
from ..core.files import disk_errors, existing_parent, parse_json, partial_folder
from ..core.source import expanded
from ..data.preprocess import Preprocess
from ..errors import DataError, NonFiniteError, UsageError, ZooError, first_line
from ..hub import card
from ..hub.folder import write_folder
from ..hub.format import CONFIG, GOLDEN, RECIPE, LinearLayer, Projector, Published, pack, tensor_place
from ..hub.push import push
from ..ops import modules
from ..ops.memory import reused_memory
from ..ops.tensors import hash_tensors, tensor_bytes
from ..sparse.topk import Dial
from . import golden
from .small_resnet import SMALL_RESNETS

__all__ = ["Layers", "PublishedModel", "check_float_batch", "is_matrix"]


def is_matrix(value: Tensor) -> bool:
    """Whether a tensor of a model is a matrix or kernel, which may be saved as float16."""
    return value.dim() >= 2 and value.is_floating_point()


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
        """Evaluation mode inside the block, for all threads; afterwards every module is in its own mode again. On a CPU, batches reuse memory."""
        with modules.evaluating(self), reused_memory(self.device):
            yield

    def train(self, mode: bool = True) -> Self:
        """Training mode, or evaluation mode; it takes effect after the blocks of `evaluating` of all threads."""
        modules.set_mode(self, mode, self._steady())
        return self

    def _steady(self) -> Sequence[nn.Module]:
        """Parts that stay in evaluation mode."""
        return ()

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> Any:
        """Weights and buffers by name; torch.compile and data parallelism around a part do not change its names."""
        state = super().state_dict(*args, prefix=prefix, **options)
        modules.shorten_names(self, state, prefix)
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        modules.lengthen_names(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def size_problem(self, height: int, width: int) -> str | None:
        """Why the backbone does not take images of this size, as it says itself; None if it does.

        One black image is tried; on the meta device nothing is computed.
        """
        try:
            with self.evaluating():
                self(torch.zeros(1, 3, height, width, device=self.device))
        except Exception as error:  # backbones refuse in their own ways
            if isinstance(error, MemoryError) or "allocate" in str(error):
                raise
            return first_line(error)
        return None

    def _check_size(self, source: Any) -> None:
        """Refuse a batch of preprocessed images whose size the backbone does not take."""
        if (
            isinstance(source, Tensor)
            and source.is_floating_point()
            and source.dim() == 4
            and source.shape[2:] != self.config.preprocess.size
        ):
            reason = self.size_problem(*source.shape[2:])
            if reason is not None:
                given, wanted = (f"{height} x {width}" for height, width in (source.shape[2:], self.config.preprocess.size))
                fix = f"preprocess images with .transform, which gives {wanted}"
                raise DataError(f"the backbone does not take images of {given} pixels ({reason}); {fix}")

    def fingerprint(self) -> str:
        """Hex digest of weights, buffers, preprocessing and dial: two models with equal fingerprints give equal outputs."""
        digest = hashlib.blake2b(repr(self.config.preprocess).encode(), digest_size=16)
        hash_tensors(digest, self._tensors())
        if (dial := getattr(self.config, "dial", None)) is not None:
            digest.update(repr(dial).encode())
        return digest.hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        """`state_dict`; refuses what holds no numbers that could be hashed or saved."""
        state: dict[str, Tensor] = self.state_dict()
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.is_quantized:
                raise UsageError(
                    f"{key} is not a plain tensor, as in quantised layers; a {self.noun} of such layers cannot be hashed or saved"
                )
            if value.is_meta:
                raise UsageError(f"{key} is on the device meta, so it has no values; load weights into the {self.noun} first")
        return state

    # --- the published folder --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rounded(self) -> Self:
        """A copy whose matrices and kernels are rounded to float16. It computes in float32, and its saves take half the bytes.

        Raises:
            UsageError: a weight is beyond the range of float16.

        Example:
            >>> import rlpjepa_zoo
            >>> enc = rlpjepa_zoo.create_encoder("test_resnet", dim=100).rounded()
            >>> weight = enc.last_layer.weight
            >>> weight.dtype, torch.equal(weight, weight.half().float())
            (torch.float32, True)
        """
        twin = copy.deepcopy(self)
        for key, value in twin._checked_state().items():
            if is_matrix(value):
                value.copy_(value.half().float())
                if not value.isfinite().all():
                    raise UsageError(f"{key} holds values beyond {torch.finfo(torch.float16).max:g}, the largest of float16")
        return twin

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
        target = expanded(path)
        return write_folder(path, self.contents(recipe, info, name, existing_parent(target.parent) / (target.name or CONFIG)))

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

    def contents(
        self, recipe: str | None = None, info: Mapping[str, Any] | None = None, name: str = "owner/repo", scratch: Path | None = None
    ) -> dict[str, bytes]:
        """The files of the published folder by name.

        Args:
            recipe, info, name: those of `save_pretrained`.
            scratch: path beside which timm writes a small file for a moment; in the system's folder for temporary files when None.
        """
        state = self._checked_state()
        matrices = {key for key, value in state.items() if is_matrix(value)}
        float16 = all(torch.equal(state[key].half().float(), state[key]) for key in matrices)
        published, linear = self._description(info, name, scratch or Path(tempfile.gettempdir()) / CONFIG, float16)
        self._refuse_other_layers(published, state)
        tensors: dict[str, dict[str, Tensor]] = {file: {} for file in published.tensor_files}
        for key, value in state.items():
            file, place = tensor_place(key, published, linear)
            tensors[file][place] = value.half() if float16 and key in matrices else value
        tensors[GOLDEN] = golden.make(self)
        files = {file: tensor_bytes(content, {"format": "pt"}) for file, content in tensors.items()} | card.files(published)
        recipe = self.config.recipe if recipe is None else recipe
        if recipe is not None:
            files[RECIPE] = recipe.encode()
        return pack(published, files)

    def _checked_state(self) -> dict[str, Tensor]:
        """The tensors to save; refuses what is not finite or not float32."""
        state = self._tensors()
        for key, value in state.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise NonFiniteError(f"{key} holds NaN or infinity; the {self.noun} is not saved")
            if value.is_floating_point() and value.dtype != torch.float32:
                raise UsageError(f"{key} is {value.dtype}; a published {self.noun} is float32, so call .float() first")
        return state

    def _description(self, info: Mapping[str, Any] | None, name: str, scratch: Path, float16: bool = False) -> tuple[Published, str]:
        """The model as config.json describes it, and timm's name of the linear layer (see `Layers`)."""
        timm_model = self._timm_model()
        layers = self._layers(timm_model)
        timm_config = _timm_config(timm_model, self.config.preprocess, layers.label_names, scratch)
        record = card.checked_info(self.config.info if info is None else info)
        published = Published(
            timm=timm_config,
            preprocess=dataclasses.asdict(self.config.preprocess),
            projector=layers.projector,
            classifier=layers.classifier,
            dial=layers.dial,
            float16=float16,
            name=name,
            needs_package=timm_config["architecture"] in SMALL_RESNETS,
            fingerprint=self.fingerprint(),
            info=record,
            versions=record.get("versions") or package.versions(),
        )
        return published, layers.linear

    def _refuse_other_layers(self, published: Published, state: Mapping[str, Tensor]) -> None:
        """Refuse what a load would refuse: tensors that the described model does not have."""
        with torch.device("meta"):
            backbone = timm.create_model(published.architecture, num_classes=0, **published.model_args)
            fresh = {key: value.shape for key, value in self._fresh(backbone).state_dict().items()}
        own = {key: value.shape for key, value in state.items()}
        for key in [*own, *fresh]:
            if own.get(key) != fresh.get(key):
                given, wanted = (tuple(shapes[key]) if key in shapes else "not there" for shapes in (own, fresh))
                reason = f"it is {given}, a new {published.architecture} with the saved arguments has {wanted}"
                raise UsageError(f"{key}: {reason}; layers that were changed after the {self.noun} was made cannot be loaded again")

    def _timm_model(self) -> Any:
        """The timm model that config.json describes; its weights are not read."""
        raise NotImplementedError

    def _layers(self, timm_model: Any) -> Layers:
        """The layers above the backbone; `timm_model` is the model that config.json describes."""
        raise NotImplementedError

    def _fresh(self, backbone: nn.Module) -> PublishedModel:
        """This model with a new backbone and new layers of the same sizes."""
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


def _timm_config(model: nn.Module, preprocess: Preprocess, label_names: list[str], scratch: Path) -> dict[str, Any]:
    """config.json as timm writes it."""
    extra: dict[str, Any] = {"pretrained_cfg": {"tag": "rlpjepa"}} | ({"label_names": label_names} if label_names else {})
    try:
        with partial_folder(scratch) as folder, disk_errors(scratch.parent):
            save_config_for_hf(model, str(folder / CONFIG), data_config=preprocess.data_config(), model_config=extra)
            config: dict[str, Any] = parse_json((folder / CONFIG).read_bytes(), CONFIG)
    except ValueError as error:  # an argument such as act_layer=nn.GELU
        raise UsageError(f"the backbone cannot be described in config.json: {first_line(error)}") from error
    config.get("model_args", {}).pop("num_classes", None)  # transformers' AutoModel passes it itself
    return config
