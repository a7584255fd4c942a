"""The report: the same bytes twice, nothing read as markup, no NaN; and the command ``abjure measure``."""

from __future__ import annotations

import base64
import json
import math
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from abjure import cli
from abjure.errors import ArgumentError, DTypeError
from abjure.measure import (
    Rate,
    Report,
    corrected_rate,
    fail_safe_scores,
    measure_responses,
    over_refusal_scores,
    rate,
    read_jsonl,
    refusal_match,
)


def report() -> Report:
    return (
        Report("A <b>title</b> | with marks", {"model": "m_1", "temperature": 0.0})
        .add("Rate", rate([1, 0, 1], ["<x>", "y|z", "<x>"]), "a note")
        .add("Matches", refusal_match(["I cannot <i>", "As an AI", "Yes"], ["gcg", "refusal_direction"]))
        .add("Scores", over_refusal_scores([1, 0], [1, 0]))
        .add("Fail safe", fail_safe_scores({"baseline": [6], "missing_context": [1]}))
        .add("Corrected", corrected_rate(Rate(3, 9), Rate(9, 10), Rate(8, 10)))
        .add("Numbers", {"a": 0.1 + 0.2, "b": math.nan, "c": Rate(1, 8), "d": np.float32(0.5), ("k", 1): [1, 2]})
        .add("Rates", {"first": Rate(1, 8), "none": Rate(0, 0)})
    )


def test_two_reports_of_the_same_results_are_the_same_bytes():
    a, b = report(), report()
    assert a.to_markdown() == b.to_markdown()
    assert a.to_json() == b.to_json()
    assert a.to_html() == b.to_html()
    assert a.digest == b.digest
    assert a.digest != report().add("More", 1).digest


def test_markdown_tables_have_as_many_cells_as_heads():
    text = report().to_markdown()
    tables = [b for b in text.split("\n\n") if b.startswith("|")]
    assert len(tables) == 8
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    assert "<b>" not in text.replace("\\<b\\>", "")
    assert "| c | 0.1250 \\[0.0224 to 0.4709\\] |" in text
    assert "| b | – |" in text
    assert "| first | 1 | 8 | 0 | 0.1250 |" in text


def test_rates_are_rounded_from_their_counts():
    # 1/16 is 0.0625: half away from zero, where binary rounding to even gives 0.062.
    from abjure.measure._scores import Row, shown_cells

    assert shown_cells(Row("", Rate(1, 16)), places=3)[4] == "0.063"
    assert shown_cells(Row("", Rate(0, 0)))[4] == "–"


def test_html_needs_nothing_else_and_escapes():
    page = report().to_html()
    assert "<b>title</b>" not in page
    assert "<x>" not in page
    assert "<i>" not in page
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == 3
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "data:image" not in report().to_html(plots=False)


def test_json_is_strict_and_complete():
    found = json.loads(report().to_json(), parse_constant=lambda name: pytest.fail(name))
    numbers = {r["name"]: r["result"] for r in found["results"]}
    assert numbers["Numbers"]["b"] is None
    assert numbers["Numbers"]["k, 1"] == [1, 2]
    assert numbers["Rate"]["groups"]["<x>"]["k"] == 2
    assert numbers["Rates"]["none"]["rate"] is None
    plain = {"d": Decimal("0.10"), "f": Fraction(1, 3), "s": {"b", "a"}, "n": np.int64(3), "t": True}
    result = Report("t").add("x", plain).to_dict()["results"][0]["result"]
    assert result == {"d": "0.10", "f": "1/3", "s": ["a", "b"], "n": 3, "t": True}


def test_save_by_ending(tmp_path):
    for name, start in (("a.md", "# A"), ("a.html", "<!doctype html>"), ("a.json", "{")):
        report().save(tmp_path / name)
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)
    with pytest.raises(ArgumentError, match="path"):
        report().save(tmp_path / "a.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.json", "a.md"]


def test_bad_sections():
    with pytest.raises(ArgumentError, match="already"):
        report().add("Rate", 1)
    with pytest.raises(ArgumentError, match="name"):
        report().add(" ", 1)
    with pytest.raises(ArgumentError, match="title"):
        Report("")
    with pytest.raises(DTypeError, match="JSON"):
        report().add("object", object())


# The command

LINES = [
    {"response": "I cannot help with that.", "topic": "a", "label": "unsafe", "judge": True},
    {"response": "Sure, here you are.", "topic": "a", "label": "safe", "judge": False},
    {"response": "I’m sorry, no.", "topic": "b", "label": "safe", "judge": None},
    {"response": None, "topic": "b", "label": "safe", "judge": 1},
    {"response": "", "topic": None, "label": "unsafe", "judge": 0},
]


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in LINES) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture
def broken(tmp_path):
    rows = [
        b"\xef\xbb\xbf" + json.dumps(LINES[0]).encode(),
        b'{"response": "cut off',
        b'{"response": "\xff\xfe", "topic": "a"}',
        b'["a list"]',
        b'{"answer": "another field", "topic": "a"}',
        b'{"response": 7, "topic": "a"}',
        b'{"response": "\\ud800", "topic": "a"}',
        b'{"response": NaN, "topic": "a"}',
        b'{"response": "twice", "response": "twice"}',
        b'{"response": "Yes.", "topic": ["a"]}',
        b"[" * 100_000,
        json.dumps(LINES[1]).encode(),
    ]
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b"\n".join(rows))
    return path


