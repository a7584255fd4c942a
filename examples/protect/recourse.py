"""Recourse under deletion on the breast cancer data of scikit-learn: what it costs, and whether it holds.

    python examples/protect/recourse.py            # about two minutes on two cores

A model is fitted to the training half; every patient of the test half whom it calls malignant is given the cheapest
change (L1 in standard deviations) that makes it say benign: first without regard to deletions, then so that any k
records may be deleted, by first-order influence or by fitting again. All are judged by fitting again without k records:
random (20 times), and the worst found by the slow search.
"""

from __future__ import annotations

import time

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from abjure.protect import DeletionModel, Recourse

DRAWS = 20


def survives(model: DeletionModel, found: list[Recourse], k: int) -> int:
    """How many stay on their side after the worst deletion found."""
    return sum((model.worst_scores(r.x, k, exhaustive=0)[0]["refit"] or 0.0) >= -1e-9 for r in found)


def survives_chance(model: DeletionModel, found: list[Recourse], k: int) -> float:
    """Share of recourses and random deletions that stay."""
    rng = np.random.default_rng(k)
    x = np.array([r.x for r in found])
    shares = []
    for _ in range(DRAWS):
        coef, intercept = model.without(rng.choice(len(model.leverages), k, replace=False))
        shares.append(float((x @ coef + intercept >= -1e-9).mean()))
    return float(np.mean(shares))


def cost(found: list[Recourse], plain: list[Recourse]) -> float:
    return float(np.median([r.cost / p.cost for r, p in zip(found, plain, strict=True)]))


def main() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    train, test, y_train, _ = train_test_split(x, y, test_size=0.5, random_state=0, stratify=y)
    mean, spread = train.mean(axis=0), train.std(axis=0)
    train, test = (train - mean) / spread, (test - mean) / spread
    for kind, target in (("logistic", y_train), ("ridge", 2.0 * y_train - 1)):
        model = DeletionModel(train, target, kind=kind, penalty=1.0)
        refused = test[model.decision_function(test) < 0]
        print(f"\n{kind}: {len(train)} records, {train.shape[1]} features, {len(refused)} patients called malignant\n")
        print("| k | plain, chance | plain, worst | influence, worst | cost | refit, worst | cost | certified | cost |")
        print("|---|---|---|---|---|---|---|---|---|")
        plain = [model.recourse(q, k=0, weights=None, exhaustive=0) for q in refused]
        for k in (1, 2, 5, 10):
            first = [model.recourse(q, k=k, weights=None, method="influence", exhaustive=0) for q in refused]
            refit = [model.recourse(q, k=k, weights=None, exhaustive=0) for q in refused]
            row = (
                f"| {k} | {survives_chance(model, plain, k):.2f} | {survives(model, plain, k)} | "
                f"{survives(model, first, k)} | {cost(first, plain):.2f} | {survives(model, refit, k)} | "
                f"{cost(refit, plain):.2f} |"
            )
            try:
                some = refused[:20]
                sure = [model.recourse(q, k=k, weights=None, method="certified", exhaustive=0) for q in some]
                row += f" {sum(r.found for r in sure)} of 20 | {cost(sure, plain[:20]):.2f} |"
            except ValueError:
                row += " none | |"
            print(row, flush=True)
        if kind == "logistic":
            speed(model, train, y_train, plain[0].x)


def speed(model: DeletionModel, train: np.ndarray, y: np.ndarray, q: np.ndarray) -> None:
    """The score of one recourse after every single deletion, three ways."""
    start = time.perf_counter()
    model.influences(q)
    first = time.perf_counter() - start
    start = time.perf_counter()
    ours = [model.without([i]) for i in range(len(train))]
    refit = time.perf_counter() - start
    start = time.perf_counter()
    for i in range(len(train)):
        keep = np.delete(np.arange(len(train)), i)
        theirs = LogisticRegression(C=1.0, tol=1e-8, solver="newton-cholesky").fit(train[keep], y[keep])
    sklearn = time.perf_counter() - start
    error = np.abs(ours[-1][0] - theirs.coef_[0]).max()
    print(
        f"\nscore after every single deletion: first order {first * 1e3:.2f} ms, refits {refit * 1e3:.0f} ms, "
        f"scikit-learn's {sklearn * 1e3:.0f} ms ({sklearn / refit:.0f} times), coefficients equal to {error:.0e}"
    )


if __name__ == "__main__":
    main()
