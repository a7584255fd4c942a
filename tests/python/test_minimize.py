"""Data minimisation against scikit-learn's trees, the definition of the criterion, and tables of every kind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.tree import DecisionTreeClassifier

from abjure import _native
from abjure.errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.protect import (
    ColumnMinimizer,
    anonymity,
    evaluate_release,
    minimization_front,
    minimize_columns,
)
from abjure.protect._trees import forest, grow, naive_bayes


def people(n=1200, seed=0):
    """The task needs income and, a little, age; the group shows in the postcode and in age, hardly in income."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 2, n)
    age = 35 + 12 * group + rng.normal(0, 8, n)
    income = rng.normal(30, 8, n)
    place = np.where(rng.random(n) < 0.9, group, 1 - group)
    town = np.array(["north", "south", "west", "east"], dtype=object)[place * 2 + rng.integers(0, 2, n)]
    approved = income + 0.1 * age + rng.normal(0, 1.5, n) > 34
    table = {"age": age, "income": income, "town": town, "noise": rng.normal(size=n)}
    return table, approved.astype(int), group


@pytest.mark.parametrize("seed", range(4))
def test_without_privacy_the_tree_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 12, (300, 5))
    y = ((codes[:, 0] + codes[:, 3] > 11).astype(int) + (codes[:, 1] > 8) + (rng.random(300) < 0.2)).clip(0, 2)
    ours = grow(codes, [y], [3], max_leaf_nodes=12, min_samples_leaf=5)
    theirs = DecisionTreeClassifier(max_leaf_nodes=12, min_samples_leaf=5, random_state=0).fit(codes, y)
    np.testing.assert_allclose(ours.predict_proba(codes), theirs.predict_proba(codes), atol=1e-12)
    assert (ours.feature < 0).sum() == theirs.get_n_leaves()


def by_definition(x, y, s, alpha, code):
    def gini(v):
        shares = np.bincount(v) / len(v)
        return 1 - (shares**2).sum()

    def impurity(rows):
        return (1 - alpha) * gini(y[rows]) + alpha * (0.5 - np.mean([gini(c[rows]) for c in s]))

    left = x <= code
    every = np.ones(len(x), dtype=bool)
    return impurity(every) - left.mean() * impurity(left) - (~left).mean() * impurity(~left)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 0.9])
def test_the_split_is_the_best_by_the_criterion(alpha):
    rng = np.random.default_rng(7)
    for _ in range(20):
        x, y = rng.integers(0, 9, 60), rng.integers(0, 3, 60)
        s = [rng.integers(0, 2, 60), rng.integers(0, 4, 60)]
        tree = grow(x[:, None], [y, *s], [3, 2, 4], alpha=alpha, max_leaf_nodes=2, min_samples_leaf=4)
        gains = {c: by_definition(x, y, s, alpha, c) for c in range(8) if 4 <= (x <= c).sum() <= 56}
        best = max(gains.values())
        if best > 1e-9:
            assert gains[tree.code[0]] == pytest.approx(best, abs=1e-12)
        else:
            assert len(tree.feature) == 1


def test_the_worked_split():
    x = np.arange(8)
    y, s = np.array([0, 0, 0, 1, 0, 1, 1, 1]), np.array([0, 1, 0, 1, 0, 0, 1, 1])
    for alpha, threshold in ((0.0, 2), (0.7, 2), (0.9, 1)):
        tree = grow(x[:, None], [y, s], [2, 2], alpha=alpha, max_leaf_nodes=2)
        assert (tree.feature[0], tree.code[0]) == (0, threshold)
    assert by_definition(x, y, [s], 0.9, 1) == pytest.approx(0.016666666667, abs=1e-12)


def test_models_of_adversaries_learn():
    x, y = load_wine(return_X_y=True)
    codes = np.stack([np.digitize(c, np.quantile(c, [0.2, 0.4, 0.6, 0.8])) for c in x.T], axis=1)
    train, test = np.arange(0, 178, 2), np.arange(1, 178, 2)
    for model in (forest, naive_bayes):
        p = model(codes[train], y[train], 3, codes[test], 0)
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-12)
        assert (p.argmax(axis=1) == y[test]).mean() > 0.9


