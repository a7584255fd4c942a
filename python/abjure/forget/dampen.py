"""Selective Synaptic Dampening (Foster, Schoepf, Brintrup: arXiv 2308.07707) on arrays and on whole models."""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from .. import _native
from .._interop import device_path, is_torch, source, target
from ..errors import AbjureError, ArgumentError, DTypeError, LayoutError, ShapeError
from .adaptive import AdaptiveAlpha, pooled_alpha, resolve_share, share_percentile
from .fisher import Fisher
from .pairs import Importance, by_name, check_alike, pair
from .params import chosen, listed, modules, named, ties
from .patch import DampenPatch, held_interrupt


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
    numbers = _floats(numbers)
    path = device_path(weights, "dampen_array_")
    if path is not None:
        return Selection(*path(weights, forget, retain, *numbers, 1.0, 1.0)[0])
    forget, retain = source(forget, "forget"), source(retain, "retain")
    with held_interrupt(), target(weights, "weights") as w:
        return Selection(*_native.dampen(w, forget, retain, *numbers, 1.0, 1.0, False, False)[0])


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


class ModuleCounts(NamedTuple):
    """Weights of one module: how many there are, were selected, changed, and became 0."""

    size: int
    selected: int
    changed: int
    zeroed: int


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
    #: How alpha was found, where it was ``"adaptive"``.
    adaptive: AdaptiveAlpha | None = None
    #: Places and old bits of what changed; None after ``undo=False`` or ``dry_run=True``.
    patch: DampenPatch | None = field(repr=False, default=None)

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

    def by_module(self, depth: int | None = None) -> dict[str, ModuleCounts]:
        """Counts per module that holds parameters, in the model's order.

        Args:
            depth: leading parts of the module names to tell apart (``1``: top-level blocks); None for all.

        Raises:
            ArgumentError: a depth below 1.
        """
        found: dict[str, ModuleCounts] = {}
        for module, names in modules(self.sizes, depth).items():
            counts = (sum(c[n] for n in names) for c in (self.sizes, self.selected, self.changed, self.zeroed))
            found[module] = ModuleCounts(*counts)
        return found

    def undo(self, model: Any) -> None:
        """Puts the old bits of everything that changed back into ``model``.

        What did not change stays as it is now.

        Args:
            model: the module or mapping that was dampened, or one of the same names, shapes and dtypes.

        Raises:
            ArgumentError: the report was made with ``undo=False`` or ``dry_run=True``, or a name is missing.
            ShapeError, DTypeError, LayoutError: a tensor has another shape or dtype than the one that was dampened.
        """
        if self.patch is None:
            raise ArgumentError("undo: expected a report of dampen_(..., undo=True, dry_run=False)")
        self.patch.restore(model)

    def without_undo(self) -> DampenReport:
        """The same report without the patch, whose memory it then no longer holds."""
        return replace(self, patch=None)

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
        return f"{self.adaptive}. {self.statement}" if self.adaptive else self.statement

    def _repr_html_(self) -> str:
        def row(name: str, size: int, s: Selection, tag: str = "td") -> str:
            cells = (html.escape(name), f"{size:,}", *(f"{v:,}" for v in s), f"{100 * s.count / max(size, 1):.3g} %")
            return "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"

        head = "".join(f"<th>{t}</th>" for t in ("parameter", "weights", "selected", "changed", "zeroed", "share"))
        rows = "".join(
            row(n, size, Selection(self.selected[n], self.changed[n], self.zeroed[n])) for n, size in self.sizes.items()
        )
        total = row("all", self.size, self.total, "th")
        return f"<p>{html.escape(str(self))}</p><table><tr>{head}</tr>{rows}{total}</table>"


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
    retain: Fisher | Mapping[str, Any] | None = None,
    alpha: float | str | AdaptiveAlpha = 10.0,
    lam: float = 1.0,
    *,
    full: Fisher | Mapping[str, Any] | None = None,
    exponent: float = 1.0,
    ratio: float | None = None,
    min_factor: float = 0.0,
    forget_size: float | None = None,
    total_size: float | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> DampenReport:
    """Dampens the parameters of a model in place; see :func:`dampen_array_` for the rule.

    Everything that has a name in ``named_parameters()`` is dampened, biases and normalisation weights too; buffers
    (running means) are not. Weights that are tied are dampened once.

    All tensors go through one native call, which either does all of it or nothing. Ctrl-C is held back meanwhile: the
    model is then as it was (with ``undo=True``), or dampened in full (with ``undo=False``).

    Args:
        model: a torch module, or a mapping of name to array (NumPy or torch). Parameters that require grad are fine.
        forget: importance for the forget set: a :class:`Fisher`, or a mapping of name to array.
        retain: importance for the retained data, of the same unit, power and batch size.
        alpha: selection weighting; ``"adaptive"`` for :func:`adaptive_alpha` (give the sizes). The published values are
            10 (ResNet-18) and 5 to 25 (ViT).
        lam: dampening constant.
        full: importance for all the data, forget set included, in place of ``retain``, as the published code has it.
        exponent: power of the ratio.
        ratio: ``lam / alpha``, the bound of all factors, in place of ``lam``.
        min_factor: smallest factor: above 0 no weight is erased.
        forget_size: number of samples to forget, for ``alpha="adaptive"``.
        total_size: number of samples in all.
        include: patterns with shell wildcards; only parameters that match one are dampened (and pooled).
        exclude: patterns of parameters to leave alone.
        dry_run: count, but write nothing.
        undo: keep places and old bits of what changes for :meth:`DampenReport.undo` (``report.patch``).

    Returns:
        Counts per tensor, and what they mean.

    Raises:
        ArgumentError: names, units or powers that do not match, a number out of range, a pattern that matches nothing,
            not exactly one of ``retain`` and ``full``, a second importance that is 0 everywhere.
        ShapeError, DTypeError, LayoutError, DeviceError: a tensor that does not fit.
        NonFiniteError, ArgumentError: bad values in importances given as mappings.
        Nothing has been modified then.

    Warns:
        UserWarning: ``alpha >= |D| / |F|`` with per-sample importances of which the second includes the first: nothing
            can be selected then, since ``I_f / I_D <= |D| / |F|``. For ``full=`` always, for ``retain=`` where nothing
            was selected.

    Source: arXiv 2308.07707, algorithm 1.
    """
    if (retain is None) == (full is None):
        found = "both" if full is not None else "neither"
        raise ArgumentError(f"retain, full: expected exactly one of the two, got {found}")
    f, d = pair(forget, retain if full is None else full)
    parameters = named(model)
    plan, tied = _plan(parameters, f, d, include, exclude)
    adaptive = None
    if isinstance(alpha, str):
        if alpha != "adaptive":
            raise ArgumentError(f"alpha: expected a number or 'adaptive', got {alpha!r}")
        share = resolve_share(forget_size, total_size)
        adaptive = alpha = pooled_alpha(f, d, plan, share, share_percentile(share))
    elif isinstance(alpha, AdaptiveAlpha):
        adaptive = alpha
    alpha, lam, exponent, _, min_factor = _floats((alpha, lam, exponent, 1.0, min_factor))
    lam = _resolve_lam(alpha, lam, ratio)
    numbers = (alpha, lam, exponent, 1.0, min_factor)
    done = _dampen_all(parameters, plan, f, d, numbers, undo, dry_run)
    report = DampenReport(
        alpha=alpha,
        lam=lam,
        exponent=exponent,
        dry_run=dry_run,
        sizes={n: math.prod(parameters[n].shape) for n in plan},
        selected={n: s.count for n, (s, _) in done.items()},
        changed={n: s.changed for n, (s, _) in done.items()},
        zeroed={n: s.zeroed for n, (s, _) in done.items()},
        tied=tied,
        adaptive=adaptive,
        patch=DampenPatch({n: p for n, (_, p) in done.items()}) if undo and not dry_run else None,
    )
    _warn_if_impossible(f, d, alpha, report, full is not None)
    return report


