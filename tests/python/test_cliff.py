"""The refusal cliff: curves of a probe by token, where they fall, which heads do it, and ranking by it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import abjure
from abjure import refuse
from abjure.refuse.architectures import text_config

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = {**IDS, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
GROUPED = {**BASE, "num_key_value_heads": 2}
MODELS = {
    "llama": ("Llama", {**GROUPED, "attention_bias": True}),
    "llama, wide heads": ("Llama", {**GROUPED, "head_dim": 16}),
    "gpt2": ("GPT2", {"vocab_size": 40, "n_embd": 32, "n_head": 4, "n_layer": 2, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt2, square": (
        "GPT2",
        {"vocab_size": 40, "n_embd": 32, "n_head": 2, "n_layer": 3, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8}),
    "gpt_neox": ("GPTNeoX", BASE),
    "qwen3_next": (
        "Qwen3Next",
        {
            **GROUPED,
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}
TEXTS = ["w3 w5", "w1 w2 w3 w4 w5 w6 w7", "w9 w8 w7 w6", "w11 w12 w13 w14 w15", "w20 w21 w22"]
PUBLISHED = [0.2, 0.9, 0.95, 0.93, 0.91, 0.9, 0.3]


def word_tokenizer():
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(37))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


@pytest.fixture(scope="module")
def prompts():
    return refuse.Prompts(word_tokenizer(), TEXTS, template=False)


def build(name):
    """Every vector parameter random: zero biases and unit gains would hide mistakes."""
    prefix, config = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, f"{prefix}Config")(**config)
    model = AutoModelForCausalLM.from_config(made, experts_implementation="eager").eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 1 and not key.endswith(("A_log", "dt_bias")):
                p.copy_(torch.randn_like(p) * 0.3 + (1.0 if "norm" in key and key.endswith("weight") else 0.0))
    return model.double()


class Probe:
    def __init__(self, coef, intercept=0.0, layer=0, site="pre"):
        self.coef, self.intercept, self.layer, self.site = np.asarray(coef, float), intercept, layer, site

    def probability(self, x):
        return 1 / (1 + np.exp(-(np.asarray(x, float) @ self.coef + self.intercept)))


def vector(width=32, seed=0):
    return np.random.default_rng(seed).standard_normal(width)


def test_published_scores():
    assert refuse.cliff_score(PUBLISHED) == pytest.approx(0.65, abs=1e-15)
    assert refuse.cliff_score(PUBLISHED, plateau="median_top_decile") == pytest.approx(0.65, abs=1e-15)
    assert refuse.cliff_score(PUBLISHED, plateau=(1, 4), final=2) == pytest.approx(2.78 / 3 - 0.6)
    assert refuse.cliff_score(PUBLISHED, plateau=(-6, -1)) == pytest.approx(4.59 / 5 - 0.3)
    z, w = [1, -1, 0.5, 2], np.arange(1, 13).reshape(3, 4) / 4
    found = refuse.head_contributions(z, w, [0.6, 0, 0.8], 2)
    np.testing.assert_allclose(found, [-0.35, 7.325], atol=1e-14)
    np.testing.assert_allclose(refuse.head_contributions(z, w.T, [6, 0, 8], 2, axis=1), found, atol=1e-14)
    assert refuse.head_contributions([z, z], w, Probe([0.6, 0, 0.8]), 4).shape == (2, 4)


def test_the_top_decile_is_not_set_by_an_outlier():
    curve = np.r_[np.full(20, 0.5), 0.99, np.full(18, 0.5), 0.1]
    assert refuse.cliff_score(curve) == pytest.approx(0.89)
    assert refuse.cliff_score(curve, plateau="median_top_decile") == pytest.approx(0.4)


def test_ragged_and_masked_curves_are_the_same():
    rng = np.random.default_rng(0)
    curves = [rng.random(n) for n in (2, 7, 31, 12)]
    want = [refuse.cliff_score(c, "median_top_decile") for c in curves]
    np.testing.assert_array_equal(refuse.cliff_score(curves, "median_top_decile"), want)
    for side in ("left", "right"):
        table, mask = np.full((4, 31), np.nan), np.zeros((4, 31), bool)
        for i, c in enumerate(curves):
            at = slice(31 - len(c), None) if side == "left" else slice(len(c))
            table[i, at], mask[i, at] = c, True
        np.testing.assert_array_equal(refuse.cliff_score(table, "median_top_decile", mask=mask), want)
        torch_forms = torch.from_numpy(table), torch.from_numpy(mask)
        np.testing.assert_array_equal(
            refuse.cliff_score(torch_forms[0], "median_top_decile", mask=torch_forms[1]), want
        )


def test_a_synthetic_cliff_is_found_where_it_was_put():
    for length, begin, tail in ((30, 20, 10), (12, 10, 2), (200, 150, 50)):
        curve = np.r_[np.full(begin, 0.9), np.linspace(0.9, 0.1, tail + 1)[1:]]
        assert curve.size == length
        found = refuse.Cliff.from_curves([curve], tolerance=0.0)
        assert (found.depth[0], found.start[0]) == (pytest.approx(0.8), begin - 1)
        assert found.start_from_end[0] == begin - 1 - length
        loose = refuse.Cliff.from_curves([curve], tolerance=0.5)
        assert loose.start[0] == begin - 1 + tail // 2
    # A dip inside the plateau is no beginning of the fall.
    dip = np.r_[[0.9] * 5, 0.3, [0.9] * 6, 0.2, 0.1]
    assert refuse.Cliff.from_curves([dip]).start[0] == 11
    for flat in ([0.4] * 5, [0.1, 0.2, 0.3]):
        assert refuse.Cliff.from_curves([flat]).start[0] == len(flat) - 1
    rising = refuse.Cliff.from_curves([[0.1, 0.2, 0.9]], plateau=(0, 2))
    assert rising.depth[0] == pytest.approx(-0.75)
    assert rising.start[0] == 2


def test_mean_curves_count_and_never_pad():
    curves = [np.full(4, 1.0), np.full(10, 0.5), np.linspace(0, 1, 7)]
    found = refuse.Cliff.from_curves(curves)
    right = found.mean_curve()
    assert right.position.tolist() == list(range(-10, 0))
    assert right.count.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert right.mean[:3].tolist() == [0.5] * 3  # padding with zeros would give a sixth
    last = [1.0, 0.5, 1.0]
    assert right.mean[-1] == pytest.approx(np.mean(last))
    assert right.standard_error[-1] == pytest.approx(np.std(last, ddof=1) / np.sqrt(3))
    assert np.isnan(right.standard_error[:3]).all()
    left = found.mean_curve("left")
    assert left.count.tolist() == right.count.tolist()[::-1]
    relative = found.mean_curve("relative", points=5)
    np.testing.assert_allclose(relative.mean, [(1.5 + t) / 3 for t in (0, 0.25, 0.5, 0.75, 1)])
    assert (relative.count == 3).all()
    for axis in ("right", "left", "relative"):
        assert found.plot(align=axis).get_ylabel() == "refusal score"
    assert "standard error" in found._repr_html_()
    assert repr(found).startswith("Cliff(prompts=3, plateau=0.8333")
    for kwargs in ({"align": "centre"}, {"points": 1}):
        with pytest.raises(abjure.ArgumentError):
            found.mean_curve(**kwargs)


@pytest.mark.parametrize("site", ["pre", "post"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_single_prompts(prompts, site, batch_size):
    model, probe = build("llama"), Probe(vector(), 0.3, layer=1, site=site)
    got = refuse.refusal_scores_by_position(model, prompts, probe, batch_size=batch_size)
    along = refuse.refusal_scores_by_position(
        model, prompts, refuse.Direction(vector(), layer=1, site=site), batch_size=batch_size
    )
    assert [len(c) for c in got] == [len(t.split()) for t in TEXTS]
    for i, prompt in enumerate(prompts):
        with torch.no_grad(), refuse.recording(model, [1], site=site) as record:
            model(torch.tensor([prompt.ids]))
        states = record[1][0].numpy()
        np.testing.assert_allclose(got[i], probe.probability(states), atol=1e-12)
        np.testing.assert_allclose(along[i], states @ vector() / np.linalg.norm(vector()), atol=1e-12)


def test_reasoning_that_falls_where_its_words_say_so():
    """At the input of the first block the stream is the embedding, so the curve is known exactly."""
    tokenizer, model = word_tokenizer(), build("llama")
    levels = {"w10": 0.9, "w11": 0.9, "w12": 0.5, "w13": 0.1, "w1": 0.2, "w2": 0.2}
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        for word, p in levels.items():
            table[tokenizer.convert_tokens_to_ids(word), 0] = np.log(p / (1 - p))
    probe = Probe(np.eye(32)[0])
    reasoning = [" w10 w11 w10 w10 w12 w13", " w1 w1 w10 w11 w13 w13 w13"]
    prompts = refuse.Prompts(tokenizer, ["w1 w2 w10", "w2"], template=False, opening=reasoning)
    found = refuse.refusal_cliff(model, prompts, probe, span="post_instruction")
    np.testing.assert_allclose(found.curves[0], [0.9, 0.9, 0.9, 0.9, 0.5, 0.1], atol=1e-12)
    np.testing.assert_allclose(found.depth, [0.8, 0.8], atol=1e-12)
    assert found.start.tolist() == [3, 3]
    assert found.offset.tolist() == [3, 1]
    whole = refuse.refusal_cliff(model, prompts, probe)
    assert (whole.start - found.offset).tolist() == [3, 3]
    np.testing.assert_allclose(whole.curves[0][:3], [0.2, 0.2, 0.9], atol=1e-12)
    ranked = refuse.rank_by_cliff(model, prompts, probe, span="post_instruction", final=2)
    np.testing.assert_allclose(ranked.scores, [0.6, 0.8], atol=1e-12)
    assert ranked.order.tolist() == [1, 0]
    with pytest.raises(abjure.ShapeError, match="one per text"):
        refuse.Prompts(tokenizer, ["w1", "w2"], template=False, opening=[" w3"])
    with pytest.raises(abjure.DTypeError, match="opening"):
        refuse.Prompts(tokenizer, ["w1"], template=False, opening=[None])
    with pytest.raises(abjure.ShapeError, match="too few in prompt 0"):
        refuse.refusal_cliff(
            model, refuse.Prompts(tokenizer, ["w1"], template=False, opening=" w3"), probe, span="post_instruction"
        )


def test_ranking():
    # drops .5, .7, .5, .1; finals .4, .2, .1, .1
    curves = [[0.9, 0.4], [0.9, 0.3, 0.2], [0.6, 0.1], [0.2, 0.1]]
    drop, final = refuse.rank_by_cliff(curves), refuse.rank_by_cliff(curves, by="final")
    assert drop.order.tolist() == [1, 0, 2, 3]
    assert final.order.tolist() == [2, 3, 1, 0]
    assert drop.select().tolist() == [1]
    assert drop.select(0.5).tolist() == [1, 0]
    assert drop.select(0.51).tolist() == [1, 0, 2]
    assert drop.select(1).tolist() == [1, 0, 2, 3]
    among = refuse.rank_by_cliff(refuse.Cliff.from_curves(curves), among=[1, 0, 1, 1])
    assert among.order.tolist() == [0, 2, 3]
    ties = refuse.rank_by_cliff([[0.5, 0.25]] * 100, by="drop")
    assert ties.order.tolist() == list(range(100))
    assert len(ties.select(0.07)) == 7  # 0.07 · 100 is above 7 in floating point
    assert "100 examples by drop" in ties._repr_html_()
    for error, call in [
        (abjure.ArgumentError, lambda: refuse.rank_by_cliff(curves, by="depth")),
        (abjure.ArgumentError, lambda: refuse.rank_by_cliff(curves, probe=Probe([1.0]))),
        (abjure.ArgumentError, lambda: refuse.rank_by_cliff(curves, among=[0, 0, 0, 0])),
        (abjure.ShapeError, lambda: refuse.rank_by_cliff(curves, among=[1])),
        (abjure.DTypeError, lambda: refuse.rank_by_cliff(curves, among=[1, 2, 0, 1])),
        (abjure.ArgumentError, lambda: refuse.rank_by_cliff(refuse.Cliff.from_curves(curves), final=1)),
        (abjure.ArgumentError, lambda: drop.select(0.0)),
        (abjure.ArgumentError, lambda: drop.select(1.5)),
    ]:
        with pytest.raises(error):
            call()


@pytest.mark.parametrize(
    ("p", "kwargs", "error", "words"),
    [
        ([], {}, abjure.ShapeError, "two tokens"),
        ([0.5], {}, abjure.ShapeError, "two tokens"),
        ([[0.5, 0.2], [0.1]], {}, abjure.ShapeError, r"p\[1\]: expected at least two tokens"),
        ([[0.5, 0.2], []], {}, abjure.ShapeError, r"p\[1\]"),
        ([0.5, np.nan, 0.1], {}, abjure.NonFiniteError, "token 1"),
        ([[0.5, 0.1], [np.inf, 0.1]], {}, abjure.NonFiniteError, r"p\[1\].*token 0"),
        (np.zeros((2, 3, 4)), {}, abjure.ShapeError, "list of curves"),
        (np.zeros((0, 4)), {}, abjure.ShapeError, "at least one curve"),
        (np.zeros((2, 3)), {"mask": np.ones((2, 2), bool)}, abjure.ShapeError, "mask"),
        (np.zeros((1, 3)), {"mask": [[0, 0, 1]]}, abjure.ShapeError, "two tokens"),
        (PUBLISHED, {"plateau": "mean"}, abjure.ArgumentError, "plateau"),
        (PUBLISHED, {"plateau": (9, 12)}, abjure.ArgumentError, "plateau"),
        (PUBLISHED, {"final": 7}, abjure.ArgumentError, "final"),
        (PUBLISHED, {"final": 0}, abjure.ArgumentError, "final"),
        (PUBLISHED, {"final": "first"}, abjure.ArgumentError, "final"),
    ],
)
def test_bad_curves(p, kwargs, error, words):
    with pytest.raises(error, match=words):
        refuse.cliff_score(p, **kwargs)
    with pytest.raises(error, match=words):
        refuse.Cliff.from_curves(p, **kwargs)


def test_bad_probes(prompts):
    model = build("llama")

    class Broken(Probe):
        def probability(self, x):
            return np.full(len(x), np.nan)

    class Wide(Probe):
        def probability(self, x):
            return np.zeros((len(x), 2))

    for probe, kwargs, error, words in [
        (Probe(np.ones(31)), {}, abjure.ShapeError, "hidden size"),
        (np.ones(32), {}, abjure.ArgumentError, "layer"),
        (np.ones((2, 32)), {"layer": 0}, abjure.ShapeError, "probe"),
        (np.zeros(32), {"layer": 0}, abjure.DegenerateError, "q"),
        (Probe(np.ones(32)), {"layer": 7}, abjure.ArgumentError, "layers"),
        (Probe(np.ones(32)), {"site": "norm"}, abjure.ArgumentError, "site"),
        (Broken(np.ones(32)), {}, abjure.NonFiniteError, "prompt"),
        (Wide(np.ones(32)), {}, abjure.ShapeError, "probability"),
        (Probe(np.ones(32)), {"tolerance": 1.0}, abjure.ArgumentError, "tolerance"),
        (Probe(np.ones(32)), {"span": "prompt"}, abjure.ArgumentError, "span"),
    ]:
        with pytest.raises(error, match=words):
            refuse.refusal_cliff(model, prompts, probe, **kwargs)
    with pytest.raises(abjure.DTypeError, match="prompts"):
        refuse.refusal_cliff(model, TEXTS, Probe(np.ones(32)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def attention_outputs(model, ids):
    """What the attention of every block adds to the stream (before a common factor), by layer: ``(tokens, d)``."""
    found, handles = {}, []
    layers = refuse.decoder_blocks(model)[1]
    for i, block in enumerate(layers):
        norm = getattr(block, "post_attention_layernorm", None) if text_config(model).model_type == "gemma2" else None
        branch = norm
        if branch is None:
            branch = next(
                m for n in ("self_attn", "attn", "attention", "linear_attn") if (m := getattr(block, n, None))
            )
        handles.append(
            branch.register_forward_hook(
                lambda m, a, out, i=i: found.__setitem__(i, (out[0] if isinstance(out, tuple) else out)[0])
            )
        )
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {i: out.reshape(-1, out.shape[-1]).double().numpy() for i, out in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_bias_sum_to_the_attention_output(prompts, name):
    model, w = build(name), vector()
    unit = w / np.linalg.norm(w)
    last = refuse.attribute_heads(model, prompts, refuse.Direction(w), batch_size=2)
    every = refuse.attribute_heads(model, prompts, Probe(w), position="all", batch_size=3)
    assert last.layers == ([1] if name == "qwen3_next" else list(range(text_config(model).num_hidden_layers)))
    assert last.mean.shape == (len(last.layers), text_config(model).num_attention_heads)
    # The norm behind a branch computes in float32 whatever the model's dtype.
    tolerance = 1e-6 if name == "gemma2" else 1e-12
    for i, prompt in enumerate(prompts):
        out = attention_outputs(model, prompt.ids)
        for row, layer in enumerate(last.layers):
            along = out[layer] @ unit
            scale = np.linalg.norm(out[layer], axis=-1).max()
            for got, want in ((last, along[-1]), (every, along.mean())):
                total = got.contributions[i, row].sum() + got.bias[i, row]
                assert total == pytest.approx(want, abs=tolerance * scale)
    assert np.abs(last.contributions).max() > 1e-3
    if name in ("llama", "gpt2", "gpt_neox"):
        assert np.abs(last.bias).min() > 1e-3
    assert last.standard_error[0, 0] == pytest.approx(last.contributions[:, 0, 0].std(ddof=1) / np.sqrt(len(prompts)))


def test_a_head_contributes_what_the_model_loses_without_it(prompts):
    """By the model itself: the attention output with the head ablated, on Conv1D weights, whose axes are swapped."""
    model, w = build("gpt2"), vector()
    unit = w / np.linalg.norm(w)
    found = refuse.attribute_heads(model, prompts, w)
    for head in range(4):
        plain = attention_outputs(model, prompts[1].ids)[1][-1]
        with refuse.ablating_heads(model, [(1, head)]):
            without = attention_outputs(model, prompts[1].ids)[1][-1]
        assert found.contributions[1, 1, head] == pytest.approx((plain - without) @ unit, abs=1e-12)


def test_the_table_of_heads(prompts):
    model = build("llama")
    found = refuse.attribute_heads(model, prompts, vector(), layers=[-1])
    whole = refuse.attribute_heads(model, prompts, vector())
    assert found.layers == [1]
    np.testing.assert_array_equal(found.contributions, whole.contributions[:, 1:])
    rows = whole.rows()
    assert [(r.layer, r.head) for r in rows] == [(i, j) for i in range(2) for j in range(4)]
    order = sorted(rows, key=lambda r: r.mean)
    assert whole.lowest(0.25) == [(r.layer, r.head) for r in order[:2]]
    assert whole.highest(0.25) == [(r.layer, r.head) for r in order[:-3:-1]]
    assert len(whole.lowest()) == 1
    assert len(str(whole).splitlines()) == 9
    assert "± standard error" in whole._repr_html_()
    assert whole.plot().get_xlabel() == "head"
    for n, share, want in ((1024, 0.03, 31), (1920, 0.03, 58)):
        many = refuse.HeadAttribution(np.zeros((2, n // 32, 32)), np.zeros((2, n // 32)), list(range(n // 32)), "last")
        assert len(many.lowest(share)) == want
    assert len(str(many).splitlines()) == 22


@pytest.mark.parametrize("name", MODELS)
def test_ablating_heads_equals_zeroed_columns(name):
    model = build(name)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    count = text_config(model).num_attention_heads
    heads = [(1, 0), (1, count - 1), (-1, 0), (1, 0)]
    with torch.no_grad():
        plain = model(ids).logits
    for gamma in (0.0, 0.5, -1.0):
        edited = copy.deepcopy(model)
        for writer in refuse.residual_writers(edited, sorted({layer for layer, _ in heads})):
            if writer.component != "attention" or not writer.name.endswith("weight") or "linear_attn" in writer.name:
                continue
            depth = text_config(model).num_hidden_layers
            mine = {h for layer, h in heads if layer % depth == writer.layer}
            weight = writer.tensor if writer.axis == 0 else writer.tensor.T
            width = weight.shape[1] // count
            with torch.no_grad():
                for h in mine:
                    weight[:, h * width : (h + 1) * width] *= gamma
        with torch.no_grad(), refuse.ablating_heads(model, heads, gamma):
            got = model(ids).logits
        with torch.no_grad():
            want = edited(ids).logits
            again = model(ids).logits
        tolerance = 1e-6 if name == "gemma2" else 1e-10
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))
        assert (got - plain).abs().max() > 1e-4 * plain.abs().max()
        assert torch.equal(again, plain)


def test_the_published_ablation_keeps_the_norm_of_the_whole_tensor():
    model = build("llama")
    ids = torch.tensor([[3, 1, 4], [2, 6, 5]])
    seen = []
    projection = model.model.layers[1].self_attn.o_proj

    def run(**kwargs):
        with torch.no_grad(), refuse.ablating_heads(model, [(1, 2)], 0.1, **kwargs):
            handle = projection.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
            model(ids)
            handle.remove()

    handle = projection.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    run()
    run(compat="refusal_cliff")
    run(positions="last")
    before, plain, kept, last = seen
    want = before.clone()
    want[..., 16:24] *= 0.1
    torch.testing.assert_close(plain, want, rtol=0, atol=1e-15)
    torch.testing.assert_close(kept, want * before.norm() / want.norm(), rtol=1e-12, atol=0)
    assert float(kept.norm()) == pytest.approx(float(before.norm()), rel=1e-12)
    assert torch.equal(last[:, :-1], before[:, :-1])
    torch.testing.assert_close(last[:, -1], want[:, -1], rtol=0, atol=1e-15)


def test_heads_come_back_after_an_exception_and_bad_heads_are_listed(prompts):
    model = build("llama")
    with pytest.raises(KeyError), refuse.ablating_heads(model, [(0, 1)]):
        raise KeyError
    for heads, kwargs, error, words in [
        ([(2, 0)], {}, abjure.ArgumentError, r"layers \[0, 1\] and heads 0 to 3, got \(2, 0\)"),
        ([(0, 0), (1, 4)], {}, abjure.ArgumentError, r"heads 0 to 3, got \(1, 4\)"),
        ([(0, -1)], {}, abjure.ArgumentError, "heads 0 to 3"),
        ([(-3, 0)], {}, abjure.ArgumentError, "heads 0 to 3"),
        ([], {}, abjure.ArgumentError, "none"),
        ([3], {}, abjure.DTypeError, "pairs"),
        ([(0, 1, 2)], {}, abjure.DTypeError, "pairs"),
        ([(0, 1.5)], {}, abjure.DTypeError, "integers"),
        ([(0, 1)], {"gamma": np.nan}, abjure.ArgumentError, "gamma"),
        ([(0, 1)], {"compat": "other"}, abjure.ArgumentError, "compat"),
    ]:
        with pytest.raises(error, match=words), refuse.ablating_heads(model, heads, **kwargs):
            pass
    for kwargs, error, words in [
        ({"direction": np.ones(16)}, abjure.ShapeError, "hidden size"),
        ({"direction": np.zeros(32)}, abjure.DegenerateError, "q"),
        ({"direction": np.ones(32), "layers": [5]}, abjure.ArgumentError, "layers"),
        ({"direction": np.ones(32), "position": "first"}, abjure.ArgumentError, "positions"),
        ({"direction": np.ones(32), "batch_size": 0}, abjure.ArgumentError, "batch_size"),
    ]:
        with pytest.raises(error, match=words):
            refuse.attribute_heads(model, prompts, **kwargs)
    with pytest.raises(abjure.ShapeError, match="hidden size"):
        refuse.attribute_heads(build("gemma2"), prompts, np.ones(16))
    with pytest.raises(abjure.ArgumentError, match="got 0, which has none"):
        refuse.attribute_heads(build("qwen3_next"), prompts, np.ones(32), layers=[0])
    with (
        pytest.raises(abjure.ArgumentError, match=r"layers \[1\]"),
        refuse.ablating_heads(build("qwen3_next"), [(0, 0)]),
    ):
        pass
    broken = build("llama")
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight.fill_(torch.inf)
    with pytest.raises(abjure.NonFiniteError, match="layer 1: non-finite output of a head at prompt"):
        refuse.attribute_heads(broken, prompts, np.ones(32))
    for m in (model, broken):
        assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.modules())
    for args, error in [
        (([1, 2, 3], np.ones((3, 4)), np.ones(3), 2), abjure.ShapeError),
        (([1, 2, 3, 4], np.ones((3, 4)), np.ones(2), 2), abjure.ShapeError),
        (([1, 2, 3, 4], np.ones((3, 4)), np.ones(3), 3), abjure.ShapeError),
        (([1, 2, 3, 4], np.ones((3, 4)), np.ones(3), 0), abjure.ArgumentError),
    ]:
        with pytest.raises(error):
            refuse.head_contributions(*args)


@pytest.mark.effect
def test_heads_that_write_refusal_carry_it(trigger):
    """On the decoder that refuses a topic, its highest heads lower the log-odds of refusal more than random ones do.

    Contributions are direct: heads of the first block find the topic and matter through what is behind them, so the
    random sets are also drawn without them. This is a property of the model at hand: trained with seed 1 it refuses by
    its first block and MLPs, and no heads behind carry the answer, however much they write along the direction.
    """
    texts = trigger.train[0] + trigger.train[1]
    labels = [0] * len(trigger.train[0]) + [1] * len(trigger.train[1])
    train = refuse.Prompts(trigger.tokenizer, texts)
    recorded = refuse.record_prompts(trigger.model, train, labels, [3], "last", site="post")
    direction = recorded[3, -1].difference_in_means()
    refused = refuse.Prompts(trigger.tokenizer, trigger.train[1])
    highest = refuse.attribute_heads(trigger.model, refused, direction).highest(0.15)
    assert len(highest) == 3
    held = refuse.Prompts(trigger.tokenizer, trigger.held_out[1])

    def score(heads):
        with refuse.ablating_heads(trigger.model, heads):
            return refuse.refusal_scores(trigger.model, held, [trigger.refusal_token]).mean()

    def random_drop(first_layer):
        rng = np.random.default_rng(0)
        heads = [(layer, head) for layer in range(first_layer, 4) for head in range(4)]
        picks = [[heads[i] for i in rng.choice(len(heads), 3, replace=False)] for _ in range(20)]
        return base - np.mean([score(pick) for pick in picks])

    base = refuse.refusal_scores(trigger.model, held, [trigger.refusal_token]).mean()
    drop = base - score(highest)
    assert drop > 1.25 * random_drop(0)
    assert drop > 2 * random_drop(1)
