"""Choosing a direction, and conditional steering, on a small decoder that was trained to refuse one topic."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import abjure
from abjure import refuse


@pytest.fixture(scope="module")
def contrasts(trigger):
    texts = trigger.train[0] + trigger.train[1]
    labels = [0] * len(trigger.train[0]) + [1] * len(trigger.train[1])
    prompts = refuse.Prompts(trigger.tokenizer, texts)
    return refuse.record_prompts(
        trigger.model, prompts, labels, positions=["last_instruction", "post_instruction"], covariance=True
    )


@pytest.fixture(scope="module")
def held(trigger):
    return tuple(refuse.Prompts(trigger.tokenizer, texts[:8]) for texts in trigger.held_out)


@pytest.fixture(scope="module")
def selection(trigger, contrasts, held):
    return refuse.select_direction(
        trigger.model,
        contrasts.directions(),
        held[1],
        held[0],
        [trigger.refusal_token],
        min_induce=-20.0,
        skip_last=0.0,
    )


def test_scores_are_the_log_odds_of_the_refusal_token(trigger, held):
    token = trigger.refusal_token
    for compat, eps in ((None, 0.0), ("refusal_direction", 1e-8)):
        for size in (1, 8):
            found = refuse.refusal_scores(trigger.model, held[1], [token], compat=compat, batch_size=size)
            for i, prompt in enumerate(held[1]):
                with torch.no_grad():
                    p = trigger.model(torch.tensor([prompt.ids])).logits[0, -1].double().softmax(-1)
                rest = 1 - p[token] if compat else p.sum() - p[token]
                want = float((p[token] + eps).log() - (rest + eps).log())
                assert found[i] == pytest.approx(want, abs=2e-3 if compat is None else 1e-3)


def test_reference_scores():
    from abjure.refuse.select import _scores

    z = torch.tensor([[2, 0.5, -1, 0.25]], dtype=torch.float64)
    assert _scores(z, [0, 2], "refusal_direction")[0] == pytest.approx(0.972647909026317, abs=1e-12)
    assert _scores(z, [0, 2], None)[0] == pytest.approx(0.972647931694899, abs=1e-12)
    z = torch.tensor([[40, 0, -1, 0.25]], dtype=torch.float64)
    assert _scores(z, [0], "refusal_direction")[0] == pytest.approx(18.4206807539524, abs=1e-7)
    assert _scores(z, [0], None)[0] == pytest.approx(39.0247218039386, abs=1e-12)


def test_the_scores_of_a_candidate_are_what_its_hooks_do(trigger, contrasts, held, selection):
    candidate = selection.candidates[-1]
    direction = contrasts[candidate.layer, candidate.position].difference_in_means()
    token = [trigger.refusal_token]
    with refuse.ablating(trigger.model, direction):
        bypass = refuse.refusal_scores(trigger.model, held[1], token).mean()
    with refuse.steering(trigger.model, direction):
        induce = refuse.refusal_scores(trigger.model, held[0], token).mean()
    assert candidate.bypass == pytest.approx(bypass)
    assert candidate.induce == pytest.approx(induce)
    base = [refuse.refusal_scores(trigger.model, p, token).mean() for p in (held[1], held[0])]
    assert selection.baseline == pytest.approx(base)


@pytest.mark.effect
def test_the_selected_direction_mediates_refusal(trigger, contrasts, selection):
    """On held-out prompts, of which the model refuses all of the topic and no other."""
    model, (other, topic) = trigger.model, trigger.held_out
    direction = selection.direction
    assert selection.best.bypass < selection.baseline[0] - 3
    with refuse.ablating(model, direction):
        assert trigger.refusal_rate(topic) <= 0.1
        assert trigger.refusal_rate(other) == 0.0
    report = refuse.orthogonalize_model_(model, direction)
    try:
        assert trigger.refusal_rate(topic) <= 0.1
        assert trigger.refusal_rate(other) == 0.0
    finally:
        report.undo()
    with refuse.steering(model, contrasts[3, "last_instruction"].difference_in_means()):
        assert trigger.refusal_rate(other) >= 0.5
    assert (trigger.refusal_rate(other), trigger.refusal_rate(topic)) == (0.0, 1.0)


def test_thresholds_and_the_table(trigger, contrasts, held, selection):
    order = [c.bypass for c in selection.eligible]
    assert order == sorted(order)
    assert selection.best is selection.eligible[0]
    candidates = {k: contrasts[k].difference_in_means() for k in [(1, -1), (3, -1)]}
    strict = refuse.select_direction(
        trigger.model, candidates, held[1], held[0], [trigger.refusal_token], max_kl=-1.0, min_induce=99.0
    )
    assert [c.failed for c in strict.candidates] == [("kl", "induce"), ("layer", "kl", "induce")]
    with pytest.raises(abjure.DegenerateError, match="2 of 2 miss kl, 2 of 2 miss induce"):
        _ = strict.direction
    assert len(str(strict).splitlines()) == 3
    assert "Directions by layer" in strict._repr_html_()
    assert json.loads(json.dumps(strict.to_dict()))["candidates"][0]["layer"] == 1
    assert selection.plot().get_xlabel() == "layer"


def test_an_interrupted_search_goes_on_where_it_stopped(trigger, contrasts, held, tmp_path, monkeypatch):
    from abjure.refuse import select

    candidates = {k: contrasts[k].difference_in_means() for k in [(1, -1), (2, -1), (3, -1)]}
    arguments = (trigger.model, candidates, held[1], held[0], [trigger.refusal_token])
    path = tmp_path / "search.json"
    whole = refuse.select_direction(*arguments)
    real, calls = select.steering, []

    def stopping(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(select, "steering", stopping)
    with pytest.raises(KeyboardInterrupt):
        refuse.select_direction(*arguments, resume=path)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trigger.model.modules())
    assert len(json.loads(path.read_text())["scores"]) == 1
    again = refuse.select_direction(*arguments, resume=path)
    assert len(calls) == 4  # the first candidate was not measured again
    for a, b in zip(again.candidates, whole.candidates, strict=True):
        assert (a.bypass, a.induce, a.kl) == pytest.approx((b.bypass, b.induce, b.kl))
    with pytest.raises(abjure.ArgumentError, match="belongs to another"):
        refuse.select_direction(*arguments[:-1], [trigger.refusal_token + 1], resume=path)
    path.write_text("{}")
    with pytest.raises(abjure.ArgumentError, match="expected a file of select_direction"):
        refuse.select_direction(*arguments, resume=path)


def test_bad_candidates(trigger, contrasts, held):
    good = contrasts[1, -1].difference_in_means()
    token = [trigger.refusal_token]
    for candidates, error in [
        ({}, abjure.ArgumentError),
        ({(9, -1): good}, abjure.ArgumentError),
        ({(1, -1): good.vector}, abjure.DTypeError),
        ({(1, -1): refuse.Direction(good.vector, site="post")}, abjure.ArgumentError),
        ({(1, -1): good, (2, -1): refuse.Direction(np.ones(3))}, abjure.ShapeError),
    ]:
        with pytest.raises(error, match="directions"):
            refuse.select_direction(trigger.model, candidates, held[1], held[0], token)
    with pytest.raises(abjure.ArgumentError):
        refuse.select_direction(trigger.model, {(1, -1): good}, held[1], held[0], [])
    with pytest.raises(abjure.ArgumentError, match="compat"):
        refuse.refusal_scores(trigger.model, held[1], token, compat="other")


def test_condition_similarity_of_the_reference():
    h, c = [0.5, -1, 2, 0.25], [1, -2, 2, 0]
    assert refuse.condition_similarity(h, c, compat="cast") == pytest.approx(0.922143830083775, abs=1e-14)
    assert refuse.condition_similarity(h, c) == pytest.approx(0.940031983880843, abs=1e-14)
    mean = np.mean([h, [1.5, 0, 0, -0.25]], axis=0)
    assert refuse.condition_similarity(mean, c, compat="cast") == pytest.approx(0.908672736678, abs=1e-12)
    c, h = np.array([100.0] + [1.0] * 50), 1000 * np.array([1.0] + [-1.0] * 50)
    assert h @ c > 0
    assert refuse.condition_similarity(h, c, compat="cast") < 0
    assert refuse.condition_similarity(np.zeros(51), c) == 0
    assert refuse.condition_similarity(-h, c) == pytest.approx(-refuse.condition_similarity(h, c))


def test_condition_threshold_is_the_best_of_all_cuts():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(3, 20))
        s, y = rng.choice(np.linspace(-1, 1, 9), n), rng.integers(0, 2, n)
        if len(set(y)) < 2 or len(set(s)) < 2:
            continue
        found = refuse.condition_threshold(s, y)

        def f1(fired, y=y):
            return 2 * (fired & (y == 1)).sum() / (fired.sum() + y.sum())

        fired = s > found.threshold if found.fire_when == "sim>θ" else s < found.threshold
        assert f1(fired) == pytest.approx(found.f1)
        grid = np.linspace(-1.01, 1.01, 203)
        cuts = [t for t in grid if (s > t).any() and (s < t).any()]
        assert found.f1 >= max(max(f1(s > t), f1(s < t)) for t in cuts) - 1e-12
    for s, y, error in [
        ([0.1, 0.1], [0, 1], abjure.DegenerateError),
        ([0.1, 0.2], [1, 1], abjure.DegenerateError),
        ([0.1, np.nan], [0, 1], abjure.NonFiniteError),
        ([0.1, 0.2], [0, 2], abjure.ArgumentError),
        ([0.1, 0.2], [0], abjure.ShapeError),
    ]:
        with pytest.raises(error):
            refuse.condition_threshold(s, y)


@pytest.fixture(scope="module")
def condition(trigger):
    """The topic, read at the input of block 3 over the whole prompt; and the threshold on the training prompts."""
    texts = trigger.train[0] + trigger.train[1]
    labels = [0] * len(trigger.train[0]) + [1] * len(trigger.train[1])
    prompts = refuse.Prompts(trigger.tokenizer, texts)
    recorded = refuse.record_prompts(trigger.model, prompts, labels, [3], "all", covariance=True)
    direction = recorded[3, "all"].lda(shrinkage=0.1)
    means = []
    for prompt in prompts:
        with torch.no_grad(), refuse.recording(trigger.model, [3]) as record:
            trigger.model(torch.tensor([prompt.ids]))
        means.append(record[3][0].double().mean(0).numpy())
    return direction, refuse.condition_threshold(refuse.condition_similarity(means, direction), labels)


@pytest.mark.effect
def test_conditional_steering_acts_on_the_topic_alone(trigger, contrasts, condition):
    """Steering away from refusal where the prompt is of the topic: a mixed batch, padded on the left, with a cache."""
    direction, chosen = condition
    assert chosen.f1 > 0.9
    mixed = [t for pair in zip(*trigger.held_out, strict=True) for t in pair]
    away = contrasts[3, "last_instruction"].difference_in_means()
    options = {"condition_layer": 3, "layers": 3, "fire_when": chosen.fire_when, "scale": -1.0}
    plain = trigger.answers(mixed)
    with refuse.conditional_steering(trigger.model, away, direction, chosen.threshold, **options) as gate:
        steered = trigger.answers(mixed)
    hit = np.arange(len(mixed)) % 2 == 1
    assert (gate.fired == hit).mean() >= 0.8
    for i, fired in enumerate(gate.fired):
        if not fired:
            assert steered[i] == plain[i]
    refused = [a.startswith("i cannot") for a in steered]
    assert sum(refused[i] for i in np.flatnonzero(gate.fired & hit)) <= 0.2 * (gate.fired & hit).sum()
    assert trigger.answers(mixed) == plain


def test_the_condition_sees_the_same_in_batches_and_alone(trigger, condition, selection):
    direction, chosen = condition
    texts = [*trigger.held_out[0][:3], *trigger.held_out[1][:3]]
    for over in ("mean", "last"):
        with refuse.conditional_steering(
            trigger.model, selection.direction, direction, chosen.threshold, layers=3, scale=0.0, over=over
        ) as gate:
            trigger.answers(texts, tokens=2)
            together = gate.similarity
            alone = []
            for text in texts:
                trigger.answers([text], tokens=3)
                alone.append(gate.similarity[0])
        np.testing.assert_allclose(together, alone, atol=1e-5)


def test_two_conditions_keep_their_own_state(trigger, condition, selection):
    direction, _ = condition
    text = trigger.held_out[1][:1]
    never, always = (
        refuse.conditional_steering(trigger.model, selection.direction, direction, t, layers=3, fire_when="sim<θ")
        for t in (-1.0, 1.0)
    )
    with never as a, always as b:
        trigger.answers(text, tokens=2)
    assert not a.fired.any()
    assert b.fired.all()


def test_bad_conditions_leave_no_hooks(trigger, condition, selection):
    direction, _ = condition
    for kwargs, words in [
        ({"fire_when": "larger"}, "fire_when"),
        ({"threshold": 2.0}, "threshold"),
        ({"over": "sum"}, "over"),
        ({"condition_layer": 9}, "layers: expected"),
        ({"v": np.ones(3), "layers": 1}, "v: expected"),
        ({"condition": np.zeros(64)}, "condition"),
        ({"condition": np.ones(64), "condition_layer": None}, "condition_layer"),
    ]:
        given = {"v": selection.direction, "condition": direction, "threshold": 0.1, **kwargs}
        with pytest.raises(abjure.AbjureError, match=words), refuse.conditional_steering(trigger.model, **given):
            pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trigger.model.modules())
