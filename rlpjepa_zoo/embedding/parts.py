"""Writing one part of a folder of embeddings; `rlpjepa_zoo.sparse.folder` defines what a folder holds."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core import files
from ..errors import DataError, first_line
from ..sparse.embeddings import SparseEmbeddings
from ..sparse.folder import empty_part_path, part_path
from ..sparse.io import Values
from ..sparse.parquet import HEADER, write_table

__all__ = ["arrow_text", "with_arrow_ids", "write_part"]


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

    summary = {"number": number, "rows": len(embeddings), "nnz": embeddings.nnz, "failed": failures}
    if not len(embeddings):
        with files.atomic_file(empty_part_path(out, number)) as aside:
            aside.write_text(json.dumps({**summary, "model": embeddings.meta["model"]}, indent=1) + "\n")
        return
    table = embeddings.to_arrow(values)
    for name, feature in columns.items():
        try:
            table = table.append_column(name, pa.array([cell[name] for cell in cells], _arrow_type(feature)))
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise DataError(f"column '{name}' holds a value that is not of its type ({first_line(error)})") from error
    header = json.loads(table.schema.metadata[HEADER.encode()]) | {"part": summary}
    info = {"info": {"features": _features(table.schema, columns)}}
    table = table.replace_schema_metadata({HEADER: json.dumps(header), "huggingface": json.dumps(info)})
    with files.atomic_file(part_path(out, number)) as aside:
        write_table(table, aside)


def arrow_text(name: str) -> str:
    """Return text that Arrow can hold: bytes of a file name that are not UTF-8 are escaped as in Python."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def arrow_id(id: str | int) -> str | int:
    """Return an id that Arrow can hold: row numbers stay, names as by `arrow_text`."""
    return id if isinstance(id, int) else arrow_text(id)


def with_arrow_ids(e: SparseEmbeddings) -> SparseEmbeddings:
    """The same rows with ids that Arrow can hold."""
    ids = [arrow_id(id) for id in e.ids.tolist()]
    return SparseEmbeddings(e.indptr, e.indices, e.values, e.dim, ids, e.meta, e.columns)


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
