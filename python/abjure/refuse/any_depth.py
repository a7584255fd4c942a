"""Any-Depth guard: the answer's header, opened again in the middle of a reply, tells whether the model would refuse it.

Source: Any-Depth Alignment (arXiv 2510.18081). The running generation is never touched: every look is a pass over a
copy of the context, or of the cache.
"""

from __future__ import annotations

import copy
import html
import inspect
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._files import reading, write_atomically
from .._interop import integers
from .._modes import evaluating
from ..errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from .blocks import select_modules
from .bounds import Threshold, calibrate_threshold
from .directions import Site, Vector, single_vector
from .hooks import _attached, _on_input, _on_output, check_site
from .probe import RefusalProbe
from .prompts import _MARK, Prompts
from .record import _inner, binary_labels, run_device

if TYPE_CHECKING:
    from torch import nn

_FORMAT = "abjure.any_depth_guard"
#: Depths of the published training set: every 25 tokens up to 500.
DEPTHS = tuple(range(25, 501, 25))
#: Beginnings of refusals; compared in lower case, with straight apostrophes.
REFUSAL_PHRASES = ("i can't", "i cannot")
#: Prompt tokens by which a running generation is told from a new one.
_REMEMBERED = 8

Conversation = tuple[str, str]


def assistant_header(tokenizer: Any) -> list[int]:
    """Token ids that end an assistant's message and open its next one, from the chat template.

    What the template writes after an assistant's message, then its generation prompt; where that is empty (Mistral),
    what stands after the user's message. For Llama 3, Gemma 2 and Qwen 2.5 these are the published tokens.

    Raises:
        ArgumentError: there is no chat template, or it hides the message; pass ``header_ids`` then.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError("tokenizer: expected a chat template, got none; pass header_ids")

    def shown(*messages: tuple[str, str], prompt: bool = False) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))

    closed, opened = shown(("user", _MARK)), shown(("user", _MARK), prompt=True)
    answered = shown(("user", "x"), ("assistant", _MARK)).split(_MARK)
    if len(answered) != 2 or closed.count(_MARK) != 1 or not opened.startswith(closed):
        raise ArgumentError("tokenizer: expected a chat template that shows each message once; pass header_ids")
    header = answered[1] + (opened[len(closed) :] or closed.split(_MARK)[1])
    ids = tokenizer(header, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ArgumentError("tokenizer: the chat template writes nothing between two messages; pass header_ids")
    return [int(i) for i in ids]


class DepthWatch:
    """When to look at a reply, and when what was seen halts it: a function of steps and probabilities, without a model.

    Args:
        rows: replies watched side by side.
        interval: look after every so many tokens of the reply.
        threshold: a look is a hit at or above it.
        patience: consecutive hits that halt a reply.

    Attributes:
        log: for each row a list of (step, probability).
        halted: for each row the step at which it was halted, or None.
    """

    def __init__(self, rows: int, interval: int = 25, threshold: float = 0.5, patience: int = 1) -> None:
        self.interval, self.patience = _count(interval, "interval"), _count(patience, "patience")
        self.threshold = _threshold(threshold)
        self.log: list[list[tuple[int, float]]] = [[] for _ in range(_count(rows, "rows"))]
        self.halted: list[int | None] = [None] * rows
        self._hits = [0] * rows

    def due(self, step: int, previous: int | None = None) -> bool:
        """Whether a multiple of ``interval`` lies in ``(previous, step]``; ``previous`` is ``step - 1`` if None."""
        before = step - 1 if previous is None else previous
        return step // self.interval > max(before, 0) // self.interval

    def update(self, step: int, probability: Any, rows: Any = None) -> Any:
        """Notes what was seen at a step.

        Args:
            step: tokens of the reply so far.
            probability: of ``rows``, in [0, 1].
            rows: indices of the rows looked at; None for all. Rows that have halted stay so and are not logged.

        Returns:
            Booleans for all rows: halted.

        Raises:
            ShapeError: not one probability per row. NonFiniteError: a NaN. ArgumentError: one outside [0, 1].
        """
        chosen = list(range(len(self.log))) if rows is None else [int(r) for r in rows]
        seen = np.asarray(probability, dtype=np.float64)
        if seen.shape != (len(chosen),):
            raise ShapeError(f"probability: expected one per row ({len(chosen)},), got {seen.shape}")
        if np.isnan(seen).any():
            raise NonFiniteError(f"probability: NaN in row {chosen[int(np.isnan(seen).argmax())]} at step {step}")
        if ((seen < 0) | (seen > 1)).any():
            raise ArgumentError(f"probability: expected [0, 1], got {seen[(seen < 0) | (seen > 1)][0]}")
        for row, p in zip(chosen, seen.tolist(), strict=True):
            if self.halted[row] is not None:
                continue
            self.log[row].append((int(step), p))
            self._hits[row] = self._hits[row] + 1 if p >= self.threshold else 0
            if self._hits[row] >= self.patience:
                self.halted[row] = int(step)
        return np.array([h is not None for h in self.halted])

    def __repr__(self) -> str:
        halted = sum(h is not None for h in self.halted)
        return (
            f"DepthWatch(interval={self.interval}, threshold={self.threshold:.6g}, patience={self.patience}, "
            f"{halted} of {len(self.halted)} halted)"
        )


def _count(value: Any, arg: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise DTypeError(f"{arg}: expected a whole number, got {value!r}")
    if value < 1:
        raise ArgumentError(f"{arg}: expected 1 or more, got {value}")
    return int(value)


def _threshold(value: Any) -> float:
    number = float(value)
    if math.isnan(number):
        raise ArgumentError("threshold: expected a number, got nan")
    return number


class _AnyDepth:
    """What the two forms share: the schedule, the header, whole replies, and the criterion for ``generate()``."""

    def __init__(self, header_ids: Any, interval: int, threshold: float, patience: int) -> None:
        ids = integers(np.asarray(header_ids), "header_ids")
        if ids.ndim != 1 or ids.size == 0 or (ids < 0).any():
            raise ArgumentError(f"header_ids: expected token ids, got {header_ids!r:.80}")
        self.header_ids = [int(i) for i in ids]
        self.interval, self.patience = _count(interval, "interval"), _count(patience, "patience")
        self.threshold = _threshold(threshold)

    def watch(self, rows: int) -> DepthWatch:
        """The state machine with this guard's settings."""
        return DepthWatch(rows, self.interval, self.threshold, self.patience)

    def look(self, model: nn.Module, contexts: Sequence[Sequence[int]]) -> Vector:
        """Probability that the model refuses, read behind each context with the header appended, ``(n,)``.

        Args:
            model: a Hugging Face decoder.
            contexts: token ids of a prompt and the reply so far.
        """
        raise NotImplementedError

    def look_forked(self, model: nn.Module, ids: Any, mask: Any, cache: Any) -> Vector:
        """As :meth:`look` from a copy of the running generation's cache, which holds a part of ``ids``."""
        raise ArgumentError(f"cache: {type(self).__name__} looks with 'recompute' only, got 'fork'")

    def criterion(self, model: nn.Module, **options: Any) -> AnyDepthCriterion:
        """For ``model.generate(..., stopping_criteria=[guard.criterion(model)])``; see :class:`AnyDepthCriterion`."""
        return AnyDepthCriterion(self, model, **options)

    def score(
        self,
        model: nn.Module,
        tokenizer: Any,
        conversations: Iterable[Conversation],
        depths: Sequence[int] | None = None,
        *,
        system: str | None = None,
        batch_size: int = 8,
    ) -> Vector:
        """Probabilities at every depth of finished replies, ``(n, depths)``; NaN beyond the end of a reply.

        Args:
            model: a Hugging Face decoder.
            tokenizer: its fast tokenizer, with a chat template.
            conversations: pairs of prompt and reply.
            depths: in tokens of the reply; None for every multiple of ``interval`` up to the longest reply.
            system: a system message before each prompt.
            batch_size: contexts per forward pass.

        Raises:
            ArgumentError, DTypeError: the arguments do not fit. NonFiniteError: a state is not finite.
        """
        coded = _coded(tokenizer, conversations, system)
        longest = max(len(reply) for _, reply in coded)
        wanted = _depths(range(self.interval, longest + 1, self.interval) if depths is None else depths)
        size = _count(batch_size, "batch_size")
        found = np.full((len(coded), len(wanted)), math.nan)
        at = [(i, j) for j, depth in enumerate(wanted) for i, (_, reply) in enumerate(coded) if len(reply) >= depth]
        for start in range(0, len(at), size):
            part = at[start : start + size]
            seen = self.look(model, [coded[i][0] + coded[i][1][: wanted[j]] for i, j in part])
            for (i, j), p in zip(part, seen, strict=True):
                found[i, j] = p
        return found

    def peaks(self, probabilities: Any) -> Vector:
        """The largest threshold at which each reply would still be halted, ``(n,)``; -inf for one never looked at.

        That is the largest, over ``patience`` consecutive looks, of their smallest probability: what
        :meth:`calibrate` takes.

        Args:
            probabilities: ``(n, depths)`` of :meth:`score`.

        Raises:
            ShapeError: another shape.
        """
        seen = np.asarray(probabilities, dtype=np.float64)
        if seen.ndim != 2:
            raise ShapeError(f"probabilities: expected (n, depths), got {seen.shape}")
        if seen.shape[1] < self.patience:
            return np.full(len(seen), -math.inf)
        windows = np.lib.stride_tricks.sliding_window_view(seen, self.patience, axis=1).min(-1)
        return np.asarray(np.where(np.isnan(windows), -math.inf, windows).max(1))

    def halts(self, probabilities: Any) -> Any:
        """Booleans ``(n,)``: replies that are halted at some depth."""
        return self.peaks(probabilities) >= self.threshold

    def calibrate(self, harmless_peaks: Any, alpha: float, delta: float | None = None) -> Threshold:
        """Sets :attr:`threshold` so that at most a share ``alpha`` of harmless replies is halted at any depth.

        The peaks must be of replies that the probe was not fitted on. Guarantee and arguments as in
        :func:`calibrate_threshold`, whose :class:`Threshold` is returned; of too few replies the guard never halts.

        Raises:
            ShapeError, NonFiniteError, ArgumentError: as there.
        """
        found = calibrate_threshold(harmless_peaks, alpha, delta)
        self.threshold = found.gate
        return found

    def _settings(self) -> str:
        return (
            f"header_ids={self.header_ids}, interval={self.interval}, threshold={self.threshold:.6g}, "
            f"patience={self.patience}"
        )


