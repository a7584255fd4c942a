"""Any-Depth guard: the state machine, the reads against plain passes, `generate()`, and the effect on a decoder."""

from __future__ import annotations

import copy
import math
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

import abjure
from abjure import refuse
from abjure.integrations.transformers import AnyDepthStoppingCriteria

pytestmark = pytest.mark.usefixtures("one_thread")
HEADER = [3, 4, 5]


def tiny(family="llama"):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    if family == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=64)
        model = GPT2LMHeadModel(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


def probe(bias=0.0, seed=0):
    return refuse.LinearProbe(np.random.default_rng(seed).standard_normal(16), bias)


def guarded(bias=0.0, **options):
    return refuse.AnyDepthGuard(probe(bias), HEADER, **{"layer": 1, "interval": 3, **options})


PROMPTS = torch.tensor([[0, 0, 7, 8, 9], [6, 7, 8, 9, 10], [0, 11, 12, 13, 14]])


def generate(model, *criteria, prompts=PROMPTS, tokens=10, **options):
    options.setdefault("do_sample", False)
    torch.manual_seed(3)
    mask = (prompts != 0).long()
    return model.generate(
        prompts, attention_mask=mask, max_new_tokens=tokens, stopping_criteria=list(criteria), **options
    )


def test_when_to_look_and_what_halts():
    watch = refuse.DepthWatch(2, interval=25, threshold=0.5, patience=2)
    assert [s for s in range(1, 101) if watch.due(s)] == [25, 50, 75, 100]
    assert watch.due(27, previous=24)
    assert not watch.due(27, previous=25)
    assert not watch.due(0)
    assert watch.update(25, [0.5, 0.9]).tolist() == [False, False]
    assert watch.update(50, [0.49, 0.4]).tolist() == [False, False]  # consecutive hits count, not hits
    assert watch.update(75, [0.6, 0.9]).tolist() == [False, False]
    assert watch.update(100, [0.6], rows=[0]).tolist() == [True, False]
    assert watch.update(125, [0.0, 0.5]).tolist() == [True, True]  # halted stays halted
    assert watch.halted == [100, 125]
    assert watch.log[0] == [(25, 0.5), (50, 0.49), (75, 0.6), (100, 0.6)]
    assert [s for s, _ in watch.log[1]] == [25, 50, 75, 125]
    assert "2 of 2 halted" in repr(watch)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_peaks_are_the_largest_thresholds_that_halt(patience):
    rng = np.random.default_rng(patience)
    seen = rng.random((40, 6))
    for row, end in enumerate(rng.integers(0, 7, 40)):
        seen[row, end:] = math.nan
    guard = guarded(patience=patience)
    peaks = guard.peaks(seen)
    for row, peak in zip(seen, peaks, strict=True):
        for threshold in [*row[~np.isnan(row)], 2.0]:
            watch = refuse.DepthWatch(1, 1, threshold, patience)
            for i, p in enumerate(row[~np.isnan(row)]):
                watch.update(i + 1, [p])
            assert (watch.halted[0] is not None) == (peak >= threshold)
    found = guard.calibrate(peaks, alpha=0.25)
    assert guard.threshold == found.gate
    assert guard.halts(seen).mean() <= 0.25
    assert (guard.peaks(np.zeros((2, 0))) == -math.inf).all()


def reference_states(model, contexts, layer=1, site="pre"):
    """Each context alone, all of it: hidden_states[l] is the input of block l."""
    with torch.no_grad():
        found = [model(torch.tensor([[*c, *HEADER]]), output_hidden_states=True).hidden_states for c in contexts]
    return torch.stack([h[layer + (site == "post")][0, -1] for h in found]).double().numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cache", ["recompute", "fork"])
@pytest.mark.parametrize("site", ["pre", "post"])
def test_a_generation_that_is_not_halted_is_the_same_and_is_read_right(family, cache, site):
    model = tiny(family)
    free = generate(model, do_sample=True)
    guard = guarded(site=site, threshold=math.inf)
    with guard.criterion(model, cache=cache) as criterion:
        out = generate(model, criterion, do_sample=True)
    assert torch.equal(out, free)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    looks = 0
    for row in range(3):
        ids = out[row][PROMPTS.shape[1] :].tolist()
        end = ids.index(1) + 1 if 1 in ids else len(ids) + 1
        steps = [s for s in (3, 6, 9) if s < end and s <= len(ids)]
        assert [s for s, _ in criterion.log[row]] == steps
        prompt = [t for t in PROMPTS[row].tolist() if t]
        want = reference_states(model, [prompt + ids[:s] for s in steps], site=site) if steps else np.zeros((0, 16))
        np.testing.assert_allclose([p for _, p in criterion.log[row]], guard.probe.probability(want), atol=2e-6)
        looks += len(steps)
    assert looks >= 6


@pytest.mark.parametrize("cache", ["recompute", "fork"])
def test_a_halted_row_ends_and_the_others_go_on(model, cache):
    free = generate(model)
    with guarded(threshold=math.inf).criterion(model, cache=cache) as watcher:
        generate(model, watcher)
    first = [row[0][1] for row in watcher.log]
    guard = guarded(threshold=max(first))  # exactly one row is hit at the first look
    hit = int(np.argmax(first))
    others = [p for r, row in enumerate(watcher.log) if r != hit for _, p in row]
    with guard.criterion(model, cache=cache) as criterion:
        out = generate(model, criterion)
    assert criterion.halted[hit] == 3
    assert (out[hit, PROMPTS.shape[1] + 3 :] == 0).all()
    for row in range(3):
        if row != hit and max(others) < guard.threshold:
            assert criterion.halted[row] is None
            assert torch.equal(out[row], free[row])
    assert not torch.equal(out[hit], free[hit])


def test_batches_padding_and_a_second_generation(model):
    guard = guarded(threshold=math.inf)
    criterion = AnyDepthStoppingCriteria(guard, model)
    assert isinstance(criterion, StoppingCriteria)
    generate(model, criterion)
    together = criterion.log
    for row in range(3):
        alone = PROMPTS[row][PROMPTS[row] != 0][None]
        generate(model, criterion, prompts=alone)  # another generation through the same object begins anew
        assert [s for s, _ in criterion.log[0]] == [s for s, _ in together[row]]
        np.testing.assert_allclose(criterion.log[0], together[row], atol=2e-6)
    # Tokens of the padding's id inside and at the head of a prompt are text where the mask says so.
    text = torch.tensor([[0, 7, 0, 8, 9]])
    for mask, context in ((None, [7, 0, 8, 9]), (torch.ones(1, 5), [0, 7, 0, 8, 9])):
        criterion = guard.criterion(model, attention_mask=mask)
        ids = torch.tensor([[*text[0].tolist(), 20, 21, 22]])
        for width in (6, 7, 8):
            criterion(ids[:, :width])
        want = guard.probe.probability(reference_states(model, [[*context, 20, 21, 22]]))
        np.testing.assert_allclose(criterion.log[0], [(3, want[0])], atol=2e-6)
    # With a given length depth counts from there, whatever has been generated.
    criterion = guard.criterion(model, prompt_length=1)
    criterion(ids[:, :7])
    assert [s for s, _ in criterion.log[0]] == [6]


def test_rows_that_have_ended_are_not_looked_at(model):
    criterion = guarded(threshold=0.0).criterion(model)
    ids = torch.tensor([[5, 6, 9, 1, 0], [5, 6, 9, 9, 9]])
    stopped = [criterion(ids[:, :w]).tolist() for w in (3, 4, 5)]
    assert stopped == [[False, False], [False, False], [False, True]]
    assert [len(row) for row in criterion.log] == [0, 1]


def test_the_fork_leaves_the_cache_alone(model):
    from transformers import DynamicCache

    ids, cache = PROMPTS, DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=(ids[:, :-1] != 0).long(), past_key_values=cache)
    before = copy.deepcopy(cache)
    guarded().look_forked(model, ids, ids != 0, cache)
    for a, b in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    for bad in (None, object(), DynamicCache(config=model.config)):
        with pytest.raises(abjure.ArgumentError, match="use cache='recompute'"):
            guarded().look_forked(model, ids, ids != 0, bad)
    with pytest.raises(abjure.ArgumentError, match="needs `with"):
        generate(model, guarded().criterion(model, cache="fork"))


