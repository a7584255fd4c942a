"""Recourse that survives deletion: changes that keep their effect when any k training records are removed."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from .. import _interop, _native
from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ._cheapest import cheapest_step
from ._tables import is_table, read_labels, read_table

Array = np.ndarray[Any, Any]
Method = Literal["refit", "newton", "influence", "certified"]
Deleted = Literal["refit", "newton", "influence"]

#: Sets up to which a result is checked by fitting again without each of them.
EXHAUSTIVE = 2000
#: Records beyond k that an exchange tries, and how often it goes through the set.
RESERVE, SWEEPS = 8, 2
#: How far beyond the threshold a solution is asked to go, relative to what it lacks.
OVERSHOOT = 1e-7
#: The certified optimum is known within this factor when the search ends.
CLOSE = 1e-4


@dataclass(frozen=True)
class Recourse:
    """A changed instance, and what is known of its score after deletions."""

    #: The changed instance; where ``found`` is False, the admissible point of the best score.
    x: Array
    instance: Array
    names: list[str] = field(repr=False)
    #: Weighted L1 or L2 cost of the change.
    cost: float
    #: Whether the score is on the desired side of ``target`` under ``method``.
    found: bool
    target: float
    desired: str
    k: int
    method: str
    #: Score now; the worst score after at most k deletions by "influence", "newton" and "refit" (of the worst sets
    #: found); "certified", a bound that no deletion of k records passes (None where none is known); "exhaustive", the
    #: worst over all sets (None where they are too many).
    scores: dict[str, float | None]
    #: Records whose deletion gives ``scores["refit"]``.
    deleted: Array = field(repr=False)
    rounds: int = field(repr=False)

    @property
    def delta(self) -> Array:
        """What is changed."""
        return np.asarray(self.x - self.instance)

    @property
    def changes(self) -> dict[str, tuple[float, float]]:
        """Value before and after of every feature that changes."""
        return {n: (float(a), float(b)) for n, a, b in zip(self.names, self.instance, self.x, strict=True) if a != b}

    def _lines(self) -> list[tuple[str, str]]:
        side = "at least" if self.desired == "above" else "at most"
        lines = [
            ("score wanted", f"{side} {self.target:g} after any {self.k} deletions, by {self.method}"),
            ("found", "yes" if self.found else "no: nothing admissible reaches it"),
            ("cost", f"{self.cost:.4g}"),
        ]
        lines += [(f"change of {n}", f"{a:.6g} -> {b:.6g}") for n, (a, b) in self.changes.items()]
        labels = {"now": "score now", "certified": "certified bound", "exhaustive": "worst over all sets"}
        for name, score in self.scores.items():
            shown = "not known" if score is None else f"{score:.6g}"
            lines.append((labels.get(name, f"worst found, {name}"), shown))
        return lines

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self._lines())

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in self._lines())
        return f"<table><caption>Recourse under deletion</caption>{cells}</table>"

    def plot(self) -> Any:
        """The changes, and the scores beside the target; a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        changes = self.changes
        left.barh(list(changes), [b - a for a, b in changes.values()])
        left.set(xlabel="change")
        known = {n: s for n, s in self.scores.items() if s is not None}
        right.plot(list(known.values()), list(known), "o")
        right.axvline(self.target, linestyle=":", color="0.4")
        right.set(xlabel=f"score, wanted {'above' if self.desired == 'above' else 'below'} the line")
        return figure


