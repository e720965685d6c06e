"""`SparseEmbeddings`: n non-negative sparse rows with their ids, as three CSR arrays. Needs numpy only; converters import their libraries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError, UsageError
from . import io
from .io import Values, number_array

__all__ = ["SparseEmbeddings"]


class SparseEmbeddings:
    """Rows of non-negative numbers, few of them non-zero (compressed sparse rows).

    Args:
        indptr: (n + 1,) integers; row i owns entries indptr[i] : indptr[i + 1].
        indices: (nnz,) column of each entry, strictly increasing within a row.
        values: (nnz,) floats > 0, finite.
        dim: number of columns D.
        ids: n ids (paths, keys), all strings or all integers; 0 .. n - 1 when None.
        meta: str -> str provenance, saved with the rows; the key ``"model"`` names the encoder. Rows of different encoders cannot be
            concatenated.

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
            rising = np.diff(indices.astype(np.int64, copy=False)) > 0
            rising[p[1:-1][(p[1:-1] > 0) & (p[1:-1] < len(indices))] - 1] = (
                True  # the first column of a row may be lower than the last of the row before
            )
            bad[1:] |= ~rising
        if bad.any():
            entry = int(np.flatnonzero(bad)[0])
            row = int(np.searchsorted(p, entry, side="right")) - 1
            raise DataError(
                f"row {row}: column {indices[entry]} with value {v[entry]}; expected rising columns below {self.dim} and finite values > 0"
            )

    # --- construction ----------------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_dense(cls, dense: Any, ids: Any = None, meta: Mapping[str, str] | None = None) -> SparseEmbeddings:
        """From an (n, D) array or tensor; only exact zeros (and -0.0) are dropped.

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
        return self._with(indptr, entries, self.ids[rows])

    def _with(self, indptr: Any, entries: Any, ids: Any) -> SparseEmbeddings:
        return SparseEmbeddings(indptr, self.indices[entries], self.values[entries], self.dim, ids, self.meta)

    def at_least(self, value: float) -> SparseEmbeddings:
        """Keep the values >= `value`."""
        keep = self.values >= value
        indptr = np.concatenate([[0], np.cumsum(keep)])[self.indptr]
        return self._with(indptr, np.flatnonzero(keep), self.ids)

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
        return self._with(indptr, entries, self.ids)

    # --- conversion ------------------------------------------------------------------------------------------------------------------

    def to_dense(self) -> np.ndarray[Any, Any]:
        """(n, D) float32 array."""
        dense = np.zeros(self.shape, dtype=np.float32)
        dense[np.repeat(np.arange(len(self)), np.diff(self.indptr)), self.indices] = self.values
        return dense

    def to_scipy(self) -> Any:
        """`scipy.sparse.csr_array`, float32, which scikit-learn accepts."""
        from scipy.sparse import csr_array

        rows = (
            self.indptr.astype(np.int32) if self.nnz < io.INT32_LIMIT else self.indptr
        )  # many scikit-learn functions take 32-bit indices only
        return csr_array((self.values, self.indices, rows), shape=self.shape)

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
        """A `pyarrow.Table` with columns id, indices (lists of int16 or int32) and values (lists of numbers), as `save` writes it."""
        return io.arrow_table(self._arrays(), values)

    # --- files -----------------------------------------------------------------------------------------------------------------------

    def _arrays(self) -> io.Arrays:
        return io.Arrays(self.indptr, self.indices, self.values, self.dim, self.ids, self.meta)

    def save(self, path: str | Path, values: Values = "float32") -> Path:
        """Write one file, atomically; the suffix sets the format: ``.safetensors``, ``.npz`` (scipy.sparse.load_npz opens it too) or ``.parquet``.

        Args:
            path: the file.
            values: ``float32`` is exact; ``float16`` halves the values and refuses what it cannot hold; ``uint8`` stores 1 .. 255 times
                a scale of each row (not in .npz): an error of at most 1/510 of the row's largest value, 1/255 for the smallest, which stay above 0.

        Raises:
            UsageError: another suffix.
            OutputError: the folder is missing, full or read-only.
        """
        path = Path(path)
        io.write(self._arrays(), path, values)
        return path

    @classmethod
    def load(cls, path: str | Path) -> SparseEmbeddings:
        """Read what `save` wrote, or all parts of a folder that `rlpjepa embed --out DIR` wrote; every file is checked like the arguments.

        Raises:
            DataError: no such file, a damaged one, or a folder that is not finished.
            ModelError: a file of another kind or a newer format.
            UsageError: parts of different encoders.
        """
        path = Path(path)
        if path.is_dir():
            return cls.concat([cls.load(part) for part in io.part_files(path)])
        arrays = io.read(path)
        try:
            return cls(*arrays)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
