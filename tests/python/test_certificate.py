"""Certificates and the bounds in them: reference vectors, peers, the budget in whole levels, files and their hashes."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import abjure
from abjure import _native
from abjure.protect import (
    Certificate,
    bayes_error,
    bayes_error_bounds,
    bhattacharyya_bound,
    cover_hart,
    fingerprint,
    henze_penrose_bound,
    maximize_bayes_error,
    nearest_neighbour_bound,
    smoothed_error,
)

torch = pytest.importorskip("torch")

TREE = np.array([[0, 0], [1, 0.1], [0.2, 0.9], [3, 3], [3.9, 3.2], [2.1, 1.8], [1.2, 1.1]])
SIDES = np.array([0, 0, 0, 1, 1, 1, 0])


def gaussians(n, d=2, classes=2, step=3.0, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return rng.normal(size=(n, d)) + step * np.eye(max(d, classes))[y, :d], y


@pytest.mark.parametrize(
    ("error", "classes", "lower"),
    [
        (0.1, 2, 0.052786404500),
        (0.3, 2, 0.183772233983),
        (0.1, 10, 0.051471862576),
        (0.3, 10, 0.165153077165),
        (0.5, 10, 0.3),
        (0.9, 10, 0.9),
        (0.0, 3, 0.0),
    ],
)
def test_cover_hart(error, classes, lower):
    assert cover_hart(error, classes) == (pytest.approx(lower, abs=1e-11), error)


def test_tree_and_neighbours_of_the_reference():
    tree = henze_penrose_bound(TREE, SIDES)
    assert tree.statistic == pytest.approx(1 / 7)
    assert (tree.lower, tree.upper) == (pytest.approx(0.077422872636, abs=1e-11), pytest.approx(0.142857142857))
    assert nearest_neighbour_bound(TREE, SIDES).statistic == pytest.approx(1 / 7)
    assert "n = 7, d = 2" in str(tree)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_neighbours_and_tree_against_scikit_learn_and_scipy(dtype):
    from scipy.sparse.csgraph import minimum_spanning_tree
    from scipy.spatial.distance import cdist
    from sklearn.neighbors import NearestNeighbors

    x, _ = gaussians(400, 9, 3)
    x = x.astype(dtype)
    got, squared = _native.nearest_neighbours(x, 4)
    distance, expected = NearestNeighbors(n_neighbors=5).fit(x).kneighbors(x)
    assert np.array_equal(got, expected[:, 1:])
    np.testing.assert_allclose(np.sqrt(squared), distance[:, 1:], rtol=1e-4 if dtype == "float32" else 1e-9)
    edges, lengths = _native.spanning_tree(x)
    tree = minimum_spanning_tree(cdist(x, x)).tocoo()
    assert {tuple(sorted(e)) for e in zip(tree.row, tree.col, strict=True)} == {tuple(e) for e in edges}
    np.testing.assert_allclose(np.sort(np.sqrt(lengths)), np.sort(tree.data), rtol=1e-4)


def test_gaussian_bhattacharyya_of_the_reference(monkeypatch):
    """Moments as given in the reference: BC 0.4208, bounds 0.0464 and 0.2104."""
    s0, s1 = np.array([[1, 0.2], [0.2, 1]]), np.array([[2, -0.3], [-0.3, 0.5]])
    rng = np.random.default_rng(0)
    parts = []
    for mean, spread in (([0, 0], s0), ([1, 2], s1)):
        z = rng.normal(size=(50, 2))
        z -= z.mean(0)
        z = z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / 49)).T  # of exactly unit covariance
        parts.append(z @ np.linalg.cholesky(spread).T + mean)
    got = bhattacharyya_bound(np.concatenate(parts), np.repeat([0, 1], 50), covariance="full")
    assert 2 * got.statistic == pytest.approx(0.420839214160, abs=1e-9)
    assert (got.lower, got.upper) == (pytest.approx(0.046432376645), pytest.approx(0.210419607081))


def test_shrinkage_is_that_of_scikit_learn():
    from sklearn.covariance import ledoit_wolf

    from abjure.protect.bounds import _spread

    x, _ = gaussians(30, 12)
    centred = x - x.mean(0)
    np.testing.assert_allclose(_spread(centred, "shrunk", 0), ledoit_wolf(centred, assume_centered=True)[0], atol=1e-12)


def test_bounds_hold_the_known_error_and_keep_their_order():
    """Unit Gaussians 3 apart: R* = 0.0668. The harmonic bounds are within those of Bhattacharyya."""
    x, y = gaussians(2000, step=3 / math.sqrt(2))
    for bound in (
        *bayes_error_bounds(x, y),
        bhattacharyya_bound(x, y, density="kernel"),
        nearest_neighbour_bound(x, y, k=5),
    ):
        assert bound.lower - 0.01 < 0.0668 < bound.upper + 0.01, bound
    tree, wide = henze_penrose_bound(x, y), bhattacharyya_bound(x, y, covariance="full")
    assert wide.lower - 0.01 < tree.lower
    assert tree.upper < wide.upper + 0.01
    assert bhattacharyya_bound(x, y, covariance="diagonal").statistic == pytest.approx(wide.statistic, abs=0.01)


@pytest.mark.parametrize("method", ["nearest_neighbour", "henze_penrose", "kernel"])
def test_label_noise_moves_every_estimator_along_the_known_line(method):
    """Labels drawn anew among all C at rate ρ raise R* to (1-ρ)R* + ρ(1-1/C): with R* near 0, the line is ρ(1-1/C)."""
    x, y = gaussians(1500, 3, 3, step=12.0)
    rng = np.random.default_rng(1)
    last = -1.0
    for rho in (0.0, 0.3, 0.6):
        noisy = np.where(rng.random(len(y)) < rho, rng.integers(0, 3, len(y)), y)
        if method == "kernel":
            found = bayes_error(x, noisy, bandwidth=2.0)
            low, high = found.plugin, found.plugin
        else:
            (bound,) = bayes_error_bounds(x, noisy, methods=(method,))
            low, high = bound.lower, bound.upper
        assert low - 0.05 <= rho * 2 / 3 <= high + 0.05
        assert high > last
        last = high


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("leave_one_out", ["corrected", "plain", "none"])
def test_halves_are_readings_of_halves(cross, leave_one_out):
    """Each half against an evaluation of that half on its own."""
    x, y = gaussians(60, 3, 3, step=1.0, seed=2)
    options = {
        "bandwidths": [0.8, 1.5],
        "objective": "gini",
        "tau": 1.0,
        "leave_one_out": leave_one_out,
        "singleton": "exclude",
        "priors": None,
    }
    queries = x + 0.2 if cross else x
    place = np.arange(60)
    found = _native.half_errors(x, y, 3, queries, y, place, options, 5, 9, None)
    for half in range(5):
        # The draw of subsample.rs: Random::stream(seed, index).
        state = _stream(9, half)
        drawn, _ = _native.draw_rows(state, 60, 30)
        rows = np.sort(np.argsort(y, kind="stable")[drawn])  # the kernel's rows are in order of class
        again = bayes_error(
            x[rows],
            y[rows],
            queries=queries[rows],
            query_rows=np.arange(30) if leave_one_out != "none" else None,
            bandwidth=[0.8, 1.5],
            leave_one_out=leave_one_out,
            singleton="exclude",
        )
        assert found["rows"][half] == again.rows
        for name in ("value", "plugin", "gini", "soft", "entropy", "nll", "own_label_error"):
            assert found[name][half] == pytest.approx(getattr(again, name), rel=1e-9), name


def _stream(seed, index):
    m = 2**64 - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & m
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & m
        return z ^ (z >> 31)

    step = 0x9E3779B97F4A7C15
    return mix(mix((seed + step) & m) ^ mix(((index * step) & m) ^ 0x5851F42D4C957F2D))


def test_intervals_of_every_reading():
    x, y = gaussians(200)
    got = bayes_error(x, y, bandwidth=0.5, subsamples=100)
    for name in ("plugin", "gini", "soft", "entropy", "nll", "own_label_error"):
        low, high = got.interval_of(name)
        assert low < getattr(got, name) < high
    assert got.interval_of("gini") == got.interval
    with pytest.raises(abjure.ArgumentError, match="reading: expected one of"):
        got.interval_of("accuracy")
    with pytest.raises(abjure.ArgumentError, match="made with subsamples"):
        bayes_error(x, y, bandwidth=0.5).interval_of("gini")


def test_smoothed_error_is_that_of_the_mixture():
    """Two points a apart smoothed by h: the Bayes error is the normal tail at a / 2h."""
    x = np.array([[0.0, 0.0], [3.0, 0.0]])
    got = smoothed_error(x, [0, 1], bandwidth=1.0, draws=20_000)
    exact = 0.5 * math.erfc(1.5 / math.sqrt(2))
    assert abs(got.error - exact) < 3 * got.standard_error
    assert got.hoeffding[0] <= got.interval[0] < exact < got.interval[1] < got.hoeffding[1]
    half = smoothed_error(x.astype(np.float16), [0, 1], bandwidth=1.0, draws=2000)
    assert half.error == pytest.approx(exact, abs=0.02)
    assert smoothed_error(x, [0, 1], bandwidth=1.0, draws=100, seed=1) != smoothed_error(
        x, [0, 1], bandwidth=1.0, draws=100
    )


def images(n=120, d=16, classes=3, dtype=np.float32):
    rng = np.random.default_rng(0)
    y = np.arange(n) % classes
    centres = rng.uniform(0.2, 0.8, size=(classes, d))
    return np.clip(centres[y] + rng.normal(size=(n, d)) * 0.1, 0, 1).astype(dtype), y


@pytest.fixture(scope="module")
def made():
    x, y = images()
    pixels = np.rint(x * 255).astype(np.uint8)
    return maximize_bayes_error(pixels, y, epsilon=8.9 / 255, steps=6, bandwidth=0.3), pixels


def test_the_budget_is_whole_levels(made):
    got, pixels = made
    certificate = got.certificate
    assert (certificate.largest_levels, certificate.allowed_levels, certificate.levels) == (8, 8, 255)
    assert certificate.largest_change == 8 / 255
    assert certificate.holds
    broken = got.x.copy()
    broken[3, 2] = pixels[3, 2] + 9
    verified = certificate.verify(broken, pixels)
    assert not verified
    assert (verified.published, verified.clean, verified.budget) == (False, True, False)
    assert verified.largest_change == 9 / 255


def test_a_certificate_says_what_holds_and_no_more(made):
    got, _ = made
    certificate = got.certificate
    text = str(certificate)
    assert "nothing here bounds the accuracy on clean data" in text
    assert {b.name.split()[0] for b in certificate.bounds_after} == {"nearest", "Bhattacharyya", "Henze–Penrose"}
    for bound in (*certificate.bounds_before, *certificate.bounds_after):
        assert (bound.rows, bound.features, bound.classes) == (120, 16, 3)
        assert 0 <= bound.lower <= bound.upper <= 1
    for name in ("published_before", "published_after", "published_refitted", "clean_before", "clean_after"):
        reading = getattr(certificate, name)
        low, high = reading.interval_of("soft")
        assert low < reading.soft < high
    assert certificate.smoothed_after.error > 0
    assert "n = 120, d = 16" in certificate._repr_html_()
    assert got.certificate.settings["epsilon"] == 8.9 / 255


def test_saved_and_loaded_it_is_the_same(made, tmp_path):
    got, pixels = made
    path = tmp_path / "data.npy"
    got.save(path)
    beside = tmp_path / "data.npy.certificate.json"
    again = Certificate.load(beside)
    assert again.to_dict() == got.certificate.to_dict()
    assert str(again) == str(got.certificate)
    assert json.loads(beside.read_text())["clean_sha256"] == fingerprint(pixels)
    np.save(tmp_path / "clean.npy", pixels)
    assert again.verify(path, tmp_path / "clean.npy")
    assert again.verify(torch.from_numpy(got.x)).budget is None
    assert not again.verify(pixels)
    with pytest.raises(abjure.ShapeError, match="published: expected shape"):
        again.verify(got.x[1:], pixels)
    with pytest.raises(abjure.ArgumentError, match=r"expected a \.npy file"):
        got.save(tmp_path / "data.csv")


@pytest.mark.parametrize("damage", ["missing", "text", "format", "number", "contradiction"])
def test_damaged_certificates_are_refused(made, tmp_path, damage):
    path = tmp_path / "c.json"
    made[0].certificate.save(path)
    found = json.loads(path.read_text())
    if damage == "format":
        found["format"] = "another"
    if damage == "number":
        found["clean_after"]["plugin"] = "much"
    if damage == "contradiction":
        found["largest_levels"] = 200
    path.write_text("{" if damage == "text" else json.dumps(found))
    with pytest.raises(abjure.ArgumentError, match="certificate"):
        Certificate.load(tmp_path / "none.json" if damage == "missing" else path)


def test_infinite_readings_survive(tmp_path, made):
    reading = dataclasses.replace(made[0].certificate.clean_after, nll=math.inf)
    certificate = dataclasses.replace(made[0].certificate, clean_after=reading)
    certificate.save(tmp_path / "c.json")
    assert Certificate.load(tmp_path / "c.json").clean_after.nll == math.inf


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), dtype=st.sampled_from(["float64", "float32", "float16", "uint8"]))
def test_a_fingerprint_is_of_dtype_shape_and_values(seed, dtype):
    x = (np.random.default_rng(seed).random((5, 2, 3)) * 200).astype(dtype)
    assert fingerprint(x) == fingerprint(torch.from_numpy(x)) == fingerprint(np.asfortranarray(x))
    assert fingerprint(x) == fingerprint(x.astype(x.dtype.newbyteorder(">")))
    assert fingerprint(x) != fingerprint(x.reshape(5, 6))
    other = x.copy()
    other[4, 1, 2] += 1
    assert fingerprint(x) != fingerprint(other)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (abjure.ArgumentError, "k: expected an odd", lambda: nearest_neighbour_bound(TREE, SIDES, k=2)),
        (abjure.ArgumentError, "k: expected 1 for 3", lambda: nearest_neighbour_bound(TREE, np.arange(7) % 3, k=3)),
        (abjure.ArgumentError, "k: expected 1 to 6", lambda: nearest_neighbour_bound(TREE, SIDES, k=7)),
        (abjure.ArgumentError, "density: expected", lambda: bhattacharyya_bound(TREE, SIDES, density="box")),
        (abjure.ArgumentError, "covariance: expected", lambda: bhattacharyya_bound(TREE, SIDES, covariance="none")),
        (abjure.ArgumentError, "bandwidth: expected with", lambda: bhattacharyya_bound(TREE, SIDES, bandwidth=1.0)),
        (
            abjure.DegenerateError,
            "class 1 has 2 rows, a full covariance needs 3",
            lambda: bhattacharyya_bound(TREE, [0, 0, 0, 0, 0, 1, 1], covariance="full"),
        ),
        (abjure.DegenerateError, "singular", lambda: bhattacharyya_bound(TREE * 0, SIDES)),
        (abjure.NonFiniteError, "non-finite", lambda: bhattacharyya_bound(TREE * [1, np.nan], SIDES)),
        (abjure.NonFiniteError, "non-finite", lambda: henze_penrose_bound(TREE * [1, np.nan], SIDES)),
        (abjure.DegenerateError, "two classes", lambda: henze_penrose_bound(TREE, SIDES * 0)),
        (abjure.ArgumentError, "methods: expected", lambda: bayes_error_bounds(TREE, SIDES, methods=("vc",))),
        (abjure.ArgumentError, "error: expected", lambda: cover_hart(1.1, 2)),
        (abjure.ArgumentError, "classes: expected", lambda: cover_hart(0.1, 1)),
        (abjure.ArgumentError, "draws: expected", lambda: smoothed_error(TREE, SIDES, bandwidth=1.0, draws=1)),
        (abjure.ArgumentError, "bandwidth: expected", lambda: smoothed_error(TREE, SIDES, bandwidth=-1.0)),
    ],
)
def test_bad_input(error, match, call):
    with pytest.raises(error, match=match):
        call()
