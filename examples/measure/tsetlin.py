"""The Tsetlin Machine on digits and on real texts, beside scikit-learn's models and, if they are installed, its peers.

    python examples/measure/tsetlin.py --reuters FOLDER            # see corpora.py for the texts
    python examples/measure/tsetlin.py --reuters FOLDER --peers    # seconds of pyTsetlinMachine and green-tsetlin too

Digits are scikit-learn's 8 × 8 images at five thresholds (320 bits); of the texts, the 2000 n-grams of one and two
words with the largest χ². Every machine has the same clauses per class, T, s and epochs and one thread. green-tsetlin
shares its clauses between classes: it is given as many in all as the others have. Accuracy is the mean over seeds with
the spread.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from corpora import INSTALLED, reuters

import abjure
from abjure.measure.text import TfidfVectorizer, TsetlinMachine, chi2

SEEDS = (1, 2, 3)
THRESHOLDS = (2, 5, 8, 11, 14)
Array = np.ndarray[Any, Any]
Data = tuple[Array, Array, Array, Array]


def digits() -> Data:
    """Bits and labels, three quarters to learn from."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    bits = np.concatenate([x > t for t in THRESHOLDS], axis=1)
    order = np.random.default_rng(0).permutation(len(y))
    cut = 3 * len(y) // 4
    return bits[order[:cut]], y[order[:cut]], bits[order[cut:]], y[order[cut:]]


def texts(topic: str, folder: Path) -> tuple[Data, list[str]]:
    """Which n-grams the articles hold, the labels, and the n-grams."""
    x, y, held, truth = reuters(topic, folder)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=3, binary=True, use_idf=False, norm=None)
    score = chi2(vectorizer.fit_transform(x), np.array(y), 2)
    vectorizer.keep(np.argsort(-score, kind="stable")[:2000])
    bits, other = (vectorizer.transform(t).toarray() > 0 for t in (x, held))
    return (bits, np.array(y), other, np.array(truth)), list(vectorizer.get_feature_names_out())


def ours(data: Data, clauses: int, t: int, s: float, epochs: int, seed: int, weighted: bool) -> tuple[float, float]:
    x, y, held, truth = data
    begin = time.perf_counter()
    machine = TsetlinMachine(clauses, t, s, epochs=epochs, seed=seed, weighted=weighted).fit(x, y)
    seconds = time.perf_counter() - begin
    return seconds, machine.score(held, truth)


def pytm(data: Data, clauses: int, t: int, s: float, epochs: int, seed: int, weighted: bool) -> tuple[float, float]:
    from pyTsetlinMachine.tm import MultiClassTsetlinMachine

    x, y, held, truth = (a.astype(np.uint32) for a in data)
    machine = MultiClassTsetlinMachine(clauses, t, s, boost_true_positive_feedback=1, weighted_clauses=weighted)
    begin = time.perf_counter()
    machine.fit(x, y, epochs=epochs)
    seconds = time.perf_counter() - begin
    return seconds, float((machine.predict(held) == truth).mean())


def green(data: Data, clauses: int, t: int, s: float, epochs: int, seed: int, weighted: bool) -> tuple[float, float]:
    import green_tsetlin as gt

    x, held = (np.ascontiguousarray(a, dtype=np.uint8) for a in (data[0], data[2]))
    y, truth = (a.astype(np.uint32) for a in (data[1], data[3]))
    classes = int(y.max()) + 1
    machine = gt.TsetlinMachine(
        n_literals=x.shape[1],
        n_clauses=clauses * classes,
        n_classes=classes,
        s=s,
        threshold=t,
        boost_true_positives=True,
    )
    trainer = gt.Trainer(
        machine, n_epochs=epochs, seed=seed, n_jobs=1, progress_bar=False, load_best_state=False, early_exit_acc=2.0
    )
    trainer.set_train_data(x, y)
    trainer.set_eval_data(held[:2], truth[:2])
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    predictor = machine.get_predictor()
    return seconds, float(np.mean([predictor.predict(row) == label for row, label in zip(held, truth, strict=True)]))


def compare(name: str, data: Data, setting: tuple[int, int, float, int], peers: bool) -> list[dict[str, Any]]:
    """Seconds of learning (the best of the seeds) and accuracy of each machine, and scikit-learn's accuracy."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import ComplementNB
    from sklearn.svm import LinearSVC

    clauses, t, s, epochs = setting
    print(f"\n{name}: {data[0].shape[0]} rows of {data[0].shape[1]} bits, {clauses} clauses a class, T={t}, s={s}")
    print(f"{epochs} epochs, one thread, seeds {SEEDS}; classes {len(np.unique(data[1]))}, tested on {len(data[3])}")
    rows = []
    machines: list[tuple[str, Callable[..., tuple[float, float]], bool]] = [
        ("abjure", ours, False),
        ("abjure, weighted", ours, True),
    ]
    if peers:
        machines += [("pyTsetlinMachine", pytm, False), ("pyTsetlinMachine, weighted", pytm, True)]
        machines += [("green-tsetlin (weighted)", green, True)]
    for label, run, weighted in machines:
        try:
            found = [run(data, *setting, seed, weighted) for seed in SEEDS]
        except ImportError as err:
            print(f"{label:<30} not installed ({err.name})")
            continue
        scores = [f[1] for f in found]
        row = {"model": label, "seconds": min(f[0] for f in found), "accuracy": scores}
        rows.append(row)
        print(
            f"{label:<30} {row['seconds']:7.3f} s  {np.mean(scores):.4f} ({min(scores):.4f} to {max(scores):.4f})",
            flush=True,
        )
    x, y, held, truth = data
    for label, other in [
        ("LogisticRegression", LogisticRegression(max_iter=2000)),
        ("LinearSVC", LinearSVC()),
        ("ComplementNB", ComplementNB()),
    ]:
        begin = time.perf_counter()
        other.fit(x.astype(float), y)
        row = {
            "model": label,
            "seconds": time.perf_counter() - begin,
            "accuracy": [other.score(held.astype(float), truth)],
        }
        rows.append(row)
        print(f"{'scikit-learn ' + label:<30} {row['seconds']:7.3f} s  {row['accuracy'][0]:.4f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuters", type=Path, default=INSTALLED, help="folder with Weka's Reuters files")
    parser.add_argument("--peers", action="store_true", help="run the other implementations that are installed")
    parser.add_argument("--only", choices=("digits", "texts"), help="one of the two")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    abjure.set_num_threads(1)
    report: dict[str, Any] = {}
    if args.only != "texts":
        report["digits"] = compare("digits", digits(), (200, 20, 5.0, 20), args.peers)
    if args.only != "digits":
        for topic in ("Grain", "Corn"):
            data, names = texts(topic, args.reuters)
            report[topic] = compare(f"Reuters {topic}", data, (200, 20, 5.0, 10), args.peers)
        machine = TsetlinMachine(20, 10, 3.0, epochs=40, max_literals=6).fit(data[0], data[1])
        print(f"\n20 short clauses a class on {topic}: accuracy {machine.score(data[2], data[3]):.4f}; for it speak")
        for rule in [r for r in machine.rules(names) if r.label == 1 and r.weight > 0][:6]:
            print(f"  {rule}")
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
