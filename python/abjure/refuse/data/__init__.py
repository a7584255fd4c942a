"""Training data that knows about refusal: made, budgeted and audited."""

from __future__ import annotations

from .audit import DataAudit, Finding, PatternRate, refuse_then_comply_scan
from .budgets import Budgets, difficulty_budgets
from .derta import (
    DecoupledRefusalCollator,
    DecoupledRefusalExamples,
    DecoupledRefusalMap,
    decoupled_refusal_examples,
    decoupled_refusal_loss,
)
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
    "DataAudit",
    "DecoupledRefusalCollator",
    "DecoupledRefusalExamples",
    "DecoupledRefusalMap",
    "Finding",
    "PatternRate",
    "RefusalAwareSplit",
    "answer_confidence",
    "answer_entropy",
    "certainty",
    "decoupled_refusal_examples",
    "decoupled_refusal_loss",
    "difficulty_budgets",
    "refusal_aware_split",
    "refuse_then_comply_scan",
    "sureness",
    "verdict_tokens",
]
