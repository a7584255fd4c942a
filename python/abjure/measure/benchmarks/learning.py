"""What data selection and refusal tuning report: difficulty of queries (DART) and AP of certainty (R-Tuning)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ArgumentError, DegenerateError
from .._arrays import Floats
from .._columns import full, integers, names, reals, verdicts
from .._scores import Estimate, Row, Scores, check_level, check_resampling
from ..ranking import average_precision
from ..rates import Rate

#: Numbers held at a time by the bootstrap.
_BLOCK = 1 << 21


@dataclass(frozen=True, repr=False)
class Difficulty(Scores):
    """Failure rates of queries.

    Attributes:
        queries: query to its failures among its trials.
        overall: failures of all trials.
    """

    queries: Mapping[Hashable, Rate]
    overall: Rate
    level: float = 0.95

    title = "DART: difficulty of queries"

    @property
    def fail_rates(self) -> Floats:
        """``(q,)`` failure rates: what :func:`abjure.refuse.difficulty_budgets` takes."""
        return np.array([r.rate for r in self.queries.values()])

    @property
    def never_solved(self) -> list[Hashable]:
        """Queries without a single right answer; their failure rate is not known to be 1."""
        return [q for q, r in self.queries.items() if r.k == r.n]

    def rows(self) -> list[Row]:
        rates = self.fail_rates
        found = [Row("all trials", self.overall), Row("mean over queries", float(rates.mean()))]
        found += [Row("queries", len(rates)), Row("never solved", len(self.never_solved))]
        found += [Row(f"quantile {q:.0%}", float(np.quantile(rates, q))) for q in (0.25, 0.5, 0.75)]
        return found

    def plot(self, ax: Any = None) -> Any:
        """Histogram of the failure rates, on matplotlib axes (made if None)."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(5, 3), layout="constrained").subplots()
        ax.hist(self.fail_rates, bins=np.linspace(0, 1, 21))
        ax.set(xlabel="failure rate", ylabel="queries")
        return ax


def dart_difficulty(correct: Any, query: Any = None, trials: Any = None, *, level: float = 0.95) -> Difficulty:
    """Difficulty of each query: the share of a reference model's samples that are wrong.

    Args:
        correct: one row per sample: ``(n,)`` of 0 and 1 with ``query``; or one per query: counts of right samples with
            ``trials``.
        query: ``(n,)`` the query of each sample.
        trials: ``(q,)`` samples per query, 1 or more.
        level: of the intervals.

    Raises:
        ArgumentError: neither or both of ``query`` and ``trials``, a missing value, more right samples than trials,
            no sample. DTypeError: values of the wrong kind. ShapeError: columns of different lengths.

    Source: DART-Math, arXiv 2407.13690, section 3.
    """
    check_level(level)
    if (query is None) == (trials is None):
        raise ArgumentError("query, trials: expected one of the two")
    counts: dict[Hashable, list[int]] = {}
    if query is not None:
        hits = verdicts(full(correct, "correct"), "correct")
        for name, hit in zip(names(query, "query", len(hits)), hits, strict=True):
            c = counts.setdefault(name, [0, 0])
            c[0] += not hit
            c[1] += 1
    else:
        n = integers(full(trials, "trials"), "trials", 1, 1 << 40)
        right = integers(full(correct, "correct", len(n)), "correct", 0, 1 << 40)
        for i, (k, m) in enumerate(zip(right, n, strict=True)):
            assert k is not None
            assert m is not None
            if k > m:
                raise ArgumentError(f"correct: expected at most {m} at index {i}, got {k}")
            counts[i] = [m - k, m]
    if not counts:
        raise ArgumentError("correct: expected at least one sample, got none")
    by = {q: Rate(k, n) for q, (k, n) in counts.items()}
    return Difficulty(by, Rate(sum(r.k for r in by.values()), sum(r.n for r in by.values())), level)


@dataclass(frozen=True, repr=False)
class RTuning(Scores):
    """How well certainty puts right answers first, and what is left where the model may refuse.

    Attributes:
        ap: average precision of certainty.
        accuracy: right answers among all.
        answered: share of questions answered at all; None without ``refused``.
        answered_accuracy: right answers among those given; None without ``refused``.
    """

    ap: Estimate
    accuracy: Rate
    answered: Rate | None
    answered_accuracy: Rate | None
    level: float = 0.95

    title = "R-Tuning"

    def rows(self) -> list[Row]:
        found = [Row("AP of certainty", self.ap), Row("accuracy", self.accuracy, "AP of no information")]
        if self.answered is not None and self.answered_accuracy is not None:
            found += [Row("answered", self.answered), Row("accuracy where answered", self.answered_accuracy)]
        return found


def r_tuning_scores(
    correct: Any,
    certainty: Any,
    refused: Any = None,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> RTuning:
    """Average precision of certainty (as :func:`average_precision`) with a bootstrap interval over questions.

    Args:
        correct: ``(n,)`` 1 where the answer is right.
        certainty: ``(n,)`` finite; the paper's is :func:`abjure.refuse.certainty`.
        refused: ``(n,)`` 1 where the model says that it is unsure.
        level: of the intervals. resamples, seed: of the bootstrap.

    Raises:
        ArgumentError: a missing verdict, an option out of range. DegenerateError: nothing is correct.
        NonFiniteError: a certainty that is not finite. DTypeError: values of the wrong kind.
        ShapeError: columns of different lengths.

    Source: R-Tuning, arXiv 2311.09677, section 4.
    """
    check_level(level)
    check_resampling(resamples, seed)
    score = reals(certainty, "certainty")
    hits = np.array(verdicts(full(correct, "correct", len(score)), "correct"), dtype=bool)
    declined = None
    if refused is not None:
        declined = np.array(verdicts(full(refused, "refused", len(score)), "refused"), dtype=bool)
    if not hits.any():
        raise DegenerateError("correct: expected at least one correct answer, got none")
    value = average_precision(hits, score)
    n = len(score)
    order = np.argsort(-score, kind="stable")
    hit = hits[order].astype(np.float64)
    last = np.append(np.flatnonzero(np.diff(score[order])), n - 1)
    rng, found = np.random.default_rng(seed), []
    step = max(1, _BLOCK // n)
    for start in range(0, resamples, step):
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start)).astype(np.float64)
        right, seen = np.cumsum(drawn * hit, axis=1)[:, last], np.cumsum(drawn, axis=1)[:, last]
        gained = np.diff(right, prepend=0.0, axis=1)
        with np.errstate(invalid="ignore"):
            found.append((gained * right / np.maximum(seen, 1)).sum(axis=1) / right[:, -1])
    values = np.concatenate(found)
    # A resample without a right answer has no AP; it is as rare as the answers are many.
    values = values[~np.isnan(values)]
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    accuracy = Rate(int(hits.sum()), n)
    ap = Estimate(value, (float(low), float(high)), n)
    if declined is None:
        return RTuning(ap, accuracy, None, None, level)
    given = ~declined
    return RTuning(ap, accuracy, Rate(int(given.sum()), n), Rate(int((hits & given).sum()), int(given.sum())), level)
