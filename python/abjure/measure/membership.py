"""Membership inference from a model's outputs alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, NonFiniteError, ShapeError
from ._arrays import Ints, class_labels

__all__ = ["SVC_FEATURES", "entropy_mia", "modified_entropy", "svc_mia"]

#: What :func:`svc_mia` can read off a prediction.
SVC_FEATURES = ("correctness", "confidence", "entropy", "modified_entropy", "probabilities")


def entropy_mia(retain: Any, test: Any, forget: Any) -> float:
    """Share of the forget samples that an entropy attack takes for training data.

    A logistic regression with balanced classes learns, from the entropy of the model's prediction, to tell retained
    training samples (1) from test samples (0), and is then asked about the forget samples. The goal of unlearning is
    the value of a model that never saw them, not 0.

    Args:
        retain: class probabilities of training samples that are kept, ``(n, classes)``, rows summing to 1; any float.
        test: the same for samples never trained on, of the same classes as ``retain``.
        forget: the same for the samples to be forgotten.

    Returns:
        A share in [0, 1].

    Raises:
        ShapeError: not two-dimensional, no rows, or different numbers of classes.
        NonFiniteError: NaN or infinity.
        ArgumentError: rows that are not probabilities.

    Source: the evaluation of Selective Synaptic Dampening, arXiv 2308.07707. Needs scikit-learn.
    """
    groups = [_probabilities(x, name) for x, name in ((retain, "retain"), (test, "test"), (forget, "forget"))]
    classes = {g.shape[1] for g in groups}
    if len(classes) > 1:
        found = ", ".join(str(g.shape[1]) for g in groups)
        raise ShapeError(f"retain, test, forget: expected one number of classes, got {found}")
    from sklearn.linear_model import LogisticRegression

    seen, unseen, asked = (_entropy(g)[:, None] for g in groups)
    member = np.repeat([1, 0], [len(seen), len(unseen)])
    attack = LogisticRegression(class_weight="balanced").fit(np.concatenate([seen, unseen]), member)
    return float(attack.predict(asked).mean())


def _probabilities(x: Any, name: str) -> npt.NDArray[np.float64]:
    """``x`` as f64 rows of probabilities; float torch tensors that require grad or hold bf16 included."""
    if hasattr(x, "detach"):
        x = x.detach().double().cpu().numpy()
    rows = np.asarray(x, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ShapeError(f"{name}: expected probabilities of shape (n, classes), got {rows.shape}")
    if not np.isfinite(rows).all():
        raise NonFiniteError(f"{name}: expected finite probabilities, got NaN or infinity")
    # 2e-2 lets bf16 rows pass: each entry is rounded by up to 2**-9 of itself.
    if (rows < 0).any() or (abs(rows.sum(axis=1) - 1) > 2e-2).any():
        raise ArgumentError(f"{name}: expected rows of probabilities that sum to 1, got other values (logits?)")
    return rows


def _entropy(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Entropy of each row in nats, with 0 log 0 = 0."""
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    entropy: npt.NDArray[np.float64] = -(p * logs).sum(axis=1)
    return entropy


def modified_entropy(p: Any, labels: Any, *, preset: Literal["svc_mia_repo"] | None = None) -> npt.NDArray[np.float64]:
    """Modified prediction entropy of each row: ``-(1 - p_y) ln p_y - sum over i != y of p_i ln(1 - p_i)``.

    0 for a certain right prediction, large for a certain wrong one; the plain entropy is 0 for both. Logarithms are
    floored at ``ln 1e-30``.

    Args:
        p: class probabilities ``(n, classes)``, rows summing to 1; any float.
        labels: true classes ``(n,)``, integers in [0, classes).
        preset: ``"svc_mia_repo"`` for numbers comparable with the widely copied code, which is wrong twice: it takes
            ``ln p`` for ``ln(1 - p)``, and in every row gives the form of the true class to all classes in ``labels``.

    Returns:
        ``(n,)`` f64, nats.

    Raises:
        ShapeError, DTypeError, NonFiniteError, ArgumentError: rows that are not probabilities, labels out of range.

    Source: Song and Mittal, arXiv 2003.10595, equation 8.
    """
    rows = _probabilities(p, "p")
    y = class_labels(labels, "labels", len(rows), rows.shape[1])
    return _modified_entropy(rows, y, preset)


