"""Protocols of frozen evaluation, as functions of representations and labels: kNN, linear and MLP probes, few-shot, retrieval, clustering.

A representation is what `rows` takes: a dense (n, C) array or tensor, `SparseEmbeddings`, or any scipy sparse matrix. A sparse one is worked
on as CSR, in tiles of at most 16 MB of float32, except that one of more than a quarter non-zeros is made dense when that takes at most
256 MB: measured on one thread (20,000 x 512 and 20,000 x 2048, float32), products with CSR are some 14 times as fast as dense ones at 1 %
non-zeros, twice as fast at 10 % and half as fast at 50 %; and above a quarter, dense rows need at most twice the memory of CSR.

Labels are integers; every row given here has one (>= 0). Cosines with a row of zeros are 0. Random draws are functions of (seed, purpose).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core import rng
from ..errors import DataError, UsageError
from ..sparse.embeddings import SparseEmbeddings

__all__ = [
    "GRID", "Retrieval", "choose_c", "clustering", "few_shot", "few_shot_shares", "held_out", "knn", "knn_accuracy", "linear", "mlp", "paired",
    "retrieval", "retrieval_each", "rows", "unit",
]  # fmt: skip

GRID = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Inverse strengths C that `choose_c` tries."""
TILE = 1 << 22
"""Numbers in a tile of cosines; blocks of this size are handed back and out again by the allocator without new pages."""
SMALL = 1 << 24
"""Numbers of a matrix that scikit-learn fits in one thread."""
DENSE_SHARE, DENSE_SIZE = 0.25, 1 << 26
"""A sparse matrix is made dense above this share of non-zeros, when it then has at most this many numbers."""
HIDDEN, EPOCHS = 256, 50
"""Of the MLP probe."""


Array = np.ndarray[Any, Any]
Rows = Any  # a float32 ndarray, or a float32 scipy.sparse.csr_array


# --- representations ------------------------------------------------------------------------------------------------------------------


def rows(x: Any) -> Rows:
    """A representation as the protocols work on it: float32, dense or CSR by the rule of this module.

    Args:
        x: (n, C) array, tensor, `SparseEmbeddings` or scipy sparse matrix; finite.

    Raises:
        UsageError: not of two dimensions.

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


def _dense(x: Rows) -> Array:
    return x if isinstance(x, np.ndarray) else x.toarray()


def unit(x: Any) -> Rows:
    """Rows of length 1 (lengths taken in float64); a row of zeros stays zero, so its cosine with anything is 0."""
    x = rows(x)
    if isinstance(x, np.ndarray):
        length = torch.linalg.vector_norm(torch.from_numpy(x), dim=1, dtype=torch.float64).numpy()
        return x / np.where(length > 0, length, 1).astype(np.float32)[:, None]
    of_row = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
    length = np.sqrt(np.bincount(of_row, np.square(x.data, dtype=np.float64), x.shape[0]))
    x = x.copy()
    x.data /= np.where(length > 0, length, 1).astype(np.float32)[of_row]
    return x


def _tiles(x: Rows, bank: Rows, most: int) -> Iterator[tuple[int, Tensor]]:
    """Products of a few rows of x with all rows of the bank: first row, (b, m) float32 of at most `most` numbers (one row at least)."""
    size = max(1, most // max(bank.shape))
    for start in range(0, x.shape[0], size):
        block = _dense(x[start : start + size])
        if isinstance(bank, np.ndarray):
            yield start, torch.from_numpy(block) @ torch.from_numpy(bank).T
        else:
            yield start, torch.from_numpy(bank @ np.ascontiguousarray(block.T)).T.contiguous()


def _scale(x: Rows) -> float:
    """Standard deviation of all numbers of a matrix around the means of their columns."""
    n, dim = x.shape
    if isinstance(x, np.ndarray):
        squares, means = (
            sum(float(np.square(part, dtype=np.float64).sum()) for part in np.array_split(x, 1 + x.size // TILE)),
            x.mean(0, np.float64),
        )
    else:
        squares, means = float(np.square(x.data, dtype=np.float64).sum()), np.bincount(x.indices, x.data, dim) / n
    variance = squares / (n * dim) - float(np.square(means).mean())
    return max(float(np.sqrt(max(variance, 0.0))), 1e-12)


def held_out(y: Any, share: float = 0.2, seed: int = 0, purpose: str = "held-out") -> Array:
    """(n,) booleans: a random share of each class, rounded, and of two images or more at least one and never all.

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


# --- protocols ------------------------------------------------------------------------------------------------------------------------


