"""Gaps between groups where the group is known of some rows only, or only as probabilities: sharp bounds."""

from __future__ import annotations

import html
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ._arrays import Floats, Ints, codes, host, items, missing
from .rates import Interval
from .resampling import check_options

__all__ = ["BASES", "GapBounds", "ParityBounds"]

#: On what grounds an attribute may be known.
BASES = ("required by law", "volunteered", "inferred", "imputed")
#: Groups up to which the least gap is searched over all unions of groups.
_MOST_GROUPS = 12
#: Rows of one value of the proxy below which values are put together.
_FEW = 20


def listed(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names))


def check_basis(basis: Any) -> str:
    """The basis as text; several joined.

    Raises:
        ArgumentError: none, or one that is unknown.
    """
    given = [basis] if isinstance(basis, str) else [] if basis is None else list(basis)
    if not given or any(b not in BASES for b in given):
        raise ArgumentError(f"basis: expected how the attribute came to be known, of {listed(BASES)}, got {basis!r}")
    return " and ".join(dict.fromkeys(given))


@dataclass(frozen=True, repr=False)
class GapBounds:
    """What the data say of a gap (largest less smallest rate of the groups).

    Attributes:
        low, high: the smallest and the largest gap that agree with the data: sharp, with no assumption on who lacks
            the attribute or how it goes with the prediction.
        interval: covers the whole of [low, high] with the coverage asked for (bootstrap over rows).
        point: the gap under :attr:`assumption`. point_interval: its bootstrap interval.
        assumption: what would have to hold for ``point``.
        rates: bounds of each group's rate.
        point_rates: each group's rate under the assumption.
        thresholded: the gap that comes out if each row is given its most probable group; None without probabilities.
        basis: how the attribute came to be known.
        n: rows. unknown: of those, the ones without an observed attribute.
    """

    low: float | None
    high: float | None
    interval: Interval | None
    point: float | None
    point_interval: Interval | None
    assumption: str
    rates: Mapping[Hashable, Interval]
    point_rates: Mapping[Hashable, float]
    thresholded: float | None
    basis: str
    n: int
    unknown: int
    level: float
    empty: tuple[Hashable, ...] = ()

    @property
    def identified(self) -> bool:
        """Whether the bounds meet, so that the data alone say what the gap is."""
        return self.low is not None and self.high is not None and self.high - self.low <= 1e-12

    @property
    def thresholding_bias(self) -> float | None:
        """The gap after thresholding less that under the assumption; None without probabilities."""
        return None if self.thresholded is None or self.point is None else self.thresholded - self.point

    def between(self, first: Hashable, second: Hashable) -> Interval:
        """Sharp bounds of the rate of ``first`` less that of ``second``.

        Raises:
            ArgumentError: an unknown group. DegenerateError: a group has no rows.
        """
        if self.empty:
            raise DegenerateError(f"groups: expected rows in every group, got none in {listed(self.empty)}")
        for name in (first, second):
            if name not in self.rates:
                raise ArgumentError(f"first, second: expected groups among {listed(self.rates)}, got {name!r}")
        a, b = self.rates[first], self.rates[second]
        # Rows that raise one group's rate are those that lower the other's: both limits are reached at once.
        return a[0] - b[1], a[1] - b[0]

    def _line(self) -> str:
        if self.low is None or self.high is None or self.interval is None:
            return f"no rows in {listed(self.empty)}; basis: {self.basis}"
        shown = f"{self.low:.4f} to {self.high:.4f}" if not self.identified else f"{self.low:.4f}"
        found = f"{shown} [{self.interval[0]:.4f}, {self.interval[1]:.4f}], "
        if self.point is not None and not self.identified:
            found += f"{self.point:.4f} if {self.assumption}, "
        if self.thresholded is not None:
            found += f"{self.thresholded:.4f} by thresholding, "
        return f"{found}attribute unknown in {self.unknown}/{self.n}, basis: {self.basis}"

    def __repr__(self) -> str:
        return f"GapBounds({self._line()})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self._line())}</p>"


