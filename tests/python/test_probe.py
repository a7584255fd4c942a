"""Probes against scikit-learn at the same optimum, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, roc_auc_score

import abjure
from abjure import refuse

X = np.array([[1, 0.5], [2, -0.5], [0, 1.5], [-1, 0], [-2, -1], [0.5, -0.5]])
Y = np.array([1, 1, 1, 0, 0, 0])


def overlapping(n, d, seed=0, share=0.5):
    """Classes that overlap, with unequal variances and a common offset."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < share).astype(int)
    scale = 3 / np.sqrt(np.arange(1, d + 1))
    x = rng.standard_normal((n, d)) * scale + 2
    return x + y[:, None] * rng.standard_normal(d) * scale * (2 / np.sqrt(d)), y


def objective(x, y, w, b, C=1.0, balanced=False):
    x, sign = np.asarray(x, np.float64), 2 * y - 1
    s = len(y) / (2 * np.where(y == 1, y.sum(), len(y) - y.sum())) if balanced else 1.0
    return 0.5 * w @ w + C * (s * np.logaddexp(0, -sign * (x @ w + b))).sum()


def test_the_vectors_of_the_reference():
    probe = refuse.RefusalProbe(tol=1e-12).fit(X, Y)
    np.testing.assert_allclose(probe.coef, [0.876919446146, 0.740336387522], atol=1e-11)
    assert probe.intercept == pytest.approx(-0.203214804794, abs=1e-11)
    assert probe.result.converged
    assert probe.result.loss == pytest.approx(objective(X, Y, probe.coef, probe.intercept), rel=1e-13)
    ridge = refuse.RefusalProbe("ridge", tol=1e-12).fit(X, Y)
    np.testing.assert_allclose(ridge.coef, [0.435946462715, 0.491013384321], atol=1e-11)
    assert ridge.intercept == pytest.approx(-0.0363288718929, abs=1e-11)


@pytest.mark.parametrize("shape", [(400, 30), (60, 90)])
@pytest.mark.parametrize("balanced", [None, "balanced"])
def test_the_optimum_is_that_of_scikit_learn(shape, balanced):
    x, y = overlapping(*shape, share=0.3)
    for C in (0.01, 1.0, 30.0):
        ours = refuse.RefusalProbe(C=C, class_weight=balanced, tol=1e-10).fit(x, y)
        theirs = LogisticRegression(C=C, class_weight=balanced, tol=1e-10, max_iter=20000).fit(x, y)
        np.testing.assert_allclose(ours.coef, theirs.coef_[0], atol=2e-5 * np.abs(theirs.coef_).max())
        best = objective(x, y, theirs.coef_[0], theirs.intercept_[0], C, balanced == "balanced")
        assert ours.result.loss <= best * (1 + 1e-10)
        assert ours.result.gradient_norm < 1e-5
    weights = len(y) / (2 * np.bincount(y))[y] if balanced else None
    ridge = refuse.RefusalProbe("ridge", alpha=2.0, class_weight=balanced, tol=1e-10).fit(x, y)
    theirs = Ridge(2.0).fit(x, 2 * y - 1, weights)
    np.testing.assert_allclose(ridge.coef, theirs.coef_, atol=1e-8)
    assert ridge.intercept == pytest.approx(theirs.intercept_, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [300, 30])
def test_every_dtype_and_layout_has_the_optimum_of_its_own_numbers(dtype, n):
    x, y = overlapping(n, 48)
    x = torch.from_numpy(x).to(dtype)
    probe = refuse.RefusalProbe().fit(x, y)
    exact = x.double().numpy()
    theirs = LogisticRegression(tol=1e-10, max_iter=20000).fit(exact, y)
    best = objective(exact, y, theirs.coef_[0], theirs.intercept_[0])
    assert objective(exact, y, probe.coef, probe.intercept) == pytest.approx(best, rel=1e-6)
    np.testing.assert_allclose(probe.decision(x), exact @ probe.coef + probe.intercept, atol=1e-4)
    wide = torch.zeros(n, 60, dtype=dtype)
    wide[:, :48] = x
    for other in (wide[:, :48], x.t().contiguous().t()):
        np.testing.assert_array_equal(refuse.RefusalProbe().fit(other, y).coef, probe.coef)


