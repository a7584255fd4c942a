"""The Tsetlin Machine on data whose answer is known, and what its interface promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, cross_val_score

import abjure
from abjure.errors import ArgumentError, DegenerateError, DTypeError, ShapeError
from abjure.measure.text import Rule, TsetlinMachine, TsetlinTextClassifier
from abjure.measure.text.sparse import sparse_rows

REFUSED = ["I'm sorry, I cannot help with that", "Sorry, I cannot do this", "I cannot assist, sorry", "I cannot"]
COMPLIED = ["Sure, here is how", "Here are the steps", "Of course: first you take", "Sure, the steps are"]
TEXTS, LABELS = (REFUSED + COMPLIED) * 6, (["refused"] * 4 + ["complied"] * 4) * 6


def noisy_xor(n: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2, (n, 12)).astype(bool)
    return x, (x[:, 0] ^ x[:, 1] ^ (rng.random(n) < noise)).astype(int)


def xor_machine(**options: object) -> TsetlinMachine:
    return TsetlinMachine(10, 15, 3.9, boost_true_positive=False, **{"epochs": 30, **options})


def test_noisy_xor() -> None:
    (x, y), (held, truth) = noisy_xor(5000, 0.4, 1), noisy_xor(2000, 0, 2)
    machine = xor_machine().fit(x, y)
    assert machine.score(held, truth) > 0.97
    rules = machine.rules([f"bit {i}" for i in range(12)])
    # The two parities, and nothing of the ten bits that say nothing.
    for label in (0, 1):
        best = next(r for r in rules if r.label == label and r.weight > 0)
        assert set(best.present + best.absent) == {"bit 0", "bit 1"}
        assert len(best.present) % 2 == label
    assert str(Rule("a", -2, ("x",), ("y",))) == "if 'x' and not 'y': 2 against 'a'"


def test_rules_add_up_to_the_votes() -> None:
    x, y = noisy_xor(400, 0.2, 3)
    y = y + (x[:, 2] & x[:, 3])
    for weighted in (False, True):
        machine = TsetlinMachine(20, 10, 4.0, epochs=5, weighted=weighted, clip=False).fit(x, y)
        votes = np.zeros((len(x), 3), dtype=int)
        for rule in machine.rules():
            fires = np.ones(len(x), dtype=bool)
            for name in rule.present:
                fires &= x[:, int(name[1:])]
            for name in rule.absent:
                fires &= ~x[:, int(name[1:])]
            votes[:, rule.label] += rule.weight * fires
        assert np.array_equal(machine.decision_function(x), votes)
        assert np.array_equal(machine.predict(x), votes.argmax(1))
        clipped = machine.set_params(clip=True).decision_function(x)
        assert np.array_equal(clipped, votes.clip(-10, 10))
        shares = machine.predict_proba(x)
        np.testing.assert_allclose(shares.sum(1), 1)
        assert (shares >= 0).all()


def test_forms_of_rows_and_threads_change_nothing() -> None:
    x, y = noisy_xor(600, 0.1, 4)
    before = abjure.get_num_threads()
    seen = []
    try:
        for threads, rows in ((1, x), (3, x.astype(np.float32)), (2, csr_matrix(x)), (2, sparse_rows(x))):
            abjure.set_num_threads(threads)
            seen.append(xor_machine(epochs=4).fit(rows, y)._state()[0])
        with_zeros = csr_matrix(np.ones(x.shape))
        with_zeros.data[:] = x.ravel()
        seen.append(xor_machine(epochs=4).fit(with_zeros, y)._state()[0])
    finally:
        abjure.set_num_threads(before)
    for state in seen[1:]:
        assert all(np.array_equal(state[name], seen[0][name]) for name in state)
    other = xor_machine(epochs=4, seed=1).fit(x, y)._state()[0]
    assert not np.array_equal(other["states"], seen[0]["states"])


def test_learning_goes_on_after_a_file(tmp_path: Path) -> None:
    x, y = noisy_xor(300, 0.1, 5)
    labels = np.array(["even", "odd"])[y]
    path = tmp_path / "tm.safetensors"
    whole = xor_machine(epochs=5, weighted=True, max_literals=4).fit(x, labels)
    half = clone(whole).set_params(epochs=np.int64(2)).fit(x, labels)
    half.save(path)
    back = TsetlinMachine.load(path).partial_fit(x, labels, epochs=3)
    assert back.epochs_ == 5
    assert back.get_params() == {**whole.get_params(), "epochs": 2}
    assert all(np.array_equal(back._state()[0][k], v) for k, v in whole._state()[0].items())
    assert list(back.predict(x)) == list(whole.predict(x))
    begun = xor_machine().partial_fit(x[:1], labels[:1], classes=["even", "odd"])
    assert begun.partial_fit(x, labels).epochs_ == 2
    with pytest.raises(ArgumentError, match="neither"):
        begun.partial_fit(x[:1], ["neither"])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ArgumentError, match="not a saved TsetlinMachine"):
        TsetlinMachine.load(path)


def test_a_budget_keeps_clauses_short() -> None:
    x, y = load_digits(return_X_y=True)
    x = x > 7
    lengths = []
    for most in (None, 8):
        machine = TsetlinMachine(20, 10, 10.0, epochs=4, max_literals=most).fit(x, y)
        lengths.append(np.mean([len(r.present) + len(r.absent) for r in machine.rules()]))
        assert machine.score(x, y) > 0.5
    assert lengths[1] < 12 < lengths[0]


def test_texts(tmp_path: Path) -> None:
    model = TsetlinTextClassifier(20, 5, 3.0, epochs=20, max_ngrams=30).fit(TEXTS, LABELS)
    assert model.score(TEXTS, LABELS) == 1
    assert list(model.predict(["Sorry, but I cannot", "Sure, here are the steps"])) == ["refused", "complied"]
    rules = model.rules()
    words = {w for r in rules if r.label == "refused" and r.weight > 0 for w in r.present}
    assert words & {"cannot", "sorry"}
    text = "Sorry, but I cannot"
    fired = model.explain(text)
    votes = [sum(r.weight for r in fired if r.label == label) for label in model.classes_]
    model.machine_.set_params(clip=False)  # type: ignore[union-attr]
    assert votes == model.decision_function([text])[0].tolist()
    path = tmp_path / "t.safetensors"
    model.save(path)
    back = TsetlinTextClassifier.load(path)
    assert back.rules() == rules
    assert back.get_params() == model.get_params()
    assert np.array_equal(back.predict_proba(TEXTS), model.predict_proba(TEXTS))
    assert "rules" in model._repr_html_()
    back.machine_.save(path)  # type: ignore[union-attr]
    with pytest.raises(ArgumentError, match="not a saved TsetlinTextClassifier"):
        TsetlinTextClassifier.load(path)


def test_scikit_learn_takes_them_for_estimators() -> None:
    assert cross_val_score(TsetlinTextClassifier(20, 5, 3.0, epochs=10), TEXTS, LABELS, cv=2).mean() > 0.9
    x, y = load_digits(n_class=3, return_X_y=True)
    search = GridSearchCV(TsetlinMachine(20, 10, epochs=5), {"s": [2.0, 5.0]}, cv=2).fit(x > 7, y)
    assert search.best_score_ > 0.9
    assert repr(TsetlinMachine(10)) == "TsetlinMachine(clauses=10)"


def test_progress_is_told() -> None:
    x, y = noisy_xor(2000, 0.4, 1)
    seen: list[int] = []
    xor_machine(epochs=7).fit(x, y, progress=seen.append)
    assert seen[-1] == 7


def test_bad_input_is_named() -> None:
    x, y = np.eye(4, dtype=bool), [0, 0, 1, 1]
    cases: list[tuple[type[Exception], str, dict, object, object]] = [
        (DegenerateError, "two classes", {}, x, [1, 1, 1, 1]),
        (DegenerateError, "no labels", {}, x[:0], []),
        (ShapeError, "4 labels", {}, x, [0, 1]),
        (ShapeError, "two dimensions", {}, x[0], y),
        (ShapeError, "one bit", {}, x[:, :0], y),
        (DTypeError, "got 3", {}, 3 * x.astype(int), y),
        (DTypeError, "got 0.5", {}, 0.5 * x, y),
        (DTypeError, "got 2.0", {}, csr_matrix(2.0 * x), y),
        (DTypeError, "dtype", {}, x.astype(str), y),
        (ArgumentError, "clauses", {"clauses": 3}, x, y),
        (ArgumentError, "clauses", {"clauses": 0}, x, y),
        (ArgumentError, "threshold", {"threshold": 0}, x, y),
        (ArgumentError, "s:", {"s": 0.5}, x, y),
        (ArgumentError, "s:", {"s": "wide"}, x, y),
        (ArgumentError, "epochs", {"epochs": 0}, x, y),
        (ArgumentError, "max_literals", {"max_literals": 0}, x, y),
        (ArgumentError, "state_bits", {"state_bits": 1}, x, y),
        (ArgumentError, "seed", {"seed": -1}, x, y),
        (ArgumentError, "weighted", {"weighted": "yes"}, x, y),
    ]
    for error, message, options, rows, labels in cases:
        machine = TsetlinMachine(**options)
        with pytest.raises(error, match=message):
            machine.fit(rows, labels)
        with pytest.raises(ArgumentError, match="fit first"):
            machine.predict(x)
    fitted = TsetlinMachine(epochs=1).fit(x, y)
    with pytest.raises(ShapeError, match="4 bits"):
        fitted.predict(x[:, :3])
    with pytest.raises(ShapeError, match="names"):
        fitted.rules(["a"])
    with pytest.raises(DegenerateError):
        TsetlinTextClassifier().fit(["", "."], [0, 1])
    with pytest.raises(ArgumentError, match="max_ngrams"):
        TsetlinTextClassifier(max_ngrams=0).fit(TEXTS, LABELS)
