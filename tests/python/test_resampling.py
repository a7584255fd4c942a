"""The compiled bootstrap against its theory and against plain resampling, and the intervals made from it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import abjure
from abjure import ArgumentError, DegenerateError, NonFiniteError, ShapeError, _native
from abjure.measure import bootstrap_mean, paired_bootstrap


def replicates(values, resamples=4000, seed=0, weights=None):
    return np.asarray(_native.bootstrap_sums([values], [weights], resamples, seed)).reshape(-1, 2)


def test_zeros_and_ones_follow_the_binomial_law():
    n, k = 700, 123
    values = np.repeat([1.0, 0.0], [k, n - k])
    found = replicates(values, 20_000)[:, 0]
    assert (found == found.round()).all()
    # The whole distribution, in 12 bins of about equal probability.
    edges = stats.binom.ppf(np.arange(1, 12) / 12, n, k / n)
    seen = np.bincount(np.searchsorted(edges, found), minlength=12)
    p = np.diff(np.concatenate([[0], stats.binom.cdf(edges, n, k / n), [1]]))
    assert stats.chisquare(seen, 20_000 * p).pvalue > 1e-3


def test_any_values_follow_the_law_of_plain_resampling():
    draw = np.random.default_rng(3)
    values = draw.standard_exponential(1100)
    plain = values[draw.integers(0, 1100, size=(4000, 1100))].sum(axis=1)
    assert stats.ks_2samp(replicates(values)[:, 0], plain).pvalue > 1e-3


def test_threads_and_order_change_nothing():
    values = np.random.default_rng(0).standard_normal(5000)
    before = abjure.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            abjure.set_num_threads(threads)
            found.append(replicates(values, 300))
        found.append(replicates(values[::-1].copy(), 300))
    finally:
        abjure.set_num_threads(before)
    assert all((f == found[0]).all() for f in found)
    assert (replicates(values, 300, 1) != found[0]).any()


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_equal_scipys(method):
    x = np.random.default_rng(1).standard_exponential(200)
    ours = bootstrap_mean(x, resamples=20_000, method=method)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=20_000, method=method, rng=np.random.default_rng(0))
    # Each limit has a Monte Carlo error of about 2 % of the interval's width.
    width = ours.high - ours.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * width)
    assert ours.value == pytest.approx(x.mean(), rel=1e-14)
    if method == "bca":  # leans to the long tail
        plain = bootstrap_mean(x, resamples=20_000)
        assert ours.high > plain.high
        assert ours.low > plain.low


def test_clusters_widen_and_strata_narrow():
    draw = np.random.default_rng(2)
    cluster = np.repeat(np.arange(60), 10)
    effect = draw.standard_normal(60)
    x = effect[cluster] + 0.1 * draw.standard_normal(600)
    clustered, plain = bootstrap_mean(x, clusters=cluster), bootstrap_mean(x)
    stratified = bootstrap_mean(x, strata=cluster)
    widths = [b.high - b.low for b in (clustered, plain, stratified)]
    # Standard errors: sd(effect)/√60; sd(x)/√600; 0.1/√600.
    want = [2 * 1.96 * s for s in (effect.std() / 60**0.5, x.std() / 600**0.5, 0.1 / 600**0.5)]
    assert widths == pytest.approx(want, rel=0.1)
    # Clusters of one row are rows.
    assert bootstrap_mean(x, clusters=np.arange(600)) == plain
    # Names need not be numbers, and clusters may be of any size.
    names = ["a", "a", "b", "c", "c", "c"]
    found = bootstrap_mean([1, 1, 0, 1, 0, 0], clusters=names, resamples=500)
    assert found.value == 0.5
    assert 0 <= found.low < found.high <= 1


def test_paired_differences_and_p_values():
    draw = np.random.default_rng(5)
    hard = draw.standard_normal(300)
    first, second = hard + 0.1 * draw.standard_normal(300) + 0.05, hard + 0.1 * draw.standard_normal(300)
    found = paired_bootstrap(first, second)
    t = stats.ttest_rel(first, second)
    assert found.pvalue == pytest.approx(t.pvalue, abs=0.005)
    assert 0 < found.low < found.value < found.high
    assert paired_bootstrap(first, first + (hard > 0) - (hard <= 0), resamples=1000).pvalue > 0.01
    # Any statistic, by calls.
    median = paired_bootstrap(first, second, np.median, resamples=300)
    assert median.low < np.median(first) - np.median(second) < median.high


def test_p_values_are_uniform_where_nothing_differs():
    found = [
        bootstrap_mean(np.random.default_rng(s).standard_normal(80), resamples=400, seed=s).pvalue for s in range(400)
    ]
    assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_refusals():
    with pytest.raises(ShapeError, match="values: expected shape"):
        bootstrap_mean([1.0])
    with pytest.raises(NonFiniteError):
        bootstrap_mean([1.0, np.nan])
    with pytest.raises(ShapeError, match="clusters: expected 3 names"):
        bootstrap_mean([1, 0, 1], clusters=[0, 1])
    with pytest.raises(DegenerateError, match="clusters: expected 2"):
        bootstrap_mean([1, 0, 1], clusters=[0, 0, 0])
    with pytest.raises(ArgumentError, match="each cluster in one stratum"):
        bootstrap_mean([1, 0, 1], clusters=[0, 0, 1], strata=[0, 1, 1])
    with pytest.raises(DegenerateError, match="strata: expected 2 units"):
        bootstrap_mean([1, 0, 1], strata=[0, 1, 2])
    with pytest.raises(DegenerateError):
        bootstrap_mean([1, 1, 1], method="bca")
    for bad in ({"level": 1}, {"resamples": 3}, {"seed": -1}, {"method": "t"}):
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            bootstrap_mean([1, 0, 1], **bad)
    with pytest.raises(ShapeError, match="second: expected 3 values"):
        paired_bootstrap([1, 0, 1], [1, 0])
    with pytest.raises(ArgumentError, match="statistic"):
        paired_bootstrap([1, 0, 1], [1, 0, 0], np.median, clusters=[0, 1, 2])
    # A constant has an interval of one point, as it should.
    flat = bootstrap_mean([2.0, 2.0, 2.0])
    assert (flat.value, flat.low, flat.high) == (2, 2, 2)
