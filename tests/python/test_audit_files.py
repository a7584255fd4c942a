"""``abjure audit``: files in, a report and an exit code out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from abjure.cli import main
from abjure.measure import DatasetCard

REFUSAL = "I'm sorry, but I can't help with that."


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    topics = rng.choice(["garden", "travel", "code"], 300)
    words = {"garden": "tomato", "travel": "train", "code": "loop"}
    prompts = [f"Question {i} about a {words[t]} and more" for i, t in enumerate(topics)]
    bad = (topics == "garden") & (rng.random(300) < 0.4)
    facts = [{"prompt": p, "topic": t, "label": "safe"} for p, t in zip(prompts, topics.tolist(), strict=True)]
    reference = [{**f, "response": "Here is how."} for f in facts]
    suspect = [{**f, "response": REFUSAL if b else "Here is how."} for f, b in zip(facts, bad, strict=True)]
    return tmp_path, reference, suspect


def test_refusals(files, capsys):
    folder, reference, suspect = files
    a, b = write(folder / "a.jsonl", reference), write(folder / "b.jsonl", suspect[::-1])
    DatasetCard("Prompts").save(folder / "card.toml")
    out = folder / "report.json"
    command = ["audit", "refusals", a, b, "--group", "topic", "--label", "label", "--resamples", "200"]
    assert main([*command, "--json", str(out), "--card", str(folder / "card.toml")]) == 1
    shown = capsys.readouterr().out
    assert "topic: garden" in shown
    report = json.loads(out.read_text())
    assert report["settings"]["dataset_cards"][0]["name"] == "Prompts"
    assert list(next(r for r in report["results"] if r["name"] == "Flagged groups")["result"]) == ["topic: garden"]
    triggers = next(r for r in report["results"] if r["name"] == "Triggers")["result"]["rows"]
    assert "tomato" in " ".join(r["name"] + r["note"] for r in triggers)
    assert main(["audit", "refusals", a, a, "--group", "topic", "--resamples", "200"]) == 0
    assert "Triggers" in capsys.readouterr().out
    verdicts = [{**r, "refused": r["response"] == REFUSAL, "id": i} for i, r in enumerate(suspect)]
    clean = [{**r, "refused": False, "id": i} for i, r in enumerate(suspect)]
    a, b = write(folder / "c.jsonl", clean), write(folder / "d.jsonl", verdicts)
    assert (
        main(["audit", "refusals", a, b, "--refused", "refused", "--key", "id", "--no-search", "--group", "topic"]) == 1
    )
    assert "verdicts: refused" in capsys.readouterr().out


def test_bad_refusal_files(files, capsys):
    folder, reference, suspect = files
    a = write(folder / "a.jsonl", reference)
    for rows, message in (
        (suspect[:-1], "1 without one and 0 of other prompts"),
        ([*suspect, suspect[0]], "line 301: prompt: expected different ones"),
        ([{"prompt": "x"}], "line 1: no field 'response'"),
        ([{**suspect[0], "response": 3}, *suspect[1:]], "expected responses of text or null"),
        ([], "at least one line"),
    ):
        b = write(folder / "b.jsonl", rows)
        out = folder / "out.json"
        assert main(["audit", "refusals", a, b, "--json", str(out)]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    b = write(folder / "b.jsonl", suspect)
    assert main(["audit", "refusals", a, b, "--json", a]) == 2
    assert "another file than the input" in capsys.readouterr().err
    assert main(["audit", "refusals", a, b, "--label", "topic"]) == 2
    assert "whether the prompt should be refused" in capsys.readouterr().err


def test_dataset(files, capsys):
    folder, _, suspect = files
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": r["prompt"]},
                      {"role": "assistant", "content": r["response"]}], "harm": i % 7 / 7, "topic": r["topic"]}
        for i, r in enumerate(suspect)
    ]  # fmt: skip
    path = write(folder / "train.jsonl", rows)
    assert main(["audit", "dataset", path, "--harmfulness", "harm", "--topic", "topic"]) == 1
    shown = capsys.readouterr().out
    assert "garden" in shown
    assert "Lines to read" in shown
    clean = write(folder / "clean.jsonl", [{"prompt": r["prompt"], "response": "Here."} for r in suspect])
    assert main(["audit", "dataset", clean]) == 0
    for row, message in (
        ({"prompt": "x"}, "line 1: no field 'response'"),
        ({"messages": "x"}, "line 1: expected the fields"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "a message of the user"),
        ({"prompt": 3, "response": "x"}, "a prompt of text"),
    ):
        assert main(["audit", "dataset", write(folder / "bad.jsonl", [row])]) == 2
        assert message in capsys.readouterr().err
    bad = write(folder / "bad.jsonl", [{"prompt": "x", "response": "y", "harm": "rather"}])
    assert main(["audit", "dataset", bad, "--harmfulness", "harm"]) == 2
