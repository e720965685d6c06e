"""Non-negative contrastive learning."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from ...objectives.contrast import info_nce
from . import METHODS
from .base import Centred, Features, Learned

__all__ = ["NonNegativeContrastive"]


@METHODS.register("ncl")
class NonNegativeContrastive(Learned):
    """NCL (arXiv 2403.12459): one rectified linear layer, InfoNCE at T = 0.2, trained once for every k."""

    order = 50

    def build(self, features: Features, k: int | None) -> nn.Module:
        return nn.Sequential(Centred(features.train), nn.Linear(features.train.shape[1], self.recipe.encoder.dim), nn.ReLU())

    def loss(self, views: Tensor, step: int) -> Tensor:
        return info_nce(self.module(views), 0.2)

    def encode(self, x: Tensor) -> Tensor:
        return self.module(x)
