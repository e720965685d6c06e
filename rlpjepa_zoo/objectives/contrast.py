"""InfoNCE between views of images: the loss of SimCLR, and on non-negative embeddings that of NCL (arXiv 2403.12459)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import distributed

__all__ = ["info_nce"]


def info_nce(z: Tensor, temperature: float, gathered: Tensor | None = None) -> Tensor:
    """Every other view of an image is to be nearer than all views of other images (NT-Xent).

    Args:
        z: (V, b, D) embeddings of V views of this rank's b images; rows are scaled to length 1.
        temperature: T > 0.
        gathered: (V, B, D), those of all ranks in their order, with gradient; None for `z`.

    Returns:
        float32 scalar: the mean over pairs of views of this rank's images of -log(exp(cosine / T) / sum of exp(cosine / T) over all other rows).
        0 for one view. The mean over ranks is the value on the whole batch, and so is the gradient.

    Example:
        >>> z = torch.eye(4).expand(2, 4, 4)
        >>> round(float(info_nce(z, 0.2)), 4)
        0.0396
    """
    views, images = z.shape[:2]
    everything, first = (z, 0) if gathered is None else (gathered, distributed.rank() * images)
    with torch.autocast(z.device.type, enabled=False):
        if views < 2:
            return z.float().sum() * 0.0
        own, others = (F.normalize(part.float().flatten(0, 1), dim=1) for part in (z, everything))
        similar = own @ others.T / temperature
        row, column = (torch.arange(len(part), device=z.device) for part in (own, others))
        same = (first + row % images)[:, None] == column % everything.shape[1]
        itself = same & ((row // images)[:, None] == column // everything.shape[1])
        log_share = similar - similar.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
        return -log_share[same & ~itself].mean()
