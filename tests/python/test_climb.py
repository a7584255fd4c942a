"""The ascent in feature spaces, over files, for some of the rows, with momentum, stopped early and continued."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import abjure
from abjure.protect import FeatureMap, bayes_error, maximize_bayes_error
from abjure.protect.ascent import _ascent_bandwidth
from abjure.protect.bayes import prepare

torch = pytest.importorskip("torch")
QUICK = {"certificate_subsamples": 0, "certificate_draws": 64}


def images(n=120, d=16, classes=3, dtype=np.float32):
    rng = np.random.default_rng(0)
    y = np.arange(n) % classes
    centres = rng.uniform(0.2, 0.8, size=(classes, d))
    return np.clip(centres[y] + rng.normal(size=(n, d)) * 0.1, 0, 1).astype(dtype), y


def same(rows):
    return rows * 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("per", ["class", "sample", "both"])
@pytest.mark.parametrize("against", ["clean", "published"])
@pytest.mark.parametrize("batch", [None, (60, 70)])
def test_it_takes_the_steps_of_the_compiled_ascent(against, per, norm, batch):
    x, y = images(dtype=np.float64)
    options = {
        "epsilon": 0.1 if norm == "linf" else 0.3,
        "norm": norm,
        "per": per,
        "against": against,
        "steps": 12,
        "bandwidth": [0.3, 0.5],
        "batch": batch,
        "jitter": 0.0,
        **QUICK,
    }
    compiled = maximize_bayes_error(x, y, **options)
    climbed = maximize_bayes_error(x, y, patience=1000, **options)
    np.testing.assert_allclose(climbed.trace.steps, compiled.trace.steps, rtol=1e-9)
    assert np.array_equal(np.unique(climbed.trace.checks[:, 0]), np.unique(compiled.trace.checks[:, 0]))
    assert climbed.trace.best == compiled.trace.best
    np.testing.assert_allclose(climbed.x, compiled.x, atol=1e-9)
    # A map that is none, through torch and back.
    mapped = maximize_bayes_error(x, y, features=same, **options)
    np.testing.assert_allclose(mapped.x, compiled.x, atol=1e-9)


@pytest.mark.parametrize("per", ["class", "sample"])
def test_one_step_through_a_map_is_the_sign_of_autograd(per):
    x, y = images(dtype=np.float64)
    x = 0.25 + x / 2
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Dropout(), torch.nn.Linear(8, 5)
    ).double()
    net.train()
    got = maximize_bayes_error(
        x.reshape(-1, 4, 4),
        y,
        features=FeatureMap(net, bandwidth=0.4, batch=50),
        per=per,
        epsilon=0.05,
        step_size=0.01,
        steps=1,
        **QUICK,
    )
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    net.eval()
    z = torch.tensor(x, requires_grad=True)
    value = _soft(net(torch.tensor(x)).detach(), net(z), torch.tensor(y), 0.4)
    (expected,) = torch.autograd.grad(value, z)
    if per == "class":
        sums = torch.stack([expected[y == c].sum(0) for c in range(3)])
        expected = sums[torch.tensor(y)]
    np.testing.assert_allclose(got.delta.reshape(-1, 16), 0.01 * np.sign(expected.numpy()), atol=1e-12)
    assert got.trace.steps[0] == pytest.approx(value.item(), rel=1e-9)
    assert got.certificate.space == "features"


def _soft(queries, centres, y, h):
    """The clean reading in plain torch: own centre left out, priors the shares of the labels, counts as they are."""
    squared = ((queries[:, None] - centres[None]) ** 2).sum(-1)
    weight = torch.exp(-squared / (2 * h * h)) * (1 - torch.eye(len(y), dtype=queries.dtype))
    own = (weight * (y[:, None] == y[None])).sum(1)
    return (1 - own / weight.sum(1)).mean()


def test_ensembles_are_weighted_means():
    x, y = images(dtype=np.float64)
    maps = [FeatureMap(None, 0.3, weight=3.0), FeatureMap(lambda t: 2 * t.flatten(1)[:, :8], [0.5, 0.9])]
    got = maximize_bayes_error(x, y, features=maps, epsilon=0.05, steps=1, **QUICK)
    first = bayes_error(x, y, queries=x, bandwidth=0.3, objective="soft").value
    second = bayes_error(2 * x[:, :8], y, queries=2 * x[:, :8], bandwidth=[0.5, 0.9], objective="soft").value
    assert got.trace.steps[0] == pytest.approx(0.75 * first + 0.25 * second, rel=1e-9)
    assert got.certificate.space == "input"
    assert got.bandwidth == (0.3,)
    longer = maximize_bayes_error(x, y, features=maps, epsilon=0.1, steps=10, **QUICK)
    assert longer.trace.checks[:, 1].max() > 1.1 * got.trace.steps[0]


def test_a_frozen_encoder_and_bytes():
    x, y = images()
    pixels = np.rint(x * 255).astype(np.uint8).reshape(-1, 1, 4, 4)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3), torch.nn.ReLU(), torch.nn.Flatten())
    got = maximize_bayes_error(pixels, y, features=net, epsilon=16 / 255, steps=8, **QUICK)
    assert got.x.dtype == np.uint8
    assert got.certificate.largest_levels <= 16
    assert got.trace.checks[:, 1].max() > got.trace.checks[0, 1]
    tensor = maximize_bayes_error(torch.from_numpy(pixels), y, features=net, epsilon=16 / 255, steps=8, **QUICK)
    assert np.array_equal(tensor.x.numpy(), got.x)


@pytest.mark.parametrize("per", ["class", "sample", "both"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_rows_that_are_not_protected_stay_bit_for_bit(per, dtype):
    x, y = images()
    x = (x * 255).astype(dtype) if dtype == "uint8" else x.astype(dtype)
    mask = np.arange(len(x)) % 3 == np.arange(len(x)) // 40
    got = maximize_bayes_error(x, y, protect=mask, per=per, epsilon=0.1, steps=8, bandwidth=0.3, seed=1, **QUICK)
    assert np.array_equal(got.x[~mask], x[~mask])
    assert (got.x[mask] != x[mask]).any(axis=1).all()
    assert (got.certificate.protected_rows, got.certificate.total_rows) == (mask.sum(), len(x))
    assert "rows that may have changed" in str(got.certificate)
    rows = maximize_bayes_error(
        x, y, protect=np.flatnonzero(mask), per=per, epsilon=0.1, steps=8, bandwidth=0.3, seed=1, **QUICK
    )
    assert np.array_equal(rows.x, got.x)
    assert got.trace.checks[:, 1].max() > got.trace.checks[0, 1]


def test_a_shared_step_is_that_of_the_protected_rows_gradient():
    x, y = images(dtype=np.float64)
    x = 0.25 + x / 2
    mask = np.arange(len(x)) % 2 == 0
    got = maximize_bayes_error(x, y, protect=mask, epsilon=0.05, step_size=0.01, steps=1, bandwidth=0.3, **QUICK)
    start = abjure.protect.bayes_error_gradient(x, y, queries=x, bandwidth=0.3, objective="soft").centres
    for c in range(3):
        expected = np.sign(start[(y == c) & mask].sum(0)) * 0.01
        np.testing.assert_allclose(got.delta[(y == c) & mask], np.tile(expected, (20, 1)), atol=1e-15)


def test_momentum_is_the_formula():
    """Dong et al. 2018, eq. 6, two steps by hand."""
    x, y = images(dtype=np.float64)
    x = 0.25 + x / 2
    options = {"bandwidth": 0.3, "objective": "soft"}
    velocity, z = np.zeros_like(x), x
    for _ in range(2):
        g = abjure.protect.bayes_error_gradient(z, y, queries=x, **options).centres
        velocity = 0.9 * velocity + g / np.abs(g).sum(1, keepdims=True)
        z = z + 0.01 * np.sign(velocity)
    got = maximize_bayes_error(
        x, y, per="sample", momentum=0.9, epsilon=0.05, step_size=0.01, steps=2, bandwidth=0.3, **QUICK
    )
    assert got.trace.best == 2
    np.testing.assert_allclose(got.x, z, atol=1e-12)


@pytest.mark.parametrize("per", ["class", "both"])
def test_it_stops_where_nothing_is_gained(per):
    x, y = images()
    got = maximize_bayes_error(
        x, y, epsilon=0.02, steps=200, step_size=0.02, bandwidth=0.3, patience=3, per=per, **QUICK
    )
    assert len(got.trace.steps) < 100
    tail = got.trace.checks[-4:, 1]
    assert tail[1:].max() <= tail[0] * (1 + 2e-3)


@pytest.mark.parametrize("per", ["class", "sample", "both"])
@pytest.mark.parametrize("to_file", [False, True])
def test_a_broken_run_goes_on_to_the_same_bits(per, to_file, tmp_path):
    x, y = images(300)
    options = {"epsilon": 0.1, "steps": 20, "bandwidth": 0.3, "batch": (60, 90), "per": per, "momentum": 0.5, **QUICK}
    out = {"out": tmp_path / "out.npy"} if to_file else {}
    whole = maximize_bayes_error(x, y, **options, **out)
    expected = np.array(whole.x)
    path = tmp_path / "run.ckpt"

    def stop(done):
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        maximize_bayes_error(x, y, checkpoint=path, progress=stop, **options, **out)
    assert path.exists()
    seen = []
    again = maximize_bayes_error(x, y, checkpoint=path, progress=seen.append, **options, **out)
    assert seen[0] == 13  # of the twelfth step's state
    assert np.array_equal(again.x, expected)
    assert again.trace.steps.tolist() == whole.trace.steps.tolist()
    # Of a run that is done, nothing is left to do.
    seen.clear()
    assert np.array_equal(
        maximize_bayes_error(x, y, checkpoint=path, progress=seen.append, **options, **out).x, expected
    )
    assert seen == [20]
    with pytest.raises(abjure.ArgumentError, match=r"checkpoint: .* is of another run"):
        maximize_bayes_error(x, y, checkpoint=path, **{**options, "epsilon": 0.2}, **out)
    with pytest.raises(abjure.ArgumentError, match=r"checkpoint: .* is of another run"):
        maximize_bayes_error(x + 0 * x.clip(0.1), 1 - np.minimum(y, 1), checkpoint=path, **options, **out)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(abjure.ArgumentError, match="is not a saved ascent"):
        maximize_bayes_error(x, y, checkpoint=path, **options, **out)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["out.npy", "run.ckpt"] if to_file else ["run.ckpt"])


# --- files


@pytest.mark.parametrize("per", ["class", "sample", "both"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_files_give_what_memory_gives(per, dtype, tmp_path):
    from safetensors.numpy import save_file

    x, y = images(200)
    x = ((x * 255) if dtype == "uint8" else x).astype(dtype).reshape(-1, 4, 4)
    options = {"epsilon": 0.1, "steps": 10, "bandwidth": 0.3, "batch": (60, 90), "per": per, **QUICK}
    expected = maximize_bayes_error(x, y, patience=100, **options)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    save_file({"images": x, "labels": y.astype(np.uint8)}, tmp_path / "x.safetensors")
    out = tmp_path / "out.npy"
    target = np.zeros_like(x)
    for source, more in (
        (tmp_path / "x.npy", {"y": tmp_path / "y.npy"}),
        (str(tmp_path / "x.safetensors"), {"y": y, "key": "images"}),
        (np.load(tmp_path / "x.npy", mmap_mode="r"), {"y": y}),
        (iter([x[:70], x[70:]]), {"y": y}),
        (((x[i : i + 64], y[i : i + 64]) for i in range(0, 200, 64)), {}),
        (x, {"y": y, "out": target}),
    ):
        got = maximize_bayes_error(source, **{"out": out, **more}, **options)
        assert np.array_equal(got.x, expected.x)
        assert got.x.dtype == x.dtype
        if "out" not in more:
            assert isinstance(got.x, np.memmap)
            assert got.certificate.verify(out, x)
    assert np.array_equal(target, expected.x)
    assert got.certificate.clean_sha256 == expected.certificate.clean_sha256
    got = maximize_bayes_error(iter([x]), y, out=out, **options)
    with pytest.raises(abjure.ArgumentError, match="came in chunks"):
        _ = got.delta
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npy", "x.npy", "x.safetensors", "y.npy"]


def test_bandwidths_of_a_draw_are_near_those_of_all():
    x, y = images(3000)
    whole = _ascent_bandwidth(prepare(x, y), None, "clean")
    part = _ascent_bandwidth(prepare(x[:1000], y[:1000]), None, "clean", 1 / 3)
    assert part[0] == pytest.approx(whole[0], rel=0.03)


PROGRAM = """
import re, sys
import numpy as np
from abjure.protect import maximize_bayes_error

