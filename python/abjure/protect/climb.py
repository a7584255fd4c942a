"""The ascent step by step: in feature spaces, over files, for some of the rows, and continued where it was broken off.

Draws, steps, projections and stored values are those of the compiled ascent (`src/protect/ascent.rs`), which runs where
none of this is asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import _interop, _native
from .._files import replacing
from ..errors import ArgumentError
from .bayes import Array
from .bounds import arithmetic
from .features import FeatureMap
from .sources import is_bytes, unit

#: Bytes of rows that are read, moved or written at a time.
CHUNK_BYTES = 8 << 20


class Rows:
    """Rows of an array or memory map, read a few at a time."""

    def __init__(self, array: Any) -> None:
        self.array = array
        shape = _interop.shape(array, "x")
        self.n, self.shape = shape[0], shape[1:]
        self.width = math.prod(self.shape)
        self.bytes = is_bytes(array)

    def stored(self, rows: Any) -> Any:
        """Rows as the kernels store them: bytes as f32 multiples of 1/255."""
        part = self.array[rows]
        part = unit(part) if self.bytes else part
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part)
            part = part if part.dtype.isnative else part.astype(part.dtype.newbyteorder("="))
        return part.reshape(-1, self.width)

    def points(self, rows: Any) -> Array:
        """Rows in the type of the arithmetic, f32 or f64."""
        return arithmetic(self.stored(rows))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the arithmetic."""
        found: np.dtype[Any] = self.points(slice(0, 1)).dtype
        return found

    def chunks(self) -> Any:
        step = max(1, CHUNK_BYTES // (8 * self.width))
        for start in range(0, self.n, step):
            yield slice(start, min(start + step, self.n))


@dataclass(frozen=True)
class Space:
    """A feature map with the numerical options of its objective."""

    map: FeatureMap
    options: dict[str, Any]
    #: Of all maps' objectives; the shares add up to 1.
    share: float


@dataclass(frozen=True)
class Climb:
    """What is climbed."""

    rows: Rows
    codes: Array
    classes: int
    spaces: tuple[Space, ...]
    #: As the compiled ascent takes it.
    plan: dict[str, Any]
    #: Rows that may change; None for all.
    protected: Array | None = None
    momentum: float = 0.0
    patience: int | None = None
    tolerance: float = 0.0
    #: Where the state is kept, and what run it belongs to.
    checkpoint: Path | None = None
    identity: str = ""
    #: Directory for arrays of one row per row of data; None keeps them in memory.
    scratch: Path | None = None


@dataclass
class State:
    """Everything that a continued run needs."""

    step: int
    #: Of the generator.
    random: int
    delta: Array
    velocity: Array | None
    best: Array | None
    best_value: float = -math.inf
    best_step: int = 0
    #: Whether ``delta`` and ``best`` hold one row per class.
    shared: bool = True
    best_shared: bool = True
    stalled: int = 0
    stopped: bool = False
    steps: list[float] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)


