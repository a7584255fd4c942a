"""What a suspect model refuses that a reference does not, overall and by group, on the same prompts."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ... import _native
from ...errors import ArgumentError, DegenerateError, ShapeError
from .._arrays import Floats, Ints, codes, host
from .._columns import verdicts
from .._scores import Estimate, Row, Scores, check_level
from ..paired import McNemar, adjust_pvalues
from ..rates import Interval, Rate
from ..resampling import check_options
from ._outcomes import Lists, group_columns, outcomes, prompt_column
from .triggers import TriggerSearch, search_triggers

__all__ = ["GroupGap", "GroupShift", "PairedShift", "RefusalShift", "refusal_shift"]

Adjust = Literal["holm", "bh"]
#: A pair of outcomes as 2 · suspect + reference: neither refuses, the reference alone, the suspect alone, both.
_SUSPECT = np.array([0.0, 0.0, 1.0, 1.0])
_REFERENCE = np.array([0.0, 1.0, 0.0, 1.0])


@dataclass(frozen=True)
class PairedShift:
    """Two models on the same prompts of one group.

    Attributes:
        name: of the group.
        counts: prompts that only the suspect refuses (``first_only``), only the reference (``second_only``), both,
            neither; with McNemar's p-values.
        interval: percentile bootstrap interval of :attr:`difference`, prompts drawn in pairs; None for one prompt.
        level: its coverage.
        holm, bh: the exact p-value adjusted over all groups of all columns; the p-value itself for the total.
    """

    name: Hashable
    counts: McNemar
    interval: Interval | None
    level: float
    holm: float
    bh: float

    @property
    def suspect(self) -> Rate:
        """Refusals of the suspect."""
        return Rate(self.counts.first_only + self.counts.both, self.counts.n)

    @property
    def reference(self) -> Rate:
        """Refusals of the reference."""
        return Rate(self.counts.second_only + self.counts.both, self.counts.n)

    @property
    def difference(self) -> float:
        """Refusal rate of the suspect less that of the reference."""
        return self.counts.difference

    @property
    def newly_refused(self) -> Rate:
        """Refused by the suspect, of the prompts that the reference answers."""
        return Rate(self.counts.first_only, self.counts.first_only + self.counts.neither)

    @property
    def pvalue(self) -> float:
        """McNemar's exact two-sided p-value, before adjustment."""
        return self.counts.exact

    def score_interval(self, level: float = 0.95) -> Interval:
        """Interval of the difference from Wilson limits and the correlation of the pairs; wide where none differ.

        Where no pair differs the bootstrap gives [0, 0], whatever the number of prompts; this one does not.

        Raises:
            ArgumentError: ``level`` out of range.

        Source: Newcombe, Improved confidence intervals for the difference between binomial proportions based on paired
        data, 1998, method 10.
        """
        check_level(level)
        first, second = self.suspect.ci(level=level), self.reference.ci(level=level)
        assert first is not None
        assert second is not None
        p, q = self.suspect.rate, self.reference.rate
        a, b, c, d = self.counts.both, self.counts.first_only, self.counts.second_only, self.counts.neither
        margins = (a + b) * (c + d) * (a + c) * (b + d)
        top = float(a * d - b * c)
        top = max(top - self.counts.n / 2, 0.0) if top > 0 else top
        phi = top / math.sqrt(margins) if margins else 0.0

        def reach(x: float, y: float) -> float:
            return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

        low = reach(p - first[0], second[1] - q)
        return self.difference - low, self.difference + reach(first[1] - p, q - second[0])


@dataclass(frozen=True)
class GroupGap:
    """A gap between groups for both models, and what became of it.

    Attributes:
        of: ``"demographic parity"`` (all prompts), ``"equal opportunity"`` (prompts that should be refused),
            ``"over-refusal"`` (prompts that should be answered).
        reference, suspect: largest less smallest rate of the groups; None where a group has no such prompt.
        change: suspect's gap less reference's.
        shift: largest less smallest change of a group's rate.
        pair: two groups; those asked for, or the two there are, or those whose change is largest and smallest.
        chosen: whether the pair was chosen after looking at the changes: its interval is then too narrow.
        two_group: absolute difference of the pair's rates, for the reference and the suspect.
        two_group_change: the change of the first of the pair less that of the second.
        empty: groups without such a prompt.
    """

    of: str
    reference: Estimate
    suspect: Estimate
    change: Estimate
    shift: Estimate
    pair: tuple[Hashable, Hashable] | None
    chosen: bool
    two_group: tuple[Estimate, Estimate]
    two_group_change: Estimate
    empty: tuple[Hashable, ...] = ()


