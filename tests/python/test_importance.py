"""Importance of models as they are found: tied, frozen, normalised, adapted, half precision; and passes that stop."""

import copy
import os
import signal

import numpy as np
import pytest
import torch
from torch.nn import functional

import abjure
from abjure.forget import (
    Fisher,
    cross_entropy,
    dampen_,
    importance,
    output_norm,
    parameter_hash,
    squared_output_norm,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def oracle(model, batches, loss, power=2, names=None):
    """The plain loop in float64: ``mean |grad|^power`` over batches, by ``.backward()``."""
    model = copy.deepcopy(model).double().eval()
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                sums[n] += p.grad.abs() ** power
    return {n: s / len(batches) for n, s in sums.items()}


def agree(fisher, expected, rtol=1e-4, atol=1e-9):
    assert set(fisher.names) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(fisher[name]).double(), value, rtol=rtol, atol=atol)


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)
    )


def classified(batches=4, size=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shape = (batches, size, 5)
    x, y = torch.randn(shape, generator=g, dtype=dtype), torch.randint(0, 3, shape[:2], generator=g)
    return list(zip(x, y, strict=True))


def language_model(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"vocab_size": 61, "num_key_value_heads": 2, "tie_word_embeddings": True} | changes
    return LlamaForCausalLM(LlamaConfig(**sizes, **options))


def sequences(batches=3, size=2, length=7):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 61, (batches, size, length), generator=g)
    return [{"input_ids": i, "labels": i} for i in ids]


# What kinds of parameters there are


@pytest.mark.parametrize("per_sample", [False, True, "loop"])
def test_tied_embeddings_count_once_and_with_both_uses(per_sample):
    model, data = language_model(), sequences()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    fisher = importance(model, data, cross_entropy, per_sample, dtype="float64")
    assert "model.embed_tokens.weight" in fisher
    assert "lm_head.weight" not in fisher
    singles = [{k: v[i : i + 1] for k, v in b.items()} for b in data for i in range(2)]
    agree(fisher, oracle(model, singles if per_sample else data, lambda m, b: m(**b).loss))


@pytest.mark.parametrize("per_sample", [False, True, "loop"])
def test_frozen_and_unused_parameters_are_zero_and_can_be_included(per_sample):
    model = network()
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(4)))
    model[0].requires_grad_(False)
    data = classified(dtype=torch.float32)
    fisher = importance(model, data, cross_entropy, per_sample)
    assert fisher["unused"].tolist() == [0] * 4
    assert fisher["0.weight"].abs().sum() == 0
    assert fisher["4.weight"].abs().sum() > 0
    whole = importance(model, data, cross_entropy, per_sample, include_frozen=True)
    assert whole["0.weight"].abs().sum() > 0
    assert torch.equal(whole["4.weight"], fisher["4.weight"])
    assert not model[0].weight.requires_grad


def test_sparse_gradients_are_counted():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4, sparse=True), torch.nn.Linear(4, 3))
    data = [(torch.tensor([1, 1, 5]), torch.tensor([0, 1, 2])), (torch.tensor([2, 2, 2]), torch.tensor([0, 0, 1]))]
    dense = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3))
    dense.load_state_dict(model.state_dict())
    agree(importance(model, data, cross_entropy), oracle(dense, data, cross_entropy))


def test_batch_normalisation_in_eval_mode_and_its_statistics_left_alone():
    model, data = network(), classified(dtype=torch.float32)
    model(data[0][0])  # moves the statistics away from their start
    model.train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    fisher = importance(model, data, cross_entropy)
    agree(fisher, oracle(model, [(x.double(), y) for x, y in data], cross_entropy), rtol=2e-3)
    assert model.training
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())

    def training(m, batch):
        m.train()
        return cross_entropy(m, batch)

    with pytest.raises(abjure.ArgumentError, match=r"eval mode.*1\.running_mean"):
        importance(model, data, training)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


# Adapters


