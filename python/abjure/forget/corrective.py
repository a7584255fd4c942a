"""Corrective unlearning: only part of the manipulated training data is known (Goel and others, arXiv 2402.14015)."""

from __future__ import annotations

import copy
import html
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .._files import write_atomically
from ..errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from ..measure._arrays import class_labels
from ..measure.outputs import outputs

__all__ = [
    "CorrectiveCell",
    "CorrectiveReport",
    "CorrectiveTask",
    "Manipulation",
    "PatchTrigger",
    "corrective_benchmark",
    "poison",
    "shuffle_labels",
    "swap_classes",
]

Ints = npt.NDArray[np.int64]

#: The published fractions of the manipulated set that are known.
FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_BATCH = 512


@dataclass(frozen=True)
class PatchTrigger:
    """Writes a square of one value into the bottom-right corner of images ``(..., height, width)``."""

    #: Value of the patch; the published one is the largest of the (normalised) training data.
    value: float
    size: int = 3

    def __call__(self, x: Any) -> Any:
        """The images with the patch, a new tensor.

        Raises:
            ShapeError: fewer than two image axes, or images smaller than the patch.
        """
        if x.ndim < 3 or min(x.shape[-2:]) < self.size:
            raise ShapeError(f"x: expected images of {self.size}x{self.size} or more, got shape {tuple(x.shape)}")
        marked = x.clone()
        marked[..., -self.size :, -self.size :] = self.value
        return marked


@dataclass(frozen=True)
class Manipulation:
    """A training set of which some samples were manipulated; made by :func:`poison` and its kin."""

    kind: str
    #: Training inputs ``(n, ...)`` and labels ``(n,)`` as they are after the manipulation, and the true labels.
    x: Any
    y: Any
    true_y: Any
    #: The manipulated samples S_m in the order in which they become known: :meth:`known` takes the first of them.
    manipulated: Ints
    #: The classes whose test accuracy is to be corrected; None for all.
    classes: tuple[int, ...] | None = None
    #: What was written into poisoned inputs, and the class they were given.
    trigger: Callable[[Any], Any] | None = None
    target: int | None = None

    def known(self, fraction: float) -> Ints:
        """The flagged part S_f of the manipulated samples, the nearest count to ``fraction`` and at least one.

        Larger fractions contain smaller ones.

        Raises:
            ArgumentError: a fraction outside (0, 1].
        """
        if not 0 < fraction <= 1:
            raise ArgumentError(f"fraction: expected a number in (0, 1], got {fraction}")
        return np.sort(self.manipulated[: max(1, round(fraction * len(self.manipulated)))])

    def corrected_test(self, x: Any, y: Any) -> tuple[Any, Any]:
        """The test data on which the manipulation shows, with true labels: triggered, or of the swapped classes."""
        if self.trigger is not None:
            return self.trigger(x), y
        if self.classes is None:
            return x, y
        return _of_classes(x, y, self.classes, True)

    def retained_test(self, x: Any, y: Any) -> tuple[Any, Any] | None:
        """The test data that should stay as it was: clean, or of the other classes; None if every class is affected."""
        if self.trigger is not None:
            return x, y
        return None if self.classes is None else _of_classes(x, y, self.classes, False)


def _of_classes(x: Any, y: Any, classes: Sequence[int], inside: bool) -> tuple[Any, Any]:
    import torch

    rows = torch.isin(y, torch.tensor(classes, device=y.device)) == inside
    if not bool(rows.any()):
        side = "of" if inside else "outside"
        raise ArgumentError(f"test: expected samples {side} the classes {tuple(classes)}, got none")
    return x[rows], y[rows]


def _labels(y: Any, n: int | None, name: str = "y") -> Any:
    import torch

    class_labels(y, name, n)
    return torch.as_tensor(y).long()


def _count(count: Any, most: int, least: int = 1) -> int:
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not least <= count <= most:
        raise ArgumentError(f"count: expected an integer in [{least}, {most}], got {count!r}")
    return int(count)


