"""Training data that knows about refusal: made, budgeted and audited."""

from __future__ import annotations

from .audit import DataAudit, Finding, PatternRate, refuse_then_comply_scan
from .budgets import Budgets, difficulty_budgets
from .coupled import CoupledEstimate, coupled_estimate
from .derta import (
    DecoupledRefusalCollator,
    DecoupledRefusalExamples,
    DecoupledRefusalMap,
    decoupled_refusal_examples,
    decoupled_refusal_loss,
)
from .evolve import OverRefusalSearch, search_over_refusals
from .notes import (
    ChainOfNoteScores,
    chain_of_note_row,
    chain_of_note_scores,
    parse_chain_of_note,
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
    "ChainOfNoteScores",
    "CoupledEstimate",
    "DataAudit",
    "DecoupledRefusalCollator",
    "DecoupledRefusalExamples",
    "DecoupledRefusalMap",
    "Finding",
    "OverRefusalSearch",
    "PatternRate",
    "RefusalAwareSplit",
    "answer_confidence",
    "answer_entropy",
    "certainty",
    "chain_of_note_row",
    "chain_of_note_scores",
    "coupled_estimate",
    "decoupled_refusal_examples",
    "decoupled_refusal_loss",
    "difficulty_budgets",
    "parse_chain_of_note",
    "refusal_aware_split",
    "refuse_then_comply_scan",
    "search_over_refusals",
    "sureness",
    "verdict_tokens",
]
