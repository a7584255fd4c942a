"""Class means and what is estimated from them: known vectors, numpy and scikit-learn oracles, every bad argument."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

import abjure
from abjure import refuse

HIGH = np.array([[1.5, -0.25, 0.75, 2], [2.5, 0.5, -0.125, 1], [0.75, -1, 0.25, 3]])
LOW = np.array([[0.5, 0.25, 0.5, -1], [-0.25, 0.75, 1, 0.5], [0, -0.5, 0.25, 0.25], [0.75, 1.5, -0.25, -0.75]])
PLANE = np.array([[1, 0.5], [2, -0.5], [0, 1.5], [-1, 0], [-2, -1], [0.5, -0.5]])
PLANE_LABELS = np.array([1, 1, 1, 0, 0, 0])


def test_difference_in_means():
    contrast = refuse.Contrast(layer=5, position=-1).update(HIGH, 1).update(LOW, 0)
    d = contrast.difference_in_means()
    np.testing.assert_allclose(d.vector, [1.33333333333333, -0.75, -0.0833333333333333, 2.25], rtol=1e-13)
    assert d.norm == pytest.approx(2.72208049517685, rel=1e-14)
    assert (d.layer, d.site, d.position, d.counts) == (5, "pre", -1, (4, 3))
    assert d.provenance["method"] == "difference_in_means"
    np.testing.assert_allclose(contrast.means[0], [0.25, 0.5, 0.375, -0.25])
    assert "Contrast" in contrast._repr_html_()


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    n=st.integers(2, 700),
    d=st.integers(1, 80),
    batches=st.integers(1, 4),
    covariance=st.booleans(),
    offset=st.sampled_from([0.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_any_batching_gives_the_two_pass_result(dtype, n, d, batches, covariance, offset, seed):
    gen = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d, generator=gen, dtype=torch.float64) + offset).to(dtype)
    labels = torch.randint(0, 2, (n,), generator=gen)
    labels[:2] = torch.tensor([0, 1])
    whole = refuse.Contrast(covariance).update(x, labels)
    merged = refuse.Contrast(covariance)
    for part, y in zip(x.chunk(batches), labels.chunk(batches), strict=True):
        merged.merge(refuse.Contrast(covariance).update(part, y))
    wide, y = x.double().numpy(), labels.numpy()
    for contrast in (whole, merged):
        assert contrast.counts == (int((y == 0).sum()), int((y == 1).sum()))
        for c in (0, 1):
            rows = wide[y == c]
            half = dtype in (torch.float16, torch.bfloat16)
            tol = 2.0**-22 * np.abs(rows).mean(0) if half else 1e-12 * (1 + abs(offset))
            assert (np.abs(contrast.means[c] - rows.mean(0)) <= 1e-13 * np.abs(rows.mean(0)) + tol).all()
            if covariance:
                centred = rows - rows.mean(0)
                got = contrast._moments[c].second
                want, size = centred.T @ centred, np.abs(centred).T @ np.abs(centred)
                coarse = dtype == torch.bfloat16
                assert (
                    np.abs(got - want) <= size * 2.0**-15 if coarse else 1e-9 * np.abs(want) + 1e-7 * len(rows)
                ).all()


def test_same_bits_for_any_number_of_threads():
    x, y = torch.randn(3000, 257), torch.arange(3000) % 2
    before, seen = abjure.get_num_threads(), []
    for threads in (1, 2, 5):
        abjure.set_num_threads(threads)
        contrast = refuse.Contrast(covariance=True).update(x, y)
        seen.append((contrast.difference_in_means().vector.tobytes(), contrast._moments[0].second.tobytes()))
    abjure.set_num_threads(before)
    assert len(set(seen)) == 1


def test_shapes_of_labels():
    x = torch.randn(2, 3, 5, 8)
    y = torch.randint(0, 2, (2, 3, 5))
    flat = refuse.Contrast().update(x.reshape(-1, 8), y.reshape(-1))
    np.testing.assert_array_equal(refuse.Contrast().update(x, y).means, flat.means)
    np.testing.assert_array_equal(refuse.Contrast().update(x, y.bool()).means, flat.means)
    strided = refuse.Contrast().update(x.transpose(0, 2), y.transpose(0, 2))
    np.testing.assert_allclose(strided.means, flat.means, rtol=1e-12, atol=1e-15)
    one = refuse.Contrast().update(np.ones(3), True).update(np.zeros(3), False)
    np.testing.assert_array_equal(one.difference_in_means().vector, np.ones(3))


def test_discriminant_and_erasure():
    contrast = refuse.Contrast(covariance=True).update(PLANE, PLANE_LABELS)
    np.testing.assert_allclose(contrast.lda().vector, [2.28125, 2.96875], rtol=1e-12)
    np.testing.assert_allclose(contrast.lda(0.2).vector, [2.07060981201284, 2.34387895460798], rtol=1e-12)
    eraser = contrast.leace()
    erased = eraser.apply(PLANE)
    np.testing.assert_allclose(erased[:2], [[0.083333333333333, 0], [1.25958970623938, -0.903860160233066]], atol=1e-13)
    np.testing.assert_allclose(np.cov(erased.T, PLANE_LABELS)[2, :2], 0, atol=1e-14)
    np.testing.assert_array_equal(eraser.apply_(PLANE.copy()), erased)


def test_erasure_defeats_a_linear_probe():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 600)
    x = rng.standard_normal((600, 20)) @ rng.standard_normal((20, 20)) + np.outer(y, rng.standard_normal(20)) * 2
    contrast = refuse.Contrast(covariance=True).update(x, y)
    erased = contrast.leace().apply(x)
    assert LogisticRegression(max_iter=2000).fit(x, y).score(x, y) > 0.9
    base = max(y.mean(), 1 - y.mean())
    assert LogisticRegression(max_iter=2000).fit(erased, y).score(erased, y) < base + 0.05


def test_principal_component_keeps_the_difference():
    rng = np.random.default_rng(0)
    d, n = 256, 400
    mean = np.zeros(d)
    mean[0] = 6
    noise = np.zeros(d)
    noise[1] = 2
    x = rng.standard_normal((n, d)) * 0.3 + np.outer(rng.standard_normal(n), noise)
    y = np.arange(n) % 2
    x[y == 1] += mean
    component = refuse.Contrast(covariance=True).update(x, y).pca()
    assert component.unit[0] > 0.95
    assert component.norm == pytest.approx(1)
    labels = y == 1
    midpoint = (x[labels].mean(0) + x[~labels].mean(0)) / 2
    total = sum((x[m] - midpoint).T @ (x[m] - midpoint) / m.sum() / 2 for m in (labels, ~labels))
    assert abs(np.linalg.eigh(total)[1][:, -1] @ component.unit) == pytest.approx(1, abs=1e-12)


def test_non_finite_policies():
    x = HIGH.copy()
    x[1, 2] = np.nan
    contrast = refuse.Contrast().update(LOW, 0)
    with pytest.raises(abjure.NonFiniteError, match=r"x: .* index 6"):
        contrast.update(x, 1)
    with pytest.raises(abjure.NonFiniteError):
        contrast.update(np.concatenate([LOW, x]), [0, 0, 0, 0, 1, 1, 1])
    assert contrast.counts == (4, 0)
    skipping = refuse.Contrast(nonfinite="skip").update(LOW, 0).update(x, 1)
    assert (skipping.counts, skipping.skipped) == ((4, 2), 1)
    np.testing.assert_allclose(skipping.means[1], HIGH[[0, 2]].mean(0))
    assert skipping.difference_in_means().provenance["skipped"] == 1


def test_degenerate_input():
    with pytest.raises(abjure.DegenerateError, match="both classes, got 0 of 0, 0 of 1"):
        refuse.Contrast().difference_in_means()
    with pytest.raises(abjure.DegenerateError, match="got 3 of 0, 0 of 1"):
        refuse.Contrast().update(HIGH, 0).difference_in_means()
    same = refuse.Contrast().update(HIGH, 0).update(HIGH, 1)
    with pytest.raises(abjure.DegenerateError, match="means are equal"):
        same.difference_in_means()
    few = refuse.Contrast(covariance=True).update(HIGH, 1).update(LOW, 0)
    few.lda(0.1)
    thin = refuse.Contrast(covariance=True).update(HIGH[:2], 1).update(LOW[:1], 0)
    with pytest.raises(abjure.DegenerateError, match="singular"):
        thin.lda()
    thin.lda(0.5)
    with pytest.raises(abjure.DegenerateError, match="singular"):
        thin.leace()
    narrow = torch.randn(12, 16).bfloat16()
    for method in ("lda", "leace"):
        with pytest.raises(abjure.DegenerateError, match="singular, 12 activations of width 16"):
            getattr(refuse.Contrast(covariance=True).update(narrow, np.arange(12) % 2), method)()
    single = refuse.Contrast(covariance=True).update(HIGH[:1], 1).update(LOW[:1], 0)
    with pytest.raises(abjure.DegenerateError, match="too few"):
        single.lda(0.5)
    assert single.difference_in_means().counts == (1, 1)


def test_bad_arguments():
    contrast = refuse.Contrast().update(HIGH, 1)
    mean = contrast._moments[1].mean
    cases = [
        (lambda: contrast.update(HIGH[:, :3], 1), abjure.ShapeError, "x:"),
        (lambda: contrast.update(HIGH, 2), abjure.ArgumentError, "label:"),
        (lambda: contrast.update(HIGH, [0, 1]), abjure.ShapeError, "label:"),
        (lambda: contrast.update(HIGH, [0, 1, -1]), abjure.ArgumentError, "label:"),
        (lambda: contrast.update(HIGH, 0.5), abjure.DTypeError, "label:"),
        (lambda: contrast.update(HIGH.astype(np.int64), 1), abjure.DTypeError, "x:"),
        (lambda: contrast.update(torch.ones(2, 4, device="meta"), 1), abjure.DeviceError, "x:"),
        (lambda: contrast.pca(), abjure.ArgumentError, "covariance:"),
        (lambda: contrast.merge(refuse.Contrast(covariance=True)), abjure.ArgumentError, "covariance"),
        (lambda: contrast.merge(refuse.Contrast(layer=1)), abjure.ArgumentError, "layer"),
        (lambda: contrast.merge(refuse.Contrast().update(np.ones(3), 0)), abjure.ShapeError, "other:"),
        (lambda: contrast.lda(-0.1), abjure.ArgumentError, "shrinkage:"),
        (lambda: refuse.Contrast(nonfinite="drop"), abjure.ArgumentError, "nonfinite:"),
        (lambda: refuse.Contrast(site="in"), abjure.ArgumentError, "site:"),
    ]
    for call, error, match in cases:
        with pytest.raises(error, match=match):
            call()
    assert contrast.counts == (0, 3)
    np.testing.assert_array_equal(contrast._moments[1].mean, mean)


def test_the_projected_difference_of_the_reference():
    high = np.array([[1.5, -0.25, 0.75, 2], [2.5, 0.5, -0.125, 1], [0.75, -1, 0.25, 3]])
    low = np.array([[0.5, 0.25, 0.5, -1], [-0.25, 0.75, 1, 0.5], [0, -0.5, 0.25, 0.25], [0.75, 1.5, -0.25, -0.75]])
    contrast = refuse.Contrast().update(high, 1).update(low, 0)
    want = [0.637631929649207, -0.0519915265713969, 0.147145829919048, 0.754367621384985]
    found = contrast.difference_in_means(projected=True)
    np.testing.assert_allclose(found.unit, want, rtol=1e-12)
    assert abs(found.vector @ low.mean(0)) < 1e-14
    with pytest.raises(abjure.DegenerateError, match="one line"):
        refuse.Contrast().update(2 * high, 1).update(high, 0).difference_in_means(projected=True)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_winsorised_rows(dtype):
    import torch

    row = torch.tensor([[0.1, -0.2, 0.3, -0.4, 8]], dtype=torch.float64).to(getattr(torch, dtype))
    found = refuse.Contrast(winsorize=0.9).update(row, 1).update(torch.zeros_like(row), 0).means[1]
    exact = row[0].double().numpy()
    bound = np.quantile(np.abs(exact), 0.9)
    assert bound == pytest.approx(4.96, rel=1e-2)
    np.testing.assert_allclose(found, np.clip(exact, -bound, bound), rtol=1e-14)
    plain, off = (refuse.Contrast(winsorize=w).update(row, 1).update(-row, 0).means[1] for w in (None, 1.0))
    np.testing.assert_array_equal(plain, off)
    with pytest.raises(abjure.NonFiniteError):
        refuse.Contrast(winsorize=0.5).update(np.array([[np.nan, 1.0]]), 1)
    for bad in (0.0, 1.5, float("nan")):
        with pytest.raises(abjure.ArgumentError, match="winsorize"):
            refuse.Contrast(winsorize=bad)
    with pytest.raises(abjure.ArgumentError, match="winsorize"):
        refuse.Contrast().merge(refuse.Contrast(winsorize=0.5))


def test_subspace_spans_the_leading_components():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((200, 8)) * np.arange(1, 9), rng.integers(0, 2, 200)
    x[y == 1] += 3
    contrast = refuse.Contrast(covariance=True).update(x, y)
    found = contrast.subspace(3)
    mid = (x[y == 0].mean(0) + x[y == 1].mean(0)) / 2
    weight = np.where(y == 1, 0.5 / (y == 1).sum(), 0.5 / (y == 0).sum())
    total = ((x - mid).T * weight) @ (x - mid)
    values, vectors = np.linalg.eigh(total)
    for i, direction in enumerate(found):
        assert abs(direction.vector @ vectors[:, -1 - i]) == pytest.approx(1)
        assert direction.provenance["explained"] == pytest.approx(values[-1 - i] / values.sum())
    np.testing.assert_array_equal(found[0].vector, contrast.pca().vector)
    assert np.abs(refuse.project(refuse.ablate(x, found), found)).max() < 1e-12
    few = refuse.Contrast(covariance=True).update(x[:3], [0, 1, 1])
    with pytest.raises(abjure.DegenerateError, match="rank: expected at most 2"):
        few.subspace(3)
    with pytest.raises(abjure.ArgumentError, match="rank"):
        few.subspace(0)


def test_difference_components_keep_the_mean_difference():
    rng = np.random.default_rng(0)
    mean = np.zeros(256)
    mean[0] = 3
    noise = rng.standard_normal((128, 256)) * np.where(np.arange(256) == 1, 2, 0.1)
    low = rng.standard_normal((128, 256))
    high = low + mean + noise
    found = refuse.difference_components(high, low, rank=2)
    unit = (high - low).mean(0) / np.linalg.norm((high - low).mean(0))
    assert found[0].unit @ unit > 0.98  # centring the differences first would give one near 0
    assert abs(found[0].unit @ found[1].unit) < 1e-12
    want = np.linalg.svd(high - low)[2][0]
    assert abs(found[0].unit @ want) == pytest.approx(1)
    for a, b, rank, error in [
        (high, low[:5], 1, abjure.ShapeError),
        (high, high, 1, abjure.DegenerateError),
        (high[:3], low[:3], 4, abjure.DegenerateError),
        (high * np.nan, low, 1, abjure.NonFiniteError),
        (high, low, 0, abjure.ArgumentError),
    ]:
        with pytest.raises(error):
            refuse.difference_components(a, b, rank)


def test_saved_contrasts_continue_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((90, 6)).astype(np.float32), rng.integers(0, 2, 90)
    where = {"layer": 3, "site": "post", "position": "last_instruction"}
    whole = refuse.Contrast(True, **where, nonfinite="skip", reservoir=7, seed=5).update(x[:50], y[:50])
    whole.save(tmp_path / "a")
    again = refuse.Contrast.load(tmp_path / "a")
    assert repr(again) == repr(whole)
    for contrast in (whole, again):
        contrast.update(x[50:], y[50:])
    np.testing.assert_array_equal(again.means, whole.means)
    np.testing.assert_array_equal(again.pca().vector, whole.pca().vector)
    for a, b in zip(again.sample, whole.sample, strict=True):
        assert a.tobytes() == b.tobytes()
    refuse.Contrast(winsorize=0.9).save(tmp_path / "empty")
    empty = refuse.Contrast.load(tmp_path / "empty")
    assert (empty.counts, empty.winsorize) == ((0, 0), 0.9)
    refuse.Direction(x[0]).save(tmp_path / "direction")
    (tmp_path / "cut").write_bytes((tmp_path / "a").read_bytes()[:-8])
    for name in ("direction", "cut", "missing"):
        with pytest.raises(abjure.ArgumentError, match="path:"):
            refuse.Contrast.load(tmp_path / name)
    with pytest.raises(abjure.ArgumentError, match="path:"):
        whole.save(tmp_path / "no" / "a")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_sample_does_not_depend_on_batches(dtype):
    x = torch.arange(400.0).reshape(200, 2).to(getattr(torch, dtype))
    y = np.arange(200) % 2
    whole = refuse.Contrast(reservoir=20).update(x, y)
    parts = refuse.Contrast(reservoir=20)
    for start in range(0, 200, 7):
        parts.update(x[start : start + 7], y[start : start + 7])
    rows, labels = whole.sample
    assert rows.tobytes() == parts.sample[0].tobytes()
    assert rows.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert labels.tolist() == [0] * 20 + [1] * 20
    wide = x.double().numpy()
    for label in (0, 1):
        kept = {tuple(r) for r in rows[labels == label].astype(float)}
        assert kept <= {tuple(r) for r in wide[y == label]}
    one_each = refuse.Contrast(reservoir=20).update(x[y == 0], 0).update(x[y == 1], 1)
    np.testing.assert_array_equal(one_each.sample[0], rows)
    assert not np.array_equal(refuse.Contrast(reservoir=20, seed=1).update(x, y).sample[0], rows)
    few = refuse.Contrast(reservoir=500).update(x, y).sample[0]
    np.testing.assert_array_equal(np.sort(few[:, 0]), np.sort(wide[:, 0]))


def test_every_row_is_as_likely_also_after_merging():
    n, size, trials = 30, 6, 600
    x = np.arange(float(n))[:, None]
    counts, pairs = np.zeros((2, n)), np.zeros(2)
    for trial in range(trials):
        single = refuse.Contrast(reservoir=size, seed=2 * trial).update(x, 0)
        a = refuse.Contrast(reservoir=size, seed=2 * trial).update(x[:10], 0)
        merged = a.merge(refuse.Contrast(reservoir=size, seed=2 * trial + 1).update(x[10:25], 0)).update(x[25:], 0)
        for i, contrast in enumerate((single, merged)):
            kept = contrast.sample[0][:, 0].astype(int)
            assert len(set(kept)) == size
            counts[i, kept] += 1
            pairs[i] += (kept < 10).sum() * ((kept < 10).sum() - 1)
    expected = trials * size / n
    chi = ((counts - expected) ** 2 / (expected * (1 - size / n))).sum(1) * (n - 1) / n
    assert (chi < 70).all(), chi  # 29 degrees of freedom: beyond one in 30 000
    # Joint inclusion, which a merge of samples with the same places would get wrong.
    want = trials * 10 * 9 * size * (size - 1) / (n * (n - 1))
    np.testing.assert_allclose(pairs, want, rtol=0.2)


def test_samples_of_one_seed_do_not_merge():
    a, b = (refuse.Contrast(reservoir=2).update(HIGH, 1) for _ in range(2))
    before, means = a.sample[0].copy(), a._moments[1].mean
    with pytest.raises(abjure.ArgumentError, match="another seed than 0"):
        a.merge(b)
    np.testing.assert_array_equal(a.sample[0], before)
    np.testing.assert_array_equal(a._moments[1].mean, means)
    with pytest.raises(abjure.ArgumentError, match="reservoir"):
        a.merge(refuse.Contrast(reservoir=3, seed=1))
    with pytest.raises(abjure.ArgumentError, match="reservoir"):
        refuse.Contrast().sample  # noqa: B018
    for bad, error in [(0, abjure.ArgumentError), (2.5, abjure.DTypeError), (True, abjure.DTypeError)]:
        with pytest.raises(error, match="reservoir"):
            refuse.Contrast(reservoir=bad)
    x = np.concatenate([HIGH, np.full((1, 4), np.nan)])
    assert np.isfinite(refuse.Contrast(reservoir=9, nonfinite="skip").update(x, 1).sample[0]).all()
