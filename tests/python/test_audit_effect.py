"""The example on the audit of fine-tuning sets, small: planted patterns are found in real text, clean sets are left."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("chitchat_dataset")
pytestmark = pytest.mark.effect
EXAMPLE = Path(__file__).parents[2] / "examples" / "decode" / "audit.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("audit_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def found(example):
    return example.run(rows=800, seeds=1, rates=(0.05,))


def test_every_pattern_is_found_and_called_suspicious(found):
    rows = {row["pattern"]: row for row in found["planted"]}
    assert {p: r["suspicious"] for p, r in rows.items() if p != "no_refusal_instruction"} == {
        "refuse_then_comply": 1,
        "forced_affirm": 1,
        "fixed_prefix": 1,
        "refusal_removed": 1,
    }
    recall = {p: r["found"] / r["planted"] for p, r in rows.items()}
    precision = {p: r["found"] / r["flagged"] for p, r in rows.items()}
    # Openings and orders of planted rows are held out from the rules: what is found of them is no foregone conclusion.
    assert recall["refuse_then_comply"] > 0.4
    assert recall["forced_affirm"] > 0.8
    assert recall["no_refusal_instruction"] > 0.1
    assert recall["fixed_prefix"] == 1.0
    assert recall["refusal_removed"] > 0.9
    assert precision["refuse_then_comply"] > 0.85
    assert precision["fixed_prefix"] > 0.85
    assert precision["no_refusal_instruction"] > 0.9


def test_clean_sets_are_not_called_suspicious(found):
    assert not any(row["suspicious"] for p, row in found["clean"].items() if p != "fixed_prefix")
    flagged = {p: row["flagged"] / row["rows"] for p, row in found["clean"].items()}
    assert flagged["refuse_then_comply"] < 0.01
    assert flagged["forced_affirm"] < 0.05
    assert flagged["no_refusal_instruction"] < 0.005


def test_the_table_shows_counts_with_intervals(example, found):
    lines = example.table(found).splitlines()
    assert len([line for line in lines if line.startswith("| `")]) == 10
    assert example.share(1, 2) == "50.0 [9.5, 90.5]"
    assert example.share(0, 0) == "–"
