"""Recourse under deletion against scikit-learn's fits without the records, scipy's programmes and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge

from abjure import protect
from abjure.errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from abjure.protect import DeletionModel, robust_recourse
from abjure.protect._cheapest import cheapest_step


def records(n=60, d=4, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.linspace(0.5, 3, d)
    score = x @ np.linspace(-1, 1.5, d) + noise * rng.normal(size=n)
    return x, score


def logistic(x, y, penalty=1.0):
    # scikit-learn stops at a gradient of 1e-4 unless told otherwise.
    model = LogisticRegression(C=1 / penalty, tol=1e-12, solver="newton-cholesky", max_iter=500)
    return model.fit(x, y)


@pytest.mark.parametrize("gone", [[], [3], [3, 17, 40, 41, 59]])
@pytest.mark.parametrize("kind", ["logistic", "ridge", "linear"])
def test_refits_equal_scikit_learn_without_the_records(kind, gone):
    x, score = records()
    y = (score > 0).astype(int) if kind == "logistic" else score
    penalty = 0.0 if kind == "linear" else 2.0
    model = DeletionModel(x, y, kind="ridge" if kind == "linear" else kind, penalty=penalty)
    keep = np.delete(np.arange(len(x)), gone)
    if kind == "logistic":
        fitted = logistic(x[keep], y[keep], penalty)
        expected = fitted.coef_[0], fitted.intercept_[0]
    else:
        fitted = (LinearRegression() if kind == "linear" else Ridge(alpha=penalty)).fit(x[keep], y[keep])
        expected = fitted.coef_, fitted.intercept_
    coef, intercept = model.without(gone)
    np.testing.assert_allclose(coef, expected[0], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(intercept, expected[1], rtol=1e-6, atol=1e-8)
    if kind != "logistic":
        np.testing.assert_allclose(model.without(gone, "newton")[0], coef, rtol=1e-9)
    if not gone:
        np.testing.assert_allclose(model.decision_function(x), x @ coef + intercept, rtol=1e-12)


def test_influence_is_the_derivative_of_the_refit_by_the_records_weight():
    """The first-order effect against a fit in which one record weighs a little less."""
    x, score = records(n=30)
    y = (score > 0).astype(int)
    model = DeletionModel(x, y, penalty=1.0)
    q = np.array([0.3, -1.0, 2.0, 0.1])
    effects = model.influences(q)
    h = 1e-4
    for i in (0, 7, 29):
        scores = []
        for change in (-h, h):
            weight = np.ones(len(x))
            weight[i] += change
            fitted = LogisticRegression(C=1.0, tol=1e-13, solver="newton-cholesky", max_iter=500).fit(x, y, weight)
            scores.append(q @ fitted.coef_[0] + fitted.intercept_[0])
        np.testing.assert_allclose(effects[i], -(scores[1] - scores[0]) / (2 * h), rtol=1e-4, atol=1e-7)


def test_the_worked_example():
    x = np.array([[1, 0.5], [2, 1], [0, 1.5], [1, -1], [3, 0.5], [-1, 2]])
    y = np.array([1, 1, 0, 1, 1, 0])
    model = DeletionModel(x, y, penalty=0.5, intercept=None)
    np.testing.assert_allclose(model.coef, [1.405332085091, -0.710122406528], atol=1e-11)
    np.testing.assert_allclose(model.without([1, 4], "newton")[0], [1.057137637922, -0.831711103995], atol=1e-11)
    np.testing.assert_allclose(model.without([1, 4], "influence")[0], [1.212826884838, -0.779696702766], atol=1e-11)
    scores, deleted = model.worst_scores([1.0, 0.2], k=2)
    by_hand = {
        s: float(np.array([1.0, 0.2]) @ model.without(list(s))[0])
        for size in range(3)
        for s in itertools.combinations(range(6), size)
    }
    worst = min(by_hand, key=by_hand.get)
    assert scores["exhaustive"] == pytest.approx(by_hand[worst], abs=1e-12)
    assert tuple(deleted) == worst
    assert scores["certified"] is None or scores["certified"] <= scores["exhaustive"]


@pytest.mark.parametrize("desired", ["above", "below"])
@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_certificates_hold_and_first_order_is_optimistic(kind, desired):
    sign = 1 if desired == "above" else -1
    optimistic = known = 0
    for seed in range(6):
        x, score = records(n=22, d=3, seed=seed)
        y = (score > 0).astype(int) if kind == "logistic" else score
        model = DeletionModel(x, y, kind=kind, penalty=8.0, intercept="penalized")
        for q in records(n=4, d=3, seed=seed + 100)[0]:
            scores, _ = model.worst_scores(q, k=2, desired=desired)
            assert scores["exhaustive"] is not None
            assert sign * scores["refit"] >= sign * scores["exhaustive"] - 1e-9
            if scores["certified"] is not None:
                known += 1
                assert sign * scores["certified"] <= sign * scores["exhaustive"] + 1e-9
            optimistic += sign * scores["influence"] > sign * scores["refit"]
    assert known >= 12
    assert optimistic >= 20


def test_the_local_certificate_is_far_tighter_than_strong_convexity_alone():
    x, score = records(n=1000, seed=3, noise=4.0)
    model = DeletionModel(x, (score > 0).astype(int), penalty=8.0, intercept="penalized")
    q = np.append(x[0], 1.0)
    local = model._native.bound(q, 2, False)[0]
    convex = model._native.bound(q, 2, True)[0]
    exact = model.worst_scores(x[0], k=2)[0]["refit"]
    assert convex < local <= exact
    assert exact - local < 0.02 * (exact - convex)


def scipy_l1(cuts, need, weights, low, high):
    from scipy.optimize import linprog

    d = len(weights)
    found = linprog(
        np.concatenate([weights, weights]),
        A_ub=-np.concatenate([cuts, -cuts], axis=1),
        b_ub=-need,
        bounds=[(0, None if np.isinf(h) else max(h, 0)) for h in high]
        + [(0, None if np.isinf(v) else max(-v, 0)) for v in low],
    )
    return (found.x[:d] - found.x[d:], found.fun) if found.status == 0 else None


@pytest.mark.parametrize("seed", range(25))
def test_the_cheapest_step_equals_scipy(seed):
    from scipy.optimize import minimize

    rng = np.random.default_rng(seed)
    d, m = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    base = rng.normal(size=d)
    # Cuts that hardly differ, as those of deletions do.
    cuts = base + 10.0 ** rng.integers(-3, 1) * rng.normal(size=(m, d))
    need = rng.uniform(0.2, 2, m)
    weights = 10 ** rng.uniform(-1, 1, d)
    low = np.where(rng.random(d) < 0.5, -np.inf, -rng.uniform(0, 2, d))
    high = np.where(rng.random(d) < 0.5, np.inf, rng.uniform(0, 2, d))
    low[rng.random(d) < 0.2] = 0.0
    expected = scipy_l1(cuts, need, weights, low, high)
    step, short = cheapest_step(cuts, need, weights, low, high, "l1")
    assert (step >= low - 1e-12).all()
    assert (step <= high + 1e-12).all()
    if expected is None:
        assert short > 0
        return
    assert short == 0
    assert (cuts @ step >= need - 1e-7).all()
    assert np.abs(step) @ weights == pytest.approx(expected[1], rel=1e-6)
    step, short = cheapest_step(cuts, need, weights, low, high, "l2")
    assert short == 0
    assert (cuts @ step >= need - 1e-7).all()
    oracle = minimize(
        lambda v: 0.5 * ((weights * v) ** 2).sum(),
        expected[0],
        jac=lambda v: weights**2 * v,
        bounds=list(zip(low, high, strict=True)),
        constraints={"type": "ineq", "fun": lambda v: cuts @ v - need, "jac": lambda v: cuts},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert 0.5 * ((weights * step) ** 2).sum() <= oracle.fun * (1 + 1e-5) + 1e-10


def test_the_least_shortfall_where_the_box_is_too_small():
    step, short = cheapest_step(np.array([[1.0, 2.0]]), np.array([10.0]), np.ones(2), -np.ones(2), np.ones(2), "l1")
    np.testing.assert_allclose(step, [1, 1], atol=1e-6)
    assert short == pytest.approx(7.0, abs=1e-6)
    # A box that leaves out the start: the least change is to enter it.
    step, short = cheapest_step(np.array([[1.0]]), np.array([0.5]), np.ones(1), np.array([1.0]), np.array([3.0]), "l2")
    assert (step, short) == (1.0, 0.0)


def refused(model, x, count):
    scores = model.decision_function(x)
    return x[np.argsort(-scores)][scores[np.argsort(-scores)] < 0][:count]


@pytest.mark.parametrize("cost", ["l1", "l2"])
def test_recourse_survives_every_deletion_and_the_plain_one_does_not(cost):
    x, score = records(n=26, d=4, seed=5)
    y = (score > 0.5).astype(int)
    model = DeletionModel(x, y, penalty=1.0)
    broken = 0
    for instance in refused(model, x, 5):
        plain = model.recourse(instance, k=0, cost=cost)
        robust = model.recourse(instance, k=2, cost=cost)
        assert plain.found
        assert robust.found
        assert plain.cost < robust.cost
        # Without deletions the change ends at the threshold.
        assert abs(plain.scores["now"]) < 1e-5
        assert plain.scores["refit"] == pytest.approx(plain.scores["now"], abs=1e-12)
        assert plain.scores["exhaustive"] == pytest.approx(plain.scores["now"], abs=1e-12)
        assert robust.scores["refit"] >= 0
        # 352 sets: all of them were looked at.
        assert robust.scores["exhaustive"] >= -1e-9
        after, _ = model.worst_scores(plain.x, k=2)
        broken += after["exhaustive"] < 0
        assert robust.cost == pytest.approx(np.linalg.norm(robust.delta * _mad(x), ord=1 if cost == "l1" else 2))
    assert broken == 5


def _mad(x):
    return 1 / np.median(np.abs(x - np.median(x, axis=0)), axis=0)


def test_the_cost_is_least_among_points_that_survive_every_set():
    """Brute force: all cuts of all sets at once, by scipy."""
    x, score = records(n=14, d=3, seed=8)
    model = DeletionModel(x, score, kind="ridge", penalty=1.0)
    instance = x[np.argmin(model.decision_function(x))]
    sets = [s for size in (0, 1, 2) for s in itertools.combinations(range(14), size)]
    thetas = [model.without(list(s)) for s in sets]
    cuts = np.array([t[0] for t in thetas])
    need = np.array([1.0 - t[0] @ instance - t[1] for t in thetas])
    infinite = np.full(3, np.inf)
    _, expected = scipy_l1(cuts, need, np.ones(3), -infinite, infinite)
    found = model.recourse(instance, k=2, target=1.0, weights=None)
    assert found.cost == pytest.approx(expected, rel=1e-5)
    # Without a look at all sets the search may miss one, and be a little too cheap.
    quick = model.recourse(instance, k=2, target=1.0, weights=None, exhaustive=0)
    assert expected * 0.99 <= quick.cost <= expected * (1 + 1e-5)
    one = model.recourse(instance, k=1, target=1.0, weights=None)
    singles = [i for i, s in enumerate(sets) if len(s) < 2]
    _, expected = scipy_l1(cuts[singles], need[singles], np.ones(3), -infinite, infinite)
    assert one.cost == pytest.approx(expected, rel=1e-5)
    assert one.scores["exhaustive"] >= 1.0 - 1e-9


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
@pytest.mark.parametrize("cost", ["l1", "l2"])
def test_certified_recourse(kind, cost):
    x, score = records(n=700, seed=2, noise=4.0)
    y = (score > 0).astype(int) if kind == "logistic" else score
    model = DeletionModel(x, y, kind=kind, penalty=4.0)
    instance = refused(model, x, 1)[0]
    certified = model.recourse(instance, k=1, cost=cost, method="certified")
    refit = model.recourse(instance, k=1, cost=cost)
    assert certified.found
    assert certified.scores["certified"] >= 0
    assert certified.scores["exhaustive"] >= certified.scores["certified"]
    assert refit.cost <= certified.cost < 2 * refit.cost
    # No cheaper point is certified: any step back towards the start loses it.
    for share in (0.9, 0.99):
        back = model.worst_scores(instance + share * certified.delta, k=1)[0]["certified"]
        assert back < 0


def test_what_may_change():
    x, score = records(n=80, d=4, seed=4)
    table = {f"f{i}": x[:, i] for i in range(4)}
    y = np.where(score > 0, "good", "bad")
    start = dict(zip(table, refused(DeletionModel(x, score > 0), x, 3)[2].tolist(), strict=True))
    free = robust_recourse(table, y, start, k=1)
    assert free.found
    moved = next(iter(free.changes))
    held = robust_recourse(table, y, start, k=1, fixed=[moved])
    assert held.found
    assert moved not in held.changes
    assert held.cost > free.cost
    up = robust_recourse(table, y, start, k=1, increase_only=list(table), cost="l2")
    assert up.found
    assert (up.delta >= 0).all()
    edge = free.changes[moved][0] + 0.25 * (free.changes[moved][1] - free.changes[moved][0])
    low, high = sorted((free.changes[moved][0], edge))
    boxed = robust_recourse(table, y, start, k=1, bounds={moved: (low, high)})
    assert boxed.found
    assert low <= boxed.x[list(table).index(moved)] <= high
    stuck = robust_recourse(table, y, start, k=1, fixed=[0, 1, 2], bounds={"f3": (start["f3"], start["f3"] + 1e-3)})
    assert not stuck.found
    assert stuck.scores["refit"] < 0
    assert "nothing admissible" in str(stuck)
    below = robust_recourse(table, y, {f"f{i}": 2.0 * i for i in range(4)}, k=1, desired="below", target=-0.5)
    assert below.found
    assert below.scores["exhaustive"] <= -0.5


def test_already_on_the_right_side():
    x, score = records()
    model = DeletionModel(x, score > 0)
    found = model.recourse(x[np.argmax(model.decision_function(x))], k=1)
    assert found.found
    assert found.cost == 0
    assert found.changes == {}


def test_last_layer_models_move_the_input():
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 12), torch.nn.Tanh(), torch.nn.Linear(12, 5), torch.nn.Tanh())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 3)).astype(np.float32)
    y = x[:, 0] + x[:, 1] ** 2 > 0.8
    with torch.no_grad():
        embedded = net(torch.from_numpy(x))
    model = DeletionModel(embedded, y, penalty=0.1)
    refused = x[np.argsort(-model.decision_function(embedded))][100]
    found = model.recourse(refused, k=1, features=net, cost="l2", weights=None)
    assert found.found
    assert found.scores["refit"] >= 0
    with torch.no_grad():
        q = net(torch.tensor(found.x[None], dtype=torch.float32))
    assert model.worst_scores(q[0], k=1)[0]["exhaustive"] >= -1e-6
    # A local optimum: going back towards the start loses it.
    with torch.no_grad():
        back = net(torch.tensor((refused + 0.97 * found.delta)[None], dtype=torch.float32))
    assert model.worst_scores(back[0], k=1)[0]["exhaustive"] < 0
    fixed = model.recourse(refused, k=1, features=net, weights=None, fixed=[0])
    assert fixed.x[0] == pytest.approx(refused[0])


def test_results_show_themselves():
    x, score = records()
    model = DeletionModel({"age <b>": x[:, 0], "b": x[:, 1], "c": x[:, 2], "d": x[:, 3]}, score > 0)
    found = model.recourse(refused(model, x, 1)[0], k=1, cost="l2")
    assert "age <b>" in str(found)
    assert "age &lt;b&gt;" in found._repr_html_()
    assert found.plot().axes
    assert set(found.scores) == {"now", "influence", "newton", "refit", "certified", "exhaustive"}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"instance": [1.0, 2.0]}, ShapeError),
        ({"instance": [1.0, 2.0, np.nan, 0.0]}, NonFiniteError),
        ({"instance": {"x0": 1.0}}, ArgumentError),
        ({"instance": list("abcd")}, ArgumentError),
        ({"k": -1}, ArgumentError),
        ({"k": 60}, ArgumentError),
        ({"k": 1.5}, ArgumentError),
        ({"method": "guess"}, ArgumentError),
        ({"cost": "l0"}, ArgumentError),
        ({"desired": "up"}, ArgumentError),
        ({"target": np.inf}, ArgumentError),
        ({"weights": [1, 2, 3]}, ArgumentError),
        ({"weights": [1, 2, 3, 0]}, ArgumentError),
        ({"weights": "iqr"}, ArgumentError),
        ({"fixed": ["nobody"]}, ArgumentError),
        ({"fixed": [4]}, ArgumentError),
        ({"bounds": {"x0": (2, 1)}}, ArgumentError),
        ({"bounds": (0,)}, ArgumentError),
        ({"bounds": ([0, 1], 2)}, ArgumentError),
        ({"kind": "svm"}, ArgumentError),
        ({"penalty": -1}, ArgumentError),
        ({"intercept": "yes"}, ArgumentError),
        ({"k": 30, "method": "certified"}, DegenerateError),
        ({"x": [[1.0, 2.0], [3.0, np.nan]], "y": [0, 1]}, NonFiniteError),
        ({"x": {"a": ["u", "v"]}, "y": [0, 1]}, ArgumentError),
        ({"y": np.zeros(60)}, ArgumentError),
        ({"y": np.arange(60)}, ArgumentError),
        ({"y": [0, 1]}, ShapeError),
    ],
)
def test_bad_input(change, error):
    x, score = records()
    arguments = {"x": x, "y": score > 0, "instance": x[0], **change}
    with pytest.raises(error):
        robust_recourse(arguments.pop("x"), arguments.pop("y"), arguments.pop("instance"), **arguments)


def test_no_unique_minimum_is_said():
    x, score = records()
    twice = np.concatenate([x, x[:, :1]], axis=1)
    with pytest.raises(DegenerateError, match="raise the penalty"):
        DeletionModel(twice, score, kind="ridge", penalty=0)
    with pytest.raises(DegenerateError, match="raise the penalty"):
        DeletionModel(x, x[:, 0] > 0, penalty=0)
    assert protect.DeletionModel(twice, score, kind="ridge", penalty=1e-3).coef.shape == (5,)
