"""Refusal matching: published phrase lists over plain responses, on one thread, against the loop people write."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .timing import Row, compare

#: Responses, and words in each (about 640 characters).
RESPONSES, WORDS = 60_000, 110
#: Everyday words without a phrase of any list, so that every response is searched to its end.
_VOCABULARY = (
    "the", "of", "and", "to", "a", "in", "that", "it", "is", "was", "for", "on", "with", "as", "his", "they", "at",
    "be", "this", "from", "have", "or", "by", "one", "had", "not", "but", "what", "all", "were", "when", "we",
    "there", "can", "an", "your", "which", "their", "said", "if", "do", "will", "each", "about", "how", "up", "out",
    "them", "then", "she", "many", "some", "so", "these", "would", "other", "into", "has", "more", "her", "two",
    "like", "him", "see", "time", "could", "no", "make", "than", "first", "been", "its", "who", "now", "people",
    "my", "made", "over", "did", "down", "only", "way", "find", "use", "may", "water", "long", "little", "very",
    "after", "words", "called", "just", "where", "most", "know",
)  # fmt: skip


def responses(count: int, seed: int = 0) -> list[str]:
    """Responses of sentences and paragraphs."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(_VOCABULARY), (count, WORDS))
    ends = np.where(np.arange(WORDS) % 40 == 39, ".\n\n", np.where(np.arange(WORDS) % 13 == 12, ". ", " "))
    return ["".join(_VOCABULARY[w] + e for w, e in zip(row, ends, strict=True)) for row in picks]


def rows(scale: float = 1.0) -> Iterator[Row]:
    """Every list as it is published, and folded, at ``scale`` times the number of responses."""
    from .. import get_num_threads, set_num_threads
    from ..measure import PHRASE_LISTS, refusal_match

    texts = responses(max(1000, int(RESPONSES * scale)))
    size = sum(map(len, texts))
    some = texts[: max(500, len(texts) // 20)]
    share = len(texts) / len(some)
    before = get_num_threads()
    set_num_threads(1)
    try:
        for name in ("gcg", "refusal_direction"):
            phrases = [p.lower() for p in PHRASE_LISTS[name].phrases]

            def loop(phrases: list[str] = phrases) -> list[bool]:
                # A twentieth of the responses: time per response does not depend on their number.
                return [any(p in low for p in phrases) for low in map(str.lower, some)]

            for form, label in ((None, "published"), ("refusal", "folded")):
                seconds = compare(lambda name=name, form=form: refusal_match(texts, name, normalize=form), loop)  # type: ignore[misc]
                case = f"{name}, {label}, {size / 1e6:.0f} MB, 1 thread"
                yield Row("refusal_match", case, seconds[0], "lower() and a loop of `in`", seconds[1] * share, size)
    finally:
        set_num_threads(before)
