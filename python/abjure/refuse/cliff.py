"""The refusal cliff: the score of a refusal probe at every token, and its fall at the end (arXiv 2510.06036).

A reasoning model may hold a high refusal score through its chain of thought and lose it in the last tokens before the
answer. Here are the curve, the depth and the start of that fall, and the ranking of training examples by it
(Cliff-as-a-Judge); which attention heads cause it is in :mod:`abjure.refuse.heads`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .._interop import is_torch
from ..errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from .directions import Direction, Site, Vector, _finite, _to_numpy, orthonormal_basis, project, single_vector
from .hooks import _check_width, check_site
from .prompts import Prompts
from .record import Rows, run_recording

if TYPE_CHECKING:
    from torch import nn

Plateau = Literal["max", "median_top_decile"] | tuple[int | None, int | None]
Final = Literal["last"] | int
Span = Literal["all", "post_instruction"]
By = Literal["drop", "final"]
Align = Literal["right", "left", "relative"]
Integers = npt.NDArray[np.int64]

#: Half a 95% interval in standard errors, for the band of a plot.
_Z = 1.959964


def probe_vector(probe: Any, arg: str = "probe") -> Vector:
    """Coefficients of a probe, or the vector of a direction: ``(d,)`` float64.

    Raises:
        ShapeError, DTypeError: it is several vectors, or none.
    """
    coef = getattr(probe, "coef", None)
    return single_vector(probe if coef is None else coef, arg)


def refusal_scores_by_position(
    model: nn.Module,
    prompts: Prompts,
    probe: Any,
    layer: int | None = None,
    *,
    site: Site | None = None,
    batch_size: int = 8,
    blocks: str | None = None,
    progress: bool = True,
) -> list[Vector]:
    """The refusal score at every token of every prompt; only scores are kept, never the states.

    The score is the probability ``p_t = σ(w·h_t + b)`` of a probe (arXiv 2510.06036, section 3), or the coefficient
    along the unit direction where ``probe`` is one. A probe fitted at one position is applied here at others: check on
    labelled prompts that its scores mean there what they mean where it was fitted.

    Args:
        model: a Hugging Face decoder; its inner decoder is run, without the output head where it has one.
        prompts: a :class:`Prompts`; reasoning goes in with ``opening=[...]``, a text per prompt.
        probe: anything with ``coef`` ``(d,)`` and ``probability(x)`` that takes ``(n, d)`` float32 or float64 and
            returns ``(n,)``, such as a ``RefusalProbe``; or a :class:`Direction` or vector ``(d,)``.
        layer: index of the block to read; None for that of the probe.
        site: input (``"pre"``) or output (``"post"``) of the block; None for that of the probe, else ``"pre"``.
        batch_size: prompts per forward pass.
        blocks: dotted name of the list of blocks, for models the table does not know.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        One float64 array ``(tokens,)`` per prompt, in the order of the prompts.

    Raises:
        ArgumentError: no layer is known, or it does not exist. ShapeError: another hidden size, or a probe that does
            not return one score per row.
        NonFiniteError: an activation or a score is NaN or infinite; the prompt is named.
    """
    if layer is None:
        layer = getattr(probe, "layer", None)
        if layer is None:
            raise ArgumentError("layer: expected a layer, since probe does not say where it was fitted")
    where: Site = (getattr(probe, "site", None) or "pre") if site is None else site
    check_site(where)
    if not isinstance(prompts, Prompts):
        raise DTypeError(f"prompts: expected Prompts, got {type(prompts).__name__}")
    width = len(probe_vector(probe))
    _check_width(model, width, "probe")
    score = _scorer(probe)
    curves: list[list[Vector]] = [[] for _ in range(len(prompts))]

    def take(rows: Rows) -> None:
        if rows.values.shape[1] != width:
            raise ShapeError(f"probe: expected {rows.values.shape[1]} coefficients, the hidden size, got {width}")
        values = score(rows.values)
        owners = np.asarray(rows.prompts)
        if not np.isfinite(values).all():
            bad = int(owners[int(np.argmin(np.isfinite(values)))])
            raise NonFiniteError(f"probe: non-finite score at prompt {bad} ({prompts[bad].text[:60]!r})")
        for i in dict.fromkeys(rows.prompts):
            curves[i].append(values[owners == i])

    run_recording(model, prompts, [layer], ["all"], where, batch_size, progress, take, blocks)
    return [np.concatenate(parts) for parts in curves]


def _scorer(probe: Any) -> Callable[[Any], Vector]:
    probability = getattr(probe, "probability", None)
    if probability is None:
        vector = probe if isinstance(probe, Direction) else probe_vector(probe)
        orthonormal_basis(vector)  # a direction without length, or not finite, is refused before the model runs
        return lambda rows: np.asarray(project(rows.double().numpy(), vector))

    def score(rows: Any) -> Vector:
        given = rows.numpy() if str(rows.dtype) == "torch.float64" else rows.float().numpy()
        values = _to_numpy(probability(given), "probe.probability")
        if values.shape != (len(given),):
            raise ShapeError(f"probe.probability: expected ({len(given)},), got {values.shape}")
        return values

    return score


def _curves(p: Any, mask: Any, arg: str = "p") -> tuple[list[Vector], bool]:
    """Curves as float64 arrays, and whether it was one."""
    if mask is not None:
        values, keep = _to_numpy(p, arg), np.asarray(mask.detach().cpu() if is_torch(mask) else mask)
        if keep.shape != values.shape or values.ndim not in (1, 2):
            raise ShapeError(f"mask: expected the shape of {arg}, (tokens,) or (curves, tokens), got {keep.shape}")
        if not np.isin(keep, (0, 1)).all():
            raise DTypeError("mask: expected booleans")
        keep = keep.astype(bool)
        single = values.ndim == 1
        parts = [v[k] for v, k in zip(np.atleast_2d(values), np.atleast_2d(keep), strict=True)]
    elif isinstance(p, (list, tuple)) and any(np.ndim(v) for v in p):
        parts, single = [_to_numpy(v, arg) for v in p], False
    else:
        values = _to_numpy(p, arg)
        if values.ndim not in (1, 2):
            raise ShapeError(f"{arg}: expected (tokens,), (curves, tokens) or a list of curves, got {values.shape}")
        single = values.ndim == 1
        parts = list(np.atleast_2d(values))
    if not parts:
        raise ShapeError(f"{arg}: expected at least one curve, got none")
    for i, curve in enumerate(parts):
        where = arg if single else f"{arg}[{i}]"
        if curve.ndim != 1:
            raise ShapeError(f"{where}: expected shape (tokens,), got {curve.shape}")
        if curve.size < 2:
            raise ShapeError(f"{where}: expected at least two tokens, without which nothing can fall, got {curve.size}")
        if not np.isfinite(curve).all():
            raise NonFiniteError(f"{where}: non-finite score at token {int(np.argmin(np.isfinite(curve)))}")
    return [np.array(c, dtype=np.float64) for c in parts], single


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_rules(plateau: Any, final: Any) -> None:
    ranged = isinstance(plateau, tuple) and len(plateau) == 2 and all(v is None or _whole(v) for v in plateau)
    if not ranged and not (isinstance(plateau, str) and plateau in ("max", "median_top_decile")):
        raise ArgumentError(f"plateau: expected 'max', 'median_top_decile' or (start, stop), got {plateau!r}")
    if not (isinstance(final, str) and final == "last") and not (_whole(final) and final >= 1):
        raise ArgumentError(f"final: expected 'last' or a number of tokens of 1 or more, got {final!r}")


def _levels(curve: Vector, plateau: Any, final: Any, i: int) -> tuple[float, float]:
    """Plateau and final score of one curve."""
    count = 1 if final == "last" else int(final)
    if count >= curve.size:
        raise ArgumentError(f"final: expected fewer tokens than curve {i} has ({curve.size}), got {final}")
    end = float(curve[-count:].mean())
    if isinstance(plateau, tuple):
        part = curve[slice(*plateau)]
        if not part.size:
            raise ArgumentError(f"plateau: expected a range with a token of curve {i} ({curve.size}), got {plateau}")
        return float(part.mean()), end
    if plateau == "max":
        return float(curve.max()), end
    return float(np.median(np.sort(curve)[-math.ceil(curve.size / 10) :])), end


def cliff_score(p: Any, plateau: Plateau = "max", final: Final = "last", *, mask: Any = None) -> Any:
    """How far a refusal score falls at the end: plateau minus final score (arXiv 2510.06036, misalignment score).

    Args:
        p: one curve ``(tokens,)``, a list of curves of any lengths, or ``(curves, tokens)``.
        plateau: ``"max"``, the largest score (as published); ``"median_top_decile"``, the median of the largest tenth
            (at least one), which one outlier cannot set; or ``(start, stop)``, the mean over that slice of tokens,
            negative counted from the end.
        final: ``"last"`` token, or the mean of the last n.
        mask: of the shape of ``p``, true at tokens that count; padding may hold anything.

    Returns:
        A float for one curve, else float64 ``(curves,)``; in the units of ``p``.

    Raises:
        ShapeError: no curve, or one of fewer than two tokens. NonFiniteError: a score is NaN or infinite.
        ArgumentError: an unknown rule, a range without tokens, ``final`` as long as a curve.
    """
    _check_rules(plateau, final)
    curves, single = _curves(p, mask)
    levels = [_levels(c, plateau, final, i) for i, c in enumerate(curves)]
    scores = np.array([high - low for high, low in levels])
    return float(scores[0]) if single else scores


@dataclass(frozen=True, eq=False)
class MeanCurve:
    """Mean of curves by position, over the curves that have it.

    Attributes:
        position: token index from the start (0, 1, ...), from the end (..., -2, -1), or relative in [0, 1].
        mean: of the curves that reach this position.
        standard_error: of that mean, across curves; NaN where fewer than two reach it.
        count: how many do.
    """

    position: Any
    mean: Vector
    standard_error: Vector
    count: Integers


def _mean_and_error(values: Any, axis: int = 0) -> tuple[Any, Any, Any]:
    """Mean, standard error and count along an axis, NaN left out."""
    there = ~np.isnan(values)
    count = there.sum(axis)
    mean = np.where(there, values, 0).sum(axis) / count
    spread = (np.where(there, values - np.expand_dims(mean, axis), 0) ** 2).sum(axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(count > 1, np.sqrt(spread / (count - 1) / count), np.nan)
    return mean, error, count


@dataclass(frozen=True, eq=False)
class Cliff:
    """Refusal scores by token position, and where and how far they fall.

    Attributes:
        curves: one float64 array ``(tokens,)`` per prompt.
        plateau, final: the two levels of every curve, ``(prompts,)``.
        depth: plateau minus final, ``(prompts,)``: what :func:`cliff_score` gives.
        start: where the fall begins, ``(prompts,)`` indices into the curves: the last token whose score is at least
            ``plateau - tolerance · depth``; the next one lies below and so do all after it. The last token of the curve
            where nothing falls (``depth <= 0``).
        offset: index in the prompt of each curve's first token.
        tolerance: share of the depth that may be lost before the fall counts as begun.
    """

    curves: list[Vector] = field(repr=False)
    plateau: Vector
    final: Vector
    depth: Vector
    start: Integers
    offset: Integers
    tolerance: float

    @classmethod
    def from_curves(
        cls,
        p: Any,
        *,
        plateau: Plateau = "max",
        final: Final = "last",
        tolerance: float = 0.1,
        mask: Any = None,
        offset: Any = None,
    ) -> Cliff:
        """From scores that are there already; ``p``, ``plateau``, ``final`` and ``mask`` as in :func:`cliff_score`.

        Raises:
            As :func:`cliff_score`; ArgumentError also for a ``tolerance`` outside [0, 1).
        """
        _check_rules(plateau, final)
        if not 0 <= _finite(tolerance, "tolerance") < 1:
            raise ArgumentError(f"tolerance: expected a share in [0, 1), got {tolerance}")
        curves, _ = _curves(p, mask)
        levels = np.array([_levels(c, plateau, final, i) for i, c in enumerate(curves)])
        high, low = levels[:, 0], levels[:, 1]
        start = [_start(*row, tolerance) for row in zip(curves, high, low, strict=True)]
        at = np.zeros(len(curves), np.int64) if offset is None else np.asarray(offset, np.int64)
        return cls(curves, high, low, high - low, np.array(start, np.int64), at, float(tolerance))

    def __len__(self) -> int:
        return len(self.curves)

    @property
    def start_from_end(self) -> Integers:
        """:attr:`start` counted from the end of each curve, ``(prompts,)``: -1 is its last token."""
        return np.asarray(self.start - [c.size for c in self.curves])

    def mean_curve(self, align: Align = "right", points: int = 100) -> MeanCurve:
        """The mean over prompts, each position over the prompts that have it: shorter ones are not filled with zeros.

        Args:
            align: ``"right"`` by tokens from the end, ``"left"`` from the start, ``"relative"`` by the share of the
                curve, resampled linearly so that no score beyond a curve's own appears.
            points: number of relative positions.

        Raises:
            ArgumentError: an unknown ``align``, or fewer than two ``points``.
        """
        if align not in ("right", "left", "relative"):
            raise ArgumentError(f"align: expected 'right', 'left' or 'relative', got {align!r}")
        if not _whole(points) or points < 2:
            raise ArgumentError(f"points: expected 2 or more, got {points!r}")
        longest = max(c.size for c in self.curves)
        position: Any = np.linspace(0, 1, int(points)) if align == "relative" else np.arange(longest)
        table = np.full((len(self.curves), len(position)), np.nan)
        for row, curve in zip(table, self.curves, strict=True):
            if align == "relative":
                row[:] = np.interp(position, np.linspace(0, 1, curve.size), curve)
            elif align == "right":
                row[longest - curve.size :] = curve
            else:
                row[: curve.size] = curve
        mean, error, count = _mean_and_error(table)
        return MeanCurve(position - longest if align == "right" else position, mean, error, count)

    def rank(self, by: By = "drop", *, among: Any = None) -> CliffRanking:
        """Prompts in the order of how much they show the cliff; see :func:`rank_by_cliff`.

        Raises:
            ArgumentError: an unknown ``by``, or nothing to rank. ShapeError, DTypeError: ``among`` does not fit.
        """
        if by not in ("drop", "final"):
            raise ArgumentError(f"by: expected 'drop' or 'final', got {by!r}")
        scores = self.depth if by == "drop" else self.final
        keep = np.ones(len(scores), bool) if among is None else np.asarray(among)
        if keep.shape != scores.shape:
            raise ShapeError(f"among: expected one per example {scores.shape}, got {keep.shape}")
        if not np.isin(keep, (0, 1)).all():
            raise DTypeError("among: expected booleans, or 0 and 1")
        order = np.argsort(-scores if by == "drop" else scores, kind="stable")
        order = order[keep.astype(bool)[order]]
        if not order.size:
            raise ArgumentError("among: expected at least one example to rank, got none")
        return CliffRanking(order, scores, by)

    def _summary(self) -> dict[str, tuple[float, float]]:
        columns = {
            "plateau": self.plateau,
            "final": self.final,
            "depth": self.depth,
            "start, tokens from the end": self.start_from_end,
        }
        found = {}
        for name, values in columns.items():
            mean, error, _ = _mean_and_error(np.asarray(values, np.float64))
            found[name] = (float(mean), float(error))
        return found

    def __repr__(self) -> str:
        facts = ", ".join(f"{k.partition(',')[0]}={m:.4g}±{e:.2g}" for k, (m, e) in self._summary().items())
        return f"Cliff(prompts={len(self)}, {facts}, tolerance={self.tolerance:g})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{k}</td><td>{m:.4g}</td><td>{e:.2g}</td></tr>" for k, (m, e) in self._summary().items()
        )
        header = "<tr><th></th><th>mean</th><th>standard error</th></tr>"
        return f"<table><caption>Refusal cliff of {len(self)} prompts</caption>{header}{rows}</table>"

    def plot(self, ax: Any = None, *, align: Align = "right", points: int = 100) -> Any:
        """The mean curve with a 95% band across prompts; the median start of the fall is dotted. Returns the axes."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        found = self.mean_curve(align, points)
        half = _Z * found.standard_error
        (line,) = ax.plot(found.position, found.mean)
        ax.fill_between(found.position, found.mean - half, found.mean + half, alpha=0.2, color=line.get_color(), lw=0)
        last = np.array([c.size - 1 for c in self.curves])
        starts = {"right": self.start_from_end, "left": self.start, "relative": self.start / last}[align]
        ax.axvline(float(np.median(starts)), color="0.5", ls=":", label="median start of the fall")
        words = {"right": "token, from the end", "left": "token", "relative": "share of the tokens"}
        ax.set(xlabel=words[align], ylabel="refusal score")
        ax.legend()
        return ax


