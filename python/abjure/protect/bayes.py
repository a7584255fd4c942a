"""The Bayes error of labelled data as a Gaussian kernel density posterior reads it, and its gradient."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from .. import _interop, _native
from ..errors import ArgumentError, DegenerateError, DTypeError, ShapeError

Objective = Literal["plugin", "gini", "softmax_tau", "entropy", "soft", "soft_capped", "nll"]
Bandwidth = str | float | tuple[str, float] | Sequence[float]
Array = np.ndarray[Any, Any]

#: Perplexity of the rule ``bandwidth="perplexity"``: the one that calibrates the estimate.
ESTIMATION_PERPLEXITY = 10.0
#: What is read of every posterior, whatever the objective.
READINGS = ("plugin", "gini", "soft", "entropy", "nll", "own_label_error")


@dataclass(frozen=True)
class Prepared:
    """Rows as a matrix the kernels read, with labels as codes."""

    matrix: Any
    codes: Array
    classes: Array
    shape: tuple[int, ...]


def prepare(x: Any, y: Any, arg: str = "x") -> Prepared:
    """``x`` as rows × features and ``y`` as codes 0..C-1 into the sorted distinct labels."""
    matrix, shape = rows(x, arg)
    labels = _interop.integers(y, "y")
    if labels.ndim != 1 or len(labels) != shape[0]:
        raise ShapeError(f"y: expected shape ({shape[0]},), one label per row of {arg}, got {labels.shape}")
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DegenerateError(f"y: expected at least two classes, got {len(classes)}")
    return Prepared(matrix, np.ascontiguousarray(codes.reshape(-1), dtype=np.int64), classes, shape)


def rows(x: Any, arg: str) -> tuple[Any, tuple[int, ...]]:
    """``x`` flattened to rows × features (a view where it can be), and its shape."""
    x = _interop.source(x, arg)
    shape = _interop.shape(x, arg)
    if len(shape) < 1 or shape[0] == 0 or math.prod(shape) == 0:
        raise ShapeError(f"{arg}: expected at least one row and one feature, got shape {shape}")
    floating = (
        x.is_floating_point()
        if _interop.is_torch(x)
        else getattr(getattr(x, "dtype", None), "kind", "f") not in "biucOSUmM"
    )
    if not floating:
        raise DTypeError(f"{arg}: expected floating-point values, got dtype {x.dtype}")
    if len(shape) != 2:
        x = x.reshape((shape[0], math.prod(shape[1:])))
    return x, shape


def cover_hart(error: float, classes: int) -> tuple[float, float]:
    """Bounds of the Bayes error from the asymptotic nearest-neighbour error e (Cover and Hart 1967).

    ``(C-1)/C · (1 - sqrt(max(0, 1 - C/(C-1) e))) <= R* <= e``.

    Raises:
        ArgumentError: an error outside [0, 1], or fewer than two classes.
    """
    if not 0 <= error <= 1:
        raise ArgumentError(f"error: expected a number from 0 to 1, got {error!r}")
    if classes < 2:
        raise ArgumentError(f"classes: expected at least 2, got {classes!r}")
    ratio = classes / (classes - 1)
    return (1 - math.sqrt(max(0.0, 1 - ratio * error))) / ratio, error


def _number(value: Any, arg: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as err:
        raise ArgumentError(f"{arg}: expected a number, got {value!r}") from err
    if not (math.isfinite(number) and number > 0):
        raise ArgumentError(f"{arg}: expected a positive number, got {value!r}")
    return number


def resolve_bandwidth(data: Prepared, rule: Bandwidth, perplexity: float = ESTIMATION_PERPLEXITY) -> list[float]:
    """The bandwidths that ``rule`` names for ``data``."""
    if isinstance(rule, tuple) and len(rule) == 2 and rule[0] == "perplexity":
        rule, perplexity = "perplexity", _number(rule[1], "bandwidth")
    if isinstance(rule, str):
        return [_native.find_bandwidth(data.matrix, data.codes, len(data.classes), rule, perplexity)]
    if isinstance(rule, (Sequence, np.ndarray)):
        if len(rule) == 0:
            raise ArgumentError("bandwidth: expected at least one number, got none")
        return [_number(h, "bandwidth") for h in rule]
    return [_number(rule, "bandwidth")]


def bandwidth(x: Any, y: Any, rule: Bandwidth = "perplexity", *, perplexity: float = ESTIMATION_PERPLEXITY) -> float:
    """The bandwidth that a rule gives for labelled data.

    Args:
        x: ``(n, ...)``, f64, f32, f16 or bf16; trailing axes are flattened.
        y: ``(n,)`` integer labels.
        rule: ``"perplexity"`` (mean entropy of the leave-one-out kernel weights is log ``perplexity``), ``"nll"``
            (least leave-one-out negative log-likelihood of the labels) or ``"knn"`` (0.27 × median distance to the
            tenth neighbour). They look at the distances from all rows, or from evenly spread rows where there are
            more than 2^24 pairs.
        perplexity: effective number of neighbours of the first rule.

    Returns:
        The standard deviation of the kernel, in the units of ``x``.

    Raises:
        ArgumentError: unknown rule, or a perplexity that ``n`` points cannot reach.
        DegenerateError: the points coincide, or there is one class only.
    """
    return resolve_bandwidth(prepare(x, y), rule, perplexity)[0]


def options(
    data: Prepared,
    bandwidths: Sequence[float],
    objective: str,
    tau: float,
    leave_one_out: bool | str,
    singleton: str,
    priors: Any,
    *,
    corrected: bool = True,
) -> dict[str, Any]:
    """The numerical part of a call, checked."""
    mode = ("corrected" if corrected else "plain") if leave_one_out is True else (leave_one_out or "none")
    if singleton not in ("error", "exclude", "keep"):
        raise ArgumentError(f'singleton: expected "error", "exclude" or "keep", got {singleton!r}')
    if priors is not None:
        priors = [float(p) for p in np.asarray(priors, dtype=np.float64).reshape(-1)]
        if len(priors) != len(data.classes):
            raise ShapeError(f"priors: expected {len(data.classes)} numbers, one per class, got {len(priors)}")
        if not (min(priors) > 0 and math.isfinite(sum(priors))):
            raise ArgumentError(f"priors: expected positive numbers, got {priors}")
        priors = [p / sum(priors) for p in priors]
    return {
        "bandwidths": list(bandwidths),
        "objective": objective,
        "tau": tau,
        "leave_one_out": mode,
        "singleton": singleton,
        "priors": priors,
    }


def refuse_singletons(data: Prepared, mode: str, singleton: str) -> None:
    """DegenerateError for a class whose only member would be left out for itself."""
    counts = np.bincount(data.codes, minlength=len(data.classes))
    alone = data.classes[counts == 1]
    if singleton == "error" and mode != "none" and len(alone):
        raise DegenerateError(
            f"y: class {alone[0]} has one member, which leave-one-out cannot judge; "
            'pass singleton="exclude" or "keep", or leave_one_out=False'
        )


@dataclass(frozen=True)
class BayesError:
    """Readings of the Bayes error, all means over the rows that count (and over the bandwidths, if several).

    ``plugin``, ``gini`` and ``soft`` are the plug-in error ``1 - max P``, the asymptotic nearest-neighbour error
    ``1 - Σ P²`` and the error ``1 - P_y`` of drawing the label; ``own_label_error`` is the share of rows whose
    likeliest class is not their label. The first two never exceed ``1 - 1/C``; ``soft`` may.
    """

    value: float
    objective: str
    plugin: float
    gini: float
    soft: float
    entropy: float
    nll: float
    own_label_error: float
    bandwidth: tuple[float, ...]
    leave_one_out: str
    rows: int
    classes: Array
    #: Objective of each row that counts.
    values: Array = field(repr=False)
    #: ``(queries, C)`` if asked for.
    posterior: Array | None = field(default=None, repr=False)
    level: float = 0.95
    #: Standard error of every reading (and of ``"value"``) from subsamples; empty if none were asked for.
    standard_errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def standard_error(self) -> float | None:
        """Standard error of ``value`` from subsamples, None if none were asked for."""
        return self.standard_errors.get("value")

    @property
    def bounds(self) -> tuple[float, float]:
        """Bounds of the Bayes error by Cover and Hart (1967) from ``gini``, read as the nearest-neighbour error.

        ``(C-1)/C · (1 - sqrt(1 - C/(C-1) e)) <= R* <= e``: exact for the density that the kernels describe, for the
        data only as far as that density is theirs.
        """
        return cover_hart(min(max(self.gini, 0.0), 1.0), len(self.classes))

    @property
    def interval(self) -> tuple[float, float]:
        """Normal interval of ``value`` at ``level``.

        From ``standard_error`` if :func:`bayes_error` was given ``subsamples``: then it speaks of other samples of the
        same population, read at this bandwidth. Else from the spread over rows, which are treated as independent given
        the centres: at no cost, and too narrow by what the centres themselves vary.
        """
        error = self.standard_error
        if error is None:
            if self.rows < 2:
                return (-math.inf, math.inf)
            error = float(np.std(self.values, ddof=1)) / math.sqrt(self.rows)
        return self._around(self.value, error)

    def interval_of(self, reading: str) -> tuple[float, float]:
        """Normal interval at ``level`` of ``"plugin"``, ``"gini"``, ``"soft"``, ``"entropy"``, ``"nll"`` or
        ``"own_label_error"``, from subsamples.

        Raises:
            ArgumentError: an unknown reading, or none were drawn.
        """
        if reading not in READINGS:
            raise ArgumentError(f"reading: expected one of {', '.join(map(repr, READINGS))}, got {reading!r}")
        if reading not in self.standard_errors:
            raise ArgumentError("reading: expected a BayesError made with subsamples, got one without")
        return self._around(getattr(self, reading), self.standard_errors[reading])

    def _around(self, value: float, error: float) -> tuple[float, float]:
        half = statistics.NormalDist().inv_cdf(0.5 + self.level / 2) * error
        return value - half, value + half

    def _lines(self) -> list[tuple[str, str]]:
        low, high = self.interval
        lower, upper = self.bounds

        def shown(reading: str) -> str:
            value = f"{getattr(self, reading):.4f}"
            if reading not in self.standard_errors:
                return value
            low, high = self.interval_of(reading)
            return f"{value}   ({low:.4f} to {high:.4f})"

        return [
            (self.objective, f"{self.value:.4f}   ({self.level:.0%} interval {low:.4f} to {high:.4f})"),
            ("plug-in error 1 - max P", shown("plugin")),
            ("nearest-neighbour error 1 - Σ P²", shown("gini")),
            ("Bayes error, Cover–Hart bounds", f"{lower:.4f} to {upper:.4f}"),
            ("label-drawing error 1 - P_y", shown("soft")),
            ("rows whose label is not the likeliest", shown("own_label_error")),
            ("bandwidth", ", ".join(f"{h:.4g}" for h in self.bandwidth)),
            ("leave one out", self.leave_one_out),
            ("rows", str(self.rows)),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self._lines())

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in self._lines())
        return f"<table><caption>Bayes error of a kernel density posterior</caption>{cells}</table>"


@dataclass(frozen=True)
class Gradient:
    """An objective and its gradient: ``centres`` like ``x``, ``queries`` like the queries (or None)."""

    value: float
    centres: Any
    queries: Any = None


@dataclass(frozen=True)
class _Call:
    data: Prepared
    options: dict[str, Any]
    queries: Prepared | None = None
    query_rows: Array | None = None

    def run(
        self,
        *,
        gradient: str = "no",
        query_gradient: bool = False,
        posterior: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> dict[str, Any]:
        d = self.data
        if self.queries is None:
            return _native.published_error(
                d.matrix, d.codes, len(d.classes), self.options, gradient != "no", posterior, progress=progress
            )
        q = self.queries
        return _native.cross_error(
            d.matrix,
            d.codes,
            len(d.classes),
            q.matrix,
            q.codes,
            self.query_rows,
            self.options,
            gradient,
            query_gradient,
            posterior,
            progress=progress,
        )


def _query_set(
    data: Prepared, queries: Any, labels: Any, query_rows: Any, leave_one_out: bool | str
) -> tuple[Prepared, Array]:
    matrix, shape = rows(queries, "queries")
    n = shape[0]
    if labels is None:
        if n != data.shape[0]:
            raise ShapeError(
                f"query_labels: expected labels of the {n} queries, got None, which takes query i for another place of "
                f"row i of x ({data.shape[0]} rows)"
            )
        codes = data.codes
        query_rows = np.arange(n) if query_rows is None else query_rows
    else:
        values = _interop.integers(labels, "query_labels")
        if values.shape != (n,):
            raise ShapeError(f"query_labels: expected shape ({n},), got {values.shape}")
        codes = np.searchsorted(data.classes, values)
        unknown = (codes == len(data.classes)) | (data.classes[np.minimum(codes, len(data.classes) - 1)] != values)
        if unknown.any():
            raise ArgumentError(f"query_labels: expected labels that occur in y, got {values[unknown][0]}")
        query_rows = np.full(n, -1) if query_rows is None else query_rows
    place = _interop.integers(query_rows, "query_rows")
    if place.shape != (n,):
        raise ShapeError(f"query_rows: expected shape ({n},), got {place.shape}")
    if leave_one_out in (False, "none"):
        place = np.full(n, -1, dtype=np.int64)
    codes = np.ascontiguousarray(codes, dtype=np.int64)
    return Prepared(matrix, codes, data.classes, shape), place


def _call(
    x: Any,
    y: Any,
    queries: Any,
    query_labels: Any,
    query_rows: Any,
    rule: Bandwidth,
    objective: str,
    leave_one_out: bool | str,
    priors: Any,
    singleton: str,
    tau: float,
) -> _Call:
    data = prepare(x, y)
    widths = resolve_bandwidth(data, rule)
    chosen = options(data, widths, objective, tau, leave_one_out, singleton, priors, corrected=queries is None)
    if queries is None:
        if query_labels is not None or query_rows is not None:
            raise ArgumentError("queries: expected points for the query_labels or query_rows given, got None")
        refuse_singletons(data, chosen["leave_one_out"], singleton)
        return _Call(data, chosen)
    found, place = _query_set(data, queries, query_labels, query_rows, leave_one_out)
    if (place >= 0).any():
        refuse_singletons(data, chosen["leave_one_out"], singleton)
    return _Call(data, chosen, found, place)


def bayes_error(
    x: Any,
    y: Any,
    *,
    queries: Any = None,
    query_labels: Any = None,
    query_rows: Any = None,
    bandwidth: Bandwidth = "perplexity",
    objective: Objective = "gini",
    leave_one_out: bool | Literal["corrected", "plain", "none"] = True,
    priors: Any = None,
    singleton: Literal["error", "exclude", "keep"] = "error",
    tau: float = 1.0,
    posterior: bool = False,
    level: float = 0.95,
    subsamples: int = 0,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> BayesError:
    """Estimate the Bayes error of labelled data from a Gaussian kernel density posterior.

    Without ``queries``: of the data themselves, every row judged by the others (the *published* reading). With
    ``queries``: of the queries, judged by the best rule that can be learnt from ``x`` (given the clean originals of a
    protected ``x``, the *clean* reading, which is the one that foretells a model's accuracy on clean data).

    Args:
        x: ``(n, ...)`` centres, f64, f32, f16 or bf16 (halves are widened to f32); trailing axes are flattened.
        y: ``(n,)`` integer labels, any values.
        queries: ``(m, ...)`` points of the same dtype and number of features.
        query_labels: ``(m,)``; if None, query i is another place of row i of ``x``: same label, own centre left out.
        query_rows: ``(m,)`` row of ``x`` that each query must not see, -1 for none.
        bandwidth: ``"perplexity"`` (k = 10), ``("perplexity", k)``, ``"nll"``, ``"knn"``, a number, or several numbers
            over which the objective is averaged; see :func:`bandwidth`.
        objective: what ``value`` reads: ``"plugin"``, ``"gini"``, ``"softmax_tau"`` (with ``tau``), ``"entropy"``,
            ``"soft"``, ``"soft_capped"``, ``"nll"``.
        leave_one_out: ``True`` is ``"corrected"`` (the own class counts one member less) without queries and
            ``"plain"`` (counts stay) with them; ``False`` is ``"none"``.
        priors: class probabilities in the order of the sorted labels; shares of ``y`` if None.
        singleton: a class of one member under leave-one-out is an ``"error"``, ``"exclude"`` leaves the row out of the
            mean, ``"keep"`` gives it probability 0.
        posterior: also return the posterior.
        level: level of ``interval``.
        subsamples: halves of the data, drawn without replacement, that ``standard_error`` and ``interval`` are computed
            from: 200 give a stable one, all from one more pass over the distances. (A bootstrap would not do: a row
            drawn twice vouches for itself.)
        seed: of the subsamples.
        progress: called with the number of finished tiles every 50 ms.

    Returns:
        The readings. Time O(n² d), memory O(tile), never n × n. In f32 squared distances carry an error of about
        2^-23 times the squared distances from the mean, which the bandwidth divides.

    Raises:
        ShapeError, DTypeError, NonFiniteError: malformed input.
        ArgumentError: an unknown option or a number outside its domain.
        DegenerateError: one class only, a class of one member, or points that all coincide.
    """
    if not 0 < level < 1:
        raise ArgumentError(f"level: expected a number between 0 and 1, got {level!r}")
    if isinstance(subsamples, bool) or not isinstance(subsamples, int) or subsamples < 0 or subsamples == 1:
        raise ArgumentError(f"subsamples: expected 0 or a whole number above 1, got {subsamples!r}")
    call = _call(x, y, queries, query_labels, query_rows, bandwidth, objective, leave_one_out, priors, singleton, tau)
    found = call.run(posterior=posterior, progress=progress)
    if found["rows"] == 0:
        raise DegenerateError("y: no row is left to judge; every class has one member")
    classes = call.data.classes
    return BayesError(
        value=found["value"],
        objective=objective,
        plugin=found["plugin"],
        gini=found["gini"],
        soft=found["soft"],
        entropy=found["entropy"],
        nll=found["nll"],
        own_label_error=found["own_label_error"],
        bandwidth=tuple(call.options["bandwidths"]),
        leave_one_out=call.options["leave_one_out"],
        rows=int(found["rows"]),
        classes=classes,
        values=found["values"],
        posterior=found["posterior"].reshape(-1, len(classes)) if posterior else None,
        level=level,
        standard_errors=_standard_errors(call, subsamples, seed, progress) if subsamples else {},
    )


def _standard_errors(call: _Call, subsamples: int, seed: int, progress: Callable[[int], object] | None) -> Any:
    """Delete-half jackknife of every reading at the bandwidth of the whole (Shao and Wu 1989).

    Values of halves drawn without replacement vary as the value of the whole does: the factor m / (n - m) of their
    variance is 1.
    """
    data = call.data
    n = data.shape[0]
    if n < 8:
        raise DegenerateError(f"subsamples: expected at least 8 rows of x, got {n}")
    options = call.options | {"singleton": "keep" if call.options["singleton"] == "keep" else "exclude"}
    queries = data if call.queries is None else call.queries
    place = np.arange(n) if call.query_rows is None else call.query_rows
    found = _native.half_errors(
        data.matrix,
        data.codes,
        len(data.classes),
        queries.matrix,
        queries.codes,
        place,
        options,
        subsamples,
        seed,
        progress=progress,
    )
    judged = found["rows"] > 0
    if judged.sum() < 2:
        raise DegenerateError("subsamples: hardly any has a row to judge")
    with np.errstate(invalid="ignore"):  # the likelihood of a row can be 0
        return {name: float(np.std(found[name][judged], ddof=1)) for name in ("value", *READINGS)}


def bayes_error_gradient(
    x: Any,
    y: Any,
    *,
    queries: Any = None,
    query_labels: Any = None,
    query_rows: Any = None,
    bandwidth: Bandwidth = "perplexity",
    objective: Objective = "gini",
    leave_one_out: bool | Literal["corrected", "plain", "none"] = True,
    priors: Any = None,
    singleton: Literal["error", "exclude", "keep"] = "error",
    tau: float = 1.0,
    wrt: Literal["centres", "queries", "both"] = "centres",
    progress: Callable[[int], object] | None = None,
) -> Gradient:
    """The objective of :func:`bayes_error` and its exact gradient, the bandwidth held fixed.

    Without ``queries`` every row is query and centre, and ``centres`` is the whole gradient, own-location and centre
    terms together. With them, ``wrt`` chooses. Gradients come in the arithmetic type (f32 for half precision), as the
    kind of array that ``x`` is, in its shape.

    Raises:
        As :func:`bayes_error`.
    """
    if wrt not in ("centres", "queries", "both"):
        raise ArgumentError(f'wrt: expected "centres", "queries" or "both", got {wrt!r}')
    call = _call(x, y, queries, query_labels, query_rows, bandwidth, objective, leave_one_out, priors, singleton, tau)
    centres = "no" if queries is not None and wrt == "queries" else "each"
    found = call.run(gradient=centres, query_gradient=queries is not None and wrt != "centres", progress=progress)
    if queries is None:
        return Gradient(found["value"], like(found["query_gradient"], x, call.data.shape))
    assert call.queries is not None
    return Gradient(
        found["value"],
        like(found["centre_gradient"], x, call.data.shape) if wrt != "queries" else None,
        like(found["query_gradient"], queries, call.queries.shape) if wrt != "centres" else None,
    )


def like(result: Array, x: Any, shape: tuple[int, ...]) -> Any:
    """``result`` in ``shape`` as the kind of array ``x`` is."""
    result = result.reshape(shape)
    if _interop.is_torch(x):
        import torch

        return torch.from_numpy(result)
    return _interop.like(result, x)
