"""Edits of checkpoints on disk: the bits of an edit in memory, the original back, and nothing wrong after a crash."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import abjure
from abjure import checkpoint, cli, forget, refuse
from abjure.checkpoint import Ablate, Dampen, Scale
from abjure.errors import AbjureError, ArgumentError, CheckpointError, DTypeError, NonFiniteError

D, INNER, VOCAB, LAYERS = 320, 1100, 700, 2
RNG = np.random.default_rng(0)
Q1 = RNG.standard_normal(D)
Q2 = RNG.standard_normal((2, D))


def tensors(dtype, layers=LAYERS, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def new(*shape):
        return (torch.randn(*shape, generator=generator) * 0.05).to(dtype)

    found = {"model.embed_tokens.weight": new(VOCAB, D), "model.norm.weight": new(D), "lm_head.weight": new(VOCAB, D)}
    for i in range(layers):
        block = f"model.layers.{i}."
        for name in "qkvo":
            found[f"{block}self_attn.{name}_proj.weight"] = new(D, D)
        found[f"{block}mlp.gate_proj.weight"] = new(INNER, D)
        found[f"{block}mlp.up_proj.weight"] = new(INNER, D)
        found[f"{block}mlp.down_proj.weight"] = new(D, INNER)
        found[f"{block}input_layernorm.weight"] = new(D)
        found[f"{block}post_attention_layernorm.weight"] = new(D)
    return found


CONFIG = {
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}


def write(path, weights, shards=2, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (path / "tokenizer.json").write_text('{"made": "up"}')
    (path / "extra").mkdir()
    (path / "extra" / "note.txt").write_text("carried along")
    if shards == 1:
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        return path
    names, index = sorted(weights, key=lambda n: weights[n].numel()), {}  # the last shard is the largest
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        mine = names[k::shards]
        save_file({n: weights[n] for n in mine}, path / file, {"format": "pt"})
        index.update(dict.fromkeys(mine, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def read(path):
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {n: t.clone() for f in files for n, t in load_file(f).items()}  # load_file maps the file


def contents(path):
    """Every byte of a checkpoint."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        x, y = (t.contiguous().view(torch.uint8) for t in (a[name], b[name]))
        assert torch.equal(x, y), name


def ablated(weights, q, scale=1.0, form=None, only=None):
    """The same edit in memory, as `orthogonalize_model_` does it."""
    q = refuse.orthonormal_basis(q)
    found = {n: t.clone() for n, t in weights.items()}
    for name, t in found.items():
        axis = 0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1 if "embed_tokens" in name else None
        if axis is not None and (only is None or only in name):
            refuse.orthogonalize_(t, q, axis, scale=scale, norm_preserving=form)
    return found


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source", tensors(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("q", "scale", "form"), [(Q1, 1, None), (Q2, 1.5, None), (Q2, 1, "in")])
def test_an_ablation_gives_the_bits_of_memory_and_undo_gives_them_back(tmp_path, dtype, q, scale, form):
    weights = tensors(dtype)
    source, out = write(tmp_path / "source", weights), tmp_path / "out"
    before = contents(source)
    # So little memory that every matrix comes in several tiles.
    report = checkpoint.edit(source, out, [Ablate(q, scale=scale, norm_preserving=form)], memory="1M")
    same(read(out), ablated(weights, q, scale, form))
    assert contents(source) == before
    assert (out / "extra" / "note.txt").read_text() == "carried along"
    assert len(report.tensors) == 2 * LAYERS + 1
    back = checkpoint.undo(out, tmp_path / "back")
    assert contents(back) == before
    verified = checkpoint.verify(out)
    assert verified
    assert verified.tensors == len(weights)
    if scale == 1 and form is None:
        edited = sum(weights[n].nbytes for n in report.tensors)
        assert sum(report.patches.values()) < edited / 12, "the factors undo nearly all of it"
        for name, t in report.tensors.items():
            (op,) = t["ops"]
            assert op["residual_after"] < op["residual_before"] / 50, name