def peak():
    # Private memory alone: pages of mapped files are the system's to give back.
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024

folder, per = sys.argv[1:]
most = 0.0

def watch(done):
    global most
    most = max(most, peak())

small = np.random.default_rng(0).random((400, 784), dtype=np.float32)
options = dict(per=per, epsilon=0.05, bandwidth=3.0)
options |= dict(certificate_rows=256, certificate_subsamples=0, certificate_draws=64)
maximize_bayes_error(small, np.arange(400) % 2, steps=2, batch=(200, 300), out=folder + "/small.npy", **options)
before = peak()
maximize_bayes_error(folder + "/x.npy", folder + "/y.npy", steps=6, batch=(200, 300), out=folder + "/out.npy",
                     progress=watch, **options)
print(max(most, peak()) - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's account of memory")
@pytest.mark.parametrize("per", ["class", "sample"])
def test_private_memory_is_bounded_by_the_batches(per, tmp_path):
    """38 MB of data: what is held is batches, of 1 MB here, and pieces of 8 MiB with their f64 forms."""
    n, width = 12_000, 784
    x = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(n, width))
    noise = np.random.default_rng(0).random((1000, width), dtype=np.float32)
    for start in range(0, n, 1000):
        x[start : start + 1000] = noise
    del x
    np.save(tmp_path / "y.npy", np.arange(n) % 2)
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), per], capture_output=True, text=True, check=True, timeout=250
    )
    assert float(found.stdout.split()[-1]) < 34, found.stdout


