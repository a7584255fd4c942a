"""Difficulty budgets of DART (arXiv 2407.13690): how many right answers to sample for each query, and what it takes."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError, DTypeError
from ...measure._arrays import vector
from ...measure.rates import binomial_at_least

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Budgets:
    """Wanted right answers per query.

    Attributes:
        difficulty: ``(n,)`` failure rates.
        raw: ``(n,)`` budgets before rounding and the floor of one.
        wanted: ``(n,)`` int64, right answers to collect.
        expected_trials: ``(n,)`` ``wanted / (1 − difficulty)``, infinite where nothing ever succeeds.
        p_filled: ``(n,)`` probability to fill the budget within ``max_trials``; 1 or 0 without a limit.
        max_trials: the limit per query, if any.
    """

    difficulty: Floats
    raw: Floats
    wanted: Ints
    expected_trials: Floats
    p_filled: Floats
    max_trials: int | None

    @property
    def impossible(self) -> list[int]:
        """Queries that never succeeded: only the limit stops them."""
        return [int(i) for i in np.flatnonzero(self.difficulty == 1)]

    @property
    def expected_unfilled(self) -> float:
        """Number of queries expected to end with their budget unfilled."""
        return float((1 - self.p_filled).sum())

    def status(self, correct: Any, trials: Any, rule: Literal["reached", "published"] = "reached") -> list[str]:
        """``"filled"``, ``"exhausted"`` (the limit came first) or ``"open"`` for each query.

        Args:
            correct: ``(n,)`` right answers so far.
            trials: ``(n,)`` answers sampled so far.
            rule: ``"reached"`` at ``wanted``; ``"published"`` only beyond it, which samples one more.

        Raises:
            ArgumentError: lengths that differ, more right answers than trials, or an unknown rule.
        """
        if rule not in ("reached", "published"):
            raise ArgumentError(f"rule: expected 'reached' or 'published', got {rule!r}")
        hits, tried = vector(correct, "correct"), vector(trials, "trials")
        if len(hits) != len(self) or len(tried) != len(self):
            raise ArgumentError(f"correct, trials: expected {len(self)} counts, got {len(hits)} and {len(tried)}")
        if (hits < 0).any() or (hits > tried).any():
            raise ArgumentError("correct: expected counts from 0 to trials")
        done = hits >= self.wanted if rule == "reached" else hits > self.wanted
        spent = np.zeros(len(self), dtype=bool) if self.max_trials is None else tried >= self.max_trials
        return ["filled" if d else "exhausted" if s else "open" for d, s in zip(done, spent, strict=True)]

    def unfilled(self, correct: Any) -> Ints:
        """``(n,)`` right answers still missing.

        Raises:
            ShapeError, ArgumentError: not one count per query.
        """
        hits = vector(correct, "correct")
        if len(hits) != len(self):
            raise ArgumentError(f"correct: expected {len(self)} counts, got {len(hits)}")
        missing: Ints = np.maximum(self.wanted - hits.astype(np.int64), 0)
        return missing

    def __len__(self) -> int:
        return len(self.wanted)

    def __repr__(self) -> str:
        limit = "without limit" if self.max_trials is None else f"within {self.max_trials} trials each"
        return (
            f"Budgets({len(self)} queries, {int(self.wanted.sum())} answers wanted, {limit} "
            f"{self.expected_unfilled:.1f} expected unfilled, {len(self.impossible)} impossible)"
        )

    def _repr_html_(self) -> str:
        body = ""
        for i in range(min(len(self), 20)):
            cells = (
                f"{self.difficulty[i]:.3g}",
                self.wanted[i],
                f"{self.expected_trials[i]:.1f}",
                f"{self.p_filled[i]:.4f}",
            )
            body += f"<tr><td>{i}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
        head = "<th>query</th><th>failure rate</th><th>wanted</th><th>expected trials</th><th>P(filled)</th>"
        return f"<table><caption>{html.escape(repr(self))}</caption><tr>{head}</tr>{body}</table>"

    def plot(self, ax: Any = None) -> Any:
        """Wanted answers and expected trials by failure rate, on matplotlib axes (made if None)."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(5, 3), layout="constrained").subplots()
        order = np.argsort(self.difficulty, kind="stable")
        finite = order[np.isfinite(self.expected_trials[order])]
        ax.plot(self.difficulty[order], self.wanted[order], marker=".", label="wanted")
        ax.plot(self.difficulty[finite], self.expected_trials[finite], marker=".", label="expected trials")
        ax.set(xlabel="failure rate", ylabel="answers", yscale="log")
        ax.legend()
        return ax


def difficulty_budgets(
    fail_rates: Sequence[float] | Any,
    k: int,
    scheme: Literal["proportional", "uniform"] = "proportional",
    *,
    max_trials: int | None = None,
) -> Budgets:
    """Right answers to sample per query.

    ``"uniform"``: ``k`` for every query. ``"proportional"`` (Prop2Diff): ``k · d / max d`` rounded half up, at least 1,
    so that the hardest query gets ``k``.

    Args:
        fail_rates: ``(n,)`` failure rates ``d`` of a reference sampler, in [0, 1].
        k: answers for each, or for the hardest query.
        scheme: of the two.
        max_trials: samples per query after which sampling stops; None for no limit.

    Raises:
        ArgumentError: a rate outside [0, 1], ``k`` or ``max_trials`` below 1, unknown scheme.
        ShapeError, NonFiniteError: not a vector of finite rates. DTypeError: ``k`` or ``max_trials`` is no integer.

    Source: DART-Math, arXiv 2407.13690, section 3.
    """
    d = vector(fail_rates, "fail_rates")
    if (d < 0).any() or (d > 1).any():
        raise ArgumentError(f"fail_rates: expected rates in [0, 1], got {d[(d < 0) | (d > 1)][0]}")
    if scheme not in ("proportional", "uniform"):
        raise ArgumentError(f"scheme: expected 'proportional' or 'uniform', got {scheme!r}")
    for name, value in (("k", k), ("max_trials", max_trials)):
        if value is None and name == "max_trials":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise DTypeError(f"{name}: expected an integer, got {type(value).__name__}")
        if value < 1:
            raise ArgumentError(f"{name}: expected 1 or more, got {value}")
    hardest = d.max()
    raw = np.full(len(d), float(k))
    if scheme == "proportional":
        # Where every query always succeeds there is no proportion: all keep the floor of one.
        raw = k * d / hardest if hardest > 0 else np.zeros(len(d))
    whole = np.floor(raw)
    wanted = np.maximum(1, (whole + (raw - whole >= 0.5)).astype(np.int64))
    success = 1 - d
    with np.errstate(divide="ignore"):
        trials = np.where(success > 0, wanted / success, math.inf)
    if max_trials is None:
        filled = (success > 0).astype(np.float64)
    else:
        filled = np.array([binomial_at_least(int(w), int(max_trials), p) for w, p in zip(wanted, success, strict=True)])
    return Budgets(d, raw, wanted, trials, filled, None if max_trials is None else int(max_trials))
