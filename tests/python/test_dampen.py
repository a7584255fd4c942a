"""dampen_array_, dampen_ and selection_curve against NumPy and torch oracles, and what they refuse."""

import contextlib
import re
import signal
import threading

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import abjure
from abjure import _native
from abjure.forget import DampenPatch, Fisher, Selection, dampen_, dampen_array_, selection_curve
from abjure.forget.patch import held_interrupt
from abjure.integrations.torch import DEVICE_PATHS

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
TORCH = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
W = [1, -2, 0.5, 4, -0.25, 3]
I_F = np.array([0, 16, 3, 16, 1, 8]) / 4096
I_D = np.array([0, 1, 0, 2, 4, 0.5]) / 4096


def oracle(w, f, d, alpha, lam, exponent=1.0, max_factor=1.0, min_factor=0.0):
    """The published dense form in the importances' dtype; the product in the weights' arithmetic dtype."""
    kind = f.dtype.type
    with np.errstate(all="ignore"):
        selected = f > kind(alpha) * d
        r = d * kind(lam) / f
        if exponent != 1:
            r = r ** kind(exponent)
        r = np.maximum(np.minimum(r, kind(max_factor)), kind(min_factor))
    arithmetic = np.float64 if w.dtype == np.float64 else np.float32
    new = np.where(selected, w.astype(arithmetic) * np.where(selected, r, 0).astype(arithmetic), w).astype(w.dtype)
    changed = new != w
    return new, Selection(int(selected.sum()), int(changed.sum()), int((changed & (new == 0)).sum()))