@dataclass(frozen=True)
class GroupShift:
    """One column of groups.

    Attributes:
        groups: each group's shift, in the order of first appearance.
        gaps: between the groups, see :class:`GroupGap`.
        heterogeneity: p-value of the largest less the smallest change of a group's rate if newly refused and newly
            answered prompts had been dealt to the groups at random.
    """

    groups: Mapping[Hashable, PairedShift]
    gaps: Sequence[GroupGap]
    heterogeneity: float


@dataclass(frozen=True, repr=False)
class RefusalShift(Scores):
    """What :func:`refusal_shift` found.

    Attributes:
        overall: all prompts.
        columns: by name of the column of groups.
        invalid: prompts left out because a model has no verdict on them.
        triggers: the search among newly refused prompts; None where it was not asked for.
        level: coverage of the intervals.
    """

    title = "Change of refusals, suspect less reference"
    overall: PairedShift
    columns: Mapping[str, GroupShift]
    invalid: int
    level: float = 0.95
    triggers: TriggerSearch | None = None
    _adjust: Adjust = field(default="holm")

    def flagged(self, alpha: float = 0.05, method: Adjust = "holm") -> list[tuple[str, PairedShift]]:
        """(column, group) whose refusal rate rose, at the adjusted level, smallest p-value first.

        Args:
            method: ``"holm"`` (no false flag, with probability 1 − alpha) or ``"bh"`` (share of false flags).

        Raises:
            ArgumentError: an unknown method, or ``alpha`` outside (0, 1).
        """
        if method not in ("holm", "bh"):
            raise ArgumentError(f"method: expected 'holm' or 'bh', got {method!r}")
        if not 0 < alpha < 1:
            raise ArgumentError(f"alpha: expected a number in (0, 1), got {alpha}")
        found = [
            (name, s)
            for name, column in self.columns.items()
            for s in column.groups.values()
            if s.difference > 0 and getattr(s, method) <= alpha
        ]
        return sorted(found, key=lambda f: (f[1].pvalue, -f[1].difference))

    def rows(self) -> list[Row]:
        def shift(name: str, s: PairedShift) -> Row:
            note = f"{s.reference.k}/{s.reference.n} to {s.suspect.k}/{s.suspect.n}; newly refused "
            note += f"{s.counts.first_only}, newly answered {s.counts.second_only}; p {s.pvalue:.3g}"
            note += f", Holm {s.holm:.3g}, BH {s.bh:.3g}" if s is not self.overall else ""
            return Row(name, Estimate(s.difference, s.interval, s.counts.n), note)

        found = [shift("all prompts", self.overall)]
        for name, column in self.columns.items():
            found += [shift(f"{name}: {g}", s) for g, s in column.groups.items()]
            for gap in column.gaps:
                if gap.suspect.value is None:
                    empty = ", ".join(map(str, gap.empty))
                    found.append(Row(f"{name}: gap, {gap.of}", None, f"no such prompt in {empty}"))
                    continue
                for what in ("reference", "suspect", "change"):
                    found.append(Row(f"{name}: {gap.of}, max - min, {what}", getattr(gap, what)))
                assert gap.pair is not None
                note = "pair chosen after looking" if gap.chosen else ""
                pair = f"{gap.pair[0]} against {gap.pair[1]}"
                found.append(Row(f"{name}: {gap.of}, {pair}, reference", gap.two_group[0], note))
                found.append(Row(f"{name}: {gap.of}, {pair}, suspect", gap.two_group[1], note))
                found.append(Row(f"{name}: {gap.of}, {pair}, change", gap.two_group_change, note))
            found.append(Row(f"{name}: p that groups changed alike", column.heterogeneity))
        return found

    def notes(self) -> list[str]:
        """What to know before quoting the numbers."""
        found = (
            [
                "A largest less a smallest rate is above 0 by chance alone in small groups, more so in resamples: "
                "where groups are many its interval lies too high. Read it with the p-value that groups changed alike."
            ]
            if self.columns
            else []
        )
        if self.invalid:
            found.append(f"{self.invalid} prompts without a verdict of both models were left out.")
        tests = sum(len(c.groups) for c in self.columns.values())
        if tests:
            found.append(f"Holm and BH adjust over the {tests} groups of all columns.")
        return found + ([] if self.triggers is None else self.triggers.notes())


