"""Similarity of two models' representations of the same inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import DegenerateError, ShapeError
from ._arrays import Floats, matrix

__all__ = ["LinearCKA", "cka"]


def cka(x: Any, y: Any, debiased: bool = False) -> float:
    """Linear centred kernel alignment of two representations of the same n inputs.

    ``||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)`` with centred columns: 1 for representations that differ by a rotation, a
    scale and a shift, and near 0 for unrelated ones, but only if n is well above the number of features. The debiased
    form replaces each term by its U-statistic, has no such bias and may be negative.

    Args:
        x: representations ``(n, p)``, one row per input; any float. Further axes are flattened into features.
        y: representations ``(n, q)`` of the same inputs in the same order.
        debiased: use the U-statistics; needs 4 rows.

    Returns:
        The similarity, computed in f64: biased in [0, 1], debiased at most about 1.

    Raises:
        ShapeError: not two-dimensional, different numbers of rows, fewer than 2 (debiased: 4) of them.
        NonFiniteError: NaN or infinity.
        DegenerateError: a representation that is the same for all inputs (or, debiased, has no positive estimate of
            its own dependence).

    Source: Kornblith and others, arXiv 1905.00414; debiased as in Nguyen, Raghu, Kornblith, arXiv 2010.15327.
    """
    least = 4 if debiased else 2
    a, b = matrix(x, "x", least), matrix(y, "y", least)
    if len(a) != len(b):
        raise ShapeError(f"y: expected the {len(a)} rows of x, got {len(b)}")
    if max(a.shape[1], b.shape[1]) <= len(a):
        stream = LinearCKA()
        stream.update(a, b)
        return stream.value(debiased)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    _varies(a, b)
    k, el = a @ a.T, b @ b.T
    if debiased:
        n = len(k)
        terms = [_unbiased_gram(p, q, n) for p, q in ((k, el), (k, k), (el, el))]
    else:
        terms = [float(np.vdot(p, q)) for p, q in ((k, el), (k, k), (el, el))]
    return _ratio(*terms)


def _varies(a: Floats, b: Floats) -> None:
    for rows, name in ((a, "x"), (b, "y")):
        if not rows.any():
            raise DegenerateError(f"{name}: expected a representation that varies, got the same row for every input")


def _unbiased_gram(k: Floats, el: Floats, n: int) -> float:
    """n (n - 3) times the U-statistic of HSIC, from Gram matrices."""
    k, el = k - np.diag(np.diag(k)), el - np.diag(np.diag(el))
    r, s = k.sum(axis=1), el.sum(axis=1)
    return float(np.vdot(k, el) + r.sum() * s.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (r @ s))


def _ratio(xy: float, xx: float, yy: float) -> float:
    if not (xx > 0 and yy > 0):
        raise DegenerateError(f"x, y: expected positive self-similarity, got {xx:.3g} and {yy:.3g} (too few rows?)")
    return float(xy / np.sqrt(xx) / np.sqrt(yy))


class LinearCKA:
    """Linear CKA over minibatches, exact: the value of :func:`cka` on all rows at once, biased or debiased.

    Keeps sums over rows (for p and q features about ``(p + q)**2`` f64 numbers), never the rows; the usual mean of
    per-batch biased values, which depends on the batch size, is not needed.

    Source: as :func:`cka`. The U-statistics are rewritten as sums over features, O(n (p + q)^2).
    """

    def __init__(self) -> None:
        self.n = 0
        self._shift: tuple[Floats, Floats] | None = None
        self._sum: list[Floats] = []
        #: sum of a b' for (x, y), (x, x), (y, y); of |b|^2 a and of |a|^2 b; of |a|^2 |b|^2.
        self._cross: list[Floats] = []
        self._weighted: list[tuple[Floats, Floats]] = []
        self._norms: list[float] = []
        self._squares: list[float] = []

    def update(self, x: Any, y: Any) -> None:
        """Adds a batch of rows.

        Args:
            x: ``(b, p)``, any float.
            y: ``(b, q)`` of the same inputs.

        Raises:
            ShapeError, NonFiniteError: rows that do not fit or are not finite; nothing has been added.
        """
        a, b = matrix(x, "x"), matrix(y, "y")
        if len(a) != len(b):
            raise ShapeError(f"y: expected the {len(a)} rows of x, got {len(b)}")
        if self._shift is None:
            # HSIC does not change under a shift; without one a large mean would cancel against itself.
            self._shift = a.mean(axis=0), b.mean(axis=0)
        for rows, shift, name in ((a, self._shift[0], "x"), (b, self._shift[1], "y")):
            if rows.shape[1] != len(shift):
                raise ShapeError(f"{name}: expected {len(shift)} features as in the first batch, got {rows.shape[1]}")
        a, b = a - self._shift[0], b - self._shift[1]
        na, nb = np.einsum("ij,ij->i", a, a), np.einsum("ij,ij->i", b, b)
        pairs = ((a, b, na, nb), (a, a, na, na), (b, b, nb, nb))
        cross = [p.T @ q for p, q, _, _ in pairs]
        weighted = [(p.T @ nq, q.T @ np_) for p, q, np_, nq in pairs]
        norms = [float(np_ @ nq) for _, _, np_, nq in pairs]
        sums, squares = [a.sum(axis=0), b.sum(axis=0)], [float(na.sum()), float(nb.sum())]
        if self.n:
            cross = [p + q for p, q in zip(self._cross, cross, strict=True)]
            weighted = [(p + r, q + s) for (p, q), (r, s) in zip(self._weighted, weighted, strict=True)]
            norms = [p + q for p, q in zip(self._norms, norms, strict=True)]
            sums = [p + q for p, q in zip(self._sum, sums, strict=True)]
            squares = [p + q for p, q in zip(self._squares, squares, strict=True)]
        self._cross, self._weighted, self._norms, self._sum, self._squares = cross, weighted, norms, sums, squares
        self.n += len(a)

    def value(self, debiased: bool = False) -> float:
        """The similarity of all rows so far.

        Args:
            debiased: use the U-statistics; needs 4 rows.

        Raises:
            ShapeError: fewer than 2 (debiased: 4) rows so far.
            DegenerateError: as :func:`cka`.
        """
        least = 4 if debiased else 2
        if self.n < least:
            raise ShapeError(f"x, y: expected {least} rows or more in all, got {self.n}")
        centred = [self._centred(i) for i in range(3)]
        for i, name in ((1, "x"), (2, "y")):
            if not centred[i].diagonal().max() > 1e-24 * max(self._cross[i].diagonal().max(), 1e-300):
                raise DegenerateError(f"{name}: expected a representation that varies, got one that does not")
        if not debiased:
            return _ratio(*(float(np.vdot(c, c)) for c in centred))
        return _ratio(*(self._unbiased(i) for i in range(3)))

    def _centred(self, i: int) -> Floats:
        s, t = self._sums(i)
        found: Floats = self._cross[i] - np.outer(s, t) / self.n
        return found

    def _sums(self, i: int) -> tuple[Floats, Floats]:
        s, t = self._sum
        return ((s, t), (s, s), (t, t))[i]

    def _unbiased(self, i: int) -> float:
        """As :func:`_unbiased_gram`, with the Gram matrices' row sums written as ``a (sum a) - |a|^2``."""
        n, (s, t) = self.n, self._sums(i)
        c, (u, v), norms = self._cross[i], self._weighted[i], self._norms[i]
        p, q = ((self._squares[0], self._squares[1]), (self._squares[0],) * 2, (self._squares[1],) * 2)[i]
        trace = float(np.vdot(c, c)) - norms
        rows = float(s @ c @ t) - float(s @ u) - float(t @ v) + norms
        total = (float(s @ s) - p) * (float(t @ t) - q)
        return trace + total / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows
