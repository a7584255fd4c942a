"""Projected gradient ascent: the budget as stored, the course of the objective, options, bad input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import abjure
from abjure.protect import bayes_error, maximize_bayes_error

torch = pytest.importorskip("torch")


def images(n=120, d=16, classes=3, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    centres = rng.uniform(0.2, 0.8, size=(classes, d))
    return np.clip(centres[y] + rng.normal(size=(n, d)) * 0.1, 0, 1).astype(dtype), y


def largest(x, clean, norm):
    change = np.asarray(x, dtype=np.float64) - np.asarray(clean, dtype=np.float64)
    return np.abs(change).max() if norm == "linf" else np.sqrt((change**2).sum(1)).max()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("per", ["class", "sample", "both"])
@pytest.mark.parametrize("against", ["clean", "published"])
def test_the_objective_rises_within_the_budget(against, per, norm):
    x, y = images()
    epsilon = 0.1 if norm == "linf" else 0.3
    got = maximize_bayes_error(
        x, y, epsilon=epsilon, norm=norm, per=per, against=against, steps=12, bandwidth=0.3, seed=3
    )
    assert got.x.dtype == x.dtype
    assert got.x.shape == x.shape
    assert 0 < largest(got.x, x, norm) <= epsilon
    assert got.certificate.holds
    assert got.certificate.largest_change == largest(got.x, x, norm)
    assert got.x.min() >= 0
    assert got.x.max() <= 1
    checks = got.trace.checks
    assert checks[:, 1].max() > checks[0, 1] * 1.02
    assert got.trace.best == checks[np.argmax(checks[:, 1]), 0]
    assert len(got.trace.steps) == 12
    # What was kept is what is reported: the objective, evaluated anew on the published array.
    queries = {"queries": x} if against == "clean" else {}
    objective = "soft" if against == "clean" else "soft_capped"
    again = bayes_error(got.x, y, bandwidth=0.3, objective=objective, **queries)
    assert again.value == pytest.approx(checks[:, 1].max(), rel=1e-5)
    if per == "class" and against == "clean":
        inside = (got.x > 0) & (got.x < 1)
        for c in range(3):
            rows = np.where(inside[y == c], got.delta[y == c], np.nan)
            assert np.nanmax(np.nanmax(rows, 0) - np.nanmin(rows, 0)) < 1e-6


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    epsilon=st.floats(0.005, 0.6),
    dtype=st.sampled_from(["float64", "float32", "float16", "bfloat16"]),
    norm=st.sampled_from(["linf", "l2"]),
    per=st.sampled_from(["class", "sample", "both"]),
)
def test_the_budget_holds_as_stored_in_every_dtype(seed, epsilon, dtype, norm, per):
    x, y = images(40, 9, 2, seed)
    x = torch.tensor(x).to(getattr(torch, dtype))
    got = maximize_bayes_error(x, y, epsilon=epsilon, norm=norm, per=per, steps=4, bandwidth=0.3, seed=seed)
    assert got.x.dtype == x.dtype
    assert largest(got.x.double(), x.double(), norm) <= epsilon
    assert float(got.x.min()) >= 0
    assert float(got.x.max()) <= 1


@pytest.mark.parametrize("per", ["class", "sample"])
def test_bytes_stay_bytes_within_whole_levels(per):
    x, y = images()
    pixels = np.rint(x * 255).astype(np.uint8).reshape(-1, 4, 4)
    got = maximize_bayes_error(pixels, y, epsilon=8.9 / 255, per=per, steps=8, bandwidth=0.3)
    assert got.x.dtype == np.uint8
    assert got.x.shape == pixels.shape
    assert np.abs(got.delta).max() == 8
    tensor = maximize_bayes_error(torch.tensor(pixels), y, epsilon=8.9 / 255, per=per, steps=8, bandwidth=0.3)
    assert tensor.x.dtype == torch.uint8
    assert np.array_equal(tensor.x.numpy(), got.x)
    floats = maximize_bayes_error(
        pixels.astype(np.float64) / 255, y, epsilon=8.9 / 255, per=per, steps=8, bandwidth=0.3, quantize=255
    )
    levels = floats.x * 255
    assert np.abs(levels - np.rint(levels)).max() < 1e-9
    assert np.abs(floats.delta).max() <= 8.9 / 255


def test_one_step_is_the_sign_of_the_gradient():
    from abjure.protect import bayes_error_gradient

    x, y = images(dtype=np.float64)
    x = 0.25 + x / 2
    start = bayes_error_gradient(x, y, queries=x, bandwidth=0.3, objective="soft")
    got = maximize_bayes_error(x, y, per="sample", epsilon=0.05, step_size=0.01, steps=1, bandwidth=0.3)
    np.testing.assert_allclose(got.delta, 0.01 * np.sign(start.centres), atol=1e-15)
    shared = maximize_bayes_error(x, y, per="class", epsilon=0.05, step_size=0.01, steps=1, bandwidth=0.3)
    for c in range(3):
        expected = np.sign(start.centres[y == c].sum(0)) * 0.01
        np.testing.assert_allclose(shared.delta[y == c], np.tile(expected, (40, 1)), atol=1e-15)


def test_batches_seeds_and_threads():
    x, y = images(300)
    options = {"epsilon": 0.1, "steps": 10, "bandwidth": 0.3, "batch": (60, 90), "per": "sample"}
    before = abjure.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 4):
            abjure.set_num_threads(threads)
            seen.append(maximize_bayes_error(x, y, seed=1, **options).x.tobytes())
    finally:
        abjure.set_num_threads(before)
    assert seen[0] == seen[1] == seen[2]
    assert maximize_bayes_error(x, y, seed=2, **options).x.tobytes() != seen[0]
    got = maximize_bayes_error(x, y, seed=1, **options)
    assert got.trace.checks[-1, 1] > got.trace.checks[0, 1]
    published = maximize_bayes_error(x, y, against="published", **options)
    assert published.trace.checks[:, 1].max() > published.trace.checks[0, 1]


def test_several_bandwidths_and_defaults():
    x, y = images(200)
    got = maximize_bayes_error(x, y, bandwidth=[0.2, 0.5], epsilon=0.1, steps=5)
    assert got.bandwidth == (0.2, 0.5)
    clean = maximize_bayes_error(x, y, epsilon=0.1, steps=3)
    published = maximize_bayes_error(x, y, epsilon=0.1, steps=3, against="published")
    assert clean.bandwidth[0] == pytest.approx(abjure.protect.bandwidth(x, y, perplexity=50))
    assert published.bandwidth[0] == pytest.approx(3.5 * abjure.protect.bandwidth(x, y))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_truncated_sums_keep_their_bound(dtype):
    x, y = images(900, dtype=dtype)
    options = {"epsilon": 0.03, "steps": 10, "batch": None, "certificate_subsamples": 0}
    exact = maximize_bayes_error(x, y, bandwidth=0.2, **options)
    got = maximize_bayes_error(x, y, bandwidth=0.2, truncate=0.25, **options)
    # In their clean places all centres are accounted for.
    assert got.trace.steps[0] == pytest.approx(exact.trace.steps[0], abs=1e-5)
    assert exact.trace.error_bound == 0
    claimed = got.trace.checks[:, 1].max()
    true = bayes_error(got.x, y, queries=x, bandwidth=0.2, objective="soft").value
    assert 0 < abs(claimed - true) <= got.trace.error_bound < 0.3
    # What it is good for: as high an exact objective, nearly.
    reached = bayes_error(exact.x, y, queries=x, bandwidth=0.2, objective="soft").value
    assert true - exact.trace.steps[0] > 0.9 * (reached - exact.trace.steps[0])
    whole = maximize_bayes_error(x, y, bandwidth=0.2, truncate=0.9999, **options)
    np.testing.assert_allclose(whole.trace.steps, exact.trace.steps, rtol=1e-9 if dtype == np.float64 else 1e-4)
    assert whole.trace.error_bound < 1e-6
    before = abjure.get_num_threads()
    try:
        abjure.set_num_threads(1)
        assert np.array_equal(maximize_bayes_error(x, y, bandwidth=0.2, truncate=0.25, **options).x, got.x)
    finally:
        abjure.set_num_threads(before)


def test_duplicates_part_under_jitter():
    x, y = images(60)
    x[1] = x[0]
    got = maximize_bayes_error(x, y, against="published", per="sample", epsilon=0.1, steps=6, bandwidth=0.3)
    assert np.abs(got.x[0] - got.x[1]).max() > 0


def test_a_dead_gradient_is_said():
    x, y = images(40)
    with pytest.warns(UserWarning, match="wider bandwidth"):
        got = maximize_bayes_error(x, y, bandwidth=1e-4, epsilon=0.1, steps=2)
    assert np.array_equal(got.x, x)


def test_progress_and_interruption():
    x, y = images(400, 64)
    seen = []
    maximize_bayes_error(x, y, epsilon=0.1, steps=5, bandwidth=0.3, progress=seen.append)
    assert seen[-1] == 5

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        maximize_bayes_error(x, y, epsilon=0.1, steps=100_000, bandwidth=0.3, progress=stop)


def test_figure_and_table():
    pytest.importorskip("matplotlib")
    x, y = images()
    got = maximize_bayes_error(x, y, epsilon=0.1, steps=3, bandwidth=0.3)
    figure = got.plot()
    assert len(figure.subfigs) == 2
    assert "largest change" in got._repr_html_()
    assert "accuracy on clean data" in str(got.certificate)


X, Y = images(30)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (abjure.ArgumentError, "epsilon: expected", {"epsilon": 0}),
        (abjure.ArgumentError, "epsilon: expected", {"epsilon": -0.1}),
        (abjure.ArgumentError, "epsilon: expected", {"epsilon": float("nan")}),
        (abjure.ArgumentError, "epsilon: expected at least one level", {"epsilon": 0.003, "quantize": 255}),
        (abjure.ArgumentError, "steps: expected", {"steps": 0}),
        (abjure.ArgumentError, "steps: expected", {"steps": 2.5}),
        (abjure.ArgumentError, "step_size: expected", {"step_size": -1.0}),
        (abjure.ArgumentError, "box: expected", {"box": (1, 0)}),
        (abjure.ArgumentError, "x: expected values in the box", {"box": (0.4, 0.6)}),
        (abjure.ArgumentError, "norm: expected", {"norm": "l1"}),
        (abjure.ArgumentError, "against: expected", {"against": "test"}),
        (abjure.ArgumentError, "per: expected", {"per": "pixel"}),
        (abjure.ArgumentError, "objective: expected", {"objective": "mse"}),
        (abjure.ArgumentError, "batch: expected", {"batch": (1, 5)}),
        (abjure.ArgumentError, "batch: expected", {"batch": "big"}),
        (abjure.ArgumentError, "class_share: expected", {"class_share": 1.0}),
        (abjure.ArgumentError, "jitter: expected", {"jitter": -1.0}),
        (abjure.ArgumentError, "seed: expected", {"seed": -1}),
        (abjure.ArgumentError, "certificate_rows: expected", {"certificate_rows": 1}),
        (abjure.ArgumentError, "quantize: expected values of x", {"quantize": 255}),
        (abjure.ArgumentError, "bandwidth: expected", {"bandwidth": -1.0}),
        (abjure.ArgumentError, "truncate: expected a number", {"truncate": 1.0}),
        (abjure.ArgumentError, 'truncate: expected with per="class"', {"truncate": 0.2, "per": "sample"}),
        (abjure.ArgumentError, 'expected with against="clean"', {"truncate": 0.2, "against": "published"}),
        (abjure.ArgumentError, "expected with another objective", {"truncate": 0.2, "objective": "entropy"}),
        (abjure.ArgumentError, "expected with batch=None", {"truncate": 0.2, "batch": (10, 20)}),
        (abjure.ArgumentError, "expected with no features", {"truncate": 0.2, "momentum": 0.5}),
        (abjure.ArgumentError, "expected with no out", {"truncate": 0.2, "patience": 3}),
    ],
)
def test_bad_options(error, match, options):
    before = X.copy()
    with pytest.raises(error, match=match):
        maximize_bayes_error(X, Y, **{"bandwidth": 0.3, "epsilon": 0.1, **options})
    assert np.array_equal(X, before)


def test_bad_data():
    with pytest.raises(abjure.DegenerateError, match="two classes"):
        maximize_bayes_error(X, Y * 0)
    alone = Y.copy()
    alone[0] = 9
    with pytest.raises(abjure.DegenerateError, match="class 9 has one member"):
        maximize_bayes_error(X, alone, bandwidth=0.3)
    assert maximize_bayes_error(X, alone, bandwidth=0.3, steps=3, singleton="exclude").certificate.holds
    broken = X.copy()
    broken[2, 3] = np.nan
    with pytest.raises(abjure.NonFiniteError, match="flat index 35"):
        maximize_bayes_error(broken, Y, bandwidth=0.3)
    with pytest.raises(abjure.ShapeError, match="y: expected"):
        maximize_bayes_error(X, Y[1:], bandwidth=0.3)
