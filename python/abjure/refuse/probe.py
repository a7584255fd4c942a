"""Linear probes of refusal, or any binary label, on activations: logistic and ridge, paths, cross-validation."""

from __future__ import annotations

import html
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .. import _native
from .._files import reading, write_atomically
from .._interop import is_torch, shape, source
from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from .directions import Direction, Site, Vector, _finite, _to_numpy
from .hooks import check_site
from .prompts import PositionKey
from .record import Activations, binary_labels

_FORMAT = "abjure.refusal_probe"
Kind = Literal["logistic", "ridge"]
Metric = Literal["log_loss", "accuracy", "auroc"]
_METRICS = ("log_loss", "accuracy", "auroc")
_Fit = tuple[Vector, float, float, float, float, int, bool]


class ProbeConvergenceWarning(UserWarning):
    """A probe stopped before its gradient was as small as asked for."""


@dataclass(frozen=True)
class ProbeFit:
    """How a fit ended.

    Attributes:
        loss: the minimised objective.
        gradient_norm: Euclidean length of its gradient in weights and intercept.
        decrement: length of the gradient in the metric of the inverse Hessian, estimated where there are more rows than
            columns; half its square is about what the loss may still fall.
        iterations: steps taken.
        converged: ``decrement <= tol · sqrt(2 · loss)``.
    """

    loss: float
    gradient_norm: float
    decrement: float
    iterations: int
    converged: bool


