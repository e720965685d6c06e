"""Small checkpoints, comparisons of them, and a forked process to kill while it saves them."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rlpjepa_zoo.training.checkpoint import Checkpoint


def made(step: int, size: int = 50) -> Checkpoint:
    """A checkpoint whose contents depend on its step."""
    model = {"weight": torch.full((size,), float(step)), "count": torch.tensor(step)}
    return Checkpoint(step, model, {"0.exp_avg": torch.full((size,), -float(step))}, {"seconds": step / 4, "note": f"step {step}"})


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and bits are equal."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and bits(a[k]) == bits(b[k]) for k in a)


def same(a: Checkpoint | None, b: Checkpoint) -> bool:
    return a is not None and a.step == b.step and equal(a.model, b.model) and equal(a.optimizer, b.optimizer) and a.state == b.state


def steps(run: Path) -> list[str]:
    """Entries of the folder of checkpoints."""
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """Run `work` in a forked process; kill that process at the end of the block."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(300)
            work()
        finally:
            os._exit(1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
