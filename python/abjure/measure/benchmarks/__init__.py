"""Scores that benchmarks of refusal, honesty and unlearning define, from plain columns, with intervals."""

from __future__ import annotations

from .attempts import AttemptsCurve, attempts_curve
from .civics import Civics, civics_scores
from .failsafe import FAIL_SAFE_GROUNDING, FAIL_SAFE_ROBUSTNESS, FailSafe, fail_safe_ratings, fail_safe_scores
from .honest import H2_BANDS, HoneSet, honeset_scores
from .learning import Difficulty, RTuning, dart_difficulty, r_tuning_scores
from .notes import ChainOfNoteScores, chain_of_note_scores, parse_chain_of_note
from .over_refusal import (
    XSTEST_LABELS,
    EvoRefuse,
    OverRefusal,
    evorefuse_scores,
    over_refusal_scores,
    read_xstest,
    refusal_tradeoff,
    xstest_scores,
)
from .samples import sorry_bench_sample, xstest_sample
from .search import FactorisedSearch, factorised_search_scores
from .sorry import (
    SORRY_BENCH_CATEGORIES,
    SORRY_BENCH_DOMAINS,
    SORRY_BENCH_MUTATIONS,
    AgainstBase,
    SorryBench,
    read_sorry_bench,
    sorry_bench_scores,
)
from .strongreject import StrongReject, parse_strongreject, strongreject_scores
from .unlearning import SafeAnswerRefusal, safe_answer_refusal_rate

__all__ = [
    "FAIL_SAFE_GROUNDING",
    "FAIL_SAFE_ROBUSTNESS",
    "H2_BANDS",
    "SORRY_BENCH_CATEGORIES",
    "SORRY_BENCH_DOMAINS",
    "SORRY_BENCH_MUTATIONS",
    "XSTEST_LABELS",
    "AgainstBase",
    "AttemptsCurve",
    "ChainOfNoteScores",
    "Civics",
    "Difficulty",
    "EvoRefuse",
    "FactorisedSearch",
    "FailSafe",
    "HoneSet",
    "OverRefusal",
    "RTuning",
    "SafeAnswerRefusal",
    "SorryBench",
    "StrongReject",
    "attempts_curve",
    "chain_of_note_scores",
    "civics_scores",
    "dart_difficulty",
    "evorefuse_scores",
    "factorised_search_scores",
    "fail_safe_ratings",
    "fail_safe_scores",
    "honeset_scores",
    "over_refusal_scores",
    "parse_chain_of_note",
    "parse_strongreject",
    "r_tuning_scores",
    "read_sorry_bench",
    "read_xstest",
    "refusal_tradeoff",
    "safe_answer_refusal_rate",
    "sorry_bench_sample",
    "sorry_bench_scores",
    "strongreject_scores",
    "xstest_sample",
    "xstest_scores",
]
