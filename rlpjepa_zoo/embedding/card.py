"""The data set card of a folder of embeddings, and the files of the folder that are published."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..sparse.folder import CARD, FAILED, MANIFEST, Manifest, listed_parts, part_paths, read_manifest, read_summary
from ..text import code, printable

__all__ = ["card", "publishable"]

_CARD = """---
{license}configs:
- config_name: default
  data_files: data/*.parquet
tags:
- rlpjepa_zoo
- sparse
- image-embeddings
---

# Sparse image embeddings: {rows:,} x {dim}

Made by the encoder `{name}` (`{architecture}`, fingerprint `{fingerprint}`). {density:.2%} of the numbers are
not zero{limits}. {bytes:,} bytes, {ratio:.1f} times fewer than dense float32.{failures}

Columns: `id`, `indices` (active dimensions, rising), `values` ({values}, > 0){columns}. `embeddings.json` says what was
embedded, and how.
{notes}
```python
import datasets

rows = datasets.load_dataset("{repo}", split="train")
```

```python
import rlpjepa_zoo as rz

e = rz.load_embeddings("{place}")
matrix = e.to_scipy()  # CSR
labels = e.columns  # further columns by name, as numpy arrays
```
{normalize}"""
_NORMALIZE = """
Rows do not have length one. For a search by inner products, call `e.normalize()` first.
"""


def card(manifest: Manifest, repo: str | None = None, license: str | None = None, notes: str | None = None) -> str:
    """Return the data set card of a finished folder. It depends on the arguments only.

    Args:
        manifest: of a finished folder, with its `result`.
        repo: ``owner/name`` that the examples open; None opens the folder of the card.
        license: SPDX identifier.
        notes: additional Markdown.
    """
    model, options, result = manifest.model, manifest.options, manifest.result
    if result is None:
        raise UsageError("the card needs the totals of a finished folder")
    limits = f"; at most {options.max_active} values an image" if options.max_active else ""
    limits += f"; no values below {options.min_value:g}" if options.min_value else ""
    limits += "; each row divided by its length" if options.normalize else ""
    return _CARD.format(
        license=f"license: {printable(license)}\n" if license else "",
        rows=result.rows,
        dim=result.dim,
        name=code(model.source) + (f" at {code(model.revision)}" if model.revision else ""),
        architecture=code(model.architecture),
        fingerprint=code(model.fingerprint),
        density=result.density,
        limits=limits,
        bytes=result.bytes,
        ratio=result.dense_bytes / result.bytes,
        failures=f" {result.skipped:,} images could not be read (`{FAILED}`)." if result.skipped else "",
        values=code(options.values) + (" times `scale` of the row" if options.values == "uint8" else ""),
        columns="".join(f", `{code(column)}`" for column in result.columns),
        notes=f"\n{notes.strip()}\n" if notes else "",
        repo=repo or ".",
        place=f"hf-hub:{repo}" if repo else ".",
        normalize="" if options.normalize else _NORMALIZE,
    )


def publishable(out: str | Path, repo: str, license: str | None = None, notes: str | None = None) -> dict[str, bytes | Path]:
    """Return the files of a finished folder for a data set on the Hub, by name. Every part is checked first.

    Args:
        out: folder of the embeddings.
        repo, license, notes: for the card, see `card`.

    Raises:
        UsageError: the folder holds no embeddings, or they are not finished.
        DataError: the manifest or a part is damaged, or a part is missing.
    """
    out = Path(out)
    manifest = read_manifest(out)
    if manifest is None or manifest.result is None:
        raise UsageError(f"{out}: holds no finished embeddings; run `rlpjepa embed ... --out {out}` to its end first")
    if (present := len(part_paths(out))) != manifest.result.parts:
        raise UsageError(f"{out}: {present} parts, {manifest.result.parts} were written; embed again to make the others")
    parts = listed_parts(out, manifest)
    for path, sha256 in parts:
        read_summary(path, sha256)
    published: dict[str, bytes | Path] = {f"data/{path.name}": path for path, _ in parts}
    published |= {name: out / name for name in (MANIFEST, FAILED) if (out / name).is_file()}
    return {**published, CARD: card(manifest, repo, license, notes).encode()}