def adapted(**options):
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]} | options
    model = peft.get_peft_model(language_model(tie_word_embeddings=False), peft.LoraConfig(**settings))
    g = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():  # an adapter that does something
        if "lora_B" in name:
            torch.nn.init.normal_(p.data, std=0.1, generator=g)
    return model


def test_adapters_alone():
    model, data = adapted(), sequences()
    fisher = importance(model, data, cross_entropy)
    expected = oracle(model, data, lambda m, b: m(**b).loss)
    agree(fisher, expected, rtol=1e-3, atol=1e-8)
    moved = {name for name in fisher if fisher[name].abs().sum() > 0}
    assert moved == {name for name in fisher if "lora_" in name}
    assert len(moved) == 8
    report = dampen_(model, fisher, importance(model, sequences(5), cross_entropy), alpha=1.0)
    assert report.total.count > 0


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_base_weights_with_the_adapters_merged_in(options):
    model, data = adapted(**options), sequences()
    model.train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    fisher = importance(model, data, cross_entropy, merged=True)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert model.training
    assert not any(m.merged for m in model.modules() if hasattr(m, "merged"))

    merged = copy.deepcopy(model).merge_and_unload()
    merged.requires_grad_(True)
    expected = oracle(merged, data, lambda m, b: m(**b).loss)
    agree(fisher, expected, rtol=2e-3, atol=1e-7)
    # It is the merged model's, not that of the base without its adapter.
    plain = oracle(language_model(tie_word_embeddings=False), data, lambda m, b: m(**b).loss)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(plain[name], expected[name], rtol=0.05)
    each = importance(model, data, cross_entropy, True, merged=True)
    agree(each, importance_of(merged, data), rtol=1e-3)
    assert dampen_(merged, fisher, importance(model, sequences(5), cross_entropy, merged=True), 1.0).total.count > 0


def importance_of(model, data):
    found = importance(model, data, cross_entropy, "loop")
    return {n: found[n].double() for n in found}


def test_merging_needs_adapters_that_are_not_merged():
    with pytest.raises(abjure.ArgumentError, match=r"merged.*peft"):
        importance(network(), classified(), cross_entropy, merged=True)
    model = adapted()
    model.merge_adapter()
    with pytest.raises(abjure.ArgumentError, match="not merged yet"):
        importance(model, sequences(), cross_entropy, merged=True)
    assert all(m.merged for m in model.modules() if hasattr(m, "merged"))


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_sample", [False, True])
def test_half_precision_models_keep_their_small_squares(dtype, per_sample):
    """Gradients around 1e-4: their squares vanish in float16, and 600 of them stall in bfloat16."""
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 4, bias=False).to(dtype)
    x = (torch.randn(1, 16) * 1e-4).to(dtype)
    data = [(x, torch.tensor([1]))] * 600

    def loss(m, batch):
        return functional.cross_entropy(m(batch[0]).float(), batch[1])

    naive = torch.zeros_like(model.weight)
    exact = torch.zeros(4, 16, dtype=torch.float64)
    for batch in data:
        (g,) = torch.autograd.grad(loss(model, batch), [model.weight])
        naive += g**2
        exact += g.double() ** 2
    fisher = importance(model, data, loss, per_sample)
    torch.testing.assert_close(fisher.sum("weight").double(), exact, rtol=1e-4, atol=0)
    assert float(naive.double().sum()) < 0.7 * float(exact.sum())


def test_loss_scale_saves_gradients_that_vanish_in_float16():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3, bias=False).half()
    data = [(torch.full((2, 8), 2e-3).half(), torch.tensor([0, 1]))]

    def loss(m, batch):
        return 1e-5 * functional.cross_entropy(m(batch[0]).float(), batch[1])

    exact = oracle(model, [(data[0][0].double(), data[0][1])], loss)
    assert importance(model, data, loss)["weight"].sum() == 0
    for options in ({}, {"per_sample": True}, {"accumulate": 2}, {"power": 1}):
        options = {"loss_scale": 2.0**16} | options
        scaled = importance(model, data, loss, **options)
        assert scaled["weight"].min() > 0
        assert scaled.count == (2 if "per_sample" in options else 1)
        if "per_sample" not in options and "power" not in options:
            agree(scaled, exact, rtol=0.02, atol=0)
    with pytest.raises(abjure.ArgumentError, match=r"loss_scale.*power of two.*1000"):
        importance(model, data, loss, loss_scale=1000.0)


