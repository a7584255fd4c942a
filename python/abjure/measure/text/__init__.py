"""Classifiers of texts, fitted in Rust behind scikit-learn's estimator interface; saved without pickle.

By n-grams: :class:`NgramRefusalClassifier` (TF-IDF and logistic regression) and its :class:`TfidfVectorizer`.
By rules in words: :class:`TsetlinTextClassifier`, and :class:`TsetlinMachine` on rows of bits.
By keywords alone: :class:`TopicMatcher` (Lbl2Vec), on :class:`Doc2Vec` or on given embeddings.
"""

from __future__ import annotations

from .lookalikes import fold as fold_lookalikes
from .refusal import LogisticFit, NgramRefusalClassifier, NgramWeight, TextConvergenceWarning
from .sparse import SparseRows
from .topics import Doc2Vec, Topic, TopicMatcher, UnknownKeywordWarning, local_outlier_factor
from .tsetlin import Rule, TsetlinMachine, TsetlinTextClassifier
from .vectorizer import TfidfVectorizer, chi2

__all__ = [
    "Doc2Vec",
    "LogisticFit",
    "NgramRefusalClassifier",
    "NgramWeight",
    "Rule",
    "SparseRows",
    "TextConvergenceWarning",
    "TfidfVectorizer",
    "Topic",
    "TopicMatcher",
    "TsetlinMachine",
    "TsetlinTextClassifier",
    "UnknownKeywordWarning",
    "chi2",
    "fold_lookalikes",
    "local_outlier_factor",
]
