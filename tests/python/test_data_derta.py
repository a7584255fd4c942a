"""Decoupled refusal examples: labels by position, the worked loss, the same rows however they are batched."""

from __future__ import annotations

import math
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abjure import ArgumentError, DTypeError, ShapeError
from abjure.refuse import (
    DecoupledRefusalCollator,
    DecoupledRefusalMap,
    decoupled_refusal_examples,
    decoupled_refusal_loss,
)

BOS, EOS = 1, 2


class Words:
    """One token per word with the space before it, as byte-level tokenizers split; ids by first appearance."""

    bos_token_id, eos_token_id = BOS, EOS
    chat_template = "turns"

    def __init__(self):
        self.ids = {}

    def __call__(self, text, add_special_tokens=True):
        pieces = re.findall(r" ?[^ ]+| ", text)
        ids = [self.ids.setdefault(p, len(self.ids) + 3) for p in pieces]
        return {"input_ids": [BOS, *ids] if add_special_tokens else ids}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"<{m['role']}> {m['content']} " for m in messages) + "<assistant>"

    def decode(self, ids):
        words = {v: k for k, v in self.ids.items()}
        return "".join(words[i] for i in ids if i > 2)


ROW = {"prompt": "How to pick a lock?", "chosen": "Sorry, no.", "rejected": "Take a thin wire and bend its end"}


def test_transition_labels_stand_at_every_position_of_the_answer():
    words = Words()
    [rto] = decoupled_refusal_examples([ROW], words, kind="rto").examples
    n_prompt, n = 6, 8
    sorry = words.ids["Sorry,"]
    assert rto["labels"] == [-100] * n_prompt + [sorry] * n
    assert rto["loss_weights"] == [0.0] * n_prompt + [1.0] * n
    assert words.decode(rto["input_ids"]) == ROW["prompt"] + ROW["rejected"]
    [fixed] = decoupled_refusal_examples([ROW], words, kind="rto", refusal_id=77, rto_weight=0.25).examples
    assert set(fixed["labels"]) == {-100, 77}
    assert set(fixed["loss_weights"]) == {0.0, 0.25}


def test_prefix_examples_learn_the_safe_answer_after_part_of_the_harmful_one():
    words = Words()
    rows = [ROW] * 60
    found = decoupled_refusal_examples(rows, words, kind="prefix")
    lengths = set()
    for i, e in enumerate(found.examples):
        text = words.decode([t for t, label in zip(e["input_ids"], e["labels"], strict=True) if label == -100])
        prefix = text.removeprefix(ROW["prompt"])
        assert ROW["rejected"].startswith(prefix)
        lengths.add(len(prefix.split()))
        assert (prefix == "") == (i % 3 == 0)
        learned = [label for label in e["labels"] if label != -100]
        assert words.decode(learned) == ROW["chosen"]
        assert learned[-1] == EOS
        # The refusal begins with one token, after a prefix or without.
        assert learned[0] == words.ids["Sorry,"]
    assert lengths == {0, 1, 2, 3, 4, 5, 6}  # 1 … length − 2 of eight words, and 0
    always = decoupled_refusal_examples(rows, words, kind="prefix", zero_every=0, prefix_units="token", eos=False)
    assert all(len(e["input_ids"]) > 6 + 2 and e["labels"][-1] != EOS for e in always.examples)


def test_worked_transition_loss():
    torch = pytest.importorskip("torch")
    p = torch.tensor([0.1, 0.2, 0.05, 0.3], dtype=torch.float64)
    logits = torch.log(torch.stack([p, 1 - p], -1))[None]
    logits = torch.cat([logits, torch.zeros(1, 1, 2, dtype=torch.float64)], 1)
    labels = torch.tensor([[-100, 0, 0, 0, 0]])
    loss = decoupled_refusal_loss(logits, labels)
    assert float(loss) == pytest.approx(2.027932020827018, abs=1e-15)
    half = decoupled_refusal_loss(logits, labels, torch.tensor([[0, 0.5, 0.5, 0.5, 0.5]]))
    assert float(half) == pytest.approx(2.027932020827018 / 2, abs=1e-15)
    assert float(decoupled_refusal_loss(logits, torch.full((1, 5), -100))) == 0
    with pytest.raises(ShapeError, match="labels"):
        decoupled_refusal_loss(logits, labels[:, :3])
    with pytest.raises(ShapeError, match="loss_weights"):
        decoupled_refusal_loss(logits, labels, labels[:, :3])


