"""The data set card of a folder of embeddings, and the files of the folder that are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..text import code, printable
from .manifest import read_manifest
from .parts import part_paths

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
{download}import rlpjepa_zoo as rz

e = rz.SparseEmbeddings.load({folder}
matrix = e.to_scipy()  # CSR
```
"""
_DOWNLOAD = """from huggingface_hub import snapshot_download

folder = snapshot_download("{repo}", repo_type="dataset")
"""


def card(manifest: dict[str, Any], repo: str | None = None, license: str | None = None, notes: str | None = None) -> str:
    """Return the data set card of a finished folder. It depends on the arguments only.

    Args:
        manifest: from `read_manifest`, with its "result".
        repo: ``owner/name`` that the examples open; None opens the folder of the card.
        license: SPDX identifier.
        notes: additional Markdown.
    """
    model, options, result = manifest["model"], manifest["options"], manifest["result"]
    limits = f"; at most {options['max_active']} values an image" if options["max_active"] else ""
    limits += f"; no values below {options['min_value']:g}" if options["min_value"] else ""
    return _CARD.format(
        license=f"license: {printable(license)}\n" if license else "",
        rows=result["rows"],
        dim=result["dim"],
        name=code(model["source"] + (f" at {model['revision']}" if model["revision"] else "")),
        architecture=code(model["architecture"]),
        fingerprint=code(model["fingerprint"]),
        density=result["density"],
        limits=limits,
        bytes=result["bytes"],
        ratio=result["bytes as dense float32"] / result["bytes"],
        failures=f" {result['skipped']:,} images could not be read (`failed.jsonl`)." if result["skipped"] else "",
        values=code(options["values"]) + (" times `scale` of the row" if options["values"] == "uint8" else ""),
        columns="".join(f", `{code(column)}`" for column in result["columns"]),
        notes=f"\n{notes.strip()}\n" if notes else "",
        repo=repo or ".",
        download=_DOWNLOAD.format(repo=repo) if repo else "",
        folder="folder)" if repo else '".")  # this folder',
    )


def publishable(out: str | Path, repo: str, license: str | None = None, notes: str | None = None) -> dict[str, bytes | Path]:
    """Return the files of a finished folder for a data set on the Hub, by name.

    Args:
        out: folder of the embeddings.
        repo, license, notes: for the card, see `card`.

    Raises:
        UsageError: the folder holds no embeddings, or they are not finished.
    """
    out = Path(out)
    manifest = read_manifest(out)
    if manifest is None or "result" not in manifest:
        raise UsageError(f"{out}: holds no finished embeddings; run `rlpjepa embed ... --out {out}` to its end first")
    parts = part_paths(out)
    if len(parts) != manifest["result"]["parts"]:
        raise UsageError(f"{out}: {len(parts)} parts, {manifest['result']['parts']} were written; embed again to make the others")
    published: dict[str, bytes | Path] = {f"data/{path.name}": path for path in parts}
    published |= {name: out / name for name in ("embeddings.json", "failed.jsonl") if (out / name).is_file()}
    return {**published, "README.md": card(manifest, repo, license, notes).encode()}