def _start(curve: Vector, plateau: float, final: float, tolerance: float) -> int:
    if not plateau > final:
        return curve.size - 1
    # A plateau taken as a mean can round above every score of a constant stretch.
    level = min(plateau - tolerance * (plateau - final), float(curve.max()))
    return int(np.flatnonzero(curve >= level)[-1])


@dataclass(frozen=True, eq=False)
class CliffRanking:
    """Examples in the order of the refusal cliff.

    Attributes:
        order: indices of examples, the most telling first; equal scores in the order of the examples.
        scores: ``(examples,)``, of all of them: the depth, or the final score.
        by: which.
    """

    order: Integers
    scores: Vector = field(repr=False)
    by: By

    def select(self, share: float = 0.017) -> Integers:
        """The first examples: ``ceil(share · number ranked)``, at least one; 1.7% is the share of arXiv 2510.06036.

        Raises:
            ArgumentError: a share outside (0, 1].
        """
        return self.order[: share_count(share, len(self.order))]

    def __len__(self) -> int:
        return len(self.order)

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{i}</td><td>{self.scores[i]:.4g}</td></tr>" for i in self.order[:20])
        caption = f"<caption>{len(self)} examples by {self.by}, the first {min(len(self), 20)}</caption>"
        return f"<table>{caption}<tr><th>example</th><th>{self.by}</th></tr>{rows}</table>"


