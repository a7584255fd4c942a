"""Over-refusal against catch rate over all thresholds, from scores alone."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArgumentError
from ..measure.rates import Rate
from .category_scores import ANSWER, CategoryScores, Decoder, Floats

if TYPE_CHECKING:
    from .recipe import Recipe

#: Prompts beyond which exact intervals are replaced by Wilson's, from which they no longer differ visibly.
_EXACT = 20_000


@dataclass(frozen=True, eq=False)
class TradeOff:
    """What each threshold ``t`` (gate) or bias ``-t`` (greedy, sampling) does to scored prompts, points from lax to
    strict.

    With several categories ``t`` moves all of them, category k at ``t + shifts[k]``: the ladder on which
    :func:`~abjure.refuse.calibrate` chooses a point. Under sampling the rates are mean probabilities.

    Attributes:
        decoder: see :func:`~abjure.refuse.calibrate`.
        names: the categories.
        thresholds: ``(points,)`` in margin units, ascending; the statistic at or above which a prompt is refused.
        over_refusal: ``(points,)``, of the prompts to be answered; NaN where there are none.
        catch_rate: ``(points,)``, of the prompts to be refused, under whichever category; NaN where there are none.
        named: ``(points, K)``, of each category's prompts those refused under it.
        answered, refused: prompts to be answered, and to be refused.
        level: of intervals and the band.
    """

    decoder: Decoder
    names: tuple[str, ...]
    thresholds: Floats
    over_refusal: Floats
    catch_rate: Floats
    named: Floats
    answered: int
    refused: int
    level: float
    shifts: tuple[float, ...] = ()
    rule: str = "ratio"
    temperature: float = 1.0

    @classmethod
    def of(
        cls,
        scores: CategoryScores,
        decoder: Decoder = "gate",
        *,
        rule: str = "ratio",
        shifts: Sequence[float] | Mapping[str, float] | None = None,
        points: int = 101,
        level: float = 0.95,
    ) -> TradeOff:
        """Counts for up to ``points`` thresholds, at quantiles of both kinds of prompts.

        Raises:
            ArgumentError: as :meth:`CategoryScores.statistic`, fewer than 2 points, ``level`` outside (0, 1).
        """
        if points < 2 or not 0 < level < 1:
            raise ArgumentError(f"points, level: expected 2 or more, and a number in (0, 1), got {points} and {level}")
        c = scores.shifts(shifts)
        sampled = decoder == "sampling"
        s = scores.log_odds(-c) if sampled else scores.statistic(decoder, c.tolist(), rule=rule)
        benign, refuse = scores.wanted == ANSWER, scores.wanted != ANSWER
        found = [np.quantile(x, np.linspace(0, 1, points), method="nearest") for x in (s[benign], s[refuse]) if x.size]
        t = np.unique(np.concatenate(found))
        t = t[np.isfinite(t)]
        if len(t) > points:
            t = t[np.linspace(0, len(t) - 1, points).astype(int)]
        # Beyond the largest score nothing is refused.
        t = np.append(t, float(np.nextafter(t[-1], math.inf))) if len(t) else np.array([0.0])
        each = np.full((len(t), len(c)), math.nan)
        if sampled:
            with np.errstate(over="ignore"):
                over, catch = (_mean_sigmoid(s[rows], t) for rows in (benign, refuse))
            for k in range(len(c)):
                part = scores.wanted == k
                if part.any():
                    own = scores.select(part)
                    each[:, k] = [own.tilted(-(x + c))[:, k].mean() for x in t]
        else:
            over, catch = (_reached(s[rows], t) for rows in (benign, refuse))
            category = scores.log_p[1:].argmax(axis=0) if rule == "mass" else _category(scores, decoder, c)
            for k in range(len(c)):
                part = scores.wanted == k
                each[:, k] = _reached(np.where(category == k, s, -math.inf)[part], t)
        return cls(
            decoder, scores.names, t, over, catch, each, int(benign.sum()), int(refuse.sum()), float(level),
            tuple(c.tolist()), rule, scores.temperature,
        )  # fmt: skip

    @property
    def band(self) -> tuple[float, float]:
        """Half-widths around the two rates that hold for all thresholds at once, with probability :attr:`level` each.

        Source: the inequality of Dvoretzky, Kiefer and Wolfowitz with Massart's constant, ``sqrt(ln(2 / delta) / 2n)``.
        """
        half = math.log(2 / (1 - self.level)) / 2
        return tuple(math.sqrt(half / n) if n else math.inf for n in (self.answered, self.refused))  # type: ignore[return-value]

    @cached_property
    def intervals(self) -> tuple[Floats, Floats]:
        """Pointwise intervals ``(points, 2)`` of over-refusal and catch rate.

        Clopper-Pearson (of more than 20 000 prompts Wilson); for mean probabilities Hoeffding's, which equals the band.
        """
        return self._intervals(self.over_refusal, self.answered, 0), self._intervals(self.catch_rate, self.refused, 1)

    def _intervals(self, rates: Floats, n: int, which: int) -> Floats:
        if not n:
            return np.full((len(rates), 2), math.nan)
        if self.decoder == "sampling":
            return np.clip(np.stack([rates - self.band[which], rates + self.band[which]], axis=1), 0.0, 1.0)
        method = "clopper-pearson" if n <= _EXACT else "wilson"
        counts = np.rint(rates * n).astype(int)
        known = {k: Rate(k, n).ci(method, self.level) for k in set(counts.tolist())}
        return np.array([known[k] for k in counts.tolist()])

    def at(self, over_refusal: float) -> int:
        """Index of the laxest point whose over-refusal is at most ``over_refusal``. No guarantee: see ``calibrate``."""
        fits = np.flatnonzero(self.over_refusal <= over_refusal)
        if not fits.size:
            raise ArgumentError(f"over_refusal: expected a rate that some point reaches, got {over_refusal}")
        return int(fits[0])

    def plot(self, axes: Any = None, recipe: Recipe | None = None) -> Any:
        """Catch rate over over-refusal, with pointwise intervals; needs matplotlib.

        Args:
            axes: to draw on; new ones by default.
            recipe: marked on the curve, if it is one of this decoder, rule and shifts.

        Returns:
            The axes.

        Raises:
            ArgumentError: one kind of prompt is missing, or a recipe of another curve.
        """
        if not (self.answered and self.refused):
            raise ArgumentError("plot: expected prompts to be answered and prompts to be refused")
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(figsize=(4.5, 4.0), layout="constrained").add_subplot()
        over, catch = self.intervals
        axes.fill_between(self.over_refusal, catch[:, 0], catch[:, 1], alpha=0.2, linewidth=0)
        axes.fill_betweenx(self.catch_rate, over[:, 0], over[:, 1], alpha=0.2, linewidth=0)
        axes.plot(self.over_refusal, self.catch_rate, marker=".", markersize=3, label=self.decoder)
        if recipe is not None:
            t = self._threshold_of(recipe)
            x, y = (float(np.interp(t, self.thresholds, r)) for r in (self.over_refusal, self.catch_rate))
            axes.plot([x], [y], marker="o", linestyle="none", label="recipe")
        axes.set_xlabel("over-refusal")
        axes.set_ylabel("catch rate")
        axes.legend()
        return axes

    def _threshold_of(self, recipe: Recipe) -> float:
        t = recipe.values if recipe.decoder == "gate" else -recipe.values
        if recipe.decoder == "sampling":
            t = t / self.temperature
        t = t - np.array(self.shifts)
        same = recipe.decoder == self.decoder and recipe.rule == self.rule and recipe.names == self.names
        if not same or not np.allclose(t, t[0], rtol=1e-9, atol=1e-9):
            raise ArgumentError("recipe: expected one of this curve's decoder, rule and shifts")
        return float(t[0])

    def __repr__(self) -> str:
        return (
            f"TradeOff({self.decoder}, {len(self.thresholds)} thresholds, {self.answered} prompts to be answered, "
            f"{self.refused} to be refused)"
        )

    def _repr_html_(self) -> str:
        rows = np.unique(np.linspace(0, len(self.thresholds) - 1, 12).astype(int))
        body = "".join(
            f"<tr><td>{self.thresholds[i]:.4g}</td><td>{self.over_refusal[i]:.4f}</td><td>{self.catch_rate[i]:.4f}</td>"
            "</tr>"
            for i in rows
        )
        head = "<th>threshold</th><th>over-refusal</th><th>catch rate</th>"
        return f"<table><caption>{html.escape(self.decoder)}</caption><tr>{head}</tr>{body}</table>"


def _category(scores: CategoryScores, decoder: Decoder, c: Floats) -> Floats:
    """Under which category a prompt is refused, if at all: a common shift does not change it."""
    found: Floats = (scores.category_statistic(decoder) - c).argmax(axis=1)
    return found


def _reached(s: Floats, t: Floats) -> Floats:
    """Share of ``s`` at or above each of ``t``."""
    if not s.size:
        return np.full(len(t), math.nan)
    found: Floats = 1 - np.searchsorted(np.sort(s), t, "left") / len(s)
    return found


def _mean_sigmoid(s: Floats, t: Floats) -> Floats:
    if not s.size:
        return np.full(len(t), math.nan)
    return np.array([float(np.mean(1 / (1 + np.exp(-(s - x))))) for x in t])
