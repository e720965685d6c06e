"""Random orthonormal bases as products of signs, permutations and fast transforms; no matrix is stored.

Shapes: D embedding width, R columns. Samples are columns (D, R), so that all projections on one direction are adjacent in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["SMALLEST_TRANSFORM", "Rotations"]

SMALLEST_TRANSFORM = 64
"""Smallest width with fast transforms. Below it `hadamard` bases come from QR: few signs give few directions, and a small QR is cheap."""


@dataclass(frozen=True)
class Rotations:
    """Rows of random orthonormal bases Q_k = M S_k P_b M S_b P_a M S_a: random signs S, random permutations P, one fixed orthogonal transform M.

    M is a Kronecker product of small Hartley matrices, one for each prime factor of D: the Hadamard transform where D is a power of two.
    It exists for every D. Its cost is D times the sum of a few small factors, where a matrix costs D^2. All bases share two rounds, so each
    further basis costs one round. Second moments equal those of uniform directions exactly, fourth moments nearly. The permutations separate
    coordinates that differ in one digit, which matters most where a factor is odd and its matrix uneven.

    Args:
        table: (2 + K, D): two rows of signed numbers +-(i + 1), with the signs of S and the rows i that P reads; then one row of signs for
            each basis.
        low, high: the directions low to high - 1 of the K * D.

    Source: randomised Hadamard products as in Ailon and Chazelle (2006) and Yu et al. (2016), "Orthogonal Random Features".

    Example:
        >>> q = Rotations(torch.tensor([[1.0, 2, 3, -4, -5, 6], [6, 5, 4, 3, 2, 1], [1, 1, 1, 1, 1, 1]]), 0, 6).matrix()
        >>> bool(torch.allclose(q @ q.T, torch.eye(6), atol=1e-6))
        True
    """

    table: Tensor
    low: int
    high: int

    @classmethod
    def draw(cls, n: int, dim: int, generator: torch.Generator | None, device: torch.device) -> Rotations:
        """n random directions of width `dim`."""
        table = torch.randint(0, 2, (2 + -(-n // dim), dim), generator=generator, device=device, dtype=torch.float32).mul_(2).sub_(1)
        for row in table[:2]:
            row.mul_(torch.randperm(dim, generator=generator, device=device) + 1)
        return cls(table, 0, n)

    def __len__(self) -> int:
        return self.high - self.low

    def chunks(self, size: int) -> list[tuple[int, int]]:
        """Ranges of complete bases, at least one basis each: a basis is as large as the samples."""
        dim = self.table.shape[1]
        step = max(1, size // dim) * dim
        ends = [*range(self.low // dim * dim + step, self.high, step), self.high]
        return [(low - self.low, high - self.low) for low, high in zip([self.low, *ends[:-1]], ends, strict=True)]

    def prepare(self, x: Tensor) -> Tensor:
        for row in self.table[:2]:
            x = _transform((row.sign()[:, None] * x)[None])[0][row.abs().long() - 1]
        return x

    def prepare_back(self, g: Tensor) -> Tensor:
        for row in self.table[:2].flip(0):
            g = _transform(torch.empty_like(g).index_copy_(0, row.abs().long() - 1, g)[None])[0].mul_(row.sign()[:, None])
        return g

    def project(self, prepared: Tensor, low: int, high: int) -> Tensor:
        signs, first = self._bases(low, high)
        return _transform(signs * prepared).flatten(0, 1)[first : first + high - low]

    def project_back(self, g: Tensor, low: int, high: int) -> Tensor:
        signs, first = self._bases(low, high)
        rows = signs.shape[0] * signs.shape[1]
        if len(g) < rows:
            g = torch.nn.functional.pad(g, (0, 0, first, rows - first - len(g)))
        turned = _transform(g.view(*signs.shape[:2], -1)).mul_(signs)
        return turned.sum(0) if len(turned) > 1 else turned[0]

    def _bases(self, low: int, high: int) -> tuple[Tensor, int]:
        """Signs (k, D, 1) of the bases that contain these directions, and the index of the first direction in them."""
        basis, first = divmod(self.low + low, self.table.shape[1])
        last = -(-(self.low + high) // self.table.shape[1])
        return self.table[2 + basis : 2 + last, :, None], first

    def select(self, low: int, high: int) -> Rotations:
        return replace(self, low=self.low + low, high=self.low + high)

    def matrix(self) -> Tensor:
        prepared = self.prepare(torch.eye(self.table.shape[1], dtype=self.table.dtype, device=self.table.device))
        return torch.cat([self.project(prepared, low, high) for low, high in self.chunks(len(self))])


def _transform(x: Tensor) -> Tensor:
    """M x for each x (D, R) of (k, D, R), contiguous: one small matrix product for each factor of D. Overwrites x, which is one of two buffers."""
    done, other, shape = len(x), torch.empty_like(x), x.shape
    for size in factors(shape[1]):
        matrix = torch.from_numpy(_hartley(size, x.dtype)).to(x.device).expand(done, size, size)
        torch.bmm(matrix, x.view(done, size, -1), out=other.view(done, size, -1))
        done, x, other = done * size, other, x
    return x.view(shape)


@cache
def factors(dim: int) -> tuple[int, ...]:
    """Sizes of the small products that transform `dim` coordinates: of about equal size and, where the primes allow it, at most 16.

    Example:
        >>> factors(512), factors(96)
        ((8, 8, 8), (8, 12))
    """
    bins = [1] * max(1, math.ceil(math.log(dim, 16) - 1e-9))
    for prime in sorted(_primes(dim), reverse=True):
        bins[bins.index(min(bins))] *= prime
    return tuple(sorted(size for size in bins if size > 1)) or (1,)


def _primes(n: int) -> list[int]:
    primes, p = [], 2
    while n > 1:
        while n % p == 0:
            primes.append(p)
            n //= p
        p = p + 1 if p * p <= n else n
    return primes


@cache
def _hartley(size: int, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """Kronecker product of the Hartley matrices of the primes of `size`: orthogonal and symmetric, (size, size)."""
    product = np.ones((1, 1))
    for prime in _primes(size):
        k = np.arange(prime)
        angle = np.outer(k, k) % prime * (2 * math.pi / prime)
        product = np.kron(product, (np.cos(angle) + np.sin(angle)) / math.sqrt(prime))
    return product.astype(np.float64 if dtype == torch.float64 else np.float32)
