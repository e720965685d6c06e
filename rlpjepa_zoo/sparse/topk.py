"""Other densities for a trained encoder: the dial, by the largest values of each image or by one threshold for all, and the shift of all biases."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Dial", "between", "keep_largest"]


def keep_largest(z: Tensor, k: int) -> Tensor:
    """Zero all but the k largest values of each row; of equal ones those of lower column stay. Rows with fewer values do not change.

    Args:
        z: (B, D) >= 0.
        k: 1 .. D; a larger k changes nothing.

    Returns:
        (B, D); gradients flow to the values that stay.

    Example:
        >>> keep_largest(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 2).tolist()
        [[0.0, 2.0, 0.0, 2.0]]
    """
    if k >= z.shape[1]:
        return z
    smallest = z.topk(k, dim=1).values[:, -1:]
    above, equal = z > smallest, z == smallest
    keep = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return torch.where(keep, z, torch.zeros_like(z))


def between(values: np.ndarray[Any, Any], keep: int) -> float:
    """Midpoint of the keep-th largest of some values and the next one, so that `keep` of them are above it; 0 follows the last value.

    Example:
        >>> between(np.array([1.0, 4.0, 2.0, 3.0]), 2), between(np.array([4.0]), 1)
        (2.5, 2.0)
    """
    at = max(0, len(values) - max(1, keep))
    ordered = np.partition(values, [at - 1, at] if at else at)
    below = ordered[at - 1] if at else min(0.0, ordered[0])
    return (float(ordered[at]) + float(below)) / 2


@dataclass(frozen=True)
class Dial:
    """How an encoder's embeddings are made sparser; saved with the encoder.

    Attributes:
        mode: ``top_k`` keeps the k largest values of each image, so that every image has equally many; ``threshold`` keeps values >= the
            threshold, so that the density differs between images.
        value: k, an integer >= 1, or the threshold > 0.
        density: requested fraction of active dimensions, in (0, 1); None if k was requested.
        images: number of images that a threshold was calibrated on.
    """

    mode: Literal["top_k", "threshold"]
    value: float
    density: float | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        number = type(self.value) in (int, float) and 0 < self.value < float("inf")
        if self.mode not in ("top_k", "threshold") or not number or (self.mode == "top_k" and not isinstance(self.value, int)):
            raise ValueError(
                f"dial: expected top_k with an integer >= 1 or threshold with a number > 0, got {self.mode!r} with {self.value!r}"
            )
        if self.density is not None and not (type(self.density) is float and 0 < self.density < 1):
            raise ValueError(f"dial: expected a density between 0 and 1, got {self.density!r}")
        if self.images is not None and (type(self.images) is not int or self.images < 1):
            raise ValueError(f"dial: expected a number of images >= 1, got {self.images!r}")

    def __call__(self, z: Tensor) -> Tensor:
        """(B, D) >= 0 to (B, D) >= 0 with fewer non-zeros."""
        if self.mode == "top_k":
            return keep_largest(z, int(self.value))
        return torch.where(z >= self.value, z, torch.zeros_like(z))

    def describe(self, dim: int) -> str:
        """One line for cards."""
        asked = "" if self.density is None else f", asked for {self.density:.3g} active"
        if self.mode == "top_k":
            return f"each image keeps its {self.value:g} largest values of {dim} ({self.value / dim:.1%}{asked})"
        return f"values below {self.value:.4g} are zero (calibrated on {self.images or 'no'} images{asked})"

    def saved(self) -> dict[str, Any]:
        """JSON-able arguments: `Dial(**dial.saved())` equals `dial`."""
        return {k: v for k, v in asdict(self).items() if v is not None}
