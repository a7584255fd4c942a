"""Forget quality and utility of a language model that was made to forget (the measures of TOFU, arXiv 2401.06121).

The inputs are mean losses per token of answers, in nats. A two-sample Kolmogorov-Smirnov test compares the truth ratios
of the unlearned model with those of a model that never saw the forget set: what counts is that they cannot be told
apart, not that the ratio is high.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ArgumentError, DegenerateError, ShapeError
from ._arrays import Floats, matrix, vector
from .overlap import rouge_l
from .resampling import Bootstrap, paired_bootstrap

__all__ = [
    "Bootstrap",
    "KSTest",
    "answer_probability",
    "forget_quality",
    "ks_test",
    "model_utility",
    "paired_bootstrap",
    "rouge_l_recall",
    "truth_ratio",
    "truth_ratio_score",
]

#: Largest sample for which "auto" counts lattice paths, as in scipy.
EXACT_LIMIT = 10_000


@dataclass(frozen=True)
class KSTest:
    """Two-sample Kolmogorov-Smirnov test, two-sided.

    Attributes:
        statistic: largest distance of the two empirical distribution functions.
        log10_p: log10 of the p-value, finite where ``pvalue`` underflows.
        sizes: the two sample sizes.
        exact: whether the p-value counts lattice paths (else Kolmogorov's limit).
    """

    statistic: float
    log10_p: float
    sizes: tuple[int, int]
    exact: bool

    @property
    def pvalue(self) -> float:
        """The p-value; 0 where it is below the smallest number."""
        return float(10.0**self.log10_p)

    def _repr_html_(self) -> str:
        kind = "exact" if self.exact else "asymptotic"
        return (
            f"<table><tr><th>KS distance</th><th>log10 p</th><th>p ({kind})</th><th>samples</th></tr>"
            f"<tr><td>{self.statistic:.4f}</td><td>{self.log10_p:.2f}</td><td>{self.pvalue:.3g}</td>"
            f"<td>{self.sizes[0]}, {self.sizes[1]}</td></tr></table>"
        )


def ks_test(x: Any, y: Any, method: str = "auto") -> KSTest:
    """Two-sample two-sided Kolmogorov-Smirnov test.

    The exact p-value is a share of lattice paths, summed from positive terms in the log domain: its relative error
    stays near 1e-12 however small it is. Time ``O(n m)``, below a second for samples of 1 000.

    Args:
        x: ``(n,)`` finite values.
        y: ``(m,)`` finite values; ties are allowed (the exact value is then conservative).
        method: ``"exact"``, ``"asymptotic"`` or ``"auto"``: exact up to 10 000 values in the larger sample.

    Raises:
        ShapeError: not a vector, or empty.
        NonFiniteError: NaN or infinity.
        ArgumentError: unknown method.

    Source: Hodges, The significance probability of the Smirnov two-sample test, 1958.
    """
    a, b = np.sort(vector(x, "x")), np.sort(vector(y, "y"))
    if method not in ("auto", "exact", "asymptotic"):
        raise ArgumentError(f"method: expected 'auto', 'exact' or 'asymptotic', got {method!r}")
    n, m = len(a), len(b)
    both = np.concatenate([a, b])
    # Whole numbers throughout: the distance is a multiple of 1 / (n m), and whether a path reaches it is not rounded.
    gap = int(np.abs(np.searchsorted(a, both, side="right") * m - np.searchsorted(b, both, side="right") * n).max())
    exact = method == "exact" or (method == "auto" and max(n, m) <= EXACT_LIMIT)
    log_p = _log_exact(n, m, gap) if exact else _log_limit(math.sqrt(n * m / (n + m)) * gap / (n * m))
    return KSTest(gap / (n * m), min(log_p / math.log(10), 0.0), (n, m), exact)


def _log_exact(n: int, m: int, gap: int) -> float:
    """ln of the share of monotone paths from (0, 0) to (n, m) that reach ``|i m − j n| >= gap``."""
    if gap == 0:
        return 0.0
    # r(i, j): share of the paths to (i, j) that have reached the bound; the last step came from (i − 1, j) with
    # probability i / (i + j). One diagonal i + j = k at a time; index i.
    i = np.arange(n + 1, dtype=np.int64)
    row = np.full(n + 1, -np.inf)
    with np.errstate(divide="ignore"):
        logs = np.log(np.arange(n + m + 1, dtype=np.float64))
    for k in range(1, n + m + 1):
        low, high = max(k - m, 0), min(k, n)
        here, j = i[low : high + 1], k - i[low : high + 1]
        left = np.full(len(here), -np.inf)
        left[here > 0] = row[here[here > 0] - 1]
        above = np.where(j > 0, row[here], -np.inf)
        new = np.logaddexp(logs[here] + left, logs[j] + above) - logs[k]
        new[np.abs(here * m - j * n) >= gap] = 0.0
        row[low : high + 1] = new
    return float(min(row[n], 0.0))


def _log_limit(z: float) -> float:
    """ln of Kolmogorov's limit ``2 Σ (−1)^(k−1) exp(−2 k² z²)``."""
    if z < 0.2:  # the complement is below 1e-12
        return 0.0
    k = np.arange(1, 101)
    rest = float((np.where(k % 2 == 1, 1.0, -1.0) * np.exp(-2 * (k * k - 1) * z * z)).sum())
    return min(math.log(2) - 2 * z * z + math.log(rest), 0.0)


def truth_ratio(paraphrased: Any, perturbed: Any, mean: str = "geometric") -> Floats:
    """Truth ratio per question: mean probability of wrong answers over that of the right one, paraphrased.

    Probabilities are per token, ``exp(−loss)``. Computed in the log domain.

    Args:
        paraphrased: ``(N,)`` mean token losses of paraphrased right answers, nats, at least 0.
        perturbed: ``(N, k)`` those of k wrong answers each.
        mean: over the wrong answers. ``"geometric"`` (``exp(l_para − mean l_i)``; what the KS test is made on, and
            Open-Unlearning's, there named ``"open_unlearning"`` with 1e-10 added to the denominator) or
            ``"arithmetic"`` (``"tofu"``: what the published model utility uses).

    Raises:
        ShapeError: shapes that do not fit.
        NonFiniteError: NaN or infinity.
        ArgumentError: unknown mean, or a negative loss.
    """
    para = vector(paraphrased, "paraphrased")
    wrong = _wrong(perturbed, "perturbed", len(para))
    if (para < 0).any() or (wrong < 0).any():
        raise ArgumentError("paraphrased, perturbed: expected losses, at least 0, got a negative one")
    if mean in ("geometric", "open_unlearning"):
        log_wrong = -wrong.mean(axis=1)
    elif mean in ("arithmetic", "tofu"):
        log_wrong = np.logaddexp.reduce(-wrong, axis=1) - math.log(wrong.shape[1])
    else:
        raise ArgumentError(f"mean: expected 'geometric', 'open_unlearning', 'arithmetic' or 'tofu', got {mean!r}")
    right = np.logaddexp(-para, math.log(1e-10)) if mean == "open_unlearning" else -para
    ratio: Floats = np.exp(log_wrong - right)
    return ratio


def _wrong(x: Any, name: str, rows: int) -> Floats:
    values = matrix(x, name)
    if len(values) != rows:
        raise ShapeError(f"{name}: expected shape ({rows}, k), one row per right answer, got {values.shape}")
    return values


def truth_ratio_score(ratio: Any, forget: bool = False) -> float:
    """Mean of ``max(0, 1 − ratio)``, or on the forget set of ``min(ratio, 1 / ratio)``: a number in [0, 1].

    Raises:
        ShapeError, NonFiniteError: not a vector of finite ratios.
        ArgumentError: a negative ratio.
    """
    values = vector(ratio, "ratio")
    if (values < 0).any():
        raise ArgumentError("ratio: expected ratios, at least 0, got a negative one")
    if not forget:
        return float(np.maximum(0.0, 1.0 - values).mean())
    with np.errstate(divide="ignore"):
        return float(np.minimum(values, 1 / values).mean())


def forget_quality(unlearned: Any, retained: Any, method: str = "auto") -> KSTest:
    """Forget quality: KS test of the truth ratios of the unlearned model and of one trained without the forget set.

    The p-value is high where the two cannot be told apart. Report ``log10_p``; over-forgetting lowers it as well.

    Args:
        unlearned: ``(n,)`` truth ratios (geometric) on the forget set, see :func:`truth_ratio`.
        retained: ``(m,)`` those of the model that never saw the forget set. There is no quality without it.
        method: see :func:`ks_test`.

    Raises:
        ArgumentError: ``retained`` missing, a negative ratio, or unknown method.
        ShapeError, NonFiniteError: not vectors of finite ratios.
    """
    if retained is None:
        raise ArgumentError("retained: forget quality needs the truth ratios of a model trained without the forget set")
    if (vector(unlearned, "unlearned") < 0).any() or (vector(retained, "retained") < 0).any():
        raise ArgumentError("unlearned, retained: expected ratios, at least 0, got a negative one")
    return ks_test(unlearned, retained, method)


def answer_probability(right: Any, wrong: Any | None = None) -> float:
    """Mean ``p = exp(−loss)`` of right answers; with wrong answers, of ``p / (p + Σ p_wrong)``.

    Args:
        right: ``(N,)`` mean token losses of the right answers.
        wrong: ``(N, k)`` those of the alternatives, or None (the retain set of TOFU).

    Raises:
        ShapeError, NonFiniteError: shapes that do not fit, NaN or infinity.
    """
    values = vector(right, "right")
    if wrong is None:
        return float(np.exp(-values).mean())
    rest = np.logaddexp.reduce(-_wrong(wrong, "wrong", len(values)), axis=1)
    return float(np.exp(-values - np.logaddexp(-values, rest)).mean())


def model_utility(values: Any) -> float:
    """Harmonic mean of scores in [0, 1] (in TOFU nine: three data sets by probability, ROUGE-L recall, truth ratio).

    One score near 0 makes it near 0; a score of 0 makes it 0.

    Raises:
        ShapeError, NonFiniteError: not a vector of finite scores.
        ArgumentError: a score outside [0, 1].
    """
    scores = vector(list(values.values()) if isinstance(values, dict) else values, "values")
    if (scores < 0).any() or (scores > 1).any():
        raise ArgumentError(f"values: expected scores in [0, 1], got {scores[(scores < 0) | (scores > 1)][0]}")
    return 0.0 if (scores == 0).any() else float(len(scores) / (1 / scores).sum())


def rouge_l_recall(answer: str, reference: str) -> float:
    """Length of the longest common subsequence of words over the reference's length.

    Words are runs of ``[a-z0-9]`` in lower case, without stemming (published figures often stem).

    Raises:
        DegenerateError: the reference has no word.
    """
    try:
        return float(rouge_l(answer, reference).recall[0])
    except DegenerateError:
        raise DegenerateError("reference: expected at least one word") from None