def test_naive_bayes_equals_scikit_learn():
    from sklearn.naive_bayes import CategoricalNB

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5, (200, 4))
    y = (codes.sum(axis=1) > 8).astype(int)
    expected = CategoricalNB(alpha=1.0, min_categories=5).fit(codes, y)
    # Scikit-learn does not smooth the prior.
    ours = naive_bayes(codes, y, 2, codes, 0)
    prior = np.log((np.bincount(y) + 1) / (len(y) + 2)) - expected.class_log_prior_
    scores = expected.predict_log_proba(codes) + prior
    scores = np.exp(scores)
    np.testing.assert_allclose(ours, scores / scores.sum(axis=1, keepdims=True), atol=1e-12)


def test_pat_gives_less_away_than_a_plain_tree():
    table, y, _ = people()
    errors = {}
    for alpha in (0.0, 0.9):
        found = minimize_columns(table, y, sensitive=["town"], alpha=alpha, seed=1, max_leaf_nodes=30)
        errors[alpha] = found.report.error()
        assert float(found.report.utility.rate) > 0.8
    assert errors[0.9] > errors[0.0] + 0.02


@pytest.mark.parametrize("method", ["tree", "uniform", "feature_selection", "model_tree", "iterative", "k_anonymity"])
def test_every_method(method):
    table, y, group = people(600)
    found = minimize_columns(table, y, attributes={"group": group}, method=method, seed=2)
    report = found.report
    assert report.columns == 4
    assert 0 < report.collected <= 4
    assert {a.adversary for a in report.attacks} == {"A1", "A2", "A3", "A4", "A5"}
    assert all(a.attribute == "group" for a in report.attacks)
    assert set(found.x) <= set(table)
    assert len(next(iter(found.x.values()))) == 600
    for name, column in found.x.items():
        if not next(b for b in found.minimizer.buckets_ if b.name == name).kept:
            assert len(set(column.tolist())) <= 64
        # A representative is a value that somebody has.
        assert set(column.tolist()) <= set(table[name].tolist())
    assert "accuracy of the task" in str(found)
    assert "<table>" in found._repr_html_()
    if method == "k_anonymity":
        rows = np.arange(600)
        assert anonymity(found.minimizer.codes(table)[rows]).smallest >= 5
    if method == "feature_selection":
        assert report.collected == 2
        assert "income" in found.x


def test_more_knowledge_helps_an_adversary():
    table, y, group = people(1500)
    table["group"] = group.astype(float)
    found = minimize_columns(table, y, sensitive=["group"], method="feature_selection", keep=1, seed=0)
    errors = {a: found.report.error(a) for a in ("A1", "A2", "A3", "A4")}
    # Income says nothing, town and age say nearly all.
    assert errors["A1"] > 0.4
    assert errors["A3"] < 0.2
    assert errors["A4"] < 0.2


def test_joined_releases_tell_at_least_as_much():
    table, y, group = people(1200)
    half = [ColumnMinimizer("uniform", buckets=2).fit({n: c[:400] for n, c in table.items()}, y[:400])]
    other = ColumnMinimizer("uniform", buckets=3).fit({n: c[:400] for n, c in table.items()}, y[:400])
    rows = {"train": np.arange(400, 800), "test": np.arange(800, 1200), "sensitive": group, "adversaries": ("A1",)}
    one = evaluate_release(half, table, y, **rows)
    both = evaluate_release([*half, other], table, y, **rows)
    assert both.error() <= one.error() + 0.01
    assert both.anonymity.smallest <= one.anonymity.smallest


def test_a_model_of_the_callers_own():
    from sklearn.linear_model import LogisticRegression

    table, y, group = people(500)
    found = minimize_columns(table, y, attributes=group, adversaries=("A1",), model=LogisticRegression)
    assert float(found.report.utility.rate) > 0.8


def frame(kind, table):
    if kind == "pandas":
        return pytest.importorskip("pandas").DataFrame(table, index=np.arange(len(table["age"])) + 7)
    if kind == "polars":
        columns = {n: c if c.dtype != object else c.tolist() for n, c in table.items()}
        return pytest.importorskip("polars").DataFrame(columns)
    if kind == "arrow":
        return pytest.importorskip("pyarrow").table(table)
    return table