# How gradients are combined


def test_accumulated_batches_are_one_big_batch():
    model = network().double()
    data = classified(4, 6)
    ragged = [*data, (data[0][0][:2], data[0][1][:2])]
    joined = [tuple(torch.cat(part) for part in zip(*ragged[i : i + 2], strict=True)) for i in (0, 2, 4)]
    joined[2] = ragged[4]
    for loader, big in ((data, joined[:2]), (ragged, joined)):
        fisher = importance(model, loader, cross_entropy, accumulate=2, dtype="float64")
        assert fisher.count == len(big)
        agree(fisher, oracle(model, big, cross_entropy), rtol=1e-10)
    # Micro-batches of different sizes weigh what they hold.
    pieces = [(data[0][0][:4], data[0][1][:4]), (data[0][0][4:], data[0][1][4:])]
    fisher = importance(model, pieces, cross_entropy, accumulate=2, dtype="float64")
    agree(fisher, oracle(model, data[:1], cross_entropy), rtol=1e-10)
    assert fisher.provenance["accumulate"] == 2


def test_accumulated_means_over_tokens_weigh_their_tokens():
    model, (batch,) = language_model(), sequences(1, 4)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, :5] = -100
    pieces = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]

    def tokens(b):
        return int((b["labels"][:, 1:] != -100).sum())

    assert tokens(pieces[0]) < tokens(pieces[1])
    expected = oracle(model, [batch], lambda m, b: m(**b).loss)
    agree(importance(model, pieces, cross_entropy, accumulate=2, size=tokens), expected, rtol=1e-3, atol=1e-9)
    by_examples = importance(model, pieces, cross_entropy, accumulate=2)
    assert not np.allclose(by_examples["model.norm.weight"], expected["model.norm.weight"], rtol=1e-2)


@pytest.mark.parametrize("per_sample", [False, True, "loop"])
def test_weights_are_repetitions(per_sample):
    model, ((x, y),) = network().double(), classified(1, 4)
    w = torch.tensor([2, 0, 1, 3])
    repeated = (x.repeat_interleave(w, 0), y.repeat_interleave(w, 0))

    def each(m, batch):
        return functional.cross_entropy(m(batch[0]), batch[1], reduction="none")

    loss = cross_entropy if per_sample else each
    fisher = importance(model, [(x, y)], loss, per_sample, weights=lambda b: w, dtype="float64")
    agree(fisher, {n: v.double() for n, v in means(model, [repeated], per_sample).items()}, rtol=1e-10)
    assert fisher.count == (6 if per_sample else 1)


def means(model, data, per_sample):
    found = importance(model, data, cross_entropy, per_sample, dtype="float64")
    return {n: found[n] for n in found}


def test_per_sample_squares_have_a_closed_form():
    """Linear layer, squared error: the gradient of an example is ``2 (w·x + b - y) x``."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 1).double()
    x, y = torch.randn(10, 6).double(), torch.randn(10, 1).double()

    def loss(m, batch):
        return ((m(batch[0]) - batch[1]) ** 2).mean()

    with torch.no_grad():
        residual = 2 * (model(x) - y)
        weight = ((residual * x) ** 2).mean(0, keepdim=True)
        bias = (residual**2).mean(0)
    for per_sample in (True, "loop"):
        agree(importance(model, [(x, y)], loss, per_sample, dtype="float64"), {"weight": weight, "bias": bias}, 1e-12)


# Without labels


class Logits(torch.nn.Module):
    """A model whose logits are its parameters, so that the gradient with respect to them shows."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.as_tensor(logits, dtype=torch.float64))

    def forward(self, x):
        return self.logits


REFERENCE = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]


