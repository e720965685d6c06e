"""SIGReg: a regulariser that draws embeddings or hidden states towards a standard Gaussian.

Shapes: B batch, C width, K directions, V views. *Strong* compares characteristic functions along directions (the statistic of Epps and
Pulley), *weak* compares the covariance with the identity. Everything runs in float32 (float64 in, float64 inside) with autocast off, in real
arithmetic. Over many processes the values are those of the joined batch. Processes exchange only means of small tensors, and embeddings only
for the weak form of a batch smaller than the width. After gradient averaging the parameters get exactly the gradient of one process.
Sources: arXiv 2511.08544 (LeJEPA), arXiv 2603.05924 (strong and weak SIGReg for supervised training).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core import distributed, rng
from ..ops.directions import directions
from ..ops.precision import full_float32

__all__ = ["KINDS", "SIGReg", "sketch", "strong_sigreg", "weak_sigreg"]

KINDS: dict[str, tuple[int, float] | None] = {"strong": (17, 5.0), "lejepa": (33, 3.0), "weak": None}
"""Kinds of `SIGReg`: knots and limit of the strong form as in each paper, and None for the weak form.

LeJEPA's 17 knots on [0, 3] with doubled weights equal 33 knots on [-3, 3], because the integrand is even.
"""


# --- strong --------------------------------------------------------------------------------------------------------------------------


def _means(wave: Tensor, count: int) -> Tensor:
    """Means over the batch of cos and sin of k theta, k = 1 ... count, from wave = (cos theta, sin theta): Chebyshev's recurrence."""
    twice, before, now = 2 * wave[0], torch.zeros_like(wave), wave.clone()
    before[0] = 1
    means = [now.mean(-1)]
    for _ in range(count - 1):
        before.neg_().addcmul_(twice, now)
        before, now = now, before
        means.append(now.mean(-1))
    return torch.stack(means)


def _series(wave: Tensor, coefficients: Tensor) -> Tensor:
    """Sum over k of a_k cos(k theta) + b_k sin(k theta), where row k - 1 of the coefficients is (a_k, b_k): Clenshaw's recurrence."""
    twice, after, now = 2 * wave[0], torch.zeros_like(wave), torch.zeros_like(wave)
    for row in coefficients.flip(0):
        after.neg_().addcmul_(twice, now).add_(row.unsqueeze(-1))
        after, now = now, after
    return (wave * now).sum(0).sub_(after[0])


class _Strong(torch.autograd.Function):
    """Value and gradient in one pass over blocks of directions; one sin and one cos for each projection, whatever the number of knots.

    With C_k and S_k the means of cos(t_k p) and sin(t_k p), the gradient of a projection p is a trigonometric series in t_1 p with
    coefficients (S_k, phi_k - C_k) 2 w_k k. So only the gradient of x is saved. The knot t = 0 adds nothing: both functions are 1 there.
    """

    @staticmethod
    @full_float32()
    def forward(ctx: Any, x: Tensor, c: Tensor, knots: int, limit: float, chunk: int) -> Tensor:
        views, batch, dim = x.shape
        flat, count, world = x.reshape(views * batch, dim), (knots - 1) // 2, distributed.world_size()
        k = torch.arange(1, count + 1, device=x.device, dtype=x.dtype).view(-1, 1, 1)
        phi = torch.exp(-(k * (limit / count)).square() / 2)
        weight = phi * (2 * limit / count)
        weight[-1] /= 2  # trapezoidal rule, with both signs of t in one knot
        grad = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        total = x.new_zeros(())
        for block in c.split(chunk):
            block = block * (limit / count)
            theta = block @ flat.T
            wave = torch.stack([theta.cos(), theta.sin()]).view(2, -1, views, batch)
            error = distributed.mean_over_ranks(_means(wave, count))
            error[:, 0] -= phi
            total += (weight * error.square().sum(1)).sum()
            if grad is not None:
                coefficients = torch.stack([error[:, 1], -error[:, 0]], 1) * (2 * weight * k).unsqueeze(1)
                grad.addmm_(_series(wave, coefficients).view(len(block), -1).T, block)
        projections = len(c) * views
        if grad is not None:
            ctx.save_for_backward(grad.mul_(world / projections).view_as(x))
        return total * (batch * world / projections)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None, None


