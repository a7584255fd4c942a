"""McNemar, sign flips, adjusted p-values and clustered errors against worked values and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from abjure import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from abjure.measure import McNemar, adjust_pvalues, clustered_mean, mcnemar, sign_flip_test
from abjure.measure.paired import t_quantile

# statsmodels: (b, c), exact, mid-p, corrected.
TABLE = [
    ((24, 9), 0.0135310, 0.0090412, 0.0148061),
    ((0, 3), 0.25, 0.125, 0.248213),
    ((10, 10), 1, 1, 0.823063),
    ((2, 12), 0.0129395, 0.0073853, 0.0161569),
]


@pytest.mark.parametrize(("pair", "exact", "midp", "corrected"), TABLE)
def test_mcnemar(pair, exact, midp, corrected):
    found = McNemar(*pair, 5, 7)
    assert found.exact == pytest.approx(exact, abs=6e-7)
    assert found.midp == pytest.approx(midp, abs=6e-7)
    assert found.corrected == pytest.approx(corrected, abs=6e-7)


def test_mcnemar_counts():
    found = mcnemar([1, 1, 0, 0, 1], [1, 0, 1, 0, 0])
    assert (found.first_only, found.second_only, found.both, found.neither) == (2, 1, 1, 1)
    assert found.difference == pytest.approx(0.2)
    same = mcnemar([1, 0], [True, False])
    assert (same.exact, same.midp, same.corrected) == (1, 1, 1)
    assert "2 against 1 of 5" in repr(found)
    assert "<table>" in found._repr_html_()
    with pytest.raises(ShapeError, match="second"):
        mcnemar([1, 0], [1])
    with pytest.raises(ShapeError, match="first"):
        mcnemar([], [])
    with pytest.raises(ArgumentError, match=r"got 2.* at index 1"):
        mcnemar([1, 2], [1, 0])
    with pytest.raises(ArgumentError):
        mcnemar([1, None], [1, 0])


@given(st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=80, deadline=None)
def test_mcnemar_equals_the_binomial_test(b, c):
    want = stats.binomtest(b, b + c).pvalue if b + c else 1
    assert McNemar(b, c, 0, 0).exact == pytest.approx(want, rel=1e-9)


def test_sign_flips():
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal(12) + 0.4, draw.standard_normal(12)
    found = sign_flip_test(a, b)
    want = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf)
    assert found.exact
    assert found.flips == 4096
    assert found.pvalue == pytest.approx(want.pvalue, abs=1e-12)
    # Ties at the observed value count: all eight signs of three equal differences, of which two reach it.
    assert sign_flip_test([0.1, 0.2, 0.3], [0.0, 0.1, 0.2]).pvalue == 0.25
    assert sign_flip_test([1, 2], [1, 2]).pvalue == 1
    a, b = draw.standard_normal(200) + 0.2, draw.standard_normal(200)
    many = sign_flip_test(a, b, flips=20_000)
    assert not many.exact
    assert many.pvalue == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.01)
    with pytest.raises(ShapeError, match="second"):
        sign_flip_test(a, b[1:])
    with pytest.raises(ArgumentError, match="flips"):
        sign_flip_test(a, b, flips=1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
@settings(max_examples=80, deadline=None)
def test_adjusted_p_values(p):
    assert adjust_pvalues(p, "bh") == pytest.approx(stats.false_discovery_control(p), abs=1e-12)
    # Holm's rule step by step.
    holm = adjust_pvalues(p)
    for level in (0.01, 0.05, 0.3):
        rejected, m = set(), len(p)
        for step, i in enumerate(np.argsort(p, kind="stable")):
            if p[i] * (m - step) > level:
                break
            rejected.add(int(i))
        assert set(np.flatnonzero(holm <= level)) == rejected


def test_adjusted_names_and_refusals():
    assert adjust_pvalues({"a": 0.01, "b": 0.04}) == {"a": 0.02, "b": 0.04}
    for bad, error in (([0.1, 1.5], ArgumentError), ([np.nan], NonFiniteError), ([], ShapeError)):
        with pytest.raises(error, match="pvalues"):
            adjust_pvalues(bad)
    with pytest.raises(ArgumentError, match="method"):
        adjust_pvalues([0.1], "bonferroni")


def test_clustered_errors():
    x, c = [1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 2]
    assert clustered_mean(x).se == pytest.approx(0.223607, abs=5e-7)
    found = clustered_mean(x, c)
    assert found.se == pytest.approx(0.144338, abs=5e-7)
    half = stats.t.ppf(0.975, 2) * found.se
    assert found.ci() == pytest.approx((0.5 - half, 0.5 + half), rel=1e-9)
    plain = np.random.default_rng(0).standard_normal(40) + 0.3
    assert clustered_mean(plain).pvalue == pytest.approx(stats.ttest_1samp(plain, 0).pvalue, rel=1e-9)
    assert clustered_mean([0, 0]).pvalue == 1
    assert clustered_mean([1, 1]).pvalue == 0
    with pytest.raises(DegenerateError, match="clusters: expected 2"):
        clustered_mean(x, ["a"] * 6)
    with pytest.raises(DegenerateError, match="values: expected 2"):
        clustered_mean([1])
    with pytest.raises(ArgumentError, match="clusters: expected a name"):
        clustered_mean([1, 0], [None, "a"])
    with pytest.raises(ArgumentError, match="level"):
        found.ci(1.0)


@pytest.mark.parametrize("df", [1, 2, 5, 30, 1000])
@pytest.mark.parametrize("q", [0.5, 0.9, 0.975, 0.9999])
def test_students_t(df, q):
    assert t_quantile(q, df) == pytest.approx(stats.t.ppf(q, df), rel=1e-8, abs=1e-12)
