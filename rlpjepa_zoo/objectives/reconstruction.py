"""Reconstruction of a backbone's features from the largest values of z: a term beside the objective, with a decoder of its own.

The decoder is linear. Features are targets without gradient, centred, and scaled by one number so that their variance over the batch of all
ranks and all dimensions is 1; scales between features are kept, as neighbours by cosine depend on them. Top-k autoencoders on frozen features:
arXiv 2406.04093; for retrieval: arXiv 2503.01776.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..core import distributed

__all__ = ["ReconstructionLoss", "decoded"]

_FEW = 16
"""Where codes have at most D / 16 values, a decoder sums rows; else it multiplies matrices."""


def decoded(values: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """Product (n, F) of codes of few values and a matrix.

    Args:
        values, columns: (n, k) values of codes and their columns.
        weight: (D, F).

    Example:
        >>> decoded(torch.tensor([[2.0]]), torch.tensor([[1]]), torch.tensor([[1.0, 1.0], [3.0, 4.0]])).tolist()
        [[6.0, 8.0]]
    """
    if values.shape[1] * _FEW <= len(weight):  # n k F products instead of n D F
        return F.embedding_bag(columns, weight, per_sample_weights=values, mode="sum")
    return values.new_zeros(len(values), len(weight)).scatter(1, columns, values) @ weight


class ReconstructionLoss(nn.Module):
    """Mean over k of the squared error of a linear decoder on the k largest values of each row of z.

    Args:
        features: F, width of the features.
        dim: D, width of z.
        active: the numbers k >= 1; D or more means all values.

    Example:
        >>> term = ReconstructionLoss(features=6, dim=8, active=[2, 4])
        >>> loss = term(torch.randn(16, 6), torch.rand(16, 8, requires_grad=True))
        >>> loss.shape, loss.requires_grad
        (torch.Size([]), True)
    """

    def __init__(self, features: int, dim: int, active: Sequence[int]) -> None:
        super().__init__()
        self.active = tuple(active)
        bound = dim**-0.5  # as of nn.Linear
        self.weight = nn.Parameter(torch.empty(dim, features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, features: Tensor, z: Tensor) -> Tensor:
        """The unweighted term, a float32 scalar.

        Args:
            features: (n, F) of this rank; no gradient flows to them.
            z: (n, D) >= 0 of this rank.
        """
        with torch.autocast(z.device.type, enabled=False):
            wanted = self._standardised(features.detach().float())
            values, columns = z.float().topk(min(max(self.active), z.shape[1]), dim=1)  # sorted, so the k largest are the first k
            sums = [decoded(values[:, :k], columns[:, :k], self.weight) for k in self.active]
            return torch.stack([(each + self.bias - wanted).square().mean() for each in sums]).mean()

    @staticmethod
    def _standardised(features: Tensor) -> Tensor:
        """Features minus their mean over all ranks, divided by one scale."""
        centred = features - distributed.mean_over_ranks(features.mean(0))
        scale = distributed.mean_over_ranks(centred.square().mean()).sqrt()
        return centred / scale.clamp_min(torch.finfo(scale.dtype).tiny)
