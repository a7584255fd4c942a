"""Know, with error bars, whether any of it worked.

Rates as counts, decimals that add up and intervals: :func:`rate`, :func:`response_rates`, :func:`percent_shares`. Two
systems on the same items: :func:`mcnemar`, :func:`paired_bootstrap`, :func:`sign_flip_test`; many tests:
:func:`adjust_pvalues`; rows that belong together: :func:`clustered_mean`, :func:`bootstrap_mean`. Groups:
:func:`parity_gap`. Raters: :func:`agreement`, :func:`fleiss_kappa`, :func:`krippendorff_alpha`. Scores: :func:`auroc`,
:func:`average_precision`, :func:`calibration`, :func:`ks_test`. Texts: :func:`rouge_l`, :func:`exact_match`.

Similarity of representations: :func:`cka` (linear and RBF), :class:`LinearCKA` and :func:`cka_shards` over batches,
:func:`svcca`, :func:`procrustes`; nearest-neighbour transfer (:func:`knn_transfer`) and the tug-of-war score
(:func:`tug_of_war`). Membership inference: :func:`threshold_mia`, :func:`logistic_mia`, :func:`lira_scores`,
:func:`entropy_mia`, :func:`svc_mia`. For language models that were made to forget: :mod:`~abjure.measure.quality`
(:func:`forget_quality`, :func:`model_utility`) and :mod:`~abjure.measure.sequence_membership` (:func:`sequence_mia`).
Refusals by published lists of phrases: :func:`refusal_match`, with :func:`corrected_rate` for the known errors of a
list, and :func:`measure_responses` for a file of responses. Scores that benchmarks define:
:mod:`~abjure.measure.benchmarks`; any of it on one page: :class:`Report`.
Classifiers of texts: :mod:`~abjure.measure.text` (:class:`NgramRefusalClassifier`, :class:`TsetlinTextClassifier`,
:class:`TopicMatcher`).
"""

from __future__ import annotations

from ._records import read_jsonl
from .agreement import Agreement, agreement, cohen_kappa, fleiss_kappa, krippendorff_alpha
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
from .calibration import Calibration, calibration
from .membership import (
    SVC_FEATURES,
    MembershipTest,
    entropy_mia,
    lira_scores,
    logistic_mia,
    logit_confidence,
    modified_entropy,
    svc_mia,
    threshold_mia,
)
from .overlap import RougeL, exact_match, rouge_l
from .paired import ClusteredMean, McNemar, SignFlip, adjust_pvalues, clustered_mean, mcnemar, sign_flip_test
from .parity import Gap, ParityGap, parity_gap
from .quality import forget_quality, ks_test, model_utility, truth_ratio
from .ranking import Auroc, AurocDifference, auroc, auroc_difference, average_precision
from .rates import Rate, ResponseRates, percent_shares, rate, rate_difference, response_rates
from .refusals import PHRASE_LISTS, CorrectedRate, PhraseList, RefusalMatches, corrected_rate, fold_text, refusal_match
from .report import Report
from .resampling import Bootstrap, bootstrap_mean, paired_bootstrap
from .responses import measure_responses
from .sequence_membership import sequence_mia
from .similarity import LinearCKA, cka, cka_shards, procrustes, svcca
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
    "Agreement",
    "AttemptsCurve",
    "Auroc",
    "AurocDifference",
    "Bootstrap",
    "Calibration",
    "ChainOfNoteScores",
    "Civics",
    "ClusteredMean",
    "CorrectedRate",
    "Difficulty",
    "EvoRefuse",
    "FactorisedSearch",
    "FailSafe",
    "Gap",
    "HoneSet",
    "LinearCKA",
    "McNemar",
    "MembershipTest",
    "NgramRefusalClassifier",
    "OverRefusal",
    "ParityGap",
    "PhraseList",
    "RTuning",
    "Rate",
    "RefusalMatches",
    "Report",
    "ResponseRates",
    "RougeL",
    "SafeAnswerRefusal",
    "SignFlip",
    "SorryBench",
    "StrongReject",
    "TopicMatcher",
    "Transfer",
    "TsetlinMachine",
    "TsetlinTextClassifier",
    "adjust_pvalues",
    "agreement",
    "attempts_curve",
    "auroc",
    "auroc_difference",
    "average_precision",
    "bootstrap_mean",
    "calibration",
    "chain_of_note_scores",
    "civics_scores",
    "cka",
    "cka_shards",
    "clustered_mean",
    "cohen_kappa",
    "corrected_rate",
    "dart_difficulty",
    "entropy_mia",
    "evorefuse_scores",
    "exact_match",
    "factorised_search_scores",
    "fail_safe_ratings",
    "fail_safe_scores",
    "fleiss_kappa",
    "fold_text",
    "forget_quality",
    "honeset_scores",
    "knn_transfer",
    "krippendorff_alpha",
    "ks_test",
    "lira_scores",
    "logistic_mia",
    "logit_confidence",
    "mcnemar",
    "measure_responses",
    "model_utility",
    "modified_entropy",
    "over_refusal_scores",
    "paired_bootstrap",
    "parity_gap",
    "parse_chain_of_note",
    "parse_strongreject",
    "percent_shares",
    "procrustes",
    "r_tuning_scores",
    "rate",
    "rate_difference",
    "read_jsonl",
    "read_sorry_bench",
    "read_xstest",
    "refusal_match",
    "refusal_tradeoff",
    "response_rates",
    "rouge_l",
    "safe_answer_refusal_rate",
    "sequence_mia",
    "sign_flip_test",
    "sorry_bench_sample",
    "sorry_bench_scores",
    "strongreject_scores",
    "svc_mia",
    "svcca",
    "threshold_mia",
    "truth_ratio",
    "tug_of_war",
    "xstest_sample",
    "xstest_scores",
]