def share_count(share: float, n: int) -> int:
    """``ceil(share · n)``, at least one; a product that is whole but for rounding is not rounded up."""
    if not 0 < _finite(share, "share") <= 1:
        raise ArgumentError(f"share: expected a share in (0, 1], got {share}")
    return max(1, math.ceil(share * n - 1e-9))


def refusal_cliff(
    model: nn.Module,
    prompts: Prompts,
    probe: Any,
    layer: int | None = None,
    *,
    plateau: Plateau = "max",
    final: Final = "last",
    tolerance: float = 0.1,
    span: Span = "all",
    site: Site | None = None,
    batch_size: int = 8,
    blocks: str | None = None,
    progress: bool = True,
) -> Cliff:
    """Runs prompts and measures how their refusal score falls at the end (arXiv 2510.06036, section 3).

    Args:
        model, prompts, probe, layer, site, batch_size, blocks, progress: as in :func:`refusal_scores_by_position`.
        plateau, final: as in :func:`cliff_score`.
        tolerance: share of the depth that may be lost before the fall counts as begun; see :class:`Cliff`.
        span: ``"all"`` tokens of the prompt, or ``"post_instruction"``, those after the instruction: the template's
            and the reasoning's.

    Raises:
        As :func:`refusal_scores_by_position` and :func:`cliff_score`.
    """
    _check_rules(plateau, final)
    if span not in ("all", "post_instruction"):
        raise ArgumentError(f"span: expected 'all' or 'post_instruction', got {span!r}")
    if not 0 <= _finite(tolerance, "tolerance") < 1:
        raise ArgumentError(f"tolerance: expected a share in [0, 1), got {tolerance}")
    if not isinstance(prompts, Prompts):
        raise DTypeError(f"prompts: expected Prompts, got {type(prompts).__name__}")
    offset = [p.instruction_end + 1 if span == "post_instruction" else 0 for p in prompts]
    if short := [i for i, (p, at) in enumerate(zip(prompts, offset, strict=True)) if len(p.ids) - at < 2]:
        raise ShapeError(f"prompts: expected at least two tokens in the span {span!r}, too few in prompt {short[0]}")
    curves = refusal_scores_by_position(
        model, prompts, probe, layer, site=site, batch_size=batch_size, blocks=blocks, progress=progress
    )
    parts = [c[at:] for c, at in zip(curves, offset, strict=True)]
    return Cliff.from_curves(parts, plateau=plateau, final=final, tolerance=tolerance, offset=offset)


