"""Recipe sections for the optimiser, the run, the measurements during it, and publishing: every key with its type, default and meaning."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..core.schema import Count, CountOrZero, NonNegative, Positive, Probability, Section
from ..core.source import is_repository
from .base import OneOf

__all__ = ["OPTIMIZER_KEYS", "Hub", "Optim", "Probe", "Train"]


OPTIMIZER_KEYS: dict[str, set[str]] = {
    "adamw": {"betas", "decay_bias_and_norm"},
    "lars": {"momentum", "trust_coefficient"},
    "sgd": {"momentum", "decay_bias_and_norm"},
}
"""Values of `optim.name`, and the keys of the section that not every optimiser uses; `rlpjepa_zoo.training.optim` builds them."""


class Optim(Section):
    """Optimiser and learning-rate schedule: linear warm-up, then cosine decay."""

    name: Annotated[str, OneOf(OPTIMIZER_KEYS, without={"sgd"})] = "adamw"
    """Optimiser: AdamW, or LARS as in the code of the paper."""
    lr: Annotated[float, Field(gt=0, le=1e6)]
    """Peak learning rate at a batch of reference_batch; the rate used is lr * train.batch_size / reference_batch."""
    reference_batch: Count = 256
    """Batch size that the learning rates refer to."""
    weight_decay: NonNegative = 1e-4
    """Weight decay of the optimiser."""
    decay_bias_and_norm: bool = False
    """adamw only: apply weight decay to biases and normalisation parameters too. lars never does."""
    momentum: Probability = 0.9
    """lars and sgd only: momentum."""
    trust_coefficient: Positive = 0.02
    """lars only: coefficient of the trust ratio."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """adamw only: decay rates of the two moment estimates."""
    warmup_epochs: NonNegative = 10.0
    """Epochs of linear warm-up; fewer than train.epochs."""
    warmup_start_lr: NonNegative = 3e-5
    """Learning rate at the first step of the warm-up."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the cosine decay."""
    backbone_lr: Positive = 1.0
    """Factor on the learning rate of the backbone, such as 0.01 to change a pretrained backbone only slightly."""
    clip_grad: Positive | None = None
    """Largest norm of the gradient; null does not clip it."""

    @model_validator(mode="after")
    def _used(self) -> Self:
        for name in sorted(set().union(*OPTIMIZER_KEYS.values()) - OPTIMIZER_KEYS[self.name]):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"optim.{name}: has no meaning for {self.name}; remove it")
        return self


class Probe(Section):
    """Measurements during training. They never change the encoder."""

    online: bool = True
    """Train linear classifiers on detached features and z during the run, if the images have labels."""
    lr: Positive = 5e-3
    """Peak learning rate of the linear classifiers, scaled by the batch size like optim.lr."""
    every_epochs: Count = 10
    """Epochs between evaluations (kNN accuracy, density in evaluation mode); the last epoch is always evaluated."""
    knn_k: Count = 20
    """Number of neighbours that vote in kNN."""
    knn_temperature: Positive = 0.07
    """Temperature of the kNN votes: a neighbour votes with weight exp(cosine / temperature)."""
    bank: Count = 10_000
    """Largest number of training images among which kNN searches."""
    eval_images: Count = 10_000
    """Largest number of evaluation images used."""


class Train(Section):
    """Length of the run, batch, precision, checkpoints and limits."""

    epochs: Annotated[float, Field(gt=0, le=1e9)]
    """Length of the run in epochs; may be a fraction."""
    batch_size: Annotated[int, Field(ge=2, le=10**9)] = 256
    """Images per step over all processes; each image gives views.count views."""
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Mixed precision of the network; no means float32. The loss is always float32."""
    channels_last: bool = True
    """Store images and weights in the memory format channels_last."""
    compile: bool = False
    """Compile the network with torch.compile."""
    num_workers: Annotated[int, Field(ge=0, le=4096)] = 2
    """Worker processes per rank that decode and augment images; 0 does this in the training process."""
    log_every: Count = 20
    """Steps between rows of metrics.jsonl."""
    checkpoint_minutes: NonNegative = 10.0
    """Minutes between checkpoints. A checkpoint is always saved after an evaluation and at the end of the run."""
    keep: Annotated[int, Field(ge=2, le=10**9)] = 2
    """Number of newest checkpoints to keep; at least 2, because the newest may be damaged."""
    best: Literal["knn_z", "knn_features", "excess"] | None = None
    """Also keep the checkpoint and the encoder (in encoder-best/) of the evaluation with the best value of this metric. excess is the sliced
    distance above its floor, measured on the last training batches."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights. The averaged weights are measured and published. The decay warms up from 0 as
    1 - (1 + t)^(-2/3) at update t. Null publishes the weights themselves."""
    stop_after: Count | None = None
    """Step after which the run ends early, with evaluation and publishing as at its end. Schedules keep the length of train.epochs, so a resume
    with another value, or null for the whole length, goes on with the losses that the run would have had. The evaluation at the end is one more, so
    the shift of a held density may differ in its last digits."""
    max_skipped: CountOrZero = 5
    """Number of consecutive steps with a non-finite loss or gradient that are skipped; one more ends the run."""
    processes: Count | None = None
    """Number of processes that the run must have, so that a launch that starts fewer is refused; null accepts any."""
    timeout_minutes: Annotated[float, Field(gt=0, le=1440)] = 30.0
    """Minutes that processes wait for each other before the run ends with an error."""
    loader_timeout_minutes: Annotated[float, Field(gt=0, le=1440)] = 10.0
    """Minutes that a step waits for a batch from its workers before the run ends with an error. Not used without workers or for streams."""
    max_bad_fraction: Probability = 1.0
    """Largest share of training images that may be unreadable; a larger share ends the run."""
    trackers: tuple[str, ...] = ()
    """Accelerate trackers (tensorboard, wandb, trackio, ...) in addition to metrics.jsonl, which is always written."""


class Hub(Section):
    """Publishing during training: after every evaluation, in the background. If the Hub fails, the run logs one line and continues."""

    repo: str | None = None
    """Repository on the Hub, owner/name; null publishes nothing."""
    private: bool | None = None
    """Visibility. An existing repository must have it. Null accepts any, and creates a private repository."""
    revision: str | None = None
    """Branch to commit to; null means main."""
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")] | None = None
    """SPDX identifier of the licence on the card, such as apache-2.0; null prints "not stated"."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.repo is not None and not is_repository(self.repo):
            raise ValueError(f"hub.repo: expected owner/name, got '{self.repo}'")
        if self.repo is None and (self.revision is not None or self.private is not None):
            raise ValueError("hub.repo: needed with hub.revision and hub.private; set it, or remove them")
        return self
