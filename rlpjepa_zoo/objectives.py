"""The objective of Rectified LpJEPA: invariance between views + sliced 2-Wasserstein distance to the rectified target (RDMReg).

Shapes: B batch, D embedding width, N directions, V views. Reductions are means (over N, B, V; for the invariance over B, D and pairs
of views), so weights carry over between batch sizes and widths. Everything runs in float32 (float64 in, float64 inside) with autocast
off: half precision would change the law of the target. Source: arXiv 2602.01456, section 4; the estimator is the mean over directions
of the squared differences of sorted projections.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import collectives, streams
from .distributions import RectifiedGeneralizedGaussian
from .errors import NonFiniteError

__all__ = ["FAMILIES", "RectifiedLpJEPALoss", "Terms", "directions", "invariance", "parse_directions", "sliced_wasserstein"]

FAMILIES = ("random", "orthogonal", "axes", "eigen", "eigen-bottom")


# --- directions ---------------------------------------------------------------------------------------------------------------------


def parse_directions(kind: str, n: int, dim: int) -> list[tuple[str, int]]:
    """Split ``"axes+random"`` or ``"axes:64+random"`` into families and their counts, which sum to `n`.

    A count can be given after a colon. Without one, `axes` and `eigen` contribute one complete basis (`dim` rows; `eigen-bottom`
    half of one) and the families `random` and `orthogonal` share what is left; a single family takes all.

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
        kind: ``random`` (normalised Gaussians), ``orthogonal`` (complete Haar-random orthonormal bases, the last one cut),
            ``axes`` (the coordinate axes; each complete round before any repeats), ``eigen`` (eigenvectors of the covariance of
            `features`, largest eigenvalue first), ``eigen-bottom`` (smallest half first), or a mix such as ``"eigen+random"``,
            see `parse_directions`.
        n: number of directions, >= 1.
        dim: D, >= 1.
        generator: source of randomness; the result lies on its device (that of `features`, else the CPU, without one).
        features: (B, D) or (V, B, D), needed by the eigen families only; detached, float32, centred. Where the batch spans fewer
            than D dimensions the basis is completed by random orthonormal directions.

    Returns:
        (n, dim) float32, rows of unit length, without gradient.

    Raises:
        ValueError: unknown kind, counts that do not add up, eigen without features.

    Example:
        >>> c = directions("orthogonal", 4, 4, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(c @ c.T, torch.eye(4), atol=1e-6))
        True
    """
    if n < 1 or dim < 1:
        raise ValueError(f"directions: expected n >= 1 and dim >= 1, got n = {n}, dim = {dim}")
    device = generator.device if generator is not None else features.device if features is not None else torch.device("cpu")
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        blocks = [_family(family, count, dim, generator, device, features) for family, count in parse_directions(kind, n, dim)]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _family(family: str, n: int, dim: int, generator: torch.Generator | None, device: torch.device, features: Tensor | None) -> Tensor:
    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device)

    if family == "random":
        return torch.nn.functional.normalize(gaussian(n, dim), dim=1)
    if family == "orthogonal":
        return torch.cat([_haar(gaussian(dim, min(dim, n - start))) for start in range(0, n, dim)])
    if family == "axes":
        last = torch.randperm(dim, generator=generator, device=device)[: n % dim].sort().values
        order = torch.cat([torch.arange(dim, device=device).repeat(n // dim), last])
        return torch.eye(dim, device=device)[order]
    if features is None:
        raise ValueError(f"directions: '{family}' needs features, the embeddings whose covariance is decomposed")
    basis = _eigenbasis(features.detach().float().reshape(-1, dim).to(device), gaussian(dim, dim))
    if family == "eigen-bottom":
        basis = basis.flip(0)
    return basis.repeat(-(-n // dim), 1)[:n]


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


# --- sliced 2-Wasserstein ------------------------------------------------------------------------------------------------------------


class _SlicedWasserstein(torch.autograd.Function):
    """Value and gradient in one pass over blocks of directions; only the (V, B, D) gradient is kept for backward.

    The permutation that sorts is constant almost everywhere, so the gradient of a row's projection is twice its signed distance
    to the target value of the same rank; what autograd would store per direction is never stored.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, c: Tensor, chunk: int) -> Tensor:
        views, batch, dim = z.shape
        flat = z.reshape(views * batch, dim)
        grad = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        total = z.new_zeros(())
        for block in c.split(chunk):
            target = (block @ y.T).sort(dim=1).values.unsqueeze(1)  # (n, 1, B): rows are contiguous, one target for all views
            projected, order = (block @ flat.T).view(-1, views, batch).sort(dim=2, stable=True)
            projected -= target
            total += projected.square().sum()
            if grad is not None:
                unsorted = torch.empty_like(projected).scatter_(2, order, projected)
                grad.addmm_(unsorted.view(len(block), -1).T, block)
        count = c.shape[0] * views * batch
        if grad is not None:
            ctx.save_for_backward(grad.mul_(2 / count).view_as(z))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None


