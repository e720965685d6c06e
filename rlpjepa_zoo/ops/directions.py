"""Unit vectors to project on, as rows of a matrix or as fast transforms (`hadamard`).

Shapes: N directions, D embedding width, R columns. Samples are columns (D, R), so that all projections on one direction are adjacent in memory,
ready to be sorted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .hadamard import SMALLEST_TRANSFORM, Rotations

__all__ = [
    "FAMILIES", "INDEPENDENT", "DirectionBlock", "DirectionMatrix", "direction_blocks", "directions", "parse_directions", "select_directions",
]  # fmt: skip

FAMILIES = ("random", "orthogonal", "hadamard", "axes", "eigen", "eigen-bottom")
INDEPENDENT = ("random", "orthogonal", "hadamard")
"""Families whose gradient noise falls with the number of directions; the others are fixed, or depend on the batch."""


class DirectionBlock(Protocol):
    """N directions of one family. Samples (D, R) are prepared once, then projected chunk by chunk; gradients go back by the transposes."""

    def __len__(self) -> int: ...

    @property
    def table(self) -> Tensor:
        """Numbers that define the directions, (rows, D)."""

    def chunks(self, size: int) -> list[tuple[int, int]]:
        """First and last + 1 direction of each chunk, about `size` directions each."""

    def prepare(self, x: Tensor) -> Tensor:
        """The part of the projection that does not depend on the direction: (D, R) -> (D, R)."""

    def prepare_back(self, g: Tensor) -> Tensor:
        """The transpose of `prepare`; may overwrite g."""

    def project(self, prepared: Tensor, low: int, high: int) -> Tensor:
        """Projections on directions low to high - 1: (high - low, R)."""

    def project_back(self, g: Tensor, low: int, high: int) -> Tensor:
        """The transpose of `project`: (high - low, R) -> (D, R); may overwrite g."""

    def select(self, low: int, high: int) -> DirectionBlock:
        """Directions low to high - 1."""

    def matrix(self) -> Tensor:
        """The directions as rows, (N, D)."""


@dataclass(frozen=True)
class DirectionMatrix:
    """Directions stored as the rows of a matrix (N, D)."""

    table: Tensor

    def __len__(self) -> int:
        return len(self.table)

    def chunks(self, size: int) -> list[tuple[int, int]]:
        return [(low, min(low + size, len(self))) for low in range(0, len(self), size)]

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def prepare_back(self, g: Tensor) -> Tensor:
        return g

    def project(self, prepared: Tensor, low: int, high: int) -> Tensor:
        return self.table[low:high] @ prepared

    def project_back(self, g: Tensor, low: int, high: int) -> Tensor:
        return self.table[low:high].T @ g

    def select(self, low: int, high: int) -> DirectionMatrix:
        return DirectionMatrix(self.table[low:high])

    def matrix(self) -> Tensor:
        return self.table


def parse_directions(kind: str, n: int, dim: int) -> list[tuple[str, int]]:
    """Split ``"axes+random"`` or ``"axes:64+random"`` into families and their counts, which sum to `n`.

    A count can be given after a colon. Without one, `axes` and `eigen` contribute one complete basis (`dim` rows; `eigen-bottom`
    half of one) and the other families share the rest; a single family takes all.

    Raises:
        ValueError: unknown family, or counts that do not add up to `n`.

    Example:
        >>> parse_directions("axes+random", 8192, 512)
        [('axes', 512), ('random', 7680)]
    """
    requested: list[tuple[str, int | None]] = []
    for text in kind.split("+"):
        match = re.fullmatch(r"\s*([a-z-]+)(?::(\d+))?\s*", text)
        if match is None or match[1] not in FAMILIES:
            raise ValueError(
                f"directions: unknown family '{text.strip()}' in '{kind}'; expected {', '.join(FAMILIES)} or a mix such as 'axes+random'"
            )
        requested.append((match[1], int(match[2]) if match[2] else None))
    if len(requested) == 1:
        if requested[0][1] not in (None, n):
            raise _bad_count(kind, n)
        return [(requested[0][0], n)]
    bases = {"axes": dim, "eigen": dim, "eigen-bottom": dim // 2}
    counts = [bases.get(family) if count is None else count for family, count in requested]
    rest, sharers = n - sum(c for c in counts if c is not None), counts.count(None)
    if rest < sharers or (not sharers and rest):
        raise _bad_count(kind, n)
    for i, count in enumerate(counts):
        if count is None:
            counts[i] = rest // sharers
            rest, sharers = rest - rest // sharers, sharers - 1
    return [(family, count) for (family, _), count in zip(requested, counts, strict=True) if count]


def _bad_count(kind: str, n: int) -> ValueError:
    return ValueError(f"directions: the counts of '{kind}' do not add up to n = {n}; give counts as 'axes:64+random', or change n")


def directions(kind: str, n: int, dim: int, generator: torch.Generator | None = None, features: Tensor | None = None) -> Tensor:
    """Unit vectors to project on.

    Args:
        kind: ``random`` (normalised Gaussians), ``orthogonal`` (complete Haar-random orthonormal bases by QR, the last one cut),
            ``hadamard`` (the same by randomised fast transforms, see `Rotations`; much cheaper, and by QR below a width of 64), ``axes`` (the
            coordinate axes; each complete round before any repeats), ``eigen`` (eigenvectors of the covariance of `features`, largest
            eigenvalue first), ``eigen-bottom`` (smallest half first), or a mix such as ``"eigen+random"``, see `parse_directions`.
        n: number of directions, >= 1.
        dim: D, >= 1.
        generator: source of randomness; the result is on its device. Without one, on the device of `features`, else on the CPU.
        features: (B, D) or (V, B, D), needed by the eigen families only; detached, float32, centred. Where the batch spans fewer
            than D dimensions the basis is completed by random orthonormal directions.

    Returns:
        (n, dim) float32, rows of unit length, without gradient. `direction_blocks` gives the same directions without the matrix of
        `hadamard` ones.

    Raises:
        ValueError: unknown kind, counts that do not add up, eigen without features.

    Example:
        >>> c = directions("orthogonal", 4, 4, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(c @ c.T, torch.eye(4), atol=1e-6))
        True
    """
    with torch.no_grad():
        matrices = [block.matrix() for block in direction_blocks(kind, n, dim, generator, features)]
        return torch.cat(matrices) if len(matrices) > 1 else matrices[0]


def direction_blocks(
    kind: str, n: int, dim: int, generator: torch.Generator | None = None, features: Tensor | None = None
) -> list[DirectionBlock]:
    """The directions of `directions` as one block for each family, which `sliced_wasserstein` takes; `hadamard` ones are never a matrix."""
    if n < 1 or dim < 1:
        raise ValueError(f"directions: expected n >= 1 and dim >= 1, got n = {n}, dim = {dim}")
    device = generator.device if generator is not None else features.device if features is not None else torch.device("cpu")
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return [_family(family, count, dim, generator, device, features) for family, count in parse_directions(kind, n, dim)]


def select_directions(blocks: Sequence[DirectionBlock], low: int, high: int) -> list[DirectionBlock]:
    """Directions low to high - 1, counted over all blocks: one rank's share."""
    selected, start = [], 0
    for block in blocks:
        first, last = max(low - start, 0), min(high - start, len(block))
        if first < last:
            selected.append(block.select(first, last))
        start += len(block)
    return selected


