"""Embed any number of images into a folder of parquet files, with any number of processes. A stopped run continues where it stopped.

`rlpjepa_zoo.sparse.folder` defines the folder; `datasets.load_dataset(DIR)` opens it.

A part holds a fixed range of rows, embedded in batches that do not cross it. So its bytes depend neither on where a run was stopped nor on the
number of processes (with the same number of threads, batch size and versions). Part k belongs to process k mod the number of processes.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..core import distributed, files
from ..core.signals import Interrupts
from ..core.source import expanded
from ..data.images import ImageRows, Row, spans
from ..data.preprocess import batched
from ..errors import DataError, HubError, StoppedBySignal, UsageError, first_line
from ..models.encoder import SparseEncoder
from ..models.inference import OutputOptions, check_count, default_batch_size, image_batches
from ..progress import progress_bar
from ..sparse import folder
from ..sparse.columns import check_names
from ..sparse.embeddings import SparseEmbeddings
from ..sparse.folder import EncoderRecord, Manifest, Options, Summary, Totals
from ..sparse.io import Values
from .card import card
from .manifest import check_equal, finished_parts, prepare, provenance
from .parts import arrow_id, arrow_text, write_part

__all__ = ["Extraction", "extract"]

log = logging.getLogger("rlpjepa_zoo")


@dataclass(frozen=True)
class Extraction:
    """Options of embedding into a folder.

    Attributes:
        values: ``float32``, ``float16`` or ``uint8``, see `SparseEmbeddings.save`.
        part_rows: images in each part.
        budget: limits on the values that are kept of each embedding.
        batch_size: images per batch; None chooses by the image size, see `rlpjepa_zoo.models.inference.default_batch_size`.
        num_workers: threads of each process that decode images.
        skip_bad: leave out and list images that cannot be read. It may differ when a folder is continued.

    Raises:
        UsageError: an option is out of range.
    """

    values: Values = "float32"
    part_rows: int = 4096
    budget: OutputOptions = field(default_factory=OutputOptions)
    batch_size: int | None = None
    num_workers: int = 4
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.values not in ("float32", "float16", "uint8"):
            raise UsageError(f"values: expected float32, float16 or uint8, got {self.values}")
        for name, least in (("part_rows", 1), ("batch_size", 1), ("num_workers", 0)):
            if (value := getattr(self, name)) is not None:
                check_count(name, value, least)

    def fixed(self) -> Options:
        """Return the options that must not change when a folder is continued."""
        budget = self.budget
        return Options(
            values=self.values, part_rows=self.part_rows, max_active=budget.max_active, min_value=budget.min_value,
            precision=budget.precision, normalize=budget.normalize,  # type: ignore[arg-type]
        )  # fmt: skip


@torch.inference_mode()
def extract(
    encoder: SparseEncoder,
    feed: ImageRows,
    out: str | Path,
    how: Extraction | None = None,
    *,
    model: EncoderRecord | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Embed all rows of a feed into a folder of parquet files. Parts that a stopped run finished are kept; if all are, nothing is embedded.

    Every process of a launch calls this.

    Memory does not depend on the number of rows. SIGTERM and Ctrl-C stop it between two batches; no incomplete file remains.

    Args:
        encoder: the encoder.
        feed: the images, from `rlpjepa_zoo.data.sources.open_images`.
        out: the folder.
        how: options.
        model: description of the encoder for the manifest, from `provenance`.
        overwrite: remove the embeddings in the folder first; other files are never touched.
        progress: show a progress bar with the remaining time on stderr.

    Returns:
        JSON-able totals: rows, skipped, reasons (how often each), dim, density, bytes, bytes as dense float32, parts, columns.

    Raises:
        UsageError: the folder holds embeddings of other images, of another encoder or with other options, or foreign files.
        DataError: an image cannot be read, without skip_bad; nothing to embed.
        OutputError: disk full, no permission.
        NonFiniteError: the encoder returned NaN or infinity.
        StoppedBySignal: stopped; the same call continues.

    Example:
        >>> import tempfile, rlpjepa_zoo
        >>> from PIL import Image
        >>> from rlpjepa_zoo.data.sources import open_images
        >>> enc, feed = rlpjepa_zoo.create_encoder("test_resnet", dim=16), open_images([Image.new("RGB", (32, 32), c) for c in ("red", "blue")])
        >>> with tempfile.TemporaryDirectory() as scratch:
        ...     totals = extract(enc, feed, scratch)
        ...     totals["rows"], rlpjepa_zoo.SparseEmbeddings.load(scratch).shape
        (2, (2, 16))
    """
    how, out, model = how or Extraction(), expanded(out), model or provenance(encoder, encoder.config.architecture)
    batch_size = how.batch_size or default_batch_size(encoder.config.preprocess.size, encoder.device)
    how = replace(how, batch_size=batch_size)
    check_names(feed.columns)
    manifest = Manifest(model=model, input=json.loads(json.dumps(feed.identity)), options=how.fixed())
    meta = {"model": model.fingerprint, "architecture": model.architecture, "provenance": manifest.model_dump_json(exclude_none=True)}
    if feed.classes:
        meta["classes"] = json.dumps(feed.classes)
    with ExitStack() as stack:
        done, on_disk = dict[int, Summary](), manifest
        with distributed.fail_together():
            if distributed.rank() == 0:
                stack.enter_context(files.lock(out))
                on_disk, done = prepare(out, manifest, batch_size, overwrite)
        done, on_disk, first = distributed.gather_objects((done, on_disk, manifest))[0]
        with distributed.fail_together():
            check_equal(first, manifest, "processes see another", "give all the same encoder, images and options")
        if (totals := _finished(on_disk, done)) is not None:
            log.info("%s: nothing to do, all %d rows are embedded", out, totals.rows)
            return totals.model_dump(by_alias=True)
        with encoder.evaluating(), Interrupts() as interrupts:
            _write_parts(encoder, feed, out, how, meta, set(done), interrupts, progress)
        try:
            distributed.barrier()
        except RuntimeError as error:
            raise HubError(
                f"another process ended, see the error of that process ({first_line(error)}); the same command continues"
            ) from error
        with distributed.fail_together():
            totals = _finish(out, on_disk, feed) if distributed.rank() == 0 else None
        return dict(distributed.gather_objects(totals)[0].model_dump(by_alias=True))