@pytest.mark.parametrize("kind", ["pandas", "polars", "arrow", "mapping"])
@pytest.mark.parametrize("output", ["representative", "code", "label"])
def test_tables_come_back_as_they_were(kind, output):
    table, y, group = people(400)
    table["town"][3] = None
    given = frame(kind, table)
    minimizer = ColumnMinimizer(alpha=0.5, output=output, max_leaf_nodes=12)
    found = minimizer.fit_transform(given, y, sensitive={"group": group})
    assert type(found) is type(given)
    plain = ColumnMinimizer(alpha=0.5, output=output, max_leaf_nodes=12).fit_transform(table, y, {"group": group})
    if kind == "pandas":
        assert list(found.index) == list(given.index)
    columns = {n: found[n].to_numpy() if kind in ("pandas", "polars") else np.asarray(found[n]) for n in plain}
    for name, column in columns.items():
        assert [str(v) for v in column.tolist()] == [str(v) for v in plain[name].tolist()]
    assert list(minimizer.get_feature_names_out()) == list(plain)


def test_pandas_categories_nullable_and_boolean_columns():
    pd = pytest.importorskip("pandas")
    table, y, _ = people(300)
    given = pd.DataFrame(table)
    given["town"] = given["town"].astype("category")
    given["old"] = given["age"] > 40
    given["whole"] = given["age"].round().astype("Int64")
    found = ColumnMinimizer("uniform", buckets=2, drop=False).fit_transform(given, y)
    assert list(found.columns) == list(given.columns)
    assert set(found["old"]) <= {0.0, 1.0}
    assert set(found["town"]) < set(table["town"])
    given.loc[5, "whole"] = pd.NA
    with pytest.raises((NonFiniteError, DTypeError), match="whole"):
        ColumnMinimizer().fit(given, y)


def test_arrays_and_tensors():
    import torch

    x, y = load_breast_cancer(return_X_y=True)
    minimizer = ColumnMinimizer(max_leaf_nodes=8).fit(x, y)
    released = minimizer.transform(x)
    assert released.dtype == np.float64
    assert released.shape == (569, sum(b.collected for b in minimizer.buckets_))
    tensor = minimizer.transform(torch.from_numpy(x))
    np.testing.assert_array_equal(tensor.numpy(), released)
    assert set(minimizer.set_params(output="code").transform(x).ravel().tolist()) <= set(range(9))


def test_buckets_are_where_the_tree_split():
    x = np.concatenate([np.linspace(0, 1, 100), np.linspace(2, 3, 100)])
    y = np.repeat([0, 1], 100)
    minimizer = ColumnMinimizer().fit(np.stack([x, np.zeros(200)], axis=1), y)
    first, second = minimizer.buckets_
    assert first.borders.tolist() == [1.5]
    assert first.labels == ["(-inf, 1.5]", "(1.5, inf]"]
    assert not second.collected
    assert "x1: not collected" in minimizer.describe()
    # Categories that were never seen belong to the largest group.
    town = np.array(["a"] * 120 + ["b"] * 80, dtype=object)
    minimizer = ColumnMinimizer().fit({"town": town}, (town == "b").astype(int))
    assert minimizer.transform({"town": np.array(["a", "b", "new"], dtype=object)})["town"].tolist() == ["a", "b", "a"]


def test_small_buckets_are_merged():
    x = np.concatenate([np.zeros(100), np.ones(3), np.full(97, 2.0)])[:, None]
    y = np.concatenate([np.zeros(100), np.ones(3), np.zeros(97)]).astype(int)
    apart = ColumnMinimizer(min_samples_leaf=1).fit(x, y).buckets_[0]
    merged = ColumnMinimizer(min_samples_leaf=1, min_bucket=0.5).fit(x, y).buckets_[0]
    assert apart.count == 3
    assert merged.borders.tolist() == [0.5]


def test_the_front():
    table, y, group = people(500)
    grid = {"tree": [{"alpha": 0.0}, {"alpha": 0.9}], "uniform": [{"buckets": 2}, {"buckets": 6}]}
    front = minimization_front(table, y, attributes=group, grid=grid, seeds=(0, 1), progress=False)
    assert len(front.points) == 4
    best = front.pareto()
    assert all(a.utility >= b.utility and a.error < b.error for a, b in itertools.pairwise(best))
    for p in front.points:
        assert any(q.utility >= p.utility and q.error >= p.error for q in best)
    assert 0.4 < front.error_majority < 0.6
    assert front.error_raw < 0.3
    assert "uniform(buckets=2)" in str(front)
    assert front.plot().axes


def test_anonymity_counts():
    found = anonymity(np.array([[0, 1], [0, 1], [2, 2], [0, 1], [3, 3]]))
    assert (found.smallest, found.unique, found.releases) == (1, 2, 3)
    assert found.sizes.tolist() == [1, 1, 3]