def poison(
    x: Any,
    y: Any,
    count: int,
    *,
    trigger: Callable[[Any], Any] | None = None,
    target: int = 0,
    seed: int = 0,
) -> Manipulation:
    """Backdoor: random samples get a trigger and the label ``target``.

    Args:
        x: training inputs ``(n, ...)``, a float tensor; images for the default trigger.
        y: true labels ``(n,)``, integers.
        count: samples to poison, of any class, as published: 100, 500 or 1,000.
        trigger: ``trigger(inputs) -> inputs``; by default a :class:`PatchTrigger` of the largest value in ``x``. Apply
            it after augmentation if there is any.
        target: the label that they get.
        seed: of the choice.

    Raises:
        ShapeError, DTypeError, ArgumentError: data that do not fit, count outside [1, n], target below 0.

    Source: arXiv 2402.14015 and its benchmark (3x3 patch, label 0).
    """
    import torch

    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise DTypeError(f"x: expected a float tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    labels = _labels(y, len(x))
    if isinstance(target, bool) or not isinstance(target, int) or target < 0:
        raise ArgumentError(f"target: expected a class of 0 or more, got {target!r}")
    chosen = np.random.default_rng(seed).permutation(len(x))[: _count(count, len(x))]
    trigger = trigger or PatchTrigger(float(x.max()))
    new_x, new_y = x.clone(), labels.clone()
    new_x[chosen] = trigger(x[chosen])
    new_y[chosen] = target
    return Manipulation("poisoning", new_x, new_y, labels, chosen.astype(np.int64), None, trigger, target)


def swap_classes(x: Any, y: Any, classes: tuple[int, int], count: int, *, seed: int = 0) -> Manipulation:
    """Interclass confusion: half of ``count`` samples of each of two classes exchange labels.

    Args:
        x: training inputs ``(n, ...)``, kept as they are.
        y: true labels ``(n,)``, integers.
        classes: the two classes.
        count: samples to relabel in all, even.
        seed: of the choice (published: the first of each class).

    Raises:
        ShapeError, DTypeError, ArgumentError: data that do not fit, or too few samples of a class.

    Source: arXiv 2402.14015 (``interclasslabelswap``).
    """
    labels = _labels(y, len(x))
    if len(tuple(classes)) != 2 or classes[0] == classes[1]:
        raise ArgumentError(f"classes: expected two different classes, got {classes}")
    draw = np.random.default_rng(seed)
    members = [draw.permutation(np.flatnonzero(labels.cpu().numpy() == c)) for c in classes]
    half = _count(count, 2 * min(map(len, members)), 2) // 2
    if count % 2:
        raise ArgumentError(f"count: expected an even number, got {count}")
    new_y = labels.clone()
    for rows, other in zip(members, reversed(tuple(classes)), strict=True):
        new_y[rows[:half]] = other
    chosen = draw.permutation(np.concatenate([rows[:half] for rows in members])).astype(np.int64)
    return Manipulation("interclass swap", x, new_y, labels, chosen, (int(classes[0]), int(classes[1])))


def shuffle_labels(x: Any, y: Any, count: int, *, seed: int = 0) -> Manipulation:
    """Random label swap: the labels of ``count`` random samples are permuted among them (some keep theirs).

    Args:
        x: training inputs ``(n, ...)``, kept as they are.
        y: true labels ``(n,)``, integers.
        count: samples to relabel.
        seed: of the choice and the permutation.

    Raises:
        ShapeError, DTypeError, ArgumentError: data that do not fit, or count outside [2, n].

    Source: arXiv 2402.14015 (``randomlabelswap``).
    """
    labels = _labels(y, len(x))
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(labels))[: _count(count, len(labels), 2)].astype(np.int64)
    new_y = labels.clone()
    new_y[chosen] = labels[draw.permutation(chosen)]
    return Manipulation("label shuffle", x, new_y, labels, chosen)


