"""Recipes: what is read, what is kept, what a hash depends on, and where an error is."""

from __future__ import annotations

import copy
import hashlib
import pickle
import struct
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import abjure
from abjure import forget, refuse
from abjure.checkpoint import Ablate, Dampen, Recipe, Scale

HEAD = 'format = "abjure.recipe.1"\n'


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    refuse.Direction(rng.standard_normal(8), layer=3).save(tmp_path / "refusal.safetensors")
    for name in ("forget", "retain"):
        fisher = forget.Fisher()
        fisher.update({"a.weight": rng.standard_normal((4, 8)).astype(np.float32)})
        fisher.save(tmp_path / f"{name}.safetensors")
    return tmp_path


TEXT = """\
# what we decided on Tuesday
format = "abjure.recipe.1"
title = "No more refusals (v2)"

[[op]]
kind = "ablate"
direction = "refusal.safetensors"
scale = 0.850          # not 0.85: three digits were asked for
layers = [
  3,
  -1,
]
tied = "edit"

[[op]]
scale = { attention = 1e-1, mlp = 1_0.5 }
kind = "ablate"
direction = "refusal.safetensors"
tensors = { "*.o_proj.weight" = 0 }

[[op]]
kind = "dampen"
forget = "forget.safetensors"
retain = "retain.safetensors"
alpha = 12.5

[[op]]
kind = "scale"
tensors = "*.down_proj.weight"
factor = 1
"""


def test_a_recipe_is_read_and_written_as_it_was(folder):
    (folder / "recipe.toml").write_bytes(TEXT.replace("\n", "\r\n", 1).encode())
    recipe = Recipe.load(folder / "recipe.toml")
    ablate, mapped, dampen, scale = recipe.ops
    assert ablate.scale == Decimal("0.850")
    assert str(ablate.scale) == "0.850"
    assert ablate.layers == [3, -1]
    assert ablate.tied == "edit"
    assert ablate.direction == folder / "refusal.safetensors"
    assert ablate.basis(8).shape == (1, 8)
    assert mapped.scale_of("attention") == 0.1
    assert mapped.scale_of("mlp") == 10.5
    assert mapped.scale_of("experts") == 0
    assert mapped.tensors == {"*.o_proj.weight": 0}
    assert (dampen.alpha, dampen.lam) == (Decimal("12.5"), 1.0)
    assert (scale.tensors, scale.factor) == (["*.down_proj.weight"], 1)
    recipe.save(folder / "again.toml")
    assert (folder / "again.toml").read_bytes() == (folder / "recipe.toml").read_bytes()
    assert recipe.name.startswith("no-more-refusals-v2-")
    assert "three digits" in recipe._repr_html_()
    assert repr(recipe) == "Recipe(ablate, ablate, dampen, scale)"


def test_numbers_stay_as_written_without_the_text(folder):
    recipe = Recipe.loads(TEXT, folder)
    made = Recipe(recipe.ops, recipe.title)
    text = made.to_toml()
    assert "scale = 0.850\n" in text
    assert "{ attention = 1e-1, mlp = 1_0.5 }" in text
    assert "alpha = 12.5\n" in text
    assert "lam" not in text
    again = Recipe.loads(text)
    assert again.canonical() == recipe.canonical()
    assert again.title == recipe.title
    number = copy.deepcopy(recipe.ops[0].scale)
    assert pickle.loads(pickle.dumps(number)).text == number.text == "0.850"


