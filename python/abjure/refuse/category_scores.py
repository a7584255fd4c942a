"""Scores of refusal categories from one pass over prompts: all that calibration and trade-off curves need.

Three decoders refuse by three statistics, which are not interchangeable:

``"gate"``: the margin reaches a threshold and the token is forced; statistic: the margin at the gate's temperature.
``"greedy"``: the biased logit exceeds every other; statistic: the lead over the largest logit outside all categories.
``"sampling"``: the biased token is drawn; statistic: the log-odds, and with exact guarantees log-odds minus the logit
of the uniform number that decides the draw.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._interop import shape
from .._modes import evaluating
from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ..measure.rates import Rate
from .bounds import log_sigmoid, winners
from .prompts import Prompts
from .tokens import RefusalTokens, row_margin, row_max_gap

if TYPE_CHECKING:
    from .recipe import Recipe
    from .trade_off import TradeOff

Decoder = Literal["gate", "greedy", "sampling"]
DECODERS = ("gate", "greedy", "sampling")
Floats = np.ndarray[Any, Any]

#: What ``wanted`` says of prompts that should be answered.
ANSWER = -1


@dataclass(frozen=True, eq=False)
class CategoryScores:
    """Scores of ``n`` prompts under K categories; row ``i`` is prompt ``i``. All float64.

    Attributes:
        names: the categories.
        margins: ``(n, K)``, log-odds of each category against all other tokens at :attr:`temperature`; the numbers that
            a gate compares with its thresholds, bit for bit.
        mass: ``(n,)``, log-odds of all categories together.
        log_p: ``(K + 1, n)``, log-probabilities of everything else (row 0) and of each category.
        leads: ``(n, K)``, a category's largest logit minus the largest outside all categories; None if unknown, and
            greedy decoding cannot be calibrated.
        wanted: ``(n,)``, the category under which a prompt should be refused, -1 for one that should be answered.
        clusters: ``(n,)`` numbers of base prompts of which several rows are variants, or None. Guarantees count
            clusters, each by its largest score.
        temperature: of margins and probabilities.
    """

    names: tuple[str, ...]
    margins: Floats
    mass: Floats
    log_p: Floats
    leads: Floats | None
    wanted: Floats
    clusters: Floats | None = None
    temperature: float = 1.0

    @classmethod
    def from_logits(
        cls, logits: Any, tokens: RefusalTokens, wanted: Any = None, *, clusters: Any = None
    ) -> CategoryScores:
        """Scores from the logits at the first response position, ``(n, vocabulary)``, before any bias.

        Args:
            logits: as the decoder will see them, before temperature and truncation; any dtype.
            tokens: names the categories and holds the temperature; its biases and thresholds play no part.
            wanted: per prompt a category's name or index, None or -1 for a prompt to be answered; None: all of these.
            clusters: see the class.

        Raises:
            ShapeError, ArgumentError: as :func:`~abjure.refuse.row_margin`, or lists that do not fit the rows.
            NonFiniteError: a NaN or +inf in a row. DegenerateError: a row of -inf only.
        """
        groups = list(tokens.categories.values())
        if len(shape(logits, "logits")) != 2:
            raise ShapeError(f"logits: expected shape (prompts, vocabulary), got {shape(logits, 'logits')}")
        union = sorted(i for ids in groups for i in ids)
        z = tokens.visible(logits)
        found = _host(row_margin(z, [*groups, union], tokens.temperature))
        own = np.stack([_group_lse(z, ids, tokens.temperature) for ids in groups], axis=1)
        peaks = np.stack([_host(z[:, ids]).max(axis=1) for ids in groups], axis=1)
        # All against the largest outside, each from the largest inside: differences of stored numbers, no logarithm.
        with np.errstate(invalid="ignore"):
            gap = _host(row_max_gap(z, [union]))[:, 0]
            leads = np.where(np.isneginf(peaks), -math.inf, peaks - peaks.max(axis=1, keepdims=True) + gap[:, None])
            inside = np.where(np.isneginf(own), -math.inf, own - _lse(own)[:, None])
        mass = found[:, -1]
        log_p = np.vstack([log_sigmoid(-mass), log_sigmoid(mass) + inside.T])
        return cls._checked(tokens.names, found[:, :-1], mass, log_p, leads, wanted, clusters, tokens.temperature)

    @classmethod
    def from_margins(
        cls,
        margins: Any,
        names: Sequence[str] | None = None,
        wanted: Any = None,
        *,
        leads: Any = None,
        clusters: Any = None,
        temperature: float = 1.0,
    ) -> CategoryScores:
        """Scores from margins ``(n,)`` or ``(n, K)`` that were collected elsewhere.

        With several categories the rest's probability is 1 minus their sum, which loses digits where that is near 0.

        Raises:
            ShapeError, ArgumentError: lists that do not fit. NonFiniteError: a NaN.
            DegenerateError: categories of a row that are more than certain together.
        """
        m = _matrix(margins, "margins")
        names = [f"category {k}" for k in range(m.shape[1])] if names is None else [str(n) for n in names]
        if m.shape[1] == 1:
            mass = m[:, 0].copy()
            log_p = np.stack([log_sigmoid(-mass), log_sigmoid(mass)])
        else:
            inside = log_sigmoid(m)
            q = np.exp(inside).sum(axis=1)
            if (q > 1 + 1e-9).any():
                raise DegenerateError(f"margins: categories of row {int(q.argmax())} are more than certain together")
            with np.errstate(divide="ignore"):
                rest = np.log1p(-np.minimum(q, 1.0))
                mass = np.where(q > 0, _lse(inside), -math.inf) - rest
            log_p = np.vstack([rest, inside.T])
        leads = None if leads is None else _matrix(leads, "leads")
        return cls._checked(names, m, mass, log_p, leads, wanted, clusters, float(temperature))

    @classmethod
    def _checked(
        cls,
        names: Sequence[str],
        margins: Floats,
        mass: Floats,
        log_p: Floats,
        leads: Floats | None,
        wanted: Any,
        clusters: Any,
        temperature: float,
    ) -> CategoryScores:
        n, k = margins.shape
        if len(names) != k or len(set(names)) != k:
            raise ArgumentError(f"names: expected {k} different names, got {list(names)}")
        if leads is not None and leads.shape != margins.shape:
            raise ShapeError(f"leads: expected shape {margins.shape} as margins, got {leads.shape}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ArgumentError(f"temperature: expected a positive finite number, got {temperature}")
        found = _wanted(wanted, list(names), n)
        groups = None
        if clusters is not None:
            groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
            if groups.shape != (n,):
                raise ShapeError(f"clusters: expected {n} (one per prompt), got shape {np.shape(clusters)}")
        return cls(tuple(names), margins, mass, log_p, leads, found, groups, temperature)

    def __len__(self) -> int:
        return len(self.mass)

    def select(self, rows: Any) -> CategoryScores:
        """The prompts at ``rows``: a mask, indices, or a category's name (those to be refused under it).

        Raises:
            ArgumentError: an unknown name. ShapeError: no prompt left.
        """
        if isinstance(rows, str):
            rows = self.wanted == self._index(rows)
        at = np.arange(len(self))[rows]
        if not at.size:
            raise ShapeError("rows: expected at least one prompt, got none")
        leads = None if self.leads is None else self.leads[at]
        clusters = None if self.clusters is None else self.clusters[at]
        log_p = np.ascontiguousarray(self.log_p[:, at])
        return CategoryScores(
            self.names, self.margins[at], self.mass[at], log_p, leads, self.wanted[at], clusters, self.temperature
        )

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ArgumentError(f"category: expected one of {list(self.names)}, got {name!r}")
        return self.names.index(name)

    def category_statistic(self, decoder: Decoder, seed: int = 0) -> Floats:
        """``(n, K)``: per category what is compared with a threshold, or with minus the bias.

        ``"sampling"`` subtracts the logit of one uniform number per prompt and category, keyed by ``seed`` and the row:
        a category with bias b is drawn only if this is at least -b.

        Raises:
            ArgumentError: an unknown decoder, or greedy decoding without leads.
        """
        if decoder not in DECODERS:
            raise ArgumentError(f"decoder: expected one of {', '.join(map(repr, DECODERS))}, got {decoder!r}")
        if decoder == "gate":
            return self.margins
        if decoder == "greedy":
            if self.leads is None:
                raise ArgumentError("decoder: greedy decoding needs leads (row_max_gap), and these scores have none")
            return self.leads
        with np.errstate(invalid="ignore"):
            odds: Floats = np.where(np.isneginf(self.log_p[1:]), -math.inf, self.log_p[1:] - self.log_p[0]).T
        return odds - uniform_logits(seed, odds.shape)

    def statistic(
        self, decoder: Decoder, shifts: Sequence[float] | None = None, *, rule: str = "ratio", seed: int = 0
    ) -> Floats:
        """``(n,)``: the number whose threshold ``t`` gives category k the threshold ``t + shifts[k]``, or that bias
        negated.

        The largest of ``category_statistic - shifts`` (gate, greedy); the mass's margin (gate with ``rule="mass"``);
        the log-odds of the mass so shifted, minus the logit of a uniform number keyed by ``seed`` and row (sampling).

        Raises:
            ArgumentError: as :meth:`category_statistic`; shifts that are not K finite numbers, or with ``rule="mass"``.
        """
        c = self.shifts(shifts)
        if rule == "mass":
            if decoder != "gate" or c.any():
                raise ArgumentError("rule: 'mass' goes with decoder 'gate' and without shifts")
            return self.mass
        if decoder != "sampling":
            found: Floats = self.category_statistic(decoder)[:, 0] - c[0]
            for k in range(1, len(c)):
                np.maximum(found, self.category_statistic(decoder)[:, k] - c[k], out=found)
            return found
        return self.log_odds(-c) - uniform_logits(seed, (len(self),))

    def shifts(self, shifts: Sequence[float] | Mapping[str, float] | None) -> Floats:
        """One finite number per category.

        Raises:
            ArgumentError: it is not that.
        """
        if isinstance(shifts, Mapping):
            shifts = [shifts.get(name, math.nan) for name in self.names]
        c = np.zeros(len(self.names)) if shifts is None else np.asarray(shifts, dtype=np.float64)
        if c.shape != (len(self.names),) or not np.isfinite(c).all():
            raise ArgumentError(f"shifts: expected {len(self.names)} finite numbers, one per category, got {shifts}")
        return c

    def log_odds(self, bias: Any) -> Floats:
        """``(n,)``: log-odds of a refusal when every category's log-odds are raised by its bias."""
        b = np.asarray(bias, dtype=np.float64)
        if len(b) == 1:
            common: Floats = self.mass + b[0]
            return common
        # A common bias moves the stored mass, so that prompts whose rest has lost its digits keep theirs.
        with np.errstate(invalid="ignore"):
            inside = _lse((self.log_p[1:] + b[:, None]).T) - _lse(self.log_p[1:].T)
        found: Floats = self.mass + np.where(np.isnan(inside), 0.0, inside)
        return found

    def tilted(self, bias: Any) -> Floats:
        """``(n, K)``: probability of each category with its logit raised by its bias (at the scores' temperature)."""
        b = np.asarray(bias, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            raised = np.where(np.isneginf(self.log_p[1:]), -math.inf, self.log_p[1:] + b[:, None])
        both = np.vstack([self.log_p[:1], raised]).T
        found: Floats = np.exp(both[:, 1:] - _lse(both)[:, None])
        return found

    def decide(self, recipe: Recipe, *, seed: int = 1) -> Floats:
        """``(n,)``: the category under which each prompt is refused by a recipe, -1 where it is answered. No
        generation.

        Sampling draws each prompt's first token by a uniform number keyed by ``seed`` and row.

        Raises:
            ArgumentError: a recipe of other categories or another temperature, or of a decoder that the scores lack.
        """
        recipe.expect(self)
        values = recipe.values
        if recipe.decoder == "sampling":
            u = uniform(seed, (len(self),))
            below = np.cumsum(self.tilted(values / self.temperature), axis=1)
            return np.where(u <= below[:, -1], (u[:, None] > below).sum(axis=1), ANSWER)
        if recipe.decoder == "greedy":
            return winners(self.category_statistic("greedy"), -values, strict=True)
        if recipe.rule == "mass":
            fires = winners(self.mass[:, None], values[:1], strict=False) == 0
            return np.where(fires, self.log_p[1:].argmax(axis=0), ANSWER)
        return winners(self.margins, values, strict=False)

    def rates(self, recipe: Recipe, *, seed: int = 1) -> RefusalRates:
        """How often a recipe refuses these prompts, by category. See :meth:`decide`."""
        found = self.decide(recipe, seed=seed)
        expected = None
        if recipe.decoder == "sampling":
            expected = tuple(self.tilted(recipe.values / self.temperature).mean(axis=0).tolist())
        return RefusalRates(self.names, found, self.wanted, expected)

    def trade_off(self, decoder: Decoder = "gate", **options: Any) -> TradeOff:
        """Over-refusal and catch rate over all thresholds or biases; see :class:`~abjure.refuse.TradeOff`."""
        from .trade_off import TradeOff

        return TradeOff.of(self, decoder, **options)

    def benign(self, values: Floats) -> Floats:
        """``values`` of the prompts to be answered, of each cluster of variants the largest.

        Raises:
            DegenerateError: there are none.
        """
        return self._part(values, self.wanted == ANSWER, "to be answered", np.maximum, -math.inf)

    def refused(self, values: Floats) -> Floats:
        """``values`` of the prompts to be refused, of each cluster of variants the smallest.

        Raises:
            DegenerateError: there are none.
        """
        return self._part(values, self.wanted != ANSWER, "to be refused", np.minimum, math.inf)

    def _part(self, values: Floats, rows: Floats, what: str, reduce: Any, start: float) -> Floats:
        if not rows.any():
            raise DegenerateError(f"wanted: no prompt is {what}")
        if self.clusters is None:
            return values[rows]
        numbers, at = np.unique(self.clusters[rows], return_inverse=True)
        found = np.full(len(numbers), start)
        reduce.at(found, at, values[rows])
        return found

    def __repr__(self) -> str:
        answered = int((self.wanted == ANSWER).sum())
        each = ", ".join(f"{int((self.wanted == k).sum())} {name!r}" for k, name in enumerate(self.names))
        return (
            f"CategoryScores({len(self)} prompts: {answered} to be answered, {each}; temperature {self.temperature:g})"
        )


@dataclass(frozen=True, eq=False)
class RefusalRates:
    """What a recipe does to scored prompts.

    Attributes:
        names: the categories.
        refused: ``(n,)`` category per prompt, -1 where it is answered.
        wanted: ``(n,)`` as in the scores.
        expected: mean probability of each category over all prompts, for sampling; None for the other decoders.
    """

    names: tuple[str, ...]
    refused: Floats
    wanted: Floats
    expected: tuple[float, ...] | None = None

    @property
    def all(self) -> Rate:
        """Prompts refused under any category."""
        return _rate(self.refused != ANSWER)

    @property
    def over_refusal(self) -> Rate:
        """Prompts to be answered that are refused."""
        return _rate(self.refused[self.wanted == ANSWER] != ANSWER)

    @property
    def share(self) -> dict[str, Rate]:
        """Of all prompts those refused under each category."""
        return {name: _rate(self.refused == k) for k, name in enumerate(self.names)}

    @property
    def caught(self) -> dict[str, Rate]:
        """Of each category's prompts those refused, under whichever category."""
        return {name: _rate(self.refused[self.wanted == k] != ANSWER) for k, name in enumerate(self.names)}

    @property
    def named(self) -> dict[str, Rate]:
        """Of each category's prompts those refused under it."""
        return {name: _rate(self.refused[self.wanted == k] == k) for k, name in enumerate(self.names)}

    def _rows(self) -> list[tuple[str, Rate]]:
        rows = [("refused", self.all), ("over-refusal", self.over_refusal)]
        rows += [(f"refused as {name}", r) for name, r in self.share.items()]
        return rows + [(f"caught, {name}", r) for name, r in self.caught.items()]

    def __repr__(self) -> str:
        body = "\n".join(f"  {name}: {r.k}/{r.n} = {r.rate:.4f}{_interval(r)}" for name, r in self._rows() if r.n)
        return f"RefusalRates (Clopper-Pearson 95 %)\n{body}"

    def _repr_html_(self) -> str:
        body = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{r.k}/{r.n}</td><td>{r.rate:.4f}</td><td>{_interval(r)}</td></tr>"
            for name, r in self._rows()
            if r.n
        )
        return f"<table><tr><th></th><th>count</th><th>rate</th><th>95 % (Clopper-Pearson)</th></tr>{body}</table>"


