"""The interface of training objectives: options from the recipe, loss terms, numbers for the log, state for a resume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..core.schema import Section
from ..distributions import RectifiedGeneralizedGaussian

__all__ = ["Objective", "Options", "Terms", "invariance"]


class Options(Section):
    """The section `objective` of a recipe: each objective has a subclass with its own keys."""

    name: str
    """Name of the objective, see `rlpjepa_zoo.list_objectives`."""

    @classmethod
    def drop_replaced(cls, values: dict[str, Any], overrides: Mapping[str, str]) -> None:
        """Remove the keys that an override of another key replaces; by default none.

        Args:
            values: the section as text, with the overrides; changed in place.
            overrides: values of the overridden keys of this section.
        """

    def check_dim(self, dim: int) -> None:
        """Refuse options that do not fit an embedding width.

        Raises:
            ValueError: the message starts with the key.
        """


class Terms(NamedTuple):
    """Result of an objective: `total` is the weighted sum, with gradient; `parts` are its unweighted summands by name."""

    total: Tensor
    parts: dict[str, Tensor]


class Objective(ABC):
    """A loss on the embeddings of several views of a batch of images.

    A new objective is one file: a subclass with its `Options`, registered by ``@OBJECTIVES.register("name")``.
    """

    Options: ClassVar[type[Options]]
    """Keys of the recipe's section `objective` for this objective."""
    needs_target: ClassVar[bool] = False
    """Whether the recipe must have a section `target`. If not, it must have none."""
    monitored: ClassVar[tuple[str, ...]] = ()
    """Names of the numbers that `monitor` returns for a run. `train.best` can name `excess` if it is one of them."""
    follows_schedule: ClassVar[bool] = False
    """Whether the objective uses `schedule`. If not, a recipe with `target.anneal` is refused."""
    schedule: Callable[[int], RectifiedGeneralizedGaussian] | None = None
    """Law of the target at a step, set for a run whose target changes; None if it does not."""

    @classmethod
    @abstractmethod
    def build(cls, options: Any, *, target: RectifiedGeneralizedGaussian | None, dim: int, batch_size: int, seed: int) -> Self:
        """The objective for a run. All ranks call this together.

        Args:
            options: validated, an instance of `Options`.
            target: law of one coordinate of the embeddings; None if the recipe has no target.
            dim: embedding width D.
            batch_size: images per step over all ranks.
            seed: seed of the run.

        Raises:
            RecipeError: options that cannot be used.
        """

    @abstractmethod
    def __call__(self, views: Tensor, step: int) -> Terms:
        """Loss terms of a step.

        Args:
            views: (V, b, D) embeddings of V views of this rank's b images.
            step: number of the step; all randomness is a function of seed and step.
        """

    def monitor(self, parts: Mapping[str, float], step: int) -> dict[str, float]:
        """Further numbers for the log.

        Args:
            parts: values of `Terms.parts`, averaged over ranks.
            step: number of the step that gave them.
        """
        return {}

    @abstractmethod
    def describe(self) -> str:
        """One phrase for the log and the model card."""

    def state(self) -> dict[str, Any]:
        """JSON-able state for a checkpoint."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore what `state` returned; `state` may have other keys, or lack some if an older version wrote it."""


def invariance(z: Tensor) -> Tensor:
    """Mean over pairs of views, batch and dimensions of the squared difference.

    Args:
        z: (V, B, D), V >= 1, embeddings of V views of the same images; no normalisation, no stop-gradient.

    Returns:
        Scalar, float32 (float64 for float64 `z`); zero for one view. For V = 2 it is mean((z1 - z2)^2).

    Example:
        >>> float(invariance(torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])))
        0.5
    """
    views = z.shape[0]
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        if views < 2:
            return z.sum() * 0.0
        if views == 2:
            return (z[0] - z[1]).square().mean()
        return (z - z.mean(0)).square().mean() * (2 * views / (views - 1))  # = mean over pairs, in O(V)
