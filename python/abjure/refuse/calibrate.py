"""Biases for wanted refusal rates, and thresholds whose over-refusal is bounded with a finite-sample guarantee."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal, localcontext
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError

#: Digits in which binomial sums are taken, and the distance below which they are decided by exact fractions.
_DIGITS = 50
_TIE = Decimal("1e-40")
#: Largest sample for which a tie is worth exact fractions; beyond it a tie counts against the claim.
_EXACT_MAX = 20_000


def _numbers(x: Any, arg: str, ndims: tuple[int, ...]) -> np.ndarray[Any, Any]:
    values = x.detach().cpu().double().numpy() if hasattr(x, "detach") else np.asarray(x, dtype=np.float64)
    if values.ndim not in ndims or 0 in values.shape:
        raise ShapeError(
            f"{arg}: expected a non-empty array of {' or '.join(map(str, ndims))} axes, got {values.shape}"
        )
    if np.isnan(values).any():
        raise NonFiniteError(f"{arg}: NaN at flat index {int(np.isnan(values).argmax())}")
    return np.asarray(values, dtype=np.float64)


def _sigmoid(m: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(-np.abs(m))
    p: np.ndarray[Any, Any] = np.where(m >= 0, 1.0, e) / (1.0 + e)
    return p


def calibrate_bias(margins: Any, rate: float | Sequence[float]) -> Any:
    """Bias under which *sampled* decoding refuses at a wanted mean rate.

    One category: the root of ``mean(sigmoid(m + b)) = rate``. Several, jointly: the minimiser of the convex
    ``mean(log(1 + sum_k p_k (exp(b_k) - 1))) - sum_k rate_k b_k``, whose gradient is mean rate minus wanted rate. Both
    by Newton's method with safeguards. Greedy decoding goes by the gap instead (:func:`~abjure.refuse.row_max_gap`).

    Args:
        margins: margins of calibration prompts, ``(n,)``, or ``(n, K)`` with each category's margin against all other
            tokens (:func:`~abjure.refuse.row_margin`).
        rate: wanted rate in (0, 1), or K of them with a sum below 1.

    Returns:
        A float, or an array ``(K,)``.

    Raises:
        ShapeError: an empty array, or rates that do not fit the categories.
        ArgumentError: a rate outside (0, 1) or a sum of 1 or more.
        NonFiniteError: a NaN margin. (Infinite ones are legal: prompts that no bias moves.)
        DegenerateError: prompts that no bias moves keep the rate from being reached, or categories whose probabilities
            exceed 1 together.
    """
    m = _numbers(margins, "margins", (1, 2))
    rates = np.atleast_1d(np.asarray(rate, dtype=np.float64))
    if rates.shape != (m.shape[1] if m.ndim == 2 else 1,):
        raise ShapeError(f"rate: expected {m.shape[1] if m.ndim == 2 else 1} (one per category), got {rates.size}")
    if not (rates > 0).all() or not rates.sum() < 1:
        raise ArgumentError(f"rate: expected rates above 0 with a sum below 1, got {rates.tolist()}")
    if m.ndim == 1 or m.shape[1] == 1:
        found = _single_bias(m.reshape(-1), float(rates[0]))
        return found if m.ndim == 1 else np.array([found])
    return _joint_bias(m, rates)


def _single_bias(m: np.ndarray[Any, Any], rate: float) -> float:
    low_rate, high_rate = float(np.mean(m == math.inf)), float(np.mean(m > -math.inf))
    if not low_rate < rate < high_rate:
        raise DegenerateError(f"margins: any bias gives a rate between {low_rate} and {high_rate}, wanted {rate}")
    finite = m[np.isfinite(m)]
    low, high = float(-finite.max() - 40), float(-finite.min() + 40)
    b = (low + high) / 2
    for _ in range(200):
        p = _sigmoid(m + b)
        error = float(p.mean()) - rate
        low, high = (low, b) if error > 0 else (b, high)
        slope = float((p * (1 - p)).mean())
        newton = b - error / slope if slope > 0 else math.nan
        step = newton if low < newton < high else (low + high) / 2
        if step == b or abs(step - b) <= 4e-16 * max(1.0, abs(b)):
            return float(step)
        b = step
    return float(b)


def _joint_bias(m: np.ndarray[Any, Any], rates: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    p = _sigmoid(m)
    rest = 1.0 - p.sum(axis=1)
    if (rest < -1e-9).any():
        raise DegenerateError(f"margins: categories of row {int(rest.argmin())} are more than certain together")
    if (p.max(axis=0) == 0).any() or not (rest > 0).any():
        raise DegenerateError("margins: a category has no probability anywhere, or nothing but refusal has any")
    with np.errstate(divide="ignore"):
        log_p, log_rest = np.log(p), np.log(np.maximum(rest, 0.0))

    def state(b: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        tilted = np.column_stack([log_rest, log_p + b])
        peak = tilted.max(axis=1, keepdims=True)
        log_d = peak[:, 0] + np.log(np.exp(tilted - peak).sum(axis=1))
        return float(log_d.mean() - rates @ b), np.exp(tilted[:, 1:] - log_d[:, None])

    b = np.log(rates / (1 - rates.sum())) - np.log(p.mean(axis=0) / max(rest.mean(), 1e-300))
    value, q = state(b)
    for _ in range(200):
        gradient = q.mean(axis=0) - rates
        hessian = np.diag(q.mean(axis=0)) - q.T @ q / len(q)
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        size = 1.0
        trial, trial_q = state(b - step)
        # Rounding alone may raise the value near the minimum; full steps are then as good as it gets.
        while trial > value + 1e-14 * (1 + abs(value)) and size > 1e-9:
            size /= 2
            trial, trial_q = state(b - size * step)
        b, value, q = b - size * step, trial, trial_q
        if np.abs(size * step).max() <= 1e-15 * max(1.0, float(np.abs(b).max())):
            break
    missed = float(np.abs(q.mean(axis=0) - rates).max())
    if not missed < 1e-9:
        raise DegenerateError(f"margins: no biases reach the wanted rates; the nearest miss them by {missed:.3g}")
    return np.asarray(b)


@dataclass(frozen=True)
class Threshold:
    """A threshold in margin units with the claim it carries. ``float()`` of it is :attr:`gate`."""

    #: The order statistic: refuse where the score is strictly above it (ceiling), or at least it (floor).
    value: float
    side: str
    #: ``"conformal"`` (over data and the next prompt) or ``"pac"`` (with probability 1 - delta over the data).
    method: str
    alpha: float
    delta: float | None
    n: int
    #: Rank of ``value`` among the ascending scores from 1; 0 where no score carries the claim.
    rank: int
    #: Smallest n with which the claim can be made at all.
    n_required: int
    #: Exact chance that data without ties break the claim (PAC); None for the conformal claim.
    failure_probability: float | None
    #: Smallest distance of a calibration score from :attr:`gate`: how far serving may deviate and decide alike.
    guard: float
    #: The shortest decimal that decides all calibration scores alike under "refuse where the score is at least it".
    decimal: str

    @property
    def gate(self) -> float:
        """Threshold for "refuse where the margin is at least it", as :class:`~abjure.refuse.RefusalTokens` does."""
        return float(self.decimal)

    def __float__(self) -> float:
        return self.gate

    @property
    def expected_rate(self) -> float:
        """Mean of the exact law of the achieved rate at a ceiling, without ties: Beta(n - rank + 1, rank)."""
        if self.rank == 0:
            return 0.0
        beyond = self.n - self.rank + 1 if self.side == "ceiling" else self.rank
        return beyond / (self.n + 1)


def _level(value: float, arg: str) -> Fraction:
    """The decimal a user wrote, exactly."""
    if not 0.0 < value < 1.0:
        raise ArgumentError(f"{arg}: expected a number between 0 and 1, got {value}")
    return Fraction(repr(float(value)))


def _largest_count(n: int, alpha: Fraction, delta: Fraction) -> tuple[int, float]:
    """Largest e with BinomCDF(e; n, alpha) <= delta, or -1, and that probability."""
    with localcontext(Context(prec=_DIGITS, Emin=-(10**12), Emax=10**12)):
        a = Decimal(alpha.numerator) / alpha.denominator
        d = Decimal(delta.numerator) / delta.denominator
        term = (1 - a) ** n
        odds = a / (1 - a)
        total, below, e = term, Decimal(0), -1
        while e < n and (_exactly(e + 1, n, alpha, delta) if abs(total - d) < _TIE else total <= d):
            below, e = total, e + 1
            term = term * (n - e) / (e + 1) * odds
            total += term
        return e, float(below)


def _exactly(e: int, n: int, alpha: Fraction, delta: Fraction) -> bool:
    if n > _EXACT_MAX:
        return False
    a, b = alpha.numerator, alpha.denominator
    count = sum(math.comb(n, i) * a**i * (b - a) ** (n - i) for i in range(e + 1))
    return bool(count * delta.denominator <= delta.numerator * b**n)


def _required(alpha: Fraction, delta: Fraction | None) -> int:
    if delta is None:
        return math.ceil(1 / alpha) - 1
    n = max(1, math.floor(math.log(delta) / math.log1p(-float(alpha))) - 1)
    with localcontext(Context(prec=_DIGITS)):
        stays = 1 - Decimal(alpha.numerator) / alpha.denominator
        while stays**n > Decimal(delta.numerator) / delta.denominator:
            n += 1
    return n


def _shortest(low: float, high: float) -> str:
    """The shortest decimal in (low, high]; ``high`` may be infinite."""
    if low == math.inf:
        return "inf"
    for digits in range(1, 18):
        with localcontext(Context(prec=digits, rounding=ROUND_CEILING)):
            up = +Decimal(low)
            if float(up) <= low:
                up = up.next_plus()
        if low < float(up) <= high:
            return str(up)
    return repr(math.nextafter(low, math.inf))


def calibrate_threshold(
    scores: Any,
    alpha: float,
    delta: float | None = None,
    *,
    side: Literal["ceiling", "floor"] = "ceiling",
) -> Threshold:
    """A threshold whose error rate is bounded by ``alpha`` with a finite-sample guarantee.

    Scores may be margins, gaps, a mass's margin, or ``max_k(m_k - c_k)`` for several categories with fixed shifts; of
    exchangeable prompts, one score per base prompt (of variants of a prompt, the largest).

    Args:
        scores: ``(n,)`` of benign prompts for a ceiling, of harmful ones for a floor; infinities are legal.
        alpha: largest rate of benign prompts refused (ceiling), or of harmful ones missed (floor).
        delta: None for the conformal claim, ``P(error at the next prompt) <= alpha`` over data and prompt (ceiling:
            rank ``ceil((n + 1)(1 - alpha))``); else, with probability ``1 - delta`` over the data, rate ``<= alpha``
            (``e = max{e : BinomCDF(e; n, alpha) <= delta}`` scores may lie beyond it).
        side: ``"ceiling"`` on over-refusal or ``"floor"`` under the catch rate.

    Returns:
        A :class:`Threshold`; of too few scores +inf (ceiling: never refuse) or -inf (floor: always refuse), with the
        number that would suffice in ``n_required``.

    Raises:
        ShapeError: scores that are not one non-empty axis.
        NonFiniteError: a NaN score.
        ArgumentError: ``alpha`` or ``delta`` outside (0, 1), an unknown side.

    Source: Vovk, Gammerman and Shafer 2005 (conformal); Clopper and Pearson 1934 by way of Vovk 2012 (conditional).
    """
    s = np.sort(_numbers(scores, "scores", (1,)))
    a, d = _level(alpha, "alpha"), None if delta is None else _level(delta, "delta")
    if side not in ("ceiling", "floor"):
        raise ArgumentError(f"side: expected 'ceiling' or 'floor', got {side!r}")
    n = len(s)
    if d is None:
        errors, failure = n - math.ceil((n + 1) * (1 - a)), None
    else:
        errors, chance = _largest_count(n, a, d)
        failure = chance if errors >= 0 else 0.0
        errors = min(errors, n - 1)
    if side == "ceiling":
        rank = n - errors if errors >= 0 else 0
        value = float(s[rank - 1]) if rank else math.inf
        above = s[s > value]
        decimal = _shortest(value, float(above[0]) if above.size else math.inf)
    else:
        rank = errors + 1
        value = float(s[rank - 1]) if rank else -math.inf
        under = s[s < value]
        decimal = _shortest(float(under[-1]), value) if rank and under.size else repr(value)
    gate = float(decimal)
    with np.errstate(invalid="ignore"):
        guard = float(np.nanmin(np.abs(s - gate), initial=math.inf))
    return Threshold(
        value=value,
        side=side,
        method="conformal" if d is None else "pac",
        alpha=float(alpha),
        delta=None if delta is None else float(delta),
        n=n,
        rank=rank,
        n_required=_required(a, d),
        failure_probability=failure,
        guard=guard,
        decimal=decimal,
    )