def sliced_wasserstein(z: Tensor, y: Tensor, directions: Tensor, chunk: int = 2048) -> Tensor:
    """Sliced squared 2-Wasserstein distance between two samples of equal size.

    mean over directions c, over ranks i and over views of (sort(Z c)_i - sort(Y c)_i)^2.

    Args:
        z: (B, D) or (V, B, D) embeddings; receives the gradient. float16 / bfloat16 are computed in float32.
        y: (B, D) sample of the target, same device, without gradient; one sample serves all views.
        directions: (N, D), rows of unit length.
        chunk: directions worked on at once; peak extra memory is about 4 * chunk * V * B numbers, whatever N.

    Returns:
        Scalar >= 0, float32 (float64 for float64 `z`). For Z = 0 its expectation is mean(y^2); for matched samples it is not zero
        but a floor proportional to 1/B.

    Raises:
        ValueError: shapes that do not fit, an empty batch, or a target that requires a gradient.

    Example:
        >>> y = torch.rand(8, 3)
        >>> float(sliced_wasserstein(y.flip(0), y, directions("axes", 3, 3)))  # order of rows does not matter
        0.0
    """
    if z.dim() not in (2, 3) or y.dim() != 2 or directions.dim() != 2:
        raise ValueError(
            f"sliced_wasserstein: expected z (B, D) or (V, B, D), y (B, D), directions (N, D), got {tuple(z.shape)}, {tuple(y.shape)}, {tuple(directions.shape)}"
        )
    if z.shape[-2:] != y.shape or directions.shape[1] != y.shape[1]:
        raise ValueError(f"sliced_wasserstein: sizes differ: z {tuple(z.shape)}, y {tuple(y.shape)}, directions {tuple(directions.shape)}")
    if z.numel() == 0 or directions.shape[0] == 0:
        raise ValueError("sliced_wasserstein: empty batch or no directions")
    if y.requires_grad:
        raise ValueError("sliced_wasserstein: the target must not require a gradient; pass y.detach()")
    if chunk < 1:
        raise ValueError(f"sliced_wasserstein: chunk must be >= 1, got {chunk}")
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        z3 = z.unsqueeze(0) if z.dim() == 2 else z
        return _SlicedWasserstein.apply(z3, y.to(z.dtype), directions.detach().to(z.device, z.dtype), chunk)


# --- the objective -------------------------------------------------------------------------------------------------------------------


def invariance(z: Tensor) -> Tensor:
    """Mean over pairs of views, batch and dimensions of the squared difference.

    Args:
        z: (V, B, D), V >= 1, rectified embeddings of V views of the same images; no normalisation, no stop-gradient.

    Returns:
        Scalar; zero for one view. For V = 2 it is mean((z1 - z2)^2).

    Example:
        >>> float(invariance(torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])))
        0.5
    """
    views = z.shape[0]
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        if views < 2:
            return z.sum() * 0.0
        if views == 2:
            return (z[0] - z[1]).square().mean()
        return (z - z.mean(0)).square().mean() * (2 * views / (views - 1))  # = mean over pairs, in O(V)


