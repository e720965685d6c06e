"""Counter-based randomness: every draw is a function of (seed, purpose, counters), never of earlier draws.

So results do not depend on rank, worker count or the point of a resume, and no generator state is saved.
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
        purpose: the use of the stream, such as ``"directions"``; streams of different purposes are independent.
        counters: step, epoch, sample id, view and so on; any integers.

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
    """Run code that draws from torch's global CPU generator (such as torchvision's transforms) on its own stream; then restore the global state."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(key(seed, purpose, *counters))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def mix(key: int | torch.Tensor, *counters: torch.Tensor) -> torch.Tensor:
    """64 random bits for each combination of counters: many streams at once, the same on every device.

    Args:
        key: number of the stream, from `key`, or a tensor of such numbers.
        counters: int64 tensors that broadcast with each other (and with `key`).

    Returns:
        int64, uniformly distributed; see `uniform`.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied once for each counter.
    """
    state = key if isinstance(key, torch.Tensor) else torch.tensor(key, device=counters[0].device)
    for counter in counters:
        state = state + (counter + 1) * -0x61C8864680B583EB  # 2^64 / golden ratio as a signed number; products wrap around
        state = (state ^ _shifted(state, 30)) * -0x40A7B892E31B1A47
        state = (state ^ _shifted(state, 27)) * -0x6B2FB644ECCEEE15
        state = state ^ _shifted(state, 31)
    return state


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # `>>` copies the sign bit, the mask removes the copies


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """float32 in [0, 1), multiples of 2^-24, from what `mix` returns.

    Example:
        >>> u = uniform(mix(key(0, "demo"), torch.arange(1000)))
        >>> bool((u >= 0).all() and (u < 1).all()), abs(float(u.mean()) - 0.5) < 0.05
        (True, True)
    """
    return _shifted(bits, 40).float() * 2.0**-24
