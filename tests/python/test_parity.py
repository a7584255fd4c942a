"""Gaps between groups against worked values, scipy and coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from abjure import ArgumentError, DegenerateError, ShapeError
from abjure.measure import Rate, parity_gap


def columns(counts):
    """Predictions and groups of ``{name: (k, n)}``."""
    predictions = np.concatenate([np.repeat([1, 0], [k, n - k]) for k, n in counts.values()])
    return predictions, np.repeat(list(counts), [n for _, n in counts.values()])


def test_two_groups():
    found = parity_gap(*columns({"A": (8, 10), "B": (1, 6)})).demographic_parity
    assert found.value == pytest.approx(19 / 30)
    assert (found.highest, found.lowest) == ("A", "B")
    assert found.pvalue == pytest.approx(0.0349650, abs=5e-8)
    assert found.rates == {"A": Rate(8, 10), "B": Rate(1, 6)}
    difference, interval = found.between("B", "A")
    assert difference == pytest.approx(-19 / 30)
    assert interval[0] < difference < interval[1] < 0
    assert set(found.pairs()) == {("A", "B")}
    with pytest.raises(ArgumentError, match="first, second"):
        found.between("A", "C")


@pytest.mark.parametrize("counts", [((3, 11), (7, 9)), ((0, 5), (5, 5)), ((4, 10), (4, 10)), ((100, 350), (41, 97))])
def test_fisher_equals_scipys(counts):
    (a, n), (b, m) = counts
    found = parity_gap(*columns({"x": (a, n), "y": (b, m)}), resamples=10).demographic_parity
    assert found.pvalue == pytest.approx(stats.fisher_exact([[a, n - a], [b, m - b]]).pvalue, rel=1e-9)


def test_labels_split_the_rows():
    predictions = [1, 1, 0, 1, 0, 0, 1, 0]
    labels = [1, 1, 1, 0, 1, 1, 0, 0]
    groups = ["a", "a", "a", "a", "b", "b", "b", "b"]
    found = parity_gap(predictions, groups, labels)
    assert found.equal_opportunity.rates == {"a": Rate(2, 3), "b": Rate(0, 2)}
    assert found.false_positive.rates == {"a": Rate(1, 1), "b": Rate(1, 2)}
    assert found.equalised_odds == pytest.approx(2 / 3)
    low, high = found.equalised_odds_ci
    assert 0 <= low <= 2 / 3 <= high <= 1
    assert "equal opportunity" in found._repr_html_()
    axes = found.plot()
    assert len(axes.containers) == 3


def test_a_group_without_rows_has_no_gap():
    found = parity_gap([1, 0, 1, 0], ["a", "a", "b", "b"], [1, 1, 0, 0])
    assert found.demographic_parity.value == 0
    assert found.equal_opportunity.value is None
    assert found.equal_opportunity.empty == ("b",)
    assert "None: no rows to count in 'b'" in repr(found.equal_opportunity)
    assert found.equalised_odds is None
    assert "no rows in a" in found._repr_html_()
    found.plot()
    with pytest.raises(DegenerateError, match="group 'b'"):
        found.equal_opportunity.between("a", "b")
    few = parity_gap(*columns({"a": (3, 4), "b": (5, 9)}), min_n=5)
    assert few.demographic_parity.empty == ("a",)


def test_intervals_cover_and_permutations_are_right():
    draw = np.random.default_rng(0)
    inside, p = 0, []
    for seed in range(150):
        counts = {g: (int(draw.binomial(200, share)), 200) for g, share in (("a", 0.2), ("b", 0.35), ("c", 0.6))}
        gap = parity_gap(*columns(counts), resamples=400, seed=seed).demographic_parity
        inside += gap.ci[0] <= 0.4 <= gap.ci[1]
        same = {g: (int(draw.binomial(80, 0.3)), 80) for g in "abc"}
        p.append(parity_gap(*columns(same), resamples=400, seed=seed).demographic_parity.pvalue)
    assert inside >= 133  # 95 % of 150 is 142; below 133 has a chance of 1e-3
    # Counts are few, so p-values are a little large; they are not small too often.
    assert np.mean(np.array(p) <= 0.05) < 0.11
    assert np.mean(np.array(p) <= 0.5) > 0.3


def test_refusals():
    with pytest.raises(DegenerateError, match="two groups or more, got 1"):
        parity_gap([1, 0], ["a", "a"])
    with pytest.raises(ShapeError, match="groups: expected 2 names"):
        parity_gap([1, 0], ["a"])
    with pytest.raises(ArgumentError, match="predictions: expected 0 or 1"):
        parity_gap([1, 0.5], ["a", "b"])
    with pytest.raises(ArgumentError, match="groups: expected a name"):
        parity_gap([1, 0], ["a", None])
    with pytest.raises(ShapeError, match="labels"):
        parity_gap([1, 0], ["a", "b"], [1])
    with pytest.raises(ArgumentError, match="min_n"):
        parity_gap([1, 0], ["a", "b"], min_n=0)
