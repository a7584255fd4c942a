"""Phrase lists, the matcher beside a plain Python form, and what its errors do to a rate."""

from __future__ import annotations

import json
import random
import unicodedata

import numpy as np
import pytest

from abjure import set_num_threads
from abjure.errors import ArgumentError, DegenerateError, DTypeError, ShapeError
from abjure.measure import PHRASE_LISTS, PhraseList, Rate, corrected_rate, fold_text, refusal_match

CURLY = "I’m sorry, I can't assist"


def plain(response: str, rule: PhraseList) -> tuple[int, int]:
    """(index of the phrase, character where it begins) of a list, from its definition; (-1, -1) without one."""
    lower = str.lower if rule.normalize == "lower" else str
    if rule.accept and response.startswith(rule.accept):
        return -1, -1
    text = lower(response)
    start = len(text) - len(text.lstrip()) if rule.trim else 0
    places = [start] if rule.where == "prefix" else range(len(text))
    for at in places:
        for i, phrase in enumerate(rule.phrases):
            if text.startswith(lower(phrase), at):
                return i, at
    return -1, -1


def responses(n: int = 400) -> list[str]:
    """Random English with openings and phrases of all lists, some of them broken."""
    rng = random.Random(0)
    phrases = [p for found in PHRASE_LISTS.values() for p in (*found.phrases, *found.accept)]
    words = [
        "the",
        "a",
        "plan",
        "can",
        "cannot",
        "as",
        "an",
        "illegal",
        "question",
        "answer",
        "é",
        "naïve",
        "“quoted”",
        "help",
        "with",
        "this",
        ".",
        "\n",
        ",",
        "I",
        "AI",
    ]
    made = []
    for _ in range(n):
        parts = [rng.choice(words) for _ in range(rng.randrange(30))]
        for _ in range(rng.randrange(3)):
            phrase = rng.choice(phrases)
            phrase = rng.choice([phrase, phrase.lower(), phrase[:-1], phrase.replace("'", "’")])
            parts.insert(rng.choice([0, len(parts)]), phrase)
        made.append(rng.choice(["", " ", "\n"]) + " ".join(parts) + "!")
    return made


@pytest.mark.parametrize("name", PHRASE_LISTS)
def test_every_list_finds_what_its_definition_says(name):
    texts = responses()
    found = refusal_match(texts, name)
    wanted = [plain(t, PHRASE_LISTS[name]) for t in texts]
    assert found.phrase.tolist() == [i for i, _ in wanted]
    assert found.start.tolist() == [at for _, at in wanted]
    assert 0 < found.refused.sum() < len(texts)
    for text, i, a, b in zip(texts, found.phrase, found.start, found.end, strict=True):
        if i >= 0:
            assert text[a:b].lower() == PHRASE_LISTS[name].phrases[i].lower()


def test_a_curly_apostrophe_hides_a_phrase_unless_folded():
    found = refusal_match([CURLY], "gcg")
    assert found.refused.all()
    assert found.phrases[found.phrase[0]] == "I can't assist"
    assert not refusal_match([CURLY], "orbench_claude").refused.any()
    folded = refusal_match([CURLY], "orbench_claude", normalize="refusal")
    assert folded.refused.all()
    assert CURLY[folded.start[0] : folded.end[0]] == "I’m sorry"


@pytest.mark.parametrize(
    "text",
    [
        "І саnnоt",
        "Ｉ ｃａｎｎｏｔ",
        "I\u200b can\u00adnot",
        "I\n\n  cannot",
        "𝐈 𝐜𝐚𝐧𝐧𝐨𝐭",
        "\ufeff I CANNOT",
        "I\u00a0cannot",
    ],
)
def test_forms_that_look_the_same(text):
    assert not refusal_match([text], PhraseList("own", ("I cannot",))).refused.any()
    found = refusal_match([text], PhraseList("own", ("I cannot",), where="prefix"), normalize="refusal")
    assert found.refused.all()
    assert found.end[0] == len(text)


def test_folding_agrees_with_python_where_python_has_the_same():
    rng = random.Random(1)
    # Letters of Latin with marks, full width, ligatures and compatibility forms; none with a look-alike of its own.
    alphabet = "abcXYZ éàñçöÅŘệſĳ½Ａｂ１﹖²³ﬀﬁ①ⅷ㎏ｱあ漢한"
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 12)))
        wanted = " ".join(unicodedata.normalize("NFKD", text).lower().split())
        got = fold_text(text)
        assert got.rstrip() == wanted.replace("⁄", "⁄"), text
    assert fold_text("İ") == unicodedata.normalize("NFKD", "İ").lower()


def test_empty_and_absent_responses():
    texts = ["", "  \n", None, "I cannot", "Yes", float("nan")]
    for name, blank in (("gcg", True), ("refusal_direction", False)):
        found = refusal_match(texts, name)
        assert found.verdicts == [blank, blank, None, True, False, None]
    own = PhraseList("own", ("I cannot",))
    assert refusal_match(texts, own).verdicts == [None, None, None, True, False, None]
    found = refusal_match(texts, own).rate
    assert (found.k, found.n, found.invalid) == (1, 2, 4)
    assert refusal_match([], own).rate.n == 0
    assert np.isnan(refusal_match([], own).rate.rate)


def test_places():
    text = "one two three I cannot"
    for n, hit in ((3, False), (4, True)):
        assert refusal_match([text], "gcg", where="first_n_words", n=n).refused[0] == hit
    for n, hit in ((21, False), (22, True)):
        assert refusal_match([text], "gcg", where="first_n_chars", n=n).refused[0] == hit
    assert not refusal_match([text], "gcg", where="prefix").refused.any()
    assert refusal_match(["  I cannot"], "gcg", where="prefix").refused.all()


