"""Tensors in safetensors files, their digests, and rows of length one."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..core.files import parse_json
from ..errors import ModelError, first_line

__all__ = ["hash_tensors", "load_tensors", "tensor_bytes", "tensor_shapes", "unit_rows"]

MAX_HEADER = 1 << 22
"""Largest header of a safetensors file that is read, in bytes."""


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Content of a safetensors file. Tensors that share memory, as in layers that a model uses twice, are each written in full."""
    contents: dict[str, Tensor] = {}
    memory = set()
    for name, tensor in tensors.items():
        contents[name] = tensor.detach().cpu().contiguous()
        place = contents[name].untyped_storage().data_ptr()
        if place in memory:
            contents[name] = contents[name].clone()
        memory.add(place)
    return safetensors.torch.save(contents, metadata=metadata)


def hash_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add names, shapes, types and bits of tensors to a digest of hashlib, in the order of the names."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def tensor_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes in a safetensors file by tensor name, from its header only.

    Raises:
        ModelError: not a safetensors file, or a header of more than 4 MiB.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= MAX_HEADER:
                raise ModelError(f"{path}: not a safetensors file (its header has {length} bytes, the limit is {MAX_HEADER})")
            header = parse_json(file.read(length), str(path), MAX_HEADER)
        return {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({first_line(error)})") from error


def load_tensors(path: Path) -> dict[str, Any]:
    """Torch tensors of a safetensors file by name."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # safetensors maps only files whose names are UTF-8
        return dict(safetensors.torch.load(path.read_bytes()))
    return dict(safetensors.torch.load_file(path))


def unit_rows(z: Tensor) -> Tensor:
    """(B, D) >= 0 with rows of length one; rows of zeros stay zero."""
    z = z / z.amax(1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)  # squares of large values are infinite
    return z / torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(1)
