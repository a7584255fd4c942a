"""Tsetlin Machines: classes as votes of conjunctions that can be read."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from ... import _native
from ..._files import reading, write_atomically
from ...errors import ArgumentError, DTypeError, ShapeError
from ._estimator import (
    Classifier,
    choice,
    classes_from_json,
    classes_to_json,
    encode_labels,
    integer,
    label_array,
    plain,
    positive,
)
from .sparse import SparseRows, sparse_rows
from .vectorizer import TfidfVectorizer, chi2

Array = np.ndarray[Any, Any]
_FORMAT = "abjure.tsetlin_machine"
_TEXT_FORMAT = "abjure.tsetlin_text_classifier"
MachineT = TypeVar("MachineT", bound="TsetlinMachine")


@dataclass(frozen=True)
class Rule:
    """A clause in words: it fires where all of ``present`` are 1 and all of ``absent`` are 0.

    Attributes:
        label: the class that it votes on.
        weight: votes for the class; against it where negative.
        present, absent: names of features.
    """

    label: Any
    weight: int
    present: tuple[str, ...]
    absent: tuple[str, ...]

    def __str__(self) -> str:
        terms = [f"{name!r}" for name in self.present] + [f"not {name!r}" for name in self.absent]
        side = "for" if self.weight > 0 else "against"
        return f"if {' and '.join(terms)}: {abs(self.weight)} {side} {self.label!r}"


class TsetlinMachine(Classifier):
    """Multi-class Tsetlin Machine on rows of bits.

    Each class has ``clauses`` conjunctions of literals (a feature is 1, a feature is 0), half of which vote for it and
    half against. The states of 64 automata at a time are moved by whole-word operations; classes learn in parallel. The
    same seed gives the same machine for every number of threads.

    Args:
        clauses: per class, an even number.
        threshold: T, the votes at which a class has learned enough from an example.
        s: specificity, from 1: literals are forgotten with probability 1/s, so larger gives longer clauses.
        epochs: passes over the rows in :meth:`fit`.
        weighted: clauses learn whole-number weights.
        boost_true_positive: literals that are true where a clause fires step towards it always, not with (s - 1)/s.
        max_literals: clauses with more literals get none and shrink; None for no limit.
        negations: literals "is 0" beside "is 1".
        state_bits: of an automaton, 2 to 8; a literal is in the clause from the middle of its states on.
        clip: votes are cut off at ±T before the largest is chosen, as while learning. Classes beyond T then tie, and
            the first wins; False compares them as they are.
        shuffle: a new order of the rows each epoch.
        seed: of all random numbers, 0 to 2⁶⁴ - 1.

    Attributes:
        classes_: labels in sorted order.
        n_features_in_: bits of a row.
        epochs_: epochs learned.

    Source: Granmo 2018 (arXiv 1804.01508), weights of arXiv 1911.12607, budget of literals of arXiv 2301.08190.
    """

    _text_input = False

    def __init__(
        self,
        clauses: int = 200,
        threshold: int = 20,
        s: float = 5.0,
        *,
        epochs: int = 20,
        weighted: bool = False,
        boost_true_positive: bool = True,
        max_literals: int | None = None,
        negations: bool = True,
        state_bits: int = 8,
        clip: bool = True,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.clauses, self.threshold, self.s, self.epochs = clauses, threshold, s, epochs
        self.weighted, self.boost_true_positive, self.max_literals = weighted, boost_true_positive, max_literals
        self.negations, self.state_bits, self.clip = negations, state_bits, clip
        self.shuffle, self.seed = shuffle, seed
        self._bank: Any = None
        #: The parameters of what was fitted; those of the object may have been changed since.
        self._used: dict[str, Any] = {}

    @property
    def _fitted(self) -> bool:
        return self._bank is not None

    @property
    def epochs_(self) -> int:
        """Epochs learned; raises ArgumentError before :meth:`fit`."""
        self._check_fitted()
        return int(self._bank.epochs)

    def _options(self, classes: int, features: int) -> dict[str, Any]:
        for name in ("weighted", "boost_true_positive", "negations", "clip", "shuffle"):
            choice(getattr(self, name), name, (False, True))
        limit = self.max_literals
        return {
            "classes": classes,
            "features": features,
            "clauses": integer(self.clauses, "clauses", 2),
            "threshold": integer(self.threshold, "threshold", 1, 2**30),
            "s": positive(self.s, "s"),
            "boost": self.boost_true_positive,
            "negations": self.negations,
            "weighted": self.weighted,
            "max_literals": None if limit is None else integer(limit, "max_literals", 1),
            "state_bits": integer(self.state_bits, "state_bits", 2, 8),
            "shuffle": self.shuffle,
            "seed": integer(self.seed, "seed", 0, 2**64 - 1),
        }

    def _pack(self, x: Any, negations: bool) -> tuple[Any, int, int]:
        """Packed rows, how many, and their bits."""
        if isinstance(x, SparseRows) or hasattr(x, "tocsr"):
            rows = sparse_rows(x)
            bits = rows.data[(rows.data != 0) & (rows.data != 1)]
            if len(bits):
                raise DTypeError(f"x: expected values 0 and 1, got {bits[0]}")
            if not rows.data.all():
                return self._pack(rows.toarray(), negations)
            packed = _native.TsetlinRows.sparse(rows.indptr, rows.indices, rows.data, rows.shape[1], negations)
            return packed, rows.shape[0], rows.shape[1]
        dense = np.asarray(x.numpy() if hasattr(x, "numpy") else x)
        if dense.ndim != 2:
            raise ShapeError(f"x: expected rows of bits, two dimensions, got shape {dense.shape}")
        if dense.dtype.kind not in "biuf":
            raise DTypeError(f"x: expected booleans or 0 and 1, got dtype {dense.dtype}")
        if dense.dtype.kind != "b" and not ((dense == 0) | (dense == 1)).all():
            bad = dense[~((dense == 0) | (dense == 1))][0]
            raise DTypeError(f"x: expected values 0 and 1, got {bad}; compare with thresholds first")
        packed = _native.TsetlinRows.dense(np.ascontiguousarray(dense, dtype=np.uint8), negations)
        return packed, dense.shape[0], dense.shape[1]

    def fit(self: MachineT, x: Any, y: Any, *, progress: Callable[[int], object] | None = None) -> MachineT:
        """Learns from the start. Returns ``self``; on an error or Ctrl-C what was fitted before stays.

        Args:
            x: ``(n, features)`` of booleans or 0 and 1; an array, a scipy sparse matrix or :class:`SparseRows`.
            y: ``(n,)`` integers, booleans or strings.
            progress: called with the number of epochs done, now and then.

        Raises:
            DegenerateError: fewer than two classes. ShapeError, DTypeError: rows or labels that do not fit.
            ArgumentError: an option outside its domain.
        """
        rows, n, features = self._pack(x, choice(self.negations, "negations", (False, True)))
        classes, codes = encode_labels(y, n)
        bank = _native.TsetlinBank(self._options(len(classes), features))
        bank.learn(rows, codes, integer(self.epochs, "epochs", 1), progress)
        self._keep(bank, classes, features)
        return self

    def _keep(self, bank: Any, classes: Array, features: int) -> None:
        if bank is not self._bank:
            self._used = {name: getattr(self, name) for name in TsetlinMachine._names()}
        self._bank, self.classes_, self.n_features_in_ = bank, classes, features

    def partial_fit(
        self: MachineT,
        x: Any,
        y: Any,
        classes: Any = None,
        *,
        epochs: int = 1,
        progress: Callable[[int], object] | None = None,
    ) -> MachineT:
        """Learns for some more epochs; the first call begins. Returns ``self``.

        Args:
            x, y, progress: as in :meth:`fit`.
            classes: all labels, where ``y`` of the first call does not hold each.
            epochs: passes over these rows.

        Raises as :meth:`fit`; ArgumentError for a label that is none of the classes.
        """
        epochs, bank = integer(epochs, "epochs", 1), self._bank
        negations = choice(self.negations, "negations", (False, True)) if bank is None else self._used["negations"]
        rows, n, features = self._pack(x, negations)
        if bank is None:
            known = encode_labels(y if classes is None else classes, n if classes is None else len(classes))[0]
            bank = _native.TsetlinBank(self._options(len(known), features))
        else:
            known = self.classes_
        labels = label_array(y, n)
        codes = np.searchsorted(known, labels) % len(known)
        if bad := list(labels[known[codes] != labels][:1]):
            raise ArgumentError(f"y: expected labels among {known.tolist()}, got {bad[0]!r}")
        bank.learn(rows, codes.astype(np.uint32), epochs, progress)
        self._keep(bank, known, features)
        return self

    def decision_function(self, x: Any) -> Array:
        """Votes for each class, ``(n, classes)`` int64; within ±T where ``clip``.

        Raises:
            ArgumentError: not fitted. ShapeError, DTypeError: rows that do not fit.
        """
        self._check_fitted()
        rows, n, _ = self._pack(x, self._used["negations"])
        return np.asarray(self._bank.votes(rows, self.clip).reshape(n, -1))

    def predict(self, x: Any) -> Array:
        """The class with the most votes; of equal ones the first. Raises as :meth:`decision_function`."""
        best = self.decision_function(x).argmax(1)
        return np.asarray(self.classes_[best])

    def predict_proba(self, x: Any) -> Array:
        """Shares of the votes, ``(v + T) / Σ (v + T)`` with v clipped to ±T: ``(n, classes)`` float64.

        They rank and sum to 1; they are not calibrated. Where every class is at -T, all shares are equal.
        Raises as :meth:`decision_function`.
        """
        votes, most = self.decision_function(x), self._used["threshold"]
        votes = votes.clip(-most, most) + most
        total = votes.sum(1, keepdims=True)
        even = np.full(votes.shape, 1 / votes.shape[1])
        return np.asarray(np.divide(votes, total, out=even, where=total > 0))

    def rules(self, names: Sequence[str] | None = None) -> list[Rule]:
        """The clauses in words: by class, those with the largest weight first, then those with the fewest literals.

        Equal clauses of a class are one rule with their weights added; those that cancel out are left out.

        Args:
            names: of the features; ``x0``, ``x1``, … by default.

        Raises:
            ArgumentError: not fitted. ShapeError: not one name per feature.
        """
        self._check_fitted()
        n = self.n_features_in_
        names = [f"x{i}" for i in range(n)] if names is None else list(names)
        if len(names) != n:
            raise ShapeError(f"names: expected {n}, one per feature, got {len(names)}")
        found = [
            Rule(
                self.classes_[label].item(),
                weight,
                tuple(names[i] for i in literals if i < n),
                tuple(names[i - n] for i in literals if i >= n),
            )
            for label, weight, literals in self._bank.rules()
        ]
        order = {label: i for i, label in enumerate(self.classes_.tolist())}
        return sorted(found, key=lambda r: (order[r.label], -abs(r.weight), len(r.present) + len(r.absent)))

    def _state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        self._check_fitted()
        states, weights = self._bank.states()
        shape = (len(self.classes_), self._used["clauses"], -1)
        facts = {
            "params": self._used,
            "classes": classes_to_json(self.classes_),
            "features": self.n_features_in_,
            "epochs": self.epochs_,
        }
        return {"states": states.reshape(shape), "weights": weights.reshape(shape[:2])}, facts

    def _take(self, file: Any, facts: dict[str, Any]) -> None:
        classes, features = classes_from_json(facts["classes"]), int(facts["features"])
        options = self._options(len(classes), features)
        states, weights = file.get_tensor("states").ravel(), file.get_tensor("weights").ravel()
        bank = _native.TsetlinBank(options, states, weights, int(facts["epochs"]))
        self._keep(bank, classes, features)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with all states and weights, so that learning can go on. Complete or not at all.

        Raises:
            ArgumentError: not fitted, or the path cannot be written.
        """
        from safetensors.numpy import save

        arrays, facts = self._state()
        write_atomically(path, save(arrays, {_FORMAT: json.dumps(facts, default=plain)}))

    @classmethod
    def load(cls: type[MachineT], path: str | os.PathLike[str]) -> MachineT:
        """Reads what :meth:`save` wrote.

        Raises:
            ArgumentError: the file cannot be read or is no saved machine.
        """
        with reading(path, cls.__name__) as file:
            facts = json.loads((file.metadata() or {})[_FORMAT])
            out = cls(**facts["params"])
            out._take(file, facts)
        return out

    def _repr_html_(self) -> str:
        if not self._fitted:
            return f"<p>{html.escape(repr(self))}, not fitted</p>"
        return _rules_html(repr(self), self.rules())


