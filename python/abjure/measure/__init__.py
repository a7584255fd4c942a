"""Know, with error bars, whether any of it worked.

Similarity of representations (:func:`cka`, :class:`LinearCKA`), nearest-neighbour transfer (:func:`knn_transfer`), the
tug-of-war score (:func:`tug_of_war`) and membership inference (:func:`entropy_mia`, :func:`svc_mia`).
For language models that were made to forget: :mod:`~abjure.measure.quality` (:func:`forget_quality`,
:func:`model_utility`) and :mod:`~abjure.measure.sequence_membership` (:func:`sequence_mia`).
Refusals by published lists of phrases: :func:`refusal_match`, with :func:`corrected_rate` for the known errors of a
list, and :func:`measure_responses` for a file of responses. Scores that benchmarks define:
:mod:`~abjure.measure.benchmarks`; any of it on one page: :class:`Report`.
Classifiers of texts: :mod:`~abjure.measure.text` (:class:`NgramRefusalClassifier`, :class:`TsetlinTextClassifier`,
:class:`TopicMatcher`).
Rates with intervals: :func:`rate`, :func:`rate_difference`; rankings: :func:`average_precision`.
"""

from __future__ import annotations

from ._records import read_jsonl
from .benchmarks import (
    FAIL_SAFE_GROUNDING,
    FAIL_SAFE_ROBUSTNESS,
    H2_BANDS,
    SORRY_BENCH_CATEGORIES,
    SORRY_BENCH_DOMAINS,
    SORRY_BENCH_MUTATIONS,
    XSTEST_LABELS,
    AgainstBase,
    AttemptsCurve,
    ChainOfNoteScores,
    Civics,
    Difficulty,
    EvoRefuse,
    FactorisedSearch,
    FailSafe,
    HoneSet,
    OverRefusal,
    RTuning,
    SafeAnswerRefusal,
    SorryBench,
    StrongReject,
    attempts_curve,
    chain_of_note_scores,
    civics_scores,
    dart_difficulty,
    evorefuse_scores,
    factorised_search_scores,
    fail_safe_ratings,
    fail_safe_scores,
    honeset_scores,
    over_refusal_scores,
    parse_chain_of_note,
    parse_strongreject,
    r_tuning_scores,
    read_sorry_bench,
    read_xstest,
    refusal_tradeoff,
    safe_answer_refusal_rate,
    sorry_bench_sample,
    sorry_bench_scores,
    strongreject_scores,
    xstest_sample,
    xstest_scores,
)
from .membership import SVC_FEATURES, entropy_mia, modified_entropy, svc_mia
from .quality import forget_quality, ks_test, model_utility, paired_bootstrap, truth_ratio
from .ranking import average_precision
from .rates import Rate, rate, rate_difference
from .refusals import (
    PHRASE_LISTS,
    CorrectedRate,
    PhraseList,
    RefusalMatches,
    corrected_rate,
    fold_text,
    refusal_match,
)
from .report import Report
from .responses import measure_responses
from .sequence_membership import sequence_mia
from .similarity import LinearCKA, cka
from .text import NgramRefusalClassifier, TopicMatcher, TsetlinMachine, TsetlinTextClassifier
from .transfer import Transfer, knn_transfer
from .tug_of_war import tug_of_war

__all__ = [
    "FAIL_SAFE_GROUNDING",
    "FAIL_SAFE_ROBUSTNESS",
    "H2_BANDS",
    "PHRASE_LISTS",
    "SORRY_BENCH_CATEGORIES",
    "SORRY_BENCH_DOMAINS",
    "SORRY_BENCH_MUTATIONS",
    "SVC_FEATURES",
    "XSTEST_LABELS",
    "AgainstBase",
    "AttemptsCurve",
    "ChainOfNoteScores",
    "Civics",
    "CorrectedRate",
    "Difficulty",
    "EvoRefuse",
    "FactorisedSearch",
    "FailSafe",
    "HoneSet",
    "LinearCKA",
    "NgramRefusalClassifier",
    "OverRefusal",
    "PhraseList",
    "RTuning",
    "Rate",
    "RefusalMatches",
    "Report",
    "SafeAnswerRefusal",
    "SorryBench",
    "StrongReject",
    "TopicMatcher",
    "Transfer",
    "TsetlinMachine",
    "TsetlinTextClassifier",
    "attempts_curve",
    "average_precision",
    "chain_of_note_scores",
    "civics_scores",
    "cka",
    "corrected_rate",
    "dart_difficulty",
    "entropy_mia",
    "evorefuse_scores",
    "factorised_search_scores",
    "fail_safe_ratings",
    "fail_safe_scores",
    "fold_text",
    "forget_quality",
    "honeset_scores",
    "knn_transfer",
    "ks_test",
    "measure_responses",
    "model_utility",
    "modified_entropy",
    "over_refusal_scores",
    "paired_bootstrap",
    "parse_chain_of_note",
    "parse_strongreject",
    "r_tuning_scores",
    "rate",
    "rate_difference",
    "read_jsonl",
    "read_sorry_bench",
    "read_xstest",
    "refusal_match",
    "refusal_tradeoff",
    "safe_answer_refusal_rate",
    "sequence_mia",
    "sorry_bench_sample",
    "sorry_bench_scores",
    "strongreject_scores",
    "svc_mia",
    "truth_ratio",
    "tug_of_war",
    "xstest_sample",
    "xstest_scores",
]
