"""The phrase automaton against its definition, transformers' processors and the reference vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoBadWordsLogitsProcessor

import abjure
from abjure.errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.integrations.torch import DEVICE_PATHS
from abjure.refuse import ForbiddenPhrases

INF = math.inf
PHRASES = [[5, 7, 9, 4], [7, 9, 2], [3], [9, 9]]


def definition(phrases: list[list[int]], context: list[int], penalty: float | None, gamma: float) -> dict[int, float]:
    found: dict[int, float] = {}
    for p in phrases:
        for m in range(len(p)):
            if list(context[len(context) - m :]) != list(p[:m]) or m > len(context):
                continue
            if m == len(p) - 1:
                value = -INF
            elif penalty is not None and m > 0:
                value = -penalty * (m / len(p)) ** gamma
            else:
                continue
            found[p[m]] = min(value, found.get(p[m], INF))
    return found


def test_reference_vector():
    soft = ForbiddenPhrases(PHRASES, mode="prefix", penalty=4.0)
    hard = ForbiddenPhrases(PHRASES)
    steps = [
        {},
        {},
        {7: -1.0},
        {9: -2.0},
        {2: -INF, 4: -INF, 9: -INF},
        {9: -INF},
        {9: -4 / 3},
        {2: -INF, 9: -INF},
        {7: -1.0},
    ]
    context = [1, 5, 7, 9, 9, 7, 9, 5]
    for n, expected in enumerate(steps):
        assert soft.after(context[:n]) == {**expected, 3: -INF}
        assert hard.after(context[:n]) == {t: v for t, v in {**expected, 3: -INF}.items() if v == -INF}


token = st.integers(0, 5)
phrase_lists = st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=12, unique_by=tuple)


@given(phrase_lists, st.lists(token, max_size=10), st.sampled_from([None, 0.0, 2.5]), st.sampled_from([0.0, 1.0, 2.0]))
@settings(max_examples=200, deadline=None)
def test_equals_the_definition(phrases, context, penalty, gamma):
    options = {} if penalty is None else {"mode": "prefix", "penalty": penalty, "gamma": gamma}
    assert ForbiddenPhrases(phrases, **options).after(context) == pytest.approx(
        definition(phrases, context, penalty, gamma)
    )


@given(
    phrase_lists,
    st.integers(0, 2**32),
    st.integers(1, 6),
    st.integers(0, 12),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_equals_transformers(phrases, seed, rows, length, dtype, strided):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (rows, length), generator=g)
    whole = torch.randn(rows, 16, generator=g).to(dtype)
    z = whole[:, 2:10] if strided else whole[:, :8].contiguous()
    expected = NoBadWordsLogitsProcessor(phrases)(ids, z.clone())
    untouched = whole[:, 10:].clone()
    processor = ForbiddenPhrases(phrases, 8, scope="all")
    other = z.clone()
    assert processor(ids, z) is z
    assert torch.equal(z, expected.to(dtype))
    assert torch.equal(whole[:, 10:], untouched)
    automaton = processor._automaton
    context = ids.numpy().reshape(-1)
    DEVICE_PATHS["forbid_"](other, *automaton.edits(context, np.zeros(rows, dtype=np.int64)), None)
    assert torch.equal(other, z)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_penalties_are_added_in_place(dtype):
    z = np.linspace(-2, 2, 20).reshape(2, 10).astype(dtype)
    expected = z.copy()
    for token_id, value in {9: -2.0, 3: -INF}.items():
        expected[0, token_id] = (expected[0, token_id].astype(np.float64) + value).astype(dtype)
    expected[1, 3] = -INF
    processor = ForbiddenPhrases(PHRASES, mode="prefix", penalty=4.0, prompt_length=0)
    assert processor(np.array([[1, 5, 7], [1, 1, 1]]), z) is z
    assert np.array_equal(z, expected)


def test_scope_prompt_border_and_padding():
    def forbidden(processor, ids):
        z = np.zeros((1, 10))
        processor(np.array([ids]), z)
        return np.flatnonzero(np.isneginf(z[0])).tolist()

    for scope, at_border in (("output", []), ("all", [2])):
        processor = ForbiddenPhrases([[7, 9, 2]], scope=scope)
        assert forbidden(processor, [1, 7, 9]) == at_border
        assert forbidden(processor, [1, 7, 9, 7]) == []
        assert forbidden(processor, [1, 7, 9, 7, 9]) == [2]
    # A phrase that begins with the padding id is matched in the text, never across the padding.
    padded = ForbiddenPhrases([[0, 0, 4]], scope="all", pad_token_id=0)
    assert forbidden(padded, [0, 0]) == []
    assert forbidden(padded, [0, 0, 0]) == []
    assert forbidden(padded, [0, 5, 0, 0]) == [4]
    assert forbidden(padded, [5, 0, 0]) == [4]
    assert forbidden(ForbiddenPhrases([[0, 0, 4]], scope="all"), [0, 0, 0]) == [4]


def test_per_row_prompt_lengths():
    processor = ForbiddenPhrases([[7, 9]], prompt_length=[1, 2])
    z = np.zeros((2, 10))
    processor(np.array([[7, 7], [7, 7]]), z)
    assert np.isneginf(z).tolist() == [[i == 9 for i in range(10)], [False] * 10]


def test_rows_may_be_permuted_and_joined_at_every_step():
    rng = np.random.default_rng(0)
    phrases = [list(map(int, p)) for p in {tuple(rng.integers(0, 4, rng.integers(1, 5))) for _ in range(6)}]
    processor = ForbiddenPhrases(phrases, scope="all")
    context = rng.integers(0, 5, (4, 3))
    for _ in range(30):
        context = context[rng.integers(0, 4, rng.integers(1, 7)) % len(context)]
        context = np.concatenate([context, rng.integers(0, 5, (len(context), 1))], axis=1)
        z = np.zeros((len(context), 8), dtype=np.float32)
        processor(context, z)
        for row, ids in zip(z, context.tolist(), strict=True):
            assert set(np.flatnonzero(np.isneginf(row))) == set(definition(phrases, ids, None, 1.0))


def test_same_bits_for_any_thread_count():
    rng = np.random.default_rng(1)
    phrases = [list(map(int, p)) for p in {tuple(rng.integers(0, 5000, rng.integers(1, 4))) for _ in range(3000)}]
    ids, z = rng.integers(0, 5000, (64, 8)), rng.normal(size=(64, 5000)).astype(np.float32)
    before, seen = abjure.get_num_threads(), []
    try:
        for threads in (1, 4):
            abjure.set_num_threads(threads)
            seen.append(ForbiddenPhrases(phrases, scope="all")(ids, z.copy()).tobytes())
    finally:
        abjure.set_num_threads(before)
    assert seen[0] == seen[1]


def test_dead_ends():
    phrases, ids = [[0], [1], [2, 2]], torch.tensor([[2], [1]])
    start = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    z = start.clone()
    with pytest.raises(DegenerateError, match="row 0"):
        ForbiddenPhrases(phrases, scope="all")(ids, z)
    assert torch.equal(z, start)
    expected = [[-INF, 2, -INF], [-INF, -INF, 6]]
    ending = ForbiddenPhrases([*phrases, [1, 1]], scope="all", eos_token_id=[3, 4], dead_end="eos")
    with pytest.raises(ArgumentError, match="eos_token_id"):
        ending(ids, z)
    ending = ForbiddenPhrases([[0], [2, 2], [2, 1], [1, 1]], scope="all", eos_token_id=1, dead_end="eos")
    ending(ids, z)
    assert z.tolist() == expected
    other = start.clone()
    edits = ending._automaton.edits(np.array([2, 1]), np.zeros(2, dtype=np.int64))
    DEVICE_PATHS["forbid_"](other, *edits, 1)
    assert other.tolist() == expected


class Words:
    """A tokenizer of whole words: a leading space makes another token."""

    unk_token_id = 0

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert add_special_tokens is False
        if "?" in text:
            return [0]
        pieces = [p for p in text.replace(" ", "\0 ").split("\0") if p]
        return [self.ids.setdefault(p, len(self.ids) + 1) for p in pieces]


def test_text_is_encoded_in_every_spelling():
    words = Words()
    processor = ForbiddenPhrases(["bad word", "Ugly"], tokenizer=words)
    spelt = {text: tuple(words.encode(text, False)) for text in ("bad word", " Bad word", " BAD WORD", "ugly", " UGLY")}
    assert len(processor) == 6 + 6
    for text, ids in spelt.items():
        assert processor.after(ids[:-1]).get(ids[-1]) == -INF, text
    assert len(ForbiddenPhrases(["bad word"], tokenizer=words, variants=False)) == 1


@pytest.mark.parametrize(
    ("phrases", "options", "message"),
    [
        ([], {}, "at least one phrase"),
        ([[1], [], [2], []], {}, "indices 1, 3"),
        ([[1, 2], [3], [1, 2]], {}, "indices 2"),
        ([[1], [2, 9]], {"vocab_size": 9}, "indices 1"),
        ([[1], [-2]], {}, "indices 1"),
        ([[1], [1, 2, 3, 4]], {"max_length": 3}, "indices 1"),
        ([[1]], {"vocab_size": 0}, "vocab_size"),
        ([[1]], {"mode": "soft"}, "mode"),
        ([[1]], {"scope": "prompt"}, "scope"),
        ([[1]], {"dead_end": "stop"}, "dead_end"),
        ([[1]], {"dead_end": "eos"}, "eos_token_id"),
        ([[2, 1], [1]], {"eos_token_id": [0, 1]}, "indices \\[1\\]"),
        ([[1]], {"mode": "prefix"}, "penalty"),
        ([[1]], {"penalty": 1.0}, "penalty"),
        ([[1]], {"mode": "prefix", "penalty": -1.0}, "penalty"),
        ([[1]], {"mode": "prefix", "penalty": math.nan}, "penalty"),
        ([[1]], {"mode": "prefix", "penalty": 1.0, "gamma": -1.0}, "gamma"),
        (["a", " "], {"tokenizer": Words()}, "indices \\[1\\]"),
        (["a", "b", "a"], {"tokenizer": Words()}, "indices \\[2\\]"),
        (["a", "?"], {"tokenizer": Words()}, "index 1"),
    ],
)
def test_bad_phrases(phrases, options, message):
    with pytest.raises(ArgumentError, match=message):
        ForbiddenPhrases(phrases, **options)


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        ("word", "list of phrases"),
        ([1, 2], "index 0"),
        ([[1], "b"], "index 1"),
        ([[1.5]], "whole"),
        (["a"], "tokenizer"),
    ],
)
def test_phrases_of_the_wrong_type(phrases, message):
    with pytest.raises(DTypeError, match=message):
        ForbiddenPhrases(phrases)


def test_bad_calls_write_nothing():
    processor = ForbiddenPhrases([[1, 2], [3]], 6, scope="all")
    good = np.array([[0, 1]])
    for ids, z, error in (
        (good, np.zeros((1, 7)), ShapeError),
        (good, np.zeros(6), ShapeError),
        (good, np.zeros((2, 6)), ShapeError),
        (good[0], np.zeros((1, 6)), ShapeError),
        (np.array([[0, -1]]), np.zeros((1, 6)), ArgumentError),
        (np.array([[0, 0.5]]), np.zeros((1, 6)), DTypeError),
        (good, np.zeros((1, 6), dtype=np.int64), DTypeError),
        (good, np.array([[0, 0, math.nan, 0, 0, 0]]), NonFiniteError),
        (good, np.array([[0, 0, 0, math.inf, 0, 0]]), NonFiniteError),
    ):
        before = z.copy()
        with pytest.raises(error):
            processor(ids, z)
        assert np.array_equal(z, before, equal_nan=z.dtype.kind == "f")
    with pytest.raises(ArgumentError, match="phrases"):
        ForbiddenPhrases([[9]])(good, np.zeros((1, 6)))
    overflow = np.full((1, 6), -65000, dtype=np.float16)
    with pytest.raises(ArgumentError, match="range of float16"):
        ForbiddenPhrases([[1, 2, 3]], mode="prefix", penalty=9e3, scope="all")(good, overflow)
    assert (overflow == -65000).all()


def test_empty_batch_and_no_context():
    processor = ForbiddenPhrases([[1, 2], [3]], scope="all")
    assert processor(np.zeros((0, 4), dtype=np.int64), np.zeros((0, 6))).shape == (0, 6)
    z = np.zeros((2, 6))
    processor(np.zeros((2, 0), dtype=np.int64), z)
    assert np.isneginf(z).sum(axis=1).tolist() == [1, 1]
