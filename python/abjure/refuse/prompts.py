"""Prompts as a model sees them, and where in them the named positions are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ArgumentError, DTypeError, ShapeError

#: An instruction that no template contains: what stands around it is the template.
_MARK = "abjure§instruction§mark"

PositionKey = int | str


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: token ids, template included.
        instruction_end: index of the last token that holds a character of the instruction.
        text: the instruction.
    """

    ids: tuple[int, ...]
    instruction_end: int
    text: str

    def index(self, key: PositionKey) -> int:
        """Token index of a position: counted from the end for integers, else ``"last_instruction"``."""
        return self.instruction_end if key == "last_instruction" else len(self.ids) + int(key)


class Prompts(Sequence[Prompt]):
    """A list of prompts, tokenised once, with the named positions located in each.

    The instruction is found in the rendered chat template by character offsets: encoding the template's tail alone
    miscounts where a token spans the border.

    Args:
        tokenizer: a fast Hugging Face tokenizer (slow ones know no offsets).
        texts: the instructions, or whole prompts with ``template=False``.
        template: apply the tokenizer's chat template, up to where the answer begins.
        system: a system message before each instruction.
        opening: text after the prompt, the beginning of an answer or a whole chain of reasoning; it counts as
            post-instruction tokens. One for all, or a list with one per text.

    Raises:
        DTypeError: a text is not a string, or the tokenizer is not one.
        ArgumentError: an empty list or text, no chat template, an instruction that the template changes, a slow
            tokenizer.
        ShapeError: a list of openings that has not one per text.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Iterable[str],
        *,
        template: bool = True,
        system: str | None = None,
        opening: str | Sequence[str] = "",
    ) -> None:
        if isinstance(texts, str):
            raise DTypeError("texts: expected a list of strings, got one string")
        if not callable(tokenizer):
            raise DTypeError(f"tokenizer: expected a Hugging Face tokenizer, got {type(tokenizer).__name__}")
        if not getattr(tokenizer, "is_fast", False):
            raise ArgumentError("tokenizer: expected a fast tokenizer, which knows the offsets of its tokens")
        if template and not getattr(tokenizer, "chat_template", None):
            raise ArgumentError("tokenizer: expected a chat template, got none; pass template=False for plain text")
        texts = list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise DTypeError(f"texts: expected strings, got {type(text).__name__} at index {i}")
            if not text.strip():
                raise ArgumentError(f"texts: expected text, got an empty string at index {i}")
        if not texts:
            raise ArgumentError("texts: expected at least one prompt, got none")
        openings = [opening] * len(texts) if isinstance(opening, str) else list(opening)
        if bad := [o for o in openings if not isinstance(o, str)]:
            raise DTypeError(f"opening: expected strings, got {type(bad[0]).__name__}")
        if len(openings) != len(texts):
            raise ShapeError(f"opening: expected one, or one per text ({len(texts)}), got {len(openings)}")
        before, after = _surroundings(tokenizer, system) if template else ("", "")
        self.tokenizer = tokenizer
        self._prompts = [
            _encode(tokenizer, t, i, before, after, template, system, o)
            for i, (t, o) in enumerate(zip(texts, openings, strict=True))
        ]

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: Any) -> Any:
        return self._prompts[index]

    @property
    def post_instruction(self) -> int:
        """Number of tokens after the instruction that every prompt has (the smallest of all)."""
        return min(len(p.ids) - 1 - p.instruction_end for p in self._prompts)

    def position_keys(self, positions: Any) -> list[PositionKey]:
        """Integers from the end, ``"last_instruction"`` and ``"all"`` from names of positions.

        ``"last"`` is -1, ``"last:k"`` the last k, ``"post_instruction"`` every token after the instruction that all
        prompts have; integers stand for themselves and must be negative.

        Raises:
            ArgumentError: an unknown name, or a position that some prompt does not have.
        """
        keys: dict[PositionKey, None] = {}
        for name in [positions] if isinstance(positions, (str, int)) else list(positions):
            keys.update(dict.fromkeys(self._keys_of(name)))
        if not keys:
            raise ArgumentError("positions: expected at least one position, got none")
        shortest = min(len(p.ids) for p in self._prompts)
        for key in keys:
            if isinstance(key, int) and not -shortest <= key < 0:
                raise ArgumentError(f"positions: expected -{shortest} to -1 (the shortest prompt), got {key}")
        return list(keys)

    def _keys_of(self, name: Any) -> list[PositionKey]:
        if isinstance(name, (int, np.integer)) and not isinstance(name, bool):
            return [int(name)]
        if name in ("last_instruction", "all"):
            return [str(name)]
        if name == "last":
            return [-1]
        if name == "post_instruction":
            if not (count := self.post_instruction):
                raise ArgumentError("positions: no token follows the instruction; use 'last'")
            return list(range(-count, 0))
        if isinstance(name, str) and name.startswith("last:") and name[5:].isdigit() and int(name[5:]) > 0:
            return list(range(-int(name[5:]), 0))
        known = "'last', 'last:k', 'last_instruction', 'post_instruction', 'all' or negative integers"
        raise ArgumentError(f"positions: expected {known}, got {name!r}")

    def token_names(self, keys: Iterable[PositionKey]) -> dict[PositionKey, str]:
        """What stands at a position in the first prompt, for tables and plots."""
        first = self._prompts[0]
        return {key: str(key) if key == "all" else self.tokenizer.decode([first.ids[first.index(key)]]) for key in keys}

    def batches(self, size: int) -> Iterator[tuple[list[int], Any, Any]]:
        """Prompts of like length together: their indices, ``input_ids`` and ``attention_mask``, padded on the right.

        The padding side of the tokenizer plays no part: no token of a prompt ever attends to padding.
        """
        import torch

        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        order = sorted(range(len(self)), key=lambda i: len(self._prompts[i].ids))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            width = max(len(self._prompts[i].ids) for i in chosen)
            ids = torch.full((len(chosen), width), 0 if pad is None else int(pad))
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                tokens = self._prompts[i].ids
                ids[row, : len(tokens)] = torch.tensor(tokens)
                mask[row, : len(tokens)] = 1
            yield chosen, ids, mask


def _render(tokenizer: Any, text: str, system: str | None) -> str:
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _surroundings(tokenizer: Any, system: str | None) -> tuple[str, str]:
    parts = _render(tokenizer, _MARK, system).split(_MARK)
    if len(parts) != 2:
        raise ArgumentError(
            f"tokenizer: expected a chat template that shows the instruction once, got {len(parts) - 1}"
        )
    return parts[0], parts[1]


def _encode(
    tokenizer: Any, text: str, i: int, before: str, after: str, template: bool, system: str | None, opening: str
) -> Prompt:
    shown = text
    if template:
        rendered = _render(tokenizer, text, system)
        shown = rendered[len(before) : len(rendered) - len(after)]
        if before + shown + after != rendered or shown.strip() != text.strip():
            raise ArgumentError(f"texts: the chat template changes the instruction at index {i}: it cannot be found")
    whole = before + shown + after + opening
    coded = tokenizer(whole, return_offsets_mapping=True, add_special_tokens=not template)
    first, last = len(before), len(before) + len(shown.rstrip())
    inside = [j for j, (a, b) in enumerate(coded["offset_mapping"]) if b > a and a < last and b > first]
    if not inside:
        raise ArgumentError(f"texts: no token holds the instruction at index {i}")
    return Prompt(tuple(coded["input_ids"]), inside[-1], text)