@dataclass(frozen=True, repr=False)
class ParityBounds:
    """:class:`ParityGap` where the attribute is missing or inferred: what can be said, and on what basis.

    Attributes:
        demographic_parity: rates of predictions of 1.
        equal_opportunity, false_positive: among rows of label 1, of label 0; None without labels.
        basis: how the attribute came to be known. level: coverage of the intervals.
    """

    demographic_parity: GapBounds
    equal_opportunity: GapBounds | None
    false_positive: GapBounds | None
    basis: str
    level: float

    def table(self) -> list[dict[str, Any]]:
        """One dict per gap; the basis is in each."""
        found = []
        for name in ("demographic_parity", "equal_opportunity", "false_positive"):
            gap = getattr(self, name)
            if gap is not None:
                found.append(
                    {
                        "gap": name.replace("_", " "),
                        "low": gap.low,
                        "high": gap.high,
                        f"{self.level:.0%} low": gap.interval[0] if gap.interval else None,
                        f"{self.level:.0%} high": gap.interval[1] if gap.interval else None,
                        f"if {gap.assumption}": gap.point,
                        "thresholded": gap.thresholded,
                        "thresholding bias": gap.thresholding_bias,
                        "unknown": gap.unknown,
                        "n": gap.n,
                        "basis": gap.basis,
                    }
                )
        return found

    def __repr__(self) -> str:
        parts = [f"{r['gap']}: {getattr(self, r['gap'].replace(' ', '_'))._line()}" for r in self.table()]
        return f"ParityBounds({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        rows = self.table()
        head = "".join(f"<th>{html.escape(k)}</th>" for k in rows[0])
        body = ""
        for r in rows:
            cells = (f"{v:.4f}" if isinstance(v, float) else "–" if v is None else str(v) for v in r.values())
            body += "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>"
        return f"<table><tr>{head}</tr>{body}</table>"

    def plot(self, ax: Any = None) -> Any:
        """Bounds, their interval, and the two estimates of each gap, on matplotlib axes (made if None)."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(6, 2.4), layout="constrained").subplots()
        rows = [r for r in self.table() if r["low"] is not None]
        for i, r in enumerate(rows[::-1]):
            gap = getattr(self, r["gap"].replace(" ", "_"))
            ax.plot(gap.interval, [i, i], color="0.6", lw=1)
            ax.plot([gap.low, gap.high], [i, i], color="C0", lw=4, solid_capstyle="butt")
            ax.plot([gap.point], [i], marker="o", color="C1", label="under the assumption" if i == 0 else None)
            if gap.thresholded is not None:
                ax.plot([gap.thresholded], [i], marker="x", color="C3", label="thresholded" if i == 0 else None)
        ax.set_yticks(range(len(rows)), [r["gap"] for r in rows[::-1]])
        ax.set(xlabel=f"gap (basis: {self.basis})")
        ax.legend()
        return ax


def observed_or_missing(groups: Any, n: int) -> tuple[Ints, list[Hashable]]:
    """Groups as numbers, -1 where there is none, and their names."""
    found = items(groups, "groups")
    if len(found) != n:
        raise ShapeError(f"groups: expected {n} names, got {len(found)}")
    known = [i for i, g in enumerate(found) if not missing(g)]
    code, names = codes([found[i] for i in known], "groups")
    out = np.full(n, -1, dtype=np.int64)
    out[known] = code
    return out, names


def proxy(probabilities: Any, names: Any, n: int) -> tuple[Floats, list[Hashable]]:
    """Probabilities ``(n, groups)`` that sum to one, and the names of the groups.

    Raises:
        ShapeError, NonFiniteError, ArgumentError, DegenerateError: they do not; the row is named.
    """
    if isinstance(probabilities, Mapping):
        names = list(probabilities) if names is None else list(names)
        probabilities = np.stack([np.asarray(host(probabilities[k]), dtype=np.float64) for k in names], axis=-1)
    q = np.asarray(host(probabilities), dtype=np.float64)
    if q.ndim != 2 or len(q) != n:
        raise ShapeError(f"probabilities: expected shape ({n}, groups), got {q.shape}")
    names = list(range(q.shape[1])) if names is None else list(names)
    if len(names) != q.shape[1] or len(set(names)) < len(names):
        raise ArgumentError(f"names: expected {q.shape[1]} different names, one per column, got {names!r}")
    if q.shape[1] < 2:
        raise DegenerateError(f"probabilities: expected two groups or more, got {q.shape[1]}")
    if not np.isfinite(q).all():
        raise NonFiniteError(f"probabilities: non-finite value in row {int((~np.isfinite(q).all(1)).argmax())}")
    off = (abs(q.sum(axis=1) - 1) > 1e-6) | (q < 0).any(axis=1)
    if off.any():
        i = int(off.argmax())
        raise ArgumentError(f"probabilities: expected rows of 0 or more that sum to 1, got {q[i].tolist()} in row {i}")
    return q / q.sum(axis=1, keepdims=True), names


def bounds(
    said: Ints,
    code: Ints | None,
    q: Floats | None,
    names: Sequence[Hashable],
    cells: Any,
    right: Any,
    basis: str,
    *,
    min_n: int,
    resamples: int,
    level: float,
    seed: int,
) -> ParityBounds:
    """The three gaps, from groups with missing ones (-1), probabilities, or both."""
    check_options(resamples, level, seed)
    if len(names) < 2:
        raise DegenerateError(f"groups: expected two groups or more, got {len(names)}")
    if q is not None and len(names) > _MOST_GROUPS:
        raise ArgumentError(f"probabilities: expected at most {_MOST_GROUPS} groups, got {len(names)}")
    place = None
    if q is not None:
        place = _cells(q, cells, len(said))
        if code is not None:
            known = code >= 0
            q = q.copy()
            q[known] = np.eye(len(names))[code[known]]
            # A row whose group was seen is a value of the proxy of its own.
            place = np.where(known, int(place.max()) + 1 + code, place)

    def gap(rows: Any, stream: int) -> GapBounds:
        unknown = len(rows) if code is None else int((code[rows] < 0).sum())
        facts = (basis, len(rows), unknown, level)
        rng = np.random.default_rng([seed, stream])
        if q is None:
            assert code is not None
            return _partial(said[rows], code[rows], names, facts, min_n, resamples, rng)
        assert place is not None
        return _by_proxy(said[rows], q[rows], place[rows], names, facts, min_n, resamples, rng)

    everything = gap(np.arange(len(said)), 0)
    if right is None:
        return ParityBounds(everything, None, None, basis, level)
    return ParityBounds(everything, gap(np.flatnonzero(right), 1), gap(np.flatnonzero(~right), 2), basis, level)


def _cells(q: Floats, cells: Any, n: int) -> Ints:
    """The value of the proxy of each row: as given, equal probabilities, or probabilities rounded to 0.05."""
    if cells is not None:
        return codes(cells, "cells", n)[0]
    for step in (1e-9, 0.05):
        place: Ints = np.unique(np.round(q / step), axis=0, return_inverse=True)[1].reshape(-1)
        if n / (place.max() + 1) >= _FEW:
            break
    return place


def _empty(names: Sequence[Hashable], gone: Any, assumption: str, facts: tuple[str, int, int, float]) -> GapBounds:
    basis, n, unknown, level = facts
    empty = tuple(name for name, g in zip(names, gone, strict=True) if g)
    return GapBounds(None, None, None, None, None, assumption, {}, {}, None, basis, n, unknown, level, empty)


def _quantiles(low: Floats, high: Floats, level: float) -> Interval | None:
    tail = (1 - level) / 2
    fine = np.isfinite(low) & np.isfinite(high)
    if fine.mean() < 0.95:
        return None
    return float(np.quantile(low[fine], tail)), float(np.quantile(high[fine], 1 - tail))


def _partial(
    said: Ints,
    code: Ints,
    names: Sequence[Hashable],
    facts: tuple[str, int, int, float],
    least: int,
    resamples: int,
    rng: np.random.Generator,
) -> GapBounds:
    """Worst cases over who the rows without a group are."""
    groups = len(names)
    counts = np.bincount((code + 1) * 2 + said, minlength=2 * groups + 2).reshape(1, groups + 1, 2)
    assumption = "the attribute is missing at random given the prediction"
    gone = counts[0, 1:].sum(axis=1) < least
    if gone.any():
        return _empty(names, gone, assumption, facts)
    low, high, least_rate, most_rate, point, point_rates = _worst(counts)
    n = int(counts.sum())
    drawn = rng.multinomial(n, counts.reshape(-1) / n, size=resamples).reshape(resamples, groups + 1, 2)
    l, h, _, _, p, _ = _worst(drawn)  # noqa: E741
    basis, rows, unknown, level = facts
    return GapBounds(
        float(low[0]), float(high[0]), _quantiles(l, h, level), float(point[0]), _quantiles(p, p, level), assumption,
        {g: (float(least_rate[0, i]), float(most_rate[0, i])) for i, g in enumerate(names)},
        {g: float(point_rates[0, i]) for i, g in enumerate(names)}, None, basis, rows, unknown, level,
    )  # fmt: skip


def _worst(counts: Any) -> tuple[Floats, ...]:
    """Bounds from counts ``(b, 1 + groups, 2)``, the rows without a group first; NaN where a group is empty."""
    c = counts.astype(np.float64)
    u0, u1 = c[:, :1, 0], c[:, :1, 1]
    k, n = c[:, 1:, 1], c[:, 1:].sum(axis=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = k / (n + u0), (k + u1) / (n + u1)
        pairs = high[:, :, None] - low[:, None, :]
        groups = k.shape[1]
        pairs[:, np.arange(groups), np.arange(groups)] = -np.inf
        most = pairs.max(axis=(1, 2))
        # All groups lie in [a, b] for some allocation just if a is at most the overall rate, the rows of 1 that lift
        # every lower group to a are there, and the same for b and rows of 0.
        total = (k.sum(axis=1) + u1[:, 0]) / (n.sum(axis=1) + u1[:, 0] + u0[:, 0])
        a = _furthest(total, 0.0, lambda t: (np.maximum(t * n - k, 0).sum(axis=1, keepdims=True) <= (1 - t) * u1)[:, 0])
        b = _furthest(total, 1.0, lambda t: (np.maximum(k - t * n, 0).sum(axis=1, keepdims=True) <= t * u0)[:, 0])
        least = np.where(np.isfinite(most), np.maximum(b - a, 0.0), np.nan)
        share1, share0 = k / k.sum(axis=1, keepdims=True), (n - k) / (n - k).sum(axis=1, keepdims=True)
        ones = k + u1 * np.nan_to_num(share1)
        zeros = n - k + u0 * np.nan_to_num(share0)
        rate = ones / (ones + zeros)
        point = rate.max(axis=1) - rate.min(axis=1)
    return least, most, low, high, point, rate


def _furthest(inside: Floats, limit: float, holds: Any) -> Floats:
    """The value nearest to ``inside`` on the way to ``limit`` for which ``holds``; exact ``inside`` where that does."""
    at_once = holds(inside[:, None])
    bad, good = inside.copy(), np.full_like(inside, limit)
    for _ in range(60):
        middle = (bad + good) / 2
        fine = holds(middle[:, None])
        good, bad = np.where(fine, middle, good), np.where(fine, bad, middle)
    found: Floats = np.where(at_once, inside, good)
    return found


def _by_proxy(
    said: Ints,
    q: Floats,
    place: Ints,
    names: Sequence[Hashable],
    facts: tuple[str, int, int, float],
    least: int,
    resamples: int,
    rng: np.random.Generator,
) -> GapBounds:
    """Fréchet bounds within each value of the proxy."""
    assumption = "the prediction does not depend on the attribute given the probabilities"
    size = q.sum(axis=0) if len(q) else np.zeros(len(names))
    gone = size < least
    if gone.any():
        return _empty(names, gone, assumption, facts)
    used, cell = np.unique(place, return_inverse=True)
    order = np.argsort(cell, kind="stable")
    starts = np.searchsorted(cell[order], np.arange(len(used)))
    # Per row: probabilities, prediction, prediction times probabilities.
    columns = np.column_stack([q, said, said[:, None] * q])[order]
    subsets = np.array([[s >> g & 1 for g in range(len(names))] for s in range(1, 1 << len(names))], dtype=np.float64)

    def of(weights: Any) -> tuple[float, float, Floats, Floats, Floats]:
        table = columns if weights is None else columns * weights[:, None]
        sums = np.add.reduceat(table, starts, axis=0)
        share, ones = sums[:, : len(names)], sums[:, len(names)]
        total = share.sum(axis=0)
        if not (total > 0).all():
            nan = np.full(len(names), np.nan)
            return np.nan, np.nan, nan, nan, nan
        rows = share.sum(axis=1)
        high = np.minimum(ones[:, None], share).sum(axis=0) / total
        low = np.maximum(ones[:, None] + share - rows[:, None], 0.0).sum(axis=0) / total
        pairs = high[:, None] - low[None, :]
        np.fill_diagonal(pairs, -np.inf)
        # Sums over cells of base polytopes: a union of groups holds at most F(S) of the ones (see the tests).
        inside = share @ subsets.T
        most = np.minimum(ones[:, None], inside).sum(axis=0)
        fewest = np.maximum(ones[:, None] + inside - rows[:, None], 0.0).sum(axis=0)
        weight = subsets @ total
        ratio = weight > 0
        floor, ceiling = (most[ratio] / weight[ratio]).min(), (fewest[ratio] / weight[ratio]).max()
        rate = sums[:, len(names) + 1 :].sum(axis=0) / total
        return max(float(ceiling - floor), 0.0), float(pairs.max()), low, high, rate

    low, high, least_rate, most_rate, rate = of(None)
    drawn = []
    for _ in range(resamples):
        l, h, _, _, r = of(np.bincount(rng.integers(len(q), size=len(q)), minlength=len(q)).astype(np.float64))  # noqa: E741
        drawn.append((l, h, r.max() - r.min()))
    ls, hs, ps = np.array(drawn).T
    taken = q.argmax(axis=1)
    held = np.bincount(taken, minlength=len(names))
    thresholded = None
    if (held > 0).all():
        shares = np.bincount(taken, weights=said, minlength=len(names)) / held
        thresholded = float(shares.max() - shares.min())
    basis, rows, unknown, level = facts
    return GapBounds(
        low, high, _quantiles(ls, hs, level), float(rate.max() - rate.min()), _quantiles(ps, ps, level), assumption,
        {g: (float(least_rate[i]), float(most_rate[i])) for i, g in enumerate(names)},
        {g: float(rate[i]) for i, g in enumerate(names)}, thresholded, basis, rows, unknown, level,
    )  # fmt: skip
