"""Directions to project on: stored as rows of a matrix, or as products of signs and fast transforms that never become one.

Shapes: N directions, D embedding width, R columns: samples lie side by side as (D, R), so that all projections on one direction are neighbours
in memory, ready to be sorted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError

__all__ = ["FAMILIES", "INDEPENDENT", "Part", "Rotations", "Rows", "cut", "directions", "parse_directions", "slices"]

FAMILIES = ("random", "orthogonal", "hadamard", "axes", "eigen", "eigen-bottom")
INDEPENDENT = ("random", "orthogonal", "hadamard")
"""Those of which one can have ever more, with ever less noise; the others are fixed, or depend on the batch."""
SMALLEST_TRANSFORM = 64
"""Widths below this get their `hadamard` bases by QR: few signs make few directions, and a small QR costs nothing."""


# --- two ways to hold directions ------------------------------------------------------------------------------------------------------


class Part(Protocol):
    """Directions of one family. Samples (D, R) are spread once, then projected span by span; gradients go back the same way."""

    def __len__(self) -> int: ...

    @property
    def table(self) -> Tensor: ...

    def spans(self, chunk: int) -> list[tuple[int, int]]:
        """First and last + 1 direction of each piece of work, about `chunk` directions each."""

    def spread(self, x: Tensor) -> Tensor:
        """What is done once, whatever the number of directions: (D, R) -> (D, R)."""

    def project(self, spread: Tensor, low: int, high: int) -> Tensor:
        """Projections on directions low to high - 1: (high - low, R)."""

    def back(self, g: Tensor, low: int, high: int) -> Tensor:
        """The transpose of `project`: (high - low, R) -> (D, R); may use g up."""

    def gather(self, g: Tensor) -> Tensor:
        """The transpose of `spread`; may use g up."""

    def cut(self, low: int, high: int) -> Part:
        """Directions low to high - 1 alone."""

    def dense(self) -> Tensor:
        """(N, D): the directions as rows."""


@dataclass(frozen=True)
class Rows:
    """Directions stored as the rows of a matrix (N, D)."""

    table: Tensor

    def __len__(self) -> int:
        return len(self.table)

    def spans(self, chunk: int) -> list[tuple[int, int]]:
        return [(low, min(low + chunk, len(self))) for low in range(0, len(self), chunk)]

    def spread(self, x: Tensor) -> Tensor:
        return x

    def project(self, spread: Tensor, low: int, high: int) -> Tensor:
        return self.table[low:high] @ spread

    def back(self, g: Tensor, low: int, high: int) -> Tensor:
        return self.table[low:high].T @ g

    def gather(self, g: Tensor) -> Tensor:
        return g

    def cut(self, low: int, high: int) -> Rows:
        return Rows(self.table[low:high])

    def dense(self) -> Tensor:
        return self.table


@dataclass(frozen=True)
class Rotations:
    """Rows of random orthonormal bases Q_k = M S_k P_b M S_b P_a M S_a: random signs S, random permutations P, one fixed orthogonal transform M.

    M is a Kronecker product of small Hartley matrices, one for each prime factor of D: the Hadamard transform where D is a power of two,
    and any D has one. It costs D times the sum of a few small factors where a matrix costs D^2. Two rounds are shared by all bases, so
    each further basis costs one. Second moments are those of uniform directions exactly, fourth moments nearly so; the permutations
    keep coordinates that differ in one digit from staying together, most of all where a factor is odd and its matrix uneven.

    Args:
        table: (2 + K, D): two rows of signed numbers +-(i + 1), the signs of S and the places i that P takes its rows from; then one row of
            signs for each basis.
        low, high: the directions meant, of the K * D.

    Source: randomised Hadamard products as in Ailon and Chazelle (2006) and Yu et al. (2016), "Orthogonal Random Features".

    Example:
        >>> q = Rotations(torch.tensor([[1.0, 2, 3, -4, -5, 6], [6, 5, 4, 3, 2, 1], [1, 1, 1, 1, 1, 1]]), 0, 6).dense()
        >>> bool(torch.allclose(q @ q.T, torch.eye(6), atol=1e-6))
        True
    """

    table: Tensor
    low: int
    high: int

    def __len__(self) -> int:
        return self.high - self.low

    def spans(self, chunk: int) -> list[tuple[int, int]]:
        """Whole bases, and one at least: a basis is as large as the samples."""
        dim = self.table.shape[1]
        step = max(1, chunk // dim) * dim
        ends = [*range(self.low // dim * dim + step, self.high, step), self.high]
        return [(low - self.low, high - self.low) for low, high in zip([self.low, *ends[:-1]], ends, strict=True)]

    def spread(self, x: Tensor) -> Tensor:
        for row in self.table[:2]:
            x = _transform((row.sign()[:, None] * x)[None])[0][row.abs().long() - 1]
        return x

    def gather(self, g: Tensor) -> Tensor:
        for row in self.table[:2].flip(0):
            g = _transform(torch.empty_like(g).index_copy_(0, row.abs().long() - 1, g)[None])[0].mul_(row.sign()[:, None])
        return g

    def project(self, spread: Tensor, low: int, high: int) -> Tensor:
        signs, first = self._bases(low, high)
        return _transform(signs * spread).flatten(0, 1)[first : first + high - low]

    def back(self, g: Tensor, low: int, high: int) -> Tensor:
        signs, first = self._bases(low, high)
        rows = signs.shape[0] * signs.shape[1]
        if len(g) < rows:
            g = torch.nn.functional.pad(g, (0, 0, first, rows - first - len(g)))
        turned = _transform(g.view(*signs.shape[:2], -1)).mul_(signs)
        return turned.sum(0) if len(turned) > 1 else turned[0]

    def _bases(self, low: int, high: int) -> tuple[Tensor, int]:
        """Signs (k, D, 1) of the bases that hold these directions, and the place of the first in them."""
        basis, first = divmod(self.low + low, self.table.shape[1])
        last = -(-(self.low + high) // self.table.shape[1])
        return self.table[2 + basis : 2 + last, :, None], first

    def cut(self, low: int, high: int) -> Rotations:
        return replace(self, low=self.low + low, high=self.low + high)

    def dense(self) -> Tensor:
        spread = self.spread(torch.eye(self.table.shape[1], dtype=self.table.dtype, device=self.table.device))
        return torch.cat([self.project(spread, low, high) for low, high in self.spans(len(self))])


def _transform(x: Tensor) -> Tensor:
    """M x for each x (D, R) of (k, D, R), contiguous: one small matrix product for each factor of D. Uses x up: two buffers take turns."""
    done, other, shape = len(x), torch.empty_like(x), x.shape
    for size in _factors(shape[1]):
        matrix = torch.from_numpy(_hartley(size, x.dtype)).to(x.device).expand(done, size, size)
        torch.bmm(matrix, x.view(done, size, -1), out=other.view(done, size, -1))
        done, x, other = done * size, other, x
    return x.view(shape)


@cache
def _factors(dim: int) -> tuple[int, ...]:
    """Numbers whose product is `dim`, of about equal size and, where its primes allow it, at most 16: small products are the fastest."""
    bins = [1] * max(1, math.ceil(math.log(dim, 16) - 1e-9))
    for prime in sorted(_primes(dim), reverse=True):
        bins[bins.index(min(bins))] *= prime
    return tuple(sorted(size for size in bins if size > 1)) or (1,)


def _primes(n: int) -> list[int]:
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p = p + 1 if p * p <= n else n
    return found


@cache
def _hartley(size: int, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """Kronecker product of the Hartley matrices of the primes of `size`: orthogonal and symmetric, (size, size)."""
    made = np.ones((1, 1))
    for prime in _primes(size):
        k = np.arange(prime)
        angle = np.outer(k, k) % prime * (2 * math.pi / prime)
        made = np.kron(made, (np.cos(angle) + np.sin(angle)) / math.sqrt(prime))
    return made.astype(np.float64 if dtype == torch.float64 else np.float32)


# --- names --------------------------------------------------------------------------------------------------------------------------


def parse_directions(kind: str, n: int, dim: int) -> list[tuple[str, int]]:
    """Split ``"axes+random"`` or ``"axes:64+random"`` into families and their counts, which sum to `n`.

    A count can be given after a colon. Without one, `axes` and `eigen` contribute one complete basis (`dim` rows; `eigen-bottom`
    half of one) and the other families share what is left; a single family takes all.

    Raises:
        ValueError: unknown family, or counts that do not add up to `n`.

    Example:
        >>> parse_directions("axes+random", 8192, 512)
        [('axes', 512), ('random', 7680)]
    """
    parts: list[tuple[str, int | None]] = []
    for part in kind.split("+"):
        match = re.fullmatch(r"\s*([a-z-]+)(?::(\d+))?\s*", part)
        if match is None or match[1] not in FAMILIES:
            raise ValueError(
                f"directions: unknown family '{part.strip()}' in '{kind}'; expected {', '.join(FAMILIES)} or a mix such as 'axes+random'"
            )
        parts.append((match[1], int(match[2]) if match[2] else None))
    if len(parts) == 1:
        return [(parts[0][0], n)] if parts[0][1] in (None, n) else _bad_count(kind, n)
    bases = {"axes": dim, "eigen": dim, "eigen-bottom": dim // 2}
    counts = [bases.get(family) if count is None else count for family, count in parts]
    left, sharers = n - sum(c for c in counts if c is not None), counts.count(None)
    if left < sharers or (not sharers and left):
        return _bad_count(kind, n)
    for i, count in enumerate(counts):
        if count is None:
            counts[i] = left // sharers
            left, sharers = left - left // sharers, sharers - 1
    return [(family, count) for (family, _), count in zip(parts, counts, strict=True) if count]


def _bad_count(kind: str, n: int) -> Any:
    raise ValueError(f"directions: the counts of '{kind}' do not add up to n = {n}; give counts as 'axes:64+random', or change n")


def directions(kind: str, n: int, dim: int, generator: torch.Generator | None = None, features: Tensor | None = None) -> Tensor:
    """Unit vectors to project on.

    Args:
        kind: ``random`` (normalised Gaussians), ``orthogonal`` (complete Haar-random orthonormal bases by QR, the last one cut),
            ``hadamard`` (the same by randomised fast transforms, see `Rotations`; much cheaper, and by QR below a width of 64), ``axes`` (the
            coordinate axes; each complete round before any repeats), ``eigen`` (eigenvectors of the covariance of `features`, largest
            eigenvalue first), ``eigen-bottom`` (smallest half first), or a mix such as ``"eigen+random"``, see `parse_directions`.
        n: number of directions, >= 1.
        dim: D, >= 1.
        generator: source of randomness; the result lies on its device (that of `features`, else the CPU, without one).
        features: (B, D) or (V, B, D), needed by the eigen families only; detached, float32, centred. Where the batch spans fewer
            than D dimensions the basis is completed by random orthonormal directions.

    Returns:
        (n, dim) float32, rows of unit length, without gradient. `slices` gives the same directions without storing what need not be.

    Raises:
        ValueError: unknown kind, counts that do not add up, eigen without features.

    Example:
        >>> c = directions("orthogonal", 4, 4, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(c @ c.T, torch.eye(4), atol=1e-6))
        True
    """
    with torch.no_grad():
        blocks = [part.dense() for part in slices(kind, n, dim, generator, features)]
        return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def slices(kind: str, n: int, dim: int, generator: torch.Generator | None = None, features: Tensor | None = None) -> list[Part]:
    """What `directions` returns, as parts that `sliced_wasserstein` takes: `hadamard` directions are never stored as a matrix."""
    if n < 1 or dim < 1:
        raise ValueError(f"directions: expected n >= 1 and dim >= 1, got n = {n}, dim = {dim}")
    device = generator.device if generator is not None else features.device if features is not None else torch.device("cpu")
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return [_family(family, count, dim, generator, device, features) for family, count in parse_directions(kind, n, dim)]


def cut(parts: Sequence[Part], low: int, high: int) -> list[Part]:
    """Directions low to high - 1 of all: one rank's share."""
    found, start = [], 0
    for part in parts:
        first, last = max(low - start, 0), min(high - start, len(part))
        if first < last:
            found.append(part.cut(first, last))
        start += len(part)
    return found