def _finished(manifest: Manifest, done: dict[int, Summary]) -> Totals | None:
    """The totals of a folder whose parts are all there; None if there is something to do."""
    totals = manifest.result
    if totals is None or manifest.sha256 is None or [*done] != [*range(len(done))]:
        return None
    rows, failed = sum(part.rows for part in done.values()), sum(len(part.failed) for part in done.values())
    return totals if (rows, failed) == (totals.rows, totals.skipped) else None


class _Batch(NamedTuple):
    """Embeddings of one batch, without its encoded images."""

    part: int
    """Number of the part that the batch belongs to."""
    embeddings: SparseEmbeddings
    """Of the images that can be read."""
    cells: list[dict[str, Any]]
    """Copied columns of the same images."""
    failures: list[tuple[str, str]]
    """(id, reason) of the other images."""

    @property
    def images(self) -> int:
        return len(self.cells) + len(self.failures)


def _encode(
    encoder: SparseEncoder, groups: Iterator[list[tuple[int, Row]]], how: Extraction, meta: dict[str, str], check: Callable[[], None]
) -> Generator[_Batch, None, None]:
    """Decode and embed batches of (part number, row) in order. `check` is called before each batch is embedded.

    Raises:
        DataError: an image cannot be read, without skip_bad.
    """
    loop = image_batches(
        groups, encoder.config.preprocess, encoder.device, row=lambda item: item[1], num_workers=how.num_workers,
        on_error="skip" if how.skip_bad else "raise", fix="; leave such images out with --skip-bad",
    )  # fmt: skip
    with closing(loop) as batches:
        for batch in batches:
            check()
            if batch.ids:
                codes = encoder.codes(batch.x, batch.ids[0], how.budget)
            else:
                codes = torch.zeros(0, encoder.config.dim)
            embeddings = SparseEmbeddings.from_dense(codes, batch.ids, meta)
            cells = [row.columns for _, row in batch.items]
            failures = [(arrow_text(str(id)), arrow_text(reason)) for id, reason in batch.failures]
            yield _Batch(batch.group[0][0], embeddings, cells, failures)


