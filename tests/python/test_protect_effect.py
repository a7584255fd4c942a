"""What protection does to models trained afresh on digits, and to a problem whose Bayes error is known."""

from __future__ import annotations

import numpy as np
import pytest

from abjure.protect import bayes_error, maximize_bayes_error

pytest.importorskip("sklearn")
pytestmark = pytest.mark.effect

EPSILON = 64 / 255


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def accuracies(x, digits):
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    _, y, test_x, test_y = digits
    return [m.fit(x, y).score(test_x, test_y) for m in (LogisticRegression(max_iter=2000), SVC())]


def test_calibrated_readings_of_digits(digits):
    x, y, *_ = digits
    got = bayes_error(x, y)
    assert got.bandwidth[0] == pytest.approx(0.435, abs=0.01)
    assert got.plugin == pytest.approx(0.026, abs=0.006)
    assert got.own_label_error < 0.03


@pytest.mark.parametrize("bandwidth", [1.0, None])
def test_against_clean_fresh_models_fail(digits, bandwidth):
    x, y, *_ = digits
    got = maximize_bayes_error(x, y, epsilon=EPSILON, bandwidth=bandwidth)
    assert max(accuracies(got.x, digits)) < 0.3
    assert got.certificate.clean_after.soft > got.certificate.clean_before.soft + 0.3
    assert got.certificate.holds


def test_noise_of_the_same_size_does_not(digits):
    x, *_ = digits
    signs = np.random.default_rng(1).choice([-1, 1], x.shape)
    assert min(accuracies(x, digits)) > 0.96
    assert min(accuracies(np.clip(x + EPSILON * signs, 0, 1).astype(np.float32), digits)) > 0.9


def test_against_published_the_estimate_rises_and_models_still_learn(digits):
    x, y, *_ = digits
    got = maximize_bayes_error(
        x, y, epsilon=EPSILON, against="published", per="sample", objective="gini", bandwidth="perplexity"
    )
    certificate = got.certificate
    assert certificate.published_before.plugin < 0.04 < 0.6 < certificate.published_after.plugin
    assert min(accuracies(got.x, digits)) > 0.9


def test_two_gaussians_whose_bayes_error_is_known():
    """Unit Gaussians 3 apart: the Bayes error is 0.0668; the estimate finds it, and the ascent drives it up."""
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)

    def draw(n):
        y = np.arange(n) % 2
        return rng.normal(size=(n, 2)) + np.outer(y, [3.0, 0.0]), y

    (x, y), (test_x, test_y) = draw(600), draw(4000)
    clean = bayes_error(x, y, bandwidth=("perplexity", 30))
    assert clean.plugin == pytest.approx(0.0668, abs=0.02)
    assert clean.bounds[0] < 0.0668 < clean.bounds[1]
    got = maximize_bayes_error(
        x,
        y,
        epsilon=2.0,
        against="published",
        per="sample",
        objective="gini",
        bandwidth=("perplexity", 30),
        box=(-20, 20),
    )
    assert got.certificate.published_after.plugin > 0.2

    def neighbours(points):
        return KNeighborsClassifier(15).fit(points, y).score(test_x, test_y)

    assert neighbours(x) > 0.91
    assert neighbours(got.x) < 0.8


def test_evidence_on_digits():
    """The small form of `examples/protect/evidence.py`: fresh networks on clean, noisy and protected digits."""
    import importlib.util
    import sys
    from pathlib import Path

    pytest.importorskip("torch")
    path = Path(__file__).parents[2] / "examples" / "protect" / "evidence.py"
    spec = importlib.util.spec_from_file_location("abjure_example_protect_evidence", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    import torch

    threads = torch.get_num_threads()
    try:
        results = module.main(["--quick"])
    finally:
        torch.set_num_threads(threads)
    for model in ("mlp", "cnn"):

        def found(kind, level, model=model):
            return results.accuracy("digits", level, kind, model, 0, "none")

        assert found("clean", 0) > 0.95
        assert found("random", 64) > 0.9
        assert found("class", 64) < 0.6
        assert found("class_mean_shift", 64) < 0.75
    table = module.report(results, "digits")
    assert "| class_mean_shift |" in table
