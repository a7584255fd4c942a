"""Refusal tokens: biases and calibrated gates on the logits of refusal categories (Jain et al. 2024, arXiv 2412.06748).

All functions take logits ``(batch, vocabulary)`` as a NumPy array, a torch tensor or any array with ``__dlpack__``, in
float64, float32, float16 or bfloat16. Those whose name ends in an underscore write in place and return their argument.
Reductions are in float64, whatever the dtype, and give the same bits for any number of threads.

A category's *margin* is ``LSE(its logits) - LSE(all others)``; its probability is ``sigmoid(margin)``. Margins do not
change when a constant is added to a row, so logits and log-probabilities (which beam search passes to processors) give
the same. Thresholds are margins too: probability ``p`` is the threshold ``log(p / (1 - p))``, see :func:`logit`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, SupportsFloat, TypeVar

import numpy as np

from .. import _native
from .._interop import device_path, integers, is_torch, shape, source, target
from ..errors import ArgumentError, DegenerateError, DTypeError, ShapeError
from ._position import Prompt

ArrayT = TypeVar("ArrayT")
Group = int | Sequence[int]
Rule = Literal["ratio", "argmax_then_threshold", "mass"]

#: Entries of a row that are read first to see that it has a token left.
_PEEK = 64
#: Verdicts of a gate that are not a category.
NO_FIRE, NOT_SELECTED, NOT_ASKED = -1, -2, -3


def logit(probability: float) -> float:
    """The margin of a probability, ``log(p / (1 - p))``: -inf for 0, +inf for 1.

    Raises:
        ArgumentError: not a probability.
    """
    if not 0.0 <= probability <= 1.0:
        raise ArgumentError(f"probability: expected a number from 0 to 1, got {probability}")
    if probability in (0.0, 1.0):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def sigmoid(margin: float) -> float:
    """The probability of a margin, ``1 / (1 + exp(-m))``, without overflow."""
    if margin >= 0:
        return 1.0 / (1.0 + math.exp(-margin))
    e = math.exp(margin)
    return e / (1.0 + e)


def bias_for_probability(margin: float, probability: float) -> float:
    """Bias that gives a token of this margin the wanted probability: ``logit(p) - m``."""
    return logit(probability) - float(margin)


def threshold_to_bias(probability: float) -> float:
    """Bias under which "probability at least one half" becomes "at least ``probability``": ``-logit(p)``."""
    return -logit(probability)


def bias_to_threshold(bias: float) -> float:
    """The reverse of :func:`threshold_to_bias`: ``sigmoid(-b)``."""
    return sigmoid(-float(bias))


def _floats(x: Any, arg: str) -> np.ndarray[Any, Any]:
    try:
        return np.ascontiguousarray(np.atleast_1d(np.asarray(x, dtype=np.float64)))
    except (TypeError, ValueError) as err:
        raise DTypeError(f"{arg}: expected numbers, got {x!r:.80}") from err


def _group(x: Any, arg: str) -> list[int]:
    ids = integers(np.atleast_1d(np.asarray(x)), arg)
    if ids.ndim != 1:
        raise ShapeError(f"{arg}: expected a token id or a list of them, got shape {ids.shape}")
    return [int(i) for i in ids]


def _groups(groups: Iterable[Group]) -> list[list[int]]:
    if isinstance(groups, (str, bytes)) or not isinstance(groups, Iterable):
        raise DTypeError(f"groups: expected a list of token ids or of lists of them, got {groups!r:.80}")
    return [_group(g, "groups") for g in groups]


def _result(values: np.ndarray[Any, Any], logits: Any) -> Any:
    return sys.modules["torch"].from_numpy(values) if is_torch(logits) else values


def bias_(logits: ArrayT, ids: Any, bias: Any, indptr: Any = None) -> ArrayT:
    """Adds biases to single logits, in place.

    Each entry is widened, added to in float32 (float64 logits: float64) and rounded to nearest even once; all others
    keep their bits and are not read. In bfloat16 a bias below half the spacing of the logit is lost in that rounding
    (at 17 the spacing is 0.125): exact control needs float32 logits or a threshold.

    Args:
        logits: ``(batch, vocabulary)``.
        ids: token ids ``(n,)``; biases of an id given twice are added.
        bias: ``(n,)`` or one number for all; finite, or -inf to forbid a token.
        indptr: None, the same list in every row; or ``(batch + 1,)``, where row ``i`` has entries
            ``indptr[i]:indptr[i + 1]``.

    Raises:
        ArgumentError: an id outside the vocabulary, a bias of NaN or +inf, a sum beyond the range of the dtype.
        ShapeError: lengths that do not fit.
        NonFiniteError: a logit to be biased is NaN or +inf (flat index = row * vocabulary + id).
        DegenerateError: a row would be left without a token.
    """
    found = integers(np.atleast_1d(np.asarray(ids)), "ids")
    values = _floats(bias, "bias")
    if values.shape == (1,) and found.size != 1:
        values = np.full(found.size, values[0])
    starts = None if indptr is None else integers(indptr, "indptr")
    path = device_path(logits, "bias_")
    if path is not None:
        path(logits, found, values, starts)
        return logits
    with target(logits, "logits") as z:
        _native.bias_(z, found, values, starts)
    return logits


def force_(logits: ArrayT, ids: Any) -> ArrayT:
    """Leaves one token per row: its logit stays if finite and becomes 0 if -inf, all others become -inf.

    Args:
        logits: ``(batch, vocabulary)``.
        ids: token id per row ``(batch,)``; a row with a negative one is left as it is.

    Raises:
        ArgumentError: an id outside the vocabulary.
        ShapeError: not one id per row.
        NonFiniteError: the kept logit is NaN or +inf.
    """
    found = integers(np.atleast_1d(np.asarray(ids)), "ids")
    path = device_path(logits, "force_")
    if path is not None:
        path(logits, found)
        return logits
    with target(logits, "logits") as z:
        _native.force_(z, found)
    return logits


def row_lse(logits: Any, temperature: float = 1.0) -> Any:
    """``log(sum(exp(z / T)))`` of each row, float64 ``(batch,)``; -inf entries count nothing.

    Error: below 1e-13 relative to the sum, whatever the dtype of the logits.

    Raises:
        NonFiniteError: a NaN or +inf in a row.
        DegenerateError: a row of -inf only.
        ArgumentError: a temperature that is not positive and finite.
    """
    path = device_path(logits, "row_lse")
    if path is not None:
        return path(logits, temperature)
    return _result(_native.row_lse(source(logits, "logits"), float(temperature)), logits)


def row_margin(logits: Any, groups: Iterable[Group], temperature: float = 1.0) -> Any:
    """Margins of groups of tokens, float64 ``(batch, groups)``: ``LSE_group(z/T) - LSE_rest(z/T)``.

    The rest is summed without the group's entries, never subtracted from the whole, so margins are exact to rounding
    where the group's probability is near 0 or 1. +inf where no other token is left, -inf where the group has none.

    Raises:
        ArgumentError: no group, an empty one, an id twice in one or outside the vocabulary, a bad temperature.
        NonFiniteError: a NaN or +inf in a row.
        DegenerateError: a row of -inf only.
    """
    found = _groups(groups)
    path = device_path(logits, "row_margin")
    if path is not None:
        return path(logits, found, temperature)
    flat = _native.row_margin(source(logits, "logits"), found, float(temperature))
    return _result(flat.reshape(-1, len(found)), logits)


def row_max_gap(logits: Any, groups: Iterable[Group]) -> Any:
    """Largest logit of a group minus the largest of all others, float64 ``(batch, groups)``.

    What greedy decoding goes by, and bounds of the margin at one pass for a maximum: for one token in a vocabulary of V
    ``m <= gap <= m + log(V - 1)``.

    Raises:
        As :func:`row_margin`.
    """
    found = _groups(groups)
    path = device_path(logits, "row_max_gap")
    if path is not None:
        return path(logits, found)
    return _result(_native.row_max_gap(source(logits, "logits"), found).reshape(-1, len(found)), logits)


def _per_category(value: Any, names: Sequence[str], arg: str, absent: float | None) -> list[float | None]:
    """One number per category from a number for all or a mapping of some."""
    if not isinstance(value, Mapping):
        value = dict.fromkeys(names, value)
    unknown = [name for name in value if name not in names]
    if unknown:
        raise ArgumentError(f"{arg}: expected categories among {list(names)}, got {unknown}")
    found: list[float | None] = []
    for name in names:
        v = value.get(name)
        if v is not None and not isinstance(v, SupportsFloat):
            raise DTypeError(f"{arg}: expected a number for {name!r}, got {v!r:.80}")
        found.append(absent if v is None else float(v))
    return found


class RefusalTokens:
    """Logits processor that raises, lowers or gates the tokens that open a refusal.

    Called as ``processor(input_ids, scores)`` it writes into ``scores`` and returns it. At each row's first response
    position, and only there unless ``position="every"``, it adds ``bias``, then holds the categories' margins to their
    thresholds: a category that fires has its most likely token forced (all other logits -inf), a row where none fires
    goes by ``on_no_fire``. Only rows at their gate are read, once for a maximum; a log-sum-exp is taken only where the
    bounds ``m <= gap <= m + log(V - 1)`` leave the verdict open.

    A threshold holds for one temperature and for logits as they were calibrated: put the processor before temperature,
    top-k and top-p (where ``generate()`` puts it). Under beam search the scores are log-probabilities; margins, and so
    verdicts, are the same, but a ``bias`` stays in the beam's score for good.

    Args:
        categories: name to token id or ids; no id in two categories.
        bias: added to the logits of all categories, or of each by name.
        threshold: margin from which a category fires (:func:`logit` of a probability; a
            :class:`~abjure.refuse.Threshold`): one for all or by name. None, or a name left out: never fires.
        rule: several categories. ``"ratio"``: the one that exceeds its threshold by most, the first of equals;
            ``"argmax_then_threshold"``: only the most probable is held to its threshold, and if it has none the row is
            kept (the published code); ``"mass"``: their sum is held to one threshold, the most probable is forced.
        on_no_fire: ``"keep"`` the row, ``"free"`` it of all categories' tokens (-inf), or the id of a token to force.
        temperature: margins are those of ``z / temperature``; None for 1.
        prompt_length: tokens before the response, for all rows or each; None: found from the calls, see :meth:`reset`.
        position: ``"first"`` response position or ``"every"`` one from there.
        elsewhere: ``"keep"``, or ``"mask"``: the categories' tokens are -inf after the first response position, for
            tokens that exist for this purpose alone.
        vocab_size: tokens that the tokenizer has; logits of another width are then an error, unless ``tail`` says
            otherwise. None: any width that holds all ids.
        tail: logits beyond ``vocab_size``, as padded output heads have them: an ``"error"``; ``"keep"``, tokens like
            any other; ``"forbid"``, left out of margins and set to -inf in every row of every call.

    Attributes:
        texts: per category the tokens' texts, where :meth:`from_tokenizer` or
            :func:`~abjure.refuse.add_refusal_tokens` knew them, else None.
        respond: id of the token that opens an answer, and ``respond_text``; None where there is none.

    Raises:
        ArgumentError: no categories, an empty one, an id negative or in two, a threshold of NaN, a bias of NaN or +inf,
            an unknown category or option.
        DTypeError: ids that are not whole numbers.
    """

    #: transformers: continuous batching shows a processor the last token only, which does not tell the position.
    supports_continuous_batching = False

    def __init__(
        self,
        categories: Mapping[str, Group],
        *,
        bias: float | Mapping[str, float] | None = None,
        threshold: SupportsFloat | Mapping[str, SupportsFloat | None] | None = None,
        rule: Rule = "ratio",
        on_no_fire: int | Literal["keep", "free"] = "keep",
        temperature: float | None = None,
        prompt_length: int | Sequence[int] | None = None,
        position: Literal["first", "every"] = "first",
        elsewhere: Literal["keep", "mask"] = "keep",
        vocab_size: int | None = None,
        tail: Literal["error", "keep", "forbid"] = "error",
    ) -> None:
        if not isinstance(categories, Mapping) or not categories:
            raise ArgumentError(f"categories: expected a mapping of names to token ids, got {categories!r:.80}")
        if position not in ("first", "every"):
            raise ArgumentError(f"position: expected 'first' or 'every', got {position!r}")
        if elsewhere not in ("keep", "mask"):
            raise ArgumentError(f"elsewhere: expected 'keep' or 'mask', got {elsewhere!r}")
        if tail not in ("error", "keep", "forbid"):
            raise ArgumentError(f"tail: expected 'error', 'keep' or 'forbid', got {tail!r}")
        if vocab_size is not None and vocab_size < 1:
            raise ArgumentError(f"vocab_size: expected 1 or more, got {vocab_size}")
        if rule == "mass" and isinstance(threshold, Mapping):
            raise ArgumentError("threshold: expected one number with rule 'mass', got a mapping")
        self.categories = {str(name): _group(ids, f"categories[{name!r}]") for name, ids in categories.items()}
        names = list(self.categories)
        self.bias = [0.0 if b is None else b for b in _per_category(bias, names, "bias", 0.0)]
        self.threshold = _per_category(threshold, names, "threshold", None)
        self.rule = rule
        self.on_no_fire = on_no_fire
        self.temperature = 1.0 if temperature is None else float(temperature)
        self.position = position
        self.elsewhere = elsewhere
        self.vocab_size = vocab_size
        self.tail: Literal["error", "keep", "forbid"] = tail
        self.texts: dict[str, list[str]] | None = None
        self.respond: int | None = None
        self.respond_text: str | None = None
        #: Verdict per row of the last call that asked: a category's index, or NO_FIRE, NOT_SELECTED, NOT_ASKED.
        self.verdicts: Any = None
        self._prompt = Prompt(prompt_length)
        #: Tokens that a bias forbids.
        self._bans = [
            i for b, ids in zip(self.bias, self.categories.values(), strict=True) if b == -math.inf for i in ids
        ]
        groups = list(self.categories.values())
        self._gate = _native.RefusalGate(groups, self.bias, self.threshold, rule, on_no_fire, self.temperature)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        categories: Mapping[str, str | Sequence[str]],
        *,
        respond: str | None = None,
        on_no_fire: int | Literal["keep", "free", "respond"] = "keep",
        **options: Any,
    ) -> Any:
        """A processor of the categories' tokens as the tokenizer spells them; ``options`` as of the class.

        Args:
            tokenizer: anything with ``encode(text, add_special_tokens=False)``; one with a length fixes ``vocab_size``.
            categories: name to the token's exact text (often with a leading space), or several.
            respond: text of the token that opens an answer.
            on_no_fire: as of the class, or ``"respond"`` to force that token.

        Raises:
            ArgumentError: a text that is not exactly one token: the tokenizer lacks it, or it was never added.
        """
        texts = {str(name): [t] if isinstance(t, str) else list(t) for name, t in categories.items()}
        found = {name: [single_token(tokenizer, t) for t in each] for name, each in texts.items()}
        answer = None if respond is None else single_token(tokenizer, respond)
        if on_no_fire == "respond":
            if answer is None:
                raise ArgumentError("on_no_fire: expected the text of a respond token beside 'respond'")
            on_no_fire = answer
        if hasattr(tokenizer, "__len__"):
            options.setdefault("vocab_size", len(tokenizer))
        made = cls(found, on_no_fire=on_no_fire, **options)
        made.texts, made.respond, made.respond_text = texts, answer, respond
        return made

    @property
    def names(self) -> list[str]:
        """Category names in declared order: what verdicts index."""
        return list(self.categories)

    def reset(self) -> None:
        """Takes the next call as the first of a new generation.

        Needed only where calls do not tell: when the same processor goes on with a prompt that is exactly what the last
        generation would have seen next, or rows of unequal progress (pass ``prompt_length`` there).
        """
        self._prompt.reset()
        self.verdicts = None

    def fired(self) -> list[str | None]:
        """Name of the category forced in each row at the last gate, None where none was."""
        return [self.names[v] if v >= 0 else None for v in (() if self.verdicts is None else self.verdicts)]

    def margins(self, scores: Any) -> Any:
        """Margin of every category in every row, ``(batch, categories)``, before any bias; writes nothing."""
        return row_margin(self.visible(scores), list(self.categories.values()), self.temperature)

    def visible(self, scores: Any) -> Any:
        """The part of ``(rows, vocabulary)`` logits that counts: all of it, or what ``tail="forbid"`` leaves.

        Raises:
            ShapeError: a width that does not match ``vocab_size``.
        """
        if self.vocab_size is None:
            return scores
        width = shape(scores, "scores")[-1]
        if width == self.vocab_size:
            return scores
        if width < self.vocab_size:
            raise ShapeError(f"scores: expected logits of {self.vocab_size} tokens, as the tokenizer has, got {width}")
        if self.tail == "error":
            raise ShapeError(
                f"scores: expected logits of {self.vocab_size} tokens, as the tokenizer has, got {width}; if the "
                "model's head is padded, pass tail='forbid' or tail='keep'"
            )
        return scores if self.tail == "keep" else scores[:, : self.vocab_size]

    def to_sft(self, rows: Iterable[Mapping[str, Any]], **options: Any) -> Any:
        """Training rows whose answers open with the token of their category; see :func:`~abjure.refuse.refusal_sft`."""
        from .token_training import refusal_sft

        return refusal_sft(self, rows, **options)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Writes biases and the gate's outcome into ``scores`` ``(rows, vocabulary)`` and returns it.

        Raises:
            ShapeError: ``input_ids`` is not ``(rows, length)`` with as many rows.
            ArgumentError: a category's id outside the vocabulary, a bias that overflows the dtype.
            NonFiniteError: a NaN or +inf in a row at its gate.
            DegenerateError: a row would be left without a token.
        """
        expect_context(input_ids, scores)
        self._write(scores, input_ids.shape[1] - self._prompt.lengths(input_ids))
        return scores

    #: Tokens of the context that :meth:`rows_` looks at.
    reach = 0

    def rows_(self, scores: Any, context: Any, length: Any, generated: Any) -> None:
        """As the call, for rows of unequal progress, as engines have them; see ``abjure.integrations``.

        Args:
            scores: ``(rows, vocabulary)``, written in place.
            context, length: not looked at.
            generated: ``(rows,)`` response tokens so far; a row with a negative number is left as it is.

        Raises:
            As the call.
        """
        self._write(scores, generated)

    def _write(self, scores: Any, generated: Any) -> None:
        seen, every, mask = self.visible(scores), self.position == "every", self.elsewhere == "mask"
        if self._bans:
            self._expect_left(seen, np.flatnonzero(generated >= 0 if every else generated == 0))
        path = device_path(seen, "gate_")
        if path is not None:
            asked = generated >= 0 if every else generated == 0
            positions = np.where(asked, 1, np.where((generated > 0) & mask, 2, 0))
            verdicts = path(seen, positions, self) if positions.any() else None
            verdicts = verdicts if asked.any() else None
        else:
            with target(seen, "scores") as z:
                verdicts = self._gate.apply_(z, generated, every, mask)
        if verdicts is not None:
            self.verdicts = verdicts
        if seen is not scores:
            scores[np.flatnonzero(generated >= 0).tolist(), self.vocab_size :] = -math.inf

    def _expect_left(self, scores: Any, rows: Any) -> None:
        """Checks that biases of -inf do not take the only tokens of a row; the kernel adds biases without a look."""
        banned = self._bans
        if not (is_torch(scores) or isinstance(scores, np.ndarray)) or max(banned) >= scores.shape[1]:
            return  # the latter is an error of the kernel's
        for row in rows.tolist():
            left = scores[row] != -math.inf
            left[banned] = False
            if not bool(left.any()):
                raise DegenerateError(f"bias: expected a token to be left in each row, got none in row {row}")


