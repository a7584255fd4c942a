"""Directions in weights: editing the matrices that write to the residual stream."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .. import _native
from .._interop import device_path, is_torch, target
from ..errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from .directions import Edit, Vector, _finite, _to_numpy, _vectors

NormPreserving = Literal["in", "row", "row_pre"]
_FORMS = (None, "in", "row", "row_pre")


@dataclass(frozen=True)
class WeightReport:
    """What an edit of one weight did.

    Attributes:
        rank: number of independent directions removed.
        residual_before: Frobenius norm of ``Q W`` before the edit.
        residual_after: the same of the weight as stored; for ``scale=1`` what rounding left.
        unrestored: rows or columns that a norm-preserving form could not stretch back, because nothing was left.
    """

    rank: int
    residual_before: float
    residual_after: float
    unrestored: int

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><th>{k}</th><td>{v:.6g}</td></tr>" for k, v in vars(self).items())
        return f"<table><caption>Orthogonalised weight</caption>{cells}</table>"


def orthogonalize_(
    weight: Any,
    q: Any,
    axis: int,
    scale: float = 1.0,
    norm_preserving: NormPreserving | None = None,
    post_gain: Any = None,
) -> WeightReport:
    """``W ← W − scale · Qᵀ Q W`` in place: a weight that no longer writes along ``q`` (Arditi et al. 2024, eq. 5).

    ``axis`` is the axis that lies along the residual stream; it is never guessed from the shape. For ``nn.Linear``
    writers ``(out, in)`` it is 0, for embeddings ``(V, d)`` and GPT-2's ``Conv1D`` ``(in, out)`` it is -1, for fused
    experts 1 in ``(E, out, in)`` and 2 in ``(E, in, out)``; for biases the only, or the last, axis.

    Args:
        weight: 1-D, 2-D or 3-D (a stack of experts), of float64, float32, float16 or bfloat16. A ``Parameter`` is
            edited under ``torch.no_grad()``.
        q: ``(d,)`` or ``(k, d)``, orthonormalised in float64.
        axis: the residual axis, of length d.
        scale: 1 removes, 2 reflects, negative values amplify.
        norm_preserving: ``"in"`` keeps the length of every vector along ``axis`` (one per input) and ``Q W = 0``.
            ``"row"`` and ``"row_pre"`` keep, exactly or approximately, the lengths across inputs, as published tools
            do; they leave components along ``q`` behind (see ``residual_after``).
        post_gain: ``(d,)`` gain g of a norm that is applied to the branch before it is added to the stream (Gemma 2
            and 3, where g is 1 + the stored weight: pass the sum). The weight is then made orthogonal to ``g ⊙ q``,
            which makes the normalised branch orthogonal to ``q``; without it such a model is not edited correctly.

    Returns:
        A :class:`WeightReport`; with ``post_gain`` its residuals are those along ``g ⊙ q``.

    Raises:
        ShapeError, DTypeError, LayoutError, DeviceError: an argument does not fit.
        ArgumentError: an unknown ``norm_preserving`` or an ``axis`` out of range.
        NonFiniteError: ``weight``, ``q`` or ``post_gain`` holds a NaN or an infinity.
        DegenerateError: ``q`` (times the gain) spans nothing.

        Nothing has been written then.
    """
    if norm_preserving not in _FORMS:
        raise ArgumentError(f"norm_preserving: expected one of {_FORMS}, got {norm_preserving!r}")
    axis = _residual_axis(weight, axis)
    width = int(weight.shape[axis])
    basis = gained_basis(q, post_gain, width)
    scale = _finite(scale, "scale")
    if (path := device_path(weight, "orthogonalize_")) is not None:
        return path(weight, basis, axis, scale, norm_preserving)  # type: ignore[no-any-return]
    plain = weight.detach() if is_torch(weight) else weight
    if norm_preserving in ("row", "row_pre"):
        if weight.ndim == 1:
            raise ArgumentError(f'norm_preserving: {norm_preserving!r} needs a matrix; a bias takes None or "in"')
        if axis == weight.ndim - 1:
            # These forms mix the rows of a last-axis layout: they run on the transposed view (through a copy).
            plain, axis = plain.swapaxes(-1, -2), weight.ndim - 2
    with target(plain, "weight") as w:
        if w.ndim == 3 or axis == w.ndim - 1:
            _native.check_weight(w)  # the kernel below checks single matrices itself
        if axis == w.ndim - 1:
            return _along_rows(w, basis, scale, norm_preserving == "in")
        stack = w if w.ndim == 3 else [w]
        parts = [_native.orthogonalize_leading(matrix, basis, scale, norm_preserving) for matrix in stack]
    return _total(basis, parts)


def _residual_axis(weight: Any, axis: int) -> int:
    shape = getattr(weight, "shape", None)
    if shape is None:
        raise DTypeError(f"weight: expected an array, got {type(weight).__name__}")
    ndim = len(shape)
    if not 1 <= ndim <= 3:
        raise ShapeError(f"weight: expected 1, 2 or 3 axes, got shape {tuple(shape)}")
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise DTypeError(f"axis: expected an integer, got {axis!r}")
    if not -ndim <= axis < ndim or (ndim == 3 and axis % 3 == 0):
        expected = "1 or 2 (axis 0 counts experts)" if ndim == 3 else f"-{ndim} to {ndim - 1}"
        raise ArgumentError(f"axis: expected {expected}, got {axis}")
    if shape[axis] == 0:
        raise ShapeError(f"weight: expected a residual axis of 1 or more, got shape {tuple(shape)}")
    return int(axis) % ndim


def gained_basis(q: Any, post_gain: Any, width: int) -> Vector:
    """Orthonormal rows that span ``q``, or ``q`` times the gain where there is one."""
    vectors = _vectors(q, "q")
    if vectors.shape[1] != width:
        raise ShapeError(f"q: expected vectors of {width}, the residual axis of weight, got shape {vectors.shape}")
    basis = _native.orthonormal(vectors)
    if post_gain is None:
        return basis
    gain = _to_numpy(post_gain, "post_gain")
    if gain.shape != (width,):
        raise ShapeError(f"post_gain: expected shape ({width},), got {gain.shape}")
    if not np.isfinite(gain).all():
        raise NonFiniteError(f"post_gain: non-finite value at index {int(np.argmin(np.isfinite(gain)))}")
    if not (basis * gain).any():
        raise DegenerateError("post_gain: it cancels every direction, so nothing is left to remove")
    return _native.orthonormal(basis * gain)


def _along_rows(w: Any, basis: Vector, scale: float, preserve_norm: bool) -> WeightReport:
    edit = Edit(basis.shape[1], basis, scale=scale, preserve_norm=preserve_norm)
    before = edit.coefficients(w)
    edit.apply_(w)
    after = edit.coefficients(w)
    unrestored = _vanished_rows(w, before) if preserve_norm else 0
    return WeightReport(len(basis), _frobenius(before), _frobenius(after), unrestored)


def _vanished_rows(w: Any, before: Any) -> int:
    """Rows that were not zero and were left all but zero: those whose old length was all along the directions."""
    old = np.asarray(np.linalg.norm(np.asarray(before, dtype=np.float64), axis=-1))
    new = np.linalg.norm(_to_numpy(w, "weight"), axis=-1)
    return int(np.count_nonzero((old > 0) & (new <= 1e-6 * old)))


def _frobenius(x: Any) -> float:
    return float(np.linalg.norm(np.asarray(x, dtype=np.float64)))


def _total(basis: Vector, parts: list[tuple[float, float, int]]) -> WeightReport:
    before, after = (math.sqrt(sum(p[i] ** 2 for p in parts)) for i in (0, 1))
    return WeightReport(len(basis), before, after, sum(p[2] for p in parts))
