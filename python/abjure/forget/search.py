"""How much to dampen: a grid over alpha and lambda from one importance pass, and Potion's search of a share."""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError, DTypeError, NonFiniteError
from .adaptive import adaptive_alpha, resolve_share
from .dampen import DampenReport, dampen_, selection_curve
from .fisher import Fisher

#: Selection weightings tried where none are given.
ALPHAS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


@dataclass(frozen=True)
class SearchPoint:
    """What one pair (alpha, lambda) does."""

    alpha: float
    lam: float
    selected: int
    changed: int
    zeroed: int
    #: Score on what is to be forgotten (lower is better) and on what is to be kept (higher is better).
    forget: float
    retain: float
    #: Further scores that ``evaluate`` gave.
    extra: dict[str, float]

    @property
    def ratio(self) -> float:
        """``lam / alpha``, the bound of all factors."""
        return self.lam / self.alpha if self.alpha else math.inf


@dataclass(frozen=True)
class DampenSearch:
    """The trade-off between forgetting and keeping over a grid of alphas and lambdas."""

    #: In the order of the search: alphas outside, lambdas or ratios inside.
    points: list[SearchPoint]
    #: Scores of the model as it was.
    before: SearchPoint

    @property
    def curve(self) -> list[SearchPoint]:
        """The points that no other beats on one side without losing on the other, by falling forget score."""
        ordered = sorted(self.points, key=lambda p: (p.forget, -p.retain, p.changed))
        best, found = -math.inf, []
        for p in ordered:
            if p.retain > best:
                best = p.retain
                found.append(p)
        return found[::-1]

    def best(
        self,
        key: Callable[[SearchPoint], float] | None = None,
        *,
        forget_at_most: float | None = None,
        retain_at_least: float | None = None,
    ) -> SearchPoint:
        """The point with the largest ``key`` among those within the limits; of equal ones, that which changes least.

        Args:
            key: number to make large; ``retain - forget`` by default.
            forget_at_most: largest score allowed on what is to be forgotten.
            retain_at_least: smallest score allowed on what is to be kept.

        Raises:
            ArgumentError: no point is within the limits.
        """
        key = key or (lambda p: round(p.retain - p.forget, 12))
        allowed = [
            p
            for p in self.points
            if (forget_at_most is None or p.forget <= forget_at_most)
            and (retain_at_least is None or p.retain >= retain_at_least)
        ]
        if not allowed:
            raise ArgumentError(
                f"forget_at_most, retain_at_least: expected limits that a point meets, got {forget_at_most} and "
                f"{retain_at_least}"
            )
        return max(allowed, key=lambda p: (key(p), -p.changed, -p.selected, p.alpha))

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        extra = list(self.before.extra)
        head = ["alpha", "lambda", "lambda/alpha", "selected", "changed", "zeroed", "forget", "retain", *extra, ""]
        on_curve, best = {id(p) for p in self.curve}, self.best()
        rows = [["-", "-", "-", "0", "0", "0", *_scores(self.before), "before"]]
        for p in self.points:
            mark = "best" if p is best else "curve" if id(p) in on_curve else ""
            counts = (f"{n:,}" for n in (p.selected, p.changed, p.zeroed))
            rows.append([f"{p.alpha:.6g}", f"{p.lam:.6g}", f"{p.ratio:.3g}", *counts, *_scores(p), mark])
        return head, rows

    def __str__(self) -> str:
        head, rows = self._cells()
        widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in (head, *rows))

    def _repr_html_(self) -> str:
        head, rows = self._cells()
        cells = ["".join(f"<th>{html.escape(c)}</th>" for c in head)]
        cells += ["".join(f"<td>{html.escape(c)}</td>" for c in row) for row in rows]
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"

    def plot(self, ax: Any = None) -> Any:
        """Retain score against forget score, the curve joined and labelled with alpha; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        ax.scatter([p.forget for p in self.points], [p.retain for p in self.points], s=18, label="tried")
        curve = self.curve
        ax.plot([p.forget for p in curve], [p.retain for p in curve], marker="o", label="best trade-offs")
        ax.scatter([self.before.forget], [self.before.retain], marker="x", color="black", label="before")
        for p in curve:
            ax.annotate(f"{p.alpha:.3g}, {p.lam:.3g}", (p.forget, p.retain), textcoords="offset points", xytext=(4, 4))
        ax.set_xlabel("score on the forget set")
        ax.set_ylabel("score on the retained set")
        ax.set_title("alpha, lambda")
        ax.legend()
        return ax


def _scores(p: SearchPoint) -> list[str]:
    return [f"{v:.4f}" for v in (p.forget, p.retain, *p.extra.values())]


def _evaluated(evaluate: Callable[[Any], Any], model: Any) -> tuple[float, float, dict[str, float]]:
    found = evaluate(model)
    if isinstance(found, Mapping):
        if not {"forget", "retain"} <= found.keys():
            raise ArgumentError(f"evaluate: expected scores 'forget' and 'retain', got {sorted(found)}")
        extra = {k: float(v) for k, v in found.items() if k not in ("forget", "retain")}
        forget, retain = float(found["forget"]), float(found["retain"])
    else:
        try:
            forget, retain = (float(v) for v in found)
        except (TypeError, ValueError):
            raise DTypeError(f"evaluate: expected a pair of scores or a mapping of them, got {found!r}") from None
        extra = {}
    if not (math.isfinite(forget) and math.isfinite(retain)):
        raise NonFiniteError(f"evaluate: expected finite scores, got {forget} and {retain}")
    return forget, retain, extra


def _grid(name: str, values: Iterable[float], lowest: float) -> list[float]:
    found = [float(v) for v in values]
    if not found or not all(math.isfinite(v) and v >= lowest for v in found):
        raise ArgumentError(f"{name}: expected finite numbers of {lowest:g} or more, at least one, got {found}")
    return found


def search_dampening(
    model: Any,
    forget: Fisher | Mapping[str, Any],
    retain: Fisher | Mapping[str, Any] | None,
    evaluate: Callable[[Any], Any],
    alphas: Sequence[float] | None = None,
    lams: Sequence[float] | None = None,
    *,
    ratios: Sequence[float] | None = None,
    full: Fisher | Mapping[str, Any] | None = None,
    exponent: float = 1.0,
    min_factor: float = 0.0,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    progress: bool = True,
) -> DampenSearch:
    """Tries every pair of alpha and lambda on the model, from one pair of importances.

    Between points the model is restored to the bit, through the patch of what changed; at the end, after an error and
    after Ctrl-C too it is as it was. A point that would change the model exactly as an earlier one did is not evaluated
    again: selections of rising alpha are nested, and the factors depend on lambda alone.

    Args:
        model: a torch module, or a mapping of name to array.
        forget: importance for the forget set.
        retain: importance for the retained data; None with ``full``.
        evaluate: ``evaluate(model)`` gives (score on the forget set, score on the retained set), say accuracies on
            held-out data, or a mapping with ``"forget"``, ``"retain"`` and any further scores. It leaves the parameters
            alone.
        alphas: selection weightings; 1 to 100 in seven steps by default.
        lams: dampening constants; 1 by default.
        ratios: in place of ``lams``, values of ``lam / alpha``.
        full: importance for all the data, in place of ``retain``.
        exponent: power of the ratio.
        min_factor: smallest factor.
        include: patterns with shell wildcards; only parameters that match one are dampened.
        exclude: patterns of parameters to leave alone.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        All points and the trade-off curve: ``print`` it, ``.plot()`` it, ask it for ``.best()``.

    Raises:
        ArgumentError: both ``lams`` and ``ratios``, an empty grid, scores that are missing.
        DTypeError, NonFiniteError: scores that are not finite numbers.
        Anything that :func:`dampen_` or ``evaluate`` raises.
    """
    if lams is not None and ratios is not None:
        raise ArgumentError("lams, ratios: expected at most one of the two, got both")
    grid = _grid("alphas", ALPHAS if alphas is None else alphas, 0.0)
    inner = _grid("lams", (1.0,) if lams is None else lams, 0.0) if ratios is None else _grid("ratios", ratios, 0.0)
    from tqdm.auto import tqdm

    options: dict[str, Any] = {"exponent": exponent, "min_factor": min_factor, "include": include, "exclude": exclude}
    # Every refusal comes before the first evaluation.
    dampen_(model, forget, retain, grid[0], full=full, dry_run=True, **options)
    second = retain if full is None else full
    counts = selection_curve(forget, second, grid, include=include, exclude=exclude).counts
    before = SearchPoint(math.nan, math.nan, 0, 0, 0, *_evaluated(evaluate, model))
    seen: dict[tuple[int, float], SearchPoint] = {}
    points = []
    pairs = [(a, n, v if ratios is None else v * a) for a, n in zip(grid, counts, strict=True) for v in inner]
    for alpha, count, lam in tqdm(pairs, desc="alpha, lambda", unit="point", disable=None if progress else True):
        key = int(count), lam if count else 0.0
        if key not in seen:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                report = dampen_(model, forget, retain, alpha, lam, full=full, **options)
            try:
                scores = _evaluated(evaluate, model) if count else (before.forget, before.retain, before.extra)
            finally:
                report.undo(model)
            seen[key] = SearchPoint(alpha, lam, *report.total, *scores)
        old = seen[key]
        counted = (old.selected, old.changed, old.zeroed)
        points.append(SearchPoint(alpha, lam, *counted, old.forget, old.retain, old.extra))
    return DampenSearch(points, before)


@dataclass(frozen=True)
class ShareStep:
    """One share that Potion's search tried."""

    share: float
    percentile: float
    alpha: float
    selected: int
    accuracy: float