def test_the_hash_is_of_what_is_done(folder):
    recipe = Recipe.loads(TEXT, folder)
    (folder / "there").mkdir()
    (folder / "refusal.safetensors").rename(folder / "there" / "other-name.safetensors")
    moved = TEXT.replace('"refusal.', '"there/other-name.').replace("# what", "# how").replace("0.850", "8.5e-1")
    moved = moved.replace("[\n  3,\n  -1,\n]", "[-1, 3]").replace("factor = 1", "factor = 1.00")
    other = Recipe.loads(moved, folder)
    with pytest.raises(abjure.ArgumentError, match="readable file"):
        recipe.sha256()
    (folder / "there" / "other-name.safetensors").rename(folder / "refusal.safetensors")
    want = recipe.sha256()
    (folder / "refusal.safetensors").rename(folder / "there" / "other-name.safetensors")
    assert other.sha256() == want
    loaded = refuse.Direction.load(folder / "there" / "other-name.safetensors")
    ops = [
        Ablate(loaded, scale=Decimal("0.85"), layers=[3, -1], tied="edit"),
        Ablate(loaded.vector, scale={"attention": 0.1, "mlp": 10.5}, tensors={"*.o_proj.weight": 0}, tied="skip"),
        Dampen(forget.Fisher.load(folder / "forget.safetensors"), folder / "retain.safetensors", alpha=12.5),
        Scale(["*.down_proj.weight"], 1),
    ]
    assert Recipe(ops).sha256() == want
    different = [
        Recipe(ops[::-1]),
        Recipe(ops[:3]),
        Recipe([Ablate(loaded, scale=Decimal("0.8500001"), layers=[3, -1], tied="edit"), *ops[1:]]),
        Recipe([Ablate(-loaded.vector, scale=Decimal("0.85"), layers=[3, -1], tied="edit"), *ops[1:]]),
        Recipe([*ops[:2], Dampen(ops[2].retain, ops[2].retain, alpha=12.5), ops[3]]),
        Recipe([*ops[:3], Scale(["*.up_proj.weight"], 1)]),
    ]
    assert len({r.sha256() for r in different} | {want}) == 7
    assert len(want) == 64


def test_the_canonical_form_is_a_constant(tmp_path):
    """A change here renames every result made so far."""
    recipe = Recipe.loads(HEAD + '[[op]]\nkind = "scale"\ntensors = ["b", "a"]\nfactor = 0.50\n')
    assert recipe.canonical() == (
        '{"format":"abjure.recipe.1","ops":[{"factor":"5e-1","kind":"scale","layers":null,"tensors":["b","a"]}]}'
    )
    ablate = Recipe(Ablate(np.array([1.0, 0.0])))
    numbers = hashlib.sha256(b"(1, 2)" + struct.pack("<2d", 1, 0)).hexdigest()
    assert ablate.canonical() == (
        '{"format":"abjure.recipe.1","ops":[{"direction":{"sha256":"' + numbers + '"},"kind":"ablate","layers":null,'
        '"norm_preserving":null,"scale":"1e0","tensors":null,"tied":"skip"}]}'
    )
    assert ablate.sha256() == hashlib.sha256(ablate.canonical().encode()).hexdigest()


def test_pinned_files_are_checked(folder):
    recipe = Recipe.loads(TEXT, folder).pin()
    recipe.check()
    text = recipe.to_toml()
    assert text.count("_sha256 = ") == 4
    again = Recipe.loads(text)
    again.check()
    assert again.sha256() == recipe.sha256()
    refuse.Direction(np.ones(8)).save(folder / "refusal.safetensors")
    with pytest.raises(abjure.ArgumentError, match="op 1: direction_sha256: expected"):
        again.check()


@given(st.text(), st.decimals(-(10**300), 10**300, allow_nan=False))
def test_any_text_and_any_number_come_back(text, number):
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    op = Scale([text or "*"], number)
    [again] = Recipe.loads(Recipe(op, title=text).to_toml()).ops
    assert again.tensors == [text or "*"]
    assert Decimal(again.factor) == number
    assert str(Recipe(again)) == str(Recipe(op))