@dataclass(frozen=True)
class CorrectiveTask:
    """All that a method of corrective unlearning may see: no test data, no true labels, no unflagged manipulation."""

    #: A copy of the model trained on all data; the method may change and return it.
    model: Any
    #: Training data as they are, manipulated samples included.
    x: Any
    y: Any
    #: Indices of the flagged samples S_f, and of all others.
    flagged: Any
    kept: Any
    #: Held-out data ``(x, y)`` to choose hyperparameters on, if any were given.
    held: tuple[Any, Any] | None
    seed: int


@dataclass(frozen=True)
class CorrectiveCell:
    """One method at one known fraction. Accuracies are shares in [0, 1]."""

    method: str
    fraction: float
    seed: int
    #: Test accuracy where the manipulation shows, true labels: the headline.
    corrected: float
    #: Test accuracy elsewhere; None if there is no elsewhere.
    retained: float | None
    #: Share of test samples that follow the manipulation: classified as the target class, or as the wrong one of the
    #: two. None for shuffles.
    misled: float | None
    #: Training accuracy, true labels, on all manipulated and on the flagged samples.
    manipulated: float
    flagged: float | None
    seconds: float


@dataclass
class CorrectiveReport:
    """What the methods of a corrective benchmark reached at each known fraction."""

    kind: str
    #: |S_m| and the number of training samples.
    manipulated: int
    samples: int
    #: The model before unlearning.
    original: CorrectiveCell
    cells: list[CorrectiveCell] = field(default_factory=list)

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order in which they ran."""
        return list(dict.fromkeys(c.method for c in self.cells))

    @property
    def fractions(self) -> list[float]:
        """The known fractions, increasing."""
        return sorted({c.fraction for c in self.cells})

    def mean(self, method: str, fraction: float, measure: str = "corrected") -> tuple[float, float]:
        """Mean and standard deviation (n - 1; nan for one) of a measure over seeds.

        Raises:
            ArgumentError: no such cell.
        """
        values = [getattr(c, measure) for c in self.cells if (c.method, c.fraction) == (method, fraction)]
        if not values or None in values:
            raise ArgumentError(f"method, fraction: expected a cell with {measure}, got {method!r} at {fraction}")
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")

    def _rows(self) -> Iterator[list[str]]:
        def cells(found: Sequence[CorrectiveCell]) -> list[str]:
            row = []
            for measure in ("corrected", "retained", "misled", "manipulated", "flagged"):
                values = [v for c in found if (v := getattr(c, measure)) is not None]
                spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
                row.append(f"{100 * np.mean(values):.1f}{spread}" if values else "–")
            return [*row, f"{np.mean([c.seconds for c in found]):.1f}"]

        yield ["original", "–", *cells([self.original])]
        for method in self.methods:
            for fraction in self.fractions:
                found = [c for c in self.cells if (c.method, c.fraction) == (method, fraction)]
                if found:
                    yield [method, f"{fraction:.0%}", *cells(found)]

    _HEAD = ("method", "known", "corrected %", "retained %", "misled %", "S_m right %", "S_f right %", "seconds")

    @property
    def statement(self) -> str:
        """In words, what was manipulated and what the columns mean."""
        return (
            f"{self.kind}: {self.manipulated:,} of {self.samples:,} training samples are manipulated; part of them "
            "is known. Corrected: test accuracy where the manipulation shows, true labels. Retained: test accuracy "
            "elsewhere. Misled: test samples that follow the manipulation. Retraining without the known samples is no "
            "gold standard here: the unknown ones stay in the data."
        )

    def __str__(self) -> str:
        rows = [list(self._HEAD), *self._rows()]
        widths = [max(len(r[i]) for r in rows) for i in range(len(self._HEAD))]
        lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
                 for r in rows]  # fmt: skip
        return "\n".join([self.statement, *lines])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(t)}</th>" for t in self._HEAD)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self._rows())
        return f"<p>{html.escape(self.statement)}</p><table><tr>{head}</tr>{rows}</table>"

    def plot(self, axes: Any = None) -> Any:
        """Corrected and retained accuracy against the known fraction, one line per method; returns two axes."""
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for ax, measure in zip(axes, ("corrected", "retained"), strict=True):
            before = getattr(self.original, measure)
            if before is None:
                continue
            ax.axhline(100 * before, color="grey", lw=1, ls="--", label="original")
            for method in self.methods:
                at = [f for f in self.fractions if any((c.method, c.fraction) == (method, f) for c in self.cells)]
                found = np.array([self.mean(method, f, measure) for f in at])
                spread = None if np.isnan(found[:, 1]).any() else 100 * found[:, 1]
                ax.errorbar(100 * np.array(at), 100 * found[:, 0], spread, marker="o", ms=4, capsize=2, label=method)
            ax.set_xlabel("known share of the manipulated samples (%)")
            ax.set_title(f"{measure} accuracy (%)")
        axes[0].legend()
        return axes

    def to_json(self) -> str:
        """Everything, as JSON that :meth:`from_json` reads."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> CorrectiveReport:
        """A report from :meth:`to_json`.

        Raises:
            ArgumentError: not such a text.
        """
        try:
            found = json.loads(text)
            cells = [CorrectiveCell(**c) for c in found.pop("cells")]
            return cls(original=CorrectiveCell(**found.pop("original")), cells=cells, **found)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise ArgumentError(f"text: expected the JSON of a CorrectiveReport, got {text[:40]!r} ({err})") from err


