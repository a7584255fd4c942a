"""Two checkpoints side by side, beside NumPy on the whole arrays."""

from __future__ import annotations

import json
import struct

import ml_dtypes  # noqa: F401  # makes bfloat16 a dtype of NumPy
import numpy as np
import pytest
from safetensors.numpy import save_file

import abjure
from abjure import refuse
from abjure.checkpoint import diff

RNG = np.random.default_rng(0)


def base():
    rng = np.random.default_rng(1)
    return {
        "model.layers.0.mlp.down_proj.weight": rng.standard_normal((64, 96)).astype(np.float32) * 0.1,
        "model.layers.1.mlp.experts.down_proj": rng.standard_normal((3, 48, 64)).astype(np.float16),
        "model.layers.1.mlp.up_proj.weight": rng.standard_normal((96, 64)).astype(np.float32),
        "model.norm.weight": rng.standard_normal(64),
        "ids": np.arange(12, dtype=np.int64).reshape(3, 4),
        "empty": np.zeros((0, 5), np.float32),
        "scalar": np.array(2.5, np.float32),
    }


def save(path, arrays, config=None, files=1):
    path.mkdir(exist_ok=True)
    names = list(arrays)
    groups = [names[i::files] for i in range(files)]
    if files == 1:
        save_file(arrays, path / "model.safetensors")
    else:
        places = {}
        for i, group in enumerate(groups, 1):
            file = f"model-{i:05}-of-{files:05}.safetensors"
            save_file({n: arrays[n] for n in group}, path / file)
            places |= dict.fromkeys(group, file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return path


@pytest.fixture
def small_pieces(monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["abjure.checkpoint.diff"], "_PIECE", 700)


def test_the_same_checkpoint_in_other_files(tmp_path, small_pieces):
    a, b = save(tmp_path / "a", base()), save(tmp_path / "b", base(), files=3)
    found = diff(a, b)
    assert found.identical
    assert found.same == len(base())
    assert str(found).endswith("0 of 7 tensors differ")
    assert diff(a / "model.safetensors", b / "model.safetensors.index.json").identical


def test_every_number_is_that_of_the_whole_arrays(tmp_path, small_pieces):
    old, new = base(), base()
    name = "model.layers.0.mlp.down_proj.weight"
    new[name][5:9] += RNG.standard_normal((4, 96)).astype(np.float32)
    new["model.layers.1.mlp.experts.down_proj"][2, 3, 5] = 9
    new["model.norm.weight"][:3] *= 2
    new["ids"][1, 2:] = -1
    new["scalar"][...] = 3
    found = diff(save(tmp_path / "a", old), save(tmp_path / "b", new, {"model_type": "llama", "x": [1]}))
    assert not found.identical
    assert {t.name for t in found.changed} == {
        name,
        "model.layers.1.mlp.experts.down_proj",
        "model.norm.weight",
        "ids",
        "scalar",
    }
    assert found.same == 2
    assert found.config == {"x": (None, [1])}
    for t in found.changed:
        x, y = old[t.name], new[t.name]
        assert t.changed == np.count_nonzero(x != y)
        assert t.shape == x.shape
        if t.name == "ids":
            assert (t.max_abs, t.relative, t.rank) == (None, None, None)
            continue
        d = y.astype(np.float64) - x
        assert t.max_abs == np.abs(d).max()
        assert t.relative == pytest.approx(np.linalg.norm(d) / np.linalg.norm(x.astype(np.float64)))
    ranks = {t.name: t.rank for t in found.changed}
    assert ranks == {name: 4, "model.layers.1.mlp.experts.down_proj": 1} | dict.fromkeys(
        ["model.norm.weight", "ids", "scalar"]
    )
    facts = json.loads(found.to_json())
    assert facts["changed"][0]["name"] in ranks
    assert facts["config"] == {"x": [None, [1]]}
    assert "down_proj" in found._repr_html_()
    assert "config.json: x: None -&gt; [1]" in found._repr_html_()
    assert "rank 4" in str(found)
    assert repr(found) == "CheckpointDiff(5 of 7 tensors differ)"
    assert all(t.rank is None for t in diff(tmp_path / "a", tmp_path / "b", rank=False).changed)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_rank_of_an_ablation_is_that_of_the_directions(dtype, rank, tmp_path, small_pieces):
    """Also where rounding makes the stored difference full rank."""
    weights = np.random.default_rng(2).standard_normal((128, 160)).astype(dtype)
    edited = weights.copy()
    q = np.random.default_rng(3).standard_normal((rank, 128))
    refuse.orthogonalize_(edited, q, 0)
    exact = np.linalg.matrix_rank(edited.astype(np.float64) - weights.astype(np.float64))
    assert exact > rank or dtype == "float64"
    paths = [tmp_path / name for name in ("a", "b")]
    for path, array in zip(paths, (weights, edited), strict=True):
        path.mkdir()
        if dtype == "bfloat16":
            header = json.dumps({"w": {"dtype": "BF16", "shape": [128, 160], "data_offsets": [0, array.nbytes]}})
            header += " " * (-len(header) % 8)
            content = struct.pack("<Q", len(header)) + header.encode() + array.view(np.uint16).tobytes()
            (path / "model.safetensors").write_bytes(content)
        else:
            save_file({"w": array}, path / "model.safetensors")
    [found] = diff(*paths).changed
    assert found.rank == rank
    assert found.dtype[0] == {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}[dtype]


def test_a_difference_of_many_directions_has_no_rank(tmp_path):
    old, new = base(), base()
    name = "model.layers.1.mlp.up_proj.weight"
    new[name] += np.random.default_rng(4).standard_normal((96, 64)).astype(np.float32)
    a, b = save(tmp_path / "a", old), save(tmp_path / "b", new)
    assert diff(a, b).changed[0].rank is None
    assert diff(a, b, max_rank=64).changed[0].rank == 64
    for bad in (0, True, 2.5):
        with pytest.raises(abjure.ArgumentError, match="max_rank"):
            diff(a, b, max_rank=bad)


def test_other_names_shapes_and_dtypes(tmp_path):
    old, new = base(), base()
    half = new["model.norm.weight"].astype(np.float16)
    new["model.norm.weight"] = half
    new["more"] = new.pop("ids")
    new["scalar"] = np.zeros(1, np.float32)
    new["model.layers.0.mlp.down_proj.weight"] = old["model.layers.0.mlp.down_proj.weight"].astype(np.float64)
    found = diff(save(tmp_path / "a", old), save(tmp_path / "b", new))
    assert (found.only_a, found.only_b) == (["ids"], ["more"])
    assert found.shapes == {"scalar": ((), (1,))}
    by_name = {t.name: t for t in found.changed}
    assert by_name["model.norm.weight"].dtype == ("F64", "F16")
    assert by_name["model.norm.weight"].changed == np.count_nonzero(old["model.norm.weight"] != half)
    wider = by_name["model.layers.0.mlp.down_proj.weight"]
    assert (wider.changed, wider.max_abs, wider.dtype) == (0, 0.0, ("F32", "F64"))
    assert "F64 -> F16" in str(found)
    assert "shape () -> (1,)" in str(found)


def test_zeros_nans_and_infinities(tmp_path):
    x = np.array([[0.0, 1.0, np.nan, np.inf], [2.0, 3.0, 4.0, 5.0]], np.float32)
    y = x.copy()
    y[0, 0] = -0.0
    y.view(np.uint32)[0, 2] ^= 1  # another NaN
    a, b = save(tmp_path / "a", {"w": x}), save(tmp_path / "b", {"w": y})
    assert diff(a, b).identical
    y[1, 1] = np.nan
    y[0, 3] = -np.inf
    [found] = diff(a, save(tmp_path / "b", {"w": y})).changed
    assert found.changed == 2
    assert np.isnan(found.max_abs)
    assert found.rank is None
    json.loads(json.dumps(found.to_dict(), allow_nan=False))
    zero = save(tmp_path / "c", {"w": np.zeros((2, 4), np.float32)})
    [found] = diff(zero, save(tmp_path / "d", {"w": np.ones((2, 4), np.float32)})).changed
    assert found.relative == np.inf
    assert found.rank == 1


def test_a_plot(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    old, new = base(), base()
    new["model.layers.0.mlp.down_proj.weight"] *= 1.5
    found = diff(save(tmp_path / "a", old), save(tmp_path / "b", new))
    ax = found.plot()
    [line] = ax.get_lines()
    assert line.get_label() == "mlp.down_proj.weight"
    assert line.get_ydata()[0] == pytest.approx(0.5)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    good = save(tmp_path / "a", base())
    bad = tmp_path / "b"
    bad.mkdir()
    with pytest.raises(abjure.AbjureError):
        diff(good, bad)
    (bad / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(abjure.AbjureError, match="pickle"):
        diff(good, bad)
    (bad / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../a/model.safetensors"}}))
    with pytest.raises(abjure.AbjureError, match="plain file name"):
        diff(bad, good)
    content = (good / "model.safetensors").read_bytes()
    (bad / "model.safetensors.index.json").unlink()
    (bad / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(abjure.AbjureError):
        diff(good, bad)


def test_damaged_headers_are_refused(tmp_path):
    """Truncations, lengths that lie, offsets that overlap, links out of the folder: an error, never a wrong answer."""
    good = save(tmp_path / "a", base())
    whole = (good / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    bad = tmp_path / "b"
    bad.mkdir()
    file = bad / "model.safetensors"

    def refused(content, words="."):
        file.write_bytes(content)
        with pytest.raises(abjure.errors.CheckpointError, match=words):
            diff(good, bad)

    for end in [*range(0, 8 + length, 41), len(whole) - 1]:
        refused(whole[:end])
    refused(whole + b"\0")
    refused(struct.pack("<Q", 1 << 60) + whole[8:], "states a header of")
    refused(b"PK\x03\x04" + whole, "pickle")

    def header(**entries):
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text

    eight = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    refused(header(a=eight, b=eight) + bytes(8), "overlap")
    refused(header(a={**eight, "data_offsets": [8, 0]}) + bytes(8))
    refused(header(a={**eight, "shape": [-2]}) + bytes(8))
    refused(header(a={**eight, "shape": [3]}) + bytes(8), "do not hold the 12 bytes")
    refused(header(a={**eight, "dtype": "F7"}) + bytes(8), "F7")
    refused(header(a=eight, b={**eight, "data_offsets": [12, 20]}) + bytes(20), "leaves a hole")
    twice = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    )
    refused(struct.pack("<Q", len(twice)) + twice + bytes(8), "stands twice")
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(8 + length)] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            diff(good, bad)
        except abjure.AbjureError:
            continue
    file.unlink()
    (tmp_path / "elsewhere.safetensors").write_bytes(whole)
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(abjure.AbjureError, match="leads out of the checkpoint"):
        diff(good, bad)
    with pytest.raises(abjure.AbjureError, match="no such file"):
        diff(good, tmp_path / "none")
