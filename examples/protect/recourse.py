"""Recourse under deletion on the breast cancer data of scikit-learn: what it costs, and whether it holds.

    python examples/protect/recourse.py

A logistic regression is fitted to the training half; every patient of the test half whom it calls malignant is given
the cheapest change that makes it say benign, first without regard to deletions and then so that any k records may be
deleted. Both are judged by fitting again without the worst records found.
"""

from __future__ import annotations

import time

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from abjure.protect import DeletionModel


def main() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    train, test, y_train, _ = train_test_split(x, y, test_size=0.5, random_state=0, stratify=y)
    mean, spread = train.mean(axis=0), train.std(axis=0)
    train, test = (train - mean) / spread, (test - mean) / spread
    model = DeletionModel(train, y_train, penalty=1.0)
    refused = test[model.decision_function(test) < 0]
    print(f"{len(train)} records, {train.shape[1]} features, {len(refused)} patients called malignant\n")
    plain = [model.recourse(q, k=0) for q in refused]
    print("| k | plain recourse that survives | robust, refit | cost | robust, certified | cost |")
    print("|---|---|---|---|---|---|")
    for k in (1, 2, 5, 10):
        kept = [model.worst_scores(r.x, k, exhaustive=0)[0]["refit"] >= 0 for r in plain]
        robust = [model.recourse(q, k=k, exhaustive=0) for q in refused]
        good = [r.scores["refit"] >= 0 for r in robust]
        ratio = np.median([r.cost / p.cost for r, p in zip(robust, plain, strict=True)])
        row = f"| {k} | {sum(kept)} of {len(kept)} | {sum(good)} of {len(good)} | {ratio:.2f} × |"
        try:
            sure = [model.recourse(q, k=k, method="certified", exhaustive=0) for q in refused[:20]]
            ratio = np.median([r.cost / p.cost for r, p in zip(sure, plain[:20], strict=True)])
            row += f" {sum(r.found for r in sure)} of {len(sure)} | {ratio:.2f} × |"
        except ValueError as err:
            row += f" none ({str(err).split(',')[0]}) | |"
        print(row, flush=True)

    print("\nworst single deletion of one recourse, over all records:")
    q = plain[0].x
    start = time.perf_counter()
    model.influences(q)
    first = time.perf_counter() - start
    start = time.perf_counter()
    exact = min(float(np.append(q, 1) @ np.append(*model.without([i]))) for i in range(len(train)))
    refit = time.perf_counter() - start
    start = time.perf_counter()
    own = []
    for i in range(50):
        keep = np.delete(np.arange(len(train)), i)
        fit = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(train[keep], y_train[keep])
        own.append(float(q @ fit.coef_[0] + fit.intercept_[0]))
    sklearn = (time.perf_counter() - start) / 50 * len(train)
    print(f"first order {first * 1e3:.2f} ms; refits {refit * 1e3:.0f} ms; scikit-learn's refits about {sklearn:.1f} s")
    print(f"score {float(model.decision_function(q)):.4f}, worst {exact:.4f}")


if __name__ == "__main__":
    main()
