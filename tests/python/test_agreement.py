"""Agreement of raters against worked values, scikit-learn and plain loops."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from abjure import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.measure import agreement, cohen_kappa, fleiss_kappa, krippendorff_alpha

FIRST, SECOND = [1, 1, 0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 1, 1, 1, 1]


def test_worked_kappas():
    assert cohen_kappa(FIRST, SECOND) == pytest.approx(0.466667, abs=5e-7)
    ordinal = cohen_kappa([1, 2, 3, 4, 5, 3], [1, 3, 3, 4, 4, 2], weights="quadratic")
    assert ordinal == pytest.approx(0.823529, abs=5e-7)
    assert cohen_kappa(["yes"] * 3, ["yes"] * 3) is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=60))
@settings(max_examples=80, deadline=None)
def test_kappa_equals_scikit_learns(pairs):
    a, b = zip(*pairs, strict=True)
    for weights in (None, "linear", "quadratic"):
        found = cohen_kappa(a, b, weights=weights, classes=range(5))
        if found is None:
            assert len(set(a + b)) == 1
        else:
            want = cohen_kappa_score(a, b, labels=range(5), weights=weights)
            assert found == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_the_kappa_paradox_is_shown():
    a = [1] * 95 + [0] * 5
    b = [1] * 90 + [0] * 5 + [1] * 5
    found = agreement(a, b)
    assert found.observed == 0.9
    assert found.kappa < 0
    assert found.ac1 > 0.88
    assert found.prevalence == 0.9
    assert found.bias == 0
    assert found.ci[0] <= found.kappa <= found.ci[1]
    assert found.classes == (0, 1)
    assert found.table.tolist() == [[0, 5], [5, 90]]
    assert "kappa=-0.05" in repr(found)
    alone = agreement([1, 1], [1, 1])
    assert (alone.kappa, alone.ci, alone.ac1, alone.observed) == (None, None, None, 1)


def test_kappa_interval_covers():
    draw = np.random.default_rng(1)
    table = np.array([[0.5, 0.1], [0.1, 0.3]])
    truth = (0.8 - (0.6**2 + 0.4**2)) / (1 - (0.6**2 + 0.4**2))
    inside = 0
    for seed in range(120):
        at = draw.choice(4, size=150, p=table.ravel())
        low, high = agreement(at // 2, at % 2, resamples=300, seed=seed).ci
        inside += low <= truth <= high
    assert inside >= 105


def test_fleiss():
    # Fleiss's own example has 14 raters of 10 subjects in 5 classes: kappa .210.
    counts = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    ratings = [[c for c, n in enumerate(row) for _ in range(n)] for row in counts]
    assert fleiss_kappa(ratings) == pytest.approx(0.20993, abs=5e-6)
    assert fleiss_kappa([["a", "a"], ["a", "a"]]) is None
    with pytest.raises(ArgumentError, match="every rater"):
        fleiss_kappa([[1, None], [1, 0]])


def plain_alpha(units, distance):
    """Mean distance of pairs within units, over that of all pairs of values."""
    units = [u for u in units if len(u) > 1]
    values = [v for u in units for v in u]
    n = len(values)
    within = sum(sum(distance(a, b) for a, b in permutations(u, 2)) / (len(u) - 1) for u in units) / n
    across = sum(distance(a, b) for a, b in permutations(values, 2)) / (n * (n - 1))
    return 1 - within / across


def test_krippendorffs_example():
    # Four observers, twelve units, of Krippendorff 2011: nominal .743, ordinal .815, interval .849.
    n = None
    data = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, n, n, n],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, n, 3],
            [n, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, n],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, n],
        ],
        dtype=object,
    ).T
    for level, want in (("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)):
        assert krippendorff_alpha(data, level) == pytest.approx(want, abs=5e-4)
    units = [[v for v in row if v is not None] for row in data]
    for level, distance in (("nominal", lambda a, b: a != b), ("interval", lambda a, b: (a - b) ** 2)):
        assert krippendorff_alpha(data, level) == pytest.approx(plain_alpha(units, distance), rel=1e-12)
    # As floats with NaN, and in another order of raters.
    floats = data.astype(float)
    assert krippendorff_alpha(floats[:, ::-1], "interval") == pytest.approx(krippendorff_alpha(data, "interval"))


def test_ordinal_distance_by_its_definition():
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 5, 40)
    data = np.clip(truth[:, None] + draw.integers(-1, 2, (40, 3)), 0, 4)
    total = np.bincount(data.ravel(), minlength=5)

    def distance(a, b):
        a, b = min(a, b), max(a, b)
        return (total[a : b + 1].sum() - (total[a] + total[b]) / 2) ** 2

    assert krippendorff_alpha(data, "ordinal") == pytest.approx(plain_alpha(data.tolist(), distance), rel=1e-12)


def test_refusals():
    with pytest.raises(ShapeError, match="second: expected 2 ratings"):
        cohen_kappa([1, 0], [1])
    with pytest.raises(ArgumentError, match="no rating at index 1"):
        cohen_kappa([1, None], [1, 0])
    with pytest.raises(ArgumentError, match="classes"):
        cohen_kappa([1, 2], [1, 2], classes=[0, 1])
    with pytest.raises(ArgumentError, match="weights"):
        cohen_kappa([1, 2], [1, 2], weights="cubic")
    with pytest.raises(ShapeError, match="ratings"):
        krippendorff_alpha([[1], [2]])
    with pytest.raises(DegenerateError, match="two ratings"):
        krippendorff_alpha([[1, None], [None, 2]])
    with pytest.raises(DTypeError, match="numbers"):
        krippendorff_alpha([["a", "b"]], "interval")
    with pytest.raises(NonFiniteError):
        krippendorff_alpha([[1.0, np.inf]], "interval")
    with pytest.raises(ArgumentError, match="level"):
        krippendorff_alpha([[1, 2]], "ratio")
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None
