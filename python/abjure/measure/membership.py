"""Membership inference from a model's outputs alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ._arrays import Floats, Ints, class_labels, host, matrix, vector
from .ranking import Auroc, auroc
from .rates import Rate

__all__ = [
    "SVC_FEATURES",
    "MembershipTest",
    "entropy_mia",
    "lira_scores",
    "logistic_mia",
    "logit_confidence",
    "modified_entropy",
    "svc_mia",
    "threshold_mia",
]

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


@dataclass(frozen=True, eq=False)
class MembershipTest:
    """How well a score tells members from others, and a threshold found on one half and tried on the other.

    Attributes:
        auroc: area under the curve, with intervals; 0.5 says that the score knows nothing.
        tpr: true-positive rate at the false-positive rate ``fpr``, with its counts.
        fpr: that rate.
        threshold: from which score on a sample is taken for a member.
        accuracy: balanced accuracy of this threshold on the rows that did not choose it.
        advantage: ``2 accuracy − 1``, true- less false-positive rate (Yeom and others, arXiv 1709.01604).
    """

    auroc: Auroc
    tpr: Rate
    fpr: float
    threshold: float
    accuracy: float

    @property
    def advantage(self) -> float:
        """True- less false-positive rate of the threshold."""
        return 2 * self.accuracy - 1

    def __repr__(self) -> str:
        return f"MembershipTest({self.auroc!r}, tpr at {self.fpr:g} = {self.tpr!r}, advantage={self.advantage:.4f})"


def threshold_mia(members: Any, others: Any, *, fpr: float = 0.01, seed: int = 0) -> MembershipTest:
    """Tests a membership score: higher means more like training data (confidence, minus the loss, :func:`lira_scores`).

    The threshold with the best balanced accuracy is chosen on a random half of each set and tried on the other half;
    one chosen and tried on the same rows would find members in noise.

    Args:
        members: ``(n,)`` scores of training data. others: ``(m,)`` scores of data never trained on.
        fpr: false-positive rate at which the true-positive rate is read: the share of members above all but
            ``floor(fpr m)`` of the others.
        seed: of the halves.

    Raises:
        ShapeError: not vectors of 2 or more. NonFiniteError: NaN or infinity. ArgumentError: ``fpr`` outside [0, 1).

    Source: Yeom and others, arXiv 1709.01604; rates at low false-positive rates after Carlini and others, arXiv
        2112.03570.
    """
    inside, outside = vector(members, "members", 2), vector(others, "others", 2)
    if not 0 <= fpr < 1:
        raise ArgumentError(f"fpr: expected a rate in [0, 1), got {fpr}")
    area = auroc(np.repeat([1, 0], [len(inside), len(outside)]), np.concatenate([inside, outside]))
    limit = np.sort(outside)[::-1][int(np.floor(fpr * len(outside) + 1e-9))]
    rng = np.random.default_rng(seed)
    halves = [np.array_split(x[rng.permutation(len(x))], 2) for x in (inside, outside)]
    (a, a_test), (b, b_test) = halves
    cuts = np.unique(np.concatenate([a, b]))
    gain = _at_least(a, cuts) - _at_least(b, cuts)
    threshold = float(cuts[int(gain.argmax())])
    accuracy = float((1 + (a_test >= threshold).mean() - (b_test >= threshold).mean()) / 2)
    return MembershipTest(area, Rate(int((inside > limit).sum()), len(inside)), fpr, threshold, accuracy)


def _at_least(sample: Floats, cuts: Floats) -> Floats:
    found: Floats = 1 - np.searchsorted(np.sort(sample), cuts, side="left") / len(sample)
    return found


def logistic_mia(members: Any, others: Any, asked: Any) -> Floats:
    """Probability that samples are members, by a logistic regression on features of the model's outputs.

    Args:
        members: features ``(n, d)`` of known training data. others: ``(m, d)`` of data never trained on.
        asked: ``(k, d)`` of the samples in question, which must be in neither.

    Returns:
        ``(k,)`` probabilities, with both classes weighted alike; a score for :func:`threshold_mia`.

    Raises:
        ShapeError, NonFiniteError, DTypeError: rows that do not fit or are not finite.

    Needs scikit-learn. Source: Shokri and others, arXiv 1610.05820, with a linear attack model.
    """
    inside, outside, rows = matrix(members, "members"), matrix(others, "others"), matrix(asked, "asked")
    for given, name in ((outside, "others"), (rows, "asked")):
        if given.shape[1] != inside.shape[1]:
            raise ShapeError(f"{name}: expected {inside.shape[1]} features as members have, got {given.shape[1]}")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    attack = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    attack.fit(np.concatenate([inside, outside]), np.repeat([1, 0], [len(inside), len(outside)]))
    found: Floats = attack.predict_proba(rows)[:, 1]
    return found


def logit_confidence(p: Any, labels: Any) -> Floats:
    """``ln(p_y / (1 − p_y))`` of the true class, the statistic of LiRA: near normal over models.

    Computed as ``ln p_y − ln Σ_{i≠y} p_i``, which keeps its digits at high confidence; both are floored at 1e-30.

    Args:
        p: class probabilities ``(n, classes)``. labels: true classes ``(n,)``.

    Raises:
        ShapeError, DTypeError, NonFiniteError, ArgumentError: as :func:`modified_entropy`.
    """
    rows = _probabilities(p, "p")
    y = class_labels(labels, "labels", len(rows), rows.shape[1])
    at = np.arange(len(y))
    own = rows[at, y]
    rest = rows.copy()
    rest[at, y] = 0
    found: Floats = np.log(np.maximum(own, 1e-30)) - np.log(np.maximum(rest.sum(axis=1), 1e-30))
    return found


def lira_scores(target: Any, reference: Any, member: Any = None, *, shared_variance: bool = True) -> Floats:
    """Likelihood-ratio scores of membership from a few reference models (LiRA, the light form).

    Of each sample's statistic under models that were, and were not, trained on it two normal distributions are fitted;
    the score is the log-likelihood ratio of what the target model says. Without ``member`` all references are models
    that never saw the samples, and the score is the log-odds of a standard normal, ``−ln P(Z > z)`` (offline form).

    Args:
        target: ``(n,)`` statistic under the model in question, see :func:`logit_confidence`.
        reference: ``(models, n)`` the same under reference models.
        member: ``(models, n)`` of true or false: which samples each reference was trained on.
        shared_variance: one variance for all samples (recommended below about 64 models), else each its own.

    Returns:
        ``(n,)`` scores, higher for members; for :func:`threshold_mia`.

    Raises:
        ShapeError: shapes that do not fit, fewer than 2 references. NonFiniteError: NaN or infinity.
        DegenerateError: a sample that no, or with its own variance fewer than 2, references were (not) trained on; no
            variance at all.

    Source: Carlini and others, arXiv 2112.03570, algorithm 1 and section 4; the light form uses few models.
    """
    t, r = vector(target, "target"), matrix(reference, "reference", 2)
    if r.shape[1] != len(t):
        raise ShapeError(f"reference: expected {len(t)} samples as in target, got {r.shape[1]}")
    if member is None:
        mean, sd = _normal(r, np.ones(r.shape, dtype=bool), shared_variance)
        return -_log_upper((t - mean) / sd)
    inside = np.asarray(host(member))
    if inside.shape != r.shape or inside.dtype.kind not in "biuf" or not np.isin(inside, (0, 1)).all():
        raise ShapeError(f"member: expected true or false of shape {r.shape}, got {inside.dtype} of {inside.shape}")
    inside = inside.astype(bool)
    (m1, s1), (m0, s0) = (_normal(r, w, shared_variance) for w in (inside, ~inside))
    found: Floats = ((t - m0) / s0) ** 2 / 2 + np.log(s0) - ((t - m1) / s1) ** 2 / 2 - np.log(s1)
    return found


def _normal(r: Floats, where: npt.NDArray[np.bool_], shared: bool) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each column over the rows in ``where``."""
    count = where.sum(axis=0)
    least = 1 if shared else 2
    if (count < least).any():
        j = int((count < least).argmax())
        raise DegenerateError(
            f"reference: expected {least} or more of each kind for every sample, got {count[j]} at {j}"
        )
    mean = np.where(where, r, 0).sum(axis=0) / count
    squares = np.where(where, (r - mean) ** 2, 0).sum(axis=0)
    if shared:
        freedom = int((count - 1).sum())
        variance = np.full(len(mean), squares.sum() / freedom if freedom else 0.0)
    else:
        variance = squares / (count - 1)
    if not (variance > 0).all():
        raise DegenerateError("reference: expected statistics that vary between models")
    return mean, np.sqrt(variance)


def _log_upper(z: Floats) -> Floats:
    """``ln P(Z > z)``; by its continued fraction far out, where the probability underflows."""
    out = np.empty(len(z))
    for i, v in enumerate(z):
        if v < 10:
            out[i] = math.log(math.erfc(v / math.sqrt(2)) / 2)
        else:
            f = v
            for k in range(20, 0, -1):
                f = v + k / f
            out[i] = -v * v / 2 - math.log(f) - 0.5 * math.log(2 * math.pi)
    return out
