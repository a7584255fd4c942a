"""Sentence embeddings, and the matching of what is being said with what must not be, by meaning."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, NonFiniteError, ShapeError
from .bounds import Threshold, calibrate_threshold
from .directions import Vector

#: Texts to ``(n, d)`` embeddings.
Encoder = Callable[[Sequence[str]], Any]


class SentenceEncoder:
    """Sentence embeddings from a transformers encoder: token states pooled, then scaled to length 1.

    Args:
        model: called with the tokenizer's output; its ``last_hidden_state`` is pooled.
        tokenizer: its tokenizer.
        pooling: ``"mean"`` over the tokens that are not padding (as sentence-transformers), or the ``"first"`` token.
        batch_size: texts at a time, longest first, so that little is padded.
        max_length: tokens beyond are cut off; None: the tokenizer's own limit.
        cache: texts whose embeddings are kept, the last used first.

    Called with texts it returns float32 ``(n, d)``.

    Raises:
        ArgumentError: an option outside its domain. NonFiniteError: an embedding that is not finite or has length 0.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        pooling: Literal["mean", "first"] = "mean",
        batch_size: int = 32,
        max_length: int | None = 256,
        cache: int = 4096,
    ) -> None:
        if pooling not in ("mean", "first"):
            raise ArgumentError(f"pooling: expected 'mean' or 'first', got {pooling!r}")
        if batch_size < 1 or cache < 0:
            raise ArgumentError(f"batch_size, cache: expected at least 1 and 0, got {batch_size} and {cache}")
        self.model, self.tokenizer, self.pooling = model, tokenizer, pooling
        self.batch_size, self.max_length, self.cache = batch_size, max_length, cache
        self._known: OrderedDict[str, Vector] = OrderedDict()
        #: Texts that went through the model; the others came from the cache.
        self.encoded = 0

    def __call__(self, texts: Sequence[str]) -> Vector:
        wanted = dict.fromkeys(texts)
        fresh = {t: v for t in wanted if (v := self._known.get(t)) is None}
        found: dict[str, Vector] = {t: self._known[t] for t in wanted if t not in fresh}
        by_length = sorted(fresh, key=len, reverse=True)
        for i in range(0, len(by_length), self.batch_size):
            part = by_length[i : i + self.batch_size]
            found.update(zip(part, self._embed(part), strict=True))
        for text in wanted:
            self._known[text] = found[text]
            self._known.move_to_end(text)
        while len(self._known) > self.cache:
            self._known.popitem(last=False)
        return np.stack([found[t] for t in texts]) if len(texts) else np.empty((0, 0), dtype=np.float32)

    def _embed(self, texts: list[str]) -> Vector:
        import torch
        from torch.nn import functional as F

        limit = {} if self.max_length is None else {"max_length": self.max_length}
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, **limit)
        device = next(self.model.parameters()).device
        batch = {k: v.to(device) for k, v in batch.items()}
        with torch.inference_mode():
            states = self.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
            pooled = states[:, 0] if self.pooling == "first" else (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors: Vector = F.normalize(pooled, dim=-1).cpu().numpy()
        self.encoded += len(texts)
        bad = ~np.isfinite(vectors).all(1) | (np.abs(vectors).max(1) == 0)
        if bad.any():
            raise NonFiniteError(f"texts: no finite embedding of {texts[int(bad.argmax())]!r:.60}")
        return vectors


def unit_rows(vectors: Any, arg: str, count: int) -> Vector:
    """Embeddings as float64 rows of length 1.

    Raises:
        ShapeError: not ``(count, d)``. NonFiniteError: a row that is not finite or has length 0.
    """
    rows = vectors.detach().cpu().double().numpy() if hasattr(vectors, "detach") else np.asarray(vectors, dtype=float)
    if rows.ndim != 2 or len(rows) != count or (count and rows.shape[1] == 0):
        raise ShapeError(f"{arg}: expected embeddings ({count}, d), got {rows.shape}")
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(rows).all() or (length == 0).any():
        raise NonFiniteError(f"{arg}: expected finite embeddings that are not zero")
    return np.asarray(rows / length)


class SemanticMatcher:
    """How near the end of a text comes to forbidden phrases in meaning: the largest cosine of embeddings.

    One short text is embedded per hypothesis and check, never one per token of the vocabulary. The penalty of a cosine
    c is ``strength * (c - threshold) / (1 - threshold)`` from ``threshold`` on, and 0 below.

    Args:
        encoder: texts to ``(n, d)`` embeddings, for example a :class:`SentenceEncoder`.
        phrases: what must not be said; with ``templates``, each is embedded in every template.
        threshold: cosine from which on there is a penalty, below 1. See :meth:`calibrate`.
        strength: penalty at a cosine of 1, in log-probability.
        drop: cosine from which on the hypothesis is given up; None: never.
        window: words of the text's end that are embedded.
        every: output tokens from one check to the next.
        templates: formats with one ``{}``.

    Raises:
        ArgumentError: no phrases, or an option outside its domain. NonFiniteError: an embedding is not finite.

    Source: our form of the semantic matching of GUARD (arXiv 2505.13312), whose constants we could not read.
    """

    def __init__(
        self,
        encoder: Encoder,
        phrases: Sequence[str],
        *,
        threshold: float = 0.6,
        strength: float = 5.0,
        drop: float | None = None,
        window: int = 8,
        every: int = 4,
        templates: Sequence[str] = ("{}",),
    ) -> None:
        if not phrases or isinstance(phrases, str) or not all(p.strip() for p in phrases):
            raise ArgumentError(f"phrases: expected texts, none of them blank, got {phrases!r:.80}")
        if window < 1 or every < 1:
            raise ArgumentError(f"window, every: expected 1 or more, got {window} and {every}")
        if not strength >= 0 or not math.isfinite(strength):
            raise ArgumentError(f"strength: expected 0 or more, got {strength}")
        if not templates or any(t.count("{}") != 1 for t in templates):
            raise ArgumentError(f"templates: expected formats with one {{}}, got {list(templates)!r:.80}")
        self.encoder, self.window, self.every, self.strength = encoder, window, every, float(strength)
        self.phrases = tuple(phrases)
        self.drop = drop
        self.threshold = threshold
        texts = [t.format(p) for p in self.phrases for t in templates]
        self._targets = unit_rows(encoder(texts), "encoder", len(texts))

    @property
    def threshold(self) -> float:
        """Cosine from which on there is a penalty."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        if not -1 <= value < 1:
            raise ArgumentError(f"threshold: expected a cosine below 1, got {value}")
        if self.drop is not None and not self.drop >= value:
            raise ArgumentError(f"drop: expected a cosine of {value} (the threshold) or more, got {self.drop}")
        self._threshold = float(value)

    def end_of(self, text: str) -> str:
        """The words that are embedded."""
        return " ".join(text.split()[-self.window :])

    def cosines(self, texts: Sequence[str]) -> Vector:
        """Largest cosine of each text's end to a phrase, ``(n,)``; -1 for a text without words."""
        ends = [self.end_of(t) for t in texts]
        some = [i for i, end in enumerate(ends) if end]
        found = np.full(len(ends), -1.0)
        if some:
            rows = unit_rows(self.encoder([ends[i] for i in some]), "encoder", len(some))
            found[some] = np.clip((rows @ self._targets.T).max(axis=1), -1.0, 1.0)
        return found

    def penalties(self, cosines: Any) -> Vector:
        """What is taken off for each cosine, 0 or more."""
        over = (np.asarray(cosines, dtype=float) - self.threshold) / (1 - self.threshold)
        return np.asarray(self.strength * np.maximum(over, 0.0))

    def calibrate(self, texts: Sequence[str], alpha: float, delta: float | None = None) -> Threshold:
        """Sets the threshold so that at most a share ``alpha`` of harmless continuations is punished.

        Every text is taken as a generation would: the largest cosine of its ends counts.

        Raises:
            ArgumentError: ``alpha`` or ``delta`` outside (0, 1). ShapeError: no texts.
        """
        worst = [float(self.cosines(self._ends(t)).max(initial=-1.0)) for t in texts]
        found = calibrate_threshold(worst, alpha, delta)
        self.threshold = min(float(found), math.nextafter(1.0, 0.0))
        return found

    def _ends(self, text: str) -> list[str]:
        words = text.split()
        return [" ".join(words[: i + 1]) for i in range(len(words))]
