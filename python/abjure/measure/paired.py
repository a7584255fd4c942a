"""Two systems on the same items, many comparisons at once, and standard errors of clustered rows."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, DegenerateError, ShapeError
from ._arrays import Floats, binary, codes, vector
from .rates import beta_cdf, beta_quantile, binomial_at_least

__all__ = ["ClusteredMean", "McNemar", "SignFlip", "adjust_pvalues", "clustered_mean", "mcnemar", "sign_flip_test"]

#: Items up to which every sign is tried.
EXACT_FLIPS = 20


@dataclass(frozen=True)
class McNemar:
    """McNemar's test on the items where two systems differ.

    Attributes:
        first_only, second_only: items where only the first, only the second said 1.
        both, neither: the others.
    """

    first_only: int
    second_only: int
    both: int
    neither: int

    @property
    def n(self) -> int:
        """Number of items."""
        return self.first_only + self.second_only + self.both + self.neither

    @property
    def difference(self) -> float:
        """Rate of the first less rate of the second."""
        return (self.first_only - self.second_only) / self.n

    @property
    def exact(self) -> float:
        """Two-sided exact p-value, ``min(1, 2 P(Bin(b + c, ½) ≤ min(b, c)))``; 1 where the systems never differ."""
        m, low = self._discordant
        return min(1.0, 2 * binomial_at_least(m - low, m, 0.5)) if m else 1.0

    @property
    def midp(self) -> float:
        """Mid-p value: the exact one less the probability of what was seen. Smaller, and seldom too small."""
        m, low = self._discordant
        if not m:
            return 1.0
        return min(1.0, 2 * binomial_at_least(m - low, m, 0.5) - self._mass(m, low))

    @property
    def corrected(self) -> float:
        """p-value of Edwards's statistic ``(|b − c| − 1)² / (b + c)`` against chi-square with one degree of freedom."""
        m, _ = self._discordant
        if not m:
            return 1.0
        return math.erfc(abs(abs(self.first_only - self.second_only) - 1) / math.sqrt(2 * m))

    @property
    def _discordant(self) -> tuple[int, int]:
        return self.first_only + self.second_only, min(self.first_only, self.second_only)

    @staticmethod
    def _mass(m: int, k: int) -> float:
        return math.exp(math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1) - m * math.log(2))

    def __repr__(self) -> str:
        return (
            f"McNemar({self.first_only} against {self.second_only} of {self.n}: difference {self.difference:+.4f}, "
            f"p exact {self.exact:.4g}, mid-p {self.midp:.4g})"
        )

    def _repr_html_(self) -> str:
        head = "<th></th><th>second 1</th><th>second 0</th>"
        rows = f"<tr><th>first 1</th><td>{self.both}</td><td>{self.first_only}</td></tr>"
        rows += f"<tr><th>first 0</th><td>{self.second_only}</td><td>{self.neither}</td></tr>"
        return f"<table><tr>{head}</tr>{rows}</table><p>p exact {self.exact:.4g}, mid-p {self.midp:.4g}</p>"


def mcnemar(first: Any, second: Any) -> McNemar:
    """Compares two systems' verdicts on the same items.

    Args:
        first, second: ``(n,)`` of true or false, 1 or 0.

    Raises:
        ShapeError: not vectors of one length, or empty. ArgumentError: a value that is neither 0 nor 1.

    Source: McNemar, 1947; mid-p as in Fagerland, Lydersen, Laake, 2013.
    """
    a = binary(first, "first")
    b = binary(second, "second", len(a))
    if not len(a):
        raise ShapeError("first: expected at least one item")
    table = np.bincount(2 * a + b, minlength=4)
    return McNemar(int(table[2]), int(table[1]), int(table[3]), int(table[0]))


@dataclass(frozen=True)
class SignFlip:
    """Permutation test of a mean difference.

    Attributes:
        difference: mean of first less second.
        pvalue: two-sided.
        exact: whether all 2^n signs were tried.
        flips: how many were.
    """

    difference: float
    pvalue: float
    exact: bool
    flips: int


