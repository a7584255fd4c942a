"""Membership inference from a model's outputs alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, NonFiniteError, ShapeError

__all__ = ["entropy_mia"]


def entropy_mia(retain: Any, test: Any, forget: Any) -> float:
    """Share of the forget samples that an entropy attack takes for training data.

    A logistic regression with balanced classes learns, from the entropy of the model's prediction, to tell retained
    training samples (1) from test samples (0), and is then asked about the forget samples. The goal of unlearning is
    the value of a model that never saw them, not 0.

    Args:
        retain: class probabilities of training samples that are kept, ``(n, classes)``, rows summing to 1; any float.
        test: the same for samples never trained on, of the same classes as ``retain``.
        forget: the same for the samples to be forgotten.

    Returns:
        A share in [0, 1].

    Raises:
        ShapeError: not two-dimensional, no rows, or different numbers of classes.
        NonFiniteError: NaN or infinity.
        ArgumentError: rows that are not probabilities.

    Source: the evaluation of Selective Synaptic Dampening, arXiv 2308.07707. Needs scikit-learn.
    """
    groups = [_probabilities(x, name) for x, name in ((retain, "retain"), (test, "test"), (forget, "forget"))]
    classes = {g.shape[1] for g in groups}
    if len(classes) > 1:
        found = ", ".join(str(g.shape[1]) for g in groups)
        raise ShapeError(f"retain, test, forget: expected one number of classes, got {found}")
    from sklearn.linear_model import LogisticRegression

    seen, unseen, asked = (_entropy(g)[:, None] for g in groups)
    member = np.repeat([1, 0], [len(seen), len(unseen)])
    attack = LogisticRegression(class_weight="balanced").fit(np.concatenate([seen, unseen]), member)
    return float(attack.predict(asked).mean())


def _probabilities(x: Any, name: str) -> npt.NDArray[np.float64]:
    """``x`` as f64 rows of probabilities; float torch tensors that require grad or hold bf16 included."""
    if hasattr(x, "detach"):
        x = x.detach().double().cpu().numpy()
    rows = np.asarray(x, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ShapeError(f"{name}: expected probabilities of shape (n, classes), got {rows.shape}")
    if not np.isfinite(rows).all():
        raise NonFiniteError(f"{name}: expected finite probabilities, got NaN or infinity")
    # 2e-2 lets bf16 rows pass: each entry is rounded by up to 2**-9 of itself.
    if (rows < 0).any() or (abs(rows.sum(axis=1) - 1) > 2e-2).any():
        raise ArgumentError(f"{name}: expected rows of probabilities that sum to 1, got other values (logits?)")
    return rows


def _entropy(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Entropy of each row in nats, with 0 log 0 = 0."""
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    entropy: npt.NDArray[np.float64] = -(p * logs).sum(axis=1)
    return entropy
