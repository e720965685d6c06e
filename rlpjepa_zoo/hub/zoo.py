"""The list of published encoders, read offline from hub/manifest.json."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from ..core.package import resource
from ..errors import UsageError, did_you_mean
from .format import read_config

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
    """Where the encoder ships with the package, weights included; None when only the Hub has it."""
    folder = resource("hub") / name
    return folder if (folder / "model.safetensors").is_file() else None


def describe(folder: Path) -> dict[str, Any]:
    """The manifest's record of a published folder."""
    config = (folder / "config.json").read_bytes()
    parsed = read_config(folder)
    block = parsed["rlpjepa_zoo"]
    info, results = block["info"], block["info"].get("results", {})
    return {
        "architecture": parsed["architecture"],
        "data": info.get("data"),
        "dim": block["projector"]["dim"],
        "density": info.get("density", {}).get("eval"),
        **{key: results[key] for key in ("knn_z", "linear_z", "knn_features", "linear_features") if key in results},
        "megabytes": round(sum(entry["size"] for entry in block["files"].values()) / 1e6, 2),
        "sha256": hashlib.sha256(config).hexdigest(),
        "repo": None,
        "commit": None,
    }


def write_manifest(root: Path) -> None:
    """Describe every published folder below hub/ in hub/manifest.json; what is known of Hub repositories is kept."""
    path = root / "manifest.json"
    known = json.loads(path.read_text())["encoders"] if path.is_file() else {}
    found = {folder.parent.name: describe(folder.parent) for folder in sorted(root.glob("*/config.json"))}
    for name, record in found.items():
        record |= {key: known.get(name, {}).get(key) for key in ("repo", "commit")}
    path.write_text(json.dumps({"format": 1, "encoders": found}, indent=1) + "\n")
    _manifest.cache_clear()
