"""A uniform sample of rows from two streams, one for each class, in memory that does not grow with the streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .._interop import is_torch
from ..errors import ArgumentError, DTypeError

Keys = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: Keys) -> Keys:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Keys = x ^ (x >> np.uint64(31))
    return mixed


def keys(seed: int, label: int, first: int, count: int) -> Keys:
    """Keys of rows ``first`` to ``first + count − 1`` of a class: distinct within a stream, uniform on 64 bits."""
    with np.errstate(over="ignore"):
        stream = _mixed(_mixed(np.array([seed], np.uint64) + _GOLDEN) + np.uint64(label + 1) * _GOLDEN)
        index = np.arange(first, first + count, dtype=np.uint64)
        return _mixed(stream + (index + np.uint64(1)) * _GOLDEN)


class Reservoir:
    """Up to ``size`` rows of each class, every subset of that size of the rows seen equally likely.

    Row i of a class gets a 64-bit key that depends on the seed, the class and i alone, and the rows with the smallest
    keys are kept (bottom-k sampling, Cohen and Kaplan 2007). How the rows were batched does not matter, and the sample
    of two streams together is the rows with the smallest keys among both samples, so merging in any order gives the
    uniform sample of all rows, provided the streams had different seeds.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        for name, value, least in (("reservoir", size, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise DTypeError(f"{name}: expected a whole number, got {value!r}")
            if not least <= value < 1 << 63:
                raise ArgumentError(f"{name}: expected {least} or more, below 2^63, got {value}")
        self.size, self.seed = int(size), int(seed)
        #: Rows drawn from so far, of each class, by the seed of their keys.
        self.drawn: dict[int, list[int]] = {}
        self.keys: list[Keys] = [np.empty(0, np.uint64) for _ in range(2)]
        self.rows: list[npt.NDArray[Any] | None] = [None, None]

    def update(self, x: Any, labels: Any) -> None:
        """Offers the rows of ``x`` ``(..., d)``; those that are not finite are left out."""
        width = int(x.shape[-1])
        if not is_torch(x) and not isinstance(x, np.ndarray):
            x = np.from_dlpack(x)
        flat = x.reshape(-1, width)
        drawn = self.drawn.setdefault(self.seed, [0, 0])
        for label in (0, 1):
            where = np.arange(len(flat)) if labels.ndim == 0 else np.arange(len(flat))[labels.reshape(-1) == label]
            if labels.ndim == 0 and int(labels) != label:
                continue
            found = keys(self.seed, label, drawn[label], len(where))
            drawn[label] += len(where)
            if len(self.keys[label]) == self.size:
                small = found < self.keys[label][-1]
                where, found = where[small], found[small]
            # In order of their keys, as many as fit, until enough finite ones are found.
            order = np.argsort(found)
            while len(order):
                part, order = order[: self.size], order[self.size :]
                rows = _wide(flat, where[part])
                finite = np.isfinite(rows).all(-1)
                self._add(label, found[part][finite], rows[finite])
                if finite.all():
                    break

    def _add(self, label: int, found: Keys, rows: npt.NDArray[Any]) -> None:
        held = self.rows[label]
        merged = found if held is None else np.concatenate([self.keys[label], found])
        stacked = rows if held is None else np.concatenate([held, rows])
        order = np.argsort(merged, kind="stable")[: self.size]
        self.keys[label], self.rows[label] = merged[order], stacked[order]

    def check(self, other: Reservoir) -> None:
        """Refuses to merge streams of one seed: both samples would hold the same places of their streams.

        Raises:
            ArgumentError: as said.
        """
        shared = sorted(seed for seed, n in self.drawn.items() if sum(n) and sum(other.drawn.get(seed, (0, 0))))
        if shared:
            raise ArgumentError(f"other: expected a reservoir with another seed than {shared[0]}, one for each worker")

    def merge(self, other: Reservoir) -> None:
        """Adds the rows that ``other`` was offered; errors as :meth:`check`."""
        self.check(other)
        for label, rows in enumerate(other.rows):
            if rows is not None:
                self._add(label, other.keys[label], rows)
        for seed, counts in other.drawn.items():
            if sum(counts):
                self.drawn[seed] = list(counts)

    def copy(self) -> Reservoir:
        """Another with the same rows; arrays are replaced on change, never written, so they are shared."""
        new = Reservoir(self.size, self.seed)
        new.drawn = {seed: list(n) for seed, n in self.drawn.items()}
        new.keys, new.rows = list(self.keys), list(self.rows)
        return new

    def sample(self, width: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Rows ``(m, d)`` of class 0, then of class 1, and their labels ``(m,)``."""
        kept = [r for r in self.rows if r is not None]
        rows = np.concatenate(kept) if kept else np.empty((0, width), np.float32)
        return rows, np.repeat(np.arange(2), [len(k) for k in self.keys])

    def state(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Arrays and JSON values that :meth:`from_state` takes."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for label, rows in enumerate(self.rows):
            if rows is not None:
                arrays[f"{label}.keys"], arrays[f"{label}.rows"] = self.keys[label], rows
        drawn = [[seed, *counts] for seed, counts in self.drawn.items()]
        return arrays, {"size": self.size, "seed": self.seed, "drawn": drawn}

    @classmethod
    def from_state(cls, arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any], width: int) -> Reservoir:
        """What :meth:`state` gave.

        Raises:
            ValueError, KeyError: it does not fit together.
        """
        new = cls(facts["size"], facts["seed"])
        new.drawn = {int(seed): [int(a), int(b)] for seed, a, b in facts["drawn"]}
        for label in (0, 1):
            if f"{label}.keys" not in arrays:
                continue
            found, rows = arrays[f"{label}.keys"], arrays[f"{label}.rows"]
            ordered = found.dtype == np.uint64 and found.ndim == 1 and bool((np.diff(found.astype(object)) > 0).all())
            if not ordered or len(found) > new.size or rows.shape != (len(found), width):
                raise ValueError("reservoir: keys and rows do not fit together")
            if rows.dtype not in (np.float32, np.float64) or not np.isfinite(rows).all():
                raise ValueError("reservoir: expected finite rows")
            new.keys[label], new.rows[label] = found, rows
        return new


def _wide(flat: Any, where: Any) -> npt.NDArray[Any]:
    """Rows of a matrix, a copy: float64 as it is, everything else widened to float32."""
    if is_torch(flat):
        import torch

        rows = flat[torch.from_numpy(where)]
        return np.asarray(rows.numpy() if rows.dtype == torch.float64 else rows.float().numpy())
    rows = flat[where]
    return np.asarray(rows, dtype=np.float64 if rows.dtype == np.float64 else np.float32)