def score_categories(
    model: Any,
    prompts: Prompts,
    tokens: RefusalTokens,
    wanted: Any = None,
    *,
    clusters: Any = None,
    batch_size: int = 16,
) -> CategoryScores:
    """One forward pass per prompt, no generation; only scores are kept, never the logits of all prompts.

    Logits of one prompt differ in their last digits with the batch it is in; a recipe's ``guard`` says how much its
    calibration set can bear.

    Args:
        model: a Hugging Face decoder with its output head.
        prompts: a :class:`~abjure.refuse.Prompts`, with its chat template up to where the answer begins.
        tokens: the categories, and their temperature.
        wanted: per prompt a category's name or index, None or -1 for one to be answered.
        clusters: numbers of base prompts, where several prompts are variants of one.
        batch_size: prompts per forward pass.

    Raises:
        ArgumentError, ShapeError: lists that do not fit, a token outside the vocabulary.
        NonFiniteError: the model gives a NaN or infinite logits.
    """
    from .select import each_last_logits

    _wanted(wanted, tokens.names, len(prompts))
    parts, order = [], []
    with evaluating(model):
        for chosen, rows in each_last_logits(model, prompts, batch_size):
            try:
                parts.append(CategoryScores.from_logits(rows, tokens))
            except (NonFiniteError, DegenerateError) as err:
                raise type(err)(f"{err} (among prompts {chosen})") from err
            order += chosen
    back = np.argsort(order)
    leads = [p.leads for p in parts if p.leads is not None]
    return CategoryScores._checked(
        tokens.names,
        np.concatenate([p.margins for p in parts])[back],
        np.concatenate([p.mass for p in parts])[back],
        np.ascontiguousarray(np.concatenate([p.log_p for p in parts], axis=1)[:, back]),
        np.concatenate(leads)[back],
        wanted,
        clusters,
        tokens.temperature,
    )