@pytest.mark.parametrize("importance", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("alpha", "lam", "after", "changed"),
    [
        (8, 1, [1, -0.125, 0, 4, -0.25, 0.1875], 3),
        (8, 4, [1, -0.5, 0, 4, -0.25, 0.75], 3),
        (8, 16, [1, -2, 0, 4, -0.25, 3], 1),
        (10, 1, [1, -0.125, 0, 4, -0.25, 0.1875], 3),
    ],
)
def test_vectors_of_the_reference(dtype, importance, alpha, lam, after, changed):
    w = np.array(W, dtype=dtype)
    found = dampen_array_(w, I_F.astype(importance), I_D.astype(importance), alpha, lam)
    assert found == (3, changed, 1)
    assert w.astype(np.float64).tolist() == after


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_the_dense_form(data):
    """Every dtype, shape, layout and thread count."""
    dtype = data.draw(st.sampled_from(DTYPES))
    importance = data.draw(st.sampled_from([np.float32, np.float64]))
    shape = tuple(data.draw(st.lists(st.integers(0, 40), min_size=0, max_size=3)))
    alpha = data.draw(st.sampled_from([0.0, 1.0, 10.0]))
    lam = data.draw(st.sampled_from([0.0, 1.0, 3.0, 40.0]))
    limits = data.draw(st.sampled_from([(1.0, 0.0), (2.0, 0.25)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    w = rng.normal(size=shape).astype(dtype)
    # Multiples of 1/8 make ties and zeros common.
    f, d = (np.asarray(rng.integers(0, 40, shape) / 8, dtype=importance) for _ in range(2))
    expected, counts = oracle(w, f, d, alpha, lam, 1.0, *limits)
    layout = data.draw(st.sampled_from(["plain", "transposed", "sliced", "reversed"]))
    if layout == "transposed":
        w, f, d, expected = w.T, f.T, d.T, expected.T
    if layout == "sliced" and shape:
        w, f, d, expected = (x[..., 1::2] for x in (w, f, d, expected))
        counts = oracle(w, f, d, alpha, lam, 1.0, *limits)[1]
    if layout == "reversed" and shape:
        w, f, d, expected = (x[::-1] for x in (w, f, d, expected))
    threads = abjure.get_num_threads()
    try:
        abjure.set_num_threads(data.draw(st.integers(1, 4)))
        found = dampen_array_(w, f, d, alpha, lam, max_factor=limits[0], min_factor=limits[1])
    finally:
        abjure.set_num_threads(threads)
    assert np.array_equal(w, expected)
    assert found == counts


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
def test_exponent(exponent):
    rng = np.random.default_rng(0)
    w, f, d = (rng.random((7, 301)).astype(np.float32) for _ in range(3))
    expected, counts = oracle(w, f, d, 2.0, 3.0, exponent)
    assert dampen_array_(w, f, d, 2.0, 3.0, exponent=exponent) == counts
    np.testing.assert_allclose(w, expected, rtol=3e-7)


def published(w, f, d, alpha, lam):
    """The published code, kept word for word in its operations: boolean indices over dense temporaries."""
    locations = torch.where(f > d.mul(alpha))
    weight = d.mul(lam).div(f).pow(1)
    update = weight[locations]
    update[torch.where(update > 1)] = 1
    w[locations] = w[locations].mul(update)


def test_bits_of_the_published_form():
    g = torch.Generator().manual_seed(0)
    w, f, d = (torch.rand(1000, 37, generator=g) for _ in range(3))
    for alpha, lam in ((10, 1), (1, 5), (0.5, 0.1)):
        expected, got = w.clone(), w.clone()
        published(expected, f, d, alpha, lam)
        dampen_array_(got, f, d, alpha, lam)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_torch_form_agrees(dtype, exponent):
    g = torch.Generator().manual_seed(1)
    w = torch.randn(300, 17, generator=g).to(dtype)
    f, d = torch.rand(300, 17, generator=g), torch.rand(300, 17, generator=g)
    numbers = (3.0, 1.0, exponent, 1.0, 0.0)
    other = w.clone()
    counts, patch = DEVICE_PATHS["dampen_array_"](other, f, d, *numbers, 7.0, 5.0, record=True)
    mine, before = w.clone(), w.clone()
    found, _ = _native.dampen(mine, f, d, *numbers, 7.0, 5.0, False, False)
    assert counts == found
    torch.testing.assert_close(mine, other, rtol=0 if exponent == 1 else 3e-3, atol=0)
    patch.restore(other)
    assert torch.equal(other, before)
    alphas = [0.0, 0.5, 2.0]
    curve = DEVICE_PATHS["selection_curve"](f, d, alphas, 7.0, 5.0)
    assert curve == _native.selection_curve(f, d, alphas, 7.0, 5.0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"alpha": -1}, abjure.ArgumentError, "alpha"),
        ({"alpha": float("nan")}, abjure.ArgumentError, "alpha"),
        ({"alpha": "ten"}, abjure.ArgumentError, "alpha"),
        ({"lam": -0.5}, abjure.ArgumentError, "lam"),
        ({"max_factor": 0.1, "min_factor": 0.2}, abjure.ArgumentError, "max_factor"),
        ({"forget": np.array([1, np.nan, 1], np.float32)}, abjure.NonFiniteError, "forget.*index 1"),
        ({"retain": np.array([1, 1, -1], np.float32)}, abjure.ArgumentError, "retain.*index 2"),
        ({"forget": np.ones(4, np.float32)}, abjure.ShapeError, r"forget.*\[3\].*\[4\]"),
        ({"retain": np.ones(3, np.float64)}, abjure.DTypeError, "retain.*float32.*float64"),
        ({"forget": np.ones(3, np.float16)}, abjure.DTypeError, "float32"),
        ({"retain": np.ones(3, np.int64)}, abjure.DTypeError, "retain"),
        ({"weights": "w"}, abjure.DTypeError, "weights"),
        ({"weights": torch.ones(3, device="meta")}, abjure.DeviceError, "meta"),
        ({"weights": torch.ones(3, requires_grad=True)}, abjure.LayoutError, "requires grad"),
        ({"weights": np.broadcast_to(np.float32(1), 3)}, abjure.LayoutError, "weights"),
    ],
)
def test_bad_input_modifies_nothing(change, error, match):
    w = np.full(3, 2, np.float32)
    arguments = {"weights": w, "forget": np.ones(3, np.float32), "retain": np.zeros(3, np.float32)} | change
    with pytest.raises(error, match=match):
        dampen_array_(**arguments)
    assert w.tolist() == [2, 2, 2]


