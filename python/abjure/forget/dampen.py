"""Selective Synaptic Dampening (Foster, Schoepf, Brintrup: arXiv 2308.07707) on arrays and on whole models."""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .. import _native
from .._interop import device_path, is_torch, source, target
from ..errors import ArgumentError, DTypeError, LayoutError, ShapeError
from .fisher import Fisher
from .params import chosen, listed, named, ties


class Selection(NamedTuple):
    """How many weights a dampening selected, how many of those changed value, and how many of those became 0."""

    count: int  # type: ignore[assignment]  # hides tuple.count
    changed: int
    zeroed: int


#: alpha, lam, exponent, max_factor, min_factor.
_Numbers = tuple[float, float, float, float, float]


def dampen_array_(
    weights: Any,
    forget: Any,
    retain: Any,
    alpha: float = 10.0,
    lam: float = 1.0,
    *,
    exponent: float = 1.0,
    max_factor: float = 1.0,
    min_factor: float = 0.0,
) -> Selection:
    """Dampens ``weights`` in place where they matter more to the forget set than to the rest.

    Where ``forget > alpha * retain`` (strictly), ``weights *= clamp((lam * retain / forget) ** exponent, min_factor,
    max_factor)``. Every selected factor is below ``lam / alpha``: with ``lam <= alpha`` the bound of 1 never binds.

    The product, the comparison and the factor are computed in the dtype of the importances, in this order: ``alpha *
    retain``; ``lam * retain``, ``/ forget``, ``** exponent``, the bounds. So a tie is decided in that dtype. The weight
    is multiplied in float32 (float64 for float64 weights) and rounded once.

    One pass over memory; besides a log of at most an eighth of the weights' size (kept while it runs, to undo the
    writes if an importance turns out bad), nothing is allocated.

    Args:
        weights: array of any shape; float64, float32, float16 or bfloat16; modified. NaN stays NaN.
        forget: importance for the forget set, same shape, float32 or float64, 0 or more. Infinite: factor 0.
        retain: importance for the retained, or for all, data, same shape and dtype. Infinite: never selected.
        alpha: selection weighting, 0 or more.
        lam: dampening constant, 0 or more.
        exponent: power of the ratio, 0 or more.
        max_factor: largest factor (``lower_bound`` in the published code).
        min_factor: smallest factor.

    Returns:
        Counts of selected, changed and zeroed weights.

    Raises:
        NonFiniteError, ArgumentError: an importance is NaN or negative, or both are infinite; a number is out of range.
        ShapeError, DTypeError, LayoutError, DeviceError: arrays that do not fit.
        Nothing has been modified then.

    Source: arXiv 2308.07707, equations 3 and 4, in the order of operations of the published code.
    """
    numbers = (alpha, lam, exponent, max_factor, min_factor)
    return _dampen(weights, forget, retain, _floats(numbers), (1.0, 1.0), False, False)[0]


def _floats(numbers: tuple[Any, Any, Any, Any, Any]) -> _Numbers:
    names = ("alpha", "lam", "exponent", "max_factor", "min_factor")
    found = []
    for name, v in zip(names, numbers, strict=True):
        try:
            found.append(float(v))
        except (TypeError, ValueError):
            raise ArgumentError(f"{name}: expected a number, got {v!r}") from None
    alpha, lam, exponent, max_factor, min_factor = found
    return alpha, lam, exponent, max_factor, min_factor


def _dampen(
    weights: Any,
    forget: Any,
    retain: Any,
    numbers: _Numbers,
    counts: tuple[float, float],
    record: bool,
    dry_run: bool,
) -> tuple[Selection, Any]:
    """One array: the counts, and what undoes it if ``record``."""
    path = device_path(weights, "dampen_array_")
    if path is not None:
        found, patch = path(weights, forget, retain, *numbers, *counts, record=record, dry_run=dry_run)
        return Selection(*found), patch
    forget, retain = source(forget, "forget"), source(retain, "retain")
    if dry_run:
        weights = source(weights, "weights")
        return Selection(*_native.dampen(weights, forget, retain, *numbers, *counts, False, True)[0]), None
    with target(weights, "weights") as w:
        found, patch = _native.dampen(w, forget, retain, *numbers, *counts, record, False)
    return Selection(*found), patch


