"""Control of the density of z in training: one shift, the same for the biases of all units; and the rise of units that are never active.

The sliced distance fixes the mean and the covariance of z, and only weakly its mass at zero. One shift for all units leaves their differences to
the objective; a rate held for each unit alone makes the codes worse (docs/codes.md). What the shift decides, the loss must not: a common gradient
of all active values would push against it in every step, and Adam would scale that push up for each unit. So it is removed. ReLU passes no
gradient to a unit that no image activates, so only its bias can bring it back.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from ..core import distributed

__all__ = ["DensityControl", "without_common_gradient"]

_GAIN = 0.3
"""Part of the correction that one step makes."""
_RISE = 0.1
"""Rise of a dead unit's bias in one step, in means of the active values."""
_BY_CHANCE = 0.05
"""Probability below which it is no chance that a unit with the asked rate is inactive in a whole batch, whose views count as if they were independent."""


class _WithoutCommonGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z > 0)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (active,) = ctx.saved_tensors
        gradient = torch.where(active, gradient, 0)  # not a product: where nothing is active, it may be infinite in half precision
        total, count = distributed.mean_over_ranks(torch.stack([gradient.float().sum(), active.float().sum()]))
        return torch.where(active, gradient - (total / count.clamp_min(1e-6)).to(gradient.dtype), 0)


def without_common_gradient(z: Tensor) -> Tensor:
    """The same values; in the backward pass, the mean gradient of all active values of all ranks is subtracted from each active value's.

    Args:
        z: (n, D) >= 0 of this rank. All ranks call it together, and its backward pass.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [2.0, 3.0]], requires_grad=True)
        >>> (without_common_gradient(z) * torch.tensor([[1.0, 9.0], [2.0, 6.0]])).sum().backward()
        >>> z.grad
        tensor([[-2.,  0.],
                [-1.,  3.]])
    """
    return cast(Tensor, _WithoutCommonGradient.apply(z))


class DensityControl:
    """Lowers or raises all biases of a last layer by one number after each step, and raises those of dead units.

    For units with an exponential tail, as of a Laplace target, a shift by s changes the density by the factor exp(-s / m), where m is the mean
    of the active values. So s = m log(density / asked) would correct the density at once; 0.3 s averages over some batches. Dead are units that no
    image of the batch activates; their biases also rise by 0.1 m, unless a unit with the asked rate is inactive in so small a batch by chance.

    Args:
        layer: the layer before the last ReLU; its bias is changed in place.

    Example:
        >>> layer = nn.Linear(32, 64)
        >>> control = DensityControl(layer)
        >>> for _ in range(50):
        ...     z = torch.relu(layer(torch.randn(256, 32)))
        ...     control.observe(z, density=0.1)
        ...     control.apply()
        >>> 0.08 < float((z > 0).float().mean()) < 0.12
        True
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer  # not its bias, which sharding replaces
        self._shift: Tensor | None = None

    @torch.no_grad()
    def observe(self, z: Tensor, density: float) -> None:
        """Compute the shifts for the embeddings of a step, over all ranks.

        Args:
            z: (..., D) >= 0 of this rank.
            density: the asked one, in (0, 1).
        """
        rows = z.detach().float().flatten(0, -2)
        share, mean = distributed.mean_over_ranks(torch.stack([(rows > 0).float().mean(), rows.mean()]))
        share = share.clamp_min(1 / rows.numel())  # if no unit is active, the active value is taken to be 1
        active = torch.where(mean > 0, mean / share, torch.ones_like(mean))
        self._shift = _GAIN * active * (share / density).log()
        if (1 - density) ** (len(rows) * distributed.world_size()) < _BY_CHANCE:
            dead = distributed.max_over_ranks(rows.amax(0)) == 0
            self._shift = self._shift - _RISE * active * dead

    @torch.no_grad()
    def apply(self) -> None:
        """Shift the biases by what the last `observe` computed, once."""
        if self._shift is not None:
            bias = self.layer.bias
            bias.sub_(distributed.copy_with_layout(self._shift.to(bias.dtype).expand(bias.shape), bias))
            self._shift = None
