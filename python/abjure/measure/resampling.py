"""Bootstrap intervals: of a mean (rows, clusters, strata) by the compiled sampler, of any statistic by a call each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from .. import _native
from ..errors import ArgumentError, DegenerateError, ShapeError
from ._arrays import Floats, codes, vector

__all__ = ["Bootstrap", "bootstrap", "bootstrap_mean", "paired_bootstrap"]

Method = Literal["percentile", "bca"]


@dataclass(frozen=True)
class Bootstrap:
    """A statistic with its bootstrap interval.

    Attributes:
        value: of the data.
        low, high: the interval.
        level: its coverage.
        pvalue: two-sided, for a value of 0, ``min(1, 2 (1 + m) / (B + 1))`` with m the replicates on the other side of
            0 (those at 0 count); None where it was not asked for.
        method: ``"percentile"`` or ``"bca"``.
    """

    value: float
    low: float
    high: float
    level: float
    pvalue: float | None = None
    method: str = "percentile"

    def _repr_html_(self) -> str:
        return f"{self.value:.4f} <small>[{self.low:.4f}, {self.high:.4f}] at {self.level:.0%}</small>"


def bootstrap_mean(
    values: Any,
    *,
    clusters: Any = None,
    strata: Any = None,
    resamples: int = 10_000,
    level: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
) -> Bootstrap:
    """Interval of the mean of ``values`` over rows, or clusters of rows, drawn with replacement.

    The multinomial counts of a resample are drawn exactly (halves of a tree by the ones among random bits), so nothing
    is approximated. The result depends on the seed and the data, not on the order of rows or the number of threads.

    Args:
        values: ``(n,)`` finite; true and false count as 1 and 0.
        clusters: ``(n,)`` names; rows of one name are drawn together (all variants of one prompt) and the mean is that
            of the rows drawn, so a resample's number of rows varies.
        strata: ``(n,)`` names; each stratum keeps its number of rows (clusters). A cluster lies in one stratum.
        resamples: bootstrap samples.
        level: coverage, in (0, 1).
        method: ``"percentile"``, or ``"bca"`` (bias-corrected and accelerated).
        seed: of the generator, 0 or more.

    Returns:
        Mean, interval and the p-value of a mean of 0.

    Raises:
        ShapeError: not a vector of at least 2 values, or names that do not fit. NonFiniteError: NaN or infinity.
        ArgumentError: an option out of range, or a cluster in two strata.
        DegenerateError: fewer than 2 clusters; every stratum holds a single unit; BCa of a constant.

    Source: Efron and Tibshirani, An introduction to the bootstrap, 1993, chapters 13 and 14; Davison and Hinkley, 1997,
    section 3.2 (strata).
    """
    x = vector(values, "values", 2)
    check_options(resamples, level, seed)
    if method not in ("percentile", "bca"):
        raise ArgumentError(f"method: expected 'percentile' or 'bca', got {method!r}")
    cluster = np.arange(len(x)) if clusters is None else codes(clusters, "clusters", len(x))[0]
    stratum = np.zeros(len(x), dtype=np.int64) if strata is None else codes(strata, "strata", len(x))[0]
    # The stratum of each cluster, and whether all of its rows agree.
    units = int(cluster.max()) + 1
    of = np.empty(units, dtype=np.int64)
    of[cluster] = stratum
    if (of[cluster] != stratum).any():
        raise ArgumentError("clusters: expected each cluster in one stratum, got one in two")
    if clusters is not None and units < 2:
        raise DegenerateError("clusters: expected 2 clusters or more, got 1")
    sums = np.bincount(cluster, weights=x, minlength=units).astype(np.float64)
    sizes = np.bincount(cluster, minlength=units).astype(np.float64)
    members = [np.flatnonzero(of == s) for s in range(int(of.max()) + 1)]
    if max(map(len, members)) < 2:
        raise DegenerateError("strata: expected 2 units or more in one of them, got one in each")
    drawn = _native.bootstrap_sums([sums[m] for m in members], [sizes[m] for m in members], resamples, seed)
    table = np.asarray(drawn).reshape(resamples, len(members), 2).sum(axis=1)
    replicates = table[:, 0] / table[:, 1]
    value = math.fsum(x) / len(x)
    q = ((1 - level) / 2, (1 + level) / 2)
    if method == "bca":
        total, n = math.fsum(x), float(len(x))
        influence = []
        for m in members:
            if len(m) > 1:
                without = (total - sums[m]) / (n - sizes[m])
                influence.append((len(m) - 1) * (without.mean() - without) / len(m))
        u = np.concatenate(influence)
        spread = float((u**2).sum())
        if not spread > 0:
            raise DegenerateError("values: expected values that vary, got a constant")
        q = _bca(replicates, value, float((u**3).sum()) / (6 * spread**1.5), q)
    low, high = np.quantile(replicates, q)
    return Bootstrap(value, float(low), float(high), level, _pvalue(replicates), method)


def _bca(replicates: Floats, value: float, acceleration: float, q: tuple[float, float]) -> tuple[float, float]:
    """Quantiles to read instead of ``q`` (Efron 1987). Replicates equal to the value count half."""
    normal = NormalDist()
    below = ((replicates < value).sum() + 0.5 * (replicates == value).sum()) / len(replicates)
    if not 0 < below < 1:
        raise DegenerateError("values: every resample lies on one side of the mean; BCa has no correction then")
    bias = normal.inv_cdf(float(below))

    def corrected(p: float) -> float:
        z = bias + normal.inv_cdf(p)
        return normal.cdf(bias + z / (1 - acceleration * z))

    return corrected(q[0]), corrected(q[1])


def _pvalue(replicates: Floats) -> float:
    smaller = min(int((replicates <= 0).sum()), int((replicates >= 0).sum()))
    return min(1.0, 2 * (1 + smaller) / (len(replicates) + 1))


def check_options(resamples: int, level: float, seed: int = 0) -> None:
    """Refuses what no bootstrap takes."""
    if not 0 < level < 1:
        raise ArgumentError(f"level: expected a number in (0, 1), got {level}")
    if resamples < 10:
        raise ArgumentError(f"resamples: expected at least 10, got {resamples}")
    if not 0 <= seed < 1 << 64:
        raise ArgumentError(f"seed: expected a number of 64 bits, 0 or more, got {seed}")


def paired_bootstrap(
    first: Any,
    second: Any,
    statistic: Callable[[Floats], float] | None = None,
    *,
    clusters: Any = None,
    strata: Any = None,
    resamples: int = 10_000,
    level: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
) -> Bootstrap:
    """Interval of ``statistic(first) − statistic(second)``, examples drawn together.

    Args:
        first: ``(n,)`` values of one model, one per example.
        second: ``(n,)`` values of the other on the same examples.
        statistic: of a vector, called for every resample; the mean if None, by :func:`bootstrap_mean` of the
            differences.
        clusters, strata: names ``(n,)`` as in :func:`bootstrap_mean`; for the mean only.
        resamples: bootstrap samples.
        level: coverage, in (0, 1).
        method: ``"percentile"`` or, for the mean, ``"bca"``.
        seed: of the generator.

    Raises:
        ShapeError: not vectors of one length of at least 2.
        NonFiniteError: NaN or infinity.
        ArgumentError: an option out of range, or one that needs the mean beside a ``statistic``.
        DegenerateError: as :func:`bootstrap_mean`.
    """
    a, b = vector(first, "first", 2), vector(second, "second", 2)
    if len(a) != len(b):
        raise ShapeError(f"second: expected {len(a)} values as in first, got {len(b)}")
    if statistic is None:
        options: dict[str, Any] = {"resamples": resamples, "level": level, "method": method, "seed": seed}
        return bootstrap_mean(a - b, clusters=clusters, strata=strata, **options)
    if clusters is not None or strata is not None or method != "percentile":
        raise ArgumentError("statistic: clusters, strata and method='bca' are for the mean, statistic=None")
    f = statistic
    return bootstrap(lambda at: f(a[at]) - f(b[at]), [len(a)], resamples=resamples, level=level, seed=seed)


def bootstrap(
    statistic: Callable[..., float], sizes: Sequence[int], *, resamples: int, level: float, seed: int
) -> Bootstrap:
    """``statistic(*indices)`` with a percentile interval over index vectors drawn with replacement, one per group."""
    check_options(resamples, level, seed)
    rng = np.random.default_rng(seed)
    drawn = [statistic(*(rng.integers(n, size=n) for n in sizes)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Bootstrap(float(statistic(*(np.arange(n) for n in sizes))), float(low), float(high), level)
