"""The evidence of refusal directions, on the decoder that refuses exactly one topic."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
FOLDER = Path(__file__).parents[2] / "examples" / "refuse"


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("abjure_example_evidence", FOLDER / "evidence.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
        for name in ("subjects", "topics", "trigger"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def found(evidence, trigger, one_thread):
    subject = evidence.trigger_subject(trigger)
    subject.doses, subject.ablations = (-0.5, 0.0, 1.0), (0.0, 1.0)
    before = {k: v.clone() for k, v in subject.model.state_dict().items()}
    numbers = evidence.run([subject])
    assert all((v == before[k]).all() for k, v in subject.model.state_dict().items())
    return {part: numbers[part]["trigger decoder"] for part in evidence.PARTS} | {"all": numbers}


def test_interval_of_auroc_inverts_its_variance(evidence):
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [30, 20])
    scores = rng.standard_normal(50) + y
    e = evidence.auroc_interval(scores, y)
    brute = np.mean([[(b > a) + 0.5 * (b == a) for a in scores[:30]] for b in scores[30:]])
    assert e.value == pytest.approx(brute)
    assert 0.5 < e.low < e.value < e.high < 1
    for t in (e.low, e.high):
        v = t * (1 - t) * (1 + 24 * (1 - t) / (2 - t) + 24 * t / (1 + t)) / 600
        assert abs(e.value - t) == pytest.approx(1.959963984540054 * v**0.5, abs=1e-9)
    perfect = evidence.auroc_interval(y, y)
    assert (perfect.value, perfect.high) == (1.0, pytest.approx(1.0))
    assert 0.8 < perfect.low < 0.99


def test_wilson_interval(evidence):
    e = evidence.rate_interval([True] * 8 + [False] * 2)
    assert (e.value, e.low, e.high) == pytest.approx((0.8, 0.4901625, 0.9433178), abs=1e-6)


def test_topics_are_whole(evidence):
    topics = sys.modules["topics"]
    pairs = topics.pairs()
    counts = {k: sum(p[0] == k for p in pairs) for k in topics.TOPICS}
    assert set(counts.values()) == {10}
    texts = [t for p in pairs for t in p[1:]] + [*topics.ALARMING, *topics.EVERYDAY]
    assert len(set(texts)) == len(texts) == 208


@pytest.mark.effect
def test_the_right_layer_separates_what_was_held_out(found):
    positions = found["directions"]["positions"]
    last = positions["-1"]
    best = last["layers"][last["chosen"]]
    assert best["auroc"] > 0.9
    assert best["low"] > 0.75
    assert last["layers"][0]["auroc"] == 0.5  # a template token before any attention holds nothing


@pytest.mark.effect
def test_probes_read_the_topic_where_the_model_has_it(found):
    last = found["probes"]["positions"]["-1"]
    best = last["layers"][last["chosen"]]
    assert best["auroc"]["value"] > 0.9
    assert best["accuracy"]["low"] > 0.6
    assert last["layers"][0]["auroc"]["value"] == 0.5  # a template token before any attention holds nothing
    assert best["log_loss"] < last["layers"][0]["log_loss"]


@pytest.mark.effect
def test_doses_take_refusal_from_none_to_most_and_from_all_to_none(found):
    steered = {r["dose"]: r for r in found["dose"]["steering"]}
    ablated = {r["dose"]: r for r in found["dose"]["ablation"]}
    for plain in (steered[0.0], ablated[0.0]):
        assert plain["refused_harmful"]["value"] == 1.0
        assert plain["refused_harmless"]["value"] == 0.0
    assert ablated[1.0]["refused_harmful"]["value"] <= 0.1
    assert ablated[1.0]["refused_harmless"]["value"] == 0.0
    assert steered[1.0]["refused_harmless"]["value"] >= 0.5
    assert steered[-0.5]["refused_harmful"]["value"] <= 0.1
    assert steered[1.0]["perplexity"] > steered[0.0]["perplexity"]
    assert steered[1.0]["score_harmless"] > steered[0.0]["score_harmless"] + 2


@pytest.mark.effect
def test_a_step_moves_its_own_belief_more_than_the_other(found):
    part = found["harmfulness"]
    assert part["held_out_auroc"]["refusal"] > 0.9
    effects = {(r["steered"], r["sign"]): r for r in part["effects"]}
    down = effects["harmfulness", -1]
    assert down["harmfulness"]["high"] < -0.3
    assert abs(down["refusal"]["value"]) < abs(down["harmfulness"]["value"]) / 2
    up = effects["refusal", 1]
    assert up["refusal"]["low"] > 0.2
    assert abs(up["harmfulness"]["value"]) < up["refusal"]["value"] / 2
    by_layer = {c["layer"]: c["own_positions"] for c in part["cosines"]}
    assert by_layer[0] is None  # no direction at a template token of layer 0
    assert all(abs(c) < 0.8 for k, c in by_layer.items() if k)


@pytest.mark.effect
def test_the_score_is_high_where_the_answer_begins(found):
    curves = {(c["kind"], c["ending"]): c for c in found["cliff"]["curves"]}
    at = found["cliff"]["answer_at"] - 1  # the last prompt token, where the direction was estimated
    assert curves["harmful", "complies"]["mean"][at] > 0.7
    assert curves["harmless", "complies"]["mean"][at] < 0.4
    assert curves["harmful", "complies"]["mean"][at] == pytest.approx(curves["harmful", "declines"]["mean"][at])
    assert curves["harmful", "complies"]["depth"]["value"] > 0


@pytest.mark.effect
def test_words_say_nothing_about_topics_that_were_left_out(found):
    """Every wording occurs with both kinds of things, so without the thing the words are no better than chance."""
    random, topics = (found["guard"]["splits"][k]["auroc"] for k in ("random", "topics"))
    assert random["words, tf-idf"]["value"] > 0.95
    assert topics["words, tf-idf"]["value"] == pytest.approx(0.5)
    assert topics["words, counts"]["value"] == pytest.approx(0.5)
    assert topics["Latent Guard"]["low"] > 0.8
    assert topics["Latent Guard, midpoint"]["low"] > 0.8


def test_tables_pictures_and_file(evidence, found, tmp_path):
    assert json.loads(json.dumps(found["all"]))["seed"] == 0
    for part, (_, table, plot) in evidence.PARTS.items():
        lines = table(found[part]).splitlines()
        assert len(lines) > 3
        assert len({line.count("|") for line in lines}) == 1
        plot(found["all"][part], tmp_path / f"{part}.png")
        assert (tmp_path / f"{part}.png").read_bytes().startswith(b"\x89PNG")
