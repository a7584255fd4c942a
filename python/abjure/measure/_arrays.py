"""What every measure takes: anything with rows, as NumPy, checked."""

from __future__ import annotations

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
