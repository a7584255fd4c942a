"""The first tokens of each answer from an aligned model, before the served one goes on, and a second look further in.

Many harmless-looking fine-tunes take refusals away in the first few tokens only, and an aligned model that writes those
brings them back (arXiv 2502.19537, which shows as well that data which refuses and then complies survives it). Hence a
second look at depth: :class:`RefusalRecheck` stops a reply that opened as a refusal and then gives what it refused.
Defence only.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._modes import evaluating
from ..errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from ..measure._refusal_rules import QUOTES, REFUSAL
from .any_depth import AnyDepthCriterion, _AnyDepth, _count
from .data.audit import _literal, _scan
from .directions import Vector
from .prompts import Prompts
from .record import run_device

if TYPE_CHECKING:
    from torch import nn

_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")


@dataclass(frozen=True)
class Opening:
    """How one answer begins.

    Attributes:
        text: what the aligned model wrote and the served model is given.
        ids: the same in the aligned model's tokens.
        refuses: whether it is a refusal, by the rules of :func:`refuse_then_comply_scan`.
        finished: whether the answer ends there and the served model is not asked.
        context: the prompt and the opening in the served model's tokens.
        handed: how many of these are the opening.
    """

    text: str
    ids: tuple[int, ...]
    refuses: bool
    finished: bool
    context: tuple[int, ...] = field(repr=False)
    handed: int


class AlignedPrefill(Sequence[Opening]):
    """Openings of answers, and the served model that goes on from them; made by :func:`aligned_prefill`.

    Attributes:
        served, tokenizer: the model that goes on, and its tokenizer.
        shared: whether tokens were handed over as they are, or text to be tokenised anew.
    """

    def __init__(self, openings: Sequence[Opening], served: nn.Module, tokenizer: Any, shared: bool) -> None:
        self._openings, self.served, self.tokenizer, self.shared = list(openings), served, tokenizer, shared

    def __len__(self) -> int:
        return len(self._openings)

    def __getitem__(self, index: Any) -> Any:
        return self._openings[index]

    @property
    def rows(self) -> list[int]:
        """Indices of the answers that the served model goes on with."""
        return [i for i, opening in enumerate(self) if not opening.finished]

    def batches(self, size: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Those answers, like lengths together: indices, and ``input_ids`` and ``attention_mask`` for ``generate()``,
        padded on the left."""
        import torch

        pad = getattr(self.tokenizer, "pad_token_id", None)
        order = sorted(self.rows, key=lambda i: len(self[i].context))
        for start in range(0, len(order), _count(size, "batch_size")):
            chosen = order[start : start + size]
            width = max(len(self[i].context) for i in chosen)
            ids = torch.full((len(chosen), width), 0 if pad is None else int(pad))
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                context = self[i].context
                ids[row, width - len(context) :] = torch.tensor(context)
                mask[row, width - len(context) :] = 1
            device = run_device(self.served)
            yield chosen, {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def generate(self, *, batch_size: int = 8, recheck: RefusalRecheck | None = None, **options: Any) -> list[str]:
        """Whole answers: each opening, and what the served model makes of it.

        Args:
            batch_size: answers side by side.
            recheck: stops replies further in; those it stopped for going back on a refusal are cut to the refusal.
            options: of ``served.generate()``; ``max_new_tokens`` counts from the opening on.

        Returns:
            Texts without special tokens, in the order of the prompts.
        """
        import torch

        if recheck is not None and "stopping_criteria" in options:
            raise ArgumentError("stopping_criteria: expected none beside recheck, which is one")
        options.setdefault("pad_token_id", getattr(self.tokenizer, "pad_token_id", None) or 0)
        found = [opening.text for opening in self]
        for rows, inputs in self.batches(batch_size):
            if recheck is not None:
                recheck.reset([self._given(i) for i in rows])
                options["stopping_criteria"] = [recheck]
            with evaluating(self.served), torch.no_grad():
                out = self.served.generate(**inputs, **options)  # type: ignore[operator]
            width = inputs["input_ids"].shape[1]
            for row, i in enumerate(rows):
                new = out[row, width:].tolist()
                if recheck is not None and (halt := recheck.halted[row]) is not None:
                    new = new[:halt]
                text = str(self.tokenizer.decode([*self._given(i), *new], skip_special_tokens=True))
                found[i] = text if recheck is None else recheck.kept(row, text)
        return found

    def _given(self, i: int) -> list[int]:
        context = self[i].context
        return list(context[len(context) - self[i].handed :])

    def __repr__(self) -> str:
        refused, done = sum(o.refuses for o in self), sum(o.finished for o in self)
        how = "tokens" if self.shared else "text"
        return f"AlignedPrefill({len(self)} openings handed over as {how}: {refused} refuse, {done} finished)"

    def _repr_html_(self) -> str:
        body = "".join(
            f"<tr><td>{html.escape(o.text)}</td><td>{o.refuses}</td><td>{o.finished}</td></tr>" for o in self
        )
        return f"<table><tr><th>opening</th><th>refuses</th><th>finished</th></tr>{body}</table>"


def aligned_prefill(
    aligned: nn.Module,
    served: nn.Module,
    tokenizer: Any,
    prompts: Iterable[str],
    k: int = 8,
    *,
    served_tokenizer: Any = None,
    on_refusal: Literal["finish", "hand_over"] = "finish",
    refusal_tokens: int = 48,
    phrases: Sequence[str] | None = None,
    system: str | None = None,
    batch_size: int = 8,
) -> AlignedPrefill:
    """Lets an aligned model begin each answer, greedily, with its first ``k`` tokens.

    An opening that ends the answer is the answer. One that refuses is, by default, finished by the aligned model at the
    end of its sentence, and the served model is not asked. All others are handed over: as tokens where both tokenizers
    are the same, else as text, cut at the end of a word and tokenised together with the served model's own prompt.

    Args:
        aligned: a Hugging Face decoder that refuses what it should.
        served: the decoder that answers, perhaps fine-tuned by others.
        tokenizer: the aligned model's fast tokenizer, with a chat template.
        prompts: instructions.
        k: tokens of an opening.
        served_tokenizer: the served model's, where it is another.
        on_refusal: ``"finish"``, or ``"hand_over"`` a refusing opening of ``k`` tokens like any other: what a fine-tune
            that refuses and then complies is waiting for.
        refusal_tokens: tokens more than ``k`` that a refusal may take to end.
        phrases: refusing phrases instead of the built-in English rules.
        system: a system message before each prompt.
        batch_size: prompts side by side.

    Raises:
        ArgumentError, DTypeError: an argument does not fit.

    Source: the defence of arXiv 2502.19537; finishing refusals is ours.
    """
    count, more = _count(k, "k"), _count(refusal_tokens, "refusal_tokens")
    if on_refusal not in ("finish", "hand_over"):
        raise ArgumentError(f"on_refusal: expected 'finish' or 'hand_over', got {on_refusal!r}")
    refusal = _refusal_rule(phrases)
    texts = list(prompts) if not isinstance(prompts, str) else prompts
    asked = Prompts(tokenizer, texts, system=system)
    other = tokenizer if served_tokenizer is None else served_tokenizer
    shared = _same(tokenizer, other)
    eos = _eos(aligned, tokenizer)
    # One token more shows whether the last word is whole.
    written = _write(aligned, tokenizer, [list(p.ids) for p in asked], count + (not shared), batch_size, eos)
    finish = on_refusal == "finish"
    pieces = [_piece(tokenizer, ids, count, eos, refusal, finish) for ids in written]
    open_ended = [i for i, p in enumerate(pieces) if p.refuses and not p.ends and finish]
    longer = _write(
        aligned,
        tokenizer,
        [[*asked[i].ids, *pieces[i].ids] for i in open_ended],
        more,
        batch_size,
        eos,
    )
    for i, rest in zip(open_ended, longer, strict=True):
        pieces[i] = _piece(tokenizer, [*pieces[i].ids, *rest], count + more, eos, refusal, finish)
    # A refusal that does not end in time is not left to the served model either.
    finished = [p.ends or (finish and p.refuses) for p in pieces]
    if shared:
        contexts = [(*p.ids, *piece.ids) for p, piece in zip(asked, pieces, strict=True)]
        handed = [len(piece.ids) for piece in pieces]
        shown = [piece.text for piece in pieces]
    else:
        shown = [
            p.text if done else _whole_words(p.text, p.following) for p, done in zip(pieces, finished, strict=True)
        ]
        contexts = [p.ids for p in Prompts(other, texts, system=system, opening=shown)]
        handed = [
            len(whole) - _common(whole, bare.ids)
            for whole, bare in zip(contexts, Prompts(other, texts, system=system), strict=True)
        ]
    openings = [
        Opening(text, tuple(p.ids), p.refuses, done, tuple(context), n)
        for text, p, done, context, n in zip(shown, pieces, finished, contexts, handed, strict=True)
    ]
    return AlignedPrefill(openings, served, other, shared)


@dataclass(frozen=True)
class _Piece:
    """An opening as the aligned model wrote it.

    ``ends``: the answer does, by an end-of-sequence token or, where it counts, by the end of a refusing sentence;
    ``following``: the text of the token after it.
    """

    ids: list[int]
    text: str
    refuses: bool
    ends: bool
    following: str


def _piece(
    tokenizer: Any, ids: list[int], count: int, eos: list[int], refusal: re.Pattern[str], finish: bool
) -> _Piece:
    end = next((i for i, t in enumerate(ids) if t in eos), len(ids) + 1)
    kept = ids[: min(count, end)]
    text = _text(tokenizer, kept)
    following = _text(tokenizer, ids[: len(kept) + 1])[len(text) :]
    found = refusal.search(text.translate(QUOTES))
    stop = None if found is None or not finish else _SENTENCE_END.search(text, found.end())
    if stop is not None:
        # The shortest run of tokens that holds the sentence.
        n = next(n for n in range(1, len(kept) + 1) if len(_text(tokenizer, kept[:n])) >= stop.end())
        return _Piece(kept[:n], text[: stop.end()], True, True, following)
    return _Piece(kept, text, found is not None, end <= count, following)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _whole_words(text: str, following: str) -> str:
    """``text`` without a last word that goes on in ``following``, and without the space behind the one before."""
    # Half of a character decodes to a replacement character.
    broken = text.endswith("�")
    if text and not broken and (following == "" or not (text[-1].isalnum() and following[0].isalnum())):
        return text.rstrip()
    return re.sub(r"\S+\Z", "", text).rstrip()


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _same(first: Any, second: Any) -> bool:
    """Whether two tokenizers give every text the same ids."""
    if first is second:
        return True
    one, two = getattr(first, "backend_tokenizer", None), getattr(second, "backend_tokenizer", None)
    return one is not None and two is not None and one.to_str() == two.to_str()


def _eos(model: nn.Module, tokenizer: Any) -> list[int]:
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    found = getattr(tokenizer, "eos_token_id", None) if found is None else found
    return [] if found is None else [int(i) for i in np.atleast_1d(np.asarray(found))]


def _write(
    model: nn.Module, tokenizer: Any, contexts: list[list[int]], tokens: int, batch_size: int, eos: list[int]
) -> list[list[int]]:
    """Greedy continuations, with the token that ends one."""
    import torch

    pad = getattr(tokenizer, "pad_token_id", None)
    device, found = run_device(model), []
    for start in range(0, len(contexts), _count(batch_size, "batch_size")):
        part = contexts[start : start + batch_size]
        width = max(map(len, part))
        ids = torch.full((len(part), width), 0 if pad is None else int(pad))
        mask = torch.zeros_like(ids)
        for row, context in enumerate(part):
            ids[row, width - len(context) :] = torch.tensor(context)
            mask[row, width - len(context) :] = 1
        with evaluating(model), torch.no_grad():
            out = model.generate(  # type: ignore[operator]
                ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=0 if pad is None else int(pad),
            )
        for new in out[:, width:].tolist():
            end = next((i + 1 for i, t in enumerate(new) if t in eos), len(new))
            found.append(new[:end])
    return found


def _refusal_rule(phrases: Sequence[str] | None) -> re.Pattern[str]:
    if phrases is None:
        return REFUSAL
    if isinstance(phrases, str) or not phrases or not all(p.strip() for p in phrases):
        raise ArgumentError("phrases: expected a list of phrases, none of them empty")
    return _literal(phrases)


class _Texts(_AnyDepth):
    """A guard that looks at nothing but, if there is one, a classifier of texts."""

    def __init__(self, interval: int, threshold: float) -> None:
        super().__init__([0], interval, threshold, 1)

    def look(self, model: Any, contexts: Sequence[Sequence[int]]) -> Vector:
        return np.zeros(len(contexts))


class RefusalRecheck(AnyDepthCriterion):
    """Halts rows of a running ``generate()`` that go back on a refusal, or that a probe or classifier finds at depth.

    At every ``interval`` tokens the reply so far is read as :func:`refuse_then_comply_scan` reads an answer: one that
    opened as a refusal, and then holds ``comply_words`` words that neither refuse, give reasons nor point elsewhere, is
    halted. The probe of an :class:`AnyDepthGuard`, or a classifier of texts, is asked at the same depths. The tokens of
    rows that are not halted are those of a generation without it.

    Honest partial help ("I can't do this, but here is that") reads the same: what it costs is in the audit's figures.

    Args:
        model: the model that generates.
        tokenizer: its tokenizer, to read the reply.
        guard: looks at the model's states; its interval, threshold and patience count for it.
        classifier: replies so far (list of texts) to probabilities of harm ``(n,)``; instead of ``guard``.
        threshold: of the classifier.
        interval: tokens between looks; None: the guard's, or 8.
        within, comply_words, phrases: as in :func:`refuse_then_comply_scan`.
        options: of :class:`AnyDepthCriterion`.

    Attributes:
        reasons: for each row ``"refuse_then_comply"``, ``"probe"``, ``"classifier"`` or None.

    Raises:
        ArgumentError, DTypeError: an argument does not fit. While generating, ShapeError, NonFiniteError: what the
            classifier returns.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        guard: _AnyDepth | None = None,
        *,
        classifier: Callable[[list[str]], Any] | None = None,
        threshold: float = 0.5,
        interval: int | None = None,
        within: int = 25,
        comply_words: int = 15,
        phrases: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        if guard is not None and (classifier is not None or interval is not None):
            raise ArgumentError("guard: expected no classifier and no interval beside it")
        if classifier is not None and not callable(classifier):
            raise DTypeError(f"classifier: expected a function of texts, got {type(classifier).__name__}")
        self.tokenizer, self.classifier = tokenizer, classifier
        self.within, self.comply_words = _count(within, "within"), _count(comply_words, "comply_words")
        self._refusal = _refusal_rule(phrases)
        self._openings: list[list[int]] | None = None
        super().__init__(guard or _Texts(8 if interval is None else interval, threshold), model, **options)

    def reset(self, openings: Sequence[Sequence[int]] | None = None) -> None:
        """Takes the next call as the first of a generation.

        Args:
            openings: token ids at the end of each prompt that belong to its reply; None: none.
        """
        super().reset()
        self._openings = None if openings is None else [[int(t) for t in o] for o in openings]
        self._turned: list[int] = []
        self.reasons: list[str | None] = []

    def _replies(self, input_ids: Any) -> list[str]:
        openings = [[]] * len(input_ids) if self._openings is None else self._openings
        if len(openings) != len(input_ids):
            raise ShapeError(f"openings: expected one per row ({len(input_ids)}), got {len(openings)}")
        ids = input_ids[:, self._start :].tolist()
        return [_text(self.tokenizer, [*o, *reply]) for o, reply in zip(openings, ids, strict=True)]

    def _look(self, input_ids: Any, active: list[int]) -> Vector:
        replies = self._replies(input_ids)
        for row in active:
            scan = _scan(replies[row].translate(QUOTES), self._refusal, self.within, self.comply_words)
            if "refuse_then_comply" in scan.flags:
                self._turned.append(row)
        seen = super()._look(input_ids, active)
        if self.classifier is None:
            return seen
        found = np.asarray(self.classifier([replies[row] for row in active]), dtype=np.float64)
        if found.shape != (len(active),):
            raise ShapeError(f"classifier: expected a probability per reply ({len(active)},), got {found.shape}")
        if np.isnan(found).any():
            raise NonFiniteError(f"classifier: NaN in row {active[int(np.isnan(found).argmax())]}")
        return found

    def __call__(self, input_ids: Any, scores: Any = None, **kwargs: Any) -> Any:
        self._turned = []
        out = super().__call__(input_ids, scores, **kwargs)
        watch = self.watch
        assert watch is not None
        self.reasons = self.reasons or [None] * len(watch.halted)
        for row, step in enumerate(watch.halted):
            if step is not None and self.reasons[row] is None:
                self.reasons[row] = "probe" if self.classifier is None else "classifier"
        for row in self._turned:
            watch.halted[row] = watch.halted[row] or input_ids.shape[1] - self._start
            self.reasons[row] = "refuse_then_comply"
            out[row] = True
        return out

    def kept(self, row: int, text: str) -> str:
        """What may be shown of a row's reply: up to where it went back on its refusal, if it was halted for that.

        Args:
            row: of the last generation.
            text: its reply, the opening included.
        """
        if row >= len(self.reasons) or self.reasons[row] != "refuse_then_comply":
            return text
        scan = _scan(text.translate(QUOTES), self._refusal, self.within, 1)
        return text[: scan.spans["comply"][0]].rstrip() if "comply" in scan.spans else text
