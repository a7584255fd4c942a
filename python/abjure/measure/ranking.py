"""How well a score puts the right ones first."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ArgumentError, DegenerateError, ShapeError
from ._arrays import host, vector

__all__ = ["average_precision"]


def average_precision(correct: Any, score: Any) -> float:
    """``Σ (R_i − R_{i−1}) P_i`` over the distinct scores, highest first; equal scores enter together.

    Args:
        correct: ``(n,)`` of true or false, 1 or 0.
        score: ``(n,)`` finite; higher is more likely correct.

    Returns:
        Average precision in (0, 1], without interpolation (as scikit-learn's).

    Raises:
        ShapeError: not vectors of one length.
        ArgumentError: ``correct`` is not 0 or 1. NonFiniteError: NaN or infinity in ``score``.
        DegenerateError: nothing is correct, so recall is undefined.
    """
    values = vector(score, "score")
    truth = np.asarray(host(correct))
    if truth.shape != values.shape:
        raise ShapeError(f"correct: expected shape {values.shape} as score, got {truth.shape}")
    if truth.dtype.kind not in "biuf" or not np.isin(truth, (0, 1)).all():
        raise ArgumentError("correct: expected 0 or 1")
    truth = truth.astype(np.int64)
    if not truth.any():
        raise DegenerateError("correct: expected at least one correct item, got none")
    order = np.argsort(-values, kind="stable")
    ordered, hits = values[order], np.cumsum(truth[order])
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    gained = np.diff(hits[last], prepend=0)
    return float((gained * (hits[last] / (last + 1))).sum() / hits[-1])
