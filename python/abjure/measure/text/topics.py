"""Topics from a few keywords each, without labelled texts."""

from __future__ import annotations

import html
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import _native
from ..._files import reading, write_atomically
from ..._interop import is_torch
from ...errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from ._estimator import Classifier, Estimator, choice, integer, plain, positive
from .vectorizer import as_texts

Array = np.ndarray[Any, Any]
_FORMAT = "abjure.topic_matcher"
_TEMPERATURE = 1 / 20
#: What scikit-learn calls ``offset_ = -1.5``.
_OUTLIER = 1.5


class UnknownKeywordWarning(UserWarning):
    """Keywords that no text holds often enough were left out."""


def _matrix(x: Any, arg: str) -> Array:
    """Rows as contiguous float32.

    Raises:
        ShapeError, DTypeError, NonFiniteError: they are none.
    """
    try:
        rows = np.ascontiguousarray(x.detach().float().cpu().numpy() if is_torch(x) else x, dtype=np.float32)
    except (TypeError, ValueError) as err:
        raise DTypeError(f"{arg}: expected rows of numbers, got {x!r:.80}") from err
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ShapeError(f"{arg}: expected rows of one value or more, two dimensions, got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise NonFiniteError(f"{arg}: non-finite value in row {int((~np.isfinite(rows).all(1)).argmax())}")
    return rows


def local_outlier_factor(x: Any, neighbors: int = 20) -> Array:
    """How far each row lies outside its neighbourhood: about 1 inside a cluster, above 1.5 commonly called an outlier.

    Args:
        x: ``(n, d)``, read as float32; distances are Euclidean, in float64.
        neighbors: k, from 1 to n - 1.

    Returns:
        ``(n,)`` float64.

    Raises:
        ShapeError, DTypeError, NonFiniteError: rows that do not fit. ArgumentError: ``neighbors`` outside its range.

    Source: Breunig et al. 2000, with scikit-learn's 1e-10 in the density.
    """
    rows = _matrix(x, "x")
    return np.asarray(_native.local_outlier_factor(rows, integer(neighbors, "neighbors", 1)))


class Doc2Vec(Estimator):
    """Vectors of documents and words in one space: PV-DBOW with skip-gram words.

    Learning runs on one thread, in the order of the texts, so that the same seed gives the same bits; vectors of new
    texts are found on all threads.

    Args:
        size: values of a vector.
        window: words on each side, at most.
        negative: words drawn against each word.
        min_count: words that occur less often are left out.
        sample: words that are a larger share of all than this are left out now and then; 0 for never.
        epochs: passes over the texts.
        rate: learning rate, at the start and at the end.
        seed: 0 to 2⁶⁴ - 1.

    Attributes:
        documents_: ``(n, size)`` float32.
        words_: ``(words, size)`` float32.
        vocabulary_: row by word, the most frequent first.

    Source: Le and Mikolov 2014 (PV-DBOW), Mikolov et al. 2013 (negative sampling, subsampling).
    """

    def __init__(
        self,
        size: int = 100,
        *,
        window: int = 5,
        negative: int = 5,
        min_count: int = 5,
        sample: float = 1e-4,
        epochs: int = 20,
        rate: tuple[float, float] = (0.025, 0.0001),
        seed: int = 0,
    ) -> None:
        self.size, self.window, self.negative, self.min_count = size, window, negative, min_count
        self.sample, self.epochs, self.rate, self.seed = sample, epochs, rate, seed
        self._context: Array | None = None

    @property
    def _fitted(self) -> bool:
        return self._context is not None

    def _learning(self) -> dict[str, Any]:
        if self.sample != 0:
            positive(self.sample, "sample")
        if len(tuple(self.rate)) != 2:
            raise ArgumentError(f"rate: expected a first and a last learning rate, got {self.rate!r}")
        return {
            "size": integer(self.size, "size", 1),
            "window": integer(self.window, "window", 1),
            "negative": integer(self.negative, "negative", 1),
            "sample": float(self.sample),
            "epochs": integer(self.epochs, "epochs", 1),
            "rate": (positive(self.rate[0], "rate"), positive(self.rate[1], "rate")),
            "seed": integer(self.seed, "seed", 0, 2**64 - 1),
        }

    def fit(self, texts: Any, y: Any = None, *, progress: Callable[[int], object] | None = None) -> Doc2Vec:
        """Learns from the start. Returns ``self``.

        Raises:
            DegenerateError: no word occurs ``min_count`` times. ArgumentError: an option outside its domain.
            DTypeError: ``texts`` holds anything but text.
        """
        options, least = self._learning(), integer(self.min_count, "min_count", 1)
        words, ends, counts, names = _native.text_words(as_texts(texts), _WORDS, None, least)
        documents, vectors, context = _native.document_vectors(words, ends, counts, options, progress)
        size = options["size"]
        self.documents_, self.words_ = documents.reshape(-1, size), vectors.reshape(-1, size)
        self._context, self._counts, self._names_of_words = context, counts, names
        self._used = options
        self.vocabulary_ = {name: i for i, name in enumerate(names)}
        return self

    def transform(self, texts: Any) -> Array:
        """Vectors of texts by the words learned: ``(n, size)`` float32; zeros for a text without a known word.

        Raises:
            ArgumentError: not fitted. DTypeError: ``texts`` holds anything but text.
        """
        self._check_fitted()
        words, ends, _, _ = _native.text_words(as_texts(texts), _WORDS, self._names_of_words, 1)
        found = _native.infer_vectors(words, ends, self._counts, self._context, self._used)
        return np.asarray(found.reshape(-1, self._used["size"]))


#: How words are cut.
_WORDS = {
    "analyzer": "word",
    "token_pattern": "two",
    "lowercase": True,
    "stop_words": [],
    "ngram_range": (1, 1),
}


@dataclass(frozen=True, eq=False)
class Topic:
    """What a topic was made of.

    Attributes:
        label: its name.
        keywords: those that were known.
        documents: numbers of the texts whose mean is the topic's vector, the most similar first.
        similarity: cosine of each of them with the mean of the keywords.
        outliers: numbers of the texts that were left out as outliers.
    """

    label: str
    keywords: tuple[str, ...]
    documents: Array
    similarity: Array
    outliers: Array

    def __repr__(self) -> str:
        return (
            f"Topic({self.label!r}, keywords={list(self.keywords)}, documents={len(self.documents)}, "
            f"outliers={len(self.outliers)})"
        )


class TopicMatcher(Classifier):
    """Texts to topics that are given by keywords: Lbl2Vec.

    The texts most similar to the mean of a topic's keywords are its candidates; outliers among them may be left out;
    the mean of the rest is the topic, and a text belongs to the topic with the largest cosine.

    A candidate is a text whose cosine is at least ``similarity_threshold``, by default the largest one less ``offset``;
    of those at least ``min_docs`` and at most ``max_docs``. The published rule differs (``compat=True``): it wants
    *more* than a threshold that by default (``offset=0``) is the largest cosine itself, so that a topic is its single
    nearest text, and stops with an error where two texts tie for it; here it then takes ``min_docs``.

    Args:
        keywords: words, or with ``embed`` any texts, by topic.
        embed: ``embed(texts)`` gives vectors ``(n, d)``, for instance ``SentenceTransformer(...).encode``; by default a
            :class:`Doc2Vec` is trained on the texts.
        similarity_threshold: least cosine of a candidate; None for the largest less ``offset``.
        offset: see above, from 0.
        min_docs, max_docs: candidates of a topic; None for no limit.
        outlier_neighbors: neighbours of :func:`local_outlier_factor` by which candidates above 1.5 are left out, at
            most half of the other candidates (with all of them as neighbours nothing would be an outlier); None leaves
            all in.
        compat: choose candidates by the published rule.
        doc2vec: options of :class:`Doc2Vec`.

    Attributes:
        classes_: topics in the order of ``keywords``.
        vectors_: ``(topics, d)`` float32.
        topics_: a :class:`Topic` each.

    Source: Schopf, Braun and Matthes 2021 (doi 10.5220/0010710300003058).
    """

    def __init__(
        self,
        keywords: Mapping[str, Sequence[str]],
        *,
        embed: Callable[[list[str]], Any] | None = None,
        similarity_threshold: float | None = None,
        offset: float = 0.1,
        min_docs: int = 1,
        max_docs: int | None = 100,
        outlier_neighbors: int | None = None,
        compat: bool = False,
        doc2vec: Mapping[str, Any] | None = None,
    ) -> None:
        self.keywords, self.embed, self.similarity_threshold = keywords, embed, similarity_threshold
        self.offset, self.min_docs, self.max_docs = offset, min_docs, max_docs
        self.outlier_neighbors, self.compat, self.doc2vec = outlier_neighbors, compat, doc2vec
        self.vectors_: Array | None = None
        self._model: Doc2Vec | None = None

    @property
    def _fitted(self) -> bool:
        return self.vectors_ is not None

    def _check(self) -> dict[str, list[str]]:
        """The keywords, each once, and options that are in their domains."""
        if not isinstance(self.keywords, Mapping) or not self.keywords:
            raise ArgumentError(f"keywords: expected lists of words by topic, got {self.keywords!r:.80}")
        words: dict[str, list[str]] = {}
        for label, listed in self.keywords.items():
            if not isinstance(label, str) or isinstance(listed, str):
                raise ArgumentError(f"keywords: expected a name and a list of words, got {label!r}: {listed!r:.80}")
            words[label] = list(dict.fromkeys(as_texts(listed, "keywords")))
            if not words[label]:
                raise DegenerateError(f"keywords: expected at least one for {label!r}")
        threshold = self.similarity_threshold
        if threshold is not None and not -1 <= threshold <= 1:
            raise ArgumentError(f"similarity_threshold: expected a cosine or None, got {threshold!r}")
        if not 0 <= self.offset <= 2:
            raise ArgumentError(f"offset: expected 0 to 2, got {self.offset!r}")
        least = integer(self.min_docs, "min_docs", 1)
        if self.max_docs is not None:
            integer(self.max_docs, "max_docs", least)
        if self.outlier_neighbors is not None:
            integer(self.outlier_neighbors, "outlier_neighbors", 1)
        choice(self.compat, "compat", (False, True))
        return words

    def fit(self, texts: Any, y: Any = None) -> TopicMatcher:
        """Finds the topics in unlabelled texts. Returns ``self``; on an error what was fitted before stays.

        Args:
            texts: list, array or column of str.
            y: not used.

        Raises:
            DegenerateError: no texts, or a topic without a known keyword. ArgumentError: an option outside its domain.

        Warns:
            UnknownKeywordWarning: keywords without a vector, which are left out.
        """
        words, texts = self._check(), as_texts(texts)
        if not texts:
            raise DegenerateError("texts: expected at least one")
        if self.embed is not None:
            vectors = {label: self.embed(listed) for label, listed in words.items()}
            return self._find(self.embed(texts), vectors, words, None)
        model = Doc2Vec(**dict(self.doc2vec or {})).fit(texts)
        known = {label: [w for w in listed if w.lower() in model.vocabulary_] for label, listed in words.items()}
        for label, listed in words.items():
            if not known[label]:
                raise DegenerateError(f"keywords: no word of {label!r} is in the texts often enough: {listed}")
            if missing := [w for w in listed if w not in known[label]]:
                warnings.warn(f"keywords of {label!r} left out: {missing}", UnknownKeywordWarning, stacklevel=2)
        rows = {label: model.words_[[model.vocabulary_[w.lower()] for w in listed]] for label, listed in known.items()}
        return self._find(model.documents_, rows, known, model)

    def fit_vectors(self, documents: Any, keyword_vectors: Mapping[str, Any]) -> TopicMatcher:
        """Finds the topics from vectors that are there already. Returns ``self``.

        Args:
            documents: ``(n, d)``, read as float32.
            keyword_vectors: ``(m, d)`` of the keywords of each topic.

        Raises as :meth:`fit`; ShapeError, NonFiniteError: vectors that do not fit.
        """
        words = self._check()
        if list(keyword_vectors) != list(words):
            raise ArgumentError(f"keyword_vectors: expected topics {list(words)}, got {list(keyword_vectors)}")
        return self._find(documents, keyword_vectors, words, None)

    def _find(
        self, documents: Any, keyword_vectors: Mapping[str, Any], words: dict[str, list[str]], model: Doc2Vec | None
    ) -> TopicMatcher:
        rows = _matrix(documents, "documents")
        if not len(rows):
            raise DegenerateError("documents: expected at least one")
        queries = []
        for label, vectors in keyword_vectors.items():
            found = _matrix(vectors, f"keyword_vectors[{label!r}]")
            if found.shape[1] != rows.shape[1] or not len(found):
                raise ShapeError(f"keyword_vectors[{label!r}]: expected (m, {rows.shape[1]}), got {found.shape}")
            queries.append(found.mean(0, dtype=np.float64))
        table = _native.row_cosines(rows, np.array(queries, dtype=np.float32)).reshape(len(rows), -1)
        topics, means = [], []
        for (label, listed), cosines in zip(words.items(), table.T, strict=True):
            order = np.argsort(-cosines, kind="stable")
            chosen = order[: self._count(cosines[order])]
            inside = np.ones(len(chosen), dtype=bool)
            if self.outlier_neighbors is not None and (k := min(self.outlier_neighbors, (len(chosen) - 1) // 2)) >= 1:
                inside = _native.local_outlier_factor(rows[chosen], k) <= _OUTLIER
            kept, left_out = chosen[inside], chosen[~inside]
            topics.append(Topic(label, tuple(listed), kept, cosines[kept], left_out))
            means.append(rows[kept].mean(0, dtype=np.float64))
        self.topics_, self.classes_ = topics, np.array(list(words))
        self.vectors_, self._model = np.array(means, dtype=np.float32), model
        return self

    def _count(self, cosines: Array) -> int:
        """How many of the texts, sorted by falling cosine, are candidates."""
        n = len(cosines)
        least = min(self.min_docs, n)
        most = n if self.max_docs is None else min(self.max_docs, n)
        threshold = cosines[0] - self.offset if self.similarity_threshold is None else self.similarity_threshold
        if not self.compat:
            return int(min(max((cosines >= threshold).sum(), least), most))
        above = int((cosines > threshold).sum())
        return least if cosines[min(least, n - 1)] < threshold or above == 0 else min(above, most)

    def _vectors_of(self, texts: Any) -> Array:
        self._check_fitted()
        texts = as_texts(texts)
        if self._model is not None:
            return self._model.transform(texts)
        if self.embed is None:
            raise ArgumentError("embed: expected a function for texts; with vectors call similarity")
        return _matrix(self.embed(texts) if texts else np.empty((0, self._width)), "embed(texts)")

    @property
    def _width(self) -> int:
        assert self.vectors_ is not None
        return int(self.vectors_.shape[1])

    def similarity(self, documents: Any) -> Array:
        """Cosine of vectors ``(n, d)`` with each topic: ``(n, topics)`` float64; 0 for a vector of zeros.

        Raises:
            ArgumentError: not fitted. ShapeError, DTypeError, NonFiniteError: vectors that do not fit.
        """
        self._check_fitted()
        rows = _matrix(documents, "documents")
        if rows.shape[1] != self._width:
            raise ShapeError(f"documents: expected rows of {self._width} values, got {rows.shape[1]}")
        return np.asarray(_native.row_cosines(rows, self.vectors_).reshape(len(rows), -1))

    def decision_function(self, texts: Any) -> Array:
        """Cosine of each text with each topic, ``(n, topics)`` float64.

        Texts that a :class:`Doc2Vec` learned from are found anew, as any others.

        Raises:
            ArgumentError: not fitted, or fitted by vectors without ``embed``. DTypeError: anything but texts.
        """
        return self.similarity(self._vectors_of(texts))

    def predict(self, texts: Any) -> Array:
        """The most similar topic of each text; of equal ones the first. Raises as :meth:`decision_function`."""
        best = self.decision_function(texts).argmax(1)
        return np.asarray(self.classes_[best])

    def predict_proba(self, texts: Any) -> Array:
        """Softmax of 20 times the cosines, ``(n, topics)``: a ranking that sums to 1, not calibrated.

        Raises as :meth:`decision_function`.
        """
        z = self.decision_function(texts) / _TEMPERATURE
        e = np.exp(z - z.max(1, keepdims=True))
        return np.asarray(e / e.sum(1, keepdims=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with the topics and the words' vectors; ``embed`` is not in it.

        Raises:
            ArgumentError: not fitted, or the path cannot be written.
        """
        from safetensors.numpy import save

        self._check_fitted()
        assert self.vectors_ is not None
        arrays: dict[str, Array] = {"vectors": self.vectors_}
        for i, topic in enumerate(self.topics_):
            arrays |= {f"documents.{i}": topic.documents, f"similarity.{i}": topic.similarity}
            arrays |= {f"outliers.{i}": topic.outliers}
        params = {name: value for name, value in self.get_params().items() if name != "embed"}
        params["keywords"] = {label: list(listed) for label, listed in self.keywords.items()}
        facts: dict[str, Any] = {"params": params, "known": [list(t.keywords) for t in self.topics_]}
        if (model := self._model) is not None:
            assert model._context is not None
            arrays |= {"context": model._context, "counts": model._counts, "words": model.words_}
            facts |= {"doc2vec": model.get_params(), "names": model._names_of_words}
        arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
        write_atomically(path, save(arrays, {_FORMAT: json.dumps(facts, default=plain)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, embed: Callable[[list[str]], Any] | None = None) -> TopicMatcher:
        """Reads what :meth:`save` wrote; ``embed`` is given anew where there was one.

        Raises:
            ArgumentError: the file cannot be read or is no saved matcher.
        """
        with reading(path, cls.__name__) as file:
            facts = json.loads((file.metadata() or {})[_FORMAT])
            out = cls(**facts["params"], embed=embed)
            labels = list(facts["params"]["keywords"])
            vectors = file.get_tensor("vectors")
            topics = [
                Topic(
                    label,
                    tuple(facts["known"][i]),
                    *(file.get_tensor(f"{name}.{i}") for name in ("documents", "similarity", "outliers")),
                )
                for i, label in enumerate(labels)
            ]
            if vectors.ndim != 2 or len(vectors) != len(labels):
                raise ValueError("vectors")
            if "doc2vec" in facts:
                model = Doc2Vec(**dict(facts["doc2vec"], rate=tuple(facts["doc2vec"]["rate"])))
                model._context, model._counts = file.get_tensor("context"), file.get_tensor("counts")
                model.words_, model._names_of_words = file.get_tensor("words"), facts["names"]
                model.vocabulary_ = {name: i for i, name in enumerate(facts["names"])}
                model._used = model._learning()
                out._model = model
        out.vectors_, out.topics_, out.classes_ = vectors, topics, np.array(labels)
        return out

    def _repr_html_(self) -> str:
        if not self._fitted:
            return f"<p>{html.escape(repr(self))}, not fitted</p>"
        rows = "".join(
            f"<tr><td>{html.escape(t.label)}</td><td>{html.escape(', '.join(t.keywords))}</td>"
            f"<td>{len(t.documents)}</td><td>{len(t.outliers)}</td></tr>"
            for t in self.topics_
        )
        head = "<tr><th>topic</th><th>keywords</th><th>texts</th><th>outliers</th></tr>"
        return f"<table>{head}{rows}</table>"
