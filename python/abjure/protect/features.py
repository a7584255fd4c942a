"""Feature maps that the Bayes error is read in, and the gradient pulled back through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._modes import evaluating
from ..errors import ArgumentError, NonFiniteError, ShapeError
from .bayes import Array, Bandwidth


@dataclass(frozen=True)
class FeatureMap:
    """A map of rows into the space that distances are taken in, for ``maximize_bayes_error(features=...)``.

    A module is run in eval mode, on its own device and in its own dtype, and is otherwise left as it is: its parameters
    get no gradient. Whatever crosses to it is a batch; the kernel work is done on the features by the library.
    """

    #: Takes a tensor ``(b, ...)`` of rows in the shape of ``x`` (bytes as multiples of 1/255), gives one ``(b, ...)``
    #: that torch can differentiate. None: the values themselves.
    map: Callable[[Any], Any] | None
    #: As in :func:`bayes_error`, in the units of the features; None as in :func:`maximize_bayes_error`.
    bandwidth: Bandwidth | None = None
    #: Share of this map's objective, relative to those of the others.
    weight: float = 1.0
    #: Rows that pass through the map at a time.
    batch: int = 256

    def __post_init__(self) -> None:
        if self.map is not None and not callable(self.map):
            raise ArgumentError(f"features: expected a callable or None, got {self.map!r}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ArgumentError(f"features: expected a positive weight, got {self.weight!r}")
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise ArgumentError(f"features: expected a positive batch, got {self.batch!r}")

    def values(self, points: Array, shape: tuple[int, ...]) -> Array:
        """``(m, f)`` features of ``(m, d)`` points whose rows have ``shape``.

        Raises:
            ShapeError: another number of rows comes out, or none of the features.
            NonFiniteError: a feature that is NaN or infinite.
        """
        if self.map is None:
            return points
        import torch

        parts = []
        with torch.no_grad(), self._ready():
            for start in range(0, len(points), self.batch):
                rows = self._tensor(points[start : start + self.batch], shape)
                parts.append(self._numpy(self._apply(rows), points.dtype))
        found = np.concatenate(parts)
        if not np.isfinite(found).all():
            row = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
            raise NonFiniteError(f"features: non-finite value for row {row} of a batch")
        return found

    def pull_back(self, points: Array, shape: tuple[int, ...], gradient: Array) -> Array:
        """The vector-Jacobian product: ``(m, d)`` from the ``(m, f)`` gradient in the features.

        Raises:
            ArgumentError: the map's values do not depend on its input as far as torch can see.
            NonFiniteError: the product is NaN or infinite.
        """
        if self.map is None:
            return gradient
        import torch

        out = np.empty_like(points)
        with torch.set_grad_enabled(True), self._ready():
            for start in range(0, len(points), self.batch):
                part = slice(start, start + self.batch)
                rows = self._tensor(points[part], shape).requires_grad_(True)
                found = self._apply(rows)
                if not found.requires_grad:
                    raise ArgumentError(
                        "features: expected a map that torch can differentiate, got values without a graph"
                    )
                towards = torch.from_numpy(np.ascontiguousarray(gradient[part])).to(found).reshape(found.shape)
                (pulled,) = torch.autograd.grad(found, rows, towards)
                out[part] = self._numpy(pulled, points.dtype)
        if not np.isfinite(out).all():
            row = int(np.flatnonzero(~np.isfinite(out).all(axis=1))[0])
            raise NonFiniteError(f"features: non-finite vector-Jacobian product for row {row} of a batch")
        return out

    def _ready(self) -> AbstractContextManager[None]:
        import torch

        return evaluating(self.map) if isinstance(self.map, torch.nn.Module) else nullcontext()

    def _tensor(self, points: Array, shape: tuple[int, ...]) -> Any:
        import torch

        rows = torch.from_numpy(np.ascontiguousarray(points)).reshape(len(points), *shape)
        if isinstance(self.map, torch.nn.Module):
            # The first floating-point weight stands for all: mixed modules convert for themselves.
            for weight in self.map.parameters():
                if weight.is_floating_point():
                    return rows.to(weight.device, weight.dtype)
        return rows.clone()

    def _apply(self, rows: Any) -> Any:
        import torch

        assert self.map is not None
        found = self.map(rows)
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            raise ArgumentError(f"features: expected a floating-point tensor, got {type(found).__name__}")
        if found.ndim < 2 or found.shape[0] != rows.shape[0] or found.numel() == 0:
            raise ShapeError(f"features: expected {rows.shape[0]} rows of features, got shape {tuple(found.shape)}")
        return found

    @staticmethod
    def _numpy(found: Any, dtype: np.dtype[Any]) -> Array:
        return np.asarray(found.detach().flatten(1).double().cpu().numpy().astype(dtype))


def feature_maps(features: Any) -> tuple[FeatureMap, ...]:
    """``features=`` as maps: None, a callable, a :class:`FeatureMap`, or several of these.

    Raises:
        ArgumentError: anything else.
    """
    several = isinstance(features, Sequence) and not isinstance(features, (str, bytes))
    given = list(features) if several else [features]
    if not given:
        raise ArgumentError("features: expected at least one map, got none")
    return tuple(f if isinstance(f, FeatureMap) else FeatureMap(f) for f in given)
