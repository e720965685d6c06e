"""Embedding at scale: any number of images into a folder of parquet files, by any number of processes, to go on where it was stopped.

    DIR/data/part-000000.parquet ...   rows in input order: id, indices, values (scale), and what is passed along; each written whole or not at all
    DIR/embeddings.json                what was embedded, by which encoder, how; and, once all is done, what came of it
    DIR/failed.jsonl                   images that could not be read, and why (absent when there are none)
    DIR/README.md                      a data set card; `datasets.load_dataset(DIR)` opens the folder

A part holds a fixed range of rows, embedded in batches that do not cross it, so its bytes depend neither on where a run was stopped nor on the
number of processes (with the same number of threads, batch size and versions). Processes take the parts that are not there in turns.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..core import distributed, files, package
from ..core.files import lock
from ..core.signals import Interrupts
from ..data.feeds import Feed, Row, named, spans
from ..data.preprocess import Ready, batched, ready
from ..errors import DataError, HubError, OutputError, StoppedBySignal, UsageError, first_line
from ..models.encoder import SparseEncoder
from ..models.inference import OutputOptions
from ..sparse.embeddings import SparseEmbeddings, Values

__all__ = ["Extraction", "card", "extract", "provenance", "publishable", "read_record"]

FORMAT = 1
_EMPTY = re.compile(r"\.part-(\d{6,})\.json")
"""In place of a part without a single image that can be read; a parquet file without rows would keep others from opening the folder."""
_NAMES = {"source", "revision", "folder"}
"""In the record: what is only said, not compared; folders may be moved."""
_PART = re.compile(r"part-(\d{6,})\.parquet")

log = logging.getLogger("rlpjepa_zoo")


@dataclass(frozen=True)
class Extraction:
    """How a folder of embeddings is made.

    Attributes:
        values: ``float32``, ``float16`` or ``uint8``, see `SparseEmbeddings.save`.
        part_rows: images in each part.
        budget: what of each embedding is kept.
        batch_size: images at a time.
        num_workers: threads of each process that decode images.
        skip_bad: leave out images that cannot be read, and list them. It may differ when a folder is gone on with.
    """

    values: Values = "float32"
    part_rows: int = 4096
    budget: OutputOptions = field(default_factory=OutputOptions)
    batch_size: int = 256
    num_workers: int = 4
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.values not in ("float32", "float16", "uint8"):
            raise UsageError(f"values: expected float32, float16 or uint8, got {self.values}")
        for name, least in (("part_rows", 1), ("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}: expected >= {least}, got {getattr(self, name)}")

    def said(self) -> dict[str, Any]:
        """What must stay the same for a folder to be gone on with."""
        kept = {"max_active": self.budget.max_active, "min_value": self.budget.min_value, "precision": self.budget.precision}
        return {"values": self.values, "part_rows": self.part_rows, **kept}


def provenance(encoder: SparseEncoder, source: str, revision: str | None = None) -> dict[str, Any]:
    """What an encoder is, for the record: name, revision, architecture, preprocessing, dial, and the fingerprint of its weights."""
    config = encoder.config
    kind, _, place = source.partition(":")
    local = kind == "local-dir" or Path(source).is_dir()
    return {
        "source": Path(place or source).resolve().name if local else source, "revision": revision, "fingerprint": encoder.fingerprint(),
        "architecture": config.architecture, "dim": config.dim, "preprocess": repr(config.preprocess),
        "dial": None if config.dial is None else config.dial.saved(),
    }  # fmt: skip


def read_record(out: Path) -> dict[str, Any] | None:
    """embeddings.json of a folder; None when there is none.

    Raises:
        DataError: it is there and cannot be read.
    """
    path = out / "embeddings.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise DataError(f"{path}: format {found['format']!r}, this version reads {FORMAT}; update rlpjepa_zoo")
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged ({first_line(error)}); embed into another folder, or add --overwrite") from error


@torch.inference_mode()
def extract(
    encoder: SparseEncoder,
    feed: Feed,
    out: str | Path,
    how: Extraction | None = None,
    *,
    model: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Embed all rows of a feed into a folder of parquet files; what a stopped run finished is not done again. Every process of a launch calls it.

    Memory does not depend on the number of rows. SIGTERM and Ctrl-C end it between two batches; nothing half-written stays.

    Args:
        encoder: of the embeddings.
        feed: the images, from `rlpjepa_zoo.data.feeds.open_feed`.
        out: the folder.
        how: options of the extraction.
        model: what is recorded of the encoder, from `provenance`.
        overwrite: remove the embeddings that are there; other files are never touched.
        progress: show a progress bar with the time left on stderr.

    Returns:
        JSON-able: rows, skipped, reasons (how often each), dim, density, bytes, bytes as dense float32, parts, columns.

    Raises:
        UsageError: the folder holds embeddings of other images, of another encoder or with other options, or foreign files.
        DataError: an image that cannot be read, without skip_bad; nothing to embed.
        OutputError: disk full, no permission.
        NonFiniteError: the encoder gave NaN or infinity.
        StoppedBySignal: asked to stop; the same call goes on.

    Example:
        >>> import tempfile, rlpjepa_zoo
        >>> from PIL import Image
        >>> from rlpjepa_zoo.data.feeds import open_feed
        >>> enc, feed = rlpjepa_zoo.create_encoder("test_resnet", dim=16), open_feed([Image.new("RGB", (32, 32), c) for c in ("red", "blue")])
        >>> with tempfile.TemporaryDirectory() as scratch:
        ...     found = extract(enc, feed, scratch)
        ...     found["rows"], rlpjepa_zoo.SparseEmbeddings.load(scratch).shape
        (2, (2, 16))
    """
    how, out = how or Extraction(), Path(out)
    record = {
        "format": FORMAT,
        "model": model or provenance(encoder, encoder.config.architecture),
        "input": feed.identity,
        "options": how.said(),
    }
    with ExitStack() as held:
        done = set[int]()
        with distributed.fail_together():
            if distributed.rank() == 0:
                held.enter_context(lock(out))
                done = _prepare(out, record, how, overwrite)
        done, first = distributed.gather_objects((done, record))[0]
        with distributed.fail_together():
            if difference := _difference(first, record):
                raise UsageError(f"processes see another {difference}; give all the same encoder, images and options")
        with encoder.evaluating(), Interrupts() as asked:
            _Work(encoder, feed, out, how, record).go(done, asked, progress)
        try:
            distributed.barrier()
        except RuntimeError as error:
            raise HubError(f"another process ended, see its own error ({first_line(error)}); the same command goes on") from error
        with distributed.fail_together():
            found = _finish(out, record, feed) if distributed.rank() == 0 else {}
        return dict(distributed.gather_objects(found)[0])


