"""Text as answers are compared."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any

from ..errors import ArgumentError, DTypeError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
NORMAL_FORMS = ("none", "casefold", "squad")


def normalized(text: str, form: str) -> str:
    """``text`` as it is compared: as it is, case folded with spaces collapsed, or in the normal form of SQuAD."""
    if form == "none":
        return text
    if form == "casefold":
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    if form == "squad":
        plain = text.lower().translate(_PUNCTUATION)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())
    raise ArgumentError(f"normalize: expected one of {', '.join(map(repr, NORMAL_FORMS))}, got {form!r}")


def texts(values: Any, name: str, length: int | None = None) -> list[str]:
    """A list of strings, of a known length."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise DTypeError(f"{name}: expected a list of strings, got {type(values).__name__}")
    for i, text in enumerate(values):
        if not isinstance(text, str):
            raise DTypeError(f"{name}: expected strings, got {type(text).__name__} at index {i}")
    if length is not None and len(values) != length:
        raise ArgumentError(f"{name}: expected {length}, one per question, got {len(values)}")
    return list(values)


def alternatives(values: Any, name: str, length: int, form: str) -> list[list[str]]:
    """Right answers, one or several per row, none of them empty once normalised."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise DTypeError(f"{name}: expected a list of answers, got {type(values).__name__}")
    if len(values) != length:
        raise ArgumentError(f"{name}: expected {length}, one per question, got {len(values)}")
    found = [[v] if isinstance(v, str) else texts(v, f"{name}[{i}]") for i, v in enumerate(values)]
    for i, options in enumerate(found):
        # An empty answer is part of every text: it would make any question known.
        if not options or not all(normalized(o, form).strip() for o in options):
            raise ArgumentError(f"{name}: expected text, got an answer that is empty once normalised at index {i}")
    return found
