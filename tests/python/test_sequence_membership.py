"""Membership inference on sequences, against worked values, scikit-learn and plain f64 forms."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from abjure import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from abjure.forget import sequence_logprobs
from abjure.measure import sequence_membership as mia

LP = [-0.1, -5, -0.3, -2, -9, -0.01, -1]


def test_worked_scores():
    assert mia.min_k_score([LP], 0.4)[0] == 7.0
    assert mia.min_k_score([LP], 0.2)[0] == 9.0
    assert mia.min_k_score([LP], 1.0)[0] == pytest.approx(-np.mean(LP))
    assert mia.min_k_score([[-1.0, -2, -3, -4, -5]], 0.2)[0] == 5.0
    assert mia.loss_score([LP, [-1.0]]).tolist() == pytest.approx([-np.mean(LP), 1.0])
    assert mia.zlib_score([LP], ["aaaa bbbb"])[0] == pytest.approx(-np.mean(LP) / len(zlib.compress(b"aaaa bbbb")))
    assert mia.reference_score([LP], [[-1.0]])[0] == pytest.approx(-np.mean(LP) - 1)
    assert mia.priv_leak(0.981, 0.5) == pytest.approx(-96.2)


def test_scores_from_logits():
    g = torch.Generator().manual_seed(0)
    z = torch.randn((3, 7, 40), generator=g, dtype=torch.float64) * 3
    labels = torch.randint(0, 40, (3, 7), generator=g)
    labels[1, :4] = -100
    log_p = torch.log_softmax(z, -1)[:, :-1]
    wanted, plus = [], []
    for b in range(3):
        kept = labels[b, 1:] != -100
        lp = log_p[b][kept].gather(-1, labels[b, 1:][kept][:, None])[:, 0]
        p = log_p[b][kept].exp()
        mu = (p * log_p[b][kept]).sum(-1)
        sigma = ((p * log_p[b][kept] ** 2).sum(-1) - mu**2).sqrt()
        wanted.append(-float(lp.mean()))
        plus.append(((lp - mu) / sigma).numpy())
    np.testing.assert_allclose(mia.loss_score(sequence_logprobs(z, labels)), wanted, rtol=1e-12)
    found = mia.standardized_logprobs(z, labels)
    for ours, theirs in zip(found, plus, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    scores = mia.min_k_plus_plus_score(found, 0.4)
    np.testing.assert_allclose(scores[0], -np.sort(plus[0])[:2].mean())
    np.testing.assert_allclose(mia.standardized_logprobs(z.bfloat16(), labels)[0], plus[0], atol=0.05)
    z[0, 0, 3] = -math.inf  # a forbidden token is nothing to the moments
    labels[0, 1] = 4
    assert np.isfinite(mia.standardized_logprobs(z, labels)[0]).all()


def test_auc_and_rate_equal_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    for n, m in ((50, 70), (7, 300), (200, 100)):
        low, high = rng.normal(size=n).round(1), rng.normal(size=m).round(1) + 0.5
        truth, score = np.repeat([1, 0], [n, m]), -np.concatenate([low, high])
        assert mia.auc(low, high) == pytest.approx(roc_auc_score(truth, score), rel=1e-12)
        fpr, tpr, _ = roc_curve(truth, score, drop_intermediate=False)
        for limit in (0.01, 0.05, 0.3):
            assert mia.tpr_at_fpr(low, high, limit) == pytest.approx(tpr[fpr <= limit].max())
    assert mia.auc([1.0, 2.0], [3.0, 4.0]) == 1
    assert mia.auc([1.0], [1.0]) == 0.5


def test_report():
    rng = np.random.default_rng(1)
    low, high = rng.normal(size=150), rng.normal(size=200) + 1
    found = mia.sequence_mia(low, high, "loss", resamples=400)
    exact = 0.5 * (1 + math.erf(1 / 2))  # P(N(0, 1) < N(1, 1))
    assert found.auc.low < exact < found.auc.high
    assert found.auc.value == mia.auc(low, high)
    assert 0.02 < found.auc.high - found.auc.low < 0.2
    assert found.tpr.low <= found.tpr.value <= found.tpr.high
    fpr, tpr = found.curve()
    assert np.trapezoid(tpr, fpr) == pytest.approx(found.auc.value)
    assert "AUC" in found._repr_html_()
    pytest.importorskip("matplotlib")
    assert found.plot().get_xlabel() == "false-positive rate"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mia.loss_score([]), ShapeError, "logprobs"),
        (lambda: mia.loss_score([[]]), ShapeError, r"logprobs\[0\]"),
        (lambda: mia.loss_score([[-1.0], [0.5]]), ArgumentError, r"logprobs\[1\]"),
        (lambda: mia.loss_score([[math.nan]]), NonFiniteError, "logprobs"),
        (lambda: mia.min_k_score([LP], 0), ArgumentError, "k:"),
        (lambda: mia.zlib_score([LP], []), ShapeError, "texts"),
        (lambda: mia.reference_score([LP], [LP, LP]), ShapeError, "reference"),
        (lambda: mia.tpr_at_fpr([1.0], [1.0], 1.0), ArgumentError, "fpr"),
        (lambda: mia.priv_leak(0.5, 1.0), DegenerateError, "retained"),
        (lambda: mia.priv_leak(1.5, 0.5), ArgumentError, "unlearned"),
        (lambda: mia.standardized_logprobs(np.zeros((1, 2, 3)), [[0, 3]]), ArgumentError, "labels"),
        (lambda: mia.standardized_logprobs(np.zeros((1, 2, 3)), [[0, -100]]), ShapeError, r"labels\[0\]"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
