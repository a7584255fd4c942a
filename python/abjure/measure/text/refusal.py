"""Refusals, or any classes of texts, told apart by n-grams and logistic regression."""

from __future__ import annotations

import html
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ... import _native
from ..._files import reading, write_atomically
from ...errors import ArgumentError
from ._estimator import Classifier, choice, classes_from_json, classes_to_json, encode_labels, integer, plain, positive
from .sparse import SparseRows
from .vectorizer import TfidfVectorizer

Array = np.ndarray[Any, Any]
_FORMAT = "abjure.ngram_refusal_classifier"


class TextConvergenceWarning(UserWarning):
    """A classifier stopped before its gradient was as small as asked for."""


@dataclass(frozen=True)
class NgramWeight:
    """An n-gram and what it adds to the decision for a class, a row of unit length holding nothing else."""

    ngram: str
    weight: float


@dataclass(frozen=True)
class LogisticFit:
    """How a fit ended.

    Attributes:
        loss: the minimised objective.
        gradient_norm: Euclidean length of its gradient; it bounds the distance of the weights from the optimum.
        iterations: Newton steps.
        converged: ``gradient_norm <= tol · max(1, ‖weights‖)``.
    """

    loss: float
    gradient_norm: float
    iterations: int
    converged: bool


class NgramRefusalClassifier(Classifier):
    """TF-IDF of n-grams and logistic regression: of answers (refused or not), of prompts, or of any labelled texts.

    Minimises ``½‖W‖² + C Σ s_i ℓ_i`` with ℓ the logistic loss, for more than two classes the softmax cross-entropy: the
    optimum of scikit-learn's ``LogisticRegression``, the intercept free unless ``penalize_intercept``.

    Args:
        ngram_range, analyzer, token_pattern, lowercase, lookalikes, stop_words, min_df, max_df, max_features, binary,
            sublinear_tf, decode_error: of :class:`TfidfVectorizer`.
        C: weight of the loss against the penalty.
        class_weight: ``"balanced"`` weighs rows by ``n / (classes · n_class)``; None by 1.
        penalize_intercept: the penalty takes the intercept in, as LIBLINEAR's does, which the published figures used.
        tol: see :attr:`LogisticFit.converged`.
        max_iter: Newton steps before a :class:`TextConvergenceWarning`.

    Attributes:
        classes_: labels in sorted order.
        coef_: ``(1, n-grams)`` for two classes, positive for the second; else ``(classes, n-grams)``. float64.
        intercept_: ``(1,)`` or ``(classes,)``.
        vectorizer_: the fitted :class:`TfidfVectorizer`.
        result_: how the fit ended, a :class:`LogisticFit`.

    Source: n-gram classifiers of refusals and prompts (arXiv 2306.03423: lengths 1 to 3, C = 10). Solver: Newton's
    method with conjugate gradients (Lin, Weng and Keerthi 2008).
    """

    def __init__(
        self,
        *,
        ngram_range: tuple[int, int] = (1, 3),
        analyzer: Literal["word", "char", "char_wb"] = "word",
        token_pattern: str = r"(?u)\b\w\w+\b",
        lowercase: bool = True,
        lookalikes: bool = False,
        stop_words: Sequence[str] | None = None,
        min_df: int | float = 1,
        max_df: int | float = 1.0,
        max_features: int | None = None,
        binary: bool = False,
        sublinear_tf: bool = False,
        decode_error: Literal["strict", "replace", "ignore"] = "strict",
        C: float = 10.0,
        class_weight: Literal["balanced"] | None = None,
        penalize_intercept: bool = False,
        tol: float = 1e-8,
        max_iter: int = 200,
    ) -> None:
        self.ngram_range, self.analyzer, self.token_pattern = ngram_range, analyzer, token_pattern
        self.lowercase, self.lookalikes, self.stop_words = lowercase, lookalikes, stop_words
        self.min_df, self.max_df, self.max_features = min_df, max_df, max_features
        self.binary, self.sublinear_tf, self.decode_error = binary, sublinear_tf, decode_error
        self.C, self.class_weight, self.penalize_intercept = C, class_weight, penalize_intercept
        self.tol, self.max_iter = tol, max_iter
        self.vectorizer_: TfidfVectorizer | None = None
        self.result_: LogisticFit | None = None
        self._weights: Array | None = None

    @property
    def _fitted(self) -> bool:
        return self._weights is not None

    def fit(self, texts: Any, y: Any, *, progress: Callable[[int], object] | None = None) -> NgramRefusalClassifier:
        """Fits the classifier. Returns ``self``; on an error what was fitted before stays.

        Args:
            texts: list, array or column of str, or of UTF-8 bytes.
            y: a label per text: integers, booleans or strings.
            progress: called with the number of Newton steps done, now and then.

        Raises:
            DegenerateError: fewer than two classes, or no n-gram is left.
            ShapeError, DTypeError: labels that do not fit.
            ArgumentError: an option outside its domain, or text that is not UTF-8.

        Warns:
            TextConvergenceWarning: the gradient is not as small as ``tol`` asks.
        """
        c, tol = positive(self.C, "C"), positive(self.tol, "tol")
        steps = integer(self.max_iter, "max_iter", 1)
        choice(self.class_weight, "class_weight", (None, "balanced"))
        choice(self.penalize_intercept, "penalize_intercept", (False, True))
        texts = texts if isinstance(texts, (str, bytes)) or not hasattr(texts, "tolist") else texts.tolist()
        names = set(TfidfVectorizer._names())
        vectorizer = TfidfVectorizer(**{k: v for k, v in self.get_params().items() if k in names})
        texts = vectorizer._read(texts)
        classes, codes = encode_labels(y, len(texts))
        rows = vectorizer.fit_transform(texts)
        coef, intercept, loss, gradient, iterations, converged = _native.sparse_logistic(
            rows.indptr,
            rows.indices,
            rows.data,
            rows.shape[1],
            codes,
            len(classes),
            c,
            self.class_weight == "balanced",
            self.penalize_intercept,
            tol,
            steps,
            progress,
        )
        self.classes_, self.vectorizer_ = classes, vectorizer
        self.result_ = LogisticFit(loss, gradient, iterations, converged)
        self._weights, self.intercept_ = coef, intercept
        if not converged:
            warnings.warn(
                f"the fit stopped with a gradient of {gradient:.2g} after {iterations} of {steps} Newton steps, "
                f"tol={tol:g}",
                TextConvergenceWarning,
                stacklevel=2,
            )
        return self

    @property
    def coef_(self) -> Array:
        """Weights, see the class; raises ArgumentError before :meth:`fit`."""
        self._check_fitted()
        assert self._weights is not None
        return np.asarray(self._weights.reshape(-1, len(self.intercept_)).T)

    def _rows(self, texts: Any) -> SparseRows:
        self._check_fitted()
        assert self.vectorizer_ is not None
        return self.vectorizer_.transform(texts)

    def decision_function(self, texts: Any) -> Array:
        """Log-odds of the second of two classes, ``(n,)``; for more classes a value each, ``(n, classes)``. float64.

        Raises:
            ArgumentError: not fitted, or text that is not UTF-8. DTypeError: ``texts`` holds anything but text.
        """
        rows = self._rows(texts)
        found = _native.sparse_decision(rows.indptr, rows.indices, rows.data, self._weights, self.intercept_)
        return np.asarray(found if len(self.intercept_) == 1 else found.reshape(len(rows), -1))

    def predict_proba(self, texts: Any) -> Array:
        """Probability of each class, ``(n, classes)`` float64. Raises as :meth:`decision_function`."""
        z = self.decision_function(texts)
        if z.ndim == 1:
            second = 0.5 + 0.5 * np.tanh(z / 2)
            return np.column_stack([0.5 - 0.5 * np.tanh(z / 2), second])
        e = np.exp(z - z.max(1, keepdims=True))
        return np.asarray(e / e.sum(1, keepdims=True))

    def predict(self, texts: Any) -> Array:
        """The most probable class of each text, ``(n,)``; of equal ones the first.

        Raises as :meth:`decision_function`.
        """
        z = self.decision_function(texts)
        return np.asarray(self.classes_[(z > 0).astype(int) if z.ndim == 1 else z.argmax(1)])

    def _direction(self, label: Any) -> Array:
        """Weights towards a class."""
        where = np.flatnonzero(self.classes_ == label)
        if not len(where):
            raise ArgumentError(f"label: expected one of {self.classes_.tolist()}, got {label!r}")
        if len(self.intercept_) == 1:
            return np.asarray(self.coef_[0] if where[0] == 1 else -self.coef_[0])
        return np.asarray(self.coef_[where[0]])

    def top_ngrams(self, k: int = 20) -> dict[Any, list[NgramWeight]]:
        """The ``k`` n-grams with the largest weights towards each class; of equal ones the first in order.

        Raises:
            ArgumentError: not fitted, or ``k`` below 1.
        """
        self._check_fitted()
        assert self.vectorizer_ is not None
        k, terms, out = integer(k, "k", 1), self.vectorizer_._spelled(), {}
        for label in self.classes_:
            weights = self._direction(label)
            order = np.argsort(-weights, kind="stable")[:k]
            out[label.item()] = [NgramWeight(terms[i], float(weights[i])) for i in order if weights[i] > 0]
        return out

    def explain(self, text: str, k: int = 10) -> dict[Any, list[NgramWeight]]:
        """What the n-grams of one text add to the decision for its predicted class, the largest first by size.

        Returns:
            the predicted class with the ``k`` contributions; they and the intercept add up to the decision.

        Raises as :meth:`decision_function`.
        """
        rows = self._rows([text])
        assert self.vectorizer_ is not None
        label, terms = self.predict([text])[0], self.vectorizer_._spelled()
        shares = rows.data * self._direction(label)[rows.indices]
        order = np.argsort(-np.abs(shares), kind="stable")[: integer(k, "k", 1)]
        return {label.item(): [NgramWeight(terms[rows.indices[i]], float(shares[i])) for i in order]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: weights and n-grams, the rest in its metadata. Complete or not at all; no pickle.

        Raises:
            ArgumentError: not fitted, or the path cannot be written.
        """
        from safetensors.numpy import save

        self._check_fitted()
        assert self.vectorizer_ is not None
        assert self.result_ is not None
        arrays, vectorizer = self.vectorizer_._state()
        facts = {
            "params": self.get_params(),
            "classes": classes_to_json(self.classes_),
            "vectorizer": vectorizer,
            "result": vars(self.result_),
        }
        arrays = {**arrays, "coef": np.asarray(self._weights), "intercept": self.intercept_}
        write_atomically(path, save(arrays, {_FORMAT: json.dumps(facts, default=plain)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NgramRefusalClassifier:
        """Reads what :meth:`save` wrote.

        Raises:
            ArgumentError: the file cannot be read or is no saved classifier.
        """
        with reading(path, cls.__name__) as file:
            facts = json.loads((file.metadata() or {})[_FORMAT])
            vectorizer = TfidfVectorizer._restore(file, facts["vectorizer"])
            coef, intercept = file.get_tensor("coef"), file.get_tensor("intercept")
            out = cls(**dict(facts["params"], ngram_range=tuple(facts["params"]["ngram_range"])))
            out.classes_ = classes_from_json(facts["classes"])
            out.result_ = LogisticFit(**facts["result"])
            wide = 1 if len(out.classes_) == 2 else len(out.classes_)
            if intercept.shape != (wide,) or coef.shape != (wide * len(vectorizer.df_),):
                raise ValueError("coef")
        out.vectorizer_, out._weights, out.intercept_ = vectorizer, coef, intercept
        return out

    def _repr_html_(self) -> str:
        if not self._fitted:
            return f"<p>{html.escape(repr(self))}, not fitted</p>"
        columns = self.top_ngrams(10)
        head = "".join(f"<th>{html.escape(str(label))}</th>" for label in columns)
        cells = "".join(
            "<td>" + "<br>".join(f"{html.escape(n.ngram)} {n.weight:+.2f}" for n in grams) + "</td>"
            for grams in columns.values()
        )
        return f"<table><caption>{html.escape(repr(self))}</caption><tr>{head}</tr><tr>{cells}</tr></table>"

    def plot(self, k: int = 15, ax: Any = None) -> Any:
        """The ``k`` n-grams with the largest weights on both sides (two classes). Returns the axes.

        Raises:
            ArgumentError: not fitted, or more than two classes.
        """
        import matplotlib.pyplot as plt

        top = self.top_ngrams(k)
        if len(top) != 2:
            raise ArgumentError(f"plot: expected two classes, got {len(top)}")
        (first, against), (second, towards) = top.items()
        bars = [(n.ngram, -n.weight) for n in against] + [(n.ngram, n.weight) for n in reversed(towards)]
        ax = plt.subplots(figsize=(6, 0.2 * len(bars) + 1))[1] if ax is None else ax
        ax.barh(range(len(bars)), [v for _, v in bars], color=["C0" if v < 0 else "C3" for _, v in bars])
        ax.set_yticks(range(len(bars)), [n for n, _ in bars], fontsize=7)
        ax.axvline(0, color="0.4", lw=0.8)
        ax.set(xlabel=f"weight: {first} ← → {second}")
        return ax
