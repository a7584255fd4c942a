"""Rates that keep their counts, with exact and score intervals."""

from __future__ import annotations

import html
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

from ..errors import ArgumentError, DTypeError, ShapeError
from ._arrays import host

__all__ = ["Rate", "beta_cdf", "beta_quantile", "binomial_at_least", "rate", "rate_difference"]

Invalid = Literal["error", "exclude", "as_fail", "as_success"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Rate:
    """``k`` successes of ``n``.

    Attributes:
        k: successes.
        n: items counted.
        invalid: items without a verdict; in ``n`` only where they were counted as failures or successes.
        groups: the same per group, in the order of first appearance; empty where no groups were given.

    Raises:
        ArgumentError: counts that are not ``0 <= k <= n``.
    """

    k: int
    n: int
    invalid: int = 0
    groups: Mapping[Hashable, Rate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.k <= self.n or self.invalid < 0:
            raise ArgumentError(f"k, n, invalid: expected 0 <= k <= n, got k={self.k}, n={self.n}, {self.invalid}")

    @property
    def rate(self) -> float:
        """``k / n``; NaN, never 0, where nothing was counted."""
        return self.k / self.n if self.n else math.nan

    def ci(self, method: str = "wilson", level: float = 0.95) -> Interval | None:
        """Interval of the rate, two-sided; None where ``n`` is 0.

        Args:
            method: ``"wilson"`` (score interval; Wilson 1927) or ``"clopper-pearson"`` (exact: covers at least
                ``level``; Clopper and Pearson 1934).
            level: coverage, in (0, 1).

        Raises:
            ArgumentError: unknown method, or ``level`` out of range.
        """
        if method not in ("wilson", "clopper-pearson"):
            raise ArgumentError(f"method: expected 'wilson' or 'clopper-pearson', got {method!r}")
        if not 0 < level < 1:
            raise ArgumentError(f"level: expected a share in (0, 1), got {level}")
        if not self.n:
            return None
        k, n = self.k, self.n
        if method == "clopper-pearson":
            tail = (1 - level) / 2
            low = 0.0 if k == 0 else beta_quantile(tail, k, n - k + 1)
            # The complement's lower limit: its tail keeps all its digits, 1 − tail would not.
            high = 1.0 if k == n else 1 - beta_quantile(tail, n - k, k + 1)
            return low, high
        z = NormalDist().inv_cdf(0.5 + level / 2)
        p, zz = k / n, z * z
        scale = 1 + zz / n
        centre = (p + zz / (2 * n)) / scale
        half = z / scale * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
        return (0.0 if k == 0 else max(centre - half, 0.0)), (1.0 if k == n else min(centre + half, 1.0))

    def __repr__(self) -> str:
        rest = f", invalid={self.invalid}" if self.invalid else ""
        groups = f", {len(self.groups)} groups" if self.groups else ""
        if not self.n:
            return f"Rate(0/0{rest}{groups})"
        low, high = self.ci() or (math.nan, math.nan)
        return f"Rate({self.k}/{self.n} = {self.rate:.4f} [{low:.4f}, {high:.4f}]{rest}{groups})"

    def _repr_html_(self) -> str:
        body = ""
        for name, r in [*self.groups.items(), ("all", self)] if self.groups else [("all", self)]:
            found = r.ci()
            interval = f"{found[0]:.4f} to {found[1]:.4f}" if found else "–"
            value = f"{r.rate:.4f}" if r.n else "–"
            body += (
                f"<tr><td>{html.escape(str(name))}</td><td>{r.k}</td><td>{r.n}</td><td>{r.invalid}</td>"
                f"<td>{value}</td><td>{interval}</td></tr>"
            )
        head = "<th>group</th><th>k</th><th>n</th><th>invalid</th><th>rate</th><th>95 % (Wilson)</th>"
        return f"<table><tr>{head}</tr>{body}</table>"


def rate(values: Any, groups: Any = None, *, invalid: Invalid = "error") -> Rate:
    """Counts verdicts.

    Args:
        values: ``(n,)`` of true or false, 1 or 0; None and NaN are items without a verdict.
        groups: ``(n,)`` names of groups, hashable; the result then holds one rate per group in ``.groups``.
        invalid: what an item without a verdict is: ``"error"``, left out (``"exclude"``), or counted ``"as_fail"`` or
            ``"as_success"``. It is counted in ``.invalid`` in any case.

    Raises:
        ArgumentError: a value that is neither 0 nor 1, an item without a verdict, or unknown ``invalid``.
        DTypeError: a value that is no number. ShapeError: not vectors of one length.
    """
    if invalid not in ("error", "exclude", "as_fail", "as_success"):
        raise ArgumentError(f"invalid: expected 'error', 'exclude', 'as_fail' or 'as_success', got {invalid!r}")
    items = _items(values, "values")
    names = [None] * len(items) if groups is None else _items(groups, "groups")
    if len(names) != len(items):
        raise ShapeError(f"groups: expected {len(items)} names, one per value, got {len(names)}")
    counts: dict[Hashable, list[int]] = {}
    for i, (item, name) in enumerate(zip(items, names, strict=True)):
        verdict = _verdict(item, i)
        k_n_bad = counts.setdefault(name, [0, 0, 0])
        if verdict is None:
            if invalid == "error":
                raise ArgumentError(f"values: no verdict at index {i}; say what it counts as with invalid=")
            k_n_bad[2] += 1
            if invalid == "exclude":
                continue
            verdict = invalid == "as_success"
        k_n_bad[0] += verdict
        k_n_bad[1] += 1
    total = [sum(c[j] for c in counts.values()) for j in range(3)]
    by_group = {} if groups is None else {name: Rate(c[0], c[1], c[2]) for name, c in counts.items()}
    return Rate(total[0], total[1], total[2], by_group)


def _items(x: Any, name: str) -> list[Any]:
    x = host(x)
    if isinstance(x, str) or not isinstance(x, Iterable):
        raise ShapeError(f"{name}: expected shape (n,), got {type(x).__name__}")
    if getattr(x, "ndim", 1) != 1:
        raise ShapeError(f"{name}: expected shape (n,), got {getattr(x, 'shape', None)}")
    return x.tolist() if hasattr(x, "tolist") else list(x)


def _verdict(item: Any, i: int) -> bool | None:
    if item is None:
        return None
    try:
        number = float(item)
    except (TypeError, ValueError):
        raise DTypeError(f"values: expected true or false, got {type(item).__name__} at index {i}") from None
    if math.isnan(number):
        return None
    if number not in (0.0, 1.0):
        raise ArgumentError(f"values: expected 0 or 1, got {item!r} at index {i}")
    return number == 1.0


def rate_difference(first: Rate, second: Rate, level: float = 0.95) -> Interval | None:
    """Interval of ``first.rate − second.rate`` for independent samples; None where either is empty.

    Raises:
        ArgumentError: ``level`` out of range.

    Source: Newcombe, Interval estimation for the difference between independent proportions, 1998, method 10.
    """
    a, b = first.ci(level=level), second.ci(level=level)
    if a is None or b is None:
        return None
    p, q = first.rate, second.rate
    low = p - q - math.hypot(p - a[0], b[1] - q)
    return low, p - q + math.hypot(a[1] - p, q - b[0])


def binomial_at_least(k: int, n: int, p: float) -> float:
    """``P(Bin(n, p) >= k)``, as a regularised incomplete beta function.

    Raises:
        ArgumentError: ``p`` outside [0, 1], or a negative ``n``.
    """
    if not 0 <= p <= 1 or n < 0:
        raise ArgumentError(f"n, p: expected n of 0 or more and p in [0, 1], got {n} and {p}")
    if k <= 0:
        return 1.0
    return 0.0 if k > n else beta_cdf(p, k, n - k + 1)


def beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function ``I_x(a, b)``; relative error near 1e-16 times ``ln Γ(a + b)``.

    Source: continued fraction of the NIST Digital Library of Mathematical Functions, 8.17.22.
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    front = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    # The fraction converges fast on its own side of the mean; the other side is the complement.
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(x, a, b) / a
    return 1 - front * _beta_fraction(1 - x, b, a) / b


def _beta_fraction(x: float, a: float, b: float) -> float:
    """Modified Lentz; about sqrt(max(a, b)) steps."""
    tiny = 1e-300
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    h = d
    for m in range(1, 100_000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 + step * d, 1 + step / c
            d, c = 1 / (d if abs(d) > tiny else tiny), c if abs(c) > tiny else tiny
            h *= d * c
        if abs(d * c - 1) < 1e-16:
            break
    return h


def beta_quantile(q: float, a: float, b: float) -> float:
    """``x`` with ``I_x(a, b) = q``, by bisection down to neighbouring floats.

    Raises:
        ArgumentError: ``q`` outside [0, 1].
    """
    if not 0 <= q <= 1:
        raise ArgumentError(f"q: expected a probability in [0, 1], got {q}")
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        if beta_cdf(middle, a, b) < q:
            low = middle
        else:
            high = middle
    return high if q > 0 else 0.0