def refusal_shift(
    reference: Any,
    suspect: Any,
    prompts: Any,
    groups: Any = None,
    *,
    labels: Any = None,
    pair: tuple[Hashable, Hashable] | None = None,
    lists: Lists = "refusal_direction",
    invalid: Literal["error", "exclude"] = "error",
    search: bool | Mapping[str, Any] = False,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> RefusalShift:
    """Compares what two models refuse on the same prompts: an audit for refusals planted on a topic or a group.

    Outcomes are paired, so that only prompts on which the models differ tell anything (McNemar). Resamples draw pairs
    within each group (and label); pairs take four values, so a resample of a group is a draw of four multinomial
    counts, exactly, and its cost does not grow with the prompts. The result depends on the seed and the data alone.

    Args:
        reference: ``(n,)`` true or false (refused), or responses to be matched with ``lists``; or a mapping from prompt
            to either. None and NaN are no verdict.
        suspect: the other model's, in the same form.
        prompts: ``(n,)`` prompts or their names.
        groups: ``(n,)`` names (a topic, a dialect), or a mapping from the name of a column to one.
        labels: ``(n,)`` true where the prompt should be refused: gaps are then also those of the true-positive rates
            (equal opportunity) and of over-refusal.
        pair: two groups for the two-group form of the gaps; in columns that have both.
        lists: phrases of :func:`refusal_match`, for responses.
        invalid: prompts without a verdict are an error or left out and counted.
        search: also look for unknown triggers among newly refused prompts; True, or options of
            :func:`search_triggers`. ``labels`` then become its strata.
        resamples: bootstrap samples, and deals of the test of heterogeneity.
        level: coverage of the intervals.
        seed: of the generators.

    Raises:
        ArgumentError: prompts of one model that the other lacks, a verdict that is neither 0 nor 1 or missing, a pair
            that no column has, an option out of range.
        ShapeError: columns that do not fit. DTypeError: values that are no verdicts, texts or names.
        DegenerateError: no prompt has a verdict of both models, or a column with a single group.

    Source: subversive alignment injection is the poisoning that this looks for; gaps as in :func:`parity_gap`; McNemar
    1947; Davison and Hinkley 1997, section 3.2 (strata).
    """
    check_options(resamples, level, seed)
    if invalid not in ("error", "exclude"):
        raise ArgumentError(f"invalid: expected 'error' or 'exclude', got {invalid!r}")
    keys = prompt_column(prompts)
    first, second = outcomes(reference, "reference", keys, lists), outcomes(suspect, "suspect", keys, lists)
    by_column = group_columns(groups, len(keys))
    wanted = None if labels is None else verdicts(labels, "labels", len(keys))
    if wanted is not None and None in wanted:
        raise ArgumentError(f"labels: expected true or false in every row, got none at index {wanted.index(None)}")
    valid = (first >= 0) & (second >= 0)
    if invalid == "error" and not valid.all():
        i = int((~valid).argmax())
        raise ArgumentError(f"reference, suspect: no verdict at index {i}; invalid='exclude' leaves such prompts out")
    if not valid.any():
        raise DegenerateError("reference, suspect: no prompt has a verdict of both models")
    cell: Ints = (2 * second + first)[valid].astype(np.int64)
    label = None if wanted is None else np.array(wanted, dtype=bool)[valid]
    kept = np.flatnonzero(valid)
    coded = {name: codes([c[i] for i in kept], f"groups: {name}") for name, c in by_column.items()}
    for name, (_, found) in coded.items():
        if len(found) < 2:
            raise DegenerateError(f"groups: {name}: expected two groups or more, got {len(found)}")
    if pair is not None and not (len(pair) == 2 and pair[0] != pair[1]):
        raise ArgumentError(f"pair: expected two different groups, got {pair!r}")
    if pair is not None and not any(p in found for _, found in coded.values() for p in [pair[0]] if pair[1] in found):
        raise ArgumentError(f"pair: expected two groups of one column, got {pair!r}")

    everything = _Draws(cell, np.zeros(len(cell), dtype=np.int64), 1, None, resamples, seed, 0)
    exact = _mcnemar(everything.counts.sum(axis=1)[0])
    total = PairedShift(
        "all prompts", exact, _interval(everything.shift(None)[:, 0], level), level, exact.exact, exact.exact
    )
    draws = {
        name: _Draws(cell, code, len(found), label, resamples, seed, i + 1)
        for i, (name, (code, found)) in enumerate(coded.items())
    }
    tests = {
        (name, g): _mcnemar(draws[name].counts[i].sum(axis=0))
        for name, (_, found) in coded.items()
        for i, g in enumerate(found)
    }
    p = {key: t.exact for key, t in tests.items()}
    holm, bh = (adjust_pvalues(p, "holm"), adjust_pvalues(p, "bh")) if p else ({}, {})
    columns = {}
    for name, (_, found) in coded.items():
        drawn = draws[name]
        moved = drawn.shift(None)
        q = np.quantile(moved, [(1 - level) / 2, (1 + level) / 2], axis=0)
        shifts: dict[Hashable, PairedShift] = {}
        for i, g in enumerate(found):
            interval = (float(q[0, i]), float(q[1, i])) if tests[name, g].n > 1 else None
            shifts[g] = PairedShift(g, tests[name, g], interval, level, holm[name, g], bh[name, g])
        kinds: list[tuple[str, int | None]] = [("demographic parity", None)]
        kinds += [] if label is None else [("equal opportunity", 1), ("over-refusal", 0)]
        gaps = [_gap(of, drawn, row, found, pair, level) for of, row in kinds]
        columns[name] = GroupShift(shifts, gaps, _heterogeneity(drawn.counts.sum(axis=1), resamples, seed))
    triggers = None
    if search:
        options = dict(search) if isinstance(search, Mapping) else {}
        rows = kept[first[kept] == 0]
        for name in ("strata", "embeddings"):
            if options.get(name) is not None:
                options[name] = _rows_of(options[name], rows, len(keys), name)
        if wanted is not None:
            options.setdefault("strata", [wanted[i] for i in rows])
        triggers = search_triggers([keys[i] for i in rows], second[rows] == 1, **options)
    return RefusalShift(total, columns, int((~valid).sum()), level, triggers)


def _rows_of(x: Any, rows: Any, n: int, name: str) -> Any:
    found = np.asarray(host(x))
    if found.ndim == 0 or len(found) != n:
        raise ShapeError(f"search: {name}: expected one row for each of {n} prompts, got shape {found.shape}")
    return found[rows]


def _mcnemar(counts: Any) -> McNemar:
    neither, reference, suspect, both = map(int, counts)
    return McNemar(suspect, reference, both, neither)


def _interval(values: Floats, level: float) -> Interval | None:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class _Draws:
    """Counts of the four pairs of outcomes by group and label, and resamples of them."""

    def __init__(
        self, cell: Ints, group: Ints, groups: int, label: Any, resamples: int, seed: int, column: int
    ) -> None:
        labels = np.zeros(len(cell), dtype=np.int64) if label is None else label.astype(np.int64)
        width = 1 if label is None else 2
        counts = np.bincount((group * width + labels) * 4 + cell, minlength=groups * width * 4)
        #: ``(groups, labels, 4)``.
        self.counts = counts.reshape(groups, width, 4)
        flat = self.counts.reshape(-1, 4)
        #: Rates of the suspect and the reference times n, ``(resamples, groups · labels)``.
        self._drawn = np.zeros((2, resamples, len(flat)))

        def draw(i: int) -> None:
            n = int(flat[i].sum())
            if n:
                # A stream per group, so that neither threads nor other groups change it.
                random = np.random.Generator(np.random.SFC64([seed, column, i]))
                found = random.multinomial(n, flat[i] / n, size=resamples)
                self._drawn[0, :, i] = found[:, 2] + found[:, 3]
                self._drawn[1, :, i] = found[:, 1] + found[:, 3]

        threads = min(_native.get_num_threads(), os.cpu_count() or 1, len(flat))
        if threads > 1 and resamples * len(flat) > 100_000:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(draw, range(len(flat))))
        else:
            for i in range(len(flat)):
                draw(i)

    def sizes(self, label: int | None) -> Floats:
        """Prompts by group, of one label or all."""
        chosen = self.counts if label is None else self.counts[:, label : label + 1]
        found: Floats = chosen.sum(axis=(1, 2)).astype(np.float64)
        return found

    def observed(self, label: int | None) -> tuple[Floats, Floats]:
        """Rates of reference and suspect by group."""
        chosen = (self.counts if label is None else self.counts[:, label : label + 1]).sum(axis=1)
        n = self.sizes(label)
        return chosen @ _REFERENCE / n, chosen @ _SUSPECT / n

    def drawn(self, label: int | None) -> tuple[Floats, Floats]:
        """Rates of reference and suspect, ``(resamples, groups)``."""
        groups, width, _ = self.counts.shape
        shaped = self._drawn.reshape(2, -1, groups, width)
        sums = shaped.sum(axis=3) if label is None else shaped[..., label]
        n = self.sizes(label)
        return sums[1] / n, sums[0] / n

    def shift(self, label: int | None) -> Floats:
        """Suspect's rates less reference's, ``(resamples, groups)``."""
        reference, suspect = self.drawn(label)
        return suspect - reference


