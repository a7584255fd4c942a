"""The processors inside `generate()`: a tiny model with known outcomes, and a real one."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)

from abjure import refuse
from abjure.integrations.transformers import ForbiddenPhrasesProcessor, RefusalTokensProcessor

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 4},
    "sampled beams": {"do_sample": True, "num_beams": 3},
}
EOS = 2


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def generate(model, prompt, processors, way, tokens=12):
    torch.manual_seed(1)
    mask = torch.ones_like(prompt)
    out = model.generate(
        prompt,
        attention_mask=mask,
        logits_processor=LogitsProcessorList(processors),
        max_new_tokens=tokens,
        pad_token_id=0,
        **WAYS[way],
    )
    return out[:, prompt.shape[1] :]


def contains(row: list[int], phrase: list[int]) -> bool:
    return any(row[i : i + len(phrase)] == phrase for i in range(len(row)))


def test_is_what_transformers_expects():
    for made in (RefusalTokensProcessor({"a": 1}), ForbiddenPhrasesProcessor([[1]])):
        assert isinstance(made, LogitsProcessor)
        assert made.supports_continuous_batching is False
        assert list(inspect.signature(made.__call__).parameters) == ["input_ids", "scores"]


@pytest.mark.parametrize("way", WAYS)
def test_forbidden_phrases_never_appear(tiny, way):
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    free = generate(tiny, prompt, [], way).tolist()
    phrases = [row[i : i + n] for row in free for i in range(3, 9, 3) for n in (2, 3)]
    phrases = [list(p) for p in dict.fromkeys(map(tuple, phrases)) if EOS not in p and 0 not in p]
    assert phrases
    out = generate(tiny, prompt, [ForbiddenPhrasesProcessor(phrases, 32)], way).tolist()
    assert not any(contains(row, p) for row in out for p in phrases)
    assert out != free


@pytest.mark.parametrize("way", WAYS)
def test_the_gate_forces_and_blocks_the_first_token(tiny, way):
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    forced = RefusalTokensProcessor({"refuse": 11}, threshold=-math.inf)
    for _ in range(2):
        assert (generate(tiny, prompt, [forced], way)[:, 0] == 11).all(), "in every generation anew"
    respond = RefusalTokensProcessor({"refuse": 11}, threshold=math.inf, on_no_fire=12)
    assert (generate(tiny, prompt, [respond], way)[:, 0] == 12).all()
    opener = int(generate(tiny, prompt[:1], [], "greedy")[0, 0])
    free = RefusalTokensProcessor({"refuse": opener}, on_no_fire="free", elsewhere="mask")
    assert not (generate(tiny, prompt, [free], way) == opener).any()


def test_the_plain_classes_work_in_a_plain_list(tiny):
    prompt = torch.tensor([[5, 6, 7]])
    processors = [refuse.RefusalTokens({"refuse": 11}, bias=1e4), refuse.ForbiddenPhrases([[11, 11], [3]], 32)]
    out = tiny.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        do_sample=False,
        logits_processor=processors,
        pad_token_id=0,
    )
    answer = out[0, 3:].tolist()
    assert answer[0] == 11
    assert answer[1] != 11
    assert 3 not in answer


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_the_verdict_is_the_margin_of_the_model(tiny, way):
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10], [3, 3, 3]])
    with torch.no_grad():
        margins = refuse.row_margin(tiny(prompt).logits[:, -1], [11])[:, 0]
    for threshold in [float(m) - 1e-3 for m in margins] + [float(m) + 1e-3 for m in margins]:
        processor = RefusalTokensProcessor({"refuse": 11}, threshold=threshold, on_no_fire="free")
        first = generate(tiny, prompt, [processor], way, tokens=2)[:, 0]
        refused = (margins >= threshold).repeat_interleave(len(first) // 3)
        assert ((first == 11) == refused).all()


def test_left_padding_keeps_the_border_of_each_prompt(tiny):
    prompt = torch.tensor([[0, 0, 6, 7], [8, 9, 10, 4]])
    mask = (prompt != 0).long()
    free = tiny.generate(prompt, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    phrase = [7, int(free[0, 4])]
    for scope, kept in (("output", True), ("all", False)):
        processor = ForbiddenPhrasesProcessor([phrase], scope=scope, pad_token_id=0)
        out = tiny.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([processor]),
        )
        assert (int(out[0, 4]) == phrase[1]) == kept
        assert torch.equal(out[1], free[1]) or not kept


@pytest.mark.effect
def test_a_real_model_loses_the_phrase_and_is_gated(smollm):
    model, tokenizer = smollm.model, smollm.tokenizer
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    def complete(*processors, tokens=16):
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList(processors),
        )
        return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)

    plain = complete()
    assert "Paris" in plain
    guarded = complete(ForbiddenPhrasesProcessor(["Paris"], tokenizer=tokenizer))
    assert "Paris" not in guarded
    assert guarded.strip()
    opener = plain.split()[0]
    tokens = {"opener": opener, "refusal": "Sorry"}
    with torch.no_grad():
        logits = model(prompt).logits[:, -1]
    made = RefusalTokensProcessor.from_tokenizer(tokenizer, tokens)
    likely, unlikely = (float(m) for m in made.margins(logits)[0])
    assert likely > unlikely
    forced = made.from_tokenizer(tokenizer, tokens, threshold={"refusal": unlikely - 0.01})
    assert complete(forced, tokens=4).startswith("Sorry")
    closed = made.from_tokenizer(tokenizer, {"opener": opener}, on_no_fire="free")
    assert not complete(closed, tokens=4).startswith(opener)
    raised = made.from_tokenizer(tokenizer, {"refusal": "Sorry"}, bias=likely - unlikely + 5.0)
    assert complete(raised, tokens=4).startswith("Sorry")
