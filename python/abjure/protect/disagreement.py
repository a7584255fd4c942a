"""Open-set disagreement: heads that agree on the classes they know and are driven apart elsewhere (DAC)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _interop
from ..errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError

Array = np.ndarray[Any, Any]


def disagreement_heads(width: int, classes: int, *, heads: int = 10, hidden: int = 128, seed: int = 0) -> Any:
    """A torch module of ``heads`` classifiers on a shared projection: features ``(B, width)`` to logits ``(B, H, C)``.

    Args:
        width: number of features.
        classes: number of known classes.
        heads: number of heads, at least 2.
        hidden: width of the projection (LayerNorm, linear, ReLU, linear).
        seed: of the weights.
    """
    for value, arg, least in ((width, "width", 1), (classes, "classes", 2), (heads, "heads", 2), (hidden, "hidden", 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"{arg}: expected a whole number of at least {least}, got {value!r}")
    from ._heads import Heads

    return Heads(width, classes, heads, hidden, seed)


def head_information(probabilities: Any) -> Any:
    """Mean mutual information of pairs of heads on a batch, in nats, differentiable: the diversity loss.

    ``J_ab = mean_b P_ba ⊗ P_bb`` and ``MI = Σ J log(J / (p_a ⊗ p_b))``, over all pairs a < b, as one matrix product of
    ``(B, H C)``. Heads that are independent over the batch give 0; heads that say the same give their entropy.

    Args:
        probabilities: torch tensor ``(B, H, C)`` of class probabilities, two heads or more.

    Returns:
        A scalar tensor in the dtype of the input, at least f32.

    Raises:
        DTypeError, ShapeError: another kind of array.
    """
    if not _interop.is_torch(probabilities) or not probabilities.is_floating_point():
        raise DTypeError(f"probabilities: expected a floating-point torch tensor, got {type(probabilities).__name__}")
    if probabilities.ndim != 3 or probabilities.shape[1] < 2 or 0 in probabilities.shape:
        raise ShapeError(f"probabilities: expected (batch, 2 or more heads, classes), got {tuple(probabilities.shape)}")
    from ._heads import pair_information

    return pair_information(probabilities)


def disagreement_loss(logits: Any, labels: Any, unlabelled: Any = None, *, weight: float = 0.1) -> Any:
    """Cross-entropy of every head on labelled data, plus the heads' mutual information on unlabelled data.

    The heads are pulled together where there are labels, and apart where there are none: on what they cannot know they
    then disagree. Kong et al. (arXiv 2505.24443); of their total this is the part that makes the heads, to which a
    consistency loss of the main classifier may be added.

    Args:
        logits: ``(B, H, C)`` of labelled data.
        labels: ``(B,)`` class numbers.
        unlabelled: ``(B', H, C)`` logits of unlabelled data, known and unknown mixed; None for the first part alone.
        weight: of the second part. The paper's 1 stands beside losses that keep the heads consistent on known classes;
            without those it tears them apart there too (docs/protect-data.md).

    Raises:
        ShapeError, DTypeError: as :func:`head_information`, or labels that do not fit.
        ArgumentError: labels outside the classes, or a negative weight.
    """
    import torch

    if not _interop.is_torch(logits) or logits.ndim != 3:
        raise ShapeError(f"logits: expected a tensor (batch, heads, classes), got {getattr(logits, 'shape', logits)!r}")
    labels = torch.as_tensor(labels, device=logits.device)
    if tuple(labels.shape) != (logits.shape[0],):
        raise ShapeError(f"labels: expected shape ({logits.shape[0]},), got {tuple(labels.shape)}")
    if labels.is_floating_point() or (
        len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[2]
    ):
        raise ArgumentError(f"labels: expected class numbers from 0 to {logits.shape[2] - 1}")
    if not (np.isfinite(weight) and weight >= 0):
        raise ArgumentError(f"weight: expected a number of 0 or more, got {weight!r}")
    heads = logits.shape[1]
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[2]), labels.long().repeat_interleave(heads)
    )
    if unlabelled is None:
        return loss
    return loss + weight * head_information(unlabelled.softmax(dim=-1))


def _probabilities(p: Any) -> Array:
    if _interop.is_torch(p):
        p = p.detach().cpu().double().numpy()
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 3 or 0 in values.shape:
        raise ShapeError(f"probabilities: expected shape (rows, heads, classes), got {values.shape}")
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"probabilities: non-finite value at flat index {int(np.flatnonzero(~np.isfinite(values))[0])}"
        )
    if values.min() < -1e-6 or np.abs(values.sum(axis=2) - 1).max() > 1e-3:
        raise ArgumentError("probabilities: expected non-negative numbers with the sum 1 over classes; apply a softmax")
    return values


def disagreement(probabilities: Any) -> Array:
    """``(rows,)`` mean of ``|P_ac - P_bc|`` over all H² pairs of heads (the diagonal counts) and all classes.

    Every class' column is sorted, ``Σ_ab |p_a - p_b| = 2 Σ_i (2i - H + 1) p_(i)``: O(H C log H), not O(H² C).

    Args:
        probabilities: ``(rows, H, C)``, array or tensor.
    """
    p = np.sort(_probabilities(probabilities), axis=1)
    h, c = p.shape[1:]
    # Rounding may leave a little below 0 where heads are equal.
    found = 2 * np.einsum("bhc,h->b", p, 2.0 * np.arange(h) - h + 1) / (h * h * c)
    return np.asarray(np.maximum(found, 0.0))


@dataclass(frozen=True)
class OpenSetScore:
    """How much each row looks like a known class: agreement times confidence, both scaled to the rows given."""

    #: ``(rows,)`` from 0 to 1; high for known classes.
    inlier: Array
    #: By Otsu's rule, of ``inlier``.
    threshold: float
    disagreement: Array
    confidence: Array

    @property
    def outlier(self) -> Array:
        """``1 - inlier``."""
        return np.asarray(1 - self.inlier)

    @property
    def is_inlier(self) -> Array:
        """Rows at or above the threshold."""
        return np.asarray(self.inlier >= self.threshold)

    def weights(self, temperature: float = 1.0) -> Array:
        """``min(1, (inlier / threshold)^temperature)``: weights for a loss on unlabelled rows."""
        if not (np.isfinite(temperature) and temperature > 0):
            raise ArgumentError(f"temperature: expected a positive number, got {temperature!r}")
        return np.asarray(np.minimum(1.0, (self.inlier / self.threshold) ** temperature))


def open_set_score(
    probabilities: Any, *, temperature: float = 1.0, previous: Any = None, momentum: float = 0.9
) -> OpenSetScore:
    """Scores rows by how much heads agree on them, and how sure they are.

    ``exp(-disagreement / temperature)`` times the largest class of the mean of the heads, each scaled to 0…1 over all
    rows; so scores are of the rows given together (a bank), not of one row by itself.

    Args:
        probabilities: ``(rows, H, C)``, two rows or more.
        temperature: of the disagreement.
        previous: ``(rows,)`` scores of an earlier pass over the same rows, averaged in with ``momentum``.
        momentum: weight of ``previous``.

    Raises:
        ShapeError, NonFiniteError, ArgumentError: malformed input.
        DegenerateError: all rows are alike.
    """
    if not (np.isfinite(temperature) and temperature > 0):
        raise ArgumentError(f"temperature: expected a positive number, got {temperature!r}")
    if not 0 <= momentum < 1:
        raise ArgumentError(f"momentum: expected a number from 0, below 1, got {momentum!r}")
    p = _probabilities(probabilities)
    apart = disagreement(p)
    confidence = p.mean(axis=1).max(axis=1)
    scores = _scaled(np.exp(-apart / temperature)) * _scaled(confidence)
    if previous is not None:
        old = np.asarray(previous, dtype=np.float64)
        if old.shape != scores.shape:
            raise ShapeError(f"previous: expected shape {scores.shape}, got {old.shape}")
        scores = momentum * old + (1 - momentum) * scores
    if scores.max() == scores.min():
        raise DegenerateError("probabilities: the heads say the same of every row")
    return OpenSetScore(scores, _otsu(scores), apart, confidence)


def _scaled(v: Array) -> Array:
    low, high = float(v.min()), float(v.max())
    return np.asarray((v - low) / (high - low)) if high > low else np.ones_like(v)


def _otsu(v: Array) -> float:
    """The division of the largest variance between its parts (Otsu 1979), over all divisions; the middle of the gap."""
    v = np.sort(v)
    n = len(v)
    k = np.arange(1, n)
    sums = np.cumsum(v)[:-1]
    low, high = sums / k, (v.sum() - sums) / (n - k)
    between = np.where(v[1:] > v[:-1], k * (n - k) * (high - low) ** 2, -1.0)
    i = int(np.argmax(between))
    return float((v[i] + v[i + 1]) / 2)
