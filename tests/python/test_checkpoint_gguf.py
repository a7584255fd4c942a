"""GGUF files as input, beside transformers' own reading of them and beside the models they were made from."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize
from transformers import AutoModelForCausalLM

import abjure
from abjure.checkpoint import GGUF, Ablate, from_gguf, resolve
from abjure.checkpoint import gguf as module

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
#: As llama.cpp names them.
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
}


def build(name):
    prefix, options = FAMILIES[name]
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if not (k == "head_dim" and prefix == "Qwen2")}
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{prefix}Config")(**sizes, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model.eval()


def interleaved(w, heads):
    """A head's first and second half of rows, one from each in turn: how llama.cpp wants queries and keys."""
    head = w.reshape(heads, 2, -1, *w.shape[1:])
    return np.stack([head[:, 0], head[:, 1]], axis=2).reshape(w.shape)


def write(path, name, kind="F32", model=None, **metadata):
    """A GGUF file of the model, made as llama.cpp's converter makes it; matrices of the type, vectors of float32."""
    model = model or build(name)
    family = name.split(",")[0]
    writer = GGUFWriter(path, family)
    sizes = model.config
    writer.add_context_length(sizes.max_position_embeddings)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_hidden_layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_attention_heads)
    writer.add_head_count_kv(sizes.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e4)
    writer.add_vocab_size(64)
    if family == "llama":
        writer.add_rope_dimension_count(16)
    if family == "qwen3":
        writer.add_key_length(16)
        writer.add_value_length(16)
    writer.add_bos_token_id(1)
    for key, value in metadata.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key.replace("__", "."), value)
    for key, p in model.named_parameters():
        parts = key.removeprefix("model.").split(".")
        stem = NAMES[parts[-2]] if parts[0] != "layers" else f"blk.{parts[1]}.{NAMES[parts[-2]]}"
        array = p.detach().numpy()
        if family == "llama" and parts[-2] in ("q_proj", "k_proj"):
            array = interleaved(array, 4 if parts[-2] == "q_proj" else 2)
        stored = kind if array.ndim == 2 else "F32"
        if stored == "F32":
            writer.add_tensor(f"{stem}.{parts[-1]}", array)
        elif stored == "F16":
            writer.add_tensor(f"{stem}.{parts[-1]}", array.astype(np.float16))
        else:
            number = GGMLQuantizationType[stored]
            writer.add_tensor(f"{stem}.{parts[-1]}", quantize(array, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_back(name, tmp_path):
    model = write(tmp_path / "m.gguf", name)
    found = from_gguf(tmp_path / "m.gguf", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(again) is type(model)
    want, got = model.state_dict(), again.state_dict()
    assert got.keys() == want.keys()
    for key in want:
        assert torch.equal(got[key], want[key]), key
    assert torch.equal(logits(again), logits(model))
    for key in SIZES:
        if key not in ("eos_token_id", "pad_token_id", "rope_theta"):
            assert getattr(again.config, key, SIZES[key]) == SIZES[key], key
    assert again.config.tie_word_embeddings == (name == "llama, tied")
    # What stands there is a checkpoint that ops understand.
    assert resolve(json.loads((tmp_path / "out/config.json").read_text()), found.tensors, Ablate(np.ones(64)))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_every_type_is_what_transformers_reads(name, kind, tmp_path):
    model = write(tmp_path / "m.gguf", name, kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    found = GGUF.open(tmp_path / "m.gguf")
    assert set(found.types.values()) == {kind, "F32"}
    ours = dict(found.arrays())
    assert ours.keys() == theirs.keys()
    step = {"F16": 1e-3, "BF16": 5e-3, "Q8_0": 5e-3, "Q4_0": 0.13}.get(kind, 0.08)
    for key, array in ours.items():
        assert array.dtype == np.float32
        assert np.array_equal(array, theirs[key].numpy()), key
        original = model.state_dict()[key].numpy()
        assert np.abs(array - original).max() <= step * np.abs(original).max(), key


def test_smollm2(smollm, tmp_path):
    from abjure.demo.smollm import model_file

    found = GGUF.open(model_file())
    assert found.config["num_hidden_layers"] == 30
    assert found.config["rms_norm_eps"] == 1e-5
    assert found.config["tie_word_embeddings"]
    theirs = smollm.model.state_dict()
    seen = 0
    for name, array in found.arrays():
        assert np.array_equal(array, theirs[name].numpy()), name
        seen += array.size
    assert seen == sum(p.numel() for p in smollm.model.parameters())
    for key in ("hidden_size", "num_key_value_heads", "intermediate_size", "vocab_size", "max_position_embeddings"):
        assert found.config[key] == getattr(smollm.model.config, key)
    assert "Q4_1 210" in str(found)
    assert found.to_dict()["types"] == {"Q8_0": 1, "F32": 61, "Q4_1": 210}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_shards_and_dtypes(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 500)  # several pieces for every tensor
    model = write(tmp_path / "m.gguf", "llama", "Q8_0")
    found = GGUF.open(tmp_path / "m.gguf")
    infos = found.save(tmp_path / "out", dtype, max_shard=30_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == kind
    for name, array in found.arrays():
        assert torch.equal(again.state_dict()[name], torch.from_numpy(array).to(kind)), name
        assert infos[name].dtype == dtype
    assert again.config.hidden_size == model.config.hidden_size


def test_bfloat16_is_rounded_to_nearest_even():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 1 << 16, dtype=np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        want = x.astype(ml_dtypes.bfloat16)
    got = module._to_bf16(x, "x").view(ml_dtypes.bfloat16)
    assert np.array_equal(np.isnan(want), np.isnan(got))
    assert np.array_equal(want[~np.isnan(want)], got[~np.isnan(want)])


def test_rope_scaling(tmp_path):
    write(tmp_path / "m.gguf", "llama", llama__rope__scaling__type="linear", llama__rope__scaling__factor=2.0)
    from_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.rope_parameters["factor"] == 2.0
    assert config.rope_parameters["rope_theta"] == 5e4
    write(tmp_path / "n.gguf", "llama", llama__rope__scaling__type="longrope")
    with pytest.raises(abjure.ArgumentError, match="rope scaling none, linear or yarn, got 'longrope'"):
        GGUF.open(tmp_path / "n.gguf")


def with_tensor(path, name, array, kind=None):
    """The file again with one more tensor."""
    model = build("llama")
    writer_add = GGUFWriter.write_header_to_file

    def more(self, *args, **kwargs):
        self.add_tensor(name, array, raw_dtype=kind)
        return writer_add(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFWriter, "write_header_to_file", more)
        write(path, "llama", model=model)


def test_what_is_not_supported_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    with_tensor(path, "rope_freqs.weight", np.ones(8, np.float32))
    with pytest.raises(abjure.ArgumentError, match=r'rope_freqs\.weight.*skip=\("rope_freqs\.weight",\)'):
        GGUF.open(path)
    assert GGUF.open(path, skip=("rope_freqs.weight",)).left_out == ("rope_freqs.weight",)
    with pytest.raises(abjure.ArgumentError, match="names of tensors in the file"):
        GGUF.open(path, skip=("rope",))
    with_tensor(path, "blk.0.ffn_gate_exps.weight", np.ones((2, 8), np.float32))
    with pytest.raises(abjure.ArgumentError, match=r"ffn_gate_exps.*dense llama model"):
        GGUF.open(path)
    with_tensor(path, "blk.2.attn_norm.weight", np.ones(64, np.float32))
    with pytest.raises(abjure.ArgumentError, match=r"model of 2 blocks, got 'model\.layers\.2\.input"):
        GGUF.open(path)
    with_tensor(path, "x.weight", np.zeros((1, 110), np.uint8), GGMLQuantizationType.IQ3_S)
    with pytest.raises(abjure.DTypeError, match=r"x\.weight is of GGUF type \w+; expected F32, F16"):
        GGUF.open(path)
    model = build("llama")
    model.config.num_hidden_layers = 3
    write(path, "llama", model=model)
    with pytest.raises(abjure.ArgumentError, match=r"a tensor for each of 'model\.layers\.2"):
        GGUF.open(path)
    model = build("llama")
    model.config.intermediate_size = 100
    write(path, "llama", model=model)
    with pytest.raises(abjure.ShapeError, match=r"gate_proj\.weight: expected shape \(100, 64\)"):
        GGUF.open(path)
    model.config.intermediate_size = 96
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 1e6
    write(path, "llama", model=model)
    found = GGUF.open(path)
    with pytest.raises(abjure.NonFiniteError, match="lm_head"):
        found.save(tmp_path / "out", "F16")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    with pytest.raises(abjure.ArgumentError, match="dtype"):
        found.save(tmp_path / "out", "F64")
    with pytest.raises(abjure.ArgumentError, match="does not exist yet"):
        found.save(tmp_path)
    with pytest.raises(abjure.ArgumentError, match="writable directory"):
        found.save(tmp_path / "none" / "out")
    with pytest.raises(abjure.ArgumentError, match="name: expected one of"):
        next(found.pieces("x"))


def test_damaged_files_are_refused(tmp_path):
    """Every truncation, and lengths that lie: an error, at once, without an allocation of that length."""
    path = tmp_path / "m.gguf"
    write(path, "llama")
    whole = path.read_bytes()
    bad = tmp_path / "bad.gguf"
    for end in [*range(64), *range(64, len(whole), 997)]:
        bad.write_bytes(whole[:end])
        with pytest.raises(abjure.ArgumentError):
            GGUF.open(bad)
    for at, value, words in [
        (0, b"GGML", "begins with b'GGML'"),
        (4, struct.pack("<I", 1), "version 2 or 3, got 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 40), "do not fit"),
        (16, struct.pack("<Q", 1 << 60), "do not fit"),
        (24, struct.pack("<Q", 1 << 62), "more are needed"),
    ]:
        bad.write_bytes(whole[:at] + value + whole[at + len(value) :])
        with pytest.raises(abjure.ArgumentError, match=words):
            GGUF.open(bad)
    rng = np.random.default_rng(0)
    header = whole.index(b"token_embd") + 2000
    opened = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, header, 3):
            damaged[at] = rng.integers(256)
        bad.write_bytes(damaged)
        try:
            found = GGUF.open(bad)
        except abjure.AbjureError:
            continue
        opened += 1
        assert sum(a.size for _, a in found.arrays()) == sum(np.prod(i.shape) for i in found.tensors.values())
    assert opened < 300
    with pytest.raises(abjure.ArgumentError, match="readable GGUF file"):
        GGUF.open(tmp_path / "none.gguf")


def test_block_sizes_are_those_of_the_package():
    assert {k: GGML_QUANT_SIZES[GGMLQuantizationType[k]] for k in module.SUPPORTED} == module._SIZES
    assert set(module.SUPPORTED) >= {"F32", "F16", "BF16", "Q8_0", "Q4_1"}