def _rules_html(caption: str, rules: list[Rule], most: int = 20) -> str:
    cells = "".join(f"<tr><td>{html.escape(str(rule))}</td></tr>" for rule in rules[:most])
    return f"<table><caption>{html.escape(caption)}, {len(rules)} rules</caption>{cells}</table>"


class TsetlinTextClassifier(Classifier):
    """A Tsetlin Machine on which n-grams a text holds.

    N-grams are found as by :class:`TfidfVectorizer`; of them, those with the largest χ² are kept. The rules that
    :meth:`rules` prints are then conjunctions of n-grams that a text has and has not.

    Args:
        ngram_range, analyzer, token_pattern, lowercase, lookalikes, stop_words, min_df, max_df, decode_error: of
            :class:`TfidfVectorizer`.
        max_ngrams: n-grams kept, those that tell the classes apart most; None for all.
        clauses, threshold, s, epochs, weighted, boost_true_positive, max_literals, negations, state_bits, clip,
            shuffle, seed: of :class:`TsetlinMachine`.

    Attributes:
        classes_: labels in sorted order.
        vectorizer_: which n-grams.
        machine_: the :class:`TsetlinMachine`.

    Source: Berge et al. 2019 (arXiv 1809.04547), Tsetlin Machines on bags of words.
    """

    def __init__(
        self,
        clauses: int = 200,
        threshold: int = 20,
        s: float = 5.0,
        *,
        epochs: int = 20,
        weighted: bool = False,
        boost_true_positive: bool = True,
        max_literals: int | None = None,
        negations: bool = True,
        state_bits: int = 8,
        clip: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        ngram_range: tuple[int, int] = (1, 2),
        analyzer: Literal["word", "char", "char_wb"] = "word",
        token_pattern: str = r"(?u)\b\w\w+\b",
        lowercase: bool = True,
        lookalikes: bool = False,
        stop_words: Sequence[str] | None = None,
        min_df: int | float = 1,
        max_df: int | float = 1.0,
        max_ngrams: int | None = 5000,
        decode_error: Literal["strict", "replace", "ignore"] = "strict",
    ) -> None:
        self.clauses, self.threshold, self.s, self.epochs = clauses, threshold, s, epochs
        self.weighted, self.boost_true_positive, self.max_literals = weighted, boost_true_positive, max_literals
        self.negations, self.state_bits, self.clip = negations, state_bits, clip
        self.shuffle, self.seed = shuffle, seed
        self.ngram_range, self.analyzer, self.token_pattern = ngram_range, analyzer, token_pattern
        self.lowercase, self.lookalikes, self.stop_words = lowercase, lookalikes, stop_words
        self.min_df, self.max_df, self.max_ngrams = min_df, max_df, max_ngrams
        self.decode_error = decode_error
        self.vectorizer_: TfidfVectorizer | None = None
        self.machine_: TsetlinMachine | None = None

    @property
    def _fitted(self) -> bool:
        return self.machine_ is not None

    def _some(self, cls: type[Any]) -> dict[str, Any]:
        names = set(cls._names())
        return {name: value for name, value in self.get_params().items() if name in names}

    def fit(self, texts: Any, y: Any, *, progress: Callable[[int], object] | None = None) -> TsetlinTextClassifier:
        """Finds the n-grams and learns. Returns ``self``; on an error what was fitted before stays.

        Args:
            texts: list, array or column of str, or of UTF-8 bytes.
            y: a label per text: integers, booleans or strings.
            progress: called with the number of epochs done, now and then.

        Raises:
            DegenerateError: fewer than two classes, or no n-gram is left.
            ShapeError, DTypeError: labels that do not fit.
            ArgumentError: an option outside its domain, or text that is not UTF-8.
        """
        most = None if self.max_ngrams is None else integer(self.max_ngrams, "max_ngrams", 1)
        texts = texts if isinstance(texts, (str, bytes)) or not hasattr(texts, "tolist") else texts.tolist()
        vectorizer = TfidfVectorizer(**self._some(TfidfVectorizer), binary=True, use_idf=False, norm=None)
        texts = vectorizer._read(texts)
        classes, codes = encode_labels(y, len(texts))
        rows = vectorizer.fit_transform(texts)
        if most is not None and most < rows.shape[1]:
            best = np.sort(np.argsort(-chi2(rows, codes, len(classes)), kind="stable")[:most])
            vectorizer.keep(best)
            rows = rows.take(best)
        machine = TsetlinMachine(**self._some(TsetlinMachine)).fit(rows, y, progress=progress)
        self.vectorizer_, self.machine_, self.classes_ = vectorizer, machine, machine.classes_
        return self

    def _both(self, texts: Any) -> tuple[TsetlinMachine, SparseRows]:
        self._check_fitted()
        assert self.machine_ is not None
        assert self.vectorizer_ is not None
        return self.machine_, self.vectorizer_.transform(texts)

    def decision_function(self, texts: Any) -> Array:
        """Votes for each class, ``(n, classes)`` int64.

        Raises:
            ArgumentError: not fitted, or text that is not UTF-8. DTypeError: ``texts`` holds anything but text.
        """
        machine, rows = self._both(texts)
        return machine.decision_function(rows)

    def predict(self, texts: Any) -> Array:
        """The class with the most votes; of equal ones the first. Raises as :meth:`decision_function`."""
        machine, rows = self._both(texts)
        return machine.predict(rows)

    def predict_proba(self, texts: Any) -> Array:
        """Shares of the votes, see :meth:`TsetlinMachine.predict_proba`."""
        machine, rows = self._both(texts)
        return machine.predict_proba(rows)

    def rules(self) -> list[Rule]:
        """The clauses as conjunctions of n-grams, see :meth:`TsetlinMachine.rules`."""
        self._check_fitted()
        assert self.machine_ is not None
        assert self.vectorizer_ is not None
        return self.machine_.rules(self.vectorizer_._spelled())

    def explain(self, text: str) -> list[Rule]:
        """The rules that fire on one text, in the order of :meth:`rules`; their weights add up to the votes, unclipped.

        Raises as :meth:`decision_function`.
        """
        _, rows = self._both([text])
        assert self.vectorizer_ is not None
        spelled = self.vectorizer_._spelled()
        held = {spelled[i] for i in rows.indices}
        return [r for r in self.rules() if held.issuperset(r.present) and held.isdisjoint(r.absent)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with n-grams, states and weights. Complete or not at all; no pickle.

        Raises:
            ArgumentError: not fitted, or the path cannot be written.
        """
        from safetensors.numpy import save

        self._check_fitted()
        assert self.machine_ is not None
        assert self.vectorizer_ is not None
        arrays, machine = self.machine_._state()
        terms, vectorizer = self.vectorizer_._state()
        facts = {"params": self.get_params(), "machine": machine, "vectorizer": vectorizer}
        write_atomically(path, save({**arrays, **terms}, {_TEXT_FORMAT: json.dumps(facts, default=plain)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TsetlinTextClassifier:
        """Reads what :meth:`save` wrote.

        Raises:
            ArgumentError: the file cannot be read or is no saved classifier.
        """
        with reading(path, cls.__name__) as file:
            facts = json.loads((file.metadata() or {})[_TEXT_FORMAT])
            out = cls(**dict(facts["params"], ngram_range=tuple(facts["params"]["ngram_range"])))
            vectorizer = TfidfVectorizer._restore(file, facts["vectorizer"])
            machine = TsetlinMachine(**facts["machine"]["params"])
            machine._take(file, facts["machine"])
            if machine.n_features_in_ != len(vectorizer.df_):
                raise ValueError("features")
        out.vectorizer_, out.machine_, out.classes_ = vectorizer, machine, machine.classes_
        return out

    def _repr_html_(self) -> str:
        if not self._fitted:
            return f"<p>{html.escape(repr(self))}, not fitted</p>"
        return _rules_html(repr(self), self.rules())
