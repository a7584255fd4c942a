"""Biases for wanted refusal rates, and thresholds whose over-refusal is bounded with a finite-sample guarantee.

The arithmetic under :func:`~abjure.refuse.calibrate`, for scores of any origin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from .. import _native
from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ..measure.rates import beta_quantile

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
    rest = 1.0 - _sigmoid(m).sum(axis=1)
    if (rest < -1e-9).any():
        raise DegenerateError(f"margins: categories of row {int(rest.argmin())} are more than certain together")
    columns = np.empty((m.shape[1] + 1, len(m)))
    with np.errstate(divide="ignore"):
        columns[0] = np.log(np.maximum(rest, 0.0))
    columns[1:] = log_sigmoid(m).T
    return outcome_bias(columns, rates)


def log_sigmoid(m: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``ln sigmoid(m)``, without underflow."""
    found: np.ndarray[Any, Any] = np.minimum(m, 0.0) - np.log1p(np.exp(-np.abs(m)))
    return found


def outcome_bias(log_p: np.ndarray[Any, Any], rates: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Biases of K outcomes with the wanted mean rates from log-probabilities ``(K + 1, n)``, all else in row 0.

    Raises:
        DegenerateError: no biases reach the rates.
    """
    means = np.array([_log_mean(row) for row in log_p])
    if np.isneginf(means).any():
        raise DegenerateError("margins: a category has no probability anywhere, or nothing but refusal has any")
    start = np.log(rates / (1 - rates.sum())) - (means[1:] - means[0])
    b, missed = _newton(log_p, rates, start)
    if not missed < 1e-9:
        raise DegenerateError(f"margins: no biases reach the wanted rates; the nearest miss them by {missed:.3g}")
    return b


def _log_mean(x: np.ndarray[Any, Any]) -> float:
    peak = float(x.max())
    return peak if not math.isfinite(peak) else peak + math.log(float(np.exp(x - peak).mean()))


def _newton(
    log_p: np.ndarray[Any, Any], rates: np.ndarray[Any, Any], b: np.ndarray[Any, Any], sharpness: float = 1.0
) -> tuple[np.ndarray[Any, Any], float]:
    """Minimises the convex function of :func:`calibrate_bias` at a sharpness; the biases and the largest miss."""
    k, n = len(rates), log_p.shape[1]
    flat = np.ascontiguousarray(log_p).reshape(-1)

    def state(b: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        value, q, products = _native.tilted(flat, n, np.ascontiguousarray(b), sharpness)
        return value - float(rates @ b), q, products.reshape(k, k)

    value, q, products = state(b)
    for _ in range(200):
        hessian = (np.diag(q) - products) * sharpness
        step = np.linalg.lstsq(hessian, q - rates, rcond=None)[0]
        size = 1.0
        trial = state(b - step)
        # Rounding alone may raise the value near the minimum; full steps are then as good as it gets.
        while trial[0] > value + 1e-14 * (1 + abs(value)) and size > 1e-9:
            size /= 2
            trial = state(b - size * step)
        b = b - size * step
        value, q, products = trial
        if np.abs(size * step).max() <= 1e-15 * max(1.0, float(np.abs(b).max())):
            break
    return np.asarray(b), float(np.abs(q - rates).max())


#: Prompts on which the smooth forms of :func:`share_thresholds` are solved.
_SMOOTH = 8192


def share_thresholds(
    scores: np.ndarray[Any, Any], rates: np.ndarray[Any, Any], strict: bool = False
) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Thresholds ``t`` under which each category wins a wanted share of prompts, as decimals, and the shares they give.

    Category ``k`` wins a prompt where ``scores[:, k] - t[k]`` is the largest of all and at least 0 (above 0 if
    ``strict``). That is the limit of sampled decoding for sharp probabilities, and ``-t`` minimises the limit of its
    convex function, ``mean(max(0, max_k(s_k + b_k))) - rates @ b``: Newton's method at rising sharpness, on a sample of
    large data, then one category after the other by order statistics of all data. Shares are multiples of 1 / n; where
    scores are tied a category gets the next smaller share that some threshold gives.

    Args:
        scores: ``(n, K)``, no NaN.
        rates: ``(K,)``, positive with a sum below 1.
    """
    n, k = scores.shape
    finite = scores[np.isfinite(scores)]
    reach = 1.0 + (2 * float(np.abs(finite).max()) if finite.size else 0.0)
    s = np.clip(scores, -reach, reach)
    b = np.array([-np.quantile(s[:, j], 1 - rates[j]) for j in range(k)])
    if k > 1:
        part = s if n <= _SMOOTH else s[np.random.default_rng(0).choice(n, _SMOOTH, replace=False)]
        spread = float(np.mean([np.subtract(*np.quantile(part[:, j], [0.75, 0.25])) for j in range(k)])) or 1.0
        columns = np.vstack([np.zeros(len(part)), part.T])
        for sharpness in (2.0, 8.0, 32.0, 128.0):
            b = _newton(columns, rates, b, sharpness / spread)[0]
    wanted = np.rint(rates * n).astype(np.int64)
    best: tuple[int, np.ndarray[Any, Any]] = (n * k + 1, b)
    for _ in range(1 if k == 1 else 40):
        missed = int(np.abs(np.bincount(winners(s, -b, strict) + 1, minlength=k + 1)[1:] - wanted).sum())
        if missed < best[0]:
            best = missed, b.copy()
        if missed == 0:
            break
        for j in range(k):
            low, high = _interval(_lead(s, b, j), int(wanted[j]))
            middle = (low + high) / 2 if math.isfinite(low) and math.isfinite(high) else math.nan
            b[j] = -middle if math.isfinite(middle) else -(low + 1 if math.isfinite(low) else high - 1)
    b, texts = best[1].copy(), []
    for j in range(k):
        low, high = _interval(_lead(s, b, j), int(wanted[j]))
        texts.append(_shortest(low, float(np.nextafter(high, low)) if strict and math.isfinite(high) else high))
        b[j] = -float(texts[-1])
    shares = np.bincount(winners(scores, -b, strict) + 1, minlength=k + 1)[1:] / n
    return texts, shares


def _lead(s: np.ndarray[Any, Any], b: np.ndarray[Any, Any], j: int) -> np.ndarray[Any, Any]:
    """How high the threshold of category ``j`` may be for it to win each prompt, the others' biases given."""
    others = np.delete(np.arange(s.shape[1]), j)
    lead: np.ndarray[Any, Any] = s[:, j].copy()
    if others.size:
        lead -= np.maximum((s[:, others] + b[others]).max(axis=1), 0.0)
    return lead


def _interval(lead: np.ndarray[Any, Any], count: int) -> tuple[float, float]:
    """Bounds (low, high] of the thresholds that at most ``count`` values reach, as many as ties allow."""
    n = len(lead)
    if count >= n:
        return -math.inf, float(lead.min())
    low = float(np.partition(lead, n - 1 - count)[n - 1 - count])
    above = lead[lead > low]
    return low, float(above.min()) if above.size else math.inf


def winners(s: np.ndarray[Any, Any], t: np.ndarray[Any, Any], strict: bool) -> np.ndarray[Any, Any]:
    """The category with the largest excess per row, the first of equals; -1 where none passes."""
    peak = np.full(len(s), 0.0 if strict else -math.inf)
    found = np.full(len(s), -1)
    for j, limit in enumerate(t):
        excess = margin_excess(s[:, j], limit)
        better = excess > peak
        found[better] = j
        np.maximum(peak, excess, out=peak)
    found[peak < 0] = -1
    return found


def margin_excess(s: np.ndarray[Any, Any], t: float) -> np.ndarray[Any, Any]:
    """``s - t`` as the gate takes it: -inf always passes, and a score equal to its threshold is 0 above it."""
    if t == -math.inf:
        return np.full(s.shape, math.inf)
    with np.errstate(invalid="ignore"):
        excess: np.ndarray[Any, Any] = s - t
    if t == math.inf:
        excess[s == t] = 0.0
    return excess


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
        return self._beyond / (self.n + 1)

    @property
    def _beyond(self) -> int:
        return self.n - self.rank + 1 if self.side == "ceiling" else self.rank

    def law(self, level: float = 0.9) -> tuple[float, float]:
        """Central interval of the exact law of the achieved error rate, without ties: a beta distribution.

        Over data sets of this size: where the rate will lie that a threshold of this rank gives.

        Raises:
            ArgumentError: ``level`` outside (0, 1).
        """
        tail = float((1 - _level(level, "level")) / 2)
        if self.rank == 0:
            return 0.0, 0.0
        a, b = self._beyond, self.n + 1 - self._beyond
        return beta_quantile(tail, a, b), 1 - beta_quantile(tail, b, a)

    def __repr__(self) -> str:
        claim = f"rate <= {self.alpha:g}"
        claim += " for the next prompt" if self.delta is None else f" with probability {1 - self.delta:g}"
        if self.rank == 0:
            return f"Threshold({self.decimal}; {self.n} prompts are too few for {claim}: {self.n_required} are needed)"
        return f"Threshold({self.decimal}, {self.side}; {claim}, rank {self.rank} of {self.n})"


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
        first, terms = _binomial_terms(n, a, d)
        total, below, e = Decimal(0), Decimal(0), first - 1
        for term in terms:
            total += term
            if not (_exactly(e + 1, n, alpha, delta) if abs(total - d) < _TIE else total <= d):
                break
            below, e = total, e + 1
        return (e if below else -1), float(below)


def _binomial_terms(n: int, a: Decimal, d: Decimal) -> tuple[int, list[Decimal]]:
    """Terms of the binomial distribution that count beside ``d``, and the index of the first.

    From the mode to both sides by ratios, scaled to a sum of 1 at the end: some 30 sqrt(n a (1 - a)) terms, not n.
    """
    odds = a / (1 - a)
    mode = min(n, int((n + 1) * a))
    tiny = d * Decimal(f"1e-{_DIGITS}")
    down, term, e = [Decimal(1)], Decimal(1), mode
    while e > 0 and term > tiny:
        term = term * e / (n - e + 1) / odds
        down.append(term)
        e -= 1
    up, term, i = [], Decimal(1), mode
    while i < n and term > tiny:
        term = term * (n - i) / (i + 1) * odds
        up.append(term)
        i += 1
    total = sum(down) + sum(up)
    return e, [t / total for t in (*reversed(down), *up)]


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


def prompts_needed(alpha: float, delta: float | None = None, *, categories: int = 1) -> int:
    """Smallest number of calibration prompts with which :func:`calibrate_threshold` can bound a rate by ``alpha``.

    At that number no score may lie beyond the threshold, the largest of all; more prompts leave more of ``alpha`` used.

    Args:
        alpha: the bound.
        delta: None for the conformal claim, ``ceil(1 / alpha) - 1`` prompts; else
            ``ceil(ln(delta / categories) / ln(1 - alpha))``.
        categories: thresholds that share ``delta``.

    Raises:
        ArgumentError: ``alpha`` or ``delta`` outside (0, 1), ``categories`` below 1.
    """
    if categories < 1:
        raise ArgumentError(f"categories: expected 1 or more, got {categories}")
    return _required(_level(alpha, "alpha"), None if delta is None else _level(delta, "delta") / categories)


def _shortest(low: float, high: float) -> str:
    """The shortest decimal in (low, high]; ``high`` may be infinite."""
    # Only scores that differ by less than 1e-28 leave no decimal that a recipe can hold.
    return _native.shortest_margin(low, high) or repr(math.nextafter(low, math.inf))


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
    a, d = _level(alpha, "alpha"), None if delta is None else _level(delta, "delta")
    return threshold_at(scores, a, d, side)


def threshold_at(scores: Any, a: Fraction, d: Fraction | None, side: str, strict: bool = False) -> Threshold:
    """:func:`calibrate_threshold` with exact levels; ``strict`` if what equals the threshold does not refuse."""
    s = np.sort(_numbers(scores, "scores", (1,)))
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
        decimal = _shortest(value, _inside(float(above[0]), value, strict) if above.size else math.inf)
    else:
        rank = errors + 1
        value = float(s[rank - 1]) if rank else -math.inf
        under = s[s < value]
        if not rank:
            decimal = repr(value)
        else:
            low = float(under[-1]) if under.size else value - 1.0
            decimal = _shortest(low, _inside(value, low, strict))
    gate = float(decimal)
    with np.errstate(invalid="ignore"):
        guard = float(np.nanmin(np.abs(s - gate), initial=math.inf))
    return Threshold(
        value=value,
        side=side,
        method="conformal" if d is None else "pac",
        alpha=float(a),
        delta=None if d is None else float(d),
        n=n,
        rank=rank,
        n_required=_required(a, d),
        failure_probability=failure,
        guard=guard,
        decimal=decimal,
    )


def _inside(high: float, low: float, strict: bool) -> float:
    """The end of an interval whose open end must not be met by rounding."""
    return math.nextafter(high, low) if strict and math.isfinite(high) else high