def strong_sigreg(x: Tensor, directions: Tensor, knots: int = 17, limit: float = 5.0, chunk: int | None = None) -> Tensor:
    """Distance of the characteristic functions of projections from that of a standard Gaussian (Epps-Pulley), averaged over directions.

    Mean over directions c and views of B * integral over [-limit, limit] of |mean_b exp(i t x_b c) - phi(t)|^2 phi(t) dt by the
    trapezoidal rule, phi(t) = exp(-t^2 / 2). Outliers hardly count: beyond a few units the gradient of a projection fades, and the rule
    sees it modulo pi (knots - 1) / limit, which is 10 for (17, 5) and 33.5 for (33, 3).

    Args:
        x: (B, C) or (V, B, C) embeddings; receives the gradient. float16 / bfloat16 are computed in float32.
        directions: (K, C), rows of unit length, without gradient, the same on all processes.
        knots: number of knots on [-limit, limit]; odd, >= 3. SIGReg has (knots, limit) = (17, 5), LeJEPA (33, 3).
        limit: end of the integral, > 0.
        chunk: directions per chunk, by default 256 on a CPU (to stay in cache) and 4096 elsewhere; peak extra memory is about
            8 * chunk * V * B numbers, whatever K and `knots`. Processes exchange chunk * knots * V numbers for each chunk.

    Returns:
        Scalar >= 0, float32 (float64 for float64 `x`). About 1.06 for Gaussian samples of any size, 0.41 B for x = 0.

    Raises:
        ValueError: shapes that do not fit, an empty batch, or a rule without knots.

    Example:
        >>> c = directions("random", 64, 8, torch.Generator().manual_seed(0))
        >>> round(float(strong_sigreg(torch.zeros(128, 8), c)), 2)
        52.34
    """
    x3 = _views("strong_sigreg", x)
    if directions.dim() != 2 or directions.shape[1] != x.shape[-1] or len(directions) == 0:
        raise ValueError(f"strong_sigreg: expected directions (K, {x.shape[-1]}) for x {tuple(x.shape)}, got {tuple(directions.shape)}")
    if knots < 3 or knots % 2 == 0:
        raise ValueError(f"strong_sigreg: knots must be odd and >= 3, so that 0 is a knot and both signs have the same knots, got {knots}")
    if not (limit > 0 and math.isfinite(limit)):
        raise ValueError(f"strong_sigreg: limit must be > 0 and finite, got {limit}")
    chunk = chunk if chunk is not None else 256 if x.device.type == "cpu" else 4096
    if chunk < 1:
        raise ValueError(f"strong_sigreg: chunk must be >= 1, got {chunk}")
    with torch.autocast(x.device.type, enabled=False):
        return _Strong.apply(x3, directions.detach().to(x3.device, x3.dtype), knots, float(limit), chunk)


# --- weak ----------------------------------------------------------------------------------------------------------------------------


class _Weak(torch.autograd.Function):
    """|Cov - I| of one view, and its gradient 2 (x Cov - x) / (d |Cov - I|), x sketched and centred, d = B - 1 + 1e-6.

    For B < C the matrix x x^T is smaller than x^T x. Its eigenvalues are those of Cov without C - B zeros, so
    |Cov - I|^2 = |x x^T / d - I|^2 + C - B: a sum without cancellation. At Cov = I, where the norm has no gradient, the gradient is 0.
    """

    @staticmethod
    @full_float32()
    def forward(ctx: Any, x: Tensor, narrow: Tensor | None) -> Tensor:
        x = x if narrow is None else x @ narrow.T
        rows, dim = x.shape
        world, rank = distributed.world_size(), distributed.rank()
        batch = rows * world
        scale = batch - 1 + 1e-6
        x = x - distributed.mean_over_ranks(x.mean(0))
        if batch < dim:
            gathered = distributed.gather_rows(x)
            excess = x @ gathered.T / scale  # this rank's rows
            excess.diagonal(rank * rows).sub_(1)
            square = world * distributed.mean_over_ranks(excess.square().sum()) + (dim - batch)
        else:
            excess = distributed.mean_over_ranks(x.T @ x) * (world / scale)
            excess.diagonal().sub_(1)
            square = excess.square().sum()
        value = square.sqrt()
        if ctx.needs_input_grad[0]:
            pull = excess @ gathered if batch < dim else x @ excess
            pull *= (2 * world / scale) / value.clamp(min=torch.finfo(x.dtype).tiny)
            ctx.save_for_backward(pull if narrow is None else pull @ narrow)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None


