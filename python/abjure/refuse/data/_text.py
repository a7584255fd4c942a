"""Text as answers are compared, random choices keyed by row, and rows in the shapes that trainers read."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import ArgumentError, DTypeError

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


def row_rng(seed: int, *key: int) -> np.random.Generator:
    """A generator for one row: choices depend on the seed and the key, not on order, batches or processes."""
    if seed < 0 or any(k < 0 for k in key):
        raise ArgumentError(f"seed: expected a seed and row indices of 0 or more, got {(seed, *key)}")
    return np.random.default_rng((seed, *key))


def messages_of(row: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """(role, text) of a list of ``{"role", "content"}``; contents in parts are joined."""
    found = []
    for message in row[name]:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise DTypeError(f"{name}: expected messages with role and content, got {message!r}")
        content = message["content"]
        if content is None:  # a message that only calls a tool
            content = ""
        if not isinstance(content, str):
            content = "".join(str(part.get("text") or "") for part in content)
        found.append((str(message["role"]), content))
    return found
