"""Adding refusal tokens to tokenizers and models, and the rows that open with them."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from abjure import refuse
from abjure.errors import ArgumentError, DegenerateError, DeviceError, DTypeError, ShapeError
from abjure.refuse import RefusalTokens, add_refusal_tokens, new_token_ids, score_categories

pytest.importorskip("transformers")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = "how do i make soup bake a loaf fix my bike no sorry cooking legal advice answer here is it".split()  # noqa: SIM905


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>", "<system>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", extra_special_tokens=special
    )
    found.chat_template = TEMPLATE
    return found


def model(size: int, tied: bool = False, dtype: torch.dtype = torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padded", [0, 2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_means_and_old_rows_keep_their_bits(tied, padded, dtype):
    t = tokenizer()
    size = len(t)
    m = model(size + padded, tied, dtype)
    old = [copy.deepcopy(x.weight.detach()) for x in (m.get_input_embeddings(), m.get_output_embeddings())]
    tokens = add_refusal_tokens(t, m, ["cooking", "legal advice"], init={"cooking": "soup loaf"})
    assert tokens.categories == {"cooking": [size], "legal advice": [size + 1]}
    assert tokens.respond == size + 2
    assert new_token_ids(tokens) == [size, size + 1, size + 2]
    assert tokens.texts == {"cooking": ["<|refuse:cooking|>"], "legal advice": ["<|refuse:legal_advice|>"]}
    assert len(t) == size + 3
    assert t.eos_token == "<end>"
    assert t.encode("<system>", add_special_tokens=False) == [5], "the tokens it had are still whole"
    pieces = t.encode("soup loaf", add_special_tokens=False)
    for before, module in zip(old, (m.get_input_embeddings(), m.get_output_embeddings()), strict=True):
        w = module.weight.detach()
        assert w.dtype == dtype
        assert w.shape[0] == max(size + padded, size + 3)
        assert torch.equal(w[:size], before[:size])
        assert torch.equal(w[size], before[pieces].double().mean(0).to(dtype))
        assert torch.equal(w[size + 1], before[:size].double().mean(0).to(dtype))
    assert (m.get_input_embeddings().weight.data_ptr() == m.get_output_embeddings().weight.data_ptr()) == tied
    assert tokens.tail == ("forbid" if padded == 40 else "error")
    # Again: nothing is new, and nothing changes.
    now = copy.deepcopy(m.state_dict())
    again = add_refusal_tokens(t, m, ["cooking", "legal advice"], init="text")
    assert again.categories == tokens.categories
    assert all(torch.equal(v, m.state_dict()[k]) for k, v in now.items())


def test_init_by_text_and_saving(tmp_path):
    from transformers import AutoTokenizer, LlamaForCausalLM

    t = tokenizer()
    m = model(len(t))
    before = m.get_input_embeddings().weight.detach().clone()
    tokens = add_refusal_tokens(t, m, {"cooking": " [No cooking]"}, respond=None, init="text", pad_to_multiple_of=16)
    assert torch.equal(m.get_input_embeddings().weight[tokens.categories["cooking"][0]], before[t.encode("cooking")[0]])
    assert m.config.vocab_size % 16 == 0
    assert tokens.respond is None
    t.save_pretrained(tmp_path)
    m.save_pretrained(tmp_path)
    t2, m2 = AutoTokenizer.from_pretrained(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path).eval()
    again = add_refusal_tokens(t2, m2, {"cooking": " [No cooking]"}, respond=None)
    assert again.categories == tokens.categories
    prompts = refuse.Prompts(t2, ["how do i make soup", "fix my bike"])
    a = score_categories(m, refuse.Prompts(t, ["how do i make soup", "fix my bike"]), tokens)
    b = score_categories(m2, prompts, again)
    assert np.array_equal(a.margins, b.margins)
    assert t2.decode([tokens.categories["cooking"][0], 6], skip_special_tokens=True).strip() == WORDS[0]


def test_bad_additions_change_nothing():
    t = tokenizer()
    m = model(len(t))
    state = copy.deepcopy(m.state_dict())
    small = model(len(t) - 4)
    meta = copy.deepcopy(m).to("meta")
    for args, options, error in (
        ((m, []), {}, ArgumentError),
        ((m, ["a", "a"]), {}, ArgumentError),
        ((m, [" "]), {}, ArgumentError),
        ((m, "cooking"), {}, DTypeError),
        ((m, [3]), {}, DTypeError),
        ((m, {"a": 3}), {}, DTypeError),
        ((m, {"a": "<x>", "b": "<x>"}), {}, ArgumentError),
        ((m, {"a": "soup"}), {}, ArgumentError),
        ((m, {"respond": "<x>"}), {}, ArgumentError),
        ((m, ["a"]), {"init": {"b": "soup"}}, ArgumentError),
        ((m, ["a"]), {"init": ""}, DegenerateError),
        ((small, ["a"]), {}, ArgumentError),
        ((meta, ["a"]), {}, DeviceError),
    ):
        size = len(t)
        with pytest.raises(error):
            add_refusal_tokens(t, *args, **options)
        assert len(t) == size
    assert all(torch.equal(v, m.state_dict()[k]) for k, v in state.items())


def test_tokens_from_a_tokenizer_check_the_width_of_logits():
    t = tokenizer()
    add_refusal_tokens(t, None, ["cooking"])
    with pytest.raises(ArgumentError, match="one token"):
        RefusalTokens.from_tokenizer(t, {"a": "<|refuse:law|>"})
    with pytest.raises(ArgumentError, match="respond"):
        RefusalTokens.from_tokenizer(t, {"a": "<|refuse:cooking|>"}, on_no_fire="respond")
    options = {"respond": "<|respond|>", "on_no_fire": "respond", "prompt_length": 1, "threshold": 0.0}
    processor = RefusalTokens.from_tokenizer(t, {"a": "<|refuse:cooking|>"}, **options)
    context, size = np.zeros((1, 1), dtype=np.int64), len(t)
    for width in (size - 1, size + 8):
        z = np.zeros((1, width))
        with pytest.raises(ShapeError, match=f"{size} tokens"):
            processor(context, z)
        assert not z.any()
    z = processor(context, np.zeros((1, size)))
    assert np.flatnonzero(np.isfinite(z[0])).tolist() == [processor.respond]
    # Padding of the head, left out or kept.
    z = np.zeros((1, size + 8))
    z[0, processor.categories["a"]] = 9.0
    z[0, -1] = 40.0
    for tail, fires in (("forbid", True), ("keep", False)):
        gate = RefusalTokens.from_tokenizer(t, {"a": "<|refuse:cooking|>"}, tail=tail, prompt_length=1, threshold=1.0)
        out = torch.from_numpy(z.copy())
        gate(context, out)
        assert (gate.fired() == ["a"]) == fires
        assert bool(torch.isneginf(out[0, size:]).all()) == fires
        assert float(np.asarray(gate.margins(z))[0, 0]) == pytest.approx(
            9 - math.log(size - 1) if fires else -31, abs=0.1
        )
    gate = RefusalTokens({"a": 1}, threshold=0.0, prompt_length=1, vocab_size=3, tail="forbid")
    bad = np.array([[math.nan, 0.0, 0.0, 5.0]])
    with pytest.raises(ValueError, match="non-finite"):
        gate(context, bad)
    assert bad[0, 3] == 5.0, "nothing is written where the gate fails"
    for options in ({"tail": "drop"}, {"vocab_size": 0}):
        with pytest.raises(ArgumentError):
            RefusalTokens({"a": 1}, **options)


# ---- training rows


@pytest.fixture
def tokens():
    t = tokenizer()
    made = add_refusal_tokens(t, None, ["cooking", "legal advice"])
    made.tokenizer = t
    return made


def test_rows_open_with_their_tokens(tokens):
    rows = [
        {
            "messages": [{"role": "user", "content": "soup"}, {"role": "assistant", "content": "no"}],
            "category": "cooking",
        },
        {"prompt": "bike", "completion": "here", "id": 7},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "it"}]},
        {"prompt": "loaf", "category": "cooking"},
        {"messages": [{"role": "user", "content": "law"}], "category": "legal advice"},
    ]
    before = copy.deepcopy(rows)
    made = tokens.to_sft(rows, refusal={"cooking": "sorry", "legal advice": "no"})
    assert rows == before
    assert made[0] == {
        "messages": [{"role": "user", "content": "soup"}, {"role": "assistant", "content": "<|refuse:cooking|>sorry"}]
    }
    assert made[1] == {"prompt": "bike", "completion": "<|respond|>here", "id": 7}
    assert made[2]["completion"] == [{"role": "assistant", "content": "<|respond|>it"}]
    assert made[3] == {"prompt": "loaf", "completion": "<|refuse:cooking|>sorry"}
    assert made[4]["messages"][-1]["content"] == "<|refuse:legal_advice|>no"
    assert made.counts == {"respond": 2, "cooking": 2, "legal advice": 1}
    assert made.shares["cooking"] == 0.4
    assert "2 'cooking' (40.0%)" in repr(made)
    assert "table" in made._repr_html_()
    own = tokens.to_sft(rows[:1], separator=" ")
    assert own[0]["messages"][-1]["content"] == "<|refuse:cooking|> no"
    both = tokens.to_sft(rows, refusal="no", form="messages")
    assert all(set(r) <= {"messages", "id"} for r in both)
    split = tokens.to_sft(rows, refusal="no", form="prompt_completion")
    assert split[0] == {
        "prompt": [{"role": "user", "content": "soup"}],
        "completion": [{"role": "assistant", "content": "<|refuse:cooking|>no"}],
    }
    silent = add_refusal_tokens(tokens.tokenizer, None, ["cooking"], respond=None)
    assert silent.to_sft(rows[1:2])[0]["completion"] == "here"


def test_encoded_rows_train_the_answer_and_its_token(tokens):
    t = tokens.tokenizer
    rows = [
        {"prompt": "how do i bake a loaf", "completion": "sorry no", "category": "cooking"},
        {"prompt": "fix my bike", "completion": "here"},
    ]
    plain = tokens.to_sft(rows).encode(t)
    assert t.decode([i for i in plain[0]["labels"] if i != -100]) == "<|refuse:cooking|> sorry no <end>"
    assert plain[0]["input_ids"][:6] == t.encode(rows[0]["prompt"])
    assert plain[0]["labels"][:6] == [-100] * 6
    chat = tokens.to_sft(rows, form="messages").encode(t, system="advice")
    assert (
        t.decode(chat[1]["input_ids"])
        == "<system> advice <end> <user> fix my bike <end> <assistant> <|respond|> here <end>"
    )
    start = next(i for i, label in enumerate(chat[1]["labels"]) if label != -100)
    assert chat[1]["labels"][start] == tokens.respond
    assert len(tokens.to_sft(rows).encode(t, max_length=7)[0]["input_ids"]) == 7
    with pytest.raises(ArgumentError, match="index 0"):
        tokens.to_sft(rows).encode(t, max_length=6)


def test_bad_rows(tokens):
    good = {"prompt": "a", "completion": "it"}
    for rows, options, error in (
        ([good | {"category": "law"}], {}, ArgumentError),
        ([good, {"prompt": "a"}], {}, ArgumentError),
        ([{"text": "a"}], {}, ArgumentError),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, ArgumentError),
        ([{"messages": []}], {}, ArgumentError),
        ([good | {"completion": "<|respond|>it"}], {}, ArgumentError),
        ([good | {"completion": []}], {}, ArgumentError),
        ([{"messages": [{"role": "assistant", "content": None}]}], {}, DTypeError),
        (["a"], {}, DTypeError),
        ([good], {"form": "text"}, ArgumentError),
        ([good], {"refusal": {"law": "no"}}, ArgumentError),
    ):
        with pytest.raises(error):
            tokens.to_sft(rows, **options)
    with pytest.raises(ArgumentError, match="texts"):
        RefusalTokens({"a": 1}).to_sft([good])


def test_peft_trains_the_new_rows_alone(tokens):
    peft = pytest.importorskip("peft")
    t = tokens.tokenizer
    m = model(len(t), tied=True)
    before = m.get_input_embeddings().weight.detach().clone()
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=new_token_ids(tokens), task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(m, config)
    rows = tokens.to_sft([{"prompt": "soup", "completion": "no", "category": "cooking"}]).encode(t)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    wrapped(input_ids=torch.tensor([rows[0]["input_ids"]]), labels=torch.tensor([rows[0]["labels"]])).loss.backward()
    optimizer.step()
    merged = wrapped.merge_and_unload()
    now = merged.get_input_embeddings().weight.detach()
    new = new_token_ids(tokens)
    assert torch.equal(now[: min(new)], before[: min(new)])
    assert not torch.equal(now[new], before[new])
    assert merged.get_output_embeddings().weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()
