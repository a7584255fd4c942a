"""Accumulators by label: taking an owner out gives the bits of a run that never saw it."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import abjure
from abjure import ArgumentError, DTypeError, NonFiniteError, ShapeError
from abjure.forget import Fisher, LabelledFisher, dampen_
from abjure.refuse import Contrast, LabelledContrast

OWNERS = ["ann", "bob", "cleo", "dan", "eve"]


def gradients(seed, spread=0):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-spread, spread, size=(40, 30))
    return {
        "w": (rng.standard_normal((40, 30)) * scale).astype(np.float32),
        "b": rng.standard_normal(17).astype(np.float32),
    }


def run(owners, dtype="float32", spread=3):
    found = LabelledFisher("sample", dtype)
    for step in range(3):
        for i, owner in enumerate(owners):
            found.update(gradients(100 * step + OWNERS.index(owner), spread), owner, weight=1.0 + i % 1)
    return found


def same(a, b):
    assert a.count == b.count
    assert a.names == b.names
    for name in a:
        x, y = np.asarray(a.sum(name)), np.asarray(b.sum(name))
        assert x.dtype == y.dtype
        assert (x.view(np.uint8) == y.view(np.uint8)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spread", [0, 3, 15])
def test_without_is_a_run_that_never_saw_the_owner(dtype, spread):
    everyone = run(OWNERS, dtype, spread)
    for owner in OWNERS:
        same(everyone.without(owner), run([o for o in OWNERS if o != owner], dtype, spread).total())
    two = run(["bob", "eve", "ann"], dtype, spread)
    same(everyone.without(("cleo", "dan")), two.total())
    # The order in which owners came does not matter.
    same(everyone.total(), run(OWNERS[::-1], dtype, spread).total())
    everyone.remove("ann")
    everyone.remove("cleo")
    same(everyone.total(), run(["eve", "dan", "bob"], dtype, spread).total())


@pytest.mark.parametrize("spread", [0, 15])
def test_sums_are_exact_sums_of_the_labels(spread):
    everyone = run(OWNERS, spread=spread)
    parts = [everyone.forget_set(o) for o in OWNERS[1:]]
    found = everyone.without("ann")
    for name in found:
        exact = [sum(map(Fraction, map(float, v))) for v in zip(*(np.ravel(p.sum(name)) for p in parts), strict=True)]
        rounded = np.array([float(v) for v in exact]).astype(np.float32)
        assert (np.ravel(found.sum(name)) == rounded).all()
    assert found.count == 12


def test_sums_beyond_two_doubles():
    """Digits 2^200 apart: more than two float64 hold, so that the other labels are summed again."""
    values = {"a": 1e30, "b": 2.0**-120, "c": 3.0, "d": 1e-30}
    found = LabelledFisher("sample", "float64")
    for owner, v in values.items():
        found.update({"w": np.array([np.sqrt(v), 1.0])}, owner)
    held = {o: float(found.forget_set(o).sum("w")[0]) for o in values}
    assert np.isnan(found.prepare()._totals()["w"][1][0])
    assert float(found.total().sum("w")[0]) == math.fsum(held.values())
    without = found.without("a")
    assert float(without.sum("w")[0]) == math.fsum(held[o] for o in "bcd")
    assert float(without.sum("w")[1]) == 3.0


def test_forget_set_feeds_dampening():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = LabelledFisher("sample")
    rng = np.random.default_rng(0)
    for owner in OWNERS:
        scale = 10.0 if owner == "bob" else 1.0
        grads = {n: torch.from_numpy(rng.standard_normal(p.shape) * scale).float() for n, p in before.items()}
        found.update(grads, owner)
    report = dampen_(model, found.forget_set("bob"), found.without("bob"), alpha=5.0, lam=1.0)
    assert sum(report.selected.values()) > 0
    assert any((p.detach() != before[n]).any() for n, p in model.named_parameters())


def test_stacked_gradients_sets_of_labels_and_whole_fishers():
    rng = np.random.default_rng(1)
    g = rng.standard_normal((4, 5))
    found = LabelledFisher("sample", "float64")
    found.update({"w": g}, ("ann", "cc-by"), stacked=True)
    found.update({"w": g[0]}, "cc-by").update({"w": g[1]}, "bob")
    assert found.labels == ["ann", "bob", "cc-by"]
    assert "ann" in found
    assert len(found) == 3
    same(found.forget_set("ann"), Fisher("sample", "float64").update({"w": g}, stacked=True))
    # What carries the licence goes, whoever else owns it.
    same(found.without("cc-by"), Fisher("sample", "float64").update({"w": g[1]}))
    other = LabelledFisher("sample", "float64").add("bob", Fisher("sample", "float64").update({"w": g[2]}))
    found.merge(other)
    assert found.forget_set("bob").count == 2
    assert found.without(["ann", "bob", "cc-by"]).count == 0


@pytest.mark.parametrize("spread", [3, 15])
def test_saved_parts_are_read_when_needed(tmp_path, spread):
    everyone = run(OWNERS, spread=spread)
    everyone.save(tmp_path / "f")
    for owner in ("bob", "eve"):
        loaded = LabelledFisher.load(tmp_path / "f")
        same(loaded.without(owner), everyone.without(owner))
        if spread == 3:
            # One pass over that label's sum: no other part was opened.
            assert [k for k, v in loaded._parts.items() if isinstance(v, Fisher)] == [frozenset({owner})]
    loaded = LabelledFisher.load(tmp_path / "f")
    loaded.update(gradients(999), "zoe")
    assert loaded.labels == [*OWNERS, "zoe"]
    assert loaded.without("zoe").count == everyone.total().count
    same(loaded.without("zoe"), everyone.total())
    with pytest.raises(ArgumentError, match="new directory"):
        everyone.save(tmp_path / "f")
    (tmp_path / "f" / "part-00001.safetensors").unlink()
    with pytest.raises(ArgumentError, match="part-00001"):
        LabelledFisher.load(tmp_path / "f")
    with pytest.raises(ArgumentError, match=r"labels\.json"):
        LabelledFisher.load(tmp_path)
    with pytest.raises(ArgumentError, match="kind 'contrast'"):
        LabelledContrast.load(tmp_path / "f")
    facts = json.loads((tmp_path / "f" / "labels.json").read_text())
    assert facts["counts"] == [3.0] * 5


def test_threads_change_nothing():
    before = abjure.get_num_threads()
    rng = np.random.default_rng(2)
    big = {o: {"w": rng.standard_normal(100_000).astype(np.float32)} for o in OWNERS}
    found = []
    for threads in (1, 4):
        abjure.set_num_threads(threads)
        one = LabelledFisher()
        for o in OWNERS:
            one.update(big[o], o)
        found.append(one.without("dan"))
    abjure.set_num_threads(before)
    same(*found)


def test_bad_input_adds_nothing():
    found = run(["ann", "bob"])
    expected = found.total()
    with pytest.raises(ArgumentError, match="'other'"):
        found.update({"other": np.ones(3)}, "cleo")
    with pytest.raises(ShapeError, match="other labels"):
        found.update({"w": np.ones((2, 2)), "b": np.ones(17)}, "cleo")
    bad = gradients(0)
    bad["b"][3] = np.nan
    with pytest.raises(NonFiniteError, match="'b'"):
        found.update(bad, "cleo")
    with pytest.raises(ArgumentError, match="label: expected labels seen, ann, bob, got 'cleo'"):
        found.without("cleo")
    with pytest.raises(ArgumentError, match="at least one label"):
        found.update(gradients(0), ())
    with pytest.raises(DTypeError):
        found.update(gradients(0), 3)
    with pytest.raises(DTypeError, match="Fisher"):
        found.add("cleo", {"w": 1})
    with pytest.raises(ArgumentError, match="unit"):
        found.add("cleo", Fisher("batch"))
    assert found.labels == ["ann", "bob"]
    same(found.total(), expected)
    high = LabelledFisher()
    for o in "ab":
        high.update({"w": np.array([1.8e19], dtype=np.float32)}, o)
    with pytest.raises(NonFiniteError, match="overflows float32"):
        high.total()
    with pytest.raises(ArgumentError, match="unit"):
        LabelledFisher("none")


def contrast(owners, **options):
    found = LabelledContrast(True, **options)
    rng = np.random.default_rng(3)
    data = {o: (rng.standard_normal((20, 8)) + 50, rng.integers(0, 2, 20)) for o in OWNERS}
    for o in owners:
        found.update(data[o][0][:12], data[o][1][:12], o)
        found.update(data[o][0][12:], data[o][1][12:], (o, "study"))
    return found


def same_contrast(a, b):
    assert a.counts == b.counts
    for x, y in zip(a._moments, b._moments, strict=True):
        assert (x.mean == y.mean).all()
        assert (x.second == y.second).all()


def test_contrasts():
    everyone = contrast(OWNERS)
    for owner in OWNERS:
        same_contrast(everyone.without(owner), contrast([o for o in OWNERS[::-1] if o != owner]).total())
    direction = everyone.without("dan").difference_in_means().vector
    assert (direction == contrast(["eve", "cleo", "bob", "ann"]).total().difference_in_means().vector).all()
    same_contrast(everyone.forget_set("study"), everyone.forget_set(["study"]))
    everyone.remove("study")
    assert sum(everyone.total().counts) == 60


def test_contrast_rows_of_several_owners(tmp_path):
    rng = np.random.default_rng(4)
    x, y = torch.from_numpy(rng.standard_normal((30, 6))), rng.integers(0, 2, 30)
    owners = [OWNERS[i % 3] for i in range(30)]
    mixed = LabelledContrast(layer=4).update(x, y, owners)
    at = [i for i, o in enumerate(owners) if o != "bob"]
    alone = LabelledContrast(layer=4).update(x[at], y[at], [owners[i] for i in at])
    a, b = mixed.without("bob"), alone.total()
    assert a.counts == b.counts
    assert (a.means[0] == b.means[0]).all()
    assert a.layer == 4
    plain = Contrast().update(x[at].numpy(), y[at])
    np.testing.assert_allclose(a.means[1], plain.means[1], rtol=1e-13)
    one = LabelledContrast().update(x, 1, owners)
    assert one.total().counts == (0, 30)
    mixed.save(tmp_path / "c")
    loaded = LabelledContrast.load(tmp_path / "c")
    assert loaded.without("bob").layer == 4
    assert (loaded.without("bob").means[1] == a.means[1]).all()
    with pytest.raises(ShapeError, match="owner: expected 30"):
        mixed.update(x, y, owners[:3])
    with pytest.raises(ShapeError, match="label: expected 30"):
        mixed.update(x, y[:3], owners)
    with pytest.raises(ArgumentError, match="label"):
        mixed.update(x, 2, "zoe")
    assert "zoe" not in mixed
    with pytest.raises(ArgumentError, match="reservoir"):
        LabelledContrast(reservoir=5)
    with pytest.raises(ArgumentError, match="options"):
        LabelledContrast(nothing=5)
    assert "3 parts" in repr(mixed)