@pytest.mark.parametrize("shape", [(3000, 64), (200, 256)])
def test_threads_change_no_bit(shape):
    x, y = overlapping(*shape)
    before, seen = abjure.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            abjure.set_num_threads(threads)
            probe = refuse.RefusalProbe().fit(x.astype(np.float32), y)
            seen.append((probe.coef.tobytes(), probe.intercept, probe.decision(x).tobytes()))
    finally:
        abjure.set_num_threads(before)
    assert seen[0] == seen[1] == seen[2]


def test_massive_activations_and_offsets_do_not_stop_it():
    x, y = overlapping(600, 40)
    x[:, 3] = x[:, 3] * 300 + 5000
    probe = refuse.RefusalProbe().fit(x.astype(np.float32), y)
    exact = x.astype(np.float32).astype(np.float64)
    mean, scale = exact.mean(0), np.where(np.arange(40) == 3, 1e-3, 1)
    # The reference, on rescaled numbers with the penalty rescaled alike, by Newton's method in float64.
    z = np.column_stack([(exact - mean) * scale, np.ones(600)])
    w, penalty = np.zeros(41), np.append(scale**2, 0)
    for _ in range(40):
        p = 1 / (1 + np.exp(-z @ w))
        hessian = (z * (p * (1 - p))[:, None]).T @ z + np.diag(penalty)
        w = w - np.linalg.solve(hessian, z.T @ (p - y) + penalty * w)
    best = objective(exact, y, w[:-1] * scale, w[-1] - (w[:-1] * scale) @ mean)
    assert objective(exact, y, probe.coef, probe.intercept) == pytest.approx(best, rel=1e-6)


def test_a_path_is_the_fits_and_cross_validation_holds_out():
    x, y = overlapping(240, 20)
    probe, Cs = refuse.RefusalProbe(tol=1e-9, class_weight="balanced", layer=3), [0.001, 0.1, 10.0]
    for C, found in zip(Cs, probe.path(x, y, Cs), strict=True):
        alone = refuse.RefusalProbe(C=C, tol=1e-9, class_weight="balanced").fit(x, y)
        np.testing.assert_allclose(found.coef, alone.coef, atol=1e-6)
        assert (found.C, found.layer, found.counts) == (C, 3, alone.counts)
    found = probe.cross_validate(x, y, Cs, folds=4, seed=1)
    shares = np.array([np.bincount(y[found.fold == k]) for k in range(4)])
    assert (np.ptp(shares, axis=0) <= 1).all()
    for i, C in enumerate(Cs):
        for k in range(4):
            held = found.fold == k
            theirs = LogisticRegression(C=C, class_weight="balanced", tol=1e-10, max_iter=5000).fit(x[~held], y[~held])
            z = theirs.decision_function(x[held])
            np.testing.assert_allclose(found.decisions[i, held], z, atol=1e-4)
            assert found.by_fold["log_loss"][i, k] == pytest.approx(log_loss(y[held], 1 / (1 + np.exp(-z))), abs=1e-5)
            assert found.by_fold["auroc"][i, k] == pytest.approx(roc_auc_score(y[held], z), abs=1e-12)
            assert found.by_fold["accuracy"][i, k] == pytest.approx(theirs.score(x[held], y[held]))
    means = found.by_fold["log_loss"].mean(1)
    assert found.best == Cs[int(means.argmin())]
    assert found.best == found.fit(x, y).C
    assert len(found.table) == 3
    assert "log loss" in str(found)
    assert "AUROC" in found._repr_html_()
    again = probe.cross_validate(x, y, Cs, folds=4, seed=1)
    np.testing.assert_array_equal(again.decisions, found.decisions)
    assert (probe.cross_validate(x, y, [1.0], folds=4, seed=2).fold != found.fold).any()


