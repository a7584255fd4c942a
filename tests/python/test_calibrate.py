"""Biases for wanted rates and thresholds with a guarantee, against the reference vectors and simulation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abjure.errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from abjure.measure.rates import beta_quantile
from abjure.refuse import RefusalTokens, calibrate_bias, calibrate_threshold

MARGINS = [-4.2, -3.1, -2.5, -1.7, -1.1, -0.6, 0.2, 0.9, 1.8, 3]
SCORES = [
    *(0.02, 0.05, 0.07, 0.11, 0.13, 0.18, 0.21, 0.24, 0.29, 0.33),
    *(0.38, 0.41, 0.47, 0.52, 0.58, 0.63, 0.71, 0.77, 0.86, 0.94),
]


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def test_reference_single_bias():
    assert calibrate_bias(MARGINS, 0.2) == pytest.approx(-1.7099445012627161, rel=1e-14)
    assert calibrate_bias(MARGINS, 0.5) == pytest.approx(0.7794074934364267, rel=1e-14)
    assert calibrate_bias(MARGINS, 0.3963794881777652) == pytest.approx(0.0, abs=1e-14)
    # Sampling as order statistics: u <= sigmoid(m + b) is m - logit(u) >= -b.
    u = np.arange(0.05, 1, 0.1)
    for b, count in ((0, 2), (1, 6)):
        assert (u <= sigmoid(np.add(MARGINS, b))).sum() == (MARGINS - np.log(u / (1 - u)) >= -b).sum() == count


def test_reference_joint_bias():
    p = np.array([(0.30, 0.10), (0.05, 0.40), (0.02, 0.01), (0.10, 0.10), (0.50, 0.20), (0.01, 0.03)])
    b = calibrate_bias(np.log(p / (1 - p)), [0.25, 0.15])
    assert b == pytest.approx([0.830518733296842, 0.34966745692686707], rel=1e-12)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(2, 60))
@settings(max_examples=80, deadline=None)
def test_biases_reach_the_rates(seed, k, n):
    rng = np.random.default_rng(seed)
    z = rng.normal(scale=4, size=(n, k + 1))
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    rates = rng.dirichlet(np.ones(k + 1))[:k] * 0.9 + 0.01
    b = calibrate_bias(np.log(p[:, :k] / (1 - p[:, :k])), rates)
    tilted = p * np.exp(np.append(b, 0.0))
    achieved = (tilted / tilted.sum(axis=1, keepdims=True)).mean(axis=0)[:k]
    assert achieved == pytest.approx(rates, abs=1e-8)


def test_bias_extremes():
    assert calibrate_bias([-800.0, -900.0], 0.25) == pytest.approx(800, abs=2)
    assert calibrate_bias([-math.inf, 0.0], 0.25) == pytest.approx(0.0, abs=1e-14)
    for margins, rate, error in (
        ([-math.inf, 0.0], 0.5, DegenerateError),
        ([math.inf, 0.0], 0.5, DegenerateError),
        ([0.0], 0.0, ArgumentError),
        ([0.0], 1.0, ArgumentError),
        ([0.0], math.nan, ArgumentError),
        ([[0.0, 0.0]], [0.5, 0.5], ArgumentError),
        ([[0.0, 0.0]], 0.5, ShapeError),
        ([], 0.5, ShapeError),
        ([math.nan], 0.5, NonFiniteError),
        ([[2.0, 2.0]], [0.1, 0.1], DegenerateError),
    ):
        with pytest.raises(error):
            calibrate_bias(margins, rate)


@pytest.mark.parametrize(
    ("alpha", "rank", "value"), [(0.05, 20, 0.94), (0.1, 19, 0.86), (0.2, 17, 0.71), (0.04, 0, math.inf)]
)
def test_reference_conformal(alpha, rank, value):
    t = calibrate_threshold(SCORES[::-1], alpha)
    assert (t.rank, t.value) == (rank, value)
    assert (np.asarray(SCORES) > t.value).sum() == (np.asarray(SCORES) >= t.gate).sum() == (20 - rank if rank else 0)
    assert alpha != 0.2 or t.expected_rate == pytest.approx(0.19047619047619047)
    assert t.n_required == {0.05: 19, 0.1: 9, 0.2: 4, 0.04: 24}[alpha]


@pytest.mark.parametrize(
    ("alpha", "delta", "rank", "value"),
    [
        (0.2, 0.1, 19, 0.86),
        (0.2, 0.05, 20, 0.94),
        (0.3, 0.1, 18, 0.77),
        (0.15, 0.1, 20, 0.94),
        (0.5, 0.1, 14, 0.52),
        (0.1, 0.1, 0, math.inf),
    ],
)
def test_reference_pac(alpha, delta, rank, value):
    t = calibrate_threshold(SCORES, alpha, delta)
    assert (t.rank, t.value, t.method) == (rank, value, "pac")


def test_reference_sample_sizes_and_chances():
    for alpha, delta, n in ((0.05, 0.05, 59), (0.01, 0.05, 299), (0.001, 0.05, 2995), (0.1, 0.1, 22), (0.2, 0.1, 11)):
        assert calibrate_threshold([0.0], alpha, delta).n_required == n
        assert calibrate_threshold(np.arange(n), alpha, delta).rank == n
        assert calibrate_threshold(np.arange(n - 1), alpha, delta).rank == 0
    for n, alpha, delta, errors, chance in (
        (200, 0.05, 0.05, 4, 0.026446800009119878),
        (1000, 0.02, 0.1, 13, 0.06422611489957845),
    ):
        t = calibrate_threshold(np.arange(n), alpha, delta)
        assert t.n - t.rank == errors
        assert t.failure_probability == pytest.approx(chance, rel=1e-13)


def test_reference_law_and_limits():
    low, high = calibrate_threshold(SCORES, 0.2).law(0.9)
    assert (low, high) == pytest.approx((0.0713538843086182, 0.3436638043142818), rel=1e-12)
    assert calibrate_threshold(SCORES, 0.04).law() == (0.0, 0.0)
    floor = calibrate_threshold(SCORES, 0.2, side="floor")
    assert floor.law() == pytest.approx((low, high))
    with pytest.raises(ArgumentError, match="level"):
        floor.law(1.0)
    # Errors are allowed as long as the one-sided Clopper-Pearson limit stays below alpha.
    upper = [1 - beta_quantile(0.1, 20 - e, e + 1) for e in range(4)]
    assert upper == pytest.approx([0.10874906186625448, 0.1809609634367385, 0.24476531712861163, 0.3041868114074787])
    for e, limit in enumerate(upper):
        assert calibrate_threshold(SCORES, math.ceil(limit * 1e6) / 1e6, 0.1).rank == 20 - e
        assert calibrate_threshold(SCORES, math.floor(limit * 1e6) / 1e6, 0.1).rank == (21 - e if e else 0)
    assert "too few" in repr(calibrate_threshold(SCORES, 0.04))
    assert "rank 17 of 20" in repr(calibrate_threshold(SCORES, 0.2))


@pytest.mark.parametrize(("n", "alpha", "delta"), [(100_000, 0.5, 0.05), (30_000, 0.001, 1e-9), (5000, 0.9, 0.2)])
def test_ranks_of_large_samples_equal_the_limit(n, alpha, delta):
    e = n - calibrate_threshold(np.arange(n), alpha, delta).rank
    assert 1 - beta_quantile(delta, n - e, e + 1) <= alpha < 1 - beta_quantile(delta, n - e - 1, e + 2)


@given(st.integers(1, 60), st.integers(1, 99), st.integers(1, 99))
@settings(max_examples=60, deadline=None)
def test_pac_rank_is_exact(n, a, d):
    alpha, delta = Fraction(a, 100), Fraction(d, 100)
    cdf, e = Fraction(0), -1
    for i in range(n):
        cdf += math.comb(n, i) * alpha**i * (1 - alpha) ** (n - i)
        if cdf > delta:
            break
        e = i
    t = calibrate_threshold(np.arange(n), a / 100, d / 100)
    assert t.rank == (n - e if e >= 0 else 0)


def test_an_exact_tie_keeps_the_claim():
    t = calibrate_threshold([1.0], 0.5, 0.5)
    assert (t.rank, t.failure_probability) == (1, 0.5)


def test_the_claim_holds_in_simulation():
    rng = np.random.default_rng(0)
    broken = [1 - calibrate_threshold(rng.random(200), 0.05, 0.05).value > 0.05 for _ in range(1500)]
    # Exact chance .0264: five standard errors of 1500 draws are .0207.
    assert abs(np.mean(broken) - 0.026446800009119878) < 0.021
    next_one = [rng.random() > calibrate_threshold(rng.random(39), 0.1).value for _ in range(4000)]
    assert abs(np.mean(next_one) - 0.1) < 0.024


def test_floor():
    t = calibrate_threshold(SCORES, 0.2, 0.1, side="floor")
    assert (t.rank, t.value) == (2, 0.05)
    assert (np.asarray(SCORES) < t.gate).sum() == 1
    assert calibrate_threshold(SCORES, 0.1, 0.1, side="floor").gate == -math.inf
    conformal = calibrate_threshold(SCORES, 0.2, side="floor")
    assert (conformal.rank, conformal.value) == (4, 0.11)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=80), st.sampled_from([0.05, 0.1, 0.3]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_decimals_decide_alike_and_survive_saving(scores, alpha, floor):
    s = np.asarray(scores)
    t = calibrate_threshold(scores, alpha, side="floor" if floor else "ceiling")
    assert float(t) == float(t.decimal) == t.gate
    assert np.array_equal(s >= t.gate, s >= t.value if floor else s > t.value)
    if math.isfinite(t.gate):
        assert t.guard == np.abs(s - t.gate).min()


def test_ties_are_conservative_and_a_threshold_gates():
    t = calibrate_threshold([0.25] * 30 + [1.5], 0.1)
    assert t.value == 0.25
    assert t.decimal == "0.3"
    z = np.array([[0.25, 0.0, -math.inf], [0.4, 0.0, -math.inf]])
    processor = RefusalTokens({"refuse": 0}, threshold=t, prompt_length=1)
    processor(np.zeros((2, 1), dtype=np.int64), z)
    assert processor.fired() == [None, "refuse"]


def test_bad_thresholds():
    for args, error in (
        (([], 0.1), ShapeError),
        (([[1.0]], 0.1), ShapeError),
        (([math.nan], 0.1), NonFiniteError),
        (([1.0], 0.0), ArgumentError),
        (([1.0], 1.0), ArgumentError),
        (([1.0], math.nan), ArgumentError),
        (([1.0], 0.1, 1.5), ArgumentError),
    ):
        with pytest.raises(error):
            calibrate_threshold(*args)
    with pytest.raises(ArgumentError, match="side"):
        calibrate_threshold([1.0], 0.1, side="middle")
