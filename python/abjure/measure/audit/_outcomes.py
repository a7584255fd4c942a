"""What the audits take: refusals of a model as verdicts, responses, or a mapping from prompt to either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError, ShapeError
from .._columns import column, names, verdicts
from ..refusals import PhraseList, refusal_match

#: 1 refused, 0 answered, -1 without a verdict.
Outcomes = npt.NDArray[np.int8]
Lists = str | PhraseList | Sequence[str | PhraseList]


def prompt_column(prompts: Any) -> list[Any]:
    """Prompts as hashable values, at least one."""
    found = names(prompts, "prompts")
    if not found:
        raise ShapeError("prompts: expected at least one prompt")
    return found


def outcomes(x: Any, name: str, prompts: list[Any], lists: Lists) -> Outcomes:
    """Verdicts of one model on the prompts, in their order.

    Args:
        x: verdicts or responses ``(n,)``, or a mapping from prompt to one.
        lists: phrases that make a response a refusal.

    Raises:
        ArgumentError: a mapping that lacks a prompt or holds another one; a value that is neither 0 nor 1.
        ShapeError: not one value per prompt. DTypeError: neither verdicts nor texts.
    """
    if isinstance(x, Mapping):
        lacking = [p for p in dict.fromkeys(prompts) if p not in x]
        extra = len(x.keys() - set(prompts))
        if lacking or extra:
            example = f", such as {lacking[0]!r:.60}" if lacking else ""
            raise ArgumentError(
                f"{name}: expected one outcome for every prompt, got {len(lacking)} prompts without{example}, "
                f"and {extra} outcomes of other prompts"
            )
        x = [x[p] for p in prompts]
    values = column(x, name)
    if len(values) != len(prompts):
        raise ShapeError(f"{name}: expected {len(prompts)} outcomes, one per prompt, got {len(values)}: not paired")
    if any(isinstance(v, str) for v in values):
        matched = refusal_match(values, lists).verdicts
        return np.array([-1 if v is None else int(v) for v in matched], dtype=np.int8)
    return np.array([-1 if v is None else int(v) for v in verdicts(values, name)], dtype=np.int8)


def group_columns(groups: Any, n: int, name: str = "groups") -> dict[str, list[Any]]:
    """Columns of names: none, one (called ``"group"``), or several by name."""
    if groups is None:
        return {}
    if isinstance(groups, Mapping):
        return {str(k): names(v, f"{name}: {k}", n) for k, v in groups.items()}
    return {"group": names(groups, name, n)}
