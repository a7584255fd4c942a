"""Recording of prompt sets: positions by name, padding, batches, streaming and shards."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import abjure
from abjure import refuse

TEXTS = [
    "How do I bake bread?",
    "Tell me a joke about cats and about dogs, and explain it",
    "assistant",
    " What is 2+2 ?\n",
    "Wie heißt die Hauptstadt von Österreich?",
    "List three colours",
]
LABELS = [1, 0, 1, 1, 0, 0]


@pytest.fixture(scope="module")
def tokenizer(loaded_smollm):
    return loaded_smollm.tokenizer


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return refuse.Prompts(tokenizer, TEXTS)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    return AutoModelForCausalLM.from_config(config).double()


def alone(model, prompts, i, layer, site="pre"):
    """The stream of one prompt run by itself, without padding or mask."""
    with torch.no_grad(), refuse.recording(model.eval(), [layer], site=site) as record:
        model(torch.tensor([prompts[i].ids]))
    return record[layer][0].numpy()


def test_positions_are_those_of_the_rendered_template(tokenizer, prompts):
    for prompt, text in zip(prompts, TEXTS, strict=True):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(prompt.ids) == rendered
        until = tokenizer.decode(prompt.ids[: prompt.instruction_end + 1])
        assert until.rstrip().endswith(text.strip())
        assert not tokenizer.decode(prompt.ids[: prompt.instruction_end]).rstrip().endswith(text.strip())
    tail = tokenizer.decode(prompts[0].ids[-prompts.post_instruction :])
    assert tail == "<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.position_keys("post_instruction") == list(range(-prompts.post_instruction, 0))
    assert prompts.position_keys(["last:3", "last", "last_instruction", -2]) == [-3, -2, -1, "last_instruction"]
    assert prompts.token_names([-1, "last_instruction"]) == {-1: "\n", "last_instruction": "?"}


def test_an_instruction_that_occurs_in_the_template_is_found_where_it_stands(tokenizer, prompts):
    ids = prompts[2].ids
    assert tokenizer.decode(ids[prompts[2].instruction_end]) == "istant"
    assert prompts[2].instruction_end < len(ids) - prompts.post_instruction


def test_system_opening_and_plain_text(tokenizer):
    system = refuse.Prompts(tokenizer, TEXTS[:1], system="Be brief.", opening="Sure")
    text = tokenizer.decode(system[0].ids)
    assert "Be brief." in text
    assert text.endswith("assistant\nSure")
    assert tokenizer.decode(system[0].ids[system[0].instruction_end]) == "?"
    plain = refuse.Prompts(tokenizer, TEXTS[:1], template=False)
    assert plain[0].instruction_end == len(plain[0].ids) - 1
    with pytest.raises(abjure.ArgumentError, match="no token follows"):
        plain.position_keys("post_instruction")


@pytest.mark.parametrize("batch_size", [1, 2, 6])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("site", ["pre", "post"])
def test_streamed_means_equal_those_of_single_prompts(tokenizer, model, batch_size, side, site):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    prompts = refuse.Prompts(tokenizer, TEXTS)
    found = refuse.record_prompts(
        model, prompts, LABELS, [0, -1], ["last_instruction", "last:2", "all"], site=site, batch_size=batch_size
    )
    assert found.layers == [0, 2]
    assert found.positions == ["last_instruction", -2, -1, "all"]
    for layer in found.layers:
        streams = [alone(model, prompts, i, layer, site) for i in range(len(TEXTS))]
        for position in found.positions:
            rows = [s if position == "all" else s[[p.index(position)]] for s, p in zip(streams, prompts, strict=True)]
            for label, mean in enumerate(found[layer, position].means):
                want = np.concatenate([r for r, y in zip(rows, LABELS, strict=True) if y == label]).mean(0)
                np.testing.assert_allclose(mean, want, rtol=0, atol=1e-12 * np.abs(want).max() + 1e-14)
    direction = found[2, -1].difference_in_means()
    assert (direction.layer, direction.site, direction.position, direction.counts) == (2, site, -1, (3, 3))
    assert found[2, "last_instruction"].difference_in_means().position == "last_instruction"


def test_absolute_positions_do_not_move_with_padding(tokenizer, prompts):
    torch.manual_seed(0)
    gpt2 = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_head=4, n_layer=2)
    ).double()
    one, many = (refuse.record_prompts(gpt2, prompts, LABELS, positions="last", batch_size=b) for b in (1, 6))
    for key in one:
        for a, b in zip(one[key].means, many[key].means, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


def test_layer_zero_has_no_direction_where_all_prompts_share_the_token(model, prompts):
    found = refuse.record_prompts(model, prompts, LABELS, positions="last")
    directions = found.directions()
    assert (0, -1) not in directions
    assert set(directions) == {(1, -1), (2, -1)}
    assert set(found.cosines(-1, found, -1)) == {1, 2}
    assert found.cosines(-1, found, -1)[2] == pytest.approx(1)
    assert "layer" in found._repr_html_()


def test_merging_halves_equals_the_whole(tokenizer, model, prompts):
    halves = [refuse.Prompts(tokenizer, TEXTS[i::2]) for i in range(2)]
    a, b = (refuse.record_prompts(model, p, LABELS[i::2], [1], "last") for i, p in enumerate(halves))
    whole = refuse.record_prompts(model, prompts, LABELS, [1], "last")
    a.merge(b)
    np.testing.assert_allclose(a[1, -1].means, whole[1, -1].means, atol=1e-12)
    with pytest.raises(abjure.ArgumentError, match="expected layers"):
        a.merge(refuse.record_prompts(model, prompts, LABELS, [0], "last"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_give_back_what_was_recorded(tmp_path, monkeypatch, model, prompts, dtype):
    from abjure.refuse import record

    monkeypatch.setattr(record, "_SHARD_BYTES", 2000)
    positions = ["last_instruction", "last", "all"]
    written = refuse.record_to_disk(
        model, prompts, LABELS, tmp_path / "a", [0, 2], positions, dtype=dtype, batch_size=2
    )
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    again = refuse.Activations(tmp_path / "a")
    assert repr(again) == repr(written)
    streamed = refuse.record_prompts(model, prompts, LABELS, [0, 2], positions, covariance=True)
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    for key in streamed:
        x, y, owners = again.array(*key)
        assert x.dtype == getattr(torch, dtype)
        assert (np.diff(owners) >= 0).all()
        np.testing.assert_array_equal(y, np.asarray(LABELS)[owners])
        contrast = again.contrast(*key, covariance=True)
        assert contrast.counts == streamed[key].counts
        np.testing.assert_allclose(contrast.means, streamed[key].means, atol=tolerance)
    with pytest.raises(abjure.ArgumentError, match="layers \\[0, 2\\]"):
        again.array(1, -1)
    with pytest.raises(abjure.ArgumentError, match="no activations in it"):
        refuse.record_to_disk(model, prompts, LABELS, tmp_path / "a")


def test_an_interrupted_recording_is_not_taken_for_a_complete_one(tmp_path, monkeypatch, model, prompts):
    from abjure.refuse import record

    calls = []

    def failing(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        path.write_bytes(content)

    monkeypatch.setattr(record, "_SHARD_BYTES", 500)
    monkeypatch.setattr(record, "write_atomically", failing)
    with pytest.raises(KeyboardInterrupt):
        refuse.record_to_disk(model, prompts, LABELS, tmp_path, batch_size=1)
    with pytest.raises(abjure.ArgumentError, match="expected recorded activations"):
        refuse.Activations(tmp_path)
    (tmp_path / "abjure.activations.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(abjure.ArgumentError, match="expected recorded activations"):
        refuse.Activations(tmp_path)


def test_non_finite_activations_name_layer_and_prompt_and_the_model_is_restored(tokenizer, model):
    broken = copy.deepcopy(model).train()
    prompts = refuse.Prompts(tokenizer, TEXTS)
    token = next(t for t in prompts[4].ids if all(t not in p.ids for i, p in enumerate(prompts) if i != 4))
    with torch.no_grad():
        broken.model.embed_tokens.weight[token] = float("nan")
    with pytest.raises(abjure.NonFiniteError, match=r"layer 0: non-finite activation at prompt 4 \('Wie"):
        refuse.record_prompts(broken, prompts, LABELS, positions="all", batch_size=6)
    assert broken.training
    assert broken.model.layers[0].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in broken.modules())


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"layers": [3]}, abjure.ArgumentError, "layers: expected -3 to 2"),
        ({"layers": "model.norm"}, abjure.ArgumentError, "indices of blocks"),
        ({"positions": "first"}, abjure.ArgumentError, "positions: expected"),
        ({"positions": -500}, abjure.ArgumentError, "the shortest prompt"),
        ({"positions": []}, abjure.ArgumentError, "at least one position"),
        ({"labels": [0, 1]}, abjure.ShapeError, "one per prompt"),
        ({"labels": [2] * 6}, abjure.ArgumentError, "0 or 1"),
        ({"batch_size": 0}, abjure.ArgumentError, "batch_size"),
        ({"site": "mid"}, abjure.ArgumentError, "site"),
        ({"covariance": [9]}, abjure.ArgumentError, "covariance"),
    ],
)
def test_bad_arguments(model, prompts, kwargs, error, words):
    with pytest.raises(error, match=words):
        refuse.record_prompts(model, prompts, **{"labels": LABELS, **kwargs})


def test_bad_prompts(tokenizer):
    for texts, error in [("one", abjure.DTypeError), ([3], abjure.DTypeError), ([], abjure.ArgumentError)]:
        with pytest.raises(error, match="texts"):
            refuse.Prompts(tokenizer, texts)
    with pytest.raises(abjure.ArgumentError, match="empty string at index 1"):
        refuse.Prompts(tokenizer, ["a", " "])
    changing = copy.deepcopy(tokenizer)
    changing.chat_template = "{{ messages[0]['content'] | upper }}\nA:"
    with pytest.raises(abjure.ArgumentError, match="template"):
        refuse.Prompts(changing, ["hello"])
    changing.chat_template = None
    with pytest.raises(abjure.ArgumentError, match="template=False"):
        refuse.Prompts(changing, ["hello"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark of memory")
def test_memory_does_not_grow_with_the_prompts(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)

    def run(count):
        texts = [f"Write {i} lines about the number {i}." for i in range(count)]
        prompts = refuse.Prompts(tokenizer, texts)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        refuse.record_prompts(model, prompts, [0, 1] * (count // 2), positions="all")
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

    run(16)
    first = run(16)
    # All that is seen of 512 prompts: 512 × 43 tokens × 3 layers × 256 × 4 B = 68 MB, and logits would be 4 GB.
    assert run(512) - first < 20_000


def test_saved_recordings_and_samples(tmp_path, tokenizer, model, prompts):
    recorded = refuse.record_prompts(model, prompts, LABELS, [1, 2], ["last_instruction", "last"], reservoir=2, seed=3)
    recorded.save(tmp_path / "a")
    again = refuse.Contrasts.load(tmp_path / "a")
    assert list(again) == list(recorded)
    assert again.token_names == recorded.token_names
    for key in recorded:
        np.testing.assert_array_equal(again[key].means, recorded[key].means)
        rows, labels = again[key].sample
        np.testing.assert_array_equal(rows, recorded[key].sample[0])
        assert labels.tolist() == [0, 0, 1, 1]
    other = refuse.record_prompts(model, prompts, LABELS, [1, 2], ["last_instruction", "last"], reservoir=2, seed=4)
    assert again.merge(other)[1, -1].counts == (6, 6)
    with pytest.raises(abjure.ArgumentError, match="seed"):
        again.merge(recorded)
    again[1, -1].save(tmp_path / "one")
    with pytest.raises(abjure.ArgumentError, match="not a saved Contrasts"):
        refuse.Contrasts.load(tmp_path / "one")
