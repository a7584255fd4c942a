"""The unlearning trainer on a tiny random model: what it computes, that it forgets, that it stops, adapters."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys

import pytest
import torch
import transformers

from abjure import ArgumentError, DegenerateError, ShapeError, forget
from abjure.integrations.trainer import (
    LOSSES,
    PaddingCollator,
    RetainLossStop,
    UnlearnDataset,
    UnlearnTrainer,
    reference_logprobs,
)

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 40


def examples(n, seed):
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        ids = torch.randint(1, VOCAB, (6 + i % 3,), generator=g)
        labels = ids.clone()
        labels[:3] = -100
        out.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return out


FORGET, RETAIN, OTHER = examples(8, 0), examples(12, 1), examples(8, 2)


def network():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def nll(model, data):
    with torch.no_grad():
        batch = PaddingCollator()(data)
        out = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return float(forget.nll((out.logits, batch["labels"])))


@pytest.fixture(scope="module")
def taught():
    """A model that knows the forget and the retain set."""
    model = network().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = PaddingCollator()(FORGET + RETAIN)
    for _ in range(120):
        loss = forget.nll((model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits, batch["labels"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert nll(model, FORGET) < 0.1
    return model


def arguments(tmp_path, **options):
    wanted = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
        "dataloader_pin_memory": False, "seed": 3, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return transformers.TrainingArguments(**{**wanted, **options})


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_by_name_trains(taught, tmp_path, loss):
    model = copy.deepcopy(taught)
    trainer = UnlearnTrainer(
        model, arguments(tmp_path), forget_dataset=FORGET, retain_dataset=RETAIN, alternative_dataset=OTHER, loss=loss
    )
    trainer.train()
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), taught.parameters(), strict=True)]
    assert any(moved)
    entries = [e for e in trainer.state.log_history if "forget_loss" in e]
    assert len(entries) == 3
    assert all("retain_loss" in e for e in entries)
    assert nll(model, FORGET) > nll(taught, FORGET)


def test_first_step_is_that_of_a_plain_loop(taught, tmp_path):
    """The gradient of one step with accumulation equals the plain formula on the same examples."""
    model = copy.deepcopy(taught)
    seen = {}

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters()})

    trainer = UnlearnTrainer(
        model,
        arguments(tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_grad_norm=0),
        forget_dataset=FORGET,
        retain_dataset=RETAIN,
        loss="npo",
        loss_options={"beta": 0.5},
        retain_weight=0.3,
        callbacks=[Watch()],
    )
    trainer.prepare_reference()
    drawn, collate = [], trainer.data_collator
    trainer.data_collator = lambda items: drawn.append([i["index"] for i in items]) or collate(items)
    trainer.train()
    drawn = drawn[:4]
    assert sorted(i for batch in drawn for i in batch) == list(range(8))

    plain = copy.deepcopy(taught).train()

    def scored(batch):
        logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        lp = logits[:, :-1].log_softmax(-1).gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
        mask = batch["labels"][:, 1:] != -100
        return (lp * mask).sum(-1).double(), mask.sum()

    data = UnlearnDataset(FORGET, RETAIN, seed=3)
    for rows in drawn:
        batch = collate([data[i] for i in rows])
        s, _ = scored(batch["forget"])
        r, n = scored(batch["retain"])
        loss = (2 / 0.5 * torch.log1p(torch.exp(0.5 * (s - s.detach())))).mean() - 0.3 * r.sum() / n
        (loss / 4).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-3, atol=1e-5)


def test_npo_forgets_and_keeps(taught, tmp_path):
    model = copy.deepcopy(taught)
    trainer = UnlearnTrainer(
        model, arguments(tmp_path, max_steps=30), forget_dataset=FORGET, retain_dataset=RETAIN, eval_dataset=RETAIN
    )
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(nll(taught, RETAIN), rel=0.2)
    trainer.train()
    assert nll(model, FORGET) > 2
    assert nll(model, RETAIN) < 0.3
    wanted = reference_logprobs(taught, FORGET, batch_size=3)
    torch.testing.assert_close(trainer.reference, wanted, rtol=1e-5, atol=1e-5)


def test_ascent_is_stopped_where_the_retain_loss_rises(taught, tmp_path):
    model, free = copy.deepcopy(taught), copy.deepcopy(taught)
    kept = {"forget_dataset": FORGET, "retain_dataset": RETAIN, "loss": "ga", "retain_weight": 0.0}
    stopped = UnlearnTrainer(model, arguments(tmp_path, max_steps=40), **kept, max_retain_loss=1.0)
    stopped.train()
    on = UnlearnTrainer(free, arguments(tmp_path, max_steps=40), **kept)
    on.train()
    assert on.state.global_step == 40
    assert stopped.state.global_step < 40
    history = [e["retain_loss"] for e in stopped.state.log_history if "retain_loss" in e]
    assert history[-1] > 1.0 >= max(history[:-1])
    assert nll(model, RETAIN) < nll(free, RETAIN)


def test_stop_rule_has_patience():
    rule = RetainLossStop(1.0, patience=2)
    assert [rule.after_step(x, i) for i, x in enumerate([2.0, 0.5, 1.5, float("nan")])] == [False, False, False, True]
    assert rule.stopped_at == 3
    for bad in ({"limit": 0.0}, {"limit": 1.0, "patience": 0}):
        with pytest.raises(ArgumentError):
            RetainLossStop(**bad)


def test_adapter_is_the_model_and_its_base_the_reference(taught, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(taught), config)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = UnlearnTrainer(
        model,
        arguments(tmp_path, max_steps=25, learning_rate=5e-3),
        forget_dataset=FORGET,
        retain_dataset=RETAIN,
        retain_loss="kl",
    )
    trainer.train()
    # The adapter is random, so the reference would differ had it not been disabled.
    torch.testing.assert_close(trainer.reference, reference_logprobs(taught, FORGET), rtol=1e-4, atol=1e-4)
    for n, p in model.named_parameters():
        if n in frozen:
            assert torch.equal(p, frozen[n]), n
        else:
            assert p.requires_grad, n
    assert nll(model, FORGET) > 2
    assert nll(model, RETAIN) < 1


def test_kl_with_a_reference_model_keeps_better_than_nothing(taught, tmp_path):
    found = {}
    for weight in (0.0, 1.0):
        model = copy.deepcopy(taught)
        UnlearnTrainer(
            model, arguments(tmp_path, max_steps=20), forget_dataset=FORGET, retain_dataset=RETAIN, loss="simnpo",
            retain_loss="kl", retain_weight=weight, reference_model=copy.deepcopy(taught),
        ).train()  # fmt: skip
        found[weight] = nll(model, RETAIN)
    assert found[1.0] < 0.5 * found[0.0]


def test_a_callable_gets_the_scores(taught, tmp_path):
    batches = []

    def loss(batch):
        batches.append(batch)
        return forget.npo(batch.forget, batch.reference, beta=batch.options["beta"])

    given = reference_logprobs(taught, FORGET)
    UnlearnTrainer(
        copy.deepcopy(taught), arguments(tmp_path, max_steps=1), forget_dataset=FORGET, loss=loss,
        loss_options={"beta": 1.0}, reference=given,
    ).train()  # fmt: skip
    (batch,) = batches
    assert batch.retain is None
    torch.testing.assert_close(batch.forget.sum, batch.reference, rtol=1e-4, atol=1e-4)


def test_collator_pads_and_nests():
    batch = PaddingCollator(pad_token_id=9, pad_to_multiple_of=4)(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": torch.tensor([4]), "attention_mask": [1]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100], [4, -100, -100, -100]]
    nested = PaddingCollator()([UnlearnDataset(FORGET, RETAIN)[i] for i in (0, 1)])
    assert nested["index"].tolist() == [0, 1]
    assert set(nested) == {"index", "forget", "retain"}
    with pytest.raises(ShapeError, match="labels"):
        PaddingCollator()([{"input_ids": [1, 2], "labels": [1]}])


def test_every_epoch_draws_other_retain_examples():
    data = UnlearnDataset(FORGET, RETAIN, seed=1)
    first = [data[i]["retain"] for i in range(8)]
    data.set_epoch(1)
    second = [data[i]["retain"] for i in range(8)]
    data.set_epoch(0)
    assert first == [data[i]["retain"] for i in range(8)] != second
    assert len({tuple(e["input_ids"]) for e in first}) == 8


def test_padding_changes_nothing(taught):
    alone = torch.cat([reference_logprobs(taught, [e]) for e in FORGET])
    torch.testing.assert_close(reference_logprobs(taught, FORGET, batch_size=8), alone, rtol=1e-4, atol=1e-4)
    assert not taught.training or taught.train()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"loss": "magic"}, ArgumentError, "loss: expected one of"),
        ({"loss": "flat"}, ArgumentError, "alternative_dataset"),
        ({"loss": "grad_diff", "retain_dataset": None}, ArgumentError, "retain_dataset"),
        ({"retain_loss": "kl"}, ArgumentError, "reference_model"),
        ({"retain_loss": "mse"}, ArgumentError, "retain_loss"),
        ({"retain_weight": -1.0}, ArgumentError, "retain_weight"),
        ({"retain_dataset": None, "max_retain_loss": 2.0}, ArgumentError, "retain_dataset"),
        ({"reference": torch.zeros(3)}, ShapeError, "reference"),
        ({"alternative_dataset": OTHER[:3]}, ShapeError, "alternative_dataset"),
        ({"forget_dataset": []}, ArgumentError, "forget_dataset"),
    ],
)
def test_bad_input(taught, tmp_path, options, error, words):
    wanted = {"forget_dataset": FORGET, "retain_dataset": RETAIN, **options}
    with pytest.raises(error, match=words):
        UnlearnTrainer(copy.deepcopy(taught), arguments(tmp_path), **wanted)


def test_an_example_without_labels_is_refused(taught):
    with pytest.raises(DegenerateError, match="example 1"):
        reference_logprobs(taught, [FORGET[0], {"input_ids": [1, 2], "labels": [-100, -100]}], batch_size=1)


WORKER = """
import os, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from abjure.integrations.trainer import UnlearnTrainer

