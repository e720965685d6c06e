"""Labelled rows for the tests of probes: Gaussian clusters, dense and as sparse codes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlpjepa_zoo.sparse.embeddings import SparseEmbeddings

Array = np.ndarray[Any, Any]


def clusters(rng: np.random.Generator, n: int = 120, d: int = 12, classes: int = 4, noise: float = 1.2) -> tuple[Tensor, Tensor]:
    """Rows around one centre per class, and their classes; the centres are always the same."""
    y = rng.integers(0, classes, n)
    centres = np.random.default_rng(1).normal(size=(classes, d))
    return torch.from_numpy(centres[y] + noise * rng.normal(size=(n, d))).float(), torch.from_numpy(y)


def codes(rng: np.random.Generator, n: int = 120, d: int = 40, classes: int = 4, noise: float = 0.8) -> tuple[Array, Array]:
    """Sparse non-negative rows, about a sixth of them non-zeros, and their classes."""
    x, y = clusters(rng, n, d, classes, noise)
    return np.maximum(x.numpy() - 1.3, 0), y.numpy()


def sparse(x: Array) -> SparseEmbeddings:
    return SparseEmbeddings.from_dense(x)
