"""Refusal-aware splits and difficulty budgets: worked values, invariants, the published scripts' defects avoided."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from abjure import ArgumentError, DegenerateError, DTypeError, NonFiniteError
from abjure.measure import average_precision
from abjure.refuse import (
    answer_confidence,
    answer_entropy,
    certainty,
    difficulty_budgets,
    refusal_aware_split,
    sureness,
    verdict_tokens,
)

PARTITIONS = {
    (5,): 0.0,
    (4, 1): 0.5004024235381879,
    (3, 2): 0.6730116670092565,
    (3, 1, 1): 0.9502705392332347,
    (2, 2, 1): 1.0549201679861442,
    (2, 1, 1, 1): 1.3321790402101223,
    (1, 1, 1, 1, 1): 1.6094379124341005,
}


@pytest.mark.parametrize("counts", PARTITIONS)
def test_worked_entropies(counts):
    want = PARTITIONS[counts]
    assert answer_entropy(counts) == pytest.approx(want, abs=1e-15)
    answers = [f"answer {i}" for i, c in enumerate(counts) for _ in range(c)]
    assert answer_entropy(answers) == answer_entropy(counts) == answer_entropy([0, *reversed(counts)])


def test_equal_entropies_are_equal_bits():
    # 4^4 = (2^2)^4: two partitions of 8 that floating sums would tell apart or not, by chance.
    assert answer_entropy([4, 1, 1, 1, 1]) == answer_entropy([2, 2, 2, 2])
    assert answer_entropy(["Paris", "paris.", "the Paris"], "squad") == 0
    assert answer_entropy(["Paris", "paris"]) == pytest.approx(math.log(2))


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_entropy_equals_scipys_and_its_bounds(counts):
    found = answer_entropy(counts)
    assert found == pytest.approx(stats.entropy(counts), abs=1e-11)
    assert 0 <= found <= math.log(len(counts)) + 1e-12


def test_worked_scores():
    y = [1, 0, 1, 1, 0, 1, 0, 0]
    confidence = [0.92, 0.81, 0.77, 0.65, 0.60, 0.55, 0.43, 0.30]
    sure = [0.88, 0.35, 0.91, 0.55, 0.52, 0.35, 0.49, 0.10]
    assert average_precision(y, certainty(confidence, sure)) == pytest.approx(0.8928571428571428, abs=1e-15)
    assert average_precision(y, confidence) == pytest.approx(0.7708333333333333, abs=1e-15)
    assert answer_confidence([0.9, 0.8, 0.5]) == pytest.approx(0.7113786608980126, abs=1e-15)
    assert answer_confidence([0.9, 0.0]) == 0
    assert sureness(1.2, -0.3)[0] == pytest.approx(0.8175744761936437, abs=1e-15)
    np.testing.assert_array_equal(sureness([1000.0, -1000.0], [-1000.0, 1000.0]), [1, 0])


QUESTIONS = ["Capital of France?", "Capital of Peru?", "Author of Ulysses?", "Largest planet?"]
ANSWERS = ["Paris", "Lima", ["James Joyce", "Joyce"], "Jupiter"]


def test_known_by_prediction():
    said = [" It is Paris. And Lima", "cusco. Lima is", " It was Joyce", "jupiter"]
    split = refusal_aware_split(QUESTIONS, ANSWERS, said)
    # The third has no full stop: the published script would have cut the e of Joyce. The second names Lima too late.
    assert split.known.tolist() == [True, False, True, False]
    assert refusal_aware_split(QUESTIONS, ANSWERS, said, normalize="squad").known.tolist() == [True, False, True, True]
    assert refusal_aware_split(QUESTIONS, ANSWERS, said, stop=None).known.tolist() == [True, True, True, False]
    assert (split.known_indices, split.unknown_indices) == ([0, 2], [1, 3])


def test_match_options():
    def known(prediction, answer, **options):
        return bool(refusal_aware_split(["q"], [answer], [prediction], **options).known[0])

    assert known("Parisian cafés", "Paris")
    assert not known("Parisian cafés", "Paris", match="words")
    assert known("in the city of Paris", "city of Paris", match="words")
    assert not known("in Paris", "Paris", match="exact")
    assert known(" paris ", "The Paris", match="exact", normalize="squad")
    assert known("STRASSE", "straße", normalize="casefold")
    assert not known("the U.S. of A", "U.S.")
    assert known("the U.S. of A", "U.S.", stop=None)


def test_unsure_and_unknown_templates():
    split = refusal_aware_split(QUESTIONS, [*ANSWERS[:3], "Jupiter."], ["Paris", "x", "Joyce", "x"])
    rows = split.rows()
    assert rows[0] == {
        "prompt": "Question: Capital of France? Answer:",
        "completion": " Paris. Are you sure you accurately answered the question based on your internal knowledge? "
        "I am sure.",
    }
    assert rows[3]["completion"].startswith(" Jupiter. Are")
    assert [r["completion"].endswith("I am unsure.") for r in rows] == [False, True, False, True]
    for verdict, text, row in zip(split.rows(form="verdict"), split.rows(form="text"), rows, strict=True):
        assert verdict["prompt"] + verdict["completion"] == text["text"] == row["prompt"] + row["completion"]
        assert verdict["completion"] in (" I am sure.", " I am unsure.")
    unknown = split.rows("unknown")
    assert unknown[0]["completion"] == " Paris"
    assert "Lima" not in unknown[1]["completion"]
    assert unknown == split.rows("unknown")
    many = refusal_aware_split(["q"] * 400, ["a"] * 400, ["x"] * 400)
    drawn = [r["completion"] for r in many.rows("unknown", seed=3)]
    assert len(set(drawn)) == 16
    assert drawn != [r["completion"] for r in many.rows("unknown", seed=4)]
    # A row's sentence depends on its index alone.
    fewer = refusal_aware_split(["q"] * 9, ["a"] * 9, ["x"] * 9).rows("unknown", seed=3)
    assert drawn[:9] == [r["completion"] for r in fewer]


def _samples(partition):
    return [f"a{i}" for i, c in enumerate(partition) for _ in range(c)]


def test_split_by_entropy_keeps_every_question():
    parts = [(3, 2), (5,), (1, 1, 1, 1, 1), (4, 1), (2, 2, 1)]
    split = refusal_aware_split(["q"] * 5, ["a"] * 5, samples=[_samples(p) for p in parts])
    # floor(5 / 2) are sure; the published script forgets all but the last question.
    assert len(split) == 5
    assert split.known.tolist() == [False, True, False, True, False]
    np.testing.assert_allclose(split.entropy, [PARTITIONS[p] for p in parts], atol=1e-15)
    assert split.tied == 0


def test_ties_stay_in_order_or_together():
    parts = [(4, 1), (5,), (4, 1), (1, 4), (3, 2), (2, 3)]
    kwargs = {"samples": [_samples(p) for p in parts]}
    stable = refusal_aware_split(["q"] * 6, ["a"] * 6, **kwargs)
    assert stable.known.tolist() == [True, True, True, False, False, False]
    assert stable.tied == 3
    together = refusal_aware_split(["q"] * 6, ["a"] * 6, ties="together", **kwargs)
    assert together.known.tolist() == [True, True, True, True, False, False]
    same = {"samples": [["a", "b"]] * 4, "ties": "together"}
    with pytest.raises(DegenerateError, match="same entropy"):
        refusal_aware_split(["q"] * 4, ["a"] * 4, **same)


@given(st.lists(st.sampled_from(list(PARTITIONS)), min_size=2, max_size=30))
@settings(deadline=None, max_examples=60)
def test_halves_and_order(parts):
    n, samples = len(parts), [_samples(p) for p in parts]
    split = refusal_aware_split(["q"] * n, ["a"] * n, samples=samples)
    assert split.known.sum() == n // 2
    assert split.entropy[split.known].max() <= split.entropy[~split.known].min()
    if len(set(parts)) > 1:
        together = refusal_aware_split(["q"] * n, ["a"] * n, samples=samples, ties="together")
        assert together.entropy[together.known].max() < together.entropy[~together.known].min()
        # No other cut between different values is nearer to the middle.
        cuts = [int((split.entropy <= e).sum()) for e in set(split.entropy)]
        best = min(abs(c - n // 2) for c in cuts if c < n)
        assert abs(int(together.known.sum()) - n // 2) == best


def test_shown():
    split = refusal_aware_split(["<b>"] * 2, ["a"] * 2, samples=[["a"], ["a", "b"]])
    assert "&lt;b&gt;" in split._repr_html_()
    assert repr(split) == "RefusalAwareSplit(1 known, 1 unknown)"
    assert len(split.plot().patches) == 40
    assert refusal_aware_split(["q"], ["a"], ["a"]).plot().get_ylabel() == "questions"


def test_verdict_tokens_differ_or_are_refused():
    def pieces(table):
        return lambda word, add_special_tokens: {"input_ids": table[word]}

    assert verdict_tokens(pieces({" sure": [7], " unsure": [8, 7]})) == (7, 8)
    with pytest.raises(ArgumentError, match="token 9"):
        verdict_tokens(pieces({" sure": [9, 1], " unsure": [9, 2]}))


FAIL = [0, 0.25, 0.5, 0.75, 0.9, 1]


def test_worked_budgets():
    found = difficulty_budgets(FAIL, 8, max_trials=64)
    np.testing.assert_allclose(found.raw, [0, 2, 4, 6, 7.2, 8], atol=1e-12)
    assert found.wanted.tolist() == [1, 2, 4, 6, 7, 8]
    np.testing.assert_allclose(found.expected_trials, [1, 8 / 3, 8, 24, 70, math.inf], rtol=1e-12)
    want = [1, 1, 0.9999999999999977, 0.9995861789412959, 0.4609611564716896, 0]
    np.testing.assert_allclose(found.p_filled, want, rtol=1e-12)
    assert found.impossible == [5]
    assert found.expected_unfilled == pytest.approx(6 - sum(want), abs=1e-12)
    uniform = difficulty_budgets(FAIL, 3, "uniform")
    assert uniform.wanted.tolist() == [3] * 6
    assert uniform.p_filled.tolist() == [1, 1, 1, 1, 1, 0]
    assert difficulty_budgets([0, 0], 8).wanted.tolist() == [1, 1]
    assert difficulty_budgets([0.3, 0.5, 1], 5).wanted.tolist() == [2, 3, 5]  # halves go up


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(1, 40), st.integers(1, 200))
@settings(deadline=None, max_examples=60)
def test_budgets_grow_with_difficulty(rates, k, limit):
    found = difficulty_budgets(rates, k, max_trials=limit)
    order = np.argsort(rates, kind="stable")
    assert all(a <= b for a, b in pairwise(found.wanted[order]))
    assert found.wanted.max() == (k if max(rates) > 0 else 1)
    assert found.wanted.min() >= 1
    want = stats.binom.sf(found.wanted - 1, limit, 1 - np.array(rates))
    np.testing.assert_allclose(found.p_filled, want, rtol=1e-8, atol=1e-12)


def test_simulated_sampling_meets_what_was_predicted():
    rng = np.random.default_rng(0)
    found = difficulty_budgets([0.5, 0.8, 0.95, 1.0], 6, max_trials=40)
    hits = np.array([[rng.binomial(40, 1 - d) for d in found.difficulty] for _ in range(4000)])
    share = (hits >= found.wanted).mean(0)
    np.testing.assert_allclose(share, found.p_filled, atol=0.03)
    assert found.status([3, 5, 0, 0], [4, 30, 40, 40]) == ["filled", "filled", "exhausted", "exhausted"]
    assert found.status([3, 4, 0, 0], [4, 30, 12, 40], "published") == ["open", "open", "open", "exhausted"]
    assert found.unfilled([9, 2, 0, 0]).tolist() == [0, 3, 6, 6]
    assert "1 impossible" in found._repr_html_()
    assert found.plot().get_yscale() == "log"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: answer_entropy([]), ArgumentError, "answers"),
        (lambda: answer_entropy([0, 0]), ArgumentError, "counts"),
        (lambda: answer_entropy([0.5]), DTypeError, "answers"),
        (lambda: answer_entropy(["a", "b"], "lower"), ArgumentError, "normalize"),
        (lambda: answer_confidence([1.5]), ArgumentError, "probabilities"),
        (lambda: certainty([0.5], [2.0]), ArgumentError, "sure"),
        (lambda: certainty([0.5], [math.nan]), NonFiniteError, "sure"),
        (lambda: refusal_aware_split([], []), ArgumentError, "questions"),
        (lambda: refusal_aware_split(["q"], ["a"]), ArgumentError, "one of the two"),
        (lambda: refusal_aware_split(["q"], ["a"], ["x"], samples=[["x"]]), ArgumentError, "one of the two"),
        (lambda: refusal_aware_split(["q"], [" "], ["x"]), ArgumentError, "index 0"),
        (lambda: refusal_aware_split(["q"], ["The"], ["x"], normalize="squad"), ArgumentError, "normalised"),
        (lambda: refusal_aware_split(["q"], ["a"], ["x", "y"]), ArgumentError, "predictions"),
        (lambda: refusal_aware_split(["q"], ["a"], samples=[[]]), ArgumentError, "index 0"),
        (lambda: refusal_aware_split("q", ["a"], ["x"]), DTypeError, "questions"),
        (lambda: refusal_aware_split(["q"], ["a"], ["x"], match="fuzzy"), ArgumentError, "match"),
        (lambda: refusal_aware_split(["q"], ["a"], ["x"], ties="random"), ArgumentError, "ties"),
        (lambda: refusal_aware_split(["q"], ["a"], ["x"]).rows("both"), ArgumentError, "template"),
        (lambda: refusal_aware_split(["q"], ["a"], ["x"]).rows("unknown", form="verdict"), ArgumentError, "form"),
        (lambda: difficulty_budgets([1.2], 3), ArgumentError, "fail_rates"),
        (lambda: difficulty_budgets([0.5], 0), ArgumentError, "k"),
        (lambda: difficulty_budgets([0.5], 2.5), DTypeError, "k"),
        (lambda: difficulty_budgets([0.5], 2, "linear"), ArgumentError, "scheme"),
        (lambda: difficulty_budgets([0.5], 2, max_trials=0), ArgumentError, "max_trials"),
        (lambda: difficulty_budgets([0.5], 2).status([3], [2]), ArgumentError, "correct"),
        (lambda: difficulty_budgets([0.5], 2).unfilled([3, 2]), ArgumentError, "correct"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
