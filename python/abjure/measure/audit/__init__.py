"""Audits of refusals: what a model newly refuses, on which topics and for whom, and the same in training data."""

from __future__ import annotations

from .files import audit_dataset, audit_refusals
from .finetuning import FinetuningScan, scan_finetuning_set
from .shift import GroupGap, GroupShift, PairedShift, RefusalShift, refusal_shift
from .triggers import Trigger, TriggerSearch, embedding_clusters, search_triggers

__all__ = [
    "FinetuningScan",
    "GroupGap",
    "GroupShift",
    "PairedShift",
    "RefusalShift",
    "Trigger",
    "TriggerSearch",
    "audit_dataset",
    "audit_refusals",
    "embedding_clusters",
    "refusal_shift",
    "scan_finetuning_set",
    "search_triggers",
]
