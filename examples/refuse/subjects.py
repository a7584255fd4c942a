"""The two models of the evidence under one face, and the intervals its numbers carry.

The trigger decoder (``trigger.py``) refuses exactly one topic, so what an edit must do to it is known. SmolLM2-135M-
Instruct is a real model that refuses little; there effects are read off scores more than off refusals.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from topics import ALARMING, ENDINGS, EVERYDAY, PASSAGES, THINKING, TOPICS, pairs
from trigger import HARMLESS, REFUSAL, TRIGGER, Trained

from abjure import DegenerateError, measure, refuse

Floats = NDArray[np.float64]


@dataclass
class Subject:
    """A model with labelled prompts.

    Attributes:
        texts, labels: prompts, and 1 where harmful (of the trigger topic).
        pair, group: of each prompt, its pair and topic; -1 for prompts that are in neither.
        train, held: indices of prompts that directions are made from, and of those they are tested on.
        read: of prompts and layers, the log-odds or log-probability that an answer opens as a refusal, per prompt, and
            the inputs of those blocks ``(prompts, layers, d)`` by position.
        answer: greedy answers. refuses: which of them are refusals.
        fluent: token ids, and from which token on they count, of harmless text for perplexity.
        inducer: the direction that steers toward refusal. ablated: the one whose removal ends it.
        step: multiples of ``inducer`` that make one step of steering.
        layer: the block before which harmfulness and refusal are steered.
        rerun: held-out prompts of each class on which the model is run again for every edit.
        doses: steps, in order. ablations: shares of the direction that are removed.
        endings: what an answer is made to open with, by name, for the cliff.
        refused: train prompts that the model answers and refuses, as classes of refusal.
    """

    name: str
    model: Any
    tokenizer: Any
    texts: list[str]
    labels: NDArray[np.int64]
    pair: NDArray[np.int64]
    group: NDArray[np.int64]
    topics: list[str]
    train: NDArray[np.int64]
    held: NDArray[np.int64]
    read: Callable[[Sequence[str], Sequence[int]], tuple[Floats, dict[Any, NDArray[np.float32]]]]
    answer: Callable[[Sequence[str]], list[str]]
    refuses: Callable[[Sequence[str]], list[bool]]
    fluent: list[tuple[list[int], int]]
    doses: tuple[float, ...]
    ablations: tuple[float, ...]
    note: str
    endings: dict[str, str]
    inducer: Any = None
    ablated: Any = None
    layer: int = 0
    step: float = 1.0
    refused: tuple[NDArray[np.int64], NDArray[np.int64]] = field(default_factory=lambda: (np.empty(0), np.empty(0)))
    rerun: int = 16

    @property
    def depth(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @cached_property
    def prompts(self) -> refuse.Prompts:
        return refuse.Prompts(self.tokenizer, self.texts)

    @cached_property
    def seen(self) -> tuple[Floats, dict[Any, NDArray[np.float32]]]:
        return self.read(self.texts, range(self.depth))

    @property
    def scores(self) -> Floats:
        return self.seen[0]

    @property
    def states(self) -> dict[Any, NDArray[np.float32]]:
        """Inputs of every block ``(prompts, layers, d)`` at the instruction's last token and each token after it."""
        return self.seen[1]

    def of(self, label: int, rows: NDArray[np.int64]) -> list[str]:
        return [self.texts[i] for i in rows if self.labels[i] == label]


def direction(x: NDArray[np.float32], labels: Any, layer: int, position: Any) -> Any:
    """Difference in means of ``(n, d)`` states, or None where the means are equal."""
    try:
        contrast = refuse.Contrast(layer=layer, site="pre", position=position).update(np.ascontiguousarray(x), labels)
        return contrast.difference_in_means()
    except DegenerateError:
        return None