class RefusalProbe:
    """A linear probe ``z = x·coef + intercept`` of a binary label.

    ``"logistic"`` minimises ``½‖w‖² + C Σ s_i log(1 + exp(−y_i z_i))``, ``"ridge"`` half of
    ``Σ s_i (z_i − y_i)² + α‖w‖²``, with y = ±1 and the intercept free of penalty: scikit-learn's optimum. Class 1
    (harmful, refused) is where z is positive. Rows are read in their own dtype and never copied to float64. The
    number of threads changes no bit of the result.

    Args:
        kind: ``"logistic"`` or ``"ridge"``.
        C: weight of the logistic loss against the penalty, finite.
        alpha: penalty of ridge.
        class_weight: ``"balanced"`` weights rows by ``s = n / (2 n_class)``; None by 1.
        tol: see :attr:`ProbeFit.converged`; the loss is then within about ``tol²`` of itself from its minimum.
        max_iter: steps before a :class:`ProbeConvergenceWarning`.
        layer, site, position: where the activations were read, kept in :meth:`direction`.

    Raises:
        ArgumentError, DTypeError: an option outside its domain; ``C=inf`` too, with which separable classes have no
            optimum.

    Source: LP of Any-Depth Alignment (arXiv 2510.18081: logistic, C = 1, balanced) and the probe of the refusal cliff
    (arXiv 2510.06036). Solvers: L-BFGS (Nocedal 1980) preconditioned by the Hessian at zero; with fewer rows than
    columns, iteratively reweighted least squares over the products of the rows.
    """

    def __init__(
        self,
        kind: Kind = "logistic",
        C: float = 1.0,
        alpha: float = 1.0,
        *,
        class_weight: Literal["balanced"] | None = None,
        tol: float = 1e-5,
        max_iter: int = 500,
        layer: int | None = None,
        site: Site = "pre",
        position: PositionKey | None = None,
    ) -> None:
        if kind not in ("logistic", "ridge"):
            raise ArgumentError(f"kind: expected 'logistic' or 'ridge', got {kind!r}")
        if class_weight not in (None, "balanced"):
            raise ArgumentError(f"class_weight: expected None or 'balanced', got {class_weight!r}")
        if isinstance(max_iter, bool) or not isinstance(max_iter, (int, np.integer)) or max_iter < 1:
            raise ArgumentError(f"max_iter: expected 1 or more, got {max_iter!r}")
        check_site(site)
        self.kind, self.class_weight, self.max_iter = kind, class_weight, int(max_iter)
        self.C, self.alpha, self.tol = _positive(C, "C"), _positive(alpha, "alpha"), _positive(tol, "tol")
        self.layer, self.site, self.position = layer, site, position
        #: Rows of class 0 and of class 1 that the probe was fitted on.
        self.counts: tuple[int, int] | None = None
        #: How the fit ended.
        self.result: ProbeFit | None = None
        self._coef: Vector | None = None
        self._intercept = 0.0

    @property
    def strength(self) -> float:
        """``C`` of logistic, ``alpha`` of ridge."""
        return self.C if self.kind == "logistic" else self.alpha

    @property
    def coef(self) -> Vector:
        """Weights, ``(d,)`` float64.

        Raises:
            ArgumentError: the probe has not been fitted.
        """
        if self._coef is None:
            raise ArgumentError("probe: expected a fitted probe; call fit first")
        return self._coef

    @property
    def intercept(self) -> float:
        """The intercept; raises as :attr:`coef`."""
        _ = self.coef
        return self._intercept

    def fit(self, x: Any, y: Any) -> RefusalProbe:
        """Fits the probe. Returns ``self``.

        Args:
            x: ``(n, d)`` activations of float64, float32, float16 or bfloat16.
            y: ``(n,)`` of 0 and 1 (booleans too).

        Raises:
            ShapeError, DTypeError, DeviceError: an argument does not fit. ArgumentError: a label other than 0 and 1.
            NonFiniteError: an activation is NaN or infinite; the row is named. DegenerateError: a class is empty.

        Warns:
            ProbeConvergenceWarning: the gradient is not as small as ``tol`` asks.
        """
        rows, labels = _data(x, y)
        self._take(self._run(rows, labels, [self.strength], None)[0][0][0], labels)
        return self

    def _run(self, rows: Any, labels: Any, strengths: list[float], fold: Any) -> tuple[list[list[_Fit]], Vector | None]:
        signs = np.where(labels == 1, 1.0, -1.0)
        try:
            fits, held = _native.probe_fit(
                rows,
                signs,
                strengths,
                self.kind == "ridge",
                self.class_weight == "balanced",
                self.tol,
                self.max_iter,
                fold,
            )
        except NonFiniteError as err:
            raise NonFiniteError(f"x: non-finite activation in row {_bad_row(rows)}") from err
        if late := [f for line in fits for f in line if not f[6]]:
            worst = max(f[4] / np.sqrt(2 * f[2]) for f in late)
            warnings.warn(
                f"{len(late)} of {sum(map(len, fits))} fits stopped at a relative decrement of up to {worst:.2g}, "
                f"above tol={self.tol:g}, after up to {max(f[5] for f in late)} of {self.max_iter} iterations",
                ProbeConvergenceWarning,
                stacklevel=3,
            )
        return fits, held

    def _take(self, fit: _Fit, labels: Any) -> None:
        self._coef, self._intercept = fit[0], fit[1]
        self._coef.flags.writeable = False
        self.result = ProbeFit(*fit[2:])
        self.counts = (int((labels == 0).sum()), int((labels == 1).sum()))

    def _like(self, strength: float) -> RefusalProbe:
        return RefusalProbe(
            self.kind,
            strength if self.kind == "logistic" else self.C,
            strength if self.kind == "ridge" else self.alpha,
            class_weight=self.class_weight,
            tol=self.tol,
            max_iter=self.max_iter,
            layer=self.layer,
            site=self.site,
            position=self.position,
        )

    def path(self, x: Any, y: Any, Cs: Sequence[float]) -> list[RefusalProbe]:
        """One fitted probe per strength (C, or alpha of ridge), each started where the last ended; in the order given.

        Raises and warns as :meth:`fit`; ArgumentError also for strengths that are none, or not finite and above 0.
        """
        rows, labels = _data(x, y)
        strengths = _strengths(Cs)
        probes = [self._like(s) for s in strengths]
        for probe, fits in zip(probes, self._run(rows, labels, strengths, None)[0], strict=True):
            probe._take(fits[0], labels)
        return probes

    def cross_validate(
        self,
        x: Any,
        y: Any,
        Cs: Sequence[float],
        folds: int = 5,
        seed: int = 0,
        *,
        metric: Metric | None = None,
    ) -> ProbeCrossValidation:
        """Stratified k-fold cross-validation over strengths; the probe itself is not changed.

        Args:
            x, y: as in :meth:`fit`.
            Cs: strengths to compare (C of logistic, alpha of ridge).
            folds: 2 or more, at most the rows of the smaller class.
            seed: of the assignment to folds.
            metric: what :attr:`ProbeCrossValidation.best` is chosen by: ``"log_loss"`` (the default of logistic),
                ``"accuracy"`` or ``"auroc"`` (the default of ridge).

        Raises and warns as :meth:`path`; DegenerateError where a class has fewer rows than folds.
        """
        rows, labels = _data(x, y)
        strengths = _strengths(Cs)
        chosen = metric or ("log_loss" if self.kind == "logistic" else "auroc")
        if chosen not in _METRICS:
            raise ArgumentError(f"metric: expected one of {_METRICS}, got {metric!r}")
        fold = stratified_folds(labels, folds, seed)
        held = self._run(rows, labels, strengths, fold)[1]
        assert held is not None
        table = np.array([[_scores(z[fold == k], labels[fold == k]) for k in range(folds)] for z in held])
        by_metric = {name: table[:, :, i] for i, name in enumerate(_METRICS)}
        return ProbeCrossValidation(self, strengths, by_metric, chosen, held, fold)

    def decision(self, x: Any) -> Vector:
        """``x·coef + intercept``: ``(...)`` float64 for ``x`` ``(..., d)``; sums in float64.

        Raises:
            ShapeError, DTypeError, DeviceError: ``x`` does not fit. ArgumentError: not fitted.
        """
        width, lead = self.coef.size, shape(read := source(x, "x"), "x")
        if not lead or lead[-1] != width:
            raise ShapeError(f"x: expected a last axis of {width}, got shape {lead}")
        return _native.probe_decision(read, self.coef, self._intercept).reshape(lead[:-1])

    def probability(self, x: Any) -> Vector:
        """``σ(decision(x))``, ``(...)`` float64. A calibrated probability only of the logistic kind, at positions like
        those it was fitted on. Raises as :meth:`decision`."""
        return _sigmoid(self.decision(x))

    def predict(self, x: Any) -> npt.NDArray[np.int64]:
        """1 where the decision is 0 or more, else 0. Raises as :meth:`decision`."""
        return (self.decision(x) >= 0).astype(np.int64)

    def score(self, x: Any, y: Any) -> float:
        """Accuracy on labelled rows. Raises as :meth:`decision`; ArgumentError for labels other than 0 and 1."""
        found = self.predict(x)
        return float((found == binary_labels(_host(y), len(found), "y")).mean())

    def direction(self) -> Direction:
        """The weights as a :class:`Direction`, which points to class 1.

        Raises:
            ArgumentError: not fitted. DegenerateError: every weight is zero.
        """
        coef, facts = self.coef, self.result
        provenance: dict[str, Any] = {
            "method": f"{self.kind}_probe",
            "C" if self.kind == "logistic" else "alpha": self.strength,
            "class_weight": self.class_weight,
            "intercept": self._intercept,
        }
        if facts is not None:
            provenance |= {"loss": facts.loss, "iterations": facts.iterations, "converged": facts.converged}
        return Direction(coef, self.layer, self.site, self.position, self.counts, provenance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with the weights; the rest is in its metadata. Complete or not at all.

        Raises:
            ArgumentError: not fitted, or the path cannot be written.
        """
        from safetensors.numpy import save

        names = ("kind", "C", "alpha", "class_weight", "tol", "max_iter", "layer", "site", "position")
        facts = {
            "options": {name: getattr(self, name) for name in names},
            "counts": self.counts,
            "result": None if self.result is None else vars(self.result),
        }
        arrays = {"coef": np.array(self.coef), "intercept": np.array([self._intercept])}
        write_atomically(path, save(arrays, {_FORMAT: json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RefusalProbe:
        """Reads what :meth:`save` wrote.

        Raises:
            ArgumentError: the file cannot be read or is not a probe.
        """
        with reading(path, "RefusalProbe") as file:
            facts = json.loads((file.metadata() or {})[_FORMAT])
            coef, intercept = file.get_tensor("coef"), float(file.get_tensor("intercept")[0])
            counts, result, options = facts["counts"], facts["result"], facts["options"]
        probe = cls(**options)
        probe._coef, probe._intercept = coef, intercept
        probe.counts = None if counts is None else (counts[0], counts[1])
        probe.result = None if result is None else ProbeFit(**result)
        return probe

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"kind": self.kind, "C" if self.kind == "logistic" else "alpha": self.strength}
        facts |= {"class_weight": self.class_weight, "layer": self.layer, "site": self.site, "position": self.position}
        if self._coef is not None and self.result is not None:
            facts |= {"d": self._coef.size, "counts": self.counts, "loss": f"{self.result.loss:.6g}"}
            facts |= {"iterations": self.result.iterations, "converged": self.result.converged}
        return facts

    def __repr__(self) -> str:
        return f"RefusalProbe({', '.join(f'{k}={v}' for k, v in self._facts().items())})"

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><th>{k}</th><td>{html.escape(str(v))}</td></tr>" for k, v in self._facts().items())
        return f"<table><caption>RefusalProbe</caption>{cells}</table>"


@dataclass(frozen=True, eq=False)
class ProbeCrossValidation:
    """Held-out scores by strength and fold.

    Attributes:
        probe: the options that were cross-validated.
        strengths: C (or alpha) of each row of the tables.
        by_fold: ``"log_loss"`` (nats per row), ``"accuracy"``, ``"auroc"`` to ``(strengths, folds)``.
        metric: what :attr:`best` is chosen by.
        decisions: ``(strengths, n)``: of every row, by the probe that did not see it.
        fold: ``(n,)``: the fold that each row was held out in.
    """

    probe: RefusalProbe
    strengths: list[float]
    by_fold: dict[str, Vector]
    metric: str
    decisions: Vector
    fold: Any

    @property
    def table(self) -> list[dict[str, float]]:
        """A row per strength: means over folds, and the standard error of the metric that decides."""
        found = []
        for i, strength in enumerate(self.strengths):
            row = {self._name: strength} | {name: float(v[i].mean()) for name, v in self.by_fold.items()}
            scores = self.by_fold[self.metric][i]
            found.append(row | {"standard_error": float(scores.std(ddof=1) / np.sqrt(len(scores)))})
        return found

    @property
    def _name(self) -> str:
        return "C" if self.probe.kind == "logistic" else "alpha"

    @property
    def best(self) -> float:
        """The strength with the best mean; of equal ones the most regularised."""
        means = self.by_fold[self.metric].mean(1)
        means = -means if self.metric == "log_loss" else means
        tied = [s for s, m in zip(self.strengths, means, strict=True) if m == means.max()]
        return min(tied) if self.probe.kind == "logistic" else max(tied)

    def fit(self, x: Any, y: Any) -> RefusalProbe:
        """A probe of the :attr:`best` strength, fitted on all rows; raises as :meth:`RefusalProbe.fit`."""
        return self.probe._like(self.best).fit(x, y)

    def __str__(self) -> str:
        lines = [f"{self._name:>10s}  log loss  accuracy   AUROC"]
        lines += [
            f"{row[self._name]:10.4g}  {row['log_loss']:8.4f}  {row['accuracy']:8.4f}  {row['auroc']:6.4f}"
            for row in self.table
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        folds = self.by_fold[self.metric].shape[1]
        return (
            f"ProbeCrossValidation(best={self.best:g} of {len(self.strengths)}, metric={self.metric!r}, folds={folds})"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{r[self._name]:.4g}</td><td>{r['log_loss']:.4f}</td><td>{r['accuracy']:.4f}</td>"
            f"<td>{r['auroc']:.4f}</td></tr>"
            for r in self.table
        )
        header = f"<tr><th>{self._name}</th><th>log loss</th><th>accuracy</th><th>AUROC</th></tr>"
        return f"<table><caption>{html.escape(repr(self))}</caption>{header}{rows}</table>"

    def plot(self, ax: Any = None) -> Any:
        """Mean of the deciding metric by strength, with its standard error; the best is marked. Returns the axes."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        order = np.argsort(self.strengths)
        table = [self.table[i] for i in order]
        x = [row[self._name] for row in table]
        ax.errorbar(x, [r[self.metric] for r in table], [r["standard_error"] for r in table], marker="o", lw=1)
        ax.axvline(self.best, color="0.6", ls=":")
        ax.set(xscale="log", xlabel=self._name, ylabel=f"held-out {self.metric.replace('_', ' ')}")
        return ax


@dataclass(frozen=True, eq=False)
class LayerProbes:
    """A probe per layer, and how it did on rows that it did not see.

    Attributes:
        probes: by layer, fitted on the training part.
        accuracy, auroc: by layer, on the held-out part.
        position: where the activations were read.
        held_out: prompts that were held out.
    """

    probes: dict[int, RefusalProbe]
    accuracy: dict[int, float]
    auroc: dict[int, float]
    position: PositionKey
    held_out: list[int]

    @property
    def best(self) -> int:
        """The layer with the highest held-out AUROC, the earliest of equal ones."""
        return max(self.auroc, key=lambda layer: (self.auroc[layer], -layer))

    def __repr__(self) -> str:
        best = self.best
        return (
            f"LayerProbes(layers={len(self.probes)}, position={self.position!r}, held_out={len(self.held_out)}, "
            f"best={best}, auroc={self.auroc[best]:.4f}, accuracy={self.accuracy[best]:.4f})"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{layer}</td><td>{self.accuracy[layer]:.4f}</td><td>{self.auroc[layer]:.4f}</td></tr>"
            for layer in self.probes
        )
        header = "<tr><th>layer</th><th>accuracy</th><th>AUROC</th></tr>"
        return f"<table><caption>{html.escape(repr(self))}</caption>{header}{rows}</table>"

    def plot(self, ax: Any = None) -> Any:
        """Held-out accuracy and AUROC by layer. Returns the axes."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        for name in ("accuracy", "auroc"):
            values = getattr(self, name)
            ax.plot(list(values), list(values.values()), marker="o", lw=1, label=name)
        ax.set(xlabel="layer", ylabel="held out")
        ax.legend()
        return ax


def probe_layers(
    activations: Activations,
    position: PositionKey,
    layers: Sequence[int] | None = None,
    *,
    test: float = 0.25,
    seed: int = 0,
    **options: Any,
) -> LayerProbes:
    """Where a label can be read: a probe per recorded layer, and its accuracy and AUROC on held-out prompts.

    Args:
        activations: from :func:`record_to_disk`; one layer is in memory at a time.
        position: one recorded token per prompt.
        layers: recorded layers, None for all.
        test: share of the prompts of each class that is held out, the same at every layer.
        seed: of the split.
        options: of :class:`RefusalProbe`.

    Raises:
        ArgumentError: a layer or the position was not recorded, ``test`` outside (0, 1), ``position="all"`` (whose rows
            of one prompt would stand on both sides).
        DegenerateError: a class has fewer than two prompts. Otherwise as :meth:`RefusalProbe.fit`.
    """
    if position == "all":
        raise ArgumentError("position: expected one token per prompt, got 'all'")
    if not 0 < _finite(test, "test") < 1:
        raise ArgumentError(f"test: expected a share in (0, 1), got {test}")
    probes, accuracy, auroc = {}, {}, {}
    held_out: list[int] = []
    for layer in activations.layers if layers is None else layers:
        rows, labels, prompts = activations.array(layer, position)
        held = _held_out(labels, test, seed)
        probe = RefusalProbe(**{"layer": layer, "site": activations.site, "position": position, **options})
        probe.fit(rows[~held], labels[~held])
        _, accuracy[layer], auroc[layer] = _scores(probe.decision(rows[held]), labels[held])
        probes[layer] = probe
        held_out = [int(i) for i in prompts[held]]
    if not probes:
        raise ArgumentError("layers: expected one or more")
    return LayerProbes(probes, accuracy, auroc, position, held_out)


def stratified_folds(labels: Any, folds: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """A fold in ``0..folds`` for each 0 or 1; every fold has its share of each class, by one row at most.

    Raises:
        ArgumentError: fewer than 2 folds. DegenerateError: a class has fewer rows than folds.
    """
    if isinstance(folds, bool) or not isinstance(folds, (int, np.integer)) or folds < 2:
        raise ArgumentError(f"folds: expected 2 or more, got {folds!r}")
    rng = np.random.default_rng(seed)
    found = np.empty(len(labels), np.int64)
    for value in (0, 1):
        mine = np.flatnonzero(labels == value)
        if len(mine) < folds:
            raise DegenerateError(f"y: expected {folds} or more rows of class {value}, one per fold, got {len(mine)}")
        # Class 1 is dealt from the other end, so that the first folds do not get the larger part of both.
        dealt = np.arange(len(mine)) % folds
        found[rng.permutation(mine)] = dealt if value == 0 else folds - 1 - dealt
    return found


def _held_out(labels: Any, share: float, seed: int) -> npt.NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for value in (0, 1):
        mine = rng.permutation(np.flatnonzero(labels == value))
        if len(mine) < 2:
            raise DegenerateError(f"labels: expected two or more prompts of class {value}, got {len(mine)}")
        held[mine[: min(max(1, round(share * len(mine))), len(mine) - 1)]] = True
    return held


def _scores(z: Vector, labels: Any) -> tuple[float, float, float]:
    """Mean log-loss, accuracy and AUROC (ties count half) of decisions."""
    high, low = z[labels == 1], np.sort(z[labels == 0])
    loss = np.logaddexp(0, np.where(labels == 1, -z, z)).mean()
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(loss), float(((z >= 0) == (labels == 1)).mean()), float(below.mean() / 2 / len(low))


def _sigmoid(z: Vector) -> Vector:
    e = np.exp(-np.abs(z))
    found: Vector = np.where(z >= 0, 1.0, e) / (1.0 + e)
    return found


def _positive(value: float, arg: str) -> float:
    found = _finite(value, arg) if not (isinstance(value, float) and np.isinf(value)) else float(value)
    if not 0 < found < np.inf:
        why = "; separable classes have no optimum without a penalty" if found == np.inf else ""
        raise ArgumentError(f"{arg}: expected a finite number above 0, got {value}{why}")
    return found


def _strengths(values: Sequence[float]) -> list[float]:
    found = [_positive(float(v), "Cs") for v in values]
    if not found:
        raise ArgumentError("Cs: expected one or more strengths")
    return found


def _host(y: Any) -> Any:
    return y.detach().cpu().numpy() if is_torch(y) else y


def _data(x: Any, y: Any) -> tuple[Any, Any]:
    rows = source(x, "x")
    found = shape(rows, "x")
    if len(found) != 2 or 0 in found:
        raise ShapeError(f"x: expected shape (n, d), got {found}")
    labels = binary_labels(_host(y), found[0], "y")
    if labels.min() == labels.max():
        raise DegenerateError(f"y: expected rows of both classes, got only {labels[0]}")
    return rows, labels


def _bad_row(rows: Any) -> int:
    bad = ~np.isfinite(_to_numpy(rows, "x")).all(1)
    return int(bad.argmax())