def _prepare(out: Path, record: dict[str, Any], how: Extraction, overwrite: bool) -> set[int]:
    """Make the folder, or see whether what is there can be gone on with; numbers of the parts that are done."""
    foreign = sorted(str(p.relative_to(out)) for p in [*out.iterdir(), *out.glob("data/*")] if not _ours(p, out))
    found = None if overwrite and not foreign else read_record(out)
    if not (out / "embeddings.json").is_file():
        foreign += [name for name in ("README.md", "failed.jsonl", "data/*") if any(out.glob(name))]
    if foreign:
        raise UsageError(f"--out {out}: holds '{foreign[0]}', which is not of embeddings; choose another folder")
    try:
        if overwrite:
            names = ("embeddings.json", "data/part-*", "data/.part-*", "failed.jsonl", "README.md")
            for path in [path for name in names for path in out.glob(name)]:
                path.unlink(missing_ok=True)
        (out / "data").mkdir(exist_ok=True)
        for left in [*out.glob(".*.partial.*"), *out.glob("data/.*.partial.*")]:
            left.unlink()  # of a run that was killed
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    around = {"batch_size": how.batch_size, "threads": torch.get_num_threads(), "versions": package.versions()}
    if found is None:
        _write_json(out / "embeddings.json", {**record, "made with": around})
        return set()
    if difference := _difference(found, record):
        raise UsageError(f"--out {out}: holds embeddings with another {difference}; choose another folder, or --overwrite to begin anew")
    changed = [f"{k} {v} -> {around[k]}" for k, v in (found.get("made with") or {}).items() if k in around and around[k] != v]
    if changed:
        log.warning("%s: other parts were made with %s; equal up to rounding, not byte for byte", out, "; ".join(changed)[:400])
    return set(_done(out, record))


