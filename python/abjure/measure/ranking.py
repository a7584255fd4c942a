"""How well a score puts the right ones first: areas under curves, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, DegenerateError, ShapeError
from ._arrays import Floats, Ints, binary, host, vector
from .rates import Interval

__all__ = ["Auroc", "AurocDifference", "auroc", "auroc_difference", "average_precision"]


@dataclass(frozen=True, eq=False)
class Auroc:
    """Area under the receiver operating characteristic.

    Attributes:
        value: probability that a positive scores above a negative, ties counting half.
        positives, negatives: how many of each.
        variance: DeLong's estimate; 0 where the classes are parted.
    """

    value: float
    positives: int
    negatives: int
    variance: float

    def ci(self, method: Literal["newcombe", "delong"] = "newcombe", level: float = 0.95) -> Interval:
        """Two-sided interval.

        Args:
            method: ``"newcombe"``: where ``|AUROC − t| = z √V(t)`` with Hanley and McNeil's variance V at t; it stays
                inside [0, 1] and open at an area of 1. ``"delong"``: normal, of the estimated variance, cut at 0 and 1;
                a point where the classes are parted.
            level: coverage, in (0, 1).

        Raises:
            ArgumentError: unknown method, or ``level`` out of range.

        Source: Newcombe, Stat. Med. 25:559, 2006, method 5; DeLong, DeLong, Clarke-Pearson, 1988.
        """
        if method not in ("newcombe", "delong"):
            raise ArgumentError(f"method: expected 'newcombe' or 'delong', got {method!r}")
        if not 0 < level < 1:
            raise ArgumentError(f"level: expected a share in (0, 1), got {level}")
        z = NormalDist().inv_cdf(0.5 + level / 2)
        if method == "delong":
            half = z * math.sqrt(self.variance)
            return max(self.value - half, 0.0), min(self.value + half, 1.0)
        pairs, half = self.positives * self.negatives, (self.positives + self.negatives) / 2 - 1

        def excess(t: float) -> float:
            v = t * (1 - t) * (1 + half * (1 - t) / (2 - t) + half * t / (1 + t)) / pairs
            return abs(self.value - t) - z * math.sqrt(v)

        return _root(excess, 0.0, self.value), _root(excess, 1.0, self.value)

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        low, high = self.ci()
        return f"Auroc({self.value:.4f} [{low:.4f}, {high:.4f}], {self.positives} against {self.negatives})"


def _root(excess: Callable[[float], float], outside: float, inside: float) -> float:
    """Bisection between a bound of the range, where ``excess >= 0``, and the estimate, where it is not above 0."""
    for _ in range(60):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if excess(middle) > 0 else (outside, middle)
    return (outside + inside) / 2


def _classes(labels: Any, score: Any) -> tuple[Ints, Floats]:
    values = vector(score, "score")
    truth = binary(labels, "labels", len(values))
    ones = int(truth.sum())
    if not 0 < ones < len(truth):
        raise DegenerateError(f"labels: expected both classes, got {ones} positives of {len(truth)}")
    return truth, values


def _placements(truth: Ints, score: Floats) -> tuple[Floats, Floats]:
    """For each positive, the share of negatives below it (ties half); for each negative, of positives above it."""
    high, low = score[truth == 1], score[truth == 0]

    def below(sample: Floats, at: Floats) -> Floats:
        ordered = np.sort(sample)
        both = np.searchsorted(ordered, at, side="left") + np.searchsorted(ordered, at, side="right")
        found: Floats = both / (2 * len(sample))
        return found

    return below(low, high), 1 - below(high, low)


def _area(truth: Ints, score: Floats) -> float:
    """From doubled mid-ranks, which are whole numbers."""
    high, low = score[truth == 1], np.sort(score[truth == 0])
    doubled = np.searchsorted(low, high, side="left") + np.searchsorted(low, high, side="right")
    return int(doubled.sum()) / (2 * len(high) * len(low))


def auroc(labels: Any, score: Any) -> Auroc:
    """Area under the ROC curve, ``(Σ ranks⁺ − n⁺(n⁺+1)/2) / (n⁺ n⁻)`` with mid-ranks of ties; 0.5 where all scores tie.

    Args:
        labels: ``(n,)`` of true or false, 1 or 0.
        score: ``(n,)`` finite; higher is more likely positive.

    Raises:
        ShapeError: not vectors of one length. NonFiniteError: NaN or infinity in ``score``.
        ArgumentError: a label that is neither 0 nor 1. DegenerateError: one class only.

    Source: Hanley and McNeil, 1982; variance by DeLong and others, 1988, in the time of a sort.
    """
    truth, values = _classes(labels, score)
    above, over = _placements(truth, values)
    variance = sum(float(v.var(ddof=1)) / len(v) if len(v) > 1 else 0.0 for v in (above, over))
    return Auroc(_area(truth, values), len(above), len(over), variance)


@dataclass(frozen=True)
class AurocDifference:
    """Difference of the areas of two scores of the same rows.

    Attributes:
        value: area of the first less that of the second.
        se: DeLong's standard error. low, high: normal interval. pvalue: two-sided, of no difference.
    """

    value: float
    se: float
    low: float
    high: float
    pvalue: float


def auroc_difference(labels: Any, first: Any, second: Any, *, level: float = 0.95) -> AurocDifference:
    """DeLong's paired test of two scores on the same rows.

    Args:
        labels: ``(n,)`` of true or false, with 2 or more of each.
        first, second: ``(n,)`` finite scores.
        level: coverage of the interval.

    Raises:
        As :func:`auroc`; DegenerateError also for a single row of one class. ArgumentError: ``level`` out of range.

    Source: DeLong, DeLong, Clarke-Pearson, 1988.
    """
    if not 0 < level < 1:
        raise ArgumentError(f"level: expected a share in (0, 1), got {level}")
    truth, a = _classes(labels, first)
    b = vector(second, "second")
    if len(b) != len(a):
        raise ShapeError(f"second: expected {len(a)} scores as in first, got {len(b)}")
    if min(int(truth.sum()), len(truth) - int(truth.sum())) < 2:
        raise DegenerateError("labels: expected 2 rows or more of each class")
    value = _area(truth, a) - _area(truth, b)
    parts = zip(_placements(truth, a), _placements(truth, b), strict=True)
    se = math.sqrt(sum(float((x - y).var(ddof=1)) / len(x) for x, y in parts))
    half = NormalDist().inv_cdf(0.5 + level / 2) * se
    z = abs(value) / se if se > 0 else math.inf if value else 0.0
    return AurocDifference(value, se, value - half, value + half, math.erfc(z / math.sqrt(2)))


def average_precision(correct: Any, score: Any) -> float:
    """``Σ (R_i − R_{i−1}) P_i`` over the distinct scores, highest first; equal scores enter together.

    Args:
        correct: ``(n,)`` of true or false, 1 or 0.
        score: ``(n,)`` finite; higher is more likely correct.

    Returns:
        Average precision in (0, 1], without interpolation (as scikit-learn's).

    Raises:
        ShapeError: not vectors of one length.
        ArgumentError: ``correct`` is not 0 or 1. NonFiniteError: NaN or infinity in ``score``.
        DegenerateError: nothing is correct, so recall is undefined.
    """
    values = vector(score, "score")
    truth = np.asarray(host(correct))
    if truth.shape != values.shape:
        raise ShapeError(f"correct: expected shape {values.shape} as score, got {truth.shape}")
    if truth.dtype.kind not in "biuf" or not np.isin(truth, (0, 1)).all():
        raise ArgumentError("correct: expected 0 or 1")
    truth = truth.astype(np.int64)
    if not truth.any():
        raise DegenerateError("correct: expected at least one correct item, got none")
    order = np.argsort(-values, kind="stable")
    ordered, hits = values[order], np.cumsum(truth[order])
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    gained = np.diff(hits[last], prepend=0)
    return float((gained * (hits[last] / (last + 1))).sum() / hits[-1])