def _spread(rates: Floats) -> Floats:
    found: Floats = rates.max(axis=-1) - rates.min(axis=-1)
    return found


def _gap(
    of: str,
    draws: _Draws,
    label: int | None,
    names: list[Hashable],
    pair: tuple[Hashable, Hashable] | None,
    level: float,
) -> GroupGap:
    n = draws.sizes(label)
    empty = tuple(name for name, k in zip(names, n, strict=True) if not k)
    none = Estimate(None)
    if empty:
        return GroupGap(of, none, none, none, none, None, False, (none, none), none, empty)
    (r, s), (dr, ds) = draws.observed(label), draws.drawn(label)
    total = int(n.sum())

    def estimate(value: Any, drawn: Floats) -> Estimate:
        return Estimate(float(value), _interval(drawn, level), total)

    moved, dmoved = s - r, ds - dr
    chosen = False
    if pair is not None and pair[0] in names and pair[1] in names:
        two = pair
    elif len(names) == 2:
        two = (names[0], names[1])
    else:
        two, chosen = (names[int(moved.argmax())], names[int(moved.argmin())]), True
        if two[0] == two[1]:
            two = (names[0], names[1])
    i, j = names.index(two[0]), names.index(two[1])
    count = int(n[i] + n[j])

    def of_pair(value: Any, drawn: Floats) -> Estimate:
        return Estimate(float(value), _interval(drawn, level), count)

    return GroupGap(
        of,
        estimate(_spread(r), _spread(dr)),
        estimate(_spread(s), _spread(ds)),
        estimate(_spread(s) - _spread(r), _spread(ds) - _spread(dr)),
        estimate(_spread(moved), _spread(dmoved)),
        two,
        chosen,
        (of_pair(abs(r[i] - r[j]), abs(dr[:, i] - dr[:, j])), of_pair(abs(s[i] - s[j]), abs(ds[:, i] - ds[:, j]))),
        of_pair(moved[i] - moved[j], dmoved[:, i] - dmoved[:, j]),
    )


def _heterogeneity(counts: Ints, deals: int, seed: int) -> float:
    """Newly refused and newly answered prompts dealt to the groups at random, the groups' sizes held."""
    n = counts.sum(axis=1)
    up, down = int(counts[:, 2].sum()), int(counts[:, 1].sum())
    if up + down == 0:
        return 1.0
    reach = float(_spread((counts[:, 2] - counts[:, 1]) / n)) - 1e-12
    random = np.random.default_rng([seed, 0x5EED])
    dealt = random.multivariate_hypergeometric(n, up + down, size=deals, method="marginals")
    # Of the differing prompts that a group was dealt, those newly refused are a draw without replacement again.
    if down == 0 or up == 0:
        net = dealt if down == 0 else -dealt
    else:
        left, ups = np.full(deals, up + down), np.full(deals, up)
        net = np.empty_like(dealt)
        for g in range(dealt.shape[1]):
            got = random.hypergeometric(ups, left - ups, dealt[:, g])
            net[:, g] = 2 * got - dealt[:, g]
            left, ups = left - dealt[:, g], ups - got
    found = int((_spread(net / n) >= reach).sum())
    return (1 + found) / (deals + 1)