def knn(bank: Any, bank_labels: Any, x: Any, k: int = 20, temperature: float = 0.07, leave_one_out: bool = False) -> Array:
    """Class of each row of x by a vote of its k nearest rows of the bank by cosine, weighted by exp(cosine / T); deterministic.

    Of equally near rows the lower ones vote, of equally voted classes the lower one wins.

    Args:
        bank, bank_labels: (m, C), (m,) voters.
        x: (n, C) queries.
        k: voters, at most m.
        temperature: T > 0.
        leave_one_out: x is the bank itself; nobody votes for itself.

    Returns:
        (n,) predicted labels.

    Source: k, T and weights are the defaults of solo-learn, on which the paper's code is built.

    Example:
        >>> knn(torch.eye(2), [3, 7], torch.tensor([[0.1, 0.9]]), k=1).tolist()
        [7]
    """
    bank, x = unit(bank), unit(x)
    labels = torch.as_tensor(np.asarray(bank_labels))
    k = min(k, bank.shape[0] - int(leave_one_out))
    if k < 1:
        raise DataError("kNN: a single labelled image has nobody to vote for it")
    found = np.empty(x.shape[0], dtype=np.int64)
    for start, cosine in _tiles(x, bank, TILE):
        if leave_one_out:
            cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -torch.inf
        near, which = _nearest(cosine, k)
        weights = ((near - near.amax(1, keepdim=True)) / temperature).exp()
        votes = torch.zeros(len(cosine), int(labels.max()) + 1).scatter_add_(1, labels[which], weights)
        found[start : start + len(cosine)] = votes.numpy().argmax(1)
    return found


