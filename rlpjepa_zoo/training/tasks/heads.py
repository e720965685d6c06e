"""What is trained along with an encoder: linear probes, which never change it, and the decoder of a reconstruction, whose loss does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ...core import distributed
from ...models.encoder import Output, SparseEncoder
from ...objectives.density import without_common_gradient
from ...objectives.reconstruction import ReconstructionLoss

__all__ = ["EncoderWithHeads", "HeadsOutput"]


class HeadsOutput(NamedTuple):
    """Embeddings and the results of the heads."""

    z: Tensor
    """(V, b, D)"""
    probe_loss: Tensor
    """float32 scalar."""
    probe_accuracy: Tensor
    """(2,): accuracy of the probes on features and on z over this batch; (0,) without probes."""
    reconstruction: Tensor | None = None
    """float32 scalar, unweighted, mean over the sizes of views; None without a decoder."""


class EncoderWithHeads(nn.Module):
    """Encoder, online probes and decoder as one module, so that one wrapper (DDP, autocast) covers all.

    Args:
        encoder: the encoder.
        classes: number of classes; there are no probes if it is below two.
        active: numbers of active dimensions that the features are reconstructed from; without any there is no decoder.
        held: whether the density of z is held, so that no loss may move all of z together.
    """

    def __init__(self, encoder: SparseEncoder, classes: int, active: Sequence[int] = (), held: bool = False) -> None:
        super().__init__()
        self.encoder, self.held = encoder, held
        self.reconstruction = ReconstructionLoss(encoder.config.features, encoder.config.dim, active) if active else None
        widths = {"features": encoder.config.features, "z": encoder.config.dim} if classes > 1 else {}
        self.probes = nn.ModuleDict({name: nn.Linear(width, classes) for name, width in widths.items()})

    def forward(self, groups: list[Tensor], labels: Tensor) -> HeadsOutput:
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
        terms = [self.reconstruction(part.features, part.z) for part in outs] if self.reconstruction else []
        return HeadsOutput(z, loss, torch.stack(accuracy) if accuracy else loss.new_zeros(0), torch.stack(terms).mean() if terms else None)

    def _both(self, x: Tensor) -> Output:
        out = self.encoder.both(x) if x.dim() == 4 else Output(x, self.encoder.projector(x))
        return out._replace(z=without_common_gradient(out.z)) if self.held else out
