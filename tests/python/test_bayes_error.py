"""The Bayes error and its gradient: reference vectors, finite differences, autograd, invariants, bad input."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import abjure
from abjure import _native
from abjure.protect import bandwidth, bayes_error, bayes_error_gradient

torch = pytest.importorskip("torch")
kde_objective_torch = importlib.import_module("abjure.integrations.torch").kde_objective_torch

X = np.array([[0, 0], [1, 0.2], [0.1, 1], [1.3, 0.9], [0.5, 0.25]])
Y = np.array([0, 0, 1, 1, 0])
SHIFT = np.array([[0.1, -0.1], [-0.1, 0.1], [0.1, 0.1], [-0.1, -0.1], [0.1, 0]])
OBJECTIVES = ["gini", "softmax_tau", "entropy", "soft", "soft_capped", "nll"]


def blobs(n, d, classes, seed=0, spread=0.7, dtype=np.float64):
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes).repeat(2), rng.integers(0, classes, n - 2 * classes)])
    rng.shuffle(y)
    centres = rng.normal(size=(classes, d)) * spread
    return (centres[y] + rng.normal(size=(n, d)) * 0.6).astype(dtype), y


@pytest.mark.parametrize(
    ("mode", "first", "readings"),
    [
        (
            False,
            [0.826623830578, 0.730669666955, 0.464032224366, 0.441234666558, 0.753769407696],
            {"plugin": 0.318840797139, "soft": 0.318840797139, "gini": 0.408384968186, "entropy": 0.595745813766},
        ),
        (
            "corrected",
            [0.787314163099, 0.682424188588, 0.700040779763, 0.680367102520, 0.733687276569],
            {
                "plugin": 0.283233297892,
                "soft": 0.435396450805,
                "gini": 0.402805455452,
                "entropy": 0.591900233024,
                "nll": 0.655119006932,
            },
        ),
        (
            "plain",
            [0.711636645356, 0.588912073752, 0.823557632377, 0.809783887699, 0.647472230098],
            {"plugin": 0.283727506144, "soft": 0.537064114174, "gini": 0.389960366515, "nll": 0.939740198730},
        ),
    ],
)
def test_reference_readings(mode, first, readings):
    got = bayes_error(X, Y, bandwidth=0.7, leave_one_out=mode, posterior=True)
    np.testing.assert_allclose(got.posterior[:, 0], first, atol=1e-10)
    np.testing.assert_allclose(got.posterior.sum(1), 1, atol=1e-14)
    for name, value in readings.items():
        assert getattr(got, name) == pytest.approx(value, abs=1e-10), name


@pytest.mark.parametrize(
    ("mode", "objective", "expected"),
    [
        (
            False,
            "soft",
            [
                -0.011778106602,
                0.083595385443,
                0.042890190312,
                0.118110196695,
                0.023479054034,
                -0.182016687348,
                -0.066653765294,
                -0.143724650432,
                0.01206262755,
                0.124035755643,
            ],
        ),
        (
            False,
            "gini",
            [
                -0.022382156053,
                0.064406679129,
                0.047800299259,
                0.068424636342,
                0.02763705744,
                -0.125417388206,
                -0.063660409221,
                -0.087027353441,
                0.010605208575,
                0.079613426175,
            ],
        ),
        (
            "corrected",
            "soft",
            [
                -0.058169057636,
                0.071197060398,
                0.094754971951,
                0.119420312648,
                -0.143990149083,
                -0.166706241628,
                0.098951324862,
                -0.155829822021,
                0.008452909906,
                0.131918690604,
            ],
        ),
        (
            "corrected",
            "gini",
            [
                -0.074203502508,
                0.018086400839,
                0.085831871989,
                0.014635451385,
                0.163837178052,
                -0.067606852223,
                -0.180344755292,
                -0.006755239419,
                0.004879207758,
                0.041640239418,
            ],
        ),
    ],
)
def test_reference_gradients(mode, objective, expected):
    got = bayes_error_gradient(X, Y, bandwidth=0.7, leave_one_out=mode, objective=objective)
    np.testing.assert_allclose(got.centres.ravel(), expected, atol=1e-10)


def test_reference_of_a_class_of_one():
    y = [0, 0, 1, 1, 2]
    got = bayes_error(X, y, bandwidth=0.7, leave_one_out=False, posterior=True)
    np.testing.assert_allclose(got.posterior[0], [0.536740920160, 0.173376169422, 0.289882910418], atol=1e-10)
    assert (got.plugin, got.soft, got.gini) == pytest.approx(
        (0.490425181588, 0.520567654127, 0.613655542821), abs=1e-10
    )
    got = bayes_error(X, y, bandwidth=0.7, singleton="keep", posterior=True)
    np.testing.assert_allclose(got.posterior[4], [0.647472230098, 0.352527769902, 0], atol=1e-10)
    assert (got.plugin, got.soft, got.gini) == pytest.approx(
        (0.556927036000, 0.739790784383, 0.616368199566), abs=1e-10
    )
    assert got.nll == np.inf
    gradient = bayes_error_gradient(X, y, bandwidth=0.7, singleton="keep").centres
    expected = [-0.020631007181, -0.001698918260, 0.013660848103, -0.028360596237, 0.030085791931, -0.033488416945]
    expected += [-0.049167832631, -0.006230707076, 0.026052199777, 0.069778638519]
    np.testing.assert_allclose(gradient.ravel(), expected, atol=1e-10)
    excluded = bayes_error(X, y, bandwidth=0.7, singleton="exclude")
    assert (excluded.rows, np.isfinite(excluded.nll)) == (4, True)
    with pytest.raises(abjure.DegenerateError, match="class 2 has one member"):
        bayes_error(X, y, bandwidth=0.7)


@pytest.mark.parametrize(
    ("objective", "value", "expected"),
    [
        (
            "soft",
            0.525950020586,
            [
                -0.039899359223,
                0.001185469669,
                0.046134741518,
                0.048445001289,
                -0.05114778126,
                -0.111444841904,
                -0.002404630049,
                -0.103507172004,
                0.006468398007,
                0.053485294876,
            ],
        ),
        (
            "gini",
            0.401267908357,
            [
                -0.026931667533,
                -0.0422340187,
                0.038176789871,
                -0.032877960948,
                0.090858995448,
                -0.102262518542,
                -0.136716379353,
                -0.031513349919,
                0.014357321491,
                -0.031092925697,
            ],
        ),
        (
            "nll",
            0.885739583912,
            [
                -0.046155406186,
                0.083727795395,
                0.062821658321,
                0.192041658811,
                -0.315138995798,
                -0.122124160803,
                0.236927083452,
                -0.207859960171,
                0.011881866884,
                0.202011698154,
            ],
        ),
    ],
)
def test_reference_of_clean_queries(objective, value, expected):
    got = bayes_error_gradient(X + SHIFT, Y, queries=X, bandwidth=0.7, objective=objective)
    assert got.value == pytest.approx(value, abs=1e-10)
    np.testing.assert_allclose(got.centres.ravel(), expected, atol=1e-10)
    assert got.queries is None


@pytest.mark.parametrize("mode", ["none", "plain", "corrected"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_against_autograd(mode, objective):
    x, y = blobs(60, 5, 4, seed=3)
    widths, tau = [0.5, 0.9], 0.3
    z = torch.tensor(x, requires_grad=True)
    labels = torch.tensor(y)
    value = kde_objective_torch(z, labels, 4, widths, objective=objective, leave_one_out=mode, tau=tau)
    (expected,) = torch.autograd.grad(value, z)
    got = bayes_error_gradient(x, y, bandwidth=widths, objective=objective, leave_one_out=mode, tau=tau)
    assert got.value == pytest.approx(value.item(), rel=1e-11)
    np.testing.assert_allclose(got.centres, expected.numpy(), rtol=1e-8, atol=1e-12)
    assert np.abs(got.centres.sum(0)).max() < 1e-14


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_sides_against_autograd_with_priors_and_masks(objective):
    x, y = blobs(70, 6, 3, seed=5)
    q, yq = x[::2] + 0.05, y[::2]
    rows = np.where(np.arange(len(q)) % 3 == 0, -1, np.arange(0, 70, 2))
    priors = [0.5, 0.2, 0.3]
    z, w = torch.tensor(x, requires_grad=True), torch.tensor(q, requires_grad=True)
    value = kde_objective_torch(
        z,
        torch.tensor(y),
        3,
        [0.8],
        queries=w,
        query_labels=torch.tensor(yq),
        query_rows=torch.tensor(rows),
        objective=objective,
        leave_one_out="corrected",
        priors=priors,
        tau=0.5,
    )
    expected = torch.autograd.grad(value, (z, w))
    got = bayes_error_gradient(
        x,
        y,
        queries=q,
        query_labels=yq,
        query_rows=rows,
        bandwidth=0.8,
        objective=objective,
        leave_one_out="corrected",
        priors=priors,
        tau=0.5,
        wrt="both",
    )
    assert got.value == pytest.approx(value.item(), rel=1e-11)
    np.testing.assert_allclose(got.centres, expected[0].numpy(), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(got.queries, expected[1].numpy(), rtol=1e-8, atol=1e-12)
    one = bayes_error_gradient(x, y, queries=q, query_labels=yq, bandwidth=0.8, wrt="queries")
    assert one.centres is None
    assert one.queries.shape == q.shape


def test_central_differences():
    x, y = blobs(12, 3, 3, seed=1)
    gradient = bayes_error_gradient(x, y, bandwidth=0.8, objective="gini").centres
    step = 1e-6
    for i, j in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i, j] += step
        down[i, j] -= step
        slope = (bayes_error(up, y, bandwidth=0.8).gini - bayes_error(down, y, bandwidth=0.8).gini) / (2 * step)
        assert gradient[i, j] == pytest.approx(slope, abs=1e-9)


def test_one_set_is_two_equal_sets():
    x, y = blobs(90, 7, 4, seed=8)
    one = bayes_error_gradient(x, y, bandwidth=0.9, objective="soft", leave_one_out="corrected")
    both = bayes_error_gradient(x, y, queries=x, bandwidth=0.9, objective="soft", leave_one_out="corrected", wrt="both")
    assert one.value == pytest.approx(both.value, rel=1e-13)
    np.testing.assert_allclose(one.centres, both.centres + both.queries, atol=1e-13)


def test_gradient_by_class_is_the_sum_over_the_class():
    x, y = blobs(300, 9, 3, seed=2)
    q = x + 0.1
    options = {
        "bandwidths": [0.7],
        "objective": "soft",
        "tau": 1.0,
        "leave_one_out": "plain",
        "singleton": "keep",
        "priors": None,
    }
    rows = np.arange(300)
    each, summed = (
        _native.cross_error(x, y, 3, q, y, rows, options, kind, False, False)["centre_gradient"]
        for kind in ("each", "class")
    )
    expected = np.stack([each[y == c].sum(0) for c in range(3)])
    np.testing.assert_allclose(summed, expected, atol=1e-14)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 16, 39, 40, 64])
def test_tiled_equals_dense_at_every_block_size(block):
    x, y = blobs(40, 5, 3, seed=4)
    options = {
        "bandwidths": [0.6],
        "objective": "entropy",
        "tau": 1.0,
        "leave_one_out": "corrected",
        "singleton": "keep",
        "priors": None,
    }
    tiled = _native.published_error(x, y, 3, options, True, True, block)
    z = torch.tensor(x, requires_grad=True)
    value = kde_objective_torch(z, torch.tensor(y), 3, [0.6], objective="entropy")
    (dense,) = torch.autograd.grad(value, z)
    assert tiled["value"] == pytest.approx(value.item(), rel=1e-13)
    np.testing.assert_allclose(tiled["query_gradient"], dense.numpy(), rtol=1e-10, atol=1e-14)


def test_several_blocks_and_strips_against_autograd():
    x, y = blobs(700, 12, 3, seed=6)
    z = torch.tensor(x, requires_grad=True)
    value = kde_objective_torch(z, torch.tensor(y), 3, [1.1], objective="soft")
    (dense,) = torch.autograd.grad(value, z)
    got = bayes_error_gradient(x, y, bandwidth=1.1, objective="soft")
    np.testing.assert_allclose(got.centres, dense.numpy(), rtol=1e-9, atol=1e-14)
    pair = bayes_error_gradient(x, y, queries=x, bandwidth=1.1, objective="soft", leave_one_out="corrected", wrt="both")
    np.testing.assert_allclose(pair.centres + pair.queries, dense.numpy(), rtol=1e-8, atol=1e-13)


def test_threads_do_not_change_a_bit():
    x, y = blobs(1500, 20, 5, seed=7, dtype=np.float32)
    before = abjure.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 3, 5):
            abjure.set_num_threads(threads)
            a = bayes_error_gradient(x, y, bandwidth=1.0)
            b = bayes_error_gradient(x, y, queries=x, bandwidth=1.0, objective="soft", wrt="both")
            seen.append((a.value, a.centres.tobytes(), b.centres.tobytes(), b.queries.tobytes(), bandwidth(x, y)))
    finally:
        abjure.set_num_threads(before)
    assert all(s == seen[0] for s in seen)


@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0])
def test_f32_error_bound(offset):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 784))
    x[1] = x[0] + 1e-3
    x = (x + offset).astype(np.float32)
    y = rng.integers(0, 3, 500)
    exact = bayes_error_gradient(x.astype(np.float64), y, bandwidth=9.0)
    got = bayes_error_gradient(x, y, bandwidth=9.0)
    assert got.value == pytest.approx(exact.value, rel=2e-6)
    assert np.abs(got.centres - exact.centres).max() <= 2e-5 * np.abs(exact.centres).max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened(dtype):
    x, y = blobs(80, 6, 3, seed=9, dtype=np.float32)
    half = torch.tensor(x).to(getattr(torch, dtype))
    wide = bayes_error_gradient(half.float(), y, bandwidth=0.8)
    got = bayes_error_gradient(half, y, bandwidth=0.8)
    assert got.value == wide.value
    assert got.centres.dtype == torch.float32
    assert torch.equal(got.centres, wide.centres)


def test_arrays_of_any_kind_and_layout():
    x, y = blobs(60, 8, 3, seed=10)
    expected = bayes_error_gradient(x, y, bandwidth=0.8).centres
    layouts = [np.asfortranarray(x), np.repeat(x, 2, 0)[::2], x[::-1][::-1], np.pad(x, ((0, 0), (0, 5)))[:, :8]]
    for layout in layouts:
        assert bayes_error_gradient(layout, y, bandwidth=0.8).centres.tobytes() == expected.tobytes()
    image = bayes_error_gradient(torch.tensor(x).reshape(60, 2, 2, 2), torch.tensor(y), bandwidth=0.8).centres
    assert image.shape == (60, 2, 2, 2)
    assert image.numpy().tobytes() == expected.tobytes()
    assert bayes_error(x.tolist(), y.tolist(), bandwidth=0.8).gini == bayes_error(x, y, bandwidth=0.8).gini


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 5), d=st.integers(1, 8), h=st.floats(0.2, 4))
def test_invariants(seed, classes, d, h):
    x, y = blobs(40, d, classes, seed)
    rng = np.random.default_rng(seed)
    base = bayes_error(x, y, bandwidth=h)
    top = 1 - 1 / classes
    assert base.plugin <= base.gini + 1e-12
    assert base.gini <= base.plugin * (2 - base.plugin / top) + 1e-12
    assert base.gini <= top + 1e-12
    assert base.bounds[0] <= base.plugin + 1e-9
    assert base.plugin <= base.bounds[1] + 1e-12
    low, high = base.interval
    assert low <= base.value <= high
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    gradient = bayes_error_gradient(x, y, bandwidth=h).centres
    moved = bayes_error_gradient(x @ rotation + 3.0, y, bandwidth=h)
    assert moved.value == pytest.approx(base.value, rel=1e-9)
    np.testing.assert_allclose(moved.centres, gradient @ rotation, atol=1e-9)
    scaled = bayes_error_gradient(x * 5, y, bandwidth=5 * h)
    assert scaled.value == pytest.approx(base.value, rel=1e-10)
    np.testing.assert_allclose(scaled.centres, gradient / 5, atol=1e-10)
    order, names = rng.permutation(40), rng.permutation(classes) * 7 - 3
    shuffled = bayes_error_gradient(x[order], names[y][order], bandwidth=h)
    assert shuffled.value == pytest.approx(base.value, rel=1e-11)
    np.testing.assert_allclose(shuffled.centres, gradient[order], atol=1e-12)


def test_far_outlier_duplicates_and_dead_bandwidth():
    x, y = blobs(50, 4, 2, seed=11)
    x[0] += 1e4
    x[2] = x[1]
    y[1], y[2] = 0, 1
    z = torch.tensor(x, requires_grad=True)
    value = kde_objective_torch(z, torch.tensor(y), 2, [1.0], objective="gini")
    (expected,) = torch.autograd.grad(value, z)
    got = bayes_error_gradient(x, y, bandwidth=1.0)
    assert np.isfinite(got.centres).all()
    np.testing.assert_allclose(got.centres, expected.numpy(), atol=1e-9)
    dead = bayes_error_gradient(x, y, bandwidth=1e-4)
    assert np.isfinite(dead.value)
    assert np.isfinite(dead.centres).all()


def test_bandwidth_rules_have_their_property():
    x, y = blobs(400, 10, 3, seed=12)
    squared = ((x[:, None] - x[None]) ** 2).sum(-1)
    np.fill_diagonal(squared, np.inf)
    for k in (3.0, 10.0, 50.0):
        h = bandwidth(x, y, perplexity=k)
        w = np.exp(-(squared - squared.min(1, keepdims=True)) / (2 * h * h))
        w /= w.sum(1, keepdims=True)
        entropy = -(w * np.log(np.where(w > 0, w, 1))).sum(1).mean()
        assert np.exp(entropy) == pytest.approx(k, rel=1e-5)
    best = bandwidth(x, y, "nll")
    nll = [bayes_error(x, y, bandwidth=best * f).nll for f in (0.9, 1.0, 1.1)]
    assert nll[1] == min(nll)
    tenth = np.sqrt(np.sort(squared, 1)[:, 9])
    assert bandwidth(x, y, "knn") == pytest.approx(0.27 * np.sort(tenth)[200], rel=1e-9)
    assert bayes_error(x, y, bandwidth=("perplexity", 10)).bandwidth == bayes_error(x, y).bandwidth


def two_gaussians(seed, n=120):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    return rng.normal(size=(n, 2)) + 2.0 * y[:, None] * np.array([1.0, 0.0]), y


@pytest.mark.parametrize("clean", [False, True])
def test_standard_error_is_the_spread_over_samples(clean):
    """Of 80 samples of one population; the spread over rows alone is about half of it."""
    got = []
    for seed in range(80):
        x, y = two_gaussians(seed)
        q, labels = two_gaussians(seed + 1000, 200) if clean else (None, None)
        got.append(bayes_error(x, y, queries=q, query_labels=labels, bandwidth=0.4, subsamples=40))
    values = np.array([g.value for g in got])
    errors = np.array([g.standard_error for g in got])
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.2)
    assert np.mean([np.std(g.values) / np.sqrt(g.rows) for g in got]) < 0.7 * errors.mean()
    truth = values.mean()
    assert np.mean([g.interval[0] <= truth <= g.interval[1] for g in got]) >= 0.88


def test_subsamples_change_the_interval_alone():
    x, y = two_gaussians(0)
    plain = bayes_error(x, y, bandwidth=0.4)
    assert plain.standard_error is None
    for a in (x, torch.tensor(x)):
        found = [bayes_error(a, y, bandwidth=0.4, subsamples=20, seed=s) for s in (0, 0, 1)]
        assert {f.value for f in found} == {plain.value}
        assert found[0].standard_error == found[1].standard_error != found[2].standard_error
        assert found[0].interval == pytest.approx(
            [plain.value + z * found[0].standard_error for z in (-1.959963984540054, 1.959963984540054)]
        )
    # Query i is another place of row i: it goes and comes with its row.
    moved = bayes_error(x, y, queries=x + 0.1, bandwidth=0.4, subsamples=20)
    assert 0 < moved.standard_error < 0.1
    y = np.r_[y[:-1], 7]
    assert bayes_error(x, y, bandwidth=0.4, subsamples=20, singleton="keep").standard_error > 0


def test_result_reads_well():
    got = bayes_error(X, Y, bandwidth=0.7)
    assert "Cover–Hart" in str(got)
    assert "<table>" in got._repr_html_()
    assert got.posterior is None
    assert got.leave_one_out == "corrected"
    assert bayes_error(X, Y, queries=X, bandwidth=0.7).leave_one_out == "plain"


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (abjure.ShapeError, "y: expected shape", lambda: bayes_error(X, Y[:4], bandwidth=1.0)),
        (abjure.ShapeError, "x: expected at least one row", lambda: bayes_error(X[:0], [], bandwidth=1.0)),
        (abjure.ShapeError, "x: expected at least one row", lambda: bayes_error(np.float64(3), [1], bandwidth=1.0)),
        (abjure.DTypeError, "x: expected floating-point", lambda: bayes_error(X.astype(int), Y, bandwidth=1.0)),
        (abjure.DTypeError, "x: expected floating-point", lambda: bayes_error(X.astype(complex), Y, bandwidth=1.0)),
        (abjure.DTypeError, "y: expected whole", lambda: bayes_error(X, Y + 0.5, bandwidth=1.0)),
        (abjure.DegenerateError, "two classes", lambda: bayes_error(X, Y * 0, bandwidth=1.0)),
        (abjure.DegenerateError, "coincide", lambda: bayes_error(X * 0, Y, bandwidth="knn")),
        (abjure.ArgumentError, "bandwidth: expected", lambda: bayes_error(X, Y, bandwidth=0)),
        (abjure.ArgumentError, "bandwidth: expected", lambda: bayes_error(X, Y, bandwidth=[1.0, -1.0])),
        (abjure.ArgumentError, "bandwidth: expected", lambda: bayes_error(X, Y, bandwidth=[])),
        (abjure.ArgumentError, "bandwidth: expected", lambda: bayes_error(X, Y, bandwidth="scott")),
        (abjure.ArgumentError, "bandwidth: expected more than", lambda: bayes_error(X, Y)),
        (abjure.ArgumentError, "objective: expected", lambda: bayes_error(X, Y, bandwidth=1.0, objective="mse")),
        (
            abjure.ArgumentError,
            "tau: expected",
            lambda: bayes_error(X, Y, bandwidth=1.0, objective="softmax_tau", tau=0),
        ),
        (abjure.ArgumentError, "leave_one_out: expected", lambda: bayes_error(X, Y, bandwidth=1.0, leave_one_out="x")),
        (abjure.ArgumentError, "singleton: expected", lambda: bayes_error(X, Y, bandwidth=1.0, singleton="drop")),
        (abjure.ArgumentError, "level: expected", lambda: bayes_error(X, Y, bandwidth=1.0, level=95)),
        (abjure.ArgumentError, "subsamples: expected", lambda: bayes_error(X, Y, bandwidth=1.0, subsamples=1)),
        (abjure.ArgumentError, "subsamples: expected", lambda: bayes_error(X, Y, bandwidth=1.0, subsamples=2.0)),
        (abjure.DegenerateError, "subsamples: expected", lambda: bayes_error(X, Y, bandwidth=1.0, subsamples=9)),
        (abjure.ShapeError, "priors: expected 2", lambda: bayes_error(X, Y, bandwidth=1.0, priors=[1.0])),
        (abjure.ArgumentError, "priors: expected", lambda: bayes_error(X, Y, bandwidth=1.0, priors=[1.0, -1.0])),
        (abjure.ArgumentError, "queries: expected", lambda: bayes_error(X, Y, bandwidth=1.0, query_labels=Y)),
        (abjure.ShapeError, "query_labels: expected", lambda: bayes_error(X, Y, bandwidth=1.0, queries=X[:2])),
        (
            abjure.ShapeError,
            "queries: expected 2 columns",
            lambda: bayes_error(X, Y, bandwidth=1.0, queries=X[:, :1].copy(), query_labels=Y),
        ),
        (
            abjure.ArgumentError,
            "query_labels: expected labels that occur",
            lambda: bayes_error(X, Y, bandwidth=1.0, queries=X, query_labels=Y + 5),
        ),
        (
            abjure.ArgumentError,
            "query_rows: expected",
            lambda: bayes_error(X, Y, bandwidth=1.0, queries=X, query_labels=Y, query_rows=[9] * 5),
        ),
        (
            abjure.DTypeError,
            "queries: expected dtype float64",
            lambda: bayes_error(X, Y, bandwidth=1.0, queries=X.astype(np.float32)),
        ),
        (abjure.ArgumentError, "wrt: expected", lambda: bayes_error_gradient(X, Y, bandwidth=1.0, wrt="all")),
        (abjure.DeviceError, "device", lambda: bayes_error(torch.empty(5, 2, device="meta"), Y, bandwidth=1.0)),
    ],
)
def test_bad_input(error, match, call):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value):
    x = X.copy()
    x[3, 1] = value
    with pytest.raises(abjure.NonFiniteError, match=r"x: non-finite value .* at flat index 7"):
        bayes_error(x, Y, bandwidth=1.0)
    with pytest.raises(abjure.NonFiniteError, match="queries: non-finite"):
        bayes_error(X, Y, queries=x, bandwidth=1.0)


def test_memory_stays_far_below_the_square():
    import subprocess
    import sys

    code = (
        "import resource, numpy as np; from abjure.protect import bayes_error_gradient as g;"
        "r = np.random.default_rng(0); x = r.normal(size=(12000, 4)).astype(np.float32); y = r.integers(0, 2, 12000);"
        "g(x[:500], y[:500], bandwidth=1.0); a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "g(x, y, bandwidth=1.0); g(x, y, queries=x, bandwidth=1.0);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown < 150_000, "KiB; the distances alone are 562 500"
