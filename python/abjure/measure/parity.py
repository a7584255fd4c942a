"""Gaps between groups: demographic parity, equal opportunity, equalised odds."""

from __future__ import annotations

import html
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, overload

import numpy as np

from .. import _native
from ..errors import ArgumentError, DegenerateError
from ._arrays import Floats, binary, codes, items, missing
from .parity_bounds import BASES, GapBounds, ParityBounds, bounds, check_basis, observed_or_missing, proxy
from .rates import Interval, Rate, rate_difference
from .resampling import check_options

__all__ = ["BASES", "Gap", "GapBounds", "ParityBounds", "ParityGap", "parity_gap"]

Ground = Literal["required by law", "volunteered", "inferred", "imputed"]
Basis = Ground | Sequence[Ground]


@dataclass(frozen=True)
class Gap:
    """Largest less smallest rate of the groups.

    Attributes:
        value: the gap; None where a group has no row to count.
        highest, lowest: the groups it lies between.
        ci: bootstrap interval of the gap, rows drawn within each group; None where there is no value. A largest less a
            smallest is never negative and, for small groups, above 0 by chance alone: read it with ``pvalue``.
        pvalue: Fisher's exact test for two groups, else a permutation of the groups.
        rates: of each group.
        empty: groups without a row to count.
    """

    value: float | None
    highest: Hashable
    lowest: Hashable
    ci: Interval | None
    pvalue: float | None
    rates: Mapping[Hashable, Rate]
    empty: tuple[Hashable, ...] = ()

    def between(self, first: Hashable, second: Hashable, level: float = 0.95) -> tuple[float, Interval]:
        """Rate of the group ``first`` less that of ``second``, with Newcombe's interval.

        Raises:
            ArgumentError: an unknown group, or ``level`` out of range. DegenerateError: one of them is empty.
        """
        for name in (first, second):
            if name not in self.rates:
                raise ArgumentError(f"first, second: expected groups among {list(self.rates)}, got {name!r}")
            if not self.rates[name].n:
                raise DegenerateError(f"group {name!r}: expected at least one row to count")
        a, b = self.rates[first], self.rates[second]
        interval = rate_difference(a, b, level)
        assert interval is not None
        return a.rate - b.rate, interval

    def pairs(self, level: float = 0.95) -> dict[tuple[Hashable, Hashable], tuple[float, Interval]]:
        """:meth:`between` of every pair of groups that have rows."""
        names = [name for name, r in self.rates.items() if r.n]
        return {(a, b): self.between(a, b, level) for a, b in combinations(names, 2)}

    def __repr__(self) -> str:
        if self.value is None or self.ci is None:
            return f"Gap(None: no rows to count in {', '.join(map(repr, self.empty))})"
        return (
            f"Gap({self.value:.4f} [{self.ci[0]:.4f}, {self.ci[1]:.4f}], {self.highest!r} over {self.lowest!r}, "
            f"p={self.pvalue:.4g})"
        )