def uniform(seed: int, size: tuple[int, ...]) -> Floats:
    """Uniform numbers in [0, 1) that depend on the seed and the place alone.

    Raises:
        ArgumentError: a negative seed.
    """
    if seed < 0:
        raise ArgumentError(f"seed: expected 0 or more, got {seed}")
    return np.random.Generator(np.random.Philox(key=seed)).random(size)


def uniform_logits(seed: int, size: tuple[int, ...]) -> Floats:
    """:func:`uniform` as logits."""
    u = uniform(seed, size)
    with np.errstate(divide="ignore"):
        found: Floats = np.log(u) - np.log1p(-u)
    return found


def _rate(verdicts: Floats) -> Rate:
    return Rate(int(verdicts.sum()), len(verdicts))


def _interval(r: Rate) -> str:
    found = r.ci("clopper-pearson")
    return f" [{found[0]:.4f}, {found[1]:.4f}]" if found else ""


def _host(x: Any) -> Floats:
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, dtype=np.float64)


def _matrix(x: Any, arg: str) -> Floats:
    m = _host(x)
    m = m[:, None] if m.ndim == 1 else m
    if m.ndim != 2 or 0 in m.shape:
        raise ShapeError(f"{arg}: expected shape (n,) or (n, categories), not empty, got {m.shape}")
    if np.isnan(m).any():
        raise NonFiniteError(f"{arg}: NaN at flat index {int(np.isnan(m).argmax())}")
    return m


