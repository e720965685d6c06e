"""Files of sparse embeddings (.safetensors, .npz, .parquet) and Arrow tables, as plain arrays.

Every file has a JSON header with format, dim and meta, and a checksum: .safetensors and .parquet the sha256 of the file (`rlpjepa_zoo.sparse.checksum`), .npz
the CRC of its zip entries. `SparseEmbeddings` is the checked type that users see; this module knows only arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from ..core.files import atomic_file
from ..errors import DataError, ModelError, UsageError, first_line
from .checksum import BLANK, KEY, add_checksum, is_intact
from .columns import columns_to_arrow, pack_columns, unpack_columns
from .csr import number_array
from .ids import pack_text, unpack_text
from .parquet import HEADER, NO_HEADER, read_parquet, too_large, write_table

__all__ = ["SUFFIXES", "Arrays", "Values", "arrow_table", "read", "write"]

FORMAT = "rlpjepa_zoo.sparse/3"
OLDER_FORMATS = ("rlpjepa_zoo.sparse/1", "rlpjepa_zoo.sparse/2")
"""Formats without checksum; text ids are in the header of safetensors files and of fixed width in .npz. The second has uint8 values."""
INT32_LIMIT = 2**31
"""From this number of entries on, row starts are 64-bit integers."""
SUFFIXES = (".safetensors", ".npz", ".parquet")
_ALLOWANCE, _EXPANSION = 1 << 28, 256
"""A file may ask for this many bytes of memory, or for this many times its own size. More is a file made to fill the memory."""
_NPZ_ENTRIES = {"format", "shape", "data", "indices", "indptr", "header", "ids", "id_text", "id_ends", "columns"}

Values = Literal["float32", "float16", "uint8"]
"""Types in which values can be saved."""


class Arrays(NamedTuple):
    """Compressed sparse rows, in the order of the arguments of `SparseEmbeddings`."""

    indptr: Any
    indices: Any
    values: Any
    dim: Any
    """None if the file does not tell it."""
    ids: Any
    meta: Any
    columns: Any


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


def index_dtype(dim: int) -> type[np.signedinteger[Any]]:
    """Type in which columns are saved."""
    return np.int16 if dim <= 2**15 else np.int32


def _header(rows: Arrays) -> dict[str, Any]:
    return {"format": FORMAT, "dim": rows.dim, "meta": rows.meta}


def _pack_ids(ids: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    if ids.dtype.kind != "O":
        return {"ids": ids}
    return dict(zip(("id_text", "id_ends"), pack_text(ids), strict=True))


def _packed(rows: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """Ids and further columns as arrays, for the formats that hold only arrays."""
    return _pack_ids(rows.ids) | ({"columns": pack_columns(rows.columns)} if rows.columns else {})


def most_bytes(size: int) -> int:
    """Largest memory that a file of this size may ask for."""
    return max(_ALLOWANCE, _EXPANSION * size)


def arrow_table(rows: Arrays, values: Values) -> Any:
    """A `pyarrow.Table` with columns id, indices and values, see `SparseEmbeddings.to_arrow`."""
    import pyarrow as pa

    try:
        ids = pa.array(rows.ids.tolist(), pa.string()) if rows.ids.dtype.kind == "O" else pa.array(rows.ids)
    except UnicodeEncodeError as error:
        raise DataError("an id is not valid UTF-8 text, which Arrow and Parquet need; save as .npz or .safetensors") from error
    small = len(rows.values) < INT32_LIMIT
    lists = pa.ListArray if small else pa.LargeListArray
    offsets = pa.array(rows.indptr.astype(np.int32) if small else rows.indptr)
    columns = {name: pa.array(array) for name, array in _encode(rows, values).items()}
    for name in ("indices", "values"):
        columns[name] = lists.from_arrays(offsets, columns[name])
    return pa.table({"id": ids, **columns, **columns_to_arrow(rows.columns)}).replace_schema_metadata({HEADER: json.dumps(_header(rows))})


# --- writing -------------------------------------------------------------------------------------------------------------------------


def write(rows: Arrays, path: Path, values: Values) -> None:
    """Write one file, see `SparseEmbeddings.save`."""
    _check_suffix(path)
    if values == "uint8" and path.suffix.lower() == ".npz":
        raise UsageError(f"{path}: scipy would read uint8 values as they are; use float16, or .parquet or .safetensors")
    writers = {".safetensors": _write_safetensors, ".npz": _write_npz, ".parquet": _write_parquet}
    encoded = _encode(rows, values)
    with atomic_file(path) as temporary:
        writers[path.suffix.lower()](temporary, rows, encoded, values)


def _write_safetensors(path: Path, rows: Arrays, encoded: dict[str, np.ndarray[Any, Any]], values: Values) -> None:
    from safetensors.numpy import save

    arrays = {"indptr": rows.indptr, **encoded, **_packed(rows)}
    path.write_bytes(save(arrays, metadata={HEADER: json.dumps(_header(rows) | {KEY: BLANK})}))
    add_checksum(path)


def _write_npz(path: Path, rows: Arrays, encoded: dict[str, np.ndarray[Any, Any]], values: Values) -> None:
    contents: dict[str, Any] = {  # scipy's names, so that scipy.sparse.load_npz reads the file
        "format": b"csr", "shape": np.array((len(rows.indptr) - 1, rows.dim)), "data": encoded["values"], "indices": rows.indices,
        "indptr": rows.indptr, "header": np.array(json.dumps(_header(rows))), **_packed(rows),
    }  # fmt: skip
    for save in (np.savez_compressed, np.savez):
        with open(path, "wb") as file:
            save(file, **contents)
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) <= most_bytes(path.stat().st_size):
                return


def _write_parquet(path: Path, rows: Arrays, encoded: dict[str, np.ndarray[Any, Any]], values: Values) -> None:
    table = arrow_table(rows, values)
    write_table(table, path)
    with open(path, "rb") as file:
        again = too_large(file, most_bytes(path.stat().st_size))
    if again:  # values so equal that they compress a hundredfold
        write_table(table, path, dense=True)


# --- reading -------------------------------------------------------------------------------------------------------------------------


def read(path: Path, sha256: str | None = None) -> Arrays:
    """Arrays of one file; they are not checked for being valid sparse rows.

    Args:
        path: the file.
        sha256: digest that the file must have.

    Raises:
        DataError: no such file, a damaged one, or one that asks for far more memory than its size.
        ModelError: a file of another kind or a newer format.
    """
    _check_suffix(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz, ".parquet": _read_parquet}
    try:
        with open(path, "rb") as file:  # as a file, not by name: Arrow takes names for URIs, and only in UTF-8
            if file.read(42) == b"version https://git-lfs.github.com/spec/v1":
                raise DataError("is a pointer of Git LFS, not the file itself; run `git lfs pull`")
            file.seek(0)
            if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise DataError("damaged or changed: its sha256 is not the one that was noted when it was written")
            file.seek(0)
            header, arrays, columns = readers[path.suffix.lower()](file)
        return _decoded(header, arrays, columns)
    except (DataError, ModelError) as error:
        raise type(error)(f"{path}: {error}") from error
    except MemoryError as error:
        raise DataError(f"{path}: does not fit into memory") from error
    except Exception as error:  # each reader has its own exceptions for damaged files
        raise DataError(f"{path}: damaged or not a file of sparse embeddings ({first_line(error)})") from error


def _decoded(header: Any, arrays: dict[str, Any], columns: dict[str, Any]) -> Arrays:
    """Check the header and decode ids and values. A file that another program wrote again has none (`NO_HEADER`)."""
    written_again = header is NO_HEADER
    if written_again:
        header = {"format": FORMAT, "meta": {}}
    if not isinstance(header, dict) or not isinstance(header.get("meta"), dict) or not {"indptr", "indices", "values"} <= set(arrays):
        raise DataError("damaged or not a file of sparse embeddings (unexpected header or arrays)")
    if header.get("format") not in (FORMAT, *OLDER_FORMATS):
        raise ModelError(f"format {str(header.get('format'))[:60]!r}, this version reads up to {FORMAT!r}; update rlpjepa_zoo")
    quantised = "scale" in arrays
    if header["format"] in OLDER_FORMATS and quantised != (header["format"] == OLDER_FORMATS[1]):
        raise DataError(f"damaged (format {header['format']!r} {'with' if quantised else 'without'} scales)")
    if quantised and number_array("values", arrays["values"]).dtype.kind == "f":
        raise DataError("values with a scale are codes 1 .. 255, got floats")
    values = _decode(arrays["values"], arrays["scale"], arrays["indptr"]) if quantised else arrays["values"]
    ids = unpack_text(arrays["id_text"], arrays["id_ends"]) if "id_text" in arrays else arrays["ids"]
    dim = None if written_again else header.get("dim") or 0
    return Arrays(arrays["indptr"], arrays["indices"], values, dim, ids, header["meta"], columns)


def _read_safetensors(file: BinaryIO) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from safetensors.numpy import load

    if is_intact(file) is False:
        raise DataError("damaged: its bytes are not those of its checksum; make it again")
    file.seek(0)
    content = file.read()
    arrays = dict(load(content))
    stored = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    header = json.loads(stored[HEADER])
    if "ids" not in arrays and "id_text" not in arrays:
        arrays["ids"] = header.get("ids", [])
    return header, arrays, unpack_columns(arrays.pop("columns")) if "columns" in arrays else {}


def _read_npz(file: BinaryIO) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        if (asked := sum(entry.file_size for entry in entries.values())) > most_bytes(size):
            raise DataError(f"asks for {asked:,} bytes of memory, the limit for a file of this size is {most_bytes(size):,}")
        if unknown := entries.keys() - _NPZ_ENTRIES:  # the CRC of an entry does not cover its name
            raise DataError(f"damaged or not embeddings: unexpected entry {min(unknown)[:60]!r}")
        arrays = {name: _npy(archive.read(entries[name])) for name in _NPZ_ENTRIES - {"format", "shape"} if name in entries}
    arrays["values"] = arrays.pop("data")
    columns = unpack_columns(arrays.pop("columns")) if "columns" in arrays else {}
    return json.loads(str(arrays.pop("header"))), arrays, columns


def _npy(content: bytes) -> np.ndarray[Any, Any]:
    """The array of one entry; its header must agree with the bytes that are there, before memory is asked for."""
    file = BytesIO(content)
    version = np.lib.format.read_magic(file)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, dtype = reader(file)
    if int(np.prod(shape, dtype=object)) * dtype.itemsize != len(content) - file.tell():
        raise DataError(f"damaged: an array of shape {shape} in {len(content) - file.tell()} bytes")
    file.seek(0)
    return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _read_parquet(file: BinaryIO) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return read_parquet(file, most_bytes(size))


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: expected a file ending in .safetensors, .npz or .parquet")
