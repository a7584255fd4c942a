"""Do judges agree? Kappa of two, Fleiss and Krippendorff of many, and what prevalence does to them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from ._arrays import Floats, host, items, missing
from .rates import Interval
from .resampling import check_options

__all__ = ["Agreement", "agreement", "cohen_kappa", "fleiss_kappa", "krippendorff_alpha"]

Level = Literal["nominal", "ordinal", "interval"]
Weights = Literal["linear", "quadratic"]


@dataclass(frozen=True, eq=False)
class Agreement:
    """Two raters on the same items.

    Attributes:
        kappa: Cohen's; None where chance alone would agree always (one class only).
        ci: its bootstrap interval over items (percentile; resamples without a kappa are left out); None without kappa.
        observed, expected: share of items on which they agree, and by chance.
        ac1: Gwet's first coefficient, which a prevailing class pulls down less. Both numbers at hand show the paradox
            of high agreement with a kappa near 0.
        prevalence, bias: for two classes, ``|a − d| / n`` and ``|b − c| / n`` of the table; None for more.
        classes: in the table's order.
        table: ``(classes, classes)`` counts, the first rater's class by row.
    """

    kappa: float | None
    ci: Interval | None
    observed: float
    expected: float
    ac1: float | None
    prevalence: float | None
    bias: float | None
    classes: tuple[Hashable, ...]
    table: Any

    def __repr__(self) -> str:
        kappa = "None" if self.kappa is None else f"{self.kappa:.4f}"
        if self.ci is not None:
            kappa += f" [{self.ci[0]:.4f}, {self.ci[1]:.4f}]"
        return f"Agreement(kappa={kappa}, observed={self.observed:.4f}, n={int(self.table.sum())})"


def _columns(raters: Sequence[Any], names: Sequence[str]) -> list[list[Any]]:
    columns = [items(r, name) for r, name in zip(raters, names, strict=True)]
    for column, name in zip(columns, names, strict=True):
        if len(column) != len(columns[0]) or not column:
            raise ShapeError(f"{name}: expected {len(columns[0])} ratings, at least 1, got {len(column)}")
    return columns


def _classes(values: Sequence[Any], given: Sequence[Any] | None) -> list[Any]:
    """In the given order; else sorted, else in the order of appearance."""
    seen = list(dict.fromkeys(values))
    if given is None:
        try:
            return sorted(seen)
        except TypeError:
            return seen
    unknown = [v for v in seen if v not in given]
    if unknown or len(set(given)) != len(given):
        raise ArgumentError(f"classes: expected all labels once, {'without ' + repr(unknown[0]) if unknown else given}")
    return list(given)


def _table(first: Any, second: Any, classes: Sequence[Any] | None) -> tuple[Any, list[Any], Any]:
    a, b = _columns([first, second], ["first", "second"])
    for column, name in ((a, "first"), (b, "second")):
        for i, v in enumerate(column):
            if missing(v):
                raise ArgumentError(f"{name}: no rating at index {i}; krippendorff_alpha takes missing ratings")
    names = _classes(a + b, classes)
    place = {c: i for i, c in enumerate(names)}
    pair = np.array([place[x] * len(names) + place[y] for x, y in zip(a, b, strict=True)])
    return np.bincount(pair, minlength=len(names) ** 2).reshape(len(names), -1), names, pair


def _weights(classes: int, weights: Weights | None) -> Floats:
    i = np.arange(classes, dtype=np.float64)
    distance: Floats = abs(i[:, None] - i)
    if weights is None:
        return (distance > 0).astype(np.float64)
    if weights not in ("linear", "quadratic"):
        raise ArgumentError(f"weights: expected None, 'linear' or 'quadratic', got {weights!r}")
    return distance if weights == "linear" else distance**2


def _kappa(tables: Any, w: Floats) -> Floats:
    """Of ``(..., c, c)`` tables; NaN where chance alone would agree."""
    n = tables.sum(axis=(-2, -1))
    seen = (tables * w).sum(axis=(-2, -1)) / n
    chance = (tables.sum(axis=-1)[..., :, None] * tables.sum(axis=-2)[..., None, :] * w).sum(axis=(-2, -1)) / n**2
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where(chance > 0, 1 - seen / chance, np.nan)
    return found


def cohen_kappa(
    first: Any, second: Any, *, weights: Weights | None = None, classes: Sequence[Any] | None = None
) -> float | None:
    """Cohen's kappa, ``(p_o − p_e) / (1 − p_e)``; None where both raters use one and the same class only.

    Args:
        first, second: ``(n,)`` labels, hashable, of the same items.
        weights: ``None``, or ``"linear"``, ``"quadratic"``: disagreement grows with the classes' distance in
            ``classes``.
        classes: all labels in order; by default those seen, sorted.

    Raises:
        ShapeError: not one label each, or none. ArgumentError: a missing label, one not in ``classes``, unknown
            weights.

    Source: Cohen, 1960 and 1968.
    """
    table, names, _ = _table(first, second, classes)
    kappa = float(_kappa(table, _weights(len(names), weights)))
    return None if np.isnan(kappa) else kappa


def agreement(
    first: Any,
    second: Any,
    *,
    weights: Weights | None = None,
    classes: Sequence[Any] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Kappa with an interval, and the indices that tell when to distrust it.

    Args:
        first, second, weights, classes: as in :func:`cohen_kappa`. ``observed``, ``expected`` and ``ac1`` are
            unweighted.
        resamples, level, seed: of the bootstrap over items.

    Raises:
        As :func:`cohen_kappa`; ArgumentError: ``level`` or ``resamples`` out of range.

    Source: Byrt, Bishop, Carlin, 1993 (prevalence, bias); Gwet, 2008 (AC1).
    """
    check_options(resamples, level, seed)
    table, names, _ = _table(first, second, classes)
    w, n = _weights(len(names), weights), int(table.sum())
    rows, columns = table.sum(axis=1) / n, table.sum(axis=0) / n
    observed, expected = float(np.trace(table) / n), float(rows @ columns)
    ac1 = None
    if len(names) > 1:
        share = (rows + columns) / 2
        chance = float((share * (1 - share)).sum() / (len(names) - 1))
        ac1 = (observed - chance) / (1 - chance)
    prevalence = bias = None
    if len(names) == 2:
        prevalence = float(abs(table[0, 0] - table[1, 1]) / n)
        bias = float(abs(table[0, 1] - table[1, 0]) / n)
    kappa = float(_kappa(table, w))
    interval = None
    if not np.isnan(kappa):
        rng = np.random.default_rng(seed)
        drawn = _kappa(rng.multinomial(n, table.ravel() / n, size=resamples).reshape(-1, *table.shape), w)
        low, high = np.quantile(drawn[~np.isnan(drawn)], [(1 - level) / 2, (1 + level) / 2])
        interval = (float(low), float(high))
    found = None if np.isnan(kappa) else kappa
    return Agreement(found, interval, observed, expected, ac1, prevalence, bias, tuple(names), table)


