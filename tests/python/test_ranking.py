"""Areas under the ROC curve: ties, intervals, and DeLong's test by its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from abjure import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from abjure.measure import auroc, auroc_difference, average_precision

Y, S = [0, 0, 1, 1, 1, 0], [0.1, 0.4, 0.35, 0.8, 0.4, 0.4]


def test_worked_values():
    assert auroc(Y, S).value == pytest.approx(2 / 3, abs=1e-15)
    assert average_precision(Y, S) == pytest.approx(0.7)
    assert auroc([0, 1, 1], [5, 5, 5]).value == 0.5
    assert float(auroc([1, 0], [0.2, 0.1])) == 1


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=60))
@settings(max_examples=80, deadline=None)
def test_equals_scikit_learns(rows):
    y, s = zip(*rows, strict=True)
    if len(set(y)) < 2:
        with pytest.raises(DegenerateError, match="both classes"):
            auroc(y, s)
    else:
        assert auroc(y, s).value == pytest.approx(roc_auc_score(y, s), abs=1e-12)


def kernel(a, b):
    return (a[:, None] > b) + 0.5 * (a[:, None] == b)


def test_delong_by_its_definition():
    draw = np.random.default_rng(0)
    y = draw.integers(0, 2, 80)
    first = np.round(draw.standard_normal(80) + y, 1)
    second = np.round(first / 2 + draw.standard_normal(80) + y / 3, 1)
    psi = [kernel(s[y == 1], s[y == 0]) for s in (first, second)]
    rows, columns = (np.array([p.mean(axis=axis) for p in psi]) for axis in (1, 0))
    covariance = np.cov(rows) / rows.shape[1] + np.cov(columns) / columns.shape[1]
    assert auroc(y, first).variance == pytest.approx(covariance[0, 0], rel=1e-12)
    found = auroc_difference(y, first, second)
    contrast = np.array([1, -1])
    assert found.se == pytest.approx(np.sqrt(contrast @ covariance @ contrast), rel=1e-12)
    assert found.value == pytest.approx(roc_auc_score(y, first) - roc_auc_score(y, second))
    assert found.low < found.value < found.high
    same = auroc_difference(y, first, first * 3)
    assert (same.value, same.se, same.pvalue) == (0, 0, 1)


def test_intervals():
    parted = auroc([1] * 10 + [0] * 10, np.arange(20)[::-1])
    assert parted.ci("delong") == (1, 1)
    low, high = parted.ci()
    assert low < 0.9
    assert high == 1
    wide, narrow = parted.ci(level=0.99), parted.ci(level=0.5)
    assert wide[0] < low < narrow[0]
    # Both cover the area of two normal samples a standard deviation apart, 0.7602.
    draw, inside = np.random.default_rng(2), {"newcombe": 0, "delong": 0}
    y = np.repeat([1, 0], [40, 60])
    for _ in range(300):
        found = auroc(y, draw.standard_normal(100) + y)
        for method in inside:
            low, high = found.ci(method)
            inside[method] += low <= 0.76025 <= high
    assert min(inside.values()) >= 270
    assert max(inside.values()) < 300


def test_refusals():
    with pytest.raises(ShapeError, match=r"labels: expected shape \(2,\)"):
        auroc([1], [0.1, 0.2])
    with pytest.raises(NonFiniteError, match="score"):
        auroc([1, 0], [0.1, np.nan])
    with pytest.raises(ArgumentError, match="labels: expected 0 or 1"):
        auroc([1, 2], [0.1, 0.2])
    with pytest.raises(ArgumentError, match="method"):
        auroc(Y, S).ci("wald")
    with pytest.raises(ArgumentError, match="level"):
        auroc(Y, S).ci(level=0)
    with pytest.raises(DegenerateError, match="2 rows or more"):
        auroc_difference([1, 0, 0], [1, 2, 3], [1, 2, 3])
    with pytest.raises(ShapeError, match="second"):
        auroc_difference(Y, S, S[:3])
