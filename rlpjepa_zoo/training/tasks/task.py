"""The interface between the trainer and what it trains: nine hooks and a few plain attributes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ...core import distributed
from ...data.sources import Source
from ..optim import ParamGroup

__all__ = ["Autocast", "Best", "Description", "Logged", "Step", "Task", "largest_over_ranks"]

Autocast = Callable[[], AbstractContextManager[Any]]
"""Opens a context for the precision of forward passes."""


class Best(NamedTuple):
    """A metric that `train.best` can name."""

    higher: bool
    """Whether higher values are better."""
    note: str = "selected by {metric} on these evaluation images, so the value is optimistic"
    """How the checkpoint was selected, for the card; {metric} is the name of the metric."""

    def improves(self, value: float, before: float | None) -> bool:
        """Whether a value is better than the best before. A non-finite value never is: no value compares with NaN, so NaN would stay."""
        return math.isfinite(value) and (before is None or (value > before if self.higher else value < before))


class Logged(NamedTuple):
    """The numbers of a logged step."""

    row: dict[str, float]
    """Means over all ranks, by name; contains `loss`."""
    failure: str | None = None
    """Why the run cannot go on. The trainer writes the row, then raises NonFiniteError."""


class Step(NamedTuple):
    """The result of one forward pass."""

    loss: Tensor
    """float32 scalar to minimise; its gradient reaches all trained parameters."""
    terms: dict[str, Tensor]
    """Terms of the loss by name, for the message about a non-finite step."""
    log: Callable[[], Logged]
    """Computes the numbers for the log. Only called when the step is logged, on all ranks."""


class Description(NamedTuple):
    """What a run says about itself."""

    sentence: str
    """What is trained and for what, in a few words, for the first line of the log."""
    record: dict[str, Any]
    """What the card shows: `EncoderConfig.info` or `ClassifierConfig.info`."""
    alarms: list[str]
    """What is wrong according to the metrics, in sentences."""


class Task:
    """What a run trains, measures and publishes. One object serves one run; all ranks call each hook.

    The trainer calls `setup`, then `module`, then `param_groups`, each once, and then the other hooks in any order. Only `setup` runs where
    a failure of one rank stops all; it must not communicate with other ranks. The other hooks may.
    """

    name: ClassVar[str]
    """Artifact name and its sub-folder in the run directory."""
    best: ClassVar[Mapping[str, Best]]
    """Metrics that `train.best` can name."""
    progress: ClassVar[Mapping[str, str]]
    """Label on the progress bar -> name of a logged number or, if no such number is logged, of a metric."""
    remember: ClassVar[Mapping[str, str]] = {}
    """Logged number -> name under which the trainer keeps it among the newest metrics. Non-finite values are not kept."""
    forward_methods: ClassVar[Sequence[str]] = ()
    """Methods of the core, other than forward, that a step calls. FSDP gathers the weights before them."""
    memory_keys: ClassVar[Sequence[str]] = ()
    """Recipe keys that reduce memory, beside those of every run."""
    unused_parameters: bool = False
    """Whether some steps give no gradient to some trained parameters."""
    cached_views: int | None = None
    """Number of random views per image whose features are computed once and kept; None encodes new views in every step."""
    every_epochs: int
    """Epochs between two evaluations."""
    settled: bool = True
    """Whether an evaluation now counts for `train.best`."""

    recipe: Any
    """The recipe. `setup` replaces it by one with all defaults resolved."""
    source: Source
    """Images for training and evaluation; set by `setup`. The trainer may replace them by decoded copies in memory."""
    core: Any
    """The part of the trained module that is averaged, measured and published: has `fingerprint` and `contents`. Set by `setup`."""

    def setup(self, source: Source) -> None:
        """Resolve defaults of the recipe, check and select the images, and build the core. Sets `recipe`, `source` and `core`.

        Args:
            source: the opened images.

        Raises:
            DataError, RecipeError: the images cannot be used.
            UsageError, ModelError, HubError: the core cannot be built.
        """
        raise NotImplementedError

    def set_up_core(self) -> None:
        """The part of `setup` that needs no images: what of the recipe can be checked without them."""
        raise NotImplementedError

    def module(self) -> nn.Module:
        """The trained module around the core, so that one wrapper (DDP, autocast) covers all of it. Also creates the loss."""
        raise NotImplementedError

    def param_groups(self) -> list[ParamGroup]:
        """Trained parameters in groups; the first is that of the core."""
        raise NotImplementedError

    def step(self, forward: Callable[..., Any], views: list[Tensor], labels: Tensor, step: int) -> Step:
        """Forward pass and loss of one batch.

        Args:
            forward: calls the module, in the precision of the run.
            views: one tensor for each size, (V b, 3, S, S); or cached features (V b, F).
            labels: (b,), -1 where unknown.
            step: number of the step, from 0.
        """
        raise NotImplementedError

    def after_update(self) -> None:
        """Called after every update of the weights; not after a step that was skipped."""

    def baseline(self, artifact: Any, autocast: Autocast) -> dict[str, float]:
        """Metrics of the artifact before the first step; by default none. A resumed run remembers them."""
        return {}

    def evaluate(self, artifact: Any, autocast: Autocast) -> dict[str, float]:
        """Metrics in evaluation mode; each rank does its share of the work.

        Args:
            artifact: what `artifact` returned.
            autocast: context for the precision of forward passes.
        """
        raise NotImplementedError

    def artifact(self, core: Any) -> Any:
        """What is measured and published of a core that is not sharded."""
        return core

    def describe(
        self, metrics: Mapping[str, float], training: Mapping[str, Any] | None = None, log_file: Path | None = None, final: bool = True
    ) -> Description:
        """What the run says about itself.

        Args:
            metrics: the newest of each kind.
            training: what the section "Training" of the card lists.
            log_file: metrics.jsonl, for the picture on the card.
            final: False while the run goes on, when some alarms would be premature.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """JSON-able state that a checkpoint must hold."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned. From older checkpoints `state` has keys of the trainer too."""


def largest_over_ranks(device: torch.device, *values: float) -> list[float]:
    """The largest of each value over all ranks, so that all take the same decision at the same step."""
    if distributed.world_size() == 1:
        return [float(value) for value in values]
    return distributed.max_over_ranks(torch.tensor([float(value) for value in values], device=device)).tolist()