class DeletionModel:
    """A ridge or logistic regression that knows what it would be without any few of its training records.

    ``Σ ℓ(θ; x_i, y_i) + ½ penalty ‖θ‖²`` with ``ℓ = ½ (x·θ - y)²`` (``"ridge"``; penalty 0 is ordinary least squares)
    or the logistic loss (``"logistic"``: scikit-learn's with ``C = 1/penalty``). For the last layer of a network, ``x``
    are the embeddings of its training records.

    Args:
        x: ``(n, d)`` records: an array, a tensor, or a table of numbers (pandas, polars, Arrow, mapping).
        y: ``(n,)`` targets, or two different labels, the greater of which counts as 1.
        kind: ``"logistic"`` or ``"ridge"``.
        penalty: λ, 0 or more.
        intercept: ``"free"`` (not penalised), ``"penalized"`` (as any coefficient) or None.

    Raises:
        ShapeError, NonFiniteError, DTypeError: malformed input.
        ArgumentError: an option outside its domain, or labels that are not two.
        DegenerateError: the records determine no coefficients (collinear columns without a penalty).
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        *,
        kind: Literal["logistic", "ridge"] = "logistic",
        penalty: float = 1.0,
        intercept: Literal["free", "penalized"] | None = "free",
    ) -> None:
        if kind not in ("logistic", "ridge"):
            raise ArgumentError(f'kind: expected "logistic" or "ridge", got {kind!r}')
        if intercept not in ("free", "penalized", None):
            raise ArgumentError(f'intercept: expected "free", "penalized" or None, got {intercept!r}')
        penalty = float(penalty)
        if not (math.isfinite(penalty) and penalty >= 0):
            raise ArgumentError(f"penalty: expected a finite number of 0 or more, got {penalty!r}")
        table = read_table(x)
        if not all(table.is_numeric):
            name = table.names[table.is_numeric.index(False)]
            raise ArgumentError(f"x: expected columns of numbers, got categories in {name!r}; encode them first")
        values = read_labels(y, table.rows, "y")
        self.classes: Array | None = None
        if kind == "logistic":
            self.classes, codes = np.unique(values, return_inverse=True)
            if len(self.classes) != 2:
                raise ArgumentError(f"y: expected two different labels, got {len(self.classes)}")
            values = codes.reshape(-1)
        elif values.dtype.kind not in "biuf":
            raise ArgumentError(f"y: expected numbers, got dtype {values.dtype}")
        self.kind, self.penalty, self.names = kind, penalty, table.names
        self._records = np.stack(table.columns, axis=1)
        rows = self._records
        penalties = np.full(rows.shape[1], penalty)
        if intercept is not None:
            rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
            penalties = np.append(penalties, penalty if intercept == "penalized" else 0.0)
        self._ones = intercept is not None
        self._native = _native.Deletion(
            np.ascontiguousarray(rows), values.astype(np.float64), penalties, kind == "logistic"
        )

    @property
    def coef(self) -> Array:
        """``(d,)`` coefficients."""
        return self._native.theta[: len(self.names)]

    @property
    def intercept(self) -> float:
        """The constant term; 0 where there is none."""
        return float(self._native.theta[-1]) if self._ones else 0.0

    @property
    def leverages(self) -> Array:
        """``(n,)`` share of the Hessian that each record contributes, in its own direction; between 0 and 1."""
        return self._native.leverages

    def _extended(self, x: Any, arg: str = "x") -> Array:
        rows = x if isinstance(x, np.ndarray) else np.asarray(_plain(x), dtype=np.float64)
        if rows.shape[-1:] != (len(self.names),):
            raise ShapeError(f"{arg}: expected {len(self.names)} features, got shape {rows.shape}")
        return np.concatenate([rows, np.ones((*rows.shape[:-1], 1))], axis=-1) if self._ones else rows

    def decision_function(self, x: Any) -> Array:
        """Scores ``x·coef + intercept`` of rows; log-odds of the greater label for ``"logistic"``."""
        x = np.stack(read_table(x).columns, axis=1) if is_table(x) else x
        return np.asarray(self._extended(x) @ self._native.theta)

    def without(self, records: Sequence[int], method: Deleted = "refit") -> tuple[Array, float]:
        """Coefficients and intercept with ``records`` deleted.

        ``"influence"`` is first order (``θ + H⁻¹ Σ g_i``), ``"newton"`` one Newton step with the Hessian of the rest
        (exact for ridge), ``"refit"`` the minimum.

        Raises:
            ArgumentError: a record that is not there or named twice.
            DegenerateError: the rest determines no coefficients.
        """
        theta = self._native.without(_interop.integers(records, "records").tolist(), method)
        return theta[: len(self.names)], float(theta[-1]) if self._ones else 0.0

    def influences(self, x: Any) -> Array:
        """``(n,)`` what the deletion of each record alone adds to the score of ``x``, to first order."""
        return self._native.effects(np.ascontiguousarray(self._extended(x)))

    def worst_scores(
        self,
        x: Any,
        k: int = 1,
        *,
        desired: Literal["above", "below"] = "above",
        exhaustive: int = EXHAUSTIVE,
    ) -> tuple[dict[str, float | None], Array]:
        """Score of ``x`` now and after the worst deletion of at most ``k`` records, and the records deleted.

        The sets tried are the k first-order influences that hurt most, the same corrected for leverage, and records
        chosen one after the other for what is left. "certified" bounds the score for every set: first order with a
        bound of what it leaves out (self-concordance of the logistic loss), or ``x·θ - ρ_k ‖x‖`` by strong convexity,
        whichever is better. "exhaustive" fits again without every set where they are at most ``exhaustive``.
        """
        search = _Search(self, _count(k, "k"), _sign(desired))
        q = np.ascontiguousarray(self._extended(np.asarray(_plain(x), dtype=np.float64), "x"))
        return search.scores(q, exhaustive)

    def recourse(
        self,
        instance: Any,
        *,
        k: int = 1,
        target: float = 0.0,
        desired: Literal["above", "below"] = "above",
        method: Method = "refit",
        cost: Literal["l1", "l2"] = "l1",
        weights: Any = "mad",
        fixed: Sequence[int | str] = (),
        increase_only: Sequence[int | str] = (),
        decrease_only: Sequence[int | str] = (),
        bounds: Mapping[int | str, tuple[float, float]] | tuple[Any, Any] | None = None,
        features: Callable[[Any], Any] | None = None,
        max_rounds: int = 100,
        exhaustive: int = EXHAUSTIVE,
    ) -> Recourse:
        """The cheapest admissible change whose score stays beyond ``target``; see :func:`robust_recourse`."""
        k, sign = _count(k, "k"), _sign(desired)
        target = float(target)
        for value, arg, known in (
            (method, "method", ("refit", "newton", "influence", "certified")),
            (cost, "cost", ("l1", "l2")),
        ):
            if value not in known:
                raise ArgumentError(f"{arg}: expected one of {', '.join(map(repr, known))}, got {value!r}")
        if not math.isfinite(target):
            raise ArgumentError(f"target: expected a finite number, got {target!r}")
        start, names = _instance(instance, self.names, features is None)
        if weights is None or isinstance(weights, str):
            weights = _weights(weights, self._records if features is None else None, len(start))
        scales = np.asarray(weights, dtype=np.float64)
        if scales.shape != start.shape or not (np.isfinite(scales) & (scales > 0)).all():
            raise ArgumentError(f"weights: expected {len(start)} positive numbers, got {weights!r:.80}")
        low, high = _box(start, names, fixed, increase_only, decrease_only, bounds)
        search = _Search(self, k, sign)
        problem = _Problem(start, scales, low - start, high - start, cost)
        if features is None:
            delta, found, rounds = search.solve(problem, target, method, max_rounds, exhaustive)
        else:
            delta, found, rounds = search.solve_features(problem, target, method, max_rounds, features)
        x = start + delta
        q = self._extended(x if features is None else _embed(features, x)[0], "features")
        scores, deleted = search.scores(np.ascontiguousarray(q), exhaustive)
        return Recourse(
            x, start, names, problem.cost_of(delta), found, target, desired, k, method, scores, deleted, rounds
        )


def robust_recourse(
    x: Any,
    y: Any,
    instance: Any,
    *,
    kind: Literal["logistic", "ridge"] = "logistic",
    penalty: float = 1.0,
    intercept: Literal["free", "penalized"] | None = "free",
    **options: Any,
) -> Recourse:
    """The cheapest change of an instance whose effect survives the deletion of any k training records.

    Recourse ("raise your income by 2 000 and the loan is granted") is a promise about a model; when people exercise
    their right to be forgotten, the model is fitted again and the promise may break. This finds the cheapest admissible
    change that keeps the score beyond ``target`` after any ``k`` deletions. Every set of deletions is a linear
    inequality in the changed instance, so the problem is convex: the worst set at the current solution is added as a
    cut until none is violated. After Krishna, Ma and Lakkaraju (arXiv 2302.04288) and Pawelczyk et al. (arXiv
    2208.14137); the formulation is the library's own.

    Args:
        x: ``(n, d)`` training records, see :class:`DeletionModel`.
        y: ``(n,)`` targets or labels.
        instance: ``(d,)`` features of one individual, or a mapping of names to values.
        kind, penalty, intercept: the model, see :class:`DeletionModel`.
        **options:

            * ``k`` (1): deletions to survive.
            * ``target`` (0): threshold of the score (log-odds for logistic); ``desired``: ``"above"`` or ``"below"``.
            * ``method``: what "survives" means. ``"refit"`` (default): the model fitted again without the worst sets
              found, by influence, the same corrected for leverage, and one record after the other. ``"newton"``,
              ``"influence"``: the same with an approximate fit (first order is optimistic). ``"certified"``: a bound
              that holds for every set of k records; costs more change, and exists only while k records cannot turn the
              Hessian.
            * ``cost`` (``"l1"``): ``Σ w|δ|``, few changes, or ``"l2"``: ``sqrt Σ (wδ)²``.
            * ``weights`` (``"mad"``): 1 / median absolute deviation of each feature (its standard deviation, or 1,
              where that is 0), ``"std"``, None for 1, or ``(d,)`` numbers.
            * ``fixed``, ``increase_only``, ``decrease_only``: names or places of features.
            * ``bounds``: ``{feature: (low, high)}``, or ``(low, high)`` for all (numbers or ``(d,)``).
            * ``features``: a torch function from an input ``(1, d)`` to an embedding, for models of a last layer: the
              search then moves the input, step by step along the gradient (a local optimum; not with tables).
            * ``max_rounds`` (100), and ``exhaustive`` (2000): number of sets up to which ``"refit"`` looks at every one
              of them before it ends, and the result is checked against all.

    Returns:
        The change with its cost, and its scores after deletion by every method. ``found`` is False, and ``x`` the
        admissible point of the best score, where nothing admissible is beyond the target.

    Raises:
        As :class:`DeletionModel`; ArgumentError for an unknown feature, an empty box or another option outside its
        domain; DegenerateError where ``method="certified"`` and no certificate exists for k deletions.
    """
    model = DeletionModel(x, y, kind=kind, penalty=penalty, intercept=intercept)
    return model.recourse(instance, **options)


@dataclass(frozen=True)
class _Problem:
    start: Array
    weights: Array
    low: Array
    high: Array
    norm: str

    def cost_of(self, delta: Array) -> float:
        scaled = np.abs(delta) * self.weights
        return float(scaled.sum() if self.norm == "l1" else np.sqrt((scaled**2).sum()))

    def cheapest(self, cuts: list[Array], need: list[float]) -> tuple[Array, bool]:
        """The cheapest step within the cuts, and whether there is one."""
        asked = np.array([n + OVERSHOOT * (abs(n) + 1e-3 * np.abs(a).max()) for a, n in zip(cuts, need, strict=True)])
        delta, short = cheapest_step(np.array(cuts), asked, self.weights, self.low, self.high, self.norm)
        size = np.abs(delta) * self.weights
        kept = np.where(size > 1e-7 * size.max(initial=0.0), delta, np.clip(0.0, self.low, self.high))
        if (np.array(cuts) @ kept >= np.array(need)).all():
            delta = kept
        return delta, short <= 0 or bool((np.array(cuts) @ delta >= np.array(need)).all())


class _Search:
    """The worst deletions for a model; ``sign`` -1 turns a score wanted below into one wanted above."""

    def __init__(self, model: DeletionModel, k: int, sign: float) -> None:
        self.model, self.native, self.k, self.sign = model, model._native, k, sign
        self._known: dict[tuple[tuple[int, ...], str], Array] = {}
        if k >= self.native.rows:
            raise ArgumentError(f"k: expected fewer deletions than the {self.native.rows} records, got {k}")

    def theta(self, records: tuple[int, ...], method: str) -> Array:
        key = records, method
        if key not in self._known:
            self._known[key] = self.sign * self.native.without(list(records), method)
        return self._known[key]

    def worst(self, q: Array, method: str, deep: bool = False) -> tuple[float, tuple[int, ...], Array]:
        """Score, records and coefficients of the worst of the sets tried; ``deep`` also chooses one after the other."""
        sets = {tuple(self.native.worst(self.sign * q, self.k, corrected)) for corrected in (False, True)} | {()}
        if deep:
            sets.add(tuple(self.native.pursue(self.sign * q, self.k)))
        if method == "influence":
            # First order is its own worst case.
            sets = {tuple(self.native.worst(self.sign * q, self.k, False))}
        score, records = min((float(q @ self.theta(s, method)), s) for s in sorted(sets))
        if deep and method != "influence":
            score, records = self._exchange(q, score, records, method)
        return score, records, self.theta(records, method)

    def _exchange(self, q: Array, score: float, records: tuple[int, ...], method: str) -> tuple[float, tuple[int, ...]]:
        """Exchanges records of the set for others that hurt, or adds one, as long as that makes the score worse."""
        effects = self.native.effects(self.sign * q) / np.maximum(1 - self.native.leverages, 1e-12)
        others = [int(i) for i in np.argsort(effects, kind="stable")[: self.k + RESERVE] if effects[i] < 0]
        for _ in range(SWEEPS):
            before = score
            for place in range(min(len(records) + 1, self.k)):
                for new in others:
                    if new not in records:
                        trial = tuple(sorted({*records[:place], *records[place + 1 :], new}))
                        value = float(q @ self.theta(trial, method))
                        if value < score:
                            score, records = value, trial
            if score == before:
                break
        return score, records

    def bound(self, q: Array, kind: bool) -> tuple[float, Array] | None:
        found = self.native.bound(self.sign * q, self.k, kind)
        return None if found is None else (found[0], self.sign * found[1])

    def scores(self, q: Array, exhaustive: int) -> tuple[dict[str, float | None], Array]:
        found: dict[str, float | None] = {"now": float(q @ self.native.theta)}
        deleted: tuple[int, ...] = ()
        for method in ("influence", "newton", "refit"):
            score, deleted, _ = self.worst(q, method, deep=True)
            found[method] = self.sign * score
        bounds = [b[0] for b in (self.bound(q, False), self.bound(q, True)) if b is not None]
        found["certified"] = self.sign * max(bounds) if bounds else None
        found["exhaustive"] = None
        if self.sets() <= exhaustive:
            score, records = self.native.exhaust(self.sign * q, self.k, exhaustive)
            found["exhaustive"] = self.sign * score
            if score < self.sign * float(found["refit"] or 0.0):
                deleted = tuple(records)
        return found, np.array(deleted, dtype=np.int64)

    def sets(self) -> int:
        """Number of sets of at most k records."""
        return sum(math.comb(self.native.rows, i) for i in range(self.k + 1))

    def solve(
        self, problem: _Problem, target: float, method: str, max_rounds: int, exhaustive: int
    ) -> tuple[Array, bool, int]:
        if method != "certified":
            return self._cut(problem, target, method, max_rounds, exhaustive)
        start = self._extend(problem.start)
        kinds = [kind for kind in (False, True) if self.bound(start, kind) is not None]
        if not kinds:
            leverage = self.native.constants(self.k)["leverage"]
            raise DegenerateError(
                f"method: no certificate for {self.k} deletions, which hold {leverage:.3g} of the Hessian; "
                'use "refit", a smaller k or a larger penalty (with intercept="penalized")'
            )
        results = [self._certify(problem, target, kind, max_rounds) for kind in kinds]
        return min(results, key=lambda r: (not r[1], problem.cost_of(r[0])))

    def _extend(self, x: Array) -> Array:
        return np.ascontiguousarray(self.model._extended(x))

    def _cut(
        self, problem: _Problem, target: float, method: str, max_rounds: int, exhaustive: int
    ) -> tuple[Array, bool, int]:
        goal, d = self.sign * target, len(problem.start)
        cuts: list[Array] = []
        need: list[float] = []
        seen: set[tuple[int, ...]] = set()
        delta = np.clip(0.0, problem.low, problem.high)
        for rounds in range(max_rounds + 1):
            score, records, theta = self.worst(self._extend(problem.start + delta), method)
            if score >= goal:
                # The slower search only where the quick one finds nothing more.
                score, records, theta = self.worst(self._extend(problem.start + delta), method, deep=True)
            if score >= goal and method == "refit" and self.sets() <= exhaustive:
                q = self._extend(problem.start + delta)
                score, chosen = self.native.exhaust(self.sign * q, self.k, exhaustive)
                records = tuple(chosen)
                theta = self.theta(records, method)
            if score >= goal:
                return delta, True, rounds
            if records in seen:
                # The box is empty of better points, or rounding is all that is missing.
                return delta, False, rounds
            seen.add(records)
            cuts.append(theta[:d])
            need.append(goal - float(self._extend(problem.start) @ theta))
            delta, met = problem.cheapest(cuts, need)
            if not met:
                return delta, False, rounds + 1
        raise DegenerateError(f"max_rounds: the worst deletions did not settle in {max_rounds} rounds")

    def _certify(self, problem: _Problem, target: float, kind: bool, max_rounds: int) -> tuple[Array, bool, int]:
        """Kelley's cutting planes on the concave bound, ended by feasible points on the ray through each solution."""
        goal, d = self.sign * target, len(problem.start)
        cuts: list[Array] = []
        need: list[float] = []
        base = np.clip(0.0, problem.low, problem.high)
        delta, best = base, None

        def value(step: Array) -> tuple[float, Array]:
            found = self.bound(self._extend(problem.start + step), kind)
            assert found is not None
            return found

        for rounds in range(max_rounds + 1):
            score, gradient = value(delta)
            if score >= goal:
                return delta, True, rounds
            reached = self._on_ray(problem, base, delta, goal, value)
            if reached is not None and (best is None or problem.cost_of(reached) < problem.cost_of(best)):
                best = reached
            if best is not None and problem.cost_of(best) <= (1 + CLOSE) * problem.cost_of(delta):
                return best, True, rounds
            cuts.append(gradient[:d])
            need.append(goal - score + float(gradient[:d] @ delta))
            delta, met = problem.cheapest(cuts, need)
            if not met:
                return delta, False, rounds + 1
        if best is None:
            raise DegenerateError(f"max_rounds: no certified point was found in {max_rounds} rounds")
        return best, True, max_rounds

    @staticmethod
    def _on_ray(
        problem: _Problem, base: Array, delta: Array, goal: float, value: Callable[[Array], tuple[float, Array]]
    ) -> Array | None:
        def at(s: float) -> Array:
            return np.clip(base + s * (delta - base), problem.low, problem.high)

        low, high = 1.0, 1.001
        while value(at(high))[0] < goal:
            low, high = high, 1 + (high - 1) * 4
            if high > 1e4:
                return None
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if value(at(middle))[0] >= goal else (middle, high)
        return at(high)

    def solve_features(
        self, problem: _Problem, target: float, method: str, max_rounds: int, features: Callable[[Any], Any]
    ) -> tuple[Array, bool, int]:
        """Sequential linearisation of the embedding in a trust region around the current input."""
        goal = self.sign * target
        kinds = [kind for kind in (False, True) if method == "certified"]

        def judge(step: Array) -> tuple[float, Array]:
            """Worst score and its gradient in the input."""
            embedded, pull = _embed(features, problem.start + step)
            q = self._extend(embedded)
            if method == "certified":
                found = [b for b in (self.bound(q, kind) for kind in kinds) if b is not None]
                if not found:
                    raise DegenerateError(f"method: no certificate for {self.k} deletions")
                score, theta = max(found, key=lambda b: b[0])
            else:
                score, _, theta = self.worst(q, method, deep=True)
            return score, pull(theta[: embedded.shape[-1]])

        delta = np.clip(0.0, problem.low, problem.high)
        score, gradient = judge(delta)
        radius = 1.0
        rounds = 0
        while rounds < max_rounds and radius > 1e-6:
            rounds += 1
            low = np.maximum(problem.low, delta - radius / problem.weights)
            high = np.minimum(problem.high, delta + radius / problem.weights)
            local = _Problem(problem.start, problem.weights, low, high, problem.norm)
            step, _ = local.cheapest([gradient], [goal - score + float(gradient @ delta)])
            next_score, next_gradient = judge(step)
            better = next_score > score if score < goal else problem.cost_of(step) < (1 - 1e-6) * problem.cost_of(delta)
            if better and (score < goal or next_score >= goal):
                delta, score, gradient = step, next_score, next_gradient
                radius *= 2
            else:
                radius /= 4
        return delta, score >= goal, rounds


