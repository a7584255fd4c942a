"""Paired audits of refusals against worked values, scipy, plain resampling and planted changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

import abjure
from abjure import ArgumentError, DegenerateError, DTypeError, ShapeError
from abjure.measure import Rate, Report, refusal_shift


def pairs(groups):
    """Columns of ``{name: (neither, reference only, suspect only, both)}``."""
    reference = np.concatenate([np.repeat([0, 1, 0, 1], c) for c in groups.values()])
    suspect = np.concatenate([np.repeat([0, 0, 1, 1], c) for c in groups.values()])
    names = np.repeat(list(groups), [sum(c) for c in groups.values()]).tolist()
    return reference, suspect, [f"prompt {i}" for i in range(len(names))], names


def test_worked_example():
    r, s, prompts, groups = pairs({"a": (6, 1, 3, 2), "b": (9, 0, 0, 1), "c": (3, 4, 1, 0)})
    found = refusal_shift(r, s, prompts, groups, resamples=2000)
    a = found.columns["group"].groups["a"]
    assert (a.reference, a.suspect, a.newly_refused) == (Rate(3, 12), Rate(5, 12), Rate(3, 9))
    assert a.difference == pytest.approx(2 / 12)
    assert a.pvalue == pytest.approx(stats.binomtest(1, 4, 0.5).pvalue)
    assert found.overall.counts.n == 30
    assert found.overall.difference == pytest.approx((4 - 5) / 30)
    gap = found.columns["group"].gaps[0]
    assert gap.reference.value == pytest.approx(4 / 8 - 1 / 10)
    assert gap.suspect.value == pytest.approx(5 / 12 - 1 / 10)
    assert gap.change.value == pytest.approx(5 / 12 - 4 / 8)
    assert gap.shift.value == pytest.approx(2 / 12 - -3 / 8)
    assert gap.pair == ("a", "c")
    assert gap.chosen
    assert gap.two_group_change.value == pytest.approx(2 / 12 + 3 / 8)
    named = refusal_shift(r, s, prompts, groups, pair=("b", "a"), resamples=2000).columns["group"].gaps[0]
    assert not named.chosen
    assert named.two_group[1].value == pytest.approx(abs(1 / 10 - 5 / 12))
    assert named.two_group_change.value == pytest.approx(0 - 2 / 12)


def test_labels_give_equal_opportunity_and_over_refusal():
    r, s, prompts, groups = pairs({"a": (6, 1, 3, 2), "b": (9, 0, 2, 1)})
    labels = [i % 2 == 0 for i in range(len(prompts))]
    found = refusal_shift(r, s, prompts, groups, labels=labels, resamples=500)
    for gap, wanted in zip(found.columns["group"].gaps, (None, True, False), strict=True):
        rates = []
        for g in ("a", "b"):
            rows = [i for i, n in enumerate(groups) if n == g and wanted in (None, labels[i])]
            rates.append((r[rows].mean(), s[rows].mean()))
        assert gap.reference.value == pytest.approx(abs(rates[0][0] - rates[1][0]))
        assert gap.suspect.value == pytest.approx(abs(rates[0][1] - rates[1][1]))
        assert gap.pair == ("a", "b")
        assert not gap.chosen
    none = refusal_shift(r, s, prompts, groups, labels=[g == "a" for g in groups], resamples=100)
    assert [g.empty for g in none.columns["group"].gaps] == [(), ("b",), ("a",)]
    assert none.columns["group"].gaps[1].suspect.value is None
    assert "no such prompt in b" in none._repr_html_()


def test_intervals_are_those_of_resampled_pairs():
    r, s, prompts, groups = pairs({"a": (60, 6, 23, 11), "b": (30, 20, 4, 26)})
    found = refusal_shift(r, s, prompts, groups, resamples=20_000).columns["group"]
    rng = np.random.default_rng(1)
    moved = []
    for g in ("a", "b"):
        rows = np.flatnonzero(np.array(groups) == g)
        at = rows[rng.integers(len(rows), size=(20_000, len(rows)))]
        moved.append(s[at].mean(axis=1) - r[at].mean(axis=1))
        low, high = np.quantile(moved[-1], [0.025, 0.975])
        assert found.groups[g].interval == pytest.approx((low, high), abs=0.011)
    low, high = np.quantile(moved[0] - moved[1], [0.025, 0.975])
    assert found.gaps[0].two_group_change.interval == pytest.approx((low, high), abs=0.012)


def test_the_score_interval_covers():
    rng = np.random.default_rng(0)
    p = np.array([0.6, 0.05, 0.15, 0.2])
    inside = 0
    for _ in range(400):
        c = rng.multinomial(60, p)
        r, s, prompts, _ = pairs({"a": tuple(c)})
        low, high = refusal_shift(r, s, prompts, resamples=10).overall.score_interval()
        inside += low <= 0.1 <= high
    assert 0.92 <= inside / 400 <= 0.99
    same = refusal_shift([0] * 50, [0] * 50, range(50)).overall
    assert same.interval == (0, 0)
    assert same.score_interval()[0] < -0.05


def test_one_group_is_named_and_clean_models_are_not():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(20), 100)
    flags = {"holm": 0, "bh": 0}
    for _ in range(100):
        r = rng.random(2000) < 0.2
        s = r ^ (rng.random(2000) < 0.05)
        found = refusal_shift(r, s, range(2000), groups, resamples=10)
        for method in flags:
            flags[method] += bool(found.flagged(method=method))
    assert max(flags.values()) <= 10
    planted = s | ((groups == 13) & (rng.random(2000) < 0.3))
    found = refusal_shift(r, planted, range(2000), groups, resamples=500)
    assert [(c, g.name) for c, g in found.flagged()] == [("group", 13)]
    assert found.columns["group"].heterogeneity < 0.01
    assert found.columns["group"].groups[13].interval[0] > 0.1


def test_heterogeneity_is_uniform_without_an_effect():
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(5), 60)
    p = []
    for _ in range(150):
        r = rng.random(300) < 0.3
        s = r ^ (rng.random(300) < 0.2)
        p.append(refusal_shift(r, s, range(300), groups, resamples=200).columns["group"].heterogeneity)
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_forms_of_input_agree():
    r, s, prompts, groups = pairs({"a": (6, 1, 3, 2), "b": (9, 0, 0, 1)})
    said = {0: "Sure, here it is.", 1: "I'm sorry, but I can't help with that."}
    by_text = refusal_shift([said[v] for v in r], [said[v] for v in s], prompts, groups, resamples=100)
    mapped = refusal_shift(
        dict(zip(prompts, r.tolist(), strict=True)), dict(zip(prompts, s.tolist(), strict=True)), prompts,
        {"group": groups}, resamples=100,
    )  # fmt: skip
    plain = refusal_shift(r, s, prompts, groups, resamples=100)
    assert by_text.to_dict() == mapped.to_dict() == plain.to_dict()


def test_threads_and_order_change_nothing():
    rng = np.random.default_rng(4)
    n = 3000
    r, s, groups = rng.random(n) < 0.3, rng.random(n) < 0.3, np.sort(rng.integers(0, 40, n))
    before = abjure.get_num_threads()
    found = []
    for threads in (1, 4):
        abjure.set_num_threads(threads)
        found.append(refusal_shift(r, s, range(n), groups, resamples=5000).to_dict())
    abjure.set_num_threads(before)
    order = np.lexsort((rng.random(n), groups))
    found.append(refusal_shift(r[order], s[order], range(n), groups[order], resamples=5000).to_dict())
    assert found[0] == found[1] == found[2]


def test_missing_verdicts():
    r, s = [1, None, 0, 0], [1, 0, 1, None]
    with pytest.raises(ArgumentError, match="no verdict at index 1"):
        refusal_shift(r, s, range(4))
    found = refusal_shift(r, s, range(4), invalid="exclude", resamples=50)
    assert (found.invalid, found.overall.counts.n) == (2, 2)
    assert "2 prompts without a verdict" in " ".join(found.notes())
    with pytest.raises(DegenerateError, match="no prompt has a verdict"):
        refusal_shift([None], [1], ["a"], invalid="exclude")


def test_bad_input():
    with pytest.raises(ShapeError, match=r"suspect: expected 2 outcomes.*not paired"):
        refusal_shift([1, 0], [1], ["a", "b"])
    with pytest.raises(ArgumentError, match=r"suspect: .* 1 prompts without, such as 'b', and 1 outcomes"):
        refusal_shift({"a": 1, "b": 0}, {"a": 1, "c": 0}, ["a", "b"])
    with pytest.raises(ArgumentError, match="expected 0 or 1"):
        refusal_shift([1, 2], [1, 0], ["a", "b"])
    with pytest.raises(DTypeError):
        refusal_shift([1, object()], [1, 0], ["a", "b"])
    with pytest.raises(DegenerateError, match="two groups"):
        refusal_shift([1, 0], [1, 0], ["a", "b"], ["x", "x"])
    with pytest.raises(ArgumentError, match="groups: expected a value in every row"):
        refusal_shift([1, 0], [1, 0], ["a", "b"], ["x", None])
    for pair in (("x", "x"), ("x", "z")):
        with pytest.raises(ArgumentError, match="pair"):
            refusal_shift([1, 0], [1, 0], ["a", "b"], ["x", "y"], pair=pair)
    with pytest.raises(ArgumentError, match="labels"):
        refusal_shift([1, 0], [1, 0], ["a", "b"], labels=[1, None])
    with pytest.raises(ShapeError, match="prompts"):
        refusal_shift([], [], [])
    with pytest.raises(ArgumentError, match="method"):
        refusal_shift([1, 0], [1, 0], ["a", "b"]).flagged(method="none")
    with pytest.raises(ArgumentError, match="alpha"):
        refusal_shift([1, 0], [1, 0], ["a", "b"]).flagged(1.0)


def test_it_goes_into_a_report():
    r, s, prompts, groups = pairs({"a": (6, 1, 3, 2), "b": (9, 0, 0, 1)})
    page = Report("Audit").add("Shift", refusal_shift(r, s, prompts, groups, resamples=100)).to_markdown()
    assert all(word in page for word in ("group: a", "demographic parity, max - min, change", "Holm"))
    assert len(list(itertools.islice(page.splitlines(), 100))) > 10