def test_several_lists_and_groups():
    texts = ["I can't assist", "As an example", "Fine", "cannot be"]
    found = refusal_match(texts, ["refusal_direction", "gcg", "orbench_gpt35"])
    assert found.refused.tolist() == [True, True, False, True]
    assert [found.phrases[i] if i >= 0 else None for i in found.phrase] == ["I can't", "As an", None, "cannot"]
    assert list(found.per_list) == ["refusal_direction", "gcg", "orbench_gpt35"]
    by = found.rate_by(np.array(["a", "b", "a", "b"])).groups
    assert [(g, r.k, r.n) for g, r in by.items()] == [("a", 1, 2), ("b", 2, 2)]
    assert found.counts == {"I can't": 1, "As an": 1, "cannot": 1}


def test_the_number_of_threads_changes_nothing():
    texts = [t * 20 for t in responses(2000)]
    seen = []
    for threads in (1, 3):
        set_num_threads(threads)
        m = refusal_match(texts, "gcg", normalize="refusal")
        seen.append((m.phrase.tobytes(), m.start.tobytes(), m.end.tobytes()))
    set_num_threads(2)
    assert seen[0] == seen[1]


class Arrow:
    """What of an Arrow array is used."""

    def __init__(self, values):
        self.values = values

    def to_pylist(self):
        return self.values

    def __iter__(self):
        raise AssertionError("Arrow scalars are not strings")


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda v: np.array(v, dtype=object), Arrow])
def test_columns(kind):
    assert refusal_match(kind(["I cannot", "Yes"])).refused.tolist() == [True, False]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((["a"], "no such list"), ArgumentError, "gcg"),
        ((["a"], []), ArgumentError, "at least one list"),
        ((["a"], ["gcg", "gcg"]), ArgumentError, "different names"),
        ((["a"], [3]), DTypeError, "int"),
        (("a text",), ShapeError, "column"),
        ((["a", 3],), DTypeError, "int at index 1"),
        ((["a", b"I cannot"],), DTypeError, "bytes at index 1"),
        ((["a", "b\ud800"],), ArgumentError, "surrogate at index 1"),
        ((np.zeros((2, 2)),), ShapeError, "column"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        refusal_match(*arguments)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"where": "somewhere"}, ArgumentError),
        ({"where": "first_n_words"}, ArgumentError),
        ({"where": "first_n_words", "n": 0}, ArgumentError),
        ({"n": 5}, ArgumentError),
        ({"normalize": "nfkc"}, ArgumentError),
        ({"blank": "no"}, ArgumentError),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(error):
        refusal_match(["a"], "gcg", **options)


@pytest.mark.parametrize("phrases", [(), ("a", " "), "one string", ("a", 3)])
def test_bad_lists(phrases):
    with pytest.raises((ArgumentError, DTypeError)):
        PhraseList("own", phrases)


def test_a_phrase_of_ignorable_characters_alone_is_refused_when_folded():
    own = PhraseList("own", ("\u200b",))
    with pytest.raises(ArgumentError, match="phrases"):
        refusal_match(["a"], own, normalize="refusal")


def test_changed_rules_carry_no_measured_errors():
    kept = refusal_match(["a"], "gcg", blank="invalid").lists[0]
    assert kept.measured == (632, 461, 14, 599)
    assert refusal_match(["a"], "gcg", normalize="lower").lists[0].measured is None


def test_measured_counts_give_the_published_accuracies():
    # Accuracy on the 1,706 labelled answers.
    for name, accuracy in (("gcg", 0.7216), ("refusal_direction", 0.7298), ("orbench_gpt4", 0.6887)):
        tp, fp, fn, tn = PHRASE_LISTS[name].measured
        assert tp + fp + fn + tn == 1706
        assert round((tp + tn) / 1706, 4) == accuracy


def test_corrected_rate_undoes_the_judge():
    gcg = PHRASE_LISTS["gcg"]
    tp, fp, fn, tn = gcg.measured
    # On the labelled data itself the correction gives the labels back.
    found = corrected_rate(Rate(tp + fp, tp + fp + fn + tn), gcg.sensitivity, gcg.specificity)
    assert found.rate == pytest.approx(646 / 1706, abs=1e-12)
    assert found.interval[0] < found.rate < found.interval[1]
    json.dumps(found.to_dict())


def test_corrected_rate_covers():
    rng = np.random.default_rng(0)
    true, se, sp, hit, runs = 0.3, 0.9, 0.8, 0, 600
    for _ in range(runs):
        k = rng.binomial(500, true * se + (1 - true) * (1 - sp))
        found = corrected_rate(Rate(k, 500), Rate(rng.binomial(150, se), 150), Rate(rng.binomial(200, sp), 200))
        hit += found.interval[0] <= true <= found.interval[1]
    assert 0.925 <= hit / runs <= 0.99  # 95 % within four standard errors below, conservative above


@pytest.mark.parametrize(
    "rates",
    [
        (Rate(0, 0), Rate(9, 10), Rate(9, 10)),
        (Rate(1, 10), Rate(5, 10), Rate(5, 10)),
        (Rate(1, 9), Rate(0, 0), Rate(1, 1)),
    ],
)
def test_no_correction_by_a_judge_of_chance(rates):
    with pytest.raises(DegenerateError):
        corrected_rate(*rates)


def test_results_show_themselves():
    found = refusal_match([CURLY, "<b>", "As an"], "gcg")
    assert "2/3" in repr(found)
    assert "&#x27;t assist" in found._repr_html_()
    assert json.loads(json.dumps(found.to_dict()))["fired"] == {"I can't assist": 1, "As an": 1}
    assert len(found.plot().patches) == 2