def _write_parts(
    encoder: SparseEncoder,
    feed: ImageRows,
    out: Path,
    how: Extraction,
    meta: dict[str, str],
    done: set[int],
    interrupts: Interrupts,
    progress: bool,
) -> None:
    """Embed and write the parts of this process that are not done. A part is written in the background while the next one is embedded.

    `meta` is stored in every part.
    """
    rank, world = distributed.rank(), distributed.world_size()

    def mine(part: int) -> bool:
        return part not in done and part % world == rank

    def groups() -> Iterator[list[tuple[int, Row]]]:
        for part, rows in spans(feed, how.part_rows, mine):
            yield from batched(((part, row._replace(id=arrow_id(row.id))) for row in rows), how.batch_size or 1)

    def check() -> None:
        if interrupts.stop:
            raise StoppedBySignal(f"stopped by a signal; the finished parts in {out} stay, and the same command continues", interrupts.stop)

    with (
        ThreadPoolExecutor(1, "write") as pool,
        closing(_encode(encoder, groups(), how, meta, check)) as encoded,
        _progress_bar(feed, how.part_rows, mine, progress) as bar,
    ):
        writing: Future[None] | None = None
        batches: list[_Batch] = []
        images = 0

        def write() -> Future[None]:
            if writing is not None:
                writing.result()  # at most one part waits in memory
            return pool.submit(_write, out, batches, feed.columns, how.values)

        for batch in encoded:
            batches.append(batch)
            images += batch.images
            bar.update(batch.images)
            if images == how.part_rows:  # only the last part of the feed is shorter
                writing, batches, images = write(), [], 0
        if batches:
            writing = write()
        if writing is not None:
            writing.result()


def _write(out: Path, batches: list[_Batch], columns: dict[str, dict[str, Any]], values: Values) -> None:
    """Write the batches of one part."""
    embeddings = SparseEmbeddings.concat([batch.embeddings for batch in batches])
    cells = [cell for batch in batches for cell in batch.cells]
    failures = [failure for batch in batches for failure in batch.failures]
    write_part(out, batches[0].part, embeddings, cells, failures, columns, values)


def _progress_bar(feed: ImageRows, part_rows: int, mine: Callable[[int], bool], progress: bool) -> Any:
    rank, world = distributed.rank(), distributed.world_size()
    total = feed.length or feed.expected
    if total is not None:
        total = sum(min(part_rows, total - k * part_rows) for k in range(-(-total // part_rows)) if mine(k))
    name = "embed" if world == 1 else f"embed (process {rank} of {world})"
    return progress_bar(name, total, hidden=not progress or rank > 0)


def _finish(out: Path, manifest: Manifest, feed: ImageRows) -> Totals:
    """Check that all parts are there, write failed.jsonl, the card and the final manifest, and return the totals."""
    dim = manifest.model.dim
    done = finished_parts(out, manifest.model.fingerprint, {})
    paths = folder.part_paths(out)
    rows, nnz = sum(part.rows for part in done.values()), sum(part.nnz for part in done.values())
    failures = [(name, reason) for part in done.values() for name, reason in part.failed]
    if missing := set(range(max(done, default=-1) + 1)) - done.keys():
        raise DataError(f"{out}: part {min(missing)} is missing; run the same command again")
    if feed.length is not None and rows + len(failures) != feed.length:
        raise DataError(
            f"{out}: {rows} rows and {len(failures)} failures, but {feed.length} images: the input changed while it was read; "
            "start again with --overwrite"
        )
    if not rows:
        first = f"; the first of {len(failures)}: {failures[0][1]}" if failures else ""
        raise DataError(f"{out}: none of the images can be read{first}")
    totals = Totals(
        rows=rows, skipped=len(failures), reasons=_count_reasons(failures), dim=dim, density=nnz / (rows * dim),
        bytes=sum(path.stat().st_size for path in paths), dense_bytes=4 * rows * dim, parts=len(paths), columns=list(feed.columns),
    )  # fmt: skip
    if failures:
        with files.atomic_file(out / folder.FAILED) as aside:
            aside.write_text("".join(json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in failures))
    manifest = manifest.model_copy(update={"result": totals, "sha256": {path.name: files.sha256(path) for path in paths}})
    with files.atomic_file(out / folder.CARD) as aside:
        aside.write_text(card(manifest), "utf-8")
    folder.write_manifest(out, manifest)
    return totals


def _count_reasons(failures: list[tuple[str, str]]) -> dict[str, int]:
    """Count how often each reason occurs, without the names of the images; the ten most frequent."""
    counts = Counter(re.sub(r"^.*?: ", "", reason) if ": " in reason else reason for _, reason in failures)
    return dict(counts.most_common(10))
