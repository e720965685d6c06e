"""`rlpjepa bench loss`: the loss compared with the paper's minimal example, timed alternately in one process, at equal numbers of directions and at
equal gradient error.

A busy machine slows all contenders, so the ratio of the medians is the figure to use. Every contender does all work of a step: it draws
directions and targets and computes the loss of two views and its gradient.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import rng
from ..distributions import RectifiedGeneralizedGaussian, sigma_gn
from ..objectives.rectified_lpjepa import RectifiedLpJEPALoss
from ..objectives.sigreg import SIGReg
from ..ops.gradient_noise import directions_needed, gradient_error, matched
from .machine import is_cuda, machine

__all__ = ["compare", "markdown_table", "minimal_example", "peak_memory", "scaling", "states", "timed"]

Loss = Callable[[Tensor], Tensor]
SIGMA = sigma_gn(1.0)


def target_law(device: torch.device | str = "cpu") -> RectifiedGeneralizedGaussian:
    """The target with p = 1, mu = 0, on a device."""
    return RectifiedGeneralizedGaussian(torch.tensor(0.0, device=device), torch.tensor(SIGMA, device=device), 1.0)


def states(batch: int, dim: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Embeddings (B, D) as at three stages of a training, each with a sample of the target (p = 1, mu = 0).

    early: correlated, of rank 16, far from the target. near: a sample of the target scaled by 1.15. matched: a sample of the target.
    """
    z, y = matched(target_law(), batch, dim)
    source = rng.generator(0, "bench-early")
    low = torch.randn(batch, 16, generator=source) @ torch.randn(16, dim, generator=source)
    return {"early": (0.075 * low, y), "near": (1.15 * z, y), "matched": (z, y)}


# --- contenders ---------------------------------------------------------------------------------------------------------------------


def minimal_example(n: int) -> Loss:
    """The loss of the paper's minimal example, from its description: new directions and a new target for each view, sorted along the batch."""

    def distance(z: Tensor) -> Tensor:
        c = F.normalize(torch.randn(n, z.shape[1], device=z.device), dim=1)
        y = torch.distributions.Laplace(torch.tensor(0.0, device=z.device), SIGMA).sample(z.shape).relu()
        return (torch.sort(z @ c.T, dim=0).values - torch.sort(y @ c.T, dim=0).values).square().mean()

    return lambda z: torch.stack([distance(view) for view in z]).mean()


def plain_torch(n: int) -> Loss:
    """Straightforward torch: directions and target shared by the views, gradient by autograd."""

    def loss(z: Tensor) -> Tensor:
        c = F.normalize(torch.randn(n, z.shape[2], device=z.device), dim=1)
        y = target_law(z.device).sample(z.shape[1:])
        return ((z @ c.T).sort(dim=1).values - (y @ c.T).sort(dim=0).values).square().mean()

    return loss


def optimal_transport(n: int) -> Loss | None:
    """The sliced distance of POT (Python Optimal Transport); None if it is not installed."""
    try:
        import ot
    except ImportError:
        return None

    def loss(z: Tensor) -> Tensor:
        c = F.normalize(torch.randn(n, z.shape[2], device=z.device), dim=1).T
        y = target_law(z.device).sample(z.shape[1:])
        return torch.stack([ot.sliced_wasserstein_distance(view, y, projections=c).square() for view in z]).mean()

    return loss


def matching_term(kind: str, n: int) -> Loss:
    """The matching term of `RectifiedLpJEPALoss`."""
    objective, steps = RectifiedLpJEPALoss(target_law(), kind=kind, n=n), count()
    return lambda z: objective(z, next(steps)).parts["matching"]


