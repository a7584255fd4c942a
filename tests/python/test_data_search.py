"""Search for over-refusals, coupled estimation of missed positives, and the Chain-of-Note format."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abjure import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.measure import Rate
from abjure.refuse import (
    chain_of_note_row,
    chain_of_note_scores,
    coupled_estimate,
    parse_chain_of_note,
    search_over_refusals,
)

ALARMING = {"kill", "shoot", "attack", "destroy"}
HARMFUL = {"bomb", "poison"}
WORDS = sorted(ALARMING | HARMFUL | {"photo", "process", "garden", "time", "paint", "story", "a", "the"})


def mutate(x, rng):
    words = x.split()
    words[int(rng.integers(len(words)))] = WORDS[int(rng.integers(len(WORDS)))]
    return " ".join(words)


def recombine(a, b, rng):
    at = int(rng.integers(1, 4))
    return " ".join(a.split()[:at] + b.split()[at:])


def refuses(x):
    return float(sum(w in ALARMING for w in x.split()))


def harmless(x):
    return not HARMFUL & set(x.split())


SEARCH = {
    "mutate": mutate,
    "recombine": recombine,
    "fitness": refuses,
    "admissible": harmless,
    "temperature": 0.5,
    "cooling": 0.02,
    "final_temperature": 0.05,
    "progress": False,
}
FIRST = ["the garden a time", "a photo the story", "the paint the process", "a story the garden"]


def test_search_finds_alarming_words_and_stays_harmless():
    seen = []
    found = search_over_refusals(FIRST, **{**SEARCH, "fitness": lambda x: seen.append(x) or refuses(x)}, generations=80)
    assert found.best[1] == 4
    assert all(harmless(x) for x in seen)
    assert len(seen) == len(set(seen)) == len(found.found)
    assert found.inadmissible > 0
    assert found.proposed == 80 * 4
    assert found.best_by_generation == sorted(found.best_by_generation)
    assert len(found.best_by_generation) == 81
    assert [v for _, v in found.found] == sorted((v for _, v in found.found), reverse=True)
    assert found.fitness == [refuses(x) for x in found.population]
    assert "best 4 after 80" in repr(found)
    assert "<td>4</td>" in found._repr_html_()
    assert found.plot().get_xlabel() == "generation"


def test_search_depends_on_the_seed_alone():
    whole = search_over_refusals(FIRST, **SEARCH, generations=30, seed=4)
    half = search_over_refusals(FIRST, **SEARCH, generations=13, seed=4)
    rest = search_over_refusals(**SEARCH, generations=17, resume=half)
    with ThreadPoolExecutor(3) as pool:
        threads = search_over_refusals(FIRST, **SEARCH, generations=30, seed=4, map=pool.map)
    for other in (rest, threads):
        assert other.population == whole.population
        assert other.found == whole.found
        assert (other.proposed, other.inadmissible, other.accepted) == (120, whole.inadmissible, whole.accepted)
        assert other.best_by_generation == whole.best_by_generation
    assert search_over_refusals(FIRST, **SEARCH, generations=30, seed=5).found != whole.found


def test_worse_children_are_taken_as_often_as_the_temperature_says():
    # Fitness falls by 1 with every step of a walk; at T = 2 a step is taken with probability exp(−1/2).
    options = {
        "mutate": lambda x, rng: (x[0] + 1, x[1]),
        "recombine": lambda a, b, rng: a,
        "fitness": lambda x: -float(x[0]),
        "admissible": lambda x: True,
        "temperature": 2.0,
        "cooling": 0.0,
        "final_temperature": 2.0,
        "progress": False,
    }
    found = search_over_refusals([(0, i) for i in range(40)], **options, generations=50)
    p = math.exp(-0.5)
    assert found.accepted / 2000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 2000))
    cold = search_over_refusals([(0, 0), (0, 1)], **{**options, "temperature": 1e-6, "final_temperature": 1e-6})
    assert cold.accepted == 0


def pool(n, seed, alone=True):
    """Items whose selection depends on their relevance's feature and, if `alone`, on one of its own."""
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=n), rng.normal(size=n)
    r = 1 / (1 + np.exp(-(-0.5 + 1.5 * x)))
    s = 1 / (1 + np.exp(-(0.2 + 0.8 * x + (1.6 * w if alone else 0))))
    relevant = rng.random(n) < r
    labels = relevant & (rng.random(n) < s)
    return x[:, None], np.column_stack([x, w]) if alone else x[:, None], r, s, relevant, labels


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_missed_positives_are_counted(seed):
    # As many items as make the count stable: with 6000 it is off by up to a fifth, which the docstring says.
    x, z, r, s, relevant, labels = pool(20000, seed)
    found = coupled_estimate(labels, x, z)
    missed = int((relevant & ~labels).sum())
    assert found.converged
    # Taking labels for the truth would count none of them.
    assert found.false_negatives == pytest.approx(missed, rel=0.15)
    assert np.abs(found.relevance - r).mean() < 0.05
    assert np.abs(found.selection - s).mean() < 0.08
    hidden = ~labels
    assert found.posterior[relevant & hidden].mean() > found.posterior[~relevant & hidden].mean() + 0.15
    # Labelled items, weighted, stand for all relevant ones.
    assert found.positive_weights.sum() == pytest.approx(relevant.sum(), rel=0.15)
    weights = (1 - found.relevance) / (1 - found.relevance * found.selection)
    np.testing.assert_allclose(found.negative_weights[hidden], weights[hidden], rtol=1e-9)
    assert (found.negative_weights[labels] == 0).all()
    assert "expected false negatives" in found._repr_html_()
    assert found.plot().get_ylabel() == "items"