def sign_flip_test(first: Any, second: Any, *, flips: int = 10_000, seed: int = 0) -> SignFlip:
    """Whether the mean difference of paired values is more than chance signs give.

    Up to 20 differing items all signs are tried; beyond, ``flips`` random ones and p is ``(1 + m) / (flips + 1)``. A
    sum that equals the observed one to within rounding counts as reaching it.

    Args:
        first, second: ``(n,)`` finite values of the same items.
        flips: random sign vectors. seed: of their generator.

    Raises:
        ShapeError, NonFiniteError: not vectors of one length of finite values. ArgumentError: ``flips`` below 100.
    """
    a, b = vector(first, "first"), vector(second, "second")
    if len(a) != len(b):
        raise ShapeError(f"second: expected {len(a)} values as in first, got {len(b)}")
    if flips < 100:
        raise ArgumentError(f"flips: expected 100 or more, got {flips}")
    mean = float((a - b).mean())
    # Equal items keep their place under any sign.
    d = (a - b)[a != b]
    reach = abs(math.fsum(d)) - 1e-12 * float(abs(d).sum())
    if len(d) <= EXACT_FLIPS:
        sums = np.zeros(1)
        for v in d:
            sums = np.concatenate([sums + v, sums - v])
        return SignFlip(mean, float((abs(sums) >= reach).mean()), True, len(sums))
    rng = np.random.default_rng(seed)
    found = 0
    step = max(1, (1 << 22) // len(d))
    for start in range(0, flips, step):
        signs = rng.integers(0, 2, size=(min(step, flips - start), len(d)), dtype=np.int8)
        found += int((abs((2.0 * signs - 1) @ d) >= reach).sum())
    return SignFlip(mean, (1 + found) / (flips + 1), False, flips)


def adjust_pvalues(pvalues: Any, method: Literal["holm", "bh"] = "holm") -> Any:
    """p-values of many tests, adjusted: reject where the result is at most the level you want.

    Args:
        pvalues: ``(m,)`` in [0, 1], or a mapping from names to them.
        method: ``"holm"`` keeps the chance of any false rejection below the level under any dependence; ``"bh"``
            (Benjamini-Hochberg) keeps the expected share of false rejections below it, for independent tests.

    Returns:
        ``(m,)`` adjusted values in the given order, or a mapping with the given names.

    Raises:
        ShapeError, NonFiniteError: not a vector of finite values. ArgumentError: a value outside [0, 1], unknown
            method.

    Source: Holm, 1979; Benjamini and Hochberg, 1995.
    """
    if method not in ("holm", "bh"):
        raise ArgumentError(f"method: expected 'holm' or 'bh', got {method!r}")
    if isinstance(pvalues, Mapping):
        found = adjust_pvalues(list(pvalues.values()), method)
        return dict(zip(pvalues, map(float, found), strict=True))
    p = vector(pvalues, "pvalues")
    if (p < 0).any() or (p > 1).any():
        raise ArgumentError(f"pvalues: expected values in [0, 1], got {p[(p < 0) | (p > 1)][0]}")
    m = len(p)
    order = np.argsort(p, kind="stable")
    if method == "holm":
        ordered = np.maximum.accumulate(p[order] * np.arange(m, 0, -1))
    else:
        ordered = np.minimum.accumulate((p[order] * m / np.arange(1, m + 1))[::-1])[::-1]
    adjusted: Floats = np.empty(m)
    adjusted[order] = np.minimum(ordered, 1.0)
    return adjusted


@dataclass(frozen=True)
class ClusteredMean:
    """A mean with its standard error.

    Attributes:
        mean: of all rows.
        se: standard error; with clusters, between them.
        n: rows. units: clusters, or rows without clusters.
    """

    mean: float
    se: float
    n: int
    units: int

    def ci(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided interval by Student's t with ``units − 1`` degrees of freedom.

        Raises:
            ArgumentError: ``level`` out of range.
        """
        half = self.half_width(level)
        return self.mean - half, self.mean + half

    def half_width(self, level: float = 0.95) -> float:
        """Half the width of :meth:`ci`. Raises as it does."""
        if not 0 < level < 1:
            raise ArgumentError(f"level: expected a share in (0, 1), got {level}")
        return t_quantile(0.5 + level / 2, self.units - 1) * self.se

    @property
    def pvalue(self) -> float:
        """Two-sided p-value of a mean of 0; 1 where mean and error are both 0."""
        if self.se == 0:
            return 1.0 if self.mean == 0 else 0.0
        t = abs(self.mean) / self.se
        df = self.units - 1
        return beta_cdf(df / (df + t * t), df / 2, 0.5)

    def _repr_html_(self) -> str:
        low, high = self.ci()
        what = f"{self.units} clusters of {self.n} rows" if self.units != self.n else f"{self.n} rows"
        return f"{self.mean:.4f} <small>[{low:.4f}, {high:.4f}] at 95 %, {html.escape(what)}</small>"


def clustered_mean(values: Any, clusters: Any = None) -> ClusteredMean:
    """Mean with a standard error that allows for rows that belong together (variants of one prompt, epochs).

    ``SE = √( C/(C−1) Σ_c (Σ_{i∈c} (x_i − x̄))² ) / n`` over C clusters; without clusters every row is its own.

    Args:
        values: ``(n,)`` finite; true and false count as 1 and 0. For two systems, pass the differences of paired rows.
        clusters: ``(n,)`` names.

    Raises:
        ShapeError, NonFiniteError: not a vector of finite values, or names that do not fit.
        DegenerateError: fewer than 2 clusters (rows), which have no standard error.

    Source: Liang and Zeger, 1986, with the factor of small samples; Miller, arXiv 2411.00640 (without it).
    """
    x = vector(values, "values")
    group: Any = np.arange(len(x)) if clusters is None else codes(clusters, "clusters", len(x))[0]
    count = int(group.max()) + 1
    if count < 2:
        raise DegenerateError(f"{'values' if clusters is None else 'clusters'}: expected 2 or more, got 1")
    mean = math.fsum(x) / len(x)
    sums = np.bincount(group, weights=x - mean, minlength=count)
    se = math.sqrt(count / (count - 1) * float((sums**2).sum())) / len(x)
    return ClusteredMean(mean, se, len(x), count)


def t_quantile(q: float, df: int) -> float:
    """Quantile of Student's t, for ``q`` of at least 1/2."""
    # P(T > t) = I_{df / (df + t²)}(df / 2, 1/2) / 2.
    x = beta_quantile(2 * (1 - q), df / 2, 0.5)
    return math.sqrt(df * (1 - x) / x) if x > 0 else math.inf
