"""Know, with error bars, whether any of it worked.

Similarity of representations (:func:`cka`, :class:`LinearCKA`), nearest-neighbour transfer (:func:`knn_transfer`), the
tug-of-war score (:func:`tug_of_war`) and membership inference (:func:`entropy_mia`, :func:`svc_mia`).
For language models that were made to forget: :mod:`~abjure.measure.quality` (:func:`forget_quality`,
:func:`model_utility`) and :mod:`~abjure.measure.sequence_membership` (:func:`sequence_mia`).
Refusals by published lists of phrases: :func:`refusal_match`, with :func:`corrected_rate` for the known errors of a
list. Rates with intervals: :func:`rate`, :func:`rate_difference`; rankings: :func:`average_precision`.
"""

from __future__ import annotations

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
from .sequence_membership import sequence_mia
from .similarity import LinearCKA, cka
from .transfer import Transfer, knn_transfer
from .tug_of_war import tug_of_war

__all__ = [
    "PHRASE_LISTS",
    "SVC_FEATURES",
    "CorrectedRate",
    "LinearCKA",
    "PhraseList",
    "Rate",
    "RefusalMatches",
    "Transfer",
    "average_precision",
    "cka",
    "corrected_rate",
    "entropy_mia",
    "fold_text",
    "forget_quality",
    "knn_transfer",
    "ks_test",
    "model_utility",
    "modified_entropy",
    "paired_bootstrap",
    "rate",
    "rate_difference",
    "refusal_match",
    "sequence_mia",
    "svc_mia",
    "truth_ratio",
    "tug_of_war",
]