def _modified_entropy(p: npt.NDArray[np.float64], y: Ints, preset: str | None) -> npt.NDArray[np.float64]:
    logs = np.log(np.maximum(p, 1e-30))
    if preset is None:
        told = np.arange(p.shape[1]) == y[:, None]
        floor = np.log(1e-30)
        reverse = np.log1p(-p, out=np.full_like(p, floor), where=p < 1)
        terms = np.where(told, (1 - p) * logs, p * np.maximum(reverse, floor))
    elif preset == "svc_mia_repo":
        terms = np.where(np.isin(np.arange(p.shape[1]), y), 1 - p, p) * logs
    else:
        raise ArgumentError(f"preset: expected None or 'svc_mia_repo', got {preset!r}")
    # + 0.0: a sum of negative zeros is no entropy of -0.
    found: npt.NDArray[np.float64] = -terms.sum(axis=1) + 0.0
    return found


def svc_mia(
    retain: tuple[Any, Any],
    test: tuple[Any, Any],
    forget: tuple[Any, Any],
    *,
    features: Sequence[str] = SVC_FEATURES,
    preset: Literal["svc_mia_repo"] | None = None,
    limit: int | None = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Share of the forget samples that a support-vector attack takes for training data, one feature at a time.

    An RBF machine (C = 3, gamma = 1 / number of features) learns from one feature of the prediction to tell retained
    training samples from test samples, with balanced classes. The goal of unlearning is the retrained model's value,
    not 0. The published "efficacy" is 1 less the share.

    Args:
        retain: class probabilities ``(n, classes)`` of training samples that are kept, and their labels ``(n,)``.
        test: the same for samples never trained on.
        forget: the same for the samples to be forgotten.
        features: of :data:`SVC_FEATURES`.
        preset: ``"svc_mia_repo"``: the published code's modified entropy (see :func:`modified_entropy`) and its classes
            without balance.
        limit: rows of ``retain`` and of ``test`` to learn from, drawn at random where there are more; the machine takes
            quadratic time. None for all.
        seed: of the draw.

    Returns:
        Shares in [0, 1] by feature.

    Raises:
        ShapeError, DTypeError, NonFiniteError, ArgumentError: rows that are not probabilities, labels out of range,
            different numbers of classes, an unknown feature.

    Source: the evaluation of arXiv 2304.04934 (``SVC_MIA``), features after arXiv 2003.10595. Needs scikit-learn.
    """
    unknown = [f for f in features if f not in SVC_FEATURES]
    if unknown or not len(features):
        raise ArgumentError(f"features: expected some of {', '.join(SVC_FEATURES)}, got {unknown or 'none'}")
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit: expected None or 1 or more, got {limit}")
    groups = []
    for given, name in ((retain, "retain"), (test, "test"), (forget, "forget")):
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise ArgumentError(f"{name}: expected a pair of probabilities and labels, got {type(given).__name__}")
        rows = _probabilities(given[0], name)
        groups.append((rows, class_labels(given[1], f"{name} labels", len(rows), rows.shape[1])))
    if len({p.shape[1] for p, _ in groups}) > 1:
        found = ", ".join(str(p.shape[1]) for p, _ in groups)
        raise ShapeError(f"retain, test, forget: expected one number of classes, got {found}")
    from sklearn.svm import SVC

    draw = np.random.default_rng(seed)
    learn = []
    for p, y in groups[:2]:
        rows_of = np.sort(draw.permutation(len(p))[:limit])
        learn.append((p[rows_of], y[rows_of]))
    member = np.repeat([1, 0], [len(p) for p, _ in learn])
    shares = {}
    for feature in features:
        seen, unseen, asked = (_feature(feature, p, y, preset) for p, y in (*learn, groups[2]))
        machine = SVC(C=3, gamma="auto", kernel="rbf", class_weight=None if preset else "balanced")
        machine.fit(np.concatenate([seen, unseen]), member)
        shares[feature] = float(machine.predict(asked).mean())
    return shares


def _feature(name: str, p: npt.NDArray[np.float64], y: Ints, preset: str | None) -> npt.NDArray[np.float64]:
    column: Any
    if name == "probabilities":
        return p
    if name == "correctness":
        column = p.argmax(axis=1) == y
    elif name == "confidence":
        column = p[np.arange(len(y)), y]
    elif name == "entropy":
        column = _entropy(p)
    else:
        column = _modified_entropy(p, y, preset)
    return np.asarray(column, dtype=np.float64)[:, None]
