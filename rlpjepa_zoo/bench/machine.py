"""What a benchmark ran on, for its result."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import torch

from ..core import package

__all__ = ["is_cuda", "machine"]


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def machine(device: str) -> dict[str, Any]:
    """Device, processor and library versions, for the record."""
    name = torch.cuda.get_device_name(device) if is_cuda(device) else f"{torch.get_num_threads()} threads"
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").is_file() else None
    cpu = f"{model[1] if model else platform.processor()}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"machine": f"{name}, {cpu}", "versions": package.versions()}
