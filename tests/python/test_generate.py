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
from abjure.errors import ArgumentError, DegenerateError
from abjure.integrations.transformers import (
    ForbiddenPhrasesProcessor,
    RefusalTokensProcessor,
    continuous_batching,
)

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


@pytest.mark.parametrize("way", WAYS)
def test_a_bias_raises_and_lowers_a_token(tiny, one_thread, way):
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    opener = int(generate(tiny, prompt[:1], [], way)[0, 0])
    assert (generate(tiny, prompt, [RefusalTokensProcessor({"a": 11}, bias=60.0)], way)[:, 0] == 11).all()
    for bias in (-60.0, -math.inf):
        assert (generate(tiny, prompt, [RefusalTokensProcessor({"a": opener}, bias=bias)], way)[:, 0] != opener).all()


def test_a_row_without_a_token_stops_the_generation(tiny, one_thread):
    def empty(input_ids, scores):
        return scores.index_fill(0, torch.tensor([1]), -math.inf) if input_ids.shape[1] == 5 else scores

    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for processor in (RefusalTokensProcessor({"a": 11}), ForbiddenPhrasesProcessor([[11, 12]])):
        with pytest.raises(DegenerateError, match="row 1"):
            generate(tiny, prompt, [empty, processor], "sampling")


def batched(model, requests, profiles, sample=False, staggered=False):
    """Responses under continuous batching; requests are (prompt, new tokens, profile)."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    config = GenerationConfig(do_sample=sample, eos_token_id=-1, pad_token_id=0, temperature=1.5, top_k=0)
    plain = ContinuousBatchingConfig(
        use_async_batching=False, num_blocks=64, page_size=4, max_batch_tokens=32, allow_block_sharing=False
    )
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=plain)
    made = continuous_batching(manager, profiles)
    manager.start()
    try:
        found = {}
        for i, (prompt, tokens, profile) in enumerate(requests):
            options = {} if profile is None else {"abjure": profile}
            manager.add_request(prompt, request_id=str(i), max_new_tokens=tokens, **options)
            while staggered and i % 2 and str(i) not in found:
                # The next request joins when this one has left, while others may be running.
                if (out := manager.get_result(timeout=60)) is not None and out.is_finished():
                    found[out.request_id] = out
        while len(found) < len(requests):
            out = manager.get_result(timeout=60)
            assert out is not None, "the manager stopped"
            if out.is_finished():
                found[out.request_id] = out
    finally:
        manager.stop(block=True)
    return [found[str(i)] for i in range(len(requests))], made


@pytest.mark.parametrize("staggered", [False, True])
def test_continuous_batching_is_each_request_by_itself(tiny, one_thread, staggered):
    """Greedy tokens are those of `generate()` with new processors, whatever else is in the batch."""
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 6, 7], [20], [21, 22, 23]]
    free = [generate(tiny, torch.tensor([p]), [], "greedy", 8)[0].tolist() for p in prompts]
    phrases = [list(p) for p in {tuple(row[i : i + 2]) for row in free for i in (1, 4)} if EOS not in p]
    profiles = {
        "phrases": [refuse.ForbiddenPhrases(phrases, 32)],
        "gate": [refuse.RefusalTokens({"a": 11}, threshold=-math.inf, elsewhere="mask")],
        "off": [],
    }
    fresh = {
        "phrases": lambda: [ForbiddenPhrasesProcessor(phrases, 32)],
        "gate": lambda: [RefusalTokensProcessor({"a": 11}, threshold=-math.inf, elsewhere="mask")],
        "off": list,
    }
    names = [None, "gate", "off", "gate", "phrases", None]
    requests = [(p, 4 + i % 3 * 2, n) for i, (p, n) in enumerate(zip(prompts, names, strict=True))]
    found, _ = batched(tiny, requests, profiles, staggered=staggered)
    for (prompt, tokens, name), out in zip(requests, found, strict=True):
        assert out.error is None
        alone = tiny.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
            logits_processor=LogitsProcessorList(fresh[name or "phrases"]()),
        )
        assert out.generated_tokens == alone[0, len(prompt) :].tolist()


def test_continuous_batching_sampled(tiny, one_thread):
    torch.manual_seed(0)
    phrases = [[i, j] for i in range(3, 32) for j in (7, 8, 9)]
    found, _ = batched(tiny, [([5, 6], 12, None)] * 4, [refuse.ForbiddenPhrases([*phrases, [11]], 32)], sample=True)
    for out in found:
        assert out.error is None
        assert len(out.generated_tokens) == 12
        assert not any(contains(out.generated_tokens, p) for p in [*phrases, [11]])


def test_continuous_batching_errors(tiny, one_thread):
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    found, made = batched(tiny, [([5, 6], 4, None)], [refuse.ForbiddenPhrases([[i] for i in range(32)], 32)])
    assert "token" in found[0].error
    assert found[0].generated_tokens == []
    # A preempted request carries its response at the end of its prompt.
    state = type("State", (), {"initial_tokens": [5, 6, 7], "_true_initial_tokens": 2, "generated_tokens": [9]})()
    state.logit_processor_kwargs = {}
    number = int(made.prepare_tensor_args([type("Future", (), {"state": state})()])[0])
    assert (made._waiting[number].prompt, made._waiting[number].output) == ([5, 6], [7, 9])
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    late = tiny.init_continuous_batching(
        generation_config=config, continuous_batching_config=ContinuousBatchingConfig(use_async_batching=True)
    )
    with pytest.raises(ArgumentError, match="async"):
        continuous_batching(late, [])


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
