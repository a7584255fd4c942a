"""CKA, nearest-neighbour transfer and tug-of-war against plain forms and hand-computed cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abjure.errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.measure.similarity import LinearCKA, cka, cka_shards, procrustes, svcca
from abjure.measure.transfer import knn_transfer
from abjure.measure.tug_of_war import tug_of_war

X = np.array([[1, 0], [0, 1], [1, 1], [2, 0]], float)
Y = np.array([[1, 2], [2, 1], [3, 3], [2, 4]], float)


def plain_cka(x, y, debiased):
    """From Gram matrices, entry by entry as the papers write it."""
    n = len(x)
    k, el = x @ x.T, y @ y.T

    def hsic(a, b):
        if not debiased:
            h = np.eye(n) - 1 / n
            return np.trace(a @ h @ b @ h)
        a, b, one = a * (1 - np.eye(n)), b * (1 - np.eye(n)), np.ones(n)
        cross = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
        return (np.trace(a @ b) + cross - 2 / (n - 2) * (one @ a @ b @ one)) / (n * (n - 3))

    return hsic(k, el) / np.sqrt(hsic(k, k) * hsic(el, el))


def test_known_values():
    assert cka(X, Y) == pytest.approx(0.746729, abs=5e-7)
    rotation = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert cka(X, 3 * X @ rotation + 5) == pytest.approx(1, abs=1e-12)
    assert cka(X, np.array([[1, 0, 0, 1.0]]).T) == pytest.approx(0.755929, abs=5e-7)
    assert cka(X, Y, debiased=True) == pytest.approx(0.397360, abs=5e-7)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("shape", [(30, 5, 7), (12, 40, 3), (12, 30, 25), (9, 9, 9)])
def test_agrees_with_the_plain_form(shape, debiased):
    n, p, q = shape
    draw = np.random.default_rng(sum(shape))
    x = draw.standard_normal((n, p))
    y = np.tanh(x[:, : min(p, q)] @ draw.standard_normal((min(p, q), q))) + draw.standard_normal((n, q)) / 3
    expected = plain_cka(x, y, debiased)
    assert cka(x, y, debiased) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # Far from the origin, where sums of raw products would lose every digit of the difference.
    assert cka(x + 1e6, y - 1e6, debiased) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.booleans())
def test_batches_give_the_value_of_all_rows(sizes, debiased):
    n = sum(sizes) + 4
    draw = np.random.default_rng(n)
    x, y = draw.standard_normal((n, 4)) + 3, draw.standard_normal((n, 3))
    y[:, 0] += x[:, 1]
    rounded = x.astype(np.float32).astype(float)
    stream = LinearCKA()
    start = 0
    for size in [*sizes, 4]:
        stream.update(torch.from_numpy(x[start : start + size]).float(), y[start : start + size])
        start += size
    assert stream.n == n
    assert stream.value(debiased) == pytest.approx(plain_cka(rounded, y, debiased), rel=1e-9, abs=1e-11)


def test_the_debiased_form_sees_no_similarity_in_unrelated_features():
    draw = np.random.default_rng(0)
    values = [
        [cka(draw.standard_normal((20, 50)), draw.standard_normal((20, 50)), d) for _ in range(30)]
        for d in (False, True)
    ]
    assert np.mean(values[0]) > 0.6
    assert abs(np.mean(values[1])) < 0.05


def test_cka_refuses_what_it_cannot_measure():
    with pytest.raises(ShapeError, match="y: expected the 4 rows of x, got 3"):
        cka(X, Y[:3])
    with pytest.raises(ShapeError, match="x: expected 4 rows or more, got 3"):
        cka(X[:3], Y[:3], debiased=True)
    with pytest.raises(ShapeError, match=r"x: expected shape \(n, d\)"):
        cka(X[:0], Y[:0])
    with pytest.raises(NonFiniteError, match="y: non-finite value NaN"):
        cka(X, Y * np.nan)
    with pytest.raises(DTypeError, match="x: expected an array of numbers"):
        cka([["a"]], Y)
    for constant in (np.ones((4, 2)), np.full((4, 20), 0.1)):
        with pytest.raises(DegenerateError, match="y: expected a representation that varies"):
            cka(X, constant)
    stream = LinearCKA()
    with pytest.raises(ShapeError, match="got 0"):
        stream.value()
    stream.update(X, Y)
    with pytest.raises(ShapeError, match="x: expected 2 features as in the first batch, got 1"):
        stream.update(X[:, :1], Y)
    assert stream.n == 4
    assert stream.value() == pytest.approx(0.746729, abs=5e-7)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_agree_with_scikit_learn(metric, k):
    from sklearn.neighbors import KNeighborsClassifier

    draw = np.random.default_rng(k)
    labels = draw.integers(0, 2, 300)  # two classes and odd k: no tied votes, which scikit-learn breaks otherwise
    bank = draw.standard_normal((300, 6)) + labels[:, None] * 0.7 + 4
    queries, truth = bank[200:], labels[200:]
    expected = KNeighborsClassifier(k, metric=metric).fit(bank[:200], labels[:200]).predict(queries)
    found = knn_transfer(
        bank[:200], labels[:200], torch.from_numpy(queries), torch.from_numpy(truth), k=k, metric=metric
    )
    assert (found.predictions == expected).all()
    assert found.accuracy == float(found) == (expected == truth).mean()
    assert found.per_class[1] == (expected == truth)[truth == 1].mean()


def test_leave_one_out_excludes_the_row_itself_and_not_its_duplicate():
    bank = np.array([[1.0, 0], [1, 0], [0, 1], [-1, 1]])
    found = knn_transfer(bank, np.array([0, 1, 2, 2]), k=1)
    assert found.predictions.tolist() == [1, 0, 2, 2]


def test_ties():
    bank = np.array([[0.0], [2], [5], [6], [7]])
    # Votes 1, 1, 1: the nearest neighbour decides. At 1 two rows are equally near: the lower index counts as nearer.
    assert knn_transfer(
        bank, [0, 1, 2, 2, 2], [[1.9], [1.0]], [1, 0], k=3, metric="euclidean"
    ).predictions.tolist() == [1, 0]
    assert knn_transfer(bank[:2], [4, 3], [[1.0]], [4], k=1, metric="euclidean").predictions.tolist() == [4]


def test_blocks_do_not_matter(monkeypatch):
    draw = np.random.default_rng(1)
    bank, labels = draw.standard_normal((50, 3)), draw.integers(0, 4, 50)
    whole = knn_transfer(bank, labels).predictions
    monkeypatch.setattr("abjure.measure.transfer._BLOCK_BYTES", 8 * 50 * 7)
    assert (knn_transfer(bank, labels).predictions == whole).all()


def test_knn_refuses_what_it_cannot_measure():
    bank, labels = np.eye(4), np.arange(4)
    with pytest.raises(ArgumentError, match="k: expected an odd number"):
        knn_transfer(bank, labels, k=2)
    with pytest.raises(ArgumentError, match="metric: expected"):
        knn_transfer(bank, labels, k=1, metric="dot")
    with pytest.raises(ShapeError, match="bank: expected 6 rows or more for k = 5, got 4"):
        knn_transfer(bank, labels)
    with pytest.raises(ShapeError, match="bank_labels: expected one label per row"):
        knn_transfer(bank, labels[:3], k=1)
    with pytest.raises(ArgumentError, match="bank_labels: expected labels of 0 or more, got -1 to 2"):
        knn_transfer(bank, labels - 1, k=1)
    with pytest.raises(DTypeError, match="bank_labels: expected integer labels, got float64"):
        knn_transfer(bank, labels / 2, k=1)
    with pytest.raises(ArgumentError, match="expected both or neither"):
        knn_transfer(bank, labels, bank, k=1)
    with pytest.raises(ShapeError, match="queries: expected 4 features"):
        knn_transfer(bank, labels, bank[:, :2], labels, k=1)
    with pytest.raises(DegenerateError, match="queries: expected rows with a direction, got 1 rows of zeros"):
        knn_transfer(bank, labels, np.zeros((1, 4)), [0], k=1)


def test_tug_of_war():
    unlearned = {"forget": 0.97, "retain": 0.55, "test": 0.90}
    assert tug_of_war(unlearned, {"test": 0.93, "forget": 0.99, "retain": 0.40}) == pytest.approx(0.80801, abs=1e-12)
    assert tug_of_war((0.2, 1, 0.9), (0.2, 1, 0.9)) == 1
    assert tug_of_war((1, 1, 1), (0, 1, 1)) == 0
    with pytest.raises(ArgumentError, match=r"unlearned: expected accuracies in .*got 97.0 for forget"):
        tug_of_war((97, 0.5, 0.5), (0, 1, 1))
    with pytest.raises(ArgumentError, match="retrained: expected the keys forget, retain, test, got forget, kept"):
        tug_of_war(unlearned, {"forget": 1, "kept": 1})
    with pytest.raises(ArgumentError, match=r"expected three accuracies .* got 2"):
        tug_of_war((0.1, 0.2), (0, 1, 1))
    with pytest.raises(ArgumentError, match="got nan for retain"):
        tug_of_war((0.1, float("nan"), 0.2), (0, 1, 1))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_products_in_the_arithmetic_of_the_data(dtype):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((1300, 40)) @ np.diag(np.linspace(0.1, 3, 40)) + 2
    y = x[:, :30] + draw.standard_normal((1300, 30))
    x, y = x.astype(dtype), y.astype(dtype)
    for debiased in (False, True):
        want = plain_cka(x.astype(float), y.astype(float), debiased)
        tolerance = 1e-12 if dtype == "float64" else 2e-6
        assert cka(x, y, debiased) == pytest.approx(want, abs=tolerance)
        assert cka(torch.from_numpy(x), torch.from_numpy(y), debiased) == pytest.approx(want, abs=tolerance)
    if dtype == "float32":
        # Scales that no f32 product survives.
        assert cka(x * np.float32(1e30), y * np.float32(1e-30)) == pytest.approx(cka(x, y), abs=1e-6)


def test_layouts_and_mapped_files(tmp_path):
    draw = np.random.default_rng(1)
    x, y = draw.standard_normal((200, 12)).astype(np.float32), draw.standard_normal((200, 9)).astype(np.float32)
    want = cka(x, y)
    assert cka(np.asfortranarray(x), y) == want
    assert cka(np.repeat(x, 2, axis=1)[:, ::2], y[::-1][::-1]) == want
    assert cka(x.reshape(200, 3, 4), y) == want
    for start in (0, 120):
        for name, a in (("x", x), ("y", y)):
            np.save(tmp_path / f"{name}{start}.npy", a[start : start + 120])
    shards = [(tmp_path / f"x{s}.npy", str(tmp_path / f"y{s}.npy")) for s in (0, 120)]
    for debiased in (False, True):
        assert cka_shards(shards, debiased) == pytest.approx(cka(x, y, debiased), abs=1e-6)
    with pytest.raises(DegenerateError, match="shards"):
        cka_shards([])


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("sigma", [2.0, (1.5, 3.0), None])
def test_rbf_agrees_with_the_plain_form(debiased, sigma):
    draw = np.random.default_rng(2)
    x = draw.standard_normal((300, 5))
    y = np.concatenate([x[:, :2] ** 2, draw.standard_normal((300, 1))], axis=1)

    def gram(a, width):
        squares = ((a[:, None] - a) ** 2).sum(axis=2)
        if width is None:
            width = np.median(np.sqrt(squares[np.triu_indices(300, 1)]))
        return np.exp(-squares / (2 * width**2))

    widths = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    k, el = gram(x, widths[0]), gram(y, widths[1])
    roots = [np.linalg.cholesky(m + 1e-12 * np.eye(300)) for m in (k, el)]
    want = plain_cka(*roots, debiased)
    assert cka(x, y, debiased, kernel="rbf", sigma=sigma) == pytest.approx(want, abs=1e-9)
    single = cka(x.astype(np.float32), y.astype(np.float32), debiased, kernel="rbf", sigma=sigma)
    assert single == pytest.approx(want, abs=1e-5)


def test_rbf_sees_what_is_not_linear():
    draw = np.random.default_rng(3)
    x = draw.standard_normal((600, 1))
    y = x**2
    assert abs(cka(x, y, debiased=True)) < 0.1
    assert cka(x, y, debiased=True, kernel="rbf", fraction=0.5) > 0.3
    assert abs(cka(x, draw.standard_normal((600, 1)), debiased=True, kernel="rbf")) < 0.03


def test_rbf_refusals():
    for sigma in (0, -1.0, np.nan, (1.0, np.inf)):
        with pytest.raises(ArgumentError, match="sigma"):
            cka(X, Y, kernel="rbf", sigma=sigma)
    with pytest.raises(ArgumentError, match="sigma: expected one width or two"):
        cka(X, Y, kernel="rbf", sigma=(1.0, 2.0, 3.0))
    with pytest.raises(ArgumentError, match="kernel"):
        cka(X, Y, kernel="cosine")
    with pytest.raises(ArgumentError, match="fraction"):
        cka(X, Y, kernel="rbf", fraction=0)
    with pytest.raises(DegenerateError, match="median distance"):
        cka(np.array([[0.1], [0.1], [0.1], [0.1], [1]]), np.arange(5.0)[:, None], kernel="rbf")
    with pytest.raises(ShapeError, match="4 rows"):
        cka(X[:3], Y[:3], debiased=True, kernel="rbf")


def test_svcca_and_procrustes():
    draw = np.random.default_rng(4)
    x = draw.standard_normal((400, 6)) * [5, 4, 3, 2, 1, 0.01]
    y = draw.standard_normal((400, 8)) + np.pad(x, ((0, 0), (0, 2)))
    rotation = np.linalg.qr(draw.standard_normal((6, 6)))[0]
    for measure in (svcca, procrustes):
        assert measure(x, 3 * x @ rotation + 7) == pytest.approx(1, abs=1e-9)
        assert measure(x, y) == pytest.approx(measure(y, x), abs=1e-12)
        assert 0 < measure(x, y) < 1
    # By singular value decompositions of the rows themselves.
    parts = []
    for rows in (x, y):
        u, s, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
        parts.append(u[:, : np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.99) + 1])
    assert svcca(x, y) == pytest.approx(np.linalg.svd(parts[0].T @ parts[1], compute_uv=False).mean(), abs=1e-9)
    unit = [(a - a.mean(axis=0)) / np.linalg.norm(a - a.mean(axis=0)) for a in (x, y)]
    assert procrustes(x, y) == pytest.approx(np.linalg.norm(unit[0].T @ unit[1], "nuc"), abs=1e-12)
    stream = LinearCKA()
    for start in range(0, 400, 90):
        stream.update(x[start : start + 90], y[start : start + 90])
    assert svcca(stream) == pytest.approx(svcca(x, y), abs=1e-9)
    assert procrustes(stream) == pytest.approx(procrustes(x, y), abs=1e-9)
    assert svcca(x, y, variance=1.0) < svcca(x, x, variance=1.0) + 1e-9
    with pytest.raises(ArgumentError, match="variance"):
        svcca(x, y, variance=0)
    with pytest.raises(DegenerateError, match="x: expected a representation that varies"):
        procrustes(np.ones((5, 2)), x[:5])
    with pytest.raises(ArgumentError, match="y: "):
        svcca(x)


def test_threads_change_nothing():
    import abjure

    draw = np.random.default_rng(5)
    x, y = (draw.standard_normal((900, d)).astype(np.float32) for d in (150, 90))
    before, found = abjure.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            abjure.set_num_threads(threads)
            found.append((cka(x, y, True), cka(x, y, True, kernel="rbf")))
    finally:
        abjure.set_num_threads(before)
    assert found[0] == found[1] == found[2]
