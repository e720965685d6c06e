"""`rlpjepa bench`: the loss beside the paper's, timed in one process by turns, at equal directions and at equal gradient error.

A busy machine slows everything by turns, so the figure to trust is the ratio of the medians. Every contender does all that a step needs: it draws
its directions and targets, computes the loss of two views and its gradient.
"""

from __future__ import annotations

import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import package, rng
from ..distributions import RectifiedGeneralizedGaussian, sigma_gn
from ..objectives.rectified_lpjepa import RectifiedLpJEPALoss
from ..ops.gradient_noise import directions_needed, gradient_error, matched

__all__ = ["compare", "machine", "minimal", "peak_memory", "scaling", "states", "table", "timed"]

Loss = Callable[[Tensor], Tensor]
SIGMA = sigma_gn(1.0)


def law(device: torch.device | str = "cpu") -> RectifiedGeneralizedGaussian:
    """p = 1, mu = 0, sampled on a device."""
    return RectifiedGeneralizedGaussian(torch.tensor(0.0, device=device), torch.tensor(SIGMA, device=device), 1.0)


def states(batch: int, dim: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Embeddings (B, D) at three times of a training, each with a sample of the target (p = 1, mu = 0).

    early: correlated, of rank 16, far from the target. near: a sample of the target, 15 % too large. matched: a sample of the target.
    """
    z, y = matched(law(), batch, dim)
    source = rng.generator(0, "bench-early")
    low = torch.randn(batch, 16, generator=source) @ torch.randn(16, dim, generator=source)
    return {"early": (0.075 * low, y), "near": (1.15 * z, y), "matched": (z, y)}


# --- contenders ---------------------------------------------------------------------------------------------------------------------


def minimal(n: int) -> Loss:
    """The loss of the paper's minimal example, from its description: for each view new directions and a new target, sorted along the batch."""

    def distance(z: Tensor) -> Tensor:
        c = F.normalize(torch.randn(n, z.shape[1], device=z.device), dim=1)
        y = torch.distributions.Laplace(torch.tensor(0.0, device=z.device), SIGMA).sample(z.shape).relu()
        return (torch.sort(z @ c.T, dim=0).values - torch.sort(y @ c.T, dim=0).values).square().mean()

    return lambda z: torch.stack([distance(view) for view in z]).mean()


def plain(n: int) -> Loss:
    """What one would write in torch: directions and target shared by the views, gradient by autograd."""

    def loss(z: Tensor) -> Tensor:
        c = F.normalize(torch.randn(n, z.shape[2], device=z.device), dim=1)
        y = law(z.device).sample(z.shape[1:])
        return ((z @ c.T).sort(dim=1).values - (y @ c.T).sort(dim=0).values).square().mean()

    return loss


def optimal_transport(n: int) -> Loss | None:
    """The sliced distance of POT (Python Optimal Transport), where it is installed."""
    try:
        import ot
    except ImportError:
        return None

    def loss(z: Tensor) -> Tensor:
        c = F.normalize(torch.randn(n, z.shape[2], device=z.device), dim=1).T
        y = law(z.device).sample(z.shape[1:])
        return torch.stack([ot.sliced_wasserstein_distance(view, y, projections=c).square() for view in z]).mean()

    return loss


def ours(kind: str, n: int) -> Loss:
    """The matching term of `RectifiedLpJEPALoss`."""
    objective, steps = RectifiedLpJEPALoss(law(), kind=kind, n=n), count()
    return lambda z: objective(z, next(steps)).parts["matching"]


def others() -> dict[str, Loss]:
    """Other objectives of joint embeddings, ours and lightly's where that is installed: what a step of them costs."""
    from ..objectives.sigreg import SIGReg

    strong, lejepa, weak = (SIGReg(kind, n) for kind, n in (("strong", 1024), ("lejepa", 1024), ("weak", 64)))
    found: dict[str, Loss] = {
        "SIGReg strong, 1024 directions": lambda z: strong(z, 0),
        "SIGReg as in LeJEPA, 1024 directions": lambda z: lejepa(z, 0),
        "SIGReg weak, sketch of 64": lambda z: weak(z, 0),
    }
    try:
        from lightly import loss as theirs
    except ImportError:
        return found
    sigreg = getattr(theirs, "SIGReg", None)
    if sigreg is not None:
        counted = sigreg(num_vectors=1024)
        found["lightly SIGReg, 1024 directions"] = lambda z: counted(z)
    pairs = {"VICReg": theirs.VICRegLoss(), "Barlow Twins": theirs.BarlowTwinsLoss(), "SimCLR (NT-Xent)": theirs.NTXentLoss(0.2)}
    return found | {f"lightly {name}": (lambda z, f=f: f(z[0], z[1])) for name, f in pairs.items()}


# --- measuring ----------------------------------------------------------------------------------------------------------------------


def timed(work: Mapping[str, Callable[[], Any]], repeats: int, cuda: bool = False) -> dict[str, list[float]]:
    """Seconds of each piece of work, done by turns in an order that changes from round to round, since what follows heavy work finds a cold
    cache; one round before the first is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, do in random.Random(repeat).sample(list(work.items()), len(work)):
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            do()
            if cuda:
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def peak_memory(work: Callable[[], Any], cuda: bool = False) -> int:
    """Most bytes of tensors that the work holds at once beyond what was there before."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def _cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if _cuda(device) else f"{torch.get_num_threads()} threads"
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").is_file() else None
    cpu = f"{model[1] if model else platform.processor()}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"machine": f"{name}, {cpu}", "versions": package.versions()}


# --- what is told -------------------------------------------------------------------------------------------------------------------


def compare(batch: int = 256, dim: int = 512, n: int = 8192, repeats: int = 9, device: str = "cpu") -> dict[str, Any]:
    """The sliced loss of two views against the minimal example's, forward and backward.

    Returns:
        ``gradient_error``: for each state, of n random directions, and the directions of ours that match it with the error they were seen
        to have. ``rows``: name, directions, seconds (median, fastest, slowest), ``faster`` and ``memory`` relative to the minimal
        example. Then the command's arguments, the machine and the versions.
    """
    errors = {name: _equal(n, z, y) for name, (z, y) in states(batch, dim).items()}
    contenders: dict[str, tuple[int, Loss | None]] = {
        "minimal example": (n, minimal(n)), "plain torch": (n, plain(n)), "POT": (n, optimal_transport(n)),
        "random": (n, ours("random", n)), "hadamard": (n, ours("hadamard", n)),
    }  # fmt: skip
    for state, found in errors.items():
        contenders[f"hadamard, equal error {state}"] = (found["hadamard"], ours("hadamard", found["hadamard"]))
    rows = _measured({name: loss for name, (_, loss) in contenders.items() if loss}, batch, dim, repeats, device)
    for name, row in rows.items():
        row["directions"] = contenders[name][0]
    context = _measured(others(), batch, dim, repeats, device)
    base = rows["minimal example"]
    for row in (*rows.values(), *context.values()):
        row["faster"] = round(base["seconds"][0] / row["seconds"][0], 2)
        row["memory"] = round(row["bytes"] / base["bytes"], 4)
    asked = {"batch": batch, "dim": dim, "n": n, "repeats": repeats, "device": device}
    return {"asked": asked, "gradient_error": errors, "rows": rows, "others": context, **machine(device)}


def _equal(n: int, z: Tensor, y: Tensor) -> dict[str, Any]:
    """Directions of the family `hadamard` that have the gradient error of n random ones, and both errors as measured."""
    error = gradient_error("random", n, z, y, seed=1)
    enough = directions_needed("hadamard", error, z, y, seed=2)
    seen = gradient_error("hadamard", enough, z, y, seed=3)
    return {"random": round(error, 4), "hadamard": enough, "seen": round(seen, 4)}


def _measured(losses: Mapping[str, Loss], batch: int, dim: int, repeats: int, device: str) -> dict[str, dict[str, Any]]:
    x = torch.stack([states(batch, dim)["near"][0]] * 2).to(device).requires_grad_()

    def step(loss: Loss) -> Callable[[], None]:
        def do() -> None:
            x.grad = None
            loss(x).backward()

        return do

    work = {name: step(loss) for name, loss in losses.items()}
    seconds, found = timed(work, repeats, _cuda(device)), {}
    for name, do in work.items():
        taken, x.grad = seconds[name], None
        spread = [float(f"{value:.4g}") for value in (statistics.median(taken), min(taken), max(taken))]
        found[name] = {"seconds": spread, "bytes": peak_memory(do, _cuda(device))}
    return found


SWEEPS = {
    "directions": (512, 1024, 2048, 4096, 8192),
    "dim": (64, 128, 256, 512, 1024, 2048),
    "batch": (32, 64, 128, 256, 512, 1024, 2048, 4096),
}
"""One size varies, the others stay at 2048 directions, D = 512, B = 256."""


def scaling(repeats: int = 5, device: str = "cpu", sweeps: Mapping[str, tuple[int, ...]] = SWEEPS) -> list[dict[str, Any]]:
    """Seconds of a step of the loss (two views, forward and backward) as one size grows, and as more ranks share the directions.

    Returns:
        Rows of sweep, family, batch, dim, directions, and seconds (median, fastest, slowest).
    """
    rows = []
    for sweep, sizes in (*sweeps.items(), ("ranks", (1, 2, 4, 8))):
        for size in sizes:
            shape = {"batch": 256, "dim": 512, "directions": 2048} | ({"directions": 2048 // size} if sweep == "ranks" else {sweep: size})
            losses = {kind: ours(kind, shape["directions"]) for kind in ("random", "hadamard")}
            for kind, row in _measured(losses, shape["batch"], shape["dim"], repeats, device).items():
                rows.append({"sweep": sweep, "family": kind, **shape, **row} | ({"ranks": size} if sweep == "ranks" else {}))
    return rows


def _short(value: float) -> str:
    return f"{value:.0f}" if value > 99 else f"{value:.3g}"


def table(found: Mapping[str, Any]) -> str:
    """`compare` in Markdown."""
    asked, lines = found["asked"], []
    lines += ["| loss | directions | ms (fastest to slowest) | times as fast | memory, MB | share |", "|---|---|---|---|---|---|"]
    for name, row in (*found["rows"].items(), *found["others"].items()):
        median, low, high = (1e3 * value for value in row["seconds"])
        lines.append(
            f"| {name} | {row.get('directions', '')} | {_short(median)} ({_short(low)} to {_short(high)}) | {row['faster']:.3g} "
            f"| {row['bytes'] / 1e6:.3g} | {row['memory']:.3g} |"
        )
    lines += [""]
    for state, error in found["gradient_error"].items():
        seen = f"{error['random']:.3g} of {asked['n']} random directions, {error['seen']:.3g} of {error['hadamard']} hadamard."
        lines += [f"- Gradient error, {state}: {seen}"]
    return "\n".join(lines)
