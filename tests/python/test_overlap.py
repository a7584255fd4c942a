"""ROUGE-L and exact match against the published examples and a plain table."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abjure import ArgumentError, DegenerateError, DTypeError, ShapeError
from abjure.measure import exact_match, rouge_l
from abjure.measure.quality import rouge_l_recall

REFERENCE = "police killed the gunman"


def test_published_examples():
    found = rouge_l(["police kill the gunman", "the gunman police killed"], [REFERENCE] * 2)
    assert found.f1.tolist() == [0.75, 0.5]
    assert found.precision.tolist() == found.recall.tolist() == [0.75, 0.5]
    assert "mean f1=0.6250" in repr(found)
    assert rouge_l_recall("The gunman, the POLICE killed!", REFERENCE) == 0.5


def plain(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = table[i - 1, j - 1] + 1 if x == y else max(table[i - 1, j], table[i, j - 1])
    return table[-1, -1]


@given(st.text("ab C1-é", max_size=200), st.text("ab c1.\n", min_size=1, max_size=200))
@settings(max_examples=60, deadline=None)
def test_equals_a_plain_table(a, b):
    words = [re.findall("[a-z0-9]+", t.lower()) for t in (a, b)]
    if not words[1]:
        with pytest.raises(DegenerateError):
            rouge_l(a, b)
        return
    found = rouge_l(a, b)
    assert found.common[0] == plain(*words)
    assert (found.candidate[0], found.reference[0]) == tuple(map(len, words))


def test_other_scripts():
    pair = ["я не могу"], ["я могу"]
    with pytest.raises(DegenerateError, match="rouge_score"):
        rouge_l(*pair)
    assert rouge_l(*pair, tokenizer="unicode").f1[0] == pytest.approx(0.8)
    assert rouge_l("できません", "できません。", tokenizer="unicode").f1[0] == 1
    mixed = rouge_l(["", "a b"], ["a", "!"])
    assert mixed.f1.tolist() == [0, 0]


def test_exact_match():
    found = exact_match(["The  Cat!", "a dog", "Paris", "x"], ["cat", "the dog", ["Lyon", "paris"], ["y"]])
    assert found.tolist() == [True, True, True, False]
    assert exact_match("The cat", "cat").tolist() == [True]
    assert exact_match(["The cat"], ["cat"], normal="none").tolist() == [False]
    # Articles are words, not letters.
    assert exact_match("theatre", "atre").tolist() == [False]


def test_refusals():
    with pytest.raises(ShapeError, match="references: expected 2"):
        rouge_l(["a", "b"], ["a"])
    with pytest.raises(ShapeError, match="candidates"):
        rouge_l([], [])
    with pytest.raises(DTypeError, match="index 1"):
        rouge_l(["a", None], ["a", "b"])
    with pytest.raises(ArgumentError, match="tokenizer"):
        rouge_l("a", "a", tokenizer="bert")
    with pytest.raises(ShapeError, match="references"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(ShapeError, match=r"references\[0\]"):
        exact_match(["a"], [[]])
    with pytest.raises(ArgumentError, match="normal"):
        exact_match("a", "a", normal="fuzzy")
