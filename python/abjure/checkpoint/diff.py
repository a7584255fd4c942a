"""Two checkpoints side by side: which tensors differ, by how much, and in how many directions."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .stored import Place, Shard, opened

Array = np.ndarray[Any, Any]

#: Bytes of one tensor that are looked at together.
_PIECE = 8 << 20
#: Bits of the significand that are stored.
_SIGNIFICANDS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
#: Vectors of the sketch beyond the largest rank that is told.
_OVER = 8
#: Times the energy that rounding may have put into a difference, which no direction has to explain.
_SLACK = 3.0


@dataclass(frozen=True)
class TensorDiff:
    """How one tensor differs.

    Attributes:
        name: of the tensor.
        shape: in both.
        dtype: in the first checkpoint, and in the second.
        changed: elements whose value differs (bits, where the dtype is not a float).
        max_abs: largest absolute difference; None where the dtype is not a float; NaN where only one value is.
        relative: ``‖b − a‖ / ‖a‖`` over the whole tensor; infinite where a is zero.
        rank: the fewest directions that explain the difference up to the rounding of its dtype, the most over the
            matrices of a stack; None where it was not asked for, there is no matrix, or it takes more directions than
            were tried.
    """

    name: str
    shape: tuple[int, ...]
    dtype: tuple[str, str]
    changed: int
    max_abs: float | None = None
    relative: float | None = None
    rank: int | None = None

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types for JSON; infinities and NaN as text."""
        found = asdict(self) | {"shape": list(self.shape), "dtype": list(self.dtype), "size": self.size}
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


@dataclass(frozen=True)
class CheckpointDiff:
    """How two checkpoints differ.

    Attributes:
        a, b: their paths.
        changed: tensors that differ, in the order of ``a``.
        same: number of tensors that are equal.
        only_a, only_b: names that the other has not.
        shapes: names whose shapes differ, with both shapes.
        config: keys of ``config.json`` that differ, with both values (None where there is none).
    """

    a: Path
    b: Path
    changed: list[TensorDiff]
    same: int
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        """Whether names, shapes, dtypes and values are all the same; the config and other files are not looked at."""
        return not (self.changed or self.only_a or self.only_b or self.shapes)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types for JSON."""
        return {
            "a": os.fspath(self.a),
            "b": os.fspath(self.b),
            "identical": self.identical,
            "same": self.same,
            "changed": [t.to_dict() for t in self.changed],
            "only_a": self.only_a,
            "only_b": self.only_b,
            "shapes": {name: [list(s) for s in both] for name, both in self.shapes.items()},
            "config": {key: list(both) for key, both in self.config.items()},
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        total = self.same + len(self.changed)
        lines = [f"{self.a} -> {self.b}: {len(self.changed)} of {total} tensors differ"]
        for t in self.changed:
            parts = [f"{t.changed:,} of {t.size:,} changed"]
            parts += [] if t.max_abs is None else [f"max {t.max_abs:.3g}", f"relative {t.relative:.3g}"]
            parts += [] if t.rank is None else [f"rank {t.rank}"]
            parts += [f"{t.dtype[0]} -> {t.dtype[1]}"] if t.dtype[0] != t.dtype[1] else []
            lines.append(f"  {t.name}: {', '.join(parts)}")
        lines += [f"  {name}: shape {x} -> {y}" for name, (x, y) in self.shapes.items()]
        lines += [f"  {name}: only in {self.a}" for name in self.only_a]
        lines += [f"  {name}: only in {self.b}" for name in self.only_b]
        lines += [f"  config.json: {key}: {x!r} -> {y!r}" for key, (x, y) in self.config.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"CheckpointDiff({len(self.changed)} of {self.same + len(self.changed)} tensors differ)"

    def _repr_html_(self) -> str:
        def number(x: float | None) -> str:
            return "" if x is None else f"{x:.4g}"

        rows = "".join(
            f"<tr><td>{html.escape(t.name)}</td><td>{t.changed:,} of {t.size:,}</td><td>{number(t.max_abs)}</td>"
            f"<td>{number(t.relative)}</td><td>{'' if t.rank is None else t.rank}</td></tr>"
            for t in self.changed
        )
        header = "<tr><th>tensor</th><th>changed</th><th>max</th><th>relative</th><th>rank</th></tr>"
        other = str(self).splitlines()[1 + len(self.changed) :]
        notes = "".join(f"<p>{html.escape(line.strip())}</p>" for line in other)
        return f"<table><caption>{html.escape(str(self).splitlines()[0])}</caption>{header}{rows}</table>{notes}"

    def plot(self, ax: Any = None) -> Any:
        """Relative change of every tensor that differs against the index of its block; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        groups: dict[str, list[tuple[int, float]]] = {}
        for t in self.changed:
            match = re.search(r"\.(\d+)\.(.+)$", t.name)
            if match and t.relative is not None and math.isfinite(t.relative):
                groups.setdefault(re.sub(r"\d+", "*", match[2]), []).append((int(match[1]), t.relative))
        for name, points in groups.items():
            x, y = zip(*sorted(points), strict=True)
            ax.plot(x, y, marker=".", label=name)
        ax.set_xlabel("block")
        ax.set_ylabel("‖b − a‖ / ‖a‖")
        if groups:
            ax.legend(fontsize="small")
        return ax