def other_objectives() -> dict[str, Loss]:
    """Other joint-embedding objectives: those of this package, and those of lightly if it is installed."""
    strong, lejepa, weak = (SIGReg(kind, n) for kind, n in (("strong", 1024), ("lejepa", 1024), ("weak", 64)))
    losses: dict[str, Loss] = {
        "SIGReg strong, 1024 directions": lambda z: strong(z, 0),
        "SIGReg as in LeJEPA, 1024 directions": lambda z: lejepa(z, 0),
        "SIGReg weak, sketch of 64": lambda z: weak(z, 0),
    }
    try:
        from lightly import loss as lightly_losses
    except ImportError:
        return losses
    sigreg = getattr(lightly_losses, "SIGReg", None)
    if sigreg is not None:
        lightly_sigreg = sigreg(num_vectors=1024)
        losses["lightly SIGReg, 1024 directions"] = lambda z: lightly_sigreg(z)
    pairs = {
        "VICReg": lightly_losses.VICRegLoss(),
        "Barlow Twins": lightly_losses.BarlowTwinsLoss(),
        "SimCLR (NT-Xent)": lightly_losses.NTXentLoss(0.2),
    }
    return losses | {f"lightly {name}": (lambda z, f=f: f(z[0], z[1])) for name, f in pairs.items()}


# --- measuring ----------------------------------------------------------------------------------------------------------------------


def timed(work: Mapping[str, Callable[[], Any]], repeats: int, cuda: bool = False) -> dict[str, list[float]]:
    """Seconds of each function over several rounds, in an order that changes each round; one warm-up round is not counted.

    The order changes because a function that follows heavy work starts with a cold cache.

    Args:
        work: functions by name.
        repeats: counted rounds.
        cuda: synchronise the CUDA device before and after each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, function in random.Random(repeat).sample(list(work.items()), len(work)):
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            function()
            if cuda:
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def peak_memory(work: Callable[[], Any], cuda: bool = False) -> int:
    """Most bytes of tensors that a function holds at once, beyond those allocated before."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    allocated = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            most = max(most, allocated)
    return most


# --- results ------------------------------------------------------------------------------------------------------------------------


def compare(batch: int = 256, dim: int = 512, n: int = 8192, repeats: int = 9, device: str = "cpu") -> dict[str, Any]:
    """The sliced loss of two views compared with the minimal example, forward and backward.

    Args:
        batch, dim: shape (B, D) of a view.
        n: directions of the minimal example.
        repeats: rounds, of which medians are taken.
        device: where the losses run.

    Returns:
        ``asked``: the arguments. ``gradient_error``: for each state, the error of n random directions, the number of hadamard directions
        with that error, and their measured error. ``rows`` and ``others``: by name, directions, seconds (median, fastest, slowest), bytes,
        and ``faster`` and ``memory`` relative to the minimal example. Then the machine and the versions.
    """
    errors = {name: _equal_error(n, z, y) for name, (z, y) in states(batch, dim).items()}
    contenders: dict[str, tuple[int, Loss | None]] = {
        "minimal example": (n, minimal_example(n)), "plain torch": (n, plain_torch(n)), "POT": (n, optimal_transport(n)),
        "random": (n, matching_term("random", n)), "hadamard": (n, matching_term("hadamard", n)),
    }  # fmt: skip
    for state, error in errors.items():
        contenders[f"hadamard, equal error {state}"] = (error["hadamard"], matching_term("hadamard", error["hadamard"]))
    rows = _measure({name: loss for name, (_, loss) in contenders.items() if loss}, batch, dim, repeats, device)
    for name, row in rows.items():
        row["directions"] = contenders[name][0]
    others = _measure(other_objectives(), batch, dim, repeats, device)
    base = rows["minimal example"]
    for row in (*rows.values(), *others.values()):
        row["faster"] = round(base["seconds"][0] / row["seconds"][0], 2)
        row["memory"] = round(row["bytes"] / base["bytes"], 4)
    asked = {"batch": batch, "dim": dim, "n": n, "repeats": repeats, "device": device}
    return {"asked": asked, "gradient_error": errors, "rows": rows, "others": others, **machine(device)}


