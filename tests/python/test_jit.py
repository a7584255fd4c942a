"""Lipschitz (JiT) unlearning: the published step in float64, what it leaves alone, and its effect."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import abjure
from abjure.forget import jit_


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3)
    ).to(dtype)


def state(model):
    return {n: v.clone() for n, v in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(v, b[n]) for n, v in a.items())


def published(model, batches, lr, noise_std, copies, seed):
    """The published loop in its own operations, with the noise of one generator."""
    model.eval()
    noise = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    constants = []
    for x in batches:
        out, loss = model(x), 0.0
        for _ in range(copies):
            other = (x + torch.randn(x.shape, generator=noise, dtype=x.dtype) * noise_std).clamp(x.min(), x.max())
            with torch.no_grad():
                out2 = model(other)
            step = torch.linalg.vector_norm((x - other).flatten(1), dim=1)
            loss = loss + (torch.linalg.vector_norm(out - out2, dim=1) / step).sum().abs()
        loss = loss / copies
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        constants.append(loss.item())
    return constants


def test_equals_the_published_loop():
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (5, 8, 1)]
    ours, theirs = network(), network()
    report = jit_(ours, batches, lr=0.01, noise_std=0.3, copies=4, seed=7, progress=False)
    expected = published(theirs, batches, 0.01, 0.3, 4, 7)
    assert report.constants == pytest.approx(expected, rel=1e-12)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert "3 steps" in str(report)


def test_modes_buffers_gradients_and_undo():
    model = network(dtype=torch.float32).train()
    model[1].eval()
    before = state(model)
    modes = [m.training for m in model.modules()]
    g = torch.Generator().manual_seed(1)
    batches = [(torch.randn(4, 6, generator=g), None) for _ in range(3)]
    report = jit_(model, batches, lr=0.01, copies=2, exclude="4.bias", progress=False)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    after = state(model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"0.weight", "0.bias", "1.weight", "1.bias", "4.weight"}
    again = network(dtype=torch.float32)
    again.load_state_dict(before)
    jit_(again, batches, lr=0.01, copies=2, exclude="4.bias", progress=False)
    assert equal(state(again), after)
    report.undo(model)
    assert equal(state(model), before)
    with pytest.raises(abjure.ArgumentError, match="undo"):
        jit_(model, batches, undo=False, progress=False).undo(model)
    with pytest.raises(abjure.ShapeError, match=r"'0.weight'"):
        report.undo(torch.nn.Sequential(torch.nn.Linear(7, 16), *model[1:]))


def test_samples_that_the_clamp_does_not_move_add_nothing():
    """A constant batch: noise is clamped away, 0/0 in the published form."""
    model = network(dtype=torch.float32)
    before = state(model)
    report = jit_(model, [torch.ones(3, 6)], lr=1.0, progress=False)
    assert report.constants == [0.0]
    assert equal(state(model), before)


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_an_error_between_batches_restores_the_model(error):
    model = network(dtype=torch.float32).train()
    before = state(model)
    middle = []

    def loader():
        yield torch.rand(4, 6)
        middle.append(state(model))
        raise error

    with pytest.raises(error):
        jit_(model, loader(), lr=0.1, progress=False)
    assert not equal(middle[0], before)
    assert equal(state(model), before)
    assert model.training


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"lr": 0.0}, abjure.ArgumentError, "lr"),
        ({"noise_std": float("inf")}, abjure.ArgumentError, "noise_std"),
        ({"copies": 0}, abjure.ArgumentError, "copies"),
        ({"loader": []}, abjure.DegenerateError, "loader"),
        ({"loader": [torch.ones(3, dtype=torch.long)]}, abjure.DTypeError, "int64"),
        ({"loader": ["x"]}, abjure.DTypeError, "str"),
        ({"loader": [torch.tensor([[0.0, np.nan, 0, 0, 0, 1]])]}, abjure.NonFiniteError, "batch 0"),
        ({"include": "z"}, abjure.ArgumentError, "include"),
        ({"model": torch.nn.ReLU()}, abjure.ArgumentError, "requires grad"),
        ({"model": 3}, abjure.DTypeError, "model"),
    ],
)
def test_bad_input(change, error, match):
    model = network(dtype=torch.float32)
    before = state(model)
    arguments = {"model": model, "loader": [torch.rand(2, 6)], "progress": False} | change
    with pytest.raises(error, match=match):
        jit_(**arguments)
    assert equal(state(model), before)


@pytest.mark.effect
def test_accuracy_on_the_forget_set_falls_more_than_on_the_rest():
    """scikit-learn's digits, class 3: the forget set alone makes the class go, the others stay."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 10))
        order = torch.Generator().manual_seed(0)
        for _ in range(25):
            for rows in torch.randperm(1300, generator=order).split(64):
                loss = functional.cross_entropy(model(x[rows]), y[rows])
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                with torch.no_grad():
                    for p, g in zip(model.parameters(), gradients, strict=True):
                        p -= 0.3 * g

        def accuracies():
            with torch.no_grad():
                right = (model(x[1300:]).argmax(1) == y[1300:]).float()
            return float(right[y[1300:] == 3].mean()), float(right[y[1300:] != 3].mean())

        before = accuracies()
        assert min(before) > 0.75
        flagged = x[:1300][y[:1300] == 3]
        report = jit_(model, flagged.split(32), lr=2e-3, noise_std=0.5, copies=10, progress=False)
        after = accuracies()
        assert after[0] < before[0] - 0.4
        assert after[1] > 0.8
        report.undo(model)
        assert accuracies() == before
    finally:
        torch.set_num_threads(threads)
