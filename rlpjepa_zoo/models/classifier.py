"""`Classifier`: the backbone of an encoder, for input "z" also its projector, and a linear layer.

The published folder of a classifier on features is an ordinary timm classifier: plain timm opens it and gives the same logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn as nn
from torch import Tensor

from ..data.preprocess import Preprocess
from ..errors import NonFiniteError, UsageError
from ..hub.format import LinearLayer, Projector
from ..ops.memory import reused_memory
from ..ops.modules import as_weights, make_projector
from .base import Layers, PublishedModel, check_float_batch
from .encoder import EncoderConfig, SparseEncoder
from .inference import Batch, OnError, source_batches

__all__ = ["Classifier", "ClassifierConfig", "Prediction", "head_name", "make_classifier", "plain_timm"]


@dataclass(frozen=True)
class ClassifierConfig:
    """Arguments that build the classifier again, and the record of its training.

    Attributes:
        encoder: configuration of the encoder that gave backbone and projector.
        input: of the linear layer, ``"features"`` or ``"z"``.
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
        """Width of the input of the linear layer."""
        return self.encoder.features if self.input == "features" else self.encoder.dim

    @property
    def dim(self) -> int:
        """Number of classes."""
        return len(self.classes)


class Prediction(NamedTuple):
    """Predictions of `Classifier.predict` for n images, in input order."""

    ids: list[Any]
    labels: list[str]
    """Most probable class of each image."""
    probabilities: np.ndarray[Any, Any]
    """(n, C) float32, rows sum to 1."""


class Classifier(PublishedModel):
    """Images to logits. Made by `rlpjepa_zoo.finetune` and loaded by `rlpjepa_zoo.load_classifier`.

    Attributes:
        backbone: timm model with num_classes = 0.
        projector: ends in ReLU; None for input "features".
        head: the linear layer.
        transform: PIL image -> tensor (3, H, W), the evaluation preprocessing that travels with the weights.
        config: `ClassifierConfig`.
        frozen: no gradient and evaluation mode for all but `head`.
        steady: evaluation mode for all but `head`, with gradients (for training adapters).

    Example:
        >>> import rlpjepa_zoo
        >>> encoder = rlpjepa_zoo.create_encoder("test_resnet", dim=16)
        >>> classifier = make_classifier(encoder, ["cat", "dog"]).eval()
        >>> classifier(torch.zeros(2, 3, 64, 64)).shape, classifier.classes
        (torch.Size([2, 2]), ('cat', 'dog'))
    """

    noun = "classifier"
    config: ClassifierConfig

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

    def _steady(self) -> Sequence[nn.Module]:
        body = (self.backbone, self.projector) if self.frozen or self.steady else ()  # batch statistics stay as they were
        return [module for module in body if module is not None]

    def features(self, x: Tensor) -> Tensor:
        """Input of the linear layer: (B, F) for input "features", (B, D) for input "z"."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone(as_weights(x, self.backbone))
            if self.projector is not None:
                features = self.projector(as_weights(features, self.projector))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of a preprocessed float batch x (B, 3, H, W)."""
        check_float_batch(x, UsageError, "preprocess images with classifier.transform")
        return self.outputs(self.features(x))

    def outputs(self, features: Tensor) -> Tensor:
        """Logits (B, C) from the input of the linear layer."""
        return self.head(as_weights(features, self.head))

    def predict(
        self, source: Any, batch_size: int | None = None, num_workers: int = 0, progress: bool = False, on_error: OnError = "raise",
        failures: list[tuple[Any, str]] | None = None,
    ) -> Prediction:  # fmt: skip
        """Classify images, in evaluation mode. `probabilities` does it batch by batch; `rlpjepa predict` writes a file.

        Args:
            source: as of `SparseEncoder.embed`: a folder, paths, PIL images, a Hugging Face dataset, a preprocessed float tensor (B, 3, H, W), ...
            batch_size: images in a batch, >= 1; None chooses by the image size.
            num_workers: threads that decode images; 0 decodes in the calling thread.
            progress: show a progress bar on stderr.
            on_error: at an unreadable image, ``raise``, or ``skip`` it and append (id, reason) to `failures`.
            failures: list that receives the ids of skipped images and the reasons.

        Raises:
            DataError: no such images, or an unreadable one.
            NonFiniteError: the classifier gave NaN or infinity.
        """
        self._check_size(source)
        ids, parts = [], [torch.zeros(0, len(self.classes))]
        options: dict[str, Any] = {"num_workers": num_workers, "progress": progress, "on_error": on_error}
        with closing(self.probabilities(source, batch_size, **options)) as batches:
            for batch, probabilities in batches:
                ids += batch.ids
                parts.append(probabilities)
                if failures is not None:
                    failures += batch.failures
        probabilities = torch.cat(parts)
        return Prediction(ids, [self.classes[i] for i in probabilities.argmax(1).tolist()], probabilities.numpy())

    def probabilities(
        self, source: Any, batch_size: int | None = None, num_workers: int = 0, progress: bool = False, on_error: OnError = "raise",
        fix: str = "",
    ) -> Generator[tuple[Batch[Any], Tensor], None, None]:  # fmt: skip
        """Batches of images and the class probabilities (n, C) float32 of their n readable images, on the CPU.

        Args:
            source, batch_size, num_workers, progress, on_error: as of `predict`.
            fix: appended to the message about an unreadable image.
        """
        batches = source_batches(
            source, self.config.preprocess, self.device, batch_size=batch_size, num_workers=num_workers, on_error=on_error, fix=fix,
            progress="predict" if progress else None,
        )  # fmt: skip
        with closing(batches), reused_memory(self.device):
            for batch in batches:
                yield batch, self._probabilities(batch) if batch.ids else torch.zeros(0, len(self.classes))

    @torch.inference_mode()
    def _probabilities(self, batch: Batch[Any]) -> Tensor:
        with self.evaluating():
            logits = self(batch.x).float().cpu()
        if not logits.isfinite().all():
            raise NonFiniteError(f"the classifier gave NaN or infinity for the batch that starts at {batch.ids[0]!r}")
        return logits.softmax(1)

    # --- the published folder --------------------------------------------------------------------------------------------------------

    def _timm_model(self) -> Any:
        with torch.device("meta"):
            return plain_timm(self.config.encoder, len(self.classes) if self.projector is None else 0)

    def _layers(self, timm_model: Any) -> Layers:
        config, linear = self.config, LinearLayer(self.config.input, self.classes)
        if self.projector is None:
            return Layers(classifier=linear, linear=head_name(timm_model, _body(self)))
        return Layers(Projector(config.encoder.dim, config.encoder.hidden_dim, config.encoder.projector_depth), linear)

    def _fresh(self, backbone: nn.Module) -> Classifier:
        sizes, config = self.config.encoder, self.config
        projector = None if self.projector is None else make_projector(sizes.features, sizes.hidden_dim, sizes.dim, sizes.projector_depth)
        return Classifier(backbone, projector, nn.Linear(config.features, config.dim), config)


