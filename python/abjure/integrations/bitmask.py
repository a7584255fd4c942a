"""Bans as a bitmask over the vocabulary, the form that structured-output libraries (xgrammar, llguidance) exchange.

An int32 array ``(rows, ceil(vocabulary / 32))``; bit ``j`` of word ``w``, from the lowest, is 1 where token
``32 w + j`` is allowed. Masks of a grammar and of phrases are joined by AND. A mask of another width than the logits is
an error unless ``tail`` says what becomes of the tokens beyond it: one library lets them pass, another forbids them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from .._interop import integers, is_torch, shape
from ..errors import ArgumentError, DegenerateError, DeviceError, DTypeError, NonFiniteError, ShapeError
from ..refuse.phrases import ForbiddenPhrases
from ._requests import _tail

Tail = Literal["forbid", "allow"]


def words(vocab_size: int) -> int:
    """Width of a mask: ``ceil(vocab_size / 32)``."""
    if vocab_size < 1:
        raise ArgumentError(f"vocab_size: expected 1 or more, got {vocab_size}")
    return -(-vocab_size // 32)


def allocate(rows: int, vocab_size: int) -> np.ndarray[Any, Any]:
    """A mask ``(rows, words)`` int32 that allows everything; ``torch.from_numpy`` shares its memory."""
    return np.full((rows, words(vocab_size)), -1, dtype=np.int32)


def pack(allowed: Any) -> np.ndarray[Any, Any]:
    """The mask of booleans ``(rows, vocabulary)``; bits beyond the vocabulary are 1.

    Raises:
        ShapeError, DTypeError: not booleans of that shape.
    """
    bits = np.asarray(allowed)
    if bits.dtype != np.bool_:
        raise DTypeError(f"allowed: expected booleans, got {bits.dtype}")
    if bits.ndim != 2 or bits.shape[1] < 1:
        raise ShapeError(f"allowed: expected (rows, vocabulary), got {bits.shape}")
    filled = np.ones((bits.shape[0], 32 * words(bits.shape[1])), dtype=np.bool_)
    filled[:, : bits.shape[1]] = bits
    return np.packbits(filled, axis=1, bitorder="little").view("<i4").astype(np.int32, copy=False)


def unpack(mask: Any, vocab_size: int) -> np.ndarray[Any, Any]:
    """Booleans ``(rows, vocab_size)`` of a mask in host memory: allowed.

    Raises:
        ShapeError: the mask has another width. DTypeError: it is not int32.
    """
    host = _host(mask)
    if host.shape[1] != words(vocab_size):
        raise ShapeError(f"mask: expected {words(vocab_size)} words for {vocab_size} tokens, got {host.shape[1]}")
    bits = np.unpackbits(np.ascontiguousarray(host).view(np.uint8), axis=1, bitorder="little")
    return bits[:, :vocab_size].astype(np.bool_)


def forbidden(mask: Any, vocab_size: int) -> list[np.ndarray[Any, Any]]:
    """Ids that each row of a mask forbids, ascending.

    Raises:
        As :func:`unpack`.
    """
    return [np.flatnonzero(~row) for row in unpack(mask, vocab_size)]


def forbid_(mask: Any, row: Any, ids: Any) -> Any:
    """Clears bits of a mask in host memory, in place.

    Args:
        mask: ``(rows, words)`` int32, NumPy or torch.
        row, ids: ``(n,)`` row and token of each bit; one row for all will do.

    Raises:
        ArgumentError: a row or an id outside the mask. ShapeError: lengths that do not fit.
    """
    host = _host(mask)
    tokens = np.atleast_1d(integers(ids, "ids"))
    at = np.atleast_1d(integers(row, "row"))
    at = np.full(len(tokens), at[0]) if at.shape == (1,) else at
    if at.shape != tokens.shape:
        raise ShapeError(f"row: expected one for each of {len(tokens)} ids, got {at.shape}")
    for name, values, size in (("row", at, host.shape[0]), ("ids", tokens, 32 * host.shape[1])):
        if len(values) and (values.min() < 0 or values.max() >= size):
            raise ArgumentError(f"{name}: expected 0 to {size - 1}, got {values.min()} to {values.max()}")
    bits = (np.uint32(1) << (tokens & 31).astype(np.uint32)).astype(np.uint32)
    np.bitwise_and.at(host.view(np.uint32), (at, tokens >> 5), ~bits)
    return mask


def forbid_phrases_(
    mask: Any, phrases: ForbiddenPhrases, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
) -> Any:
    """Clears the bits of tokens that would complete a phrase, in place; penalties have no place in a mask.

    Args:
        mask: ``(rows, words)`` int32 in host memory.
        phrases: which, and whether prompts are matched (``scope``).
        prompts, outputs: token ids of each row's prompt and response so far.

    Raises:
        ShapeError: not one prompt and output per row. ArgumentError: a phrase with an id outside the mask.
        DegenerateError: a row would be left without an allowed token; the mask is as it was.
    """
    host = _host(mask)
    if not len(prompts) == len(outputs) == host.shape[0]:
        raise ShapeError(
            f"prompts, outputs: expected {host.shape[0]}, one per row, got {len(prompts)} and {len(outputs)}"
        )
    found = host.copy()
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        tail = _tail(prompt if phrases.scope == "all" else [], output, phrases.reach)
        hard = [token for token, value in phrases.after(tail).items() if value == -np.inf]
        forbid_(found, [row] * len(hard), np.array(hard, dtype=np.int64))
    _expect_alive(found, phrases.vocab_size)
    host[:] = found
    return mask


def and_(mask: Any, other: Any) -> Any:
    """Joins another mask to a mask in host memory, in place: allowed is what both allow.

    Raises:
        ShapeError: masks of different shapes. DegenerateError: a row is left without an allowed token; the mask is as
            it was.
    """
    host, more = _host(mask), _host(other)
    if host.shape != more.shape:
        raise ShapeError(f"other: expected the mask's shape {host.shape}, got {more.shape}")
    joined = host & more
    _expect_alive(joined, None)
    host[:] = joined
    return mask


def apply_(scores: Any, mask: Any, *, rows: Any = None, tail: Tail | None = None) -> Any:
    """Writes -inf where a mask forbids, in place, and returns ``scores``.

    Args:
        scores: ``(batch, vocabulary)``, NumPy or torch, on any device.
        mask: ``(rows, words)`` int32 on the same device.
        rows: the row of ``scores`` that each row of the mask is for; None: all, in order.
        tail: what becomes of tokens that the mask does not reach, and allows a mask that reaches too far.

    Raises:
        ShapeError: another number of rows, or of words without ``tail``.
        ArgumentError: rows that are not there or twice.
        DegenerateError: a row would be left without a token. NonFiniteError: NaN or +inf in a row to be masked.
        DeviceError, DTypeError: scores and mask on different devices, or of a wrong type. Nothing is written then.
    """
    import torch

    found = shape(scores, "scores")
    if tail not in (None, "forbid", "allow"):
        raise ArgumentError(f"tail: expected 'forbid', 'allow' or None, got {tail!r}")
    z = scores if is_torch(scores) else torch.from_numpy(np.asarray(scores))
    bits = mask if is_torch(mask) else torch.from_numpy(np.asarray(mask))
    if z.dim() != 2 or bits.dim() != 2:
        raise ShapeError(
            f"scores, mask: expected (batch, vocabulary) and (rows, words), got {found}, {tuple(bits.shape)}"
        )
    if bits.dtype is not torch.int32 or not z.is_floating_point():
        raise DTypeError(f"scores, mask: expected floats and int32, got {z.dtype}, {bits.dtype}")
    if z.device != bits.device:
        raise DeviceError(f"mask: expected device {str(z.device)!r}, got {str(bits.device)!r}")
    chosen = np.arange(z.shape[0]) if rows is None else np.atleast_1d(integers(rows, "rows"))
    if len(chosen) != bits.shape[0]:
        raise ShapeError(f"mask: expected {len(chosen)} rows, got {bits.shape[0]}")
    if len(set(chosen.tolist())) != len(chosen) or (len(chosen) and not 0 <= chosen.min() <= chosen.max() < z.shape[0]):
        raise ArgumentError(f"rows: expected different rows from 0 to {z.shape[0] - 1}, got {chosen.tolist()}")
    vocab = z.shape[1]
    if tail is None and bits.shape[1] != words(vocab):
        raise ShapeError(
            f"mask: expected {words(vocab)} words for {vocab} tokens, got {bits.shape[1]}; tail= says otherwise"
        )
    shifts = torch.arange(32, device=bits.device, dtype=torch.int32)
    allowed = ((bits[:, :, None] >> shifts) & 1).bool().flatten(1)[:, :vocab]
    if allowed.shape[1] < vocab:
        allowed = torch.nn.functional.pad(allowed, (0, vocab - allowed.shape[1]), value=tail == "allow")
    at = torch.as_tensor(chosen, device=z.device)
    part = z[at]
    bad = (part.isnan() | (part == float("inf"))).any(1)
    if bool(bad.any()):
        raise NonFiniteError(f"scores: NaN or +inf in row {int(at[bad][0])}")
    dead = ~(allowed & (part != -float("inf"))).any(1)
    if bool(dead.any()):
        raise DegenerateError(f"mask: no token is left in row {int(at[dead][0])}")
    z[at] = part.masked_fill_(~allowed, -float("inf"))
    return scores


def _expect_alive(mask: np.ndarray[Any, Any], vocab_size: int | None) -> None:
    bits = mask.view(np.uint32)
    if vocab_size is not None and vocab_size % 32 and bits.shape[1] == words(vocab_size):
        bits = bits.copy()
        bits[:, -1] &= np.uint32((1 << vocab_size % 32) - 1)
    dead = np.flatnonzero(~bits.any(1))
    if len(dead):
        raise DegenerateError(f"mask: no token is left in row {dead[0]}")


def _host(mask: Any) -> np.ndarray[Any, Any]:
    """A mask as a NumPy array over the same memory."""
    if is_torch(mask):
        if not mask.is_cpu:
            raise DeviceError(f"mask: expected host memory, got device {str(mask.device)!r}; masks are filled there")
        torch = sys.modules["torch"]
        if mask.dtype is not torch.int32:
            raise DTypeError(f"mask: expected int32, got {mask.dtype}")
        mask = mask.numpy()
    if not isinstance(mask, np.ndarray) or mask.dtype != np.int32:
        raise DTypeError(f"mask: expected int32, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.ndim != 2 or not mask.shape[1]:
        raise ShapeError(f"mask: expected (rows, words), got {mask.shape}")
    return mask
