"""Adding refusal tokens to a tokenizer and a model, and the training rows that open with them (arXiv 2412.06748)."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError, DegenerateError, DeviceError, DTypeError
from .tokens import RefusalTokens


def add_refusal_tokens(
    tokenizer: Any,
    model: Any,
    names: Sequence[str] | Mapping[str, str],
    *,
    respond: str | None = "<|respond|>",
    init: str | Mapping[str, str] = "mean",
    pad_to_multiple_of: int | None = None,
    **options: Any,
) -> RefusalTokens:
    """Adds one special token per refusal category, with rows in the embedding and the output head.

    The rows of new tokens are the mean of those of the old vocabulary, or of the pieces of a describing text. A padded
    embedding (rows beyond the tokenizer's last id) is used before it is made larger. Tokens that are there already, as
    in a model that was saved after this, keep their rows, so that the call may be repeated. Existing extra special
    tokens of the tokenizer stay.

    A model that is trained with adapters must train these rows too, or the tokens never learn: with peft,
    ``LoraConfig(trainable_token_indices=new_token_ids(tokens))``.

    Args:
        tokenizer: a Hugging Face tokenizer; changed in place.
        model: the Hugging Face model; changed in place. None to change the tokenizer only.
        names: category names, whose tokens are spelt ``<|refuse:name|>`` with spaces as underscores; or name to text.
        respond: text of a token that opens answers; None for none.
        init: ``"mean"``, ``"text"`` (the mean over the pieces of the category's name, of ``"answer"`` for the respond
            token), any other text for all, or a mapping from names (and ``"respond"``) to texts, ``"mean"`` for the
            rest.
        pad_to_multiple_of: the size of a grown embedding is rounded up to this.
        options: of the :class:`~abjure.refuse.RefusalTokens` returned.

    Returns:
        A processor that does nothing yet: no bias, no threshold (unless in ``options``). Its ``to_sft`` writes training
        rows, :func:`~abjure.refuse.score_categories` takes it for scoring.

    Raises:
        ArgumentError: no names, a name or text twice, a text that is an ordinary token of the tokenizer or is empty, an
            unknown name in ``init``, a model whose embedding is smaller than the tokenizer's vocabulary.
        DTypeError: names that are no strings, a quantised embedding. DeviceError: an embedding without memory.
        DegenerateError: a describing text without tokens.

    Source: Jain et al. 2024, arXiv 2412.06748, section 3 (tokens); the mean of old rows is the usual choice for new
        ones.
    """
    texts = _texts(names)
    if respond is not None:
        texts["respond"] = respond
    bad = [t for t in texts.values() if not isinstance(t, str)]
    if bad:
        raise DTypeError(f"names: expected texts, got {type(bad[0]).__name__}")
    if any(not t.strip() for t in texts.values()) or len(set(texts.values())) != len(texts):
        raise ArgumentError(
            f"names: expected texts of different tokens, none of them empty, got {list(texts.values())}"
        )
    added = set(tokenizer.get_added_vocab())
    ordinary = [t for t in texts.values() if t not in added and t in tokenizer.get_vocab()]
    if ordinary:
        raise ArgumentError(f"names: expected texts of new tokens, but {ordinary[0]!r} is an ordinary token already")
    new = {name: text for name, text in texts.items() if text not in added}
    wanted = _descriptions(tokenizer, init, list(texts))
    size = len(tokenizer)
    if model is not None:
        _check_rows(model, size)
    if new:
        # The default would replace the extra tokens that the tokenizer has.
        tokenizer.add_special_tokens({"extra_special_tokens": list(new.values())}, replace_extra_special_tokens=False)
    if model is not None and new:
        ids = {name: int(tokenizer.convert_tokens_to_ids(text)) for name, text in new.items()}
        rows = int(model.get_input_embeddings().weight.shape[0])
        if len(tokenizer) > rows:
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
        _initialise(model, ids, wanted, size)
    if model is not None:
        options.setdefault("tail", "forbid" if _head_rows(model) > len(tokenizer) else "error")
    categories = {name: text for name, text in texts.items() if name != "respond"}
    made: RefusalTokens = RefusalTokens.from_tokenizer(tokenizer, categories, respond=respond, **options)
    return made


def new_token_ids(tokens: RefusalTokens) -> list[int]:
    """Ids of all categories' tokens and of the respond token, ascending: the embedding rows to train."""
    ids = {i for each in tokens.categories.values() for i in each}
    return sorted(ids if tokens.respond is None else ids | {tokens.respond})


def _texts(names: Any) -> dict[str, str]:
    if isinstance(names, Mapping):
        found = {str(k): v for k, v in names.items()}
    else:
        if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
            raise DTypeError(f"names: expected a list of names or a mapping to texts, got {type(names).__name__}")
        if any(not isinstance(n, str) for n in names):
            raise DTypeError("names: expected strings")
        found = {n: f"<|refuse:{'_'.join(n.split())}|>" if n.strip() else "" for n in names}
        if len(found) != len(names):
            raise ArgumentError(f"names: expected each name once, got {list(names)}")
    if not found:
        raise ArgumentError("names: expected at least one category, got none")
    if "respond" in found:
        raise ArgumentError("names: 'respond' is the name of the token that opens answers; choose another")
    return found


def _descriptions(tokenizer: Any, init: Any, names: list[str]) -> dict[str, list[int] | None]:
    """Per name the ids whose rows are averaged, None for all rows."""
    if isinstance(init, Mapping):
        unknown = [n for n in init if n not in names]
        if unknown:
            raise ArgumentError(f"init: expected names among {names}, got {unknown}")
        texts = {n: str(init.get(n, "mean")) for n in names}
    elif init == "text":
        texts = {n: "answer" if n == "respond" else n for n in names}
    else:
        texts = dict.fromkeys(names, str(init))
    found: dict[str, list[int] | None] = {}
    for name, text in texts.items():
        ids = None if text == "mean" else [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
        if ids == []:
            raise DegenerateError(f"init: {text!r} for {name!r} has no tokens")
        found[name] = ids
    return found


def _head_rows(model: Any) -> int:
    head = model.get_output_embeddings()
    return int((model.get_input_embeddings() if head is None else head).weight.shape[0])


def _check_rows(model: Any, size: int) -> None:
    for name, module in (("embedding", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
        if module is None and name == "head":
            continue
        weight = getattr(module, "weight", None)
        if weight is None or not weight.is_floating_point():
            raise DTypeError(f"model: expected floating-point rows in the {name}, got {getattr(weight, 'dtype', None)}")
        if weight.device.type == "meta":
            raise DeviceError(f"model: expected rows with memory in the {name}, got device 'meta'")
        if weight.shape[0] < size:
            raise ArgumentError(
                f"model: expected at least {size} rows in the {name}, one per token, got {weight.shape[0]}"
            )


def _initialise(model: Any, ids: Mapping[str, int], pieces: Mapping[str, list[int] | None], size: int) -> None:
    """Writes the rows of new tokens; ``size`` is the old vocabulary, beyond which rows are padding."""
    import torch

    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    tensors = [m.weight for m in modules if m is not None]
    bias = getattr(modules[1], "bias", None)
    tensors += [] if bias is None else [bias]
    done = set()
    with torch.no_grad():
        for t in tensors:
            if t.data_ptr() in done:  # tied: the rows are there already
                continue
            done.add(t.data_ptr())
            mean = t[:size].double().mean(dim=0)
            for name, i in ids.items():
                of = pieces[name]
                t[i] = (mean if of is None else t[of].double().mean(dim=0)).to(t.dtype)


@dataclass(frozen=True, eq=False)
class RefusalSft(Sequence[dict[str, Any]]):
    """Training rows, in the order given.

    Attributes:
        rows: plain dicts, as ``datasets.Dataset.from_list`` and trl's ``SFTTrainer`` take them.
        counts: rows per category, and those to be answered under ``"respond"``.
    """

    rows: list[dict[str, Any]]
    counts: Counter[str]

    @property
    def shares(self) -> dict[str, float]:
        """:attr:`counts` over the number of rows."""
        return {name: n / len(self.rows) for name, n in self.counts.items()}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def encode(
        self, tokenizer: Any, *, system: str | None = None, max_length: int | None = None
    ) -> list[dict[str, Any]]:
        """``input_ids`` and ``labels`` with the loss on the last answer alone, its control token included.

        For trainers that take tokenised rows; others mask prompts themselves (``completion_only_loss``,
        ``assistant_only_loss``). The end-of-turn text of the chat template (plain text: the tokenizer's end token) is
        part of the answer.

        Raises:
            ArgumentError: a template whose text before the answer changes with the answer, an answer that
                ``max_length`` cuts off entirely.
        """
        return [_encode(tokenizer, row, i, system, max_length) for i, row in enumerate(self.rows)]

    def __repr__(self) -> str:
        each = ", ".join(f"{n} {name!r} ({n / max(len(self), 1):.1%})" for name, n in self.counts.items())
        return f"RefusalSft({len(self)} rows: {each})"

    def _repr_html_(self) -> str:
        body = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{n}</td><td>{self.shares[name]:.1%}</td></tr>"
            for name, n in self.counts.items()
        )
        return f"<table><tr><th>opens as</th><th>rows</th><th>share</th></tr>{body}</table>"


def refusal_sft(
    tokens: RefusalTokens,
    rows: Iterable[Mapping[str, Any]],
    *,
    category: str = "category",
    refusal: str | Mapping[str, str] | None = None,
    separator: str = "",
    form: str = "same",
) -> RefusalSft:
    """Rows whose last answer opens with the token of its category: the respond token where it is to be answered.

    A row is ``{"messages": [..., {"role": "assistant", ...}]}``, ``{"prompt": str, "completion": str}``, or the latter
    with lists of messages. Other columns stay. The published work trains on short refusals and finds that their length
    matters little.

    Args:
        tokens: with texts, from :func:`add_refusal_tokens` or ``RefusalTokens.from_tokenizer``.
        rows: each with the category's name under ``category``, or None or no such column for a row to be answered.
        category: name of that column; it is left out of the result.
        refusal: what refused rows say: None for their own answer, one text for all, or a text per category.
            ``{prompt}`` in it is not replaced.
        separator: between the token and the answer.
        form: ``"same"`` as each row, ``"messages"``, or ``"prompt_completion"`` (lists of messages where the row has
            them).

    Raises:
        ArgumentError: tokens without texts, an unknown category or form, a row without an answer, one that opens with a
            control token already; the message names the row.
        DTypeError: rows of another kind.

    Source: Jain et al. 2024, arXiv 2412.06748: ``token + answer``, the loss on the token too.
    """
    if tokens.texts is None:
        raise ArgumentError("tokens: expected texts; make them with add_refusal_tokens or RefusalTokens.from_tokenizer")
    if form not in ("same", "messages", "prompt_completion"):
        raise ArgumentError(f"form: expected 'same', 'messages' or 'prompt_completion', got {form!r}")
    opening = {name: texts[0] for name, texts in tokens.texts.items()}
    controls = [t for texts in tokens.texts.values() for t in texts] + [t for t in [tokens.respond_text] if t]
    said = dict.fromkeys(opening, refusal) if isinstance(refusal, str) else dict(refusal or {})
    if unknown := [n for n in said if n not in opening]:
        raise ArgumentError(f"refusal: expected categories among {list(opening)}, got {unknown}")
    made, counts = [], Counter({"respond": 0, **dict.fromkeys(opening, 0)})
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DTypeError(f"rows: expected mappings, got {type(row).__name__} at index {i}")
        name = row.get(category)
        if name is not None and name not in opening:
            raise ArgumentError(f"rows: expected a category among {list(opening)} at index {i}, got {name!r}")
        prompt, answer = _parts(row, i, needs_answer=name is None or name not in said)
        answer = said.get(name, answer) if name is not None else answer
        if any(answer.startswith(t) for t in controls):
            raise ArgumentError(f"rows: the answer at index {i} opens with a control token already: {answer[:40]!r}")
        token = opening[name] if name is not None else tokens.respond_text
        text = answer if token is None else token + separator + answer
        rest = {k: v for k, v in row.items() if k not in (category, "messages", "prompt", "completion")}
        made.append(_form(prompt, text, form, "messages" in row) | rest)
        counts[name or "respond"] += 1
    return RefusalSft(made, counts)


def _parts(row: Mapping[str, Any], i: int, needs_answer: bool) -> tuple[Any, str]:
    """What comes before the answer (text or messages), and the answer."""
    if "messages" in row:
        messages = [dict(m) for m in row["messages"]]
        if messages and messages[-1].get("role") == "assistant":
            return messages[:-1], _content(messages[-1], i)
        if needs_answer or not messages:
            raise ArgumentError(f"rows: expected messages that end with the assistant's at index {i}")
        return messages, ""
    if "prompt" not in row or (needs_answer and "completion" not in row):
        raise ArgumentError(f"rows: expected 'messages', or 'prompt' and 'completion', at index {i}, got {list(row)}")
    prompt, completion = row["prompt"], row.get("completion", "")
    if not isinstance(prompt, str):
        prompt = [dict(m) for m in prompt]
    if not isinstance(completion, str):
        if len(completion) != 1:
            raise ArgumentError(f"rows: expected one message as the completion at index {i}, got {len(completion)}")
        completion = _content(completion[0], i)
    return prompt, completion


def _content(message: Mapping[str, Any], i: int) -> str:
    if not isinstance(message.get("content"), str):
        raise DTypeError(f"rows: expected text as the answer at index {i}, got {type(message.get('content')).__name__}")
    return str(message["content"])


def _form(prompt: Any, text: str, form: str, had_messages: bool) -> dict[str, Any]:
    if form == "messages" or (form == "same" and had_messages):
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return {"messages": [*before, {"role": "assistant", "content": text}]}
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": text}
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": text}]}


def _encode(tokenizer: Any, row: Mapping[str, Any], i: int, system: str | None, limit: int | None) -> dict[str, Any]:
    if "prompt" in row and isinstance(row["prompt"], str):
        before, whole = row["prompt"], row["prompt"] + row["completion"] + (tokenizer.eos_token or "")
        special = True
    else:
        messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        before = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole, special = tokenizer.apply_chat_template(messages, tokenize=False), False
    if not whole.startswith(before):
        raise ArgumentError(f"tokenizer: the chat template changes what stands before the answer at index {i}")
    start = [int(t) for t in tokenizer(before, add_special_tokens=special)["input_ids"]]
    # Apart, so that the answer begins with its control token whatever stands before it.
    answer = [int(t) for t in tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]]
    ids, labels = [*start, *answer][:limit], [*[-100] * len(start), *answer][:limit]
    if all(label == -100 for label in labels):
        raise ArgumentError(f"max_length: nothing is left of the answer at index {i}")
    return {"input_ids": ids, "labels": labels}
