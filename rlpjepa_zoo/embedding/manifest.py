"""embeddings.json, the manifest of a folder of embeddings: what was embedded, by which encoder and how; after the end, the totals too.

The keys "model", "input" and "options" must be equal when a folder is continued, apart from names (`_NAMES`).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from ..core import package
from ..core.source import ModelSource
from ..errors import DataError, OutputError, UsageError, first_line
from ..models.encoder import SparseEncoder
from .parts import part_number, read_summary, write_json

__all__ = ["FORMAT", "check_equal", "finished_parts", "prepare", "provenance", "read_manifest"]

FORMAT = 1
_NAMES = {"source", "revision", "folder"}
"""Keys that are not compared: a folder may be moved, a model renamed."""

log = logging.getLogger("rlpjepa_zoo")


def provenance(encoder: SparseEncoder, source: str, revision: str | None = None) -> dict[str, Any]:
    """Describe an encoder for the manifest: name, revision, architecture, preprocessing, dial, fingerprint of its weights.

    Args:
        encoder: the encoder.
        source: name it was loaded by; of a folder only the last component is kept.
        revision: branch, tag or commit on the Hub.
    """
    config = encoder.config
    return {
        "source": ModelSource.parse(source).label, "revision": revision, "fingerprint": encoder.fingerprint(),
        "architecture": config.architecture, "dim": config.dim, "preprocess": repr(config.preprocess),
        "dial": None if config.dial is None else config.dial.saved(),
    }  # fmt: skip


def read_manifest(out: Path) -> dict[str, Any] | None:
    """Return embeddings.json of a folder; None if it does not exist.

    Raises:
        DataError: the file is damaged, or of another format.
    """
    path = out / "embeddings.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise DataError(f"{path}: format {manifest['format']!r}, this version reads {FORMAT}; update rlpjepa_zoo")
        return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged ({first_line(error)}); embed into another folder, or add --overwrite") from error


def prepare(out: Path, manifest: dict[str, Any], batch_size: int, overwrite: bool) -> set[int]:
    """Start a folder of embeddings, or check that it can be continued.

    Args:
        out: the folder; it exists and is locked.
        manifest: of this call.
        batch_size: of this call; another one than before logs a warning.
        overwrite: remove the embeddings in the folder first. Other files are never touched.

    Returns:
        Numbers of the finished parts.

    Raises:
        UsageError: the folder holds foreign files, or embeddings of another encoder, other images or other options.
        DataError: its embeddings.json is damaged.
        OutputError: no permission, disk full.
    """
    foreign = sorted(str(p.relative_to(out)) for p in [*out.iterdir(), *out.glob("data/*")] if not _is_ours(p, out))
    before = None if overwrite and not foreign else read_manifest(out)
    if not (out / "embeddings.json").is_file():
        foreign += [name for name in ("README.md", "failed.jsonl", "data/*") if any(out.glob(name))]
    if foreign:
        raise UsageError(f"--out {out}: holds '{foreign[0]}', which does not belong to embeddings; choose another folder")
    try:
        if overwrite:
            names = ("embeddings.json", "data/part-*", "data/.part-*", "failed.jsonl", "README.md")
            for path in [path for name in names for path in out.glob(name)]:
                path.unlink(missing_ok=True)
        (out / "data").mkdir(exist_ok=True)
        for partial in [*out.glob(".*.partial.*"), *out.glob("data/.*.partial.*")]:
            partial.unlink()  # a killed run left it
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    made_with = {"batch_size": batch_size, "threads": torch.get_num_threads(), "versions": package.versions()}
    if before is None:
        write_json(out / "embeddings.json", {**manifest, "made with": made_with})
        return set()
    check_equal(before, manifest, f"--out {out}: holds embeddings with another", "choose another folder, or --overwrite to start again")
    earlier = before.get("made with") or {}
    changed = [f"{k} {v} -> {made_with[k]}" for k, v in earlier.items() if k in made_with and made_with[k] != v]
    if changed:
        log.warning("%s: other parts were made with %s; equal up to rounding, not byte for byte", out, "; ".join(changed)[:400])
    return set(finished_parts(out, manifest["model"]["fingerprint"]))


def _is_ours(path: Path, out: Path) -> bool:
    """Whether a file or folder in `out`, or in its data/, is one that embedding writes."""
    if path.name.startswith(".") and ".partial." in path.name:
        return True
    if path.parent == out:
        return path.name in ("data", "embeddings.json", "failed.jsonl", "README.md", ".lock")
    return part_number(path) is not None


def check_equal(before: dict[str, Any], now: dict[str, Any], problem: str, remedy: str) -> None:
    """Compare two manifests.

    Raises:
        UsageError: ``problem section: key was x, is y; remedy`` for the first difference.
    """
    for section in ("model", "input", "options"):
        old, new = before.get(section) or {}, now[section]
        for key in sorted((old.keys() | new.keys()) - _NAMES):
            if old.get(key) != new.get(key):
                raise UsageError(f"{problem} {section}: {key} was {old.get(key)!r}, is {new.get(key)!r}; {remedy}")


def finished_parts(out: Path, fingerprint: str) -> dict[int, dict[str, Any]]:
    """Return the summaries of the finished parts by number, rising. Removes damaged parts, so that they are made again.

    Raises:
        UsageError: a part is of an encoder with another fingerprint.
    """
    summaries = {}
    for path in sorted((out / "data").iterdir()):
        number = part_number(path)
        if number is None:
            continue
        try:
            summary = read_summary(path)
        except DataError as error:
            log.warning("%s; it is made again", error)
            path.unlink()
            continue
        if summary["model"] != fingerprint:
            raise UsageError(f"{path}: is of another encoder ({summary['model']}); choose another folder, or --overwrite to start again")
        summaries[number] = summary
    return dict(sorted(summaries.items()))