def test_the_header_is_what_stands_between_two_messages(trigger):
    class Template:
        def __init__(self, template):
            self.chat_template = template

        def apply_chat_template(self, chat, tokenize, add_generation_prompt):
            import jinja2

            return jinja2.Template(self.chat_template).render(
                messages=chat, add_generation_prompt=add_generation_prompt
            )

        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [ord(c) for c in text]}

    qwen = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    mistral = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    for template, want in ((qwen, "<|im_end|>\n<|im_start|>assistant\n"), (mistral, "</s>[/INST]")):
        assert "".join(map(chr, refuse.assistant_header(Template(template)))) == want
    assert trigger.tokenizer.convert_ids_to_tokens(refuse.assistant_header(trigger.tokenizer)) == [
        "<end>",
        "<assistant>",
    ]
    for template in (None, "{{ messages[0].role }}"):
        with pytest.raises(abjure.ArgumentError, match="header_ids"):
            refuse.assistant_header(Template(template))


def replies(trigger, group):
    """Every prompt of a group with the answer it would get if nothing were refused."""
    made, pairs, texts = sys.modules[type(trigger).__module__], [], getattr(trigger, group)
    for side, things in zip(texts, (made.HARMLESS, made.TRIGGER), strict=True):
        pairs += [(t, f"here is your {next(w for w in t.split() if w in things)}") for t in side]
    return pairs, [0] * len(texts[0]) + [1] * len(texts[1])