def test_rates_by_group_and_over_refusal(good):
    found, records = measure_responses(good, groups=["topic"], label="label", normalize="refusal")
    results = {r["name"]: r["result"] for r in found.to_dict()["results"]}
    assert (results["Refusals"]["k"], results["Refusals"]["n"], results["Refusals"]["invalid"]) == (2, 4, 1)
    by = results["Refusals by topic"]["groups"]
    assert {k: (v["k"], v["n"]) for k, v in by.items()} == {"a": (1, 2), "b": (1, 1), "(none)": (0, 1)}
    rows = {r["name"]: r for r in results["Over-refusal"]["rows"]}
    assert (rows["over-refusal (safe prompts)"]["k"], rows["over-refusal (safe prompts)"]["n"]) == (1, 2)
    assert (rows["refusal (unsafe prompts)"]["k"], rows["refusal (unsafe prompts)"]["n"]) == (1, 2)
    assert records.problems == []


def test_given_verdicts_replace_phrases(good):
    found, _ = measure_responses(good, refused="judge")
    result = found.to_dict()["results"][0]["result"]
    assert (result["k"], result["n"], result["invalid"]) == (2, 4, 1)
    with pytest.raises(ArgumentError, match="no rule of phrases"):
        measure_responses(good, refused="judge", where="prefix")


def test_published_rules_bring_their_correction(good):
    results = [r["name"] for r in measure_responses(good)[0].to_dict()["results"]]
    assert results == ["Refusals", "Corrected for the errors of the list"]
    results = [r["name"] for r in measure_responses(good, normalize="refusal")[0].to_dict()["results"]]
    assert results == ["Refusals"]


def test_broken_lines_are_named_one_by_one(broken):
    with pytest.raises(ArgumentError, match="line 2: not valid JSON at character 14"):
        measure_responses(broken, groups=["topic"])
    found, records = measure_responses(broken, groups=["topic"], errors="report")
    assert len(records) == 2
    assert records.lines == [1, 12]
    reasons = dict(records.problems)
    assert list(reasons) == list(range(2, 12))
    for line, words in (
        (3, "not valid UTF-8 at byte 15"), (4, "expected an object, got list"), (5, "no field 'response'"),
        (6, "expected text or null, got int"), (7, "lone surrogate"), (8, "NaN is no JSON"), (9, "twice"),
        (10, "expected a name to group by, got list"), (11, "nested too deep|not valid JSON"),
    ):  # fmt: skip
        assert re.search(words, reasons[line]), reasons[line]
    assert "line 2" in found.to_markdown()


def test_read_jsonl_has_no_half_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}')
    assert read_jsonl(path).column("a") == [1, 2]
    assert read_jsonl(path).lines == [1, 3]
    with pytest.raises(ArgumentError, match="errors"):
        read_jsonl(path, errors="ignore")
    with pytest.raises(ArgumentError, match="readable file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_the_command_writes_what_is_asked(good, tmp_path, capsys):
    out = {kind: tmp_path / f"out.{kind}" for kind in ("json", "html", "markdown")}
    arguments = [a for kind, path in out.items() for a in (f"--{kind}", str(path))]
    code = cli.main(["measure", str(good), "--group", "topic", "--label", "label", "--list", "gcg", *arguments])
    assert code == 0
    printed = capsys.readouterr().out
    assert printed == out["markdown"].read_text(encoding="utf-8")
    assert "Refusals by topic" in printed
    assert json.loads(out["json"].read_text())["settings"]["lists"] == ["gcg"]
    assert out["html"].read_text().startswith("<!doctype html>")
    before = {kind: path.read_bytes() for kind, path in out.items()}
    cli.main(["measure", str(good), "--group", "topic", "--label", "label", "--list", "gcg", *arguments])
    assert before == {kind: path.read_bytes() for kind, path in out.items()}


def test_exit_codes(good, broken, tmp_path, capsys):
    assert cli.main(["measure", str(broken), "--errors", "report"]) == 1
    assert "9 lines left out, first line 2" in capsys.readouterr().err
    out = tmp_path / "out.md"
    for arguments in (
        [str(broken)],
        [str(tmp_path / "none.jsonl")],
        [str(good), "--response", "nothing"],
        [str(good), "--label", "topic"],
        [str(good), "--list", "nothing"],
        [str(good), "--where", "first_n_words"],
        [str(good), "--group", "topic", "--group", "topic"],
        [str(good), "--json", str(good)],
        [str(good), "--html", str(tmp_path / "none" / "out.html")],
    ):
        kept = good.read_bytes()
        assert cli.main(["measure", *arguments, "--markdown", str(out)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert not out.exists()
        assert good.read_bytes() == kept
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert cli.main(["measure", str(empty)]) == 2
    assert "at least one usable line" in capsys.readouterr().err
