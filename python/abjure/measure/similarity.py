"""Similarity of two models' representations of the same inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from .. import _interop, _native
from ..errors import ArgumentError, DegenerateError, DTypeError, ShapeError
from ._arrays import Floats, matrix

__all__ = ["LinearCKA", "cka", "cka_shards", "procrustes", "svcca"]

#: Rows whose pairs give the median distance of a kernel's width.
MEDIAN_ROWS = 2048
#: Rows that are widened to f64 at a time.
F64_ROWS = 4096


def cka(
    x: Any,
    y: Any,
    debiased: bool = False,
    *,
    kernel: Literal["linear", "rbf"] = "linear",
    sigma: float | tuple[float, float] | None = None,
    fraction: float = 1.0,
) -> float:
    """Centred kernel alignment of two representations of the same n inputs.

    Linear: ``||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)`` with centred columns: 1 for representations that differ by a
    rotation, a scale and a shift, and near 0 for unrelated ones, but only if n is well above the number of features.
    The debiased form replaces each term by its U-statistic, has no such bias and may be negative. With the kernel
    ``exp(−‖a − b‖² / 2σ²)`` close inputs count most.

    Memory: linear ``(p + q)^2`` numbers where no side has more features than rows; else, and for RBF, tiles and a few
    numbers per row, in time ``n^2``. Arrays are read in place (memory-mapped ones too) and multiplied in their own
    arithmetic (float64, else float32) with sums in f64.

    Args:
        x: representations ``(n, p)``, one row per input; any float. Further axes are flattened into features.
        y: representations ``(n, q)`` of the same inputs in the same order.
        debiased: use the U-statistics; needs 4 rows.
        kernel: ``"linear"`` or ``"rbf"``.
        sigma: widths σ of the RBF for x and y, or one for both, in units of distance. By default ``fraction`` times the
            median distance of two rows of each (over 2048 rows drawn with seed 0 where there are more).
        fraction: see ``sigma``.

    Returns:
        The similarity: biased in [0, 1], debiased at most about 1.

    Raises:
        ShapeError: not two-dimensional, different numbers of rows, fewer than 2 (debiased: 4) of them.
        NonFiniteError: NaN or infinity.
        ArgumentError: unknown kernel, a width that is not positive.
        DegenerateError: a representation that is the same for all inputs, a median distance of 0, or (debiased) no
            positive estimate of a representation's own dependence.

    Source: Kornblith and others, arXiv 1905.00414; debiased as in Nguyen, Raghu, Kornblith, arXiv 2010.15327.
    """
    if kernel not in ("linear", "rbf"):
        raise ArgumentError(f"kernel: expected 'linear' or 'rbf', got {kernel!r}")
    least = 4 if debiased else 2
    a, b = _pair(x, y, least)
    if kernel == "linear" and max(a.shape[1], b.shape[1]) <= len(a):
        stream = LinearCKA()
        stream.update(a, b)
        return stream.value(debiased)
    gammas = [-1.0, -1.0]
    if kernel == "rbf":
        widths = sigma if isinstance(sigma, tuple) else (sigma, sigma)
        if len(widths) != 2:
            raise ArgumentError(f"sigma: expected one width or two, got {len(widths)}")
        gammas = [_gamma(rows, w, fraction, name) for rows, w, name in zip((a, b), widths, "xy", strict=True)]
    return _ratio(*_native.hsic(a, b, gammas[0], gammas[1], debiased))


def _gamma(rows: Any, sigma: float | None, fraction: float, name: str) -> float:
    if sigma is None:
        if not 0 < fraction < np.inf:
            raise ArgumentError(f"fraction: expected a positive number, got {fraction}")
        some = np.random.default_rng(0).permutation(len(rows))[:MEDIAN_ROWS] if len(rows) > MEDIAN_ROWS else slice(None)
        r = matrix(rows[some], name)
        r = r - r.mean(axis=0)
        squares = np.einsum("ij,ij->i", r, r)
        distances = squares[:, None] + squares - 2 * (r @ r.T)
        middle = float(np.median(distances[np.triu_indices(len(r), 1)]))
        sigma = fraction * float(np.sqrt(max(middle, 0.0)))
        # What is left of two equal rows is rounding.
        if not middle > 1e-14 * float(distances.max()):
            raise DegenerateError(f"{name}: the median distance of two rows is 0; give sigma")
    if not 0 < sigma < np.inf:
        raise ArgumentError(f"sigma: expected a positive number, got {sigma}")
    return 1 / (2 * float(sigma) ** 2)


def _native_rows(x: Any, name: str) -> Any:
    """``x`` as rows ``(n, d)`` for a kernel: NumPy arrays and CPU tensors of a float type in place, others as f64."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x if x.is_floating_point() else x.double()
    elif (
        not (isinstance(x, np.ndarray) and (x.dtype.kind == "f" or x.dtype.name == "bfloat16")) or x.dtype.itemsize > 8
    ):
        try:
            x = np.asarray(x, dtype=np.float64)
        except (TypeError, ValueError):
            raise DTypeError(f"{name}: expected an array of numbers, got {type(x).__name__}") from None
    if x.ndim > 2 and len(x):
        x = x.reshape(len(x), -1)
    if x.ndim != 2 or 0 in x.shape:
        raise ShapeError(f"{name}: expected shape (n, d) with n and d above 0, got {tuple(x.shape)}")
    return _interop.source(x, name)