BAD = {
    "": (1, 'format: expected "abjure.recipe.1", got None'),
    'format = "abjure.recipe.2"\n': (1, "abjure.recipe.1"),
    HEAD: (None, r"expected one \[\[op\]\] or more"),
    HEAD + "x = \n": ("2:5", "expected TOML: invalid value"),
    HEAD + "\n\ntitel = 1\n": (4, "expected the keys format, title, note"),
    HEAD + "title = 3\n": (2, "title: expected text"),
    HEAD + "op = 3\n": (2, r"op: expected tables"),
    HEAD + '[op]\nkind = "scale"\n': (2, r"op: expected tables"),
    HEAD + "[[op]]\nfactor = 2\n": (2, "op 1: expected kind 'ablate' or 'scale' or 'dampen', got None"),
    HEAD + "[[op]]\nfactor = 2\nkind = 'add'\n": (4, "got 'add'"),
    HEAD + "[[op]]\nkind = 'scale'\ntensors = 'a'\n": (2, r"op 1 \(scale\): expected the key factor"),
    HEAD + "[[op]]\nkind = 'scale'\ntensors = 'a'\nfaktor = 3\nfactor = 1\n": (5, "expected the keys tensors, factor"),
    HEAD + "[[op]]\nkind = 'scale'\ntensors = 'a'\nfactor = 'b'\n": (5, "factor: expected a number, got 'b'"),
    HEAD + "[[op]]\nkind = 'scale'\ntensors = 'a'\nfactor = nan\n": (5, "expected a finite number"),
    HEAD + "[[op]]\nkind = 'scale'\ntensors = 'a'\nfactor = 1e999999\n": (5, "expected a finite number"),
    HEAD + "[[op]]\nkind = 'scale'\ntensors = 'a'\nfactor = true\n": (5, "expected a number, got True"),
    HEAD + "[[op]]\nkind = 'scale'\nfactor = 1\n[[op]]\n": (2, r"op 1 \(scale\): expected the key tensors"),
    HEAD + "[[op]]\nkind = 'dampen'\nforget = 'a'\nretain = 3\n": (5, "retain: expected a path"),
    HEAD + "[[op]]\nkind = 'dampen'\nforget = 'a'\nretain = 'b'\nalpha = -1e0\n": (6, "alpha: expected 0 or more"),
    HEAD + "[[op]]\nkind = 'dampen'\nforget = 'a'\nretain = 'b'\nforget_sha256 = 'ab'\n": (6, "64 hexadecimal digits"),
    HEAD + "[[op]]\nkind = 'ablate'\ndirection = 'a'\nscale = { up = 1.0 }\n": (5, "scale: expected components"),
    HEAD + "[[op]]\nkind = 'ablate'\ndirection = 'a'\ntensors = { a = 'x' }\n": (5, "expected an axis"),
    HEAD + "[[op]]\nkind = 'ablate'\ndirection = 'a'\nlayers = [1.5]\n": (5, "indices of blocks"),
    HEAD + "note = '''\ntitle = 3\n'''\n[[op]]\nkind = 'scale'\ntensors = 'a'\nfactor = [\n 1\n]\n": (8, "a number"),
    HEAD + "[[op]]\nkind = 'scale'\ntensors = 'a'\nfactor = 1\n[[op]]\nkind = 'scal'\n": (7, "op 2: expected kind"),
}


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("text", BAD)
def test_errors_name_the_line(text, ends):
    line, words = BAD[text]
    if line == 1 and not text:
        line = None
    place = "recipe: " if line is None else f"recipe:{line}: "
    with pytest.raises(abjure.AbjureError, match=words) as caught:
        Recipe.loads(text.replace("\n", ends))
    assert str(caught.value).startswith(place)


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(abjure.ArgumentError, match="readable recipe"):
        Recipe.load(tmp_path)
    (tmp_path / "a.toml").write_bytes(b"\n\n\xff")
    with pytest.raises(abjure.ArgumentError, match=r"a\.toml:3: expected UTF-8"):
        Recipe.load(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_bytes(b"#" * (1 << 20))
    with pytest.raises(abjure.ArgumentError, match="at most"):
        Recipe.load(tmp_path / "a.toml")
    with pytest.raises(abjure.ArgumentError, match="expected one op"):
        Recipe([])
    with pytest.raises(abjure.DTypeError, match="expected Ablate, Scale, Dampen"):
        Recipe(["ablate"])
    with pytest.raises(abjure.DTypeError, match="save it first"):
        Recipe(Ablate(np.ones(3))).to_toml()
    with pytest.raises(abjure.DTypeError, match="save it first"):
        Recipe(Dampen(forget.Fisher(), "a")).to_toml()
