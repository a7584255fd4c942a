"""The bytes of every token of a tokenizer, for matching text whatever tokens spell it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from .. import _native
from ..errors import ArgumentError, DTypeError

Scheme = Literal["byte_level", "metaspace"]
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: Lines that a table of bytes must spell as the tokenizer decodes them: spaces, case, digits, accents, scripts, emoji.
_PROOF = (
    "Hello world, this is  a test.\n\tIt has 1234 lines;",
    "naïve café Ünïcödé — “quotes” … €",
    "Привет мир, 你好世界 🙂👍🏽 ﷽",
)


def _byte_of_symbol() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for the code points from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        return []
    return [s for d in decoder["decoders"] for s in _steps(d)] if decoder.get("type") == "Sequence" else [decoder]


def _scheme(tokenizer: Any) -> Scheme:
    """How the tokenizer's own decoder turns tokens into text."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise ArgumentError(
            f"scheme: expected 'byte_level' or 'metaspace' for {type(tokenizer).__name__}, which does not say how it "
            "decodes"
        )
    steps = _steps(json.loads(backend.to_str()).get("decoder"))
    kinds = {str(s.get("type")) for s in steps}
    spaces = any(s.get("type") == "Replace" and s.get("pattern") == {"String": "▁"} for s in steps)
    if "ByteLevel" in kinds:
        return "byte_level"
    if "Metaspace" in kinds or (spaces and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}):
        return "metaspace"
    raise ArgumentError(
        f"tokenizer: expected one whose tokens have exact bytes (byte-level BPE or SentencePiece), got the decoder "
        f"{' + '.join(sorted(kinds)) or 'none'}"
    )


def _spell(token: str, scheme: Scheme, table: dict[str, int]) -> bytes:
    if scheme == "byte_level":
        found = [table.get(c) for c in token]
        return token.encode() if None in found else bytes(b for b in found if b is not None)
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


class TokenBytes:
    """The bytes of every token, recovered from the tokenizer's vocabulary and checked against what it decodes.

    Byte-level BPE (GPT-2, Llama 3, Qwen) spells bytes in an alphabet of 256 symbols; SentencePiece (Llama 2, Gemma,
    Mistral) has ``▁`` for a space and ``<0x0A>`` for a byte. Special tokens have no bytes. WordPiece has no exact
    spelling and is refused.

    Args:
        tokenizer: a Hugging Face tokenizer.
        special: what a token without text does to a phrase around it. ``"transparent"``: nothing, as in text decoded
            with ``skip_special_tokens=True``; ``"break"``: no phrase reaches across it.
        scheme: ``"byte_level"`` or ``"metaspace"``; None: what the tokenizer's decoder says.
        proof: texts that must come out as the tokenizer decodes them; None: a few lines in several scripts.

    Raises:
        ArgumentError: a tokenizer without exact bytes, or that does not say; an unknown option; a failed ``proof``.
        DTypeError: not a tokenizer.

    One object serves any number of :class:`ForbiddenPhrases`, as their ``tokenizer``, and is built once.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        special: Literal["transparent", "break"] = "transparent",
        scheme: Scheme | None = None,
        proof: Iterable[str] | None = None,
    ) -> None:
        if not hasattr(tokenizer, "get_vocab"):
            raise DTypeError(f"tokenizer: expected a Hugging Face tokenizer, got {type(tokenizer).__name__}")
        if special not in ("transparent", "break"):
            raise ArgumentError(f"special: expected 'transparent' or 'break', got {special!r}")
        if scheme not in (None, "byte_level", "metaspace"):
            raise ArgumentError(f"scheme: expected None, 'byte_level' or 'metaspace', got {scheme!r}")
        self.scheme: Scheme = _scheme(tokenizer) if scheme is None else scheme
        self.special = special
        self.tokens = self._table(tokenizer)
        self._vocabularies: dict[bool, _native.ByteVocabulary] = {}
        self._prove(tokenizer, _PROOF if proof is None else list(proof))

    def _table(self, tokenizer: Any) -> list[bytes]:
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        if not vocabulary:
            raise ArgumentError("tokenizer: expected a vocabulary, got none")
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = set(getattr(tokenizer, "all_special_ids", ()))
        special |= {i for i, t in added.items() if getattr(t, "special", False)}
        special.add(getattr(tokenizer, "unk_token_id", None))
        size = max(vocabulary.values()) + 1
        tokens, table = [b""] * size, _byte_of_symbol()
        for token, i in vocabulary.items():
            if i in special:
                continue
            # Tokens that were added stand in the vocabulary as they are, not in the alphabet of the others.
            tokens[i] = token.encode() if i in added else _spell(token, self.scheme, table)
        if not any(tokens):
            raise ArgumentError("tokenizer: expected a token with text, got special tokens alone")
        return tokens

    def _prove(self, tokenizer: Any, texts: Sequence[str]) -> None:
        unknown = getattr(tokenizer, "unk_token_id", None)
        for text in texts:
            ids = list(tokenizer.encode(text, add_special_tokens=False))
            if unknown in ids:
                continue
            decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            spelt = self.spell(ids).decode(errors="replace")
            # SentencePiece's decoders drop the space before the first word.
            if spelt != decoded and not (self.scheme == "metaspace" and spelt == f" {decoded}"):
                raise ArgumentError(
                    f"tokenizer: its tokens do not spell what it decodes: {spelt!r:.60} instead of {decoded!r:.60}"
                )

    def __len__(self) -> int:
        """Number of token ids."""
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"TokenBytes({len(self)} tokens, {self.scheme}, special={self.special!r})"

    @property
    def nbytes(self) -> int:
        """Memory of what has been built for matching, once for exact and once for folded case."""
        return sum(int(v.nbytes) for v in self._vocabularies.values())

    def spell(self, ids: Iterable[int]) -> bytes:
        """The bytes of some tokens; ids beyond the tokenizer have none.

        Raises:
            ArgumentError: a negative id.
        """
        found = []
        for i in ids:
            if i < 0:
                raise ArgumentError(f"ids: expected 0 or more, got {i}")
            found.append(self.tokens[i] if i < len(self.tokens) else b"")
        return b"".join(found)

    def vocabulary(self, fold: bool) -> _native.ByteVocabulary:
        """The sorted bytes that automata share, with the case of ASCII letters folded or not."""
        if fold not in self._vocabularies:
            self._vocabularies[fold] = _native.ByteVocabulary(self.tokens, fold, self.special == "transparent")
        return self._vocabularies[fold]

    def without_text(self) -> np.ndarray[Any, Any]:
        """Which ids have no text, ``(len + 1,)``: the last entry stands for all ids beyond."""
        return np.array([not t for t in self.tokens] + [True])
