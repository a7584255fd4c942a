"""Named parameters: where they come from, which of them share memory, and how patterns choose among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import numpy as np

from .._interop import is_torch
from ..errors import ArgumentError, DTypeError, LayoutError


def named(model: Any, arg: str = "model") -> dict[str, Any]:
    """Name to parameter of a torch module (as ``named_parameters()``) or of a mapping, in order.

    Raises:
        DTypeError: ``model`` is neither, or holds something that is not an array.
    """
    if isinstance(model, Mapping):
        found = dict(model)
    elif hasattr(model, "named_parameters"):
        found = dict(model.named_parameters())
    else:
        raise DTypeError(f"{arg}: expected a torch module or a mapping of name to array, got {type(model).__name__}")
    for name, p in found.items():
        if not (isinstance(name, str) and hasattr(p, "shape")):
            raise DTypeError(f"{arg}: expected names and arrays, got {name!r}: {type(p).__name__}")
    return found


def _memory(p: Any) -> tuple[Any, ...] | None:
    """Device, first and last byte, shape, strides in bytes (None if C-contiguous); None for an array without bytes."""
    if is_torch(p):
        if p.numel() == 0 or p.is_meta:
            return None
        size, start, device = p.element_size(), p.data_ptr(), "cpu" if p.is_cpu else str(p.device)
        if p.is_contiguous():  # a short way: models have hundreds of tensors, and nearly all are so
            return device, start, start + p.numel() * size, p.shape, None
        shape, strides = tuple(p.shape), tuple(s * size for s in p.stride())
    else:
        p = np.asarray(p) if not isinstance(p, np.ndarray) else p
        if p.size == 0:
            return None
        shape, strides, start, size = p.shape, p.strides, p.__array_interface__["data"][0], p.itemsize
        device = "cpu"
        if p.flags.c_contiguous:
            return device, start, start + p.nbytes, shape, None
    reach = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    low = start + sum(r for r in reach if r < 0)
    high = start + sum(r for r in reach if r > 0) + size
    return device, low, high, shape, tuple(s for n, s in zip(shape, strides, strict=True) if n > 1)


def ties(parameters: Mapping[str, Any]) -> list[list[str]]:
    """Groups of names that are the same memory (start, shape and strides), in order of first appearance.

    Raises:
        LayoutError: two parameters overlap without being the same, so that changing one changes part of the other.
    """
    groups: dict[Any, list[str]] = {}
    for name, p in parameters.items():
        groups.setdefault(_memory(p) or ("empty", name), []).append(name)
    spans = sorted(((*key[:3], names[0]) for key, names in groups.items() if key[0] != "empty"), key=lambda s: s[:3])
    for (device, _, end, name), (other_device, start, _, other) in pairwise(spans):
        if device == other_device and start < end:
            raise LayoutError(f"model: {name!r} and {other!r} share part of their memory; pass one of them")
    return list(groups.values())


def _patterns(patterns: str | Iterable[str] | None, arg: str) -> list[str] | None:
    if patterns is None:
        return None
    found = [patterns] if isinstance(patterns, str) else list(patterns)
    for p in found:
        if not isinstance(p, str):
            raise DTypeError(f"{arg}: expected name patterns, got {p!r}")
    return found


def chosen(
    names: Iterable[str],
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> list[str]:
    """Names that match any pattern of ``include`` (all if None) and none of ``exclude``; shell wildcards.

    Raises:
        ArgumentError: a pattern matches no name.
    """
    names = list(names)
    include, exclude = _patterns(include, "include"), _patterns(exclude, "exclude")
    for arg, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(n, pattern) for n in names):
                raise ArgumentError(f"{arg}: expected a pattern that matches a parameter, got {pattern!r}")

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, p) for p in patterns)

    return [n for n in names if (include is None or matches(n, include)) and not matches(n, exclude or [])]


def modules(names: Iterable[str], depth: int | None = None) -> dict[str, list[str]]:
    """Parameter names by the module that holds them (by the first ``depth`` parts of its name), in order.

    Raises:
        ArgumentError: a depth below 1.
    """
    if depth is not None and depth < 1:
        raise ArgumentError(f"depth: expected 1 or more, got {depth}")
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(".".join(name.split(".")[:-1][:depth]), []).append(name)
    return found


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Names for a message, the first few of them."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(n) for n in names[:limit]) + more
