"""The example on invented facts, with its tiny model: what the losses do when a model is trained on them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.effect
EXAMPLE = Path(__file__).parents[2] / "examples" / "forget" / "facts.py"


@pytest.fixture(scope="module")
def facts():
    import sys

    spec = importlib.util.spec_from_file_location("facts_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def found(facts):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield facts.run(quick=True)
    torch.set_num_threads(threads)


def test_every_method_forgets_and_ascent_costs_the_most(found):
    taught, kept, curves = found["taught"], found["kept_only"], found["curves"]
    assert taught["forget_probability"] > 0.6 > 0.3 > kept["forget_probability"]
    assert kept["log10_quality"] == 0  # the reference against itself
    assert taught["log10_quality"] < -2
    end = {name: curve[-1] for name, curve in curves.items()}
    for name in curves:
        assert end[name]["forget_probability"] < 0.2 * taught["forget_probability"] + 0.02, name
        assert max(c["log10_quality"] for c in curves[name]) > taught["log10_quality"] + 1, name
    # Alone, all of them lose what was to be kept; the bounded losses more slowly than ascent.
    assert end["GA"]["utility"] < 0.25 * taught["utility"]
    assert end["NPO"]["utility"] > 1.3 * end["GA"]["utility"]
    assert end["SimNPO"]["utility"] > 1.3 * end["GA"]["utility"]
    assert end["NPO + retain"]["utility"] > 0.8 * taught["utility"]


def test_table_plot_and_file(facts, found, tmp_path):
    lines = facts.table(found).splitlines()
    assert len(lines) == 3 + len(facts.METHODS)
    assert "never" in lines[-1]
    facts.plot(found, tmp_path / "facts.png")
    assert (tmp_path / "facts.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(found))["facts"] == 24
