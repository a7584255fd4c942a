"""Latent Guard: the reference vector, a plain oracle, and harmfulness read off a decoder trained to refuse a topic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import abjure
from abjure import refuse


def oracle(h, high, low):
    def cos(a, b):
        return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))

    return np.array([np.mean([cos(s, p) - cos(s, n) for s, p, n in zip(x, high, low, strict=True)]) for x in h])


def test_the_belief_of_the_reference():
    guard = refuse.LatentGuard([[1, 0.5, 0]], [[-0.5, 1, 0.25]], [0])
    assert guard.score([[0.5, 1, -1]])[0] == pytest.approx(0.305327607018621, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("center", [None, "midpoint"])
def test_scores_equal_a_plain_oracle(dtype, center):
    rng = np.random.default_rng(0)
    h = torch.from_numpy(rng.standard_normal((20, 3, 16)) + 2).to(dtype)
    y = np.arange(20) % 2
    exact = h.double().numpy()
    high, low = exact[y == 1].mean(0), exact[y == 0].mean(0)
    guard = refuse.LatentGuard.fit(h, y, center=center)
    mid = (high + low) / 2 if center else 0
    np.testing.assert_allclose(guard.score(h), oracle(exact - mid, high - mid, low - mid), atol=1e-12)
    found = guard.beliefs(h[3])
    assert found.by_layer.shape == (1, 3)
    assert found.score[0] == pytest.approx(guard.score(h)[3])


def test_states_without_length_are_flagged_and_count_as_nothing():
    guard = refuse.LatentGuard([[1.0, 0], [0, 1]], [[0, 1.0], [1, 0]], [0, 1])
    found = guard.beliefs(np.array([[[0.0, 0], [0, 2]]]))
    assert found.zero.tolist() == [[True, False]]
    assert found.score[0] == pytest.approx(0.5)


def test_calibration_keeps_its_promise_and_save_gives_the_same_guard(tmp_path):
    rng = np.random.default_rng(0)
    h, y = rng.standard_normal((400, 2, 8)), np.arange(400) % 2
    h[y == 1] += 0.8
    guard = refuse.LatentGuard.fit(h[:100], y[:100], [3, 5], position=-1, site="post", center="midpoint")
    scores = guard.score(h[100:])
    harmless = scores[y[100:] == 0]
    threshold = guard.calibrate(harmless[:99], alpha=0.1)
    assert guard.threshold == threshold.gate
    assert guard.predict(harmless[:99]).sum() == 9  # rank ceil(100 · 0.9) of 99 is the last that passes
    assert guard.predict(scores[y[100:] == 1]).mean() > 0.5
    guard.save(tmp_path / "guard.safetensors")
    again = refuse.LatentGuard.load(tmp_path / "guard.safetensors")
    assert repr(again) == repr(guard)
    np.testing.assert_array_equal(again.score(h), guard.score(h))
    assert again.threshold == guard.threshold
    assert "cosine of the centroids" in guard._repr_html_()
    (tmp_path / "other").write_bytes(b"no")
    for path in (tmp_path / "other", tmp_path / "none"):
        with pytest.raises(abjure.ArgumentError, match="path"):
            refuse.LatentGuard.load(path)


@pytest.mark.effect
def test_harmfulness_is_read_where_the_topic_stands(trigger):
    """Held-out prompts of a decoder that refuses one topic; streamed scores equal those of stored states."""
    texts = trigger.train[0] + trigger.train[1]
    labels = [0] * len(trigger.train[0]) + [1] * len(trigger.train[1])
    contrasts = refuse.record_prompts(
        trigger.model, refuse.Prompts(trigger.tokenizer, texts), labels, positions="last_instruction"
    )
    guard = refuse.LatentGuard.from_contrasts(contrasts, center="midpoint")
    assert guard.layers == [0, 1, 2, 3]
    held = [refuse.Prompts(trigger.tokenizer, group) for group in trigger.held_out]
    scores = [guard.score_prompts(trigger.model, prompts) for prompts in held]
    assert (scores[1][:, None] > scores[0]).mean() > 0.9  # area under the curve
    states = []
    for prompt in held[1][:4]:
        with torch.no_grad(), refuse.recording(trigger.model, positions=[prompt.instruction_end]) as record:
            trigger.model(torch.tensor([prompt.ids]))
        states.append(torch.stack([record[layer][0, 0] for layer in guard.layers]))
    np.testing.assert_allclose(guard.score(torch.stack(states)), scores[1][:4], atol=1e-5)


def test_bad_input():
    one = np.eye(3)[None]
    with pytest.raises(abjure.ShapeError, match="positive"):
        refuse.LatentGuard(np.eye(3), np.ones((2, 3)), [0, 1, 2])
    with pytest.raises(abjure.ShapeError, match="2 layers"):
        refuse.LatentGuard(np.eye(3), 2 - np.eye(3), [0, 1])
    with pytest.raises(abjure.DegenerateError, match="same way at layer 7"):
        refuse.LatentGuard([[1.0, 0]], [[2.0, 0]], [7])
    with pytest.raises(abjure.DegenerateError, match="at layer 7"):
        refuse.LatentGuard([[1.0, 0]], [[1.0, 0]], [7], center="midpoint")
    with pytest.raises(abjure.NonFiniteError):
        refuse.LatentGuard([[np.nan, 0]], [[2.0, 0]], [7])
    with pytest.raises(abjure.ArgumentError, match="center"):
        refuse.LatentGuard([[1.0, 0]], [[0, 1.0]], [7], center="mean")
    with pytest.raises(abjure.DegenerateError, match="both classes"):
        refuse.LatentGuard.fit(np.concatenate([one, one]), [1, 1])
    with pytest.raises(abjure.ShapeError, match="y"):
        refuse.LatentGuard.fit(one, [1, 0])
    with pytest.raises(abjure.ArgumentError, match="0 or 1"):
        refuse.LatentGuard.fit(one, [2])
    guard = refuse.LatentGuard([[1.0, 0]], [[0, 1.0]], [7])
    with pytest.raises(abjure.ShapeError, match="h: expected"):
        guard.score(np.ones((2, 1, 3)))
    with pytest.raises(abjure.NonFiniteError, match="layer 7, prompt 1"):
        guard.score([[[1.0, 0]], [[np.inf, 0]]])
