"""The tug-of-war score of an unlearned model against a retrained one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ArgumentError

__all__ = ["tug_of_war"]

_SETS = ("forget", "retain", "test")


def tug_of_war(
    unlearned: Mapping[str, float] | Sequence[float], retrained: Mapping[str, float] | Sequence[float]
) -> float:
    """``prod over S in {forget, retain, test} of 1 - |acc_u(S) - acc_r(S)|``.

    1 where the unlearned model has the retrained model's accuracy on every set; each difference pulls it down. Put a
    membership-inference score in the place of the forget accuracy for ToW-MIA.

    Args:
        unlearned: accuracies in [0, 1] of the unlearned model: a mapping with the keys ``forget``, ``retain`` and
            ``test``, or a sequence in this order.
        retrained: the same of the model retrained without the forget set.

    Returns:
        The score in [0, 1]; 1 is the goal.

    Raises:
        ArgumentError: a set is missing, or a value is not in [0, 1] (percentages?).

    Source: Zhao and others, "What makes unlearning hard and what to do about it", arXiv 2406.01257.
    """
    score = 1.0
    for u, r in zip(_three(unlearned, "unlearned"), _three(retrained, "retrained"), strict=True):
        score *= 1 - abs(u - r)
    return score


def _three(given: Any, name: str) -> list[float]:
    if isinstance(given, Mapping):
        if set(given) != set(_SETS):
            raise ArgumentError(f"{name}: expected the keys {', '.join(_SETS)}, got {', '.join(map(str, given))}")
        given = [given[s] for s in _SETS]
    try:
        values = [float(v) for v in given]
    except (TypeError, ValueError):
        raise ArgumentError(f"{name}: expected three accuracies, got {given!r}") from None
    if len(values) != 3:
        raise ArgumentError(f"{name}: expected three accuracies (forget, retain, test), got {len(values)}")
    for s, v in zip(_SETS, values, strict=True):
        if not 0 <= v <= 1:
            raise ArgumentError(f"{name}: expected accuracies in [0, 1], got {v} for {s}")
    return values