# --- families -----------------------------------------------------------------------------------------------------------------------


def _family(family: str, n: int, dim: int, generator: torch.Generator | None, device: torch.device, features: Tensor | None) -> Part:
    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)

    if family == "random":
        return Rows(torch.nn.functional.normalize(gaussian(n, dim), dim=1))
    if family == "hadamard" and dim >= SMALLEST_TRANSFORM:
        table = torch.randint(0, 2, (2 + -(-n // dim), dim), generator=generator, device=device, dtype=torch.float32).mul_(2).sub_(1)
        for row in table[:2]:
            row.mul_(torch.randperm(dim, generator=generator, device=device) + 1)
        return Rotations(table, 0, n)
    if family in ("orthogonal", "hadamard"):
        return Rows(torch.cat([_haar(gaussian(dim, min(dim, n - start))) for start in range(0, n, dim)]))
    if family == "axes":
        last = torch.randperm(dim, generator=generator, device=device)[: n % dim].sort().values
        order = torch.cat([torch.arange(dim, device=device).repeat(n // dim), last])
        return Rows(torch.eye(dim, device=device, dtype=torch.float32)[order])
    if features is None:
        raise ValueError(f"directions: '{family}' needs features, the embeddings whose covariance is decomposed")
    basis = _eigenbasis(features.detach().float().reshape(-1, dim).to(device), gaussian(dim, dim))
    if family == "eigen-bottom":
        basis = basis.flip(0)
    return Rows(basis.repeat(-(-n // dim), 1)[:n])


def _haar(gaussian: Tensor) -> Tensor:
    """Orthonormal rows, uniformly distributed, from a (D, k) Gaussian matrix: QR with the signs of R's diagonal taken out."""
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).T.contiguous()


def _eigenbasis(x: Tensor, gaussian: Tensor) -> Tensor:
    """All D eigenvectors of the covariance of x (B, D) as rows, by falling eigenvalue; null space filled at random."""
    x = x - x.mean(0)
    if not torch.isfinite(x).all():
        raise NonFiniteError("directions: the features hold NaN or infinity")
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = vh[s > s.max().clamp(min=1e-30) * 1e-6]
    if len(kept) == x.shape[1]:
        return kept
    # project the span out before QR, so that what QR orthonormalises already lies in the complement
    rest = gaussian[:, : x.shape[1] - len(kept)]
    q, _ = torch.linalg.qr(torch.cat([kept.T, rest], dim=1))
    return torch.cat([kept, q.T[len(kept) :]])