@dataclass(frozen=True)
class PotionReport:
    """What :func:`potion_` tried, and the dampening that it kept."""

    #: Accuracy on the flagged set before.
    before: float
    rho: float
    steps: list[ShareStep]
    #: The dampening that is now in the model; None where no share was large enough (the model is as it was).
    report: DampenReport | None

    @property
    def reached(self) -> bool:
        """Whether accuracy on the flagged set fell to ``rho`` times its original value."""
        return self.report is not None

    def undo(self, model: Any) -> None:
        """Restores the model as :meth:`DampenReport.undo` does; nothing to do where the goal was not reached."""
        if self.report is not None:
            self.report.undo(model)

    def __str__(self) -> str:
        last = self.steps[-1]
        found = "reached" if self.reached else "not reached"
        return (
            f"{found} after {len(self.steps)} shares: share {last.share:.4g} (percentile {last.percentile:.6g}, alpha "
            f"{last.alpha:.4g}) selects {last.selected:,} weights; accuracy on the flagged set {last.accuracy:.4f}, "
            f"was {self.before:.4f}, goal {self.rho:g} times that."
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{t}</th>" for t in ("share", "percentile", "alpha", "selected", "accuracy"))
        rows = "".join(
            f"<tr><td>{s.share:.4g}</td><td>{s.percentile:.6g}</td><td>{s.alpha:.4g}</td><td>{s.selected:,}</td>"
            f"<td>{s.accuracy:.4f}</td></tr>"
            for s in self.steps
        )
        return f"<p>{html.escape(str(self))}</p><table><tr>{head}</tr>{rows}</table>"

    def plot(self, ax: Any = None) -> Any:
        """Accuracy on the flagged set against the share, with the goal; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        ax.semilogx([s.share for s in self.steps], [s.accuracy for s in self.steps], marker=".")
        ax.axhline(self.rho * self.before, linestyle="--", color="grey", label=f"{self.rho:g} of the original")
        ax.set_xlabel("share")
        ax.set_ylabel("accuracy on the flagged set")
        ax.legend()
        return ax


def potion_(
    model: Any,
    forget: Fisher | Mapping[str, Any],
    retain: Fisher | Mapping[str, Any],
    accuracy: Callable[[Any], float],
    rho: float,
    *,
    forget_size: float | None = None,
    total_size: float | None = None,
    start: float | None = None,
    growth: float = 1.1,
    tries: int = 500,
    lam: float = 1.0,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    undo: bool = True,
    progress: bool = True,
) -> PotionReport:
    """Dampens by the smallest share that makes the flagged samples forgotten (Poison Trigger Neutralisation search).

    The share takes the place of ``|F| / |D|`` in the percentile of :func:`adaptive_alpha`, since nobody knows how many
    poisoned samples there are. It grows from ``start`` by ``growth`` until the accuracy on the flagged set is at most
    ``rho`` times what it was. One pair of importances serves all shares, and each attempt starts from the model as it
    was, restored to the bit.

    With importances of ``output_norm`` and power 1 this is Potion's outlier-resistant form: the gradient of a norm is
    bounded by the Jacobian and not weighted by the size of the outputs. Any other importances do as well.

    Args:
        model: a torch module, or a mapping of name to array.
        forget: importance for the flagged samples.
        retain: importance for the others, poisoned ones that nobody flagged included.
        accuracy: ``accuracy(model)`` on the flagged samples, with the labels that the model was trained on.
        rho: share of the original accuracy to fall to, 0 to 1. The published runs use 0 to 0.75 and default to 0.
        forget_size: number of flagged samples.
        total_size: number of samples in all.
        start: first share; by default ``forget_size / total_size / 25``, as published.
        growth: factor from one share to the next.
        tries: shares tried at most.
        lam: dampening constant.
        include: patterns with shell wildcards; only parameters that match one are pooled and dampened.
        exclude: patterns of parameters to leave alone.
        undo: keep what :meth:`PotionReport.undo` needs.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        The shares tried and the dampening kept.

    Raises:
        ArgumentError: a number out of range, or neither sizes nor ``start``.
        NonFiniteError: an accuracy is not finite. The model is as it was then.
        Anything that :func:`dampen_` or ``accuracy`` raises; the model is as it was then.

    Warns:
        UserWarning: no share was large enough; the model is as it was.

    Source: arXiv 2406.09173 and its code.
    """
    if not 0 <= rho <= 1:
        raise ArgumentError(f"rho: expected a number from 0 to 1, got {rho}")
    if not (math.isfinite(growth) and growth > 1):
        raise ArgumentError(f"growth: expected a finite number above 1, got {growth}")
    if tries < 1:
        raise ArgumentError(f"tries: expected 1 or more, got {tries}")
    if start is not None and (forget_size is not None or total_size is not None):
        raise ArgumentError("start, forget_size, total_size: expected either start or the sizes, got both")
    share = resolve_share(forget_size, total_size) / 25 if start is None else float(start)
    largest = math.expm1(100.0) / 100.0
    if not 0 < share <= largest:
        raise ArgumentError(f"start: expected a number above 0, at most {largest:.3g}, got {share}")
    from tqdm.auto import tqdm

    options: dict[str, Any] = {"include": include, "exclude": exclude}
    # Every refusal comes before the first evaluation.
    dampen_(model, forget, retain, 1.0, lam, dry_run=True, **options)
    before = _finite(accuracy(model))
    steps: list[ShareStep] = []
    for _ in tqdm(range(tries), desc="share", unit="try", disable=None if progress else True):
        alpha = adaptive_alpha(forget, retain, share=share, **options)
        report = dampen_(model, forget, retain, alpha, lam, **options)
        selected = report.total.count
        reached = False
        try:
            # The same selection gives the same model.
            same = bool(steps) and selected == steps[-1].selected
            score = steps[-1].accuracy if same else _finite(accuracy(model))
            steps.append(ShareStep(share, alpha.percentile, alpha.value, selected, score))
            reached = score <= rho * before
        finally:
            if not reached:
                report.undo(model)
        if reached:
            kept = report if undo else report.without_undo()
            return PotionReport(before, rho, steps, kept)
        share *= growth
        if share > largest:
            break
    warnings.warn(
        f"no share up to {steps[-1].share:.3g} brought the accuracy on the flagged set to {rho:g} times {before:.4g}; "
        "the model is as it was",
        stacklevel=2,
    )
    return PotionReport(before, rho, steps, None)


def _finite(value: float) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise NonFiniteError(f"accuracy: expected a finite number, got {value}")
    return value