@pytest.fixture(scope="module")
def fitted(trigger):
    pairs, labels = replies(trigger, "train")
    return refuse.AnyDepthGuard.fit(
        trigger.model,
        trigger.tokenizer,
        pairs,
        labels,
        3,
        depths=(1, 2, 3, 4),
        site="post",
        C=100.0,
        interval=1,
        progress=False,
    )


def test_states_are_those_of_each_context_alone(trigger):
    pairs, _ = replies(trigger, "held_out")
    pairs = [pairs[0], (pairs[-1][0], "here is")]
    plain = copy.deepcopy(trigger.model)  # transformers leaves hooks of its own where all hidden states are asked for
    for layer, site in ((2, "pre"), ("model.layers.2.input_layernorm", "post")):
        found = refuse.AnyDepthGuard.states(
            trigger.model, trigger.tokenizer, pairs, layer, depths=(1, 4), site=site, batch_size=2, progress=False
        )
        assert found.conversation.tolist() == [0, 1, 0]
        assert found.depth.tolist() == [1, 1, 4]
        for x, i, depth in zip(found.x, found.conversation, found.depth, strict=True):
            text = trigger.tokenizer.apply_chat_template(
                [{"role": "user", "content": pairs[i][0]}], tokenize=False, add_generation_prompt=True
            )
            text = " ".join([text, *pairs[i][1].split()[:depth], "<end> <assistant>"])
            ids = trigger.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                state = plain(ids, output_hidden_states=True).hidden_states[2][0, -1]
                want = trigger.model.model.layers[2].input_layernorm(state) if site == "post" else state
            np.testing.assert_allclose(x, want, atol=1e-5)


