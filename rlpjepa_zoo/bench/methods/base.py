"""What the methods share: the features they get, the interface, and one training loop for all that are learned.

Everything after the backbone is computed in float32. A learned method sees the same batches as the others (rows and views are functions of seed
and step), for the same number of steps, with optimiser, rate, weight decay and schedule of the recipe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ...config.pretrain import Recipe
from ...core import rng
from ...data.loader import rows_loader
from ...data.sources import Source
from ...models.encoder import SparseEncoder
from ...sparse.topk import keep_largest
from ...training.optim import ParamGroup, build_optimizer, set_learning_rates
from ...training.tasks.feature_cache import CachedViews
from ...training.tasks.pretrain import param_groups

__all__ = ["Centred", "Features", "Learned", "Method"]

_ROWS = 4096
"""Rows that are encoded at a time."""


class Features(NamedTuple):
    """Features of a frozen backbone: of random views of the training images, and of training and test images as evaluations see them."""

    encoder: SparseEncoder
    """Its backbone made the features. Its projector is not used."""
    source: Source
    """Training and test images."""
    views: CachedViews
    """Of N training images."""
    train: Tensor
    """(n, F) float32 on the CPU; unreadable images are left out."""
    train_labels: Tensor
    """(n,) int64, -1 where unknown."""
    test: Tensor
    """(m, F)"""
    test_labels: Tensor
    """(m,)"""


class Method(ABC):
    """One way to turn features into sparse codes.

    To add one, register a subclass with ``@METHODS.register("name")`` in a file of this folder. The first line of its docstring describes it
    in results.

    Args:
        recipe: of the comparison; `recipe.seed` is the seed of this repetition.
        device: where to compute.
    """

    order: ClassVar[int]
    """Place in tables."""
    default: ClassVar[bool] = True
    """Whether it is compared if no methods are named."""
    one_fit: ClassVar[bool] = True
    """Whether one fit serves every k. Otherwise there is a fit for each k, and no code with all values."""
    random: ClassVar[bool] = True
    """Whether the fit depends on the seed."""
    sparse: ClassVar[bool] = True
    """Whether codes have at most k values, so that their density means something."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device

    @classmethod  # noqa: B027 - most methods refuse nothing
    def check(cls, recipe: Recipe) -> None:
        """Refuse a recipe that the method cannot be compared with, before anything is encoded.

        Raises:
            RecipeError: names the key and the fix.
        """

    @classmethod
    def allows(cls, k: int, width: int) -> bool:
        """Whether there can be a code of k values from features of this width."""
        return True

    @abstractmethod
    def fit(self, features: Features, k: int | None) -> None:
        """Learn from the features of training images.

        Args:
            features: of the comparison; test features are not to be used.
            k: values that a code will have, for methods with a fit for each k; else None.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Codes (n, D) >= 0, with all their values, of features (n, F) on the device of the method."""

    @torch.no_grad()
    def codes(self, x: Tensor, k: int | None) -> Tensor:
        """Codes of features.

        Args:
            x: (n, F) float32.
            k: keep only this many largest values of each row; None keeps all.

        Returns:
            (n, D) float32 on the CPU, >= 0.
        """
        blocks = [self.encode(block.to(self.device)).float().cpu() for block in x.split(_ROWS)]
        return torch.cat(blocks if k is None else [keep_largest(block, k) for block in blocks])


class Learned(Method):
    """A method that is trained on random views by gradient descent."""

    module: nn.Module
    """What is trained."""
    steps: int
    """Of the training."""

    def fit(self, features: Features, k: int | None) -> None:
        recipe, n = self.recipe, features.source.length
        self.steps, per_epoch = recipe.steps(n)
        with rng.seeded(recipe.seed, "init"):
            self.module = self.build(features, k).to(self.device)
        optimizer = build_optimizer(recipe.optim.name, self.param_groups(), recipe.optim)
        views = CachedViews(features.views.features, features.views.labels, recipe.views.count, recipe.seed)
        self.module.train()
        for step, batch in enumerate(rows_loader(views, n, recipe, range(self.steps), 0, 1)):
            set_learning_rates(optimizer, recipe.optim, step, self.steps, per_epoch)
            optimizer.zero_grad(set_to_none=True)
            self.loss(batch.images[0].to(self.device), step).backward()
            if recipe.optim.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.clipped(), recipe.optim.clip_grad)
            optimizer.step()
            self.after_update()
        self.module.eval()
        self.finish(features)

    @abstractmethod
    def build(self, features: Features, k: int | None) -> nn.Module:
        """The module to train. torch's generator is at the start of the stream of this seed."""

    @abstractmethod
    def loss(self, views: Tensor, step: int) -> Tensor:
        """Loss of a batch.

        Args:
            views: (V, b, F) features of V views of each image.
            step: from 0.
        """

    def param_groups(self) -> list[ParamGroup]:
        """Parameters with their weight decay: as in pretraining."""
        return param_groups(self.module, None, self.recipe)

    def clipped(self) -> Iterable[nn.Parameter]:
        """Parameters whose gradient `optim.clip_grad` limits."""
        return self.module.parameters()

    def after_update(self) -> None:
        """What a step does after its update of the weights; by default nothing."""

    def finish(self, features: Features) -> None:
        """What a training does at its end, in evaluation mode; by default nothing."""


class Centred(nn.Module):
    """Features minus their mean, divided by one number: their standard deviation around it. So the rate of the recipe suits any backbone."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        mean = x.mean(0)
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("scale", (x - mean).square().mean().sqrt().clamp_min(1e-12))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale
