"""Autoencoders that keep the k largest values: CSR, CSRv2, and the plain top-k autoencoder.

Written from the papers. What is different here from the code of CSR's authors and from `SparseAutoEncoder` and `CSRLoss` of
sentence-transformers, which follow it:

- optimiser, rate, schedule, weight decay, batch size and number of units are those of the recipe (theirs: Adam at 4e-4, constant, no decay, batches
  of 4096, four units for each feature);
- features are centred and divided by one number, so that the rate of the recipe suits any backbone;
- the decoder is a matrix of its own. It starts as the weight of the encoder, and its rows, one for each unit, have length 1 (theirs is that weight);
- the two views are random views of an image (the authors encode the same features twice);
- a unit is dead after 30 steps in which no code has it (theirs count codes, of which a step makes two to four for each view);
- without dead units there is no term for them (theirs is then constant);
- the contrastive term is the authors' one, InfoNCE at T = 0.2 of codes of length 1 (that of sentence-transformers takes inner products, T = 1).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from ...objectives.contrast import info_nce
from ...objectives.reconstruction import decoded
from ...sparse.topk import keep_largest
from . import METHODS
from .base import Centred, Features, Learned

__all__ = ["CSR", "CSRv2", "TopKAutoencoder", "TopKSAE"]

_PATIENCE = 30
"""Steps in which no code has a unit, after which it counts as dead."""
_MOST_DEAD = 512
"""Dead units that reconstruct what is left, at most."""


class TopKAutoencoder(nn.Module):
    """x -> the k largest of relu(W (x - b) + c) -> U z + b, on centred features.

    Args:
        x: (n, F) training features.
        dim: D, number of units.
    """

    def __init__(self, x: Tensor, dim: int) -> None:
        super().__init__()
        self.centred, self.bias = Centred(x), nn.Parameter(torch.zeros(x.shape[1]))
        self.encoder = nn.Linear(x.shape[1], dim)
        nn.init.zeros_(self.encoder.bias)
        self.decoder = nn.Parameter(self.encoder.weight.detach().clone())
        self.idle: Tensor
        self.register_buffer("idle", torch.zeros(dim, dtype=torch.long))
        self.scale_decoder()

    @torch.no_grad()
    def scale_decoder(self) -> None:
        """Scale the rows of the decoder to length 1."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True).clamp_min(1e-8))

    def forward(self, centred: Tensor) -> Tensor:
        """All units (n, D) >= 0 of centred features (n, F)."""
        return self.encoder(centred - self.bias).relu()

    def terms(self, views: Tensor, k: int, more: int | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes of a batch, and the terms of its loss, each a mean over the views.

        Args:
            views: (V, b, F) features.
            k: values of a code.
            more: values of the second, richer code; None for none.

        Returns:
            Codes (V, b, D), and by name: ``k`` and ``more``, mean squared errors of the reconstructions; ``dead``, the mean squared error with
            which dead units reconstruct the error of the first, divided by the variance of that error over the batch (0 without dead units).
        """
        count, x = len(views), self.centred(views.flatten(0, 1))
        units = self(x)
        values, columns = units.topk(min(max(k, more or 0), units.shape[1]), dim=1)  # sorted: a code of k values is the first k
        z = torch.zeros_like(units).scatter(1, columns[:, :k], values[:, :k])
        error = x - self.bias - decoded(values[:, :k], columns[:, :k], self.decoder)
        terms = {"k": error.square().mean(), "dead": error.new_zeros(())}
        if more is not None:
            terms["more"] = (x - self.bias - decoded(values, columns, self.decoder)).square().mean()
        with torch.no_grad():
            self.idle += 1
            self.idle[columns[values > 0]] = 0
        if (dead := self.idle >= _PATIENCE).any():
            left = error.detach().unflatten(0, (count, -1))
            rest = (keep_largest(units * dead, _MOST_DEAD) @ self.decoder).unflatten(0, (count, -1))
            variance = (left - left.mean(1, keepdim=True)).square().mean((1, 2)).clamp_min(1e-12)
            terms["dead"] = ((rest - left).square().mean((1, 2)) / variance).mean()
        return z.unflatten(0, (count, -1)), terms


class _Autoencoder(Learned):
    """Training and use of a `TopKAutoencoder`."""

    one_fit = False
    module: TopKAutoencoder
    more_weight: ClassVar[float] = 0.0
    """Weight of the reconstruction from 4 k values."""
    contrast_weight: ClassVar[float] = 0.0
    """Weight of the contrastive term."""

    def build(self, features: Features, k: int | None) -> nn.Module:
        self.k = k or self.recipe.encoder.dim
        return TopKAutoencoder(features.train, self.recipe.encoder.dim)

    def k_at(self, step: int) -> int:
        """Values that codes have in a step."""
        return self.k

    def loss(self, views: Tensor, step: int) -> Tensor:
        k = self.k_at(step)
        z, terms = self.module.terms(views, k, 4 * k if self.more_weight else None)
        loss = terms["k"] + terms["dead"] / 32
        if self.more_weight:
            loss = loss + self.more_weight * terms["more"]
        return loss + self.contrast_weight * info_nce(z, 0.2) if self.contrast_weight else loss

    def after_update(self) -> None:
        self.module.scale_decoder()

    def encode(self, x: Tensor) -> Tensor:
        return self.module(self.module.centred(x))


@METHODS.register("csr")
class CSR(_Autoencoder):
    """CSR (arXiv 2503.01776): top-k autoencoder that reconstructs from k and 4 k values, with a contrastive term, trained for each k."""

    order = 20
    more_weight = 1 / 8
    contrast_weight = 0.1


@METHODS.register("csrv2")
class CSRv2(CSR):
    """CSRv2 without labels (arXiv 2602.05735): CSR whose k falls in a line from 64 over 70 % of the training."""

    order = 30

    def k_at(self, step: int) -> int:
        left = max(0.0, 1 - step / (0.7 * self.steps))
        return round(self.k + max(0, 64 - self.k) * left)


@METHODS.register("topk_sae")
class TopKSAE(_Autoencoder):
    """Top-k sparse autoencoder (arXiv 2406.04093): reconstructs from k values, trained for each k."""

    order = 40
