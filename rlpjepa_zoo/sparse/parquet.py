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
from .columns import columns_from_arrow
from .ids import object_array
from .seal import BLANK, intact, seal

__all__ = ["HEADER", "NO_HEADER", "read_parquet", "write_table"]

HEADER = "rlpjepa_zoo"
"""Key of the header in the metadata."""
NO_HEADER: dict[str, Any] = {}
"""In place of the header that another program dropped."""
_SEAL = "rlpjepa_zoo.sha256"
"""Key of the checksum, which only the file has, not the schema inside it: a program that writes the table again copies it into the schema."""


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
        writer.add_key_value_metadata({_SEAL: BLANK})
    seal(path)


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
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        metadata, schema = opened.metadata, opened.schema_arrow
    if missing := [name for name in ("id", "indices", "values") if name not in schema.names]:
        raise DataError(f"no column '{missing[0]}' (columns: {', '.join(schema.names[:20])}); expected id, indices and values")
    if not _written_again(metadata) and intact(file) is False:
        raise DataError("damaged: its bytes are not those of its checksum; make it again")
    _check_size(metadata, most_bytes)
    text = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    file.seek(0)
    with pq.ParquetFile(file, page_checksum_verification=True, read_dictionary=text) as opened:  # equal texts are held once
        table = opened.read()
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
        raise DataError(
            f"asks for {size:,} bytes of memory, the limit for a file of this size is {most_bytes:,}; split it, or load it with pyarrow"
        )


def _written_again(metadata: Any) -> bool:
    """Whether another program read the table and wrote it with the metadata of the old file, whose checksum is not that of the new file."""
    import pyarrow as pa

    stored = metadata.metadata or {}
    if b"ARROW:schema" not in stored:
        return True
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(stored[b"ARROW:schema"])))
    return _SEAL.encode() in (schema.metadata or {})


def _arrays(table: Any) -> dict[str, Any]:
    indices, values = _lists(table["indices"], "indices"), _lists(table["values"], "values")
    if not indices.offsets.equals(values.offsets):
        differing = np.diff(indices.offsets.to_numpy()) != np.diff(values.offsets.to_numpy())
        raise DataError(f"row {int(np.flatnonzero(differing)[0])}: indices and values have different lengths")
    arrays = {
        "indptr": indices.offsets.to_numpy(),
        "indices": _numbers(indices.values, "indices"),
        "values": _numbers(values.values, "values"),
        "ids": _ids(table["id"]),
    }
    if "scale" in table.column_names:
        arrays["scale"] = _numbers(_whole(table["scale"]), "scale")
    return arrays


def _whole(column: Any) -> Any:
    """A chunked column as one array."""
    import pyarrow as pa

    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _lists(column: Any, name: str) -> Any:
    """A column of lists of any kind as one large list array whose offsets start at 0.

    Raises:
        DataError: it is no column of lists, or a row is null.
    """
    import pyarrow as pa

    inner = getattr(column.type, "value_type", None)
    if inner is None or pa.types.is_dictionary(column.type):
        raise DataError(f"column '{name}': expected lists of numbers, got {column.type}")
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"row {row}: column '{name}' has no value (null); an embedding without entries is an empty list")
    if pa.types.is_dictionary(inner):
        inner = inner.value_type
    lists = _whole(column.cast(pa.large_list(inner)))
    offsets = lists.offsets.to_numpy()
    return pa.LargeListArray.from_arrays(pa.array(offsets - offsets[0]), lists.values.slice(offsets[0], offsets[-1] - offsets[0]))


def _numbers(array: Any, name: str) -> np.ndarray[Any, Any]:
    if array.null_count:
        raise DataError(f"column '{name}' holds null in place of a number")
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _ids(column: Any) -> Any:
    """Ids as numpy integers or Python strings; equal texts are one object.

    Raises:
        DataError: a row has no id.
    """
    import pyarrow as pa

    if column.null_count:
        raise DataError(f"row {int(np.flatnonzero(column.is_null().to_numpy())[0])}: no id (null)")
    ids = _whole(column.unify_dictionaries() if pa.types.is_dictionary(column.type) else column)
    if pa.types.is_dictionary(ids.type):
        return object_array(ids.dictionary.to_pylist())[ids.indices.to_numpy()]
    return ids.to_numpy() if pa.types.is_integer(ids.type) else object_array(ids.to_pylist())