def test_gradient_moves_only_what_is_labelled():
    torch = pytest.importorskip("torch")
    examples = decoupled_refusal_examples([ROW, {**ROW, "rejected": "Use a key"}], Words()).examples
    batch = DecoupledRefusalCollator(pad_token_id=9, pad_to_multiple_of=8)(examples)
    assert batch["input_ids"].shape[1] % 8 == 0
    for row, e in zip(range(len(examples)), examples, strict=True):
        n = len(e["input_ids"])
        assert batch["input_ids"][row, :n].tolist() == e["input_ids"]
        assert batch["input_ids"][row, n:].eq(9).all()
        assert batch["attention_mask"][row].sum() == n
        assert batch["labels"][row, n:].eq(-100).all()
        assert batch["loss_weights"][row, n:].eq(0).all()
    torch.manual_seed(0)
    logits = torch.randn(*batch["labels"].shape, 40, requires_grad=True)
    decoupled_refusal_loss(logits, batch["labels"], batch["loss_weights"]).backward()
    moved = logits.grad.abs().sum(-1)[:, :-1] > 0
    assert torch.equal(moved, batch["labels"][:, 1:] != -100)


def test_training_on_transitions_teaches_to_refuse_in_the_middle():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    words = Words()
    found = decoupled_refusal_examples([ROW] * 3, words)
    batch = DecoupledRefusalCollator()(found.examples)
    size = len(words.ids) + 4
    # Next token from the current one: enough to tell positions of the harmful answer from others.
    table = torch.nn.Embedding(size, size)
    optimizer = torch.optim.Adam(table.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        decoupled_refusal_loss(table(batch["input_ids"]), batch["labels"], batch["loss_weights"]).backward()
        optimizer.step()
    middle = words(ROW["rejected"], add_special_tokens=False)["input_ids"][3:7]
    p = torch.softmax(table(torch.tensor(middle)), -1)[:, words.ids["Sorry,"]]
    assert (p > 0.9).all()


@given(st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_kept_positions_are_the_answers_and_as_many_as_asked(n, fraction, seed):
    row = {"prompt": "p q", "chosen": "No", "rejected": " ".join(["w"] * n)}
    [e] = decoupled_refusal_examples([row], Words(), kind="rto", keep_fraction=fraction, seed=seed).examples
    kept = [t for t, label in enumerate(e["labels"]) if label != -100]
    assert len(kept) == max(1, math.ceil(fraction * n))
    assert min(kept) >= 3  # never the prompt


def test_what_is_drawn_depends_on_the_row_alone():
    words = Words()
    rows = [{**ROW, "rejected": f"{ROW['rejected']} {i}"} for i in range(12)]
    make = DecoupledRefusalMap(words, keep_fraction=0.3, seed=5)
    columns = {c: [r[c] for r in rows] for c in ROW}
    whole = make(columns, list(range(12)))
    cut = [make({c: v[a:b] for c, v in columns.items()}, list(range(a, b))) for a, b in ((0, 5), (5, 6), (6, 12))]
    assert whole == {key: [x for part in cut for x in part[key]] for key in whole}
    listed = decoupled_refusal_examples(rows, words, keep_fraction=0.3, seed=5).examples
    assert whole["input_ids"] == [e["input_ids"] for e in listed]
    assert whole["labels"] == [e["labels"] for e in listed]
    single = DecoupledRefusalMap(words, kind="rto", keep_fraction=0.3, seed=5)
    assert [single(r, i)["labels"] for i, r in enumerate(rows)] == whole["labels"][::2]
    other = DecoupledRefusalMap(words, keep_fraction=0.3, seed=6)(columns, list(range(12)))
    assert other["labels"] != whole["labels"]
    copy = pickle.loads(pickle.dumps(make))
    assert copy(columns, list(range(12))) == whole
    assert pickle.dumps(make) == pickle.dumps(make)


def test_in_datasets_map():
    datasets = pytest.importorskip("datasets")
    rows = [{**ROW, "rejected": f"{ROW['rejected']} {i}"} for i in range(6)]
    words = Words()
    made = datasets.Dataset.from_list(rows).map(
        DecoupledRefusalMap(words), with_indices=True, batched=True, batch_size=4, remove_columns=list(ROW)
    )
    assert made["labels"] == [e["labels"] for e in decoupled_refusal_examples(rows, words).examples]


def test_messages_are_rendered():
    words = Words()
    row = {
        "prompt": [{"role": "user", "content": "pick a lock"}],
        "chosen": [{"role": "assistant", "content": "No."}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "Take a wire"}]}],
    }
    [e] = decoupled_refusal_examples([row], words, kind="rto").examples
    assert words.decode(e["input_ids"]) == "<user> pick a lock <assistant>Take a wire"
    assert e["input_ids"][0] != BOS  # the template writes it