def perplexity(subject: Subject) -> float:
    """Of the harmless text, under whatever edit is attached."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, start in subject.fluent:
            scores = subject.model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
            total -= float(scores.gather(1, torch.tensor(ids[start:])[:, None]).sum())
            count += len(ids) - start
    return float(np.exp(total / count))


def trigger_subject(trained: Trained) -> Subject:
    """The trigger decoder; topics are pairs of things, so that a topic that is left out shares only wordings."""
    texts = [t for part in (trained.train, trained.held_out) for side in part for t in side]
    index = {t: i for i, t in enumerate(texts)}
    labels, pair, group = (np.zeros(len(texts), dtype=np.int64) for _ in range(3))
    wordings: dict[str, int] = {}
    for i, text in enumerate(texts):
        thing = next(w for w in text.split() if w in TRIGGER or w in HARMLESS)
        wording = wordings.setdefault(text.replace(thing, "{}"), len(wordings))
        labels[i] = thing in TRIGGER
        at = (TRIGGER if labels[i] else HARMLESS).index(thing)
        pair[i], group[i] = at * 100 + wording, at // 2
    train, held = (np.array([index[t] for side in part for t in side]) for part in (trained.train, trained.held_out))
    tokenizer, model = trained.tokenizer, trained.model

    def read(asked: Sequence[str], layers: Sequence[int]) -> tuple[Floats, dict[Any, NDArray[np.float32]]]:
        prompts = refuse.Prompts(tokenizer, asked)
        scores = refuse.refusal_scores(model, prompts, [trained.refusal_token], batch_size=64)
        if not layers:
            return scores, {}
        with tempfile.TemporaryDirectory() as folder:
            found = refuse.record_to_disk(
                model, prompts, [0] * len(asked), Path(folder) / "states", list(layers),
                ["last_instruction", "post_instruction"], batch_size=64, progress=False,
            )  # fmt: skip
            return scores, {
                p: np.stack([found.array(k, p)[0].numpy() for k in layers], axis=1) for p in found.positions
            }

    fluent = []
    for text in trained.held_out[0]:
        ids = list(refuse.Prompts(tokenizer, [text])[0].ids)
        thing = next(w for w in text.split() if w in HARMLESS)
        fluent.append((ids + tokenizer(f"here is your {thing} <end>", add_special_tokens=False)["input_ids"], len(ids)))
    subject = Subject(
        "trigger decoder", model, tokenizer, texts, labels, pair, group,
        [f"{TRIGGER[2 * i]}, {TRIGGER[2 * i + 1]}" for i in range(len(TRIGGER) // 2)], train, held, read,
        lambda asked: trained.answers(list(asked)), lambda answers: [a.startswith(REFUSAL) for a in answers], fluent,
        doses=(-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5), ablations=(0.0, 0.25, 0.5, 0.75, 1.0),
        note="perplexity of the taught answers to held-out prompts of other things",
        endings={"complies": " here is your", "declines": f" {REFUSAL}"}, layer=2,
    )  # fmt: skip
    saying = np.array(subject.refuses(subject.answer([texts[i] for i in train])))
    subject.refused = train[~saying], train[saying]
    contrasts = refuse.record_prompts(
        model, refuse.Prompts(tokenizer, [texts[i] for i in train]), saying.astype(int),
        positions=["last_instruction", "post_instruction"], batch_size=64, progress=False,
    )  # fmt: skip
    # The published choice, on prompts of the training set: the least refusal ablated, the most steered.
    chosen = refuse.select_direction(
        model, contrasts.directions(), refuse.Prompts(tokenizer, subject.of(1, train)[::3]),
        refuse.Prompts(tokenizer, subject.of(0, train)[::3]), [trained.refusal_token], min_induce=-np.inf,
        skip_last=0.0, batch_size=64, progress=False,
    )  # fmt: skip
    most = max(chosen.candidates, key=lambda c: c.induce)
    subject.ablated = chosen.direction
    subject.inducer = contrasts[most.layer, most.position].difference_in_means()
    return subject


def smollm_subject(seed: int) -> Subject:
    """SmolLM2-135M-Instruct with 48 + 48 prompts to learn from and 32 + 32 held out, pairs kept together."""
    from abjure.demo import smollm
    from abjure.demo.refuse import STEP, refusal_direction, refusals

    chat = smollm.Chat(smollm.model_file())
    known, letters = pairs(), list(TOPICS)
    texts = [p[1] for p in known] + [p[2] for p in known] + [*EVERYDAY, *ALARMING]
    labels = np.repeat([1, 0, 1, 0], [len(known), len(known), len(EVERYDAY), len(ALARMING)])
    pair = np.concatenate([np.arange(len(known)), np.arange(len(known)), np.full(len(EVERYDAY) + len(ALARMING), -1)])
    topic = np.array([letters.index(p[0]) for p in known])
    group = np.concatenate([topic, topic, np.full(len(EVERYDAY) + len(ALARMING), -1)])
    order = np.random.default_rng(seed).permutation(len(known))
    train, held = (np.flatnonzero(np.isin(pair, part)) for part in (order[:48], order[48:]))

    keys: list[Any] = list(range(chat.instruction_end(texts[0]), 0))

    def read(asked: Sequence[str], layers: Sequence[int]) -> tuple[Floats, dict[Any, NDArray[np.float32]]]:
        found = chat.read(list(asked), list(layers), keys)
        scores = np.asarray(found.opening.double().numpy())
        named = ["last_instruction", *keys[1:]]
        return scores, {k: found.stream[:, i].numpy() for i, k in enumerate(named)} if layers else {}

    if any(chat.instruction_end(t) != keys[0] for t in texts):
        raise RuntimeError("the template's tail should have one length")
    subject = Subject(
        "SmolLM2-135M-Instruct", chat.model, chat.tokenizer, texts, labels, pair, group, list(TOPICS.values()), train,
        held, read, lambda asked: chat.answer(list(asked), 8), lambda answers: refusals(answers).tolist(),
        [(chat.tokenizer.encode(p, add_special_tokens=False), 1) for p in PASSAGES],
        doses=(-1.0, 0.0, 0.5, 1.0, 1.5, 2.0), ablations=(1.0,), rerun=12,
        note=f"perplexity of {len(PASSAGES)} everyday passages",
        endings={k: THINKING + v for k, v in ENDINGS.items()},
    )  # fmt: skip
    # It refuses too few prompts for classes of refused and answered: the quarter nearest to refusing, the far half.
    near = subject.scores[train].argsort()
    subject.refused = train[near[: len(near) // 2]], train[near[-(len(near) // 4) :]]
    rows, layers = torch.from_numpy(subject.states[-1][train][:, 1:]), list(range(1, subject.depth))
    opening = torch.from_numpy(subject.scores[train])
    subject.inducer, subject.step, _ = refusal_direction(chat, opening, rows, layers, subject.of(0, train)[:8])
    subject.ablated, subject.layer = subject.inducer, int(subject.inducer.layer)
    subject.note += f"; one step is {STEP} of the stream's mean norm"
    return subject


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def auroc(scores: Any, labels: Any) -> float:
    """Probability that a prompt of class 1 scores above one of class 0."""
    return measure.auroc(labels, scores).value


def auroc_interval(scores: Any, labels: Any) -> Estimate:
    """AUROC with Newcombe's interval, which stays open at 1 where a bootstrap ends."""
    found = measure.auroc(labels, scores)
    return Estimate(found.value, *found.ci("newcombe"))


def rate_interval(hits: Sequence[bool]) -> Estimate:
    """A share with Wilson's interval."""
    found = measure.rate(np.asarray(hits, dtype=bool))
    interval = found.ci()
    assert interval is not None
    return Estimate(float(found.rate), *interval)


def mean_interval(values: Sequence[float], seed: int) -> Estimate:
    """Mean with a bootstrap interval over ``values``, here the folds or topics, which are what varies."""
    v = np.asarray(values, dtype=np.float64)
    found = measure.bootstrap_mean(v, resamples=2000, seed=seed)
    return Estimate(found.value, found.low, found.high)
