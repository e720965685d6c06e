"""`SparseEmbeddings`: n non-negative sparse rows with ids and columns, as three CSR arrays. Needs numpy only; converters import their libraries."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from ..core.source import expanded
from ..errors import DataError, UsageError
from . import io
from .columns import column_dict
from .csr import check_csr, number_array
from .ids import id_array
from .io import Values

__all__ = ["SparseEmbeddings"]

log = logging.getLogger("rlpjepa_zoo")


class SparseEmbeddings:
    """Rows of non-negative numbers, few of them non-zero (compressed sparse rows).

    Args:
        indptr: (n + 1,) integers; row i owns entries indptr[i] : indptr[i + 1].
        indices: (nnz,) column of each entry, strictly increasing within a row.
        values: (nnz,) floats > 0, finite.
        dim: number of columns D.
        ids: n ids (paths, keys), all text or all integers, in a list or an array of numpy, pandas, polars or Arrow; 0 .. n - 1 when None.
        meta: str -> str provenance, saved with the rows; the key ``"model"`` names the encoder. Rows of different encoders cannot be
            concatenated.
        columns: further values of each row, such as the class label: name -> n values.

    Attributes:
        shape: (n, D).
        ids: (n,) array: int64, or Python strings (dtype object).
        columns: read-only mapping from names to (n,) arrays; indexing, concatenation and files keep them, equality does not look at them.
        nnz: number of stored entries.
        l0: mean over rows of the fraction of non-zeros, the *density*, in [0, 1].

    Raises:
        DataError: arrays that are not a valid non-negative CSR matrix; the message names the first bad row.

    Example:
        >>> e = SparseEmbeddings.from_dense([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]], ids=["a.png", "b.png"])
        >>> e.shape, e.nnz, round(e.l0, 2), e[1].ids.tolist(), e.top_k(1).to_dense().tolist()
        ((2, 3), 3, 0.5, ['b.png'], [[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    """

    __slots__ = ("_columns", "dim", "ids", "indices", "indptr", "meta", "values")

    def __init__(
        self,
        indptr: Any,
        indices: Any,
        values: Any,
        dim: int,
        ids: Any = None,
        meta: Mapping[str, str] | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        self.indptr, wide, self.values = (
            number_array("indptr", indptr, np.int64),
            number_array("indices", indices),
            number_array("values", values, np.float32),
        )
        if isinstance(dim, bool) or not isinstance(dim, int | np.integer):
            raise DataError(f"dim: expected an integer, got {dim!r}")
        self.dim = int(dim)
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in dict(meta or {}).items()):
            raise DataError("meta: expected text for every key and value")
        self.meta = dict(meta or {})
        check_csr(self.indptr, wide, self.values, self.dim)
        self.ids = id_array(ids, len(self))
        self._columns = column_dict(columns, len(self))
        self.indices = wide.astype(np.int32, copy=False)

    # --- construction ----------------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls, dense: Any, ids: Any = None, meta: Mapping[str, str] | None = None, columns: Mapping[str, Any] | None = None
    ) -> SparseEmbeddings:
        """From an (n, D) array or tensor; only exact zeros (and -0.0) are dropped.

        Raises:
            DataError: a negative or non-finite number, with its row.
        """
        if hasattr(dense, "detach"):
            dense = dense.detach().float().cpu().numpy()
        dense = np.asarray(dense, dtype=np.float32)
        if dense.ndim != 2:
            raise DataError(f"expected an (n, D) matrix, got shape {dense.shape}")
        rows, active = np.nonzero(dense)
        indptr = np.zeros(len(dense) + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=len(dense)), out=indptr[1:])
        return cls(indptr, active, dense[rows, active], dense.shape[1], ids, meta, columns)

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
            UsageError: no parts, different widths, kinds of ids or columns, or rows of different encoders.
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
        filled = [part for part in parts if len(part)] or parts[:1]
        if len({part.ids.dtype.kind == "O" for part in filled}) > 1:
            raise UsageError("concat: some parts have string ids, others integers")
        if len(names := {tuple(sorted(part.columns)) for part in filled}) > 1:
            raise UsageError(f"concat: the parts have different columns {sorted(names)}; with_columns({{}}) drops them")
        return cls(
            indptr,
            np.concatenate([part.indices for part in parts]),
            np.concatenate([part.values for part in parts]),
            parts[0].dim,
            np.concatenate([part.ids for part in filled]),
            meta,
            {name: np.concatenate([part.columns[name] for part in filled]) for name in filled[0].columns},
        )

    # --- access ---------------------------------------------------------------------------------------------------------------------

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
    def columns(self) -> Mapping[str, np.ndarray[Any, Any]]:
        return MappingProxyType(self._columns)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[SparseEmbeddings]:
        return (self[i] for i in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as saved: float32 values, int16 columns where they fit, int64 row starts; ids are not counted."""
        return self.indptr.nbytes + self.values.nbytes + self.indices.astype(io.index_dtype(self.dim)).nbytes

    def __repr__(self) -> str:
        return f"SparseEmbeddings(shape={self.shape}, nnz={self.nnz}, l0={self.l0:.4f})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseEmbeddings):
            return NotImplemented
        names = ("indptr", "indices", "values", "ids")
        return self.dim == other.dim and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray[Any, Any]) -> SparseEmbeddings:
        """Rows as a new object: an integer gives one row of shape (1, D); slices, index arrays and boolean masks give several rows."""
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
        columns = {name: values[rows] for name, values in self._columns.items()}
        return SparseEmbeddings(indptr, self.indices[entries], self.values[entries], self.dim, self.ids[rows], self.meta, columns)

    def _with(self, indptr: Any, entries: Any, values: Any = None) -> SparseEmbeddings:
        """The same rows with some of their entries."""
        values = self.values[entries] if values is None else values
        return SparseEmbeddings(indptr, self.indices[entries], values, self.dim, self.ids, self.meta, self._columns)

    def with_columns(self, columns: Mapping[str, Any]) -> SparseEmbeddings:
        """The same rows with these columns in place of the present ones; an empty mapping drops them."""
        return SparseEmbeddings(self.indptr, self.indices, self.values, self.dim, self.ids, self.meta, columns)

    def normalize(self) -> SparseEmbeddings:
        """Rows of length one (L2), so that inner products are cosines and a row finds itself first; rows of zeros stay zero.

        Example:
            >>> SparseEmbeddings.from_dense([[0.0, 2.0], [0.0, 0.0]]).normalize().to_dense().tolist()
            [[0.0, 1.0], [0.0, 0.0]]
        """
        rows = np.repeat(np.arange(len(self)), np.diff(self.indptr))
        values = self.values.astype(np.float64)
        lengths = np.sqrt(np.bincount(rows, values**2, minlength=len(self)))
        with np.errstate(under="ignore"):
            values = (values / lengths[rows]).astype(np.float32)
        keep = values > 0  # beside 1e30, 1e-30 is zero
        return self._with(np.concatenate([[0], np.cumsum(keep)])[self.indptr], np.flatnonzero(keep), values[keep])

    def at_least(self, value: float) -> SparseEmbeddings:
        """Keep the values >= `value`."""
        keep = self.values >= value
        indptr = np.concatenate([[0], np.cumsum(keep)])[self.indptr]
        return self._with(indptr, np.flatnonzero(keep))

    def top_k(self, k: int) -> SparseEmbeddings:
        """Keep the k largest values of each row (of equal ones, those of lower column); rows with fewer values do not change.

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
        return self._with(indptr, entries)

    # --- conversion ------------------------------------------------------------------------------------------------------------------

    def to_dense(self) -> np.ndarray[Any, Any]:
        """(n, D) float32 array."""
        dense = np.zeros(self.shape, dtype=np.float32)
        dense[np.repeat(np.arange(len(self)), np.diff(self.indptr)), self.indices] = self.values
        return dense

    def to_scipy(self) -> Any:
        """A `scipy.sparse.csr_array` of its own memory, float32, which scikit-learn accepts."""
        from scipy.sparse import csr_array

        rows = (
            self.indptr.astype(np.int32) if self.nnz < io.INT32_LIMIT else self.indptr
        )  # many scikit-learn functions take 32-bit indices only
        return csr_array((self.values, self.indices, rows), shape=self.shape, copy=True)

    def to_torch(self, layout: Literal["csr", "coo"] = "csr") -> Any:
        """A torch sparse tensor, float32. torch CSR can neither be sliced nor concatenated; this class can.

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
        """A `pyarrow.Table` with id, indices (lists of int16 or int32), values (lists of numbers) and the further columns, as `save` writes it."""
        return io.arrow_table(self._arrays(), values)

    # --- files -----------------------------------------------------------------------------------------------------------------------

    def _arrays(self) -> io.Arrays:
        return io.Arrays(self.indptr, self.indices, self.values, self.dim, self.ids, self.meta, self._columns)

    def save(self, path: str | Path, values: Values = "float32") -> Path:
        """Write one file, atomically; the suffix sets the format: ``.safetensors``, ``.npz`` (scipy.sparse.load_npz opens it too) or ``.parquet``.

        Every file carries a checksum, which `load` verifies.

        Args:
            path: the file.
            values: ``float32`` is exact; ``float16`` halves the values and refuses what it cannot hold; ``uint8`` stores 1 .. 255 times
                a scale of each row (not in .npz): an error of at most 1/510 of the row's largest value, 1/255 for the smallest, which stay above 0.

        Raises:
            UsageError: another suffix.
            OutputError: the folder is missing, full or read-only.
        """
        io.write(self._arrays(), path := expanded(path), values)
        return path

    @classmethod
    def load(cls, path: str | Path, dim: int | None = None) -> SparseEmbeddings:
        """Read what `save` wrote, or all parts of a folder that `rlpjepa embed --out DIR` wrote; every file is checked like the arguments.

        Also reads a parquet file that pandas, polars or datasets wrote again, with columns id, indices, values and others in any order. Such a
        file does not tell D. Without `dim`, D is the largest column that occurs, plus one, and a warning says so.

        Args:
            path: the file or folder. `rlpjepa_zoo.load_embeddings` also takes a repository on the Hub.
            dim: D; refused if the file tells another.

        Raises:
            DataError: no such file, a damaged one, or a folder that is not finished.
            ModelError: a file of another kind or a newer format.
            UsageError: parts of different encoders, or another `dim`.
        """
        if str(path).startswith("hf-hub:"):
            raise UsageError(f"{path}: SparseEmbeddings.load reads local files; rlpjepa_zoo.load_embeddings('{path}') reads from the Hub")
        path = expanded(path)
        parts: list[tuple[Path, str | None]] = [(path, None)]
        if path.is_dir():
            from . import folder

            dim, parts = folder.verified_parts(path, dim)
        found = [(part, io.read(part, sha256)) for part, sha256 in parts]
        widths = [arrays.dim for _, arrays in found if arrays.dim is not None]
        if dim is not None and any(width != dim for width in widths):
            raise UsageError(f"{path}: has width {next(width for width in widths if width != dim)}, not {dim}")
        if dim is None and not widths:
            dim = max(int(np.max(arrays.indices, initial=0)) for _, arrays in found) + 1
            log.warning("%s: was written by another program and does not tell the width; taken as %d, or give dim=", path, dim)
        return cls.concat([cls._checked(part, arrays, widths[0] if dim is None else dim) for part, arrays in found])

    @classmethod
    def _checked(cls, path: Path, arrays: io.Arrays, dim: int) -> SparseEmbeddings:
        try:
            return cls(*(arrays if arrays.dim is not None else arrays._replace(dim=dim)))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
