"""Bounds of gaps against enumeration, linear programmes and simulated populations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from abjure import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from abjure.measure import GapBounds, ParityBounds, ParityGap, parity_gap


def rows_of(cells):
    """Predictions and groups of ``{group or None: (zeros, ones)}``."""
    said = np.concatenate([np.repeat([0, 1], c) for c in cells.values()])
    groups = [g for g, c in cells.items() for _ in range(sum(c))]
    return said, groups


def splits(total, parts):
    return (c for c in itertools.product(range(total + 1), repeat=parts) if sum(c) == total)


def test_missing_groups_by_enumeration():
    for cells in (
        {"a": (9, 5), "b": (4, 8), "c": (7, 7), None: (4, 5)},
        {"a": (30, 2), "b": (3, 20), None: (6, 3)},
        {"a": (10, 10), "b": (20, 20), None: (3, 3)},
    ):
        said, groups = rows_of(cells)
        gap = parity_gap(said, groups, basis="volunteered", resamples=50).demographic_parity
        names = [g for g in cells if g is not None]
        u0, u1 = cells[None]
        gaps, differences = [], []
        for zeros, ones in itertools.product(splits(u0, len(names)), splits(u1, len(names))):
            rate = [(cells[g][1] + o) / (sum(cells[g]) + o + z) for g, z, o in zip(names, zeros, ones, strict=True)]
            gaps.append(max(rate) - min(rate))
            differences.append(rate[0] - rate[1])
        assert gap.high == pytest.approx(max(gaps))
        # Whole rows cannot always be dealt as evenly as shares of rows.
        assert gap.low <= min(gaps) + 1e-12
        assert gap.low >= min(gaps) - 0.03
        assert gap.between(*names[:2]) == pytest.approx((min(differences), max(differences)))
        assert gap.interval[0] <= gap.low <= gap.high <= gap.interval[1]
        assert gap.low - 1e-12 <= gap.point <= gap.high + 1e-12
        assert (gap.unknown, gap.n) == (u0 + u1, len(said))
    assert gap.low == 0


def test_missing_at_random_is_recovered():
    rng = np.random.default_rng(0)
    n = 40_000
    group = rng.integers(0, 3, n)
    said = rng.random(n) < np.array([0.2, 0.35, 0.5])[group]
    # Refused users are asked for the attribute more rarely: the observed rows alone are wrong.
    seen = rng.random(n) < np.where(said, 0.3, 0.9)
    groups = [int(g) if s else None for g, s in zip(group, seen, strict=True)]
    gap = parity_gap(said, groups, basis=("volunteered", "required by law"), resamples=200).demographic_parity
    assert gap.point == pytest.approx(0.3, abs=0.02)
    assert gap.point_interval[0] <= 0.3 <= gap.point_interval[1]
    observed = parity_gap(said[seen], group[seen].tolist(), resamples=10).demographic_parity.value
    assert abs(observed - 0.3) > 0.05
    assert gap.low <= 0.3 <= gap.high
    assert gap.basis == "volunteered and required by law"


def programme(cells, q, said, groups):
    """Least and largest gap by linear programmes over the ones of each cell and group."""
    names = np.unique(cells)
    total = q.sum(axis=0)
    share = np.array([q[cells == z].sum(axis=0) for z in names])
    ones = np.array([said[cells == z].sum() for z in names])
    rows = np.array([(cells == z).sum() for z in names])
    count = len(names) * groups
    equal = np.zeros((len(names), count + 2))
    for z in range(len(names)):
        equal[z, z * groups : (z + 1) * groups] = 1
    limits = [
        (max(0.0, ones[z] + share[z, g] - rows[z]), min(ones[z], share[z, g]))
        for z in range(len(names))
        for g in range(groups)
    ]
    inside = []
    for g in range(groups):
        rate = np.zeros(count + 2)
        rate[g:count:groups] = 1 / total[g]
        low, high = rate.copy(), -rate.copy()
        low[-1], high[-2] = -1, 1
        inside += [low, high]
    aim = np.zeros(count + 2)
    aim[-2:] = -1, 1
    free = [*limits, (0, 1), (0, 1)]
    least = linprog(aim, np.array(inside), np.zeros(len(inside)), equal, ones, bounds=free).fun
    most = -1.0
    for g, h in itertools.permutations(range(groups), 2):
        aim = np.zeros(count + 2)
        aim[g:count:groups] = -1 / total[g]
        aim[h:count:groups] += 1 / total[h]
        most = max(most, -linprog(aim, A_eq=equal, b_eq=ones, bounds=free).fun)
    return least, most


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_proxy_bounds_are_those_of_linear_programmes(groups):
    rng = np.random.default_rng(groups)
    for _ in range(6):
        kinds = rng.dirichlet(np.full(groups, 0.4), size=5)
        cells = rng.integers(0, 5, 200)
        said = rng.random(200) < rng.random(5)[cells]
        found = parity_gap(said, probabilities=kinds[cells], basis="inferred", resamples=20).demographic_parity
        least, most = programme(cells, kinds[cells], said, groups)
        assert (found.low, found.high) == pytest.approx((least, most), abs=1e-9)


def test_thresholding_is_biased_and_weighting_is_not():
    rng = np.random.default_rng(1)
    n = 20_000
    cell = rng.integers(0, 10, n)
    q = np.linspace(0.05, 0.95, 10)[cell]
    member = rng.random(n) < q
    # Districts with more members are refused more: independent of membership within a district.
    said = rng.random(n) < 0.1 + 0.4 * q
    truth = abs(said[member].mean() - said[~member].mean())
    gap = parity_gap(said, probabilities={"member": q, "other": 1 - q}, cells=cell, basis="inferred", resamples=100)
    gap = gap.demographic_parity
    assert gap.point == pytest.approx(truth, abs=0.02)
    assert gap.thresholding_bias > 0.05
    assert gap.low <= truth <= gap.high
    assert not gap.identified
    # Where membership itself decides, the weighted estimate is wrong and the bounds still hold.
    said = rng.random(n) < np.where(member, 0.5, 0.1)
    gap = parity_gap(said, probabilities={"member": q, "other": 1 - q}, cells=cell, basis="inferred", resamples=100)
    gap = gap.demographic_parity
    assert abs(gap.point - 0.4) > 0.1
    assert gap.interval[0] <= 0.4 <= gap.interval[1]


def test_certain_probabilities_identify_the_gap():
    said, groups = rows_of({"a": (9, 5), "b": (4, 8)})
    q = np.array([[g == "a", g == "b"] for g in groups], dtype=float)
    labels = np.arange(len(said)) % 2
    exact = parity_gap(said, groups, labels, basis="required by law", resamples=50)
    assert isinstance(exact, ParityGap)
    assert "basis: required by law" in repr(exact)
    for found in (
        parity_gap(said, None, labels, probabilities=q, names=["a", "b"], basis="inferred", resamples=50),
        parity_gap(
            said, groups, labels, probabilities=np.full(q.shape, 0.5), names=["a", "b"], basis="imputed", resamples=50
        ),
    ):  # fmt: skip
        assert isinstance(found, ParityBounds)
        for name in ("demographic_parity", "equal_opportunity", "false_positive"):
            gap = getattr(found, name)
            assert isinstance(gap, GapBounds)
            assert gap.identified
            assert gap.low == pytest.approx(getattr(exact, name).value)


def test_intervals_cover_the_bounds():
    rng = np.random.default_rng(2)
    p = np.array([0.2, 0.1, 0.25, 0.2, 0.1, 0.15])
    cells = ["a", "a", "b", "b", None, None]
    truth = parity_gap(
        *rows_of(dict(zip("abN", [(2000, 1000), (2500, 2000), (1000, 1500)], strict=True))), resamples=10
    )
    assert isinstance(truth, ParityGap)
    large = np.round(p * 100_000).astype(int)
    said, groups = (
        np.repeat([0, 1, 0, 1, 0, 1], large),
        [g for g, k in zip(cells, large, strict=True) for _ in range(k)],
    )
    exact = parity_gap(said, groups, basis="volunteered", resamples=10).demographic_parity
    covered = 0
    for _ in range(100):
        k = rng.multinomial(300, p)
        said, groups = np.repeat([0, 1, 0, 1, 0, 1], k), [g for g, m in zip(cells, k, strict=True) for _ in range(m)]
        gap = parity_gap(said, groups, basis="volunteered", resamples=200).demographic_parity
        covered += gap.interval[0] <= exact.low and exact.high <= gap.interval[1]
    assert covered >= 88


def test_the_basis_is_printed_with_every_number():
    said, groups = rows_of({"a": (9, 5), "b": (4, 8), None: (3, 3)})
    found = parity_gap(said, groups, said, basis="volunteered", resamples=50)
    for text in (
        repr(found),
        found._repr_html_(),
        repr(found.demographic_parity),
        found.demographic_parity._repr_html_(),
    ):
        assert "volunteered" in text
    assert all(r["basis"] == "volunteered" for r in found.table())
    assert "volunteered" in found.plot().get_xlabel()
    assert "basis: not stated" in repr(parity_gap([1, 0], ["a", "b"], resamples=10))
    empty = parity_gap([1, 0, 1], ["a", "b", None], [1, 0, 0], basis="imputed", resamples=10)
    assert empty.equal_opportunity.low is None
    assert empty.equal_opportunity.empty == ("b",)
    assert "no rows in 'b'" in repr(empty)
    with pytest.raises(DegenerateError, match="rows in every group"):
        empty.equal_opportunity.between("a", "b")


def test_bad_input():
    half = [[0.5, 0.5], [0.5, 0.5]]
    with pytest.raises(ArgumentError, match="or basis="):
        parity_gap([1, 0, 1], ["a", "b", None])
    for basis in (None, "guessed", (), ["inferred", "guessed"]):
        with pytest.raises(ArgumentError, match="basis: expected how"):
            parity_gap([1, 0], probabilities=half, basis=basis)
    with pytest.raises(ArgumentError, match="basis"):
        parity_gap([1, 0], ["a", "b"], basis="guessed")
    with pytest.raises(ArgumentError, match=r"sum to 1.*in row 1"):
        parity_gap([1, 0], probabilities=[[0.5, 0.5], [0.5, 0.4]], basis="inferred")
    with pytest.raises(ArgumentError, match=r"sum to 1.*in row 0"):
        parity_gap([1, 0], probabilities=[[1.5, -0.5], [0.5, 0.5]], basis="inferred")
    with pytest.raises(NonFiniteError, match="row 1"):
        parity_gap([1, 0], probabilities=[[0.5, 0.5], [np.nan, 0.4]], basis="inferred")
    with pytest.raises(ShapeError, match="probabilities"):
        parity_gap([1, 0], probabilities=[[0.5, 0.5]], basis="inferred")
    with pytest.raises(DegenerateError, match="two groups"):
        parity_gap([1, 0], probabilities=[[1.0], [1.0]], basis="inferred")
    with pytest.raises(ArgumentError, match="names"):
        parity_gap([1, 0], probabilities=half, names=["a", "a"], basis="inferred")
    with pytest.raises(ArgumentError, match="groups: expected names of"):
        parity_gap([1, 0], ["a", None], probabilities=half, names=["x", "y"], basis="inferred")
    with pytest.raises(ArgumentError, match="at least one"):
        parity_gap([1, 0])
    with pytest.raises(ArgumentError, match="at most 12"):
        parity_gap([1, 0], probabilities=np.full((2, 13), 1 / 13), basis="inferred")
    with pytest.raises(DegenerateError, match="two groups"):
        parity_gap([1, 0], ["a", None], basis="inferred")
