"""Phrases that must not be generated: automata whose cost per step is what matches, not how many phrases there are."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np

from .. import _native
from .._interop import device_path, integers, target
from ..errors import ArgumentError, DTypeError, ShapeError
from ._position import Prompt, columns, is_int64, token_ids
from .token_bytes import TokenBytes
from .tokens import expect_context

#: More tokens than a context has.
_WHOLE = 2**31 - 1
_FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")


def _encodings(tokenizer: Any, text: str, variants: bool) -> list[list[int]]:
    """The ways ``text`` may be spelt in tokens: with and without a leading space, as written, in lower case, in upper
    case and with a capital."""
    texts = [text]
    if variants:
        forms = (text, text.lower(), text.upper(), text[:1].upper() + text[1:])
        texts = list(dict.fromkeys(lead + form.lstrip() for lead in ("", " ") for form in forms))
    found = [tuple(int(i) for i in tokenizer.encode(t, add_special_tokens=False)) for t in texts]
    return [list(ids) for ids in dict.fromkeys(found)]


def _check_texts(phrases: Sequence[str]) -> None:
    def shows(text: str) -> bool:
        return any(not c.isspace() and unicodedata.category(c) != "Cf" for c in unicodedata.normalize("NFKC", text))

    blank = [i for i, text in enumerate(phrases) if not shows(text)]
    if blank:
        raise ArgumentError(f"phrases: expected text in each phrase, got none at indices {blank[:8]}")
    seen: set[str] = set()
    twice = [i for i, text in enumerate(phrases) if text in seen or seen.add(text)]  # type: ignore[func-returns-value]
    if twice:
        raise ArgumentError(f"phrases: expected each phrase once, got repeats at indices {twice[:8]}")


def _from_texts(phrases: Sequence[str], tokenizer: Any, variants: bool) -> list[list[int]]:
    _check_texts(phrases)
    unknown = getattr(tokenizer, "unk_token_id", None)
    found: dict[tuple[int, ...], None] = {}
    for i, text in enumerate(phrases):
        encodings = [tuple(ids) for ids in _encodings(tokenizer, text, variants) if ids and unknown not in ids]
        if not encodings:
            raise ArgumentError(f"phrases: expected text the tokenizer knows, got {text!r} at index {i}")
        found.update(dict.fromkeys(encodings))
    return [list(ids) for ids in found]


def _spellings(text: str, variants: bool) -> set[bytes]:
    """The bytes of a text; of its variants, in the four Unicode forms and in other cases, those that ASCII's folded
    case does not already cover."""
    if not variants:
        return {text.encode()}
    text = text.strip()
    cases = {text, text.lower(), text.upper(), text.title(), text.capitalize(), text.casefold()}
    return {unicodedata.normalize(form, t).encode().lower() for t in cases for form in _FORMS}


def _to_bytes(phrases: Sequence[Any], variants: bool, max_length: int) -> list[bytes]:
    for i, text in enumerate(phrases):
        if not isinstance(text, str):
            raise DTypeError(f"phrases: expected texts with mode 'bytes', got {text!r:.80} at index {i}")
    _check_texts(phrases)
    found: dict[bytes, None] = {}
    long = []
    for i, text in enumerate(phrases):
        spellings = sorted(_spellings(text, variants))
        long += [i] if max(map(len, spellings)) > max_length else []
        found.update(dict.fromkeys(spellings))
    if long:
        raise ArgumentError(f"phrases: expected at most {max_length} bytes in each phrase, got more at {long[:8]}")
    return list(found)


def _flat(phrases: Sequence[Sequence[int]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    for i, phrase in enumerate(phrases):
        if isinstance(phrase, (str, bytes)) or not hasattr(phrase, "__len__"):
            raise DTypeError(f"phrases: expected lists of token ids, got {phrase!r:.80} at index {i}")
    lengths = np.fromiter((len(p) for p in phrases), dtype=np.int64, count=len(phrases))
    return integers(np.array(list(chain.from_iterable(phrases))), "phrases"), lengths


class ForbiddenPhrases:
    """Logits processor that keeps phrases from being generated.

    Called as ``processor(input_ids, scores)`` it writes into ``scores`` and returns it: -inf for every token that would
    complete a phrase and, with a ``penalty``, ``-penalty * (m / L) ** gamma`` for every token that would extend a
    phrase of length L of which the context ends with m (of several penalties for a token the strongest counts; the
    first token of a phrase is not taxed, or every sentence with that word would be).

    Phrases are an Aho-Corasick automaton, over token ids or over bytes. Its state is recomputed in every row at every
    step from the end of the context, so beams may be permuted and rows may join and leave. A step costs what matches:
    the work does not grow with the vocabulary, nor with the number of phrases but for those that fit into one token,
    which are one write per row each. Other entries of ``scores`` are not read.

    Modes ``"hard"`` and ``"prefix"`` match exact id sequences. Text that can be spelt in other tokens than those given
    passes: with ``tokenizer``, each phrase is encoded with and without a leading space, as written, in lower and upper
    case and with a capital.

    Mode ``"bytes"`` matches text, in whatever tokens it comes: a token is blocked if its bytes, after those of the
    context, would complete a phrase anywhere. The tokens that would are ranges of the vocabulary in the order of its
    bytes, found while building. m and L are then bytes, and the penalty falls on every token that extends a phrase.

    Args:
        phrases: lists of token ids, or texts with ``tokenizer``.
        vocab_size: vocabulary, to check ids and scores against; None: ids are checked against the first scores.
        tokenizer: anything with ``encode(text, add_special_tokens=False)``; required for texts. With mode ``"bytes"``
            a Hugging Face tokenizer, or a :class:`TokenBytes` to be shared.
        variants: whether texts are matched in all the ways above or only as written. In mode ``"bytes"``: without
            regard to case and in the four Unicode normal forms, white space at the ends left out; or byte by byte.
        mode: ``"hard"``, ``"prefix"`` or ``"bytes"``.
        penalty: in logits (or log-probabilities under beam search), 0 or more; required by mode ``"prefix"``, optional
            in mode ``"bytes"``.
        gamma: exponent of the matched share, 0 or more.
        boundary: with mode ``"bytes"``, ``"word"``: a phrase that begins with a letter, digit or underscore of ASCII is
            matched only where none stands before it ("paris", but not in "comparison"). What follows is not asked for.
        scope: ``"output"`` matches in the response only, ``"all"`` across its border with the prompt too
            (as transformers' ``NoBadWordsLogitsProcessor``).
        prompt_length: tokens before the response, for all rows or each; None: found from the calls, see :meth:`reset`.
        pad_token_id: with ``scope="all"``, leading tokens of this id are left padding and never matched.
        eos_token_id: id or ids that end a response; a phrase that is just one of them is refused.
        dead_end: a row without a token left: ``"raise"``, or ``"eos"`` to end it with the (first) ``eos_token_id``.
        max_length: longest phrase accepted, in tokens or bytes.

    Raises:
        ArgumentError: no phrases; phrases that are empty, duplicate, too long, without anything to be seen, or hold an
            id outside the vocabulary, with their indices; a negative penalty; an unknown option; a tokenizer whose
            tokens have no exact bytes.
        DTypeError: phrases that are not lists of whole numbers (or, in mode ``"bytes"``, texts), texts without a
            tokenizer.

    Source: Aho and Corasick, 1975; the penalty as used for generation-time unlearning (GUARD, arXiv 2505.13312) is our
    form.
    """

    #: transformers: continuous batching shows a processor the last token only, so that no phrase could be matched.
    supports_continuous_batching = False

    def __init__(
        self,
        phrases: Iterable[Sequence[int]] | Iterable[str],
        vocab_size: int | None = None,
        *,
        tokenizer: Any = None,
        variants: bool = True,
        mode: Literal["hard", "prefix", "bytes"] = "hard",
        penalty: float | None = None,
        gamma: float = 1.0,
        boundary: Literal["none", "word"] = "none",
        scope: Literal["output", "all"] = "output",
        prompt_length: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        dead_end: Literal["raise", "eos"] = "raise",
        max_length: int = 256,
    ) -> None:
        if isinstance(phrases, (str, bytes)) or not isinstance(phrases, Iterable):
            raise DTypeError(f"phrases: expected a list of phrases, got {phrases!r:.80}")
        for arg, value, allowed in (
            ("mode", mode, ("hard", "prefix", "bytes")),
            ("boundary", boundary, ("none", "word")),
            ("scope", scope, ("output", "all")),
            ("dead_end", dead_end, ("raise", "eos")),
        ):
            if value not in allowed:
                raise ArgumentError(f"{arg}: expected one of {allowed}, got {value!r}")
        if mode == "bytes" or (mode == "prefix") == (penalty is not None):
            strength = None if penalty is None else (float(penalty), float(gamma))
        else:
            raise ArgumentError(f"penalty: expected a number with mode 'prefix' and none with 'hard', got {penalty!r}")
        if boundary != "none" and mode != "bytes":
            raise ArgumentError(f"boundary: expected 'none' with mode {mode!r}, got {boundary!r}")
        if vocab_size is not None and vocab_size < 1:
            raise ArgumentError(f"vocab_size: expected 1 or more, got {vocab_size}")
        eos = [] if eos_token_id is None else [int(i) for i in np.atleast_1d(np.asarray(eos_token_id))]
        if dead_end == "eos" and not eos:
            raise ArgumentError("eos_token_id: expected an id with dead_end 'eos', got None")
        given: list[Any] = list(phrases)
        self.token_bytes: TokenBytes | None = None
        self._silent: np.ndarray[Any, Any] | None = None
        if mode == "bytes":
            if tokenizer is None:
                raise DTypeError("tokenizer: expected one with mode 'bytes', got None")
            spellings = _to_bytes(given, variants, max_length)
            table = tokenizer if isinstance(tokenizer, TokenBytes) else TokenBytes(tokenizer)
            if vocab_size is not None and vocab_size < len(table):
                raise ArgumentError(f"vocab_size: expected at least the tokenizer's {len(table)}, got {vocab_size}")
            shared = table.vocabulary(variants)
            self._automaton = _native.PhraseAutomaton.from_bytes(
                spellings, shared, boundary == "word", max_length, strength
            )
            self.token_bytes = table
            if table.special == "transparent":
                self._silent = table.without_text()
        else:
            if given and all(isinstance(p, str) for p in given):
                if tokenizer is None:
                    raise DTypeError("tokenizer: expected one for phrases given as text, got None")
                given = _from_texts(given, tokenizer, variants)
            ending = [i for i, p in enumerate(given) if hasattr(p, "__len__") and len(p) == 1 and p[0] in eos]
            if ending:
                raise ArgumentError(
                    f"phrases: expected none that is eos_token_id alone, got it at indices {ending[:8]}"
                )
            ids, lengths = _flat(given)
            self._automaton = _native.PhraseAutomaton(ids, lengths, vocab_size, max_length, strength)
        self._reach = self._automaton.reach
        self.vocab_size = vocab_size
        self.mode = mode
        self.penalty = penalty
        self.scope = scope
        self.pad_token_id = pad_token_id
        self.dead_end = eos[0] if dead_end == "eos" else None
        self._prompt = Prompt(prompt_length)

    def __len__(self) -> int:
        """Number of phrases (token sequences, byte strings) matched."""
        return int(self._automaton.phrases)

    def __repr__(self) -> str:
        table = (
            ""
            if self.token_bytes is None
            else f" beside {self.token_bytes!r} of {self.token_bytes.nbytes / 1e6:.1f} MB"
        )
        return (
            f"ForbiddenPhrases({len(self)} phrases, mode={self.mode!r}, {self.nodes} nodes, "
            f"{self.nbytes / 1e6:.2f} MB{table})"
        )

    @property
    def nodes(self) -> int:
        """Number of nodes of the trie."""
        return int(self._automaton.nodes)

    @property
    def nbytes(self) -> int:
        """Memory the automaton holds; in mode ``"bytes"`` without what it shares (:attr:`TokenBytes.nbytes`)."""
        return int(self._automaton.nbytes)

    def reset(self) -> None:
        """Takes the next call as the first of a new generation.

        Needed only where calls do not tell: when the same processor goes on with a prompt that is exactly what the last
        generation would have seen next, or rows of unequal progress (pass ``prompt_length`` there).
        """
        self._prompt.reset()

    def after(self, context: Sequence[int]) -> dict[int, float]:
        """What would be added to which token after ``context``: -inf where it completes a phrase."""
        ids = integers(np.asarray(context, dtype=None if len(context) else np.int64), "context")
        _, tokens, values = self._automaton.edits(ids, np.zeros(1, dtype=np.int64))
        return {int(t): float(v) for t, v in zip(tokens, values, strict=True)}

    def penalty_of(self, response: Sequence[int]) -> float:
        """Sum of the penalties that the tokens of a response were given; 0 without a ``penalty``."""
        if self.penalty is None:
            return 0.0
        ids = [int(i) for i in response]
        added = (self.after(ids[:n]).get(i, 0.0) for n, i in enumerate(ids))
        return float(sum(v for v in added if v != -np.inf))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Writes into ``scores`` ``(rows, vocabulary)`` what each row's context forbids, and returns it.

        Raises:
            ShapeError: ``input_ids`` is not ``(rows, length)`` with as many rows, or another vocabulary than
                ``vocab_size``.
            ArgumentError: ids outside the vocabulary, a penalty that overflows the dtype.
            NonFiniteError: a logit to be written is NaN or +inf.
            DegenerateError: a row would be left without a token and ``dead_end`` is ``"raise"``.
        """
        expect_context(input_ids, scores)
        prompt = self._prompt.lengths(input_ids) if self.scope == "output" else None
        return self._write(input_ids, scores, prompt)

    @property
    def reach(self) -> int:
        """Tokens of the context that :meth:`rows_` looks at: all, where tokens without text may stand in a phrase."""
        return int(self._reach) if self._silent is None else _WHOLE

    def rows_(self, scores: Any, context: Any, length: Any, generated: Any) -> None:
        """As the call, for rows of unequal progress, as engines have them; see ``abjure.integrations``.

        Args:
            scores: ``(rows, vocabulary)``, written in place.
            context: ``(rows, width)`` int64, the ends of the rows' contexts on the right, at least :attr:`reach` wide
                where there is that much.
            length: ``(rows,)`` how many of these are tokens; those to the left of them are not.
            generated: ``(rows,)`` response tokens so far; a row with a negative number counts as one with none.

        Raises:
            As the call.
        """
        expect_context(context, scores)
        width = context.shape[1]
        matched = np.minimum(length, np.maximum(generated, 0)) if self.scope == "output" else np.asarray(length)
        self._write(context, scores, np.ascontiguousarray(width - np.minimum(matched, width), dtype=np.int64))

    def _write(self, input_ids: Any, scores: Any, prompt: np.ndarray[Any, Any] | None) -> Any:
        """What a call does, once it is known how many tokens of each row are its prompt (None: all are matched)."""
        if self.vocab_size is not None and scores.shape[1] != self.vocab_size:
            raise ShapeError(f"scores: expected a vocabulary of {self.vocab_size}, got {scores.shape[1]}")
        if self.token_bytes is not None and scores.shape[1] < len(self.token_bytes):
            least = len(self.token_bytes)
            raise ShapeError(f"scores: expected a vocabulary of the tokenizer's {least} or more, got {scores.shape[1]}")
        start = self._start(input_ids, prompt)
        begin = self._begin(input_ids, start, prompt)
        path = device_path(scores, "forbid_")
        if path is not None:
            context = columns(input_ids, start)
            begin = np.zeros(len(context), dtype=np.int64) if begin is None else begin
            path(scores, *self._automaton.edits(context.reshape(-1), begin), self.dead_end)
            return scores
        if not is_int64(input_ids):
            input_ids, start = columns(input_ids, start), 0
        with target(scores, "scores") as z:
            self._automaton.apply_(z, input_ids, start, begin, self.dead_end)
        return scores

    def _start(self, input_ids: Any, prompt: np.ndarray[Any, Any] | None) -> int:
        """First column that can matter."""
        width = int(input_ids.shape[1])
        start = max(0, width - self._reach)
        # Tokens without text take up columns but no bytes.
        while self._silent is not None and start > 0:
            ids = columns(input_ids, start)
            text = ~self._silent[np.clip(ids, 0, len(self._silent) - 1)]
            short = text.sum(axis=1) < self._reach
            if not (short if prompt is None else short & (prompt < start)).any():
                break
            start = max(0, 2 * start - width)
        return start

    def _begin(self, input_ids: Any, start: int, prompt: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any] | None:
        """First column from ``start`` on to be matched, per row; None where all are."""
        if prompt is not None:
            return np.asarray(np.maximum(prompt - start, 0))
        if self.pad_token_id is None or start == input_ids.shape[1]:
            return None
        begin = np.zeros(input_ids.shape[0], dtype=np.int64)
        # Padding reaches into these columns only where they begin with it.
        for row in np.flatnonzero(columns(input_ids, start, start + 1)[:, 0] == self.pad_token_id):
            whole = token_ids(input_ids[row], "input_ids")
            text = whole != self.pad_token_id
            padding = int(text.argmax()) if text.any() else len(whole)
            begin[row] = max(0, padding - start)
        return begin
