"""What encoders and classifiers have in common: evaluation mode for a while, and a name for their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn

__all__ = ["Served", "digest"]


class Served(nn.Module):
    """A module that is used on images as well as trained."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode for a while; every module gets its own mode back."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def digest(module: nn.Module, before: Any, after: Any = None) -> str:
    """Hex digest of how a module's images are prepared (`before`), of its weights and buffers, and of what is done to what it gives (`after`)."""
    found = hashlib.blake2b(repr(before).encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if after is not None:
        found.update(repr(after).encode())
    return found.hexdigest()