def _embed(features: Callable[[Any], Any], x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """The embedding of one input, and the product of a vector with its Jacobian."""
    import torch

    leaf = torch.tensor(x[None], dtype=torch.get_default_dtype(), requires_grad=True)
    with torch.enable_grad():  # type: ignore[no-untyped-call]
        out = features(leaf)
    if not isinstance(out, torch.Tensor) or out.shape[:1] != (1,) or not out.requires_grad:
        raise ArgumentError("features: expected a differentiable function from (1, d) to a torch tensor (1, width)")
    flat = out.reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        raise NonFiniteError("features: the embedding of the instance is not finite")

    def pull(v: Array) -> Array:
        (found,) = torch.autograd.grad(flat, leaf, torch.tensor(v, dtype=flat.dtype), retain_graph=True)
        return np.asarray(found[0].double().numpy())

    return flat.detach().double().numpy(), pull


def _count(value: Any, arg: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise ArgumentError(f"{arg}: expected a whole number of 0 or more, got {value!r}")
    return int(value)


def _sign(desired: str) -> float:
    if desired not in ("above", "below"):
        raise ArgumentError(f'desired: expected "above" or "below", got {desired!r}')
    return 1.0 if desired == "above" else -1.0


def _plain(x: Any) -> Any:
    return x.detach().cpu().numpy() if _interop.is_torch(x) else x


def _instance(instance: Any, names: list[str], named: bool) -> tuple[Array, list[str]]:
    if isinstance(instance, Mapping) or hasattr(instance, "to_dict"):
        given = {str(n): v for n, v in (instance if isinstance(instance, Mapping) else instance.to_dict()).items()}
        if set(given) != set(names):
            odd = sorted(set(given) ^ set(names))
            raise ArgumentError(f"instance: expected the features {names}, differs in {odd}")
        instance = [given[n] for n in names]
    try:
        start = np.asarray(_plain(instance), dtype=np.float64)
    except (TypeError, ValueError) as err:
        raise ArgumentError(f"instance: expected numbers, got {instance!r:.80}") from err
    if named and start.shape != (len(names),):
        raise ShapeError(f"instance: expected shape ({len(names)},), got {start.shape}")
    if start.ndim != 1 or start.size == 0:
        raise ShapeError(f"instance: expected one axis of features, got shape {start.shape}")
    if not np.isfinite(start).all():
        raise NonFiniteError(f"instance: non-finite value at {int(np.flatnonzero(~np.isfinite(start))[0])}")
    return start, names if named else [f"x{i}" for i in range(len(start))]


def _weights(rule: str | None, records: Array | None, d: int) -> Array:
    if rule not in (None, "mad", "std"):
        raise ArgumentError(f'weights: expected "mad", "std", None or numbers, got {rule!r}')
    if rule is None or records is None:
        return np.ones(d)
    spread = records.std(axis=0)
    if rule == "mad":
        mad = np.median(np.abs(records - np.median(records, axis=0)), axis=0)
        spread = np.where(mad > 0, mad, spread)
    return np.asarray(1 / np.where(spread > 0, spread, 1.0))


def _box(
    start: Array, names: list[str], fixed: Any, increase_only: Any, decrease_only: Any, bounds: Any
) -> tuple[Array, Array]:
    d = len(start)
    low, high = np.full(d, -np.inf), np.full(d, np.inf)

    def place(feature: int | str, arg: str) -> int:
        if isinstance(feature, str):
            if feature not in names:
                raise ArgumentError(f"{arg}: expected a feature of {names}, got {feature!r}")
            return names.index(feature)
        if not 0 <= int(feature) < d:
            raise ArgumentError(f"{arg}: expected features from 0 to {d - 1}, got {feature!r}")
        return int(feature)

    if isinstance(bounds, Mapping):
        for feature, (a, b) in bounds.items():
            i = place(feature, "bounds")
            low[i], high[i] = float(a), float(b)
    elif bounds is not None:
        if len(bounds) != 2:
            raise ArgumentError(f"bounds: expected (low, high) or a mapping, got {bounds!r:.80}")
        try:
            low = np.broadcast_to(np.asarray(bounds[0], dtype=np.float64), (d,)).copy()
            high = np.broadcast_to(np.asarray(bounds[1], dtype=np.float64), (d,)).copy()
        except (TypeError, ValueError) as err:
            raise ArgumentError(f"bounds: expected numbers or {d} of them, got {bounds!r:.80}") from err
    for feature in increase_only:
        i = place(feature, "increase_only")
        low[i] = max(low[i], start[i])
    for feature in decrease_only:
        i = place(feature, "decrease_only")
        high[i] = min(high[i], start[i])
    for feature in fixed:
        i = place(feature, "fixed")
        low[i] = high[i] = start[i]
    if not (low <= high).all():
        i = int(np.flatnonzero(~(low <= high))[0])
        raise ArgumentError(f"bounds: expected low <= high for {names[i]!r}, got {low[i]:g} and {high[i]:g}")
    return low, high
