"""What all probes share: the form of a representation, products in tiles, held-out rows, the base class and the scores.

A representation is anything that `rows` accepts: a dense (n, C) array or tensor, `SparseEmbeddings`, or a scipy sparse matrix. A sparse
representation is processed as CSR, in tiles of at most 16 MB of float32. Exception: a matrix with more than a quarter non-zeros is made
dense if the dense form takes at most 256 MB. Measured on one thread (20,000 x 512 and 20,000 x 2048, float32), products with CSR are about
14 times as fast as dense products at 1 % non-zeros, twice as fast at 10 % and half as fast at 50 %; above a quarter, dense rows need at
most twice the memory of CSR.

Labels are integers >= 0. Cosines with a row of zeros are 0. Random draws are functions of (seed, purpose).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ...core import rng
from ...errors import UsageError
from ...sparse.embeddings import SparseEmbeddings

__all__ = [
    "Array", "Probe", "Rows", "Scores", "Split", "at_least_one", "dense", "fit", "held_out", "rows", "rows_per_tile", "seeds_text", "sklearn_seed", "spread",
    "tiles", "unit",
]  # fmt: skip

TILE = 1 << 22
"""Numbers in a tile of cosines. The allocator reuses blocks of this size without requesting new pages."""
SMALL = 1 << 24
"""Numbers of a matrix up to which scikit-learn fits in one thread."""
DENSE_SHARE, DENSE_SIZE = 0.25, 1 << 26
"""A sparse matrix is made dense above this share of non-zeros, if it then has at most this many numbers."""

Array = np.ndarray[Any, Any]
Rows = Any  # a float32 ndarray, or a float32 scipy.sparse.csr_array


# --- representations ------------------------------------------------------------------------------------------------------------------


def rows(x: Any) -> Rows:
    """Convert a representation to float32, dense or CSR by the rule of this module.

    Args:
        x: (n, C) array, tensor, `SparseEmbeddings` or scipy sparse matrix; finite.

    Raises:
        UsageError: x does not have two dimensions.

    Example:
        >>> rows(torch.eye(3)).dtype, type(rows(SparseEmbeddings.from_dense(torch.eye(9)))).__name__
        (dtype('float32'), 'csr_array')
    """
    from scipy.sparse import csr_array, issparse

    if isinstance(x, SparseEmbeddings):
        x = x.to_scipy()
    if issparse(x):
        x = csr_array(x).astype(np.float32, copy=False)
        size = x.shape[0] * x.shape[1]
        return x.toarray() if size <= DENSE_SIZE and x.nnz > DENSE_SHARE * size else x
    x = x.detach().cpu().float().numpy() if isinstance(x, Tensor) else np.asarray(x, dtype=np.float32)
    if x.ndim != 2:
        raise UsageError(f"a representation has shape (n, C), got {x.shape}")
    return np.ascontiguousarray(x)


def dense(x: Rows) -> Array:
    """Dense form of what `rows` returns."""
    return x if isinstance(x, np.ndarray) else x.toarray()


def unit(x: Any) -> Rows:
    """Rows scaled to length 1 (lengths computed in float64). A row of zeros stays zero, so its cosine with any row is 0."""
    x = rows(x)
    if isinstance(x, np.ndarray):
        length = torch.linalg.vector_norm(torch.from_numpy(x), dim=1, dtype=torch.float64).numpy()
        return x / np.where(length > 0, length, 1).astype(np.float32)[:, None]
    row_of = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
    length = np.sqrt(np.bincount(row_of, np.square(x.data, dtype=np.float64), x.shape[0]))
    x = x.copy()
    x.data /= np.where(length > 0, length, 1).astype(np.float32)[row_of]
    return x


def rows_per_tile(width: int) -> int:
    """Number of rows of `width` numbers that fit into a tile, at least one."""
    return max(1, TILE // width)


def tiles(x: Rows, bank: Rows) -> Iterator[tuple[int, Tensor]]:
    """Products of blocks of rows of x with all rows of the bank.

    Yields:
        Index of the block's first row and the (b, m) float32 products, at most `TILE` numbers (at least one row).
    """
    size = rows_per_tile(max(bank.shape))
    for start in range(0, x.shape[0], size):
        block = dense(x[start : start + size])
        if isinstance(bank, np.ndarray):
            yield start, torch.from_numpy(block) @ torch.from_numpy(bank).T
        else:
            yield start, torch.from_numpy(bank @ np.ascontiguousarray(block.T)).T.contiguous()


def spread(x: Rows) -> float:
    """Standard deviation of all numbers of a matrix around the means of their columns."""
    n, dim = x.shape
    if isinstance(x, np.ndarray):
        squares = sum(float(np.square(block, dtype=np.float64).sum()) for block in np.array_split(x, 1 + x.size // TILE))
        means = x.mean(0, np.float64)
    else:
        squares, means = float(np.square(x.data, dtype=np.float64).sum()), np.bincount(x.indices, x.data, dim) / n
    variance = squares / (n * dim) - float(np.square(means).mean())
    return max(float(np.sqrt(max(variance, 0.0))), 1e-12)


def held_out(y: Any, share: float = 0.2, seed: int = 0, purpose: str = "held-out") -> Array:
    """Choose a random share of each class, rounded; of a class with two rows or more at least one row and never all.

    Args:
        y: (n,) labels.
        share: in (0, 1).
        seed, purpose: of the random order.

    Returns:
        (n,) booleans, True for the chosen rows.

    Example:
        >>> held_out([0] * 10 + [1] * 5 + [2]).sum()
        np.int64(3)
    """
    y = np.asarray(y)
    chosen = np.zeros(len(y), dtype=bool)
    for c in np.unique(y):
        members = np.flatnonzero(y == c)
        n = min(max(round(share * len(members)), 1), len(members) - 1)
        order = torch.randperm(len(members), generator=rng.generator(seed, purpose, int(c))).numpy()
        chosen[members[order[:n]]] = True
    return chosen


# --- scikit-learn ---------------------------------------------------------------------------------------------------------------------


def fit(model: Any, x: Rows, y: Array) -> Any:
    """Fit a scikit-learn model; a small one in one thread.

    Several threads do not speed up small fits, and on a busy machine they wait for each other: two threads on two busy cores took twenty
    times as long.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1 if x.shape[0] * x.shape[1] <= SMALL else None):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the limit of iterations is part of the protocol
        return model.fit(x, y)