def test_what_cannot_be_made_is_counted():
    rows = [
        ROW,
        {**ROW, "rejected": "Take wire"},
        {**ROW, "rejected": ""},
        {**ROW, "chosen": ""},
        {**ROW, "chosen": "I can't."},
    ]
    words = Words()
    found = decoupled_refusal_examples(rows, words)
    assert found.counts == {
        "rto": 3,
        "prefix": 2,
        "harmful answer too short": 2,
        "empty harmful answer": 1,
        "empty safe answer": 2,
    }
    assert sorted(found.refusal_ids.values()) == [1, 2]  # "I" begins another refusal than "Sorry,"
    assert "too short" in repr(found)
    assert "<td>rto</td><td>3</td>" in found._repr_html_()
    short = decoupled_refusal_examples([ROW], words, max_length=6)
    assert len(short) == 0
    assert short.counts == {"no label left within max_length": 2}
    cut = decoupled_refusal_examples([ROW], words, max_length=8, kind="rto")
    assert len(cut[0]["labels"]) == 8
    alone = DecoupledRefusalMap(words, kind="prefix")(rows[2], 2)
    assert (alone["kind"], alone["input_ids"]) == ("none", [])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: DecoupledRefusalMap(None), DTypeError, "tokenizer"),
        (lambda: DecoupledRefusalMap(Words(), kind="mle"), ArgumentError, "kind"),
        (lambda: DecoupledRefusalMap(Words(), keep_fraction=0), ArgumentError, "keep_fraction"),
        (lambda: DecoupledRefusalMap(Words(), rto_weight=math.nan), ArgumentError, "rto_weight"),
        (lambda: DecoupledRefusalMap(Words(), prefix_units="byte"), ArgumentError, "prefix_units"),
        (lambda: DecoupledRefusalMap(Words(), max_length=0), ArgumentError, "max_length"),
        (lambda: DecoupledRefusalMap(Words(), seed=-1), ArgumentError, "seed"),
        (lambda: DecoupledRefusalMap(Words())(ROW), ArgumentError, "with_indices"),
        (lambda: DecoupledRefusalMap(Words())(ROW, 0), ArgumentError, "batched"),
        (lambda: DecoupledRefusalMap(Words(), kind="rto")({"prompt": "a"}, 0), ArgumentError, "chosen"),
        (lambda: decoupled_refusal_examples(["a"], Words()), DTypeError, "rows"),
        (lambda: decoupled_refusal_examples([{"prompt": "a"}], Words()), ArgumentError, "index 0"),
        (lambda: decoupled_refusal_examples([{**ROW, "chosen": 3}], Words()), DTypeError, "chosen"),
        (lambda: DecoupledRefusalCollator()([]), ArgumentError, "examples"),
        (lambda: DecoupledRefusalCollator()([{"input_ids": [1], "labels": []}]), ShapeError, "examples"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