def _pair(x: Any, y: Any, least: int = 1) -> tuple[Any, Any]:
    """Both as rows of one dtype (f64 where they differ), as many of them."""
    a, b = _native_rows(x, "x"), _native_rows(y, "y")
    for rows, name in ((a, "x"), (b, "y")):
        if len(rows) < least:
            raise ShapeError(f"{name}: expected {least} rows or more, got {len(rows)}")
    if len(a) != len(b):
        raise ShapeError(f"y: expected the {len(a)} rows of x, got {len(b)}")
    if str(a.dtype).removeprefix("torch.") != str(b.dtype).removeprefix("torch."):
        a, b = _double(a), _double(b)
    return a, b


def _ratio(xy: float, xx: float, yy: float) -> float:
    if not (xx > 0 and yy > 0):
        raise DegenerateError(f"x, y: expected positive self-similarity, got {xx:.3g} and {yy:.3g} (too few rows?)")
    return float(xy / np.sqrt(xx) / np.sqrt(yy))


class LinearCKA:
    """Linear CKA over minibatches, exact: the value of :func:`cka` on all rows at once, biased or debiased.

    Keeps sums over rows (for p and q features ``(p + q)**2`` f64 numbers), never the rows; the usual mean of per-batch
    values, which depends on the batch size, is not needed. Batches are multiplied in their own arithmetic, in runs of
    at most 1024 rows, about the mean of the first batch; all longer sums are in f64.

    Source: as :func:`cka`. The U-statistics are rewritten as sums over features, O(n (p + q)^2).
    """

    def __init__(self) -> None:
        self._moments: Any = None

    @property
    def n(self) -> int:
        """Rows so far."""
        return 0 if self._moments is None else int(self._moments.rows)

    def update(self, x: Any, y: Any) -> None:
        """Adds a batch of rows.

        Args:
            x: ``(b, p)``, any float.
            y: ``(b, q)`` of the same inputs.

        Raises:
            ShapeError, NonFiniteError: rows that do not fit or are not finite; nothing has been added.
        """
        a, b = _pair(x, y)
        if self._moments is None:
            moments = _native.CrossMoments(a.shape[1], b.shape[1])
        else:
            moments = self._moments
            for rows, width, name in zip((a, b), moments.widths, "xy", strict=True):
                if rows.shape[1] != width:
                    raise ShapeError(f"{name}: expected {width} features as in the first batch, got {rows.shape[1]}")
        moments.update(a, b)
        self._moments = moments

    def value(self, debiased: bool = False) -> float:
        """The similarity of all rows so far.

        Args:
            debiased: use the U-statistics; needs 4 rows.

        Raises:
            ShapeError: fewer than 2 (debiased: 4) rows so far.
            DegenerateError: as :func:`cka`; or an update was interrupted, which leaves part of a batch behind.
        """
        if self._moments is None:
            raise ShapeError(f"x, y: expected {4 if debiased else 2} rows or more in all, got 0")
        return _ratio(*self._moments.dependence(debiased))

    def covariances(self) -> tuple[Floats, Floats, Floats]:
        """``Σ x xᵀ`` ``(p, p)``, ``Σ y xᵀ`` ``(q, p)`` and ``Σ y yᵀ`` ``(q, q)`` about the means of all rows so far.

        Raises:
            ShapeError: no rows so far. DegenerateError: after an interrupted update.
        """
        if self._moments is None:
            raise ShapeError("x, y: expected at least one row, got 0")
        p, q = self._moments.widths
        xx, yx, yy = self._moments.matrices()
        return xx.reshape(p, p), yx.reshape(q, p), yy.reshape(q, q)