def test_an_audit_tells_relevance_and_selection_apart():
    x, z, r, _, relevant, labels = pool(4000, 1, alone=False)
    with pytest.raises(DegenerateError, match="told apart"):
        coupled_estimate(labels, x, z)
    audited = np.full(4000, np.nan)
    examined = np.random.default_rng(2).choice(np.flatnonzero(~labels), 300, replace=False)
    audited[examined] = relevant[examined]
    found = coupled_estimate(labels, x, z, audited=audited)
    assert np.abs(found.relevance - r).mean() < 0.05
    assert found.false_negatives == pytest.approx((relevant & ~labels).sum(), rel=0.15)
    np.testing.assert_array_equal(found.posterior[examined], relevant[examined])
    one = np.full(4000, np.nan)
    one[examined[0]] = relevant[examined[0]]
    with pytest.raises(DegenerateError, match="both outcomes"):
        coupled_estimate(labels, x, z, audited=one)
    # Another unit of the same feature tells nothing.
    with pytest.raises(DegenerateError, match="told apart"):
        coupled_estimate(labels, x, 1e6 * x + 3)


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=8)
def test_the_penalised_likelihood_never_falls(seed):
    x, z, _, _, _, labels = pool(150, seed)
    found = coupled_estimate(labels, x, z, penalty=1e-9, rounds=40)
    assert np.diff(found.log_likelihood).min() > -1e-6
    for p in (found.relevance, found.selection, found.posterior):
        assert ((p >= 0) & (p <= 1)).all()


def test_notes_go_there_and_back():
    row = chain_of_note_row("Who?", ["Joyce wrote it.", "It rained."], ["It says Joyce.", "Beside the point."], "Joyce")
    assert "Document 2: It rained." in row["prompt"]
    assert row["prompt"].count("Who?") == 1
    assert "Joyce\n" not in row["prompt"]
    assert parse_chain_of_note(row["completion"]) == (["It says Joyce.", "Beside the point."], "Joyce")
    none = chain_of_note_row("Who?", ["It rained."], ["Beside the point."], None)
    assert parse_chain_of_note(none["completion"])[1] == "unknown"
    assert parse_chain_of_note("Note 1: a\nb\nfinal answer: x y\n\nThat is all.") == (["a\nb"], "x y")
    assert parse_chain_of_note("No notes at all.") == ([], None)


def test_worked_scores():
    said = ["Answer: The Paris.", "Answer: Lima", "Answer: unknown", "Answer: Unknown.", "Answer: Oslo", "Paris"]
    found = chain_of_note_scores(said, ["Paris", ["Quito", "lima"], "Rome", None, None, "Paris"])
    assert found.exact_match == Rate(2, 4)
    assert found.rejection == Rate(1, 2)
    assert found.over_rejection == Rate(1, 4)
    assert found.unmarked == 1
    assert "<td>rejection rate (unanswerable)</td><td>1</td><td>2</td>" in found._repr_html_()
    assert math.isnan(chain_of_note_scores(["Answer: x"], ["x"]).rejection.rate)


NAN = math.nan
X = np.arange(4.0)[:, None]
Z = np.array([[0.0, 1], [1, 0], [2, 2], [3, 1]])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: search_over_refusals(["a b c d"], **SEARCH), ArgumentError, "two"),
        (lambda: search_over_refusals(["a b c d", "bomb a b c"], **SEARCH), DegenerateError, "individual 1"),
        (lambda: search_over_refusals(FIRST, **SEARCH, crossover=2), ArgumentError, "crossover"),
        (lambda: search_over_refusals(FIRST, **{**SEARCH, "temperature": 0.01}), ArgumentError, "temperature"),
        (lambda: search_over_refusals(FIRST, **{**SEARCH, "fitness": lambda x: NAN}), NonFiniteError, "fitness"),
        (lambda: search_over_refusals([["a"], ["b"]], **{**SEARCH, "admissible": bool}), DTypeError, "hashed"),
        (lambda: coupled_estimate([0, 1, 2, 0], X, Z), ArgumentError, "labels"),
        (lambda: coupled_estimate([0, 0, 0, 0], X, Z), DegenerateError, "labels"),
        (lambda: coupled_estimate([0, 1, 1, 0], X[:3], Z), ShapeError, "relevance_features"),
        (lambda: coupled_estimate([0, 1, 1, 0], X, X), DegenerateError, "told apart"),
        (lambda: coupled_estimate([0, 1, 1, 0], X, Z, clip=0), ArgumentError, "clip"),
        (lambda: coupled_estimate([0, 1, 1, 0], X, Z, audited=[0, 0, NAN, 1]), ArgumentError, "item 1"),
        (lambda: coupled_estimate([0, 1, 1, 0], X, Z, audited=[0, 2, NAN, 1]), ArgumentError, "audited"),
        (lambda: coupled_estimate([0, 1, 1, 0], X, Z, audited=[0]), ShapeError, "audited"),
        (lambda: chain_of_note_row("q", ["d"], [], "a"), ShapeError, "notes"),
        (lambda: chain_of_note_row("q", [], [], "a"), ArgumentError, "documents"),
        (lambda: chain_of_note_row("q", ["d"], [" "], "a"), ArgumentError, "notes"),
        (lambda: chain_of_note_row("q", ["d"], ["x\nAnswer: y"], "a"), ArgumentError, "Answer"),
        (lambda: chain_of_note_row(3, ["d"], ["n"], "a"), DTypeError, "question"),
        (lambda: chain_of_note_scores([], []), ArgumentError, "answers"),
        (lambda: chain_of_note_scores(["a"], ["a", "b"]), ArgumentError, "answers"),
        (lambda: chain_of_note_scores(["x"], ["x"], unknown="the"), ArgumentError, "unknown"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