def test_both_infinite_is_refused_and_one_is_not():
    inf = np.float32(np.inf)
    w = np.ones(2, np.float32)
    with pytest.raises(abjure.ArgumentError, match="infinite"):
        dampen_array_(w, np.array([inf, 1]), np.array([inf, 1]))
    assert dampen_array_(w, np.array([inf, 1]), np.array([1, inf])) == (1, 1, 1)
    assert w.tolist() == [0, 1]


def test_read_only_and_shared_memory():
    w = np.ones(4, np.float32)
    d = np.zeros(4, np.float32)
    with pytest.raises(abjure.LayoutError, match="shares memory"):
        dampen_array_(w, w, d)
    w.flags.writeable = False
    with pytest.raises(abjure.LayoutError, match="read-only"):
        dampen_array_(w, np.ones(4, np.float32), d)
    assert w.tolist() == [1, 1, 1, 1]


def test_late_error_is_rolled_back_across_threads():
    n = 1_500_000
    w = np.arange(n, dtype=np.float32)
    f, d = np.ones(n, np.float32), np.zeros(n, np.float32)
    f[-3] = np.nan
    with pytest.raises(abjure.NonFiniteError, match=str(n - 3)):
        dampen_array_(w, f, d)
    assert np.array_equal(w, np.arange(n, dtype=np.float32))


# Whole models


class Tied(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.body = torch.nn.Linear(6, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, x):
        return self.head(self.norm(self.body(self.embed(x))))


def fishers(model, seed=0, unit="batch", dtype="float32"):
    g = torch.Generator().manual_seed(seed)
    found = []
    for scale in (2.0, 1.0):
        fisher = Fisher(unit, dtype)
        for _ in range(3):
            fisher.update({n: scale * torch.randn(p.shape, generator=g) for n, p in model.named_parameters()})
        found.append(fisher)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["float32", "float64"])
