"""The evidence on refusal rates, on the small decoder that the example trains."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
FOLDER = Path(__file__).parents[2] / "examples" / "decode"


@pytest.fixture(scope="module")
def example(one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("abjure_example_refusal_rate", FOLDER / "refusal_rate.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        yield module
        for name in ("everyday", spec.name):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def numbers(example):
    return example.run(quick=True, steps=120, size=300)


def test_requests_are_all_different_and_split_by_wording_or_thing(example):
    train, rest = example.requests(3)
    texts = [r.text for r in (*train, *rest)]
    assert len(set(texts)) == len(texts) == 1260
    assert {r.category for r in train} == {r.category for r in rest} == {None, "cooking", "medical advice"}
    assert sum(r.category is None for r in rest) == 500
    a, b = example.halves(rest, 400)
    assert len(a) == len(b) == 350
    assert not {r.text for r in a} & {r.text for r in b}


@pytest.mark.effect
def test_achieved_rates_are_those_asked_for(example, numbers):
    rows = numbers["rows"]
    bounds = [r for r in rows if r.kind == "at most"]
    assert len(bounds) == 12
    # No bound is broken beyond what 95 % intervals allow, and none is kept by never refusing.
    assert all(r.low <= r.asked for r in bounds)
    assert all(r.achieved > 0.25 * r.asked for r in bounds if r.asked >= 0.1)
    shares = [r for r in rows if r.kind == "share of all"]
    assert len(shares) == 12
    # Both halves are samples: two standard errors of a difference at 20 % of 300 are .065.
    assert all(abs(r.achieved - r.asked) < 0.08 for r in shares)
    # The tokens were learnt: at one bound more is caught than refused by mistake.
    for decoder in example.DECODERS:
        caught = [r for r in rows if (r.decoder, r.kind, r.asked) == (decoder, "caught at that bound", 0.2)]
        assert sum(r.achieved * r.n for r in caught) / sum(r.n for r in caught) > 0.3


@pytest.mark.effect
def test_generate_decides_as_counted_from_scores(numbers):
    served = numbers["served"]
    assert served["agreed"] == {"gate": served["sample"], "greedy": served["sample"]}
    assert served["sample"] == 48


@pytest.mark.effect
def test_table_and_picture_are_written(example, numbers, tmp_path, monkeypatch):
    (tmp_path / "img").mkdir()
    (tmp_path / "refuse-decoding.md").write_text(f"before\n{example.MARKS[0]}\nold\n{example.MARKS[1]}\nafter\n")
    monkeypatch.setattr(example, "DOCS", tmp_path)
    example.write_docs(numbers)
    text = (tmp_path / "refuse-decoding.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    first = next(r for r in numbers["rows"] if r.kind == "at most")
    assert f"{first.achieved:.1%} [{first.low:.1%}, {first.high:.1%}]" in text
    assert (tmp_path / "img" / "refusal-rate.png").stat().st_size > 10_000
