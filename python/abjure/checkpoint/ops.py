"""What can be done to a checkpoint: removing a direction, scaling tensors, dampening weights.

An op says what is wanted; :mod:`abjure.checkpoint.layout` says which stored tensors that touches in a given checkpoint.
Numbers may be :class:`decimal.Decimal`, so that a recipe keeps them as they were written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, Literal, get_args

import numpy as np

from ..errors import ArgumentError, DTypeError, ShapeError
from ..refuse import Direction
from ..refuse.architectures import Component
from ..refuse.directions import Vector, orthonormal_basis
from ..refuse.model_edit import Tied
from ..refuse.weights import NormPreserving

Number = int | float | Decimal
Path = str | os.PathLike[str]

#: Kinds of residual writers, by which :attr:`Ablate.scale` may differ.
COMPONENTS = get_args(Component)
#: How a norm-preserving ablation keeps lengths; see :func:`abjure.refuse.orthogonalize_`.
FORMS = get_args(NormPreserving)
TIED = get_args(Tied)


@dataclass(frozen=True, eq=False)
class Ablate:
    """Removes a direction from every tensor that writes to the residual stream (Arditi et al. 2024, eq. 5).

    What :func:`abjure.refuse.orthogonalize_model_` does to a loaded model, on the stored tensors.

    Attributes:
        direction: path of a saved :class:`abjure.refuse.Direction`, or a Direction, or vectors ``(d,)`` or ``(k, d)``.
        scale: 1 removes, 2 reflects, negative values amplify; or one for each component (``"embedding"``,
            ``"attention"``, ``"mlp"``, ``"experts"``), where those left out are not edited.
        layers: indices of the blocks to edit, negative from the end; None for every block and the embeddings.
        tensors: patterns with shell wildcards that choose among the known writers; or a mapping of pattern to axis,
            which takes the place of the table: every stored tensor that matches is a writer, along that axis.
            ``"*.qkv_proj.weight:q"`` is a part of a fused tensor, see :class:`Scale`; its axis has to be the last.
        norm_preserving: ``"in"``, ``"row"`` or ``"row_pre"``, as :func:`abjure.refuse.orthogonalize_`.
        tied: what to do with an embedding that is also the output head: ``"skip"`` (also None), ``"untie"``,
            ``"edit"``, as :func:`abjure.refuse.orthogonalize_model_`.

    Raises:
        ArgumentError, DTypeError: an option is not one of these.
    """

    direction: Any
    scale: Number | Mapping[str, Number] = 1.0
    layers: int | Iterable[int] | None = None
    tensors: str | Iterable[str] | Mapping[str, int] | None = None
    norm_preserving: NormPreserving | None = None
    tied: Tied | None = None

    kind = "ablate"

    def __post_init__(self) -> None:
        if self.direction is None:
            raise DTypeError("direction: expected a path, a Direction or an array, got None")
        if isinstance(self.scale, Mapping):
            if unknown := [k for k in self.scale if k not in COMPONENTS]:
                raise ArgumentError(f"scale: expected components among {COMPONENTS}, got {unknown[0]!r}")
            if not self.scale:
                raise ArgumentError("scale: expected a scale for one component or more, got none")
            _set(self, scale={k: _number(v, f"scale.{k}") for k, v in self.scale.items()})
        else:
            _set(self, scale=_number(self.scale, "scale"))
        _set(self, layers=_layers(self.layers))
        if isinstance(self.tensors, Mapping):
            if not self.tensors:
                raise ArgumentError("tensors: expected one pattern or more, got none")
            for pattern, axis in self.tensors.items():
                if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
                    raise DTypeError(f"tensors.{pattern!r}: expected an axis (an integer), got {axis!r}")
            patterns = _patterns(self.tensors, "tensors")
            _set(self, tensors={p: int(a) for p, a in zip(patterns, self.tensors.values(), strict=True)})
        else:
            _set(self, tensors=None if self.tensors is None else _patterns(self.tensors, "tensors"))
        if self.norm_preserving not in (None, *FORMS):
            raise ArgumentError(f"norm_preserving: expected one of {FORMS}, got {self.norm_preserving!r}")
        if self.tied not in (None, *TIED):
            raise ArgumentError(f"tied: expected one of {TIED}, got {self.tied!r}")

    def scale_of(self, component: str) -> float:
        """The scale for one component; 0 where it is not to be edited."""
        return float(self.scale.get(component, 0) if isinstance(self.scale, Mapping) else self.scale)

    def basis(self, width: int | None = None) -> Vector:
        """Orthonormal rows ``(k, d)`` float64 that span the direction, read from its file where it is a path.

        Raises:
            ArgumentError: the file cannot be read or is not a direction.
            ShapeError: ``d`` is not ``width``.
            NonFiniteError, DegenerateError: it is not finite, or spans nothing.
        """
        given = self.direction
        basis = orthonormal_basis(Direction.load(given) if isinstance(given, (str, os.PathLike)) else given)
        if width is not None and basis.shape[1] != width:
            raise ShapeError(f"direction: expected vectors of {width}, the model's hidden size, got {basis.shape[1]}")
        return basis


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiplies stored tensors by a factor.

    Attributes:
        tensors: patterns of stored names, with shell wildcards; each has to match a tensor. Of a tensor that several
            were fused into, ``:q``, ``:k``, ``:v``, ``:gate`` or ``:up`` after the pattern is that part, where the
            table knows how the family puts them together.
        factor: any finite number; 0 erases.
        layers: of the matches, only those in these blocks; None for all.

    Raises:
        ArgumentError, DTypeError: an option is not one of these.
    """

    tensors: str | Iterable[str]
    factor: Number
    layers: int | Iterable[int] | None = None

    kind = "scale"

    def __post_init__(self) -> None:
        _set(
            self,
            tensors=_patterns(self.tensors, "tensors"),
            factor=_number(self.factor, "factor"),
            layers=_layers(self.layers),
        )


