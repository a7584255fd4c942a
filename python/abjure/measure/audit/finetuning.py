"""Refusals in a fine-tuning set that concentrate on a topic beyond what its harmfulness explains."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from ...errors import ArgumentError, ShapeError
from .._columns import reals, texts
from .._scores import Row, Scores
from ..rates import Rate
from ._outcomes import Lists, outcomes
from .triggers import TriggerSearch, search_triggers

__all__ = ["FinetuningScan", "scan_finetuning_set"]


@dataclass(frozen=True, repr=False)
class FinetuningScan(Scores):
    """What :func:`scan_finetuning_set` found.

    Attributes:
        refused: rows whose response is a refusal, by band of harmfulness where that was given.
        triggers: the topics, see :class:`TriggerSearch`.
        suspects: indices of the refusals that a trigger covers: to read, and to leave out of training until read.
        invalid: rows without a verdict, left out.
    """

    title = "Refusals in a fine-tuning set"
    refused: Rate
    triggers: TriggerSearch
    suspects: Sequence[int]
    invalid: int

    def rows(self) -> list[Row]:
        found = [Row("refused", self.refused)]
        found += [Row(f"harmfulness {name}", r) for name, r in self.refused.groups.items()]
        return found + self.triggers.rows()[1:]

    def notes(self) -> list[str]:
        """What to know before quoting the numbers."""
        found = self.triggers.notes()
        return found + ([f"{self.invalid} rows without a response were left out."] if self.invalid else [])


def scan_finetuning_set(
    prompts: Any,
    responses: Any,
    *,
    harmfulness: Any = None,
    bands: int = 10,
    topics: Any = None,
    embeddings: Any = None,
    clusters: int | Sequence[int] | None = None,
    ngrams: tuple[int, int] | None = (1, 3),
    min_prompts: int = 3,
    lists: Lists = "refusal_direction",
    alpha: float = 0.05,
    method: Literal["bh", "holm"] = "bh",
    seed: int = 0,
) -> FinetuningScan:
    """Looks for planted refusals in training data, before anything is trained.

    A topic may be refused often because it is harmful. Rows are therefore compared within bands of equal harmfulness,
    and only what is refused more than others of its band is named.

    Args:
        prompts: ``(n,)`` texts.
        responses: ``(n,)`` texts, judged by ``lists``, or verdicts of true or false (refused). None is no response.
        harmfulness: ``(n,)`` of the prompts: true or false, or a score (of a moderation model) cut into bands of about
            equal size. Without it all rows are compared with each other, and the result says so.
        bands: of a score, at most. Fewer where scores are tied.
        topics, embeddings, clusters, ngrams, min_prompts, alpha, method, seed: as in :func:`search_triggers`.
        lists: phrases of :func:`refusal_match`.

    Raises:
        ShapeError, DTypeError, ArgumentError: columns that do not fit, or an option out of range.
        NonFiniteError: a harmfulness that is NaN or missing.
        DegenerateError: nothing to test.
    """
    given = texts(prompts, "prompts")
    if None in given:
        raise ArgumentError(f"prompts: expected text in every row, got none at index {given.index(None)}")
    if not given:
        raise ShapeError("prompts: expected at least one prompt")
    if isinstance(bands, bool) or not isinstance(bands, int) or bands < 1:
        raise ArgumentError(f"bands: expected 1 or more, got {bands!r}")
    n = len(given)
    said = outcomes(responses, "responses", list(given), lists)
    kept = np.flatnonzero(said >= 0)
    if not len(kept):
        raise ArgumentError("responses: expected at least one response, got none")
    strata = None
    if harmfulness is not None:
        score = reals([float(h) if isinstance(h, (bool, np.bool_)) else h for h in harmfulness], "harmfulness", n)
        strata = _bands(score[kept], bands)
    refused = said[kept] == 1

    def rows_of(x: Any, name: str) -> Any:
        if x is None:
            return None
        if isinstance(x, dict):
            return {k: rows_of(v, f"{name}: {k}") for k, v in x.items()}
        if len(x) != n:
            raise ShapeError(f"{name}: expected {n} rows, one per prompt, got {len(x)}")
        return x[kept] if isinstance(x, np.ndarray) else [x[int(i)] for i in kept]

    found = search_triggers(
        [given[i] for i in kept], refused, strata=strata, topics=rows_of(topics, "topics"),
        embeddings=rows_of(embeddings, "embeddings"), clusters=clusters, ngrams=ngrams, min_prompts=min_prompts,
        alpha=alpha, method=method, seed=seed,
    )  # fmt: skip
    groups: dict[Hashable, Rate] = {}
    for name in [] if strata is None else sorted(set(strata)):
        here = refused[[s == name for s in strata or ()]]
        groups[name] = Rate(int(here.sum()), len(here))
    return FinetuningScan(
        Rate(int(refused.sum()), len(kept), n - len(kept), groups),
        found,
        [int(kept[i]) for i in found.covered],
        n - len(kept),
    )


def _bands(score: Any, bands: int) -> list[str]:
    """The name of each row's band; scores that are equal share one."""
    values = np.unique(score)
    if len(values) <= bands:
        place = np.searchsorted(values, score)
        names = [f"{i + 1}: {v:.4g}" for i, v in enumerate(values)]
    else:
        edges = np.unique(np.quantile(score, np.linspace(0, 1, bands + 1)[1:-1]))
        place = np.searchsorted(edges, score, side="right")
        limits = [score.min(), *edges, score.max()]
        names = [f"{i + 1}: {a:.4g} to {b:.4g}" for i, (a, b) in enumerate(pairwise(limits))]
    width = len(str(len(names)))
    return [names[i].rjust(len(names[i]) + width - len(names[i].split(":")[0])) for i in place]