def test_plots(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    x, y = overlapping(80, 6)
    ax = refuse.RefusalProbe("ridge").cross_validate(x, y, [1.0, 10.0], folds=2).plot()
    assert ax.get_ylabel() == "held-out auroc"


def test_save_gives_the_same_probe_and_the_direction_says_where_from(tmp_path):
    x, y = overlapping(100, 12)
    probe = refuse.RefusalProbe(C=0.5, layer=7, site="post", position="last_instruction").fit(x, y)
    probe.save(tmp_path / "probe.safetensors")
    again = refuse.RefusalProbe.load(tmp_path / "probe.safetensors")
    assert repr(again) == repr(probe)
    assert again.result == probe.result
    np.testing.assert_array_equal(again.probability(x), probe.probability(x))
    assert probe.score(x, y) == (probe.predict(x) == y).mean() > 0.7
    direction = probe.direction()
    assert (direction.layer, direction.site, direction.position) == (7, "post", "last_instruction")
    assert direction.counts == tuple(np.bincount(y))
    assert direction.provenance["C"] == 0.5
    assert "C" in probe._repr_html_()
    (tmp_path / "other").write_bytes(b"no")
    with pytest.raises(abjure.ArgumentError, match="RefusalProbe"):
        refuse.RefusalProbe.load(tmp_path / "other")


def test_what_is_refused():
    x, y = overlapping(40, 5)
    probe = refuse.RefusalProbe()
    with pytest.raises(abjure.ArgumentError, match="fitted"):
        probe.decision(x)
    with pytest.raises(abjure.ArgumentError, match="separable"):
        refuse.RefusalProbe(C=float("inf"))
    for options in ({"C": 0.0}, {"kind": "svm"}, {"tol": -1.0}, {"max_iter": 0}, {"class_weight": "all"}):
        with pytest.raises(abjure.ArgumentError):
            refuse.RefusalProbe(**options)
    with pytest.raises(abjure.DegenerateError, match="both classes"):
        probe.fit(x, np.ones(40, int))
    with pytest.raises(abjure.ArgumentError, match="0 or 1"):
        probe.fit(x, y * 2)
    with pytest.raises(abjure.ShapeError):
        probe.fit(x, y[:-1])
    with pytest.raises(abjure.ShapeError):
        probe.fit(x[0], y)
    for dtype in (torch.float32, torch.bfloat16):
        bad = torch.from_numpy(x).to(dtype)
        bad[17, 2] = float("nan")
        with pytest.raises(abjure.NonFiniteError, match="row 17"):
            probe.fit(bad, y)
    assert probe.result is None
    with pytest.raises(abjure.DegenerateError, match="fold"):
        probe.cross_validate(x, np.arange(40) < 3, [1.0], folds=5)
    with pytest.raises(abjure.ArgumentError):
        probe.path(x, y, [])
    with pytest.raises(abjure.ShapeError, match="last axis of 5"):
        probe.fit(x, y).decision(x[:, :4])
    with pytest.warns(refuse.ProbeConvergenceWarning, match="after up to 1 of 1"):
        refuse.RefusalProbe(max_iter=1, tol=1e-12).fit(x, y)


def test_a_probe_per_layer_of_recorded_activations(trigger, tmp_path):
    texts = trigger.train[0][:40] + trigger.train[1][:40]
    labels = [0] * len(trigger.train[0][:40]) + [1] * len(trigger.train[1][:40])
    prompts = refuse.Prompts(trigger.tokenizer, texts)
    recorded = refuse.record_to_disk(
        trigger.model, prompts, labels, tmp_path / "acts", positions="last", progress=False
    )
    position = recorded.positions[0]
    found = refuse.probe_layers(recorded, position, test=0.3)
    assert list(found.probes) == recorded.layers
    rows, y, owners = recorded.array(found.best, position)
    held = np.isin(owners, found.held_out)
    assert abs(held.mean() - 0.3) < 0.02
    probe = found.probes[found.best]
    assert probe.counts == (int((y[~held] == 0).sum()), int((y[~held] == 1).sum()))
    assert found.auroc[found.best] == pytest.approx(roc_auc_score(y[held], probe.decision(rows[held])))
    assert found.accuracy[found.best] == probe.score(rows[held], y[held])
    assert found.auroc[found.best] > 0.9
    assert probe.direction().layer == found.best
    assert "AUROC" in found._repr_html_()
