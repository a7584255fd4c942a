"""The bitmask form: packing against its definition, joining, dead ends, and what the structured-output library does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abjure.errors import ArgumentError, DegenerateError, DeviceError, DTypeError, NonFiniteError, ShapeError
from abjure.integrations import bitmask
from abjure.refuse import ForbiddenPhrases

INF = math.inf
quick = settings(max_examples=40, deadline=None)


def definition(mask: np.ndarray, row: int, token: int) -> bool:
    return bool((int(mask[row, token // 32]) >> (token % 32)) & 1)


@given(st.integers(0, 3), st.integers(1, 100), st.integers(0, 2**32))
@quick
def test_pack_and_unpack(rows, vocab, seed):
    allowed = np.random.default_rng(seed).random((rows, vocab)) < 0.5
    mask = bitmask.pack(allowed)
    assert mask.dtype == np.int32
    assert mask.shape == (rows, bitmask.words(vocab))
    assert all(definition(mask, i, j) == allowed[i, j] for i in range(rows) for j in range(vocab))
    assert np.array_equal(bitmask.unpack(mask, vocab), allowed)
    assert [f.tolist() for f in bitmask.forbidden(torch.from_numpy(mask), vocab)] == [
        [j for j in range(vocab) if not allowed[i, j]] for i in range(rows)
    ]


def test_forbid_clears_single_bits():
    mask = torch.from_numpy(bitmask.allocate(2, 70))
    assert bitmask.forbid_(mask, [0, 1, 1, 1], [31, 32, 32, 69]) is mask
    assert [f.tolist() for f in bitmask.forbidden(mask, 70)] == [[31], [32, 69]]
    bitmask.forbid_(mask, 0, [0, 63])
    assert bitmask.forbidden(mask, 70)[0].tolist() == [0, 31, 63]


@given(
    st.integers(1, 4),
    st.integers(1, 80),
    st.integers(0, 2**32),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
)
@quick
def test_apply_is_minus_infinity_where_it_forbids(rows, vocab, seed, dtype, some):
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(rows)[: rng.integers(1, rows + 1)] if some else None
    allowed = rng.random((rows if chosen is None else len(chosen), vocab)) < 0.5
    allowed[:, rng.integers(vocab)] = True
    z = torch.from_numpy(rng.normal(size=(rows, vocab))).to(dtype)
    wanted = z.clone()
    for i, row in enumerate(range(rows) if chosen is None else chosen):
        wanted[row, torch.from_numpy(~allowed[i])] = -INF
    assert bitmask.apply_(z, torch.from_numpy(bitmask.pack(allowed)), rows=chosen) is z
    assert torch.equal(z, wanted)
    if chosen is None and dtype is torch.float32:
        other = rng.normal(size=(rows, vocab)).astype(np.float32)
        bitmask.apply_(other, bitmask.pack(allowed))
        assert np.array_equal(np.isneginf(other), ~allowed)


@given(st.integers(1, 4), st.integers(1, 100), st.integers(0, 2**32))
@quick
def test_equals_xgrammar(rows, vocab, seed):
    xgrammar = pytest.importorskip("xgrammar")
    rng = np.random.default_rng(seed)
    mask = xgrammar.allocate_token_bitmask(rows, vocab)
    assert np.array_equal(mask.numpy(), bitmask.allocate(rows, vocab))
    allowed = rng.random((rows, vocab)) < 0.5
    allowed[:, 0] = True
    bitmask.and_(mask, bitmask.pack(allowed))
    z = torch.from_numpy(rng.normal(size=(rows, vocab)).astype(np.float32))
    theirs = z.clone()
    xgrammar.apply_token_bitmask_inplace(theirs, mask)
    assert torch.equal(bitmask.apply_(z, mask), theirs)


def test_phrases_join_a_grammar():
    phrases = ForbiddenPhrases([[5, 7, 9], [7, 2], [3]], 40)
    grammar = np.ones((2, 40), dtype=bool)
    grammar[:, 20:] = False
    mask = bitmask.pack(grammar)
    bitmask.forbid_phrases_(mask, phrases, [[5], [5]], [[5, 7], [7]])
    assert [sorted(set(f.tolist()) - set(range(20, 40))) for f in bitmask.forbidden(mask, 40)] == [[2, 3, 9], [2, 3]]
    both = ForbiddenPhrases([[5, 7, 9]], 40, scope="all")
    mask = bitmask.allocate(1, 40)
    assert [f.tolist() for f in bitmask.forbidden(bitmask.forbid_phrases_(mask, both, [[5, 7]], [[]]), 40)] == [[9]]
    soft = ForbiddenPhrases([[5, 7, 9]], 40, mode="prefix", penalty=1.0)
    mask = bitmask.forbid_phrases_(bitmask.allocate(1, 40), soft, [[]], [[5]])
    assert np.array_equal(mask, bitmask.allocate(1, 40)), "a penalty has no place in a mask"


def test_no_row_is_left_without_a_token():
    phrases = ForbiddenPhrases([[i] for i in range(40)], 40)
    for make in (
        lambda m: bitmask.forbid_phrases_(m, phrases, [[]], [[]]),
        lambda m: bitmask.and_(m, np.zeros((1, 2), dtype=np.int32)),
    ):
        mask = bitmask.allocate(1, 40)
        with pytest.raises(DegenerateError):
            make(mask)
        assert (mask == -1).all()
    mask = bitmask.forbid_(bitmask.allocate(2, 3), [1, 1, 1], [0, 1, 2])
    z = torch.zeros(2, 3)
    with pytest.raises(DegenerateError, match="row 1"):
        bitmask.apply_(z, torch.from_numpy(mask))
    z[0, :2] = -INF
    with pytest.raises(DegenerateError, match="row 0"):
        bitmask.apply_(z, torch.from_numpy(bitmask.forbid_(bitmask.allocate(2, 3), 0, [2])))
    z[0, 1] = math.nan
    with pytest.raises(NonFiniteError, match="row 0"):
        bitmask.apply_(z, torch.from_numpy(bitmask.allocate(2, 3)))


def test_another_width_needs_a_word_on_the_tail():
    z = torch.zeros(1, 70)
    mask = torch.from_numpy(bitmask.forbid_(bitmask.allocate(1, 64), 0, [1]))
    with pytest.raises(ShapeError, match="tail"):
        bitmask.apply_(z, mask)
    assert not z.any()
    assert torch.nonzero(bitmask.apply_(z.clone(), mask, tail="allow")[0])[:, 0].tolist() == [1]
    assert torch.nonzero(bitmask.apply_(z.clone(), mask, tail="forbid")[0])[:, 0].tolist() == [1, *range(64, 70)]
    assert torch.nonzero(bitmask.apply_(torch.zeros(1, 20), mask, tail="allow")[0])[:, 0].tolist() == [1]


def test_bad_arguments():
    mask = bitmask.allocate(1, 40)
    z = np.zeros((1, 40), dtype=np.float32)
    for call, error in (
        (lambda: bitmask.allocate(1, 0), ArgumentError),
        (lambda: bitmask.pack(np.ones((1, 4))), DTypeError),
        (lambda: bitmask.pack(np.ones(4, dtype=bool)), ShapeError),
        (lambda: bitmask.unpack(mask, 70), ShapeError),
        (lambda: bitmask.unpack(mask.astype(np.int64), 40), DTypeError),
        (lambda: bitmask.unpack(torch.zeros(1, 2), 40), DTypeError),
        (lambda: bitmask.unpack(mask[0], 40), ShapeError),
        (lambda: bitmask.unpack(torch.zeros(1, 2, dtype=torch.int32, device="meta"), 40), DeviceError),
        (lambda: bitmask.forbid_(mask, 0, [64]), ArgumentError),
        (lambda: bitmask.forbid_(mask, 1, [0]), ArgumentError),
        (lambda: bitmask.forbid_(mask, [0, 0], [1, 2, 3]), ShapeError),
        (lambda: bitmask.forbid_phrases_(mask, ForbiddenPhrases([[70]]), [[]], [[]]), ArgumentError),
        (lambda: bitmask.forbid_phrases_(mask, ForbiddenPhrases([[7]]), [[]], []), ShapeError),
        (lambda: bitmask.and_(mask, bitmask.allocate(2, 40)), ShapeError),
        (lambda: bitmask.apply_(z, bitmask.allocate(2, 40)), ShapeError),
        (lambda: bitmask.apply_(z[0], mask), ShapeError),
        (lambda: bitmask.apply_(z, mask.astype(np.int64)), DTypeError),
        (lambda: bitmask.apply_(z.astype(np.int64), mask), DTypeError),
        (lambda: bitmask.apply_(z, mask, tail="drop"), ArgumentError),
        (lambda: bitmask.apply_(z, mask, rows=[1]), ArgumentError),
        (lambda: bitmask.apply_(np.zeros((2, 40)), bitmask.allocate(2, 40), rows=[1, 1]), ArgumentError),
        (lambda: bitmask.apply_(torch.zeros(1, 40, device="meta"), torch.from_numpy(mask)), DeviceError),
    ):
        with pytest.raises(error):
            call()
    assert (mask == -1).all()
    assert not z.any()