def _nearest(cosine: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row with their columns, in any order; of equal ones those of lower column (which topk alone leaves open)."""
    near, which = cosine.topk(k, dim=1)
    last = near[:, -1:]
    open_ones = torch.nonzero((cosine == last).sum(1) > (near == last).sum(1)).flatten()
    if len(open_ones):
        tied, last = cosine[open_ones], last[open_ones]
        above, equal = tied > last, tied == last
        chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= k - above.sum(1, keepdim=True)))
        which[open_ones] = torch.nonzero(chosen)[:, 1].view(-1, k)
        near[open_ones] = tied.gather(1, which[open_ones])
    return near, which


def knn_accuracy(
    bank: Any, bank_labels: Any, x: Any, labels: Any, k: int = 20, temperature: float = 0.07, leave_one_out: bool = False
) -> float:
    """Share of rows of x whose label `knn` finds; rows with a label < 0 are left out.

    Raises:
        DataError: no labelled rows.
    """
    bank_labels, labels = np.asarray(bank_labels), np.asarray(labels)
    if not (bank_labels >= 0).any() or not (labels >= 0).any():
        raise DataError("kNN: no labelled images")
    bank, x = rows(bank)[bank_labels >= 0], rows(x)[labels >= 0]
    return float((knn(bank, bank_labels[bank_labels >= 0], x, k, temperature, leave_one_out) == labels[labels >= 0]).mean())


def choose_c(x: Any, y: Any, grid: Sequence[float] = GRID, seed: int = 0, max_iter: int = 100) -> float:
    """C of the grid that is best on a random fifth of the training images, held out class by class; of equally good ones the smallest.

    The grid is climbed from the smallest C, each fit starting from the last one, until two in a row are worse than the best.

    Args:
        x, y: training rows and labels.
        grid: rising; one number is returned as it is.
        seed: of the held-out images.
        max_iter: of L-BFGS, for each fit.
    """
    x, y, grid = rows(x), np.asarray(y), tuple(grid)
    _two_classes(y)
    if len(grid) == 1:
        return grid[0]
    out = held_out(y, seed=seed)
    if not out.any():
        raise DataError("linear probe: no class has two training images, so C cannot be chosen; give one C")
    scale = np.float32(_scale(x[~out]))
    train, test = x[~out] / scale, x[out] / scale
    probe = _logistic(grid[0], max_iter, warm_start=True)
    best, chosen, worse = -1.0, grid[0], 0
    for c in grid:
        probe.C = c
        score = float((_fit(probe, train, y[~out]).predict(test) == y[out]).mean())
        worse = worse + 1 if score < best else 0
        if score > best:
            best, chosen = score, c
        if worse == 2:
            break
    return chosen


def linear(x: Any, y: Any, test_x: Any, c: float = 1.0, max_iter: int = 300) -> Array:
    """Classes of test rows by multinomial logistic regression: scikit-learn's L-BFGS, L2 with inverse strength C.

    It minimises |W|^2 / 2 + C * sum of cross entropies over W and free intercepts, on rows divided by one number, the standard deviation of the
    training rows around the means of their columns; nothing is centred, so zeros stay zeros.

    Args:
        x, y: (m, C), (m,) training rows and labels of at least two classes.
        test_x: (n, C).
        c: C > 0, see `choose_c`.
        max_iter: of L-BFGS.

    Returns:
        (n,) predicted labels.

    Example:
        >>> linear([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1], [[-1.0], [4.0]]).tolist()
        [0, 1]
    """
    x, test_x, y = rows(x), rows(test_x), np.asarray(y)
    _two_classes(y)
    scale = np.float32(_scale(x))
    probe: Array = _fit(_logistic(c, max_iter), x / scale, y).predict(test_x / scale)
    return probe


def _two_classes(y: Array) -> None:
    if len(np.unique(y)) < 2:
        raise DataError("linear probe: needs labelled images of at least two classes for training")


def _logistic(c: float, max_iter: int, warm_start: bool = False) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, max_iter=max_iter, warm_start=warm_start)


def _fit(model: Any, x: Rows, y: Array) -> Any:
    """Fit a model of scikit-learn; a small one in one thread: several gain nothing there, and on a busy machine they wait for each other
    (twenty times as long was measured with two threads on two busy cores)."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1 if x.shape[0] * x.shape[1] <= SMALL else None):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the limit of iterations is part of the protocol
        return model.fit(x, y)


def few_shot(x: Any, y: Any, test_x: Any, test_y: Any, shots: int = 1, draws: int = 100, seed: int = 0) -> Array:
    """Accuracy of the nearest class mean (cosine) of a few random images per class, for each of many draws.

    The mean is taken of rows of length 1. The same draws are made whatever x is, so representations of one data set compare pairwise.

    Args:
        x, y: (m, C), (m,) training rows and labels, from which the shots are drawn.
        test_x, test_y: (n, C), (n,).
        shots: images per class, >= 1.
        draws: >= 1.

    Returns:
        (draws,) accuracies in [0, 1].

    Raises:
        DataError: a class has fewer images.

    Example:
        >>> few_shot(torch.eye(2), [0, 1], torch.eye(2), [0, 1], draws=3).tolist()
        [1.0, 1.0, 1.0]
    """
    return few_shot_shares(x, y, test_x, test_y, shots, draws, seed)[0]


def few_shot_shares(x: Any, y: Any, test_x: Any, test_y: Any, shots: int = 1, draws: int = 100, seed: int = 0) -> tuple[Array, Array]:
    """`few_shot`, and of each test image the share of draws that classify it rightly: (draws,), (n,), both in [0, 1]."""
    from scipy.sparse import csr_array

    y, test_y = np.asarray(y), np.asarray(test_y)
    if not len(y) or not len(test_y):
        raise DataError(f"{shots}-shot: no labelled images")
    classes, counts = np.unique(y, return_counts=True)
    if counts.min() < shots:
        raise DataError(f"{shots}-shot: class {classes[counts.argmin()]} has {counts.min()} training images")
    members = [np.flatnonzero(y == c) for c in classes]
    picks = np.stack([_draw(members, shots, draw, seed) for draw in range(draws)])  # (draws, classes, shots)
    x, test_x = unit(x), unit(test_x)
    right, share = np.zeros(draws), np.zeros(len(test_y))
    group = max(1, TILE // (len(classes) * x.shape[1]))
    for first in range(0, draws, group):
        chosen = picks[first : first + group]
        ends = np.arange(0, chosen.size + 1, shots)
        sums = csr_array((np.ones(chosen.size, np.float32), chosen.ravel(), ends), shape=(len(ends) - 1, len(y))) @ x
        for start, cosine in _tiles(test_x, unit(_dense(sums)), TILE):
            found = classes[cosine.numpy().reshape(len(cosine), len(chosen), len(classes)).argmax(2)]
            hits = found == test_y[start : start + len(cosine), None]
            right[first : first + len(chosen)] += hits.sum(0)
            share[start : start + len(cosine)] += hits.sum(1)
    return right / len(test_y), share / draws


def _draw(members: Sequence[Array], shots: int, draw: int, seed: int) -> Array:
    """(classes, shots) rows, without repetition."""
    if shots == 1:
        source = rng.generator(seed, "one-shot", draw)
        return np.array([[m[int(torch.randint(len(m), (1,), generator=source))]] for m in members])
    source = rng.generator(seed, "few-shot", shots, draw)
    return np.stack([m[torch.randperm(len(m), generator=source)[:shots].numpy()] for m in members])


def mlp(x: Any, y: Any, test_x: Any, seed: int = 0) -> Array:
    """Classes of test rows by a network of one hidden layer of 256 ReLUs: scikit-learn's MLPClassifier, Adam, 50 epochs, batches of 200.

    Rows are divided by one number as in `linear`.
    """
    from sklearn.neural_network import MLPClassifier

    x, test_x, y = rows(x), rows(test_x), np.asarray(y)
    scale = np.float32(_scale(x))
    network = MLPClassifier((HIDDEN,), max_iter=EPOCHS, random_state=_state(seed, "mlp"))
    found: Array = _fit(network, x / scale, y).predict(test_x / scale)
    return found


def _state(seed: int, purpose: str) -> int:
    """A seed for scikit-learn."""
    return rng.key(seed, purpose) % 2**32


class Retrieval(NamedTuple):
    """Means over queries, in [0, 1]."""

    map: float
    precision_at_1: float
    precision_at_10: float
    queries: int


def retrieval(x: Any, y: Any, test_x: Any, test_y: Any, queries: int | None = None, seed: int = 0) -> Retrieval:
    """Mean average precision when each test row ranks all training rows by cosine and those of its label are the right ones.

    Of equally near rows the lower one comes first; a query without right ones counts as 0.

    Args:
        x, y: (m, C), (m,) what is searched.
        test_x, test_y: (n, C), (n,) queries.
        queries: use at most this many, drawn at random.

    Example:
        >>> retrieval(torch.eye(2), [0, 1], torch.eye(2), [0, 0]).map
        0.75
    """
    found = retrieval_each(x, y, test_x, test_y, queries, seed)
    average, first, ten = found.mean(1).tolist()
    return Retrieval(average, first, ten, found.shape[1])


def retrieval_each(x: Any, y: Any, test_x: Any, test_y: Any, queries: int | None = None, seed: int = 0) -> Array:
    """`retrieval` before its means: average precision, precision at 1 and at 10 (rows) of each query (columns), the same queries whatever x is."""
    y, test_y = np.asarray(y), np.asarray(test_y)
    x, test_x = unit(x), unit(test_x)
    if queries is not None and queries < len(test_y):
        chosen = torch.randperm(len(test_y), generator=rng.generator(seed, "queries"))[:queries].sort().values.numpy()
        test_x, test_y = test_x[chosen], test_y[chosen]
    labels, precision = torch.as_tensor(y), []
    rank = torch.arange(1, len(y) + 1, dtype=torch.float64)
    for start, cosine in _tiles(test_x, x, TILE):
        wanted = torch.as_tensor(test_y[start : start + len(cosine)])[:, None]
        hits = labels[cosine.sort(dim=1, descending=True, stable=True).indices] == wanted
        share = hits.cumsum(1) / rank
        average = (share * hits).sum(1) / hits.sum(1).clamp(min=1)
        precision.append(torch.stack([average, share[:, 0], share[:, min(10, len(y)) - 1]]))
    found: Array = torch.cat(precision, dim=1).numpy()
    return found


def clustering(x: Any, y: Any, seed: int = 0) -> float:
    """Normalised mutual information (arithmetic mean) of labels and k-means clusters of rows of length 1, one cluster for each label.

    Args:
        x, y: (n, C), (n,); n >= number of labels.
        seed: of the first centres (k-means++, one start).
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    y = np.asarray(y)
    clusters = _fit(KMeans(len(np.unique(y)), n_init=1, random_state=_state(seed, "clustering")), unit(x), y).labels_
    return float(normalized_mutual_info_score(y, clusters))


def paired(a: Any, b: Any, seed: int = 0, resamples: int = 10_000) -> dict[str, float]:
    """Mean of a - b over the same images, with its 95 % interval by a paired bootstrap over images (percentiles of the resampled means).

    Args:
        a, b: (n,) for each image, how often it was classified rightly, or its average precision, in [0, 1].

    Returns:
        difference, low, high, n.

    Example:
        >>> paired([1, 1, 1, 0], [1, 1, 1, 0])
        {'difference': 0.0, 'low': 0.0, 'high': 0.0, 'n': 4}
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n = len(difference)
    values, counts = np.unique(difference.round(9), return_counts=True)  # few: resampling images is drawing how often each value comes
    source = np.random.default_rng(rng.key(seed, "bootstrap"))
    group = max(1, TILE // len(values))  # of many values, such as average precisions, a part of the resamples at a time
    sizes = [min(group, resamples - first) for first in range(0, resamples, group)]
    means = np.concatenate([source.multinomial(n, counts / n, size) @ values / n for size in sizes])
    low, high = np.quantile(means, (0.025, 0.975))
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high), "n": n}
