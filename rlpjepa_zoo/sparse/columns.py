"""Further columns of the rows, such as the class label: name -> one value for each row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import DataError, UsageError, first_line
from .ids import object_array, python_values

__all__ = [
    "RESERVED", "Columns", "check_names", "column_dict", "columns_from_arrow", "columns_of", "columns_to_arrow", "python_objects", "pack_columns", "unpack_columns",
]  # fmt: skip

Columns = dict[str, np.ndarray[Any, Any]]
RESERVED = ("id", "indices", "values", "scale")
"""Columns of the embeddings themselves."""
_INDEX_OF_PANDAS = re.compile(r"__index_level_\d+__")


def column_dict(columns: Mapping[str, Any] | None, n: int) -> Columns:
    """Return columns as arrays (n,): numbers, truth values and dates as numpy holds them, anything else as Python objects.

    Raises:
        DataError: another number of values, or a name that the embeddings use.
    """
    arrays = {}
    for name, values in (columns or {}).items():
        if not isinstance(name, str) or name in RESERVED:
            raise DataError(f"columns: the name {name!r} is not free; expected text other than {', '.join(RESERVED)}")
        if not (isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "biufmMO"):
            values = _array(python_values(values, f"columns: {name}"))
        if len(values) != n:
            raise DataError(f"columns: '{name}' has {len(values)} values, expected {n}, one for each row")
        arrays[name] = values
    return arrays


def columns_of(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Columns from one mapping per row, all with the same names."""
    return {name: [row[name] for row in cells] for name in cells[0]} if cells else {}


def check_names(names: Iterable[str]) -> None:
    """Refuse names of copied columns that the embeddings use.

    Raises:
        UsageError: names the column and the option that helps.
    """
    for name in names:
        if name in RESERVED:
            raise UsageError(f"column '{name}': embeddings have a column of that name; --id-column takes ids, or rename it in the data set")


def _array(values: list[Any]) -> np.ndarray[Any, Any]:
    kinds = set(map(type, values))
    if len(kinds) == 1 and kinds <= {int, float, bool}:
        try:
            return np.array(values)
        except OverflowError:
            pass
    return object_array(values)


def columns_to_arrow(columns: Columns) -> dict[str, Any]:
    """Return columns as Arrow arrays.

    Raises:
        DataError: values that Arrow cannot hold in one column.
    """
    import pyarrow as pa

    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pa.array(values.tolist() if values.dtype == object else values)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise DataError(f"columns: '{name}' cannot be saved ({first_line(error)})") from error
    return arrays


def columns_from_arrow(table: Any) -> Columns:
    """Return the columns of an Arrow table, without those of the embeddings and the row index of pandas."""
    import pyarrow.types as kind

    columns: Columns = {}
    for name in table.column_names:
        if name in RESERVED or _INDEX_OF_PANDAS.fullmatch(name):
            continue
        column = table[name]
        numbers = kind.is_integer(column.type) or kind.is_floating(column.type) or kind.is_boolean(column.type)
        if (numbers and not column.null_count) or kind.is_timestamp(column.type):
            columns[name] = column.to_numpy()
        else:
            columns[name] = python_objects(column)
    return columns


def python_objects(column: Any) -> np.ndarray[Any, Any]:
    """The values of an Arrow column as Python objects. Equal values of a dictionary are one object, so a repeated long text takes no memory."""
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type) or not column.num_chunks:
        return object_array(column.to_pylist())
    whole = pa.concat_arrays(column.unify_dictionaries().chunks)
    values = object_array([*whole.dictionary.to_pylist(), None])
    return values[whole.indices.fill_null(len(values) - 1).to_numpy()]


def pack_columns(columns: Columns) -> np.ndarray[Any, Any]:
    """Columns as bytes (an Arrow stream), for the formats that hold only arrays."""
    import pyarrow as pa

    table = pa.table(columns_to_arrow(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return np.frombuffer(sink.getvalue(), np.uint8)


def unpack_columns(data: np.ndarray[Any, Any]) -> Columns:
    """The columns that `pack_columns` packed."""
    import pyarrow as pa

    table = pa.ipc.open_stream(data.tobytes()).read_all()
    table.validate(full=True)  # a hostile file may point outside its own bytes
    return columns_from_arrow(table)
