"""Training data that knows about refusal: made, budgeted and audited."""

from __future__ import annotations

from .budgets import Budgets, difficulty_budgets
from .rtuning import (
    UNKNOWN_ANSWERS,
    RefusalAwareSplit,
    answer_confidence,
    answer_entropy,
    certainty,
    refusal_aware_split,
    sureness,
    verdict_tokens,
)

__all__ = [
    "UNKNOWN_ANSWERS",
    "Budgets",
    "RefusalAwareSplit",
    "answer_confidence",
    "answer_entropy",
    "certainty",
    "difficulty_budgets",
    "refusal_aware_split",
    "sureness",
    "verdict_tokens",
]