def _dampen_all(
    parameters: dict[str, Any],
    plan: list[str],
    f: Importance,
    d: Importance,
    numbers: _Numbers,
    undo: bool,
    dry_run: bool,
) -> dict[str, tuple[Selection, Any]]:
    """Counts and patch of every tensor; on any error, and on Ctrl-C with ``undo``, the tensors are as they were."""
    weights = {n: p.detach() if is_torch(p) else p for n, p in ((n, parameters[n]) for n in plan)}
    elsewhere = [n for n, w in weights.items() if device_path(w, "dampen_array_") is not None]
    here = [n for n in plan if n not in elsewhere] if elsewhere else plan
    done: dict[str, tuple[Selection, Any]] = {}
    with held_interrupt() as interrupt:
        try:
            for name in elsewhere:
                path = device_path(weights[name], "dampen_array_")
                assert path is not None
                arrays = (weights[name], f.arrays[name], d.arrays[name])
                try:
                    found, patch = path(*arrays, *numbers, f.count, d.count, record=not dry_run, dry_run=dry_run)
                except AbjureError as err:
                    raise type(err)(f"{name!r}: {err}") from None
                done[name] = Selection(*found), patch
            done.update(_dampen_here(weights, here, f, d, numbers, undo, dry_run))
        except BaseException:
            DampenPatch({n: p for n, (_, p) in done.items() if p is not None}).restore(weights)
            raise
        if interrupt.pending and undo and not dry_run:
            DampenPatch({n: p for n, (_, p) in done.items()}).restore(weights)
    return {n: done[n] for n in plan}