def _lse(x: Floats) -> Floats:
    """Log-sum-exp of the last axis."""
    peak = x.max(axis=-1)
    safe = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        found: Floats = np.where(np.isfinite(peak), safe + np.log(np.exp(x - safe[..., None]).sum(axis=-1)), peak)
    return found


def _group_lse(z: Any, ids: list[int], temperature: float) -> Floats:
    return _lse(_host(z[:, ids]) / temperature)


def _wanted(wanted: Any, names: Sequence[str], n: int) -> Floats:
    if wanted is None:
        return np.full(n, ANSWER)
    if not isinstance(wanted, Iterable) or isinstance(wanted, (str, bytes)):
        raise ArgumentError(f"wanted: expected one category or None per prompt, got {wanted!r:.80}")
    known = np.asarray(wanted) if getattr(getattr(wanted, "dtype", None), "kind", "") == "i" else None
    if known is not None and known.shape == (n,) and known.min() >= ANSWER and known.max() < len(names):
        return known.astype(np.int64)
    found = []
    for i, w in enumerate(wanted):
        if w is None:
            found.append(ANSWER)
        elif isinstance(w, str) and w in names:
            found.append(list(names).index(w))
        elif not isinstance(w, str) and ANSWER <= int(w) < len(names) and int(w) == w:
            found.append(int(w))
        else:
            raise ArgumentError(f"wanted: expected None or one of {list(names)} at index {i}, got {w!r}")
    if len(found) != n:
        raise ShapeError(f"wanted: expected {n} (one per prompt), got {len(found)}")
    return np.array(found)
