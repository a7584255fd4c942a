"""How much of a reference text an answer repeats: ROUGE-L and exact match."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .. import _native
from ..errors import ArgumentError, DegenerateError, DTypeError, ShapeError
from ._arrays import Floats

__all__ = ["RougeL", "exact_match", "rouge_l"]

Tokenizer = Literal["rouge_score", "unicode"]


@dataclass(frozen=True, eq=False)
class RougeL:
    """ROUGE-L of n pairs of texts, from the longest common subsequence of their words.

    Attributes:
        common, candidate, reference: ``(n,)`` words in the subsequence and in each text.
        tokenizer: what a word was.
    """

    common: Floats
    candidate: Floats
    reference: Floats
    tokenizer: str

    @property
    def precision(self) -> Floats:
        """``(n,)`` share of the candidate's words; 0 for a candidate without words."""
        return _share(self.common, self.candidate)

    @property
    def recall(self) -> Floats:
        """``(n,)`` share of the reference's words; 0 for a reference without words."""
        return _share(self.common, self.reference)

    @property
    def f1(self) -> Floats:
        """``(n,)`` harmonic mean of precision and recall, ``2 common / (candidate + reference)``."""
        return _share(2 * self.common, self.candidate + self.reference)

    def __repr__(self) -> str:
        return f"RougeL(n={len(self.common)}, mean f1={float(self.f1.mean()):.4f}, tokenizer={self.tokenizer!r})"


def _share(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def rouge_l(
    candidates: Sequence[str] | str, references: Sequence[str] | str, *, tokenizer: Tokenizer = "rouge_score"
) -> RougeL:
    """ROUGE-L of answers against references, pair by pair, in parallel.

    Args:
        candidates: ``n`` texts, or one.
        references: as many.
        tokenizer: ``"rouge_score"``: runs of ``[a-z0-9]`` in lower case, as that package without stemming (texts in
            other scripts score 0 there, and so here); ``"unicode"``: words by Unicode's rules (UAX #29), in lower case.

    Raises:
        ShapeError: no texts, or different numbers of them. DTypeError: something that is no text.
        ArgumentError: unknown ``tokenizer``. DegenerateError: every reference is without a word.

    Source: Lin, ROUGE: a package for automatic evaluation of summaries, 2004; bit-parallel by Hyyrö, 2004.
    """
    if tokenizer not in ("rouge_score", "unicode"):
        raise ArgumentError(f"tokenizer: expected 'rouge_score' or 'unicode', got {tokenizer!r}")
    a, b = texts(candidates, "candidates"), texts(references, "references")
    if len(a) != len(b):
        raise ShapeError(f"references: expected {len(a)} texts, one per candidate, got {len(b)}")
    columns = np.array(_native.text_overlaps(a, b, tokenizer == "unicode"), dtype=np.float64).T
    if not columns[2].any():
        raise DegenerateError(f"references: expected words, found none by the rules of tokenizer={tokenizer!r}")
    return RougeL(columns[0], columns[1], columns[2], tokenizer)


#: Transformations of :func:`exact_match`.
Normal = Literal["squad", "none"]

_PUNCTUATION = {ord(c): None for c in string.punctuation}


def exact_match(
    candidates: Sequence[str] | str, references: Sequence[Any] | str, *, normal: Normal = "squad"
) -> npt.NDArray[np.bool_]:
    """Whether each answer equals its reference, or one of its references.

    Args:
        candidates: ``n`` texts, or one.
        references: as many texts, or lists of texts of which one must match.
        normal: ``"squad"``: both in lower case, without ASCII punctuation and the articles a, an, the, with single
            spaces; ``"none"``: as they are.

    Returns:
        ``(n,)`` bool.

    Raises:
        ShapeError: no texts, different numbers of them, an empty list of references. DTypeError: something that is no
            text.
        ArgumentError: unknown ``normal``.

    Source: Rajpurkar and others, arXiv 1606.05250.
    """
    if normal not in ("squad", "none"):
        raise ArgumentError(f"normal: expected 'squad' or 'none', got {normal!r}")
    a = texts(candidates, "candidates")
    given = [references] if isinstance(references, str) or isinstance(candidates, str) else list(references)
    if len(given) != len(a):
        raise ShapeError(f"references: expected {len(a)}, one per candidate, got {len(given)}")
    form = _squad if normal == "squad" else str
    found = [
        form(x) in {form(y) for y in texts(ys, f"references[{i}]")}
        for i, (x, ys) in enumerate(zip(a, given, strict=True))
    ]
    return np.array(found)


def _squad(text: str) -> str:
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(w for w in re.sub(r"\b(a|an|the)\b", " ", plain).split())


def texts(given: Any, name: str) -> list[str]:
    """``given`` as a list of one or more texts."""
    found = [given] if isinstance(given, str) else list(given)
    if not found:
        raise ShapeError(f"{name}: expected at least one text")
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise DTypeError(f"{name}: expected texts, got {type(text).__name__} at index {i}")
    return found