class AnyDepthCriterion:
    """Halts rows of a running ``generate()``; one object serves one generation at a time.

    Called by ``generate()`` as ``criterion(input_ids, scores)``; it returns booleans per row. The tokens of rows that
    are not halted are those of a generation without it, bit for bit. After a row is halted ``generate()`` writes
    padding to it where it has an end-of-sequence token, else goes on until all rows are done: :attr:`halted` tells
    where to cut. Rows that have ended are not looked at. Not for beam search, where rows change places.

    Args:
        guard: an :class:`AnyDepthGuard` or :class:`AnyDepthKeywords`.
        model: the model that generates.
        cache: ``"recompute"`` reads the whole context again at each look, one pass over it up to the block that is
            read; right for every model and cache. ``"fork"`` copies the cache of the generation and passes the header
            only: cheap in time, twice the memory of the cache for that moment. It watches the model's calls, so use it
            as ``with guard.criterion(model, cache="fork") as criterion``; for a ``DynamicCache``, without beams.
        attention_mask: of the prompts, ``(rows, width)``; None: leading tokens of ``pad_token_id`` are padding.
        prompt_length: tokens before the reply, padding included, where depth is not to be counted from the first
            generated token (a reply with a prefilled opening); None: found from the first call.
        pad_token_id, eos_token_id: None for those of the model's generation configuration.

    Raises:
        ArgumentError: an unknown ``cache``, a mask or length that does not fit; while generating, a cache that cannot
            be forked.
        NonFiniteError: while generating, a state is not finite: a guard that cannot see does not pass in silence.
    """

    def __init__(
        self,
        guard: _AnyDepth,
        model: nn.Module,
        *,
        cache: Literal["recompute", "fork"] = "recompute",
        attention_mask: Any = None,
        prompt_length: int | None = None,
        pad_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> None:
        if not isinstance(guard, _AnyDepth):
            raise DTypeError(f"guard: expected an AnyDepthGuard or AnyDepthKeywords, got {type(guard).__name__}")
        if cache not in ("recompute", "fork"):
            raise ArgumentError(f"cache: expected 'recompute' or 'fork', got {cache!r}")
        if cache == "fork" and type(guard).look_forked is _AnyDepth.look_forked:
            raise ArgumentError(f"cache: {type(guard).__name__} looks with 'recompute' only, got 'fork'")
        if prompt_length is not None and (isinstance(prompt_length, bool) or prompt_length < 0):
            raise ArgumentError(f"prompt_length: expected 0 or more, got {prompt_length!r}")
        if attention_mask is not None and np.ndim(attention_mask) != 2:
            raise ShapeError(f"attention_mask: expected (rows, width), got {np.shape(attention_mask)}")
        config = getattr(model, "generation_config", None)
        eos = getattr(config, "eos_token_id", None) if eos_token_id is None else eos_token_id
        self.guard, self.model, self.cache = guard, model, cache
        self._mask = attention_mask
        self._given = None if prompt_length is None else int(prompt_length)
        self._pad = getattr(config, "pad_token_id", None) if pad_token_id is None else pad_token_id
        self._eos = [] if eos is None else [int(i) for i in np.atleast_1d(np.asarray(eos))]
        self._seen_cache: Any = None
        self._hook: Any = None
        self._looking = False
        self.reset()

    def reset(self) -> None:
        """Takes the next call as the first of a generation."""
        self.watch: DepthWatch | None = None
        self._width = self._start = -1
        self._tail: Any = None

    @property
    def log(self) -> list[list[tuple[int, float]]]:
        """For each row a list of (step, probability) of the last generation."""
        return [] if self.watch is None else self.watch.log

    @property
    def halted(self) -> list[int | None]:
        """For each row the step (tokens of the reply) at which it was halted, or None."""
        return [] if self.watch is None else self.watch.halted

    def __enter__(self) -> AnyDepthCriterion:
        if self.cache == "fork":

            def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
                if not self._looking:
                    self._seen_cache = kwargs.get("past_key_values")

            self._hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._seen_cache = None

    def _begins(self, input_ids: Any) -> bool:
        rows, width = input_ids.shape
        if self.watch is None or rows != len(self.watch.log) or width <= self._width:
            return True
        # Assisted decoding adds several tokens at once; without a given length only one tells it from a new prompt.
        if self._given is None and width != self._width + 1:
            return True
        return not bool((input_ids[:, max(0, self._start - _REMEMBERED) : self._start] == self._tail).all())

    def __call__(self, input_ids: Any, scores: Any = None, **kwargs: Any) -> Any:
        import torch

        rows, width = input_ids.shape
        previous = self._width - self._start
        if self._begins(input_ids):
            start = width - 1 if self._given is None else self._given
            if start >= width:
                raise ArgumentError(f"prompt_length: expected less than the {width} tokens there are, got {start}")
            if self._mask is not None and (len(self._mask) != rows or np.shape(self._mask)[1] > width):
                raise ShapeError(f"attention_mask: expected {rows} rows of the prompts, got {np.shape(self._mask)}")
            self.watch, self._start = self.guard.watch(rows), start
            self._tail = input_ids[:, max(0, start - _REMEMBERED) : start].clone()
            previous = max(0, width - 1 - start)
        self._width = width
        watch, step = self.watch, width - self._start
        assert watch is not None
        if watch.due(step, previous):
            active = [
                r
                for r, reply in enumerate(input_ids[:, self._start :].tolist())
                if watch.halted[r] is None and not any(i in self._eos for i in reply)
            ]
            if active:
                watch.update(step, self._look(input_ids, active), active)
        return torch.tensor([h is not None for h in watch.halted], device=input_ids.device)

    def _attended(self, input_ids: Any) -> Any:
        import torch

        if self._mask is not None:
            given = torch.as_tensor(self._mask, device=input_ids.device).bool()
            return torch.nn.functional.pad(given, (0, input_ids.shape[1] - given.shape[1]), value=True)
        if self._pad is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        return (input_ids != int(self._pad)).cumsum(1) > 0

    def _look(self, input_ids: Any, active: list[int]) -> Vector:
        mask = self._attended(input_ids)
        self._looking = True
        try:
            if self.cache == "fork":
                if self._hook is None:
                    raise ArgumentError("cache: 'fork' needs `with guard.criterion(model, cache='fork') as criterion`")
                return self.guard.look_forked(self.model, input_ids, mask, self._seen_cache)[active]
            return self.guard.look(self.model, [input_ids[r][mask[r]].tolist() for r in active])
        finally:
            self._looking = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.guard!r}, cache={self.cache!r})"