@dataclass(frozen=True, repr=False)
class ParityGap:
    """How differently groups are treated. Here a prediction of 1 is a refusal and a label of 1 says it was right.

    Attributes:
        demographic_parity: gap of the rates of predictions of 1.
        equal_opportunity: gap of the true-positive rates; None without labels.
        false_positive: gap of the false-positive rates; None without labels.
        level: coverage of the intervals.
        basis: how the attribute came to be known (see ``BASES``); None where the groups are no attribute of persons or
            nobody said.
    """

    demographic_parity: Gap
    equal_opportunity: Gap | None = None
    false_positive: Gap | None = None
    level: float = 0.95
    _odds: tuple[float, Interval] | None = field(default=None, repr=False)
    basis: str | None = None

    @property
    def equalised_odds(self) -> float | None:
        """The larger of the true- and the false-positive gap; None where one of them is missing."""
        return None if self._odds is None else self._odds[0]

    @property
    def equalised_odds_ci(self) -> Interval | None:
        """Its bootstrap interval."""
        return None if self._odds is None else self._odds[1]

    def __repr__(self) -> str:
        named = ("demographic_parity", "equal_opportunity", "false_positive")
        parts = [f"{name}={getattr(self, name)!r}" for name in named if getattr(self, name) is not None]
        return f"ParityGap({', '.join(parts)}, basis: {self.basis or 'not stated'})"

    def _repr_html_(self) -> str:
        body = ""
        for name in ("demographic_parity", "equal_opportunity", "false_positive"):
            gap = getattr(self, name)
            if gap is None:
                continue
            groups = ", ".join(f"{g}: {r.k}/{r.n}" for g, r in gap.rates.items())
            if gap.value is None:
                cells = f"<td>–</td><td>no rows in {html.escape(', '.join(map(str, gap.empty)))}</td><td>–</td>"
            else:
                cells = f"<td>{gap.value:.4f}</td><td>{gap.ci[0]:.4f} to {gap.ci[1]:.4f}</td><td>{gap.pvalue:.3g}</td>"
            body += f"<tr><td>{name.replace('_', ' ')}</td>{cells}<td>{html.escape(groups)}</td></tr>"
        head = f"<th></th><th>gap</th><th>{self.level:.0%}</th><th>p</th><th>groups</th>"
        basis = f"<caption>basis of the attribute: {html.escape(self.basis or 'not stated')}</caption>"
        return f"<table>{basis}<tr>{head}</tr>{body}</table>"

    def plot(self, ax: Any = None) -> Any:
        """Rate of each group with its Wilson interval, on matplotlib axes (made if None)."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(6, 3), layout="constrained").subplots()
        names = [n for n, r in self.demographic_parity.rates.items() if r.n]
        gaps = [("all", self.demographic_parity), ("label 1", self.equal_opportunity), ("label 0", self.false_positive)]
        for k, (label, gap) in enumerate(gaps):
            if gap is None:
                continue
            at, middle, error = [], [], []
            for i, name in enumerate(names):
                ci = gap.rates[name].ci(level=self.level)
                if ci is not None:
                    at.append(i + 0.2 * (k - 1))
                    middle.append(gap.rates[name].rate)
                    error.append((middle[-1] - ci[0], ci[1] - middle[-1]))
            ax.errorbar(at, middle, np.array(error).reshape(-1, 2).T, fmt="o", capsize=3, label=label)
        ax.set(ylabel="rate", ylim=(-0.02, 1.02), xticks=range(len(names)), xticklabels=[str(n) for n in names])
        ax.legend()
        return ax


@overload
def parity_gap(
    predictions: Any,
    groups: Any,
    labels: Any = None,
    *,
    probabilities: None = None,
    names: Any = None,
    cells: Any = None,
    basis: None = None,
    min_n: int = 1,
    resamples: int | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> ParityGap: ...


@overload
def parity_gap(
    predictions: Any,
    groups: Any = None,
    labels: Any = None,
    *,
    probabilities: Any = None,
    names: Any = None,
    cells: Any = None,
    basis: Basis,
    min_n: int = 1,
    resamples: int | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Any: ...


def parity_gap(
    predictions: Any,
    groups: Any = None,
    labels: Any = None,
    *,
    probabilities: Any = None,
    names: Any = None,
    cells: Any = None,
    basis: Basis | None = None,
    min_n: int = 1,
    resamples: int | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> ParityGap | ParityBounds:
    """Gaps between groups in the rate of a prediction, with intervals; bounds where the group is not known of all.

    With a group in every row the gaps are estimated. With groups missing in some rows, or known only as probabilities,
    the data allow a range of gaps: the result then holds its sharp limits, and beside them the estimate under a stated
    assumption. Rows without a group are never dropped.

    Args:
        predictions: ``(n,)`` of true or false: refused.
        groups: ``(n,)`` names, two different ones or more; None (and NaN) where the attribute is not known, which needs
            ``basis``.
        labels: ``(n,)`` of true or false: should have been refused. Without them demographic parity alone is measured.
        probabilities: ``(n, groups)`` of a proxy model, or a mapping from group to column; rows sum to 1. Rows whose
            group is known as well count as known. They are taken for calibrated, within each label too.
        names: of the columns of ``probabilities``.
        cells: ``(n,)`` the value of the proxy of each row (a surname, a district), within which anything between
            prediction and attribute is possible. By default rows of equal probabilities, or, where those are few, of
            probabilities equal to 0.05: coarser cells give wider, still valid bounds.
        basis: how the attribute came to be known: ``"required by law"``, ``"volunteered"``, ``"inferred"``,
            ``"imputed"``, or several. Must be given where it is missing or only probable, and is printed with every
            number.
        min_n: rows below which a group counts as empty, in each of the gaps.
        resamples: bootstrap samples, and permutations where there are more than two groups; 10 000, or 1000 with
            probabilities.
        level: coverage of the intervals.
        seed: of the generators.

    Returns:
        :class:`ParityGap`, or :class:`ParityBounds` where a group is missing or probabilities are given.

    Raises:
        ShapeError: columns that do not fit. ArgumentError: a value that is neither 0 nor 1, a row without a group and
            no ``basis``, an unknown basis, probabilities that do not sum to 1 (the row is named), an option out of
            range.
        DegenerateError: fewer than two groups. NonFiniteError: a probability is NaN.

    Source: Dwork and others, 2012 (demographic parity); Hardt, Price, Srebro, arXiv 1610.02413 (the other two); Manski,
    1989 (worst cases over missing values); Chen and others, arXiv 1811.11154 (weighting by probabilities, the bias of
    thresholding); Kallus, Mao, Zhou, arXiv 1906.00285 (sharp bounds from a proxy).
    """
    resamples = (10_000 if probabilities is None else 1000) if resamples is None else resamples
    check_options(resamples, level, seed)
    if min_n < 1:
        raise ArgumentError(f"min_n: expected 1 or more, got {min_n}")
    said = binary(predictions, "predictions")
    grounds = None if basis is None else check_basis(basis)
    if groups is None and probabilities is None:
        raise ArgumentError("groups, probabilities: expected at least one of the two")
    unknown = groups is not None and any(missing(g) for g in items(groups, "groups"))
    if probabilities is not None or (unknown and grounds is not None):
        if grounds is None:
            check_basis(basis)
        assert grounds is not None
        right = None if labels is None else binary(labels, "labels", len(said)).astype(bool)
        options: dict[str, Any] = {"min_n": min_n, "resamples": resamples, "level": level, "seed": seed}
        if probabilities is None:
            code, found = observed_or_missing(groups, len(said))
            return bounds(said, code, None, found, None, right, grounds, **options)
        q, found = proxy(probabilities, names, len(said))
        known = None if groups is None else _known(groups, found, len(said))
        return bounds(said, known, q, found, cells, right, grounds, **options)
    if unknown:
        raise ArgumentError("groups: expected a name for every row, or basis= for bounds that allow for missing ones")
    group, names = codes(groups, "groups", len(said))
    if len(names) < 2:
        raise DegenerateError(f"groups: expected two groups or more, got {len(names)}")
    tails = [(1 - level) / 2, (1 + level) / 2]

    def gap(rows: Any, stream: int) -> tuple[Gap, Floats | None]:
        n = np.bincount(group[rows], minlength=len(names))
        k = np.bincount(group[rows], weights=said[rows], minlength=len(names)).astype(np.int64)
        rates = {name: Rate(int(k[i]), int(n[i])) for i, name in enumerate(names)}
        empty = tuple(name for i, name in enumerate(names) if n[i] < min_n)
        if empty:
            return Gap(None, None, None, None, None, rates, empty), None
        share = k / n
        high, low = int(share.argmax()), int(share.argmin())
        strata = [np.repeat([0.0, 1.0], [n[i] - k[i], k[i]]) for i in range(len(names))]
        drawn = np.asarray(_native.bootstrap_sums(strata, [None for _ in strata], resamples, seed + stream))
        table = drawn.reshape(resamples, len(names), 2)[:, :, 0] / n
        spread: Floats = table.max(axis=1) - table.min(axis=1)
        interval = tuple(map(float, np.quantile(spread, tails)))
        p = _fisher(k, n) if len(names) == 2 else _permutation(k, n, resamples, seed)
        found = Gap(float(share[high] - share[low]), names[high], names[low], (interval[0], interval[1]), p, rates)
        return found, spread

    parity, _ = gap(np.ones(len(said), dtype=bool), 0)
    if labels is None:
        return ParityGap(parity, level=level, basis=grounds)
    right = binary(labels, "labels", len(said)).astype(bool)
    (true, first), (false, second) = gap(right, 1), gap(~right, 2)
    odds = None
    if first is not None and second is not None and true.value is not None and false.value is not None:
        # The two are independent: they are of different rows.
        low, high = np.quantile(np.maximum(first, second), tails)
        odds = (max(true.value, false.value), (float(low), float(high)))
    return ParityGap(parity, true, false, level, odds, grounds)


def _known(groups: Any, names: list[Hashable], n: int) -> Any:
    """Groups as columns of the probabilities, -1 where there is none."""
    code, seen = observed_or_missing(groups, n)
    unknown = [g for g in seen if g not in names]
    if unknown:
        raise ArgumentError(f"groups: expected names of the probabilities' columns, {names}, got {unknown[0]!r}")
    place = np.array([*(names.index(g) for g in seen), -1])
    return place[code]


def _fisher(k: Any, n: Any) -> float:
    """Two-sided Fisher's exact test: the tables at most as probable as the one seen."""
    m, total = int(k.sum()), int(n.sum())
    first = int(n[0])
    x = np.arange(max(0, m - (total - first)), min(m, first) + 1)
    lf = np.array([math.lgamma(i + 1) for i in range(total + 1)])
    logs = lf[first] - lf[x] - lf[first - x] + lf[total - first] - lf[m - x] - lf[total - first - m + x]
    logs = logs - (lf[total] - lf[m] - lf[total - m])
    seen = logs[int(k[0]) - int(x[0])]
    # Tables of equal probability differ in the last digits here.
    return min(1.0, float(np.exp(logs[logs <= seen + 1e-7]).sum()))


def _permutation(k: Any, n: Any, permutations: int, seed: int) -> float:
    """Chance of a gap as large when the outcomes are dealt to the groups at random: hypergeometric counts."""
    rng = np.random.default_rng(seed)
    share = k / n
    reach = share.max() - share.min() - 1e-12
    dealt = rng.multivariate_hypergeometric(n, int(k.sum()), size=permutations, method="marginals") / n
    found = int((dealt.max(axis=1) - dealt.min(axis=1) >= reach).sum())
    return (1 + found) / (permutations + 1)