@pytest.mark.parametrize("form", ["row", "row_pre"])
def test_forms_by_row(tmp_path, form):
    weights = tensors(torch.float32)
    source, out = write(tmp_path / "source", weights, shards=1), tmp_path / "out"
    checkpoint.edit(source, out, Ablate(Q2, norm_preserving=form, tensors="*down_proj*"), memory="2M")
    same(read(out), ablated(weights, Q2, 1, form, only="down_proj"))
    same(read(checkpoint.undo(out)), weights)
    with pytest.raises(ArgumentError, match="transpose"):
        checkpoint.edit(source, tmp_path / "other", Ablate(Q2, norm_preserving=form))


def test_close_to_torch_in_float32(tmp_path):
    """The oracle knows nothing of abjure: W - q qT W in torch."""
    weights = tensors(torch.float32)
    source, out = write(tmp_path / "source", weights), tmp_path / "out"
    checkpoint.edit(source, out, Ablate(Q1))
    q = torch.from_numpy(Q1 / np.linalg.norm(Q1))
    for name, t in read(out).items():
        w = weights[name].double()
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            w = w - torch.outer(q, q @ w)
        elif "embed_tokens" in name:
            w = w - torch.outer(w @ q, q)
        assert (t.double() - w).abs().max() < 1e-7, name


def test_several_ops_on_the_same_tensors(tmp_path):
    weights = tensors(torch.float32)
    source, out = write(tmp_path / "source", weights), tmp_path / "out"
    ops = [Ablate(Q1), Scale("*o_proj*", 0.3), Ablate(Q2, norm_preserving="in")]
    checkpoint.edit(source, out, ops, memory="1M")
    expected = ablated(weights, Q1)
    for name, t in expected.items():
        if "o_proj" in name:
            t *= 0.3
    same(read(out), ablated(expected, Q2, 1, "in"))
    assert contents(checkpoint.undo(out, tmp_path / "back")) == contents(source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_dampen(tmp_path, dtype):
    weights = tensors(dtype)
    source = write(tmp_path / "source", weights)
    checkpoint.edit(source, tmp_path / "scaled", Scale("model.layers.1.*", 0.7))
    expected = {n: (t.float() * 0.7).to(dtype) if ".layers.1." in n else t for n, t in weights.items()}
    same(read(tmp_path / "scaled"), expected)
    assert contents(checkpoint.undo(tmp_path / "scaled", tmp_path / "back")) == contents(source)

    files = []
    for k, name in enumerate(("forget", "retain")):
        fisher = forget.Fisher()
        generator = torch.Generator().manual_seed(k)
        for _ in range(3):
            fisher.update({n: torch.randn(t.shape, generator=generator) ** 3 for n, t in weights.items()})
        fisher.save(tmp_path / f"{name}.safetensors")
        files.append((tmp_path / f"{name}.safetensors", fisher))
    (f, wanted), (r, kept) = files
    out = tmp_path / "dampened"
    report = checkpoint.edit(source, out, Dampen(f, r, alpha=3, lam=1, exclude="*norm*"), memory="1M")
    expected = {n: t.clone() for n, t in weights.items()}
    total = forget.dampen_(expected, wanted, kept, alpha=3.0, lam=1.0, exclude=["*norm*"])
    same(read(out), expected)
    assert sum(t["ops"][0]["selected"] for t in report.tensors.values()) == sum(total.selected.values())
    assert "dampen: selected" in str(report)
    assert contents(checkpoint.undo(out, tmp_path / "undone")) == contents(source)
    # A Fisher in memory is the same as its file.
    checkpoint.edit(source, tmp_path / "again", Dampen(wanted, kept, alpha=3, exclude="*norm*"))
    same(read(tmp_path / "again"), expected)
    zero = forget.Fisher().update({n: torch.zeros(t.shape) for n, t in weights.items()})
    with pytest.raises(ArgumentError, match="0 everywhere"):
        checkpoint.edit(source, tmp_path / "none", Dampen(wanted, zero))


def test_untied(tmp_path):
    weights = tensors(torch.bfloat16)
    head = weights.pop("lm_head.weight")
    source = write(tmp_path / "source", weights, tie_word_embeddings=True)
    out = tmp_path / "out"
    checkpoint.edit(source, out, Ablate(Q1, tied="untie"))
    expected = ablated(weights, Q1)
    expected["lm_head.weight"] = weights["model.embed_tokens.weight"]
    same(read(out), expected)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert checkpoint.verify(out)
    assert contents(checkpoint.undo(out, tmp_path / "back")) == contents(source)
    with pytest.raises(ArgumentError, match="copy"):
        checkpoint.undo(out)
    with pytest.raises(ArgumentError, match="adds"):
        checkpoint.edit(source, None, Ablate(Q1, tied="untie"), in_place=True)
    assert head.shape == expected["lm_head.weight"].shape


def test_in_place_and_a_history_of_two(source):
    weights, before = read(source), contents(source)
    checkpoint.edit(source, None, Ablate(Q1), in_place=True, memory="1M")
    first = ablated(weights, Q1)
    same(read(source), first)
    middle = contents(source)
    checkpoint.edit(source, source, Scale("*up_proj*", "2" and 2.5), in_place=True)
    assert [e["number"] for e in checkpoint.info(source).history] == [1, 2]
    assert checkpoint.verify(source)
    checkpoint.undo(source)
    assert contents(source) == middle
    assert checkpoint.verify(source)
    checkpoint.undo(source)
    assert contents(source) == before
    with pytest.raises(CheckpointError, match="no edit to undo"):
        checkpoint.undo(source)


def test_one_file(tmp_path):
    weights = tensors(torch.float16)
    path, out = tmp_path / "w.safetensors", tmp_path / "o.safetensors"
    save_file(weights, path, {"made": "here"})
    checkpoint.edit(path, out, Ablate(Q1, tensors={"*.down_proj.weight": 0}))
    same(read(out), ablated(weights, Q1, only="down_proj"))
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"made": "here"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "o.safetensors",
        "o.safetensors.abjure.json",
        "o.safetensors.undo-1",
        "w.safetensors",
    ]
    assert checkpoint.verify(out)
    checkpoint.undo(out)
    assert out.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.safetensors", "w.safetensors"]