def cka_shards(shards: Iterable[tuple[Any, Any]], debiased: bool = False) -> float:
    """Linear CKA of representations that lie in several files or arrive in batches; exact, one pass.

    Args:
        shards: pairs ``(x, y)`` of rows of the same inputs: arrays, tensors, memory-mapped arrays (read in place), or
            paths of ``.npy`` files, which are memory-mapped.
        debiased: use the U-statistics.

    Raises:
        As :class:`LinearCKA`; DegenerateError: no shards.
    """
    stream = LinearCKA()
    for pair in shards:
        stream.update(
            *(np.load(a, mmap_mode="r") if hasattr(a, "__fspath__") or isinstance(a, str) else a for a in pair)
        )
    if not stream.n:
        raise DegenerateError("shards: expected at least one pair of arrays, got none")
    return stream.value(debiased)


def svcca(x: Any, y: Any = None, *, variance: float = 0.99) -> float:
    """Mean canonical correlation of the principal components that hold a share ``variance`` of each representation.

    Args:
        x: representations ``(n, p)``, any float; multiplied in f64. Or a :class:`LinearCKA` that has seen the rows of
            both.
        y: ``(n, q)`` of the same inputs.
        variance: share in (0, 1] of the variance that is kept.

    Returns:
        A mean over the smaller number of kept components, in [0, 1]. With fewer rows than kept components it is near 1
        for anything.

    Raises:
        ShapeError, NonFiniteError: as :func:`cka`. ArgumentError: ``variance`` out of range, ``y`` missing.
        DegenerateError: a representation that does not vary.

    Source: Raghu and others, arXiv 1706.05806.
    """
    if not 0 < variance <= 1:
        raise ArgumentError(f"variance: expected a share in (0, 1], got {variance}")
    xx, yx, yy = _covariances(x, y)
    left, right = _whitening(yy, variance, "y"), _whitening(xx, variance, "x")
    found = np.linalg.svd(left.T @ yx @ right, compute_uv=False)
    return float(np.minimum(found, 1.0).mean())


def procrustes(x: Any, y: Any = None) -> float:
    """Similarity after the best rotation: ``||Y'X||_* / (||X||_F ||Y||_F)`` with centred columns.

    1 less half the squared Procrustes distance of the two at norm 1. Of different widths the narrower one is padded.

    Args:
        x, y: as in :func:`svcca`.

    Returns:
        A similarity in [0, 1]; 1 for representations that differ by a rotation, a scale and a shift.

    Raises:
        ShapeError, NonFiniteError: as :func:`cka`. DegenerateError: a representation that does not vary.

    Source: Ding, Denain, Steinhardt, arXiv 2108.01661; Williams and others, arXiv 2110.14739.
    """
    xx, yx, yy = _covariances(x, y)
    size = np.sqrt(np.trace(xx)) * np.sqrt(np.trace(yy))
    return float(min(np.linalg.svd(yx, compute_uv=False).sum() / size, 1.0))


def _covariances(x: Any, y: Any) -> tuple[Floats, Floats, Floats]:
    if y is None and not isinstance(x, LinearCKA):
        raise ArgumentError("y: expected the representations of the second model, or a LinearCKA as x")
    if isinstance(x, LinearCKA):
        stream = x
    else:
        stream = LinearCKA()
        a, b = _pair(x, y, 2)
        for start in range(0, len(a), F64_ROWS):
            stream.update(*(_interop.source(_double(r[start : start + F64_ROWS]), n) for r, n in ((a, "x"), (b, "y"))))
    stream.value()  # refuses what does not vary
    return stream.covariances()


def _double(rows: Any) -> Any:
    return rows.double() if hasattr(rows, "double") else rows.astype(np.float64)


def _whitening(c: Floats, variance: float, name: str) -> Floats:
    """Columns that map to the kept components at unit variance."""
    values, vectors = np.linalg.eigh(c)
    values, vectors = values[::-1], vectors[:, ::-1]
    # Below this a component is rounding.
    values = np.where(values > values[0] * len(c) * np.finfo(np.float32).eps ** 2, values, 0.0)
    share = np.cumsum(values) / values.sum()
    keep = min(int(np.searchsorted(share, variance * (1 - 1e-12))) + 1, int((values > 0).sum()))
    found: Floats = vectors[:, :keep] / np.sqrt(values[:keep])
    return found