def weak_sigreg(x: Tensor, sketch: Tensor | None = None) -> Tensor:
    """Frobenius norm (not squared) of Cov - I, Cov = x^T x / (B - 1 + 1e-6) of the centred batch, averaged over views.

    Args:
        x: (B, C) or (V, B, C) embeddings; receives the gradient. float16 / bfloat16 are computed in float32.
        sketch: (K, C), from `sketch`, without gradient, the same on all processes; x is replaced by x sketch^T first.

    Returns:
        Scalar >= 0, float32 (float64 for float64 `x`). sqrt(K) (without a sketch sqrt(C)) for x = 0. For Gaussian samples it is not 0, and
        its minimum is at a variance below 1, because the noise of Cov counts too.

    Raises:
        ValueError: shapes that do not fit, or fewer than two rows.

    Example:
        >>> float(weak_sigreg(torch.zeros(16, 9)))
        3.0
    """
    x3 = _views("weak_sigreg", x)
    if x3.shape[1] * distributed.world_size() < 2:
        raise ValueError(f"weak_sigreg: expected at least 2 rows, got x {tuple(x.shape)}")
    if sketch is not None and (sketch.dim() != 2 or sketch.shape[1] != x.shape[-1] or len(sketch) == 0):
        raise ValueError(f"weak_sigreg: expected sketch (K, {x.shape[-1]}) for x {tuple(x.shape)}, got {tuple(sketch.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        narrow = None if sketch is None else sketch.detach().to(x3.device, x3.dtype)
        return torch.stack([_Weak.apply(view, narrow) for view in x3]).mean()


def sketch(n: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """(n, dim) float32 matrix of independent N(0, 1 / dim), on the device of `generator`; reduces x of `dim` columns to n for `weak_sigreg`.

    Example:
        >>> sketch(64, 512, torch.Generator().manual_seed(0)).shape
        torch.Size([64, 512])
    """
    if n < 1 or dim < 1:
        raise ValueError(f"sketch: expected n >= 1 and dim >= 1, got n = {n}, dim = {dim}")
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randn(n, dim, generator=generator, device=device) / math.sqrt(dim)


def _views(name: str, x: Tensor) -> Tensor:
    """x as (V, B, C), in float32, or float64 if x is float64."""
    if x.dim() not in (2, 3):
        raise ValueError(f"{name}: expected x (B, C) or (V, B, C), got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name}: empty batch, x is {tuple(x.shape)}")
    x = x if x.dtype == torch.float64 else x.float()
    return x.unsqueeze(0) if x.dim() == 2 else x


# --- as a regulariser ---------------------------------------------------------------------------------------------------------------


class SIGReg:
    """SIGReg of embeddings, or its mean over hidden states; directions or sketch are drawn from (seed, step), the same on all processes.

    Args:
        kind: ``strong``, ``lejepa`` or ``weak``, see `KINDS`.
        n: number of directions; for the weak form, rows of the sketch, which is used for states wider than n.
        seed: seed of the run.
        family: family of the directions, see `directions`; not for the weak form, and not one that needs features.

    Raises:
        ValueError: unknown kind, n < 1, or a family that does not fit. Calls raise as `strong_sigreg` and `weak_sigreg`.

    Example:
        >>> hidden = [torch.randn(32, 16), torch.randn(32, 128)]
        >>> bool(SIGReg("weak")(hidden, step=0) > 0)
        True
    """

    def __init__(self, kind: str = "strong", n: int = 64, seed: int = 0, family: str = "random") -> None:
        if kind not in KINDS:
            raise ValueError(f"SIGReg: unknown kind '{kind}'; expected {', '.join(KINDS)}")
        if n < 1:
            raise ValueError(f"SIGReg: n must be >= 1, got {n}")
        if "eigen" in family or (kind == "weak" and family != "random"):
            raise ValueError(
                f"SIGReg: family '{family}' is not for kind '{kind}'; expected 'random', or for the strong form 'orthogonal', 'hadamard' or 'axes'"
            )
        self.kind, self.n, self.seed, self.family = kind, n, seed, family

    def __call__(self, x: Tensor | Sequence[Tensor], step: int) -> Tensor:
        """Scalar for x (B, C) or (V, B, C), or the mean over a list of such, at a step."""
        layers = [x] if isinstance(x, Tensor) else list(x)
        if not layers:
            raise ValueError("SIGReg: no hidden states; expected one tensor or a list of at least one")
        source = rng.generator(self.seed, "sigreg-directions", step, device=layers[0].device)
        return torch.stack([self._layer(layer, source) for layer in layers]).mean()

    def _layer(self, x: Tensor, source: torch.Generator) -> Tensor:
        x, rule = _views("SIGReg", x), KINDS[self.kind]
        width = x.shape[-1]
        if rule is None:
            return weak_sigreg(x, sketch(self.n, width, source) if width > self.n else None)
        return strong_sigreg(x, directions(self.family, self.n, width, source), *rule)
