"""Decimals that add up, limits decided in whole numbers, and the rates of responses."""

from __future__ import annotations

import json
import math
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abjure import ArgumentError, DTypeError, ShapeError
from abjure.measure import Rate, percent_shares, rate, response_rates

counts = st.integers(0, 10**6).flatmap(lambda k: st.tuples(st.just(k), st.integers(max(k, 1), 2 * 10**6)))


@settings(max_examples=200, deadline=None)
@given(counts, st.integers(0, 12), st.sampled_from(["half_up", "half_even"]))
def test_decimals_equal_exact_division(pair, digits, rounding):
    k, n = pair
    with localcontext() as context:
        context.prec = 60
        exact = Decimal(k) / Decimal(n)
        rule = ROUND_HALF_UP if rounding == "half_up" else ROUND_HALF_EVEN
        assert Rate(k, n).decimal(digits, rounding) == exact.quantize(Decimal(1).scaleb(-digits), rule)
        assert Rate(k, n).percent(digits, rounding) == (100 * exact).quantize(Decimal(1).scaleb(-digits), rule)


def test_rounding_is_stated_and_printed_alike():
    # Python and NumPy print 0.12 and 2.67 here.
    assert str(Rate(1, 8).decimal(2)) == "0.13"
    assert str(Rate(1, 8).decimal(2, "half_even")) == "0.12"
    assert str(Rate(1, 2).percent(1)) == "50.0"
    assert Rate(0, 0).decimal() is None
    assert "0.6667" in repr(Rate(2, 3))
    groups = {"a": Rate(1, 3), "b": Rate(0, 0)}
    text = json.dumps(Rate(1, 3, 2, groups).to_dict())
    assert text == json.dumps(Rate(1, 3, 2, groups).to_dict())
    found = json.loads(text)
    assert (found["rate"], found["invalid"], found["groups"]["b"]["rate"]) == ("0.3333", 2, None)
    for bad in (-1, 21, 1.5, True):
        with pytest.raises(ArgumentError, match="digits"):
            Rate(1, 3).decimal(bad)
    with pytest.raises(ArgumentError, match="rounding"):
        Rate(1, 3).decimal(2, "down")


@settings(max_examples=150, deadline=None)
@given(counts, st.decimals(0, 1, places=6))
def test_limits_are_decided_exactly(pair, limit):
    k, n = pair
    assert Rate(k, n).at_least(limit) == (Fraction(k, n) >= Fraction(limit))
    assert Rate(k, n).at_most(str(limit)) == (Fraction(k, n) <= Fraction(limit))


def test_a_limit_that_binary_fractions_get_wrong():
    assert not 1 - 0.9 >= 0.1
    assert Rate(1, 10).at_least("0.1")
    assert Rate(1, 10).at_most("0.1")
    assert Rate(5, 5).at_least(1)
    assert not Rate(4, 5).at_least(1)
    with pytest.raises(DTypeError, match="limit: expected text or a Decimal"):
        Rate(1, 10).at_least(0.1)
    for bad in ("a tenth", "NaN", "1e400", "1e-99"):
        with pytest.raises(ArgumentError, match="limit"):
            Rate(1, 10).at_least(bad)
    with pytest.raises(ArgumentError, match="nothing was counted"):
        Rate(0, 0).at_least("0.1")


@settings(max_examples=150, deadline=None)
@given(counts, counts, st.integers(0, 6))
def test_differences_are_rounded_once(a, b, digits):
    with localcontext() as context:
        context.prec = 60
        exact = Fraction(*a) - Fraction(*b)
        want = (Decimal(exact.numerator) / Decimal(exact.denominator)).quantize(
            Decimal(1).scaleb(-digits), ROUND_HALF_UP
        )
    assert Rate(*a).difference(Rate(*b), digits) == want
    assert Rate(*a).difference(Rate(0, 0)) is None


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=45).filter(any), st.integers(0, 6))
def test_shares_add_up(numbers, digits):
    found = percent_shares(numbers, digits)
    assert sum(found) == 100
    for c, share in zip(numbers, found, strict=True):
        assert abs(Fraction(share) - Fraction(100 * c, sum(numbers))) < Fraction(1, 10**digits)
    assert percent_shares(dict(enumerate(numbers)), digits) == dict(enumerate(found))


def test_shares_of_thirds_and_refusals():
    assert [str(s) for s in percent_shares(np.array([1, 1, 1]))] == ["33.4", "33.3", "33.3"]
    for bad, error in (([1, -1], ArgumentError), ([0, 0], ArgumentError), ([1.5], DTypeError), ([], ArgumentError)):
        with pytest.raises(error, match="counts"):
            percent_shares(bad)


def test_response_rates():
    #           harmful: refused, fulfilled, neither; harmless: refused, fulfilled, neither
    refused = [1, 0, 0, 1, 0, 0]
    harmful = [1, 1, 1, 0, 0, 0]
    done = [1, 1, 0, 0, 1, 0]
    found = response_rates(refused, harmful, list("aabbcc"), fulfilled=done)
    assert (found.refusal.k, found.refusal.n, found.compliance.k) == (2, 6, 4)
    assert (found.rejection.k, found.rejection.n) == (1, 3)
    # The refused one is no success, whatever the judge says.
    assert (found.attack_success.k, found.attack_success.n) == (1, 3)
    assert (found.over_refusal.k, found.fulfilment.k, found.fulfilment.n) == (1, 1, 3)
    assert found.rejection.groups == {"a": Rate(1, 2), "b": Rate(0, 1), "c": Rate(0, 0)}
    assert math.isnan(found.rejection.groups["c"].rate)
    plain = response_rates(refused, harmful)
    assert (plain.attack_success.k, plain.fulfilment.k) == (2, 2)
    assert "over refusal" in found._repr_html_()
    assert found.to_dict()["over_refusal"]["rate"] == "0.3333"
    with pytest.raises(ArgumentError, match="no verdict"):
        response_rates([1, None], [1, 1])
    kept = response_rates([1, None], [1, 1], fulfilled=[0, 1], invalid="exclude")
    assert (kept.refusal.n, kept.attack_success.n, kept.attack_success.invalid) == (1, 1, 1)
    with pytest.raises(ArgumentError, match="harmful: expected true or false for every request"):
        response_rates([1, 0], [1, None])
    with pytest.raises(ShapeError, match="harmful: expected 2"):
        response_rates([1, 0], [1])


def test_columns_of_other_kinds():
    pandas = pytest.importorskip("pandas")
    column = pandas.Series([True, None, False], dtype="boolean")
    assert rate(column, invalid="exclude") == Rate(1, 2, 1)


def test_arrow_columns():
    arrow = pytest.importorskip("pyarrow")
    assert rate(arrow.array([True, None, False]), arrow.array(["x", "x", "y"]), invalid="as_fail").k == 1
