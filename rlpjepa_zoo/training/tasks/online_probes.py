"""Linear probes that are trained along with an encoder; they never change it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ...core import distributed
from ...models.encoder import Output, SparseEncoder

__all__ = ["EncoderWithProbes", "ProbedOutput"]


class ProbedOutput(NamedTuple):
    """Embeddings and the results of the probes."""

    z: Tensor
    """(V, b, D)"""
    probe_loss: Tensor
    """float32 scalar."""
    probe_accuracy: Tensor
    """(2,): accuracy of the probes on features and on z over this batch; (0,) without probes."""


class EncoderWithProbes(nn.Module):
    """Encoder and online probes as one module, so that one wrapper (DDP, autocast) covers both.

    Args:
        encoder: the encoder.
        classes: number of classes; there are no probes if it is below two.
    """

    def __init__(self, encoder: SparseEncoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        widths = {"features": encoder.config.features, "z": encoder.config.dim} if classes > 1 else {}
        self.probes = nn.ModuleDict({name: nn.Linear(width, classes) for name, width in widths.items()})

    def forward(self, groups: list[Tensor], labels: Tensor) -> ProbedOutput:
        """Encode views of each size; the probes see the first size.

        Args:
            groups: one tensor for each size, (V b, 3, S, S), or features (V b, F).
            labels: (b,), -1 where unknown.
        """
        outs = [self._both(x) for x in groups]
        z = torch.cat([out.z.unflatten(0, (-1, len(labels))) for out in outs])
        out, views = outs[0], len(groups[0]) // len(labels)
        loss, accuracy = out.z.new_zeros((), dtype=torch.float32), []
        known = (labels >= 0).repeat(views)
        # the mean over ranks divides by the known labels of all ranks, whatever the share of each
        count = distributed.mean_over_ranks(known.sum().float()).clamp(min=1 / distributed.world_size())
        target = labels.clamp(min=0).repeat(views)
        for name, source in (("features", out.features), ("z", out.z)) if self.probes else ():
            scores = self.probes[name](source.detach().float()).float()
            loss = loss + (nn.functional.cross_entropy(scores, target, reduction="none") * known).sum() / count
            accuracy.append(((scores.argmax(1) == target) & known).sum() / count)
        return ProbedOutput(z, loss, torch.stack(accuracy) if accuracy else loss.new_zeros(0))

    def _both(self, x: Tensor) -> Output:
        return self.encoder.both(x) if x.dim() == 4 else Output(x, self.encoder.projector(x))