@dataclass(frozen=True)
class DampenReport:
    """What :func:`dampen_` did, per tensor and in all; undoes it, prints it, plots it."""

    alpha: float
    lam: float
    exponent: float
    dry_run: bool
    #: Number of weights per tensor, in the model's order; tied weights once.
    sizes: dict[str, int]
    selected: dict[str, int]
    changed: dict[str, int]
    zeroed: dict[str, int]
    #: Other names of a tensor, where weights are tied.
    tied: dict[str, list[str]]
    _patches: dict[str, Any] | None = field(repr=False, default=None)

    @property
    def total(self) -> Selection:
        """Counts over all tensors."""
        return Selection(*(sum(v.values()) for v in (self.selected, self.changed, self.zeroed)))

    @property
    def size(self) -> int:
        """Weights looked at."""
        return sum(self.sizes.values())

    @property
    def statement(self) -> str:
        """In words, what alpha and lambda imply and what was found."""
        limit = (self.lam / self.alpha) ** self.exponent if self.alpha else float("inf")
        bound = f"every selected factor is below (lambda/alpha)^exponent = {limit:.3g}"
        if limit > 1:
            bound += ", and at most 1, so that some selected weights may stay as they are"
        elif self.exponent and self.alpha:
            bound += "; the bound of 1 never binds"
        total, verb = self.total, "would select" if self.dry_run else "selected"
        share = 100 * total.count / self.size if self.size else 0.0
        return (
            f"alpha = {self.alpha:g} and lambda = {self.lam:g} {verb} {total.count:,} of {self.size:,} weights "
            f"({share:.3g} %), changing {total.changed:,} and zeroing {total.zeroed:,}; {bound}."
        )

    def undo(self, model: Any) -> None:
        """Puts the old values of all selected weights back into ``model``, bit for bit.

        Weights that were not selected stay as they are now.

        Args:
            model: the module or mapping that was dampened, or one of the same names, shapes and dtypes.

        Raises:
            ArgumentError: the report was made with ``undo=False`` or ``dry_run=True``, or a name is missing.
            ShapeError, DTypeError, LayoutError: a tensor has another shape or dtype than the one that was dampened.
        """
        if self._patches is None:
            raise ArgumentError("undo: expected a report of dampen_(..., undo=True, dry_run=False)")
        parameters = named(model)
        missing = [n for n in self._patches if n not in parameters]
        if missing:
            raise ArgumentError(f"model: expected parameters {listed(missing)}, got {listed(parameters)}")
        for name, patch in self._patches.items():
            _restore(patch, parameters[name])

    def plot(self, ax: Any = None) -> Any:
        """Bars of the selected share per tensor (percent), the zeroed part marked; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(7, 0.6 + 0.25 * max(len(self.sizes), 3)), layout="constrained")
        names = list(self.sizes)
        for label, counts in (("selected", self.selected), ("zeroed", self.zeroed)):
            ax.barh(names, [100 * counts[n] / max(self.sizes[n], 1) for n in names], label=label)
        ax.invert_yaxis()
        ax.set_xlabel("weights (%)")
        ax.set_title(f"alpha = {self.alpha:g}, lambda = {self.lam:g}")
        ax.legend()
        return ax

    def __str__(self) -> str:
        return self.statement

    def _repr_html_(self) -> str:
        def row(name: str, size: int, s: Selection, tag: str = "td") -> str:
            cells = (html.escape(name), f"{size:,}", *(f"{v:,}" for v in s), f"{100 * s.count / max(size, 1):.3g} %")
            return "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"

        head = "".join(f"<th>{t}</th>" for t in ("parameter", "weights", "selected", "changed", "zeroed", "share"))
        rows = "".join(
            row(n, size, Selection(self.selected[n], self.changed[n], self.zeroed[n])) for n, size in self.sizes.items()
        )
        total = row("all", self.size, self.total, "th")
        return f"<p>{html.escape(self.statement)}</p><table><tr>{head}</tr>{rows}{total}</table>"


def _restore(patch: Any, weights: Any) -> None:
    if is_torch(weights):
        weights = weights.detach()
    if device_path(weights, "dampen_array_") is not None:
        patch.restore(weights)
        return
    with target(weights, "weights") as w:
        patch.restore(w)


class _Importance:
    """Sums and count of a Fisher, or a mapping of importances as they are."""

    def __init__(self, given: Any, arg: str) -> None:
        self.arg = arg
        self.fisher = given if isinstance(given, Fisher) else None
        if self.fisher is not None:
            if not self.fisher.count > 0:
                raise ArgumentError(f"{arg}: expected a Fisher that has seen gradients, got a count of 0")
            self.count = self.fisher.count
            self.arrays = {name: self.fisher.sum(name) for name in self.fisher}
        elif isinstance(given, Mapping):
            self.count = 1.0
            self.arrays = named(given, arg)
        else:
            raise DTypeError(f"{arg}: expected a Fisher or a mapping of name to array, got {type(given).__name__}")


def _pair(forget: Any, retain: Any) -> tuple[_Importance, _Importance]:
    f, d = _Importance(forget, "forget"), _Importance(retain, "retain")
    if f.fisher is not None and d.fisher is not None and f.fisher.unit != d.fisher.unit:
        raise ArgumentError(f"retain: expected unit {f.fisher.unit!r} as forget has, got {d.fisher.unit!r}")
    if (f.fisher is None) != (d.fisher is None):
        raise DTypeError("retain: expected the same kind of importance as forget (two Fisher or two mappings)")
    if f.arrays.keys() != d.arrays.keys():
        differing = listed(f.arrays.keys() ^ d.arrays.keys())
        raise ArgumentError(f"retain: expected the names of forget, got a difference in {differing}")
    return f, d


def _check_importances(f: _Importance, d: _Importance, name: str) -> None:
    """Shapes and dtypes agree; values too are checked where they are not a Fisher's, which guarantees them."""
    a, b = f.arrays[name], d.arrays[name]
    if tuple(a.shape) != tuple(b.shape):
        raise ShapeError(f"retain: {name!r}: expected shape {tuple(a.shape)}, got {tuple(b.shape)}")
    if str(a.dtype).removeprefix("torch.") != str(b.dtype).removeprefix("torch."):
        raise DTypeError(f"retain: {name!r}: expected dtype {a.dtype}, got {b.dtype}")
    if f.fisher is None and device_path(a, "dampen_array_") is None:
        try:
            _native.check_importances(source(a, "forget"), source(b, "retain"))
        except ValueError as err:
            raise type(err)(f"{name!r}: {err}") from None


