"""Directions in activations: what they are, and the kernels that measure, remove and add them.

Every function takes a NumPy array, a torch tensor or any array with ``__dlpack__`` of float64, float32, float16 or
bfloat16, with any leading shape; rows lie along the last axis. Directions ``q`` are a :class:`Direction`, one vector
``(d,)`` or several ``(k, d)``; they are never trusted to be unit, orthogonal or independent, but orthonormalised in
float64 first. Half and single precision compute in float32, coefficients are totalled in float64, and every element is
rounded once. A row that holds a NaN or an infinity comes out non-finite, as in torch; no other row is affected.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from .. import _native
from .._files import reading, write_atomically
from .._interop import device_path, empty_like, is_torch, like, source, target
from ..errors import ArgumentError, DegenerateError, DTypeError, LayoutError, NonFiniteError, ShapeError

ArrayT = TypeVar("ArrayT")
Vector = npt.NDArray[np.float64]
Site = Literal["pre", "post"]

_FORMAT = "abjure.direction"


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction in the residual stream, and where it came from. Usable wherever ``q`` or ``v`` is expected.

    Attributes:
        vector: ``(d,)`` float64, as estimated: its length is the unit of steering.
        layer: index of the decoder block whose residual stream it was estimated in, if known.
        site: ``"pre"`` for the block's input, ``"post"`` for its output.
        position: token position it was read at (negative from the end, or a name), if known.
        counts: number of activations of class 0 and of class 1 (the class it points to).
        provenance: anything else worth keeping; must be JSON.

    Raises:
        ShapeError, NonFiniteError, DegenerateError: ``vector`` is not a vector, not finite, or zero.
        ArgumentError: ``site`` is neither ``"pre"`` nor ``"post"``.
    """

    vector: Vector
    layer: int | None = None
    site: Site = "pre"
    position: int | str | None = None
    counts: tuple[int, int] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        vector = _to_numpy(self.vector, "vector").copy()
        if vector.ndim != 1 or vector.size == 0:
            raise ShapeError(f"vector: expected shape (d,), got {vector.shape}")
        if not np.isfinite(vector).all():
            raise NonFiniteError(f"vector: non-finite value at index {int(np.argmin(np.isfinite(vector)))}")
        if not vector.any():
            raise DegenerateError("vector: every element is zero, so there is no direction")
        if self.site not in ("pre", "post"):
            raise ArgumentError(f'site: expected "pre" or "post", got {self.site!r}')
        vector.flags.writeable = False
        object.__setattr__(self, "vector", vector)

    @property
    def norm(self) -> float:
        """Length of :attr:`vector`."""
        largest = float(np.abs(self.vector).max())
        return largest * float(np.linalg.norm(self.vector / largest))

    @property
    def unit(self) -> Vector:
        """``vector / norm``, float64."""
        unit: Vector = orthonormal_basis(self.vector)[0]
        return unit

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.vector, dtype=dtype) if copy or dtype is not None else self.vector

    def __len__(self) -> int:
        return int(self.vector.size)

    def without(self, *others: Any) -> Direction:
        """The component orthogonal to every one of ``others``: what moves this concept and leaves theirs alone.

        Harmfulness and refusal, for instance, are two directions that are not orthogonal (arXiv 2507.11878, section
        3); steering along ``harmfulness.without(refusal)`` leaves the projection on refusal as it was, to the
        rounding of the activations. Projected twice in float64.

        Args:
            others: each a :class:`Direction`, ``(d,)`` or ``(k, d)``; their lengths do not matter.

        Returns:
            A :class:`Direction` of the same place, not normalised. Its provenance holds, under ``"without"`` and for
            each call, the ``share`` of the length that is left, the ``norm`` there was, and for each vector taken
            away its cosine with this direction and where it was estimated.

        Raises:
            ArgumentError: there are no ``others``.
            ShapeError, DTypeError: one of them has another width, or is not a vector.
            NonFiniteError, DegenerateError: one of them is not finite, or is zero.
            DegenerateError: nothing is left to 1e-12 of the length.
        """
        if not others:
            raise ArgumentError("others: expected at least one direction")
        units: list[Vector] = []
        taken: list[dict[str, Any]] = []
        for other in others:
            place = {}
            if isinstance(other, Direction):
                place = {"layer": other.layer, "site": other.site, "position": other.position}
            for row in _vectors(other, "others"):
                if row.size != self.vector.size:
                    raise ShapeError(f"others: expected vectors of {self.vector.size}, got {row.size}")
                units.append(orthonormal_basis(row)[0])
                taken.append({"cosine": float(units[-1] @ self.unit), **place})
        basis = orthonormal_basis(np.stack(units))
        left = self.unit
        for _ in range(2):
            left = left - (basis @ left) @ basis
        share = float(np.linalg.norm(left))
        if share <= 1e-12:
            raise DegenerateError("others: the direction lies in their span, so nothing is left of it")
        facts = {"share": share, "norm": self.norm, "others": taken}
        history = [*self.provenance.get("without", ()), facts]
        return replace(self, vector=left * self.norm, provenance={**self.provenance, "without": history})

    def _metadata(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "version": 1,
            "layer": self.layer,
            "site": self.site,
            "position": self.position,
            "counts": list(self.counts) if self.counts is not None else None,
            "norm": self.norm,
            "provenance": dict(self.provenance),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: ``vector`` in float64, everything else as JSON in its metadata.

        The file appears complete or not at all.

        Raises:
            ArgumentError: ``path`` cannot be written, ``provenance`` is not JSON.
        """
        from safetensors.numpy import save

        try:
            metadata = json.dumps(self._metadata(), sort_keys=True)
        except (TypeError, ValueError) as err:
            raise ArgumentError(f"provenance: expected JSON values ({err})") from err
        write_atomically(path, save({"vector": np.ascontiguousarray(self.vector)}, {_FORMAT: metadata}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Direction:
        """Reads what :meth:`save` wrote.

        Raises:
            ArgumentError: the file cannot be read or is not a direction.
        """
        with reading(path, "Direction") as file:
            metadata = json.loads((file.metadata() or {})[_FORMAT])
            vector = file.get_tensor("vector")
        counts = metadata["counts"]
        return cls(
            vector,
            layer=metadata["layer"],
            site=metadata["site"],
            position=metadata["position"],
            counts=(counts[0], counts[1]) if counts is not None else None,
            provenance=metadata["provenance"],
        )

    def __repr__(self) -> str:
        where = f"layer={self.layer}, site={self.site!r}, position={self.position}"
        return f"Direction(d={self.vector.size}, norm={self.norm:.6g}, {where}, counts={self.counts})"

    def _repr_html_(self) -> str:
        facts = {
            "dimension": self.vector.size,
            "norm": f"{self.norm:.6g}",
            "layer": self.layer,
            "site": self.site,
            "position": self.position,
            "counts (class 0, class 1)": self.counts,
            **self.provenance,
        }
        cells = "".join(
            f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items()
        )
        return f"<table><caption>Direction</caption>{cells}</table>{_profile(self.vector)}"


def _profile(vector: Vector) -> str:
    """The largest components as an inline bar picture: outlier dimensions show at a glance."""
    count = min(vector.size, 64)
    order = np.sort(np.argsort(-np.abs(vector))[:count])
    top = float(np.abs(vector).max())
    heights = [20 * vector[j] / top for j in order]
    bars = "".join(
        f'<rect x="{4 * i}" width="3" y="{20 - max(h, 0):.1f}" height="{abs(h):.1f}"><title>{j}</title></rect>'
        for i, (j, h) in enumerate(zip(order, heights, strict=True))
    )
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{4 * count}" height="40" fill="#456">{bars}</svg>'
    return f'<img alt="largest components" src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}">'


def _to_numpy(x: Any, arg: str) -> npt.NDArray[Any]:
    """Small operands (directions, origins, gains) as float64 NumPy, from wherever they live."""
    if isinstance(x, Direction):
        return x.vector
    if isinstance(x, Sequence) and not isinstance(x, str) and any(isinstance(v, Direction) or is_torch(v) for v in x):
        rows = [_to_numpy(v, arg) for v in x]
        if len({r.shape for r in rows}) != 1:
            raise ShapeError(f"{arg}: expected vectors of one length, got {[r.shape for r in rows]}")
        return np.stack(rows)
    if is_torch(x):
        if x.requires_grad and _grad_enabled():
            raise LayoutError(f"{arg}: no gradient flows to a direction; pass {arg}.detach()")
        if not x.is_floating_point() and x.is_complex():
            raise DTypeError(f"{arg}: expected real numbers, got dtype {x.dtype}")
        return np.asarray(x.detach().cpu().double().numpy())
    if not isinstance(x, (np.ndarray, list, tuple, int, float)) and hasattr(x, "__dlpack__"):
        x = np.from_dlpack(x)
    x = np.asarray(x) if isinstance(x, np.ndarray) else source(x, arg)
    name = getattr(x.dtype, "name", "")
    if x.dtype.kind not in "fiub" and name != "bfloat16":
        raise DTypeError(f"{arg}: expected real numbers, got dtype {x.dtype}")
    return np.asarray(x, dtype=np.float64)


def _grad_enabled() -> bool:
    import torch

    return torch.is_grad_enabled()


def _vectors(q: Any, arg: str, width: int | None = None) -> Vector:
    """``q`` as ``(k, d)`` float64."""
    vectors = np.atleast_1d(_to_numpy(q, arg))
    if vectors.ndim > 2 or vectors.size == 0:
        raise ShapeError(f"{arg}: expected shape (d,) or (k, d), got {vectors.shape}")
    if width is not None and vectors.shape[-1] != width:
        raise ShapeError(f"{arg}: expected vectors of {width}, the last axis of x, got shape {vectors.shape}")
    return np.ascontiguousarray(np.atleast_2d(vectors))


def _vector(v: Any, arg: str, width: int) -> Vector:
    vector = _to_numpy(v, arg)
    if vector.shape != (width,):
        raise ShapeError(f"{arg}: expected shape ({width},), got {vector.shape}")
    if not np.isfinite(vector).all():
        raise NonFiniteError(f"{arg}: non-finite value at index {int(np.argmin(np.isfinite(vector)))}")
    return np.ascontiguousarray(vector)


def single_vector(v: Any, arg: str) -> Vector:
    """The one direction that ``v`` is, ``(d,)`` float64.

    Raises:
        ShapeError, DTypeError: it is several, or none.
    """
    vectors = _vectors(v, arg)
    if len(vectors) != 1:
        raise ShapeError(f"{arg}: expected shape (d,), got {vectors.shape}")
    found: Vector = vectors[0]
    return found


def _finite(value: float, arg: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise DTypeError(f"{arg}: expected a number, got {type(value).__name__}")
    if not np.isfinite(value):
        raise ArgumentError(f"{arg}: expected a finite number, got {value}")
    return float(value)


def _width(x: Any, arg: str = "x") -> int:
    shape = np.shape(x) if isinstance(x, (list, tuple, int, float)) else getattr(x, "shape", None)
    if shape is None:
        raise DTypeError(f"{arg}: expected an array, got {type(x).__name__}")
    if len(shape) == 0 or shape[-1] == 0:
        raise ShapeError(f"{arg}: expected shape (..., d), got {tuple(shape)}")
    return int(shape[-1])


def orthonormal_basis(q: Any) -> Vector:
    """Orthonormal rows that span the rows of ``q``.

    Independent rows keep their order (modified Gram–Schmidt, run twice: the first basis vector is the first row over
    its length); dependent rows are replaced by the leading right singular vectors. Singular values at or below
    ``σ₁ · max(k, d) · 2⁻⁵² · 8`` count as zero.

    Args:
        q: ``(d,)`` or ``(k, d)``.

    Returns:
        ``(rank, d)`` float64.

    Raises:
        ShapeError, DTypeError: ``q`` is not one or several vectors of numbers.
        NonFiniteError: ``q`` holds a NaN or an infinity.
        DegenerateError: every vector is zero.
    """
    return _native.orthonormal(_vectors(q, "q"))


class Edit:
    """An edit of rows with its vectors prepared once: what the functions of this module build, reusable in a loop.

    ``y = x − scale · Σ_i (x·left_i − origin·left_i) right_i + shift``, then rescaled to the length of ``x`` if
    ``preserve_norm``.
    """

    def __init__(
        self,
        width: int,
        left: Vector | None = None,
        *,
        right: Vector | None = None,
        origin: Vector | None = None,
        scale: float = 1.0,
        shift: Vector | None = None,
        preserve_norm: bool = False,
    ) -> None:
        self.left, self.right, self.origin, self.shift = left, right, origin, shift
        self.scale, self.preserve_norm = _finite(scale, "scale"), bool(preserve_norm)
        #: The vectors as tensors per (device, dtype), filled by the torch form.
        self.tensors: dict[Any, Any] = {}
        self._native = _native.Edit(
            width, left, right=right, origin=origin, scale=self.scale, shift=shift, keep_norm=preserve_norm
        )

    @property
    def width(self) -> int:
        """Length of the rows."""
        return self._native.width

    @property
    def rank(self) -> int:
        """Number of independent directions."""
        return self._native.rank

    def _check(self, x: Any) -> None:
        if _width(x) != self.width:
            raise ShapeError(f"x: expected a last axis of {self.width}, got shape {tuple(np.shape(x))}")

    def apply(self, x: ArrayT) -> ArrayT:
        """The edited rows of ``x`` as a new array of its kind; differentiable where ``x`` requires grad."""
        self._check(x)
        if (path := device_path(x, "edit")) is not None:
            return path(x, self)  # type: ignore[no-any-return]
        if is_torch(x) and x.requires_grad and _grad_enabled():  # type: ignore[attr-defined]
            from ..integrations.torch import differentiable_edit

            return differentiable_edit(x, self)  # type: ignore[no-any-return]
        read = source(x, "x")
        out = empty_like(read)
        self._native.apply(read, out)
        return like(out, x)  # type: ignore[no-any-return]

    def apply_(self, x: ArrayT) -> ArrayT:
        """Edits the rows of ``x`` in place and returns it."""
        self._check(x)
        if (path := device_path(x, "edit_")) is not None:
            return path(x, self)  # type: ignore[no-any-return]
        with target(x, "x") as rows:
            self._native.apply_(rows)
        return x

    def coefficients(self, x: Any) -> Any:
        """``x·left_i − origin·left_i``, shape ``(..., rank)``: float64 for float64 ``x``, else float32.

        Differentiable where ``x`` requires grad, by the torch form.
        """
        self._check(x)
        if (path := device_path(x, "edit_coefficients")) is not None:
            return path(x, self)
        if is_torch(x) and x.requires_grad and _grad_enabled():
            from ..integrations.torch import edit_coefficients

            return edit_coefficients(x, self)
        x_read = source(x, "x")
        shape = (*x_read.shape[:-1], self.rank)
        if is_torch(x_read):
            import torch

            out: Any = torch.empty(shape, dtype=torch.float64 if x_read.dtype == torch.float64 else torch.float32)
        else:
            out = np.empty(shape, np.float64 if str(x_read.dtype).endswith("float64") else np.float32)
        self._native.coefficients(x_read, out)
        return like(out, x)


def _ablation(x: Any, q: Any, scale: float, preserve_norm: bool, origin: Any = None) -> Edit:
    width = _width(x)
    basis = _native.orthonormal(_vectors(q, "q", width))
    start = None if origin is None else _vector(origin, "origin", width)
    return Edit(width, basis, origin=start, scale=scale, preserve_norm=preserve_norm)


def project(x: Any, q: Any) -> Any:
    """Coefficients of the rows of ``x`` along ``q``.

    Args:
        x: ``(..., d)``.
        q: one direction ``(d,)``, or several ``(k, d)``.

    Returns:
        ``(...)`` for one direction, ``(..., rank)`` for several: products with the rows of
        :func:`orthonormal_basis`, float64 for float64 ``x``, else float32. The kind of array that ``x`` is.

    Raises:
        ShapeError, DTypeError, LayoutError, DeviceError: an argument does not fit.
        NonFiniteError, DegenerateError: ``q`` is not finite, or spans nothing.
    """
    single = np.ndim(q if isinstance(q, Direction) else _to_numpy(q, "q")) == 1
    found = _ablation(x, q, 1.0, False).coefficients(x)
    return found[..., 0] if single else found


def ablate(x: ArrayT, q: Any, *, scale: float = 1.0, preserve_norm: bool = False) -> ArrayT:
    """``x − scale · (x Qᵀ) Q``: the rows of ``x`` without their components along ``q`` (Arditi et al. 2024, eq. 4).

    Args:
        x: ``(..., d)``; may require grad, the result is then differentiable in ``x``.
        q: ``(d,)`` or ``(k, d)``; removed jointly, as the orthonormal rows Q that span them.
        scale: 1 removes, 2 reflects, negative values amplify.
        preserve_norm: rescale every row to the length it had, unless less than 1e-6 of it is left.

    Returns:
        A new array of the kind, shape and dtype of ``x``. What is left along a unit direction r is bounded by the
        rounding of the result: ``|y·r| ≤ u Σ|y_i r_i|`` (u = 2⁻⁸ for bfloat16, 2⁻¹¹ for float16), plus
        ``(32 + 2k) · 2⁻²⁴ Σ_j Σ_i |x_i q_ji|`` of the float32 arithmetic.

    Raises:
        ShapeError, DTypeError, LayoutError, DeviceError: an argument does not fit.
        ArgumentError: ``scale`` is not finite.
        NonFiniteError, DegenerateError: ``q`` is not finite, or spans nothing.
    """
    return _ablation(x, q, scale, preserve_norm).apply(x)


def ablate_(x: ArrayT, q: Any, *, scale: float = 1.0, preserve_norm: bool = False) -> ArrayT:
    """:func:`ablate` in place: each row is read and written once. Returns ``x``.

    Raises:
        As :func:`ablate`; LayoutError also if ``x`` is read-only, overlaps itself, or requires grad outside
        ``torch.no_grad()``. Nothing has been written then.
    """
    return _ablation(x, q, scale, preserve_norm).apply_(x)


def affine_ablate_(x: ArrayT, q: Any, origin: Any, *, scale: float = 1.0, shift: Any = None) -> ArrayT:
    """``x − scale · ((x − origin) Qᵀ) Q + shift`` in place: every row gets the component of ``origin`` along ``q``.

    With the mean of the negative class as ``origin`` and ``α`` times the difference in means as ``shift`` this is
    affine concept editing (Marshall et al. 2024, arXiv 2411.09003); α = 0 acts like the negative class.

    Args:
        x: ``(..., d)``.
        q: ``(d,)`` or ``(k, d)``.
        origin: ``(d,)``; zeros give :func:`ablate_`.
        scale: as in :func:`ablate`.
        shift: ``(d,)``, added in the same pass; None adds nothing.

    Returns:
        ``x``.

    Raises:
        As :func:`ablate_`; NonFiniteError also for ``origin`` and ``shift``.
    """
    width = _width(x)
    basis = _native.orthonormal(_vectors(q, "q", width))
    edit = Edit(
        width,
        basis,
        origin=_vector(origin, "origin", width),
        scale=scale,
        shift=None if shift is None else _vector(shift, "shift", width),
    )
    return edit.apply_(x)


def steering_edit(v: Any, width: int, scale: float, *, unit: bool = False, preserve_norm: bool = False) -> Edit:
    """The :class:`Edit` that adds ``scale · v`` to rows of ``width``."""
    vector = _vector(v, "v", width)
    if unit:
        if not vector.any():
            raise DegenerateError("v: every element is zero, so it has no unit vector")
        vector = orthonormal_basis(vector)[0]
    return Edit(width, shift=_finite(scale, "scale") * vector, preserve_norm=preserve_norm)


def steer_(x: ArrayT, v: Any, scale: float = 1.0, *, unit: bool = False, preserve_norm: bool = False) -> ArrayT:
    """``x + scale · v`` in place (activation addition, Turner et al. 2023).

    Args:
        x: ``(..., d)``.
        v: ``(d,)``; its length matters unless ``unit``.
        scale: multiples of ``v``; negative steers away.
        unit: divide ``v`` by its length first.
        preserve_norm: rescale every row to the length it had.

    Returns:
        ``x``.

    Raises:
        As :func:`ablate_`; DegenerateError if ``unit`` and ``v`` is zero.
    """
    return steering_edit(v, _width(x), scale, unit=unit, preserve_norm=preserve_norm).apply_(x)
