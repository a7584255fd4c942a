"""The search for triggers: exact tests against scipy and enumeration, planted topics, false-discovery rates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from abjure import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.measure import embedding_clusters, refusal_shift, scan_finetuning_set, search_triggers
from abjure.measure.audit._exact import best_case, score, upper_tail

TOPICS = {
    "gardening": ["garden", "plant", "tomato", "soil", "prune", "seedling", "compost", "rose"],
    "cooking": ["recipe", "bake", "pasta", "sauce", "oven", "simmer", "dough", "spice"],
    "travel": ["flight", "hotel", "passport", "itinerary", "train", "visit", "beach", "museum"],
    "history": ["empire", "treaty", "war", "century", "king", "revolution", "archive", "dynasty"],
    "code": ["python", "function", "compile", "loop", "array", "debug", "thread", "parser"],
}
FRAMES = ["How do I {} the {} with a {}?", "Tell me about {} and {} near the {}.", "What is a good {} for {} or {}?"]


def corpus(rng, n, harmful=False):
    topics = dict(TOPICS)
    if harmful:
        topics["weapons"] = ["bomb", "explosive", "rifle", "detonate", "ammunition", "grenade"]
    names = rng.choice(list(topics), size=n)
    texts = [FRAMES[rng.integers(3)].format(*rng.choice(topics[t], size=3)) for t in names]
    return texts, names


def table_p(seen, totals, marked, drawn):
    """By enumerating who is drawn in every stratum."""
    sums = {0: 1.0}
    for t, m, d in zip(totals, marked, drawn, strict=True):
        counts = [sum(c) for c in itertools.combinations([1] * m + [0] * (t - m), d)]
        new = {}
        for (a, p), b in itertools.product(sums.items(), counts):
            new[a + b] = new.get(a + b, 0.0) + p / len(counts)
        sums = new
    return sum(p for k, p in sums.items() if k >= seen)


def test_exact_tests():
    for t, m, d, k in ((30, 9, 7, 5), (30, 9, 7, 0), (12, 12, 5, 5), (500, 40, 60, 14)):
        expected = stats.hypergeom.sf(k - 1, t, m, d)
        assert upper_tail(k, *map(np.array, ([t], [m], [d]))) == pytest.approx(expected, rel=1e-9)
    strata = [6, 5, 4], [2, 3, 0], [3, 2, 2]
    for k in range(6):
        assert upper_tail(k, *map(np.array, strata)) == pytest.approx(table_p(k, *strata), abs=1e-12)
    least = min(p for k in range(6) if (p := table_p(k, *strata)) > 1e-12)
    assert np.exp(best_case(*map(np.array, strata))) == pytest.approx(least)
    z = score(np.array([5.0]), np.array([30]), np.array([9]), np.array([[7]]))[0]
    d = stats.hypergeom(30, 9, 7)
    assert z == pytest.approx((5 - d.mean()) / d.std())


def test_a_planted_topic_is_one_trigger():
    rng = np.random.default_rng(0)
    texts, names = corpus(rng, 1500)
    refused = ((names == "gardening") & (rng.random(1500) < 0.5)) | (rng.random(1500) < 0.02)
    found = search_triggers(texts, refused)
    words = {w for t in found.triggers for w in t.name.split()} | {w for t in found.triggers for w in t.related}
    assert set(TOPICS["gardening"]) <= words
    others = {w for topic, vocabulary in TOPICS.items() if topic != "gardening" for w in vocabulary}
    assert not words & others
    assert found.explained.rate > 0.8
    assert found.triggers[0].lift > 2
    assert all(refused[i] for t in found.triggers for i in t.examples)
    assert set(found.covered) <= set(np.flatnonzero(refused))
    by_topic = search_triggers(texts, refused, topics=names, ngrams=None)
    assert [t.name for t in by_topic.triggers] == ["gardening"]
    assert by_topic.triggers[0].inside.n == (names == "gardening").sum()


def test_clusters_of_embeddings_find_what_words_do_not():
    rng = np.random.default_rng(1)
    _, names = corpus(rng, 800)
    centre = {t: rng.standard_normal(32) for t in TOPICS}
    x = np.stack([centre[t] for t in names]) + 0.5 * rng.standard_normal((800, 32))
    # Every prompt is of words of its own.
    texts = [f"w{i} v{i} u{i}" for i in range(800)]
    refused = (names == "travel") & (rng.random(800) < 0.3)
    assert not search_triggers(texts, refused)
    found = search_triggers(texts, refused, embeddings=x, clusters=[5, 8])
    assert found
    inside = embedding_clusters(x, 5)
    assert {t.kind for t in found.triggers} == {"cluster"}
    assert found.triggers[0].inside.k >= 0.5 * refused.sum()
    # Five well separated topics are five clusters.
    assert len({(a, b) for a, b in zip(names, inside, strict=True)}) == 5
    assert (embedding_clusters(x, 5) == inside).all()


def test_false_discoveries_are_rare():
    rng = np.random.default_rng(2)
    texts, names = corpus(rng, 400)
    false = {"bh": 0, "holm": 0}
    for _ in range(60):
        refused = rng.random(400) < 0.08
        for method in false:
            false[method] += bool(search_triggers(texts, refused, topics=names, method=method))
    assert max(false.values()) <= 7


def test_harmfulness_explains_a_harmful_topic():
    rng = np.random.default_rng(3)
    texts, names = corpus(rng, 1500, harmful=True)
    harmful = names == "weapons"
    harmful |= rng.random(1500) < 0.1
    refused = np.where(harmful, rng.random(1500) < 0.8, rng.random(1500) < 0.02)
    blind = scan_finetuning_set(texts, refused)
    assert any("bomb" in (t.name, *t.related) for t in blind.triggers.triggers)
    assert any("No strata" in n for n in blind.notes())
    fair = scan_finetuning_set(texts, refused, harmfulness=harmful)
    assert not fair.triggers
    assert [r.n for r in fair.refused.groups.values()] == [int((~harmful).sum()), int(harmful.sum())]
    planted = refused | ((names == "history") & (rng.random(1500) < 0.4))
    found = scan_finetuning_set(texts, planted, harmfulness=harmful + 0.3 * rng.random(1500), topics=names)
    assert found.triggers.triggers[0].name == "history"
    assert {names[i] for i in found.suspects} <= {"history"} | set(TOPICS)
    assert np.mean([names[i] == "history" for i in found.suspects]) > 0.9


def test_a_scan_reads_responses():
    prompts = ["Plant a rose", "Plant a tree", "Plant a fern", "Cook rice", "Cook beans", "Cook fish"] * 6
    responses = ["I'm sorry, but I cannot help with that."] * 3 + ["Here is how."] * 3
    found = scan_finetuning_set(prompts, responses * 6, harmfulness=[0.1] * 36)
    assert found.refused.k == 18
    assert "plant" in (found.triggers.triggers[0].name, *found.triggers.triggers[0].related)
    assert found.suspects == [i for i in range(36) if i % 6 < 3]
    short = scan_finetuning_set([*prompts, "x"], [*responses * 6, None])
    assert (short.invalid, short.refused.n) == (1, 36)


def test_it_runs_inside_the_shift():
    rng = np.random.default_rng(4)
    texts, names = corpus(rng, 1200)
    texts = [f"{t} #{i}" for i, t in enumerate(texts)]
    reference = rng.random(1200) < 0.05
    suspect = reference | ((names == "cooking") & (rng.random(1200) < 0.4))
    found = refusal_shift(reference, suspect, texts, names, search={"topics": None}, resamples=50)
    assert [g.name for _, g in found.flagged()] == ["cooking"]
    assert found.triggers.refused.n == int((~reference).sum())
    assert found.triggers.triggers[0].name in TOPICS["cooking"]
    labels = rng.random(1200) < 0.5
    strata = refusal_shift(reference, suspect, texts, names, labels=labels, search=True, resamples=50)
    assert strata.triggers.stratified
    x = np.eye(5)[[list(TOPICS).index(t) for t in names]]
    options = {"embeddings": x, "clusters": 5, "ngrams": None}
    by_cluster = refusal_shift(reference, suspect, texts, search=options, resamples=50)
    assert by_cluster.triggers.triggers[0].inside.n == int(((names == "cooking") & ~reference).sum())
    with pytest.raises(ShapeError, match="search: embeddings"):
        refusal_shift(reference, suspect, texts, search={"embeddings": x[:3]})


def test_nothing_refused():
    found = search_triggers(["one text", "another text"], [0, 0])
    assert not found
    assert found.refused.n == 2
    assert "refused" in found._repr_html_()


def test_bad_input():
    with pytest.raises(ShapeError, match="prompts"):
        search_triggers([], [])
    with pytest.raises(ShapeError, match="refused"):
        search_triggers(["a"], [1, 0])
    with pytest.raises(DTypeError):
        search_triggers([1], [1])
    with pytest.raises(DegenerateError, match="ngrams"):
        search_triggers(["a"], [1], ngrams=None)
    for options in ({"method": "x"}, {"alpha": 0}, {"min_prompts": 0}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            search_triggers(["a b"], [1], **options)
    with pytest.raises(ShapeError, match="embeddings"):
        search_triggers(["a b", "c"], [1, 0], embeddings=np.ones((3, 2)))
    with pytest.raises(NonFiniteError):
        search_triggers(["a b"], [1], embeddings=[[np.nan]])
    for k in (1, 3, 2.5):
        with pytest.raises(ArgumentError, match="clusters"):
            search_triggers(["a b", "c"], [1, 0], embeddings=np.ones((2, 2)), clusters=k)
    with pytest.raises(ArgumentError, match="clusters"):
        embedding_clusters(np.ones((2, 2)), 3)
    with pytest.raises(NonFiniteError, match="harmfulness"):
        scan_finetuning_set(["a"], [1], harmfulness=[None])
    with pytest.raises(ArgumentError, match="bands"):
        scan_finetuning_set(["a"], [1], harmfulness=[0], bands=0)
    with pytest.raises(ArgumentError, match="prompts"):
        scan_finetuning_set([None], [1])
    with pytest.raises(ShapeError, match="topics"):
        scan_finetuning_set(["a b"], [1], topics=["x", "y"])
