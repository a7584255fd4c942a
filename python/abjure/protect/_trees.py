"""Decision trees on codes: the privacy-aware tree, and models of users and adversaries. The kernel counts in Rust."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _native

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tree:
    """Splits (codes of ``feature`` up to ``code`` go left) and leaves (feature -1) with their class shares."""

    feature: Array
    code: Array
    left: Array
    right: Array
    #: ``(nodes, classes)``
    shares: Array

    def cuts(self, feature: int) -> list[int]:
        """Codes after which the feature is split anywhere."""
        return sorted({int(c) for c in self.code[self.feature == feature]})

    def predict_proba(self, codes: Array) -> Array:
        """``(rows, classes)`` shares of the leaf of each row."""
        at = np.zeros(len(codes), dtype=np.int64)
        rows = np.arange(len(codes))
        while True:
            feature = self.feature[at]
            inside = feature >= 0
            if not inside.any():
                return np.asarray(self.shares[at])
            goes_left = codes[rows, np.maximum(feature, 0)] <= self.code[at]
            at = np.where(inside, np.where(goes_left, self.left[at], self.right[at]), at)


def _narrow(codes: Array) -> Array:
    return np.ascontiguousarray(codes, dtype=np.uint16)


def grow(
    codes: Array,
    targets: Sequence[Array],
    classes: Sequence[int],
    *,
    alpha: float = 0.0,
    max_leaf_nodes: int = 20,
    min_samples_leaf: int = 1,
    max_depth: int | None = None,
    rows: Array | None = None,
) -> Tree:
    """A tree grown best first: the split of the largest gain, weighted by its share of the rows, comes next.

    The impurity is ``(1 - α) Gini(y) + α (½ - mean Gini(s))``, ``y`` the first target. Ties go to the lowest feature,
    then the lowest code. A split without a gain is not made: it would tell something and help nobody.
    """
    feature, code, left, right, shares = _native.grow_tree(
        _narrow(codes),
        [np.ascontiguousarray(t, dtype=np.int64) for t in targets],
        list(classes),
        alpha,
        max_leaf_nodes,
        min_samples_leaf,
        max_depth,
        None if rows is None else np.ascontiguousarray(rows, dtype=np.int64),
    )
    return Tree(feature, code, left, right, shares.reshape(len(feature), classes[0]))


def forest(codes: Array, y: Array, classes: int, queries: Array, seed: int) -> Array:
    """``(queries, classes)`` of 30 trees of at most 64 leaves of 3 rows (Breiman 2001)."""
    features = max(1, math.ceil(math.sqrt(codes.shape[1])))
    y = np.ascontiguousarray(y, dtype=np.int64)
    found = _native.forest_probabilities(_narrow(codes), y, classes, _narrow(queries), 30, 64, 3, features, seed)
    return found.reshape(len(queries), classes)


def naive_bayes(codes: Array, y: Array, classes: int, queries: Array, seed: int) -> Array:
    """``(queries, classes)`` of independent codes given the class, every count one more than seen (Laplace)."""
    width = int(max(codes.max(), queries.max())) + 1
    d = codes.shape[1]
    flat = (codes + np.arange(d) * width) * classes + y[:, None]
    counts = np.bincount(flat.reshape(-1), minlength=d * width * classes).reshape(d, width, classes) + 1.0
    log = np.log(counts / counts.sum(axis=1, keepdims=True))
    scores = np.log((np.bincount(y, minlength=classes) + 1) / (len(y) + classes)) + log[np.arange(d), queries].sum(
        axis=1
    )
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(scores / scores.sum(axis=1, keepdims=True))
