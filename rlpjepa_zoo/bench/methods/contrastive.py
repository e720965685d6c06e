"""Non-negative contrastive learning, and the loss it shares with CSR."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import METHODS
from .base import Centred, Features, Learned

__all__ = ["NonNegativeContrastive", "info_nce"]


def info_nce(z: Tensor, temperature: float) -> Tensor:
    """InfoNCE of SimCLR (NT-Xent): every other view of an image is to be nearer than all views of other images.

    Args:
        z: (V, b, D), V >= 2 views of b images; rows are scaled to length 1.
        temperature: T > 0.

    Returns:
        The mean over pairs of views of one image of -log(exp(cosine / T) / sum of exp(cosine / T) over all other rows).

    Example:
        >>> z = torch.eye(4).expand(2, 4, 4)
        >>> round(float(info_nce(z, 0.2)), 4)
        0.0396
    """
    views, images = z.shape[:2]
    unit = F.normalize(z.flatten(0, 1), dim=1)
    similar = unit @ unit.T / temperature
    itself = torch.eye(views * images, dtype=torch.bool, device=z.device)
    image = torch.arange(images, device=z.device).repeat(views)
    pairs = (image[:, None] == image) & ~itself
    log_share = similar - similar.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    return -log_share[pairs].mean()


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
