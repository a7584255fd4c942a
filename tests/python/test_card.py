"""Cards of data sets: forms that say the same, completeness, hashes in the provenance of what is made."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abjure import ArgumentError, DTypeError
from abjure.cli import main
from abjure.forget import Fisher
from abjure.measure import CARD_QUESTIONS, DatasetCard, Report
from abjure.refuse import Direction

ANSWERS = {q.key: f"An answer to {q.key}." for q in CARD_QUESTIONS}


def test_completeness():
    card = DatasetCard("Forum posts", "2", ANSWERS)
    assert card.check().complete
    assert repr(card.check()) == "CardCheck(17 of 17 answered, 0 declined with a reason)"
    part = card.with_answers(consent="", conditions="Unknown: the vendor did not say.", care="unknown: ", absences="  ")
    check = part.check()
    assert check.missing == ("consent", "care", "absences")
    assert check.declined == ("conditions",)
    assert len(check.answered) == 13
    assert not check.complete
    assert "unanswered: consent, care, absences" in repr(part)
    for text in (part.to_markdown(), part.to_html(), part._repr_html_()):
        assert "consent, care, absences" in text
        assert text.count("Not answered.") == 2
    assert card["licence"] == "An answer to licence."


KEYS, TEXTS = st.sampled_from([q.key for q in CARD_QUESTIONS]), st.text(alphabet=st.characters(codec="utf-8"))


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(KEYS, TEXTS))
def test_every_form_holds_the_same(tmp_path_factory, answers):
    folder = tmp_path_factory.mktemp("card")
    card = DatasetCard("Name \"quoted\" \\ 'too'", "1\t", answers, {'a "file".txt': "0" * 64})
    for ending in ("toml", "json"):
        card.save(folder / f"card.{ending}")
        loaded = DatasetCard.load(folder / f"card.{ending}")
        # TOML and JSON readers take CR LF for what it is in JSON alone.
        if ending == "json" or "\r" not in "".join(answers.values()):
            assert loaded == card
            assert loaded.digest == card.digest
    assert card.to_markdown().endswith(f"card {card.digest}\n")
    assert card.digest in card.to_html()


def test_digest_follows_the_content():
    card = DatasetCard("a", "1", ANSWERS)
    changed = [
        DatasetCard("b", "1", ANSWERS),
        DatasetCard("a", "2", ANSWERS),
        card.with_answers(purpose="Another."),
        DatasetCard("a", "1", ANSWERS, {"x": "0" * 64}),
    ]
    assert len({c.digest for c in [card, *changed]}) == 5
    assert DatasetCard("a", "1", dict(reversed(ANSWERS.items()))) == card
    assert hash(DatasetCard("a", "1", ANSWERS)) == hash(card)


def test_html_and_markdown_do_not_let_answers_be_markup():
    card = DatasetCard("<b>x</b>", "", {"purpose": "<script>alert(1)</script> | # *bold*"}, {"<i>": "0" * 64})
    assert "<script>" not in card.to_html()
    assert "<i>" not in card.to_html().replace("<i>Not answered.</i>", "")
    assert "\\*bold\\*" in card.to_markdown()


def test_the_hash_goes_into_what_is_made_from_the_data(tmp_path):
    card = DatasetCard("Forget set", "1", {"licence": "CC BY 4.0"})
    fisher = Fisher("sample").update({"w": np.ones(3)})
    direction = Direction(np.ones(4))
    report, extra = Report("Made"), {}
    card.stamp(fisher, direction, report, extra)
    card.stamp(fisher)
    other = DatasetCard("Retained", "1")
    other.stamp(fisher)
    assert [c["sha256"] for c in fisher.provenance["dataset_cards"]] == [card.digest, other.digest]
    fisher.save(tmp_path / "f.safetensors")
    loaded = Fisher.load(tmp_path / "f.safetensors").provenance["dataset_cards"][0]
    assert loaded == card.provenance()
    assert "consent" in loaded["unanswered"]
    direction.save(tmp_path / "d.safetensors")
    assert Direction.load(tmp_path / "d.safetensors").provenance["dataset_cards"] == [card.provenance()]
    assert card.digest in report.to_markdown()
    with pytest.raises(DTypeError, match="provenance"):
        card.stamp({}, 3)


def test_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"one")
    (tmp_path / "b.jsonl").write_bytes(b"two")
    card = DatasetCard("x").with_files(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert card.files["a.jsonl"] == hashlib.sha256(b"one").hexdigest()
    assert card.verify(tmp_path) == []
    (tmp_path / "a.jsonl").write_bytes(b"other")
    (tmp_path / "b.jsonl").unlink()
    assert card.verify(tmp_path) == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ArgumentError, match="twice"):
        card.with_files(tmp_path / "a.jsonl", tmp_path / "a.jsonl")
    with pytest.raises(ArgumentError, match="readable"):
        card.with_files(tmp_path / "none")


def test_bad_cards(tmp_path):
    with pytest.raises(ArgumentError, match="name"):
        DatasetCard(" ")
    with pytest.raises(ArgumentError, match="answers: expected questions"):
        DatasetCard("x", answers={"nothing": "y"})
    with pytest.raises(DTypeError, match="answers: consent"):
        DatasetCard("x", answers={"consent": 3})
    with pytest.raises(ArgumentError, match="surrogate"):
        DatasetCard("x", answers={"consent": "\ud800"})
    with pytest.raises(ArgumentError, match="files"):
        DatasetCard("x", files={"a": "abc"})
    with pytest.raises(ArgumentError, match="key"):
        DatasetCard("x")["nothing"]
    for name, content in (
        ("a.toml", "name = "),
        ("a.json", "[]"),
        ("b.json", '{"name": "x", "extra": 1}'),
        ("c.json", '{"name": "x", "format": "other"}'),
        ("d.json", '{"name": "x", "answers": []}'),
        ("a.yaml", "name: x"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ArgumentError):
            DatasetCard.load(tmp_path / name)
    with pytest.raises(ArgumentError, match="path"):
        DatasetCard("x").save(tmp_path / "card.txt")
    with pytest.raises(ArgumentError, match="path"):
        DatasetCard.load(tmp_path / "absent.toml")


def test_the_command(tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text("{}\n")
    new = str(tmp_path / "card.toml")
    assert main(["card", new, "--new", "Forum posts", "--data", str(tmp_path / "data.jsonl")]) == 0
    assert "0 of 17 answered" in capsys.readouterr().out
    assert main(["card", new]) == 1
    assert "unanswered: consent" in capsys.readouterr().out
    card = DatasetCard.load(new).with_answers(**ANSWERS)
    card.save(new)
    outs = [f"--{kind}={tmp_path / f'out.{kind}'}" for kind in ("json", "html", "markdown")]
    assert main(["card", new, "--verify", str(tmp_path), *outs]) == 0
    assert card.digest in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text()) == card.to_dict()
    (tmp_path / "data.jsonl").write_text("changed")
    assert main(["card", new, "--verify", str(tmp_path)]) == 1
    assert "differs or is absent: data.jsonl" in capsys.readouterr().out
    assert main(["card", new, "--new", "Again"]) == 2
    assert main(["card", str(tmp_path / "none.toml")]) == 2
    assert DatasetCard.load(new) == card
