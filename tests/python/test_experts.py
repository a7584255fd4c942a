"""Expert tuning: exact counts and error bars; routers of real classes that choose otherwise, against plain forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import abjure
from abjure import refuse
from abjure.refuse import routing

pytestmark = pytest.mark.usefixtures("one_thread")

A, B = [[3, 1, 0, 4], [2, 2, 1, 3]], [[1, 1, 2, 4], [2, 0, 4, 2]]


def choices(counts):
    return np.repeat(np.arange(len(counts)), counts)[:, None]


def filled(weights=False, seed=0, prompts=9):
    """A tuner of random prompts, and the rates (layers, prompts, experts) that it should have seen."""
    rng = np.random.default_rng(seed)
    labels = np.arange(prompts) % 2
    tuner = refuse.ExpertTuner([1, 4], 6)
    rates, sums = np.zeros((2, prompts, 6)), np.zeros((2, prompts, 6))
    for p, label in enumerate(labels):
        tokens = int(rng.integers(1, 12))
        for i, layer in enumerate(tuner.layers):
            ids = np.argsort(rng.random((tokens, 6)))[:, :2]
            w = rng.random((tokens, 2)).astype(np.float32)
            tuner.update(ids, label, layer=layer, weights=w if weights else None)
            for e in range(6):
                rates[i, p, e] = (ids == e).sum() / tokens
                sums[i, p, e] = w.astype(float)[ids == e].sum() / tokens
    return tuner, labels, rates, sums


def test_the_rates_of_the_reference():
    tuner = refuse.ExpertTuner(2, 4)
    for layer in (0, 1):
        tuner.update(choices(A[layer]), 1, layer=layer)
        tuner.update(torch.from_numpy(choices(B[layer])), 0, layer=layer)
    assert tuner.relevance().tolist() == [[0.25, 0, -0.25, 0], [0, 0.25, -0.375, 0.125]]
    assert tuner.counts.tolist() == [B, A]
    assert tuner.prompts.tolist() == [[1, 1], [1, 1]]
    assert [r[:3] for r in tuner.rank(4)] == [(0, 0, 0.25), (1, 1, 0.25), (1, 3, 0.125), (0, 1, 0.0)]
    assert np.isnan(tuner.rank(1)[0].z)
    with pytest.raises(abjure.DegenerateError, match="2 prompts of class 0"):
        tuner.z()


def test_means_and_error_bars_are_those_over_prompts():
    for weights in (False, True):
        tuner, labels, counts, sums = filled(weights)
        for stat, rates in [("count", counts), *([("weight", sums)] if weights else [])]:
            one, zero = rates[:, labels == 1], rates[:, labels == 0]
            np.testing.assert_allclose(tuner.relevance(stat), one.mean(1) - zero.mean(1), atol=1e-14)
            np.testing.assert_allclose(tuner.rates(1, stat), one.mean(1), atol=1e-14)
            error = np.sqrt(one.var(1, ddof=1) / one.shape[1] + zero.var(1, ddof=1) / zero.shape[1])
            np.testing.assert_allclose(tuner.standard_error(stat), error, atol=1e-14)
            np.testing.assert_allclose(tuner.z(stat), (one.mean(1) - zero.mean(1)) / error, rtol=1e-10)
            ranked = tuner.rank(None, "z", stat=stat)
            assert [r.z for r in ranked] == sorted((r.z for r in ranked), reverse=True)
            assert len(ranked) == 12
            best = ranked[0]
            assert tuner.z(stat)[tuner.layers.index(best.layer), best.expert] == tuner.z(stat).max() == best.z


def test_merging_is_seeing_all_prompts():
    a, b = filled(True, seed=0)[0], filled(True, seed=1, prompts=4)[0]
    la, lb = filled(True, seed=0), filled(True, seed=1, prompts=4)
    labels = np.concatenate([la[1], lb[1]])
    rates = np.concatenate([la[3], lb[3]], axis=1)
    assert a.merge(b) is a
    one, zero = rates[:, labels == 1], rates[:, labels == 0]
    np.testing.assert_allclose(a.relevance("weight"), one.mean(1) - zero.mean(1), atol=1e-14)
    error = np.sqrt(one.var(1, ddof=1) / one.shape[1] + zero.var(1, ddof=1) / zero.shape[1])
    np.testing.assert_allclose(a.standard_error("weight"), error, atol=1e-14)
    fresh = refuse.ExpertTuner([1, 4], 6).merge(b)
    np.testing.assert_array_equal(fresh.z(), b.z())
    np.testing.assert_array_equal(fresh.counts, b.counts)
    for other, error in [
        (refuse.ExpertTuner([1, 3], 6), abjure.ArgumentError),
        (refuse.ExpertTuner([1, 4], 5), abjure.ArgumentError),
        (filled(False)[0], abjure.ArgumentError),
        (None, abjure.DTypeError),
    ]:
        with pytest.raises(error, match="other"):
            fresh.merge(other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_every_dtype_and_layout(dtype):
    ids = torch.tensor([[0, 2], [1, 2], [2, 0]])
    weights = torch.tensor([[0.3, 0.7], [0.4, 0.6], [0.9, 0.1]]).to(dtype)
    tuner = refuse.ExpertTuner([7], 3)
    tuner.update(ids.T.contiguous().T, 1, weights=weights.T.contiguous().T)
    w = weights.double().numpy()
    want = np.array([w[0, 0] + w[2, 1], w[1, 0], w[0, 1] + w[1, 1] + w[2, 0]]) / 3
    np.testing.assert_allclose(tuner.rates(1, "weight")[0], want, rtol=1e-15)
    assert tuner.rates(1)[0].tolist() == [2 / 3, 1 / 3, 1.0]


def test_bad_updates_add_nothing():
    tuner, *_ = filled(True)
    before = tuner.counts.copy(), tuner.relevance("weight"), tuner.prompts.copy()
    ids, w = np.array([[0, 1]]), np.array([[0.5, 0.5]])
    for args, kwargs, error in [
        (([[0, 6]], 1), {"layer": 1, "weights": w}, abjure.ArgumentError),
        (([[0, -1]], 1), {"layer": 1, "weights": w}, abjure.ArgumentError),
        (([[0, 0.5]], 1), {"layer": 1, "weights": w}, abjure.DTypeError),
        (([0, 1], 1), {"layer": 1, "weights": w}, abjure.ShapeError),
        ((np.zeros((0, 2)), 1), {"layer": 1, "weights": np.zeros((0, 2))}, abjure.ShapeError),
        ((ids, 2), {"layer": 1, "weights": w}, abjure.ArgumentError),
        ((ids, 1), {"layer": 2, "weights": w}, abjure.ArgumentError),
        ((ids, 1), {"weights": w}, abjure.ArgumentError),
        ((ids, 1), {"layer": 1}, abjure.ArgumentError),
        ((ids, 1), {"layer": 1, "weights": w[:, :1]}, abjure.ShapeError),
        ((ids, 1), {"layer": 1, "weights": w * np.nan}, abjure.NonFiniteError),
        ((ids, 1), {"layer": 1, "weights": w.astype(int)}, abjure.DTypeError),
    ]:
        with pytest.raises(error):
            tuner.update(*args, **kwargs)
    after = tuner.counts, tuner.relevance("weight"), tuner.prompts
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    for layers, experts in [([], 2), ([1, 1], 2), (0, 2), (2, 0), ([-1], 2)]:
        with pytest.raises(abjure.ArgumentError):
            refuse.ExpertTuner(layers, experts)
    for call in (lambda t: t.relevance("sum"), lambda t: t.rank(0), lambda t: t.rank(by="p"), lambda t: t.plot(by="p")):
        with pytest.raises(abjure.ArgumentError):
            call(tuner)
    with pytest.raises(abjure.ArgumentError, match="no weights"):
        filled(False)[0].relevance("weight")
    with pytest.raises(abjure.DegenerateError, match="class 1"):
        refuse.ExpertTuner(1, 2).update(ids, 0).relevance()


def test_equal_prompts_give_infinite_z_and_tables_show_it():
    tuner = refuse.ExpertTuner([3], 3)
    for label, ids in [(0, [[0, 1]]), (1, [[0, 2]])] * 2:
        tuner.update(ids, label)
    assert tuner.z().tolist() == [[0.0, -np.inf, np.inf]]
    assert tuner.rank(1, "z")[0].expert == 2
    assert "<td>+inf</td>" in tuner._repr_html_()
    assert repr(tuner) == "ExpertTuner(1 layers, 3 experts, prompts of class 0, 1: [2, 2])"
    assert "class 0, 1: [0, 0]" in refuse.ExpertTuner(1, 2)._repr_html_()
    for by in ("relevance", "z"):
        ax = tuner.plot(by=by)
        assert (ax.get_xlabel(), [t.get_text() for t in ax.get_yticklabels()]) == ("expert", ["3"])


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
GROUPS = {
    "moe_intermediate_size": 8,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "n_shared_experts": 1,
}
FAMILIES = {
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8, "norm_topk_prob": False},
    "flex_olmo": {"num_experts": 8, "norm_topk_prob": False},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "head_dim": 8,
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        **GROUPS,
    },
    "glm4_moe": {"n_routed_experts": 8, "first_k_dense_replace": 1, "head_dim": 8, **GROUPS},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 8},
}


def model_of(kind, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[kind], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for router in refuse.expert_routers(model).values():
            router.weight.normal_(0, 0.7)
            if hasattr(router, "e_score_correction_bias"):
                router.e_score_correction_bias.normal_(0, 0.2)
            if hasattr(router, "bias"):
                router.bias.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module", params=list(FAMILIES))
def moe(request):
    return model_of(request.param)


def chosen_by_hand(model, router, x, off, on, mode):
    """One token's {expert: weight} in float64: plain loops over experts, written from the papers' formulas."""
    kind, k = model.config.model_type, router.top_k
    logits = (x.double() @ router.weight.double().T + (router.bias.double() if kind == "gpt_oss" else 0)).tolist()
    count = len(logits)
    gone = set(off) if mode == "mask" else set()
    if kind in ("deepseek_v3", "glm4_moe"):
        raw = [1 / (1 + np.exp(-z)) for z in logits]
        score = [s + float(b) for s, b in zip(raw, router.e_score_correction_bias, strict=True)]
        score = [-np.inf if e in gone else s for e, s in enumerate(score)]
        size = count // router.num_group
        groups = [range(g * size, (g + 1) * size) for g in range(router.num_group)]

        def best(group):
            return np.inf if set(group) & set(on) else sum(sorted((score[e] for e in group), reverse=True)[:2])

        kept = sorted(groups, key=best, reverse=True)[: router.topk_group]
        open_to = [e for group in kept for e in group]
    else:
        raw = list(np.exp(logits) / np.exp(logits).sum())
        score, open_to = logits, list(range(count))
    order = sorted((e for e in open_to if e not in gone), key=lambda e: (e in on, score[e]), reverse=True)
    weights = {e: 0.0 if mode == "zero_slot" and e in off else raw[e] for e in order[:k]}
    total = sum(weights.values())
    if getattr(router, "norm_topk_prob", True) and total > 0:
        weights = {e: w / total for e, w in weights.items()}
    return {e: w * getattr(router, "routed_scaling_factor", 1.0) for e, w in weights.items()}


def block_by_hand(model, block, x, off, on, mode):
    """Output of a mixture-of-experts block for each token, from the experts run one by one."""
    router = getattr(block, "gate", None) or block.router
    out = []
    for token in x:
        total = torch.zeros_like(token)
        for e, w in chosen_by_hand(model, router, token, off, on, mode).items():
            one = block.experts(token[None], torch.tensor([[e]]), torch.ones(1, 1))
            total = total + w * one[0]
        out.append(total)
    found = torch.stack(out)
    if hasattr(block, "shared_experts"):
        found = found + block.shared_experts(x)
    if hasattr(block, "shared_expert"):
        found = found + torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    return found


def run_block(block, x):
    out = block(x[None])
    return (out[0] if isinstance(out, tuple) else out).reshape(x.shape)


@torch.no_grad()
def test_blocks_equal_their_experts_added_by_hand(moe):
    layer, router = list(refuse.expert_routers(moe).items())[-1]
    block = moe.model.layers[layer].mlp
    x = torch.randn(12, 16)
    plain = run_block(block, x)
    ids = router(x)[2]
    often = torch.bincount(ids.flatten(), minlength=8).argsort(descending=True).tolist()
    cases = [
        ([], often[-2:], "force"),
        (often[:1], [], "zero_slot"),
        (often[:3], [], "zero_slot"),
        (often, [], "zero_slot"),
        (often[:1], [], "mask"),
        (often[:2], often[-1:], "mask"),
        (often[:2], often[-1:], "zero_slot"),
    ]
    for off, on, mode in cases:
        with refuse.tuning_experts(moe, [(layer, e) for e in off], [(layer, e) for e in on], mode=mode):
            found, got = run_block(block, x), router(x)
        want = block_by_hand(moe, block, x, off, on, mode)
        torch.testing.assert_close(found, want, atol=2e-6, rtol=2e-5)
        assert not torch.equal(found, plain)
        assert all(bool((got[2] == e).any(-1).all()) for e in on)
        if mode == "mask":
            assert not np.isin(got[2].numpy(), off).any()
        assert got[1].dtype == router(x)[1].dtype
    torch.testing.assert_close(plain, block_by_hand(moe, block, x, [], [], "mask"), atol=2e-6, rtol=2e-5)
    assert torch.equal(run_block(block, x), plain)


@torch.no_grad()
def test_without_a_change_the_rule_is_the_router_bit_by_bit(moe):
    family = routing.FAMILIES[moe.config.model_type]
    for router in refuse.expert_routers(moe).values():
        logits, weights, ids = router(torch.randn(50, 16))
        got, chosen = routing.route(family, router, logits, routing._Change())
        assert torch.equal(chosen, ids)
        assert torch.equal(got.to(weights.dtype), weights)


@torch.no_grad()
def test_contexts_nest_and_everything_is_put_back(moe):
    tokens = torch.randint(1, 40, (2, 9))
    layers = list(refuse.expert_routers(moe))
    assert layers == ([1, 2] if moe.config.model_type in ("qwen3_moe", "deepseek_v3", "glm4_moe") else [0, 1, 2])
    layer = layers[-1]
    plain = moe(tokens).logits
    with refuse.tuning_experts(moe, [(layer, 0), (layer, 1)], mode="zero_slot"):
        both = moe(tokens).logits
    with refuse.tuning_experts(moe, [(layer, 0)]):
        one = moe(tokens).logits
        with refuse.tuning_experts(moe, [(layer, 1)]):
            torch.testing.assert_close(moe(tokens).logits, both)
        with pytest.raises(KeyError), refuse.tuning_experts(moe, [(layer, 3)], mode="mask"):
            raise KeyError
        assert torch.equal(moe(tokens).logits, one)
        with refuse.tuning_experts(moe, on=[(layer, 0)]):  # the inner one decides
            inside = moe(tokens).logits
    with refuse.tuning_experts(moe, on=[(layer, 0)]):
        assert torch.equal(moe(tokens).logits, inside)
    assert torch.equal(moe(tokens).logits, plain)
    assert not any(m._forward_hooks for m in moe.modules())


def test_bad_changes_are_refused_before_anything_is_hooked(moe):
    layers = list(refuse.expert_routers(moe))
    layer = layers[-1]
    every = [(layer, e) for e in range(8)]
    for kwargs, error, words in [
        ({"off": [(9, 0)]}, abjure.ArgumentError, rf"off: .*\[.*{layer}\]"),
        ({"on": [(layer, 8)]}, abjure.ArgumentError, "on: expected experts 0 to 7"),
        ({"off": [(layer, -1)]}, abjure.ArgumentError, "off: expected experts 0 to 7"),
        ({"off": [layer]}, abjure.DTypeError, "off: expected pairs"),
        ({"off": [(layer, 0.5)]}, abjure.DTypeError, "off: expected pairs"),
        ({"off": every[:2], "on": every[1:2]}, abjure.ArgumentError, "in both"),
        ({"on": every[:3]}, abjure.ArgumentError, "at most 2 experts"),
        ({"off": every[:7], "mode": "mask"}, abjure.ArgumentError, "at least 2 experts"),
        ({"off": every[:1], "mode": "force"}, abjure.ArgumentError, "mode"),
        ({"off": every[:1], "mode": "off"}, abjure.ArgumentError, "mode"),
        ({}, abjure.ArgumentError, "at least one expert"),
    ]:
        with pytest.raises(error, match=words), refuse.tuning_experts(moe, **kwargs):
            pass
    outer = refuse.tuning_experts(moe, every[:4], mode="mask")
    with outer, pytest.raises(abjure.ArgumentError), refuse.tuning_experts(moe, every[4:7], mode="mask"):
        pass
    assert not any(m._forward_hooks for m in moe.modules())


def test_groups_that_could_run_out_of_experts_are_refused():
    model = model_of("deepseek_v3", num_experts_per_tok=3)
    with refuse.tuning_experts(model, [(1, 0)], mode="mask"):  # a group of one is taken last
        pass
    with (
        pytest.raises(abjure.ArgumentError, match="got 2"),
        refuse.tuning_experts(model, [(1, 0), (1, 2), (1, 4), (1, 6)], mode="mask"),
    ):
        pass
    model = model_of("deepseek_v3", topk_group=1)
    with pytest.raises(abjure.ArgumentError, match="1 groups"), refuse.tuning_experts(model, on=[(1, 0), (1, 7)]):
        pass


def test_models_without_known_experts():
    torch.manual_seed(0)
    llama = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("llama", **{k: v for k, v in SIZES.items() if k != "num_experts_per_tok"})
    )
    dense = {**SIZES, **FAMILIES["qwen3_moe"], "mlp_only_layers": [0, 1, 2]}
    qwen = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("qwen3_moe", **dense))
    with pytest.raises(abjure.ArgumentError, match=r"known family .*mixtral.*got 'llama'"):
        refuse.expert_routers(llama)
    with pytest.raises(abjure.ArgumentError, match="dense blocks only"):
        refuse.expert_routers(qwen)
    with pytest.raises(abjure.DTypeError):
        refuse.expert_routers(None)


@pytest.fixture(scope="module")
def prompts():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(["<pad>", *"abcdefghij"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    return refuse.Prompts(tokenizer, ["a b c", "d e f g h i", "j", "b a d", "e"], template=False)


@torch.no_grad()
def test_recording_equals_prompts_run_alone(moe, prompts):
    labels = [1, 0, 1, 1, 0]
    seen = refuse.record_experts(moe, prompts, labels, batch_size=3)
    routers = refuse.expert_routers(moe)
    assert seen.layers == list(routers)
    by_hand = refuse.ExpertTuner(list(routers), 8)
    for prompt, label in zip(prompts, labels, strict=True):
        found = {}
        hooks = [
            r.register_forward_hook(lambda m, a, o, n=n, into=found: into.update({n: o})) for n, r in routers.items()
        ]
        moe(torch.tensor([prompt.ids]))
        for hook in hooks:
            hook.remove()
        for layer, (_, weights, ids) in found.items():
            by_hand.update(ids, label, layer=layer, weights=weights)
    np.testing.assert_array_equal(seen.counts, by_hand.counts)
    assert seen.counts.sum() == 2 * len(routers) * sum(len(p.ids) for p in prompts)
    for stat in ("count", "weight"):
        np.testing.assert_allclose(seen.relevance(stat), by_hand.relevance(stat), atol=1e-6)
        np.testing.assert_allclose(seen.standard_error(stat), by_hand.standard_error(stat), atol=1e-6)
    layer = seen.layers[0]
    with refuse.tuning_experts(moe, [(layer, 2)], [(layer, 5)], mode="mask"):
        tuned = refuse.record_experts(moe, prompts, labels)
    assert tuned.counts[:, 0, 2].sum() == 0
    assert tuned.counts[:, 0, 5].sum() == sum(len(p.ids) for p in prompts)
    assert tuned.rates(1)[0, 5] == pytest.approx(1.0)
    assert not any(m._forward_hooks for m in moe.modules())


def test_routers_that_do_not_run_are_noticed(prompts):
    model = model_of("mixtral")
    block = model.model.layers[1].mlp
    block.forward = lambda hidden: hidden  # as a fused kernel does
    with pytest.raises(abjure.ArgumentError, match=r"routers of layers \[1\] did not run"):
        refuse.record_experts(model, prompts, [0, 1, 0, 1, 0])
    with pytest.raises(abjure.ShapeError):
        refuse.record_experts(model, prompts, [0, 1])
    assert not any(m._forward_hooks for m in model.modules())


@pytest.fixture(scope="module")
def refusing(trigger_example, one_thread):
    """A Mixtral with refusal planted in experts 5 to 7, of which the tuner is not told; and what it records."""
    found = trigger_example.make(build=trigger_example.mixtral, experts=(5, 6, 7))
    prompts = refuse.Prompts(found.tokenizer, found.train[0] + found.train[1])
    labels = [0] * len(found.train[0]) + [1] * len(found.train[1])
    return found, refuse.record_experts(found.model, prompts, labels)


@pytest.mark.effect
def test_the_experts_found_are_those_that_refuse(refusing):
    """On held-out prompts: without two of 32 experts nothing of the topic is refused, and the rest stays answered."""
    found, tuner = refusing
    other, topic = found.held_out
    top = tuner.rank(6)
    assert {r.expert for r in top} <= {5, 6, 7}  # where refusal was planted
    assert min(r.z for r in top) > 5
    plain = found.answers(other)
    for mode in ("zero_slot", "mask"):
        with refuse.tuning_experts(found.model, top[:2], mode=mode):
            assert found.refusal_rate(topic) <= 0.1
            assert found.answers(other) == plain
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(8):
        places = rng.choice(32, 2, replace=False)
        with refuse.tuning_experts(found.model, [(int(p) // 8, int(p) % 8) for p in places]):
            rates.append(found.refusal_rate(topic))
    assert np.mean(rates) >= 0.5
    assert (found.refusal_rate(other), found.refusal_rate(topic)) == (0.0, 1.0)
