"""FailSafeQA (arXiv 2502.06329): robustness, context grounding, and the two in one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...errors import ArgumentError, DTypeError
from .._arrays import Floats
from .._columns import column, integers, names, verdicts
from .._scores import Estimate, Row, Scores, bootstrap_cells, check_level, check_resampling
from ..rates import Rate

#: Cases in which a right answer exists, and cases in which saying so is right.
FAIL_SAFE_ROBUSTNESS = ("baseline", "misspelled", "incomplete", "out_of_domain", "ocr")
FAIL_SAFE_GROUNDING = ("missing_context", "irrelevant_context")


@dataclass(frozen=True, repr=False)
class FailSafe(Scores):
    """Scores of FailSafeQA.

    Attributes:
        robustness: items that comply in every case with an answer (the worst case of each item).
        grounding: compliant cells of the cases without one.
        compliance: ``(1+β²)GR/(β²G + R)``, with a bootstrap interval over items.
        cases: case to its compliance rate.
        beta: below 1 weighs grounding more.
    """

    robustness: Rate
    grounding: Rate
    compliance: Estimate
    cases: Mapping[str, Rate]
    beta: float
    level: float = 0.95

    title = "FailSafeQA"

    def rows(self) -> list[Row]:
        return [
            Row("robustness", self.robustness, "worst case per item"),
            Row("context grounding", self.grounding),
            Row(f"compliance (β = {self.beta:g})", self.compliance),
            *(Row(f"case: {name}", r) for name, r in self.cases.items()),
        ]

    def notes(self) -> list[str]:
        return [
            "which cases robustness takes, the threshold and β are arguments: the paper's text leaves them open",
            "the interval of grounding takes the cells of an item as independent; that of compliance does not",
        ]


def fail_safe_scores(
    ratings: Mapping[str, Any],
    *,
    robustness: Sequence[str] | None = None,
    grounding: Sequence[str] | None = None,
    threshold: int | None = 4,
    beta: float = 0.5,
    missing: Literal["error", "exclude", "min_over_present"] = "error",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> FailSafe:
    """Robustness ``R = mean_i min_t c_it``, grounding ``G = mean c``, compliance ``(1+β²)GR/(β²G + R)``.

    Args:
        ratings: case to its column ``(n,)``: a judge's ratings 1 to 6, or 0 and 1 with ``threshold=None``. Rows are
            items, alike in all columns.
        robustness: cases with an answer; by default those of ``FAIL_SAFE_ROBUSTNESS`` that are there.
        grounding: cases without one, where refusing is compliance; by default those of ``FAIL_SAFE_GROUNDING``.
        threshold: the least rating that counts as compliant.
        beta: below 1 weighs grounding more.
        missing: an item without a rating in one of its cases is an error, left out and counted, or judged by the cases
            it has (an item without any is left out).
        level: of the intervals.
        resamples, seed: of the bootstrap over items.

    Raises:
        ArgumentError: an unknown case or option, a rating out of range, a missing one, no case or item.
        DTypeError: values of the wrong kind. ShapeError: columns of different lengths.

    Source: FailSafeQA, arXiv 2502.06329, section 3; HELM's worst case, arXiv 2211.09110.
    """
    check_level(level)
    check_resampling(resamples, seed)
    if missing not in ("error", "exclude", "min_over_present"):
        raise ArgumentError(f"missing: expected 'error', 'exclude' or 'min_over_present', got {missing!r}")
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < float("inf"):
        raise ArgumentError(f"beta: expected a number above 0, got {beta!r}")
    if threshold is not None and (isinstance(threshold, bool) or threshold not in range(1, 7)):
        raise ArgumentError(f"threshold: expected 1 to 6 or None, got {threshold!r}")
    if not isinstance(ratings, Mapping) or not ratings:
        raise DTypeError("ratings: expected a mapping of cases to columns")
    chosen = {
        "robustness": _chosen(robustness, FAIL_SAFE_ROBUSTNESS, ratings, "robustness"),
        "grounding": _chosen(grounding, FAIL_SAFE_GROUNDING, ratings, "grounding"),
    }
    n: int | None = None
    columns: dict[str, list[bool | None]] = {}
    for case in (*chosen["robustness"], *chosen["grounding"]):
        name = f"ratings[{case!r}]"
        if threshold is None:
            columns[case] = verdicts(ratings[case], name, n)
        else:
            found = integers(ratings[case], name, 1, 6, n)
            columns[case] = [None if q is None else q >= threshold for q in found]
        n = len(columns[case])
        if missing == "error" and None in columns[case]:
            raise ArgumentError(f"{name}: no rating at index {columns[case].index(None)}; see missing=")
    if not n:
        raise ArgumentError("ratings: expected at least one item, got none")
    worst = _worst([columns[c] for c in chosen["robustness"]], missing)
    held = [_kept([columns[c][i] for c in chosen["grounding"]], missing) for i in range(n)]
    cells = [v for row in held if row is not None for v in row]
    sure = [w for w in worst if w is not None]
    lost = sum(row is None for row in held) * len(chosen["grounding"])
    r, g = Rate(sum(sure), len(sure), n - len(sure)), Rate(sum(cells), len(cells), lost)
    value = None if not r.n or not g.n else float(_compliance(np.array([g.rate]), np.array([r.rate]), beta)[0])
    # Items with the same cells are alike, so a resample is a draw of their counts.
    kinds: dict[tuple[int, int, int, int], int] = {}
    for w, row in zip(worst, held, strict=True):
        key = (int(bool(w)), int(w is not None), sum(row or ()), len(row or ()))
        kinds[key] = kinds.get(key, 0) + 1
    parts = np.array(list(kinds), dtype=np.float64)

    def statistic(drawn: Floats) -> Floats:
        k_r, n_r, k_g, n_g = (drawn @ parts).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return _compliance(k_g / n_g, k_r / n_r, beta)

    counts = np.array(list(kinds.values()), dtype=np.int64)
    interval = None
    if value is not None:
        interval = bootstrap_cells(counts, statistic, resamples=resamples, seed=seed, level=level)
    by = {}
    for case, values in columns.items():
        judged = [v for v in values if v is not None]
        by[case] = Rate(sum(judged), len(judged), n - len(judged))
    return FailSafe(r, g, Estimate(value, interval, n), by, float(beta), level)


def _chosen(given: Sequence[str] | None, known: Sequence[str], ratings: Mapping[str, Any], name: str) -> list[str]:
    if isinstance(given, str):
        raise DTypeError(f"{name}: expected a list of cases, got one string")
    found = [c for c in known if c in ratings] if given is None else list(given)
    if absent := [c for c in found if c not in ratings]:
        raise ArgumentError(f"{name}: expected cases among {', '.join(map(str, ratings))}, got {absent[0]!r}")
    if not found or len(set(found)) < len(found):
        raise ArgumentError(f"{name}: expected at least one case and none twice, got {found}")
    return found


def _kept(row: list[bool | None], missing: str) -> list[bool] | None:
    found = [v for v in row if v is not None]
    return found if len(found) == len(row) or (missing == "min_over_present" and found) else None


def _worst(columns: list[list[bool | None]], missing: str) -> list[bool | None]:
    rows = (_kept(list(row), missing) for row in zip(*columns, strict=True))
    return [None if row is None else all(row) for row in rows]


def _compliance(g: Floats, r: Floats, beta: float) -> Floats:
    under = beta * beta * g + r
    found: Floats = np.where(under == 0, 0.0, (1 + beta * beta) * g * r / np.where(under == 0, 1.0, under))
    return found


def fail_safe_ratings(item: Any, case: Any, rating: Any) -> dict[str, list[Any]]:
    """Columns per case from one row per answer: what :func:`fail_safe_scores` takes.

    Args:
        item, case: ``(n,)`` names. rating: ``(n,)`` values, None for none.

    Returns:
        Case to its column, items in the order of first appearance, None where an item lacks the case.

    Raises:
        ArgumentError: two ratings of one item in one case, a missing name. ShapeError: columns of different lengths.
    """
    items = names(item, "item")
    cases = names(case, "case", len(items))
    values = column(rating, "rating", len(items))
    order = {name: i for i, name in enumerate(dict.fromkeys(items))}
    found: dict[str, list[Any]] = {c: [None] * len(order) for c in dict.fromkeys(cases)}
    seen = set()
    for i, c, v in zip(items, cases, values, strict=True):
        if (i, c) in seen:
            raise ArgumentError(f"item, case: two ratings of {i!r} in {c!r}")
        seen.add((i, c))
        found[c][order[i]] = v
    return found
