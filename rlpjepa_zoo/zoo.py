"""The list of published encoders, read offline from hub/manifest.json."""

from __future__ import annotations

import fnmatch
import json
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import UsageError, did_you_mean

__all__ = ["entry", "list_encoders", "local_folder", "resource", "versions"]


def resource(name: str) -> Path:
    """A folder that ships with the package (``recipes`` or ``hub``): inside it in a wheel, beside it in a checkout."""
    here = Path(__file__).parent
    return here / name if (here / name).is_dir() else here.parent / name


@cache
def _manifest() -> dict[str, dict[str, Any]]:
    path = resource("hub") / "manifest.json"
    return json.loads(path.read_text())["encoders"] if path.is_file() else {}


def list_encoders(pattern: str = "*") -> list[str]:
    """Names of the zoo's encoders that match a shell pattern, sorted; no network.

    Example:
        >>> list_encoders("no-such-*")
        []
    """
    return sorted(fnmatch.filter(_manifest(), pattern))


def entry(name: str) -> dict[str, Any]:
    """The manifest's record of one encoder: backbone, data, dim, density, scores, size, repo, commit, sha256 of config.json.

    Raises:
        UsageError: no such encoder, with the nearest name.
    """
    if name not in _manifest():
        raise UsageError(
            f"no encoder named '{name}' in the zoo ({len(_manifest())} listed by `rlpjepa list`).{did_you_mean(name, _manifest())}"
        )
    return _manifest()[name]


def local_folder(name: str) -> Path | None:
    """Where the encoder ships with the package, weights included; None when only the Hub has it."""
    folder = resource("hub") / name
    return folder if (folder / "model.safetensors").is_file() else None


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    names = ("rlpjepa-zoo", "torch", "torchvision", "timm", "accelerate", "datasets", "huggingface_hub", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
