"""Relearn time on a model whose steps can be counted by hand, and on a network that knows more than it says."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from abjure.errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError
from abjure.forget import Relearning, relearn_time

pytestmark = pytest.mark.usefixtures("one_thread")


class Point(nn.Module):
    """Loss theta**2 / 2 per batch: a step of rate r multiplies theta by 1 - r."""

    def __init__(self, start):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(float(start)))


def square(model, batch):
    return model.theta**2 / 2


def run(starts, **more):
    models = {name: Point(v) for name, v in starts.items()}
    return relearn_time(models, [torch.zeros(1)], square, **{"target": 0.5, "lr": 0.5, **more})


def test_steps_ratio_and_censoring_by_hand():
    # theta <= 1 is the goal: 8 -> 4 -> 2 -> 1 takes 3 steps, 64 takes 6.
    found = run({"unlearned": 8, "retrained": 64, "there": 0.5})
    assert found.steps == {"unlearned": [3], "retrained": [6], "there": [0]}
    assert found.losses["unlearned"] == [[32, 8, 2, 0.5]]
    assert found.ratio("unlearned") == (0.5, "=")
    at, alive = found.survival("unlearned")
    assert alive[:5].tolist() == [1, 1, 1, 0, 0]
    assert len(at) == 101
    capped = run({"unlearned": 8, "retrained": 64}, max_steps=5)
    assert capped.steps["retrained"] == [None]
    assert capped.ratio("unlearned") == (3 / 5, "<=")
    assert "<= 0.6" in str(capped)
    assert "&gt; 5" in capped._repr_html_()
    assert run({"unlearned": 64, "retrained": 8}, max_steps=5).ratio("unlearned") == (5 / 3, ">=")
    assert run({"unlearned": 64, "retrained": 64}, max_steps=5).ratio("unlearned") == (None, "?")
    assert run({"unlearned": 4, "retrained": 0}).ratio("unlearned") == (3, "=")
    assert run({"unlearned": 8, "retrained": 64}, check_every=2).steps == {"unlearned": [4], "retrained": [6]}
    assert run({"a": 8}).reference is None
    assert json.loads(found.to_json())["steps"]["unlearned"] == [3]
    assert len(capped.plot()[0].lines) == 2


def test_medians_count_censored_runs_as_later_than_all_others():
    def median(steps):
        return Relearning({"a": steps}, {"a": []}, 0.0, 9, 1, None).median("a")

    assert median([3, None, 1]) == 3
    assert median([3, None]) is None
    assert median([None, 5, 3, None]) is None
    assert median([2, 4, None, 3]) == 3.5


def test_the_target_is_the_original_loss_with_a_margin_and_models_stay():
    models = {"unlearned": Point(8).train()}
    original = Point(1)
    found = relearn_time(models, [torch.zeros(1)], square, original=original, margin=0.1, lr=0.5)
    assert found.target == pytest.approx(0.55)
    assert models["unlearned"].theta.item() == 8
    assert models["unlearned"].training
    adam = relearn_time(models, [torch.zeros(1)], square, target=0.6, optimizer=lambda p: torch.optim.Adam(p, lr=1.0))
    assert adam.steps["unlearned"] == [8]  # steps of at most 1, smaller as the gradient falls


def test_batches_weigh_by_their_size():
    found = relearn_time(
        {"a": Point(0)}, [(torch.zeros(3), 1.0), (torch.zeros(1), 5.0)], lambda m, b: m.theta + b[1], target=9.0
    )
    assert found.losses["a"] == [[2.0]]


def test_bad_input():
    with pytest.raises(ArgumentError, match="models, seeds: expected at least one"):
        run({})
    with pytest.raises(ArgumentError, match="original, target: expected one of the two"):
        run({"a": 1}, target=None)
    with pytest.raises(ArgumentError, match="max_steps: expected an integer of 1 or more, got 0"):
        run({"a": 1}, max_steps=0)
    with pytest.raises(ArgumentError, match="lr, margin"):
        run({"a": 1}, lr=0)
    with pytest.raises(DegenerateError, match="forget: expected at least one batch"):
        relearn_time({"a": Point(1)}, [], square, target=1.0)
    with pytest.raises(DTypeError, match="models: 'a': expected a torch module, got int"):
        relearn_time({"a": 1}, [torch.zeros(1)], square, target=1.0)
    with pytest.raises(NonFiniteError, match="loss: 'a', step 0: expected finite losses"):
        run({"a": float("nan")})
    with pytest.raises(ArgumentError, match="target: expected a finite loss"):
        run({"a": 1}, target=float("inf"))


@pytest.mark.effect
def test_what_was_pushed_down_comes_back_sooner_than_what_was_never_learnt():
    """Wrong labels memorised by a network and then suppressed by gradient ascent; a retrained one never saw them."""
    from abjure.demo import digits

    with digits.one_thread():
        x, y = digits.digits()
        x, y = x[:300], y[:300].clone()
        noise = torch.arange(300) < 30
        y[noise] = (y[noise] + 1 + torch.arange(30) % 9) % 10
        original = digits.train(x, y, 0, epochs=80)
        assert digits.accuracy(original, x[noise], y[noise]) > 0.9
        retrained = digits.train(x[~noise], y[~noise], 1, epochs=12)
        pushed = copy.deepcopy(original)
        ascent = torch.optim.SGD(pushed.parameters(), lr=0.01)
        while digits.accuracy(pushed, x[noise], y[noise]) > 0.3:
            ascent.zero_grad()
            (-digits.loss(pushed, (x[noise], y[noise]))).backward()
            ascent.step()
        found = relearn_time(
            {"pushed": pushed, "retrained": retrained},
            digits.batches(x[noise], y[noise]),
            digits.loss,
            target=0.5,
            optimizer=lambda p: torch.optim.Adam(p, lr=1e-3),
            max_steps=60,
            seeds=(0, 1),
        )
    value, _ = found.ratio("pushed")
    print(found)
    assert value is not None
    assert value < 0.6
    assert np.diff(found.survival("pushed")[1]).max() <= 0
