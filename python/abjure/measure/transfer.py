"""What a model's features still tell, read by their nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, DegenerateError, ShapeError
from ._arrays import Floats, Ints, class_labels, matrix

__all__ = ["Transfer", "knn_transfer"]

#: Bytes of distances held at a time.
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Transfer:
    """Accuracy of a nearest-neighbour classifier, in all and per class."""

    k: int
    metric: str
    #: Predicted class of each query.
    predictions: Ints
    labels: Ints

    @property
    def n(self) -> int:
        """Number of queries."""
        return len(self.labels)

    @property
    def correct(self) -> int:
        """Number of queries whose class was found."""
        return int((self.predictions == self.labels).sum())

    @property
    def accuracy(self) -> float:
        """Share of queries whose class was found."""
        return self.correct / self.n

    def __float__(self) -> float:
        return self.accuracy

    @property
    def per_class(self) -> dict[int, float]:
        """Accuracy on the queries of each class."""
        hit = self.predictions == self.labels
        return {int(c): float(hit[self.labels == c].mean()) for c in np.unique(self.labels)}


def knn_transfer(
    bank: Any,
    bank_labels: Any,
    queries: Any = None,
    query_labels: Any = None,
    *,
    k: int = 5,
    metric: Literal["cosine", "euclidean"] = "cosine",
) -> Transfer:
    """Accuracy of k nearest neighbours in a model's features: how much they still separate the classes.

    Accuracy of the head can be destroyed without touching what the features know; compare with the features of a
    retrained model. A tied vote goes to the tied class whose neighbour is nearest, a tied distance to the lower index.

    Args:
        bank: features ``(n, d)`` of labelled examples; any float, further axes are flattened.
        bank_labels: their classes ``(n,)``, integers of 0 or more.
        queries: features ``(m, d)`` to classify. By default the bank itself, each row without itself (by its index,
            so that a duplicate of it still counts).
        query_labels: their classes ``(m,)``.
        k: neighbours that vote; odd, so that two classes cannot tie.
        metric: ``"cosine"`` similarity or ``"euclidean"`` distance.

    Returns:
        Accuracy, predictions and accuracy per class.

    Raises:
        ShapeError: arrays that do not fit, or none; fewer than k rows in the bank (k + 1 without queries).
        ArgumentError: k even or below 1, an unknown metric, ``queries`` without ``query_labels`` or the reverse.
        NonFiniteError: NaN or infinity.
        DegenerateError: a row of zeros, which has no cosine.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1 or k % 2 == 0:
        raise ArgumentError(f"k: expected an odd number of 1 or more, got {k!r}")
    if metric not in ("cosine", "euclidean"):
        raise ArgumentError(f"metric: expected 'cosine' or 'euclidean', got {metric!r}")
    if (queries is None) != (query_labels is None):
        raise ArgumentError("queries, query_labels: expected both or neither")
    rows = matrix(bank, "bank")
    classes = class_labels(bank_labels, "bank_labels", len(rows))
    alone = queries is None
    asked = rows if alone else matrix(queries, "queries")
    truth = classes if alone else class_labels(query_labels, "query_labels", len(asked))
    if asked.shape[1] != rows.shape[1]:
        raise ShapeError(f"queries: expected {rows.shape[1]} features as the bank has, got {asked.shape[1]}")
    if len(rows) - alone < k:
        raise ShapeError(f"bank: expected {k + alone} rows or more for k = {k}, got {len(rows)}")
    if metric == "cosine":
        rows, asked = _unit(rows, "bank"), _unit(asked, "queries")
        squares = np.zeros(len(rows))
    else:
        # Shifted together: the expanded square of a distance cancels badly far from the origin.
        centre = rows.mean(axis=0)
        rows, asked = rows - centre, asked - centre
        squares = np.einsum("ij,ij->i", rows, rows) / 2
    names, codes = np.unique(classes, return_inverse=True)
    step = max(1, _BLOCK_BYTES // (8 * len(rows)))
    found = np.empty(len(asked), dtype=np.int64)
    for start in range(0, len(asked), step):
        block = slice(start, start + step)
        distance: Floats = squares - asked[block] @ rows.T
        if alone:
            i = np.arange(len(distance))
            distance[i, start + i] = np.inf
        found[block] = names[_vote(codes[_nearest(distance, int(k))], len(names))]
    return Transfer(int(k), metric, found, truth)


def _unit(rows: Floats, name: str) -> Floats:
    # Scaled first, so that the squares of tiny or huge features stay finite.
    largest = abs(rows).max(axis=1, keepdims=True)
    if (largest == 0).any():
        raise DegenerateError(f"{name}: expected rows with a direction, got {int((largest == 0).sum())} rows of zeros")
    rows = rows / largest
    found: Floats = rows / np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return found


def _nearest(distance: Floats, k: int) -> npt.NDArray[np.intp]:
    """Indices of the k smallest of each row, nearest first, the lower index first where they tie."""
    limit = np.partition(distance, k - 1, axis=1)[:, k - 1 : k]
    found = np.empty((len(distance), k), dtype=np.intp)
    inside = distance <= limit
    clear = inside.sum(axis=1) == k
    if clear.any():
        some = np.nonzero(inside[clear])[1].reshape(-1, k)
        order = np.argsort(np.take_along_axis(distance[clear], some, axis=1), axis=1, kind="stable")
        found[clear] = np.take_along_axis(some, order, axis=1)
    for i in np.flatnonzero(~clear):
        found[i] = np.argsort(distance[i], kind="stable")[:k]
    return found


def _vote(neighbours: npt.NDArray[np.intp], classes: int) -> npt.NDArray[np.intp]:
    """The class with most votes; of tied ones, that of the nearest neighbour."""
    n, k = neighbours.shape
    counts = np.zeros((n, classes), dtype=np.int64)
    np.add.at(counts, (np.repeat(np.arange(n), k), neighbours.ravel()), 1)
    votes = np.take_along_axis(counts, neighbours, axis=1)
    return np.take_along_axis(neighbours, votes.argmax(axis=1)[:, None], axis=1)[:, 0]
