"""TF-IDF and the n-gram classifier against scikit-learn, on the paragraphs of this project's own pages."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.feature_extraction.text import TfidfVectorizer as Reference
from sklearn.feature_selection import chi2 as reference_chi2
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

import abjure
from abjure.errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.measure.text import (
    NgramRefusalClassifier,
    SparseRows,
    TextConvergenceWarning,
    TfidfVectorizer,
    chi2,
    fold_lookalikes,
)
from abjure.measure.text.sparse import sparse_rows

ROOT = Path(__file__).parents[2]
STRANGE = [
    "",
    " \n",
    "I can't, I won’t — naïve ÉCLAIR’s ﬁnd ½ ²³ ⅷ",
    "हिन्दी में लिखा ΟΔΟΣ İstanbul ẞ ߐ",
    "日本語の文章 混ぜて abc　日本語",
    "a\x1c\x1db \u2003 c_d __ 3.14\u00a0x",
    "x" * 3000,
]


def paragraphs() -> tuple[list[str], list[str]]:
    texts, labels = [], []
    for path in sorted((ROOT / "docs").glob("*.md")):
        for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
            if len(block) > 40:
                texts.append(block)
                labels.append(path.stem)
    keep = {"forget", "protect", "refuse-directions"}
    rows = [i for i, label in enumerate(labels) if label in keep]
    return [texts[i] for i in rows], [labels[i] for i in rows]


TEXTS, LABELS = paragraphs()
BINARY = [label == "forget" for label in LABELS]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ngram_range": (1, 3)},
        {"ngram_range": (2, 2), "norm": "l1", "lowercase": False},
        {"token_pattern": r"(?u)\b\w+\b", "ngram_range": (1, 2), "sublinear_tf": True, "min_df": 2},
        {"min_df": 0.02, "max_df": 0.3, "smooth_idf": False, "ngram_range": (1, 2)},
        {"stop_words": ["the", "of", "and"], "ngram_range": (2, 3), "binary": True, "norm": None},
        {"use_idf": False, "strip_accents": "unicode", "max_df": 40},
        {"strip_accents": "ascii", "dtype": "float32"},
        {"analyzer": "char", "ngram_range": (1, 4)},
        {"analyzer": "char", "ngram_range": (3, 3), "lowercase": False},
        {"analyzer": "char_wb", "ngram_range": (2, 5)},
        {"analyzer": "char_wb", "ngram_range": (4, 4), "min_df": 3},
    ],
)
def test_tfidf_is_scikit_learns(options: dict) -> None:
    texts = TEXTS[:150] + STRANGE
    held_out = [*TEXTS[150:220], "entirely unseen zzyzx", *STRANGE[::-1]]
    ours = TfidfVectorizer(**options)
    theirs = Reference(**{**options, "dtype": np.dtype(options.get("dtype", "float64")).type})
    found, expected = ours.fit_transform(texts), theirs.fit_transform(texts)
    assert list(ours.get_feature_names_out()) == list(theirs.get_feature_names_out())
    assert ours.vocabulary_ == {k: int(v) for k, v in theirs.vocabulary_.items()}
    expected.sort_indices()
    tolerance = 1e-12 if found.dtype == np.float64 else 1e-6
    assert found.dtype == expected.dtype
    assert (found.indptr == expected.indptr).all()
    assert (found.indices == expected.indices).all()
    np.testing.assert_allclose(found.data, expected.data, rtol=tolerance)
    if options.get("use_idf", True):
        np.testing.assert_allclose(ours.idf_, theirs.idf_, rtol=tolerance)
    for part in (texts, held_out):
        np.testing.assert_allclose(ours.transform(part).toarray(), theirs.transform(part).toarray(), atol=tolerance)


def test_the_most_frequent_ngrams_are_kept() -> None:
    full = TfidfVectorizer(use_idf=False, norm=None).fit(TEXTS)
    totals = full.transform(TEXTS).toarray().sum(0)
    names = full.get_feature_names_out()
    order = sorted(range(len(names)), key=lambda i: (-totals[i], i))
    kept = TfidfVectorizer(max_features=30).fit(TEXTS)
    assert list(kept.get_feature_names_out()) == sorted(names[i] for i in order[:30])


def test_the_number_of_threads_changes_nothing() -> None:
    before = abjure.get_num_threads()
    texts = TEXTS * 8
    seen = []
    try:
        for threads in (1, 3):
            abjure.set_num_threads(threads)
            rows = TfidfVectorizer(ngram_range=(1, 3)).fit_transform(texts)
            fit = NgramRefusalClassifier(ngram_range=(1, 2)).fit(texts, LABELS * 8)
            seen.append([rows.data, rows.indices, rows.indptr, fit.coef_, fit.intercept_])
    finally:
        abjure.set_num_threads(before)
    for a, b in zip(*seen, strict=True):
        assert np.array_equal(a, b)


def test_apostrophes_and_single_letters() -> None:
    kept = TfidfVectorizer(token_pattern="apostrophe").fit(["I can’t help", "I can"])
    assert list(kept.get_feature_names_out()) == ["can", "can't", "help", "i"]
    plain = TfidfVectorizer().fit(["I can't help", "I can"])
    assert list(plain.get_feature_names_out()) == ["can", "help"]


def test_lookalikes() -> None:
    assert fold_lookalikes("I саnnot hеlр, ｓｏｒｒｙ: 𝐧𝐨; can’t") == "I cannot help, sorry: no; can't"
    assert fold_lookalikes("can\u200bnot re\u00adfuse") == "cannot refuse"
    assert fold_lookalikes("Я не могу помочь Ωμέγα") == "Я не могу помочь Ωμέγα"
    fit = NgramRefusalClassifier(lookalikes=True).fit(["I cannot", "I can", "sorry no", "sure yes"], [1, 0, 1, 0])
    assert fit.predict(["саnnot"])[0] == 1


@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize("labels", [BINARY, LABELS], ids=["two", "three"])
def test_weights_are_scikit_learns(labels: list, class_weight: str | None) -> None:
    options = {"ngram_range": (1, 2), "min_df": 2}
    rows = Reference(**options).fit_transform(TEXTS)
    ours = NgramRefusalClassifier(**options, C=3.0, class_weight=class_weight).fit(TEXTS, labels)
    theirs = LogisticRegression(C=3.0, class_weight=class_weight, solver="newton-cg", tol=1e-10, max_iter=500)
    theirs.fit(rows, labels)
    assert ours.result_ is not None
    assert ours.result_.converged
    assert list(ours.classes_) == list(theirs.classes_)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.predict_proba(TEXTS), theirs.predict_proba(rows), atol=1e-6)
    assert list(ours.predict(TEXTS)) == list(theirs.predict(rows))
    assert ours.score(TEXTS, labels) == theirs.score(rows, labels)
    if len(ours.classes_) == 2:
        np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-6)
        np.testing.assert_allclose(ours.decision_function(TEXTS), theirs.decision_function(rows), atol=1e-6)


def test_a_penalised_intercept_is_liblinears() -> None:
    rows = Reference().fit_transform(TEXTS)
    ours = NgramRefusalClassifier(ngram_range=(1, 1), penalize_intercept=True).fit(TEXTS, BINARY)
    theirs = LogisticRegression(C=10.0, solver="liblinear", tol=1e-10, max_iter=5000).fit(rows, BINARY)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-5)


def test_ngrams_that_speak_for_a_class() -> None:
    texts = ["sorry I cannot help", "I cannot do that", "sure here it is", "here you are"] * 3
    fit = NgramRefusalClassifier(ngram_range=(1, 2)).fit(texts, ["refused", "refused", "complied", "complied"] * 3)
    top = fit.top_ngrams(3)
    assert list(top) == ["complied", "refused"]
    assert top["refused"][0].ngram == "cannot"
    assert top["complied"][0].ngram == "here"
    weights = [n.weight for n in top["refused"]]
    assert weights == sorted(weights, reverse=True)
    explained = fit.explain("sorry, cannot", k=10)
    assert set(explained) == {"refused"}
    total = sum(n.weight for n in explained["refused"]) + fit.intercept_[0]
    np.testing.assert_allclose(total, fit.decision_function(["sorry, cannot"])[0])
    assert "cannot" in fit._repr_html_()
    with pytest.raises(ArgumentError, match="k"):
        fit.top_ngrams(0)


def test_scikit_learn_takes_it_for_an_estimator() -> None:
    model = NgramRefusalClassifier(C=2.0, ngram_range=(1, 2))
    copy = clone(model)
    assert copy.get_params() == model.get_params()
    assert repr(copy) == "NgramRefusalClassifier(ngram_range=(1, 2), C=2.0)"
    scores = cross_val_score(NgramRefusalClassifier(ngram_range=(1, 1)), TEXTS, LABELS, cv=3)
    assert scores.mean() > 0.6
    search = GridSearchCV(NgramRefusalClassifier(ngram_range=(1, 1)), {"C": [0.01, 10.0]}, cv=3).fit(TEXTS, LABELS)
    assert search.best_params_ == {"C": 10.0}

    class Unwrap:
        def fit(self, x: object, y: object = None) -> Unwrap:
            return self

        def transform(self, x: SparseRows) -> object:
            return x.to_scipy()

    pipe = make_pipeline(TfidfVectorizer(), Unwrap(), LogisticRegression()).fit(TEXTS, LABELS)
    assert pipe.score(TEXTS, LABELS) > 0.8
    with pytest.raises(ArgumentError, match="gamma"):
        model.set_params(gamma=1)
    assert model.set_params(C=5.0).C == 5.0


@pytest.mark.parametrize("labels", [BINARY, LABELS, [len(x) % 3 - 1 for x in LABELS]])
def test_files(tmp_path: Path, labels: list) -> None:
    path = tmp_path / "c.safetensors"
    fit = NgramRefusalClassifier(ngram_range=(1, 2), min_df=2, stop_words=["the"]).fit(TEXTS, labels)
    fit.save(path)
    back = NgramRefusalClassifier.load(path)
    assert back.get_params() == fit.get_params()
    assert back.classes_.dtype == fit.classes_.dtype
    assert np.array_equal(back.predict_proba(TEXTS + STRANGE), fit.predict_proba(TEXTS + STRANGE))
    assert back.result_ == fit.result_
    assert back.vectorizer_ is not None
    back.vectorizer_.save(path)
    alone = TfidfVectorizer.load(path)
    assert np.array_equal(alone.transform(TEXTS).data, back.vectorizer_.transform(TEXTS).data)
    with pytest.raises(ArgumentError, match="not a saved NgramRefusalClassifier"):
        NgramRefusalClassifier.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ArgumentError, match="not a saved"):
        NgramRefusalClassifier.load(path)
    with pytest.raises(ArgumentError, match="readable"):
        TfidfVectorizer.load(tmp_path / "missing")
    with pytest.raises(ArgumentError, match="fit first"):
        NgramRefusalClassifier().save(path)


def test_bytes_and_surrogates() -> None:
    latin = ["refusé".encode("latin-1"), "refusé"]
    with pytest.raises(ArgumentError, match="byte 5 of text 0"):
        TfidfVectorizer().fit(latin)
    names = TfidfVectorizer(decode_error="ignore").fit(latin).get_feature_names_out()
    assert list(names) == ["refus", "refusé"]
    with pytest.raises(ArgumentError, match="surrogate in text 1"):
        TfidfVectorizer().fit(["fine", "half \ud800 pair"])
    found = TfidfVectorizer(decode_error="replace").fit(["fine", "half \ud800 pair"]).get_feature_names_out()
    assert list(found) == ["fine", "half", "pair"]
    assert list(TfidfVectorizer().fit(np.array(["ab cd", "ef"], dtype=object)).get_feature_names_out()) == [
        "ab",
        "cd",
        "ef",
    ]


def test_bad_input_is_named() -> None:
    two = ["ab cd", "ef gh"]
    cases: list[tuple[type[Exception], str, dict, object, object]] = [
        (DegenerateError, "two classes", {}, two, [1, 1]),
        (DegenerateError, "two classes", {}, [], []),
        (DegenerateError, "no text holds", {}, ["", "."], [0, 1]),
        (DegenerateError, "min_df", {"min_df": 2}, two, [0, 1]),
        (DegenerateError, "stop words", {"stop_words": ["ab", "cd", "ef", "gh"]}, two, [0, 1]),
        (ShapeError, "2 labels", {}, two, [0, 1, 1]),
        (DTypeError, "y", {}, two, [0.5, 1.0]),
        (DTypeError, "got str", {}, "ab cd", [0, 1]),
        (DTypeError, "index 1", {}, ["ab", 3], [0, 1]),
        (DTypeError, "index 1", {}, ["ab", None], [0, 1]),
        (ArgumentError, "C", {"C": 0}, two, [0, 1]),
        (ArgumentError, "C", {"C": float("inf")}, two, [0, 1]),
        (ArgumentError, "tol", {"tol": -1.0}, two, [0, 1]),
        (ArgumentError, "max_iter", {"max_iter": 0}, two, [0, 1]),
        (ArgumentError, "class_weight", {"class_weight": "even"}, two, [0, 1]),
        (ArgumentError, "analyzer", {"analyzer": "byte"}, two, [0, 1]),
        (ArgumentError, "ngram_range", {"ngram_range": (2, 1)}, two, [0, 1]),
        (ArgumentError, "token_pattern", {"token_pattern": r"\S+"}, two, [0, 1]),
        (ArgumentError, "min_df", {"min_df": 1.5}, two, [0, 1]),
        (ArgumentError, "max_df", {"min_df": 2, "max_df": 1}, two, [0, 1]),
        (ArgumentError, "stop_words", {"stop_words": "english"}, two, [0, 1]),
        (ArgumentError, "max_features", {"max_features": 0}, two, [0, 1]),
        (ArgumentError, "decode_error", {"decode_error": "guess"}, two, [0, 1]),
    ]
    for error, message, options, texts, labels in cases:
        fit = NgramRefusalClassifier(**options)
        with pytest.raises(error, match=message):
            fit.fit(texts, labels)
        with pytest.raises(ArgumentError, match="fit first"):
            fit.predict(two)
    with pytest.raises(ArgumentError, match="norm"):
        TfidfVectorizer(norm="l3").fit(two)  # type: ignore[arg-type]


def test_an_empty_text_has_no_direction_and_a_failed_fit_keeps_the_old_one() -> None:
    fit = NgramRefusalClassifier().fit(["ab cd", "ef gh"], [0, 1])
    np.testing.assert_allclose(fit.decision_function([""]), fit.intercept_)
    assert fit.decision_function([]).shape == (0,)
    before = fit.coef_.copy()
    with pytest.raises(DegenerateError):
        fit.fit(["ab cd", "ef gh"], [0, 0])
    assert np.array_equal(fit.coef_, before)
    with pytest.warns(TextConvergenceWarning):
        NgramRefusalClassifier(max_iter=1).fit(TEXTS, LABELS)


def test_chi2_and_columns() -> None:
    vectorizer = TfidfVectorizer(binary=True, use_idf=False, norm=None)
    rows = vectorizer.fit_transform(TEXTS)
    codes = np.unique(LABELS, return_inverse=True)[1]
    found = chi2(rows, codes, 3)
    np.testing.assert_allclose(found, reference_chi2(rows.to_scipy(), codes)[0], rtol=1e-9)
    best = np.sort(np.argsort(-found, kind="stable")[:50])
    assert np.array_equal(vectorizer.keep(best).transform(TEXTS).toarray(), rows.toarray()[:, best])
    assert np.array_equal(rows.take(best).toarray(), rows.toarray()[:, best])
    assert np.array_equal(rows.take(best[::-1]).toarray(), rows.toarray()[:, best[::-1]])
    with pytest.raises(ShapeError):
        chi2(rows, codes[:-1], 3)
    with pytest.raises(DegenerateError):
        vectorizer.keep([])
    with pytest.raises(ArgumentError, match="columns"):
        vectorizer.keep([50])


def test_intake_of_sparse_rows() -> None:
    from scipy.sparse import coo_matrix, csr_matrix

    dense = np.array([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    for x in (dense, csr_matrix(dense), coo_matrix(dense), dense.tolist(), sparse_rows(dense)):
        assert np.array_equal(sparse_rows(x).toarray(), dense)
    doubled = coo_matrix(([1.0, 1.0], ([0, 0], [1, 1])), shape=(2, 2))
    assert sparse_rows(doubled).toarray()[0, 1] == 2
    with pytest.raises(NonFiniteError, match="row 1"):
        sparse_rows(np.array([[0.0, 1.0], [np.nan, 1.0]]))
    with pytest.raises(ShapeError):
        sparse_rows(np.zeros(3))
    with pytest.raises(DTypeError):
        sparse_rows([["a"]])
