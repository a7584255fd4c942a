"""Calibration against worked values, bin edges and scikit-learn's curve."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from abjure import ArgumentError, NonFiniteError, ShapeError
from abjure.measure import calibration

P = [0.95, 0.9, 0.62, 0.55, 0.5, 0.3, 0.05]
Y = [1, 1, 0, 1, 0, 0, 0]


def test_worked_values():
    most = calibration(Y, P)
    assert (most.ece, most.definition) == (pytest.approx(0.21, abs=1e-12), "ece_max_right10")
    positive = calibration(Y, P, confidence="positive")
    assert (positive.ece, positive.definition) == (pytest.approx(0.295714, abs=5e-7), "ece_positive_right10")
    mass = calibration(Y, P, confidence="positive", bins=5, binning="mass")
    assert (mass.ece, mass.definition) == (pytest.approx(0.167143, abs=5e-7), "ece_positive_mass5")
    assert most.brier == pytest.approx(0.134557, abs=5e-7) == brier_score_loss(Y, P)
    assert "ece_max_right10=0.2100" in repr(most)
    assert most._repr_html_().count("<tr>") == 1 + (most.count > 0).sum()
    axes = most.plot()
    assert axes.get_title() == "ece_max_right10 = 0.210"


def test_edges():
    # 0.1 * 3 is the number after 0.3, and so in the bin above the edge; 0.3 is in the bin below it. 0 is in the first.
    counts = calibration([0, 0, 1, 1], [0.0, 0.3, 0.1 * 3, 1.0], confidence="positive").count
    assert counts.tolist() == [1, 0, 1, 1, 0, 0, 0, 0, 0, 1]
    for bins in (3, 7, 10, 15, 100):
        at = np.arange(1, bins + 1) / bins
        found = calibration(np.ones(bins, int), at, confidence="positive", bins=bins)
        assert (found.count == 1).all()


def test_against_scikit_learn():
    draw = np.random.default_rng(0)
    p = draw.uniform(size=500)
    y = (draw.uniform(size=500) < p**1.5).astype(int)
    found = calibration(y, p, confidence="positive", bins=8)
    accuracy, confidence = calibration_curve(y, p, n_bins=8)
    assert found.accuracy == pytest.approx(accuracy)
    assert found.confidence == pytest.approx(confidence)
    assert found.ece == pytest.approx((found.count / 500 * abs(accuracy - confidence)).sum())
    assert found.mce == pytest.approx(abs(accuracy - confidence).max())


def test_classes():
    draw = np.random.default_rng(1)
    logits = draw.standard_normal((400, 3)) * 2
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    y = np.array([draw.choice(3, p=row) for row in p])
    calm, loud = calibration(y, p), calibration(y, np.eye(3)[p.argmax(axis=1)])
    assert calm.ece < 0.08 < loud.ece
    assert loud.ece == pytest.approx((p.argmax(axis=1) != y).mean())
    two = np.stack([1 - np.array(P), P], axis=1)
    assert calibration(Y, two).ece == pytest.approx(0.21, abs=1e-12)
    assert calibration(Y, two, confidence="positive").ece == pytest.approx(0.295714, abs=5e-7)


def test_refusals():
    for p, error in (([0.5, 1.5], ArgumentError), ([0.5, np.nan], NonFiniteError), ([0.5], ShapeError)):
        with pytest.raises(error):
            calibration([0, 1], p)
    with pytest.raises(ArgumentError, match="sum to 1"):
        calibration([0, 1], [[0.5, 0.2], [1, 0]])
    with pytest.raises(ArgumentError, match="labels"):
        calibration([0, 2], [0.5, 0.5])
    with pytest.raises(ArgumentError, match="two classes"):
        calibration([0], [[0.2, 0.3, 0.5]], confidence="positive")
    with pytest.raises(ShapeError, match="bins"):
        calibration([0], [0.2], binning="mass")
    for bad in ({"bins": 0}, {"confidence": "all"}, {"binning": "log"}):
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            calibration([0, 1], [0.2, 0.4], **bad)
