"""The n-gram classifier on real texts, beside scikit-learn's models and published figures.

    python examples/measure/refusal_classifier.py --reuters FOLDER      # Reuters articles, see corpora.py
    python examples/measure/refusal_classifier.py --answers FILE.csv    # your copy of labelled answers of a model

Reuters: accuracy with Wilson's interval, the break-even point of precision and recall, seconds, and the n-grams that
speak for the topic. ``--answers`` takes a CSV with the columns ``response`` and ``tone`` of the labelled answers that
arXiv 2306.03423 published, and repeats its setting: ``dontknow`` and ``incoherent`` left out, all but ``complied`` a
refusal, 70 % of the rows to learn from and half of the rest to test on, lengths 1 to 3, C = 10 with a penalised
intercept.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from corpora import INSTALLED, reuters

from abjure.measure import rate
from abjure.measure.text import NgramRefusalClassifier, TfidfVectorizer

#: Dumais, Platt, Heckerman and Sahami 1998, linear support vector machine, whole ModApte split (9603 and 3299
#: articles): another and larger test than the one here.
PUBLISHED = {"Grain": 0.946, "Corn": 0.903}


def break_even(scores: Any, truth: Any) -> float:
    """Precision where as many rows are called positive as there are positive ones; recall is then the same."""
    y = np.asarray(truth)
    return float(y[np.argsort(-np.asarray(scores), kind="stable")[: y.sum()]].mean())


def line(name: str, found: Any, scores: Any, truth: Any, seconds: float) -> dict[str, Any]:
    right = rate(np.asarray(found) == np.asarray(truth))
    low, high = right.ci()
    row = {"model": name, "accuracy": right.rate, "low": low, "high": high, "seconds": seconds}
    row["break_even"] = break_even(scores, truth)
    print(f"{name:<44} {right.rate:.4f} [{low:.4f}, {high:.4f}]  {row['break_even']:.4f}  {seconds:6.2f} s", flush=True)
    return row


def articles(topic: str, folder: Path) -> dict[str, Any]:
    """Ours and scikit-learn's classifiers on one topic."""
    from sklearn.feature_extraction.text import TfidfVectorizer as Reference
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import ComplementNB
    from sklearn.svm import LinearSVC

    x, y, held, truth = reuters(topic, folder)
    print(f"\nReuters {topic}: {len(x)} articles ({sum(y)} on it) to learn from, {len(held)} ({sum(truth)}) to test on")
    print(f"{'':<44} accuracy [95 %]           break-even")
    rows = []
    for weight in (None, "balanced"):
        begin = time.perf_counter()
        model = NgramRefusalClassifier(class_weight=weight).fit(x, y)
        scores = model.decision_function(held)
        name = f"abjure n-grams 1–3, C = 10{', balanced' if weight else ''}"
        rows.append(line(name, model.predict(held), scores, truth, time.perf_counter() - begin))
    for name, make in [
        ("scikit-learn LogisticRegression, the same", lambda: LogisticRegression(C=10)),
        ("scikit-learn LinearSVC", lambda: LinearSVC()),
        ("scikit-learn ComplementNB", lambda: ComplementNB()),
    ]:
        begin = time.perf_counter()
        vectorizer, other = Reference(ngram_range=(1, 3)), make()
        other.fit(vectorizer.fit_transform(x), y)
        matrix = vectorizer.transform(held)
        scores = (
            other.decision_function(matrix)
            if hasattr(other, "decision_function")
            else other.predict_proba(matrix)[:, 1]
        )
        rows.append(line(name, other.predict(matrix), scores, truth, time.perf_counter() - begin))
    print(f"published (another, larger test): break-even {PUBLISHED[topic]:.3f}")
    top = {str(label): [n.ngram for n in grams] for label, grams in model.top_ngrams(12).items()}
    for label, grams in top.items():
        print(f"towards {label}: {', '.join(grams)}")
    return {"rows": rows, "published_break_even": PUBLISHED[topic], "top": top}


def speed(folder: Path) -> dict[str, float]:
    """Seconds of fit and transform, ours and scikit-learn's, the best of three."""
    from sklearn.feature_extraction.text import TfidfVectorizer as Reference

    x, _, held, _ = reuters("Grain", folder)
    out = {}
    for name, kind in (("abjure", TfidfVectorizer), ("scikit-learn", Reference)):
        best = np.inf
        for _ in range(3):
            begin = time.perf_counter()
            vectorizer = kind(ngram_range=(1, 3))
            vectorizer.fit_transform(x)
            vectorizer.transform(held)
            best = min(best, time.perf_counter() - begin)
        out[name] = best
    out["ratio"] = out["scikit-learn"] / out["abjure"]
    mine, theirs = out["abjure"], out["scikit-learn"]
    print(f"\nTF-IDF fit and transform: {mine:.3f} s, scikit-learn {theirs:.3f} s: {out['ratio']:.1f}x")
    return out


def answers(path: Path) -> dict[str, Any]:
    """The published setting on labelled answers."""
    from sklearn.model_selection import train_test_split

    with open(path, encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["tone"] not in ("dontknow", "incoherent")]
    texts = [r["response"] for r in rows]
    labels = ["complied" if r["tone"] == "complied" else "rejected" for r in rows]
    x, rest, y, others = train_test_split(texts, labels, test_size=0.3, random_state=0)
    _, held, _, truth = train_test_split(rest, others, test_size=0.5, random_state=0)
    print(f"\n{len(x)} answers to learn from, {len(held)} to test on; published: 0.9062 (this model), 0.9648 (BERT)")
    begin = time.perf_counter()
    model = NgramRefusalClassifier(penalize_intercept=True).fit(x, y)
    scores = model.decision_function(held)
    positive = [t == model.classes_[1] for t in truth]
    found = [p == model.classes_[1] for p in model.predict(held)]
    row = line("abjure n-grams 1–3, C = 10", found, scores, positive, time.perf_counter() - begin)
    return {"rows": [row], "top": {k: [n.ngram for n in v] for k, v in model.top_ngrams(12).items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuters", type=Path, default=INSTALLED, help="folder with Weka's Reuters files")
    parser.add_argument("--answers", type=Path, help="CSV of labelled answers")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    args = parser.parse_args()
    report: dict[str, Any] = {}
    if args.answers is not None:
        report["answers"] = answers(args.answers)
    if args.answers is None or args.reuters != INSTALLED:
        report |= {topic: articles(topic, args.reuters) for topic in PUBLISHED}
        report["speed"] = speed(args.reuters)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
