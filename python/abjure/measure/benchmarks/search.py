"""WebDetective-style scores (arXiv 2510.05137): searching, using what was found, and refusing, each on its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...errors import ArgumentError
from .._arrays import Floats
from .._columns import full, verdicts
from .._scores import Estimate, Row, Scores, bootstrap_cells, check_level, check_resampling
from ..rates import Rate


@dataclass(frozen=True, repr=False)
class FactorisedSearch(Scores):
    """Factorised scores of search agents.

    Attributes:
        sufficiency: items with sufficient evidence.
        use_precision: right answers among answers with sufficient evidence. use_recall: among items with it.
        use_f1: harmonic mean of the two; None where no item has sufficient evidence.
        refusal_precision: refusals without sufficient evidence among refusals. refusal_recall: among items without it.
        refusal_f1: harmonic mean; None where every item has sufficient evidence.
        generation: mean of the two F1; None where either is.
        lucky: right answers without sufficient evidence (memory or luck), among items without it.
        accuracy: right answers among all items.
    """

    sufficiency: Rate
    use_precision: Rate
    use_recall: Rate
    use_f1: Estimate
    refusal_precision: Rate
    refusal_recall: Rate
    refusal_f1: Estimate
    generation: Estimate
    lucky: Rate
    accuracy: Rate
    level: float = 0.95

    title = "Factorised search (WebDetective-style)"

    def rows(self) -> list[Row]:
        return [
            Row("search sufficiency", self.sufficiency),
            Row("knowledge use: precision", self.use_precision),
            Row("knowledge use: recall", self.use_recall),
            Row("knowledge use: F1", self.use_f1),
            Row("good refusal: precision", self.refusal_precision),
            Row("good refusal: recall", self.refusal_recall),
            Row("good refusal: F1", self.refusal_f1),
            Row("generation score", self.generation),
            Row("right without evidence", self.lucky),
            Row("accuracy", self.accuracy),
        ]

    def notes(self) -> list[str]:
        return ["after WebDetective: its equations are not reproduced from its code, only its factors"]


def factorised_search_scores(
    sufficient: Any,
    answered: Any,
    correct: Any,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> FactorisedSearch:
    """Search sufficiency, knowledge use, good refusal and the generation score.

    Args:
        sufficient: ``(n,)`` 1 where the evidence found suffices.
        answered: ``(n,)`` 1 where an answer was given, 0 where it was refused.
        correct: ``(n,)`` 1 where the answer is right; only answers can be.
        level: of the intervals. resamples, seed: of the bootstrap over items, for the F1 scores.

    Raises:
        ArgumentError: a missing verdict, a right answer that was not given, an option out of range, no item.
        DTypeError: values of the wrong kind. ShapeError: columns of different lengths.

    Source: WebDetective, arXiv 2510.05137, section 4, after its description.
    """
    check_level(level)
    check_resampling(resamples, seed)
    s, a, c = (
        np.array(verdicts(full(x, name), name), dtype=bool)
        for x, name in ((sufficient, "sufficient"), (answered, "answered"), (correct, "correct"))
    )
    n = len(s)
    for x, name in ((answered, "answered"), (correct, "correct")):
        full(x, name, n)
    if not n:
        raise ArgumentError("sufficient: expected at least one item, got none")
    if (c & ~a).any():
        at = int((c & ~a).argmax())
        raise ArgumentError(f"correct: expected answers where correct, got a refusal at index {at}")
    # One cell per (sufficient, answered, correct).
    cells = np.bincount(4 * s + 2 * a + c, minlength=8).astype(np.int64)
    values = _scores(cells[None].astype(np.float64))
    lows = {}
    for name in ("use", "refusal", "generation"):
        value = float(values[name][0])
        got = None
        if not np.isnan(value):
            got = bootstrap_cells(cells, partial(_part, name), resamples=resamples, seed=seed, level=level)
        lows[name] = Estimate(None if np.isnan(value) else value, got, n)

    def counted(hit: Any, of: Any) -> Rate:
        return Rate(int((hit & of).sum()), int(of.sum()))

    right = s & a & c
    return FactorisedSearch(
        counted(s, np.ones(n, dtype=bool)), counted(right, s & a), counted(right, s), lows["use"],
        counted(~s, ~a), counted(~a, ~s), lows["refusal"], lows["generation"],
        counted(c, ~s), counted(c, np.ones(n, dtype=bool)), level,
    )  # fmt: skip


def _part(name: str, cells: Floats) -> Floats:
    return _scores(cells)[name]


def _scores(cells: Floats) -> dict[str, Floats]:
    """F1 scores of counts ``(b, 8)``; NaN where nothing could be used, or nothing refused rightly."""
    wrong_s, right_s, refused_s = cells[:, 6], cells[:, 7], cells[:, 4] + cells[:, 5]
    refused_n, other_n = cells[:, 0] + cells[:, 1], cells[:, 2] + cells[:, 3]
    # 2·tp / (predicted + actual): also right where nothing was predicted, which makes it 0.
    use = _f1(right_s, right_s + wrong_s, right_s + wrong_s + refused_s)
    refusal = _f1(refused_n, refused_n + refused_s, refused_n + other_n)
    return {"use": use, "refusal": refusal, "generation": (use + refusal) / 2}


def _f1(hits: Floats, predicted: Floats, actual: Floats) -> Floats:
    found: Floats = np.where(actual > 0, 2 * hits / np.maximum(predicted + actual, 1), np.nan)
    return found
