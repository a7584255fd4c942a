"""Which stored tensors an op touches: every family saved by its real class, edited in the file, and loaded again."""

from __future__ import annotations

import importlib.util
import json
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from transformers import AutoModelForCausalLM

import abjure
from abjure import checkpoint, refuse
from abjure.checkpoint import Ablate, Dampen, Scale, TensorInfo, resolution, resolve

pytestmark = pytest.mark.usefixtures("one_thread")


def _sibling(name):
    """Another test file of this folder: pytest's import mode knows no siblings."""
    spec = importlib.util.spec_from_file_location(f"abjure_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


families = _sibling("test_architectures")
TOKENS, build, states = families.TOKENS, families.build, families.states
Q = families.direction()


class Saved:
    """A checkpoint directory, read and written with safetensors alone."""

    def __init__(self, path):
        self.path = Path(path)
        self.config = json.loads((self.path / "config.json").read_text())
        self.files = {f.name: load_file(f) for f in sorted(self.path.glob("*.safetensors"))}
        self.arrays = {n: a for file in self.files.values() for n, a in file.items()}
        self.tensors = {n: TensorInfo(a.shape, {"float32": "F32"}[str(a.dtype)]) for n, a in self.arrays.items()}

    def apply(self, op):
        found = resolution(self.config, self.tensors, op)
        for t in found.targets:
            gain = None if t.post_gain is None else self.arrays[t.post_gain].astype(np.float64) + t.gain_offset
            array = self.arrays[t.name]
            if t.keep_as is not None:
                next(iter(self.files.values()))[t.keep_as] = array.copy()
            if t.axis is None:
                array *= np.float32(t.scale)
            else:
                refuse.orthogonalize_(array, op.basis(found.width), t.axis, t.scale, t.norm_preserving, gain)
        for name, value in found.config.items():
            owner, _, key = name.rpartition(".")
            (self.config[owner] if owner else self.config)[key] = value
        for name, arrays in self.files.items():
            save_file(arrays, self.path / name, {"format": "pt"})
        (self.path / "config.json").write_text(json.dumps(self.config))
        return found


def load(path, cls=AutoModelForCausalLM):
    return cls.from_pretrained(path, dtype=torch.float32, **families.EAGER).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def tied_of(name):
    return "skip" if name == "bloom" else "edit"


def expect_same_as_live(path, op, layers=None, cls=AutoModelForCausalLM, **options):
    """Edits the files at ``path``, and holds the loaded result to the edit of the loaded model, bit for bit."""
    live = load(path, cls)
    report = refuse.orthogonalize_model_(live, Q, layers, undo=False, **options)
    found = Saved(path).apply(op)
    edited = load(path, cls)
    want, got = live.state_dict(), edited.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert torch.equal(logits(edited), logits(live))
    return found, edited, report


@pytest.mark.parametrize("name", families.ALL)
def test_editing_the_file_is_editing_the_model(name, tmp_path):
    model = build(name, torch.float32)
    model.save_pretrained(tmp_path)
    plain = states(model)
    op = Ablate(Q, tied=tied_of(name))
    found, edited, report = expect_same_as_live(tmp_path, op, tied=tied_of(name))
    assert len(found.targets) >= len(report.edits)
    assert found.depth == 2
    assert found.width == 32
    assert {t.component for t in found.targets} >= {"attention"}
    if tied_of(name) == "edit":
        after = states(edited)
        assert refuse.project(plain, Q).abs().max() > 1e-3 * plain.abs().max()
        assert refuse.project(after, Q).abs().max() < 1e-5 * after.abs().max()
    saved = Saved(tmp_path)
    for t in found.targets:  # a writer that is missing is noticed, never passed over
        with pytest.raises(abjure.AbjureError):
            resolve(saved.config, {n: i for n, i in saved.tensors.items() if n != t.name}, op)


def test_a_square_matrix_is_edited_along_the_axis_of_its_format(tmp_path):
    build("gpt_oss", torch.float32).save_pretrained(tmp_path)
    saved = Saved(tmp_path)
    found = {t.name: (t.component, t.axis) for t in resolve(saved.config, saved.tensors, Ablate(Q, layers=[1]))}
    assert saved.tensors["model.layers.1.mlp.experts.down_proj"].shape == (4, 32, 32)
    assert found == {
        "model.layers.1.self_attn.o_proj.weight": ("attention", 0),
        "model.layers.1.self_attn.o_proj.bias": ("attention", 0),
        "model.layers.1.mlp.experts.down_proj": ("experts", 2),
        "model.layers.1.mlp.experts.down_proj_bias": ("experts", 1),
    }


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gpt2", "gemma2", "qwen3_moe", "granitemoe"])
@pytest.mark.parametrize("form", ["in", "row_pre"])
def test_norm_preserving_forms_and_scales(name, form, tmp_path):
    build(name, torch.float32).save_pretrained(tmp_path)
    scale = {"attention": 0.5, "mlp": -1.0, "experts": 2.0}
    expect_same_as_live(
        tmp_path, Ablate(Q, scale=scale, layers=[-1], norm_preserving=form), [-1], scale=scale, norm_preserving=form
    )


def test_shards(tmp_path):
    build("deepseek_v3", torch.float32).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expect_same_as_live(tmp_path, Ablate(Q), None)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen2_moe", "granitemoe", "phimoe", "gpt_neox"])
def test_files_under_the_names_of_the_modules(name, tmp_path):
    """The layout that transformers 5 keeps in memory, stored as it is: stacked experts, lm_head."""
    model = build(name, torch.float32)
    model.config.save_pretrained(tmp_path)
    save_file({n: p.numpy() for n, p in model.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"})
    found, *_ = expect_same_as_live(tmp_path, Ablate(Q), None)
    if name != "gpt_neox":
        assert {len(t.shape) for t in found.targets if t.component == "experts"} == {3}


def test_a_decoder_saved_without_its_head(tmp_path):
    model = build("gpt2", torch.float32)
    model.transformer.save_pretrained(tmp_path)
    assert "h.0.attn.c_proj.weight" in Saved(tmp_path).tensors
    found, *_ = expect_same_as_live(tmp_path, Ablate(Q, tied="edit"), None, tied="edit")
    assert found.blocks == "h"


GEMMA3 = {
    "text_config": {**families.HEAD, "vocab_size": 40},
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
}


@pytest.fixture
def multimodal(tmp_path):
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**GEMMA3))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "language_model" in name and name.endswith("norm.weight"):
                p.copy_(torch.randn_like(p) * 0.3)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("tied", ["skip", "untie", "edit"])
def test_the_text_decoder_of_a_multimodal_checkpoint(multimodal, tied):
    found, _, report = expect_same_as_live(
        multimodal, Ablate(Q, tied=tied), cls=transformers.Gemma3ForConditionalGeneration, tied=tied
    )
    assert found.blocks == "language_model.model.layers"
    assert found.family == "gemma3_text"
    assert {t.name for t in found.targets if t.post_gain is None} <= {"language_model.model.embed_tokens.weight"}
    assert len(found.targets) == len(report.edits)
    assert any("vision_tower" in note and "left as it is" in note for note in found.notes)


TEXT = {k: v for k, v in families.WIDE.items() if not k.startswith(("bos", "eos"))}
WRAPPERS = {
    "llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TEXT),
            vision_config=transformers.CLIPVisionConfig(**GEMMA3["vision_config"]),
            image_token_index=39,
        )
    ),
    "mistral3": lambda: transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config=transformers.MistralConfig(**TEXT),
            vision_config=transformers.PixtralVisionConfig(**GEMMA3["vision_config"], head_dim=8),
            image_token_index=39,
        )
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_around_other_families(name, tmp_path):
    model = WRAPPERS[name]()
    model.save_pretrained(tmp_path)
    found, edited, _ = expect_same_as_live(tmp_path, Ablate(Q, tied="edit"), cls=type(model), tied="edit")
    assert found.family == {"llava": "llama", "mistral3": "mistral"}[name]
    after = states(edited)
    assert refuse.project(after, Q).abs().max() < 1e-5 * after.abs().max()