def rank_by_cliff(
    source: Any,
    examples: Prompts | None = None,
    probe: Any = None,
    *,
    by: By = "drop",
    among: Any = None,
    **options: Any,
) -> CliffRanking:
    """Orders training examples by their refusal cliff, for choosing few of them (Cliff-as-a-Judge, arXiv 2510.06036).

    Args:
        source: a model, or without ``examples`` a :class:`Cliff` or precomputed curves as in :func:`cliff_score`.
        examples: the :class:`Prompts` to run; reasoning goes in with ``opening=[...]``.
        probe: as in :func:`refusal_scores_by_position`.
        by: ``"drop"``, the largest depth first (the paper's misalignment score); ``"final"``, the lowest final score
            first (what the released script sorts by).
        among: booleans per example, those that may be chosen: for instance the harmful ones, by labels of yours.
        options: of :func:`refusal_cliff`, or for curves of :meth:`Cliff.from_curves`.

    Returns:
        A :class:`CliffRanking`; ``.select(share)`` are the indices to keep.

    Raises:
        As :func:`refusal_cliff`, :meth:`Cliff.from_curves` and :meth:`Cliff.rank`.
    """
    if (examples is None) != (probe is None):
        raise ArgumentError("examples, probe: expected both with a model, or neither with curves")
    if by not in ("drop", "final"):
        raise ArgumentError(f"by: expected 'drop' or 'final', got {by!r}")
    if examples is not None:
        found = refusal_cliff(source, examples, probe, **options)
    elif isinstance(source, Cliff):
        if options:
            raise ArgumentError(f"{next(iter(options))}: not used with a Cliff, whose levels are measured already")
        found = source
    else:
        found = Cliff.from_curves(source, **options)
    return found.rank(by, among=among)
