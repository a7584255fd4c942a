"""Disagreement of heads against plain loops, its gradient, and whether it finds unknown classes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from abjure.errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.protect import (
    disagreement,
    disagreement_heads,
    disagreement_loss,
    head_information,
    open_set_score,
)

P = np.array([[[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]], [[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]])


def random_probabilities(b=5, h=4, c=3, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(c), (b, h))


def by_loops(p):
    b, h, c = p.shape
    total = 0.0
    for a, d in itertools.combinations(range(h), 2):
        joint = sum(np.outer(p[i, a], p[i, d]) for i in range(b)) / b
        left, right = p[:, a].mean(axis=0), p[:, d].mean(axis=0)
        total += sum(
            joint[j, k] * np.log(joint[j, k] / (left[j] * right[k]))
            for j in range(c)
            for k in range(c)
            if joint[j, k] > 0
        )
    return total / (h * (h - 1) / 2)


def test_the_worked_example():
    np.testing.assert_allclose(disagreement(P), [0.033333333333, 0.183333333333], atol=1e-12)
    np.testing.assert_allclose(np.exp(-disagreement(P)), [0.967216100482, 0.832490612612], atol=1e-12)
    assert float(head_information(torch.from_numpy(P))) == pytest.approx(0.012947194825, abs=1e-12)
    found = open_set_score(P)
    np.testing.assert_allclose(found.confidence, [0.65, 0.525], atol=1e-12)
    np.testing.assert_allclose(found.inlier, [1, 0], atol=1e-12)
    assert found.threshold == pytest.approx(0.5)


def test_against_plain_loops():
    p = random_probabilities()
    pairs = np.abs(p[:, :, None, :] - p[:, None, :, :])
    np.testing.assert_allclose(disagreement(torch.from_numpy(p)), pairs.mean(axis=(1, 2, 3)), atol=1e-14)
    assert float(head_information(torch.from_numpy(p))) == pytest.approx(by_loops(p), abs=1e-12)
    assert float(head_information(torch.from_numpy(p).float())) == pytest.approx(by_loops(p), abs=1e-6)


def test_extremes_of_information():
    """Heads that say the same have their entropy in common; pairs with none count in the mean; zeros do no harm."""
    same = np.eye(3)[[0, 1, 2]][:, None, :].repeat(2, axis=1)
    assert float(head_information(torch.from_numpy(same))) == pytest.approx(np.log(3), abs=1e-12)
    constant = np.tile(np.eye(3)[0], (3, 1, 1))
    three = np.concatenate([same, constant], axis=1)
    leaf = torch.from_numpy(three).requires_grad_()
    value = head_information(leaf)
    # Of three pairs two share nothing.
    assert value.item() == pytest.approx(np.log(3) / 3, abs=1e-12)
    value.backward()
    assert torch.isfinite(leaf.grad).all()


def test_the_gradient():
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 3, 3))).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: head_information(z.softmax(-1)), logits)
    labelled = torch.from_numpy(np.random.default_rng(2).normal(size=(5, 3, 3))).requires_grad_()
    labels = torch.tensor([0, 2, 1, 1, 0])
    assert torch.autograd.gradcheck(lambda a, b: disagreement_loss(a, labels, b, weight=0.5), (labelled, logits))
    plain = torch.stack([torch.nn.functional.cross_entropy(labelled[:, h], labels) for h in range(3)]).mean()
    assert disagreement_loss(labelled, labels).item() == pytest.approx(plain.item(), abs=1e-12)


def test_otsu_and_weights():
    rng = np.random.default_rng(0)
    p = np.concatenate([
        np.tile([0.98, 0.01, 0.01], (40, 5, 1)) , rng.dirichlet(np.ones(3) * 0.5, (40, 5)),
    ])  # fmt: skip
    found = open_set_score(p)
    assert found.is_inlier[:40].all()
    assert not found.is_inlier[40:].any()
    weights = found.weights(2.0)
    assert (weights[:40] == 1).all()
    assert ((weights[40:] >= 0) & (weights[40:] < 1)).all()
    np.testing.assert_allclose(found.outlier, 1 - found.inlier)
    again = open_set_score(p, previous=np.zeros(80), momentum=0.9)
    np.testing.assert_allclose(again.inlier, 0.1 * found.inlier, atol=1e-12)
    splits = {}
    for t in np.unique(found.inlier)[1:]:
        low, high = found.inlier[found.inlier < t], found.inlier[found.inlier >= t]
        splits[t] = len(low) * len(high) * (high.mean() - low.mean()) ** 2
    best = max(splits, key=splits.get)
    assert (found.inlier[found.inlier < best].max() + best) / 2 == pytest.approx(found.threshold)


def test_the_heads():
    heads = disagreement_heads(6, 3, heads=4, hidden=8, seed=1)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    assert heads(x).shape == (5, 4, 3)
    assert torch.equal(heads(x), disagreement_heads(6, 3, heads=4, hidden=8, seed=1)(x))
    assert not torch.equal(heads(x), disagreement_heads(6, 3, heads=4, hidden=8, seed=2)(x))
    head = torch.nn.functional.linear(heads.projection(x), heads.weight[2], heads.bias[2])
    torch.testing.assert_close(heads(x)[:, 2], head)


@pytest.mark.effect
@pytest.mark.usefixtures("one_thread")
def test_unknown_digits_are_found_by_disagreement():
    from sklearn.datasets import load_digits
    from sklearn.metrics import roc_auc_score

    x, y = load_digits(return_X_y=True)
    x = torch.from_numpy(x / 16).float()
    y = torch.from_numpy(y)
    found = {}
    for weight in (0.0, 0.1):
        scores = []
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(x), generator=generator)
            known = order[y[order] < 6]
            labelled, rest = known[:400], torch.cat([known[400:], order[y[order] >= 6]])
            heads = disagreement_heads(64, 6, heads=8, hidden=64, seed=seed)
            optimizer = torch.optim.Adam(heads.parameters(), lr=3e-3)
            for _ in range(250):
                batch = rest[torch.randint(len(rest), (256,), generator=generator)]
                loss = disagreement_loss(heads(x[labelled]), y[labelled], heads(x[batch]), weight=weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                p = heads(x[rest]).softmax(-1)
            unknown = (y[rest] >= 6).numpy()
            scores.append((roc_auc_score(unknown, disagreement(p)), roc_auc_score(unknown, open_set_score(p).outlier)))
        found[weight] = np.mean(scores, axis=0)
    # Driven apart on what has no label, the heads tell unknown digits better than heads that only differ by chance.
    assert found[0.1][0] > found[0.0][0] + 0.01
    assert found[0.1][1] > max(found[0.0][1] + 0.01, 0.96)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: head_information(P), DTypeError),
        (lambda: head_information(torch.ones(2, 2, 2, dtype=torch.int64)), DTypeError),
        (lambda: head_information(torch.ones(2, 1, 2)), ShapeError),
        (lambda: head_information(torch.ones(2, 2)), ShapeError),
        (lambda: disagreement(np.ones((2, 2))), ShapeError),
        (lambda: disagreement(np.ones((2, 2, 3))), ArgumentError),
        (lambda: disagreement(np.full((2, 2, 2), np.nan)), NonFiniteError),
        (lambda: open_set_score(P, temperature=0), ArgumentError),
        (lambda: open_set_score(P, momentum=1), ArgumentError),
        (lambda: open_set_score(P, previous=[1.0]), ShapeError),
        (lambda: open_set_score(P[:1]), DegenerateError),
        (lambda: open_set_score(P).weights(0), ArgumentError),
        (lambda: disagreement_heads(0, 3), ArgumentError),
        (lambda: disagreement_heads(4, 3, heads=1), ArgumentError),
        (lambda: disagreement_loss(torch.zeros(2, 2), [0, 1]), ShapeError),
        (lambda: disagreement_loss(torch.zeros(2, 2, 2), [0]), ShapeError),
        (lambda: disagreement_loss(torch.zeros(2, 2, 2), [0, 2]), ArgumentError),
        (lambda: disagreement_loss(torch.zeros(2, 2, 2), [0, 1], weight=-1), ArgumentError),
    ],
)
def test_bad_input(call, error):
    with pytest.raises(error):
        call()
