"""Timing that a shared machine cannot spoil: the two sides in turn, medians, and ratios from the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Seconds between two timed calls; OpenMP's workers spin for a few milliseconds after their last task.
SETTLE = 0.01


def _settle() -> None:
    """Waits on one thread, moving memory: an idle machine would lower its clocks and slow what comes next."""
    a, b = np.ones(1 << 20), np.empty(1 << 20)
    end = time.perf_counter() + SETTLE
    while time.perf_counter() < end:
        np.copyto(b, a)


@dataclass(frozen=True)
class Row:
    """One comparison: a kernel against the plain form that does the same."""

    kernel: str
    case: str
    seconds: float
    baseline: str
    baseline_seconds: float
    #: Bytes that must move between memory and the core, each counted once; 0 where bandwidth is not the limit.
    bytes: int = 0
    #: Floating-point operations of the method; 0 where arithmetic is not the limit.
    flops: float = 0.0

    @property
    def speedup(self) -> float:
        """Baseline time over ours."""
        return self.baseline_seconds / self.seconds

    @property
    def gigabytes_per_second(self) -> float:
        """Memory traffic that must move, per second."""
        return self.bytes / self.seconds / 1e9


def compare(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    *,
    reset: Callable[[], object] | None = None,
    repeats: int = 5,
    settle: bool = True,
) -> tuple[float, float]:
    """Median seconds of ``ours`` and ``baseline``, in turn after a warm-up each; ``reset`` runs untimed before each.

    Each waits first until the worker threads of whatever ran before have stopped spinning: on few cores they would take
    one away from the side that comes next. ``settle=False`` is for calls on one thread of less than a millisecond,
    which in their real place follow at once on what ``reset`` does.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for side, call in enumerate((ours, baseline)):
            if reset is not None:
                reset()
            if settle:
                _settle()
            start = time.perf_counter()
            call()
            if turn:
                times[side].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def bandwidth(megabytes: int = 256, repeats: int = 7) -> dict[str, float]:
    """GB/s of this machine now, with all threads: ``copy`` (read + write) and ``triad`` (two reads + one write).

    Measured by the compiled loops of :mod:`abjure._native`, so that threads and instruction set are the kernels' own.
    """
    from .. import _native

    n = megabytes * (1 << 20) // 4
    a, b, c = (np.ones(n, dtype=np.float32) for _ in range(3))
    found = {}
    for name, moved in (("copy", 2), ("triad", 3)):
        best = []
        for _ in range(repeats):
            _settle()
            start = time.perf_counter()
            if name == "copy":
                _native._copy(a, b)
            else:
                _native._triad(a, b, c)
            best.append(time.perf_counter() - start)
        found[name] = moved * n * 4 / statistics.median(best) / 1e9
    return found
