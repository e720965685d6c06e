"""Counter-based randomness: every draw is a function of (seed, purpose, counters), never of what was drawn before.

Because of that the result does not depend on rank, worker count or the point of a resume, and no generator state is ever saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def key(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit number that names one stream of random draws.

    Args:
        seed: seed of the run, any integer.
        purpose: what the stream is for, such as ``"directions"``; streams of different purposes are independent.
        counters: step, epoch, sample id, view, ... any integers.

    Example:
        >>> key(0, "order", 3) == key(0, "order", 3), key(0, "order", 3) == key(0, "order", 4)
        (True, False)
    """
    text = f"{seed}|{purpose}|{'|'.join(map(str, counters))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh `torch.Generator` on `device` at the start of the stream (seed, purpose, counters).

    Example:
        >>> a, b = generator(0, "targets", 7), generator(0, "targets", 7)
        >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
        True
    """
    return torch.Generator(device=device).manual_seed(key(seed, purpose, *counters))


@contextmanager
def seeded(seed: int, purpose: str, *counters: int) -> Iterator[None]:
    """Run code that can only draw from torch's global CPU generator (torchvision's transforms) on its own stream; the global state is put back."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(key(seed, purpose, *counters))
    try:
        yield
    finally:
        torch.set_rng_state(state)