def test_the_config_of_early_gemma3_files(multimodal):
    """They name neither the text model's type nor the tie."""
    saved = Saved(multimodal)
    want = resolve(saved.config, saved.tensors, Ablate(Q, tied="edit"))
    del saved.config["text_config"]["model_type"], saved.config["text_config"]["tie_word_embeddings"]
    del saved.config["tie_word_embeddings"]
    assert resolve(saved.config, saved.tensors, Ablate(Q, tied="edit")) == want


@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "gemma2", "opt"])
def test_tied_embeddings_are_skipped_edited_or_untied(name, tmp_path):
    model = build(name, torch.float32)
    for tied in ("skip", "edit", "untie"):
        model.save_pretrained(tmp_path / tied)
        found, edited, _ = expect_same_as_live(tmp_path / tied, Ablate(Q, tied=tied), tied=tied)
        table = edited.get_input_embeddings().weight
        along = float(refuse.project(table.detach(), Q).abs().max())
        assert (along < 1e-5) == (tied != "skip")
        assert (edited.lm_head.weight is table) == (tied != "untie")
        assert any("embed" in note or "wte" in note for note in found.notes)
    assert found.config == {"tie_word_embeddings": False}
    assert [t.keep_as for t in found.targets if t.keep_as] == ["lm_head.weight"]