def test_threads_and_seeds_change_nothing_else():
    import abjure

    table, y, group = people(400)
    before = abjure.get_num_threads()
    reports = []
    try:
        for threads in (1, 3):
            abjure.set_num_threads(threads)
            reports.append(minimize_columns(table, y, attributes=group, seed=5).report.to_dict())
    finally:
        abjure.set_num_threads(before)
    assert reports[0] == reports[1]


@pytest.mark.filterwarnings("ignore:Estimator ColumnMinimizer does not inherit")
def test_scikit_learns_own_checks():
    from sklearn.base import clone
    from sklearn.pipeline import make_pipeline
    from sklearn.tree import DecisionTreeClassifier
    from sklearn.utils.estimator_checks import check_estimator

    minimizer = ColumnMinimizer(alpha=0.3)
    assert clone(minimizer).get_params() == minimizer.get_params()
    x, y = load_wine(return_X_y=True)
    assert make_pipeline(minimizer, DecisionTreeClassifier(random_state=0)).fit(x, y).score(x, y) > 0.9
    results = check_estimator(ColumnMinimizer(drop=False), on_fail=None, on_skip=None)
    failed = {r["check_name"]: str(r["exception"]) for r in results if r["status"] == "failed"}
    assert failed == {}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"y": np.zeros(300)}, DegenerateError),
        ({"y": np.random.default_rng(0).normal(size=300)}, ArgumentError),
        ({"y": np.arange(300)}, ArgumentError),
        ({"y": np.ones(3)}, ShapeError),
        ({"x": {"a": np.ones(300), "b": np.ones(299)}}, ShapeError),
        ({"x": {}}, ShapeError),
        ({"x": {"a": np.full(300, np.nan)}}, NonFiniteError),
        ({"x": {"a": np.arange(300).astype("datetime64[D]")}}, DTypeError),
        ({"x": np.ones((2, 3, 4))}, ShapeError),
        ({"sensitive": ["nobody"]}, ArgumentError),
        ({"sensitive": [9]}, ArgumentError),
        ({"sensitive": (), "attributes": None}, ArgumentError),
        ({"attributes": np.zeros(300)}, ArgumentError),
        ({"attributes": np.zeros(5)}, ShapeError),
        ({"method": "magic"}, ArgumentError),
        ({"alpha": 1.5}, ArgumentError),
        ({"max_leaf_nodes": 1}, ArgumentError),
        ({"min_samples_leaf": 0}, ArgumentError),
        ({"output": "text"}, ArgumentError),
        ({"split": (0.5, 0.5, 0.5)}, ArgumentError),
        ({"adversaries": ("A9",)}, ArgumentError),
        ({"colour": "red"}, ArgumentError),
        ({"method": "k_anonymity", "k": 1000}, ArgumentError),
    ],
)
def test_bad_input(change, error):
    table, y, group = people(300)
    arguments = {"x": table, "y": y, "attributes": group, **change}
    with pytest.raises(error):
        minimize_columns(arguments.pop("x"), arguments.pop("y"), **arguments)


def test_a_table_that_does_not_fit_the_fit():
    table, y, _ = people(300)
    minimizer = ColumnMinimizer().fit(table, y)
    with pytest.raises(ArgumentError, match="columns"):
        minimizer.transform({n + "2": c for n, c in table.items()})
    with pytest.raises(ShapeError, match="3 features"):
        minimizer.transform({n: c for n, c in table.items() if n != "age"})
    with pytest.raises(DTypeError, match="town"):
        minimizer.transform({**table, "town": np.zeros(300)})


def test_the_kernel_refuses_what_does_not_fit():
    codes = np.zeros((3, 2), dtype=np.uint16)
    y = np.zeros(3, dtype=np.int64)
    with pytest.raises(ShapeError):
        _native.grow_tree(codes, [y[:2]], [2], 0.0, 2, 1)
    with pytest.raises(ArgumentError):
        _native.grow_tree(codes, [y + 2], [2], 0.0, 2, 1)
    with pytest.raises(ShapeError):
        _native.grow_tree(codes, [y], [2, 2], 0.0, 2, 1)
    with pytest.raises(ShapeError):
        _native.forest_probabilities(codes, y, 2, codes[:, :1].copy(), 2, 4, 1, 1, 0)
