"""Embeddings as Arrow tables and parquet files, also files that pandas, polars or datasets wrote again.

The layout is told by the columns, not by the metadata: `id` (text or integers), `indices` and `values` (lists of any kind), `scale` for uint8 values;
all others are further columns. Other programs drop the header, and with it the width D; see `SparseEmbeddings.load`.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import DataError
from .checksum import BLANK, KEY, add_checksum, is_intact
from .columns import columns_from_arrow, python_objects

__all__ = ["HEADER", "NO_HEADER", "read_parquet", "write_table"]

HEADER = "rlpjepa_zoo"
"""Key of the header in the metadata."""
NO_HEADER: dict[str, Any] = {}
"""In place of the header that another program dropped."""


def write_table(table: Any, path: Path, dense: bool = False) -> None:
    """Write a table with checksums of its pages and of the file.

    Args:
        table: the table.
        path: the file.
        dense: neither compress nor share equal values.
    """
    import pyarrow.parquet as pq

    how: dict[str, Any] = {"compression": "none", "use_dictionary": False} if dense else {"compression": "zstd"}
    with open(path, "wb") as file, pq.ParquetWriter(file, table.schema, write_page_checksum=True, **how) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({KEY: BLANK})
    add_checksum(path)


def read_parquet(file: BinaryIO, most_bytes: int) -> tuple[Any, dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Read a file of embeddings.

    Args:
        file: opened for reading.
        most_bytes: largest size in memory.

    Returns:
        The header, `NO_HEADER` if another program dropped it; the arrays; the further columns.

    Raises:
        DataError: damaged, or not embeddings. pyarrow's own errors come through.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        metadata, schema = opened.metadata, opened.schema_arrow
    if missing := [name for name in ("id", "indices", "values") if name not in schema.names]:
        raise DataError(f"no column '{missing[0]}' (columns: {', '.join(schema.names[:20])}); expected id, indices and values")
    if not _written_again(metadata) and is_intact(file) is False:
        raise DataError("damaged: its bytes are not those of its checksum; make it again")
    _check_size(metadata, most_bytes)
    file.seek(0)
    with pq.ParquetFile(file, page_checksum_verification=True, read_dictionary=_text_columns(metadata)) as opened:
        table = opened.read()  # equal texts are held once
    nested = sum(_expanded(chunk) for column in table.columns if not _is_dictionary(column) for chunk in column.chunks)
    if nested > most_bytes:
        raise DataError(_too_much(nested, most_bytes))
    stored = metadata.metadata or {}
    header = json.loads(stored[HEADER.encode()]) if HEADER.encode() in stored else NO_HEADER
    return header, _arrays(table), columns_from_arrow(table)


def too_large(file: BinaryIO, most_bytes: int) -> bool:
    """Whether `read_parquet` would refuse a file for its size in memory."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            _check_size(opened.metadata, most_bytes)
    except DataError:
        return True
    return False


def _check_size(metadata: Any, most_bytes: int) -> None:
    """Refuse a footer that asks for more memory than a file of this size can mean."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    if metadata.num_rows != sum(group.num_rows for group in groups):
        raise DataError(f"damaged: {metadata.num_rows} rows, but its row groups have {sum(group.num_rows for group in groups)}")
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    size = sum(max(8 * chunk.num_values, chunk.total_uncompressed_size) for chunk in chunks)
    if size > most_bytes:
        raise DataError(_too_much(size, most_bytes))


def _too_much(size: int, most_bytes: int) -> str:
    return f"asks for {size:,} bytes of memory, the limit for a file of this size is {most_bytes:,}; split it, or load it with pyarrow"


def _text_columns(metadata: Any) -> list[str]:
    """Paths of the columns of texts and bytes, also inside lists and structs."""
    columns = (metadata.schema.column(i) for i in range(metadata.num_columns))
    return [c.path for c in columns if c.physical_type == "BYTE_ARRAY" and c.converted_type in ("NONE", "UTF8")]


def _is_dictionary(array: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_dictionary(array.type))


def _expanded(array: Any) -> int:
    """Bytes of the texts of an array, each counted as often as it occurs: inside lists and structs Python does not share equal ones."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if _is_dictionary(array):
        if not _is_text(array.dictionary.type):
            return 0
        return int(pc.sum(pc.binary_length(array.dictionary).cast(pa.int64()).take(array.indices)).as_py() or 0)
    if pa.types.is_struct(array.type):
        return sum(map(_expanded, array.flatten()))
    if pa.types.is_map(array.type):
        return _expanded(array.keys) + _expanded(array.items)
    if hasattr(array.type, "value_type"):
        return _expanded(array.flatten())
    return 0


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _written_again(metadata: Any) -> bool:
    """Whether another program read the table and wrote it with the metadata of the old file, whose checksum is not that of the new file.

    Arrow then copies the checksum into the schema, where we do not write it.
    """
    import pyarrow as pa

    stored = metadata.metadata or {}
    if b"ARROW:schema" not in stored:
        return False
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(stored[b"ARROW:schema"])))
    return KEY.encode() in (schema.metadata or {})


def _arrays(table: Any) -> dict[str, Any]:
    (counts, indices), (value_counts, values) = (_lists(table[name], name) for name in ("indices", "values"))
    if not np.array_equal(counts, value_counts):
        raise DataError(f"row {int(np.flatnonzero(counts != value_counts)[0])}: indices and values have different lengths")
    indptr = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    arrays = {"indptr": indptr, "indices": indices, "values": values, "ids": _ids(table["id"])}
    if "scale" in table.column_names:
        arrays["scale"] = _numbers(table["scale"].chunks, table["scale"].type, "scale")
    return arrays


def _lists(column: Any, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Length of each list of a column, and the elements of all lists. The lists may be of any kind that Arrow knows.

    Raises:
        DataError: it is no column of lists of numbers, or a row is null.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    inner = getattr(column.type, "value_type", None)
    if inner is None or pa.types.is_dictionary(column.type):
        raise DataError(f"column '{name}': expected lists of numbers, got {column.type}")
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"row {row}: column '{name}' has no value (null); an embedding without entries is an empty list")
    counts = [pc.list_value_length(chunk).to_numpy() for chunk in column.chunks]
    return np.concatenate([np.zeros(0, np.int64), *counts]), _numbers([chunk.flatten() for chunk in column.chunks], inner, name)


def _numbers(chunks: list[Any], kind: Any, name: str) -> np.ndarray[Any, Any]:
    """The numbers of Arrow arrays of one type, which may be a dictionary of numbers."""
    import pyarrow as pa

    if any(chunk.null_count for chunk in chunks):
        raise DataError(f"column '{name}' holds null in place of a number")
    if pa.types.is_dictionary(kind):
        chunks, kind = [chunk.dictionary_decode() for chunk in chunks], kind.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise DataError(f"column '{name}': expected numbers, got {kind}")
    dtype = np.int64 if pa.types.is_null(kind) else kind.to_pandas_dtype()  # lists that are all empty have no type
    return np.concatenate([np.zeros(0, dtype), *(chunk.to_numpy(zero_copy_only=False).astype(dtype, copy=False) for chunk in chunks)])


def _ids(column: Any) -> Any:
    """Ids as numpy integers or Python strings; equal texts are one object.

    Raises:
        DataError: a row has no id.
    """
    import pyarrow as pa

    if column.null_count:
        raise DataError(f"row {int(np.flatnonzero(column.is_null().to_numpy())[0])}: no id (null)")
    return column.to_numpy() if pa.types.is_integer(column.type) else python_objects(column)