def test_a_stored_copy_of_a_tied_head_gets_the_same_edit(tmp_path):
    """Files of older releases hold both; transformers 5 ties them only while they are equal."""
    build("llama, tied", torch.float32).save_pretrained(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    found, edited, _ = expect_same_as_live(tmp_path, Ablate(Q, tied="edit"), tied="edit")
    assert edited.lm_head.weight is edited.model.embed_tokens.weight
    assert [(t.name, t.tied_to) for t in found.targets if t.tied_to] == [
        ("lm_head.weight", "model.embed_tokens.weight")
    ]
    saved = Saved(tmp_path)
    untied = resolution(saved.config, saved.tensors, Ablate(Q, tied="untie"))
    assert not any(t.keep_as for t in untied.targets)
    assert untied.config == {"tie_word_embeddings": False}
    with pytest.raises(abjure.ArgumentError, match="tied; expected both"):
        resolve(saved.config, saved.tensors, Scale("model.embed_tokens.weight", 0.5))
    assert len(resolve(saved.config, saved.tensors, Scale(["*embed_tokens.weight", "lm_head*"], 0.5))) == 2


def test_layers_and_patterns_choose_among_the_writers(tmp_path):
    build("llama", torch.float32).save_pretrained(tmp_path)
    saved = Saved(tmp_path)
    found = resolve(saved.config, saved.tensors, Ablate(Q, layers=-1, tensors="*.down_proj.*"))
    assert [(t.name, t.axis, t.layer) for t in found] == [
        ("model.layers.1.mlp.down_proj.bias", 0, 1),
        ("model.layers.1.mlp.down_proj.weight", 0, 1),
    ]
    for op, words in {
        Ablate(Q, layers=[2]): "layers: expected -2 to 1",
        Ablate(Q, tensors="*.up_proj.*"): "matches a known writer",
        Ablate(Q, scale=0): "nothing is left to edit",
        Scale("*.up_proj", 2): "matches a stored tensor",
        Scale("*norm.weight", 2, layers=[7]): "layers: expected -2 to 1",
    }.items():
        with pytest.raises(abjure.ArgumentError, match=words):
            resolve(saved.config, saved.tensors, op)


def test_writers_that_the_user_names(tmp_path):
    build("gemma2", torch.float32).save_pretrained(tmp_path)
    saved = Saved(tmp_path)
    op = Ablate(Q, tensors={"*.o_proj.weight": 0, "*.down_proj.weight": -2}, layers=[1])
    found = resolution(saved.config, saved.tensors, op)
    assert [(t.name, t.axis, t.post_gain, t.gain_offset) for t in found.targets] == [
        ("model.layers.1.self_attn.o_proj.weight", 0, "model.layers.1.post_attention_layernorm.weight", 1.0),
        ("model.layers.1.mlp.down_proj.weight", 0, "model.layers.1.post_feedforward_layernorm.weight", 1.0),
    ]
    with pytest.raises(abjure.ArgumentError, match="expected axis 0, a fact of this family"):
        resolve(saved.config, saved.tensors, Ablate(Q, tensors={"*.o_proj.weight": 1}))
    unknown = {**saved.config, "model_type": "unheard_of"}
    with pytest.raises(abjure.ArgumentError, match="model_type 'unheard_of'"):
        resolve(unknown, saved.tensors, Ablate(Q))
    found = resolution(unknown, saved.tensors, op)
    assert [(t.axis, t.post_gain, t.layer) for t in found.targets] == [(0, None, 1), (0, None, 1)]
    assert "not in the table" in found.notes[0]
    for tensors, words in {
        (("*.o_proj.weight", 2),): "no axis 2",
        (("*.o_proj.weight", 0), ("*.layers.1.*o_proj*", 1)): "two patterns with different axes",
        (("*.nothing", 0),): "matches a stored tensor",
    }.items():
        with pytest.raises(abjure.ArgumentError, match=words):
            resolve(unknown, saved.tensors, Ablate(Q, tensors=dict(tensors)))
    with pytest.raises(abjure.ShapeError, match="one width along the stream"):
        resolve(unknown, saved.tensors, Ablate(Q, tensors={"*.o_proj.weight": 0, "*.up_proj.weight": 0}))


RENAMED = [
    "llama",
    "mixtral",
    "phimoe",
    "granitemoe",
    "deepseek_v3",
    "qwen2_moe",
    "jamba",
    "gpt_oss",
    "gpt_neox",
    "gpt2",
]


@pytest.mark.parametrize("name", RENAMED)
def test_importances_of_the_modules_find_their_parts_in_the_files(name, tmp_path):
    build(name, torch.float32).save_pretrained(tmp_path)
    live = load(tmp_path)
    rng = np.random.default_rng(0)
    forget, retain = (
        {n: rng.random(tuple(p.shape), dtype=np.float32) for n, p in live.named_parameters()} for _ in range(2)
    )
    op = Dampen(forget, retain, alpha=Decimal("1.5"), lam=1)
    from abjure import forget as wing

    wing.dampen_(live, forget, retain, 1.5, 1.0)
    saved = Saved(tmp_path)
    found = resolve(saved.config, saved.tensors, op, {n: a.shape for n, a in forget.items()})
    seen = {n: np.zeros(a.size, bool) for n, a in forget.items()}
    for t in found:
        part = slice(t.importance_offset, t.importance_offset + saved.arrays[t.name].size)
        assert not seen[t.importance][part].any()
        seen[t.importance][part] = True
        f, d = (np.ascontiguousarray(i[t.importance]).reshape(-1)[part] for i in (forget, retain))
        wing.dampen_array_(saved.arrays[t.name].reshape(-1), f, d, 1.5, 1.0)
    assert all(s.all() for s in seen.values())
    save_file(saved.arrays, tmp_path / "model.safetensors", {"format": "pt"})
    want, got = live.state_dict(), load(tmp_path).state_dict()
    for key in want:
        assert torch.equal(got[key], want[key]), key


def test_dampening_says_what_does_not_fit(tmp_path):
    build("mixtral", torch.float32).save_pretrained(tmp_path)
    live = load(tmp_path)
    saved = Saved(tmp_path)
    shapes = {n: tuple(p.shape) for n, p in live.named_parameters()}
    op = Dampen("forget", "retain")
    key = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(abjure.ShapeError, match="expected experts of"):
        resolve(saved.config, saved.tensors, op, {**shapes, key: (4, 32, 96)})
    with pytest.raises(abjure.ShapeError, match="3 experts or more"):
        resolve(saved.config, saved.tensors, op, {**shapes, key: (2, 96, 32)})
    fewer = {n: s for n, s in shapes.items() if n != key}
    with pytest.raises(abjure.ArgumentError, match="got none for"):
        resolve(saved.config, saved.tensors, op, fewer)
    left = resolve(
        saved.config, saved.tensors, Dampen("f", "r", exclude=["*layers.0.*.w1.*", "*layers.0.*.w3.*"]), fewer
    )
    assert len(left) == len(saved.tensors) - 8
    with pytest.raises(abjure.ArgumentError, match=r"unknown 'model\.more'"):
        resolve(saved.config, saved.tensors, op, {**shapes, "model.more": (1,)})
    with pytest.raises(abjure.ArgumentError, match="importance: expected names and shapes"):
        resolve(saved.config, saved.tensors, op)


def test_blocks_that_predict_further_tokens_are_left_alone(tmp_path):
    build("deepseek_v3", torch.float32).save_pretrained(tmp_path)
    saved = Saved(tmp_path)
    extra = {n.replace(".1.", ".2.", 1): i for n, i in saved.tensors.items() if n.startswith("model.layers.1.")}
    extra["model.layers.2.eh_proj.weight"] = TensorInfo((32, 64), "F32")
    found = resolution(saved.config, saved.tensors | extra, Ablate(Q))
    assert found.targets == resolve(saved.config, saved.tensors, Ablate(Q))
    assert "model.layers.2: left as it is" in found.notes[0]
    with pytest.raises(abjure.ArgumentError, match="got block 2 too"):
        resolve({**saved.config, "num_nextn_predict_layers": 0}, saved.tensors | extra, Ablate(Q))


def changed(saved, config=None, drop=(), add=None):
    """Config and tensors with some of both changed or dropped."""
    tensors = {n: i for n, i in saved.tensors.items() if n not in drop} | (add or {})
    return {**saved.config, **(config or {})}, tensors


def test_configs_that_do_not_match_the_tensors_are_errors(tmp_path):
    build("mixtral", torch.float32).save_pretrained(tmp_path)
    saved = Saved(tmp_path)
    block = "model.layers.1."
    experts = block + "block_sparse_moe.experts."
    whole = [n for n in saved.tensors if n.startswith(block)]
    half = TensorInfo((16,), "F32")
    gain = block + "input_layernorm.weight"
    for case, (kind, words) in {
        "fewer": (abjure.ArgumentError, "expected 3 blocks model.layers.0 to .2 .* no tensor of block 2"),
        "more": (abjure.ArgumentError, "got block 1 too"),
        "width": (abjure.ShapeError, r"expected 48 \(the config's hidden size\)"),
        "rows": (abjure.ShapeError, "expected 41 rows"),
        "experts": (abjure.ArgumentError, "expected experts 0 to 4 as the config says, got 4"),
        "block": (abjure.ArgumentError, "no tensor of block 1"),
        "expert": (abjure.ArgumentError, r"missing \[2\]"),
        "attention": (abjure.ArgumentError, "model.layers.1 has no known attention writer"),
        "head": (abjure.ArgumentError, "expected an output head"),
        "table": (abjure.ArgumentError, "expected model.embed_tokens.weight"),
        "inside": (abjure.ArgumentError, r"layers\.1\.extra\.weight is neither a known writer"),
        "beside": (abjure.ArgumentError, r"model\.extra\.weight is neither"),
        "adapter": (abjure.ArgumentError, "got an adapter"),
        "names": (abjure.ArgumentError, r"expected the blocks of one mixtral decoder \(model\.layers\.0"),
        "type": (abjure.ArgumentError, "config: expected model_type"),
        "depth": (abjure.ArgumentError, "config: expected the number of blocks"),
        "number": (abjure.ArgumentError, "num_hidden_layers of 1 or more"),
        "axes": (abjure.ShapeError, "expected 2 axes"),
    }.items():
        config, tensors = {
            "fewer": lambda: changed(saved, {"num_hidden_layers": 3}),
            "more": lambda: changed(saved, {"num_hidden_layers": 1}),
            "width": lambda: changed(saved, {"hidden_size": 48}),
            "rows": lambda: changed(saved, {"vocab_size": 41}),
            "experts": lambda: changed(saved, {"num_local_experts": 5}),
            "block": lambda: changed(saved, drop=whole),
            "expert": lambda: changed(saved, drop=[experts + "2.w2.weight"]),
            "attention": lambda: changed(saved, drop=[block + "self_attn.o_proj.weight"]),
            "head": lambda: changed(saved, drop=["lm_head.weight"]),
            "table": lambda: changed(saved, drop=["model.embed_tokens.weight"]),
            "inside": lambda: changed(saved, add={block + "extra.weight": half}),
            "beside": lambda: changed(saved, add={"model.extra.weight": half}),
            "adapter": lambda: changed(saved, add={block + "self_attn.o_proj.lora_A.weight": half}),
            "names": lambda: (
                {"model_type": "mixtral", "hidden_size": 32, "num_hidden_layers": 2},
                {"encoder." + gain: half},
            ),
            "type": lambda: ({}, saved.tensors),
            "depth": lambda: ({"model_type": "mixtral", "hidden_size": 32}, saved.tensors),
            "number": lambda: changed(saved, {"num_hidden_layers": "2"}),
            "axes": lambda: changed(saved, add={block + "self_attn.o_proj.weight": half}),
        }[case]()
        with pytest.raises(kind, match=words):
            resolve(config, tensors, Ablate(Q))


def test_norms_and_shared_experts_that_are_missing(tmp_path):
    build("gemma2", torch.float32).save_pretrained(tmp_path / "gemma2")
    build("deepseek_v3", torch.float32).save_pretrained(tmp_path / "deepseek")
    gemma, deepseek = Saved(tmp_path / "gemma2"), Saved(tmp_path / "deepseek")
    norm = "model.layers.0.post_attention_layernorm."
    with pytest.raises(abjure.ArgumentError, match="expected a norm with a gain"):
        resolve(*changed(gemma, drop=[norm + "weight"]), Ablate(Q))
    with pytest.raises(abjure.ArgumentError, match="has a bias, which writes too"):
        resolve(*changed(gemma, add={norm + "bias": TensorInfo((32,), "F32")}), Ablate(Q))
    shared = "model.layers.1.mlp.shared_experts."
    with pytest.raises(abjure.ArgumentError, match=r"shared_experts\.down_proj beside mlp\.shared_experts"):
        resolve(*changed(deepseek, drop=[shared + "down_proj.weight"]), Ablate(Q))
    with pytest.raises(abjure.ArgumentError, match="expected a shared expert"):
        resolve(*changed(deepseek, drop=[n for n in deepseek.tensors if n.startswith(shared)]), Ablate(Q))


def test_quantised_writers_are_refused_by_name(tmp_path):
    build("gpt_oss", torch.float32).save_pretrained(tmp_path / "a")
    build("deepseek_v3", torch.float32).save_pretrained(tmp_path / "b")
    oss, deepseek = Saved(tmp_path / "a"), Saved(tmp_path / "b")
    place = "model.layers.1.mlp.experts.down_proj"
    blocks = {place + "_blocks": TensorInfo((4, 32, 1, 16), "U8"), place + "_scales": TensorInfo((4, 32, 1), "U8")}
    with pytest.raises(abjure.DTypeError, match=r"experts\.down_proj is quantised \(MXFP4\)"):
        resolve(*changed(oss, drop=[place], add=blocks), Ablate(Q))
    name = "model.layers.1.self_attn.o_proj.weight"
    fp8 = {name: TensorInfo((32, 32), "F8_E4M3"), name + "_scale_inv": TensorInfo((1, 1), "F32")}
    with pytest.raises(abjure.DTypeError, match=r"o_proj\.weight is quantised \(FP8 with block scales\)"):
        resolve(*changed(deepseek, add=fp8), Ablate(Q))
    config = {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(abjure.DTypeError, match=r"stored as F8_E4M3 \(quantised by fp8\)"):
        resolve(*changed(deepseek, config, add={name: fp8[name]}), Ablate(Q))
    gptq = {name.replace("weight", end): TensorInfo((4, 32), "I32") for end in ("qweight", "qzeros", "scales")}
    with pytest.raises(abjure.DTypeError, match="GPTQ or AWQ"):
        resolve(*changed(deepseek, drop=[name], add=gptq), Ablate(Q))
    # A quantised tensor that only reads is none of ours.
    reader = "model.layers.1.self_attn.q_a_proj.weight"
    found = resolve(
        *changed(deepseek, add={reader: fp8[name], reader + "_scale_inv": TensorInfo((1, 1), "F32")}), Ablate(Q)
    )
    assert found == resolve(deepseek.config, deepseek.tensors, Ablate(Q))


@pytest.mark.parametrize(
    ("dtype", "beside", "method", "words"),
    [
        ("F8_E4M3", {}, "fp8", r"o_proj\.weight is stored as F8_E4M3 \(quantised by fp8\)"),
        ("F8_E5M2", {}, None, r"o_proj\.weight is stored as F8_E5M2; expected"),
        (
            "F8_E4M3",
            {"weight_scale": ("F32", (1,))},
            "fbgemm_fp8",
            r"o_proj\.weight is quantised \(compressed-tensors\)",
        ),
        (None, {"qweight": ("I32", (4, 32)), "g_idx": ("I32", (32,))}, "gptq", "o_proj.* is quantised .GPTQ or AWQ"),
        (None, {"qweight": ("I32", (32, 4)), "qzeros": ("I32", (1, 4))}, "awq", "o_proj.* is quantised .GPTQ or AWQ"),
        ("I8", {"SCB": ("F32", (32,))}, "bitsandbytes", r"o_proj.* is quantised \(bitsandbytes int8\)"),
        ("U8", {"weight.absmax": ("U8", (16,))}, "bitsandbytes", r"o_proj.* is quantised \(bitsandbytes 4-bit\)"),
        (None, {"weight_packed": ("I32", (32, 4))}, "compressed-tensors", "o_proj.* is quantised .compressed-tensors"),
    ],
)
def test_every_quantisation_is_named(dtype, beside, method, words, tmp_path):
    build("llama", torch.float32).save_pretrained(tmp_path)
    saved = Saved(tmp_path)
    root = "model.layers.1.self_attn.o_proj."
    add = {root + end: TensorInfo(shape, kind) for end, (kind, shape) in beside.items()}
    if dtype is not None:
        add[root + "weight"] = TensorInfo((32, 32) if dtype != "U8" else (512, 1), dtype)
    config = {} if method is None else {"quantization_config": {"quant_method": method}}
    case = changed(saved, config, drop=[root + "weight"], add=add)
    with pytest.raises(abjure.DTypeError, match=words):
        resolve(*case, Ablate(Q))
    stored = next(n for n, t in add.items() if t.dtype not in ("F32",))
    with pytest.raises(abjure.DTypeError, match=stored.replace(".", r"\.")):
        resolve(*case, Scale(stored, 2.0))


# Parts of fused tensors -------------------------------------------------------------------------------------------


def seen(path, module, which):
    """What the first forward pass gives to a module of block 0 (``which`` 0) or gets from it (1)."""
    model, found = load(path), []
    _, blocks = next((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)

    def hook(_, given, result):
        value = (given, result)[which]
        found.append((value[0] if isinstance(value, tuple) else value).detach().clone())

    blocks[0].get_submodule(module).register_forward_hook(hook)
    logits(model)
    return found[0]


QKV = {
    "phi3": ("self_attn.qkv_proj.weight", "self_attn.o_proj"),
    "gpt2": ("attn.c_attn.*", "attn.c_proj"),
    "mpt": ("attn.Wqkv.weight", "attn.out_proj"),
    "gpt_neox": ("attention.query_key_value.*", "attention.dense"),
    "bloom": ("self_attention.query_key_value.*", "self_attention.dense"),
    "falcon": ("self_attention.query_key_value.weight", "self_attention.dense"),
    "falcon, new": ("self_attention.query_key_value.*", "self_attention.dense"),
    "codegen": ("attn.qkv_proj.weight", "attn.out_proj"),
}


@pytest.mark.parametrize("name", QKV)
def test_q_k_and_v_of_fused_tensors(name, tmp_path):
    """Twice the values is twice the output of attention; twice the queries is the same as twice the keys."""
    model = build(name, torch.float32)
    with torch.no_grad():
        for p in model.parameters():  # scores far enough from 0 that twice of them is another softmax
            p.mul_(3)
    model.save_pretrained(tmp_path / "plain")
    tensor, module = QKV[name]
    found = {"plain": seen(tmp_path / "plain", module, 0)}
    for part in "qkv":
        checkpoint.edit(tmp_path / "plain", tmp_path / part, Scale(f"*.{tensor}:{part}", 2), progress=False)
        found[part] = seen(tmp_path / part, module, 0)
        assert checkpoint.undo(tmp_path / part, tmp_path / f"{part} undone", progress=False)
        back, first = Saved(tmp_path / f"{part} undone"), Saved(tmp_path / "plain")
        assert all(np.array_equal(back.arrays[n], a) for n, a in first.arrays.items())
    assert torch.equal(found["v"], 2 * found["plain"])
    assert torch.equal(found["q"], found["k"])
    assert not torch.allclose(found["q"], found["plain"], rtol=1e-3)


HALVES = {
    "phi3": ("mlp.gate_up_proj.weight", "mlp"),
    "glm": ("mlp.gate_up_proj.weight", "mlp"),
    "glm4": ("mlp.gate_up_proj.weight", "mlp"),
    "granitemoe": ("block_sparse_moe.input_linear.weight", "block_sparse_moe"),
}


@pytest.mark.parametrize("name", HALVES)
def test_gate_and_up_of_fused_tensors(name, tmp_path):
    """The output of the MLP is linear in up, and not in gate."""
    build(name, torch.float32).save_pretrained(tmp_path / "plain")
    tensor, module = HALVES[name]
    plain = seen(tmp_path / "plain", module, 1)
    for part in ("gate", "up"):
        checkpoint.edit(tmp_path / "plain", tmp_path / part, Scale(f"*.{tensor}:{part}", 2), progress=False)
        doubled = torch.equal(seen(tmp_path / part, module, 1), 2 * plain)
        assert doubled == (part == "up")


def test_gate_and_up_of_stacked_experts(tmp_path):
    build("gpt_oss", torch.float32).save_pretrained(tmp_path / "plain")
    arrays = Saved(tmp_path / "plain").arrays
    place = "model.layers.0.mlp.experts.gate_up_proj"
    edit = Scale([f"{place}:gate", f"{place}_bias:gate"], 0)
    checkpoint.edit(tmp_path / "plain", tmp_path / "no gate", edit, progress=False)
    found = Saved(tmp_path / "no gate").arrays
    for name in (place, place + "_bias"):
        assert not found[name][..., ::2].any()
        assert np.array_equal(found[name][..., 1::2], arrays[name][..., 1::2])
    # Without gates no expert says anything but its bias.
    silent = Saved(tmp_path / "plain")
    silent.apply(Scale("*.layers.0.mlp.experts.down_proj", 0))
    assert torch.equal(seen(tmp_path / "no gate", "mlp", 1), seen(tmp_path / "plain", "mlp", 1))


@pytest.mark.parametrize("name", ["llama4_text", "mixtral", "qwen3_moe"])
def test_stacks_under_the_names_of_modules(name, tmp_path):
    model = build(name, torch.float32)
    plain, out = tmp_path / "plain", tmp_path / "out"
    model.config.save_pretrained(plain)
    state = {n: p.numpy() for n, p in model.state_dict().items()}
    save_file(state, plain / "model.safetensors", {"format": "pt"})
    stack = next(n for n in state if n.endswith("experts.gate_up_proj"))
    checkpoint.edit(plain, out, Scale(f"{stack}:up", 2), progress=False)
    found, axis = Saved(out).arrays[stack], 2 if name == "llama4_text" else 1
    (gate, up), (gate_0, up_0) = np.split(found, 2, axis), np.split(state[stack], 2, axis)
    assert np.array_equal(gate, gate_0)
    assert np.array_equal(up, 2 * up_0)
    block = model.get_submodule(stack.rpartition(".")[0])
    hidden = torch.randn(6, 32)
    routes = (torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1))
    given = (hidden.repeat(block.num_experts, 1),) if name == "llama4_text" else (hidden, *routes)
    with torch.no_grad():
        before = block(*given)
        block.gate_up_proj.copy_(torch.from_numpy(found))
        assert torch.equal(block(*given), 2 * before)


def test_keys_and_values_of_a_latent(tmp_path):
    build("deepseek_v3", torch.float32).save_pretrained(tmp_path / "plain")
    plain = seen(tmp_path / "plain", "self_attn.o_proj", 0)
    for part in "kv":
        checkpoint.edit(tmp_path / "plain", tmp_path / part, Scale(f"*.kv_b_proj.weight:{part}", 2), progress=False)
        found = seen(tmp_path / part, "self_attn.o_proj", 0)
        assert torch.equal(found, 2 * plain) == (part == "v")
        assert not torch.equal(found, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [None, "in"])
def test_a_direction_that_a_part_reads_is_removed_from_that_part(dtype, form, tmp_path):
    build("gpt_neox", torch.float32).to(dtype).save_pretrained(tmp_path / "plain")
    first = {n: t.clone() for n, t in load_torch(tmp_path / "plain" / "model.safetensors").items()}
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    op = Ablate(Q, tensors={f"{name}:k": 1}, norm_preserving=form)
    checkpoint.edit(tmp_path / "plain", tmp_path / "out", [op, Scale(f"{name}:v", 3)], memory="1M", progress=False)
    expected = {n: t.clone() for n, t in first.items()}
    by_head = expected[name].view(4, 3, 8, 32)
    keys = by_head[:, 1].reshape(32, 32).clone()
    refuse.orthogonalize_(keys, Q, 1, norm_preserving=form)
    by_head[:, 1] = keys.view(4, 8, 32)
    by_head[:, 2] *= 3
    found = load_torch(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[n], expected[n]) for n in found)
    assert checkpoint.verify(tmp_path / "out")
    checkpoint.undo(tmp_path / "out", progress=False)
    back = load_torch(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(back[n], first[n]) for n in first)


def test_parts_that_are_not_there(tmp_path):
    build("gpt_neox", torch.float32).save_pretrained(tmp_path)
    saved = Saved(tmp_path)
    fused, whole = "*.query_key_value.weight", "*.dense.weight"
    wrong = "gpt_neox.layers.0.attention.query_key_value.weight"
    for op, words in [
        (Scale(fused + ":gate", 2), f"{wrong}: expected its parts q, k, v, got :gate"),
        (Scale(whole + ":q", 2), "dense.weight: expected no part of it"),
        (Scale([fused, fused + ":q"], 2), "all of it or parts of it, got both"),
        (Scale("*.nothing:q", 2), "matches a stored tensor"),
        (Ablate(Q, tensors={fused + ":q": 0}), "a part is ablated along the last axis"),
        (Ablate(Q, tensors={fused + ":q": 1, fused: 1}), "all of it or one part, got more"),
        (Ablate(Q, tensors={fused + ":q": 1, fused + ":k": 1}), "all of it or one part, got more"),
        (Ablate(Q, tensors=fused + ":q"), "matches a known writer"),
    ]:
        with pytest.raises(abjure.ArgumentError, match=words):
            resolve(saved.config, saved.tensors, op)
    with pytest.raises(abjure.ArgumentError, match="families in the table"):
        resolve({**saved.config, "model_type": "unheard_of"}, saved.tensors, Scale(fused + ":q", 2))
    with pytest.raises(abjure.ShapeError, match="that the config's heads allow"):
        resolve({**saved.config, "num_attention_heads": 5}, saved.tensors, Scale(fused + ":q", 2))


def test_configurations_that_no_weight_edit_passes(tmp_path):
    build("opt", torch.float32).save_pretrained(tmp_path)
    saved = Saved(tmp_path)
    config = {**saved.config, "do_layer_norm_before": False}
    with pytest.raises(abjure.ArgumentError, match="do_layer_norm_before"):
        resolve(config, saved.tensors, Ablate(Q))
    assert len(resolve(config, saved.tensors, Scale("*.fc2.weight", 0.5))) == 2


def test_ops_check_their_options():
    for make, kind, words in [
        (lambda: Ablate(None), abjure.DTypeError, "direction"),
        (lambda: Ablate(Q, scale=float("nan")), abjure.ArgumentError, "finite"),
        (lambda: Ablate(Q, scale="1"), abjure.DTypeError, "expected a number"),
        (lambda: Ablate(Q, scale=True), abjure.DTypeError, "expected a number"),
        (lambda: Ablate(Q, scale={"expert": 1}), abjure.ArgumentError, "components among"),
        (lambda: Ablate(Q, scale={}), abjure.ArgumentError, "one component or more"),
        (lambda: Ablate(Q, layers="all"), abjure.DTypeError, "indices of blocks"),
        (lambda: Ablate(Q, layers=[]), abjure.ArgumentError, "one index or more"),
        (lambda: Ablate(Q, layers=[1.5]), abjure.DTypeError, "indices of blocks"),
        (lambda: Ablate(Q, tensors=[]), abjure.ArgumentError, "one pattern or more"),
        (lambda: Ablate(Q, tensors={"*": "0"}), abjure.DTypeError, "expected an axis"),
        (lambda: Ablate(Q, norm_preserving="out"), abjure.ArgumentError, "norm_preserving"),
        (lambda: Ablate(Q, tied="keep"), abjure.ArgumentError, "tied"),
        (lambda: Scale([], 2), abjure.ArgumentError, "one pattern or more"),
        (lambda: Scale([3], 2), abjure.DTypeError, "name patterns"),
        (lambda: Scale("*", None), abjure.DTypeError, "expected a number"),
        (lambda: Dampen("f", None), abjure.DTypeError, "retain"),
        (lambda: Dampen("f", "r", alpha=-1), abjure.ArgumentError, "0 or more"),
        (lambda: Dampen("f", "r", lam=Decimal("NaN")), abjure.ArgumentError, "finite"),
    ]:
        with pytest.raises(kind, match=words):
            make()
    with pytest.raises(abjure.ShapeError, match="expected vectors of 31"):
        Ablate(Q).basis(31)
    with pytest.raises(abjure.DTypeError, match="expected Ablate, Scale or Dampen"):
        resolve({}, {}, "ablate")
    with pytest.raises(abjure.DTypeError, match="shape and dtype"):
        resolve({}, {"a": 3}, Ablate(Q))


def test_a_resolution_prints_and_writes_itself(tmp_path):
    build("gemma2", torch.float32).save_pretrained(tmp_path)
    saved = Saved(tmp_path)
    found = resolution(saved.config, saved.tensors, Ablate(Q, scale=Decimal("0.50")))
    assert str(found).startswith(
        "ablate: 4 tensors in 2 of 2 blocks (attention 2, mlp 2)\nmodel.embed_tokens.weight: left"
    )
    assert "post_attention_layernorm" not in found._repr_html_()
    assert "o_proj" in found._repr_html_()
    facts = json.loads(json.dumps(found.to_dict()))
    assert facts["targets"][0] == {
        "name": "model.layers.0.self_attn.o_proj.weight",
        "axis": 0,
        "post_gain": "model.layers.0.post_attention_layernorm.weight",
        "gain_offset": 1.0,
        "scale": 0.5,
        "component": "attention",
        "layer": 0,
        "shape": [32, 32],
        "dtype": "F32",
    }


def test_the_layout_needs_no_torch():
    code = (
        "import sys, abjure.checkpoint as c; c.resolve; "
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    import subprocess

    subprocess.run([sys.executable, "-c", code], check=True)
    assert checkpoint.resolve is resolve
