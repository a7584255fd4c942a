"""Topics from keywords: the choice of texts by hand, outliers as scikit-learn finds them, and two topics told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import LocalOutlierFactor

from abjure.errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.measure.text import Doc2Vec, TopicMatcher, UnknownKeywordWarning, local_outlier_factor

DOCS = np.array([[1, 0], [0.8, 0.6], [0, 1]], dtype=np.float32)
SEA = ["ship", "harbour", "sailor", "wave", "anchor", "captain", "deck", "storm", "island", "cargo"]
FARM = ["wheat", "tractor", "barn", "cow", "harvest", "field", "seed", "plough", "maize", "orchard"]


def corpus(n: int, seed: int) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for i in range(n):
        words = SEA if i % 2 == 0 else FARM
        texts.append(" ".join([*rng.choice(words, 12), *rng.choice(["the", "of", "and"], 6)]))
        labels.append("sea" if i % 2 == 0 else "farm")
    return texts, labels


def one(**options: object) -> TopicMatcher:
    return TopicMatcher({"t": ["k"]}, **options).fit_vectors(DOCS, {"t": [[1, 0]]})  # type: ignore[arg-type]


def test_the_vectors_of_the_reference() -> None:
    published = one(compat=True, offset=0.0)
    assert published.vectors_.tolist() == [[1, 0]]
    wide = one(compat=True, similarity_threshold=0.7)
    np.testing.assert_allclose(wide.vectors_, [[0.9, 0.3]], atol=1e-7)
    np.testing.assert_allclose(wide.similarity(DOCS)[:, 0], [0.948683, 0.948683, 0.316228], atol=1e-6)
    assert wide.topics_[0].documents.tolist() == [0, 1]


def test_which_texts_are_chosen() -> None:
    def count(cosines: list[float], **options: object) -> int:
        return TopicMatcher({"t": ["k"]}, **options)._count(np.array(cosines))  # type: ignore[arg-type]

    s = [0.9, 0.85, 0.8, 0.5, 0.1]
    assert count(s) == 3
    assert count(s, offset=0.0) == 1
    assert count(s, min_docs=4) == 4
    assert count(s, min_docs=40, max_docs=50) == 5
    assert count(s, similarity_threshold=0.1) == 5
    assert count(s, similarity_threshold=0.1, max_docs=2) == 2
    assert count(s, similarity_threshold=0.95) == 1
    # The published rule is strict, and stops at ties; here the least number of texts is taken.
    assert count(s, similarity_threshold=0.5, compat=True) == 3
    assert count([0.9, 0.9, 0.2], compat=True, offset=0.0) == 1
    assert count([0.9, 0.9, 0.2], compat=True, offset=0.0, min_docs=3) == 3


@pytest.mark.parametrize("k", [1, 3, 20, 59])
def test_outliers_are_scikit_learns(k: int) -> None:
    rng = np.random.default_rng(k)
    x = np.concatenate([rng.normal(size=(50, 5)), rng.normal(size=(10, 5)) * 4]).astype(np.float32)
    reference = LocalOutlierFactor(k).fit(x.astype(np.float64))
    np.testing.assert_allclose(local_outlier_factor(x, k), -reference.negative_outlier_factor_, rtol=1e-6)
    for bad, error in ((0, ArgumentError), (60, ArgumentError)):
        with pytest.raises(error, match="neighbors"):
            local_outlier_factor(x, bad)


def test_an_outlier_is_left_out_of_few_candidates() -> None:
    x = np.array([[5, 5], [5, 6], [6, 5], [6, 6], [12, 12]], dtype=np.float32)
    for neighbors, expected in ((None, []), (20, [4])):
        found = TopicMatcher({"t": ["k"]}, similarity_threshold=-1, outlier_neighbors=neighbors)
        found.fit_vectors(x, {"t": [[1, 1]]})
        assert found.topics_[0].outliers.tolist() == expected
    np.testing.assert_allclose(found.vectors_, [[5.5, 5.5]])


def test_topics_by_document_vectors(tmp_path: Path) -> None:
    texts, labels = corpus(80, 1)
    held, truth = corpus(40, 2)
    options = {"size": 24, "epochs": 30, "sample": 0.0, "min_count": 2, "rate": (0.05, 0.001)}
    keywords = {"sea": ["Ship", "sailor", "Ship"], "farm": ["wheat", "cow", "combine"]}
    matcher = TopicMatcher(keywords, min_docs=10, outlier_neighbors=5, doc2vec=options)
    with pytest.warns(UnknownKeywordWarning, match="combine"):
        matcher.fit(texts)
    assert matcher.topics_[0].keywords == ("Ship", "sailor")
    assert list(matcher.classes_) == ["sea", "farm"]
    assert matcher.score(held, truth) > 0.95
    assert matcher.score(texts, labels) > 0.95
    np.testing.assert_allclose(matcher.predict_proba(held).sum(1), 1)
    path = tmp_path / "m.safetensors"
    matcher.save(path)
    back = TopicMatcher.load(path)
    assert np.array_equal(back.decision_function(held), matcher.decision_function(held))
    assert repr(back.topics_) == repr(matcher.topics_)
    with pytest.warns(UnknownKeywordWarning):
        again = TopicMatcher(**matcher.get_params()).fit(texts)
    assert np.array_equal(again.vectors_, matcher.vectors_)
    # A text without a known word is like no topic.
    assert np.array_equal(matcher.decision_function(["zzyzx", ""]), np.zeros((2, 2)))
    assert "sea" in matcher._repr_html_()
    path.write_bytes(b"no")
    with pytest.raises(ArgumentError, match="not a saved TopicMatcher"):
        TopicMatcher.load(path)


def test_topics_by_given_embeddings(tmp_path: Path) -> None:
    vocabulary = {w: i for i, w in enumerate(SEA + FARM)}

    def embed(texts: list[str]) -> np.ndarray:
        out = np.zeros((len(texts), len(vocabulary)))
        for row, text in zip(out, texts, strict=True):
            for word in text.split():
                if word in vocabulary:
                    row[vocabulary[word]] += 1
        return out

    texts, labels = corpus(60, 3)
    matcher = TopicMatcher({"sea": ["ship wave"], "farm": ["wheat cow"]}, embed=embed, offset=0.3).fit(texts)
    assert matcher.score(texts, labels) == 1
    matcher.save(tmp_path / "m")
    back = TopicMatcher.load(tmp_path / "m", embed=embed)
    assert np.array_equal(back.decision_function(texts), matcher.decision_function(texts))
    with pytest.raises(ArgumentError, match="embed"):
        TopicMatcher.load(tmp_path / "m").predict(texts)
    assert TopicMatcher.load(tmp_path / "m").similarity(embed(texts)).shape == (60, 2)


def test_bad_input_is_named() -> None:
    texts, _ = corpus(20, 1)
    for error, message, keywords, options in [
        (ArgumentError, "keywords", {}, {}),
        (ArgumentError, "keywords", {"a": "word"}, {}),
        (DegenerateError, "at least one", {"a": []}, {}),
        (DTypeError, "keywords", {"a": [3]}, {}),
        (DegenerateError, "no word of 'a'", {"a": ["zzyzx"]}, {}),
        (ArgumentError, "similarity_threshold", {"a": ["ship"]}, {"similarity_threshold": 2.0}),
        (ArgumentError, "offset", {"a": ["ship"]}, {"offset": -0.1}),
        (ArgumentError, "min_docs", {"a": ["ship"]}, {"min_docs": 0}),
        (ArgumentError, "max_docs", {"a": ["ship"]}, {"min_docs": 5, "max_docs": 2}),
        (ArgumentError, "outlier_neighbors", {"a": ["ship"]}, {"outlier_neighbors": 0}),
        (ArgumentError, "size", {"a": ["ship"]}, {"doc2vec": {"size": 0}}),
        (ArgumentError, "rate", {"a": ["ship"]}, {"doc2vec": {"rate": (0.1, 0.2)}}),
        (DegenerateError, "min_count", {"a": ["ship"]}, {"doc2vec": {"min_count": 10_000}}),
    ]:
        matcher = TopicMatcher(keywords, **options)  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            matcher.fit(texts)
        with pytest.raises(ArgumentError, match="fit first"):
            matcher.predict(texts)
    with pytest.raises(DegenerateError, match="texts"):
        TopicMatcher({"a": ["ship"]}).fit([])
    matcher = TopicMatcher({"t": ["k"]})
    with pytest.raises(NonFiniteError, match="row 1"):
        matcher.fit_vectors([[0.0, 1.0], [np.nan, 1.0]], {"t": [[1, 0]]})
    with pytest.raises(ShapeError, match="expected"):
        matcher.fit_vectors(DOCS, {"t": [[1, 0, 0]]})
    with pytest.raises(ArgumentError, match="topics"):
        matcher.fit_vectors(DOCS, {"other": [[1, 0]]})
    with pytest.raises(ShapeError, match="2 values"):
        one().similarity(np.ones((2, 3)))
    with pytest.raises(ArgumentError, match="embed"):
        one().predict(["a"])
    with pytest.raises(ArgumentError, match="fit first"):
        Doc2Vec().transform(["a"])