def single_token(tokenizer: Any, text: str) -> int:
    """The id of ``text`` if the tokenizer has it as one token.

    Raises:
        ArgumentError: it is none, several, or the unknown token. (The last id of several would be a fragment.)
    """
    ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    unknown = getattr(tokenizer, "unk_token_id", None)
    if len(ids) != 1 or (unknown is not None and ids[0] == unknown):
        raise ArgumentError(
            f"categories: expected the text of one token, got {text!r}, which the tokenizer encodes as {ids}; "
            "add it as a special token first, or mind the leading space"
        )
    return ids[0]


def expect_context(input_ids: Any, scores: Any) -> None:
    """Checks what a processor is called with.

    Raises:
        ShapeError: not ``(rows, length)`` ids and ``(rows, vocabulary)`` scores.
        DTypeError: not arrays.
    """
    ids, z = shape(input_ids, "input_ids"), shape(scores, "scores")
    if len(z) != 2:
        raise ShapeError(f"scores: expected shape (rows, vocabulary), got {z}")
    if len(ids) != 2 or ids[0] != z[0]:
        raise ShapeError(f"input_ids: expected shape ({z[0]}, length), got {ids}")


def expect_a_token(scores: Any) -> None:
    """Checks that every row of host memory has a token left: a row of -inf becomes NaN in every softmax after it.

    Reads a few entries of a row that has one among them, as rows do; the whole of others. Arrays of other libraries are
    left to the kernels.

    Raises:
        DegenerateError: a row of -inf only (or without a vocabulary), with its index.
    """
    if is_torch(scores):
        if not scores.is_cpu:
            return
        few = (scores[:, :_PEEK] == -math.inf).all(1).nonzero()[:, 0].tolist()
    elif not isinstance(scores, np.ndarray):
        return
    else:
        few = np.flatnonzero((scores[:, :_PEEK] == -np.inf).all(1)).tolist()
    for row in few:
        if bool((scores[row] == -math.inf).all()):
            raise DegenerateError(f"scores: expected a token that is not -inf in each row, got none in row {row}")
