"""The percentile of pooled ratios against NumPy, and dampening with the alpha that it gives."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import abjure
from abjure import _native
from abjure.forget import AdaptiveAlpha, Fisher, adaptive_alpha, dampen_
from abjure.forget.adaptive import pooled_alpha, share_percentile
from abjure.forget.pairs import pair
from abjure.integrations.torch import DEVICE_PATHS


def pooled(f, d):
    """All ratios, in the dtype of the importances, as float64."""
    with np.errstate(all="ignore"):
        return np.concatenate([(f[n] / d[n]).astype(np.float64).ravel() for n in f])


@pytest.mark.parametrize(
    ("forget", "total", "percentile"),
    [(100, 50_000, 99.81767844320605), (10, 1_000, 99.30685281944005), (500, 5_000, 97.60210472720163)],
)
def test_percentiles_of_the_reference(forget, total, percentile):
    assert share_percentile(forget / total) == pytest.approx(percentile, rel=1e-15)
    rng = np.random.default_rng(0)
    f, d = ({"w": rng.random(100)} for _ in range(2))
    found = adaptive_alpha(f, d, forget, total)
    assert found.percentile == pytest.approx(percentile, rel=1e-15)
    assert found.value == np.percentile(pooled(f, d), found.percentile)


SPECIAL = [0.0, -0.0, 1.0, 2.0, 0.5, 3.0, 1e-40, 1e-30, 1e30, math.inf]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_equals_numpy(data):
    """Zeros of both signs, ties, subnormals, infinities; shapes, layouts, dtypes, threads, counts."""
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    q = data.draw(st.one_of(st.floats(0, 100), st.sampled_from([0.0, 50.0, 100.0])))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ties = data.draw(st.booleans())
    f, d = {}, {}
    for k in range(data.draw(st.integers(1, 4))):
        shape = tuple(data.draw(st.lists(st.integers(0, 30), max_size=2)))
        a, b = (np.asarray(rng.choice(SPECIAL[:-1], shape) if ties else rng.random(shape), dtype=dtype) for _ in "ab")
        if ties:
            a = np.where(rng.random(shape) < 0.05, dtype(np.inf), a)
        f[str(k)], d[str(k)] = (a.T, b.T) if data.draw(st.booleans()) else (a, b)
    d["0"] = np.where(d["0"] == 0, 1, d["0"]).astype(dtype) if d["0"].size else d["0"]
    ratios = pooled(f, {n: v + 0.0 for n, v in d.items()})
    finite = ratios[np.isfinite(ratios)]
    threads = abjure.get_num_threads()
    try:
        abjure.set_num_threads(data.draw(st.integers(1, 4)))
        native = _native.ratio_percentile(
            [np.ascontiguousarray(v) for v in f.values()], [np.ascontiguousarray(v) for v in d.values()], q, 1.0, 1.0
        )
        if len(finite):
            found = adaptive_alpha(f, d, percentile=q)
    finally:
        abjure.set_num_threads(threads)
    counts = len(finite), int(np.isinf(ratios).sum()), int(np.isnan(ratios).sum())
    assert native[1:] == counts
    if len(finite):
        assert found.value == np.percentile(finite, q)
        assert (found.finite, found.infinite, found.undefined) == counts
        assert native[0] == found.value


def test_large_arrays_on_any_number_of_threads():
    """Many work items, heavy ties, and a rank on a boundary between two leading digits of the bit pattern."""
    rng = np.random.default_rng(3)
    n = 600_001
    f = {"a": rng.integers(0, 50, n).astype(np.float32), "b": rng.lognormal(0, 9, n).astype(np.float32)}
    d = {"a": rng.integers(0, 50, n).astype(np.float32), "b": rng.lognormal(0, 9, n).astype(np.float32)}
    ratios = pooled(f, d)
    finite = ratios[np.isfinite(ratios)]
    for q in (0.0, 1e-7, 37.5, 50.0, 97.6, 99.9999, 100.0):
        expected = np.percentile(finite, q)
        found = set()
        threads = abjure.get_num_threads()
        try:
            for k in (1, 2, 5):
                abjure.set_num_threads(k)
                found.add(adaptive_alpha(f, d, percentile=q).value)
        finally:
            abjure.set_num_threads(threads)
        assert found == {expected}


def test_counts_of_a_fisher_divide_first():
    rng = np.random.default_rng(0)
    forget, retain = Fisher(), Fisher()
    for _ in range(3):
        forget.update({"w": rng.normal(size=999).astype(np.float32)})
    for _ in range(7):
        retain.update({"w": rng.normal(size=999).astype(np.float32)})
    found = adaptive_alpha(forget, retain, share=0.2)
    assert found.value == np.percentile((forget["w"] / retain["w"]).astype(np.float64), found.percentile)
    assert found.share == 0.2
    w = {"w": np.ones(999, np.float32)}
    report = dampen_(w, forget, retain, found)
    # The percentile is that of the ratios that the selection compares.
    assert report.total.count == int((forget["w"] / retain["w"] > found.value).sum()) == 31
    assert report.adaptive == found


def test_infinite_ratios_are_left_out_but_erased():
    """Section 1.1 of the note: x/0 does not enter the percentile, and is still selected and zeroed."""
    f = {"w": np.array([4, 1, 2, 3, 0, 8], np.float32)}
    d = {"w": np.array([0, 1, 1, 1, 0, 1], np.float32)}
    found = adaptive_alpha(f, d, percentile=50)
    assert found == AdaptiveAlpha(2.5, 50.0, None, 4, 1, 1)
    w = {"w": np.ones(6, np.float32)}
    assert dampen_(w, f, d, found).total == (3, 3, 1)
    assert w["w"].tolist() == [0, 1, 1, np.float32(1 / 3), 1, 0.125]
    assert "1 infinite and 1 undefined left out" in str(found)


def test_dampening_by_the_adaptive_rule():
    rng = np.random.default_rng(5)
    f, d = ({n: rng.random((50, 40)).astype(np.float32) for n in "ab"} for _ in range(2))
    w = {n: rng.normal(size=(50, 40)).astype(np.float32) for n in "ab"}
    expected = {n: v.copy() for n, v in w.items()}
    alpha = adaptive_alpha(f, d, 50, 1000)
    dampen_(expected, f, d, float(alpha))
    report = dampen_(w, f, d, "adaptive", forget_size=50, total_size=1000)
    assert all(np.array_equal(w[n], expected[n]) for n in w)
    assert report.adaptive == alpha
    assert report.alpha == alpha.value
    assert "percentile" in str(report)
    # Patterns choose what is pooled, too.
    only = dampen_(w, f, d, "adaptive", forget_size=50, total_size=1000, include="a", dry_run=True)
    assert only.adaptive == adaptive_alpha({"a": f["a"]}, {"a": d["a"]}, 50, 1000)
    # lambda/alpha applies to whatever alpha was found.
    half = dampen_(w, f, d, "adaptive", forget_size=50, total_size=1000, ratio=0.5, dry_run=True)
    assert half.lam == 0.5 * alpha.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_form_agrees(dtype):
    g = torch.Generator().manual_seed(0)
    f, d = ([torch.rand(n, 3, generator=g, dtype=dtype) for n in (5, 70)] for _ in range(2))
    d[0][1], f[0][:2] = 0, 0
    d[1][3] = 0
    for q in (0.0, 33.0, 99.0, 100.0):
        assert DEVICE_PATHS["ratio_percentile"](f, d, q, 3.0, 7.0) == _native.ratio_percentile(f, d, q, 3.0, 7.0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({}, abjure.ArgumentError, "exactly one"),
        ({"forget_size": 5}, abjure.ArgumentError, "total_size"),
        ({"forget_size": 5, "total_size": 4}, abjure.ArgumentError, "5 and 4"),
        ({"forget_size": 0, "total_size": 4}, abjure.ArgumentError, "forget_size"),
        ({"share": 0.0}, abjure.ArgumentError, "share"),
        ({"share": math.nan}, abjure.ArgumentError, "share"),
        ({"share": 1e45}, abjure.ArgumentError, "share"),
        ({"share": 0.1, "percentile": 3}, abjure.ArgumentError, "exactly one"),
        ({"percentile": 101}, abjure.ArgumentError, "percentile"),
        ({"share": 0.1, "include": "x*"}, abjure.ArgumentError, "include"),
        ({"share": 0.1, "retain": {"w": np.zeros(3, np.float32)}}, abjure.ArgumentError, "0 everywhere"),
        ({"share": 0.1, "retain": {"w": np.array([1, np.nan, 1], np.float32)}}, abjure.NonFiniteError, "'w'.*index 1"),
        ({"share": 0.1, "retain": {"w": np.array([1, -1, 1], np.float32)}}, abjure.ArgumentError, "'w'.*retain"),
        ({"share": 0.1, "retain": {"w": np.ones(4, np.float32)}}, abjure.ShapeError, "'w'"),
        ({"share": 0.1, "retain": {"w": np.ones(3)}}, abjure.DTypeError, "'w'"),
        ({"share": 0.1, "retain": {"v": np.ones(3, np.float32)}}, abjure.ArgumentError, "'v', 'w'"),
        ({"share": 0.1, "retain": {"w": np.array([0, 0, np.inf], np.float32)}, "include": "w"}, None, ""),
    ],
)  # fmt: skip
def test_bad_input(change, error, match):
    arguments = {"forget": {"w": np.ones(3, np.float32)}, "retain": {"w": np.full(3, 2, np.float32)}} | change
    if error is None:
        assert adaptive_alpha(**arguments).value == 0.0
        return
    with pytest.raises(error, match=match):
        adaptive_alpha(**arguments)


def test_no_finite_ratio():
    f = {"a": np.ones(3, np.float32), "b": np.zeros(2, np.float32)}
    d = {"a": np.zeros(3, np.float32), "b": np.array([0, 0], np.float32)}
    assert _native.ratio_percentile(list(f.values()), list(d.values()), 50, 1, 1)[1:] == (0, 3, 2)
    with pytest.raises(abjure.DegenerateError, match="3 infinite"):
        pooled_alpha(*pair(f, d), list(f), None, 50.0)
