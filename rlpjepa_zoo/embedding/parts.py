"""One part of a folder of embeddings: a parquet file that holds a fixed range of input rows.

data/part-000003.parquet     columns id, indices, values (scale), and the copied columns; number, rows, nnz and failures in the schema metadata
data/.part-000003.json       written instead if no image of the part can be read, because datasets cannot open a folder with an empty part
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core import files
from ..errors import DataError, first_line
from ..sparse.embeddings import SparseEmbeddings
from ..sparse.io import Values

__all__ = ["arrow_text", "part_number", "part_paths", "read_summary", "write_json", "write_part"]

_PART = re.compile(r"part-(\d{6,})\.parquet")
_EMPTY = re.compile(r"\.part-(\d{6,})\.json")


def part_number(path: Path) -> int | None:
    """Return the number of a part, told by its file name; None for other files."""
    name = _PART.fullmatch(path.name) or _EMPTY.fullmatch(path.name)
    return None if name is None else int(name[1])


def part_paths(out: Path) -> list[Path]:
    """Return the parquet files of a folder of embeddings, in input order."""
    return sorted(path for path in (out / "data").iterdir() if _PART.fullmatch(path.name))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file completely or not at all."""
    with files.atomic_file(path) as aside:
        aside.write_text(json.dumps(value, indent=1) + "\n")


def write_part(
    out: Path,
    number: int,
    embeddings: SparseEmbeddings,
    cells: list[dict[str, Any]],
    failures: list[tuple[str, str]],
    columns: dict[str, dict[str, Any]],
    values: Values,
) -> None:
    """Write one part, completely or not at all.

    Args:
        out: folder of the embeddings.
        number: of the part.
        embeddings: of the images of the part that can be read; ``meta`` holds the key ``model``.
        cells: copied columns, one dictionary per row of `embeddings`.
        failures: (id, reason) of the images that cannot be read.
        columns: copied columns: name and type, as Hugging Face data sets describe it.
        values: type of the stored values, see `SparseEmbeddings.save`.

    Raises:
        DataError: a cell does not have the type of its column.
        OutputError: disk full, no permission.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    summary = {"number": number, "rows": len(embeddings), "nnz": embeddings.nnz, "failed": failures}
    if not len(embeddings):
        write_json(out / "data" / f".part-{number:06d}.json", {**summary, "model": embeddings.meta["model"]})
        return
    table = embeddings.to_arrow(values)
    for name, feature in columns.items():
        try:
            table = table.append_column(name, pa.array([cell[name] for cell in cells], _arrow_type(feature)))
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise DataError(f"column '{name}' holds a value that is not of its type ({first_line(error)})") from error
    header = json.loads(table.schema.metadata[b"rlpjepa_zoo"]) | {"part": summary}
    info = {"info": {"features": _features(table.schema, columns)}}
    table = table.replace_schema_metadata({"rlpjepa_zoo": json.dumps(header), "huggingface": json.dumps(info)})
    with files.atomic_file(out / "data" / f"part-{number:06d}.parquet") as aside:
        pq.write_table(table, aside, compression="zstd")


def read_summary(path: Path) -> dict[str, Any]:
    """Return the summary that a part carries: number, rows, nnz, failed, model.

    Raises:
        DataError: the file is damaged or no part.
    """
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".json":
            return dict(json.loads(path.read_text()))
        with pq.ParquetFile(path) as file:
            header = json.loads((file.schema_arrow.metadata or {})[b"rlpjepa_zoo"])
            return {**header["part"], "model": header["meta"]["model"]}
    except Exception as error:
        raise DataError(f"{path}: damaged or not a part of embeddings ({first_line(error)})") from error


def arrow_text(name: str | int) -> str | int:
    """Return an id that Arrow can hold: bytes of a file name that are not UTF-8 are escaped as in Python."""
    return name if isinstance(name, int) else os.fsencode(name).decode("utf-8", "backslashreplace")


def _arrow_type(feature: dict[str, Any]) -> Any:
    """Return the Arrow type of a column, from its description by a Hugging Face data set."""
    import pyarrow as pa

    if feature.get("_type") == "ClassLabel":
        return pa.int64()
    if feature.get("_type") == "Value":
        with suppress(KeyError, ValueError, TypeError):
            return pa.type_for_alias(feature["dtype"])
    import datasets

    return datasets.Features.from_dict({"x": feature}).arrow_schema.field("x").type


def _features(schema: Any, columns: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Describe the columns of a part as Hugging Face data sets do."""
    features: dict[str, Any] = {}
    for column in schema:
        inner = getattr(column.type, "value_type", None)
        dtype = str(inner if inner is not None else column.type)
        value = {"dtype": {"halffloat": "float16", "float": "float32"}.get(dtype, dtype), "_type": "Value"}
        features[column.name] = columns.get(column.name) or ({"feature": value, "_type": "List"} if inner is not None else value)
    return features