class _Read(Exception):
    """Ends a forward pass behind the block that was read."""


@dataclass(frozen=True)
class LinearProbe:
    """Logistic probe ``sigmoid(x · coef + intercept)`` from its numbers alone, as :meth:`AnyDepthGuard.load` reads it.

    Attributes:
        coef: ``(d,)`` float64.
        intercept: a number.
    """

    coef: Vector
    intercept: float = 0.0

    def __post_init__(self) -> None:
        coef = single_vector(self.coef, "coef")
        if not (np.isfinite(coef).all() and math.isfinite(self.intercept)):
            raise NonFiniteError("coef, intercept: expected finite numbers")
        object.__setattr__(self, "coef", coef)

    def probability(self, x: Any) -> Vector:
        """``(n,)`` of states ``(n, d)``."""
        z = np.asarray(x, dtype=np.float64) @ self.coef + self.intercept
        e = np.exp(-np.abs(z))
        return np.asarray(np.where(z >= 0, 1.0, e) / (1.0 + e))


class AnyDepthGuard(_AnyDepth):
    """Probe on the header that opens an answer, put behind what has been generated so far, at any depth.

    Args:
        probe: anything with ``probability(x)``, ``(n, d)`` states to ``(n,)`` in [0, 1], harmful = 1.
        header_ids: tokens appended at each look (:func:`assistant_header`); the state is read at the last of them.
        layer: index of a block, or the name of a module. Published: the output of a block's input norm, for instance
            ``"model.layers.15.input_layernorm"`` with ``site="post"``.
        site: input (``"pre"``) or output (``"post"``) of it.
        interval: look after every so many tokens of the reply.
        threshold: a look is a hit at or above it; from :meth:`calibrate` for a bound on halted harmless replies.
        patience: consecutive hits that halt (ours; published: 1).
        blocks: dotted name of the list of blocks, for models the table does not know.

    Raises:
        DTypeError, ArgumentError: an argument does not fit.

    Source: arXiv 2510.18081, the linear probe form (LP).
    """

    def __init__(
        self,
        probe: Any,
        header_ids: Any,
        layer: int | str,
        *,
        site: Site = "pre",
        interval: int = 25,
        threshold: float = 0.5,
        patience: int = 1,
        blocks: str | None = None,
    ) -> None:
        if not callable(getattr(probe, "probability", None)):
            raise DTypeError(f"probe: expected an object with probability(x), got {type(probe).__name__}")
        super().__init__(header_ids, interval, threshold, patience)
        check_site(site)
        self.probe, self.layer, self.site, self.blocks = probe, layer, site, blocks

    @staticmethod
    def states(
        model: nn.Module,
        tokenizer: Any,
        conversations: Iterable[Conversation],
        layer: int | str,
        depths: Sequence[int] = DEPTHS,
        *,
        site: Site = "pre",
        header_ids: Any = None,
        system: str | None = None,
        batch_size: int = 8,
        blocks: str | None = None,
        progress: bool = True,
    ) -> DepthStates:
        """States at the last header token, the header put behind the first ``depth`` tokens of each reply.

        Args:
            model: a Hugging Face decoder.
            tokenizer: its fast tokenizer, with a chat template.
            conversations: pairs of prompt and reply.
            layer, site, header_ids, blocks: as in the class; ``header_ids`` None for :func:`assistant_header`.
            depths: in tokens of the reply; a reply counts at those it is long enough for.
            system: a system message before each prompt.
            batch_size: contexts per forward pass.
            progress: show a progress bar where standard error is a terminal.

        Raises:
            ArgumentError, DTypeError: the arguments do not fit, or no reply reaches the first depth.
            NonFiniteError: a state is not finite.
        """
        coded = _coded(tokenizer, conversations, system)
        header = assistant_header(tokenizer) if header_ids is None else [int(i) for i in header_ids]
        at = [(i, d) for d in _depths(depths) for i, (_, reply) in enumerate(coded) if len(reply) >= d]
        if not at:
            raise ArgumentError(
                f"depths: no reply has {min(depths)} tokens; the longest has {max(len(r) for _, r in coded)}"
            )
        contexts = [coded[i][0] + coded[i][1][:d] + header for i, d in at]
        x = _last_states(model, contexts, layer, site, blocks, batch_size, progress)
        return DepthStates(x, np.array([i for i, _ in at]), np.array([d for _, d in at]), header)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: Any,
        conversations: Iterable[Conversation],
        labels: Any,
        layer: int | str,
        depths: Sequence[int] = DEPTHS,
        *,
        C: float = 1.0,
        class_weight: Literal["balanced"] | None = "balanced",
        site: Site = "pre",
        header_ids: Any = None,
        system: str | None = None,
        batch_size: int = 8,
        blocks: str | None = None,
        progress: bool = True,
        **options: Any,
    ) -> AnyDepthGuard:
        """Fits the logistic probe on labelled replies, at all depths together.

        Args:
            labels: per conversation, 1 for harmful replies, 0 for harmless ones.
            C, class_weight: of the :class:`RefusalProbe`.
            options: further arguments of the class. Others as in :meth:`states`.

        Raises:
            As :meth:`states`. ShapeError, ArgumentError: labels that do not fit.
            DegenerateError: the replies of one class are missing.
        """
        block = layer if isinstance(layer, int) else None
        probe = RefusalProbe(C=C, class_weight=class_weight, layer=block, site=site)
        pairs = list(conversations)
        values = binary_labels(labels, len(pairs))
        if values.min() == values.max():
            raise DegenerateError("labels: expected both classes")
        found = cls.states(
            model,
            tokenizer,
            pairs,
            layer,
            depths,
            site=site,
            header_ids=header_ids,
            system=system,
            batch_size=batch_size,
            blocks=blocks,
            progress=progress,
        )
        y = values[found.conversation]
        if y.min() == y.max():
            raise DegenerateError(f"labels: only class {y[0]} has replies of {min(depths)} tokens or more")
        return cls(probe.fit(found.x, y), found.header_ids, layer, site=site, blocks=blocks, **options)

    def look(self, model: nn.Module, contexts: Sequence[Sequence[int]]) -> Vector:
        """Probability of a harmful reply behind each context, ``(n,)`` float64: one pass over all of them.

        Args:
            model: a Hugging Face decoder.
            contexts: token ids of a prompt and the reply so far; the header is appended here.
        """
        whole = [[*context, *self.header_ids] for context in contexts]
        return self._judge(_last_states(model, whole, self.layer, self.site, self.blocks, len(whole), False))

    def look_forked(self, model: nn.Module, ids: Any, mask: Any, cache: Any) -> Vector:
        """As :meth:`look` for all rows of a running generation, from a copy of its cache.

        Args:
            model: the model that generates.
            ids, mask: ``(rows, width)`` tokens so far, and which of them are not padding.
            cache: the generation's ``DynamicCache``, which holds the first of these tokens; it is not changed.

        Raises:
            ArgumentError: another kind of cache, or one of other rows.
        """
        import torch
        from transformers import DynamicCache

        if type(cache) is not DynamicCache:
            found = "none" if cache is None else type(cache).__name__
            raise ArgumentError(f"cache: 'fork' needs a DynamicCache, got {found}; use cache='recompute'")
        held, (rows, width) = int(cache.get_seq_length()), ids.shape
        keys = next((k for entry in cache.layers if (k := getattr(entry, "keys", None)) is not None), None)
        cached = 0 if keys is None else int(keys.shape[0])
        if not 0 < held < width or cached != rows:
            raise ArgumentError(
                f"cache: expected {rows} rows and below {width} tokens, got {cached} and {held}; use cache='recompute'"
            )
        header = torch.tensor(self.header_ids, device=ids.device).expand(rows, -1)
        attended = torch.nn.functional.pad(mask.long(), (0, header.shape[1]), value=1)
        states = _states_of_pass(
            model,
            torch.cat([ids[:, held:], header], 1),
            attended,
            torch.full((rows,), width - held + header.shape[1] - 1),
            self._module(model),
            self.site,
            past_key_values=copy.deepcopy(cache),
            use_cache=True,
            **_positions(model, attended, held),
        )
        return self._judge(states)

    def _module(self, model: nn.Module) -> nn.Module:
        return next(iter(select_modules(model, self.layer, self.blocks).values()))

    def _judge(self, states: Any) -> Vector:
        return np.asarray(self.probe.probability(states), dtype=np.float64)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with the probe's ``coef`` and ``intercept``; the rest is in its metadata.

        Raises:
            DTypeError: the probe has no ``coef`` and ``intercept``. ArgumentError: the path cannot be written.
        """
        from safetensors.numpy import save

        if not (hasattr(self.probe, "coef") and hasattr(self.probe, "intercept")):
            raise DTypeError(f"probe: expected coef and intercept to save, got {type(self.probe).__name__}")
        facts = {
            "header_ids": self.header_ids,
            "layer": self.layer,
            "site": self.site,
            "interval": self.interval,
            "threshold": repr(self.threshold),
            "patience": self.patience,
            "blocks": self.blocks,
        }
        arrays = {
            "coef": np.ascontiguousarray(self.probe.coef, dtype=np.float64).reshape(-1),
            "intercept": np.array(self.probe.intercept, dtype=np.float64).reshape(1),
        }
        write_atomically(path, save(arrays, {_FORMAT: json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AnyDepthGuard:
        """Reads what :meth:`save` wrote; the probe is a :class:`LinearProbe` then.

        Raises:
            ArgumentError: the file cannot be read or is not a guard.
        """
        with reading(path, "AnyDepthGuard") as file:
            facts = json.loads((file.metadata() or {})[_FORMAT])
            probe = LinearProbe(file.get_tensor("coef"), float(file.get_tensor("intercept")[0]))
            facts["threshold"] = float(facts["threshold"])
            header, layer = facts.pop("header_ids"), facts.pop("layer")
        return cls(probe, header, layer, **facts)

    def __repr__(self) -> str:
        return f"AnyDepthGuard(layer={self.layer!r}, site={self.site!r}, {self._settings()})"

    def _repr_html_(self) -> str:
        facts = {"probe": type(self.probe).__name__, "layer": self.layer, "site": self.site}
        facts |= {k: getattr(self, k) for k in ("header_ids", "interval", "threshold", "patience")}
        rows = "".join(f"<tr><td>{k}</td><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
        return f"<table><caption>AnyDepthGuard</caption>{rows}</table>"


class AnyDepthKeywords(_AnyDepth):
    """The form without a probe: a short greedy answer after the header, a refusal if it holds one of some phrases.

    Costs a pass over the context and ``lookahead`` tokens at each look. Probabilities are 0 or 1.

    Args:
        tokenizer: decodes what the model answers.
        header_ids: None for :func:`assistant_header`.
        phrases: compared in lower case, with straight apostrophes.
        lookahead: tokens of the answer.
        interval, patience: as in :class:`AnyDepthGuard`.

    Raises:
        ArgumentError, DTypeError: an argument does not fit.

    Source: arXiv 2510.18081, the rethinking form (RK).
    """

    def __init__(
        self,
        tokenizer: Any,
        header_ids: Any = None,
        *,
        phrases: Iterable[str] = REFUSAL_PHRASES,
        lookahead: int = 20,
        interval: int = 25,
        patience: int = 1,
    ) -> None:
        if isinstance(phrases, str):
            raise DTypeError("phrases: expected a list of strings, got one string")
        self.phrases = [_plain(p) for p in phrases]
        if not self.phrases or not all(p.strip() for p in self.phrases):
            raise ArgumentError("phrases: expected text in each phrase")
        self.tokenizer, self.lookahead = tokenizer, _count(lookahead, "lookahead")
        super().__init__(assistant_header(tokenizer) if header_ids is None else header_ids, interval, 0.5, patience)

    def answers(self, model: nn.Module, contexts: Sequence[Sequence[int]]) -> list[str]:
        """The greedy answers behind the header, at most ``lookahead`` tokens each."""
        import torch

        whole = [[*context, *self.header_ids] for context in contexts]
        width = max(map(len, whole))
        ids = torch.zeros(len(whole), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(whole):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        device, pad = run_device(model), getattr(self.tokenizer, "pad_token_id", None)
        with evaluating(model), torch.no_grad():
            out = model.generate(  # type: ignore[operator]
                ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=self.lookahead,
                do_sample=False,
                num_beams=1,
                pad_token_id=0 if pad is None else int(pad),
            )
        return [str(t) for t in self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]

    def look(self, model: nn.Module, contexts: Sequence[Sequence[int]]) -> Vector:
        """1 where the answer behind a context and the header refuses, else 0; ``(n,)`` float64."""
        found = [_plain(text) for text in self.answers(model, contexts)]
        return np.array([float(any(p in text for p in self.phrases)) for text in found])

    def __repr__(self) -> str:
        return f"AnyDepthKeywords({len(self.phrases)} phrases, lookahead={self.lookahead}, {self._settings()})"


def _plain(text: str) -> str:
    return text.lower().replace("’", "'")


@dataclass(frozen=True)
class DepthStates:
    """States read behind the header.

    Attributes:
        x: ``(rows, d)`` float32.
        conversation: ``(rows,)`` index of each row's conversation.
        depth: ``(rows,)`` tokens of the reply before the header.
        header_ids: the header.
    """

    x: Any = field(repr=False)
    conversation: Any = field(repr=False)
    depth: Any
    header_ids: list[int]


def _depths(depths: Iterable[int]) -> list[int]:
    found = [_count(d, "depths") for d in depths]
    if len(set(found)) != len(found):
        raise ArgumentError(f"depths: expected each once, got {found}")
    return sorted(found)


def _coded(
    tokenizer: Any, conversations: Iterable[Conversation], system: str | None
) -> list[tuple[list[int], list[int]]]:
    """Token ids of every prompt, as the template renders it, and of its reply."""
    pairs = list(conversations)
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            raise DTypeError(f"conversations: expected pairs of prompt and reply, got {pair!r:.80} at index {i}")
    prompts = Prompts(tokenizer, [prompt for prompt, _ in pairs], system=system)
    replies = [tokenizer(reply, add_special_tokens=False)["input_ids"] for _, reply in pairs]
    return [(list(p.ids), [int(t) for t in r]) for p, r in zip(prompts, replies, strict=True)]


def _positions(model: nn.Module, attended: Any, start: int) -> dict[str, Any]:
    if "position_ids" not in inspect.signature(_inner(model).forward).parameters:
        return {}
    return {"position_ids": (attended.cumsum(-1) - 1).clamp(min=0)[:, start:]}


def _states_of_pass(
    model: nn.Module, ids: Any, mask: Any, last: Any, module: nn.Module, site: Site, **options: Any
) -> Any:
    """States ``(rows, d)`` float32 at index ``last`` of each row; the pass ends behind the module that is read."""
    import torch

    found: list[Any] = []

    def take(hidden: Any) -> None:
        found.append(hidden.detach()[torch.arange(len(last)), last.to(hidden.device)].float().cpu())
        raise _Read

    attach = _on_input if site == "pre" else _on_output
    with suppress(_Read), evaluating(model), torch.no_grad(), _attached([lambda: attach(module, take)]):
        _inner(model)(input_ids=ids, attention_mask=mask, **options)
    if not found:
        raise ArgumentError("layer: the module does not run when the model does")
    if not bool(torch.isfinite(found[0]).all()):
        row = int((~torch.isfinite(found[0]).all(-1)).nonzero()[0])
        raise NonFiniteError(f"states: non-finite state behind the header in row {row}")
    return found[0].numpy()


def _last_states(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    layer: int | str,
    site: Site,
    blocks: str | None,
    batch_size: int,
    progress: bool,
) -> Any:
    """States ``(n, d)`` at the last token of each context; like lengths together, padded on the right."""
    import torch
    from tqdm.auto import tqdm

    check_site(site)
    size = _count(batch_size, "batch_size")
    module = next(iter(select_modules(model, layer, blocks).values()))
    device, out = run_device(model), [None] * len(contexts)
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    with tqdm(total=len(order), desc="states", unit="context", disable=None if progress else True) as bar:
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            last = torch.tensor([len(contexts[i]) - 1 for i in chosen])
            ids = torch.zeros(len(chosen), int(last.max()) + 1, dtype=torch.long)
            for row, i in enumerate(chosen):
                ids[row, : len(contexts[i])] = torch.tensor(contexts[i])
            mask = (torch.arange(ids.shape[1]) <= last[:, None]).long()
            rows = _states_of_pass(model, ids.to(device), mask.to(device), last, module, site, use_cache=False)
            for i, state in zip(chosen, rows, strict=True):
                out[i] = state
            bar.update(len(chosen))
    return np.stack(out)  # type: ignore[arg-type]
