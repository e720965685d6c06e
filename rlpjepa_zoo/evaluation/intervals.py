"""95 % intervals of what an evaluation measures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..core import rng

__all__ = ["mean_interval", "paired_difference", "share_interval"]

_NORMAL = 1.959963984540054
"""Half width of a 95 % interval in standard errors."""
_GROUP = 1 << 22
"""Counts that are drawn at a time."""


def mean_interval(values: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Mean of independent values and its 95 % interval by the normal approximation, mean -+ 1.96 s / sqrt(n).

    Args:
        values: (n,). The spread of a single value is unknown, so its interval is NaN.

    Returns:
        mean, low, high.

    Example:
        >>> [round(x, 3) for x in mean_interval(np.array([0.1, 0.2, 0.3]))]
        [0.2, 0.087, 0.313]
    """
    mean = float(np.mean(values))
    half = _NORMAL * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean, mean - half, mean + half


def share_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share counted in n trials (Wilson 1927); it stays in [0, 1] and is not empty at 0 and 1.

    Args:
        share: in [0, 1]; share * n is rounded to the number of successes.
        n: trials, >= 1.

    Returns:
        low, high.

    Example:
        >>> [round(x, 3) for x in share_interval(1.0, 360)]
        [0.989, 1.0]
    """
    from scipy.stats import binomtest

    interval = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference(a: Any, b: Any, seed: int = 0, resamples: int = 10_000) -> dict[str, float]:
    """Mean of a - b over the same images and its 95 % interval by a paired bootstrap over images (percentiles of the resampled means).

    Args:
        a, b: (n,) in [0, 1], for each image: the share of repetitions that classify it correctly, or its average precision.
        seed: of the bootstrap.
        resamples: >= 1.

    Returns:
        difference, low, high, n.

    Example:
        >>> paired_difference([1, 1, 1, 0], [1, 1, 1, 0])
        {'difference': 0.0, 'low': 0.0, 'high': 0.0, 'n': 4}
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n = len(difference)
    # to resample images is to draw how often each value occurs, and there are few values
    values, counts = np.unique(difference.round(9), return_counts=True)
    source = np.random.default_rng(rng.key(seed, "bootstrap"))
    group = max(1, _GROUP // len(values))  # many values, such as average precisions, are resampled in groups to bound the memory
    sizes = [min(group, resamples - first) for first in range(0, resamples, group)]
    means = np.concatenate([source.multinomial(n, counts / n, size) @ values / n for size in sizes])
    low, high = np.quantile(means, (0.025, 0.975))
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high), "n": n}
