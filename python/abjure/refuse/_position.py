"""Where the response begins in each row that a logits processor is called with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from .._interop import integers, is_torch
from ..errors import ArgumentError, ShapeError

#: Last prompt tokens by which a running generation is told from a new one.
_REMEMBERED = 8


def is_int64(input_ids: Any) -> bool:
    """Whether a context is one that `generate()` passes, a CPU tensor of 64-bit integers, or such an array."""
    if is_torch(input_ids):
        return bool(input_ids.is_cpu and input_ids.dtype is sys.modules["torch"].int64)
    return isinstance(input_ids, np.ndarray) and input_ids.dtype == np.int64


def columns(input_ids: Any, start: int, stop: int | None = None) -> np.ndarray[Any, Any]:
    """Columns of a context as C-contiguous int64; of what `generate()` passes nothing but these columns is touched."""
    if is_torch(input_ids) and is_int64(input_ids):
        input_ids = input_ids.detach().numpy()
    part = input_ids[:, start:stop]
    if isinstance(part, np.ndarray) and part.dtype == np.int64:
        return np.ascontiguousarray(part)
    return token_ids(part, "input_ids")


def token_ids(x: Any, arg: str) -> np.ndarray[Any, Any]:
    """Integer ids from a NumPy array or a tensor on any device; only a small part of the context is ever passed."""
    if hasattr(x, "detach") and getattr(x, "device", None) is not None and x.device.type != "cpu":
        x = x.detach().cpu()
    return integers(x, arg)


class Prompt:
    """Prompt length of each row, given or found from the calls of one generation.

    Without given lengths, the width of the first call is the prompt of all rows, padding included. A call continues the
    generation if it has as many rows, is one token wider and ends its prompt with the same tokens; any other call
    begins a new one. That holds for `generate()` with greedy, sampled and beam search, where beams stay with their
    prompt.
    """

    def __init__(self, given: int | Sequence[int] | None) -> None:
        self._given: np.ndarray[Any, Any] | None = None
        if given is not None:
            self._given = integers(np.atleast_1d(np.asarray(given)), "prompt_length")
            if self._given.ndim != 1 or self._given.size == 0 or (self._given < 0).any():
                raise ArgumentError(f"prompt_length: expected lengths of 0 or more, got {given!r:.80}")
        self.reset()

    def reset(self) -> None:
        """Takes the next call as the first of a generation."""
        self._width = -1
        self._length = -1
        self._tail = np.empty((0, 0), dtype=np.int64)

    def lengths(self, input_ids: Any) -> np.ndarray[Any, Any]:
        """Tokens before the first response token, per row."""
        rows, width = input_ids.shape
        if self._given is not None:
            return self._spread(rows)
        if not self._continues(input_ids):
            self._length = width
            self._tail = self._end_of_prompt(input_ids)
        self._width = width
        return np.full(rows, self._length, dtype=np.int64)

    def _spread(self, rows: int) -> np.ndarray[Any, Any]:
        given = self._given
        assert given is not None
        if rows % given.size:
            raise ShapeError(
                f"prompt_length: expected one per row or per group of beams ({rows} rows), got {given.size}"
            )
        return np.repeat(given, rows // given.size)

    def _end_of_prompt(self, input_ids: Any) -> np.ndarray[Any, Any]:
        start = max(0, self._length - _REMEMBERED)
        return columns(input_ids, start, self._length)

    def _continues(self, input_ids: Any) -> bool:
        rows, width = input_ids.shape
        if width != self._width + 1 or rows != self._tail.shape[0]:
            return False
        return bool(np.array_equal(self._end_of_prompt(input_ids), self._tail))
