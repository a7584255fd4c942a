"""Two importances that belong together: what dampening and its selection rules check before they look at a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .._interop import device_path, is_torch, source
from ..errors import AbjureError, ArgumentError, DTypeError, ShapeError
from .fisher import Fisher
from .params import listed, named

#: What a look for one importance above 0 reads first.
_FIRST = 4096


class Importance:
    """Sums and count of a Fisher, or a mapping of importances as they are."""

    def __init__(self, given: Any, arg: str) -> None:
        self.arg = arg
        self.fisher = given if isinstance(given, Fisher) else None
        if self.fisher is not None:
            if not self.fisher.count > 0:
                raise ArgumentError(f"{arg}: expected a Fisher that has seen gradients, got a count of 0")
            self.count = self.fisher.count
            self.arrays = {name: self.fisher.sum(name) for name in self.fisher}
        elif isinstance(given, Mapping):
            self.count = 1.0
            self.arrays = named(given, arg)
        else:
            raise DTypeError(f"{arg}: expected a Fisher or a mapping of name to array, got {type(given).__name__}")


def pair(forget: Any, retain: Any) -> tuple[Importance, Importance]:
    """The two importances, of one kind, unit, power and set of names.

    Raises:
        ArgumentError: a Fisher without gradients; units, powers or names differ.
        DTypeError: neither Fisher nor mapping, or one of each.
    """
    f, d = Importance(forget, "forget"), Importance(retain, "retain")
    if (f.fisher is None) != (d.fisher is None):
        raise DTypeError("retain: expected the same kind of importance as forget (two Fisher or two mappings)")
    for what in ("unit", "power"):
        ours, theirs = getattr(f.fisher, what, None), getattr(d.fisher, what, None)
        if ours != theirs:
            raise ArgumentError(f"retain: expected {what} {ours!r} as forget has, got {theirs!r}")
    if f.arrays.keys() != d.arrays.keys():
        differing = listed(f.arrays.keys() ^ d.arrays.keys())
        raise ArgumentError(f"retain: expected the names of forget, got a difference in {differing}")
    return f, d


def check_alike(f: Importance, d: Importance, names: Iterable[str]) -> None:
    """Shapes and dtypes of the two agree, and ``retain`` is not 0 everywhere.

    Raises:
        ShapeError, DTypeError: a pair does not fit.
        ArgumentError: every weight would be erased that the forget set uses at all.
    """
    names = list(names)
    for name in names:
        a, b = f.arrays[name], d.arrays[name]
        if a.shape != b.shape and tuple(a.shape) != tuple(b.shape):
            raise ShapeError(f"retain: {name!r}: expected shape {tuple(a.shape)}, got {tuple(b.shape)}")
        if a.dtype is not b.dtype and _dtype(a) != _dtype(b):
            raise DTypeError(f"retain: {name!r}: expected dtype {a.dtype}, got {b.dtype}")
    if names and any(_size(d.arrays[n]) for n in names) and not any(_above_zero(d.arrays[n]) for n in names):
        raise ArgumentError(
            "retain: expected an importance above 0 somewhere, got 0 everywhere (were gradients of the retained "
            "data ever added?)"
        )


def by_name(err: AbjureError, names: list[str]) -> AbjureError:
    """The error of a native call on several tensors, with the name of the tensor it speaks of."""
    index = getattr(err, "tensor", None)
    return err if index is None else type(err)(f"{names[index]!r}: {err}")


def on_device(arrays: Iterable[Any], kernel: str) -> bool:
    """Whether any of them is a tensor that the native kernels cannot read."""
    return any(device_path(a, kernel) is not None for a in arrays)


def readable(arrays: Iterable[Any], arg: str) -> list[Any]:
    """The arrays as the native kernels can read them."""
    return [source(a, arg) for a in arrays]


def _dtype(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def _size(x: Any) -> int:
    return math.prod(x.shape)


def _above_zero(x: Any) -> bool:
    """Whether any element differs from 0. NaN counts, as do arrays that cannot be read: others complain about those."""
    if is_torch(x) and (x.is_meta or not x.is_floating_point()):
        return True
    x = x.detach() if is_torch(x) else np.asarray(x)
    if not is_torch(x) and x.dtype.kind in "iucbOSU":
        return True
    x = x.reshape(-1)
    return bool((x[:_FIRST] != 0).any()) or bool((x != 0).any())
