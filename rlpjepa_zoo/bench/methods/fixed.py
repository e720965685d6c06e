"""Methods without training: the features themselves, principal components, random projections."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core import rng
from . import METHODS
from .base import Features, Method

__all__ = ["Dense", "PrincipalComponents", "RandomProjection"]


@METHODS.register("features")
class Dense(Method):
    """The k largest values of the features; with all values, the features as they are.

    Features as they are may be negative; codes cut from them are not.
    """

    order = 0
    random = False

    @classmethod
    def allows(cls, k: int, width: int) -> bool:
        return k <= width

    def fit(self, features: Features, k: int | None) -> None:
        pass

    def encode(self, x: Tensor) -> Tensor:
        return x

    def codes(self, x: Tensor, k: int | None) -> Tensor:
        return super().codes(x if k is None else x.relu(), k)


@METHODS.register("pca")
class PrincipalComponents(Method):
    """Principal components of the training features, their positive and negative parts side by side."""

    order = 60
    random = False

    @classmethod
    def allows(cls, k: int, width: int) -> bool:
        return k <= width

    def fit(self, features: Features, k: int | None) -> None:
        x = features.train.double()
        mean = x.mean(0)
        centred = x - mean
        axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, : min(x.shape)]
        self.mean, self.axes = mean.float().to(self.device), axes.float().to(self.device)

    def encode(self, x: Tensor) -> Tensor:
        scores = (x - self.mean) @ self.axes
        return torch.cat([scores.relu(), (-scores).relu()], dim=1)


@METHODS.register("random")
class RandomProjection(Method):
    """Random projections above a threshold for each, which gives the density of the target on training features (0.1 without a target)."""

    order = 70

    def fit(self, features: Features, k: int | None) -> None:
        x, target = features.train, self.recipe.target
        density = 0.1 if target is None else target.density_in_theory()
        axes = torch.randn(x.shape[1], self.recipe.encoder.dim, generator=rng.generator(self.recipe.seed, "bench-projection"))
        mean = x.mean(0)
        highest = math.ceil((1 - density) * len(x))
        blocks = [((x - mean) @ block).kthvalue(min(max(highest, 1), len(x)), dim=0).values for block in axes.split(256, dim=1)]
        self.mean, self.axes, self.thresholds = (part.to(self.device) for part in (mean, axes, torch.cat(blocks)))

    def encode(self, x: Tensor) -> Tensor:
        return ((x - self.mean) @ self.axes - self.thresholds).relu()
