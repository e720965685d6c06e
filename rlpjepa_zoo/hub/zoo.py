"""The list of published encoders, read offline from hub/manifest.json."""

from __future__ import annotations

import fnmatch
import json
from functools import cache
from pathlib import Path
from typing import Any

from ..core.files import sha256
from ..core.package import resource
from ..errors import UsageError, did_you_mean
from .folder import read_folder
from .format import CONFIG

__all__ = ["describe", "entry", "list_encoders", "local_folder", "write_manifest"]


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
    """The shipped folder of an encoder, with weights; None if only the Hub has it."""
    folder = resource("hub") / name
    return folder if (folder / "model.safetensors").is_file() else None


def describe(folder: Path) -> dict[str, Any]:
    """The manifest's record of a published folder."""
    model = read_folder(folder)
    results = model.info.get("results") or {}
    return {
        "architecture": model.architecture,
        "data": model.info.get("data"),
        "dim": None if model.projector is None else model.projector.dim,
        "density": (model.info.get("density") or {}).get("eval"),
        **{key: results[key] for key in ("knn_z", "linear_z", "knn_features", "linear_features") if key in results},
        "megabytes": round(sum(entry["size"] for entry in model.files.values()) / 1e6, 2),
        "sha256": sha256(folder / CONFIG),
        "repo": None,
        "commit": None,
    }


def write_manifest(root: Path) -> None:
    """Describe every published folder below hub/ in hub/manifest.json; repositories and commits already listed there are kept."""
    path = root / "manifest.json"
    listed = json.loads(path.read_text())["encoders"] if path.is_file() else {}
    encoders = {config.parent.name: describe(config.parent) for config in sorted(root.glob(f"*/{CONFIG}"))}
    for name, record in encoders.items():
        record |= {key: listed.get(name, {}).get(key) for key in ("repo", "commit")}
    path.write_text(json.dumps({"format": 1, "encoders": encoders}, indent=1) + "\n")
    _manifest.cache_clear()
