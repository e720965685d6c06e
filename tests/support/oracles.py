"""Independent float64 references: quadrature, loops and plain autograd. Nothing here imports the package."""

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations

import numpy as np
import torch
from scipy import optimize, special, stats
from scipy.integrate import quad
from torch import Tensor


def law(p: float, mu: float, sigma: float) -> stats.distributions.rv_frozen:
    """GN_p(mu, sigma) by scipy."""
    return stats.gennorm(p, loc=mu, scale=p ** (1 / p) * sigma)


def sigma_gn(p: float) -> float:
    """Scale of unit variance before rectification, from scipy's variance of the standard law."""
    return 1 / float(law(p, 0.0, 1.0).std())


def _branch(f: Callable[[float], float], p: float, mu: float, sigma: float, near: float) -> float:
    """Integral of f over x > mu + near; substituting x = mu + s^4 removes the cusp at mu."""
    depth = (near / sigma) ** p / p
    stops = [(sigma * (p * (depth + t)) ** (1 / p)) ** 0.25 for t in (0, 1, 5, 15, 40, 80)]
    return sum(
        quad(lambda s: f(mu + s**4) * 4 * s**3, a, b, epsabs=0, epsrel=1e-12, limit=200)[0]
        for a, b in zip(stops[:-1], stops[1:], strict=True)
    )


def positive_part(g: Callable[[float], float], p: float, mu: float, sigma: float) -> float:
    """Integral over x > 0 of g(x) times the density of GN_p(mu, sigma)."""
    peak = float(law(p, mu, sigma).pdf(mu))

    def f(x: float) -> float:
        return g(x) * peak * math.exp(-((abs(x - mu) / sigma) ** p) / p)

    if mu <= 0:
        return _branch(f, p, mu, sigma, -mu)
    inner = quad(lambda s: f(mu - s**4) * 4 * s**3, 0, mu**0.25, epsabs=0, epsrel=1e-12, limit=200)[0]
    return _branch(f, p, mu, sigma, 0.0) + inner


@cache
def rectified(p: float, mu: float, sigma: float) -> dict[str, float]:
    """l0, moments and d(xi)-entropy (nats) of max(X, 0), X ~ GN_p(mu, sigma)."""
    x = law(p, mu, sigma)
    zero, peak = float(x.cdf(0.0)), float(x.pdf(mu))
    l0 = positive_part(lambda y: 1.0, p, mu, sigma)
    mean = positive_part(lambda y: y, p, mu, sigma)
    continuous = positive_part(lambda y: (abs(y - mu) / sigma) ** p / p - math.log(peak), p, mu, sigma)
    atom = special.xlog1py(zero, -l0) if l0 < 0.5 else special.xlogy(zero, zero)
    return {
        "l0": l0,
        "mean": mean,
        "second": positive_part(lambda y: y * y, p, mu, sigma),
        "variance": positive_part(lambda y: (y - mean) ** 2, p, mu, sigma) + zero * mean**2,
        "entropy": continuous - float(atom),
    }


def sliced(z: np.ndarray, y: np.ndarray, directions: np.ndarray) -> float:
    """Sliced squared 2-Wasserstein distance of (B, D) samples, one direction at a time."""
    values = []
    for c in directions:
        values.append(np.mean((np.sort(z @ c) - np.sort(y @ c)) ** 2))
    return float(np.mean(values))


def transport(u: np.ndarray, v: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of two 1-D samples as an assignment problem, without any sort."""
    cost = (u[:, None] - v[None, :]) ** 2
    rows, columns = optimize.linear_sum_assignment(cost)
    return float(cost[rows, columns].mean())


def sliced_autograd(z: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """`sliced` in torch, with the gradient of `sort` (ties in the order of the batch); z is (B, D) or (V, B, D)."""
    views = z.unsqueeze(0) if z.dim() == 2 else z
    target = (y @ directions.T).sort(dim=0).values
    return torch.stack([((view @ directions.T).sort(dim=0, stable=True).values - target).square().mean() for view in views]).mean()


def invariance(z: np.ndarray) -> float:
    """Mean over pairs of views of the mean squared difference."""
    pairs = [np.mean((z[i] - z[j]) ** 2) for i, j in combinations(range(len(z)), 2)]
    return float(np.mean(pairs)) if pairs else 0.0


def laplace_tail(mu: float, sigma: float) -> dict[str, float]:
    """Exact l0, mean, variance and entropy for p = 1, mu <= 0, at full relative precision."""
    l0 = 0.5 * math.exp(mu / sigma)
    entropy = l0 * (1 + math.log(sigma)) - l0 * math.log(l0) - (1 - l0) * math.log1p(-l0)
    return {"l0": l0, "mean": l0 * sigma, "variance": l0 * sigma**2 * (2 - l0), "entropy": entropy}


def info_nce(z: np.ndarray, temperature: float) -> float:
    """NT-Xent of views (V, b, D) by loops: the mean over ordered pairs of different views of one image."""
    rows = [(image, v / np.linalg.norm(v)) for view in z.astype(np.float64) for image, v in enumerate(view)]
    losses = []
    for i, (image, a) in enumerate(rows):
        others = {j: math.exp(float(a @ b) / temperature) for j, (_, b) in enumerate(rows) if j != i}
        losses += [-math.log(others[j] / sum(others.values())) for j in others if rows[j][0] == image]
    return sum(losses) / len(losses)


def largest(row: np.ndarray, k: int) -> np.ndarray:
    """A row with only its k largest positive values."""
    kept = np.zeros_like(row)
    for i in sorted(range(len(row)), key=lambda i: -row[i])[:k]:
        kept[i] = max(row[i], 0.0)
    return kept


def csr_loss(
    x: np.ndarray, encode: np.ndarray, c: np.ndarray, decode: np.ndarray, b: np.ndarray, k: int, dead: set[int], most_dead: int = 512
) -> float:
    """The loss of CSR, equations of arXiv 2503.01776 and its appendix, row by row: L(k) + L(4k) / 8 + L(aux) / 32 + 0.1 L(contrastive).

    Args:
        x: (V, n, F) centred features of V views.
        encode, c: (D, F), (D,) of the encoder; decode, b: (F, D), (F,) of the decoder. c, b are biases.
        k: values of a code.
        dead: units that the auxiliary loss is for.
    """
    x = x.astype(np.float64)
    codes, squares, auxiliary = np.zeros((*x.shape[:2], len(encode))), {"k": [], "4k": []}, []
    for v, view in enumerate(x):
        errors, repairs = [], []
        for i, row in enumerate(view):
            units = encode @ (row - b) + c
            codes[v, i] = largest(units, k)
            errors.append(row - (decode @ codes[v, i] + b))
            squares["k"].append(np.mean(errors[-1] ** 2))
            squares["4k"].append(np.mean((row - (decode @ largest(units, 4 * k) + b)) ** 2))
            repairs.append(decode @ largest(np.array([u if j in dead else 0.0 for j, u in enumerate(units)]), most_dead))
        error, repair = np.array(errors), np.array(repairs)
        auxiliary.append(np.mean((repair - error) ** 2) / np.mean((error - error.mean(0)) ** 2) if dead else 0.0)
    return float(np.mean(squares["k"]) + np.mean(squares["4k"]) / 8 + np.mean(auxiliary) / 32 + 0.1 * info_nce(codes, 0.2))