def test_squared_output_norm_is_that_of_the_reference():
    model = Logits(REFERENCE)
    assert squared_output_norm(model, torch.zeros(2)).item() == 7.625
    fisher = importance(model, [torch.zeros(2)], squared_output_norm, dtype="float64")
    assert fisher.power == 1
    assert fisher["logits"].tolist() == np.abs(REFERENCE).tolist()


def test_output_norm_and_its_gradient_at_zero():
    model = Logits([*REFERENCE, [0.0, 0.0, 0.0]])
    f = np.array([*REFERENCE, [0.0] * 3])
    norms = np.linalg.norm(f, axis=1, keepdims=True)
    assert output_norm(model, torch.zeros(3)).item() == pytest.approx(norms.mean(), rel=1e-15)
    fisher = importance(model, [torch.zeros(3)], output_norm, dtype="float64")
    expected = np.abs(f) / np.where(norms > 0, norms, 1) / 3
    np.testing.assert_allclose(fisher["logits"], expected, rtol=1e-14)


@pytest.mark.parametrize("criterion", [squared_output_norm, output_norm])
@pytest.mark.parametrize("per_sample", [False, True, "loop"])
def test_label_free_importance_by_hand(criterion, per_sample):
    """One linear layer: the gradient of ``mean ‖Wx‖²`` is ``2/b Σ Wx xᵀ``, that of ``mean ‖Wx‖`` has ``1/‖Wx‖`` too."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3, bias=False).double()
    x = np.random.default_rng(0).normal(size=(3, 5, 4))
    w = model.weight.detach().numpy()
    f = x @ w.T
    factor = 2.0 if criterion is squared_output_norm else 1 / np.linalg.norm(f, axis=-1, keepdims=True)
    each = np.einsum("bni,bnj->bnij", factor * f, x)
    exact = np.abs(each).mean((0, 1)) if per_sample else np.abs(each.mean(1)).mean(0)
    labels = torch.full((3, 5), 10**6)  # never read
    data = list(zip(torch.as_tensor(x), labels, strict=True))
    fisher = importance(model, data, criterion, per_sample, dtype="float64")
    np.testing.assert_allclose(fisher["weight"], exact, rtol=1e-12)
    assert fisher.power == 1
    assert fisher.provenance["loss"] == criterion.name


def test_label_free_importance_leaves_padding_out():
    model = language_model()
    ids = torch.randint(0, 61, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    other = torch.where(mask.bool(), ids, 7)
    values = [squared_output_norm(model, {"input_ids": i, "attention_mask": mask}).item() for i in (ids, other)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_powers_do_not_mix(tmp_path):
    model, data = network(), classified(dtype=torch.float32)
    one, two = importance(model, data, squared_output_norm), importance(model, data, cross_entropy)
    for call in (one.merge, one.subtract):
        with pytest.raises(abjure.ArgumentError, match="power 1, got 2"):
            call(two)
    one.save(tmp_path / "one")
    loaded = Fisher.load(tmp_path / "one")
    assert loaded.power == 1
    assert loaded.merge(one.copy()).power == 1
    assert Fisher.from_state_dict(one.state_dict()).power == 1
    assert "power 1" in repr(one)
    squares = importance(model, data, squared_output_norm, power=2)
    assert squares.power == 2
    with pytest.raises(abjure.ArgumentError, match="power: expected 1 or 2, got 3"):
        importance(model, data, cross_entropy, power=3)


# Stopping and going on


class Stops:
    """A loader that raises once it has given ``after`` batches."""

    def __init__(self, data, after, error=KeyboardInterrupt):
        self.data, self.after, self.error = data, after, error

    def __iter__(self):
        yield from self.data[: self.after]
        raise self.error


def same(a, b):
    assert a.names == b.names
    assert a.count == b.count
    return all(torch.equal(torch.as_tensor(a.sum(n)), torch.as_tensor(b.sum(n))) for n in a)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_sample": True},
        {"per_sample": "loop"},
        {"accumulate": 2},
        {"power": 1, "dtype": "float64"},
        {"per_sample": True, "weights": lambda b: torch.arange(1.0, 7.0)},
    ],
)
def test_a_resumed_pass_has_the_same_bits(tmp_path, options):
    model, data = network(), classified(7, dtype=torch.float32)
    whole = importance(model, data, cross_entropy, **options)
    path = tmp_path / "pass.safetensors"
    for after in (1, 3, 5):  # stopped three times, with accumulate=2 in the middle of a group
        with pytest.raises(KeyboardInterrupt):
            importance(model, Stops(data, after), cross_entropy, checkpoint=path, **options)
        assert path.exists() == (after > 1 or "accumulate" not in options)
    resumed = importance(model, data, cross_entropy, checkpoint=path, **options)
    assert same(whole, resumed)
    drop = {"date"}
    assert {k: v for k, v in whole.provenance.items() if k not in drop} == {
        k: v for k, v in resumed.provenance.items() if k not in drop
    }

    # A complete one is read again, and its batches are only compared.
    def never(m, b):
        raise AssertionError("called")

    never.name = "cross_entropy"
    assert same(
        whole,
        importance(
            model, data, never, checkpoint=path, power=whole.power, **{k: v for k, v in options.items() if k != "power"}
        ),
    )
    assert os.listdir(tmp_path) == ["pass.safetensors"]


def test_checkpoints_are_written_while_the_pass_runs(tmp_path):
    model, data = network(), classified(6, dtype=torch.float32)
    path = tmp_path / "pass"
    seen = []

    def watched():
        for batch in data:
            seen.append(Fisher.load(path).count if path.exists() else 0)
            yield batch

    importance(model, watched(), cross_entropy, checkpoint=path, every=2)
    assert seen == [0, 0, 2, 2, 4, 4]
    assert Fisher.load(path).count == 6


def test_another_pass_does_not_continue_a_checkpoint(tmp_path):
    model, data = network(), classified(4, dtype=torch.float32)
    path = tmp_path / "pass"
    with pytest.raises(KeyboardInterrupt):
        importance(model, Stops(data, 2), cross_entropy, checkpoint=path)
    content = path.read_bytes()
    other = network(seed=1)
    wider = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.BatchNorm1d(9), *network()[2:4], torch.nn.Linear(9, 3))
    shuffled = [data[1], data[0], *data[2:]]
    cases = [
        (other, data, cross_entropy, {}, "parameters"),
        (wider, data, cross_entropy, {}, r"'0.bias': expected shape \(9,\), got \(8,\)"),
        (torch.nn.Linear(5, 3), data, cross_entropy, {}, "parameter names"),
        (model, data, lambda m, b: cross_entropy(m, b), {}, "loss"),
        (model, data, cross_entropy, {"per_sample": True}, "unit"),
        (model, data, cross_entropy, {"power": 1}, "power"),
        (model, data, cross_entropy, {"dtype": "float64"}, "dtype"),
        (model, data, cross_entropy, {"accumulate": 2}, "accumulate"),
        (model, data, cross_entropy, {"loss_scale": 2.0}, "loss_scale"),
        (model, shuffled, cross_entropy, {}, "first 2 batches again"),
        (model, data[:1], cross_entropy, {}, "at least 2 batches, got 1"),
    ]
    for who, what, loss, options, match in cases:
        who.train()
        with pytest.raises(abjure.ArgumentError, match=match):
            importance(who, what, loss, checkpoint=path, **options)
        assert path.read_bytes() == content
        assert who.training
    with pytest.raises(abjure.ArgumentError, match=r"every.*got 0"):
        importance(model, data, cross_entropy, checkpoint=path, every=0)
    with pytest.raises(abjure.ArgumentError, match="existing folder"):
        importance(model, data, cross_entropy, checkpoint=tmp_path / "nowhere" / "pass")
    importance(model, data, cross_entropy, checkpoint=path)
    with pytest.raises(abjure.ArgumentError, match="4 batches as before, got more"):
        importance(model, [*data, data[0]], cross_entropy, checkpoint=path)
    importance(model, data, cross_entropy).save(path)
    with pytest.raises(abjure.ArgumentError, match="got a Fisher file"):
        importance(model, data, cross_entropy, checkpoint=path)


def test_ctrl_c_while_a_gradient_is_added(tmp_path):
    """The signal comes in the middle of a backward pass: that batch is completed, then the pass stops."""
    model, data = network(), classified(5, dtype=torch.float32)
    model.train()
    whole = importance(model, data, cross_entropy)
    path = tmp_path / "pass"
    calls = []

    def interrupting(m, batch):
        calls.append(0)
        value = cross_entropy(m, batch)
        if len(calls) == 3:
            value.register_hook(lambda g: os.kill(os.getpid(), signal.SIGINT))
        return value

    interrupting.name = "cross_entropy"
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        importance(model, data, interrupting, checkpoint=path, every=100)
    assert len(calls) == 3
    assert signal.getsignal(signal.SIGINT) is handler
    assert all(m.training for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())
    assert Fisher.load(path).count == 3
    assert same(whole, importance(model, data, interrupting, checkpoint=path))
    assert len(calls) == 5


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_checkpoint(tmp_path):
    model, data = network(), classified(5, dtype=torch.float32)
    path = tmp_path / "pass"
    calls = []

    def twice(g):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    def impatient(m, batch):
        calls.append(0)
        value = cross_entropy(m, batch)
        if len(calls) == 3:
            value.register_hook(twice)
        return value

    impatient.name = "cross_entropy"
    whole = importance(model, data, cross_entropy)
    with pytest.raises(KeyboardInterrupt):
        importance(model, data, impatient, checkpoint=path, every=2)
    assert Fisher.load(path).count == 2
    assert same(whole, importance(model, data, impatient, checkpoint=path, every=2))


# Where it comes from


def test_provenance_is_saved_and_read_back(tmp_path):
    model, data = language_model(), sequences()
    notes = {"purpose": "übung", "request": [1, 2]}
    fisher = importance(model, data, cross_entropy, notes=notes)
    facts = fisher.provenance
    assert facts["model"].endswith("LlamaForCausalLM")
    assert facts["parameters"] == parameter_hash(model)
    assert (facts["loss"], facts["batches"], facts["examples"], facts["mode"]) == ("cross_entropy", 3, 6, "eval")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["notes"] == notes
    fisher.save(tmp_path / "fisher")
    loaded = Fisher.load(tmp_path / "fisher")
    assert loaded.provenance == facts
    assert fisher.copy().provenance == facts
    assert "LlamaForCausalLM" in fisher._repr_html_()
    merged = loaded.merge(fisher)
    assert merged.provenance == {"merge": [facts, facts]}
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert parameter_hash(model) != facts["parameters"]
    again = importance(model, list(reversed(data)), lambda m, b: m(**b).loss).provenance
    assert again["data"] != facts["data"]
    assert "<lambda>" in again["loss"]
    with pytest.raises(abjure.ArgumentError, match="notes"):
        importance(model, data, cross_entropy, notes={1, 2})
    fisher.provenance["extra"] = object()
    with pytest.raises(abjure.ArgumentError, match="provenance"):
        fisher.save(tmp_path / "other")
    assert os.listdir(tmp_path) == ["fisher"]


# What is refused


def half_bad(data, at, change):
    return [change(b) if i == at else b for i, b in enumerate(data)]


@pytest.mark.parametrize(
    ("change", "options", "error", "match"),
    [
        (lambda b: (b[0], b[1] + 7), {}, abjure.ArgumentError, r"labels: expected 0 to 2 or -100, got"),
        (lambda b: (b[0], b[1] - 9), {}, abjure.ArgumentError, "labels"),
        (lambda b: (b[0], b[1][:2]), {}, abjure.ArgumentError, r"labels: expected shape \(6,\), got \(2,\)"),
        (lambda b: b[0], {}, abjure.ArgumentError, "with labels"),
        (lambda b: (b[0] * float("inf"), b[1]), {}, abjure.NonFiniteError, "loss: batch 2: .*nan"),
        (lambda b: (b[0] * float("nan"), b[1]), {"per_sample": "loop"}, abjure.NonFiniteError, "batch 2, example 0"),
        (lambda b: (b[0] * float("nan"), b[1]), {"per_sample": True}, abjure.NonFiniteError, "batch 2, example 0"),
        (lambda b: (b[0], b[1] + 7), {"per_sample": True}, abjure.ArgumentError, "batch 2: expected labels"),
        (lambda b: (b[0], b[1] + 7), {"per_sample": "loop"}, abjure.ArgumentError, "labels"),
        (lambda b: b, {"accumulate": 0}, abjure.ArgumentError, "accumulate"),
        (lambda b: b, {"accumulate": 2, "per_sample": True}, abjure.ArgumentError, "accumulate"),
        (lambda b: b, {"weights": lambda b: [1.0] * 5, "per_sample": True}, abjure.ShapeError, r"weights.*\(6,\)"),
        (lambda b: b, {"weights": lambda b: [-1.0] * 6, "per_sample": True}, abjure.ArgumentError, "weights: batch 1"),
        (lambda b: b, {"weights": lambda b: [0.0] * 6}, abjure.ArgumentError, "weights: batch 1.*above 0"),
        (lambda b: b, {"weights": lambda b: [1.0] * 6}, abjure.ArgumentError, "value for each of 6"),
        (lambda b: b, {"accumulate": 2, "size": lambda b: 0}, abjure.ArgumentError, "size: batch 1"),
        (lambda b: b, {"dtype": "bfloat16"}, abjure.ArgumentError, "dtype"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(change, options, error, match):
    model = network()
    model.train()
    data = half_bad(classified(3, dtype=torch.float32), 1, change)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(error, match=match):
        importance(model, data, cross_entropy, **options)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())


def test_other_losses_name_the_batch_of_an_index_out_of_range():
    data = half_bad(classified(3, dtype=torch.float32), 2, lambda b: (b[0], b[1] + 7))
    with pytest.raises(abjure.ArgumentError, match=r"batch 3: expected labels and tokens in range"):
        importance(network(), data, lambda m, b: functional.cross_entropy(m(b[0]), b[1]))
    tokens = sequences()
    tokens[1]["input_ids"] = tokens[1]["input_ids"] + 61
    with pytest.raises(abjure.ArgumentError, match="batch 2"):
        importance(language_model(), tokens, lambda m, b: m(**b).loss)


def test_losses_that_cannot_be_differentiated():
    data = classified(1, dtype=torch.float32)
    with pytest.raises(abjure.ArgumentError, match="constant"):
        importance(network(), data, lambda m, b: cross_entropy(m, b).detach())
    with pytest.raises(abjure.ArgumentError, match="outputs"):
        importance(torch.nn.LSTM(5, 3), [data[0][0]], squared_output_norm)
    with pytest.raises(abjure.DegenerateError, match="at least one batch"):
        importance(network(), iter(()), cross_entropy)
    mixed = [{"x": torch.zeros(2, 5), "y": torch.zeros(3)}]
    with pytest.raises(abjure.ArgumentError, match="size="):
        importance(network(), mixed, lambda m, b: m(b["x"]).sum(), accumulate=2)


def test_weights_of_stacked_gradients():
    g = np.random.default_rng(0).normal(size=(3, 4))
    w = np.array([0.5, 0.0, 2.0])
    for power in (1, 2):
        fisher = Fisher("sample", "float64", power).update({"w": g}, w, stacked=True)
        assert fisher.count == 2.5
        np.testing.assert_allclose(fisher.sum("w"), (w[:, None] * np.abs(g) ** power).sum(0), rtol=1e-14)
    for bad in ([1.0, 2.0], [1.0, -1.0, 1.0], [0.0] * 3, [[1.0] * 3]):
        with pytest.raises(abjure.ArgumentError, match="weight"):
            fisher.update({"w": g}, bad, stacked=True)
    with pytest.raises(abjure.ArgumentError, match="one number"):
        Fisher("sample").update({"w": g[0]}, [1.0, 2.0])
    assert fisher.count == 2.5