def _ours(path: Path, out: Path) -> bool:
    """Whether a file or folder in `out`, or in its data/, is one that we write."""
    if path.name.startswith(".") and ".partial." in path.name:
        return True
    if path.parent == out:
        return path.name in ("data", "embeddings.json", "failed.jsonl", "README.md", ".lock")
    return bool(_PART.fullmatch(path.name) or _EMPTY.fullmatch(path.name))


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first thing that differs between two records, of what must not."""
    for part in ("model", "input", "options"):
        old, new = before.get(part) or {}, now[part]
        for key in sorted((old.keys() | new.keys()) - _NAMES):
            if old.get(key) != new.get(key):
                return f"{part}: {key} was {old.get(key)!r}, is {new.get(key)!r}"
    return None


def _done(out: Path, record: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What the parts that are whole say of themselves, by number; one that cannot be read is removed, to be made again."""
    found = {}
    for path in sorted((out / "data").iterdir()):
        name = _PART.fullmatch(path.name) or _EMPTY.fullmatch(path.name)
        if name is None:
            continue
        try:
            part = _said_by(path)
        except DataError as error:
            log.warning("%s; it is made again", error)
            path.unlink()
            continue
        if part["model"] != record["model"]["fingerprint"]:
            raise UsageError(f"{path}: is of another encoder ({part['model']}); choose another folder, or --overwrite to begin anew")
        found[int(name[1])] = part
    return dict(sorted(found.items()))


def _said_by(path: Path) -> dict[str, Any]:
    """What a part says of itself: number, rows, nnz, failed, model."""
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".json":
            return dict(json.loads(path.read_text()))
        with pq.ParquetFile(path) as file:
            header = json.loads((file.schema_arrow.metadata or {})[b"rlpjepa_zoo"])
            return {**header["part"], "model": header["meta"]["model"]}
    except Exception as error:
        raise DataError(f"{path}: damaged or not a part of embeddings ({first_line(error)})") from error


