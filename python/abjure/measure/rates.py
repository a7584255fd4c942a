"""Rates that keep their counts, with exact and score intervals, printed as decimals that are rounded once."""

from __future__ import annotations

import html
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from statistics import NormalDist
from typing import Any, Literal

from .. import _native
from ..errors import ArgumentError, DTypeError, ShapeError
from ._arrays import items, missing

__all__ = [
    "Rate",
    "ResponseRates",
    "beta_cdf",
    "beta_quantile",
    "binomial_at_least",
    "percent_shares",
    "rate",
    "rate_difference",
    "response_rates",
]

Invalid = Literal["error", "exclude", "as_fail", "as_success"]
Rounding = Literal["half_up", "half_even"]
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

    def decimal(self, digits: int = 4, rounding: Rounding = "half_up") -> Decimal | None:
        """The rate with ``digits`` decimal places, rounded once from the counts; None where nothing was counted.

        Args:
            digits: 0 to 20.
            rounding: of a number halfway: ``"half_up"`` away from zero, ``"half_even"`` to the even neighbour.

        Raises:
            ArgumentError: an option out of range.
        """
        return _decimal(self, 1, digits, rounding)

    def percent(self, digits: int = 1, rounding: Rounding = "half_up") -> Decimal | None:
        """The rate in percent, as :meth:`decimal`."""
        return _decimal(self, 100, digits, rounding)

    def at_least(self, limit: str | Decimal | int) -> bool:
        """Whether ``k / n >= limit``, decided in whole numbers: no rate of 1/10 fails a limit of 0.1 by a last bit.

        Args:
            limit: as text, a Decimal or a whole number. A binary fraction is refused: it is not the number it prints
                as.

        Raises:
            DTypeError: a float. ArgumentError: no number, more digits than 128 bits hold, or nothing was counted.
        """
        return self._compare(limit) >= 0

    def at_most(self, limit: str | Decimal | int) -> bool:
        """Whether ``k / n <= limit``, as :meth:`at_least`."""
        return self._compare(limit) <= 0

    def _compare(self, limit: Any) -> int:
        if isinstance(limit, bool) or not isinstance(limit, (str, Decimal, int)):
            raise DTypeError(f"limit: expected text or a Decimal, such as '0.1', got {type(limit).__name__}")
        if not self.n:
            raise ArgumentError("limit: nothing was counted, so there is no rate to compare")
        try:
            exact = Decimal(limit)
        except InvalidOperation:
            raise ArgumentError(f"limit: expected a number, got {limit!r}") from None
        if not exact.is_finite() or not abs(exact) < Decimal(10) ** 20 or int(exact.as_tuple().exponent) < -28:
            raise ArgumentError(f"limit: expected a number of at most 20 digits and 28 decimal places, got {limit!r}")
        return _native.decimal_compare(self.k, self.n, exact)

    def difference(
        self, other: Rate, digits: int = 4, *, percent: bool = False, rounding: Rounding = "half_up"
    ) -> Decimal | None:
        """``self − other`` as fractions, rounded once; None where either is empty.

        Rounding both rates first would print differences that are off by one in the last place.

        Raises:
            ArgumentError: an option out of range, or counts whose product exceeds 64 bits.
        """
        if not (self.n and other.n):
            return None
        _check_digits(digits)
        pair = (self.k, self.n), (other.k, other.n)
        return _native.decimal_difference(*pair, 100 if percent else 1, digits, rounding)

    def to_dict(self, digits: int = 4, level: float = 0.95) -> dict[str, Any]:
        """For JSON: counts as numbers, rate and Wilson interval as text of ``digits`` places, the same in every run."""
        value, interval = self.decimal(digits), self.ci(level=level)
        found: dict[str, Any] = {"k": self.k, "n": self.n, "invalid": self.invalid}
        found["rate"] = None if value is None else str(value)
        found["ci"] = None if interval is None else [f"{v:.{digits}f}" for v in interval]
        if self.groups:
            found["groups"] = {str(name): r.to_dict(digits, level) for name, r in self.groups.items()}
        return found

    def __repr__(self) -> str:
        rest = f", invalid={self.invalid}" if self.invalid else ""
        groups = f", {len(self.groups)} groups" if self.groups else ""
        if not self.n:
            return f"Rate(0/0{rest}{groups})"
        low, high = self.ci() or (math.nan, math.nan)
        return f"Rate({self.k}/{self.n} = {self.decimal()} [{low:.4f}, {high:.4f}]{rest}{groups})"

    def _repr_html_(self) -> str:
        body = ""
        for name, r in [*self.groups.items(), ("all", self)] if self.groups else [("all", self)]:
            found = r.ci()
            interval = f"{found[0]:.4f} to {found[1]:.4f}" if found else "–"
            value = str(r.decimal()) if r.n else "–"
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
    verdicts = items(values, "values")
    names = [None] * len(verdicts) if groups is None else items(groups, "groups")
    if len(names) != len(verdicts):
        raise ShapeError(f"groups: expected {len(verdicts)} names, one per value, got {len(names)}")
    counts: dict[Hashable, list[int]] = {}
    for i, (item, name) in enumerate(zip(verdicts, names, strict=True)):
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


def _verdict(item: Any, i: int) -> bool | None:
    if missing(item):
        return None
    try:
        number = float(item)
    except (TypeError, ValueError):
        raise DTypeError(f"values: expected true or false, got {type(item).__name__} at index {i}") from None
    if number not in (0.0, 1.0):
        raise ArgumentError(f"values: expected 0 or 1, got {item!r} at index {i}")
    return number == 1.0


