"""Fisher and importance against NumPy and torch oracles, and what they refuse."""

import os
import signal
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import abjure
from abjure.forget import Fisher, importance
from abjure.integrations.torch import DEVICE_PATHS


def fisher_of(*gradients, unit="batch", dtype="float32", weight=1.0):
    fisher = Fisher(unit, dtype)
    for g in gradients:
        fisher.update({"w": np.asarray(g, dtype=np.float64)}, weight)
    return fisher


def test_batch_size_changes_the_batch_unit():
    """Four gradients, the mean of each batch squared: the numbers of the reference."""
    g = [1, -1, 2, 0]
    assert fisher_of(*g, unit="sample")["w"] == 1.5
    assert fisher_of(*np.mean(np.reshape(g, (2, 2)), 1))["w"] == 0.5
    assert fisher_of(np.mean(g))["w"] == 0.25
    # A ragged last batch counts as a whole one unless weighted by its size.
    assert fisher_of(0.0, 2.0)["w"] == 2.0
    weighted = Fisher(dtype="float64").update({"w": np.zeros(())}, 2.0).update({"w": np.full((), 2.0)}, 1.0)
    assert weighted["w"] == pytest.approx(4 / 3, rel=1e-15)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_sums_within_the_stated_bound(data):
    dtype = data.draw(st.sampled_from([np.float64, np.float32, np.float16, ml_dtypes.bfloat16]))
    kind = data.draw(st.sampled_from(["float32", "float64"]))
    shape = tuple(data.draw(st.lists(st.integers(0, 30), max_size=3)))
    stacked = data.draw(st.booleans())
    k = data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    grads = rng.normal(size=(k, *shape)).astype(dtype)
    fisher = Fisher("sample", kind)
    if stacked:
        fisher.update({"w": grads}, stacked=True)
    else:
        for g in grads:
            fisher.update({"w": g})
    exact = (grads.astype(np.float64) ** 2).sum(axis=0)
    unit = 2.0**-24 if kind == "float32" else 2.0**-53
    assert fisher.count == k
    assert np.all(np.abs(fisher.sum("w") - exact) <= (k + 2) * unit * exact)
    assert fisher["w"].shape == shape
    assert fisher["w"].dtype == kind


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1e-3), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)])
def test_half_precision_squares_are_not_lost(dtype, size):
    """2,000 equal squares: summed in half precision they stall (bfloat16) or vanish (float16)."""
    g = torch.full((8,), size, dtype=dtype)
    fisher, naive = Fisher(), torch.zeros(8, dtype=dtype)
    for _ in range(2000):
        fisher.update({"w": g})
        naive += g**2
    exact = 2000 * float(g[0]) ** 2
    torch.testing.assert_close(fisher.sum("w"), torch.full((8,), exact), rtol=2002 * 2.0**-24, atol=0)
    assert float(naive[0]) < 0.5 * exact


def test_module_gradients_ties_and_none():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
    model(torch.eye(3)).sum().backward()
    fisher = Fisher().update(model)
    assert fisher.names == ["unused", "0.weight"]
    assert torch.equal(fisher["0.weight"], model[0].weight.grad ** 2)
    assert fisher["unused"].tolist() == [0, 0]
    assert isinstance(fisher["unused"], torch.Tensor)


def test_any_layout_of_the_gradient():
    g = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (g.T, g[::2], g[:, ::-1], np.broadcast_to(g[0], (3, 6))):
        assert np.array_equal(Fisher().update({"w": view})["w"], view**2)
        if (np.array(view.strides) >= 0).all():
            assert np.array_equal(Fisher().update({"w": torch.from_numpy(view.copy())})["w"], view**2)
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert torch.equal(Fisher().update({"w": x})["w"], x.contiguous() ** 2)


def test_same_bits_for_any_number_of_threads_and_instruction_set():
    g = np.random.default_rng(0).normal(size=300_001).astype(np.float32)
    threads, level = abjure.get_num_threads(), abjure._native.simd_level()[0]
    seen = []
    try:
        for n in (1, 2, 5):
            for name in ("baseline", "avx2", "avx512"):
                abjure.set_num_threads(n)
                abjure._native.set_simd_level(name)
                seen.append(Fisher().update({"w": g}, 0.3).update({"w": g})["w"])
    finally:
        abjure.set_num_threads(threads)
        abjure._native.set_simd_level(level)
    assert all(np.array_equal(s, seen[0]) for s in seen)


