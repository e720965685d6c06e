"""What a benchmark ran on, for its result."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..core import package

__all__ = ["is_cuda", "machine", "shown_command"]


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def machine(device: str) -> dict[str, Any]:
    """Device, processor and library versions, for the record."""
    name = (
        torch.cuda.get_device_name(device) if is_cuda(device) else f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    )
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").is_file() else None
    cpu = f"{model[1] if model else platform.processor()}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"machine": f"{name}, {cpu}", "versions": package.versions()}


def shown_command(words: Iterable[str]) -> str:
    """A command line, quoted for a shell, without the folders of this machine: of a path only the last part.

    Example:
        >>> shown_command(["bench", "encoder.backbone=local-dir:/data/vit", "data.name=owner/name"])
        'bench encoder.backbone=local-dir:vit data.name=owner/name'
    """
    return shlex.join(re.sub(r"(^|[=:])[/~.][^=:]*/(?=[^/])", r"\1", word) for word in words)