# --- bad input

X, Y = images(30)


class _Wrong(torch.nn.Module):
    def forward(self, rows):
        return rows.flatten(1)[:-1]


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (abjure.ShapeError, "features: expected 30 rows", {"features": _Wrong()}),
        (abjure.ShapeError, "features: expected 30 rows", {"features": lambda t: t.sum(1)}),
        (abjure.NonFiniteError, "features: non-finite value for row 0", {"features": lambda t: t / 0}),
        (
            abjure.NonFiniteError,
            "non-finite vector-Jacobian product",
            {"features": lambda t: (t - t.detach()).sqrt() + t},
        ),
        (abjure.ArgumentError, "that torch can differentiate", {"features": lambda t: t.detach() * 2}),
        (abjure.ArgumentError, "expected a floating-point tensor", {"features": lambda t: t.numpy()}),
        (abjure.ArgumentError, "features: expected a callable", {"features": "resnet18"}),
        (abjure.ArgumentError, "features: expected at least one", {"features": []}),
        (abjure.ArgumentError, "protect: expected at least one row", {"protect": np.zeros(30, dtype=bool)}),
        (abjure.ShapeError, "protect: expected a mask of shape", {"protect": np.ones(29, dtype=bool)}),
        (abjure.ArgumentError, "protect: expected rows from 0 to 29", {"protect": [1, 30]}),
        (abjure.ArgumentError, "momentum: expected", {"momentum": 1.0}),
        (abjure.ArgumentError, "patience: expected", {"patience": 0}),
        (abjure.ArgumentError, "tolerance: expected", {"tolerance": -1.0}),
        (abjure.ArgumentError, "certificate_draws: expected", {"certificate_draws": 1}),
        (abjure.ArgumentError, "certificate_subsamples: expected", {"certificate_subsamples": 1}),
        (abjure.ArgumentError, r"out: expected a \.npy file", {"out": "published.csv"}),
        (abjure.ArgumentError, r"out: expected a \.npy file or a NumPy array", {"out": 3}),
        (abjure.ShapeError, "out: expected shape", {"out": np.zeros((3, 16), np.float32)}),
        (abjure.DTypeError, "out: expected dtype float32", {"out": np.zeros((30, 16))}),
        (abjure.ArgumentError, r"out: .* cannot be written", {"out": "/nonexistent/out.npy"}),
        (abjure.ArgumentError, "expected values in the box", {"box": (0.4, 0.6), "patience": 3}),
    ],
)
def test_bad_options(error, match, options):
    before = X.copy()
    with pytest.raises(error, match=match):
        maximize_bayes_error(X, Y, **{"bandwidth": 0.3, "epsilon": 0.1, "steps": 3, **QUICK, **options})
    assert np.array_equal(X, before)