# --- families -----------------------------------------------------------------------------------------------------------------------


def _family(
    family: str, n: int, dim: int, generator: torch.Generator | None, device: torch.device, features: Tensor | None
) -> DirectionBlock:
    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)

    if family == "random":
        return DirectionMatrix(torch.nn.functional.normalize(gaussian(n, dim), dim=1))
    if family == "hadamard" and dim >= SMALLEST_TRANSFORM:
        return Rotations.draw(n, dim, generator, device)
    if family in ("orthogonal", "hadamard"):
        return DirectionMatrix(torch.cat([_haar(gaussian(dim, min(dim, n - start))) for start in range(0, n, dim)]))
    if family == "axes":
        last = torch.randperm(dim, generator=generator, device=device)[: n % dim].sort().values
        order = torch.cat([torch.arange(dim, device=device).repeat(n // dim), last])
        return DirectionMatrix(torch.eye(dim, device=device, dtype=torch.float32)[order])
    if features is None:
        raise ValueError(f"directions: '{family}' needs features, the embeddings whose covariance is decomposed")
    basis = _eigenbasis(features.detach().float().reshape(-1, dim).to(device), gaussian(dim, dim))
    if family == "eigen-bottom":
        basis = basis.flip(0)
    return DirectionMatrix(basis.repeat(-(-n // dim), 1)[:n])


def _haar(gaussian: Tensor) -> Tensor:
    """Orthonormal rows, uniformly distributed, from a (D, k) Gaussian matrix: QR, times the signs of R's diagonal."""
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).T.contiguous()


def _eigenbasis(x: Tensor, gaussian: Tensor) -> Tensor:
    """All D eigenvectors of the covariance of x (B, D) as rows, by decreasing eigenvalue; random directions complete the null space."""
    x = x - x.mean(0)
    if not torch.isfinite(x).all():
        raise NonFiniteError("directions: the features contain NaN or infinity")
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    spanned = vh[s > s.max().clamp(min=1e-30) * 1e-6]
    if len(spanned) == x.shape[1]:
        return spanned
    rest = gaussian[:, : x.shape[1] - len(spanned)]
    q, _ = torch.linalg.qr(torch.cat([spanned.T, rest], dim=1))
    return torch.cat([spanned, q.T[len(spanned) :]])
