"""What is different from run to run: the interface between `rlpjepa_zoo.training.trainer` and what it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader

from ..core import distributed
from ..data.batch import Batch
from ..data.loader import make_loader
from ..data.sources import Source

__all__ = ["Loss", "Task", "agree"]


class Loss(NamedTuple):
    """What a step minimises."""

    total: Tensor
    """float32; its gradient reaches all that is trained."""
    terms: dict[str, Tensor]
    """By name, for the log and for the line about a step that is not finite."""


class Task:
    """What a run trains, measures and publishes; one object serves one run, whose methods all ranks call together.

    The core is the part of the trained module that is averaged, measured and published: a module with `fingerprint` and `contents`.
    """

    name: ClassVar[str]
    """Of the published thing and of its folder in that of the run."""
    best: ClassVar[Mapping[str, bool]]
    """What train.best can name, and whether more of it is better."""
    calls: ClassVar[Sequence[str]] = ()
    """Methods of the core, other than forward, that a step calls."""
    lighter: ClassVar[str] = ""
    """Keys that save memory, beside those of every run."""
    some_unused = False
    """Whether there are steps that give no gradient to some of what is trained."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe

    @property
    def every_epochs(self) -> int:
        """How often `measure` is called."""
        raise NotImplementedError

    def resolve_defaults(self) -> None:
        """Put into the recipe what it leaves to what the run starts from."""

    def accept(self, source: Source) -> Source:
        """The images to train on and to measure with; DataError or RecipeError if they will not do."""
        return source

    def build(self) -> Any:
        """A fresh core, the same every time."""
        raise NotImplementedError

    def wrap(self, core: Any, source: Source) -> nn.Module:
        """What is trained: a module around the core, so that one wrapper (DDP, autocast) covers all of it."""
        raise NotImplementedError

    def optimizer(self, core: Any, module: nn.Module) -> torch.optim.Optimizer:
        raise NotImplementedError

    def ready(
        self, core: Any, source: Source, autocast: Callable[[], AbstractContextManager[Any]], memory: Any, progress: bool
    ) -> list[tuple[int, str]]:
        """Called once before the first step; returns images that this rank could not read, and why.

        Args:
            core, source: of the run.
            autocast: a context for the precision of forward passes.
            memory: memory format of images.
            progress: show a progress bar on stderr.
        """
        return []

    def loader(self, source: Source, steps: range, finish: bool) -> DataLoader[Batch]:
        """This rank's batches of some steps; `finish`: make the views there."""
        return make_loader(source, self.recipe, steps, distributed.rank(), distributed.world_size(), finish)

    def before(self, core: Any, step: int, per_epoch: int) -> None:
        """Called before each step."""

    def inputs(self, groups: list[Tensor], labels: Tensor, step: int) -> tuple[Any, ...]:
        """What the module is called with.

        Args:
            groups: views of each size, (V b, 3, S, S).
            labels: (b,), -1 where unknown.
            step: number of the step.
        """
        return groups, labels

    def loss(self, output: Any, step: int) -> Loss:
        """The loss of what the module returned."""
        raise NotImplementedError

    def numbers(self, loss: Loss, output: Any) -> dict[str, float]:
        """A row of the log about a step, over all ranks; with `loss` in it."""
        raise NotImplementedError

    def noted(self, step: int, row: Mapping[str, float]) -> dict[str, float]:
        """What is remembered of a row of the log as the newest measurement; NonFiniteError ends a run that is lost."""
        return {}

    def brief(self, row: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, str]:
        """What the progress bar shows."""
        return {"loss": f"{row['loss']:.3f}"}

    def shown(self, core: Any) -> Any:
        """What is measured and published of a core that is not sharded."""
        return core

    def measure(self, shown: Any, source: Source, autocast: Callable[[], AbstractContextManager[Any]]) -> dict[str, float]:
        """Figures in evaluation mode; every rank has its share of the work."""
        raise NotImplementedError

    def alarms(self, metrics: Mapping[str, float], still_training: bool = False) -> list[str]:
        """What is wrong by the figures, in sentences."""
        return []

    def chosen(self, metric: str) -> str:
        """How the evaluation that is kept by train.best = metric was chosen, for its card."""
        return f"chosen by {metric} on these very images, so too good"

    def aim(self, source: Source) -> str:
        """What is trained and what for, in a few words."""
        raise NotImplementedError

    def describe(
        self, core: Any, source: Source, metrics: Mapping[str, float], training: Mapping[str, Any], log_file: Path
    ) -> dict[str, Any]:
        """The record that the card shows, see `rlpjepa_zoo.training.publisher.describe`."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of the task, JSON-able."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""


def agree(device: torch.device, *flags: float) -> list[float]:
    """The largest of each flag over ranks, so that all save and stop at the same step."""
    if distributed.world_size() == 1:
        return [float(flag) for flag in flags]
    return distributed.max_over_ranks(torch.tensor([float(flag) for flag in flags], device=device)).tolist()
