"""Rates and rankings, against statsmodels' values, scipy, scikit-learn and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score

from abjure import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.measure import Rate, average_precision, rate, rate_difference
from abjure.measure.rates import beta_cdf, beta_quantile, binomial_at_least

# statsmodels: (k, n), Wilson, Clopper-Pearson.
TABLE = [
    (0, 10, (0, 0.277533), (0, 0.308497)),
    (1, 10, (0.017876, 0.404150), (0.002529, 0.445016)),
    (10, 10, (0.722467, 1), (0.691503, 1)),
    (57, 100, (0.472154, 0.662667), (0.467134, 0.668609)),
    (88, 100, (0.801879, 0.930006), (0.799764, 0.936431)),
    (3, 450, (0.002270, 0.019415), (0.001377, 0.019358)),
]


@pytest.mark.parametrize(("k", "n", "wilson", "exact"), TABLE)
def test_worked_intervals(k, n, wilson, exact):
    found = Rate(k, n)
    assert found.ci() == pytest.approx(wilson, abs=6e-7)
    assert found.ci("clopper-pearson") == pytest.approx(exact, abs=6e-7)
    if k == 0:
        assert found.ci()[0] == found.ci("clopper-pearson")[0] == 0
    if k == n:
        assert found.ci()[1] == found.ci("clopper-pearson")[1] == 1


@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
@settings(deadline=None, max_examples=60)
def test_intervals_equal_scipys(n, share, level):
    k = round(share * n)
    theirs = stats.binomtest(k, n)
    for method, name in (("wilson", "wilson"), ("clopper-pearson", "exact")):
        want = theirs.proportion_ci(level, name)
        found = Rate(k, n).ci(method, level)
        assert found == pytest.approx((want.low, want.high), abs=1e-10)
        assert 0 <= found[0] <= k / n <= found[1] <= 1


@pytest.mark.parametrize("p", [0.02, 0.2, 0.5])
def test_exact_interval_covers_and_wilson_nearly_does(p):
    n = 60
    weights = stats.binom.pmf(np.arange(n + 1), n, p)
    for method, least in (("clopper-pearson", 0.95), ("wilson", 0.93)):
        inside = [low <= p <= high for low, high in (Rate(k, n).ci(method) for k in range(n + 1))]
        assert weights[inside].sum() >= least


@given(st.integers(1, 400), st.integers(0, 400), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_binomial_tail_equals_scipys(n, k, p):
    assert binomial_at_least(k, n, p) == pytest.approx(stats.binom.sf(k - 1, n, p), rel=1e-9, abs=1e-300)


def test_beta_for_large_counts():
    for a, b in ((500_000, 500_001), (3, 999_998), (0.5, 0.5)):
        for q in (1e-12, 0.025, 0.5, 0.975):
            x = beta_quantile(q, a, b)
            assert x == pytest.approx(stats.beta.ppf(q, a, b), rel=1e-7)
            assert beta_cdf(x, a, b) == pytest.approx(q, rel=1e-6)
    assert (beta_quantile(0, 2, 3), beta_cdf(0, 2, 3), beta_cdf(1, 2, 3)) == (0, 0, 1)


def test_counts_groups_and_invalid_items():
    found = rate([True, False, 1, 0.0], groups=["a", "b", "a", "b"])
    assert (found.k, found.n, found.rate) == (2, 4, 0.5)
    assert found.groups == {"a": Rate(2, 2), "b": Rate(0, 2)}
    values, groups = [1, None, math.nan, 0], ["x", "x", "y", "x"]
    assert rate(values, groups, invalid="exclude").groups["y"] == Rate(0, 0, 1)
    assert math.isnan(rate(values, groups, invalid="exclude").groups["y"].rate)
    assert rate(values, invalid="as_fail") == Rate(1, 4, 2)
    assert rate(values, invalid="as_success") == Rate(3, 4, 2)
    assert rate([]).ci() is None
    assert rate(np.array([True, True])) == Rate(2, 2)
    assert "2/4 = 0.5000" in repr(found)
    assert "<td>a</td><td>2</td>" in found._repr_html_()


def test_newcombe_difference():
    # Newcombe 1998, table II: 56/70 − 48/80.
    assert rate_difference(Rate(56, 70), Rate(48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert rate_difference(Rate(0, 0), Rate(1, 2)) is None
    low, high = rate_difference(Rate(5, 9), Rate(2, 7))
    assert rate_difference(Rate(2, 7), Rate(5, 9)) == pytest.approx((-high, -low), abs=1e-15)


def test_worked_average_precision():
    assert average_precision([0, 0, 1, 1, 1, 0], [0.1, 0.4, 0.35, 0.8, 0.4, 0.4]) == pytest.approx(0.7, abs=1e-15)
    assert average_precision([1, 0, 1, 0], [0.5, 0.5, 0.9, 0.1]) == pytest.approx(5 / 6, abs=1e-15)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_average_precision_equals_scikit_learns_whatever_the_order(pairs):
    y, s = [p[0] for p in pairs], [float(p[1]) for p in pairs]
    if not any(y):
        with pytest.raises(DegenerateError, match="correct"):
            average_precision(y, s)
        return
    found = average_precision(y, s)
    assert found == pytest.approx(average_precision_score(y, s), abs=1e-12)
    assert found == pytest.approx(average_precision(y[::-1], s[::-1]), abs=1e-15)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Rate(3, 2), ArgumentError, "k=3"),
        (lambda: Rate(1, 2).ci("wald"), ArgumentError, "method"),
        (lambda: Rate(1, 2).ci(level=1), ArgumentError, "level"),
        (lambda: rate([0, 2]), ArgumentError, "index 1"),
        (lambda: rate([1, None]), ArgumentError, "index 1"),
        (lambda: rate(["yes"]), DTypeError, "str"),
        (lambda: rate([1, 0], ["a"]), ShapeError, "groups"),
        (lambda: rate([[1, 0]]), DTypeError, "list"),
        (lambda: rate(np.ones((1, 2))), ShapeError, "values"),
        (lambda: rate([1], invalid="skip"), ArgumentError, "invalid"),
        (lambda: average_precision([1, 0], [1.0]), ShapeError, "correct"),
        (lambda: average_precision([1, 2], [1.0, 2.0]), ArgumentError, "correct"),
        (lambda: average_precision([1, 0], [1.0, math.nan]), NonFiniteError, "score"),
        (lambda: beta_quantile(2, 1, 1), ArgumentError, "q"),
        (lambda: binomial_at_least(1, 2, 1.5), ArgumentError, "p"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
