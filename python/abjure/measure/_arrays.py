"""What every measure takes: anything with rows, as NumPy, checked."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, DTypeError, NonFiniteError, ShapeError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def host(x: Any) -> Any:
    """A torch tensor (on any device, with a gradient, of any float) as NumPy; everything else as it is."""
    if not hasattr(x, "detach"):
        return x
    x = x.detach()
    return (x.double() if x.is_floating_point() else x).cpu().numpy()


def matrix(x: Any, name: str, least: int = 1) -> Floats:
    """``x`` as finite f64 rows ``(n, d)``, at least ``least`` of them; further axes are flattened."""
    try:
        rows = np.asarray(host(x), dtype=np.float64)
    except (TypeError, ValueError):
        raise DTypeError(f"{name}: expected an array of numbers, got {type(x).__name__}") from None
    if rows.ndim > 2:
        rows = rows.reshape(len(rows), -1) if len(rows) else rows
    if rows.ndim != 2 or 0 in rows.shape:
        raise ShapeError(f"{name}: expected shape (n, d) with n and d above 0, got {rows.shape}")
    if len(rows) < least:
        raise ShapeError(f"{name}: expected {least} rows or more, got {len(rows)}")
    if not np.isfinite(rows).all():
        raise NonFiniteError(f"{name}: expected finite values, got NaN or infinity")
    return rows


def vector(x: Any, name: str, least: int = 1) -> Floats:
    """``x`` as finite f64 values ``(n,)``."""
    try:
        values = np.asarray(host(x), dtype=np.float64)
    except (TypeError, ValueError):
        raise DTypeError(f"{name}: expected an array of numbers, got {type(x).__name__}") from None
    if values.ndim != 1 or len(values) < least:
        raise ShapeError(f"{name}: expected shape (n,) with n of {least} or more, got {values.shape}")
    if not np.isfinite(values).all():
        raise NonFiniteError(f"{name}: expected finite values, got NaN or infinity")
    return values


def class_labels(y: Any, name: str, n: int | None = None, classes: int | None = None) -> Ints:
    """``y`` as int64 classes ``(n,)``, 0 or more, below ``classes``."""
    found = np.asarray(host(y))
    if found.ndim != 1 or (n is not None and len(found) != n):
        wanted = "(n,)" if n is None else f"({n},)"
        raise ShapeError(f"{name}: expected one label per row, shape {wanted}, got {found.shape}")
    if found.dtype.kind not in "iu":
        raise DTypeError(f"{name}: expected integer labels, got {found.dtype}")
    labels: Ints = found.astype(np.int64)
    if len(labels) and (labels.min() < 0 or (classes is not None and labels.max() >= classes)):
        limit = "" if classes is None else f" and below {classes}"
        raise ArgumentError(f"{name}: expected labels of 0 or more{limit}, got {labels.min()} to {labels.max()}")
    return labels


def items(x: Any, name: str) -> list[Any]:
    """``x`` as a list: lists, NumPy, torch, Arrow and pandas columns, in one dimension."""
    x = host(x)
    if isinstance(x, (str, bytes)) or not isinstance(x, Iterable):
        raise ShapeError(f"{name}: expected shape (n,), got {type(x).__name__}")
    if getattr(x, "ndim", 1) != 1:
        raise ShapeError(f"{name}: expected shape (n,), got {getattr(x, 'shape', None)}")
    for convert in ("tolist", "to_pylist", "to_list"):
        if hasattr(x, convert):
            return list(getattr(x, convert)())
    return list(x)


def missing(item: Any) -> bool:
    """None and NaN (and what pandas calls NA) stand for no value."""
    if item is None or type(item).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(item, (float, np.floating)) and math.isnan(item)


def codes(x: Any, name: str, n: int | None = None) -> tuple[Ints, list[Hashable]]:
    """Names ``(n,)`` as numbers from 0 on, in the order of first appearance, and the names."""
    found = items(x, name)
    if n is not None and len(found) != n:
        raise ShapeError(f"{name}: expected {n} names, got {len(found)}")
    seen: dict[Hashable, int] = {}
    out = np.empty(len(found), dtype=np.int64)
    for i, item in enumerate(found):
        if missing(item):
            raise ArgumentError(f"{name}: expected a name for every row, got {item} at index {i}")
        try:
            out[i] = seen.setdefault(item, len(seen))
        except TypeError:
            raise DTypeError(f"{name}: expected hashable names, got {type(item).__name__} at index {i}") from None
    return out, list(seen)


def binary(x: Any, name: str, n: int | None = None) -> Ints:
    """``x`` as int64 of 0 and 1, ``(n,)``, from true or false, 1 or 0."""
    found = np.asarray(host(x))
    if found.ndim != 1 or (n is not None and len(found) != n):
        wanted = "(n,)" if n is None else f"({n},)"
        raise ShapeError(f"{name}: expected shape {wanted}, got {found.shape}")
    if found.dtype.kind not in "biuf":
        found = np.array([math.nan if missing(v) else v for v in found], dtype=object)
        try:
            found = found.astype(np.float64)
        except (TypeError, ValueError):
            raise DTypeError(f"{name}: expected true or false, got {type(x).__name__} of other things") from None
    bad = ~np.isin(found, (0, 1))
    if bad.any():
        i = int(bad.argmax())
        raise ArgumentError(f"{name}: expected 0 or 1, got {found[i]} at index {i}")
    return found.astype(np.int64)
