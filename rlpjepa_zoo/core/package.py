"""Versions of installed packages, and data that ships with this package."""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path


def resource(name: str) -> Path:
    """A folder that ships with the package (``recipes`` or ``hub``): inside it in a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    shipped = package / "_shipped" / name
    return shipped if shipped.is_dir() else package.parent / name


def versions() -> dict[str, str]:
    """Versions of the packages that affect results; packages that are not installed are left out."""
    names = ("rlpjepa-zoo", "torch", "torchvision", "timm", "accelerate", "datasets", "huggingface_hub", "numpy")
    return {name: version for name in names if (version := _version(name)) is not None}


@functools.cache  # a run asks for it several times, and each answer parses a file of metadata
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
