"""Ids of rows: n texts or n integers, from whatever holds them, as one numpy array whose memory grows with the text."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..errors import DataError

__all__ = ["id_array", "pack_text", "python_values", "unpack_text"]


def id_array(ids: Any, n: int) -> np.ndarray[Any, Any]:
    """Return ids as an array: integers as int64 (uint64 above 2^63 - 1), texts as Python strings in an object array.

    A numpy array of fixed width would give every text the length of the longest, and neither numpy's StringDType nor Arrow holds names of
    files that are not UTF-8.

    Args:
        ids: n texts, paths, bytes in UTF-8, or integers: a list, an array of numpy, pandas, polars, Arrow or torch; 0 .. n - 1 when None.
        n: number of rows.

    Raises:
        DataError: another number of ids, an id of another type, or a missing one (None, NaN), with its row.

    Example:
        >>> id_array(["a.png", "b.png"], 2).tolist(), id_array(None, 2).tolist()
        (['a.png', 'b.png'], [0, 1])
    """
    if ids is None or (isinstance(ids, list | tuple) and not ids and n == 0):
        return np.arange(n)
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu" and ids.shape == (n,):
        return ids.astype(np.uint64 if ids.dtype == np.uint64 and n and ids.max() >= 2**63 else np.int64, copy=False)
    values = python_values(ids, "ids")
    if len(values) != n:
        raise DataError(f"ids: expected {n}, one for each row, got {len(values)}")
    values = [value if type(value) in (str, int) else _id(row, value) for row, value in enumerate(values)]
    kinds = set(map(type, values))
    if len(kinds) > 1:
        row = next(row for row, value in enumerate(values) if type(value) is not type(values[0]))
        raise DataError(
            f"ids: expected all strings or all integers, got both; row 0 has {_short(values[0])}, row {row} has {_short(values[row])}"
        )
    if kinds == {str} or (not kinds and getattr(getattr(ids, "dtype", None), "kind", "") in "OUT"):
        return object_array(values)
    return _integers(values)


def object_array(values: list[Any]) -> np.ndarray[Any, Any]:
    """A one-dimensional array of Python objects; `np.array` would make matrices of equally long lists."""
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def python_values(values: Any, name: str) -> list[Any]:
    """The elements of a list or of a one-dimensional array of any library, as Python objects.

    Raises:
        DataError: it is neither.
    """
    if hasattr(values, "detach"):  # torch
        values = values.detach().cpu().numpy()
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise DataError(f"{name}: expected a list or a one-dimensional array, got {_short(values)}")
    shape = getattr(values, "shape", None)
    if isinstance(shape, tuple) and len(shape) != 1:
        raise DataError(f"{name}: expected a list or a one-dimensional array, got shape {shape}")
    for method in ("to_pylist", "to_list", "tolist"):  # Arrow, polars and pandas, numpy
        if hasattr(values, method):
            return list(getattr(values, method)())
    return list(values)


def _id(row: int, value: Any) -> str | int:
    """One id as a Python string or integer."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, bytes | os.PathLike):
        try:
            text = os.fspath(value)
            return text if isinstance(text, str) else text.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"ids: row {row} has {_short(value)}, which is not UTF-8; decode it first") from error
    missing = str(value) in ("None", "nan", "<NA>", "NaT")  # pandas's NA can neither be compared nor taken for true or false
    raise DataError(f"ids: row {row} has {f'no id ({value})' if missing else _short(value)}; expected text or an integer")


def _integers(values: list[int]) -> np.ndarray[Any, Any]:
    low, high = min(values, default=0), max(values, default=0)
    if low < -(2**63) or high >= 2**64 or (low < 0 and high >= 2**63):
        raise DataError(f"ids: integers from {low} to {high} do not fit into 64 bits; use text")
    return np.array(values, dtype=np.int64 if high < 2**63 else np.uint64)


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}{' ...' if len(text) > 60 else ''} ({type(value).__name__})"


def pack_text(texts: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Texts as one array of bytes and the end of each text in it. Names that are not UTF-8 are kept (surrogates are encoded)."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    return np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(text) for text in encoded], dtype=np.int64)


def unpack_text(data: np.ndarray[Any, Any], ends: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The texts that `pack_text` packed.

    Raises:
        DataError: the ends do not cut the bytes into texts.
    """
    if data.dtype != np.uint8 or ends.dtype != np.int64 or data.ndim != 1 or ends.ndim != 1:
        raise DataError(f"ids: expected bytes and their ends, got {data.dtype} and {ends.dtype}")
    starts = np.concatenate([[0], ends])
    if (np.diff(starts) < 0).any() or starts[-1] != len(data):
        raise DataError(f"ids: the ends of the texts do not fit {len(data)} bytes")
    content = data.tobytes()
    try:
        return object_array(
            [content[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts[:-1].tolist(), ends.tolist(), strict=True)]
        )
    except UnicodeDecodeError as error:
        raise DataError(f"ids: damaged text ({error})") from error
