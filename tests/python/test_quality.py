"""Forget quality and utility, against scipy, exact fractions and worked values."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from abjure import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from abjure.measure import quality
from abjure.measure.quality import ks_test

U = [0.42, 0.55, 0.61, 0.70, 0.83, 0.95, 1.10, 1.32]
R = [0.60, 0.72, 0.88, 0.97, 1.05, 1.21, 1.44, 1.80]
PARA = [1.2, 0.8, 2.0]
WRONG = [[1.5, 2, 1, 3, 2.5], [0.7, 0.9, 1.1, 0.8, 1], [2.2, 1.8, 2.6, 2, 1.9]]


def test_worked_ks():
    found = ks_test(U, R)
    assert found.statistic == 0.375
    assert found.exact
    assert found.pvalue == pytest.approx(0.6601398601399, rel=1e-12)
    assert ks_test(1 / np.array(U), 1 / np.array(R)).log10_p == pytest.approx(found.log10_p, abs=1e-14)
    assert ks_test(U, U).log10_p == 0


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 3), (4, 4), (3, 6), (5, 4)])
def test_exact_p_counts_all_splits(n, m):
    everything = np.arange(n + m)
    splits = list(combinations(everything, n))

    def gap(chosen):
        a = np.isin(everything, chosen)
        return np.abs(np.cumsum(a) * m - np.cumsum(~a) * n).max()

    gaps = np.array([gap(s) for s in splits])
    for chosen, g in zip(splits, gaps, strict=True):
        want = Fraction(int((gaps >= g).sum()), len(splits))
        rest = np.setdiff1d(everything, chosen)
        assert ks_test(chosen, rest).pvalue == pytest.approx(float(want), rel=1e-12)


@pytest.mark.parametrize(("n", "m", "shift"), [(40, 40, 0.3), (200, 200, 0.5), (37, 90, 1.0), (400, 300, 0.2)])
def test_p_equals_scipys_exact(n, m, shift):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=n), rng.normal(size=m) + shift
    want = stats.ks_2samp(x, y, method="exact")
    found = ks_test(x, y)
    assert found.statistic == pytest.approx(want.statistic, rel=1e-12)
    assert found.pvalue == pytest.approx(want.pvalue, rel=1e-8)
    assert np.log10(want.pvalue) == pytest.approx(found.log10_p, abs=1e-7)


def test_p_below_the_smallest_number():
    n = 600
    found = ks_test(np.arange(n), np.arange(n) + n)
    # Two of the C(2n, n) paths reach a distance of 1.
    want = (math.log(2) + 2 * math.lgamma(n + 1) - math.lgamma(2 * n + 1)) / math.log(10)
    assert found.log10_p == pytest.approx(want, rel=1e-10)
    assert found.log10_p < -330
    assert found.pvalue == 0


def test_asymptotic_p_for_large_samples():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=3000), rng.normal(size=2000) + 0.05
    found, want = ks_test(x, y, "asymptotic"), stats.kstwobign.sf
    assert not found.exact
    assert found.pvalue == pytest.approx(want(found.statistic * math.sqrt(1200)), rel=1e-9)
    assert ks_test(x, y).pvalue == pytest.approx(found.pvalue, rel=0.1)
    assert not ks_test(np.arange(10_001), [1.5]).exact
    assert ks_test(np.arange(20_000), np.arange(20_000) + 0.5).pvalue == pytest.approx(1, abs=1e-9)
    assert ks_test(np.zeros(20_000), np.ones(20_000)).log10_p < -8000


def test_truth_ratios_of_both_means():
    arithmetic = quality.truth_ratio(PARA, WRONG, "arithmetic")
    np.testing.assert_allclose(arithmetic, [0.569876124843, 0.913911461974, 0.938823213082], rtol=1e-11)
    np.testing.assert_array_equal(quality.truth_ratio(PARA, WRONG, "tofu"), arithmetic)
    geometric = quality.truth_ratio(PARA, WRONG)
    np.testing.assert_allclose(geometric, [0.449328964117, 0.904837418036, 0.904837418036], rtol=1e-11)
    theirs = quality.truth_ratio(PARA, WRONG, "open_unlearning")
    direct = np.exp(-np.mean(WRONG, axis=1)) / (np.exp(-np.array(PARA)) + 1e-10)
    np.testing.assert_allclose(theirs, direct, rtol=1e-14)
    assert quality.truth_ratio_score(arithmetic, forget=True) == pytest.approx(0.8075369333, rel=1e-9)
    assert quality.truth_ratio_score(arithmetic) == pytest.approx(0.1924630667, rel=1e-9)
    assert np.isfinite(quality.truth_ratio([2000.0], [[2000.0, 2001.0]], "arithmetic")).all()


def test_forget_quality_is_one_for_the_retain_model_itself_and_needs_it():
    ratio = quality.truth_ratio(PARA, WRONG)
    assert quality.forget_quality(ratio, ratio).pvalue == 1
    with pytest.raises(ArgumentError, match="without the forget set"):
        quality.forget_quality(ratio, None)


def test_utility_and_probability():
    assert quality.model_utility([0.9] * 8 + [0.001]) == pytest.approx(0.00892070485, rel=1e-8)
    assert quality.model_utility({"a": 0.5, "b": 0.0}) == 0
    right, wrong = np.exp([-1.2, -0.8, -2.0]), np.exp(-np.array(WRONG)).sum(1)
    assert quality.answer_probability(PARA) == pytest.approx(right.mean())
    assert quality.answer_probability(PARA, WRONG) == pytest.approx((right / (right + wrong)).mean())


@pytest.mark.parametrize(
    ("answer", "reference", "want"),
    [
        ("the cat sat on the mat", "The cat, on the mat!", 1.0),
        ("on the mat the cat", "the cat on the mat", 3 / 5),
        ("", "a b", 0),
        ("x y z", "a b", 0),
    ],
)
def test_rouge_l_recall(answer, reference, want):
    assert quality.rouge_l_recall(answer, reference) == want


def test_paired_bootstrap_covers_and_pairs():
    rng = np.random.default_rng(1)
    common = rng.normal(size=200) * 10
    a, b = common + 1, common + rng.normal(size=200) * 0.1
    found = quality.paired_bootstrap(a, b, resamples=500)
    assert 0.95 < found.low < found.value < found.high < 1.05
    se = (a - b).std(ddof=1) / math.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * 1.96 * se, rel=0.15)
    assert quality.paired_bootstrap(a, b, np.median, resamples=100) == quality.paired_bootstrap(
        a, b, np.median, resamples=100
    )
    assert "95%" in found._repr_html_()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ks_test([], [1]), ShapeError, "x"),
        (lambda: ks_test([1], [math.nan]), NonFiniteError, "y"),
        (lambda: ks_test([1], [2], "fast"), ArgumentError, "method"),
        (lambda: quality.truth_ratio(PARA, WRONG[:2]), ShapeError, "perturbed"),
        (lambda: quality.truth_ratio([-1.0], [[1.0]]), ArgumentError, "losses"),
        (lambda: quality.truth_ratio(PARA, WRONG, "median"), ArgumentError, "mean"),
        (lambda: quality.model_utility([0.5, 1.2]), ArgumentError, "values"),
        (lambda: quality.rouge_l_recall("a", "?!"), DegenerateError, "reference"),
        (lambda: quality.paired_bootstrap([1, 2], [1, 2, 3]), ShapeError, "second"),
        (lambda: quality.paired_bootstrap([1, 2], [1, 2], level=1.0), ArgumentError, "level"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