def test_torch_forms_agree():
    g = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    mine, other = torch.zeros(50, 7), torch.zeros(50, 7)
    abjure._native.fisher_accumulate(mine, g, [1.5], 2)
    DEVICE_PATHS["fisher_accumulate"](other, g, [1.5], 2)
    assert torch.equal(mine, other)
    for bad in (float("nan"), 1e20):
        with pytest.raises(abjure.NonFiniteError):
            DEVICE_PATHS["fisher_accumulate"](other, torch.full((50, 7), bad), [1.0], 2, check_only=True)
    part = mine * 0.25
    for subtract in (False, True):
        abjure._native.fisher_combine(mine, part, subtract)
        DEVICE_PATHS["fisher_combine"](other, part, subtract, check_only=True)
        DEVICE_PATHS["fisher_combine"](other, part, subtract)
        assert torch.equal(mine, other)
    with pytest.raises(abjure.ArgumentError):
        DEVICE_PATHS["fisher_combine"](other, 2 * other + 1, True, check_only=True)


def test_merge_and_subtract():
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(10, 4, 5))
    whole = fisher_of(*grads, unit="sample")
    first, last = fisher_of(*grads[:3], unit="sample"), fisher_of(*grads[3:], unit="sample")
    merged = first.copy().merge(last)
    assert merged.count == 10
    np.testing.assert_allclose(merged["w"], whole["w"], rtol=1e-6)
    rest = whole.copy().subtract(first)
    assert rest.count == 7
    np.testing.assert_allclose(rest["w"], last["w"], rtol=1e-5, atol=1e-6)
    assert Fisher("sample").merge(first)["w"].tolist() == first["w"].tolist()
    assert (first.copy().subtract(first).sum("w") == 0).all()


