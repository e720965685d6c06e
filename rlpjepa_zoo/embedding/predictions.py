"""Predictions of a classifier as a table in one file: id, class, probability."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..core.files import atomic_file
from ..data.images import ImageRows
from ..errors import DataError, UsageError
from ..models.classifier import Classifier
from .parts import arrow_id, arrow_text

__all__ = ["SUFFIXES", "write_predictions"]

SUFFIXES = (".csv", ".jsonl", ".parquet")
"""Formats of the file, told by its suffix."""
COLUMNS = ("id", "class", "probability")

Rows = list[tuple[str | int, str, float]]


def write_predictions(
    classifier: Classifier, images: ImageRows, out: Path, top: int = 1, batch_size: int | None = None, num_workers: int = 4,
    skip_bad: bool = False, progress: bool = False,
) -> tuple[int, list[tuple[Any, str]]]:  # fmt: skip
    """Classify all rows of a source and write `top` rows for each image, in input order, most probable class first.

    Memory does not depend on the number of images. The file appears when it is complete.

    Args:
        classifier: used in evaluation mode.
        images: from `rlpjepa_zoo.data.sources.open_images`.
        out: file ending in one of `SUFFIXES`; replaced if it exists.
        top: classes of each image, 1 to C.
        batch_size, num_workers: as of `Classifier.predict`.
        skip_bad: leave out unreadable images.
        progress: show a progress bar on stderr.

    Returns:
        Number of classified images; ids of unreadable images, and the reasons.

    Raises:
        UsageError: another suffix, or more classes than there are.
        DataError: an unreadable image, without skip_bad; or no readable image.
        OutputError: disk full, no permission.

    Example:
        >>> import tempfile, rlpjepa_zoo
        >>> from PIL import Image
        >>> from rlpjepa_zoo.data.sources import open_images
        >>> from rlpjepa_zoo.models.classifier import make_classifier
        >>> classifier = make_classifier(rlpjepa_zoo.create_encoder("test_resnet", dim=16), ["cat", "dog"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_predictions(classifier, open_images([Image.new("RGB", (32, 32))]), Path(folder) / "p.csv")
        ...     (Path(folder) / "p.csv").read_text().splitlines()[0]
        (1, [])
        'id,class,probability'
    """
    if out.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{out}: expected a file ending in {', '.join(SUFFIXES)}")
    if not 1 <= top <= len(classifier.classes):
        raise UsageError(f"top: expected 1 to {len(classifier.classes)}, the classes of the classifier, got {top}")
    count, failures = 0, list[tuple[Any, str]]()
    loop = classifier.probabilities(
        images, batch_size, num_workers, progress, "skip" if skip_bad else "raise", "; leave such images out with --skip-bad"
    )
    with atomic_file(out) as aside, _writer(aside) as write, closing(loop) as batches:
        for batch, probabilities in batches:
            write(_rows(batch.ids, probabilities, classifier.classes, top))
            count += len(batch.ids)
            failures += batch.failures
        if not count:
            raise DataError(f"none of the images can be read{f'; the first of {len(failures)}: {failures[0][1]}' if failures else ''}")
    return count, failures


def _rows(ids: list[Any], probabilities: Tensor, classes: tuple[str, ...], top: int) -> Rows:
    """Rows of a batch; among equally probable classes the first comes first."""
    values, order = probabilities.sort(dim=1, descending=True, stable=True)
    return [
        (arrow_id(id), arrow_text(classes[number]), value)
        for id, numbers, of_image in zip(ids, order[:, :top].tolist(), values[:, :top].numpy(), strict=True)
        for number, value in zip(numbers, _decimals(of_image), strict=True)
    ]


def _decimals(values: np.ndarray[Any, Any]) -> list[float]:
    """float32 numbers as the shortest decimals that give them back."""
    return [float(str(value)) for value in values]


@contextmanager
def _writer(path: Path) -> Iterator[Callable[[Rows], None]]:
    """A function that appends rows to a new file."""
    if path.suffix.lower() == ".parquet":
        with _parquet_writer(path) as write:
            yield write
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() == ".csv":
            table = csv.writer(file)
            table.writerow(COLUMNS)
            yield table.writerows
        else:
            yield lambda rows: file.writelines(json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def _parquet_writer(path: Path) -> Iterator[Callable[[Rows], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None
    with open(path, "wb") as file:

        def write(rows: Rows) -> None:
            nonlocal writer
            if not rows:
                return
            fields = [
                ("id", pa.int64() if isinstance(rows[0][0], int) else pa.string()),
                ("class", pa.string()),
                ("probability", pa.float32()),
            ]
            schema = pa.schema(fields)
            writer = writer or pq.ParquetWriter(file, schema)
            writer.write_table(
                pa.table(
                    [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)], schema=schema
                )
            )

        try:
            yield write
        finally:
            if writer is not None:
                writer.close()
