"""The objective of Rectified LpJEPA: invariance between views + sliced 2-Wasserstein distance to the rectified target (RDMReg).

Shapes: B batch, D embedding width, N directions, V views. Reductions are means (over N, B, V; for the invariance over B, D and pairs
of views), so weights carry over between batch sizes and widths. Everything runs in float32 (float64 in, float64 inside) with autocast
off: half precision would change the law of the target. Source: arXiv 2602.01456, section 4; the estimator is the mean over directions
of the squared differences of sorted projections.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import distributed, rng
from ..distributions import RectifiedGeneralizedGaussian
from ..ops.directions import cut, directions, slices
from ..ops.sliced_wasserstein import sliced_wasserstein

__all__ = ["RectifiedLpJEPALoss", "Terms", "invariance"]


def invariance(z: Tensor) -> Tensor:
    """Mean over pairs of views, batch and dimensions of the squared difference.

    Args:
        z: (V, B, D), V >= 1, rectified embeddings of V views of the same images; no normalisation, no stop-gradient.

    Returns:
        Scalar; zero for one view. For V = 2 it is mean((z1 - z2)^2).

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


class Terms(NamedTuple):
    """What the objective returns: `loss` = weighted sum (with gradient), and its two unweighted parts."""

    loss: Tensor
    invariance: Tensor
    matching: Tensor


class RectifiedLpJEPALoss:
    """weight_invariance * invariance + weight_matching * mean over views of the sliced distance to the target.

    Targets and directions are drawn from (seed, step), the same on every rank, for the batch gathered from all ranks; each rank
    works on its share of the directions. After gradient averaging the parameters get exactly the gradient of one process that sees
    the whole batch, whatever the number of ranks.

    Args:
        target: law of one coordinate (scalar parameters).
        invariance_weight, matching_weight: lambda_inv and lambda_reg, >= 0.
        kind, n: family and number of directions, see `directions`.
        seed: of the run.
        chunk: directions at once, see `sliced_wasserstein`.

    Example:
        >>> from rlpjepa_zoo.distributions import sigma_gn
        >>> loss = RectifiedLpJEPALoss(RectifiedGeneralizedGaussian(0.0, sigma_gn(1.0), 1.0), n=64)
        >>> terms = loss(torch.rand(2, 16, 8, requires_grad=True), step=0)
        >>> terms.loss.requires_grad, bool(terms.matching >= 0)
        (True, True)
    """

    def __init__(
        self,
        target: RectifiedGeneralizedGaussian,
        invariance_weight: float = 25.0,
        matching_weight: float = 125.0,
        kind: str = "hadamard",
        n: int = 4096,
        seed: int = 0,
        chunk: int | None = None,
    ) -> None:
        self.target, self.kind, self.n, self.seed, self.chunk = target, kind, n, seed, chunk
        self.invariance_weight, self.matching_weight = invariance_weight, matching_weight

    def _draw(self, purpose: str, step: int, rows: int, dim: int, device: torch.device) -> Tensor:
        source = rng.generator(self.seed, purpose, step, device=device)
        loc, scale = (torch.tensor(float(x), device=device) for x in (self.target.loc, self.target.scale))
        law = RectifiedGeneralizedGaussian(loc, scale, float(self.target.p), validate_args=False)
        return law.sample((rows, dim), generator=source)

    def __call__(self, z: Tensor, step: int) -> Terms:
        """Terms for this rank's embeddings z (V, b, D) at a step; `matching` covers the batch of all ranks."""
        inv = invariance(z)
        everyone = distributed.gather_with_grad(z, dim=1)
        batch, dim = everyone.shape[1:]
        y = self._draw("target", step, batch, dim, z.device)
        source = rng.generator(self.seed, "directions", step, device=z.device)
        rank, ranks = distributed.rank(), distributed.world_size()
        if self.n < ranks:  # on every rank
            raise ValueError(f"directions: {self.n} are fewer than {ranks} ranks; raise objective.num_directions")
        low, high = self.n * rank // ranks, self.n * (rank + 1) // ranks
        mine = cut(slices(self.kind, self.n, dim, source, features=everyone), low, high)
        share = (high - low) * ranks / self.n  # 1 when the ranks divide n evenly
        matching = sliced_wasserstein(everyone, y, mine, self.chunk) * share
        return Terms(self.invariance_weight * inv + self.matching_weight * matching, inv, matching)

    @torch.no_grad()
    def floor(self, batch: int, dim: int, repeats: int = 4, n: int = 512, device: torch.device | str = "cpu") -> float:
        """Value of the matching term for embeddings that *are* a sample of the target: what perfect training ends at, about kappa / B.

        Args:
            batch, dim: global B and D.
            repeats, n: independent pairs of samples, and random directions for each.
        """
        where = torch.device(device)
        values = []
        for i in range(repeats):
            c = directions("random", n, dim, rng.generator(self.seed, "floor-directions", i, device=where))
            a, b = (self._draw(f"floor-{half}", i, batch, dim, where) for half in "ab")
            values.append(float(sliced_wasserstein(a, b, c, self.chunk)))
        return sum(values) / len(values)
