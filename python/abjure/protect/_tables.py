"""Tables of pandas, polars, Arrow, mappings of columns and plain arrays: read as columns, given back as they came."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .. import _interop
from ..errors import DTypeError, NonFiniteError, ShapeError

Array = np.ndarray[Any, Any]
Kind = Literal["numpy", "torch", "pandas", "polars", "arrow", "mapping"]


@dataclass(frozen=True)
class Table:
    """Columns by name: numbers as f64, everything else as objects."""

    names: list[str]
    columns: list[Array]
    kind: Kind
    #: Rows' labels, of pandas.
    index: Any = None

    @property
    def rows(self) -> int:
        return len(self.columns[0]) if self.columns else 0

    @property
    def is_numeric(self) -> list[bool]:
        return [c.dtype.kind == "f" for c in self.columns]


def is_table(x: Any) -> bool:
    """Whether ``x`` has named columns."""
    return _kind(x) not in ("numpy", "torch")


def _kind(x: Any) -> Kind:
    for module, name, kind in (
        ("pandas", "DataFrame", "pandas"),
        ("polars", "DataFrame", "polars"),
        ("pyarrow", "Table", "arrow"),
        ("pyarrow", "RecordBatch", "arrow"),
    ):
        found = sys.modules.get(module)
        if found is not None and isinstance(x, getattr(found, name)):
            return kind  # type: ignore[return-value]
    if isinstance(x, Mapping):
        return "mapping"
    return "torch" if _interop.is_torch(x) else "numpy"


def read_table(x: Any, arg: str = "x") -> Table:
    """The columns of a table or of a matrix (then named ``x0``, ``x1``, …).

    Raises:
        DTypeError: no table and no array of two axes, or a column of dates or complex numbers.
        ShapeError: no column, or columns of different lengths.
        NonFiniteError: a missing or infinite number. (A missing category is a category.)
    """
    kind = _kind(x)
    index = None
    if kind == "pandas":
        names = [str(c) for c in x.columns]
        columns = [np.asarray(x.iloc[:, i]) for i in range(len(names))]
        index = x.index
    elif kind == "polars":
        names = list(x.columns)
        columns = [_from_polars(x[name]) for name in names]
    elif kind == "arrow":
        names = [str(n) for n in x.schema.names]
        columns = [_from_arrow(x.column(i)) for i in range(len(names))]
    elif kind == "mapping":
        names = [str(n) for n in x]
        columns = [np.asarray(c) for c in x.values()]
    else:
        matrix = x.detach().double().numpy() if kind == "torch" else np.asarray(x)
        if matrix.ndim != 2:
            raise ShapeError(f"{arg}: expected a table or a matrix of rows × columns, got shape {matrix.shape}")
        names = [f"x{i}" for i in range(matrix.shape[1])]
        columns = list(matrix.T)
    if not columns:
        raise ShapeError(f"{arg}: expected at least one column, got none")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ShapeError(f"{arg}: expected columns of different names, got {twice!r} twice")
    read = [_column(c, f"{arg}: column {n!r}") for n, c in zip(names, columns, strict=True)]
    for name, column in zip(names, read, strict=True):
        if len(column) != len(read[0]):
            raise ShapeError(f"{arg}: expected {len(read[0])} values in column {name!r}, got {len(column)}")
    return Table(names, read, kind, index)


def _from_polars(series: Any) -> Array:
    numeric = series.dtype.is_numeric() or str(series.dtype) == "Boolean"
    return np.asarray(series.to_numpy() if numeric else series.to_list(), dtype=None if numeric else object)


def _from_arrow(column: Any) -> Array:
    import pyarrow

    t = column.type
    if pyarrow.types.is_integer(t) or pyarrow.types.is_floating(t) or pyarrow.types.is_boolean(t):
        return np.asarray(column.to_numpy(zero_copy_only=False) if column.null_count == 0 else column.to_pylist())
    return np.array(column.to_pylist(), dtype=object)


def _column(values: Array, what: str) -> Array:
    if values.ndim != 1:
        raise ShapeError(f"{what}: expected one value per row, got shape {values.shape}")
    if values.dtype.kind in "OUST":
        # Whatever a library calls missing is None.
        items = [None if _is_missing(v) else v for v in values.tolist()]
        present = [v for v in items if v is not None]
        if values.dtype != object or not present or not all(_is_number(v) for v in present):
            return np.array(items, dtype=object)
        values = np.array([np.nan if v is None else v for v in items], dtype=np.float64)
    if values.dtype.kind in "biuf":
        values = np.ascontiguousarray(values, dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            found = "NaN" if np.isnan(values[bad[0]]) else "inf"
            raise NonFiniteError(f"{what}: expected finite numbers, got {found} at row {bad[0]}; fill or drop it first")
        return values
    raise DTypeError(f"{what}: expected numbers or categories, got dtype {values.dtype}")


def _is_missing(value: Any) -> bool:
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number, np.bool_))


def write_table(like: Table, names: Sequence[str], columns: Sequence[Array]) -> Any:
    """Columns as the kind of table that ``like`` was read from."""
    if like.kind in ("numpy", "torch"):
        numeric = all(c.dtype.kind in "biuf" for c in columns)
        matrix = np.stack([np.asarray(c, dtype=np.float64 if numeric else object) for c in columns], axis=1)
        if like.kind == "torch" and numeric:
            import torch

            return torch.from_numpy(matrix)
        return matrix
    # Lists, so that every library finds its own type of strings.
    found = {n: (c if c.dtype.kind in "biuf" else c.tolist()) for n, c in zip(names, columns, strict=True)}
    if like.kind == "pandas":
        import pandas

        return pandas.DataFrame(found, index=like.index)
    if like.kind == "polars":
        import polars

        return polars.DataFrame(found)
    if like.kind == "arrow":
        import pyarrow

        return pyarrow.table(found)
    return {n: np.asarray(c) for n, c in found.items()}


def read_labels(y: Any, rows: int, arg: str) -> Array:
    """``(rows,)`` labels or targets as NumPy values.

    Raises:
        ShapeError: another length.
    """
    if _interop.is_torch(y):
        y = y.detach().cpu().double().numpy() if y.is_floating_point() else y.detach().cpu().numpy()
    elif hasattr(y, "to_numpy"):
        y = y.to_numpy()
    values = np.asarray(y)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.shape != (rows,):
        raise ShapeError(f"{arg}: expected shape ({rows},), one value per row of x, got {values.shape}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise NonFiniteError(f"{arg}: non-finite value at row {int(np.flatnonzero(~np.isfinite(values))[0])}")
    return values