def test_merge_refuses_what_does_not_mix():
    a = fisher_of(1.0)
    for other, match in [
        (fisher_of(1.0, unit="sample"), "unit 'batch'.*'sample'"),
        (fisher_of(1.0, dtype="float64"), "dtype 'float32'.*'float64'"),
        (Fisher().update({"v": np.ones(())}), "'v'"),
        (Fisher().update({"w": np.ones(2)}), r"\(\).*\(2,\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            a.merge(other)
    with pytest.raises(abjure.DTypeError, match="Fisher"):
        a.merge({"w": 1})
    with pytest.raises(abjure.ArgumentError, match="unit"):
        Fisher("sample").merge(a)
    with pytest.raises(abjure.ArgumentError, match="count of at most 1"):
        a.subtract(fisher_of(1.0, 1.0))
    with pytest.raises(abjure.ArgumentError, match=r"'w'.*difference"):
        a.subtract(fisher_of(2.0))
    assert a.count == 1
    assert a["w"] == 1


@pytest.mark.parametrize(
    ("gradients", "kwargs", "error", "match"),
    [
        ({"a": np.ones(3), "b": np.array([1, np.nan])}, {}, abjure.NonFiniteError, "'b'.*index 1"),
        ({"a": np.ones(3), "b": np.array([1, np.inf])}, {}, abjure.NonFiniteError, "'b'"),
        ({"a": np.ones(3), "b": np.array([1, 1e20])}, {}, abjure.NonFiniteError, "'b'.*sum of squares"),
        ({"a": np.ones(3), "b": np.ones(3)}, {}, abjure.ShapeError, r"'b'.*\(2,\).*\(3,\)"),
        ({"a": np.ones(3)}, {}, abjure.ArgumentError, "missing 'b'"),
        ({"a": np.ones(3), "b": np.ones(2), "c": np.ones(2)}, {}, abjure.ArgumentError, "unknown 'c'"),
        ({"a": np.ones(3), "b": np.ones(2, int)}, {}, abjure.DTypeError, "'b'.*int64"),
        ({"a": np.ones(3), "b": 1.0}, {}, abjure.DTypeError, "'b'"),
        ({"a": np.ones(3), "b": np.ones(2)}, {"weight": 0}, abjure.ArgumentError, "weight"),
        ({"a": np.ones(3), "b": np.ones(2)}, {"weight": np.nan}, abjure.ArgumentError, "weight"),
        ({"a": np.ones(3), "b": np.ones(2)}, {"stacked": True}, abjure.ArgumentError, "unit='sample'"),
        ({"a": np.ones(3), "b": torch.ones(2).to_sparse()}, {}, abjure.LayoutError, "'b'.*sparse"),
    ],
)
def test_a_bad_update_adds_nothing(gradients, kwargs, error, match):
    fisher = Fisher().update({"a": np.ones(3), "b": np.ones(2)})
    with pytest.raises(error, match=match):
        fisher.update(gradients, **kwargs)
    assert fisher.count == 1
    assert fisher["a"].tolist() == [1, 1, 1]
    assert fisher["b"].tolist() == [1, 1]


def test_stacked_gradients_must_agree():
    fisher = Fisher("sample")
    with pytest.raises(abjure.ShapeError, match="same number of examples"):
        fisher.update({"a": np.ones((3, 2)), "b": np.ones((2, 2))}, stacked=True)
    with pytest.raises(abjure.ShapeError, match="leading axis"):
        fisher.update({"a": np.ones(())}, stacked=True)
    assert fisher.count == 0
    assert not fisher.names


def test_constructor_and_lookup_errors():
    with pytest.raises(abjure.ArgumentError, match=r"unit.*'token'"):
        Fisher("token")
    with pytest.raises(abjure.ArgumentError, match=r"dtype.*'bfloat16'"):
        Fisher(dtype="bfloat16")
    with pytest.raises(abjure.ArgumentError, match="'nope'"):
        fisher_of(1.0).mean("nope")
    with pytest.raises(abjure.ArgumentError, match="at least one"):
        Fisher().update({})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_saved_and_loaded(tmp_path, dtype, kind):
    rng = np.random.default_rng(0)
    fisher = Fisher("sample", dtype)
    for _ in range(3):
        fisher.update({"a.b": kind(rng.normal(size=(3, 4))), "scalar": kind(np.array(2.0))}, 0.1)
    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    loaded = Fisher.load(path)
    assert (loaded.unit, loaded.dtype, loaded.count) == ("sample", dtype, fisher.count)
    assert loaded.names == fisher.names
    for name in fisher:
        assert np.array_equal(np.asarray(fisher.sum(name)), loaded.sum(name))
    again = Fisher.from_state_dict(fisher.state_dict())
    assert again.count == fisher.count
    assert os.listdir(tmp_path) == ["fisher.safetensors"]
    loaded.update({"a.b": torch.ones(3, 4), "scalar": torch.ones(())})


def test_bad_paths_and_files(tmp_path):
    fisher = fisher_of(1.0)
    with pytest.raises(abjure.ArgumentError, match=r"path.*nowhere.*No such file"):
        fisher.save(tmp_path / "nowhere" / "f.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(abjure.ArgumentError, match="path"):
        fisher.save(folder)
    assert os.listdir(tmp_path) == ["folder"]
    with pytest.raises(abjure.ArgumentError, match=r"path.*readable"):
        Fisher.load(tmp_path / "none.safetensors")
    (tmp_path / "noise").write_bytes(b"not a file of tensors")
    with pytest.raises(abjure.ArgumentError, match="path"):
        Fisher.load(tmp_path / "noise")
    from safetensors.numpy import save_file

    save_file({"w": np.ones(2, np.float32)}, tmp_path / "other")
    with pytest.raises(abjure.ArgumentError, match="format"):
        Fisher.load(tmp_path / "other")
    state = fisher.state_dict()
    for bad, error in [(np.nan, abjure.NonFiniteError), (-1.0, abjure.ArgumentError), (np.inf, abjure.ArgumentError)]:
        state["sum"] = {"w": np.full((), bad, np.float32)}
        with pytest.raises(error, match="'w'"):
            Fisher.from_state_dict(state)
    with pytest.raises(abjure.ArgumentError, match="'count'"):
        Fisher.from_state_dict({"unit": "batch", "dtype": "float32", "sum": {}})


def test_notebook_form():
    shown = Fisher().update({"<w>": np.full((2, 2), 2.0)})._repr_html_()
    assert "&lt;w&gt;" in shown
    assert "<td>4</td>" in shown


# The whole pass


def model_and_data(batches=3, size=4):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(6, 3)
    ).double()
    data = [(torch.randn(size, 5).double(), torch.randint(0, 3, (size,))) for _ in range(batches)]
    return model, data


def cross_entropy(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def reference(model, batches):
    """As the published code: zero the gradients, backward, add the squares, divide by the number of batches."""
    model.eval()
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        cross_entropy(model, batch).backward()
        for n, p in model.named_parameters():
            sums[n] += p.grad**2
    model.zero_grad()
    return {n: s / len(batches) for n, s in sums.items()}


def test_importance_is_the_published_one_and_leaves_the_model_alone():
    model, data = model_and_data()
    expected = reference(model, data)
    model.train()
    model[3].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = {n: v.clone() for n, v in model.state_dict().items()}
    with torch.no_grad():
        fisher = importance(model, data, cross_entropy, dtype="float64")
    assert (fisher.unit, fisher.count) == ("batch", 3)
    for name, value in expected.items():
        torch.testing.assert_close(fisher[name], value)
    assert [m.training for m in model] == [True, True, True, False, True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[4].weight.grad is None
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("per_sample", [True, "loop"])
def test_per_sample_importance(per_sample):
    model, data = model_and_data()
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(x))]
    expected = reference(model, singles)
    fisher = importance(model, data, cross_entropy, per_sample, dtype="float64")
    assert (fisher.unit, fisher.count) == ("sample", 12)
    for name, value in expected.items():
        torch.testing.assert_close(fisher[name], value)


def test_per_sample_importance_in_pieces(monkeypatch):
    model, data = model_and_data()
    whole = importance(model, data, cross_entropy, True)
    monkeypatch.setattr("abjure.forget.estimate._STACK_BYTES", 1)
    pieces = importance(model, data, cross_entropy, True)
    for name in whole:
        torch.testing.assert_close(whole[name], pieces[name])


def test_frozen_parameters_have_no_importance():
    model, data = model_and_data()
    model[0].requires_grad_(False)
    for per_sample in (False, True):
        fisher = importance(model, data, cross_entropy, per_sample)
        assert fisher["0.weight"].abs().sum() == 0
        assert fisher["4.weight"].abs().sum() > 0
    model.requires_grad_(False)
    with pytest.raises(abjure.ArgumentError, match="requires grad"):
        importance(model, data, cross_entropy)


def test_bad_passes_restore_the_model():
    model, data = model_and_data()
    model.train()
    cases = [
        ([], cross_entropy, False, abjure.DegenerateError, "at least one batch"),
        (data, lambda m, b: m(b[0]), False, abjure.ArgumentError, "scalar"),
        (data, lambda m, b: 0.5, False, abjure.ArgumentError, "scalar"),
        (data, lambda m, b: cross_entropy(m, b) * float("nan"), False, abjure.NonFiniteError, "batch 1"),
        ([(data[0][0], data[0][1][:2])], cross_entropy, True, abjure.ArgumentError, "leading axis"),
        (data, cross_entropy, "both", abjure.ArgumentError, "per_sample"),
    ]
    for loader, loss, per_sample, error, match in cases:
        with pytest.raises(error, match=match):
            importance(model, loader, loss, per_sample)
        assert all(m.training for m in model.modules())
    with pytest.raises(abjure.DTypeError, match="model"):
        importance({}, data, cross_entropy)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupted():
    model, data = model_and_data(batches=1)
    model.train()

    def forever():
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            yield data[0]

    with pytest.raises(KeyboardInterrupt):
        importance(model, forever(), cross_entropy)
    assert all(m.training for m in model.modules())


REDUCE = """
import sys, numpy as np, torch.distributed as dist
from abjure import ArgumentError
from abjure.forget import Fisher
rank = int(sys.argv[1])
fisher = Fisher().update({"w": np.full(3, rank + 1.0)}, rank + 1.0)
assert fisher.copy().all_reduce().count == rank + 1
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
total = fisher.copy().all_reduce()
assert total.count == 3 and total.sum("w").tolist() == [9.0] * 3, total.sum("w")
other = Fisher().update({"w" if rank else "v": np.ones(3)})
try:
    other.all_reduce()
except ArgumentError:
    pass
else:
    raise SystemExit("mixed names were reduced")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed")
def test_all_reduce(tmp_path):
    command = [sys.executable, "-c", REDUCE]
    ranks = [
        subprocess.Popen([*command, str(r), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    errors = [p.communicate(timeout=120)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(errors)