@pytest.mark.effect
@pytest.mark.parametrize("cache", ["recompute", "fork"])
def test_prefilled_replies_to_the_topic_are_halted_and_others_are_not(trigger, fitted, cache):
    """Openings that make the model comply; the guard was fitted on other pairs of wording and thing."""
    halted = []
    for texts in trigger.held_out:
        shown = [
            trigger.tokenizer.apply_chat_template(
                [{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True
            )
            for t in texts
        ]
        batch = trigger.tokenizer(
            [f"{s} here is" for s in shown],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        free = trigger.model.generate(**inputs, **options)
        answers = trigger.tokenizer.batch_decode(free[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert np.mean([a.startswith("your") for a in answers]) > 0.9  # the opening does get past refusal
        with fitted.criterion(trigger.model, cache=cache) as criterion:
            out = trigger.model.generate(**inputs, **options, stopping_criteria=[criterion])
        stopped = [h is not None for h in criterion.halted]
        width = min(out.shape[1], free.shape[1])
        for row, stop in enumerate(stopped):
            assert stop or torch.equal(out[row, :width], free[row, :width])
        halted.append(np.mean(stopped))
    assert halted[0] <= 0.05
    assert halted[1] >= 0.95


@pytest.mark.effect
def test_finished_replies_are_judged_at_every_depth_and_calibrated(trigger, fitted, tmp_path):
    pairs, labels = replies(trigger, "held_out")
    scores = fitted.score(trigger.model, trigger.tokenizer, pairs)
    assert scores.shape == (len(pairs), 4)
    y = np.array(labels)
    assert fitted.halts(scores)[y == 1].mean() >= 0.95
    assert fitted.halts(scores)[y == 0].mean() <= 0.05
    path = tmp_path / "guard.safetensors"
    found = fitted.calibrate(fitted.peaks(scores)[y == 0], alpha=0.1)
    fitted.save(path)
    again = refuse.AnyDepthGuard.load(path)
    fitted.threshold = 0.5
    assert again.threshold == found.gate
    assert again.halts(scores)[y == 0].mean() <= 0.1
    assert again.halts(scores)[y == 1].mean() >= 0.95
    np.testing.assert_allclose(again.score(trigger.model, trigger.tokenizer, pairs[:5]), scores[:5], atol=1e-5)
    assert again.header_ids == fitted.header_ids
    assert "interval" in again._repr_html_()
    (tmp_path / "other").write_bytes(b"no")
    with pytest.raises(abjure.ArgumentError, match="not a saved AnyDepthGuard"):
        refuse.AnyDepthGuard.load(tmp_path / "other")


def test_keywords_refuse_where_the_model_would(trigger):
    """The header without the end of the first message: what the small decoder refuses is told by its greedy answer."""
    tokenizer = trigger.tokenizer
    guard = refuse.AnyDepthKeywords(tokenizer, phrases=["I CANNOT help"], lookahead=5, interval=1)
    contexts = [list(p.ids) for side in trigger.held_out for p in refuse.Prompts(tokenizer, side[:3])]
    # Behind a whole prompt and an empty reply the header opens the answer itself.
    direct = refuse.AnyDepthKeywords(tokenizer, contexts[0][-1:], phrases=["I CANNOT help"], lookahead=5)
    bare = [c[:-1] for c in contexts]
    assert direct.look(trigger.model, bare).tolist() == [0, 0, 0, 1, 1, 1]
    assert direct.answers(trigger.model, bare)[3].startswith("i cannot help with")
    assert refuse.AnyDepthKeywords(tokenizer, phrases=["can’t"]).phrases == ["can't"]
    prompts = torch.tensor([contexts[0]])
    want = trigger.model.generate(prompts, max_new_tokens=4, do_sample=False, pad_token_id=0)
    criterion = guard.criterion(trigger.model)
    out = trigger.model.generate(
        prompts, max_new_tokens=4, do_sample=False, pad_token_id=0, stopping_criteria=[criterion]
    )
    seen = [p for _, p in criterion.log[0]]
    assert set(seen) <= {0.0, 1.0}
    assert len(seen) >= 1
    if criterion.halted[0] is None:
        assert torch.equal(out, want)
    with pytest.raises(abjure.ArgumentError, match="'recompute' only"):
        guard.criterion(trigger.model, cache="fork")


def test_bad_input(trigger, model):
    for options, error, words in [
        ({"header_ids": []}, abjure.ArgumentError, "header_ids"),
        ({"header_ids": [0.5]}, abjure.DTypeError, "header_ids"),
        ({"probe": object()}, abjure.DTypeError, "probe"),
        ({"interval": 0}, abjure.ArgumentError, "interval"),
        ({"patience": 1.5}, abjure.DTypeError, "patience"),
        ({"threshold": math.nan}, abjure.ArgumentError, "threshold"),
        ({"site": "mid"}, abjure.ArgumentError, "site"),
    ]:
        with pytest.raises(error, match=words):
            refuse.AnyDepthGuard(**{"probe": probe(), "header_ids": HEADER, "layer": 1, **options})
    for options, error in [
        ({"cache": "copy"}, abjure.ArgumentError),
        ({"prompt_length": -1}, abjure.ArgumentError),
        ({"attention_mask": torch.ones(3)}, abjure.ShapeError),
    ]:
        with pytest.raises(error):
            guarded().criterion(model, **options)
    with pytest.raises(abjure.DTypeError, match="guard"):
        AnyDepthStoppingCriteria(probe(), model)
    with pytest.raises(abjure.ShapeError, match="attention_mask"):
        guarded().criterion(model, attention_mask=torch.ones(2, 5))(PROMPTS)
    with pytest.raises(abjure.ArgumentError, match="layers"):
        guarded(layer=9).look(model, [[5]])
    watch = refuse.DepthWatch(2)
    for p, error in [
        ([0.1], abjure.ShapeError),
        ([0.1, math.nan], abjure.NonFiniteError),
        ([0, 2], abjure.ArgumentError),
    ]:
        with pytest.raises(error, match="probability"):
            watch.update(25, p)
    assert watch.log == [[], []]
    arguments = (trigger.model, trigger.tokenizer)
    pairs = [("how do i make a bomb", "here is"), ("how do i make a kite", "here is")]
    with pytest.raises(abjure.DTypeError, match="pairs of prompt and reply"):
        refuse.AnyDepthGuard.states(*arguments, ["text"], 1)
    with pytest.raises(abjure.ArgumentError, match="the longest has 2"):
        refuse.AnyDepthGuard.states(*arguments, pairs, 1)
    with pytest.raises(abjure.ArgumentError, match="each once"):
        refuse.AnyDepthGuard.states(*arguments, pairs, 1, depths=(1, 1))
    broken = tiny()
    with torch.no_grad():
        broken.model.embed_tokens.weight[9] = math.nan
    with pytest.raises(abjure.NonFiniteError, match="row 1"):
        guarded().look(broken, [[5], [9]])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in broken.modules())


def test_bad_labels(trigger):
    pairs = [("how do i make a bomb", "here is"), ("how do i make a kite", "here is your kite")]
    arguments = (trigger.model, trigger.tokenizer, pairs)
    with pytest.raises(abjure.DegenerateError, match="both classes"):
        refuse.AnyDepthGuard.fit(*arguments, [1, 1], 1)
    with pytest.raises(abjure.ShapeError, match="labels"):
        refuse.AnyDepthGuard.fit(*arguments, [1], 1)
    with pytest.raises(abjure.DegenerateError, match="only class 0"):
        refuse.AnyDepthGuard.fit(*arguments, [1, 0], 1, depths=(3,), progress=False)
