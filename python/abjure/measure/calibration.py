"""Do probabilities mean what they say? Expected calibration error by a named definition, Brier score, reliability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, ShapeError
from ._arrays import Floats, Ints, binary, class_labels, matrix, vector
from .rates import Rate

__all__ = ["Calibration", "calibration"]

Confidence = Literal["max", "positive"]
Binning = Literal["width", "mass"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Confidence against accuracy, bin by bin.

    Attributes:
        ece: expected calibration error, ``Σ n_b / n |acc_b − conf_b|``.
        mce: the largest of these differences.
        brier: mean squared error of the probabilities (two classes: of the positive one; more: summed over classes).
        definition: what ``ece`` is, e.g. ``"ece_max_right10"``: confidence, the closed side of bins of equal width (or
            ``mass``), number of bins. Figures of different definitions cannot be compared.
        edges: ``(bins + 1,)`` of equal-width bins; the least and largest confidence of ``mass`` bins are in ``low``,
            ``high``.
        low, high: ``(bins,)`` range of each bin.
        count: ``(bins,)`` rows.
        confidence, accuracy: ``(bins,)`` means; NaN in empty bins.
    """

    ece: float
    mce: float
    brier: float
    definition: str
    low: Floats
    high: Floats
    count: Ints
    confidence: Floats
    accuracy: Floats

    def __repr__(self) -> str:
        return f"Calibration({self.definition}={self.ece:.4f}, mce={self.mce:.4f}, brier={self.brier:.4f})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{a:.3f} to {b:.3f}</td><td>{n}</td><td>{c:.3f}</td><td>{r:.3f}</td></tr>"
            for a, b, n, c, r in zip(self.low, self.high, self.count, self.confidence, self.accuracy, strict=True)
            if n
        )
        head = "<th>bin</th><th>n</th><th>confidence</th><th>accuracy</th>"
        note = f"<p>{self.definition} {self.ece:.4f}, Brier {self.brier:.4f}</p>"
        return f"<table><tr>{head}</tr>{rows}</table>{note}"

    def plot(self, ax: Any = None, level: float = 0.95) -> Any:
        """Reliability diagram with Wilson intervals of the accuracy, on matplotlib axes (made if None)."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(4, 4), layout="constrained").subplots()
        used = self.count > 0
        hits = np.round(self.accuracy[used] * self.count[used]).astype(int)
        bounds = [Rate(int(k), int(n)).ci(level=level) for k, n in zip(hits, self.count[used], strict=True)]
        low, high = np.array([b for b in bounds if b is not None]).T
        y = self.accuracy[used]
        ax.plot([0, 1], [0, 1], color="grey", ls=":")
        ax.errorbar(self.confidence[used], y, [np.maximum(y - low, 0), np.maximum(high - y, 0)], fmt="o", capsize=3)
        ax.set(xlabel="confidence", ylabel="accuracy", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        ax.set_title(f"{self.definition} = {self.ece:.3f}", fontsize="medium")
        return ax


def calibration(
    labels: Any,
    probabilities: Any,
    *,
    bins: int = 10,
    confidence: Confidence = "max",
    binning: Binning = "width",
) -> Calibration:
    """Expected calibration error, Brier score and what a reliability diagram shows.

    Args:
        labels: ``(n,)`` true classes: 0 or 1, or integers below the number of classes.
        probabilities: ``(n,)`` of class 1, or ``(n, classes)`` with rows that sum to 1.
        bins: number of bins.
        confidence: ``"max"``: of the predicted class, against whether it is right (class 1 is predicted from 1/2 on);
            ``"positive"``: of class 1, against the label; for two classes.
        binning: ``"width"``: ``(i/bins, (i+1)/bins]``, closed on the right as published, 0 in the first; the edges are
            correctly rounded, so a probability written as an edge falls into the bin below it. ``"mass"``: bins of
            equal numbers of rows in order of confidence (sizes differ by at most 1; equal confidences may be parted).

    Raises:
        ShapeError: columns that do not fit, or none. NonFiniteError: NaN or infinity.
        ArgumentError: values outside [0, 1], rows that do not sum to 1, labels out of range, unknown options.

    Source: Naeini, Cooper, Hauskrecht, 2015; Guo and others, arXiv 1706.04599; Brier, 1950.
    """
    if bins < 1:
        raise ArgumentError(f"bins: expected 1 or more, got {bins}")
    if confidence not in ("max", "positive"):
        raise ArgumentError(f"confidence: expected 'max' or 'positive', got {confidence!r}")
    if binning not in ("width", "mass"):
        raise ArgumentError(f"binning: expected 'width' or 'mass', got {binning!r}")
    if np.ndim(probabilities) == 2:
        p = matrix(probabilities, "probabilities")
        y = class_labels(labels, "labels", len(p), p.shape[1])
        if p.min() < 0 or (abs(p.sum(axis=1) - 1) > 1e-3).any():
            raise ArgumentError("probabilities: expected rows of probabilities that sum to 1 (logits?)")
        brier = float(((p - np.eye(p.shape[1])[y]) ** 2).sum(axis=1).mean())
        if confidence == "positive":
            if p.shape[1] != 2:
                raise ArgumentError(f"confidence: 'positive' is for two classes, got {p.shape[1]}")
            conf, hit = p[:, 1], y == 1
        else:
            conf, hit = p.max(axis=1), p.argmax(axis=1) == y
    else:
        one = vector(probabilities, "probabilities")
        y = binary(labels, "labels", len(one))
        if one.min() < 0 or one.max() > 1:
            raise ArgumentError(f"probabilities: expected values in [0, 1], got {one.min()} to {one.max()}")
        brier = float(((one - y) ** 2).mean())
        conf, hit = (one, y == 1) if confidence == "positive" else (np.maximum(one, 1 - one), (one >= 0.5) == (y == 1))
    if binning == "width":
        edges = np.arange(bins + 1) / bins
        place = np.maximum(np.searchsorted(edges, np.minimum(conf, 1.0), side="left") - 1, 0)
        low, high = edges[:-1], edges[1:]
    else:
        if bins > len(conf):
            raise ShapeError(f"bins: expected at most one per row, {len(conf)}, got {bins}")
        order = np.argsort(conf, kind="stable")
        place = np.empty(len(conf), dtype=np.int64)
        parts = np.array_split(order, bins)
        for i, part in enumerate(parts):
            place[part] = i
        low, high = (np.array([f(conf[part]) for part in parts]) for f in (np.min, np.max))
    count = np.bincount(place, minlength=bins)
    sums = np.bincount(place, weights=conf, minlength=bins)
    hits = np.bincount(place, weights=hit.astype(np.float64), minlength=bins)
    with np.errstate(invalid="ignore"):
        mean, accuracy = sums / count, hits / count
    gaps = abs(hits - sums) / len(conf)
    rule = f"right{bins}" if binning == "width" else f"mass{bins}"
    mce = float(np.nanmax(abs(accuracy - mean)))
    name = f"ece_{confidence}_{rule}"
    return Calibration(float(gaps.sum()), mce, brier, name, low, high, count, mean, accuracy)