class _Work:
    """One process's share."""

    def __init__(self, encoder: SparseEncoder, feed: Feed, out: Path, how: Extraction, record: dict[str, Any]) -> None:
        self.encoder, self.feed, self.out, self.how = encoder, feed, out, how
        model = record["model"]
        self.meta = {"model": model["fingerprint"], "architecture": model["architecture"], "provenance": json.dumps(record, sort_keys=True)}
        self.writing: Future[None] | None = None

    def go(self, done: set[int], asked: Interrupts, progress: bool) -> None:
        rank, world = distributed.rank(), distributed.world_size()

        def mine(k: int) -> bool:
            return k not in done and k % world == rank

        def groups() -> Iterator[list[tuple[int, Row]]]:
            for k, rows in spans(self.feed, self.how.part_rows, mine):
                yield from batched(((k, row) for row in rows), self.how.batch_size)

        prepared = ready(groups(), lambda item: item[1].read(), self.encoder.config.preprocess, self.how.num_workers)
        parts: list[SparseEmbeddings] = []
        cells: list[dict[str, Any]] = []  # not the rows, which hold the encoded images
        failed: list[tuple[str, str]] = []
        at: int | None = None
        with ThreadPoolExecutor(1, "write") as pool, closing(prepared), self._bar(done, rank, world, progress) as bar:
            for group in prepared:
                if asked.stop:
                    raise StoppedBySignal(
                        f"stopped by a signal; the parts in {self.out} that are finished stay, and the same command goes on", asked.stop
                    )
                if at is not None and group.items[0][0] != at:
                    self._write(pool, at, parts, cells, failed)
                    parts, cells, failed = [], [], []
                at = group.items[0][0]
                parts.append(self._embed(group, failed))
                cells += [group.items[i][1].columns for i in group.good]
                bar.update(len(group.items))
            if at is not None:
                self._write(pool, at, parts, cells, failed)
            if self.writing is not None:
                self.writing.result()

    def _bar(self, done: set[int], rank: int, world: int, progress: bool) -> Any:
        size, total = self.how.part_rows, self.feed.length or self.feed.expected
        if total is not None:
            mine = [k for k in range(-(-total // size)) if k % world == rank and k not in done]
            total = sum(min(size, total - k * size) for k in mine)
        name = "embed" if world == 1 else f"embed (process {rank} of {world})"
        return tqdm(total=total, desc=name, unit="image", unit_scale=True, disable=not progress or rank > 0, mininterval=0.5)

    def _embed(self, group: Ready[tuple[int, Row]], failed: list[tuple[str, str]]) -> SparseEmbeddings:
        for i, reason in group.bad:
            name = _text(group.items[i][1].id)
            reason = named(name, reason)
            if not self.how.skip_bad:
                raise DataError(f"{reason}; leave such images out with --skip-bad")
            failed.append((str(name), reason))
        ids = [_text(group.items[i][1].id) for i in group.good]
        if not ids:
            return SparseEmbeddings.from_dense(torch.zeros(0, self.encoder.config.dim), meta=self.meta)
        x = self.encoder.config.preprocess.normalised(group.pixels.to(self.encoder.device))
        return SparseEmbeddings.from_dense(self.encoder.codes(x, ids[0], self.how.budget), ids, self.meta)

    def _write(
        self, pool: ThreadPoolExecutor, k: int, parts: list[SparseEmbeddings], cells: list[dict[str, Any]], failed: list[tuple[str, str]]
    ) -> None:
        """Write a part in the background, once the one before is on the disk."""
        if self.writing is not None:
            self.writing.result()
        self.writing = pool.submit(self._write_now, k, parts, cells, failed)

    def _write_now(self, k: int, parts: list[SparseEmbeddings], cells: list[dict[str, Any]], failed: list[tuple[str, str]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        whole = SparseEmbeddings.concat(parts)
        said = {"number": k, "rows": len(whole), "nnz": whole.nnz, "failed": failed}
        if not len(whole):
            _write_json(self.out / "data" / f".part-{k:06d}.json", {**said, "model": self.meta["model"]})
            return
        table = whole.to_arrow(self.how.values)
        for name, feature in self.feed.columns.items():
            try:
                table = table.append_column(name, pa.array([cell[name] for cell in cells], _arrow_type(feature)))
            except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
                raise DataError(f"column '{name}' does not hold what its type says ({first_line(error)})") from error
        header = json.loads(table.schema.metadata[b"rlpjepa_zoo"]) | {"part": said}
        described = {"info": {"features": _features(table.schema, self.feed.columns)}}
        table = table.replace_schema_metadata({"rlpjepa_zoo": json.dumps(header), "huggingface": json.dumps(described)})
        with files.whole_file(self.out / "data" / f"part-{k:06d}.parquet") as aside:
            pq.write_table(table, aside, compression="zstd")


def _text(name: str | int) -> str | int:
    """An id that Arrow can hold: bytes of a file name that are no text are written as they are escaped in Python."""
    return name if isinstance(name, int) else os.fsencode(name).decode("utf-8", "backslashreplace")


def _arrow_type(feature: dict[str, Any]) -> Any:
    """The Arrow type of a feature as a Hugging Face data set describes it."""
    import pyarrow as pa

    if feature.get("_type") == "ClassLabel":
        return pa.int64()
    if feature.get("_type") == "Value":
        with suppress(KeyError, ValueError, TypeError):
            return pa.type_for_alias(feature["dtype"])
    import datasets

    return datasets.Features.from_dict({"x": feature}).arrow_schema.field("x").type


def _features(schema: Any, passed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The columns of a part as a Hugging Face data set describes them."""
    found: dict[str, Any] = {}
    for column in schema:
        inner = getattr(column.type, "value_type", None)
        value = {"dtype": _dtype(inner if inner is not None else column.type), "_type": "Value"}
        found[column.name] = passed.get(column.name) or ({"feature": value, "_type": "List"} if inner is not None else value)
    return found


def _dtype(kind: Any) -> str:
    return {"halffloat": "float16", "float": "float32"}.get(str(kind), str(kind))


# --- the end --------------------------------------------------------------------------------------------------------------------------


def _finish(out: Path, record: dict[str, Any], feed: Feed) -> dict[str, Any]:
    """Look at all parts, and write down what there is."""
    done = _done(out, record)
    paths = sorted(path for path in (out / "data").iterdir() if _PART.fullmatch(path.name))
    rows, nnz = (sum(part[key] for part in done.values()) for key in ("rows", "nnz"))
    failed = [tuple(one) for part in done.values() for one in part["failed"]]
    if absent := set(range(max(done, default=-1) + 1)) - done.keys():
        raise DataError(f"{out}: part {min(absent)} is not there; run the same command again")
    if feed.length is not None and rows + len(failed) != feed.length:
        raise DataError(
            f"{out}: {rows} rows and {len(failed)} failures, but {feed.length} images: the input changed while it was read; begin anew"
        )
    if not rows:
        why = f"; the first of {len(failed)}: {failed[0][1]}" if failed else ""
        raise DataError(f"{out}: none of the images can be read{why}")
    dim, size = record["model"]["dim"], sum(path.stat().st_size for path in paths)
    found = {
        "rows": rows, "skipped": len(failed), "reasons": _reasons(failed), "dim": dim, "density": nnz / (rows * dim), "bytes": size,
        "bytes as dense float32": 4 * rows * dim, "parts": len(paths), "columns": list(feed.columns),
    }  # fmt: skip
    if failed:
        with files.whole_file(out / "failed.jsonl") as aside:
            aside.write_text("".join(json.dumps({"id": i, "reason": reason}) + "\n" for i, reason in failed))
    record = {**record, "made with": (read_record(out) or {}).get("made with"), "result": found}
    with files.whole_file(out / "README.md") as aside:
        aside.write_text(card(record))
    _write_json(out / "embeddings.json", record)
    return found


def _reasons(failed: list[Any]) -> dict[str, int]:
    """How often each reason occurs, without the names of the images; the most frequent ten."""
    counts = Counter(re.sub(r"^.*?: ", "", reason) if ": " in reason else reason for _, reason in failed)
    return dict(counts.most_common(10))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with files.whole_file(path) as aside:
        aside.write_text(json.dumps(value, indent=1) + "\n")


def card(record: dict[str, Any], repo: str | None = None, license: str | None = None, notes: str | None = None) -> str:
    """The card of a finished folder, a function of its record.

    Args:
        record: from `read_record`.
        repo: ``owner/name`` that the examples open; this folder when None.
        license: SPDX identifier.
        notes: Markdown of your own.
    """
    model, options, found = record["model"], record["options"], record["result"]
    name = model["source"] + (f" at {model['revision']}" if model["revision"] else "")
    budget = f"; at most {options['max_active']} values an image" if options["max_active"] else ""
    budget += f"; no values below {options['min_value']:g}" if options["min_value"] else ""
    scaled = " times `scale` of the row" if options["values"] == "uint8" else ""
    passed = "".join(f", `{column}`" for column in found["columns"])
    smaller = found["bytes as dense float32"] / found["bytes"]
    failed = f" {found['skipped']:,} images could not be read (`failed.jsonl`)." if found["skipped"] else ""
    first = (
        ""
        if repo is None
        else f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repo}", repo_type="dataset")\n'
    )
    where = '"."  # this folder' if repo is None else "folder"
    return f"""---
{f"license: {license}" + chr(10) if license else ""}configs:
- config_name: default
  data_files: data/*.parquet
tags:
- rlpjepa_zoo
- sparse
- image-embeddings
---

# Sparse image embeddings: {found["rows"]:,} x {found["dim"]}

Made by the encoder `{name}` (`{model["architecture"]}`, fingerprint `{model["fingerprint"]}`). {found["density"]:.2%} of the numbers are
not zero{budget}. {found["bytes"]:,} bytes, {smaller:.1f} times fewer than dense float32.{failed}

Columns: `id`, `indices` (active dimensions, rising), `values` ({options["values"]}{scaled}, > 0){passed}. `embeddings.json` says what was
embedded, and how.
{chr(10) + notes.strip() + chr(10) if notes else ""}
```python
import datasets

rows = datasets.load_dataset("{repo or "."}", split="train")
```

```python
{first}import rlpjepa_zoo as rz

e = rz.SparseEmbeddings.load({where.split("  #")[0]}){"  #" + where.split("  #")[1] if "#" in where else ""}
matrix = e.to_scipy()  # CSR
```
"""


def publishable(out: str | Path, repo: str, license: str | None = None, notes: str | None = None) -> dict[str, bytes | Path]:
    """The files of a finished folder as a data set on the Hub, by name.

    Raises:
        UsageError: the folder holds no embeddings, or some that are not finished.
    """
    out = Path(out)
    record = read_record(out)
    if record is None or "result" not in record:
        raise UsageError(f"{out}: holds no finished embeddings; run `rlpjepa embed ... --out {out}` to its end first")
    parts = sorted(path for path in (out / "data").iterdir() if _PART.fullmatch(path.name))
    if len(parts) != record["result"]["parts"]:
        raise UsageError(f"{out}: {len(parts)} parts, {record['result']['parts']} were written; embed again to make the others")
    found: dict[str, bytes | Path] = {f"data/{path.name}": path for path in parts}
    found |= {name: out / name for name in ("embeddings.json", "failed.jsonl") if (out / name).is_file()}
    return {**found, "README.md": card(record, repo, license, notes).encode()}