def fleiss_kappa(ratings: Any) -> float | None:
    """Fleiss's kappa of ``(items, raters)`` labels without gaps; None where only one class was ever used.

    Raises:
        ShapeError: not ``(items, raters)`` with 2 raters or more. ArgumentError: a missing label.

    Source: Fleiss, 1971.
    """
    rows = _grid(ratings)
    if any(missing(v) for row in rows for v in row):
        raise ArgumentError("ratings: expected a label from every rater; krippendorff_alpha takes missing ratings")
    names = _classes([v for row in rows for v in row], None)
    place = {c: i for i, c in enumerate(names)}
    counts = np.zeros((len(rows), len(names)))
    for i, row in enumerate(rows):
        for v in row:
            counts[i, place[v]] += 1
    m = len(rows[0])
    observed = float(((counts**2).sum(axis=1) - m).mean() / (m * (m - 1)))
    expected = float(((counts.sum(axis=0) / counts.sum()) ** 2).sum())
    return None if len(names) == 1 else (observed - expected) / (1 - expected)


def _grid(ratings: Any) -> list[list[Any]]:
    found = host(ratings)
    if hasattr(found, "to_numpy"):
        found = found.to_numpy()
    rows = [
        list(row) if not isinstance(row, str) else [row]
        for row in (found.tolist() if hasattr(found, "tolist") else found)
    ]
    if not rows or len({len(r) for r in rows}) > 1 or len(rows[0]) < 2:
        raise ShapeError("ratings: expected shape (items, raters) with 1 item and 2 raters or more")
    return rows


def krippendorff_alpha(ratings: Any, level: Level = "nominal", *, classes: Sequence[Any] | None = None) -> float | None:
    """Krippendorff's alpha, ``1 − D_o / D_e``, of any number of raters; None where only one value was ever used.

    Args:
        ratings: ``(items, raters)``; None and NaN are missing. Items with fewer than two ratings do not count.
        level: how far two values are apart: ``"nominal"`` (different or not), ``"ordinal"`` (by the ratings between
            them) or ``"interval"`` (squared difference of numbers).
        classes: the values in order, for ``"ordinal"``; by default those seen, sorted.

    Raises:
        ShapeError: not ``(items, raters)`` with 2 raters or more. ArgumentError: unknown level, a value not in
            ``classes``.
        DTypeError, NonFiniteError: ``"interval"`` with a value that is no finite number.
        DegenerateError: no item has two ratings.

    Source: Krippendorff, Computing Krippendorff's alpha-reliability, 2011.
    """
    if level not in ("nominal", "ordinal", "interval"):
        raise ArgumentError(f"level: expected 'nominal', 'ordinal' or 'interval', got {level!r}")
    units = [[v for v in row if not missing(v)] for row in _grid(ratings)]
    units = [u for u in units if len(u) > 1]
    if not units:
        raise DegenerateError("ratings: expected an item with two ratings, got none")
    names = _classes([v for u in units for v in u], classes)
    place = {c: i for i, c in enumerate(names)}
    counts = np.zeros((len(units), len(names)))
    for i, u in enumerate(units):
        for v in u:
            counts[i, place[v]] += 1
    m = counts.sum(axis=1)
    coincidences = (counts / (m - 1)[:, None]).T @ counts - np.diag((counts / (m - 1)[:, None]).sum(axis=0))
    total = coincidences.sum(axis=1)
    distance = _distance(level, names, total)
    n = total.sum()
    expected = float((np.outer(total, total) * distance).sum()) / (n - 1)
    return None if expected == 0 else 1 - float((coincidences * distance).sum()) / expected


def _distance(level: Level, names: Sequence[Any], total: Floats) -> Floats:
    """Squared distance of every two values."""
    if level == "interval":
        try:
            values = np.array([float(v) for v in names])
        except (TypeError, ValueError):
            raise DTypeError("ratings: expected numbers for level='interval'") from None
        if not np.isfinite(values).all():
            raise NonFiniteError("ratings: expected finite numbers, got infinity")
        return np.asarray((values[:, None] - values) ** 2)
    if level == "nominal":
        return 1 - np.eye(len(names))
    # Ratings up to the middle of each class: between two lie those of the classes between and half of the ends'.
    middle = np.cumsum(total) - total / 2
    return np.asarray((middle[:, None] - middle) ** 2)