def _dampen_here(
    weights: dict[str, Any],
    names: list[str],
    f: Importance,
    d: Importance,
    numbers: _Numbers,
    undo: bool,
    dry_run: bool,
) -> dict[str, tuple[Selection, Any]]:
    """The tensors in CPU memory, in one call."""
    forget, retain = ([source(i.arrays[n], i.arg) for n in names] for i in (f, d))
    with ExitStack() as written:
        # Temporaries of arrays that are not made of rows are copied back when this section ends without an error.
        arrays = [
            source(weights[n], "weights") if dry_run else written.enter_context(target(weights[n], "weights"))
            for n in names
        ]
        try:
            found = _native.dampen_all(arrays, forget, retain, *numbers, f.count, d.count, undo, dry_run)
        except AbjureError as err:
            raise by_name(err, names) from None
    return {n: (Selection(*counts), patch) for n, (counts, patch) in zip(names, found, strict=True)}


def _plan(
    parameters: dict[str, Any],
    f: Importance,
    d: Importance,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
) -> tuple[list[str], dict[str, list[str]]]:
    """Names to dampen and their other names, after every check that needs no look at the values."""
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
    check_alike(f, d, plan)
    tied = {name: [n for n in leaders[name] if n != name] for name in plan if len(leaders[name]) > 1}
    return plan, tied


def _warn_if_impossible(f: Importance, d: Importance, alpha: float, report: DampenReport, full: bool) -> None:
    if f.fisher is None or f.fisher.unit != "sample" or not report.size or d.count / f.count > alpha:
        return
    if not full and report.total.count:
        return
    what = "full includes" if full else "nothing was selected: if retain includes"
    warnings.warn(
        f"{what} the forget set (all the data), so that I_f / I_D is at most |D| / |F| = {d.count / f.count:g}, not "
        f"above alpha = {alpha:g}; lower alpha, or take the forget set away with Fisher.subtract",
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
    f, d = pair(forget, retain)
    counts = np.zeros(len(grid), dtype=np.int64)
    size = 0
    names = chosen(f.arrays, include, exclude)
    check_alike(f, d, names)
    for name in names:
        a, b = f.arrays[name], d.arrays[name]
        path = device_path(a, "selection_curve")
        if path is None:
            a, b, path = source(a, "forget"), source(b, "retain"), _native.selection_curve
        counts += np.asarray(path(a, b, grid.tolist(), f.count, d.count), dtype=np.int64)
        size += math.prod(a.shape)
    return SelectionCurve(grid, counts, size)
