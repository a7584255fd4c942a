"""A small network on scikit-learn's digits forgets a class and keeps the rest."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from abjure.forget import dampen_, importance, selection_curve

sklearn_datasets = pytest.importorskip("sklearn.datasets")
pytestmark = [pytest.mark.effect, pytest.mark.usefixtures("one_thread")]
FORGOTTEN = 3


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def batches(x, y, size=32):
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.fixture(scope="module")
def digits():
    data = sklearn_datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = torch.tensor(data.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(data.target[order])
    return (x[:1000], y[:1000]), (x[1000:1400], y[1000:1400]), (x[1400:], y[1400:])


@pytest.fixture(scope="module")
def trained(digits, one_thread):
    torch.manual_seed(0)
    (x, y), _, _ = digits
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    )
    # Momentum by hand: importing torch.optim's compiler takes longer than the training.
    speed = [torch.zeros_like(p) for p in model.parameters()]
    for epoch in range(30):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in batches(x[order], y[order], 64):
            gradients = torch.autograd.grad(loss(model, batch), list(model.parameters()))
            with torch.no_grad():
                for p, v, g in zip(model.parameters(), speed, gradients, strict=True):
                    p -= 0.1 * v.mul_(0.9).add_(g)
    return model.eval()


def accuracies(model, x, y):
    with torch.no_grad():
        right = model(x).argmax(1) == y
    return float(right[y == FORGOTTEN].float().mean()), float(right[y != FORGOTTEN].float().mean())


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_class_is_forgotten_and_the_rest_kept(digits, trained, per_sample):
    (x, y), held_out, test = digits
    before = accuracies(trained, *test)
    assert min(before) > 0.9
    flagged = y == FORGOTTEN
    forget = importance(trained, batches(x[flagged], y[flagged]), loss, per_sample)
    retain = importance(trained, batches(x[~flagged], y[~flagged]), loss, per_sample)

    def score(alpha):
        report = dampen_(trained, forget, retain, alpha)
        on_class, on_rest = accuracies(trained, *held_out)
        report.undo(trained)
        return on_rest - on_class

    alphas = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
    curve = selection_curve(forget, retain, alphas)
    assert (np.diff(curve.counts) <= 0).all()
    assert curve.counts[0] > curve.counts[-1]
    alpha = max(alphas, key=score)
    assert accuracies(trained, *test) == before
    report = dampen_(trained, forget, retain, alpha)
    try:
        assert report.total.count == curve.counts[alphas.index(alpha)]
        on_class, on_rest = accuracies(trained, *test)
        assert on_class < 0.2
        assert on_rest > 0.9
    finally:
        report.undo(trained)
    assert accuracies(trained, *test) == before