def test_a_model_is_dampened_as_its_arrays_and_undone(dtype, storage):
    model = Tied(dtype)
    forget, retain = fishers(model, dtype=storage)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    counts = {n: dampen_array_(w, forget[n], retain[n], 2.0, 0.5) for n, w in expected.items()}
    report = dampen_(model, forget, retain, 2.0, 0.5)
    for name, p in model.named_parameters():
        assert p.requires_grad
        assert torch.equal(p, expected[name])
    assert report.selected == {n: c.count for n, c in counts.items()}
    assert report.changed == {n: c.changed for n, c in counts.items()}
    assert report.zeroed == {n: c.zeroed for n, c in counts.items()}
    assert report.total.count > 0
    assert torch.equal(model.norm.running_var, before["norm.running_var"])
    report.undo(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_tied_weights_are_dampened_once_from_a_state_dict_too():
    model = Tied()
    forget, retain = fishers(model)
    expected = model.embed.weight.detach().clone()
    dampen_array_(expected, forget["embed.weight"], retain["embed.weight"], 1.0)
    state = {n: v for n, v in model.state_dict().items() if "running" not in n and "tracked" not in n}
    # The tied name first, although the importance has the other one.
    state = {"head.weight": state.pop("head.weight")} | state
    report = dampen_(state, forget, retain, 1.0)
    assert torch.equal(model.head.weight, expected)
    assert report.tied == {"embed.weight": ["head.weight"]}
    assert "head.weight" not in report.sizes


def test_partly_shared_memory_is_refused():
    w = np.ones((4, 4), np.float32)
    one = {n: np.ones((4, 4), np.float32) for n in ("a", "b")}
    zero = {n: np.zeros((4, 4), np.float32) for n in ("a", "b")}
    with pytest.raises(abjure.LayoutError, match="'a' and 'b'"):
        dampen_({"a": w, "b": w.T}, one, zero)
    assert (w == 1).all()


def test_include_exclude_dry_run_and_words():
    model = Tied()
    forget, retain = fishers(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = dampen_(model, forget, retain, 1.0, include="*.weight", exclude=["norm.*"], dry_run=True)
    assert list(report.sizes) == ["embed.weight", "body.weight"]
    assert report.total.count == sum(int((forget[n] > retain[n]).sum()) for n in report.sizes)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert "would select" in report.statement
    with pytest.raises(abjure.ArgumentError, match="undo"):
        report.undo(model)
    with pytest.raises(abjure.ArgumentError, match=re.escape("'*.bais'")):
        dampen_(model, forget, retain, include="*.bais")


def test_ratio_and_the_statement():
    model = Tied()
    forget, retain = fishers(model)
    report = dampen_(model, forget, retain, 4.0, ratio=0.5, dry_run=True)
    assert report.lam == 2.0
    assert "below (lambda/alpha)^exponent = 0.5; the bound of 1 never binds" in str(report)
    assert "some selected weights may stay" in dampen_(model, forget, retain, 1.0, 3.0, dry_run=True).statement
    with pytest.raises(abjure.ArgumentError, match="ratio"):
        dampen_(model, forget, retain, 4.0, 2.0, ratio=0.5)


def test_every_selected_factor_is_below_lambda_over_alpha():
    model = Tied()
    forget, retain = fishers(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = dampen_(model, forget, retain, 3.0, 0.6)
    for n, p in model.named_parameters():
        moved = p != before[n]
        assert int(moved.sum()) == report.changed[n]
        assert (p[moved].abs() < 0.2 * before[n][moved].abs() * (1 + 1e-6)).all()


@pytest.mark.parametrize("undo", [True, False])
def test_bad_models_and_importances_modify_nothing(undo):
    w = {"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float32)}
    ones = {n: np.ones_like(v) for n, v in w.items()}
    zeros = {n: np.full_like(v, 0.01) for n, v in w.items()}
    late = dict(ones, b=np.array([[1, 1], [1, np.nan]], np.float32))
    cases = [
        (w, late, zeros, {}, abjure.NonFiniteError, "'b'.*index 3"),
        (w, ones, {"a": zeros["a"]}, {}, abjure.ArgumentError, "'b'"),
        (w, ones | {"c": np.ones(2)}, zeros | {"c": np.ones(2)}, {}, abjure.ArgumentError, "unknown 'c'"),
        (w | {"c": np.ones(2)}, ones, zeros, {}, abjure.ArgumentError, "none for 'c'"),
        (w, dict(ones, b=np.ones((2, 3), np.float32)), dict(zeros, b=np.ones((2, 3), np.float32)), {},
         abjure.ShapeError, r"'b'.*\(2, 2\).*\(2, 3\)"),
        (w, dict(ones, b=np.ones((2, 2))), zeros, {}, abjure.DTypeError, "'b'"),
        (w, ones, zeros, {"alpha": -1}, abjure.ArgumentError, "alpha"),
        (w, Fisher(), Fisher(), {}, abjure.ArgumentError, "count of 0"),
        (w, [1], zeros, {}, abjure.DTypeError, "forget"),
        (w, ones, {n: 0 * v for n, v in zeros.items()}, {}, abjure.ArgumentError, "retain.*0 everywhere"),
        (w, ones, zeros, {"full": zeros}, abjure.ArgumentError, "retain, full.*both"),
        (w, ones, None, {}, abjure.ArgumentError, "retain, full.*neither"),
        (w, ones, zeros, {"alpha": "adaptive"}, abjure.ArgumentError, "forget_size"),
        (w, ones, zeros, {"alpha": "percentile"}, abjure.ArgumentError, "'adaptive'"),
        (w, ones, zeros, {"min_factor": 2.0}, abjure.ArgumentError, "max_factor"),
        (3, ones, zeros, {}, abjure.DTypeError, "model"),
        (dict(w, b=np.ones((2, 2), np.int32)), ones, zeros, {}, abjure.DTypeError, "'b'.*int32"),
    ]  # fmt: skip
    for model, forget, retain, numbers, error, match in cases:
        with pytest.raises(error, match=match):
            dampen_(model, forget, retain, undo=undo, **numbers)
        assert all((v == 1).all() for v in w.values())


def test_units_must_agree():
    model = Tied()
    forget, retain = fishers(model)[0], fishers(model, unit="sample")[1]
    with pytest.raises(abjure.ArgumentError, match=r"unit 'batch'.*'sample'"):
        dampen_(model, forget, retain)


def test_warns_where_nothing_can_be_selected():
    """All data against a tenth of it: I_f / I_D is at most 10."""
    rng = np.random.default_rng(0)
    part = [rng.normal(size=5).astype(np.float32) for _ in range(2)]
    forget, everything = Fisher("sample"), Fisher("sample")
    for g in part:
        forget.update({"w": g})
    for g in part + [rng.normal(size=5).astype(np.float32) for _ in range(18)]:
        everything.update({"w": g})
    w = {"w": np.ones(5, np.float32)}
    with pytest.warns(UserWarning, match="= 10, not above alpha = 10"):
        dampen_(w, forget, everything, 10.0)
    rest = everything.copy().subtract(forget)
    assert dampen_(w, forget, rest, 0.1, dry_run=True).total.count > 0


def test_selection_curve_is_what_dampening_selects():
    model = Tied()
    forget, retain = fishers(model)
    alphas = [8.0, 0.0, 1.0, 2.0, 100.0]
    curve = selection_curve(forget, retain, alphas)
    expected = [dampen_(model, forget, retain, a, dry_run=True).total.count for a in alphas]
    assert curve.counts.tolist() == expected
    assert curve.size == sum(p.numel() for p in model.parameters())
    arrays = selection_curve(I_F, I_D, [8.0, 10.0])
    assert arrays.counts.tolist() == [3, 3]
    assert "<table>" in curve._repr_html_()
    with pytest.raises(abjure.ArgumentError, match="alpha"):
        selection_curve(forget, retain, [-1.0])


def test_report_shows_itself():
    import matplotlib

    matplotlib.use("Agg")
    model = Tied()
    forget, retain = fishers(model)
    report = dampen_(model, forget, retain, 1.0)
    assert "embed.weight" in report._repr_html_()
    assert len(report.plot().patches) == 2 * len(report.sizes)
    assert selection_curve(forget, retain).plot().get_xlabel() == "alpha"


def test_undo_checks_what_it_is_given():
    model = Tied()
    forget, retain = fishers(model)
    report = dampen_(model, forget, retain, 1.0)
    with pytest.raises(abjure.ArgumentError, match=r"'embed.weight'"):
        report.undo({"body.weight": model.body.weight.detach()})
    with pytest.raises(abjure.DTypeError, match="weights"):
        report.undo(Tied(torch.float16))


def bits(w):
    """The bits of every tensor, for comparisons that tell NaNs and zeros apart."""
    return {n: (v.detach().clone().numpy() if isinstance(v, torch.Tensor) else v).tobytes() for n, v in w.items()}


def mixed(seed=0, n=40_000):
    """Tensors of all dtypes and of layouts with and without rows, with NaN, zeros of both signs and importances 0."""
    rng = np.random.default_rng(seed)
    w = {
        "f32": rng.normal(size=(n // 100, 100)).astype(np.float32),
        "f64": rng.normal(size=n // 4),
        "f16": rng.normal(size=(3, 7)).astype(np.float16),
        "bf16": rng.normal(size=(50, 21)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(0.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "columns": rng.normal(size=(40, 60)).astype(np.float32).T,
        "strided": rng.normal(size=(30, 80)).astype(np.float32)[:, ::2],
    }
    w["f32"][:2] = [[0.0, -0.0] * 50, [np.nan, 1.0] * 50]
    f = {k: np.asarray(rng.random(v.shape), dtype=np.float32) for k, v in w.items()}
    d = {k: np.asarray(rng.random(v.shape), dtype=np.float32) for k, v in w.items()}
    d["f32"][5] = 0
    return w, f, d


@pytest.mark.parametrize("alpha", [0.5, 5.0, 2000.0])
def test_patch_holds_only_what_changed_and_gives_back_the_bits(alpha, tmp_path):
    w, f, d = mixed()
    before, old = bits(w), {n: v.copy() for n, v in w.items()}
    report = dampen_(w, f, d, alpha, 0.9)
    after = bits(w)
    assert report.total.count > 0
    kinds = {2: np.uint16, 4: np.uint32, 8: np.uint64}
    for name, v in w.items():
        kind = kinds[v.itemsize]
        was, now = (np.ascontiguousarray(x).view(kind).ravel() for x in (old[name], v))
        indices, kept = report.patch.entries(name)
        # A NaN that was selected may come back with other bits: it is kept whether it does or not.
        moved = np.flatnonzero((was != now) | (np.isnan(np.ravel(old[name])) & np.isin(np.arange(v.size), indices)))
        assert indices.tolist() == moved.tolist()
        assert kept.tolist() == was[moved].tolist()
    entries = len(report.patch)
    assert entries >= report.total.changed
    size = report.size
    assert report.patch.nbytes <= entries * 12 + size // 8 + 64
    file = tmp_path / "patch.safetensors"
    report.patch.save(file)
    assert file.stat().st_size < entries * 12 + 4096
    loaded = DampenPatch.load(file)
    assert loaded.names == list(w)
    assert (len(loaded), loaded.nbytes) == (entries, report.patch.nbytes)
    loaded.restore(w)
    assert bits(w) == before
    dampen_(w, f, d, alpha, 0.9, undo=False)
    assert bits(w) == after
    report.undo(w)
    assert bits(w) == before


def test_sparse_patches_are_smaller_than_a_bit_per_weight():
    rng = np.random.default_rng(0)
    w = {"w": rng.normal(size=1_000_000).astype(np.float32)}
    f, d = ({"w": rng.random(1_000_000).astype(np.float32)} for _ in range(2))
    report = dampen_(w, f, d, 500.0)
    assert 100 < report.total.count < 10_000
    assert report.patch.nbytes == 8 * report.total.count


def test_patch_files_and_models_that_do_not_fit(tmp_path):
    w, f, d = mixed()
    report = dampen_(w, f, d, 1.0)
    damped = bits(w)
    with pytest.raises(abjure.ArgumentError, match="'f64'"):
        report.undo({n: v for n, v in w.items() if n != "f64"})
    with pytest.raises(abjure.ShapeError, match="'bf16'"):
        report.undo(w | {"bf16": w["bf16"][1:]})
    frozen = w["f64"].copy()
    frozen.flags.writeable = False
    with pytest.raises(abjure.LayoutError, match="'f64'"):
        report.undo(w | {"f64": frozen})
    assert bits(w) == damped
    file = tmp_path / "p.safetensors"
    report.patch.save(file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(abjure.ArgumentError, match="patch file"):
        DampenPatch.load(file)
    fishers(Tied())[0].save(file)
    with pytest.raises(abjure.ArgumentError, match=r"abjure\.patch"):
        DampenPatch.load(file)
    with pytest.raises(abjure.ArgumentError, match="patch file"):
        DampenPatch.load(tmp_path / "none")
    one = np.array([1], np.uint32)
    for indices, values, error in (
        ([2, 1], 2, "ascend"),
        ([1, 1], 2, "ascend"),
        ([9], 1, "below 4"),
        ([1, 2], 1, "got 1"),
    ):
        with pytest.raises(ValueError, match=error):
            _native.Patch.from_entries([2, 2], "float32", np.array(indices, np.uint64), one.repeat(values))
    with pytest.raises(abjure.ArgumentError, match="float8"):
        _native.Patch.from_entries([2, 2], "float8", np.array([1], np.uint64), one)


def test_patch_of_a_tensor_elsewhere_is_the_same():
    """The torch form, on the CPU: same entries, and each restores what the other recorded."""
    from abjure.integrations.torch import TorchPatch

    rng = np.random.default_rng(1)
    for dtype in TORCH:
        w = torch.tensor(rng.normal(size=(40, 30))).to(dtype)
        f, d = (torch.tensor(rng.random((40, 30)), dtype=torch.float32) for _ in range(2))
        before, other = w.clone(), w.clone()
        report = dampen_({"w": w}, {"w": f}, {"w": d}, 0.5, 0.7)
        numbers = (0.5, 0.7, 1.0, 1.0, 0.0)
        _, patch = DEVICE_PATHS["dampen_array_"](other, f, d, *numbers, record=True)
        ours, theirs = report.patch.entries("w"), patch.entries()
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))
        DampenPatch({"w": patch}).restore({"w": w})
        TorchPatch.of(report.patch._patches["w"], "cpu").restore(other)
        assert torch.equal(w, before)
        assert torch.equal(other, before)


def test_one_call_for_all_tensors_as_one_call_for_each():
    w, f, d = mixed(2)
    expected = {n: v.copy(order="K") for n, v in w.items()}
    counts = {n: dampen_array_(expected[n], f[n], d[n], 2.0, 0.5, min_factor=0.125) for n in w}
    for threads in (1, 3):
        got = {n: v.copy(order="K") for n, v in w.items()}
        before = abjure.get_num_threads()
        try:
            abjure.set_num_threads(threads)
            report = dampen_(got, f, d, 2.0, 0.5, min_factor=0.125)
        finally:
            abjure.set_num_threads(before)
        assert bits(got) == bits(expected)
        assert {n: (report.selected[n], report.changed[n], report.zeroed[n]) for n in w} == counts
        assert report.total.zeroed == 0


@pytest.mark.parametrize("undo", [True, False])
@pytest.mark.parametrize("where", ["f32", "strided", "bf16"])
def test_an_error_in_any_tensor_leaves_all_untouched(undo, where):
    """A bad importance at the end of one tensor, found while others, of other dtypes too, have been written."""
    w, f, d = mixed(3)
    before = bits(w)
    f[where][-1, -1] = np.nan
    with pytest.raises(abjure.NonFiniteError, match=f"'{where}'.*forget"):
        dampen_(w, f, d, 1.0, undo=undo)
    assert bits(w) == before


def test_memory_shared_with_an_importance_is_refused():
    w, f, d = mixed(4)
    before = bits(w)
    f["f32"] = w["f32"]
    with pytest.raises(abjure.LayoutError, match=r"'f32'.*shares memory with forget"):
        dampen_(w, f, d)
    assert bits(w) == before
    a, b = np.ones(6, np.float32), np.zeros(3, np.float32)
    with pytest.raises(abjure.LayoutError, match="another tensor"):
        _native.dampen_all([a[:3], a[2:5]], [b + 1, b + 1], [b, b], 1, 1, 1, 1, 0, 1, 1, False, False)
    assert (a == 1).all()


@pytest.mark.parametrize("undo", [True, False])
def test_ctrl_c_leaves_all_or_nothing(undo):
    """The signal arrives from another thread at different times around the writing."""
    for delay in (0.0, 0.001, 0.003, 0.006, 0.012, 0.025, 0.05):
        rng = np.random.default_rng(0)
        w = {f"w{k}": rng.normal(size=300_000).astype(np.float32) for k in range(8)}
        f, d = ({n: rng.random(v.shape).astype(np.float32) for n, v in w.items()} for _ in range(2))
        before = bits(w)
        full = {n: v.copy() for n, v in w.items()}
        dampen_(full, f, d, 0.5)
        signals = threading.Timer(delay, signal.raise_signal, (signal.SIGINT,))
        main = signal.getsignal(signal.SIGINT)
        with contextlib.suppress(KeyboardInterrupt):
            signals.start()
            dampen_(w, f, d, 0.5, undo=undo)
            signals.join()
        signals.join()
        assert signal.getsignal(signal.SIGINT) is main
        assert bits(w) in (before, bits(full))


def test_ctrl_c_while_the_kernel_runs(monkeypatch):
    """Just before and just after the native call: held back, then raised with the model restored (or finished)."""
    model = Tied()
    forget, retain = fishers(model)
    before = bits(dict(model.named_parameters()))
    real = _native.dampen_all

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        found = real(*args)
        signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(_native, "dampen_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dampen_(model, forget, retain, 1.0)
    assert bits(dict(model.named_parameters())) == before
    with pytest.raises(KeyboardInterrupt):
        dampen_(model, forget, retain, 1.0, undo=False)
    monkeypatch.undo()
    dampened = bits(dict(model.named_parameters()))
    other = {n: np.frombuffer(b, np.float32).copy() for n, b in before.items()}
    dampen_(other, {n: forget[n].ravel() for n in other}, {n: retain[n].ravel() for n in other}, 1.0)
    assert bits(other) == dampened


def test_held_interrupts_are_raised_at_the_end_and_nest():
    reached = []

    def nested():
        with held_interrupt() as outer:
            with held_interrupt() as inner:
                signal.raise_signal(signal.SIGINT)
                reached.append(inner.pending)
            reached.append(outer.pending)

    with pytest.raises(KeyboardInterrupt):
        nested()
    assert reached == [True, True]

    def failing():
        with held_interrupt():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("x")

    with pytest.raises(KeyboardInterrupt) as caught:
        failing()
    assert isinstance(caught.value.__context__, ValueError)
    done = []
    worker = threading.Thread(target=lambda: done.append(held_interrupt().__enter__().pending))
    worker.start()
    worker.join()
    assert done == [False]


def test_counts_by_module():
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 4), torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    )
    forget, retain = fishers(model)
    report = dampen_(model, forget, retain, 1.0, dry_run=True)
    leaves = report.by_module()
    assert list(leaves) == ["0", "1.0", "1.1"]
    assert leaves["1.0"].size == 4 * 3 + 3
    assert leaves["1.0"].selected == report.selected["1.0.weight"] + report.selected["1.0.bias"]
    blocks = report.by_module(1)
    assert list(blocks) == ["0", "1"]
    assert blocks["1"] == tuple(a + b for a, b in zip(leaves["1.0"], leaves["1.1"], strict=True))
    with pytest.raises(abjure.ArgumentError, match="depth"):
        report.by_module(0)


def test_full_says_that_it_includes_the_forget_set():
    rng = np.random.default_rng(0)
    forget, everything = Fisher("sample"), Fisher("sample")
    for k in range(10):
        g = rng.normal(size=5).astype(np.float32)
        everything.update({"w": g})
        if k < 2:
            forget.update({"w": g})
    w = {"w": np.ones(5, np.float32)}
    with pytest.warns(UserWarning, match=r"full includes.*= 5, not above alpha = 5"):
        dampen_(w, forget, full=everything, alpha=5.0)
    assert dampen_(w, forget, full=everything, alpha=0.5, dry_run=True).total.count > 0


def test_powers_must_agree():
    """Squares and absolute values never meet; any Fisher that says its power is asked for it."""

    class Absolute(Fisher):
        power = 1

    model = Tied()
    retain = fishers(model)[1]
    forget = Absolute().update({n: torch.ones_like(p) for n, p in model.named_parameters()})
    before = bits(dict(model.named_parameters()))
    with pytest.raises(abjure.ArgumentError, match="power 1"):
        dampen_(model, forget, retain)
    assert bits(dict(model.named_parameters())) == before


@pytest.mark.effect
def test_a_real_model_is_dampened_saved_and_undone(smollm, tmp_path):
    """SmolLM2-135M with its tied head, in the files' own precision: counts of the dense form, bits after the undo."""
    state = {n: p.detach().to(torch.bfloat16) for n, p in smollm.model.named_parameters()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    g = torch.Generator().manual_seed(0)
    names = [n for n in state if n != "lm_head.weight"]
    forget, retain = ({n: torch.rand(state[n].shape, generator=g) for n in names} for _ in range(2))
    sums = {n: int(state[n].view(torch.int16).sum(dtype=torch.int64)) for n in names}
    report = dampen_(state, forget, retain, 200.0)
    assert report.tied == {"model.embed_tokens.weight": ["lm_head.weight"]}
    assert report.size == sum(p.numel() for p in smollm.model.parameters())
    assert report.total.count == sum(int((forget[n] > 200 * retain[n]).sum()) for n in names)
    assert list(report.by_module(2))[:2] == ["model.embed_tokens", "model.layers"]
    assert {n: int(state[n].view(torch.int16).sum(dtype=torch.int64)) for n in names} != sums
    report.patch.save(tmp_path / "undo.safetensors")
    assert (tmp_path / "undo.safetensors").stat().st_size < 6 * report.total.count + (1 << 17)
    DampenPatch.load(tmp_path / "undo.safetensors").restore(state)
    originals = dict(smollm.model.named_parameters())
    assert all(torch.equal(state[n], originals[n].detach().to(torch.bfloat16)) for n in names)