@pytest.mark.parametrize(
    ("arguments", "match"), [({"weight": -1.0}, "positive weight"), ({"batch": 0}, "positive batch")]
)
def test_bad_maps_are_refused(arguments, match):
    with pytest.raises(abjure.ArgumentError, match=match):
        FeatureMap(same, **arguments)


def test_bad_files(tmp_path):
    out = tmp_path / "out.npy"
    options = {"epsilon": 0.1, "steps": 3, "bandwidth": 0.3, "out": out, **QUICK}
    np.save(tmp_path / "x.npy", X)
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(whole[:-100])
    (tmp_path / "short.safetensors").write_bytes(b"\xff" * 40)
    broken = X.copy()
    broken[2, 3] = np.nan
    for source, error, match in (
        (tmp_path / "none.npy", abjure.ArgumentError, "x: expected a readable file"),
        (tmp_path / "short.npy", abjure.ArgumentError, "is no complete"),
        (tmp_path / "short.safetensors", abjure.ArgumentError, "is no safetensors file"),
        (tmp_path, abjure.ArgumentError, "x: expected a readable file"),
        (iter([]), abjure.ShapeError, "at least one chunk"),
        (iter([X, X[:, 1:]]), abjure.ShapeError, "for chunk 1"),
        (iter([X, X.astype(np.float64)]), abjure.DTypeError, "for chunk 1"),
        (iter([(X, Y), X]), abjure.ShapeError, "for chunk 1"),
        (iter([broken]), abjure.NonFiniteError, "flat index 35"),
    ):
        with pytest.raises(error, match=match):
            maximize_bayes_error(source, Y, **options)
    with pytest.raises(abjure.DegenerateError, match="two classes"):
        maximize_bayes_error(tmp_path / "x.npy", Y * 0, **options)
    with pytest.raises(abjure.ArgumentError, match="another file than x"):
        maximize_bayes_error(tmp_path / "x.npy", Y, **{**options, "out": tmp_path / "x.npy"})
    with pytest.raises(abjure.ArgumentError, match="y: expected labels"):
        maximize_bayes_error(iter([X]), **options)
    with pytest.raises(abjure.DTypeError, match="x: expected an array, or with out="):
        maximize_bayes_error(tmp_path / "x.npy", Y, epsilon=0.1)
    assert not out.exists()
    assert (tmp_path / "x.npy").read_bytes() == whole


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no room is set aside there")
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    options = {"epsilon": 0.1, "steps": 3, "bandwidth": 0.3, "per": "sample", **QUICK}
    out = tmp_path / "out.npy"
    out.write_bytes(b"what stood there")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(abjure.ArgumentError, match=r"no room .*No space left"):
        maximize_bayes_error(X, Y, out=out, **options)
    monkeypatch.undo()
    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(abjure.ArgumentError, match="No space left"):
        maximize_bayes_error(X, Y, out=out, **options)
    assert out.read_bytes() == b"what stood there"
    assert [p.name for p in tmp_path.iterdir()] == ["out.npy"]


@pytest.mark.effect
def test_a_feature_map_protects_digits_as_pixels_do():
    """A frozen random convolution as the space of the ascent: fresh models fail on clean digits all the same."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8, 8)), torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten()
    )
    got = maximize_bayes_error(
        x[:1200], y[:1200], features=[None, net], epsilon=64 / 255, steps=20, batch=(300, 400), **QUICK
    )
    model = LogisticRegression(max_iter=1000)
    assert model.fit(x[:1200], y[:1200]).score(x[1200:], y[1200:]) > 0.95
    assert model.fit(got.x, y[:1200]).score(x[1200:], y[1200:]) < 0.35
    assert got.certificate.holds
