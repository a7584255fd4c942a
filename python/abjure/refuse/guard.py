"""Generation-time forgetting (GUARD, arXiv 2505.13312): a gate on prompts, and phrases held back while answering."""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import ArgumentError, DegenerateError, DTypeError, ShapeError
from ..measure.rates import Rate
from ._position import Prompt, columns
from .bounds import Threshold, calibrate_threshold
from .directions import Vector
from .key_phrases import extract_phrases
from .phrases import ForbiddenPhrases
from .probe import RefusalProbe
from .semantic import Encoder, SemanticMatcher, unit_rows
from .token_bytes import TokenBytes
from .tokens import expect_a_token, expect_context

if TYPE_CHECKING:
    from torch import Tensor

#: Added to a beam that is given up: finite, so that no distribution is ever empty, and beyond every other beam.
_DROPPED = -1e4
#: Sets of phrases whose automata are kept.
_AUTOMATA = 64
Boundary = Literal["none", "word"]


@dataclass(frozen=True)
class ForgetTarget:
    """Something to be forgotten.

    Attributes:
        prompts: ways of asking for it, one or more.
        phrases: what an answer must not say.
        answer: the answer that the phrases come from, if any.

    Raises:
        ArgumentError: no prompt, or no phrase with text.
    """

    prompts: tuple[str, ...]
    phrases: tuple[str, ...]
    answer: str = ""

    def __post_init__(self) -> None:
        for name in ("prompts", "phrases"):
            given = getattr(self, name)
            texts = (given,) if isinstance(given, str) else tuple(given)
            if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
                raise ArgumentError(f"{name}: expected texts, none of them blank, got {given!r:.80}")
            object.__setattr__(self, name, texts)


@dataclass(frozen=True)
class GateDecision:
    """What the gate says of a prompt.

    Attributes:
        target: index of the target it concerns; None lets the prompt pass.
        score: above or at the gate's threshold where a target is named.
        nearest: indices of all targets, the nearest first.
        similarity: cosine to the nearest prompt of the nearest target.
    """

    target: int | None
    score: float
    nearest: tuple[int, ...]
    similarity: float


