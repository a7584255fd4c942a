"""The table of residual writers, family by family, on small random models of the real classes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import abjure
from abjure import refuse

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
IDS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = {**IDS, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
WIDE = {**BASE, "intermediate_size": 48, "num_key_value_heads": 2}
HEAD = {**WIDE, "head_dim": 8}
GPT = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "n_embd": 32, "n_head": 4, "n_layer": 2}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 24}
ROUTED = {
    **{k: v for k, v in EXPERTS.items() if k != "num_experts"},
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    **WIDE,
    **ROUTED,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LINEAR = {f"linear_{k}": v for k, v in {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 8}.items()}

EAGER = {"experts_implementation": "eager"}  # the grouped kernels know no float64

#: model_type to the prefix of its configuration's class, and the configuration.
FAMILIES: dict[str, tuple[str, dict]] = {
    "apertus": ("Apertus", WIDE),
    "arcee": ("Arcee", WIDE),
    "bloom": ("Bloom", {**IDS, "hidden_size": 32, "n_head": 4, "n_layer": 2}),
    "codegen": ("CodeGen", {**GPT, "rotary_dim": 4}),
    "cohere": ("Cohere", WIDE),
    "cohere2": ("Cohere2", WIDE),
    "deepseek_v2": ("DeepseekV2", LATENT),
    "deepseek_v3": ("DeepseekV3", LATENT),
    "ernie4_5": ("Ernie4_5", HEAD),
    "exaone4": ("Exaone4", WIDE),
    "falcon": ("Falcon", BASE),
    "gemma": ("Gemma", HEAD),
    "gemma2": ("Gemma2", HEAD),
    "gemma3_text": ("Gemma3Text", HEAD),
    "glm": ("Glm", HEAD),
    "glm4": ("Glm4", HEAD),
    "glm4_moe": ("Glm4Moe", {**HEAD, **ROUTED, "n_group": 1}),
    "gpt2": ("GPT2", GPT),
    "gpt_neo": (
        "GPTNeo",
        {
            **{k: v for k, v in IDS.items() if k != "pad_token_id"},
            "hidden_size": 32,
            "num_heads": 4,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gpt_neox": ("GPTNeoX", {**BASE, "intermediate_size": 48}),
    "gpt_oss": ("GptOss", {**HEAD, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "granite": ("Granite", {**WIDE, "residual_multiplier": 0.5}),
    "granitemoe": ("GraniteMoe", {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "helium": ("Helium", HEAD),
    "hunyuan_v1_dense": ("HunYuanDenseV1", HEAD),
    "jamba": (
        "Jamba",
        {
            **WIDE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "lfm2": ("Lfm2", {**WIDE, "layer_types": ["conv", "full_attention"]}),
    "llama": ("Llama", {**WIDE, "attention_bias": True, "mlp_bias": True}),
    "llama4_text": (
        "Llama4Text",
        {**HEAD, "num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
    ),
    "ministral": ("Ministral", {**HEAD, "layer_types": ["full_attention"] * 2}),
    "ministral3": ("Ministral3", HEAD),
    "mistral": ("Mistral", WIDE),
    "mixtral": ("Mixtral", {**WIDE, "num_local_experts": 4}),
    "mpt": ("Mpt", {"vocab_size": 40, "d_model": 32, "n_heads": 4, "n_layers": 2}),
    "nemotron": ("Nemotron", WIDE),
    "olmo": ("Olmo", WIDE),
    "olmo2": ("Olmo2", WIDE),
    "olmo3": ("Olmo3", WIDE),
    "olmoe": ("Olmoe", {**WIDE, "num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPT", {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": ("Phi", {**WIDE, "num_key_value_heads": 4}),
    "phi3": ("Phi3", WIDE),
    "phimoe": ("Phimoe", {**WIDE, "num_local_experts": 4}),
    "qwen2": ("Qwen2", WIDE),
    "qwen2_moe": ("Qwen2Moe", {**WIDE, **SHARED, "mlp_only_layers": [0]}),
    "qwen3": ("Qwen3", HEAD),
    "qwen3_moe": ("Qwen3Moe", {**HEAD, **EXPERTS, "mlp_only_layers": [0]}),
    "qwen3_next": (
        "Qwen3Next",
        {
            **HEAD,
            **SHARED,
            **LINEAR,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "seed_oss": ("SeedOss", HEAD),
    "smollm3": ("SmolLM3", WIDE),
    "stablelm": ("StableLm", WIDE),
    "starcoder2": ("Starcoder2", WIDE),
}
#: Beyond one configuration per family.
VARIANTS: dict[str, tuple[str, dict]] = {
    "falcon, new": ("Falcon", {**BASE, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "gpt_neox, sequential": ("GPTNeoX", {**BASE, "intermediate_size": 48, "use_parallel_residual": False}),
    "opt, narrow": ("OPT", {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "stablelm, parallel": ("StableLm", {**WIDE, "use_parallel_residual": True}),
    "llama, tied": ("Llama", {**WIDE, "tie_word_embeddings": True}),
    "gpt2, untied": ("GPT2", {**GPT, "tie_word_embeddings": False}),
}
ALL = {**FAMILIES, **VARIANTS}


def build(name, dtype=torch.float64):
    """A small model with every vector parameter random: zero biases and unit gains would hide mistakes."""
    prefix, config = ALL[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{prefix}Config")(**config), **EAGER).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 1 and not key.endswith(("A_log", ".D", "dt_bias", "alpha_p", "alpha_n")):
                p.copy_(torch.randn_like(p) * 0.3 + (1.0 if "norm" in key and key.endswith("weight") else 0.0))
            elif key.endswith("down_proj_bias"):
                p.copy_(torch.randn_like(p) * 0.3)
    return model.to(dtype)


def direction(seed=0, rank=2):
    return np.random.default_rng(seed).standard_normal((rank, 32))


def states(model, **hooks):
    """What the blocks hand on; not the logits, which a tied edit changes by itself."""
    with torch.no_grad(), refuse.recording(model, site="post") as post:
        model(TOKENS)
    return torch.stack([post[layer] for layer in sorted(post)])


def fingerprint(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def unchanged(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in before)


def test_every_family_of_the_table_is_tested():
    assert set(FAMILIES) == set(refuse.ARCHITECTURES)


@pytest.mark.parametrize("name", ALL)
def test_hooks_and_weight_edits_agree(name):
    model = build(name)
    before = fingerprint(model)
    plain = states(model)
    q = direction()
    layered = refuse.ARCHITECTURES[name.split(",")[0]].embedding_norm is not None
    with refuse.ablating(model, q, sites=("attn", "mlp") if layered else ("pre", "attn", "mlp")):
        want = states(model)
    assert (want - plain).abs().max() > 1e-3 * plain.abs().max()
    report = refuse.orthogonalize_model_(model, q, tied="skip" if layered else "edit")
    got = states(model)
    # The norm behind a branch computes in float32 whatever the model's dtype.
    tolerance = 1e-6 if refuse.ARCHITECTURES[name.split(",")[0]].post_mlp else 1e-9
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))
    if not layered:
        along = refuse.project(got, q).abs().max()
        assert along < tolerance * got.abs().max()
        assert refuse.project(plain, q).abs().max() > 1e-3 * plain.abs().max()
    assert all(" 0" not in line.split(":")[1] for line in report.coverage)
    assert len(report.coverage) == 3
    report.undo()
    assert unchanged(model, before)
    report.undo()
    assert unchanged(model, before)


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "gpt_oss", "gpt2", "qwen3_next"])
def test_every_tensor_matters(name):
    """Leaving out any one component leaves something along q: the test above could not pass by accident."""
    model = build(name)
    q = direction()
    for component in {w.component for w in refuse.residual_writers(model)}:
        edited = copy.deepcopy(model)
        refuse.orthogonalize_model_(
            edited, q, tied="edit", scale=lambda w, skip=component: 0.0 if w.component == skip else 1.0
        )
        got = states(edited)
        assert refuse.project(got, q).abs().max() > 1e-4 * got.abs().max(), component


def test_axis_and_names_of_the_square_case():
    model = build("gpt_oss")
    found = {w.name: (w.component, w.axis) for w in refuse.residual_writers(model, [1])}
    assert found == {
        "model.layers.1.self_attn.o_proj.weight": ("attention", 0),
        "model.layers.1.self_attn.o_proj.bias": ("attention", 0),
        "model.layers.1.mlp.experts.down_proj": ("experts", 2),
        "model.layers.1.mlp.experts.down_proj_bias": ("experts", 1),
    }


def test_scales_layers_and_report():
    model = build("mixtral")
    before = fingerprint(model)
    q = refuse.Direction(direction(rank=1)[0], layer=1, site="pre", position=-1, counts=(3, 4))
    report = refuse.orthogonalize_model_(model, q, [1], scale={"experts": 0.5})
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"model.layers.1.mlp.experts.down_proj"}
    edit = report.edits["model.layers.1.mlp.experts.down_proj"]
    assert edit.residual_after == pytest.approx(edit.residual_before / 2)
    assert "block 1: experts 1, experts 4, not edited 1" in str(report)
    facts = report.to_dict()
    assert facts["direction"]["layer"] == 1
    assert [t["scale"] for t in facts["tensors"]] == [None, 0.5]
    assert "down_proj" in report._repr_html_()
    report.undo()
    assert unchanged(model, before)


def test_norm_preserving_keeps_columns_and_removes_q():
    model = build("llama")
    q = direction()
    weight = model.model.layers[0].mlp.down_proj.weight
    norms = weight.detach().norm(dim=0)
    refuse.orthogonalize_model_(model, q, norm_preserving="in")
    torch.testing.assert_close(weight.detach().norm(dim=0), norms)
    got = states(model)
    assert refuse.project(got, q).abs().max() < 1e-9 * got.abs().max()


def test_tied_embeddings_are_skipped_aloud_edited_or_untied(tmp_path):
    q = direction()
    model = build("llama, tied")
    table = model.model.embed_tokens.weight
    former = table.detach().clone()
    with pytest.warns(UserWarning, match="tied to the output head"):
        report = refuse.orthogonalize_model_(model, q)
    assert torch.equal(table, former)
    assert any("left as it is" in note for note in report.notes)
    report.undo()

    report = refuse.orthogonalize_model_(model, q, tied="edit")
    assert refuse.project(table, q).abs().max() < 1e-12
    assert model.lm_head.weight is table
    report.undo()
    assert torch.equal(table, former)

    with torch.no_grad(), refuse.ablating(model, q):
        want = model(TOKENS).logits
    report = refuse.orthogonalize_model_(model, q, tied="untie")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, want, rtol=1e-9, atol=1e-9)
    assert torch.equal(model.lm_head.weight, former)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, want, rtol=1e-9, atol=1e-9)
    report.undo()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, former)
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "tied")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tied", dtype=torch.float64)
    assert torch.equal(again.lm_head.weight, former)


def test_bf16_is_nearer_the_exact_edit_than_the_eager_form():
    q = direction(rank=1)
    exact, ours, eager = (build("llama", dtype) for dtype in (torch.float64, torch.bfloat16, torch.bfloat16))
    exact.load_state_dict(ours.state_dict())
    refuse.orthogonalize_model_(exact, q)
    refuse.orthogonalize_model_(ours, q)
    r = torch.tensor(q[0] / np.linalg.norm(q[0])).bfloat16()
    with torch.no_grad():
        for w in refuse.residual_writers(eager):
            t = w.tensor if w.axis == w.tensor.ndim - 1 else w.tensor.T
            t -= (t @ r)[..., None] * r
    error = {
        name: sum(
            float((a.tensor.detach().double() - b.tensor.detach()).abs().sum())
            for a, b in zip(refuse.residual_writers(m), refuse.residual_writers(exact), strict=True)
        )
        for name, m in {"ours": ours, "eager": eager}.items()
    }
    assert error["ours"] < 0.9 * error["eager"]


def test_the_model_is_restored_when_an_edit_fails(monkeypatch):
    model = build("llama")
    before = fingerprint(model)
    from abjure.refuse import model_edit

    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return refuse.orthogonalize_(*args)

    monkeypatch.setattr(model_edit, "orthogonalize_", failing)
    with pytest.raises(KeyboardInterrupt):
        refuse.orthogonalize_model_(model, direction())
    assert len(calls) == 4
    assert unchanged(model, before)


def test_bad_models_and_arguments_change_nothing():
    q = direction()
    model = build("mixtral")
    before = fingerprint(model)
    for kwargs, words in {
        ("layers", 7): "layers: expected -2 to 1",
        ("layers", "model.norm"): "expected indices of blocks",
        ("scale", float("nan")): "scale",
        ("scale", 0.0): "nothing is left to edit",
        ("tied", "keep"): "tied: expected",
    }.items():
        with pytest.raises(abjure.ArgumentError, match=words):
            refuse.orthogonalize_model_(model, q, **{kwargs[0]: kwargs[1]})
    with pytest.raises(abjure.ArgumentError, match="components among"):
        refuse.orthogonalize_model_(model, q, scale={"expert": 1.0})
    with pytest.raises(abjure.ShapeError, match="hidden size"):
        refuse.orthogonalize_model_(model, q[:, :31])
    with pytest.raises(abjure.DegenerateError):
        refuse.orthogonalize_model_(model, np.zeros(32))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 2, 1] = float("inf")
    before = fingerprint(model)
    with pytest.raises(abjure.NonFiniteError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        refuse.orthogonalize_model_(model, q)
    assert unchanged(model, before)


def test_unknown_families_and_unknown_writers_are_errors():
    config = transformers.MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(abjure.ArgumentError, match="model_type 'mamba'"):
        refuse.residual_writers(AutoModelForCausalLM.from_config(config))
    model = build("llama")
    model.model.layers[1].extra = torch.nn.Linear(32, 32)
    with pytest.raises(abjure.ArgumentError, match=r"layers\.1\.extra\.weight is neither"):
        refuse.residual_writers(model)
    model = build("llama")
    model.model.layers[0].mlp = torch.nn.Identity()
    with pytest.raises(abjure.ArgumentError, match=r"layers\.0 has no known mlp writer"):
        refuse.residual_writers(model)
    post = transformers.OPTConfig(**BASE, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False)
    with pytest.raises(abjure.ArgumentError, match="do_layer_norm_before"):
        refuse.residual_writers(AutoModelForCausalLM.from_config(post))
    with pytest.raises(abjure.ArgumentError, match="word_embeddings_layernorm"):
        refuse.orthogonalize_model_(build("bloom"), direction(), tied="edit")
    with pytest.raises(abjure.DTypeError):
        refuse.residual_writers(model.state_dict())
    quantised = build("llama")
    quantised.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(
        torch.zeros(32, 48, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(abjure.DTypeError, match=r"down_proj\.weight is stored as"):
        refuse.residual_writers(quantised)