class Terms(NamedTuple):
    """What the objective returns: `loss` = weighted sum (with gradient), and its two unweighted parts."""

    loss: Tensor
    invariance: Tensor
    matching: Tensor


class RectifiedLpJEPALoss:
    """weight_invariance * invariance + weight_matching * mean over views of the sliced distance to the target.

    Targets and directions are drawn from (seed, step), the same on every rank, for the batch gathered from all ranks; each rank
    works on its share of the directions. After gradient averaging the parameters get exactly the gradient of one process that sees
    the whole batch, whatever the number of ranks.

    Args:
        target: law of one coordinate (scalar parameters).
        invariance_weight, matching_weight: lambda_inv and lambda_reg, >= 0.
        kind, n: family and number of directions, see `directions`.
        seed: of the run.
        chunk: directions at once, see `sliced_wasserstein`.

    Example:
        >>> from rlpjepa_zoo.distributions import sigma_gn
        >>> loss = RectifiedLpJEPALoss(RectifiedGeneralizedGaussian(0.0, sigma_gn(1.0), 1.0), n=64)
        >>> terms = loss(torch.rand(2, 16, 8, requires_grad=True), step=0)
        >>> terms.loss.requires_grad, bool(terms.matching >= 0)
        (True, True)
    """

    def __init__(
        self,
        target: RectifiedGeneralizedGaussian,
        invariance_weight: float = 25.0,
        matching_weight: float = 125.0,
        kind: str = "random",
        n: int = 8192,
        seed: int = 0,
        chunk: int = 2048,
    ) -> None:
        self.target, self.kind, self.n, self.seed, self.chunk = target, kind, n, seed, chunk
        self.invariance_weight, self.matching_weight = invariance_weight, matching_weight

    def _draw(self, purpose: str, step: int, rows: int, dim: int, device: torch.device) -> Tensor:
        source = streams.generator(self.seed, purpose, step, device=device)
        loc, scale = (torch.tensor(float(x), device=device) for x in (self.target.loc, self.target.scale))
        law = RectifiedGeneralizedGaussian(loc, scale, float(self.target.p), validate_args=False)
        return law.sample((rows, dim), generator=source)

    def __call__(self, z: Tensor, step: int) -> Terms:
        """Terms for this rank's embeddings z (V, b, D) at a step; `matching` covers the batch of all ranks."""
        inv = invariance(z)
        everyone = collectives.gather_with_grad(z, dim=1)
        batch, dim = everyone.shape[1:]
        y = self._draw("target", step, batch, dim, z.device)
        source = streams.generator(self.seed, "directions", step, device=z.device)
        c = directions(self.kind, self.n, dim, source, features=everyone)
        mine = c[collectives.rank() :: collectives.world_size()]
        if len(c) < collectives.world_size():
            raise ValueError(
                f"directions: {self.n} are fewer than {collectives.world_size()} ranks; raise objective.num_directions"
            )  # on every rank
        share = len(mine) * collectives.world_size() / len(c)  # 1 when the ranks divide n evenly
        matching = sliced_wasserstein(everyone, y, mine, self.chunk) * share
        return Terms(self.invariance_weight * inv + self.matching_weight * matching, inv, matching)

    @torch.no_grad()
    def floor(self, batch: int, dim: int, repeats: int = 4, n: int = 512, device: torch.device | str = "cpu") -> float:
        """Value of the matching term for embeddings that *are* a sample of the target: what perfect training ends at, about kappa / B.

        Args:
            batch, dim: global B and D.
            repeats, n: independent pairs of samples, and random directions for each.
        """
        where = torch.device(device)
        values = []
        for i in range(repeats):
            c = directions("random", n, dim, streams.generator(self.seed, "floor-directions", i, device=where))
            a, b = (self._draw(f"floor-{half}", i, batch, dim, where) for half in "ab")
            values.append(float(sliced_wasserstein(a, b, c, self.chunk)))
        return sum(values) / len(values)
