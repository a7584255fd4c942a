"""Membership inference on sequences: was this text in the training data?

Every score is low where the model looks as if it had seen the text, as published. :func:`sequence_mia` sets the scores
of the forget set against those of a hold-out set the model never saw: an area under the curve of 1 means that the
forget set still looks like training data, 0.5 is the goal, and near 0 says that too much was done.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ._arrays import Floats, host, vector
from .resampling import Bootstrap, bootstrap

__all__ = [
    "SequenceMia",
    "auc",
    "loss_score",
    "min_k_plus_plus_score",
    "min_k_score",
    "priv_leak",
    "reference_score",
    "sequence_mia",
    "standardized_logprobs",
    "tpr_at_fpr",
    "zlib_score",
]


def _sequences(logprobs: Any, name: str = "logprobs", highest: float = 1e-6) -> list[Floats]:
    """Counted values per sequence, from a list of vectors or anything with ``.token`` and ``.mask``."""
    if hasattr(logprobs, "token") and hasattr(logprobs, "mask"):
        tokens, mask = host(logprobs.token), host(logprobs.mask)
        logprobs = [row[kept] for row, kept in zip(tokens, mask, strict=True)]
    if len(logprobs) == 0:
        raise ShapeError(f"{name}: expected at least one sequence")
    rows = [vector(row, f"{name}[{i}]") for i, row in enumerate(logprobs)]
    for i, row in enumerate(rows):
        if row.max() > highest:
            raise ArgumentError(f"{name}[{i}]: expected log-probabilities, at most 0, got {row.max()}")
    return rows


def loss_score(logprobs: Any) -> Floats:
    """LOSS: mean negative log-probability per token of each sequence.

    Args:
        logprobs: token log-probabilities in nats: one vector per sequence, or a
            :class:`~abjure.forget.SequenceLogprobs`.

    Raises:
        ShapeError: no sequence, or one without a counted token.
        NonFiniteError: NaN or infinity.
        ArgumentError: a log-probability above 0.

    Source: Yeom et al., arXiv 1709.01604.
    """
    return np.array([-row.mean() for row in _sequences(logprobs)])


def zlib_score(logprobs: Any, texts: Sequence[str]) -> Floats:
    """zlib: mean negative log-probability over the number of bytes of the compressed text (UTF-8, zlib's level 6).

    Raises:
        ShapeError: not one text per sequence; otherwise as :func:`loss_score`.

    Source: Carlini et al., Extracting training data from large language models, arXiv 2012.07805.
    """
    losses = loss_score(logprobs)
    if len(texts) != len(losses):
        raise ShapeError(f"texts: expected {len(losses)} texts, one per sequence, got {len(texts)}")
    sizes = np.array([len(zlib.compress(text.encode())) for text in texts])
    scores: Floats = losses / sizes
    return scores


def _lowest(rows: list[Floats], k: float) -> Floats:
    if not 0 < k <= 1:
        raise ArgumentError(f"k: expected a share in (0, 1], got {k}")
    # Whole tokens of k n, computed so that k = 0.2 of 5 is 1 although 0.2 * 5 could round below.
    counts = [max(1, math.floor(k * len(row) + 1e-9)) for row in rows]
    return np.array([-np.sort(row)[:n].mean() for row, n in zip(rows, counts, strict=True)])


def min_k_score(logprobs: Any, k: float = 0.2) -> Floats:
    """Min-K%: minus the mean of the lowest ``max(1, floor(k n))`` log-probabilities.

    Args:
        logprobs: as in :func:`loss_score`.
        k: share of the tokens, in (0, 1]. Published values: 0.2, and 0.4 on TOFU.

    Raises:
        ArgumentError: ``k`` outside (0, 1]; otherwise as :func:`loss_score`.

    Source: Shi et al., arXiv 2310.16789.
    """
    return _lowest(_sequences(logprobs), k)


def min_k_plus_plus_score(standardized: Any, k: float = 0.2) -> Floats:
    """Min-K%++: minus the mean of the lowest ``max(1, floor(k n))`` values of :func:`standardized_logprobs`.

    Args:
        standardized: one vector per sequence.
        k: share of the tokens, in (0, 1].

    Raises:
        ShapeError, NonFiniteError, ArgumentError: as :func:`min_k_score`.

    Source: Zhang et al., arXiv 2404.02936.
    """
    return _lowest(_sequences(standardized, "standardized", math.inf), k)


def standardized_logprobs(logits: Any, labels: Any, ignore_index: int = -100, shift: bool = True) -> list[Floats]:
    """``(lp − μ) / σ`` of each counted label, μ and σ over the model's own next-token distribution.

    ``μ = Σ p lp``, ``σ² = Σ p lp² − μ²``, at least 1e-6 (as published). In f64, a row of logits at a time.

    Args:
        logits: ``(B, T, V)`` array or tensor.
        labels: ``(B, T)`` token ids.
        ignore_index: label that does not count.
        shift: logits at t predict the label at t + 1.

    Returns:
        One vector per sequence.

    Raises:
        ShapeError: shapes that do not fit, or a sequence without a counted token.
        ArgumentError: a label out of range.
        NonFiniteError: NaN or +∞ in a counted row, or a label of probability 0.
    """
    ids = np.asarray(host(labels))
    if len(logits.shape) != 3 or ids.shape != tuple(logits.shape[:2]):
        raise ShapeError(f"labels: expected shape (B, T) of logits (B, T, V) {tuple(logits.shape)}, got {ids.shape}")
    vocab = logits.shape[-1]
    bad = (ids != ignore_index) & ((ids < 0) | (ids >= vocab))
    if bad.any():
        raise ArgumentError(f"labels: expected token ids in [0, {vocab}) or {ignore_index}, got {ids[bad][0]}")
    first = 1 if shift else 0
    found = []
    for b in range(len(ids)):
        values = []
        for t in np.flatnonzero(ids[b, first:] != ignore_index):
            z = np.asarray(host(logits[b, t]), dtype=np.float64)
            top = z.max()
            with np.errstate(invalid="ignore"):
                lp = z - top - np.log(np.exp(z - top).sum())
            p = np.exp(lp)
            with np.errstate(invalid="ignore"):
                weighted = np.where(p > 0, p * lp, 0.0)
                square = np.where(p > 0, p * lp * lp, 0.0).sum()
            mean = weighted.sum()
            value = (lp[ids[b, t + first]] - mean) / math.sqrt(max(square - mean * mean, 1e-6))
            if not np.isfinite(value):
                raise NonFiniteError(f"logits[{b}, {t}]: expected finite log-probabilities of labels, got {value}")
            values.append(value)
        if not values:
            raise ShapeError(f"labels[{b}]: expected at least one counted token")
        found.append(np.array(values))
    return found


def reference_score(logprobs: Any, reference: Any) -> Floats:
    """Reference: mean negative log-probability minus that under a model that never saw the text.

    Raises:
        ShapeError: different numbers of sequences; otherwise as :func:`loss_score`.
    """
    ours, theirs = loss_score(logprobs), loss_score(reference)
    if len(ours) != len(theirs):
        raise ShapeError(f"reference: expected {len(ours)} sequences as in logprobs, got {len(theirs)}")
    return ours - theirs


def auc(members: Any, others: Any) -> float:
    """Probability that a member scores below another text, ties counting half (Mann-Whitney).

    Raises:
        ShapeError, NonFiniteError: not vectors of finite values.
    """
    return _auc(vector(members, "members"), vector(others, "others"))


def _auc(low: Floats, high: Floats) -> float:
    ordered = np.sort(high)
    above = len(high) - np.searchsorted(ordered, low, side="right")
    tied = np.searchsorted(ordered, low, side="right") - np.searchsorted(ordered, low, side="left")
    return float((above + 0.5 * tied).mean() / len(high))


def tpr_at_fpr(members: Any, others: Any, fpr: float = 0.01) -> float:
    """Share of members found by the loosest threshold that takes at most ``fpr`` of the others for members.

    With fewer than ``1 / fpr`` others no false alarm is allowed at all.

    Raises:
        ShapeError, NonFiniteError: not vectors of finite values.
        ArgumentError: ``fpr`` outside [0, 1).
    """
    return _tpr(vector(members, "members"), vector(others, "others"), fpr)


def _tpr(low: Floats, high: Floats, fpr: float) -> float:
    if not 0 <= fpr < 1:
        raise ArgumentError(f"fpr: expected a rate in [0, 1), got {fpr}")
    allowed = math.floor(fpr * len(high) + 1e-9)
    return float((low < np.sort(high)[allowed]).mean())


def priv_leak(unlearned: float, retained: float) -> float:
    """PrivLeak in percent: ``((1 − AUC) − (1 − AUC_ref)) / (1 − AUC_ref) · 100``; 0 is the goal.

    Negative: the forget set still looks like training data (under-unlearning); positive: over-unlearning.

    Args:
        unlearned: area under the curve of the unlearned model, by :func:`auc`.
        retained: that of a model trained without the forget set.

    Raises:
        ArgumentError: not in [0, 1].
        DegenerateError: ``retained`` is 1.

    Source: MUSE, arXiv 2407.06460, with the orientation of Open-Unlearning.
    """
    for name, value in (("unlearned", unlearned), ("retained", retained)):
        if not 0 <= value <= 1:
            raise ArgumentError(f"{name}: expected an area in [0, 1], got {value}")
    if retained == 1:
        raise DegenerateError("retained: expected an area below 1, got 1")
    return (retained - unlearned) / (1 - retained) * 100


@dataclass(frozen=True)
class SequenceMia:
    """One attack: area under the curve and true-positive rate, with percentile bootstrap intervals over texts.

    Attributes:
        attack: its name.
        auc: chance that a forget text scores below a hold-out text; 0.5 is the goal.
        tpr: true-positive rate at the false-positive rate ``fpr``.
        fpr: that rate.
        members: scores of the forget set.
        others: scores of the hold-out set.
    """

    attack: str
    auc: Bootstrap
    tpr: Bootstrap
    fpr: float
    members: Floats
    others: Floats

    def _repr_html_(self) -> str:
        return (
            f"<table><tr><th>attack</th><th>AUC</th><th>TPR at {self.fpr:.0%} FPR</th></tr>"
            f"<tr><td>{self.attack}</td><td>{self.auc._repr_html_()}</td><td>{self.tpr._repr_html_()}</td></tr></table>"
        )

    def curve(self) -> tuple[Floats, Floats]:
        """False- and true-positive rates of all thresholds, from (0, 0) to (1, 1)."""
        cuts = np.unique(np.concatenate([self.members, self.others]))
        fpr, tpr = (np.searchsorted(np.sort(x), cuts, side="right") / len(x) for x in (self.others, self.members))
        return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])

    def plot(self, ax: Any = None) -> Any:
        """The receiver operating characteristic, on matplotlib axes (made if None)."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(4, 4), layout="constrained").subplots()
        ax.plot(*self.curve(), label=f"{self.attack}: AUC {self.auc.value:.3f}")
        ax.plot([0, 1], [0, 1], color="grey", ls=":")
        ax.set(xlabel="false-positive rate", ylabel="true-positive rate")
        ax.legend()
        return ax


def sequence_mia(
    members: Any,
    others: Any,
    attack: str = "loss",
    *,
    fpr: float = 0.01,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> SequenceMia:
    """Sets the scores of the forget set against those of texts the model never saw.

    Args:
        members: ``(n,)`` scores of the forget set, by one of this module's functions (low where it looks known).
        others: ``(m,)`` scores of a hold-out set.
        attack: a name for the report.
        fpr: false-positive rate at which the true-positive rate is read.
        resamples: bootstrap samples; texts are drawn with replacement in each set.
        level: coverage of the intervals.
        seed: of the bootstrap. To compare two models, use the same seed: the same texts are drawn.

    Raises:
        ShapeError, NonFiniteError: not vectors of finite values.
        ArgumentError: ``fpr``, ``level`` or ``resamples`` out of range.
    """
    low, high = vector(members, "members"), vector(others, "others")
    drawn: dict[str, Any] = {"sizes": [len(low), len(high)], "resamples": resamples, "level": level, "seed": seed}
    area = bootstrap(lambda i, j: _auc(low[i], high[j]), **drawn)
    rate = bootstrap(lambda i, j: _tpr(low[i], high[j], fpr), **drawn)
    return SequenceMia(attack, area, rate, fpr, low, high)