def corrective_benchmark(
    manipulation: Manipulation,
    original: Any,
    methods: Mapping[str, Callable[[CorrectiveTask], Any]],
    test: tuple[Any, Any],
    *,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = (0,),
    held: tuple[Any, Any] | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> CorrectiveReport:
    """Runs methods of corrective unlearning while only a part of the manipulated data is known.

    Every method sees the same :class:`CorrectiveTask`, and none sees the test data: choosing the best epoch or constant
    by test accuracy, as some published baselines do, would compare unequal things.

    Args:
        manipulation: the training data and what was done to them.
        original: the model trained on all of them; it is copied, never changed.
        methods: ``method(task) -> model`` by name. The time of the call is measured.
        test: clean test data ``(x, y)`` with true labels.
        fractions: known shares |S_f| / |S_m|, in (0, 1].
        seeds: passed to the methods; several give a spread.
        held: held-out data ``(x, y)`` for the methods' choices.
        path: JSON file of the report, written after every cell; cells that it already holds are not run again.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        A table, a plot over the known fraction, JSON.

    Raises:
        ArgumentError: no methods, fractions or seeds, a fraction outside (0, 1], or a file of another benchmark.
        ShapeError, ArgumentError: test data that do not fit, or labels out of range.
        NonFiniteError: a method's model gives NaN or infinite logits; the method and fraction are named.
        DTypeError: a method does not return a model.

    Source: Goel and others, "Corrective Machine Unlearning", arXiv 2402.14015, and its benchmark.
    """
    from tqdm.auto import tqdm

    if not methods or not len(fractions) or not len(seeds):
        raise ArgumentError("methods, fractions, seeds: expected at least one of each, got none")
    flags = {float(f): manipulation.known(f) for f in fractions}
    for (x, y), name in ((test, "test"), *(((held, "held"),) if held is not None else ())):
        if len(x) != len(y) or not len(x):
            raise ShapeError(f"{name}: expected as many inputs as labels, above 0, got {len(x)} and {len(y)}")
    score = _Score(manipulation, test)
    report = CorrectiveReport(
        manipulation.kind,
        len(manipulation.manipulated),
        len(manipulation.y),
        score(original, "original", 0.0, 0, None, 0.0),
    )
    done = _resumed(path, report)
    plan = [(m, f, s) for m in methods for f in sorted(flags) for s in seeds]
    for method, fraction, seed in tqdm(plan, desc="corrective", unit="cell", disable=None if progress else True):
        if (method, fraction, seed) not in done:
            task = _task(manipulation, original, flags[fraction], held, seed)
            start = time.perf_counter()
            model = methods[method](task)
            seconds = time.perf_counter() - start
            if not hasattr(model, "named_modules"):
                raise DTypeError(f"methods: {method!r}: expected a torch module back, got {type(model).__name__}")
            done[method, fraction, seed] = score(model, method, fraction, seed, flags[fraction], seconds)
        report.cells.append(done[method, fraction, seed])
        if path is not None:
            # Cells of the file that have not had their turn, or are not asked for this time, stay in it.
            reached = {(c.method, c.fraction, c.seed) for c in report.cells}
            rest = [c for at, c in done.items() if at not in reached]
            write_atomically(path, replace(report, cells=report.cells + rest).to_json().encode())
    return report


def _task(
    manipulation: Manipulation, original: Any, flagged: Ints, held: tuple[Any, Any] | None, seed: int
) -> CorrectiveTask:
    import torch

    kept = np.setdiff1d(np.arange(len(manipulation.y)), flagged)
    f, k = torch.from_numpy(flagged), torch.from_numpy(kept)
    return CorrectiveTask(copy.deepcopy(original), manipulation.x, manipulation.y, f, k, held, seed)


def _resumed(
    path: str | os.PathLike[str] | None, report: CorrectiveReport
) -> dict[tuple[str, float, int], CorrectiveCell]:
    if path is None or not Path(path).exists():
        return {}
    found = CorrectiveReport.from_json(Path(path).read_text())
    if (found.kind, found.manipulated, found.samples) != (report.kind, report.manipulated, report.samples) or any(
        getattr(found.original, m) != getattr(report.original, m) for m in ("corrected", "retained", "manipulated")
    ):
        raise ArgumentError(f"path: expected a report of the same benchmark, got another one in {os.fspath(path)!r}")
    return {(c.method, c.fraction, c.seed): c for c in found.cells}


class _Score:
    """Measures a model on all parts of a benchmark."""

    def __init__(self, manipulation: Manipulation, test: tuple[Any, Any]) -> None:
        import torch

        x, y = test[0], _labels(test[1], len(test[0]), "test")
        self._m = manipulation
        self._corrected = manipulation.corrected_test(x, y)
        self._retained = manipulation.retained_test(x, y)
        self._wrong: Any = None
        if manipulation.target is not None:
            # Samples of the target class cannot be misled into it.
            self._wrong = torch.where(y == manipulation.target, -1, manipulation.target)
        elif manipulation.classes is not None:
            a, b = manipulation.classes
            self._wrong = torch.where(self._corrected[1] == a, b, a)

    def __call__(
        self, model: Any, method: str, fraction: float, seed: int, flagged: Ints | None, seconds: float
    ) -> CorrectiveCell:
        m = self._m
        try:
            guess = _predict(model, *self._corrected)
            wrong = None
            if self._wrong is not None:
                told = self._wrong.cpu().numpy()
                wrong = float((guess == told)[told >= 0].mean()) if (told >= 0).any() else None
            train = _predict(model, m.x[m.manipulated], m.true_y[m.manipulated])
            right = dict(zip(m.manipulated.tolist(), train == m.true_y[m.manipulated].cpu().numpy(), strict=True))
            retained = self._retained
            kept = None if retained is None else (_predict(model, *retained) == retained[1].cpu().numpy()).mean()
        except NonFiniteError as err:
            raise NonFiniteError(f"methods: {method!r} at {fraction:.0%} known: {err}") from None
        return CorrectiveCell(
            method,
            fraction,
            seed,
            float((guess == self._corrected[1].cpu().numpy()).mean()),
            None if kept is None else float(kept),
            wrong,
            float(np.mean(list(right.values()))),
            None if flagged is None else float(np.mean([right[i] for i in flagged.tolist()])),
            seconds,
        )


def _predict(model: Any, x: Any, y: Any) -> Any:
    loader = zip(x.split(_BATCH), y.split(_BATCH), strict=True)
    return outputs({"model": model}, loader, name="data")["model"].probabilities.argmax(axis=1)
