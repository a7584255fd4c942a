"""N-grams, sparse logistic regression and the Tsetlin Machine beside scikit-learn's and NumPy's forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..measure.text import NgramRefusalClassifier, TfidfVectorizer, TsetlinMachine
from .timing import Row, compare

Array = np.ndarray[Any, Any]


def _texts(n: int, words: int = 120, seed: int = 0) -> tuple[list[str], Array]:
    """Texts of words drawn by Zipf's law; one word in twenty is of the text's own class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    common = rng.zipf(1.3, size=(n, words)).clip(max=30_000)
    own = rng.random((n, words)) < 0.05
    special = rng.integers(0, 200, (n, words))
    texts = [
        " ".join(f"c{label}x{s}" if o else f"word{w}" for w, o, s in zip(*line, strict=True))
        for label, *line in zip(y, common, own, special, strict=True)
    ]
    return texts, y


def _numpy_epoch(x: Array, y: Array, clauses: int, t: int, s: float, seed: int = 0) -> Array:
    """One epoch of a Tsetlin Machine with a number for each automaton: the states afterwards."""
    rng = np.random.default_rng(seed)
    literals = np.concatenate([x, ~x], axis=1)
    classes = int(y.max()) + 1
    states = np.full((classes, clauses, literals.shape[1]), 127, dtype=np.int16)
    positive = np.arange(clauses) % 2 == 0
    for row, label in zip(literals, y, strict=True):
        other = (label + rng.integers(1, classes)) % classes
        for taught, own in ((label, True), (other, False)):
            bank = states[taught]
            fires = ~((bank >= 128) & ~row).any(1)
            votes = int(np.clip(fires[positive].sum() - fires[~positive].sum(), -t, t))
            drawn = rng.random(clauses) < ((t - votes) if own else (t + votes)) / (2 * t)
            first = positive == own
            mask = rng.random(bank.shape) < 1 / s
            good = drawn & first & fires
            bank += good[:, None] & row
            bank -= (good[:, None] & ~row & mask) | ((drawn & first & ~fires)[:, None] & mask)
            bank += (drawn & ~first & fires)[:, None] & ~row & (bank < 128)
            np.clip(bank, 0, 255, out=bank)
    return states


def rows(scale: float = 1.0) -> Iterator[Row]:
    """Fit and transform of n-grams, fit of a classifier, an epoch of a machine; sizes shrink with ``scale``."""
    from sklearn.feature_extraction.text import TfidfVectorizer as Reference
    from sklearn.linear_model import LogisticRegression

    texts, y = _texts(max(int(2000 * scale), 50))
    case = f"{len(texts)} texts, words 1–3"

    def ours_rows() -> object:
        vectorizer = TfidfVectorizer(ngram_range=(1, 3))
        vectorizer.fit_transform(texts)
        return vectorizer.transform(texts)

    def their_rows() -> object:
        vectorizer = Reference(ngram_range=(1, 3))
        vectorizer.fit_transform(texts)
        return vectorizer.transform(texts)

    ours, theirs = compare(ours_rows, their_rows, repeats=3)
    yield Row("tfidf fit + transform", case, ours, "scikit-learn TfidfVectorizer", theirs)

    def their_fit() -> object:
        matrix = Reference(ngram_range=(1, 3)).fit_transform(texts)
        return LogisticRegression(C=10).fit(matrix, y)

    ours, theirs = compare(lambda: NgramRefusalClassifier().fit(texts, y), their_fit, repeats=3)
    yield Row("NgramRefusalClassifier", case, ours, "scikit-learn TF-IDF and LogisticRegression", theirs)
    rng = np.random.default_rng(1)
    n, features, clauses = max(int(400 * scale), 20), 320, 200
    labels = rng.integers(0, 10, n)
    bits = rng.random((n, features)) < 0.2 + 0.6 * (rng.random((10, features)) < 0.3)[labels]

    def machine() -> object:
        return TsetlinMachine(clauses, 20, 5.0, epochs=1).fit(bits, labels)

    ours, theirs = compare(machine, lambda: _numpy_epoch(bits, labels, clauses, 20, 5.0), repeats=3)
    yield Row("TsetlinMachine epoch", f"{n} × {features} bits, 10 × {clauses}", ours, "NumPy, a number a state", theirs)