def _equal_error(n: int, z: Tensor, y: Tensor) -> dict[str, Any]:
    """Number of hadamard directions with the gradient error of n random directions, and both errors as measured."""
    error = gradient_error("random", n, z, y, seed=1)
    enough = directions_needed("hadamard", error, z, y, seed=2)
    measured = gradient_error("hadamard", enough, z, y, seed=3)
    return {"random": round(error, 4), "hadamard": enough, "seen": round(measured, 4)}


def _measure(losses: Mapping[str, Loss], batch: int, dim: int, repeats: int, device: str) -> dict[str, dict[str, Any]]:
    """Seconds (median, fastest, slowest) and bytes of a step of each loss."""
    x = torch.stack([states(batch, dim)["near"][0]] * 2).to(device).requires_grad_()

    def step(loss: Loss) -> Callable[[], None]:
        def forward_and_backward() -> None:
            x.grad = None
            loss(x).backward()

        return forward_and_backward

    work = {name: step(loss) for name, loss in losses.items()}
    seconds, rows = timed(work, repeats, is_cuda(device)), {}
    for name, function in work.items():
        values, x.grad = seconds[name], None
        summary = [float(f"{value:.4g}") for value in (statistics.median(values), min(values), max(values))]
        rows[name] = {"seconds": summary, "bytes": peak_memory(function, is_cuda(device))}
    return rows


SWEEPS = {
    "directions": (512, 1024, 2048, 4096, 8192),
    "dim": (64, 128, 256, 512, 1024, 2048),
    "batch": (32, 64, 128, 256, 512, 1024, 2048, 4096),
}
"""Sizes of each sweep; the sizes that do not vary stay at 2048 directions, D = 512, B = 256."""


def scaling(repeats: int = 5, device: str = "cpu", sweeps: Mapping[str, tuple[int, ...]] = SWEEPS) -> list[dict[str, Any]]:
    """Seconds of a step of the loss (two views, forward and backward) for one growing size, and for directions shared by more ranks.

    Returns:
        Rows of sweep, family, batch, dim, directions, and seconds (median, fastest, slowest).
    """
    rows = []
    for sweep, sizes in (*sweeps.items(), ("ranks", (1, 2, 4, 8))):
        for size in sizes:
            shape = {"batch": 256, "dim": 512, "directions": 2048} | ({"directions": 2048 // size} if sweep == "ranks" else {sweep: size})
            losses = {kind: matching_term(kind, shape["directions"]) for kind in ("random", "hadamard")}
            for kind, row in _measure(losses, shape["batch"], shape["dim"], repeats, device).items():
                rows.append({"sweep": sweep, "family": kind, **shape, **row} | ({"ranks": size} if sweep == "ranks" else {}))
    return rows


def _short(value: float) -> str:
    return f"{value:.0f}" if value > 99 else f"{value:.3g}"


def markdown_table(comparison: Mapping[str, Any]) -> str:
    """The result of `compare` in Markdown."""
    asked, lines = comparison["asked"], []
    lines += ["| loss | directions | ms (fastest to slowest) | times as fast | memory, MB | share |", "|---|---|---|---|---|---|"]
    for name, row in (*comparison["rows"].items(), *comparison["others"].items()):
        median, low, high = (1e3 * value for value in row["seconds"])
        lines.append(
            f"| {name} | {row.get('directions', '')} | {_short(median)} ({_short(low)} to {_short(high)}) | {row['faster']:.3g} "
            f"| {row['bytes'] / 1e6:.3g} | {row['memory']:.3g} |"
        )
    lines += [""]
    for state, error in comparison["gradient_error"].items():
        errors = f"{error['random']:.3g} of {asked['n']} random directions, {error['seen']:.3g} of {error['hadamard']} hadamard."
        lines += [f"- Gradient error, {state}: {errors}"]
    return "\n".join(lines)
