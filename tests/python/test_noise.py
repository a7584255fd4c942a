"""The noise that others protect data with: budgets in what is stored, recipes against plain NumPy, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest

import abjure
from abjure.errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.protect import noise

torch = pytest.importorskip("torch")

CLASSES = 4
ONE_PASS = {
    "class_mean_shift": lambda x, y, **k: noise.class_mean_shift(x, y, **({"epsilon": 16 / 255} | k)),
    "linearly_separable": lambda x, y, **k: noise.linearly_separable(x, y, **({"patch": 3} | k)),
    "autoregressive": lambda x, y, **k: noise.autoregressive(x, y, **({"crop": 2, "filters": FILTERS} | k)),
    "convolutional": noise.convolutional,
    "one_pixel": noise.one_pixel,
}
FILTERS = np.random.default_rng(0).uniform(-0.2, 0.3, (CLASSES, 3, 8)).astype(np.float32)


def pictures(n=60, shape=(3, 10, 7), seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, n)
    y[:CLASSES] = np.arange(CLASSES)
    base = rng.uniform(0, 255, (CLASSES, *shape))
    x = np.clip(0.5 * base[y] + 0.5 * rng.uniform(0, 255, (n, *shape)), 0, 255)
    return np.rint(x).astype(np.uint8), y * 3 - 1


@pytest.mark.parametrize("method", ONE_PASS)
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64", "torch"])
def test_budget_holds_in_what_is_stored(method, dtype):
    u, y = pictures()
    x = u if dtype == "uint8" else torch.from_numpy(u) if dtype == "torch" else (u / 255).astype(dtype)
    before = x.clone() if dtype == "torch" else x.copy()
    got = ONE_PASS[method](x, y)
    assert type(got.x) is type(x)
    assert got.x.dtype == x.dtype
    assert tuple(got.x.shape) == x.shape
    assert bool((x == before).all())
    stored, clean = (np.asarray(a, dtype=np.float64).reshape(len(y), -1) for a in (got.x, x))
    scale = 1.0 if dtype.startswith("float") else 255.0
    change = (stored - clean) / scale
    size = {
        "linf": lambda: np.abs(change).max(),
        "l2": lambda: np.sqrt((change**2).sum(1)).max(),
        "l0": lambda: (change.reshape(-1, 3, 70) != 0).any(1).sum(1).max(),
        "none": lambda: 0.0,
    }[got.norm]()
    assert 0 <= size <= got.epsilon
    assert got.budget.holds
    if got.norm in ("linf", "l2"):
        assert size == pytest.approx(got.budget.largest_change, rel=1e-6)
        assert size > 0.8 * got.epsilon
    assert stored.min() >= 0
    assert stored.max() <= scale
    assert np.array_equal(
        np.asarray(got.delta).reshape(len(y), -1),
        (stored - clean).astype(got.delta.numpy().dtype if dtype == "torch" else got.delta.dtype),
    )


@pytest.mark.parametrize("method", ONE_PASS)
def test_same_bits_for_all_threads_and_layouts_and_out(method):
    u, y = pictures(n=700)
    x = (u / 255).astype(np.float32)
    threads = abjure.get_num_threads()
    found = []
    for count in (1, 3):
        abjure.set_num_threads(count)
        found.append(ONE_PASS[method](x, y).x)
    abjure.set_num_threads(threads)
    assert np.array_equal(*found)
    out = np.full_like(x, 9)
    assert ONE_PASS[method](x, y, out=out).x is out
    assert np.array_equal(out, found[0])
    last = np.ascontiguousarray(np.moveaxis(x, 1, 3))
    assert np.array_equal(np.moveaxis(ONE_PASS[method](last, y).x, 3, 1), found[0])
    if method in ("linearly_separable", "autoregressive", "convolutional"):
        assert not np.array_equal(ONE_PASS[method](x, y, seed=1).x, found[0])


def test_class_mean_shift_is_the_sign_of_the_difference_of_means():
    u, y = pictures(shape=(6, 5))
    x = u / 255
    got = noise.class_mean_shift(x, y, epsilon=0.05)
    classes = np.unique(y)
    means = np.stack([x[y == c].mean(0) for c in classes])
    shift = 0.05 * np.sign(np.roll(means, -1, 0) - means)
    np.testing.assert_allclose(got.x, np.clip(x + shift[np.searchsorted(classes, y)], 0, 1), atol=1e-9)
    flat = noise.class_mean_shift(x, y, epsilon=0.3, norm="l2")
    assert np.sqrt((flat.delta**2).sum((1, 2))).max() <= 0.3


def test_linearly_separable_noise_is_separable():
    u, y = pictures(n=200, shape=(32, 32))
    x = (u / 255 * 0.5 + 0.25).astype(np.float32)
    got = noise.linearly_separable(x, y, patch=8)
    assert got.epsilon == pytest.approx(6 / 255 * 32)
    delta = got.delta.reshape(200, -1)
    assert np.sqrt((delta**2).sum(1)) == pytest.approx(got.epsilon, rel=1e-4)
    # A linear rule made from half of the noise, the nearest mean, tells the other half's classes.
    classes = np.unique(y)
    means = np.stack([delta[:100][y[:100] == c].mean(0) for c in classes])
    scores = delta[100:] @ means.T - 0.5 * (means**2).sum(1)
    assert (classes[scores.argmax(1)] == y[100:]).all()
    signs = noise.linearly_separable(x, y, patch=8, epsilon=8 / 255, norm="linf").delta
    assert np.abs(signs) == pytest.approx(8 / 255, rel=1e-4)


def test_the_filter_of_a_class_leaves_nothing_of_its_noise():
    x, y = np.full((12, 3, 16, 16), 0.5), np.arange(12) % 2
    filters = noise.autoregressive_filters(2, size=(16, 16), seed=3)
    assert filters.shape == (2, 3, 8)
    np.testing.assert_allclose(filters.sum(2), 1, atol=1e-4)
    delta = noise.autoregressive(x, y, filters=filters).delta
    assert np.sqrt((delta**2).sum((1, 2, 3))) == pytest.approx(1.0, rel=1e-4)
    window = np.lib.stride_tricks.sliding_window_view(delta, (3, 3), axis=(2, 3))
    for c in range(2):
        kernel = np.concatenate([filters[c], -np.ones((3, 1))], 1).reshape(3, 3, 3)
        answer = np.abs(np.einsum("nchwij,cij->nchw", window, kernel)).max((1, 2, 3))
        assert (answer[y == c] < 1e-5).all()
        assert (answer[y != c] > 1e-2).all()


def test_convolution_of_bytes():
    u, y = pictures(n=9, shape=(3, 3))
    got = noise.convolutional(u, y, seed=4)
    rng = np.random.default_rng(4)
    kernels = rng.uniform(0, 0.3, (CLASSES, 9))
    kernels[np.arange(CLASSES), rng.integers(0, 9, CLASSES)] = 1.0
    padded = np.pad(u.astype(float), ((0, 0), (1, 1), (1, 1)))
    window = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    sums = np.einsum("nhwij,nij->nhw", window, kernels[np.searchsorted(np.unique(y), y)].reshape(-1, 3, 3))
    exact = sums / sums.max((1, 2), keepdims=True) * 255
    assert np.abs(got.x - exact).max() <= 0.5 + 1e-3
    assert not got.budget.epsilon < math.inf
    low = noise.convolutional(u, y, seed=4, rounding="truncate").x
    assert np.abs(low - (exact - 0.5)).max() <= 0.5 + 1e-3
    assert (low[low != got.x] == got.x[low != got.x] - 1).all()


def test_one_pixel_scores_of_the_reference():
    x = np.array([[[0.1, 0.9], [0.4, 0.5]], [[0.2, 0.7], [0.6, 0.5]], [[0.0, 0.8], [0.3, 0.6]]] * 2)
    y = np.repeat([0, 1], 3)
    got = noise.one_pixel(x, y)
    black = [1.224744871392, 9.797958971133, 3.474396144862, 11.313708498985]
    white = [11.022703842524, 2.449489742783, 4.543441112511, 9.899494936612]
    from abjure.protect.noise.onepass import _scores

    flat = x[:3].reshape(3, 4)
    scores = _scores(flat.sum(0)[:, None], (flat**2).sum(0)[:, None], 3, np.array([[0], [1]]), 0.0, 1.0)
    np.testing.assert_allclose(scores, np.stack([black, white], 1), rtol=1e-9)
    # The first class takes pixel (1, 1) in black, the second the next best pair.
    assert np.argwhere(got.x[0] != x[0]).tolist() == [[1, 1]]
    assert (got.x[:3, 1, 1] == 0).all()
    assert np.argwhere(got.x[3] != x[3]).tolist() == [[0, 0]]
    assert (got.x[3:, 0, 0] == 1).all()


def test_one_pixel_scores_by_brute_force():
    u, y = pictures(n=40, shape=(3, 4, 5))
    got = noise.one_pixel(u, y, sparsity=2)
    x, classes = u / 255, np.unique(y)
    taken = set()
    for c in classes:
        own = x[y == c]
        found = []
        for pixel in range(20):
            for corner in range(8):
                colour = np.array([corner >> k & 1 for k in range(3)])
                a = np.abs(colour - own[:, :, pixel // 5, pixel % 5])
                found.append((a.mean() / a.std(), pixel, corner))
        best = []
        for _, pixel, corner in sorted(found, key=lambda f: (-f[0], f[1], f[2])):
            if (pixel, corner) not in taken and pixel not in [b[0] for b in best] and len(best) < 2:
                best.append((pixel, corner))
        taken.update(best)
        for pixel, corner in best:
            colour = [255 * (corner >> k & 1) for k in range(3)]
            assert (got.x[y == c][:, :, pixel // 5, pixel % 5] == colour).all()


@pytest.mark.parametrize("per", ["sample", "class"])
@pytest.mark.usefixtures("one_thread")
def test_error_minimizing_noise_lowers_the_loss(per):
    u, y = pictures(n=48, shape=(1, 8, 8))
    kwargs = {"epsilon": 24 / 255, "per": per, "steps": 4, "max_rounds": 3, "stop_error": 0, "progress": False}
    with pytest.warns(UserWarning, match="above stop_error"):
        got = noise.error_minimizing(u, y, **kwargs)
    assert got.x.dtype == np.uint8
    assert np.abs(got.delta).max() == 24
    assert got.budget.holds
    assert len(got.trace) == 3
    if per == "class":
        for c in np.unique(y):
            # One perturbation for all, but for the box.
            inside = (u[y == c].min(0) > 24) & (u[y == c].max(0) < 231)
            assert (np.ptp(got.delta[y == c], axis=0)[inside] == 0).all()
    with pytest.warns(UserWarning, match="above stop_error"):
        again = noise.error_minimizing(torch.from_numpy(u), y, **kwargs)
    assert np.array_equal(again.x.numpy(), got.x)


@pytest.mark.usefixtures("one_thread")
def test_adversarial_poison_moves_the_surrogate_to_the_next_class():
    from abjure.protect import networks

    u, y = pictures(n=64, shape=(1, 8, 8))
    x = torch.from_numpy((u / 255).astype(np.float32))
    kept = []

    def factory(shape, classes):
        kept.append(networks.mlp(shape, classes))
        return kept[-1]

    got = noise.adversarial_poison(
        x, y, epsilon=0.2, steps=8, restarts=2, epochs=60, model=factory, augment=False, progress=False
    )
    codes = torch.from_numpy(np.searchsorted(np.unique(y), y))
    assert networks.accuracy(kept[0], x, codes) > 0.9
    assert networks.accuracy(kept[0], got.x, (codes + 1) % CLASSES) > 0.9
    assert got.budget.holds
    assert got.trace[-1] < 0.5 * got.trace[0]


def test_networks_crop_and_flip_keep_pixels():
    from abjure.protect import networks

    x = torch.arange(2 * 5 * 6.0).reshape(1, 2, 5, 6).repeat(400, 1, 1, 1)
    got = networks.crop_and_flip(x, torch.Generator().manual_seed(0), pad=1)
    same = (got == x).flatten(1).all(1)
    flipped = (got == x.flip(3)).flatten(1).all(1)
    assert same.any()
    assert flipped.any()
    # Every line is a line of the image, moved, mirrored or with its edge repeated.
    assert set(got.unique().tolist()) <= set(x.unique().tolist())


BAD = [
    ("labels", {"y": [0, 0, 0, 0]}, DegenerateError, "two classes"),
    ("labels short", {"y": [0, 1, 0]}, ShapeError, "one label per row"),
    ("nan", {"x": np.nan}, NonFiniteError, "flat index"),
    ("outside", {"x": 1.5}, ArgumentError, "box"),
    ("box", {"box": (1.0, 0.0)}, ArgumentError, "box"),
    ("channels", {"channels": "middle"}, ArgumentError, "channels"),
    ("words", {"x": "words"}, DTypeError, "x"),
]


@pytest.mark.parametrize("method", ["class_mean_shift", "linearly_separable", "autoregressive", "convolutional"])
@pytest.mark.parametrize(("what", "change", "error", "message"), BAD, ids=[b[0] for b in BAD])
def test_bad_input(method, what, change, error, message):
    x, y = np.full((4, 3, 6, 6), 0.5), [0, 1, 2, 3]
    x[:, :, 2, 2] = np.arange(4)[:, None] / 10
    change = dict(change)
    if isinstance(change.get("x"), float):
        x[2, 1, 3, 3] = change.pop("x")
    elif "x" in change:
        x = np.full((4, 3, 6, 6), "a")
        change.pop("x")
    y = change.pop("y", y)
    out = np.full((4, 3, 6, 6), 7.0)
    with pytest.raises(error, match=message):
        ONE_PASS[method](x, y, **change)
    if what in ("labels", "labels short", "box", "channels"):
        with pytest.raises(error, match=message):
            ONE_PASS[method](x, y, out=out, **change)
        assert (out == 7).all()


def test_bad_options():
    u, y = pictures()
    x = u / 255
    for call, message in [
        (lambda: noise.class_mean_shift(x, y, epsilon=-1), "epsilon"),
        (lambda: noise.class_mean_shift(u, y, epsilon=0.001), "at least one level"),
        (lambda: noise.class_mean_shift(x, y, norm="l1"), "norm"),
        (lambda: noise.linearly_separable(x, y, patch=0), "patch"),
        (lambda: noise.linearly_separable(np.zeros((4, 3, 64, 64)), [0, 1, 2, 3], patch=1), "features"),
        (lambda: noise.autoregressive(x, y, crop=1), "crop"),
        (lambda: noise.autoregressive(x, y, seed=-1), "seed"),
        (lambda: noise.convolutional(x, y, rounding="truncate"), "rounding"),
        (lambda: noise.convolutional(x, y, blur=2), "blur"),
        (lambda: noise.convolutional(x, y, box=(-1, 1)), "box"),
        (lambda: noise.one_pixel(x, y, sparsity=500), "sparsity"),
        (lambda: noise.error_minimizing(x, y, per="batch"), "per"),
        (lambda: noise.adversarial_poison(x, y, steps=0), "steps"),
        (lambda: noise.class_mean_shift(u, y, box=(0, 255)), "box"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()
    for call in (
        lambda: noise.class_mean_shift(np.zeros((4, 5, 6, 7)), [0, 1, 2, 3]),
        lambda: noise.autoregressive(np.zeros((4, 2)), [0, 1, 2, 3]),
        lambda: noise.autoregressive(x, y, filters=np.zeros((2, 3, 8))),
        lambda: noise.class_mean_shift(x, y, out=np.zeros((3, 3))),
    ):
        with pytest.raises(ShapeError):
            call()
    with pytest.raises(DegenerateError, match="one mean"):
        noise.class_mean_shift(np.full((4, 6), 0.5), [0, 1, 0, 1])
    with pytest.raises(DegenerateError, match="vanishes or diverges"):
        noise.autoregressive(x, y, filters=np.full((CLASSES, 3, 8), 1e9))
    with pytest.raises(DegenerateError, match="draws"):
        noise.autoregressive_filters(50, channels=1, size=(8, 8), draws=256)


def test_certificate_repr_and_plot():
    u, y = pictures(n=120, shape=(6, 6))
    got = noise.class_mean_shift(u, y, epsilon=40 / 255)
    certificate = got.certificate
    assert certificate is got.certificate
    assert certificate.holds
    assert certificate.largest_levels == 40
    assert certificate.clean_after.soft > certificate.clean_before.soft
    dots = noise.one_pixel(u, y).certificate
    assert (dots.norm, dots.epsilon, dots.largest_change, dots.holds) == ("l0", 1.0, 1.0, True)
    assert "class_mean_shift" in got._repr_html_()
    assert "0.1568" in got._repr_html_()
    pytest.importorskip("matplotlib")
    assert len(got.plot(3).axes) == 9
