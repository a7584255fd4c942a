"""Fisher importances kept apart by the labels of their data, with an exact total from which a label can be taken."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _native
from .._files import reading, replacing
from .._labelled import Key, Labelled, key_order
from ..errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from .fisher import Fisher, Unit, _to_numpy

__all__ = ["LabelledFisher"]

Floats = npt.NDArray[np.float64]
#: Elements whose arrays stay in a core's cache together.
_CHUNK = 1 << 14


class LabelledFisher(Labelled[Fisher]):
    """A :class:`Fisher` for each owner (or set of labels) of the data.

    A sum over labels is here the exact sum of the labels' sums, rounded once to float64 and once to ``dtype``: it does
    not depend on the order of labels. So ``without(label)`` has the bits of a run that never saw the label, and costs
    one pass: the total is kept exactly, as the unevaluated sum of two float64, and the label's sum is taken from it.
    Elements whose exact sum does not fit two float64 (labels that differ by more than about 2⁷⁰) are summed again from
    the other labels, exactly; the result is the same.

    Args:
        unit, dtype, power: as in :class:`Fisher`.

    Raises:
        ArgumentError: as :class:`Fisher`.
    """

    _kind = "fisher"

    def __init__(self, unit: Unit = "sample", dtype: str = "float32", power: int = 2) -> None:
        self._template = Fisher(unit, dtype, power)
        super().__init__(lambda: Fisher(unit, dtype, power))
        self._exact: dict[str, tuple[Floats, Floats]] | Path | None = None
        self._known: dict[str, tuple[int, ...]] = {}
        self._counts: dict[Key, float] = {}

    @property
    def dtype(self) -> str:
        """Dtype of the sums."""
        return self._template.dtype

    def update(
        self, gradients: Any, label: Any, weight: float | Sequence[float] = 1.0, *, stacked: bool = False
    ) -> LabelledFisher:
        """Adds one gradient (or stacked ones) of data with one label or one set of labels; batches must not mix owners.

        Args:
            label: the owner, or all labels of the data.
            gradients, weight, stacked: as :meth:`Fisher.update`.

        Raises:
            As :meth:`Fisher.update`; ArgumentError: parameters that differ from those of other labels.
        """
        self._expect({n: s for n, (_, s) in self._template._gradients(gradients, stacked)[1].items()})
        with self._adding(label) as part:
            part.update(gradients, weight, stacked=stacked)
        return self

    def add(self, label: Any, fisher: Fisher) -> LabelledFisher:
        """Adds a whole :class:`Fisher` of data with the label, as :func:`importance` makes it.

        Raises:
            As :meth:`Fisher.merge`; ArgumentError: parameters that differ from those of other labels.
        """
        if not isinstance(fisher, Fisher):
            raise DTypeError(f"fisher: expected a Fisher, got {type(fisher).__name__}")
        self._template._expect_same_kind(fisher)
        self._expect(_shapes_of(fisher))
        with self._adding(label) as part:
            part.merge(fisher)
        return self

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, the same for every label; empty before the first."""
        if not self._known:
            for part in self._parts.values():
                if isinstance(part, Fisher) and len(part):
                    self._known = _shapes_of(part)
                    break
        return self._known

    def _expect(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuses parameters that other labels do not have. Of a gradient of None the shape is not known."""
        known = self._shapes()
        if not known:
            return
        for name, shape in shapes.items():
            if name not in known:
                raise ArgumentError(f"gradients: expected the parameters of other labels, got {name!r}")
            if shape != known[name]:
                raise ShapeError(f"gradients: {name!r}: expected shape {known[name]} as for other labels, got {shape}")

    def _changed(self, key: Key) -> None:
        self._exact = None
        self._counts.pop(key, None)

    def _count(self, key: Key) -> float:
        """Without reading the part where it is in a file."""
        return self._counts[key] if key in self._counts else self._part(key).count

    def prepare(self) -> LabelledFisher:
        """Sums all labels exactly, one pass over each; otherwise done where it is first needed after an update."""
        self._totals()
        return self

    def _totals(self) -> dict[str, tuple[Floats, Floats]]:
        if isinstance(self._exact, Path):
            with reading(self._exact, "exact total") as file:
                names = [n.removeprefix("hi.") for n in file.keys() if n.startswith("hi.")]  # noqa: SIM118
                self._exact = {n: (file.get_tensor(f"hi.{n}"), file.get_tensor(f"lo.{n}")) for n in names}
        if self._exact is None:
            totals = {n: (np.zeros(math.prod(s)), np.zeros(math.prod(s))) for n, s in self._shapes().items()}
            for key in self.keys:
                for name, (hi, lo) in totals.items():
                    x = self._flat(key, name)
                    _chunks(len(x), lambda s, hi=hi, lo=lo, x=x: _add_(hi[s], lo[s], x[s], 1.0))
            self._exact = totals
        return self._exact

    def _merged(self, keys: Iterable[Key]) -> Fisher:
        keep = sorted(keys, key=key_order)
        if not keep:
            return self._make()
        gone = [key for key in self.keys if key not in set(keep)]
        # From the total, unless there is less to add up than to take away.
        from_total = len(gone) < len(keep)
        totals = self._totals() if from_total else {}
        sums: dict[str, Any] = {}
        dtype = np.dtype(self.dtype)
        for name, shape in self._shapes().items():
            out = np.empty(math.prod(shape), dtype=dtype)
            parts = [self._flat(key, name) for key in (gone if from_total else keep)]
            sign = -1.0 if from_total else 1.0

            def run(s: slice, name: str = name, out: Any = out, parts: list[Any] = parts, sign: float = sign) -> None:
                if from_total:
                    hi, lo = (v[s].copy() for v in totals[name])
                else:
                    hi, lo = np.zeros(s.stop - s.start), np.zeros(s.stop - s.start)
                for x in parts:
                    _add_(hi, lo, x[s], sign)
                wide = np.isnan(lo)
                if wide.any():
                    # More digits than two float64 hold: the exact sum of what is kept, rounded once.
                    rows = s.start + np.flatnonzero(wide)
                    columns = np.stack([self._flat(key, name)[rows] for key in keep], axis=1)
                    hi[wide] = [_fsum(c) for c in columns.tolist()]
                with np.errstate(over="ignore"):
                    out[s] = hi

            _chunks(out.size, run)
            if not np.isfinite(out).all():
                raise NonFiniteError(f"{name!r}: the sum over labels overflows {self.dtype}")
            sums[name] = out.reshape(shape)
        return Fisher.from_state_dict(
            {
                "unit": self._template.unit,
                "power": self._template.power,
                "dtype": self.dtype,
                "count": math.fsum(self._count(key) for key in keep),
                "sum": sums,
                "provenance": {"labels": [list(key_order(key)) for key in keep]},
            }
        )

    def _flat(self, key: Key, name: str) -> Any:
        part = self._part(key)
        if not len(part):  # a label whose data had no gradient
            return np.zeros(math.prod(self._shapes()[name]), dtype=self.dtype)
        return np.ascontiguousarray(_to_numpy(self._part(key).sum(name))).reshape(-1)

    def _load(self, path: Path) -> Fisher:
        return Fisher.load(path)

    def _save(self, part: Fisher, path: Path) -> None:
        part.save(path)

    def _facts(self, folder: Path) -> dict[str, Any]:
        from safetensors.numpy import save_file

        arrays: dict[str, Any] = {}
        for name, (hi, lo) in self._totals().items():
            arrays |= {f"hi.{name}": hi, f"lo.{name}": lo}
        with replacing(folder / "total.safetensors") as temporary:
            save_file(arrays, temporary)
        t = self._template
        shapes = {name: list(shape) for name, shape in self._shapes().items()}
        counts = [self._count(key) for key in self.keys]
        return {"unit": t.unit, "dtype": t.dtype, "power": t.power, "shapes": shapes, "counts": counts}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LabelledFisher:
        """Reads what :meth:`save` wrote; each part, and the exact total, is read when it is needed.

        Raises:
            ArgumentError: the directory cannot be read or is of another kind.
        """
        found, parts = cls._read(path)
        try:
            new = cls(found["unit"], found["dtype"], int(found["power"]))
            new._known = {str(n): tuple(map(int, s)) for n, s in found["shapes"].items()}
            new._counts = dict(zip(parts, map(float, found["counts"]), strict=True))
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise ArgumentError(f"path: expected the facts of a labelled Fisher in labels.json ({err})") from None
        new._parts = dict(parts)
        total = Path(path) / "total.safetensors"
        new._exact = total if total.is_file() else None
        return new


def _shapes_of(fisher: Fisher) -> dict[str, tuple[int, ...]]:
    return {name: tuple(fisher.sum(name).shape) for name in fisher}


def _fsum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def _chunks(size: int, run: Any) -> None:
    """``run`` of slices of an array, on all threads; every element is worked on by itself."""
    slices = [slice(a, min(a + _CHUNK, size)) for a in range(0, size, _CHUNK)]
    threads = min(_native.get_num_threads(), len(slices))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            step = -(-len(slices) // (4 * threads))
            groups = [slices[i : i + step] for i in range(0, len(slices), step)]
            list(pool.map(lambda group: [run(s) for s in group], groups))
    else:
        for s in slices:
            run(s)


def _two_sum(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """``a + b`` rounded, and exactly what rounding left (Knuth)."""
    with np.errstate(invalid="ignore", over="ignore"):
        s = a + b
        bb = s - a
        return s, (a - (s - bb)) + (b - bb)


def _add_(hi: Floats, lo: Floats, x: Any, sign: float) -> None:
    """Adds ``sign · x`` to ``hi + lo`` exactly, in place; ``lo`` becomes NaN where the two cannot hold the sum."""
    wide = x.astype(np.float64) if sign > 0 else -x.astype(np.float64)
    s, e = _two_sum(hi, wide)
    t, left = _two_sum(lo, e)
    hi[...], lo[...] = _two_sum(s, t)
    lost = left != 0
    if lost.any():
        lo[lost] = np.nan