def test_the_number_of_threads_changes_nothing(source, tmp_path):
    before, found = abjure.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            abjure.set_num_threads(threads)
            checkpoint.edit(source, tmp_path / str(threads), Ablate(Q2))
            found.append(read(tmp_path / str(threads)))
    finally:
        abjure.set_num_threads(before)
    same(found[0], found[1])
    same(found[0], found[2])


def test_a_flipped_bit_is_found(source, tmp_path):
    out = tmp_path / "out"
    checkpoint.edit(source, out, Ablate(Q1))
    shard = next(out.glob("*.safetensors"))
    with safe_open(shard, "pt") as file:
        names = set(file.keys())
    with open(shard, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        old = file.read(1)[0]
        file.seek(-100, os.SEEK_END)
        file.write(bytes([old ^ 1]))
    report = checkpoint.verify(out)
    assert not report
    assert len(report.changed) == 1
    assert report.changed[0] in names
    assert cli.main(["verify", str(out), "--quiet"]) == 1
    (out / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in checkpoint.verify(out).changed
    edited = next(n for n in names if n.endswith("o_proj.weight"))
    with safe_open(shard, "pt") as file:
        content = file.get_tensor(edited)
    raw = shard.read_bytes()
    at = raw.find(content.view(torch.uint8).numpy().tobytes())
    shard.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
    broken = contents(out)
    for target in (None, tmp_path / "back"):
        with pytest.raises(CheckpointError, match="changed since"):
            checkpoint.undo(out, target)
    assert contents(out) == broken
    assert not (tmp_path / "back").exists()


def test_a_damaged_patch_is_refused(source, tmp_path):
    out = tmp_path / "out"
    checkpoint.edit(source, out, Ablate(Q1))
    patch = max(out.glob("*.undo-1"), key=lambda p: p.stat().st_size)
    good, before = patch.read_bytes(), contents(out)
    for damage in (good[:-9], good[: len(good) // 2], b"", good[:-60] + b"!" + good[-59:]):
        patch.write_bytes(damage)
        for target in (None, tmp_path / "back"):
            with pytest.raises(CheckpointError, match="patch"):
                checkpoint.undo(out, target)
    # Damage in the factors shows in the hashes of what they give.
    start = good.find(np.float64(Q1[5] / np.linalg.norm(Q1)).tobytes())
    assert start > 0
    patch.write_bytes(good[: start + 6] + bytes([good[start + 6] ^ 32]) + good[start + 7 :])
    for target in (None, tmp_path / "back"):
        with pytest.raises(CheckpointError, match="old bits"):
            checkpoint.undo(out, target)
    patch.write_bytes(good)
    assert contents(out) == before
    assert not (tmp_path / "back").exists()
    checkpoint.undo(out)
    assert contents(out) == contents(source)


def test_dry_run_and_hashes_of_the_edited_alone(source, tmp_path):
    before = contents(tmp_path)
    plan = checkpoint.edit(source, tmp_path / "out", Ablate(Q1), dry_run=True)
    assert contents(tmp_path) == before
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    assert plan.write == size
    assert plan.read > size
    assert plan.seconds > 0
    assert "5 tensors edited" in str(plan)
    assert "<table>" in plan._repr_html_()
    assert json.loads(json.dumps(plan.to_dict()))["tensors"] == 5
    checkpoint.edit(source, tmp_path / "out", Ablate(Q1), hashes="edited")
    same(read(tmp_path / "out"), ablated(read(source), Q1))
    assert checkpoint.verify(tmp_path / "out").tensors == 5


def test_what_is_not_carried(source, tmp_path):
    (source / "pytorch_model.bin").write_bytes(b"PK")
    (source / "other.safetensors").write_bytes((source / "model-00001-of-00002.safetensors").read_bytes())
    (tmp_path / "secret").write_text("x")
    (source / "link.txt").symlink_to(tmp_path / "secret")
    report = checkpoint.edit(source, tmp_path / "out", Ablate(Q1))
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"other.safetensors", "tokenizer.json", "config.json"}
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert not (tmp_path / "out" / "link.txt").exists()
    notes = "\n".join(report.notes)
    assert "pytorch_model.bin: left behind" in notes
    assert "link.txt: left behind" in notes
    assert "other.safetensors: carried along as it is" in notes


def test_a_hub_cache_of_links_is_read(tmp_path):
    weights = tensors(torch.bfloat16)
    source = write(tmp_path / "plain", weights)
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for k, file in enumerate(p for p in source.iterdir() if p.is_file()):
        blob = tmp_path / "models--a--b" / "blobs" / f"{k:040x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    out = tmp_path / "out"
    checkpoint.edit(snapshot, out, Ablate(Q1))
    same(read(out), ablated(weights, Q1))
    assert not any(p.is_symlink() for p in out.iterdir())
    with pytest.raises(CheckpointError, match="linked"):
        checkpoint.edit(snapshot, None, Ablate(Q1), in_place=True)


# Bad input --------------------------------------------------------------------------------------------------------


def refused(tmp_path, source, match, error=CheckpointError, ops=None, **options):
    out = tmp_path / "refused"
    before = contents(source)
    with pytest.raises(error, match=match):
        checkpoint.edit(source, out, Ablate(Q1) if ops is None else ops, **options)
    assert not out.exists()
    assert contents(source) == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_bad_checkpoints(source, tmp_path):
    shard = source / "model-00001-of-00002.safetensors"
    index = source / "model.safetensors.index.json"
    good, text = shard.read_bytes(), index.read_text()
    header = int.from_bytes(good[:8], "little")
    for content, match in [
        (good[:-1], "truncated"),
        (good + b"\0", "too long"),
        (good[:5], "too few"),
        ((2**62).to_bytes(8, "little") + good[8:], "states a header"),
        ((header + 8).to_bytes(8, "little") + good[8:], "header"),
        (b"PK\x03\x04" + good[4:], "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "LFS"),
    ]:
        shard.write_bytes(content)
        refused(tmp_path, source, match)
        with pytest.raises(CheckpointError, match=match):
            checkpoint.info(source)
    shard.unlink()
    refused(tmp_path, source, "missing")
    shard.write_bytes(good)
    for name in ("../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "pytorch_model.bin"):
        index.write_text(text.replace("model-00001-of-00002.safetensors", name))
        refused(tmp_path, source, "plain file name|pickle")
    index.write_text(text[:-1])
    refused(tmp_path, source, "index")
    index.unlink()
    refused(tmp_path, source, "expected one index")
    index.write_text(text)
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out"):
        checkpoint.edit(source, tmp_path / "refused", Ablate(Q1))


def test_what_does_not_fit(source, tmp_path):
    refused(tmp_path, source, "hidden size", AbjureError, Ablate(Q1[:-1]))
    refused(tmp_path, source, "memory", ArgumentError, memory="64K")
    refused(tmp_path, source, "memory", ArgumentError, memory="lots")
    refused(tmp_path, source, "hashes", ArgumentError, hashes="some")
    refused(tmp_path, source, "ops", DTypeError, ops=3)
    refused(tmp_path, source, "op", ArgumentError, ops=[])
    refused(tmp_path, source, "matches", ArgumentError, ops=Scale("nothing*", 2))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(tmp_path, source, "block|layer", AbjureError)
    (source / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    refused(tmp_path, source, "expected", AbjureError)
    (source / "config.json").write_text("{")
    refused(tmp_path, source, "JSON")


def test_a_weight_that_is_not_finite(tmp_path):
    weights = tensors(torch.float32)
    weights["model.layers.1.mlp.down_proj.weight"][7, 9] = float("nan")
    source = write(tmp_path / "source", weights)
    refused(tmp_path, source, f"flat index {7 * INNER + 9} .*layers.1.mlp.down_proj", (ArgumentError, NonFiniteError))
    before = contents(source)
    with pytest.raises(AbjureError, match="down_proj"):
        checkpoint.edit(source, None, Ablate(Q1), in_place=True)
    assert contents(source) == before


def test_quantised_tensors_are_refused_by_name(tmp_path):
    weights = tensors(torch.float32)
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    source = write(tmp_path / "source", weights)
    refused(tmp_path, source, "layers.0.mlp.down_proj", DTypeError)
    refused(tmp_path, source, "layers.0.mlp.down_proj", DTypeError, ops=Scale("*down_proj*", 2))
    checkpoint.edit(source, tmp_path / "out", Scale("*up_proj*", 2))  # the others can be edited
    same(
        {n: t for n, t in read(tmp_path / "out").items() if "up_proj" not in n},
        {n: t for n, t in weights.items() if "up_proj" not in n},
    )


def test_paths(source, tmp_path):
    for out, match in [
        (source, "another path"),
        (source / "inside", "outside of the source"),
        (tmp_path / "none" / "out", "existing folder"),
        (None, "in_place"),
    ]:
        with pytest.raises(ArgumentError, match=match):
            checkpoint.edit(source, out, Ablate(Q1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(ArgumentError, match="does not exist"):
        checkpoint.edit(source, tmp_path / "full", Ablate(Q1))
    with pytest.raises(CheckpointError, match="nowhere"):
        checkpoint.edit(tmp_path / "nowhere", tmp_path / "out", Ablate(Q1))
    (tmp_path / "empty").mkdir()
    checkpoint.edit(source, tmp_path / "empty", Ablate(Q1))
    assert checkpoint.verify(tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(source, tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.edit(source, folder / "out", Ablate(Q1))


def test_no_space_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    refused(tmp_path, source, "no space")
    with pytest.raises(CheckpointError, match="no space"):
        checkpoint.edit(source, None, Ablate(Q1), in_place=True)


# Crashes ----------------------------------------------------------------------------------------------------------


def in_child(work, after=None, limit=None):
    """Runs ``work`` in a forked process, killed ``after`` seconds, with at most ``limit`` bytes per file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads, which the child does not use
        child = os.fork()
    if child == 0:
        code = 1
        try:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work()
            code = 0
        except CheckpointError:
            code = 3
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def moments(count, longest, seed):
    draw = random.Random(seed)
    return [draw.uniform(0, longest) for _ in range(count)]


def test_killed_copies_leave_nothing_wrong_and_are_taken_up(tmp_path):
    weights = tensors(torch.bfloat16, layers=LAYERS)
    source = write(tmp_path / "source", weights, shards=4)
    before, expected = contents(source), ablated(weights, Q1)
    out = tmp_path / "out"
    start = time.perf_counter()
    assert in_child(lambda: checkpoint.edit(source, tmp_path / "timed", Ablate(Q1), progress=False)) == 0
    took = time.perf_counter() - start
    killed = 0
    for after in moments(12, 1.1 * took, seed=1):
        code = in_child(lambda: checkpoint.edit(source, out, Ablate(Q1), progress=False), after)
        killed += code is None
        assert contents(source) == before
        if out.exists():
            same(read(out), expected)
            assert checkpoint.verify(out)
            for path in sorted(out.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            out.rmdir()
    assert killed > 3
    checkpoint.edit(source, out, Ablate(Q1), progress=False)
    same(read(out), expected)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_killed_edits_in_place_are_ended_one_way_or_the_other(tmp_path):
    weights = tensors(torch.bfloat16)
    source = write(tmp_path / "source", weights)
    before, expected = contents(source), ablated(weights, Q1)
    start = time.perf_counter()
    assert in_child(lambda: checkpoint.edit(source, None, Ablate(Q1), in_place=True, progress=False)) == 0
    took = time.perf_counter() - start
    checkpoint.undo(source)
    assert contents(source) == before
    seen = set()
    for after in moments(12, 1.1 * took, seed=2):
        in_child(lambda: checkpoint.edit(source, None, Ablate(Q1), in_place=True, progress=False), after)
        if (source / ".abjure-journal").exists():
            assert checkpoint.info(source).interrupted
            with pytest.raises(CheckpointError, match="interrupted"):
                checkpoint.verify(source)
            index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
            if all((source / file).exists() for file in index.values()):
                # What can be loaded is the one or the other, never a mixture.
                found = read(source)
                new = found["model.embed_tokens.weight"].view(torch.int16)
                old = torch.equal(new, weights["model.embed_tokens.weight"].view(torch.int16))
                same(found, weights if old else expected)
            checkpoint.recover(source)
        if (source / "abjure.json").exists():
            same(read(source), expected)
            assert checkpoint.verify(source)
            checkpoint.undo(source)
            seen.add("new")
        else:
            seen.add("old")
        assert contents(source) == before
    assert "old" in seen
    checkpoint.edit(source, None, Ablate(Q1), in_place=True)
    same(read(source), expected)


def test_every_step_of_an_edit_in_place_can_be_the_last(tmp_path, monkeypatch):
    """Stops at each rename and each file written, as a crash would, instead of hoping to hit them."""
    from abjure.checkpoint import editing as module

    weights = tensors(torch.bfloat16, layers=2)
    source = write(tmp_path / "source", weights)
    before, expected = contents(source), ablated(weights, Q1)
    real = {"rename": os.rename, "replace": os.replace, "write_synced": module.write_synced}

    class Stop(BaseException):
        pass

    def run(steps):
        count = 0

        def step(function):
            def inner(*args):
                nonlocal count
                count += 1
                if count > steps:
                    raise Stop
                return function(*args)

            return inner

        with monkeypatch.context() as m:
            m.setattr(os, "rename", step(real["rename"]))
            m.setattr(os, "replace", step(real["replace"]))
            m.setattr(module, "write_synced", step(real["write_synced"]))
            # A killed process does not clean up after itself.
            m.setattr(module, "recover", lambda path, recover=module.recover: recover(path) if count <= steps else None)
            checkpoint.edit(source, None, Ablate(Q1), in_place=True, progress=False)

    ends, steps = [], 0
    while True:
        try:
            run(steps)
        except Stop:
            ends.append(checkpoint.recover(source))
        else:
            break
        if (source / "abjure.json").exists():
            same(read(source), expected)
            assert checkpoint.verify(source)
            checkpoint.undo(source)
        assert contents(source) == before, steps
        steps += 1
    assert set(ends) == {"back", "forward"}
    same(read(source), expected)


def test_a_disk_that_fills_up(tmp_path):
    weights = tensors(torch.bfloat16)
    source = write(tmp_path / "source", weights, shards=3)
    before, expected = contents(source), ablated(weights, Q1)
    largest = max(len(b) for b in before.values())
    out = tmp_path / "out"
    for share in (0.1, 0.5, 0.9, 0.999):
        limit = int(share * largest)
        assert in_child(lambda: checkpoint.edit(source, out, Ablate(Q1), progress=False), limit=limit) == 3
        assert not out.exists()
        assert contents(source) == before
        in_place = in_child(
            lambda: checkpoint.edit(source, None, Ablate(Q1), in_place=True, progress=False), limit=limit
        )
        assert in_place in (0, 3)
        checkpoint.recover(source)
        if in_place == 0:
            checkpoint.undo(source)
        assert contents(source) == before
    checkpoint.edit(source, out, Ablate(Q1), progress=False)
    same(read(out), expected)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MiB, and a function that gives it another size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join((*options, f"size={size}")), "tmpfs", str(disk)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not mount(6 << 20):
        pytest.skip("file systems cannot be mounted here")
    yield disk, lambda size: mount(size, "remount")
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full(tmp_path, small_disk, monkeypatch):
    disk, resize = small_disk
    usage = shutil.disk_usage(disk)
    weights = tensors(torch.bfloat16)
    source = write(tmp_path / "source", weights, shards=5)
    before, expected = contents(source), ablated(weights, Q1)
    assert sum(map(len, before.values())) > 6 << 20
    with pytest.raises(CheckpointError, match="no space"):
        checkpoint.edit(source, disk / "out", Ablate(Q1), progress=False)
    assert not list(disk.iterdir())
    with monkeypatch.context() as m:
        m.setattr("shutil.disk_usage", lambda _: usage._replace(free=1 << 40))  # others fill it meanwhile
        with pytest.raises(CheckpointError, match="No space"):
            checkpoint.edit(source, disk / "out", Ablate(Q1), progress=False)
    assert not (disk / "out").exists()
    assert contents(source) == before
    assert resize(40 << 20)
    report = checkpoint.edit(source, disk / "out", Ablate(Q1), progress=False)
    assert report.resumed > 0
    same(read(disk / "out"), expected)
    # In place, with too little room for the journal.
    shutil.rmtree(disk / "out")
    shutil.copytree(source, disk / "place")
    assert resize(sum(map(len, before.values())) + (1 << 20))
    with monkeypatch.context() as m:
        m.setattr("shutil.disk_usage", lambda _: usage._replace(free=1 << 40))
        with pytest.raises(CheckpointError, match="No space"):
            checkpoint.edit(disk / "place", None, Ablate(Q1), in_place=True, progress=False)
    assert contents(disk / "place") == before


@pytest.fixture
def small_ext4(tmp_path):
    """An ext4 of 40 MiB, where shards are reserved and written past the page cache."""
    image, disk = tmp_path / "image", tmp_path / "ext4"
    disk.mkdir()
    with open(image, "wb") as file:
        file.truncate(40 << 20)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(disk)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_of_blocks(tmp_path, small_ext4, monkeypatch):
    weights = tensors(torch.bfloat16)
    source = write(tmp_path / "source", weights, shards=5)
    before, expected = contents(source), ablated(weights, Q1)
    out, usage = small_ext4 / "out", shutil.disk_usage(small_ext4)
    ballast = small_ext4 / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, usage.free - (5 << 20))
    with pytest.raises(CheckpointError, match="no space"):
        checkpoint.edit(source, out, Ablate(Q1), progress=False)
    with monkeypatch.context() as m:
        m.setattr("shutil.disk_usage", lambda _: usage._replace(free=1 << 40))  # others fill it meanwhile
        with pytest.raises(CheckpointError, match="No space"):
            checkpoint.edit(source, out, Ablate(Q1), progress=False)
    assert not out.exists()
    assert contents(source) == before
    ballast.unlink()
    assert checkpoint.edit(source, out, Ablate(Q1), progress=False).resumed > 0
    same(read(out), expected)
    assert checkpoint.verify(out, progress=False)
    checkpoint.undo(out, progress=False)
    assert contents(out) == before


def test_finished_shards_are_kept_for_the_next_run(tmp_path):
    weights = tensors(torch.bfloat16)
    source = write(tmp_path / "source", weights, shards=3)
    *_, small, big = (p.stat().st_size for p in sorted(source.glob("*.safetensors")))
    assert big > small + 1
    out = tmp_path / "out"

    def until_the_largest(target):
        abjure.set_num_threads(1)
        checkpoint.edit(source, target, Ablate(Q1), progress=False)

    assert in_child(lambda: until_the_largest(out), limit=small + 1) == 3
    kept = list((tmp_path / ".out.abjure-partial" / "records").iterdir())
    assert len(kept) == 2
    report = checkpoint.edit(source, out, Ablate(Q1), progress=False)
    assert report.resumed == len(kept)
    same(read(out), ablated(weights, Q1))
    # Another edit does not take them up.
    other = tmp_path / "other"
    assert in_child(lambda: until_the_largest(other), limit=small + 1) == 3
    report = checkpoint.edit(source, other, Ablate(Q2), progress=False)
    assert report.resumed == 0
    same(read(other), ablated(weights, Q2))


# Commands ---------------------------------------------------------------------------------------------------------


def test_commands(source, tmp_path, capsys):
    refuse.Direction(Q1).save(tmp_path / "r.safetensors")
    out = str(tmp_path / "out")

    def run(*args):
        code = cli.main([*map(str, args)])
        return code, capsys.readouterr()

    ablate = ("ablate", source, out, "--direction", tmp_path / "r.safetensors", "--layers", "0-1", "--quiet")
    code, text = run(*ablate, "--dry-run")
    assert code == 0
    assert "4 tensors edited" in text.out
    assert re.search(r"reads [\d.]+ MiB, writes [\d.]+ MiB, about [\d.]+ s", text.out)
    assert not os.path.exists(out)
    code, text = run(*ablate, "--json")
    assert code == 0
    assert len(json.loads(text.out)["tensors"]) == 4
    assert run("verify", out, "--quiet")[0] == 0
    code, text = run("info", out, "--json")
    assert json.loads(text.out)["history"][0]["tensors"] == 4
    code, text = run("diff", source, out, "--json")
    assert code == 1
    assert not json.loads(text.out)["identical"]
    code, text = run("info", source)
    assert code == 0
    assert f"llama, {LAYERS} layers, " in text.out
    assert "BF16" in text.out
    code, text = run("scale", out, "--in-place", "--tensors", "*up_proj*", "--factor", "1.50", "--quiet")
    assert code == 0
    assert run("undo", out, "--quiet")[0] == 0
    assert run("undo", out, "--quiet")[0] == 0
    assert contents(tmp_path / "out") == contents(source)
    code, text = run("undo", out, "--quiet")
    assert code == 2
    assert text.err.count("\n") == 1
    assert "no edit to undo" in text.err
    code, text = run("ablate", source, out, "--direction", tmp_path / "r.safetensors", "--layers", "x")
    assert code == 2
    assert "layers" in text.err
