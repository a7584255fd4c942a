"""Sparse rows, as scipy's ``csr_matrix`` holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ArgumentError, DTypeError, NonFiniteError, ShapeError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class SparseRows:
    """Rows of few elements that are not zero.

    Attributes:
        data: float64 or float32 values.
        indices: int32 column of each value, ascending within a row.
        indptr: int64; row i is ``indptr[i]`` to ``indptr[i + 1]``.
        shape: rows and columns.
    """

    data: Array
    indices: Array
    indptr: Array
    shape: tuple[int, int]

    @property
    def nnz(self) -> int:
        """Stored values."""
        return len(self.data)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        return np.dtype(self.data.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def to_scipy(self) -> Any:
        """As ``scipy.sparse.csr_matrix``, sharing the memory."""
        from scipy.sparse import csr_matrix

        return csr_matrix((self.data, self.indices, self.indptr), shape=self.shape)

    def toarray(self) -> Array:
        """As a dense array."""
        out = np.zeros(self.shape, dtype=self.data.dtype)
        out[np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)), self.indices] = self.data
        return out

    def take(self, columns: Array) -> SparseRows:
        """Only some columns, in the order given."""
        place = np.full(self.shape[1], -1, dtype=np.int64)
        place[columns] = np.arange(len(columns))
        found = place[self.indices]
        kept = found >= 0
        ends = np.concatenate([[0], np.cumsum(kept)])[self.indptr]
        rows = np.repeat(np.arange(self.shape[0]), np.diff(ends))
        order = np.lexsort((found[kept], rows))
        indices = found[kept][order].astype(np.int32)
        return SparseRows(self.data[kept][order], indices, ends.astype(np.int64), (self.shape[0], len(columns)))

    def __repr__(self) -> str:
        return f"SparseRows(shape={self.shape}, nnz={self.nnz}, dtype={self.dtype})"


def sparse_rows(x: Any, arg: str = "x") -> SparseRows:
    """A scipy sparse matrix, :class:`SparseRows` or a dense 2-d array as float64 sparse rows.

    Raises:
        ShapeError: not two-dimensional. DTypeError: not numbers. NonFiniteError: NaN or infinity.
        ArgumentError: offsets or columns that do not fit.
    """
    if not isinstance(x, SparseRows) and hasattr(x, "tocsr"):
        x = x.tocsr()
        if not x.has_sorted_indices or not x.has_canonical_format:
            x = x.copy()
            x.sum_duplicates()
    if hasattr(x, "indptr"):
        data = np.ascontiguousarray(x.data, dtype=np.float64)
        indices = np.ascontiguousarray(x.indices, dtype=np.int32)
        indptr = np.ascontiguousarray(x.indptr, dtype=np.int64)
        rows = SparseRows(data, indices, indptr, (int(x.shape[0]), int(x.shape[1])))
        if len(indptr) != rows.shape[0] + 1 or len(indices) != len(data):
            raise ArgumentError(f"{arg}: expected offsets of {rows.shape[0]} rows and a column per value")
    else:
        try:
            dense = np.asarray(x, dtype=np.float64)
        except (TypeError, ValueError) as err:
            raise DTypeError(f"{arg}: expected numbers, got {x!r:.80}") from err
        if dense.ndim != 2:
            raise ShapeError(f"{arg}: expected two dimensions, got shape {dense.shape}")
        where, columns = np.nonzero(dense)
        indptr = np.searchsorted(where, np.arange(dense.shape[0] + 1)).astype(np.int64)
        rows = SparseRows(dense[where, columns], columns.astype(np.int32), indptr, (dense.shape[0], dense.shape[1]))
    if not np.isfinite(rows.data).all():
        bad = int((~np.isfinite(rows.data)).argmax())
        row = int(np.searchsorted(rows.indptr, bad, side="right")) - 1
        raise NonFiniteError(f"{arg}: non-finite value {rows.data[bad]} in row {row}")
    return rows
