"""Checks of arrays that are to be compressed sparse rows (CSR)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import DataError

__all__ = ["check_csr", "number_array"]


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


def check_csr(indptr: np.ndarray[Any, Any], indices: np.ndarray[Any, Any], values: np.ndarray[Any, Any], dim: int) -> None:
    """Check that arrays are a non-negative matrix of compressed sparse rows with rising columns and no stored zeros.

    Raises:
        DataError: they are not; the message names the first bad row.
    """
    p, v = indptr, values
    if p.ndim != 1 or len(p) < 1 or p[0] != 0 or p[-1] != len(indices) or len(indices) != len(v):
        raise DataError(
            f"indptr, indices and values do not fit together: lengths {len(p)}, {len(indices)}, {len(v)}, last indptr {p[-1:].tolist()}"
        )
    if (np.diff(p) < 0).any():
        raise DataError(f"row {int(np.flatnonzero(np.diff(p) < 0)[0])}: indptr decreases")
    if not 0 < dim < 2**31:
        raise DataError(f"dim: expected 1 .. 2^31 - 1, got {dim}")
    bad = ~(np.isfinite(v) & (v > 0))
    if indices.dtype.kind not in "iu" and len(indices):
        raise DataError(f"indices: expected integers, got {indices.dtype}")
    bad |= (indices < 0) | (indices >= dim)
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
            f"row {row}: column {indices[entry]} with value {v[entry]}; expected rising columns below {dim} and finite values > 0"
        )