def diff(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, rank: bool = True, max_rank: int = 16
) -> CheckpointDiff:
    """Compares two checkpoints tensor by tensor, through memory maps; no model is loaded.

    Values are compared, not bits, where both are floats: 0 and −0 are equal, a NaN differs from every number and from
    no NaN; tensors of different dtypes are compared by value, and count as changed where a value is.

    Args:
        a: a checkpoint: a directory, an index, or one safetensors file.
        b: another.
        rank: also estimate the rank of each difference, from a random sketch of it (Halko, Martinsson and Tropp 2011);
            changed tensors are then read three times instead of once.
        max_rank: largest rank that is told, 1 or more.

    Returns:
        A :class:`CheckpointDiff`.

    Raises:
        CheckpointError: one of them is damaged, inconsistent or of another kind.
        ArgumentError: ``max_rank`` is below 1.
    """
    if isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1:
        raise ArgumentError(f"max_rank: expected 1 or more, got {max_rank!r}")
    first, second = opened(a), opened(b)
    places = [
        {name: (shard, place) for shard in s.shards for name, place in shard.tensors.items()} for s in (first, second)
    ]
    changed, shapes, same = [], {}, 0
    for name, (shard, place) in places[0].items():
        if name not in places[1]:
            continue
        other_shard, other = places[1][name]
        if place.shape != other.shape:
            shapes[name] = (place.shape, other.shape)
            continue
        found = _compared(name, _Tensor(shard, place), _Tensor(other_shard, other), max_rank if rank else 0)
        if found is None:
            same += 1
        else:
            changed.append(found)
    configs = [dict(s.config) for s in (first, second)]
    keys = [k for k in dict.fromkeys([*configs[0], *configs[1]]) if configs[0].get(k) != configs[1].get(k)]
    return CheckpointDiff(
        first.path,
        second.path,
        changed,
        same,
        [n for n in places[0] if n not in places[1]],
        [n for n in places[1] if n not in places[0]],
        shapes,
        {k: (configs[0].get(k), configs[1].get(k)) for k in keys},
    )