class PromptGate:
    """Decides whether a prompt concerns something to be forgotten, and what, by sentence embeddings.

    The decision is a threshold on a score: of a logistic probe (:class:`RefusalProbe`) fitted on embeddings of prompts
    that do and do not, or the cosine to the nearest prompt that does, which needs no others. What it concerns is the
    target with the nearest prompt.

    Args:
        encoder: texts to ``(n, d)`` embeddings, for example a :class:`SentenceEncoder`.
        kind: ``"probe"`` or ``"similarity"``.
        C: of the probe.
        threshold: score from which on the gate fires; 0 is the probe's even odds. Best set by :meth:`calibrate`.

    Raises:
        ArgumentError: an unknown kind, or a NaN threshold.

    Source: the prompt classifier of GUARD (arXiv 2505.13312) is a multilayer perceptron whose features and sizes we
    could not read; this form is ours.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        kind: Literal["probe", "similarity"] = "probe",
        C: float = 10.0,
        threshold: float | None = None,
    ) -> None:
        if kind not in ("probe", "similarity"):
            raise ArgumentError(f"kind: expected 'probe' or 'similarity', got {kind!r}")
        self.threshold = (0.0 if kind == "probe" else 0.6) if threshold is None else float(threshold)
        if math.isnan(self.threshold):
            raise ArgumentError("threshold: expected a number, got nan")
        self.encoder, self.kind = encoder, kind
        self.probe = RefusalProbe(C=C, class_weight="balanced") if kind == "probe" else None
        self._owners = np.empty(0, dtype=np.int64)
        self._rows: Vector = np.empty((0, 0))

    def fit(self, targets: Sequence[ForgetTarget], others: Sequence[str] = ()) -> PromptGate:
        """Learns the targets' prompts, and with kind ``"probe"`` what tells them from ``others``. Returns ``self``.

        Raises:
            ArgumentError: no targets. DegenerateError: kind ``"probe"`` without other prompts.
            ShapeError, NonFiniteError: the encoder's embeddings do not fit or are not finite.
        """
        if not targets:
            raise ArgumentError("targets: expected at least one, got none")
        prompts = [p for t in targets for p in t.prompts]
        rows = unit_rows(self.encoder(prompts), "encoder", len(prompts))
        if self.probe is not None:
            if not others:
                raise DegenerateError("others: expected prompts that concern no target, got none")
            rest = unit_rows(self.encoder(list(others)), "encoder", len(others))
            self.probe.fit(np.concatenate([rows, rest]), [1] * len(rows) + [0] * len(rest))
        self._owners = np.repeat(np.arange(len(targets)), [len(t.prompts) for t in targets])
        self._rows = rows
        return self

    def _read(self, prompts: Sequence[str]) -> tuple[Vector, Vector]:
        """Scores, and the cosine of every prompt to each target."""
        if isinstance(prompts, str):
            raise DTypeError("prompts: expected a list of texts, got one text")
        if not len(self._owners):
            raise ArgumentError("gate: expected a fitted gate; call fit first")
        targets = int(self._owners.max()) + 1
        if not len(prompts):
            return np.empty(0), np.empty((0, targets))
        rows = unit_rows(self.encoder(list(prompts)), "encoder", len(prompts))
        if rows.shape[1] != self._rows.shape[1]:
            raise ShapeError(f"encoder: expected embeddings of width {self._rows.shape[1]}, got {rows.shape[1]}")
        cosines = rows @ self._rows.T
        best = np.stack([cosines[:, self._owners == t].max(axis=1) for t in range(targets)], axis=1)
        return (best.max(axis=1) if self.probe is None else self.probe.decision(rows)), best

    def scores(self, prompts: Sequence[str]) -> Vector:
        """The score of each prompt, ``(n,)``.

        Raises:
            ArgumentError: the gate has not been fitted. DTypeError: one text instead of a list.
        """
        return self._read(prompts)[0]

    def calibrate(
        self,
        prompts: Sequence[str],
        alpha: float,
        delta: float | None = None,
        *,
        side: Literal["ceiling", "floor"] = "ceiling",
    ) -> Threshold:
        """Sets the threshold by :func:`calibrate_threshold`: fires on at most a share ``alpha`` of prompts like these
        (ceiling; prompts that concern no target), or misses at most that share (floor; prompts that do).

        Raises:
            ArgumentError: a share outside (0, 1), or a gate that has not been fitted. ShapeError: no prompts.
            DegenerateError: too few prompts for the claim; the number that would do is named.
        """
        found = calibrate_threshold(self.scores(prompts), alpha, delta, side=side)
        if not found.rank:
            raise DegenerateError(f"prompts: expected {found.n_required} or more for this claim, got {found.n}")
        self.threshold = float(found)
        return found

    def __call__(self, prompts: Sequence[str]) -> list[GateDecision]:
        """What the gate says of each prompt; raises as :meth:`scores`."""
        scores, cosines = self._read(prompts)
        order = np.argsort(-cosines, axis=1, kind="stable")
        return [
            GateDecision(
                int(nearest[0]) if score >= self.threshold else None,
                float(score),
                tuple(int(t) for t in nearest),
                float(row[nearest[0]]),
            )
            for score, row, nearest in zip(scores, cosines, order, strict=True)
        ]

    def __repr__(self) -> str:
        return f"PromptGate(kind={self.kind!r}, threshold={self.threshold:.4g}, {len(self._owners)} prompts)"


class Guard:
    """Keeps a model from saying what is to be forgotten, while it generates, without touching its weights.

    A gate decides for each prompt whether it concerns a target. Where it does not, logits are not touched and outputs
    are those of the model alone, bit for bit. Where it does, the phrases of the nearest targets are forbidden in the
    response (and, with ``penalty``, made less likely from their beginning on), and a :class:`SemanticMatcher` may lower
    the score of beams that come near in meaning, or give them up.

    Args:
        targets: what is to be forgotten; see :meth:`from_answers`.
        gate: prompts to decisions: a fitted :class:`PromptGate`, or any function that returns :class:`GateDecision`s;
            None guards every prompt with the phrases of all targets.
        tokenizer: the model's.
        matching: ``"bytes"`` (any spelling in tokens; see :class:`ForbiddenPhrases`) or ``"tokens"``.
        variants, boundary, penalty, gamma: as there; ``boundary`` counts in bytes only.
        nearest: how many targets' phrases are forbidden where the gate fires; None: those of all.
        semantic: targets' phrases to a matcher, e.g. ``lambda phrases: SemanticMatcher(encoder, phrases)``.
        fallback: the reply in place of one that had to be given up.

    Raises:
        ArgumentError: no targets, phrases that cannot be matched, or an option outside its domain.

    Source: GUARD, arXiv 2505.13312; the form of every part is ours, and every constant an argument.
    """

    def __init__(
        self,
        targets: Sequence[ForgetTarget],
        gate: Callable[[Sequence[str]], list[GateDecision]] | None,
        tokenizer: Any,
        *,
        matching: Literal["bytes", "tokens"] = "bytes",
        variants: bool = True,
        boundary: Boundary = "word",
        penalty: float | None = None,
        gamma: float = 1.0,
        nearest: int | None = 1,
        semantic: Callable[[Sequence[str]], SemanticMatcher] | None = None,
        fallback: str = "I'm sorry, but I can't help with that.",
    ) -> None:
        if not targets:
            raise ArgumentError("targets: expected at least one, got none")
        if matching not in ("bytes", "tokens"):
            raise ArgumentError(f"matching: expected 'bytes' or 'tokens', got {matching!r}")
        if nearest is not None and nearest < 1:
            raise ArgumentError(f"nearest: expected 1 or more, or None, got {nearest}")
        self.targets = tuple(targets)
        self.gate, self.tokenizer, self.matching, self.nearest, self.fallback = (
            gate,
            tokenizer,
            matching,
            nearest,
            fallback,
        )
        self.boundary: Boundary = boundary
        self.variants = variants
        eos = getattr(tokenizer, "eos_token_id", None)
        self._options: dict[str, Any] = {
            "variants": variants,
            "penalty": penalty,
            "gamma": gamma,
            "eos_token_id": eos,
            "dead_end": "raise" if eos is None else "eos",
        }
        if matching == "bytes":
            shared = tokenizer if isinstance(tokenizer, TokenBytes) else TokenBytes(tokenizer)
            self._options |= {"mode": "bytes", "boundary": boundary, "tokenizer": shared}
        else:
            self._options |= {"mode": "hard" if penalty is None else "prefix", "tokenizer": tokenizer}
        self._semantic = semantic
        self._matchers: OrderedDict[frozenset[int], tuple[ForbiddenPhrases, SemanticMatcher | None]] = OrderedDict()
        self._matcher(frozenset(range(len(self.targets))))

    @classmethod
    def from_answers(
        cls,
        prompts: Sequence[str | Sequence[str]],
        answers: Sequence[str],
        others: Sequence[str],
        encoder: Encoder,
        tokenizer: Any,
        *,
        calibration: Sequence[str] | None = None,
        alpha: float = 0.05,
        delta: float | None = None,
        extract: Callable[..., list[tuple[str, ...]]] = extract_phrases,
        **options: Any,
    ) -> Guard:
        """A guard of questions (one or several wordings each) and their answers.

        Args:
            prompts, answers: what is to be forgotten.
            others: prompts that concern none of it, to fit the gate.
            encoder: texts to embeddings.
            tokenizer: the model's.
            calibration: more such prompts, of which the gate may fire on a share of ``alpha`` at most; None leaves
                its threshold at even odds.
            alpha, delta: as in :func:`calibrate_threshold`.
            extract: answers and ``prompts=`` (first wordings) to the phrases of each.
            options: further arguments of the class.

        Raises:
            ShapeError: not one answer per prompt. ArgumentError: an answer without a phrase, with its index.
        """
        asked = [(p,) if isinstance(p, str) else tuple(p) for p in prompts]
        if len(asked) != len(answers):
            raise ShapeError(f"answers: expected {len(asked)} (one per prompt), got {len(answers)}")
        found = extract(answers, prompts=[" ".join(p) for p in asked])
        if bare := [i for i, phrases in enumerate(found) if not phrases]:
            raise ArgumentError(f"answers: expected a phrase in each, found none at indices {bare[:8]}")
        targets = [ForgetTarget(p, f, a) for p, f, a in zip(asked, found, answers, strict=True)]
        gate = PromptGate(encoder).fit(targets, others)
        if calibration is not None:
            gate.calibrate(calibration, alpha, delta)
        return cls(targets, gate, tokenizer, **options)

    def __repr__(self) -> str:
        phrases = self._matcher(frozenset(range(len(self.targets))))[0]
        return f"Guard({len(self.targets)} targets, {self.gate!r}, {phrases!r})"

    def _matcher(self, chosen: frozenset[int]) -> tuple[ForbiddenPhrases, SemanticMatcher | None]:
        if chosen not in self._matchers:
            texts = list(dict.fromkeys(p for t in sorted(chosen) for p in self.targets[t].phrases))
            soft = None if self._semantic is None else self._semantic(texts)
            self._matchers[chosen] = ForbiddenPhrases(texts, **self._options), soft
            if len(self._matchers) > _AUTOMATA:
                self._matchers.popitem(last=False)
        self._matchers.move_to_end(chosen)
        return self._matchers[chosen]

    def decide(self, prompts: Sequence[str]) -> list[GateDecision]:
        """The gate's decision on each prompt, as the user wrote it (without a chat template)."""
        if self.gate is not None:
            return self.gate(prompts)
        every = tuple(range(len(self.targets)))
        return [GateDecision(0, math.inf, every, 1.0) for _ in prompts]

    def _chosen(self, decision: GateDecision) -> frozenset[int] | None:
        if decision.target is None:
            return None
        if self.gate is None or self.nearest is None:
            return frozenset(range(len(self.targets)))
        return frozenset(list(dict.fromkeys([decision.target, *decision.nearest]))[: self.nearest])

    def processor(
        self,
        decisions: Sequence[GateDecision],
        *,
        beams: bool = False,
        prompt_length: int | Sequence[int] | None = None,
    ) -> GuardProcessor:
        """A logits processor for one generation from the prompts that were decided on.

        Args:
            decisions: of :meth:`decide`, one per prompt of the batch. Rows may be a multiple (beams, several replies).
            beams: whether rows are beams, whose scores a semantic penalty lowers. Where tokens are drawn or the largest
                is taken, a penalty on a whole row has no effect: there a reply that comes too near is ended.
            prompt_length: as in :class:`ForbiddenPhrases`.
        """
        return GuardProcessor(self, decisions, beams=beams, prompt_length=prompt_length)

    def generate(
        self,
        model: Any,
        prompts: Sequence[str],
        *,
        chat: Callable[[str], str] | None = None,
        decisions: Sequence[GateDecision] | None = None,
        logits_processor: Sequence[Any] = (),
        **options: Any,
    ) -> GuardedReplies:
        """Replies of ``model.generate`` under the guard.

        Args:
            model: a transformers model.
            prompts: as users wrote them.
            chat: puts a prompt into the chat template; None: prompts are encoded as they are.
            decisions: if they are known already.
            logits_processor: further processors, run before the guard.
            options: of ``generate``: ``max_new_tokens``, ``do_sample``, ``num_beams``, ``num_return_sequences`` and
                others.

        Raises:
            ArgumentError: a tokenizer that pads on the right, or no prompts. ShapeError: not one decision per prompt.
        """
        if isinstance(self.tokenizer, TokenBytes):
            raise ArgumentError("tokenizer: expected the guard to be made with a tokenizer, got TokenBytes")
        if not prompts:
            raise ArgumentError("prompts: expected at least one, got none")
        if getattr(self.tokenizer, "padding_side", "left") != "left":
            raise ArgumentError("tokenizer: expected padding_side 'left' for generation, got 'right'")
        found = list(self.decide(prompts) if decisions is None else decisions)
        if len(found) != len(prompts):
            raise ShapeError(f"decisions: expected {len(prompts)} (one per prompt), got {len(found)}")
        texts = [p if chat is None else chat(p) for p in prompts]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=chat is None)
        batch = {k: v.to(model.device) for k, v in batch.items()}
        processor = self.processor(found, beams=options.get("num_beams", 1) > 1)
        pad = getattr(self.tokenizer, "pad_token_id", None)
        options.setdefault("pad_token_id", self.tokenizer.eos_token_id if pad is None else pad)
        out = model.generate(
            **batch,
            logits_processor=[*logits_processor, processor],
            return_dict_in_generate=True,
            output_scores=options.pop("output_scores", options.get("num_beams", 1) > 1),
            **options,
        )
        replies = out.sequences[:, batch["input_ids"].shape[1] :]
        spread = len(replies) // len(found)
        each = [d for d in found for _ in range(spread)]
        rows = [r.tolist() for r in replies]
        read = self.tokenizer.batch_decode(replies, skip_special_tokens=True)
        given_up = tuple(processor.given_up(i // spread, row) for i, row in enumerate(rows))
        scores = getattr(out, "sequences_scores", None)
        return GuardedReplies(
            texts=tuple(self.fallback if gone else t for t, gone in zip(read, given_up, strict=True)),
            decisions=tuple(each),
            sequences=out.sequences,
            given_up=given_up,
            scores=None if scores is None else tuple(scores.tolist()),
            penalties=tuple(processor.penalty(i // spread, row) for i, row in enumerate(rows)),
        )

    def says(self, text: str, targets: Iterable[int] | None = None) -> tuple[str, ...]:
        """The forbidden phrases (of some targets, or of all) that a text holds, found without automata."""
        chosen = range(len(self.targets)) if targets is None else targets
        phrases = dict.fromkeys(p for t in chosen for p in self.targets[t].phrases)
        edge = r"(?<![0-9A-Za-z_])" if self.boundary == "word" else ""
        return tuple(p for p in phrases if _holds(text, p, edge, self.variants))

    def leak_report(
        self,
        truth: Sequence[int | None],
        replies: GuardedReplies | Sequence[str],
        decisions: Sequence[GateDecision] | None = None,
    ) -> LeakReport:
        """What got through, and why: past the gate, past its choice of a target, or past the matcher.

        Args:
            truth: the target that each prompt concerns; None where it concerns none.
            replies: of :meth:`generate`, or texts.
            decisions: with texts, the gate's decisions.

        Raises:
            ShapeError: not one reply and decision per entry of ``truth``. ArgumentError: an unknown target.
        """
        if isinstance(replies, GuardedReplies):
            texts, found = list(replies.texts), list(replies.decisions)
        else:
            texts, found = list(replies), list(decisions or ())
        if not len(texts) == len(found) == len(truth):
            raise ShapeError(
                f"truth, replies, decisions: expected as many of each, got {len(truth)}, {len(texts)} and {len(found)}"
            )
        if bad := [t for t in truth if t is not None and not 0 <= t < len(self.targets)]:
            raise ArgumentError(f"truth: expected targets from 0 to {len(self.targets) - 1}, got {bad[0]}")
        gate, target, matcher, alarms = [], [], [], []
        missed = 0
        for i, (true, text, decision) in enumerate(zip(truth, texts, found, strict=True)):
            if true is None:
                alarms += [] if decision.target is None else [i]
                continue
            chosen = self._chosen(decision)
            missed += chosen is None
            if not self.says(text, [true]):
                continue
            if chosen is None:
                gate.append(i)
            elif true not in chosen:
                target.append(i)
            else:
                matcher.append(i)
        concerned = sum(t is not None for t in truth)
        return LeakReport(
            concerned=concerned,
            others=len(truth) - concerned,
            missed=missed,
            gate_leaks=tuple(gate),
            target_leaks=tuple(target),
            matcher_leaks=tuple(matcher),
            false_alarms=tuple(alarms),
        )


def _holds(text: str, phrase: str, edge: str, variants: bool) -> bool:
    if not variants:
        return re.search((edge if phrase[:1].isascii() else "") + re.escape(phrase), text) is not None
    text, phrase = (unicodedata.normalize("NFKC", t).casefold() for t in (text, phrase.strip()))
    word = re.match(r"[0-9A-Za-z_]", phrase) is not None
    return re.search((edge if word else "") + re.escape(phrase), text) is not None


class GuardProcessor:
    """What :meth:`Guard.processor` makes: called as ``processor(input_ids, scores)``, for one generation.

    Rows of prompts that the gate lets pass are not read and not written.
    """

    #: transformers: continuous batching shows a processor the last token only.
    supports_continuous_batching = False

    def __init__(
        self,
        guard: Guard,
        decisions: Sequence[GateDecision],
        *,
        beams: bool = False,
        prompt_length: int | Sequence[int] | None = None,
    ) -> None:
        if not decisions:
            raise ArgumentError("decisions: expected one per prompt, got none")
        self.beams = beams
        self._chosen = [guard._chosen(d) for d in decisions]
        self._matchers = {c: guard._matcher(c) for c in self._chosen if c is not None}
        tokenizer = guard.tokenizer
        if any(soft is not None for _, soft in self._matchers.values()) and not hasattr(tokenizer, "decode"):
            raise ArgumentError("tokenizer: expected one that decodes, for semantic matching")
        self._tokenizer = tokenizer
        self._eos = getattr(tokenizer, "eos_token_id", None)
        self._prompt = Prompt(prompt_length)
        #: Sum of the semantic penalties of each hypothesis so far, and hypotheses that were given up.
        self._soft: dict[tuple[int, bytes], float] = {}
        self._gone: set[tuple[int, bytes]] = set()

    def reset(self) -> None:
        """Takes the next call as the first of a new generation from the same prompts."""
        self._prompt.reset()
        self._soft.clear()
        self._gone.clear()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Writes into ``scores`` what each row's context forbids, and returns it.

        Raises:
            ShapeError: rows that are not a multiple of the prompts; otherwise as :class:`ForbiddenPhrases`.
        """
        expect_context(input_ids, scores)
        expect_a_token(scores)
        rows, prompts = scores.shape[0], len(self._chosen)
        if rows == 0 or rows % prompts:
            raise ShapeError(f"scores: expected a multiple of the {prompts} prompts as rows, got {rows}")
        spread = rows // prompts
        lengths = self._prompt.lengths(input_ids)
        start = 0
        while start < prompts:
            stop = start + 1
            while stop < prompts and self._chosen[stop] == self._chosen[start]:
                stop += 1
            chosen = self._chosen[start]
            if chosen is not None:
                part = slice(start * spread, stop * spread)
                hard, soft = self._matchers[chosen]
                hard._write(input_ids[part], scores[part], lengths[part])
                if soft is not None:
                    self._weigh(soft, input_ids, scores, lengths, part, spread)
            start = stop
        return scores

    def _weigh(
        self, soft: SemanticMatcher, input_ids: Any, scores: Any, lengths: Any, part: slice, spread: int
    ) -> None:
        """Lowers, or ends, the rows whose text comes near a forbidden phrase in meaning."""
        outputs = {i: columns(input_ids[i : i + 1], int(lengths[i]))[0] for i in range(part.start, part.stop)}
        keys = {i: (i // spread, ids.tobytes()) for i, ids in outputs.items()}
        for i, ids in outputs.items():
            before = (i // spread, ids[:-1].tobytes())
            self._soft[keys[i]] = self._soft.get(before, 0.0)
            if before in self._gone:
                self._gone.add(keys[i])
        due = [i for i, ids in outputs.items() if len(ids) and len(ids) % soft.every == 0]
        if not due:
            return
        texts = self._tokenizer.batch_decode([outputs[i] for i in due], skip_special_tokens=True)
        cosines = soft.cosines(texts)
        for i, c, penalty in zip(due, cosines, soft.penalties(cosines), strict=True):
            drop = soft.drop is not None and c >= soft.drop
            if drop:
                self._gone.add(keys[i])
            if self.beams:
                amount = _DROPPED if drop else -float(penalty)
                self._soft[keys[i]] += amount
                if amount:
                    scores[i] += amount
            elif drop and self._eos is not None:
                scores[i] = -math.inf
                scores[i, self._eos if isinstance(self._eos, int) else self._eos[0]] = 0.0

    def _prefixes(self, prompt: int, ids: Sequence[int]) -> Iterable[tuple[int, bytes]]:
        row = np.asarray(ids, dtype=np.int64)
        return ((prompt, row[:n].tobytes()) for n in range(len(row), -1, -1))

    def given_up(self, prompt: int, ids: Sequence[int]) -> bool:
        """Whether the reply ``ids`` to a prompt was given up on the way."""
        return any(key in self._gone for key in self._prefixes(prompt, ids))

    def penalty(self, prompt: int, ids: Sequence[int]) -> float:
        """Sum of the penalties in the score of the reply ``ids``: for phrases that it began, and for its meaning."""
        chosen = self._chosen[prompt]
        if chosen is None:
            return 0.0
        hard, _ = self._matchers[chosen]
        soft = next((self._soft[k] for k in self._prefixes(prompt, ids) if k in self._soft), 0.0)
        return soft + hard.penalty_of(ids)


@dataclass(frozen=True)
class GuardedReplies:
    """Replies under a guard, one per returned sequence.

    Attributes:
        texts: the replies, the fallback in place of those given up.
        decisions: the gate's decision on each prompt.
        sequences: token ids as ``generate`` returned them, prompts included.
        given_up: replies that came too near a forbidden phrase in meaning.
        scores: scores of the beams; None without beam search. They hold the penalties.
        penalties: sum of the penalties of each reply, 0 or less, before the length penalty of beam search.
    """

    texts: tuple[str, ...]
    decisions: tuple[GateDecision, ...]
    sequences: Tensor
    given_up: tuple[bool, ...]
    scores: tuple[float, ...] | None
    penalties: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        guarded = sum(d.target is not None for d in self.decisions)
        return f"GuardedReplies({len(self)} replies, {guarded} guarded, {sum(self.given_up)} given up)"


@dataclass(frozen=True)
class LeakReport:
    """What a guard let through. Items are indices of replies.

    Attributes:
        concerned, others: replies to prompts that concern a target, and to others.
        missed: prompts that concern a target and that the gate let pass, whether or not the reply gave it away.
        gate_leaks: replies that say a phrase of their target because the gate let the prompt pass.
        target_leaks: because the gate named another target.
        matcher_leaks: although the phrases were forbidden.
        false_alarms: other prompts on which the gate fired.
    """

    concerned: int
    others: int
    missed: int
    gate_leaks: tuple[int, ...] = ()
    target_leaks: tuple[int, ...] = ()
    matcher_leaks: tuple[int, ...] = ()
    false_alarms: tuple[int, ...] = field(default=())

    @property
    def leaks(self) -> int:
        """Replies that give something away."""
        return len(self.gate_leaks) + len(self.target_leaks) + len(self.matcher_leaks)

    @property
    def rates(self) -> dict[str, Rate]:
        """Every count as a rate with intervals: leaks and misses of the concerned, false alarms of the others."""
        counts = {
            "leaks": self.leaks,
            "gate misses": self.missed,
            "gate leaks": len(self.gate_leaks),
            "target leaks": len(self.target_leaks),
            "matcher leaks": len(self.matcher_leaks),
        }
        return {k: Rate(v, self.concerned) for k, v in counts.items()} | {
            "false alarms": Rate(len(self.false_alarms), self.others)
        }

    def __repr__(self) -> str:
        parts = ", ".join(f"{k} {r.k}/{r.n}" for k, r in self.rates.items())
        return f"LeakReport({parts})"

    def _repr_html_(self) -> str:
        def interval(r: Rate) -> str:
            found = r.ci()
            return "" if found is None else f"{found[0]:.3f} to {found[1]:.3f}"

        rows = "".join(
            f"<tr><td>{html.escape(k)}</td><td>{r.k} / {r.n}</td><td>{interval(r)}</td></tr>"
            for k, r in self.rates.items()
        )
        return f"<table><tr><th></th><th>count</th><th>95 % interval</th></tr>{rows}</table>"
