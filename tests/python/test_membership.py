"""The entropy attack against what it must say on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abjure.errors import ArgumentError, NonFiniteError, ShapeError
from abjure.measure.membership import entropy_mia


def rows(confidence: float, n: int, classes: int = 10, spread: float = 0.0, seed: int = 0) -> np.ndarray:
    """Predictions that give the top class about ``confidence``."""
    top = np.clip(confidence + spread * np.random.default_rng(seed).standard_normal(n), 0.2, 0.999)
    p = np.repeat(((1 - top) / (classes - 1))[:, None], classes, axis=1)
    p[:, 0] = top
    return p


def test_tells_sure_members_from_unsure_outsiders():
    train, test = rows(0.97, 200, spread=0.01), rows(0.6, 100, spread=0.05, seed=1)
    assert entropy_mia(train, test, rows(0.97, 50)) == 1.0
    assert entropy_mia(train, test, rows(0.6, 50)) == 0.0
    mixed = np.concatenate([rows(0.97, 30), rows(0.6, 10)])
    assert entropy_mia(train, test, mixed) == 0.75


def test_agrees_with_the_plain_form():
    from sklearn.linear_model import LogisticRegression

    draw = np.random.default_rng(3)
    train, test, forget = (draw.dirichlet(np.full(5, a), size=n) for a, n in ((0.2, 300), (0.6, 90), (0.4, 70)))

    def entropy(p):
        return np.array([-sum(v * np.log(v) for v in row if v > 0) for row in p])[:, None]

    x = np.concatenate([entropy(train), entropy(test)])
    y = np.array([1] * 300 + [0] * 90)
    expected = LogisticRegression(class_weight="balanced").fit(x, y).predict(entropy(forget)).mean()
    assert entropy_mia(train, test, forget) == expected
    assert 0 < expected < 1


def test_certain_predictions_have_entropy_0():
    sure = np.eye(4)
    with np.errstate(all="raise"):
        assert entropy_mia(sure, rows(0.5, 20, 4), sure) == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_takes_tensors_of_every_dtype_even_with_a_gradient(dtype):
    train, test = rows(0.97, 50, spread=0.01), rows(0.5, 50, spread=0.05, seed=1)
    tensors = [torch.from_numpy(p).to(dtype).requires_grad_() for p in (train, test, train)]
    assert entropy_mia(*tensors) == 1.0


@given(st.permutations(range(12)))
def test_order_of_rows_does_not_matter(order):
    train, test, forget = (rows(c, 12, 3, 0.1, s) for c, s in ((0.9, 0), (0.6, 1), (0.75, 2)))
    assert entropy_mia(train, test, forget[order]) == entropy_mia(train, test, forget)


def test_bad_input_names_the_argument():
    good = rows(0.9, 5)
    bad = good.copy()
    bad[2, 1] = np.nan
    with pytest.raises(ShapeError, match=r"test: expected probabilities of shape \(n, classes\), got \(10,\)"):
        entropy_mia(good, good[0], good)
    with pytest.raises(ShapeError, match=r"forget: .*got \(0, 10\)"):
        entropy_mia(good, good, good[:0])
    with pytest.raises(ShapeError, match="expected one number of classes, got 10, 10, 4"):
        entropy_mia(good, good, rows(0.9, 5, 4))
    with pytest.raises(NonFiniteError, match="retain: expected finite"):
        entropy_mia(bad, good, good)
    with pytest.raises(ArgumentError, match="test: expected rows of probabilities that sum to 1"):
        entropy_mia(good, 3 * good, good)
    with pytest.raises(ArgumentError, match="retain: expected rows of probabilities"):
        entropy_mia(good * np.array([-1, *[3] * 9]), good, good)
