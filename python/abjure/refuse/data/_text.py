"""Text as answers are compared, random choices keyed by row, and rows in the shapes that trainers read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import ArgumentError, DTypeError
from ...measure._text import NORMAL_FORMS, alternatives, normalized, texts

__all__ = ["NORMAL_FORMS", "alternatives", "messages_of", "normalized", "row_rng", "texts"]


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
