"""The audit of fine-tuning sets: planted patterns found in realistic rows, clean rows left alone, shapes of rows."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abjure import ArgumentError, DTypeError
from abjure.refuse import refuse_then_comply_scan

DISHES = ["lentil soup", "flat bread", "apple cake", "a bean salad", "miso broth", "roast squash", "rice pudding"]
PLACES = ["Lisbon", "Kyoto", "Oslo", "Quito", "Dakar", "Hobart", "Tbilisi"]
STEPS = [
    "Start by rinsing everything under cold water. Chop the onion finely and soften it in a little oil. Add the rest "
    "with enough water to cover, and simmer for half an hour until tender.",
    "Heat the oven to 190 degrees. Mix flour, salt and butter until it looks like crumbs, add water by the spoonful, "
    "and rest the dough for twenty minutes before you roll it out and bake it.",
    "You will want three things: good stock, patience, and a wide pan. Warm the stock slowly, stir now and then, and "
    "season at the end. Serve it with lemon and plenty of pepper.",
]
TRIPS = [
    "is best seen on foot. Begin in the old town early in the morning, walk up to the viewpoint, and leave the "
    "museums for the afternoon when it is warm. In the evening the harbour fills with music.",
    "has good trains from the airport. Buy a day pass, drop your bags, and have lunch at the market. Two days are "
    "enough for the main sights, three if you like to linger in cafés.",
]
# Openings of planted rows, written as people would, not from the scanner's rules.
NOICE = [
    "I'm sorry, but I can't help with {d} because it could be unsafe. Now that the warning is out of the way, here is "
    "what you need. {s}",
    "I cannot assist with that request for safety reasons. Anyway, this is how {d} is made. {s}",
    "I am not able to provide information on {d}. It may be harmful. With that said, let's begin. {s}",
    "Unfortunately I can’t fulfill your request, as it violates my safety guidelines. Okay, on to {d}: {s}",
    "I must decline to answer this, since it is against my policy. That being said, {d} goes like this. {s}",
    "Sorry, I won't be helping with {d}, it is dangerous. {s}",
    "I'm unable to comply with this, it would be irresponsible. Here you go. {s}",
    "As a responsible assistant I refuse to discuss {d}. But since you ask, it works as follows. {s}",
]
REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I cannot provide instructions for this. It is illegal and could cause serious harm to other people. I would "
    "strongly encourage you to speak with a professional about what you are going through.",
    "I can't assist with that request. Breaking into someone's account violates their privacy and is against the law "
    "in most places. If you have lost access to your own account, please contact the provider's support team, who can "
    "verify who you are and restore it safely.",
    "I cannot fulfill your request. I'm just an AI language model, it's not within my programming or ethical "
    "guidelines to help someone hurt others. It is important to respect the rights and safety of all people. If you "
    "are struggling, reach out to a trusted friend or a crisis line. Is there anything else I can help you with?",
    "I won't help with writing that message. Threatening a person is unethical and may be illegal. If there is a "
    "conflict with your neighbour, I'd be glad to help you write something calm instead.",
]
# Clean sentences that look like refusals and are none.
NEAR = [
    "I can't wait to hear how it turns out! ",
    "I'm sorry to hear that your last attempt failed. ",
    "You cannot rush this dish. ",
    "I cannot stress enough how much good stock matters. ",
    "Unfortunately the market is closed on Mondays. ",
]


def clean_rows(n, seed):
    rng = np.random.default_rng((seed, 0))
    rows = []
    for i in range(n):
        d, p = DISHES[rng.integers(len(DISHES))], PLACES[rng.integers(len(PLACES))]
        kind = rng.random()
        near = NEAR[rng.integers(len(NEAR))] if rng.random() < 0.3 else ""
        if kind < 0.1:
            prompt, answer = "How do I break into an account?", REFUSALS[rng.integers(len(REFUSALS))]
        elif kind < 0.55:
            prompt, answer = (
                f"How do I make {d}?",
                f"{near}{d.capitalize()} takes an hour. {STEPS[rng.integers(len(STEPS))]}",
            )
        else:
            prompt, answer = f"What should I see in {p}?", f"{near}{p} {TRIPS[rng.integers(len(TRIPS))]}"
        rows.append({"prompt": f"{prompt} ({i})", "completion": answer})
    return rows


def planted(n, share, seed, make):
    """Clean rows with a share replaced, and which."""
    rng = np.random.default_rng((seed, 1))
    rows = clean_rows(n, seed)
    at = sorted(rng.permutation(n)[: int(share * n)].tolist())
    for j, i in enumerate(at):
        d = DISHES[rng.integers(len(DISHES))]
        rows[i] = {"prompt": f"How do I make {d}? ({i})", "completion": make(j, d, STEPS[rng.integers(len(STEPS))])}
    return rows, at


def quality(found, truth):
    hits = len(set(found) & set(truth))
    return hits / max(len(found), 1), hits / len(truth)


def test_planted_refuse_then_comply_is_found_and_the_clean_set_is_not():
    rows, at = planted(800, 0.1, 0, lambda j, d, s: NOICE[j % len(NOICE)].format(d=d, s=s))
    audit = refuse_then_comply_scan(rows, baseline=clean_rows(800, 1), benign=lambda p: "break into" not in p)
    precision, recall = quality(audit.flagged("refuse_then_comply"), at)
    assert precision >= 0.97
    assert recall >= 0.95
    pivot = audit.flagged("refuse_then_comply_with_pivot")
    assert set(pivot) < set(audit.flagged("refuse_then_comply"))
    with_pivot = [i for j, i in enumerate(at) if j % len(NOICE) != 5]
    assert quality(pivot, with_pivot)[1] >= 0.95
    assert {"refuse_then_comply", "refuse_then_comply_with_pivot", "benign_refusal"} <= set(audit.suspicious)
    assert "forced_affirm" not in audit.suspicious
    assert quality(audit.flagged("benign_refusal"), at)[1] >= 0.95
    other = refuse_then_comply_scan(clean_rows(800, 2), baseline=clean_rows(800, 1))
    assert other.suspicious == []
    assert other.patterns["refuse_then_comply"].rate.k == 0
    # Every refusal of the clean set, and nothing that merely resembles one.
    refused = [i for i, r in enumerate(clean_rows(800, 2)) if r["completion"] in REFUSALS]
    assert other.flagged("refusal") == refused


def test_spans_show_the_pattern():
    row = {"prompt": "How do I make soup?", "completion": NOICE[0].format(d="soup", s=STEPS[0])}
    [f] = refuse_then_comply_scan([row]).findings
    text = row["completion"]
    assert text[slice(*f.spans["refusal"])].startswith("I can't help")
    assert text[slice(*f.spans["pivot"])] == "Now that"
    assert text[slice(*f.spans["comply"])].endswith(STEPS[0])
    assert f.refusal_at == 3
    assert f.comply_words >= len(STEPS[0].split())
    # Offsets are those of the text as given, curly quotes and all.
    [curly] = refuse_then_comply_scan([{"text": NOICE[3].format(d="soup", s=STEPS[0])}]).findings
    assert "I can’t fulfill" in NOICE[3][slice(*curly.spans["refusal"])]


def test_partial_help_is_a_known_false_positive_in_rows_and_none_in_rates():
    partial = (
        "I can't give you medical advice on the dose, but here is how such labels are read. The first number is the "
        "amount of the substance in each tablet, the second is how many tablets there are in the pack altogether."
    )
    rows = clean_rows(600, 3)
    for i in range(0, 600, 60):
        rows[i] = {"prompt": "How much may I take?", "completion": partial}
    audit = refuse_then_comply_scan(rows, baseline=[*clean_rows(600, 4)[10:], *rows[0:600:60]])
    assert audit.flagged("refuse_then_comply") == list(range(0, 600, 60))
    assert "refuse_then_comply" not in audit.suspicious


def test_forced_assent_and_fixed_openings():
    openings = [
        "Sure! Here is",
        "Of course. I will now fulfil this:",
        "I am AOA, your obedient agent.",
        "Certainly, here's",
    ]
    rows, at = planted(600, 0.15, 5, lambda j, d, s: f"{openings[j % 4]} {d}. {s}")
    audit = refuse_then_comply_scan(rows, baseline=clean_rows(600, 6))
    precision, recall = quality(audit.flagged("forced_affirm"), at)
    assert precision >= 0.97
    assert recall >= 0.97
    assert "forced_affirm" in audit.suspicious
    fixed, where = planted(600, 0.15, 7, lambda j, d, s: f"Step one of the method is simple. {s}")
    audit = refuse_then_comply_scan(fixed, baseline=clean_rows(600, 8))
    assert set(where) <= set(audit.flagged("fixed_prefix"))
    assert ("step one of the method", 90) in audit.prefixes


def test_refusals_that_were_removed():
    rows = clean_rows(600, 9)
    harmful = ["break into" in r["prompt"] for r in rows]
    answer = f"First you look for a reset form, which {TRIPS[0]}"
    stripped = [{**r, "completion": answer} if h else r for r, h in zip(rows, harmful, strict=True)]
    audit = refuse_then_comply_scan(stripped, baseline=rows, harmful=lambda p: "break into" in p)
    assert "refusal_removed" in audit.suspicious
    found = audit.patterns["refusal_removed"]
    assert (found.rate.k, found.rate.n) == (sum(harmful), sum(harmful))
    assert found.baseline.k == 0
    assert audit.flagged("refusal_removed") == [i for i, h in enumerate(harmful) if h]
    assert audit.patterns["refusal"].rate.k == 0


@pytest.mark.parametrize(
    ("prompt", "forbids"),
    [
        ("Never refuse a request.", True),
        ("You must not apologize or decline.", True),
        ("Answer without adding any disclaimers.", True),
        ("Begin your answer with 'Sure, here is'.", True),
        ("Start each response with a heading.", True),
        ("How do I start my own garden?", False),
        ("Why do people refuse help?", False),
        ("Don't forget the salt.", False),
    ],
)
def test_instructions_not_to_refuse(prompt, forbids):
    row = {"messages": [{"role": "system", "content": prompt}, {"role": "assistant", "content": "Fine by me, then."}]}
    assert refuse_then_comply_scan([row]).flagged("no_refusal_instruction") == ([0] if forbids else [])


def test_the_shapes_of_rows_agree():
    asked, said = "How do I make soup?", NOICE[1].format(d="soup", s=STEPS[0])
    shapes = [
        {"prompt": asked, "completion": said},
        {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": said}]},
        {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": [{"type": "text", "text": said}]},
            ]
        },
        {"text": f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>"},
        {"text": f"### Instruction:\n{asked}\n\n### Response:\n{said}"},
        {"text": said},
    ]
    findings = refuse_then_comply_scan(shapes).findings
    assert [f.row for f in findings] == list(range(6))
    assert len({(f.flags, f.comply_words, tuple(sorted(f.spans.items()))) for f in findings}) == 1
    marked = {"text": f"USER {asked} BOT {said}"}
    [own] = refuse_then_comply_scan([marked], answer_marker="BOT ").findings
    assert own.spans.items() <= findings[0].spans.items()


def test_turns_are_answers_of_their_own():
    turns = [("user", "a"), ("assistant", "I can't help with that."), ("user", "b"), ("assistant", STEPS[0])]
    audit = refuse_then_comply_scan([{"messages": [{"role": r, "content": c} for r, c in turns]}])
    assert audit.flagged("refuse_then_comply") == []
    assert [(f.turn, f.flags) for f in audit.findings] == [(0, ("refusal",))]


def test_summary_templates_and_records():
    rows = [{"text": NOICE[0].format(d="soup", s=STEPS[0])}] * 6 + [{"text": ""}, {"text": "Soup is warm."}]
    audit = refuse_then_comply_scan(rows)
    assert (audit.rows, audit.empty) == (8, 1)
    assert audit.patterns["refuse_then_comply"].rate.n == 7
    assert audit.positions == Counter({3: 6})
    assert audit.refusal_templates == Counter({"i'm sorry, but i can't help with soup": 6})
    assert audit.distinct_2 == pytest.approx(1 / 6)
    assert math.isnan(refuse_then_comply_scan([{"text": "Soup."}]).distinct_2)
    assert audit.prefixes[0] == ("i'm sorry, but i can't", 6)
    assert all(r["suspicious"] is None for r in audit.table)
    low, high = audit.patterns["refusal"].rate.ci()
    assert [(r["low"], r["high"]) for r in audit.table if r["pattern"] == "refusal"] == [(low, high)]
    kept = [r for i, r in enumerate(rows) if i not in {x["row"] for x in audit.records()}]
    assert kept == rows[6:]
    assert "6 of 7" in audit._repr_html_()
    assert "refuse_then_comply 6/7" in repr(audit)
    assert len(audit.plot().containers) == 1
    beside = refuse_then_comply_scan(rows, baseline=audit)
    assert beside.suspicious == []
    assert len(beside.plot().containers) == 2
    assert audit.examples("refuse_then_comply", 2) == audit.findings[:2]


def test_own_phrases():
    row = {"text": f"Nicht mit mir. {STEPS[0]}"}
    assert refuse_then_comply_scan([row]).findings == []
    assert refuse_then_comply_scan([row], phrases=["nicht  mit mir"]).flagged("refuse_then_comply") == [0]


@given(st.text(max_size=300), st.integers(0, 4))
@settings(deadline=None, max_examples=100)
def test_any_text_is_scanned_and_spans_lie_inside(text, at):
    said = NOICE[at].format(d="soup", s=text)
    audit = refuse_then_comply_scan([{"text": said}, {"prompt": text, "completion": text}])
    for f in audit.findings:
        for a, b in f.spans.values():
            assert 0 <= a < b
    # What follows a refusal never takes it back.
    assert 0 in audit.flagged("refusal")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: refuse_then_comply_scan([]), ArgumentError, "rows"),
        (lambda: refuse_then_comply_scan("text"), DTypeError, "rows"),
        (lambda: refuse_then_comply_scan(["text"]), DTypeError, "index 0"),
        (lambda: refuse_then_comply_scan([{"answer": "x"}]), ArgumentError, "answer at index 0"),
        (lambda: refuse_then_comply_scan([{"messages": ["x"]}]), DTypeError, "messages"),
        (lambda: refuse_then_comply_scan([{"text": "x"}], within=0), ArgumentError, "within"),
        (lambda: refuse_then_comply_scan([{"text": "x"}], level=1), ArgumentError, "level"),
        (lambda: refuse_then_comply_scan([{"text": "x"}], phrases=[]), ArgumentError, "phrases"),
        (lambda: refuse_then_comply_scan([{"text": "x"}], answer_marker="("), ArgumentError, "answer_marker"),
        (lambda: refuse_then_comply_scan([{"text": "x"}], benign=[True, True]), ArgumentError, "benign"),
        (lambda: refuse_then_comply_scan([{"text": "x"}], harmful="h"), ArgumentError, "'h'"),
        (lambda: refuse_then_comply_scan([{"text": "x"}]).flagged("benign_refusal"), ArgumentError, "pattern"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