def _check_weights(name: str, w: Any, importance: Any) -> None:
    if tuple(w.shape) != tuple(importance.shape):
        raise ShapeError(f"forget: {name!r}: expected shape {tuple(w.shape)}, got {tuple(importance.shape)}")
    dtype = str(w.dtype).removeprefix("torch.")
    if dtype not in ("float64", "float32", "float16", "bfloat16"):
        raise DTypeError(f"model: {name!r}: expected dtype float64, float32, float16 or bfloat16, got {dtype}")
    if isinstance(w, np.ndarray) and not w.flags.writeable:
        raise LayoutError(f"model: {name!r}: the array is read-only")


def _resolve_lam(alpha: float, lam: float, ratio: float | None) -> float:
    if ratio is None:
        return lam
    if lam != 1.0:
        raise ArgumentError(f"ratio: expected lam to be left alone where ratio is given, got lam={lam}")
    return float(ratio) * alpha


def dampen_(
    model: Any,
    forget: Fisher | Mapping[str, Any],
    retain: Fisher | Mapping[str, Any],
    alpha: float = 10.0,
    lam: float = 1.0,
    *,
    exponent: float = 1.0,
    ratio: float | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> DampenReport:
    """Dampens the parameters of a model in place; see :func:`dampen_array_` for the rule.

    Everything that has a name in ``named_parameters()`` is dampened, biases and normalisation weights too; buffers
    (running means) are not. Weights that are tied are dampened once.

    Args:
        model: a torch module, or a mapping of name to array (NumPy or torch). Parameters that require grad are fine.
        forget: importance for the forget set: a :class:`Fisher`, or a mapping of name to array.
        retain: importance for the retained data, or for all the data as published, of the same unit and batch size.
        alpha: selection weighting. The published values are 10 (ResNet-18) and 5 to 25 (ViT).
        lam: dampening constant.
        exponent: power of the ratio.
        ratio: ``lam / alpha``, the bound of all factors, in place of ``lam``.
        include: patterns with shell wildcards; only parameters that match one are dampened.
        exclude: patterns of parameters to leave alone.
        dry_run: count, but write nothing.
        undo: keep the old values of the selected weights (a bit per weight and one value per selected weight) for
            :meth:`DampenReport.undo`. With ``undo=False``, an interrupt between two tensors leaves the first dampened.

    Returns:
        Counts per tensor, and what they mean.

    Raises:
        ArgumentError: names that do not match, a number out of range, a pattern that matches nothing.
        ShapeError, DTypeError, LayoutError, DeviceError: a tensor that does not fit.
        NonFiniteError, ArgumentError: bad values in importances given as mappings.
        Nothing has been modified then.

    Warns:
        UserWarning: nothing was selected where nothing can be: per-sample importances whose second set includes the
            first have ``I_f / I_D <= |D| / |F|``.

    Source: arXiv 2308.07707, algorithm 1.
    """
    alpha, lam, exponent, *_ = _floats((alpha, lam, exponent, 1.0, 0.0))
    lam = _resolve_lam(alpha, lam, ratio)
    f, d = _pair(forget, retain)
    parameters = named(model)
    plan, tied = _plan(parameters, f, d, include, exclude)
    numbers, counts = (alpha, lam, exponent, 1.0, 0.0), (f.count, d.count)
    found: dict[str, Selection] = {}
    patches: dict[str, Any] = {}
    try:
        for name in plan:
            w = parameters[name].detach() if is_torch(parameters[name]) else parameters[name]
            done = _dampen(w, f.arrays[name], d.arrays[name], numbers, counts, undo and not dry_run, dry_run)
            found[name], patches[name] = done
    except BaseException:
        for name, patch in patches.items():
            if patch is not None:
                _restore(patch, parameters[name])
        raise
    report = DampenReport(
        alpha=alpha,
        lam=lam,
        exponent=exponent,
        dry_run=dry_run,
        sizes={n: int(np.prod(parameters[n].shape)) for n in plan},
        selected={n: s.count for n, s in found.items()},
        changed={n: s.changed for n, s in found.items()},
        zeroed={n: s.zeroed for n, s in found.items()},
        tied=tied,
        _patches=patches if undo and not dry_run else None,
    )
    _warn_if_impossible(f, d, alpha, report)
    return report


def _plan(
    parameters: dict[str, Any],
    f: _Importance,
    d: _Importance,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
) -> tuple[list[str], dict[str, list[str]]]:
    """Names to dampen and their other names, after every check that can be made before writing."""
    groups = ties(parameters)
    leaders = {next((n for n in group if n in f.arrays), group[0]): group for group in groups}
    unknown = f.arrays.keys() - parameters.keys()
    if unknown:
        raise ArgumentError(f"forget: expected the parameters of the model, got unknown {listed(unknown)}")
    plan = chosen(leaders, include, exclude)
    missing = [n for n in plan if n not in f.arrays]
    if missing:
        raise ArgumentError(f"forget: expected an importance for every parameter, got none for {listed(missing)}")
    for name in plan:
        _check_weights(name, parameters[name], f.arrays[name])
    for name in plan:
        _check_importances(f, d, name)
    tied = {name: [n for n in leaders[name] if n != name] for name in plan if len(leaders[name]) > 1}
    return plan, tied


def _warn_if_impossible(f: _Importance, d: _Importance, alpha: float, report: DampenReport) -> None:
    if f.fisher is None or f.fisher.unit != "sample" or report.total.count or not report.size:
        return
    if d.count / f.count <= alpha:
        warnings.warn(
            f"nothing was selected: if retain includes the forget set (all the data), I_f / I_D is at most "
            f"|D| / |F| = {d.count / f.count:g}, not above alpha = {alpha:g}; lower alpha, or take the forget set away "
            "from retain with Fisher.subtract",
            stacklevel=3,
        )


@dataclass(frozen=True)
class SelectionCurve:
    """How many of ``size`` weights each alpha selects."""

    alphas: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]
    size: int

    def plot(self, ax: Any = None) -> Any:
        """Selected share (percent) against alpha, both axes logarithmic; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        ax.loglog(self.alphas, 100 * self.counts / max(self.size, 1), marker=".")
        ax.set_xlabel("alpha")
        ax.set_ylabel("selected weights (%)")
        return ax

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{a:g}</td><td>{c:,}</td><td>{100 * c / max(self.size, 1):.3g} %</td></tr>"
            for a, c in zip(self.alphas, self.counts, strict=True)
        )
        return f"<table><tr><th>alpha</th><th>selected</th><th>share</th></tr>{rows}</table>"


def selection_curve(
    forget: Any,
    retain: Any,
    alphas: Sequence[float] | np.ndarray[Any, Any] | None = None,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> SelectionCurve:
    """How many weights :func:`dampen_` would select for each alpha, from one pass over the importances.

    Args:
        forget: a :class:`Fisher`, a mapping of name to array, or one array (float32 or float64).
        retain: the same kind of thing.
        alphas: selection weightings in any order, 0 or more; by default 1 to 10,000 in 33 equal ratios.
        include: patterns with shell wildcards; only parameters that match one are counted.
        exclude: patterns of parameters to leave out.

    Returns:
        Counts, exactly those of :func:`dampen_` at each alpha.

    Raises:
        ArgumentError, NonFiniteError, ShapeError, DTypeError, DeviceError: as :func:`dampen_`.
    """
    grid = np.geomspace(1.0, 1e4, 33) if alphas is None else np.asarray(alphas, dtype=np.float64)
    if grid.ndim != 1:
        raise ShapeError(f"alphas: expected one axis, got shape {grid.shape}")
    if not isinstance(forget, (Fisher, Mapping)):
        forget, retain = {"array": forget}, {"array": retain}
    f, d = _pair(forget, retain)
    counts = np.zeros(len(grid), dtype=np.int64)
    size = 0
    for name in chosen(f.arrays, include, exclude):
        a, b = f.arrays[name], d.arrays[name]
        path = device_path(a, "selection_curve")
        if path is None:
            a, b, path = source(a, "forget"), source(b, "retain"), _native.selection_curve
        counts += np.asarray(path(a, b, grid.tolist(), f.count, d.count), dtype=np.int64)
        size += int(np.prod(a.shape))
    return SelectionCurve(grid, counts, size)
