"""What the results of benchmarks share: estimates with intervals, rows to show, and the statistics under them."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from ._arrays import Floats
from .paired import clustered_mean
from .rates import Interval, Rate


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: the estimate; None where it is not defined (nothing was counted).
        interval: its limits; None where there are too few items for one.
        n: items it rests on.
        invalid: items left out for want of a verdict.
        exact: the value as a fraction, where the scores are whole numbers.
    """

    value: float | None
    interval: Interval | None = None
    n: int = 0
    invalid: int = 0
    exact: Fraction | None = None

    def __float__(self) -> float:
        return math.nan if self.value is None else self.value

    def __repr__(self) -> str:
        if self.value is None:
            return f"Estimate(undefined, n={self.n})"
        shown = f" [{self.interval[0]:.4f}, {self.interval[1]:.4f}]" if self.interval else ""
        return f"Estimate({self.value:.4f}{shown}, n={self.n})"


@dataclass(frozen=True)
class Row:
    """One line of a result: a rate, an estimate, or a plain count."""

    name: str
    value: Rate | Estimate | int | float | str | None
    note: str = ""


def decimal_places(value: Fraction | float | None, places: int = 4) -> str:
    """A number as text, rounded half away from zero; exactly so where it is a fraction."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–" if value is None or math.isnan(value) else ("∞" if value > 0 else "−∞")
    if isinstance(value, Fraction):
        scaled = abs(value) * 10**places
        whole = (2 * scaled.numerator + scaled.denominator) // (2 * scaled.denominator)
        found = Decimal(whole).scaleb(-places)
        return f"{'-' if value < 0 and whole else ''}{found:.{places}f}"
    return f"{Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-places), rounding=ROUND_HALF_UP):f}"


class Scores:
    """Base of results: a title, rows, notes; everything else is made from these."""

    title: ClassVar[str] = ""
    level: float = 0.95

    def rows(self) -> list[Row]:
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What to know before quoting the numbers."""
        return []

    def table(self) -> list[dict[str, Any]]:
        """One dict per row: name, k, n, invalid, value, low, high, note; None where there is none."""
        return [self._cells(row) for row in self.rows()]

    def _cells(self, row: Row) -> dict[str, Any]:
        v = row.value
        cells: dict[str, Any] = {"name": row.name, "k": None, "n": None, "invalid": None}
        cells |= {"value": None, "low": None, "high": None, "note": row.note}
        if isinstance(v, Rate):
            low, high = v.ci(level=self.level) or (None, None)
            value = v.rate if v.n else None
            return cells | {"k": v.k, "n": v.n, "invalid": v.invalid, "value": value, "low": low, "high": high}
        if isinstance(v, Estimate):
            low, high = v.interval or (None, None)
            return cells | {"n": v.n, "invalid": v.invalid, "value": v.value, "low": low, "high": high}
        return cells | {"value": v}

    def to_dict(self) -> dict[str, Any]:
        """Title, rows and notes as plain values."""
        return {"kind": type(self).__name__, "title": self.title, "rows": self.table(), "notes": self.notes()}

    def __repr__(self) -> str:
        shown = []
        for row in self.rows()[:8]:
            v = row.value
            if isinstance(v, Rate):
                text = f"{v.k}/{v.n}"
            else:
                text = decimal_places(float(v), 4) if isinstance(v, (Estimate, float)) else str(v)
            shown.append(f"{row.name} {text}")
        return f"{type(self).__name__}({', '.join(shown)}{', …' if len(self.rows()) > 8 else ''})"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{h}</th>" for h in ("", "k", "n", "invalid", "value", f"{self.level:.0%} interval", ""))
        body = ""
        for row in self.rows():
            body += "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in shown_cells(row, self.level)) + "</tr>"
        notes = "".join(f"<li>{html.escape(n)}</li>" for n in self.notes())
        return f"<table><caption>{html.escape(self.title)}</caption><tr>{head}</tr>{body}</table><ul>{notes}</ul>"

    def plot(self, ax: Any = None) -> Any:
        """The rows with their intervals, on matplotlib axes (made if None)."""
        rows = [r for r in self.table() if isinstance(r["value"], (int, float)) and r["n"]]
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(6, max(2.0, 0.3 * len(rows) + 1)), layout="constrained").subplots()
        for i, r in enumerate(rows[::-1]):
            low, high = (r["value"], r["value"]) if r["low"] is None else (r["low"], r["high"])
            ax.plot([low, high], [i, i], color="0.5")
            ax.plot([r["value"]], [i], marker="o", color="C0")
        ax.set_yticks(range(len(rows)), [r["name"] for r in rows[::-1]])
        ax.set(title=self.title)
        return ax


