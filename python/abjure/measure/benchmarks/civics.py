"""CIVICS-style comparison (arXiv 2405.13974): agreement with value statements across groups, by log-probabilities."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...errors import ArgumentError, DegenerateError, NonFiniteError
from .._arrays import Floats
from .._columns import column, names, reals
from .._scores import Estimate, Row, Scores, check_level, check_resampling, mean_estimate

#: Numbers held at a time by the permutations.
_BLOCK = 1 << 21


@dataclass(frozen=True, repr=False)
class Civics(Scores):
    """Log-odds of agreement by group.

    Attributes:
        groups: group to the mean of ``log p(agree) − log p(disagree)`` (nats), clustered by statement.
        gaps: (first, second) group to (difference of their means, p-value).
        p: of the hypothesis that groups do not differ (largest gap).
        agreement: group to the mean probability of agreement of the two options.
        paired: whether groups share their statements, so that a permutation swaps groups within a statement.
    """

    groups: Mapping[Hashable, Estimate]
    gaps: Mapping[tuple[Hashable, Hashable], tuple[float, float]]
    p: float
    agreement: Mapping[Hashable, float]
    paired: bool
    level: float = 0.95

    title = "CIVICS-style: log-odds of agreement (nats)"

    def rows(self) -> list[Row]:
        found = [Row(f"log-odds: {g}", e, f"P(agree) {self.agreement[g]:.4f}") for g, e in self.groups.items()]
        found += [Row(f"{a} − {b}", gap, f"p {p:.3g}") for (a, b), (gap, p) in self.gaps.items()]
        return [*found, Row("p of no difference", self.p, "permutations of statements")]


def civics_scores(
    logp_agree: Any,
    logp_disagree: Any,
    group: Any,
    statement: Any,
    *,
    normalize: Literal["sum", "token", "byte"] = "sum",
    agree_length: Any = None,
    disagree_length: Any = None,
    level: float = 0.95,
    permutations: int = 2000,
    seed: int = 0,
) -> Civics:
    """Compares agreement between groups (languages, topics, models), with permutations over statements, not rows.

    Where every statement is there in every group (translations), groups are swapped within a statement; otherwise each
    statement has to belong to one group, and statements change groups as a whole.

    Args:
        logp_agree, logp_disagree: ``(n,)`` log-probabilities (nats, at most 0) of the two continuations.
        group, statement: ``(n,)`` names.
        normalize: ``"sum"`` takes them as they are; ``"token"`` and ``"byte"`` divide by the lengths.
        agree_length, disagree_length: ``(n,)`` lengths of the continuations, above 0.
        level: of the intervals. permutations, seed: of the test; ``p = (1 + #as large)/(permutations + 1)``.

    Raises:
        ArgumentError: lengths missing or not wanted, a log-probability above 0, statements that are neither in all
            groups nor in one, an option out of range. NonFiniteError: a missing or infinite log-probability.
        DegenerateError: fewer than two groups or statements. DTypeError: values of the wrong kind.
        ShapeError: columns of different lengths.

    Source: CIVICS, arXiv 2405.13974; this form of the comparison is ours.
    """
    check_level(level)
    check_resampling(permutations, seed)
    if normalize not in ("sum", "token", "byte"):
        raise ArgumentError(f"normalize: expected 'sum', 'token' or 'byte', got {normalize!r}")
    given = (agree_length is not None) + (disagree_length is not None)
    if given != (0 if normalize == "sum" else 2):
        raise ArgumentError(f"agree_length, disagree_length: expected {'none' if normalize == 'sum' else 'both'}")
    raw = column(logp_agree, "logp_agree")
    for name, values in (("logp_agree", raw), ("logp_disagree", column(logp_disagree, "logp_disagree", len(raw)))):
        for i, v in enumerate(values):
            if v == float("-inf"):
                raise NonFiniteError(f"{name}: an option without a probability at index {i}; give both options' logits")
    parts = []
    for name, x, length in (
        ("logp_agree", logp_agree, agree_length),
        ("logp_disagree", logp_disagree, disagree_length),
    ):
        value = reals(x, name, len(raw))
        if (value > 0).any():
            raise ArgumentError(f"{name}: expected log-probabilities of at most 0, got {value.max()}")
        if length is not None:
            by = reals(length, f"{name.split('_')[1]}_length", len(raw))
            if (by <= 0).any():
                raise ArgumentError(f"{name.split('_')[1]}_length: expected lengths above 0, got {by.min()}")
            value = value / by
        parts.append(value)
    d: Floats = parts[0] - parts[1]
    own, items = names(group, "group", len(d)), names(statement, "statement", len(d))
    kinds, topics = list(dict.fromkeys(own)), list(dict.fromkeys(items))
    if len(kinds) < 2 or len(topics) < 2:
        raise DegenerateError(f"group, statement: expected two or more of each, got {len(kinds)} and {len(topics)}")
    # Mean per (statement, group): a statement weighs the same however many rows it has.
    total, count = np.zeros((len(topics), len(kinds))), np.zeros((len(topics), len(kinds)))
    where = ([topics.index(i) for i in items], [kinds.index(g) for g in own])
    np.add.at(total, where, d)
    np.add.at(count, where, 1)
    present = count > 0
    paired = bool(present.all())
    if not paired and (present.sum(axis=1) != 1).any():
        at = topics[int((present.sum(axis=1) != 1).argmax())]
        raise ArgumentError(f"statement: expected each in all groups, or each in one, found otherwise for {at!r}")
    means = np.where(present, total / np.maximum(count, 1), 0.0)
    groups = {}
    for j, g in enumerate(kinds):
        groups[g] = mean_estimate([float(v) for v in means[present[:, j], j]], level=level)
    pairs = [(i, j) for i in range(len(kinds)) for j in range(i + 1, len(kinds))]
    centre = means.sum(axis=0) / present.sum(axis=0)
    gaps = np.array([centre[i] - centre[j] for i, j in pairs])
    drawn = _permuted(means, present, paired, pairs, permutations, seed)
    # A gap that differs by rounding alone counts as equally large.
    slack = 1e-9 * (1 + abs(gaps))
    singles = (1 + (abs(drawn) >= abs(gaps) - slack).sum(axis=0)) / (permutations + 1)
    widest = abs(gaps).max()
    p = float((1 + (abs(drawn).max(axis=1) >= widest - 1e-9 * (1 + widest)).sum()) / (permutations + 1))
    by_pair = {
        (kinds[i], kinds[j]): (float(gap), float(q)) for (i, j), gap, q in zip(pairs, gaps, singles, strict=True)
    }
    odds = 1 / (1 + np.exp(-np.clip(d, -700, 700)))
    share = {g: float(np.mean([o for o, k in zip(odds, own, strict=True) if k == g])) for g in kinds}
    return Civics(groups, by_pair, p, share, paired, level)


def _permuted(
    means: Floats, present: Any, paired: bool, pairs: list[tuple[int, int]], permutations: int, seed: int
) -> Floats:
    """Gaps ``(permutations, pairs)`` where groups are exchanged."""
    rng, found = np.random.default_rng(seed), []
    n, g = means.shape
    step = max(1, _BLOCK // (n * g))
    for start in range(0, permutations, step):
        size = min(step, permutations - start)
        if paired:
            order = rng.random((size, n, g)).argsort(axis=2)
            centres = np.take_along_axis(np.broadcast_to(means, (size, n, g)), order, axis=2).mean(axis=1)
        else:
            values, label = means.sum(axis=1), present.argmax(axis=1)
            order = rng.random((size, n)).argsort(axis=1)
            counts = present.sum(axis=0)
            mixed = values[order]
            centres = np.stack([mixed[:, label == j].sum(axis=1) / counts[j] for j in range(g)], axis=1)
        found.append(np.stack([centres[:, i] - centres[:, j] for i, j in pairs], axis=1))
    return np.concatenate(found)
