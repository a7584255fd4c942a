"""Classical bounds of the Bayes error of labelled data, and the one that is exact for the published data smoothed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .. import _interop, _native
from ..errors import ArgumentError, DegenerateError, ShapeError
from .bayes import Array, Prepared, bayes_error, cover_hart, prepare

Covariance = Literal["shrunk", "full", "diagonal"]
METHODS = ("nearest_neighbour", "bhattacharyya", "henze_penrose")


@dataclass(frozen=True)
class Bound:
    """A lower and an upper bound of the Bayes error, and what they rest on."""

    name: str
    lower: float
    upper: float
    #: What they are computed from: an error, a coefficient, the share of edges between classes.
    statistic: float
    rows: int
    features: int
    classes: int
    #: When they are bounds.
    holds: str

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.lower:.4f} <= R* <= {self.upper:.4f}   "
            f"(n = {self.rows}, d = {self.features}, {self.classes} classes; {self.holds})"
        )


def nearest_neighbour_bound(x: Any, y: Any, *, k: int = 1) -> Bound:
    """Bounds from the leave-one-out error of the ``k`` nearest neighbours (Cover and Hart 1967; Devroye 1981).

    With ``k = 1`` the lower bound is that of :func:`cover_hart`. More neighbours are for two classes alone, where
    ``R* >= e / (1 + sqrt(1 / k))``: with more classes no such theorem holds.

    Args:
        x: ``(n, ...)``, f64, f32, f16 or bf16.
        y: ``(n,)`` integer labels.
        k: odd number of neighbours; the nearest of equal distance is that of the lower index.

    Returns:
        The bounds; ``statistic`` is the error. They are asymptotic in n.

    Raises:
        ArgumentError: an even ``k``, ``k > 1`` with more than two classes, or as many neighbours as rows.
        ShapeError, DTypeError, NonFiniteError, DegenerateError: as :func:`bayes_error`.
    """
    data = prepare(x, y)
    classes = len(data.classes)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1 or k % 2 == 0:
        raise ArgumentError(f"k: expected an odd positive number, got {k!r}")
    if k > 1 and classes > 2:
        raise ArgumentError(f"k: expected 1 for {classes} classes (more neighbours bound two classes alone), got {k}")
    return _nearest_neighbour(data, k)


def _nearest_neighbour(data: Prepared, k: int = 1) -> Bound:
    classes = len(data.classes)
    neighbours, _ = _native.nearest_neighbours(data.matrix, k)
    votes = data.codes[neighbours]
    guess = votes[:, 0] if k == 1 else (votes.sum(axis=1) > k / 2).astype(np.int64)
    error = float(np.mean(guess != data.codes))
    lower = cover_hart(error, classes)[0] if k == 1 else error / (1 + math.sqrt(1 / k))
    name = "nearest neighbour (Cover–Hart)" if k == 1 else f"{k} nearest neighbours"
    return _bound(data, name, lower, error, error, "as n grows")


def henze_penrose_bound(x: Any, y: Any) -> Bound:
    """Bounds from the share of edges of the minimum spanning tree that join two classes (Berisha et al. 2016).

    The share r estimates the Henze–Penrose (harmonic) error, and
    ``(C-1)/C · (1 - sqrt(max(0, 1 - C/(C-1) r))) <= R* <= r``: for two classes the bounds of Berisha, Wisler, Hero and
    Spanias by Friedman and Rafsky's statistic, for more those of the one global tree (Sekeh, Oselio and Hero 2020).
    Duplicates are edges of length 0.

    Args:
        x: ``(n, ...)``, f64, f32, f16 or bf16. Up to 16 384 rows the n² distances are kept (in f32 1 GiB at most).
        y: ``(n,)`` integer labels.

    Returns:
        The bounds; ``statistic`` is the share of all n rows (edges between classes / n). They are asymptotic in n.

    Raises:
        ShapeError, DTypeError, NonFiniteError, DegenerateError: as :func:`bayes_error`.
    """
    return _henze_penrose(prepare(x, y))


def _henze_penrose(data: Prepared) -> Bound:
    edges, _ = _native.spanning_tree(data.matrix)
    share = float(np.sum(data.codes[edges[:, 0]] != data.codes[edges[:, 1]])) / data.shape[0]
    lower, upper = cover_hart(share, len(data.classes))
    return _bound(data, "Henze–Penrose (spanning tree)", lower, upper, share, "as n grows")


def bhattacharyya_bound(
    x: Any,
    y: Any,
    *,
    density: Literal["gaussian", "kernel"] = "gaussian",
    covariance: Covariance = "shrunk",
    **kernel: Any,
) -> Bound:
    """Bounds from the Bhattacharyya coefficients of the pairs of classes (Kailath 1967; Garber and Djouadi 1988).

    With ``r_ab = ∫ sqrt(π_a p_a π_b p_b)`` a pair errs by at most ``r_ab`` and at least
    ``s/2 · (1 - sqrt(1 - 4 r_ab² / s²))``, s = π_a + π_b. All classes err by at most the sum over pairs and at least
    2/C of it.

    Args:
        x: ``(n, ...)``, f64, f32, f16 or bf16.
        y: ``(n,)`` integer labels.
        density: ``"gaussian"``: a Gaussian per class, whose coefficients have a closed form. ``"kernel"``: the kernel
            densities of :func:`bayes_error`, by ``r_ab`` = mean of ``sqrt(P_a P_b)`` over the rows.
        covariance: of the Gaussians: ``"shrunk"`` towards a multiple of the identity (Ledoit and Wolf 2004), ``"full"``
            (the sample's, needs more rows per class than features) or ``"diagonal"``. O(C² d³) for all but the last.
        **kernel: for :func:`bayes_error`, e.g. ``bandwidth``.

    Returns:
        The bounds; ``statistic`` is Σ r_ab. Bounds of the densities' Bayes error, of the data's only as far as the
        densities are theirs.

    Raises:
        ArgumentError: an unknown option.
        DegenerateError: a class with too few rows for its covariance, or one that is singular.
        ShapeError, DTypeError, NonFiniteError: as :func:`bayes_error`.
    """
    data = prepare(x, y)
    if density == "kernel":
        posterior = bayes_error(x, y, posterior=True, **{"singleton": "exclude", **kernel}).posterior
        assert posterior is not None
        root = np.sqrt(posterior)
        return _bhattacharyya(data, root.T @ root / len(root), "if the kernels' density is the data's")
    if density != "gaussian":
        raise ArgumentError(f'density: expected "gaussian" or "kernel", got {density!r}')
    if kernel:
        raise ArgumentError(f'{next(iter(kernel))}: expected with density="kernel" alone')
    if covariance not in ("shrunk", "full", "diagonal"):
        raise ArgumentError(f'covariance: expected "shrunk", "full" or "diagonal", got {covariance!r}')
    return _gaussian(data, covariance)


def _gaussian(data: Prepared, covariance: Covariance) -> Bound:
    points = matrix64(data.matrix)
    if not np.isfinite(points).all():
        # The kernels' own check names the first one.
        bayes_error(data.matrix, data.codes, bandwidth=1.0, singleton="keep")
    members = [points[data.codes == c] for c in range(len(data.classes))]
    means = [m.mean(axis=0) for m in members]
    spreads = [
        _spread(m - mean, covariance, data.classes[c]) for c, (m, mean) in enumerate(zip(members, means, strict=True))
    ]
    priors = np.array([len(m) for m in members]) / len(points)
    logs = [_log_determinant(s, data.classes[c]) for c, s in enumerate(spreads)]
    r = np.zeros((len(members), len(members)))
    for a in range(len(members)):
        for b in range(a + 1, len(members)):
            middle, step = (spreads[a] + spreads[b]) / 2, means[a] - means[b]
            if covariance == "diagonal":
                log, squared = float(np.log(middle).sum()), float((step**2 / middle).sum())
            else:
                root = np.linalg.cholesky(middle)
                log = 2 * float(np.log(np.diag(root)).sum())
                squared = float((np.linalg.solve(root, step) ** 2).sum())
            distance = squared / 8 + (log - (logs[a] + logs[b]) / 2) / 2
            r[a, b] = r[b, a] = math.sqrt(priors[a] * priors[b]) * math.exp(-distance)
    np.fill_diagonal(r, priors)
    return _bhattacharyya(data, r, f"if the classes are Gaussian, {covariance} covariances")


def _spread(centred: Array, kind: Covariance, label: Any) -> Array:
    """The covariance of one class (divided by n - 1; by n where it is shrunk), or its diagonal."""
    n, d = centred.shape
    if n < 2 or (kind == "full" and n <= d):
        need = d + 1 if kind == "full" else 2
        raise DegenerateError(f"y: class {label} has {n} rows, a {kind} covariance needs {need}")
    if kind == "diagonal":
        return np.asarray((centred**2).sum(axis=0) / (n - 1))
    if kind == "full":
        return np.asarray(centred.T @ centred / (n - 1))
    sample = centred.T @ centred / n
    scale = float(np.trace(sample)) / d
    distance = float((sample**2).sum()) - d * scale**2
    noise = (float(((centred**2).sum(axis=1) ** 2).sum()) / n - float((sample**2).sum())) / n
    weight = 1.0 if distance <= 0 else min(1.0, max(0.0, noise / distance))
    sample *= 1 - weight
    sample[np.diag_indices(d)] += weight * scale
    return np.asarray(sample)


def _log_determinant(spread: Array, label: Any) -> float:
    if spread.ndim == 1:
        if spread.min() <= 0:
            raise DegenerateError(f"y: a feature does not vary in class {label}")
        return float(np.log(spread).sum())
    try:
        return 2 * float(np.log(np.diag(np.linalg.cholesky(spread))).sum())
    except np.linalg.LinAlgError as err:
        raise DegenerateError(f"y: the covariance of class {label} is singular") from err


def _bhattacharyya(data: Prepared, r: Array, holds: str) -> Bound:
    classes, shares = len(data.classes), np.bincount(data.codes) / len(data.codes)
    lower = upper = 0.0
    for a in range(classes):
        for b in range(a + 1, classes):
            both = shares[a] + shares[b]
            lower += both / 2 * (1 - math.sqrt(max(0.0, 1 - 4 * (r[a, b] / both) ** 2)))
            upper += r[a, b]
    return _bound(data, "Bhattacharyya", 2 / classes * lower, min(upper, 1 - float(shares.max())), upper, holds)


def _bound(data: Prepared, name: str, lower: float, upper: float, statistic: float, holds: str) -> Bound:
    features = math.prod(data.shape[1:])
    return Bound(name, float(lower), float(upper), float(statistic), data.shape[0], features, len(data.classes), holds)


def matrix64(x: Any) -> Array:
    """An array of any of the kinds the kernels take as NumPy f64."""
    if _interop.is_torch(x):
        return np.asarray(x.detach().double().numpy())
    if not isinstance(x, np.ndarray):
        x = np.from_dlpack(x)
    return np.asarray(x.astype(np.float64, copy=False))


def bayes_error_bounds(x: Any, y: Any, *, methods: Sequence[str] = METHODS) -> tuple[Bound, ...]:
    """The bounds of ``methods`` with their defaults: ``"nearest_neighbour"``, ``"bhattacharyya"``, ``"henze_penrose"``.

    Raises:
        ArgumentError: an unknown method.
        ShapeError, DTypeError, NonFiniteError, DegenerateError: as :func:`bayes_error`.
    """
    for method in methods:
        if method not in METHODS:
            raise ArgumentError(f"methods: expected some of {', '.join(map(repr, METHODS))}, got {method!r}")
    data = prepare(x, y)
    forms = {
        "nearest_neighbour": _nearest_neighbour,
        "bhattacharyya": lambda d: _gaussian(d, "shrunk"),
        "henze_penrose": _henze_penrose,
    }
    return tuple(forms[method](data) for method in methods)


@dataclass(frozen=True)
class SmoothedError:
    """The Bayes error of labelled points smoothed by a Gaussian: a known mixture, so that no density is estimated.

    No classifier, however it was trained, is more accurate than ``1 - error`` on data drawn from that mixture.
    """

    error: float
    standard_error: float
    #: Draws from the mixture.
    draws: int
    bandwidth: float
    #: Points that the mixture is made of.
    rows: int
    features: int
    classes: int
    level: float = 0.95

    @property
    def interval(self) -> tuple[float, float]:
        """Normal interval of the error at ``level``, from the spread over draws."""
        half = statistics.NormalDist().inv_cdf(0.5 + self.level / 2) * self.standard_error
        return max(0.0, self.error - half), min(1.0, self.error + half)

    @property
    def hoeffding(self) -> tuple[float, float]:
        """Interval at ``level`` that holds for every number of draws (Hoeffding 1963): summands lie in [0, 1 - 1/C]."""
        half = (1 - 1 / self.classes) * math.sqrt(math.log(2 / (1 - self.level)) / (2 * self.draws))
        return max(0.0, self.error - half), min(1.0, self.error + half)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"Bayes error of the points smoothed by N(0, {self.bandwidth:.4g}²): {self.error:.4f} "
            f"({self.level:.0%} interval {low:.4f} to {high:.4f}; Hoeffding {self.hoeffding[0]:.4f} to "
            f"{self.hoeffding[1]:.4f}; {self.draws} draws, n = {self.rows}, d = {self.features})"
        )


def smoothed_error(
    x: Any, y: Any, *, bandwidth: float, draws: int = 4096, seed: int = 0, level: float = 0.95
) -> SmoothedError:
    """The Bayes error of the data smoothed by a Gaussian, by Monte Carlo.

    A draw is a row, chosen evenly, plus N(0, bandwidth²) in every feature; its mean ``1 - max P`` under all rows, own
    centre included, is the Bayes error of the mixture.

    Args:
        x: ``(n, ...)``, f64, f32, f16 or bf16.
        y: ``(n,)`` integer labels.
        bandwidth: standard deviation of the smoothing, in the units of ``x``.
        draws: number of draws, at least 2.
        seed: of the draws.
        level: of the intervals.

    Raises:
        ArgumentError: a number outside its domain.
        ShapeError, DTypeError, NonFiniteError, DegenerateError: as :func:`bayes_error`.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
        raise ArgumentError(f"draws: expected a whole number above 1, got {draws!r}")
    data = prepare(x, y)
    points = arithmetic(data.matrix)
    random = np.random.default_rng(seed)
    pick = random.integers(0, len(points), draws)
    queries = points[pick] + float(bandwidth) * random.standard_normal((draws, points.shape[1]), dtype=points.dtype)
    # The matrix product's rows and the draws are both read in the arithmetic type.
    found = bayes_error(
        points,
        data.codes,
        queries=queries.astype(points.dtype, copy=False),
        query_labels=data.codes[pick],
        bandwidth=float(bandwidth),
        objective="plugin",
        leave_one_out=False,
        singleton="keep",
        level=level,
    )
    error = float(np.std(found.values, ddof=1)) / math.sqrt(draws)
    rows, features = points.shape
    return SmoothedError(found.plugin, error, draws, float(bandwidth), rows, features, len(data.classes), level)


def arithmetic(matrix: Any) -> Array:
    """Rows as NumPy f32, or f64 where they are."""
    if _interop.is_torch(matrix):
        import torch

        return np.asarray((matrix if matrix.dtype == torch.float64 else matrix.float()).numpy())
    if not isinstance(matrix, np.ndarray):
        matrix = np.from_dlpack(matrix)
    if matrix.ndim != 2:
        raise ShapeError(f"x: expected rows of features, got shape {matrix.shape}")
    return np.asarray(matrix if matrix.dtype == np.float64 else matrix.astype(np.float32, copy=False))