def shown_cells(row: Row, level: float = 0.95, places: int = 4) -> list[str]:
    """Name, k, n, invalid, value, interval and note as text; rates are rounded from their counts."""
    v = row.value
    if isinstance(v, Rate):
        limits = v.ci(level=level)
        value = decimal_places(Fraction(v.k, v.n) if v.n else None, places)
        return [row.name, str(v.k), str(v.n), str(v.invalid), value, _limits(limits, places), row.note]
    if isinstance(v, Estimate):
        value = decimal_places(v.value if v.exact is None else v.exact, places)
        return [row.name, "", str(v.n), str(v.invalid), value, _limits(v.interval, places), row.note]
    text = decimal_places(v, places) if isinstance(v, float) or v is None else str(v)
    return [row.name, "", "", "", text, "", row.note]


def _limits(limits: Interval | None, places: int) -> str:
    return "–" if limits is None else f"{decimal_places(limits[0], places)} to {decimal_places(limits[1], places)}"


def rate_of(counts: Sequence[int]) -> Rate:
    """A rate from successes, items and items without a verdict."""
    k, n, invalid = counts
    return Rate(k, n, invalid)


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ArgumentError(f"level: expected a share in (0, 1), got {level}")


def mean_estimate(
    values: Sequence[int | Fraction | float],
    clusters: Sequence[Any] | None = None,
    *,
    level: float = 0.95,
    invalid: int = 0,
    bounds: tuple[float, float] | None = None,
) -> Estimate:
    """Mean with a t interval, from the variation of single items or of clusters; cut to ``bounds``.

    The error is that of :func:`clustered_mean`. No interval for fewer than two items or clusters.
    """
    n = len(values)
    if not n:
        return Estimate(None, None, 0, invalid)
    whole = [Fraction(v) for v in values if isinstance(v, (int, Fraction))]
    exact = sum(whole, Fraction(0)) / n if len(whole) == n else None
    x: Floats = np.asarray([float(v) for v in values])
    mean = float(exact) if exact is not None else math.fsum(x) / n
    interval = None
    places: dict[Any, int] = {}
    # A missing name is a cluster like any other here.
    group = [places.setdefault(name, len(places)) for name in (range(n) if clusters is None else clusters)]
    if len(places) > 1:
        half = clustered_mean(x, group).half_width(level)
        low, high = mean - half, mean + half
        interval = (low, high) if bounds is None else (max(low, bounds[0]), min(high, bounds[1]))
    return Estimate(mean, interval, n, invalid, exact)


def bootstrap_cells(
    counts: npt.NDArray[np.int64],
    statistic: Callable[[Floats], Floats],
    *,
    resamples: int,
    seed: int,
    level: float,
) -> Interval | None:
    """Percentile interval of a statistic of counted cells, by resampling items.

    Items of one cell are alike, so that a resample is a draw of counts. Draws without a value (NaN) are left out;
    None where more than a twentieth are.

    Args:
        counts: items per cell. statistic: counts ``(b, cells)`` to values ``(b,)``.
    """
    n = int(counts.sum())
    if n < 2:
        return None
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    values = statistic(drawn.astype(np.float64))
    values = values[~np.isnan(values)]
    if len(values) < 0.95 * resamples:
        return None
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def check_resampling(resamples: int, seed: int) -> None:
    if isinstance(resamples, bool) or not isinstance(resamples, (int, np.integer)) or resamples < 100:
        raise ArgumentError(f"resamples: expected 100 or more, got {resamples!r}")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ArgumentError(f"seed: expected an integer of 0 or more, got {seed!r}")
