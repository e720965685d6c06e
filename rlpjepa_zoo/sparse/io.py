"""Files of sparse embeddings (.safetensors, .npz, .parquet, folders of parquet files) and Arrow tables, as plain arrays.

Every file has a JSON header with format, dim and meta. `SparseEmbeddings` is the checked type that users see; this module knows only arrays.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..core.files import atomic_file
from ..errors import DataError, ModelError, UsageError, first_line

__all__ = ["Arrays", "Values", "arrow_table", "number_array", "part_files", "read", "write"]

FORMAT = "rlpjepa_zoo.sparse/1"
QUANTISED_FORMAT = "rlpjepa_zoo.sparse/2"
"""Format of files with uint8 values; readers of the first format would take them for the values themselves."""
INT32_LIMIT = 2**31
"""From this number of entries on, row starts are 64-bit integers."""
SUFFIXES = (".safetensors", ".npz", ".parquet")
HEADER = "rlpjepa_zoo"
"""Key of the header in safetensors and parquet metadata."""

Values = Literal["float32", "float16", "uint8"]
"""Types in which values can be saved."""


class Arrays(NamedTuple):
    """Compressed sparse rows, in the order of the arguments of `SparseEmbeddings`."""

    indptr: Any
    indices: Any
    values: Any
    dim: Any
    ids: Any
    meta: Any


# --- encoding ------------------------------------------------------------------------------------------------------------------------


def _encode(rows: Arrays, values: str) -> dict[str, np.ndarray[Any, Any]]:
    """Columns and values as written. With uint8, value = code * scale of the row, and the smallest code is 1."""
    columns = {"indices": rows.indices.astype(index_dtype(rows.dim))}
    if values == "uint8":
        counts = np.diff(rows.indptr)
        largest = np.zeros(len(counts), np.float32)
        largest[counts > 0] = np.maximum.reduceat(rows.values, rows.indptr[:-1][counts > 0]) if len(rows.values) else 0
        scale = np.maximum(largest / np.float32(255), np.float32(1e-38))
        codes = np.clip(np.rint(rows.values / np.repeat(scale, counts)), 1, 255).astype(np.uint8)
        return {**columns, "values": codes, "scale": scale}
    if values not in ("float32", "float16"):
        raise UsageError(f"values: expected 'float32', 'float16' or 'uint8', got {values!r}")
    with np.errstate(over="ignore"):
        cast = rows.values.astype(values)
    if not np.isfinite(cast).all() or (cast == 0).any():
        raise DataError("values do not fit into float16 (range 6e-8 .. 65504); save as float32")
    return {**columns, "values": cast}


def _decode(codes: Any, scale: Any, indptr: Any) -> np.ndarray[Any, Any]:
    """Values of uint8 codes."""
    codes, scale = number_array("values", codes), number_array("scale", scale, np.float32)
    counts = np.diff(number_array("indptr", indptr, np.int64))
    if len(scale) != len(counts) or (counts < 0).any() or counts.sum() != len(codes):
        raise DataError(f"scale: expected one for each of {len(counts)} rows, got {len(scale)}")
    return codes.astype(np.float32) * np.repeat(scale, counts)


def number_array(name: str, values: Any, dtype: Any = None) -> np.ndarray[Any, Any]:
    """One-dimensional array of integers or floats, cast to `dtype` if given.

    Raises:
        DataError: another shape or type, or integers expected and others given.
    """
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise DataError(f"{name}: expected a one-dimensional array of numbers, got {array.dtype} of shape {array.shape}")
    if dtype is None:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype, copy=False)
    if dtype == np.int64 and not np.array_equal(cast, array):
        raise DataError(f"{name}: expected integers, got {array.dtype}")
    return cast


def index_dtype(dim: int) -> type[np.signedinteger[Any]]:
    """Type in which columns are saved."""
    return np.int16 if dim <= 2**15 else np.int32


def _header(rows: Arrays, values: str) -> dict[str, Any]:
    return {"format": QUANTISED_FORMAT if values == "uint8" else FORMAT, "dim": rows.dim, "meta": rows.meta}


def arrow_table(rows: Arrays, values: Values) -> Any:
    """A `pyarrow.Table` with columns id, indices and values, see `SparseEmbeddings.to_arrow`."""
    import pyarrow as pa

    try:
        ids = pa.array(rows.ids.tolist(), pa.string() if rows.ids.dtype.kind == "U" else pa.int64())
    except UnicodeEncodeError as error:
        raise DataError("an id is not valid UTF-8 text, which Arrow and Parquet need; save as .npz or .safetensors") from error
    except OverflowError as error:
        raise DataError("an id is above 2^63 - 1, which Arrow and Parquet do not hold; use text") from error
    small = len(rows.values) < INT32_LIMIT
    lists = pa.ListArray if small else pa.LargeListArray
    offsets = pa.array(rows.indptr.astype(np.int32) if small else rows.indptr)
    columns = {name: pa.array(array) for name, array in _encode(rows, values).items()}
    for name in ("indices", "values"):
        columns[name] = lists.from_arrays(offsets, columns[name])
    return pa.table({"id": ids, **columns}).replace_schema_metadata({HEADER: json.dumps(_header(rows, values))})


# --- writing -------------------------------------------------------------------------------------------------------------------------


def write(rows: Arrays, path: Path, values: Values) -> None:
    """Write one file, see `SparseEmbeddings.save`."""
    _check_suffix(path)
    if values == "uint8" and path.suffix == ".npz":
        raise UsageError(f"{path}: scipy would read uint8 values as they are; use float16, or .parquet or .safetensors")
    writers = {".safetensors": _write_safetensors, ".npz": _write_npz, ".parquet": _write_parquet}
    encoded = _encode(rows, values)
    with atomic_file(path) as temporary:
        writers[path.suffix](temporary, rows, encoded, values)


def _write_safetensors(path: Path, rows: Arrays, encoded: dict[str, np.ndarray[Any, Any]], values: Values) -> None:
    from safetensors.numpy import save

    text_ids = rows.ids.dtype.kind == "U"
    arrays = {"indptr": rows.indptr, **encoded} | ({} if text_ids else {"ids": rows.ids.astype(np.int64)})
    header = _header(rows, values) | ({"ids": rows.ids.tolist()} if text_ids else {})
    path.write_bytes(save(arrays, metadata={HEADER: json.dumps(header)}))


def _write_npz(path: Path, rows: Arrays, encoded: dict[str, np.ndarray[Any, Any]], values: Values) -> None:
    contents: dict[str, Any] = {  # scipy's names, so that scipy.sparse.load_npz reads the file
        "format": b"csr", "shape": np.array((len(rows.indptr) - 1, rows.dim)), "data": encoded["values"], "indices": rows.indices,
        "indptr": rows.indptr, "ids": rows.ids, "header": np.array(json.dumps(_header(rows, values))),
    }  # fmt: skip
    with open(path, "wb") as file:
        np.savez_compressed(file, **contents)


def _write_parquet(path: Path, rows: Arrays, encoded: dict[str, np.ndarray[Any, Any]], values: Values) -> None:
    import pyarrow.parquet as pq

    pq.write_table(arrow_table(rows, values), path, compression="zstd")


# --- reading -------------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> Arrays:
    """Arrays of one file; they are not checked for being valid sparse rows.

    Raises:
        DataError: no such file, or a damaged one.
        ModelError: a file of another kind or a newer format.
    """
    _check_suffix(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz, ".parquet": _read_parquet}
    try:
        header, arrays = readers[path.suffix](path)
    except (DataError, ModelError):
        raise
    except Exception as error:  # each reader has its own exceptions for damaged files
        raise DataError(f"{path}: damaged or not a file of sparse embeddings ({first_line(error)})") from error
    if not isinstance(header, dict) or not isinstance(header.get("meta"), dict) or not {"indptr", "indices", "values"} <= set(arrays):
        raise DataError(f"{path}: damaged or not a file of sparse embeddings (unexpected header or arrays)")
    if header.get("format") not in (FORMAT, QUANTISED_FORMAT):
        raise ModelError(
            f"{path}: format {header.get('format')!r}, this version reads {FORMAT!r} and {QUANTISED_FORMAT!r}; update rlpjepa_zoo"
        )
    quantised = header["format"] == QUANTISED_FORMAT
    if quantised != ("scale" in arrays):
        raise DataError(f"{path}: damaged (format {header['format']!r} {'without' if quantised else 'with'} scales)")
    values = arrays["values"]
    if quantised:
        try:
            values = _decode(values, arrays["scale"], arrays["indptr"])
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    return Arrays(arrays["indptr"], arrays["indices"], values, header.get("dim", 0), arrays["ids"], header["meta"])


def _read_safetensors(path: Path) -> tuple[Any, dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        header = json.loads((file.metadata() or {})[HEADER])
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    arrays.setdefault("ids", np.array(header.get("ids", []), dtype=str))
    return header, arrays


def _read_npz(path: Path) -> tuple[Any, dict[str, Any]]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in ("indptr", "indices", "ids")} | {"values": file["data"]}
        return json.loads(str(file["header"])), arrays


def _read_parquet(path: Path) -> tuple[Any, dict[str, Any]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path, memory_map=False)
    header = json.loads((table.schema.metadata or {})[HEADER.encode()])
    columns, values = table["indices"].combine_chunks(), table["values"].combine_chunks()
    if not columns.offsets.equals(values.offsets):
        raise DataError(f"{path}: indices and values have rows of different lengths")
    ids = table["id"].to_pylist()
    scale = {"scale": table["scale"].to_numpy()} if "scale" in table.column_names else {}
    return header, scale | {
        "indptr": columns.offsets.to_numpy() - columns.offsets[0].as_py(),
        "indices": columns.flatten().to_numpy(zero_copy_only=False),
        "values": values.flatten().to_numpy(zero_copy_only=False),
        "ids": np.array(ids, dtype=str if ids and isinstance(ids[0], str) else np.int64),
    }


def part_files(folder: Path) -> list[Path]:
    """All parquet files of a folder that `rlpjepa embed --out DIR` wrote, in order.

    Raises:
        DataError: another folder, or one that is not finished.
    """
    files = sorted(folder.glob("data/*.parquet"))
    if not files:
        raise DataError(f"{folder}: no data/*.parquet, so not a folder of embeddings; expected one that `rlpjepa embed --out DIR` wrote")
    manifest = folder / "embeddings.json"
    try:
        written = json.loads(manifest.read_text())["result"]["parts"] if manifest.is_file() else len(files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not finished; run the same `rlpjepa embed` again, or load the parts you want one by one") from error
    if written != len(files):
        raise DataError(f"{folder}: {len(files)} parts, {written} were written; run the same `rlpjepa embed` again")
    return files


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: expected a file ending in .safetensors, .npz or .parquet")