class _Tensor:
    """A stored tensor as rows of bytes."""

    def __init__(self, shard: Shard, place: Place) -> None:
        self.shape, self.dtype = place.shape, place.dtype
        self.width = place.shape[-1] if place.shape else 1
        self.rows = math.prod(place.shape[:-1])
        length = place.end - place.begin
        self.bytes = np.memmap(shard.path, np.uint8, "r", place.begin, (length,)) if length else np.zeros(0, np.uint8)
        self.stride = length // self.rows if self.rows else 0

    def raw(self, start: int, stop: int) -> Array:
        return self.bytes[start * self.stride : stop * self.stride]

    def values(self, start: int, stop: int) -> Array:
        """Rows as float32, or as float64 where they are stored so."""
        raw = self.raw(start, stop)
        if self.dtype == "BF16":
            found = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            found = raw.view({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[self.dtype])
            found = found.astype(np.float32) if self.dtype == "F16" else found
        return found.reshape(-1, self.width)


def _compared(name: str, a: _Tensor, b: _Tensor, max_rank: int) -> TensorDiff | None:
    step = max(1, _PIECE // max(a.stride, b.stride, 1))
    pieces = [(i, min(i + step, a.rows)) for i in range(0, a.rows, step)]
    alike = a.dtype == b.dtype
    if alike:
        pieces = [p for p in pieces if not np.array_equal(a.raw(*p), b.raw(*p))]
        if not pieces:
            return None
    if a.dtype not in _SIGNIFICANDS or b.dtype not in _SIGNIFICANDS:
        if not alike:
            return TensorDiff(name, a.shape, (a.dtype, b.dtype), math.prod(a.shape))
        return TensorDiff(name, a.shape, (a.dtype, b.dtype), _bytes_changed(a, b, pieces))
    count, largest, energy, norm = 0, 0.0, 0.0, 0.0
    for p in pieces:
        x, y = a.values(*p), b.values(*p)
        both = ~(np.isnan(x) & np.isnan(y))
        count += int(np.count_nonzero((x != y) & both))
        with np.errstate(invalid="ignore", over="ignore"):
            d = np.where(x == y, 0, y.astype(np.float64) - x)[both]
        largest = float(np.maximum(largest, np.abs(d).max(initial=0.0)))
        energy += float(d @ d)
    if count == 0 and alike:
        return None  # the bits of zeros or of NaNs
    for i in range(0, a.rows, step):
        x = a.values(i, min(i + step, a.rows)).astype(np.float64).reshape(-1)
        norm += float(x @ x)
    relative = math.sqrt(energy / norm) if norm else (math.inf if energy else 0.0)
    told = None
    if max_rank and len(a.shape) in (2, 3) and math.isfinite(energy) and energy > 0 and min(a.shape[-2:]) > 1:
        told = _rank(a, b, max_rank)
    return TensorDiff(name, a.shape, (a.dtype, b.dtype), count, largest, relative, told)


def _bytes_changed(a: _Tensor, b: _Tensor, pieces: list[tuple[int, int]]) -> int:
    """Elements whose bytes differ; elements smaller than a byte count by the byte."""
    total = 0
    size = max(len(a.bytes) // max(math.prod(a.shape), 1), 1)
    for p in pieces:
        differ = a.raw(*p) != b.raw(*p)
        total += int(np.count_nonzero(differ.reshape(-1, size).any(axis=1)))
    return total


def _rank(a: _Tensor, b: _Tensor, max_rank: int) -> int | None:
    """Rank of the difference of a matrix; of a stack the largest one of its matrices."""
    rows = a.shape[-2]
    highest = 0
    for matrix in range(a.rows // rows):
        found = _matrix_rank(a, b, matrix * rows, rows, max_rank)
        if found is None:
            return None
        highest = max(highest, found)
    return highest


def _matrix_rank(a: _Tensor, b: _Tensor, begin: int, rows: int, max_rank: int) -> int | None:
    """The fewest directions whose part of ``D = b − a`` leaves no more than rounding explains; None if too many."""
    most = min(rows, a.width)
    k = min(max_rank + _OVER, most)
    step = max(1, _PIECE // max(a.stride, b.stride, 1))
    test = np.random.default_rng(0).standard_normal((a.width, k))

    def differences() -> Iterator[tuple[slice, Array, float]]:
        for i in range(0, rows, step):
            part = (begin + i, begin + min(i + step, rows))
            x, y = a.values(*part), b.values(*part)
            noise = _rounding(x, a.dtype) + _rounding(y, b.dtype)
            yield slice(i, min(i + step, rows)), y.astype(np.float64) - x, noise

    sketch = np.empty((rows, k))
    energy = noise = 0.0
    for part, d, rounding in differences():
        sketch[part] = d @ test
        energy += float(np.vdot(d, d))
        noise += rounding
    if energy == 0.0:
        return 0
    basis = np.linalg.qr(sketch)[0]
    seen = np.zeros((k, a.width))
    for part, d, _ in differences():
        seen += basis[part].T @ d
    singular = np.linalg.svd(seen, compute_uv=False)
    left = energy - np.concatenate([[0.0], np.cumsum(singular**2)])
    enough = np.flatnonzero(left <= _SLACK * noise + 1e-12 * energy)
    rank = int(enough[0]) if len(enough) else most
    return rank if rank <= max_rank or k == most else None


def _rounding(x: Array, dtype: str) -> float:
    """Energy that rounding to the dtype puts into these numbers on average: a twelfth of each squared spacing."""
    _, exponent = np.frexp(x)
    spacing = np.ldexp(1.0, exponent - 1 - _SIGNIFICANDS[dtype])[x != 0]
    return float(spacing @ spacing) / 12
