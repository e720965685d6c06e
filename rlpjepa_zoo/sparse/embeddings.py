"""`SparseEmbeddings`: n non-negative sparse rows with their ids, as three CSR arrays. numpy only; converters import what they need."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..core.files import whole_file
from ..errors import DataError, ModelError, UsageError

__all__ = ["SparseEmbeddings"]

_FORMAT = "rlpjepa_zoo.sparse/1"
_QUANTISED = "rlpjepa_zoo.sparse/2"
"""Of files with uint8 values, which readers of the first format would take for the values themselves."""

Values = Literal["float32", "float16", "uint8"]


class SparseEmbeddings:
    """Rows of non-negative numbers of which few are non-zero (compressed sparse rows).

    Args:
        indptr: (n + 1,) integers; row i owns entries indptr[i] : indptr[i + 1].
        indices: (nnz,) column of each entry, strictly increasing within a row.
        values: (nnz,) floats > 0, finite.
        dim: number of columns D.
        ids: n ids, all strings or all integers (paths, keys); 0 .. n - 1 when None.
        meta: str -> str provenance that travels with the rows; the key ``"model"`` names the encoder, and rows of two encoders
            do not mix.

    Attributes:
        shape: (n, D).
        nnz: number of stored entries.
        l0: mean over rows of the fraction of non-zeros, the *density*, in [0, 1].

    Raises:
        DataError: arrays that are not a valid non-negative CSR matrix; the message names the first bad row.

    Example:
        >>> e = SparseEmbeddings.from_dense([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]], ids=["a.png", "b.png"])
        >>> e.shape, e.nnz, round(e.l0, 2), e[1].ids.tolist(), e.top_k(1).to_dense().tolist()
        ((2, 3), 3, 0.5, ['b.png'], [[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    """

    __slots__ = ("dim", "ids", "indices", "indptr", "meta", "values")

    def __init__(
        self,
        indptr: Any,
        indices: Any,
        values: Any,
        dim: int,
        ids: Sequence[str] | Sequence[int] | np.ndarray[Any, Any] | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> None:
        self.indptr, wide, self.values = (
            _vector("indptr", indptr, np.int64),
            _vector("indices", indices),
            _vector("values", values, np.float32),
        )
        if isinstance(dim, bool) or not isinstance(dim, int | np.integer):
            raise DataError(f"dim: expected an integer, got {dim!r}")
        self.dim = int(dim)
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in dict(meta or {}).items()):
            raise DataError("meta: expected text for every key and value")
        self.meta = dict(meta or {})
        n = len(self.indptr) - 1
        self.ids = np.arange(n) if ids is None or np.size(ids) == n == 0 else np.asarray(ids)
        if self.ids.dtype.kind == "U" and not isinstance(ids, np.ndarray) and not all(isinstance(i, str) for i in ids or ()):
            raise DataError("ids: expected all strings or all integers, got both")
        self._check(wide)
        self.indices = wide.astype(np.int32, copy=False)

    def _check(self, indices: np.ndarray[Any, Any]) -> None:
        p, v = self.indptr, self.values
        if p.ndim != 1 or len(p) < 1 or p[0] != 0 or p[-1] != len(indices) or len(indices) != len(v):
            raise DataError(
                f"indptr, indices and values do not fit together: lengths {len(p)}, {len(indices)}, {len(v)}, last indptr {p[-1:].tolist()}"
            )
        if (np.diff(p) < 0).any():
            raise DataError(f"row {int(np.flatnonzero(np.diff(p) < 0)[0])}: indptr decreases")
        if not 0 < self.dim < 2**31:
            raise DataError(f"dim: expected 1 .. 2^31 - 1, got {self.dim}")
        if self.ids.ndim != 1 or len(self.ids) != len(p) - 1 or self.ids.dtype.kind not in "iuU":
            raise DataError(f"ids: expected {len(p) - 1} strings or {len(p) - 1} integers, got {self.ids.dtype} of shape {self.ids.shape}")
        bad = ~(np.isfinite(v) & (v > 0))
        if indices.dtype.kind not in "iu" and len(indices):
            raise DataError(f"indices: expected integers, got {indices.dtype}")
        bad |= (indices < 0) | (indices >= self.dim)
        if len(indices) > 1:
            rises = np.diff(indices.astype(np.int64, copy=False)) > 0
            rises[p[1:-1][(p[1:-1] > 0) & (p[1:-1] < len(indices))] - 1] = True  # a new row may start lower
            bad[1:] |= ~rises
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            row = int(np.searchsorted(p, at, side="right")) - 1
            raise DataError(
                f"row {row}: column {indices[at]} with value {v[at]}; expected rising columns below {self.dim} and finite values > 0"
            )

    # --- making ----------------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_dense(cls, dense: Any, ids: Any = None, meta: Mapping[str, str] | None = None) -> SparseEmbeddings:
        """From an (n, D) array or tensor; exact zeros (and -0.0) are dropped, everything else is kept.

        Raises:
            DataError: a negative or non-finite number, with its row.
        """
        if hasattr(dense, "detach"):
            dense = dense.detach().float().cpu().numpy()
        dense = np.asarray(dense, dtype=np.float32)
        if dense.ndim != 2:
            raise DataError(f"expected an (n, D) matrix, got shape {dense.shape}")
        rows, columns = np.nonzero(dense)
        indptr = np.zeros(len(dense) + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=len(dense)), out=indptr[1:])
        return cls(indptr, columns, dense[rows, columns], dense.shape[1], ids, meta)

    @classmethod
    def from_scipy(cls, matrix: Any, ids: Any = None, meta: Mapping[str, str] | None = None) -> SparseEmbeddings:
        """From any scipy sparse matrix or array; explicit zeros are dropped and columns sorted."""
        matrix = matrix.tocsr(copy=True)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        return cls(matrix.indptr, matrix.indices, matrix.data, matrix.shape[1], ids, meta)

    @classmethod
    def concat(cls, parts: Iterable[SparseEmbeddings]) -> SparseEmbeddings:
        """Stack rows in the given order.

        Raises:
            UsageError: no parts, different widths, or rows of different encoders.
        """
        if isinstance(parts, SparseEmbeddings):
            raise UsageError("concat: expected a list, as in SparseEmbeddings.concat([a, b])")
        parts = list(parts)
        if not parts:
            raise UsageError("concat: expected at least one part, got none")
        models = {part.meta["model"] for part in parts if "model" in part.meta}
        if len({part.dim for part in parts}) > 1 or len(models) > 1:
            raise UsageError(
                f"concat: rows of different encoders do not mix: widths {sorted({p.dim for p in parts})}, models {sorted(models)}"
            )
        starts = np.cumsum([0] + [part.nnz for part in parts])
        indptr = np.concatenate([[0]] + [part.indptr[1:] + start for part, start in zip(parts, starts, strict=False)])
        meta = {k: v for k, v in parts[0].meta.items() if all(part.meta.get(k) == v for part in parts)}
        ids = [part.ids for part in parts]
        if len({part.ids.dtype.kind == "U" for part in parts if len(part)}) > 1:
            raise UsageError("concat: some parts have string ids, others integers")
        return cls(
            indptr,
            np.concatenate([part.indices for part in parts]),
            np.concatenate([part.values for part in parts]),
            parts[0].dim,
            np.concatenate([i for i in ids if len(i)] or ids[:1]),
            meta,
        )

    # --- looking ---------------------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.indptr) - 1, self.dim

    @property
    def nnz(self) -> int:
        return len(self.values)

    @property
    def l0(self) -> float:
        n, dim = self.shape
        return self.nnz / (n * dim) if n else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as they are saved: values float32, columns int16 where they fit, row starts int64 (ids not counted)."""
        return self.indptr.nbytes + self.values.nbytes + self.indices.astype(_index_dtype(self.dim)).nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[SparseEmbeddings]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"SparseEmbeddings(shape={self.shape}, nnz={self.nnz}, l0={self.l0:.4f})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseEmbeddings):
            return NotImplemented
        names = ("indptr", "indices", "values", "ids")
        return self.dim == other.dim and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray[Any, Any]) -> SparseEmbeddings:
        """Rows as a new object: an integer gives one row of shape (1, D); slices, index arrays and boolean masks give several."""
        n = len(self)
        if isinstance(index, int | np.integer):
            if not -n <= index < n:
                raise IndexError(f"row {index} of {n}")
            index = [int(index)]
        rows = np.atleast_1d(np.arange(n)[index])
        if rows.ndim != 1:
            raise IndexError(f"rows are chosen by one index, got {rows.ndim} dimensions")
        counts = np.diff(self.indptr)[rows]
        indptr = np.concatenate([[0], np.cumsum(counts)])
        entries = np.repeat(self.indptr[rows] - indptr[:-1], counts) + np.arange(indptr[-1])
        return self._with(indptr, entries, self.ids[rows])

    def _with(self, indptr: Any, entries: Any, ids: Any) -> SparseEmbeddings:
        return SparseEmbeddings(indptr, self.indices[entries], self.values[entries], self.dim, ids, self.meta)

    def top_k(self, k: int) -> SparseEmbeddings:
        """Keep the k largest values of each row (of equal ones, those of lower column); rows with fewer keep what they have.

        Raises:
            UsageError: k < 1.
        """
        if k < 1:
            raise UsageError(f"top_k: expected k >= 1, got {k}")
        rows = np.repeat(np.arange(len(self)), np.diff(self.indptr))
        order = np.lexsort((self.indices, -self.values, rows))
        rank = np.arange(self.nnz) - self.indptr[rows]
        entries = np.sort(order[rank < k])
        indptr = np.concatenate([[0], np.cumsum(np.minimum(np.diff(self.indptr), k))])
        return self._with(indptr, entries, self.ids)

    def at_least(self, value: float) -> SparseEmbeddings:
        """Keep the values that are not below `value`."""
        kept = self.values >= value
        indptr = np.concatenate([[0], np.cumsum(kept)])[self.indptr]
        return self._with(indptr, np.flatnonzero(kept), self.ids)

    # --- converting ------------------------------------------------------------------------------------------------------------------

    def to_dense(self) -> np.ndarray[Any, Any]:
        """(n, D) float32 array."""
        dense = np.zeros(self.shape, dtype=np.float32)
        dense[np.repeat(np.arange(len(self)), np.diff(self.indptr)), self.indices] = self.values
        return dense

    def to_scipy(self) -> Any:
        """`scipy.sparse.csr_array`, float32, which scikit-learn takes as it is."""
        from scipy.sparse import csr_array

        rows = self.indptr.astype(np.int32) if self.nnz < 2**31 else self.indptr  # much of scikit-learn takes 32-bit indices only
        return csr_array((self.values, self.indices, rows), shape=self.shape)

    def to_torch(self, layout: Literal["csr", "coo"] = "csr") -> Any:
        """A torch sparse tensor, float32. Prefer this class for slicing and joining: torch CSR can do neither.

        Raises:
            UsageError: another layout.
        """
        import warnings

        import torch

        if layout not in ("csr", "coo"):
            raise UsageError(f"to_torch: layout must be 'csr' or 'coo', got {layout!r}")
        columns, values = torch.from_numpy(self.indices.astype(np.int64)), torch.from_numpy(self.values.copy())
        if layout == "coo":
            rows = torch.from_numpy(np.repeat(np.arange(len(self)), np.diff(self.indptr)))
            return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, self.shape, is_coalesced=True, check_invariants=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
            return torch.sparse_csr_tensor(torch.from_numpy(self.indptr.copy()), columns, values, self.shape, check_invariants=True)

    def to_arrow(self, values: Values = "float32") -> Any:
        """A `pyarrow.Table` with columns id, indices (lists of int16 or int32) and values (lists of numbers), as `save` writes it."""
        import pyarrow as pa

        try:
            names = pa.array(self.ids.tolist(), pa.string() if self.ids.dtype.kind == "U" else pa.int64())
        except UnicodeEncodeError as error:
            raise DataError("an id is not valid UTF-8 text, which Arrow and Parquet need; save as .npz or .safetensors") from error
        except OverflowError as error:
            raise DataError("an id is above 2^63 - 1, which Arrow and Parquet do not hold; use text") from error
        lists, offsets = (
            (pa.ListArray, pa.array(self.indptr.astype(np.int32))) if self.nnz < 2**31 else (pa.LargeListArray, pa.array(self.indptr))
        )
        columns = {name: pa.array(array) for name, array in self._stored(values).items()}
        for name in ("indices", "values"):
            columns[name] = lists.from_arrays(offsets, columns[name])
        return pa.table({"id": names, **columns}).replace_schema_metadata({"rlpjepa_zoo": json.dumps(self._header(values))})

    def _stored(self, values: str) -> dict[str, np.ndarray[Any, Any]]:
        """Columns and values as they are written; with uint8, value = stored * scale of the row, and the smallest stored value is 1."""
        columns = {"indices": self.indices.astype(_index_dtype(self.dim))}
        if values == "uint8":
            counts = np.diff(self.indptr)
            largest = np.zeros(len(self), np.float32)
            largest[counts > 0] = np.maximum.reduceat(self.values, self.indptr[:-1][counts > 0]) if self.nnz else 0
            scale = np.maximum(largest / np.float32(255), np.float32(1e-38))
            return {**columns, "values": np.clip(np.rint(self.values / np.repeat(scale, counts)), 1, 255).astype(np.uint8), "scale": scale}
        if values not in ("float32", "float16"):
            raise UsageError(f"values: expected 'float32', 'float16' or 'uint8', got {values!r}")
        with np.errstate(over="ignore"):
            out = self.values.astype(values)
        if not np.isfinite(out).all() or (out == 0).any():
            raise DataError("values do not fit into float16 (range 6e-8 .. 65504); save as float32")
        return {**columns, "values": out}

    # --- files -----------------------------------------------------------------------------------------------------------------------

    def _header(self, values: str) -> dict[str, Any]:
        return {"format": _QUANTISED if values == "uint8" else _FORMAT, "dim": self.dim, "meta": self.meta}

    def save(self, path: str | Path, values: Values = "float32") -> Path:
        """Write one file, atomically; the ending chooses the format: ``.safetensors``, ``.npz`` (scipy.sparse.load_npz opens it too) or ``.parquet``.

        Args:
            values: ``float32`` keeps every bit; ``float16`` halves the values and refuses what it cannot hold; ``uint8`` stores 1 .. 255 times
                a scale of each row (not in .npz): an error of at most 1/510 of the row's largest value, 1/255 for the smallest, which stay above 0.

        Raises:
            UsageError: another ending.
            OutputError: the folder is missing, full or read-only.
        """
        path = Path(path)
        _check_ending(path)
        if values == "uint8" and path.suffix == ".npz":
            raise UsageError(f"{path}: scipy would read uint8 values as they are; use float16, or .parquet or .safetensors")
        stored = self._stored(values)
        with whole_file(path) as aside:
            getattr(self, f"_write_{path.suffix[1:]}")(aside, stored, values)
        return path

    def _write_safetensors(self, path: Path, stored: dict[str, np.ndarray[Any, Any]], values: str) -> None:
        from safetensors.numpy import save

        strings = self.ids.dtype.kind == "U"
        arrays = {"indptr": self.indptr, **stored} | ({} if strings else {"ids": self.ids.astype(np.int64)})
        header = self._header(values) | ({"ids": self.ids.tolist()} if strings else {})
        path.write_bytes(save(arrays, metadata={"rlpjepa_zoo": json.dumps(header)}))

    def _write_npz(self, path: Path, stored: dict[str, np.ndarray[Any, Any]], values: str) -> None:
        arrays = {
            "data": stored["values"],
            "indices": self.indices,
            "indptr": self.indptr,
        }  # scipy's names, so scipy.sparse.load_npz reads it
        extra = {"ids": self.ids, "header": np.array(json.dumps(self._header(values)))}
        with open(path, "wb") as file:
            parts: dict[str, Any] = {"format": b"csr", "shape": np.array(self.shape), **arrays, **extra}
            np.savez_compressed(file, **parts)

    def _write_parquet(self, path: Path, stored: dict[str, np.ndarray[Any, Any]], values: Values) -> None:
        import pyarrow.parquet as pq

        pq.write_table(self.to_arrow(values), path, compression="zstd")

    @classmethod
    def load(cls, path: str | Path) -> SparseEmbeddings:
        """Read what `save` wrote, or all parts of a folder that `rlpjepa embed --out DIR` wrote; every file is checked as the constructor checks.

        Raises:
            DataError: no such file, one that is damaged, or a folder that is not finished.
            ModelError: a file of another kind or a newer format.
            UsageError: parts of different encoders.
        """
        path = Path(path)
        if path.is_dir():
            return cls.concat([cls.load(part) for part in _parts(path)])
        _check_ending(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        try:
            header, arrays = getattr(cls, f"_read_{path.suffix[1:]}")(path)
        except (DataError, ModelError):
            raise
        except Exception as error:  # each reader has its own zoo of exceptions for damaged files
            raise DataError(
                f"{path}: damaged or not a file of sparse embeddings ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from error
        if not isinstance(header, dict) or not isinstance(header.get("meta"), dict) or not {"indptr", "indices", "values"} <= set(arrays):
            raise DataError(f"{path}: damaged or not a file of sparse embeddings (its header or its arrays are not theirs)")
        if header.get("format") not in (_FORMAT, _QUANTISED):
            raise ModelError(
                f"{path}: format {header.get('format')!r}, this version reads {_FORMAT!r} and {_QUANTISED!r}; update rlpjepa_zoo"
            )
        if (header["format"] == _QUANTISED) != ("scale" in arrays):
            raise DataError(
                f"{path}: damaged (format {header['format']!r} {'without' if header['format'] == _QUANTISED else 'with'} scales)"
            )
        try:
            values = arrays["values"]
            if "scale" in arrays:
                values = _scaled(values, arrays["scale"], arrays["indptr"])
            return cls(arrays["indptr"], arrays["indices"], values, header.get("dim", 0), arrays["ids"], header["meta"])
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @staticmethod
    def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["rlpjepa_zoo"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        arrays.setdefault("ids", np.array(header.get("ids", []), dtype=str))
        return header, arrays

    @staticmethod
    def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("indptr", "indices", "ids")} | {"values": file["data"]}
            return json.loads(str(file["header"])), arrays

    @staticmethod
    def _read_parquet(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        import pyarrow.parquet as pq

        table = pq.read_table(path, memory_map=False)
        header = json.loads((table.schema.metadata or {})[b"rlpjepa_zoo"])
        rows, cells = table["indices"].combine_chunks(), table["values"].combine_chunks()
        if not rows.offsets.equals(cells.offsets):
            raise DataError(f"{path}: indices and values have rows of different lengths")
        ids = table["id"].to_pylist()
        scale = {"scale": table["scale"].to_numpy()} if "scale" in table.column_names else {}
        return header, scale | {
            "indptr": rows.offsets.to_numpy() - rows.offsets[0].as_py(),
            "indices": rows.flatten().to_numpy(zero_copy_only=False),
            "values": cells.flatten().to_numpy(zero_copy_only=False),
            "ids": np.array(ids, dtype=str if ids and isinstance(ids[0], str) else np.int64),
        }


def _vector(name: str, values: Any, dtype: Any = None) -> np.ndarray[Any, Any]:
    """One-dimensional array of integers or numbers, refused when it is not that or does not fit the type."""
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


def _parts(folder: Path) -> list[Path]:
    """The parquet files of a folder of embeddings, all of them."""
    found = sorted(folder.glob("data/*.parquet"))
    if not found:
        raise DataError(f"{folder}: no data/*.parquet, so not a folder of embeddings; expected one that `rlpjepa embed --out DIR` wrote")
    record = folder / "embeddings.json"
    try:
        said = json.loads(record.read_text())["result"]["parts"] if record.is_file() else len(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not finished; run the same `rlpjepa embed` again, or load the parts you want one by one") from error
    if said != len(found):
        raise DataError(f"{folder}: {len(found)} parts, {said} were written; run the same `rlpjepa embed` again")
    return found


def _check_ending(path: Path) -> None:
    if path.suffix not in (".safetensors", ".npz", ".parquet"):
        raise UsageError(f"{path}: expected a file ending in .safetensors, .npz or .parquet")


def _scaled(stored: Any, scale: Any, indptr: Any) -> np.ndarray[Any, Any]:
    """Values of uint8 files."""
    stored, scale = _vector("values", stored), _vector("scale", scale, np.float32)
    counts = np.diff(_vector("indptr", indptr, np.int64))
    if len(scale) != len(counts) or (counts < 0).any() or counts.sum() != len(stored):
        raise DataError(f"scale: expected one for each of {len(counts)} rows, got {len(scale)}")
    return stored.astype(np.float32) * np.repeat(scale, counts)


def _index_dtype(dim: int) -> type[np.signedinteger[Any]]:
    return np.int16 if dim <= 2**15 else np.int32