def sklearn_seed(seed: int, purpose: str) -> int:
    """A `random_state` for scikit-learn."""
    return rng.key(seed, purpose) % 2**32


# --- probes ---------------------------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Training and test rows of one representation, with their labels (all >= 0)."""

    x: Rows
    y: Array
    test_x: Rows
    test_y: Array


@dataclass
class Scores:
    """Results of one representation, by measure."""

    mean: dict[str, float] = field(default_factory=dict)
    """Mean over repetitions."""
    spread: dict[str, float] = field(default_factory=dict)
    """Standard deviation over repetitions, if there are several."""
    per_image: dict[str, Array] = field(default_factory=dict)
    """Score of each test image, mean over repetitions: (n,), 1 if correct and 0 if not; for `map`, the average precision of each query."""
    chosen_c: list[float] = field(default_factory=list)
    """C of the linear probe for each seed."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Measures that were left out, and why."""

    def add(self, measure: str, values: Sequence[float] | Array) -> None:
        """Add a measure from the values of its repetitions."""
        self.mean[measure] = float(np.mean(values))
        if len(values) > 1:
            self.spread[measure] = float(np.std(values, ddof=1))

    def flat(self, space: str) -> dict[str, float]:
        """Means and spreads under the keys of a report: measure_space and measure_std_space."""
        entries = {}
        for measure, value in self.mean.items():
            entries[f"{measure}_{space}"] = value
            if measure in self.spread:
                entries[f"{measure}_std_{space}"] = self.spread[measure]
        return entries


@dataclass(frozen=True)
class Probe(ABC):
    """A way to measure a representation. A subclass is a frozen dataclass whose fields are its hyper-parameters.

    To add a probe, register it with ``@PROBES.register("name")`` in a file of this folder with the same name.
    A new measure of a probe also needs a row in `rlpjepa_zoo.core.measures.MEASURES`, which holds its label and its place in tables.
    """

    order: ClassVar[int]
    """Position among the probes, in reports and in the protocol's text."""
    default: ClassVar[bool] = False
    """Whether the probe runs when none is named."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """The probe with those of the options that are its hyper-parameters.

        Raises:
            UsageError: a value is out of range.
        """
        return cls(**{parameter.name: options[parameter.name] for parameter in fields(cls) if parameter.name in options})

    @abstractmethod
    def describe(self, n_train: int, n_test: int, seeds: int, skipped: Collection[str]) -> str:
        """A sentence for the protocol; empty if nothing was measured.

        Args:
            n_train, n_test: training and test images.
            seeds: repetitions of what is random.
            skipped: measures that were left out.
        """

    @abstractmethod
    def score(self, split: Split, seeds: int, scores: Scores) -> None:
        """Measure a representation and add the results to `scores`."""


def at_least_one(**values: int) -> None:
    """UsageError naming the first value below 1."""
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"{name}: expected >= 1, got {value}")


def seeds_text(seeds: int) -> str:
    """How repetitions over seeds are described in the protocol."""
    return f"mean of {seeds} seeds (± their standard deviation)" if seeds > 1 else "one seed"
