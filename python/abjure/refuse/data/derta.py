"""Decoupled refusal training (DeRTa, arXiv 2407.09121): learn to refuse at any position of a harmful answer."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError, DTypeError, ShapeError
from ._text import messages_of, row_rng

if TYPE_CHECKING:
    from torch import Tensor

_OUT = ("input_ids", "labels", "loss_weights", "kind", "row")
_NO_LOSS = -100


@dataclass(frozen=True)
class DecoupledRefusalMap:
    """Turns pairs of a harmful and a safe answer into training examples, one row or a batch at a time.

    A function for ``Dataset.map(..., with_indices=True)``: dict in, dict out, picklable, without a generator inside
    (what is drawn depends on ``seed`` and the row's index alone, whatever the batches or processes). Two kinds:

    ``"prefix"``: the prompt and the first k words (or tokens) of the harmful answer without loss, then the safe answer.
    ``"rto"`` (reinforced transition optimisation): prompt and harmful answer; the label at every position of the answer
    is the token that begins a refusal. As labels are shifted inside the loss, position t − 1 learns "refuse next".

    Prompt, prefix and answer are encoded apart, so a safe answer begins with the same token wherever it sets in. A
    batched call drops what cannot be made; a call for one row returns it with empty ids and ``kind`` ``"none"``.

    Attributes:
        tokenizer: a Hugging Face tokenizer (with a chat template, where prompts are messages).
        kind: ``"both"`` (batched calls only, two examples per row), ``"rto"`` or ``"prefix"``.
        refusal_id: token that begins a refusal; None takes the first token of each row's safe answer.
        keep_fraction: share of the answer's positions that keep their label in ``"rto"``, at least one; drawn by row.
            1 keeps all. (The published full-parameter script keeps 5 % of the padded row, prompt and padding
            included, so that some rows have no label; here only positions of the answer count.)
        rto_weight: weight of ``"rto"`` labels in ``loss_weights``; others have 1.
        prefix_units: ``"word"`` (pieces between single spaces) or ``"token"``.
        zero_every: every such row has k = 0 (3 as published; 0 for never). Other k are uniform on 1 … length − 2.
        max_length: longer examples lose their end; one that loses every label is not made.
        eos: append the tokenizer's end token to the safe answer.
        columns: names of the prompt, the safe and the harmful answer (the layout of preference data).
        seed: of all draws.

    Raises:
        ArgumentError, DTypeError: an option out of range.
    """

    tokenizer: Any
    kind: str = "both"
    refusal_id: int | None = None
    keep_fraction: float = 1.0
    rto_weight: float = 1.0
    prefix_units: str = "word"
    zero_every: int = 3
    max_length: int | None = None
    eos: bool = True
    columns: tuple[str, str, str] = ("prompt", "chosen", "rejected")
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.tokenizer):
            raise DTypeError(f"tokenizer: expected a Hugging Face tokenizer, got {type(self.tokenizer).__name__}")
        if self.kind not in ("both", "rto", "prefix"):
            raise ArgumentError(f"kind: expected 'both', 'rto' or 'prefix', got {self.kind!r}")
        if not 0 < self.keep_fraction <= 1:
            raise ArgumentError(f"keep_fraction: expected a share in (0, 1], got {self.keep_fraction}")
        if not (math.isfinite(self.rto_weight) and self.rto_weight >= 0):
            raise ArgumentError(f"rto_weight: expected a weight of 0 or more, got {self.rto_weight}")
        if self.prefix_units not in ("word", "token"):
            raise ArgumentError(f"prefix_units: expected 'word' or 'token', got {self.prefix_units!r}")
        if self.zero_every < 0 or self.seed < 0 or (self.refusal_id is not None and self.refusal_id < 0):
            raise ArgumentError("zero_every, seed, refusal_id: expected 0 or more")
        if self.max_length is not None and self.max_length < 1:
            raise ArgumentError(f"max_length: expected 1 or more, got {self.max_length}")
        if len(self.columns) != 3:
            raise ArgumentError("columns: expected the names of prompt, safe and harmful answer")

    def __call__(self, example: Mapping[str, Any], index: int | Sequence[int] | None = None) -> dict[str, Any]:
        """One row and its index, or columns and their indices.

        Raises:
            ArgumentError: no index, a column that is missing, or one row with ``kind="both"``.
            DTypeError: something that is neither text nor messages.
        """
        if index is None:
            raise ArgumentError("index: expected the row's index; call map with with_indices=True")
        if missing := [c for c in self.columns if c not in example]:
            raise ArgumentError(f"columns: expected {missing[0]!r} in the row, got {', '.join(map(str, example))}")
        if isinstance(index, Sequence):
            made: list[dict[str, Any]] = []
            for j, i in enumerate(index):
                made += [e for e in self.examples({c: example[c][j] for c in self.columns}, int(i)) if e["input_ids"]]
            return {key: [e[key] for e in made] for key in _OUT}
        if self.kind == "both":
            raise ArgumentError("kind: one row gives one example; use batched=True, or kind='rto' or 'prefix'")
        return {key: self.examples(example, int(index))[0][key] for key in _OUT}

    def examples(self, row: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
        """The examples of one row; one that cannot be made has no ids and a ``reason``.

        Raises:
            ArgumentError, DTypeError: as in a call.
        """
        prompt = self._prompt(row[self.columns[0]], self.columns[0])
        safe, harmful = (self._answer(row, c) for c in self.columns[1:])
        kinds = ("rto", "prefix") if self.kind == "both" else (self.kind,)
        return [(self._rto if k == "rto" else self._prefix)(prompt, safe, harmful, index) for k in kinds]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=special)["input_ids"]]

    def _prompt(self, prompt: Any, name: str) -> list[int]:
        if isinstance(prompt, str):
            return self._ids(prompt, special=True)
        messages = [{"role": r, "content": t} for r, t in messages_of({name: prompt}, name)]
        return self._ids(str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)))

    def _answer(self, row: Mapping[str, Any], name: str) -> str:
        if isinstance(row[name], str):
            return str(row[name])
        if isinstance(row[name], Sequence):
            said = messages_of(row, name)
            if len(said) == 1:
                return said[0][1]
            raise ArgumentError(f"{name}: expected the answer alone, got {len(said)} messages")
        raise DTypeError(f"{name}: expected text or messages, got {type(row[name]).__name__}")

    def _refusal(self, safe: list[int]) -> int | None:
        if self.refusal_id is not None:
            return self.refusal_id
        return safe[0] if safe else None

    def _rto(self, prompt: list[int], safe: str, harmful: str, index: int) -> dict[str, Any]:
        answer, refusal = self._ids(harmful), self._refusal(self._ids(safe))
        if not answer or refusal is None:
            return _nothing("empty harmful answer" if not answer else "empty safe answer", index)
        kept = len(answer)
        labels = [refusal] * kept
        if self.keep_fraction < 1:
            kept = max(1, math.ceil(self.keep_fraction * kept))
            chosen = set(row_rng(self.seed, index, 0).permutation(len(answer))[:kept].tolist())
            labels = [refusal if t in chosen else _NO_LOSS for t in range(len(answer))]
        return self._example("rto", prompt, answer, labels, index, self.rto_weight)

    def _prefix(self, prompt: list[int], safe: str, harmful: str, index: int) -> dict[str, Any]:
        target = self._ids(safe)
        if not target:
            return _nothing("empty safe answer", index)
        words = self._ids(harmful) if self.prefix_units == "token" else harmful.split(" ")
        if len(words) < 3:
            return _nothing("harmful answer too short", index)
        k = 0
        if not (self.zero_every and index % self.zero_every == 0):
            k = int(row_rng(self.seed, index, 1).integers(1, len(words) - 1))
        taken = words[:k]
        before = [int(t) for t in taken] if self.prefix_units == "token" else self._ids(" ".join(map(str, taken)))
        end = getattr(self.tokenizer, "eos_token_id", None)
        target = [*target, int(end)] if self.eos and end is not None else target
        return self._example("prefix", [*prompt, *(before if k else [])], target, target, index, 1.0)

    def _example(
        self, kind: str, before: list[int], answer: list[int], labels: list[int], index: int, weight: float
    ) -> dict[str, Any]:
        ids, wanted = [*before, *answer], [_NO_LOSS] * len(before) + labels
        ids, wanted = ids[: self.max_length], wanted[: self.max_length]
        if all(label == _NO_LOSS for label in wanted):
            return _nothing("no label left within max_length", index)
        weights = [0.0 if label == _NO_LOSS else float(weight) for label in wanted]
        return {"input_ids": ids, "labels": wanted, "loss_weights": weights, "kind": kind, "row": index}


def _nothing(reason: str, index: int) -> dict[str, Any]:
    return {"input_ids": [], "labels": [], "loss_weights": [], "kind": "none", "row": index, "reason": reason}


@dataclass(frozen=True, eq=False)
class DecoupledRefusalExamples:
    """What was made of a data set.

    Attributes:
        examples: dicts of ``input_ids``, ``labels``, ``loss_weights``, ``kind`` and ``row``.
        skipped: (row, reason) of the examples that could not be made.
        refusal_ids: how often each token was the label of a transition's row. More than one means that safe answers
            begin differently, and that the model learns several ways to begin.
    """

    examples: list[dict[str, Any]]
    skipped: list[tuple[int, str]]
    refusal_ids: Counter[int] = field(default_factory=Counter)

    @property
    def counts(self) -> dict[str, int]:
        """Examples by kind, and those not made by reason."""
        found = Counter(e["kind"] for e in self.examples)
        found.update(reason for _, reason in self.skipped)
        return dict(found)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index]

    def __repr__(self) -> str:
        counts = ", ".join(f"{k}: {v}" for k, v in self.counts.items())
        return f"DecoupledRefusalExamples({counts}; refusal begins with {dict(self.refusal_ids.most_common(3))})"

    def _repr_html_(self) -> str:
        body = "".join(f"<tr><td>{html.escape(k)}</td><td>{v}</td></tr>" for k, v in self.counts.items())
        return f"<table><tr><th>examples</th><th>number</th></tr>{body}</table>"


def decoupled_refusal_examples(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, **options: Any
) -> DecoupledRefusalExamples:
    """Examples of decoupled refusal training from rows of prompt, safe and harmful answer, with what was left out.

    Args:
        rows: mappings with the columns ``prompt``, ``chosen`` (safe) and ``rejected`` (harmful): texts, or messages.
        tokenizer: a Hugging Face tokenizer.
        options: further arguments of :class:`DecoupledRefusalMap`, which does the same inside ``Dataset.map``.

    Raises:
        ArgumentError, DTypeError: an option or a row does not fit.

    Source: DeRTa, arXiv 2407.09121, sections 3.1 and 3.2.
    """
    make = DecoupledRefusalMap(tokenizer, **options)
    made, skipped, begins = [], [], Counter[int]()
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DTypeError(f"rows: expected mappings, got {type(row).__name__} at index {i}")
        if missing := [c for c in make.columns if c not in row]:
            raise ArgumentError(f"rows: expected the column {missing[0]!r}, got none at index {i}")
        for example in make.examples(row, i):
            if not example["input_ids"]:
                skipped.append((i, example["reason"]))
                continue
            made.append(example)
            if example["kind"] == "rto":
                begins[next(label for label in example["labels"] if label != _NO_LOSS)] += 1
    return DecoupledRefusalExamples(made, skipped, begins)


@dataclass(frozen=True)
class DecoupledRefusalCollator:
    """Pads examples on the right into torch tensors of ``input_ids``, ``attention_mask``, ``labels``, ``loss_weights``.

    Attributes:
        pad_token_id: id that fills ``input_ids``.
        pad_to_multiple_of: the width is rounded up to this.

    Raises:
        ArgumentError: no example. ShapeError: lists of an example that differ in length, or an empty one.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int = 1

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        import torch

        if not examples:
            raise ArgumentError("examples: expected at least one, got none")
        for e in examples:
            lengths = {len(e[key]) for key in ("input_ids", "labels", "loss_weights") if key in e}
            if len(lengths) != 1 or 0 in lengths:
                raise ShapeError(f"examples: expected ids, labels and weights of one length above 0, got {lengths}")
        step = max(self.pad_to_multiple_of, 1)
        width = -(-max(len(e["input_ids"]) for e in examples) // step) * step
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": _NO_LOSS, "loss_weights": 0.0}
        batch = {key: torch.full((len(examples), width), fill) for key, fill in fills.items()}
        for i, e in enumerate(examples):
            n = len(e["input_ids"])
            plain = [0.0 if label == _NO_LOSS else 1.0 for label in e["labels"]]
            values = {**e, "attention_mask": [1] * n, "loss_weights": e.get("loss_weights", plain)}
            for key, out in batch.items():
                out[i, :n] = torch.as_tensor(values[key], dtype=out.dtype)
        return batch

    torch_call = __call__


def decoupled_refusal_loss(logits: Tensor, labels: Tensor, loss_weights: Tensor | None = None) -> Tensor:
    """``Σ w · (−ln p(label)) / number of labels``: with weights of 1 the mean that a causal language model computes.

    Args:
        logits: ``(B, T, V)``; position t predicts the label at t + 1.
        labels: ``(B, T)``, -100 where there is no loss.
        loss_weights: ``(B, T)``, or None for 1.

    Returns:
        A scalar, float32 or wider, differentiable; 0 where nothing is labelled.

    Raises:
        ShapeError: shapes that do not fit.
    """
    import torch

    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ShapeError(f"labels: expected {tuple(logits.shape[:2])} as logits, got {tuple(labels.shape)}")
    if loss_weights is not None and loss_weights.shape != labels.shape:
        raise ShapeError(f"loss_weights: expected {tuple(labels.shape)}, got {tuple(loss_weights.shape)}")
    wanted = labels[:, 1:].reshape(-1)
    predicted = logits[:, :-1].reshape(-1, logits.shape[-1])
    predicted = predicted if predicted.dtype == torch.float64 else predicted.float()
    losses = torch.nn.functional.cross_entropy(predicted, wanted, ignore_index=_NO_LOSS, reduction="none")
    if loss_weights is not None:
        losses = losses * loss_weights[:, 1:].reshape(-1)
    return losses.sum() / (wanted != _NO_LOSS).sum().clamp(min=1)
