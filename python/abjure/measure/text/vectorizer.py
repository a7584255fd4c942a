"""Texts as sparse rows of weighted n-grams, with scikit-learn's numbers."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from ... import _native
from ..._files import reading, write_atomically
from ...errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from ._estimator import Estimator, choice, integer, plain
from .lookalikes import fold
from .sparse import SparseRows

Array = np.ndarray[Any, Any]
_FORMAT = "abjure.tfidf_vectorizer"
#: scikit-learn's ways to write the two patterns that need no name.
_PATTERNS = {r"(?u)\b\w\w+\b": "two", r"(?u)\b\w+\b": "one", "apostrophe": "apostrophe"}


def as_texts(x: Any, arg: str = "texts", decode_error: str = "strict") -> list[str]:
    """A list, array or column of texts as ``list[str]``; ``bytes`` are read as UTF-8.

    Raises:
        DTypeError: one string instead of several, or an element that is no text; its index is named.
        ArgumentError: bytes that are not UTF-8, or a lone surrogate, with ``decode_error="strict"``.
    """
    if isinstance(x, (str, bytes)) or not isinstance(x, Iterable):
        raise DTypeError(f"{arg}: expected a list of texts, got {type(x).__name__}")
    out: list[str] = x if type(x) is list else list(x.tolist() if hasattr(x, "tolist") else x)
    for i, text in enumerate(out):
        if type(text) is str:
            continue
        out = list(out) if out is x else out
        if isinstance(text, (bytes, bytearray)):
            try:
                out[i] = bytes(text).decode("utf-8", decode_error)
            except UnicodeDecodeError as err:
                raise ArgumentError(f"{arg}: expected UTF-8, got byte {err.start} of text {i} ({err.reason})") from err
        elif isinstance(text, str):
            out[i] = str(text)
        else:
            raise DTypeError(f"{arg}: expected text, got {type(text).__name__} at index {i}")
    if decode_error != "strict":
        return [t if t.isascii() else t.encode("utf-8", _SURROGATES[decode_error]).decode() for t in out]
    return out


_SURROGATES = {"replace": "replace", "ignore": "ignore"}


class TfidfVectorizer(Estimator):
    """Texts to TF-IDF rows: n-grams of words or characters, weighted and scaled.

    The options of the same names mean what they mean in scikit-learn's ``TfidfVectorizer``, and the numbers agree to
    rounding; finding and counting n-grams runs in Rust on all threads.

    Args:
        ngram_range: lengths of n-grams, shortest and longest.
        analyzer: ``"word"``, ``"char"``, or ``"char_wb"`` (characters within words).
        token_pattern: what a word is: scikit-learn's default, the same from one letter on (``r"(?u)\\b\\w+\\b"``), or
            ``"apostrophe"``: from one letter on, with what follows an apostrophe, so that "I can't" is ``i can't``
            and not ``can`` (which speaks for compliance).
        lowercase: Unicode lower case first.
        strip_accents: ``"unicode"``, ``"ascii"`` or None, after that.
        lookalikes: undo disguises first: compatibility forms (full width, mathematical letters), invisible characters,
            and Cyrillic and Greek letters inside a word that also has Latin ones; see :func:`fold_lookalikes`.
        stop_words: words left out, before n-grams are formed.
        min_df, max_df: keep n-grams that are in at least, at most so many texts; a float is a share of the texts.
        max_features: keep only the most frequent n-grams; of equally frequent ones the first in order.
        binary: count an n-gram once a text.
        use_idf, smooth_idf: weigh by ``ln((1 + n) / (1 + df)) + 1``, without smoothing ``ln(n / df) + 1``.
        sublinear_tf: ``1 + ln(count)`` for counts.
        norm: ``"l2"``, ``"l1"`` or None. An empty text stays a row of zeros.
        decode_error: what to do with bytes that are not UTF-8 and with lone surrogates: ``"strict"``, ``"replace"``,
            ``"ignore"``.
        dtype: ``"float64"`` or ``"float32"``.

    Attributes:
        idf_: weight of each n-gram, float64.
        df_: texts that hold each, of those that were fitted.

    Source: term weighting of Salton and Buckley 1988 in scikit-learn's form (smooth idf, L2 rows).
    """

    def __init__(
        self,
        *,
        ngram_range: tuple[int, int] = (1, 1),
        analyzer: Literal["word", "char", "char_wb"] = "word",
        token_pattern: str = r"(?u)\b\w\w+\b",
        lowercase: bool = True,
        strip_accents: Literal["ascii", "unicode"] | None = None,
        lookalikes: bool = False,
        stop_words: Sequence[str] | None = None,
        min_df: int | float = 1,
        max_df: int | float = 1.0,
        max_features: int | None = None,
        binary: bool = False,
        use_idf: bool = True,
        smooth_idf: bool = True,
        sublinear_tf: bool = False,
        norm: Literal["l1", "l2"] | None = "l2",
        decode_error: Literal["strict", "replace", "ignore"] = "strict",
        dtype: str = "float64",
    ) -> None:
        self.ngram_range, self.analyzer, self.token_pattern = ngram_range, analyzer, token_pattern
        self.lowercase, self.strip_accents, self.lookalikes = lowercase, strip_accents, lookalikes
        self.stop_words, self.min_df, self.max_df = stop_words, min_df, max_df
        self.max_features, self.binary, self.use_idf = max_features, binary, use_idf
        self.smooth_idf, self.sublinear_tf, self.norm = smooth_idf, sublinear_tf, norm
        self.decode_error, self.dtype = decode_error, dtype
        self._terms: Array | None = None
        self._ends: Array | None = None
        self._native: Any = None
        self._names_cache: list[str] | None = None

    @property
    def _fitted(self) -> bool:
        return self._terms is not None

    def _options(self) -> dict[str, Any]:
        """The arguments of the Rust tokenizer, checked."""
        for name in ("lowercase", "lookalikes", "binary", "use_idf", "smooth_idf", "sublinear_tf"):
            choice(getattr(self, name), name, (False, True))
        choice(self.strip_accents, "strip_accents", (None, "ascii", "unicode"))
        choice(self.norm, "norm", (None, "l1", "l2"))
        choice(self.decode_error, "decode_error", ("strict", "replace", "ignore"))
        choice(self.dtype, "dtype", ("float64", "float32"))
        if len(tuple(self.ngram_range)) != 2:
            raise ArgumentError(f"ngram_range: expected a shortest and a longest length, got {self.ngram_range!r}")
        low = integer(self.ngram_range[0], "ngram_range", 1)
        high = integer(self.ngram_range[1], "ngram_range", low, 64)
        if self.token_pattern not in _PATTERNS:
            raise ArgumentError(f"token_pattern: expected one of {tuple(_PATTERNS)}, got {self.token_pattern!r}")
        if isinstance(self.stop_words, str):
            raise ArgumentError(f"stop_words: expected a list of words, got {self.stop_words!r}")
        return {
            "analyzer": choice(self.analyzer, "analyzer", ("word", "char", "char_wb")),
            "token_pattern": _PATTERNS[self.token_pattern],
            "lowercase": self.lowercase and self.strip_accents is None,
            "stop_words": as_texts(self.stop_words or [], "stop_words"),
            "ngram_range": (low, high),
        }

    def _read(self, texts: Any) -> list[str]:
        out = as_texts(texts, "texts", self.decode_error)
        if self.lookalikes:
            out = [fold(t) for t in out]
        if self.strip_accents is not None:
            out = [_strip(t.lower() if self.lowercase else t, self.strip_accents) for t in out]
        return out

    def _limit(self, value: Any, name: str, rows: int) -> int:
        if isinstance(value, (float, np.floating)):
            if not 0 <= value <= 1:
                raise ArgumentError(f"{name}: expected a share from 0 to 1 or a whole number, got {value!r}")
            share = value * rows
            return int(np.ceil(share) if name == "min_df" else np.floor(share))
        return integer(value, name, 1)

    def fit_transform(self, texts: Any, y: Any = None) -> SparseRows:
        """Learns the n-grams and their weights, and returns the rows: ``(texts, n-grams)``.

        Raises:
            DegenerateError: no n-gram is left: no texts, only stop words, or none within ``min_df`` and ``max_df``.
            ArgumentError: an option outside its domain. DTypeError, ArgumentError: ``texts`` as in :func:`as_texts`.
        """
        options, read = self._options(), self._read(texts)
        low, high = self._limit(self.min_df, "min_df", len(read)), self._limit(self.max_df, "max_df", len(read))
        if read and high < low:
            raise ArgumentError(f"max_df: expected at least min_df, got {high} and {low} of {len(read)} texts")
        most = None if self.max_features is None else integer(self.max_features, "max_features", 1)
        terms, ends, df, (indptr, indices, data) = _native.text_ngrams(read, options, low, high, most, self.binary)
        self._take(terms, ends, df, len(read))
        return self._weigh(indptr, indices, data)

    def fit(self, texts: Any, y: Any = None) -> TfidfVectorizer:
        """As :meth:`fit_transform`; returns ``self``."""
        self.fit_transform(texts)
        return self

    def _take(self, terms: Array, ends: Array, df: Array, rows: int) -> None:
        self._terms, self._ends, self._names_cache = terms, ends, None
        self._native = _native.TextVocabulary(terms, ends, self._options())
        self.df_, self.rows_ = df, rows
        if self.smooth_idf:
            self.idf_ = np.log((1.0 + rows) / (1.0 + df)) + 1.0
        else:
            self.idf_ = np.log(rows / df.astype(np.float64)) + 1.0

    def _weigh(self, indptr: Array, indices: Array, data: Array) -> SparseRows:
        data = _native.text_weights(
            indptr, indices, data, self.idf_, self.use_idf, self.sublinear_tf, self.norm or "none"
        )
        return SparseRows(data.astype(self.dtype, copy=False), indices, indptr, (len(indptr) - 1, len(self.idf_)))

    def counts(self, texts: Any) -> SparseRows:
        """How often each n-gram is in each text, unweighted float64. Raises as :meth:`transform`."""
        self._check_fitted()
        indptr, indices, data = self._native.count(self._read(texts), self.binary)
        return SparseRows(data, indices, indptr, (len(indptr) - 1, len(self.idf_)))

    def transform(self, texts: Any) -> SparseRows:
        """Rows of new texts, ``(texts, n-grams)``; n-grams that were not learned are left out.

        Raises:
            ArgumentError: not fitted. Else ``texts`` as in :func:`as_texts`.
        """
        found = self.counts(texts)
        return self._weigh(found.indptr, found.indices, found.data)

    def _spelled(self) -> list[str]:
        self._check_fitted()
        if self._names_cache is None:
            assert self._terms is not None
            assert self._ends is not None
            raw, start, out = self._terms.tobytes(), 0, []
            for end in self._ends.tolist():
                out.append(raw[start:end].decode())
                start = end
            self._names_cache = out
        return self._names_cache

    def get_feature_names_out(self, input_features: Any = None) -> Array:
        """The n-grams in the order of columns, an object array of str."""
        return np.array(self._spelled(), dtype=object)

    @property
    def vocabulary_(self) -> dict[str, int]:
        """Column by n-gram."""
        return {term: i for i, term in enumerate(self._spelled())}

    def keep(self, columns: Any) -> TfidfVectorizer:
        """Keeps only some columns, for instance those that tell classes apart; in their old order. Returns ``self``.

        Raises:
            ArgumentError: not fitted, or numbers that are no columns. DegenerateError: none.
        """
        terms, chosen = self._spelled(), np.unique(np.asarray(columns, dtype=np.int64))
        if not len(chosen):
            raise DegenerateError("columns: expected at least one")
        if chosen[0] < 0 or chosen[-1] >= len(terms):
            raise ArgumentError(f"columns: expected 0 to {len(terms) - 1}, got {chosen[0]} to {chosen[-1]}")
        raw, ends = pack_terms([terms[i] for i in chosen])
        self._take(raw, ends, self.df_[chosen], self.rows_)
        return self

    def _state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        self._check_fitted()
        assert self._terms is not None
        assert self._ends is not None
        arrays = {"terms": self._terms, "ends": self._ends, "df": self.df_, "idf": self.idf_}
        facts = {"params": self.get_params(), "rows": self.rows_}
        return arrays, facts

    @classmethod
    def _restore(cls, file: Any, facts: dict[str, Any]) -> TfidfVectorizer:
        params = dict(facts["params"], ngram_range=tuple(facts["params"]["ngram_range"]))
        out = cls(**params)
        terms, ends, df = (file.get_tensor(name) for name in ("terms", "ends", "df"))
        if len(ends) != len(df) or len(ends) == 0 or ends[-1] != len(terms):
            raise ValueError("terms")
        out._take(terms, ends, df, int(facts["rows"]))
        out.idf_ = file.get_tensor("idf")
        if out.idf_.shape != df.shape or not np.isfinite(out.idf_).all():
            raise ValueError("idf")
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with the n-grams and weights, options in its metadata. Complete or not at all.

        Raises:
            ArgumentError: not fitted, or the path cannot be written.
        """
        from safetensors.numpy import save

        arrays, facts = self._state()
        write_atomically(path, save(arrays, {_FORMAT: json.dumps(facts, default=plain)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TfidfVectorizer:
        """Reads what :meth:`save` wrote.

        Raises:
            ArgumentError: the file cannot be read or is no saved vectorizer.
        """
        with reading(path, cls.__name__) as file:
            return cls._restore(file, json.loads((file.metadata() or {})[_FORMAT]))


def pack_terms(terms: Sequence[str]) -> tuple[Array, Array]:
    """Texts as one uint8 array of UTF-8, and where each ends."""
    parts = [t.encode() for t in terms]
    raw = np.frombuffer(b"".join(parts), dtype=np.uint8).copy()
    return raw, np.cumsum([len(p) for p in parts], dtype=np.int64)


def _strip(text: str, how: str) -> str:
    if text.isascii():
        return text
    split = unicodedata.normalize("NFKD", text)
    if how == "ascii":
        return split.encode("ascii", "ignore").decode()
    return "".join(c for c in split if not unicodedata.combining(c))


def chi2(x: SparseRows, codes: Array, classes: int) -> Array:
    """Pearson's χ² of each column with the classes: ``Σ (observed − expected)² / expected`` over the column's sums.

    Args:
        x: rows of values from 0, for instance counts or presence.
        codes: number of each row's class.
        classes: how many there are.

    Returns:
        ``(columns,)`` float64; 0 for a column of zeros.

    Raises:
        ShapeError: not one class per row. NonFiniteError, ArgumentError: a value that is negative or no number.
    """
    if len(codes) != x.shape[0]:
        raise ShapeError(f"codes: expected {x.shape[0]}, one per row, got {len(codes)}")
    if not np.isfinite(x.data).all():
        raise NonFiniteError("x: expected finite values")
    if len(x.data) and x.data.min() < 0:
        raise ArgumentError(f"x: expected values from 0, got {x.data.min()}")
    rows = np.repeat(np.asarray(codes, dtype=np.int64), np.diff(x.indptr))
    flat = rows * x.shape[1] + x.indices
    observed = np.bincount(flat, weights=x.data, minlength=classes * x.shape[1]).reshape(classes, x.shape[1])
    expected = np.bincount(codes, minlength=classes)[:, None] / len(codes) * observed.sum(0)
    gap = (observed - expected) ** 2
    return np.asarray(np.divide(gap, expected, out=np.zeros_like(gap), where=expected > 0).sum(0))
