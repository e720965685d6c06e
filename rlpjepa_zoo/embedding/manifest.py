"""Starting and continuing a folder of embeddings. `rlpjepa_zoo.sparse.folder` defines what the folder and its manifest hold.

"model", "input" and "options" of the manifest must be equal when a folder is continued, apart from names (`_NAMES`).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ..core import files, package
from ..core.source import ModelSource
from ..errors import DataError, UsageError
from ..models.encoder import SparseEncoder
from ..sparse import folder
from ..sparse.folder import EncoderRecord, MadeWith, Manifest, Summary
from .parts import arrow_text

__all__ = ["check_equal", "finished_parts", "prepare", "provenance"]

_NAMES = {"source", "revision", "folder"}
"""Keys that are not compared: a folder may be moved, a model renamed."""

log = logging.getLogger("rlpjepa_zoo")


def provenance(encoder: SparseEncoder, source: str, revision: str | None = None) -> EncoderRecord:
    """Describe an encoder for the manifest: name, revision, architecture, preprocessing, dial, fingerprint of its weights.

    Args:
        encoder: the encoder.
        source: name it was loaded by; of a folder only the last component is kept.
        revision: branch, tag or commit on the Hub.
    """
    config = encoder.config
    return EncoderRecord(
        source=arrow_text(ModelSource.parse(source).label), revision=revision, fingerprint=encoder.fingerprint(), architecture=config.architecture,
        dim=config.dim, preprocess=repr(config.preprocess), dial=None if config.dial is None else config.dial.saved(),
    )  # fmt: skip


def prepare(out: Path, manifest: Manifest, batch_size: int, overwrite: bool) -> tuple[Manifest, dict[int, Summary]]:
    """Start a folder of embeddings, or check that it can be continued.

    Args:
        out: the folder; it exists and is locked.
        manifest: of this call.
        batch_size: of this call; another one than before logs a warning.
        overwrite: remove the embeddings in the folder first. Other files are never touched.

    Returns:
        The manifest as it is on disk now, and the summaries of the finished parts by number.

    Raises:
        UsageError: the folder holds foreign files, or embeddings of another encoder, other images or other options.
        DataError: its embeddings.json is damaged.
        OutputError: no permission, disk full.
    """
    with files.disk_errors(out):
        present = [*out.iterdir(), *(out / "data").glob("*")]
        foreign = sorted(str(p.relative_to(out)) for p in present if not folder.is_ours(p, out) and not files.left_behind(p.name))
        before = None if overwrite and not foreign else folder.read_manifest(out)
        if not (out / folder.MANIFEST).is_file():  # then nothing here is known to be of embeddings
            ours = [p for p in present if p.parent != out or p.name in (folder.CARD, folder.FAILED)]
            foreign += sorted(str(p.relative_to(out)) for p in ours if folder.is_ours(p, out))
        if foreign:
            raise UsageError(f"--out {out}: holds '{foreign[0]}', which does not belong to embeddings; choose another folder")
        _clear([path for path in present if folder.is_ours(path, out)], overwrite)
        (out / "data").mkdir(exist_ok=True)
    made_with = MadeWith(batch_size=batch_size, threads=torch.get_num_threads(), versions=package.versions())
    if before is None:
        manifest = manifest.model_copy(update={"made_with": made_with})
        folder.write_manifest(out, manifest)
        return manifest, {}
    check_equal(before, manifest, f"--out {out}: holds embeddings with another", "choose another folder, or --overwrite to start again")
    earlier, now = (before.made_with.model_dump() if before.made_with else {}), made_with.model_dump()
    changed = [f"{k} {v} -> {now[k]}" for k, v in earlier.items() if now[k] != v]
    if changed:
        log.warning("%s: other parts were made with %s; equal up to rounding, not byte for byte", out, "; ".join(changed)[:400])
    return before, finished_parts(out, manifest.model.fingerprint, before.sha256 or {})


def _clear(ours: list[Path], overwrite: bool) -> None:
    """Remove what a killed run left half written; with `overwrite`, all embeddings."""
    for path in ours:
        if path.is_file() and (folder.is_partial(path) or (overwrite and path.name != ".lock")):
            path.unlink(missing_ok=True)


def check_equal(before: Manifest, now: Manifest, problem: str, remedy: str) -> None:
    """Compare two manifests.

    Raises:
        UsageError: ``problem section: key was x, is y; remedy`` for the first difference.
    """
    past, present = before.model_dump(), now.model_dump()
    for section in ("model", "input", "options"):
        old, new = past[section], present[section]
        for key in sorted((old.keys() | new.keys()) - _NAMES):
            if old.get(key) != new.get(key):
                raise UsageError(f"{problem} {section}: {key} was {_shown(old.get(key))}, is {_shown(new.get(key))}; {remedy}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def finished_parts(out: Path, fingerprint: str, digests: dict[str, str]) -> dict[int, Summary]:
    """Return the summaries of the finished parts by number, rising. Every part is read and checked; damaged ones are removed and made again.

    Args:
        out: the folder.
        fingerprint: of the encoder.
        digests: sha256 of the parts by file name, where known.

    Raises:
        UsageError: a part is of an encoder with another fingerprint.
    """
    summaries = {}
    for path in sorted((out / "data").iterdir()):
        number = folder.part_number(path)
        if number is None:
            continue
        try:
            summary = folder.read_summary(path, digests.get(path.name))
        except DataError as error:
            log.warning("%s; it is made again", error)
            path.unlink()
            continue
        if summary.model != fingerprint:
            raise UsageError(f"{path}: is of another encoder ({summary.model[:100]}); choose another folder, or --overwrite to start again")
        summaries[number] = summary
    return dict(sorted(summaries.items()))
