"""Columns from wherever people keep them: lists, NumPy, pandas, polars, Arrow, torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from ._arrays import Floats, host


def listed(x: Any, name: str) -> list[Any]:
    """``x`` as a list of Python values, as they are.

    Raises:
        ShapeError: not one axis.
    """
    x = host(x)
    if isinstance(x, (str, bytes, Mapping)) or not isinstance(x, Iterable):
        raise ShapeError(f"{name}: expected a column of shape (n,), got {type(x).__name__}")
    if getattr(x, "ndim", 1) != 1:
        raise ShapeError(f"{name}: expected a column of shape (n,), got shape {getattr(x, 'shape', None)}")
    for reader in ("to_pylist", "to_list", "tolist"):  # Arrow; polars, pandas; NumPy
        if hasattr(x, reader):
            return list(getattr(x, reader)())
    return list(x)


def column(x: Any, name: str, n: int | None = None) -> list[Any]:
    """``x`` as a list of Python values, missing ones (None, NaN, the missing value of pandas) as None.

    Raises:
        ShapeError: not one axis, or not ``n`` long.
    """
    found = listed(x, name)
    if n is not None and len(found) != n:
        raise ShapeError(f"{name}: expected {n} values, one per row, got {len(found)}")
    return [None if missing(v) else v for v in found]


def missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, NA."""
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ == "NAType"


def full(x: Any, name: str, n: int | None = None) -> list[Any]:
    """A column without missing values.

    Raises:
        ArgumentError: a missing value. ShapeError: as :func:`column`.
    """
    found = column(x, name, n)
    if (gap := next((i for i, v in enumerate(found) if v is None), None)) is not None:
        raise ArgumentError(f"{name}: expected a value in every row, got none at index {gap}")
    return found


def names(x: Any, name: str, n: int | None = None) -> list[Any]:
    """A column of hashable names without missing values.

    Raises:
        DTypeError: a value that cannot be a name. ArgumentError, ShapeError: as :func:`full`.
    """
    found = full(x, name, n)
    for i, v in enumerate(found):
        try:
            hash(v)
        except TypeError:
            raise DTypeError(f"{name}: expected names, got {type(v).__name__} at index {i}") from None
    return found


def texts(x: Any, name: str, n: int | None = None) -> list[str | None]:
    """A column of strings; missing ones stay None.

    Raises:
        DTypeError: a value that is no string. ShapeError: as :func:`column`.
    """
    found = column(x, name, n)
    for i, v in enumerate(found):
        if v is not None and not isinstance(v, str):
            raise DTypeError(f"{name}: expected strings, got {type(v).__name__} at index {i}")
    return found


def verdicts(x: Any, name: str, n: int | None = None) -> list[bool | None]:
    """A column of true or false, 1 or 0; missing ones stay None.

    Raises:
        DTypeError: a value that is no number. ArgumentError: one that is neither 0 nor 1. ShapeError: as
            :func:`column`.
    """
    out: list[bool | None] = []
    for i, v in enumerate(column(x, name, n)):
        if v is None:
            out.append(None)
        elif isinstance(v, (bool, int, float, np.number, np.bool_)):
            if v not in (0, 1):
                raise ArgumentError(f"{name}: expected 0 or 1, got {v!r} at index {i}")
            out.append(bool(v))
        else:
            raise DTypeError(f"{name}: expected true or false, got {type(v).__name__} at index {i}")
    return out


def integers(x: Any, name: str, low: int, high: int, n: int | None = None) -> list[int | None]:
    """A column of integers in a range; missing ones stay None.

    Raises:
        DTypeError: a value that is no number. ArgumentError: one outside the range, or no integer. ShapeError: as
            :func:`column`.
    """
    out: list[int | None] = []
    for i, v in enumerate(column(x, name, n)):
        if v is None:
            out.append(None)
            continue
        if isinstance(v, (bool, np.bool_)) or not isinstance(v, (int, float, np.number)):
            raise DTypeError(f"{name}: expected integers, got {type(v).__name__} at index {i}")
        if not low <= v <= high or v != int(v):
            raise ArgumentError(f"{name}: expected integers from {low} to {high}, got {v!r} at index {i}")
        out.append(int(v))
    return out


def reals(x: Any, name: str, n: int | None = None) -> Floats:
    """A column of finite numbers as f64.

    Raises:
        DTypeError: a value that is no number. NonFiniteError: NaN, infinity or a missing value. ShapeError: as
            :func:`column`.
    """
    found = column(x, name, n)
    for i, v in enumerate(found):
        if v is None or (isinstance(v, float) and not np.isfinite(v)):
            raise NonFiniteError(f"{name}: expected finite values, got {v!r} at index {i}")
        if isinstance(v, (bool, np.bool_)) or not isinstance(v, (int, float, np.number)):
            raise DTypeError(f"{name}: expected numbers, got {type(v).__name__} at index {i}")
    return np.asarray(found, dtype=np.float64)