class Ascent:
    """A :class:`Climb` on its way."""

    def __init__(self, climb: Climb) -> None:
        self.climb = climb
        plan = climb.plan
        self.n, self.width = climb.rows.n, climb.rows.width
        self.dtype = climb.rows.dtype
        self.full = plan["batch_queries"] >= self.n and plan["batch_centres"] >= self.n
        self.share = {"sample": 0.0, "class": 1.0, "both": plan["class_share"]}[plan["per"]]
        self.shared_steps = math.floor(plan["steps"] * self.share + 0.5)
        self.every = 1 if self.full else max(plan["steps"] // 10, 5)
        # The rows of the checks are a stream of their own.
        self.fixed = self._draw(~plan["seed"] % 2**64)[0]
        self._clean: dict[int, Array] = {}

    def run(self, progress: Callable[[int], object] | None) -> State:
        """Climbs to the end, or on from the checkpoint."""
        steps = self.climb.plan["steps"]
        state = self._resume() or self._start()
        save_every = max(1, steps // 10)
        while state.step < steps and not state.stopped:
            self._advance(state)
            if progress is not None:
                progress(state.step)
            if state.step % save_every == 0 and state.step < steps:
                self._save(state)
        if progress is not None:
            progress(steps)
        if not state.checks or state.checks[-1][0] != state.step:
            self._check(state, self._evaluate(state, self.fixed, gradient=False)[0])
        self._save(state)
        return state

    # --- one step

    def _advance(self, state: State) -> None:
        climb, plan = self.climb, self.climb.plan
        if state.shared and self.share < 1 and state.step >= self.shared_steps:
            self._spread(state)
        first = self.shared_steps if not state.shared else 0
        drawn, state.random = (self.fixed, state.random) if self.full else self._draw(state.random)
        on_schedule = not self.full and (state.step - first) % self.every == 0
        if on_schedule and self._check(state, self._evaluate(state, self.fixed, gradient=False)[0]):
            return
        value, where, gradient = self._evaluate(state, drawn, gradient=True)
        if self.full and self._check(state, value):
            return
        state.steps.append(value)
        if climb.momentum > 0:
            assert state.velocity is not None
            size = np.abs(gradient).sum(axis=1, keepdims=True)
            gradient = np.divide(gradient, size, out=np.zeros_like(gradient), where=size > 0)
            gradient += self.dtype.type(climb.momentum) * state.velocity[where]
            state.velocity[where] = gradient
        limits = {k: plan[k] for k in ("norm", "epsilon", "low", "high")}
        moved = np.ascontiguousarray(state.delta[where])
        if state.shared:
            limits["epsilon"] *= self.share
            _native.step_rows(None, moved, gradient, limits, plan["step_size"])
        else:
            _native.step_rows(climb.rows.stored(where), moved, gradient, limits, plan["step_size"])
        state.delta[where] = moved
        state.step += 1

    def _check(self, state: State, value: float) -> bool:
        """Keeps the best; whether the phase is over because nothing has been gained for long enough."""
        climb = self.climb
        state.checks.append((state.step, value))
        gained = value - state.best_value
        if gained > 0:
            state.best_value, state.best_step, state.best_shared = value, state.step, state.shared
            if state.shared:
                state.best = state.delta.copy()
            else:
                if state.best is None or len(state.best) != self.n:
                    state.best = self._array("best")
                self._copy(state.delta, state.best)
        enough = climb.tolerance * abs(state.best_value)
        state.stalled = 0 if gained > enough else state.stalled + 1
        over = climb.patience is not None and state.stalled >= climb.patience
        if over and state.shared and self.share < 1:
            state.step = max(state.step, self.shared_steps)
        elif over:
            state.stopped = True
        return over

    def _draw(self, random: int) -> tuple[tuple[Array, Array], int]:
        plan = self.climb.plan
        centres, random = _native.draw_rows(random, self.n, plan["batch_centres"])
        queries = centres[:0]
        if plan["against"] == "clean":
            queries, random = _native.draw_rows(random, self.n, plan["batch_queries"])
        return (queries, centres), random

    def _evaluate(self, state: State, drawn: tuple[Array, Array], *, gradient: bool) -> tuple[float, Array, Array]:
        """The objective; and of each perturbation that may move, its place in ``state.delta`` and its gradient."""
        climb = self.climb
        queries, centres = drawn
        published = self._published(state, centres)
        codes = np.ascontiguousarray(climb.codes[centres])
        by_class = gradient and state.shared and climb.protected is None
        value, total = 0.0, None
        for at, space in enumerate(climb.spaces):
            points = space.map.values(published, climb.rows.shape)
            grouped = by_class and space.map.map is None and climb.plan["against"] == "clean"
            if climb.plan["against"] == "clean":
                found = _native.cross_error(
                    points,
                    codes,
                    climb.classes,
                    self._clean_features(at, queries, drawn is self.fixed),
                    np.ascontiguousarray(climb.codes[queries]),
                    self._own(queries, centres),
                    space.options,
                    "no" if not gradient else "class" if grouped else "each",
                    False,
                    False,
                )
                pulled = found["centre_gradient"]
            else:
                found = _native.published_error(points, codes, climb.classes, space.options, gradient, False)
                pulled = found["query_gradient"]
            value += space.share * found["value"]
            if not gradient:
                continue
            if not grouped:
                pulled = space.map.pull_back(published, climb.rows.shape, pulled)
                pulled = self._by_class(pulled, codes, centres) if state.shared else pulled
            pulled = self.dtype.type(space.share) * pulled
            total = pulled if total is None else total + pulled
        if total is None:
            return value, centres[:0], np.empty((0, self.width), self.dtype)
        if state.shared:
            return value, np.arange(climb.classes), np.ascontiguousarray(total)
        if climb.protected is not None:
            may = climb.protected[centres]
            return value, centres[may], np.ascontiguousarray(total[may])
        return value, centres, np.ascontiguousarray(total)

    def _by_class(self, gradient: Array, codes: Array, centres: Array) -> Array:
        """Sums over the rows of each class that may change."""
        sums = np.zeros((self.climb.classes, self.width))
        may = slice(None) if self.climb.protected is None else self.climb.protected[centres]
        np.add.at(sums, codes[may], gradient[may])
        return sums.astype(self.dtype)

    def _own(self, queries: Array, centres: Array) -> Array:
        """Where each query stands among the centres, -1 if it does not."""
        at = np.minimum(np.searchsorted(centres, queries), len(centres) - 1)
        return np.where(centres[at] == queries, at, -1).astype(np.int64)

    def _clean_features(self, space: int, queries: Array, keep: bool) -> Array:
        """Clean queries do not move: those of the checks are put through each map once."""
        if keep and space in self._clean:
            return self._clean[space]
        found = self.climb.spaces[space].map.values(self.climb.rows.points(queries), self.climb.rows.shape)
        if keep:
            self._clean[space] = found
        return found

    def _published(self, state: State, rows: Array) -> Array:
        """``clip(x + delta)``; rows that are not protected as they are."""
        plan, points = self.climb.plan, self.climb.rows.points(rows)
        delta = state.delta[self.climb.codes[rows] if state.shared else rows]
        low, high = self.dtype.type(plan["low"]), self.dtype.type(plan["high"])
        moved = np.clip(points + delta, low, high)
        may = self.climb.protected
        return moved if may is None else np.where(may[rows][:, None], moved, points)

    # --- arrays of one row per row of data

    def _array(self, name: str) -> Array:
        shape = (self.n, self.width)
        if self.climb.scratch is None:
            return np.zeros(shape, self.dtype)
        path = self.climb.scratch / f"{name}.rows"
        size = self.n * self.width * self.dtype.itemsize
        try:
            with open(path, "w+b") as file:
                if hasattr(os, "posix_fallocate"):
                    # A map of a file with holes would end in a signal, not an error, on a full disk.
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
        except OSError as err:
            raise ArgumentError(f"out: no room beside it for {size} bytes of working space ({err.strerror})") from err
        return np.memmap(path, dtype=self.dtype, mode="r+", shape=shape)

    def _copy(self, source: Array, target: Array) -> None:
        for part in self.climb.rows.chunks():
            target[part] = source[part]

    def _start(self) -> State:
        plan, shared = self.climb.plan, self.share > 0
        shape = (self.climb.classes, self.width)
        state = State(0, plan["seed"], np.empty(0), None, None, shared=shared)
        state.delta = np.zeros(shape, self.dtype) if shared else self._array("delta")
        if self.climb.momentum > 0:
            state.velocity = np.zeros(shape, self.dtype) if shared else self._array("velocity")
        if not shared and plan["against"] == "published" and plan["jitter"] > 0:
            # Duplicates are a saddle.
            scale = plan["jitter"] * plan["epsilon"]
            scale /= math.sqrt(self.width) if plan["norm"] == "l2" else 1.0
            noise = np.random.default_rng(plan["seed"])
            for part in self.climb.rows.chunks():
                draws = noise.uniform(-scale, scale, (part.stop - part.start, self.width)).astype(self.dtype)
                self._put(state.delta, part, draws)
        return state

    def _spread(self, state: State) -> None:
        """A shared perturbation as one per row, from the best there is."""
        if state.checks[-1][0] != state.step:
            self._check(state, self._evaluate(state, self.fixed, gradient=False)[0])
        shared = state.best if state.best is not None and state.best_shared else state.delta
        state.delta = self._array("delta")
        if self.climb.momentum > 0:
            state.velocity = self._array("velocity")
        state.shared, state.stalled = False, 0
        for part in self.climb.rows.chunks():
            self._put(state.delta, part, shared[self.climb.codes[part]])

    def _put(self, delta: Array, part: slice, values: Array) -> None:
        """``values`` within budget and box, 0 where nothing may change."""
        plan = self.climb.plan
        limits = {k: plan[k] for k in ("norm", "epsilon", "low", "high")}
        if self.climb.protected is not None:
            values[~self.climb.protected[part]] = 0
        # A step of a zero gradient is the projection alone.
        _native.step_rows(self.climb.rows.stored(part), values, np.zeros_like(values), limits, plan["step_size"])
        delta[part] = values

    # --- what is published

    def publish(self, state: State, write: Callable[[Any], object]) -> None:
        """Hands the published rows, as stored, to ``write`` in pieces."""
        climb, plan = self.climb, self.climb.plan
        limits = {k: plan[k] for k in ("norm", "epsilon", "low", "high")}
        for part in climb.rows.chunks():
            clean = climb.rows.stored(part)
            out = _interop.empty_like(clean)
            best = state.best
            assert best is not None
            delta = np.ascontiguousarray(best[climb.codes[part] if state.best_shared else part])
            if climb.protected is not None:
                delta = np.where(climb.protected[part][:, None], delta, 0).astype(delta.dtype)
            _native.publish_rows(clean, delta, out, limits, plan["levels"])
            if climb.protected is not None:
                keep = ~climb.protected[part]
                out[keep] = clean[keep]
            write(out)

    # --- the checkpoint

    def _save(self, state: State) -> None:
        path = self.climb.checkpoint
        if path is None:
            return
        plain = {
            "identity": self.climb.identity,
            "step": state.step,
            "random": state.random,
            "best_value": state.best_value if math.isfinite(state.best_value) else None,
            "best_step": state.best_step,
            "shared": state.shared,
            "best_shared": state.best_shared,
            "stalled": state.stalled,
            "stopped": state.stopped,
            "steps": state.steps,
            "checks": state.checks,
        }
        arrays = {"delta": state.delta, "velocity": state.velocity, "best": state.best}
        with replacing(path) as temporary, open(temporary, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            archive.writestr("state.json", json.dumps(plain))
            for name, array in arrays.items():
                if array is None:
                    continue
                with archive.open(name, "w", force_zip64=True) as entry:
                    step = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
                    for start in range(0, len(array), step):
                        entry.write(np.ascontiguousarray(array[start : start + step]).data)

    def _resume(self) -> State | None:
        path = self.climb.checkpoint
        if path is None or not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:
                found = json.loads(archive.read("state.json"))
                if found.pop("identity") != self.climb.identity:
                    raise ArgumentError(
                        f"checkpoint: {os.fspath(path)!r} is of another run (other data, labels or options); "
                        "name another file or delete it"
                    )
                found["checks"] = [(int(s), float(v)) for s, v in found["checks"]]
                found["best_value"] = -math.inf if found["best_value"] is None else found["best_value"]
                names = set(archive.namelist())
                state = State(delta=np.empty(0), velocity=None, best=None, **found)
                for name in ("delta", "velocity", "best"):
                    if name in names:
                        shared = state.best_shared if name == "best" else state.shared
                        setattr(state, name, self._read(archive, name, shared))
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError, EOFError, OSError) as err:
            if isinstance(err, ArgumentError):
                raise
            raise ArgumentError(f"checkpoint: {os.fspath(path)!r} is not a saved ascent ({err})") from err
        return state

    def _read(self, archive: zipfile.ZipFile, name: str, shared: bool) -> Array:
        array = np.zeros((self.climb.classes, self.width), self.dtype) if shared else self._array(name)
        step = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
        with archive.open(name) as entry:
            for start in range(0, len(array), step):
                part = array[start : start + step]
                content = entry.read(part.nbytes)
                array[start : start + step] = np.frombuffer(content, dtype=self.dtype).reshape(part.shape)
        return array


def identity(settings: dict[str, Any], data: str, codes: Array, protected: Array | None) -> str:
    """Of a run: what it was asked for and of which data."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
    digest.update(data.encode())
    digest.update(codes.tobytes())
    digest.update(b"" if protected is None else protected.tobytes())
    return digest.hexdigest()
