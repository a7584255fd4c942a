"""Permitted retrieval against NumPy, and non-interference: forbidden records change nothing a user sees."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import torch

import abjure
from abjure import ArgumentError, DTypeError, NonFiniteError, ShapeError
from abjure.forget import PermittedIndex, Policy

POLICY = Policy(
    {"public": ["staff"], "staff": [], "ann": [], "bob": []},
    {"ann": ["ann", "public"], "bob": ["bob", "staff"], "all": ["ann", "bob", "staff"], "none": []},
)
KINDS = ["public", "staff", ("ann", "public"), ("bob", "staff"), "bob"]


def records(n, d, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    return x.astype(np.float32), [KINDS[i] for i in rng.integers(0, len(KINDS), n)]


def seen(labels, user):
    return np.flatnonzero(POLICY.permitted(labels, user))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_against_numpy(dtype, metric):
    x, labels = records(700, 33)
    held = torch.from_numpy(x).to(getattr(torch, dtype)) if dtype == "bfloat16" else x.astype(dtype)
    wide = np.asarray(held.double() if dtype == "bfloat16" else held, dtype=np.float64)
    queries = np.random.default_rng(1).standard_normal((5, 33)).astype(np.float32)
    index = PermittedIndex(held, labels, POLICY, metric=metric)
    for user in ("ann", "bob", "all"):
        rows = seen(labels, user)
        found = index.search(queries, user, k=9)
        exact = queries.astype(np.float64) @ wide[rows].T
        if metric == "cosine":
            exact /= np.linalg.norm(wide[rows], axis=1) * np.linalg.norm(queries, axis=1, keepdims=True)
        best = rows[np.argsort(-exact, axis=1, kind="stable")[:, :9]]
        assert (found.rows == best).all()
        np.testing.assert_allclose(found.scores, -np.sort(-exact, axis=1)[:, :9], rtol=3e-6)
        assert found.ids == found.rows.tolist()


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_non_interference(tmp_path, saved, metric):
    """Whatever the forbidden records hold, a user sees the same bits, ids and ties."""
    x, labels = records(3000, 48)
    x[::7] = x[0]  # ties between permitted and forbidden records
    queries = np.concatenate([x[:2], records(4, 48, 9)[0]])
    rows = seen(labels, "ann")
    forbidden = np.setdiff1d(np.arange(3000), rows)

    def result(data, finite):
        index = PermittedIndex(data, labels, POLICY, metric=metric)
        if saved:
            index.save(tmp_path / f"{finite}.safetensors")
            index = PermittedIndex.load(tmp_path / f"{finite}.safetensors")
        return index.search(queries, "ann", k=25)

    first = result(x, "a")
    rng = np.random.default_rng(2)
    for name, content in (("b", rng.standard_normal), ("c", np.zeros), ("d", lambda s: np.tile(x[0] * 1e3, (s[0], 1)))):
        other = x.copy()
        other[forbidden] = content((len(forbidden), 48))
        again = result(other, name)
        assert (again.rows == first.rows).all()
        assert (again.scores.view(np.int64) == first.scores.view(np.int64)).all()
    # Without the forbidden records at all: the same records and scores, in other places.
    alone = PermittedIndex(x[rows], [labels[i] for i in rows], POLICY, metric=metric).search(queries, "ann", k=25)
    assert (rows[alone.rows] == first.rows).all()
    assert (alone.scores == first.scores).all()


def test_forbidden_records_are_not_even_read(tmp_path):
    x, labels = records(500, 16)
    path = tmp_path / "index.safetensors"
    PermittedIndex(x, labels, POLICY, metric="dot").save(path)
    first = PermittedIndex.load(path).search(x[0], "bob")
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    # Tensors lie in an order of the library's own.
    header = json.loads(content[8:start])
    at = start + header["embeddings"]["data_offsets"][0]
    for i in np.setdiff1d(np.arange(500), seen(labels, "bob")):
        content[at + i * 64 : at + (i + 1) * 64] = np.full(16, np.nan, dtype=np.float32).tobytes()
    path.write_bytes(content)
    again = PermittedIndex.load(path).search(x[0], "bob")
    assert (again.scores == first.scores).all()
    with pytest.raises(NonFiniteError):
        PermittedIndex.load(path).search(x[0], "all")


def test_save_and_load(tmp_path):
    x, labels = records(200, 12)
    names = [f"r{i}" for i in range(200)]
    queries = records(3, 12, 5)[0]
    for i, held in enumerate((x, x.astype(np.float16), torch.from_numpy(x).bfloat16(), x.astype(ml_dtypes.bfloat16))):
        index = PermittedIndex(held, labels, POLICY, ids=names, metric="cosine")
        index.save(tmp_path / f"{i}.safetensors")
        loaded = PermittedIndex.load(tmp_path / f"{i}.safetensors")
        a, b = index.search(queries, "all"), loaded.search(queries, "all")
        assert a.ids == b.ids
        assert a.ids[0][0].startswith("r")
        assert (a.scores == b.scores).all()
        assert loaded.policy == POLICY
        assert (len(loaded), loaded.width, loaded.metric) == (200, 12, "cosine")
        assert isinstance(loaded._rows, np.memmap)
    assert "200 records of width 12" in repr(loaded)
    assert "<table>" in a._repr_html_()


def test_damaged_files(tmp_path):
    x, labels = records(50, 4)
    path = tmp_path / "index.safetensors"
    PermittedIndex(x, labels, POLICY).save(path)
    whole = path.read_bytes()
    for content in (b"", whole[:6], b"\xff" * 8 + whole[8:], whole[:-100], whole[:8] + b"[" + whole[9:]):
        path.write_bytes(content)
        with pytest.raises(ArgumentError, match="path"):
            PermittedIndex.load(path)
    with pytest.raises(ArgumentError, match="path"):
        PermittedIndex.load(tmp_path / "absent")
    from safetensors.numpy import save_file

    save_file({"embeddings": x}, path)
    with pytest.raises(ArgumentError, match="path"):
        PermittedIndex.load(path)


def test_threads_and_few_records():
    x, labels = records(9000, 40)
    before, found = abjure.get_num_threads(), []
    for threads in (1, 3):
        abjure.set_num_threads(threads)
        found.append(PermittedIndex(x, labels, POLICY).search(x[:6], "bob", 50))
    abjure.set_num_threads(before)
    assert (found[0].rows == found[1].rows).all()
    assert (found[0].scores == found[1].scores).all()
    index = PermittedIndex(x[:3], ["public", "bob", "public"], POLICY)
    assert index.search(x[:2], "ann", 10).rows.shape == (2, 2)
    nothing = index.search(x[:2], "none", 10)
    assert nothing.rows.shape == (2, 0)
    assert nothing.ids == [[], []]
    assert index.search(np.zeros((0, 40)), "ann").rows.shape == (0, 0)
    assert index.permitted("none").tolist() == []


def test_bad_input():
    x, labels = records(20, 4)
    index = PermittedIndex(x, labels, POLICY)
    with pytest.raises(ArgumentError, match="user"):
        index.search(x[0], "eve")
    with pytest.raises(ArgumentError, match="k"):
        index.search(x[0], "ann", 0)
    with pytest.raises(ShapeError, match="queries"):
        index.search(x[0, :3], "ann")
    with pytest.raises(NonFiniteError, match="queries"):
        index.search([np.nan] * 4, "ann")
    with pytest.raises(DTypeError, match="queries"):
        index.search("abcd", "ann")
    with pytest.raises(ShapeError, match="labels"):
        PermittedIndex(x, labels[:3], POLICY)
    with pytest.raises(ArgumentError, match="labels: record 19"):
        PermittedIndex(x, [*labels[:19], "other"], POLICY)
    with pytest.raises(ShapeError, match="embeddings"):
        PermittedIndex(x[0], labels, POLICY)
    with pytest.raises(NonFiniteError):
        PermittedIndex(np.where(np.arange(80).reshape(20, 4) == 7, np.inf, x), labels, POLICY)
    with pytest.raises(ArgumentError, match="metric"):
        PermittedIndex(x, labels, POLICY, metric="l2")
    with pytest.raises(DTypeError, match="policy"):
        PermittedIndex(x, labels, {})
    with pytest.raises(ShapeError, match="ids"):
        PermittedIndex(x, labels, POLICY, ids=["a"])
    with pytest.raises(DTypeError, match="ids"):
        PermittedIndex(x, labels, POLICY, ids=[1.5] * 20)