@dataclass(frozen=True, eq=False)
class Dampen:
    """Selective Synaptic Dampening (arXiv 2308.07707) on the stored tensors, as :func:`abjure.forget.dampen_`.

    Attributes:
        forget: path of a saved :class:`abjure.forget.Fisher` of the forget set, or a Fisher.
        retain: the same of the retained, or of all, data.
        alpha: selection weighting, 0 or more.
        lam: dampening constant, 0 or more.
        include: patterns of stored names; only those are dampened.
        exclude: patterns of stored names to leave alone.

    Raises:
        ArgumentError, DTypeError: an option is not one of these.
    """

    forget: Any
    retain: Any
    alpha: Number = 10.0
    lam: Number = 1.0
    include: str | Iterable[str] | None = None
    exclude: str | Iterable[str] | None = None

    kind = "dampen"

    def __post_init__(self) -> None:
        for name in ("forget", "retain"):
            if getattr(self, name) is None:
                raise DTypeError(f"{name}: expected a path or a Fisher, got None")
        for name in ("alpha", "lam"):
            value = _number(getattr(self, name), name)
            if value < 0:
                raise ArgumentError(f"{name}: expected 0 or more, got {value}")
            _set(self, **{name: value})
        for name in ("include", "exclude"):
            if (given := getattr(self, name)) is not None:
                _set(self, **{name: _patterns(given, name)})


Op = Ablate | Scale | Dampen
OPS: dict[str, type[Ablate] | type[Scale] | type[Dampen]] = {op.kind: op for op in (Ablate, Scale, Dampen)}
Kind = Literal["ablate", "scale", "dampen"]


def options(op: Op) -> dict[str, Any]:
    """The options of an op that differ from their defaults, in the order of its fields."""
    found = {}
    for f in fields(op):
        value = getattr(op, f.name)
        if value is not f.default and not (isinstance(value, (int, float, Decimal)) and value == f.default):
            found[f.name] = value
    return found


def _set(op: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(op, name, value)


def _number(value: Any, arg: str) -> Number:
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal, np.integer, np.floating)):
        raise DTypeError(f"{arg}: expected a number, got {value!r}")
    try:
        finite = math.isfinite(float(value))
    except (OverflowError, ValueError):
        finite = False
    if not finite:
        raise ArgumentError(f"{arg}: expected a finite number, got {value}")
    return value.item() if isinstance(value, np.generic) else value


def _layers(layers: Any) -> list[int] | None:
    if layers is None:
        return None
    found = [layers] if isinstance(layers, (int, np.integer)) else layers
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise DTypeError(f"layers: expected indices of blocks, got {layers!r}")
    found = list(found)
    for layer in found:
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
            raise DTypeError(f"layers: expected indices of blocks, got {layer!r}")
    if not found:
        raise ArgumentError("layers: expected one index or more, got none; None means every block")
    return [int(layer) for layer in found]


def _patterns(patterns: Any, arg: str) -> list[str]:
    found = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(found, Iterable):
        raise DTypeError(f"{arg}: expected name patterns, got {patterns!r}")
    found = list(found)
    for pattern in found:
        if not isinstance(pattern, str) or not pattern:
            raise DTypeError(f"{arg}: expected name patterns, got {pattern!r}")
    if not found:
        raise ArgumentError(f"{arg}: expected one pattern or more, got none")
    return found
