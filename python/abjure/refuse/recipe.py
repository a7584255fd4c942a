"""Calibrated settings of refusal tokens: found on scored prompts, saved as decimals, applied by a logits processor."""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import _native
from .._files import write_atomically
from ..errors import AbjureError, ArgumentError, DegenerateError, ShapeError
from .bounds import Threshold, _level, _single_bias, outcome_bias, share_thresholds, threshold_at
from .category_scores import DECODERS, CategoryScores, Decoder, Floats
from .tokens import RefusalTokens

_FORMAT = "abjure.refusal-recipe.1"
_LEVELS = np.linspace(0.0, 1.0, 21)


@dataclass(frozen=True)
class Recipe:
    """Thresholds or biases of refusal categories for one decoder at one temperature.

    Attributes:
        decoder: ``"gate"``, ``"greedy"`` or ``"sampling"``; see :func:`calibrate`.
        names: the categories.
        decimals: per category the threshold in margin units (gate) or the bias on the logit (greedy, sampling), exactly
            as it is saved; :attr:`values` are the nearest doubles, which a processor uses.
        rule: how several categories decide under a gate, ``"ratio"`` or ``"mass"``.
        temperature: of the margins (gate) or of decoding (sampling).
        ids: per category the token ids, None where they were not known.
        texts: per category the tokens' texts, None where they were not known.
        on_no_fire: what a gate does with a row that is answered; see :class:`~abjure.refuse.RefusalTokens`.
        claim: what was asked and what holds: ``asked``, ``kind``, and with a guarantee ``method``, ``delta``, ``n``,
            ``rank``, ``n_required`` per threshold.
        calibration: of the prompts used their number, a digest of their scores, quantiles of the statistic, the
            smallest distance ``guard`` of a score from its threshold, and the shares ``achieved`` on them.
    """

    decoder: Decoder
    names: tuple[str, ...]
    decimals: tuple[str, ...]
    rule: str = "ratio"
    temperature: float = 1.0
    ids: tuple[tuple[int, ...], ...] | None = None
    texts: tuple[tuple[str, ...], ...] | None = None
    on_no_fire: int | str = "keep"
    claim: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise ArgumentError(f"decoder: expected one of {', '.join(map(repr, DECODERS))}, got {self.decoder!r}")
        if self.rule not in ("ratio", "mass") or (self.rule == "mass" and self.decoder != "gate"):
            raise ArgumentError(f"rule: expected 'ratio', or 'mass' with decoder 'gate', got {self.rule!r}")
        k = len(self.names)
        if not k or len(self.decimals) != k or any(x is not None and len(x) != k for x in (self.ids, self.texts)):
            raise ShapeError(f"decimals: expected one per category {list(self.names)}, got {list(self.decimals)}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ArgumentError(f"temperature: expected a positive finite number, got {self.temperature}")
        values = self.values
        if self.decoder != "gate" and np.isposinf(values).any():
            raise ArgumentError("decimals: expected biases below inf")
        if self.rule == "mass" and len(set(values.tolist())) != 1:
            raise ArgumentError(f"decimals: expected one threshold for all with rule 'mass', got {list(self.decimals)}")

    @property
    def values(self) -> Floats:
        """``(K,)`` float64: the thresholds or biases as they are used.

        Raises:
            ArgumentError: a text that is no decimal of at most 28 digits.
        """
        return np.array([_native.margin_value(d) for d in self.decimals])

    def expect(self, scores: CategoryScores) -> None:
        """Checks that scores are of these categories and this temperature.

        Raises:
            ArgumentError: they are not.
        """
        if scores.names != self.names:
            raise ArgumentError(f"scores: expected categories {list(self.names)}, got {list(scores.names)}")
        if self.decoder != "greedy" and scores.temperature != self.temperature:
            raise ArgumentError(
                f"scores: expected temperature {self.temperature:g}, for which alone the recipe holds, "
                f"got {scores.temperature:g}"
            )

    def processor(self, tokens: RefusalTokens | None = None, **options: Any) -> RefusalTokens:
        """The logits processor that does what the recipe says; ``options`` as of the class, besides what it fixes.

        Args:
            tokens: names the ids, where the recipe does not.

        Raises:
            ArgumentError: no ids, or those of other categories.
        """
        if tokens is not None and tuple(tokens.names) != self.names:
            raise ArgumentError(f"tokens: expected categories {list(self.names)}, got {tokens.names}")
        if tokens is None and self.ids is None:
            raise ArgumentError("tokens: expected a RefusalTokens, since the recipe holds no token ids")
        categories: Mapping[str, Any]
        if tokens is not None:
            categories = tokens.categories
            for name in ("vocab_size", "tail"):
                options.setdefault(name, getattr(tokens, name))
        else:
            categories = dict(zip(self.names, map(list, self.ids or ()), strict=True))
        each = dict(zip(self.names, self.values.tolist(), strict=True))
        if self.decoder == "gate":
            options.setdefault("on_no_fire", self.on_no_fire)
            threshold = each[self.names[0]] if self.rule == "mass" else each
            options |= {"threshold": threshold, "rule": self.rule, "temperature": self.temperature}
        else:
            options |= {"bias": each}
        return RefusalTokens(categories, **options)

    def generation(self, tokens: RefusalTokens | None = None, **options: Any) -> dict[str, Any]:
        """Arguments of ``model.generate()`` under which the recipe's claim holds for the first response token.

        Greedy: no sampling. Sampling: the temperature it was calibrated for, and no truncation, since a token outside
        the nucleus is never drawn whatever its probability. A gate decides before any of that and leaves them alone.
        """
        found: dict[str, Any] = {"logits_processor": [self.processor(tokens, **options)]}
        if self.decoder == "greedy":
            found |= {"do_sample": False, "num_beams": 1}
        if self.decoder == "sampling":
            found |= {"do_sample": True, "num_beams": 1, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return found

    def drift(self, scores: CategoryScores, delta: float = 0.05) -> tuple[float, float]:
        """Distance of new scores from those calibrated on, and what chance alone exceeds with probability ``delta``.

        The largest difference of the distribution functions at the saved quantiles of the statistic. A distance above
        the second number says that the guarantee, which needs exchangeable prompts, no longer applies.

        Args:
            scores: of new prompts; those to be answered count where the recipe bounds over-refusal, all otherwise.
            delta: chance of a false alarm.

        Raises:
            ArgumentError: other categories or temperature, no saved quantiles, ``delta`` outside (0, 1).

        Source: the inequality of Dvoretzky, Kiefer and Wolfowitz with Massart's constant, for both samples.
        """
        self.expect(scores)
        _level(delta, "delta")
        if not self.calibration.get("quantiles"):
            raise ArgumentError("recipe: expected the quantiles of a calibration set, got none")
        s = _compared(scores, self.decoder, self.rule, self.claim.get("shifts"), self.claim.get("kind"))
        old = np.array([float(q) for q in self.calibration["quantiles"]])
        low = np.searchsorted(np.sort(s), old, "left") / len(s)
        high = np.searchsorted(np.sort(s), old, "right") / len(s)
        distance = max(float((low - _LEVELS).max()), float((_LEVELS - high).max()), 0.0)
        n = int(self.calibration["compared"])
        chance = math.sqrt(math.log(4 / delta) / 2) * (1 / math.sqrt(n) + 1 / math.sqrt(len(s))) + 1 / n
        return distance, chance

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON in which thresholds and biases are the texts of :attr:`decimals`.

        Raises:
            ArgumentError: the path cannot be written.
        """
        value = "threshold" if self.decoder == "gate" else "bias"
        categories: list[dict[str, Any]] = []
        for k, name in enumerate(self.names):
            entry: dict[str, Any] = {"name": name, value: self.decimals[k]}
            if self.ids is not None:
                entry["ids"] = list(self.ids[k])
            if self.texts is not None:
                entry["texts"] = list(self.texts[k])
            categories.append(entry)
        content = {
            "format": _FORMAT,
            "decoder": self.decoder,
            "rule": self.rule,
            "temperature": repr(self.temperature),
            "on_no_fire": self.on_no_fire,
            "categories": categories,
            "claim": dict(self.claim),
            "calibration": dict(self.calibration),
        }
        write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], tokenizer: Any = None) -> Recipe:
        """Reads what :meth:`save` wrote, or somebody edited; numbers may stand with or without quotes.

        Args:
            path: the file.
            tokenizer: if given, every text must be the one token whose id the recipe holds.

        Raises:
            ArgumentError: no such file, not a recipe, a threshold that is no decimal, a tokenizer of other ids.
        """
        from .tokens import single_token

        name = os.fspath(path)
        if not Path(path).is_file():
            raise ArgumentError(f"path: expected a readable file, got {name!r}")
        try:
            # Numbers stay as they are written: a double in between would lose digits.
            content = json.loads(Path(path).read_text("utf-8"), parse_float=str, parse_int=str)
            if content["format"] != _FORMAT:
                raise ArgumentError(f"path: expected format {_FORMAT}, got {content['format']!r}")
            entries = content["categories"]
            value = "threshold" if content["decoder"] == "gate" else "bias"
            no_fire = content.get("on_no_fire", "keep")
            found = cls(
                content["decoder"],
                tuple(str(e["name"]) for e in entries),
                tuple(str(e[value]) for e in entries),
                content["rule"],
                float(content["temperature"]),
                tuple(tuple(int(i) for i in e["ids"]) for e in entries) if "ids" in entries[0] else None,
                tuple(tuple(e["texts"]) for e in entries) if "texts" in entries[0] else None,
                no_fire if no_fire in ("keep", "free") else int(no_fire),
                _numbers(content.get("claim", {})),
                _numbers(content.get("calibration", {})),
            )
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as err:
            if isinstance(err, AbjureError):
                raise
            raise ArgumentError(f"path: {name!r} is not a saved recipe ({type(err).__name__}: {err})") from err
        if tokenizer is not None and found.texts is not None and found.ids is not None:
            for texts, ids in zip(found.texts, found.ids, strict=True):
                for text, i in zip(texts, ids, strict=True):
                    if (now := single_token(tokenizer, text)) != i:
                        raise ArgumentError(f"tokenizer: expected id {i} for {text!r}, got {now}")
        return found

    def __repr__(self) -> str:
        value = "threshold" if self.decoder == "gate" else "bias"
        each = ", ".join(f"{n}: {d}" for n, d in zip(self.names, self.decimals, strict=True))
        return f"Recipe({self.decoder}, {value} {{{each}}}, temperature {self.temperature:g}; {self._claim()})"

    def _claim(self) -> str:
        asked = self.claim.get("asked")
        if not asked:
            return "no claim"
        if self.claim["kind"] == "target_rate":
            return f"target rate {asked}, achieved {self.calibration.get('achieved')}"
        short = [t for t in self.claim["thresholds"] if t["rank"] == 0]
        if short:
            return f"over-refusal <= {asked} cannot be claimed: {short[0]['n_required']} prompts are needed"
        delta = self.claim.get("delta")
        sure = "for the next prompt" if delta is None else f"with probability {1 - float(delta):g}"
        return f"over-refusal <= {asked} {sure}, n = {self.claim['thresholds'][0]['n']}"

    def _repr_html_(self) -> str:
        value = "threshold" if self.decoder == "gate" else "bias"
        body = "".join(
            f"<tr><td>{html.escape(n)}</td><td>{d}</td></tr>" for n, d in zip(self.names, self.decimals, strict=True)
        )
        caption = html.escape(f"{self.decoder}, temperature {self.temperature:g}; {self._claim()}")
        return f"<table><caption>{caption}</caption><tr><th>category</th><th>{value}</th></tr>{body}</table>"


def calibrate(
    scores: CategoryScores,
    tokens: RefusalTokens | None = None,
    *,
    decoder: Decoder = "gate",
    target_rate: float | Mapping[str, float] | None = None,
    max_over_refusal: float | Mapping[str, float] | None = None,
    min_catch_rate: float | None = None,
    delta: float | None = None,
    rule: Literal["ratio", "mass"] = "ratio",
    shifts: Sequence[float] | Mapping[str, float] | None = None,
    on_no_fire: int | Literal["keep", "free", "respond"] = "keep",
    seed: int = 0,
) -> Recipe:
    """Thresholds or biases for a wanted refusal rate, or for a bound on over-refusal with a finite-sample guarantee.

    Exactly one of ``target_rate`` and ``max_over_refusal``. A target is a share of all scored prompts, reached on them
    (by mean probability where the decoder samples); how far it carries over is what
    ``held_out.rates(recipe)`` measures. A bound counts the prompts to be answered only, and with one number holds for
    refusals of all categories together.

    ==================  ======================================  ===============================================
    \\                   one number                              a number per category
    ==================  ======================================  ===============================================
    target, gate        order statistic of the union            joint: each category wins its share of prompts
    target, greedy      the same of leads                       the same of leads
    target, sampling    root of the mean probability            joint convex solve
    bound, all          order statistic of the union            one per category at ``delta / K`` (Bonferroni)
    ==================  ======================================  ===============================================

    The union's score is ``max_k(score_k - shifts[k])``: one threshold ``t`` for it gives category k the threshold ``t +
    shifts[k]`` and needs no correction, as long as the shifts were fixed before these prompts were looked at. For
    sampling, guarantees go by ``log-odds - logit(u)`` with keyed uniform numbers u, since a draw refuses exactly where
    that reaches minus the bias: the bound is one on refusals drawn, not on mean probabilities.

    Args:
        scores: of validation prompts, at the temperature of serving.
        tokens: puts ids and texts into the recipe.
        decoder: ``"gate"`` (forced threshold), ``"greedy"`` or ``"sampling"`` (both with a bias).
        target_rate: rate, or rates with a sum below 1, in (0, 1).
        max_over_refusal: bound, or bounds per category, in (0, 1).
        min_catch_rate: with one ``max_over_refusal``: the threshold must also catch at least this rate of the prompts
            to be refused, at the same kind of claim.
        delta: None for the conformal claim (over data and the next prompt); else the claim holds with probability ``1 -
            delta`` over the data.
        rule: ``"ratio"``, or under a gate ``"mass"``: one threshold for the sum.
        shifts: of the union, in logits (at the scores' temperature); none by default.
        on_no_fire: what the gate does with rows that it answers; ``"respond"`` for ``tokens``' respond token.
        seed: of the uniform numbers.

    Returns:
        A :class:`Recipe`. Of too few prompts its thresholds are inf (biases -inf): it never refuses, and says how many
        are needed (:func:`~abjure.refuse.prompts_needed`).

    Raises:
        ArgumentError: a rate outside (0, 1), none or both asked for, options that do not go together.
        DegenerateError: no prompt to be answered, a target that no bias reaches, or a bound and a catch rate that no
            threshold meets both; the message holds both thresholds.
    """
    if (target_rate is None) == (max_over_refusal is None):
        raise ArgumentError("target_rate, max_over_refusal: expected exactly one of them")
    if decoder not in DECODERS:
        raise ArgumentError(f"decoder: expected one of {', '.join(map(repr, DECODERS))}, got {decoder!r}")
    if rule not in ("ratio", "mass") or (rule == "mass" and decoder != "gate"):
        raise ArgumentError(f"rule: expected 'ratio', or 'mass' with decoder 'gate', got {rule!r}")
    if tokens is not None and tuple(tokens.names) != scores.names:
        raise ArgumentError(f"tokens: expected categories {list(scores.names)}, got {tokens.names}")
    if tokens is not None and tokens.temperature != scores.temperature:
        raise ArgumentError(f"tokens: expected temperature {scores.temperature:g}, got {tokens.temperature:g}")
    asked = target_rate if max_over_refusal is None else max_over_refusal
    if isinstance(asked, Mapping) and (rule == "mass" or shifts is not None):
        raise ArgumentError("shifts, rule: expected none beside numbers per category, which fix them")
    if min_catch_rate is not None and (max_over_refusal is None or isinstance(asked, Mapping)):
        raise ArgumentError("min_catch_rate: expected it beside one max_over_refusal for all categories")
    c = scores.shifts(shifts)
    claim: dict[str, Any] = {"asked": dict(asked) if isinstance(asked, Mapping) else asked, "shifts": c.tolist()}
    if max_over_refusal is not None:
        kind = "max_over_refusal"
        texts, found = _bounded(scores, decoder, max_over_refusal, min_catch_rate, delta, rule, c, seed)
        claim |= {"method": found[0].method, "delta": delta, "thresholds": [_summary(t) for t in found]}
        if min_catch_rate is not None:
            claim["min_catch_rate"] = min_catch_rate
        guard = min(t.guard for t in found)
    else:
        assert target_rate is not None
        kind, (texts, guard) = "target_rate", _targeted(scores, decoder, target_rate, rule, c)
    claim["kind"] = kind
    decimals = texts if decoder == "gate" else [_bias_text(t, scores.temperature, decoder) for t in texts]
    compared = _compared(scores, decoder, rule, c, kind)
    recipe = Recipe(
        decoder,
        scores.names,
        tuple(decimals),
        rule,
        scores.temperature if decoder != "greedy" else 1.0,
        None if tokens is None else tuple(map(tuple, tokens.categories.values())),
        None if tokens is None or tokens.texts is None else tuple(tuple(tokens.texts[n]) for n in scores.names),
        _no_fire(on_no_fire, tokens),
        claim,
    )
    if decoder == "sampling":
        achieved = scores.tilted(recipe.values / scores.temperature).mean(axis=0).tolist()
    else:
        achieved = [float((scores.decide(recipe) == k).mean()) for k in range(len(scores.names))]
    calibration = {
        "prompts": len(scores),
        "compared": len(compared),
        "sha256": hashlib.sha256(np.ascontiguousarray(compared).tobytes()).hexdigest(),
        "quantiles": [repr(float(q)) for q in np.quantile(compared, _LEVELS, method="inverted_cdf")],
        "guard": repr(guard),
        "achieved": dict(zip(scores.names, achieved, strict=True)),
    }
    return replace(recipe, calibration=calibration)


def _bounded(
    scores: CategoryScores,
    decoder: Decoder,
    bound: float | Mapping[str, float],
    catch: float | None,
    delta: float | None,
    rule: str,
    c: Floats,
    seed: int,
) -> tuple[list[str], list[Threshold]]:
    """Thresholds as texts (of minus the bias, where the decoder takes one), and the claims."""
    strict = decoder == "greedy"
    d = None if delta is None else _level(delta, "delta")
    if isinstance(bound, Mapping):
        levels = [_level(a, "max_over_refusal") for a in _each(bound, scores.names, "max_over_refusal")]
        share = None if d is None else d / len(levels)
        each = scores.category_statistic(decoder, seed)
        found = [threshold_at(scores.benign(each[:, k]), a, share, "ceiling", strict) for k, a in enumerate(levels)]
        return [t.decimal for t in found], found
    statistic = scores.statistic(decoder, c.tolist(), rule=rule, seed=seed)
    a = _level(bound, "max_over_refusal")
    ceiling = threshold_at(scores.benign(statistic), a, d, "ceiling", strict)
    if catch is not None:
        floor = threshold_at(scores.refused(statistic), 1 - _level(catch, "min_catch_rate"), d, "floor", strict)
        if not ceiling.gate <= floor.gate:
            raise DegenerateError(
                f"max_over_refusal, min_catch_rate: no threshold meets both: over-refusal <= {bound} needs at least "
                f"{ceiling.decimal} ({ceiling.n} prompts, {ceiling.n_required} are needed), a catch rate >= {catch} at "
                f"most {floor.decimal} ({floor.n} prompts, {floor.n_required} are needed); "
                f"the gap is {ceiling.gate - floor.gate:.6g}"
            )
    return _shifted(ceiling.decimal, c), [ceiling]


def _targeted(
    scores: CategoryScores, decoder: Decoder, target: float | Mapping[str, float], rule: str, c: Floats
) -> tuple[list[str], float]:
    """Thresholds as texts (of minus the bias at the scores' temperature), and the guard."""
    if isinstance(target, Mapping):
        rates = np.array([float(_level(r, "target_rate")) for r in _each(target, scores.names, "target_rate")])
        if not rates.sum() < 1:
            raise ArgumentError(f"target_rate: expected rates with a sum below 1, got {rates.tolist()}")
        if decoder == "sampling":
            return [repr(float(-b)) for b in outcome_bias(scores.log_p, rates)], math.inf
        each = scores.category_statistic(decoder)
        texts = share_thresholds(each, rates, strict=decoder == "greedy")[0]
        limits = np.array([float(t) for t in texts])
        with np.errstate(invalid="ignore"):
            return texts, float(np.nanmin(np.abs((each - limits).max(axis=1)), initial=math.inf))
    rate = float(_level(target, "target_rate"))
    if decoder == "sampling":
        b = _single_bias(scores.log_odds(-c), rate)
        return [repr(float(x - b)) for x in c], math.inf
    statistic = scores.statistic(decoder, c.tolist(), rule=rule)
    texts = share_thresholds(statistic[:, None], np.array([rate]), strict=decoder == "greedy")[0]
    return _shifted(texts[0], c), float(np.abs(statistic - float(texts[0])).min())


def _shifted(text: str, c: Floats) -> list[str]:
    """The exact decimals ``t + c_k``."""
    return [text if x == 0 else _native.margin_sum(text, repr(float(x))) for x in c]


def _bias_text(threshold: str, temperature: float, decoder: Decoder) -> str:
    """Minus a threshold as text. A bias acts before temperature, so it is that much larger on the logits."""
    if decoder == "sampling" and temperature != 1.0:
        return repr(-temperature * float(threshold))
    if threshold.startswith("-"):
        return threshold[1:]
    return threshold if float(threshold) == 0 else f"-{threshold}"


def _each(values: Mapping[str, float], names: Sequence[str], arg: str) -> list[float]:
    if set(values) != set(names):
        raise ArgumentError(f"{arg}: expected a number for each of {list(names)}, got {list(values)}")
    return [float(values[name]) for name in names]


def _no_fire(value: int | str, tokens: RefusalTokens | None) -> int | str:
    if value == "respond":
        if tokens is None or tokens.respond is None:
            raise ArgumentError("on_no_fire: expected tokens with a respond token for 'respond'")
        return tokens.respond
    return value


def _summary(t: Threshold) -> dict[str, Any]:
    return {
        "decimal": t.decimal,
        "alpha": t.alpha,
        "n": t.n,
        "rank": t.rank,
        "n_required": t.n_required,
        "failure_probability": t.failure_probability,
    }


def _compared(scores: CategoryScores, decoder: Decoder, rule: str, shifts: Any, kind: Any) -> Floats:
    """What is compared with later scores: the statistic, without the uniform numbers of sampling."""
    c = scores.shifts(shifts)
    statistic = scores.log_odds(-c) if decoder == "sampling" else scores.statistic(decoder, c.tolist(), rule=rule)
    return scores.benign(statistic) if kind == "max_over_refusal" else statistic


def _numbers(x: Any, key: str = "") -> Any:
    """Numbers of a claim as numbers again; what is kept as text by :meth:`Recipe.save` stays text."""
    if isinstance(x, dict):
        return {k: _numbers(v, k) for k, v in x.items()}
    if isinstance(x, list):
        return [_numbers(v, key) for v in x]
    if not isinstance(x, str) or key in ("decimal", "quantiles", "guard", "sha256", "method", "kind"):
        return x
    return int(x) if x.lstrip("-").isdigit() else float(x)
