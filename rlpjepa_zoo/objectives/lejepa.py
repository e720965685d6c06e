"""LeJEPA: agreement of views + SIGReg. Source: arXiv 2511.08544.

It is not registered as a training objective yet: SIGReg needs a projector without a final ReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Terms
from .sigreg import SIGReg

__all__ = ["LeJEPALoss"]


class LeJEPALoss:
    """weight * SIGReg + (1 - weight) * mean over views, batch and dimensions of (z_v - mean of the views)^2.

    It is called like `RectifiedLpJEPALoss`, and gives the same gradient for any number of processes.

    Args:
        weight: lambda in [0, 1]; LeJEPA uses 0.02 to 0.05.
        sigreg: the regulariser; by default ``SIGReg("lejepa", n=1024)`` with seed 0.

    Raises:
        ValueError: a weight out of range; when called, `z` of another shape.

    Example:
        >>> terms = LeJEPALoss()(torch.randn(2, 16, 8, requires_grad=True), step=0)
        >>> terms.total.requires_grad, bool(terms.parts["matching"] > 0)
        (True, True)
    """

    def __init__(self, weight: float = 0.05, sigreg: SIGReg | None = None) -> None:
        if not 0 <= weight <= 1:
            raise ValueError(f"LeJEPALoss: weight must lie in [0, 1], got {weight}")
        self.weight, self.sigreg = weight, sigreg if sigreg is not None else SIGReg("lejepa", n=1024)

    def __call__(self, z: Tensor, step: int) -> Terms:
        """Terms for this rank's embeddings z (V, b, D) at a step; `matching` covers the batch of all ranks."""
        if z.dim() != 3:
            raise ValueError(f"LeJEPALoss: expected z (V, B, D), got {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            wide = z if z.dtype == torch.float64 else z.float()
            difference = (wide - wide.mean(0)).square().mean()
        matching = self.sigreg(z, step)
        total = self.weight * matching + (1 - self.weight) * difference
        return Terms(total, {"invariance": difference, "matching": matching})
