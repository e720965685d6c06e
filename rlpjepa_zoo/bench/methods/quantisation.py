"""Product quantisation, the usual way to make dense vectors small, at equal bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import rng
from . import METHODS
from .base import Features, Method

__all__ = ["ProductQuantisation", "kmeans"]

_CENTRES = 256
_ROWS_PER_CENTRE = 64


def kmeans(x: Tensor, centres: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Centres of Lloyd's algorithm, started at different random rows.

    Args:
        x: (n, d).
        centres: at most this many; n if there are fewer rows.
        generator: of the first centres, on the CPU.
        rounds: of assignment and mean. A centre without rows stays where it is.

    Example:
        >>> x = torch.tensor([[0.0], [0.2], [5.0], [5.2]])
        >>> kmeans(x, 2, torch.Generator().manual_seed(0)).sort(0).values.flatten().tolist()
        [0.10000000149011612, 5.099999904632568]
    """
    means = x[torch.randperm(len(x), generator=generator)[:centres].to(x.device)]
    for _ in range(rounds):
        nearest = _nearest(x, means)
        counts = torch.bincount(nearest, minlength=len(means))
        sums = torch.zeros_like(means).index_add_(0, nearest, x)
        means = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), means)
    return means


def _nearest(x: Tensor, means: Tensor) -> Tensor:
    return (means.square().sum(1) / 2 - x @ means.T).argmin(1)


@METHODS.register("pq")
class ProductQuantisation(Method):
    """Product quantisation of the features, scaled to length 1, at equal bytes: 4 k parts of 8 bits, decoded before the search.

    A sparse code of k values takes 2 bytes for each column and 2 for each value. Codes are decoded vectors, so they are dense, and negative
    where features are. Queries are quantised like the images they search.
    """

    order = 80
    one_fit = False
    sparse = False

    @classmethod
    def allows(cls, k: int, width: int) -> bool:
        return 4 * k <= width

    def fit(self, features: Features, k: int | None) -> None:
        draw = rng.generator(self.recipe.seed, "bench-pq")
        rows = torch.randperm(len(features.train), generator=draw)[: _CENTRES * _ROWS_PER_CENTRE]
        x = F.normalize(features.train[rows].to(self.device), dim=1)
        self.means = [kmeans(part, _CENTRES, draw) for part in x.tensor_split(4 * (k or 1), dim=1)]

    def encode(self, x: Tensor) -> Tensor:
        parts = F.normalize(x, dim=1).tensor_split(len(self.means), dim=1)
        return torch.cat([means[_nearest(part, means)] for part, means in zip(parts, self.means, strict=True)], dim=1)

    def codes(self, x: Tensor, k: int | None) -> Tensor:
        return super().codes(x, None)