def make_classifier(encoder: SparseEncoder, classes: Sequence[str], input: str = "features") -> Classifier:
    """A new linear layer on the layers of an encoder, which are shared. Weights are N(0, 0.01^2) from torch's generator, biases 0.

    Args:
        encoder: its backbone, and its projector for input "z", are used without a copy.
        classes: names, at least two.
        input: ``"features"`` or ``"z"``.

    Raises:
        UsageError: fewer than two classes, or an architecture that has no plain linear classifier in timm.
    """
    if len(classes) < 2:
        raise UsageError(f"classes: expected at least two, got {len(classes)}")
    if input == "z" and encoder.config.dial is not None:
        raise UsageError(
            "start.input: the encoder has a dial, which passes no gradient to dropped values; use features, or the encoder without the dial"
        )
    config = ClassifierConfig(dataclasses.replace(encoder.config, dial=None), input, tuple(map(str, classes)))
    if input == "features":
        with torch.device("meta"):
            head_name(plain_timm(encoder.config, len(classes)), _body(encoder))
    head = nn.Linear(config.features, len(classes))
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return Classifier(encoder.backbone, encoder.projector if input == "z" else None, head, config)


def _body(model: PublishedModel) -> list[str]:
    """Tensor names of the backbone, as timm has them."""
    return [name.removeprefix("backbone.") for name in model.state_dict() if name.startswith("backbone.")]


def plain_timm(encoder: EncoderConfig, classes: int) -> Any:
    """The timm classifier with the backbone of an encoder; of 0 classes, the backbone alone."""
    return timm.create_model(encoder.architecture, num_classes=classes, **encoder.model_args)


def head_name(model: Any, body: Collection[str]) -> str:
    """Name of the single linear layer from pooled features to the logits of a timm classifier.

    Args:
        model: the timm classifier.
        body: tensor names of its backbone alone.

    Raises:
        UsageError: the classifier has another kind of head.
    """
    name = model.pretrained_cfg.get("classifier")
    names = model.state_dict()
    if not isinstance(name, str) or names.keys() ^ set(body) != {f"{name}.weight", f"{name}.bias"} or names[f"{name}.weight"].dim() != 2:
        architecture = model.pretrained_cfg.get("architecture")
        raise UsageError(f"{architecture}: its classifier in timm is not one linear layer on pooled features; use start.input=z")
    return name