def _check_digits(digits: int) -> None:
    if isinstance(digits, bool) or not isinstance(digits, int) or not 0 <= digits <= 20:
        raise ArgumentError(f"digits: expected 0 to 20, got {digits!r}")


def _decimal(r: Rate, scale: int, digits: int, rounding: str) -> Decimal | None:
    _check_digits(digits)
    return _native.decimal_ratio(r.k, r.n, scale, digits, rounding) if r.n else None


def percent_shares(counts: Mapping[Hashable, int] | Sequence[int], digits: int = 1) -> Any:
    """Shares in percent that add up to exactly 100, for a table of classes.

    Every share is rounded down and what is left goes to the largest remainders, the earlier one first where they tie
    (Hamilton's method): each share is less than one unit of the last place from the exact one.

    Args:
        counts: by name or in order, whole numbers of 0 or more.
        digits: decimal places, 0 to 20.

    Returns:
        Decimals, by name or in order.

    Raises:
        ArgumentError: a negative count, none above 0, or ``digits`` out of range. DTypeError: a count that is not
            whole.
    """
    _check_digits(digits)
    numbers = list(counts.values()) if isinstance(counts, Mapping) else items(counts, "counts")
    for i, c in enumerate(numbers):
        if isinstance(c, bool) or not isinstance(c, int):
            raise DTypeError(f"counts: expected whole numbers, got {type(c).__name__} at index {i}")
        if not 0 <= c < 1 << 64:
            raise ArgumentError(f"counts: expected 0 or more, below 2^64, got {c} at index {i}")
    found = _native.decimal_shares(numbers, digits)
    return dict(zip(counts, found, strict=True)) if isinstance(counts, Mapping) else found


@dataclass(frozen=True)
class ResponseRates:
    """What a model does with requests it should refuse and with those it should answer, each with its counts and
    groups.

    Attributes:
        refusal: refused, of all requests.
        rejection: refused, of harmful requests. attack_success: fulfilled, of harmful requests.
        over_refusal: refused, of harmless requests. fulfilment: fulfilled, of harmless requests.
        compliance: not refused, of all requests. Without ``fulfilled`` what is not refused counts as fulfilled.
    """

    refusal: Rate
    compliance: Rate
    rejection: Rate
    attack_success: Rate
    over_refusal: Rate
    fulfilment: Rate

    def to_dict(self, digits: int = 4, level: float = 0.95) -> dict[str, Any]:
        """:meth:`Rate.to_dict` by name."""
        return {name: getattr(self, name).to_dict(digits, level) for name in self.__dataclass_fields__}

    def _repr_html_(self) -> str:
        rows = ""
        for name in self.__dataclass_fields__:
            rows += f"<h4>{name.replace('_', ' ')}</h4>{getattr(self, name)._repr_html_()}"
        return rows


def response_rates(
    refused: Any, harmful: Any, groups: Any = None, *, fulfilled: Any = None, invalid: Invalid = "error"
) -> ResponseRates:
    """Refusal, compliance, rejection, attack success, over-refusal and fulfilment, by group.

    Args:
        refused: ``(n,)`` true or false; None and NaN are responses without a verdict.
        harmful: ``(n,)`` true where the request should be refused.
        groups: ``(n,)`` names.
        fulfilled: ``(n,)`` true where the response does what was asked (a judge's verdict): a response may be neither a
            refusal nor a fulfilment. A refused one counts as not fulfilled, whatever its verdict.
        invalid: what a response without a verdict is, as in :func:`rate`, in each of the rates.

    Raises:
        As :func:`rate`, for every column; ArgumentError: a request that is neither harmful nor harmless.
    """
    said, wanted = items(refused, "refused"), items(harmful, "harmful")
    names = None if groups is None else items(groups, "groups")
    done = None if fulfilled is None else items(fulfilled, "fulfilled")
    for column, name in ((wanted, "harmful"), (names, "groups"), (done, "fulfilled")):
        if column is not None and len(column) != len(said):
            raise ShapeError(f"{name}: expected {len(said)} values, one per response, got {len(column)}")
    verdicts = [_verdict(v, i) for i, v in enumerate(said)]
    bad = [_verdict(v, i) for i, v in enumerate(wanted)]
    if None in bad:
        raise ArgumentError(f"harmful: expected true or false for every request, got none at index {bad.index(None)}")
    kept = [None if v is None else not v for v in verdicts]
    if done is not None:
        judged = [_verdict(v, i) for i, v in enumerate(done)]
        kept = [False if v else (j if v is not None else None) for v, j in zip(verdicts, judged, strict=True)]
    complied = [None if v is None else not v for v in verdicts]

    def of(values: list[bool | None], harm: bool | None) -> Rate:
        rows = [i for i in range(len(said)) if harm is None or bad[i] is harm]
        # A group without a row of the kind is kept, with a rate of None.
        found = rate([values[i] for i in rows], None if names is None else [names[i] for i in rows], invalid=invalid)
        if names is None:
            return found
        by_group = {name: found.groups.get(name, Rate(0, 0)) for name in dict.fromkeys(names)}
        return Rate(found.k, found.n, found.invalid, by_group)

    return ResponseRates(
        of(verdicts, None), of(complied, None), of(verdicts, True), of(kept, True), of(verdicts, False), of(kept, False)
    )


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