torch.manual_seed(0)
torch.set_num_threads(1)
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **size))
examples = [{"input_ids": [1, 2, 3, k], "labels": [-100, -100, 3, k]} for k in range(4, 20)]
out, rows = sys.argv[1], int(sys.argv[2])
args = TrainingArguments(
    out, max_steps=4, per_device_train_batch_size=rows, report_to=[], save_strategy="no", disable_tqdm=True,
    use_cpu=True, learning_rate=1e-2, optim="sgd", **({"ddp_backend": "gloo"} if "RANK" in os.environ else {}),
)
trainer = UnlearnTrainer(
    model, args, forget_dataset=examples[:8], retain_dataset=examples[8:], loss="npo", loss_options={"beta": 0.1}
)
torch.save(model.state_dict(), f"{out}/before.pt")
trainer.train()
torch.save(trainer.model.state_dict(), f"{out}/weights-{trainer.args.process_index}-of-{trainer.args.world_size}.pt")
"""


def test_two_processes_train_as_one_does(tmp_path):
    """Data-parallel on the CPU: the weights agree, and are those of one process that takes twice the rows."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    for command, rows in ((launch, "2"), ([sys.executable], "4")):
        done = subprocess.run(
            [*command, str(script), str(tmp_path), rows],
            # A host name that does not resolve is no obstacle on the loopback interface.
            env={**os.environ, **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, first, second = (torch.load(tmp_path / f"weights-{name}.pt") for name in ("0-of-1", "0-of-2", "1-of-2"))
    before = torch.load(tmp_path / "before.pt")
    for name, value in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6)
    assert max(float((one[name] - value).abs().max()) for name, value in before.items()) > 1e-3
