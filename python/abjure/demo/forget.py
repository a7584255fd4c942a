"""Forget a class of the digits by Selective Synaptic Dampening, beside a model that never saw it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from .. import forget as unlearn
from ..measure.membership import entropy_mia
from . import digits
from .plot import GREY, ORANGE, RED, TEAL, axes, picture
from .section import Section, Table

TITLE = "Forget: a class leaves a trained network"
LEAD = (
    "A small CNN has learnt the digits. Selective Synaptic Dampening shrinks the weights that matter far more to one "
    "class than to all data. The yardstick is a network retrained from scratch without that class."
)
CLASS = 3
ALPHAS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 70.0, 100.0, 150.0, 200.0, 300.0, 500.0)


@dataclass
class Task:
    """The data of one request: forget class ``label``."""

    x: Tensor
    y: Tensor
    train: Tensor
    held: Tensor
    test: Tensor
    label: int

    def rows(self, part: Tensor, forget: bool) -> tuple[Tensor, Tensor]:
        """Images and labels of ``part`` that belong to the class, or that do not."""
        chosen = part[(self.y[part] == self.label) == forget]
        return self.x[chosen], self.y[chosen]


@dataclass
class Outcome:
    """What one model does, on test data unless said."""

    forget_accuracy: float
    rest_accuracy: float
    #: Share of the forget class's training samples taken for members.
    membership: float
    seconds: float


@dataclass
class Trial:
    """One class forgotten: three models, the search for alpha, and the drawings' data."""

    original: Outcome
    dampened: Outcome
    retrained: Outcome
    alpha: float
    selected: int
    curve: dict[str, list[float]]
    per_class: dict[str, list[float]]
    entropies: dict[str, list[float]]


@digits.one_thread()
def run(seed: int, say: Callable[[str], None]) -> Section:
    """Forgets digit ``CLASS`` in detail and every digit in turn for the spread."""
    x, y = digits.digits()
    train, held, test = digits.split(y, (1000, 200), seed)
    say("training the original")
    digits.train(x[:1], y[:1], seed, epochs=1)  # torch loads its optimisers on first use
    start = time.perf_counter()
    model = digits.train(x[train], y[train], seed)
    original_seconds = time.perf_counter() - start
    trials = []
    for label in range(10):
        say(f"forgetting digit {label}")
        trials.append(trial(model, Task(x, y, train, held, test, label), seed, original_seconds))
    return section(trials, sum(p.numel() for p in model.parameters()))


def trial(model: nn.Module, task: Task, seed: int, original_seconds: float) -> Trial:
    """Forgets one class, measures, and restores the model."""
    before = outcome(model, task, original_seconds)
    classes = {"original": class_accuracies(model, task)}
    entropies = {"original": entropy(model, task)}
    start = time.perf_counter()
    important = measure_importance(model, *task.rows(task.train, True))
    everything = measure_importance(model, task.x[task.train], task.y[task.train])
    alpha, curve = search(model, task, important, everything)
    report = unlearn.dampen_(model, forget=important, retain=everything, alpha=alpha)
    seconds = time.perf_counter() - start
    after = outcome(model, task, seconds)
    classes["dampened"] = class_accuracies(model, task)
    entropies["dampened"] = entropy(model, task)
    report.undo(model)

    start = time.perf_counter()
    fresh = digits.train(*task.rows(task.train, False), seed)
    retrained = outcome(fresh, task, time.perf_counter() - start)
    classes["retrained"] = class_accuracies(fresh, task)
    entropies["retrained"] = entropy(fresh, task)
    return Trial(before, after, retrained, alpha, sum(report.selected.values()), curve, classes, entropies)


def measure_importance(model: nn.Module, x: Tensor, y: Tensor) -> unlearn.Fisher:
    """Squared gradients of each batch's mean loss, as published."""
    return unlearn.importance(model, digits.batches(x, y), digits.loss, progress=False)


def search(
    model: nn.Module, task: Task, important: unlearn.Fisher, everything: unlearn.Fisher
) -> tuple[float, dict[str, list[float]]]:
    """The gentlest alpha with the best held-out trade: accuracy on the rest less accuracy on the class.

    One importance pass serves all; an alpha that selects nothing need not be tried.
    """
    counts = [int(n) for n in unlearn.selection_curve(important, everything, ALPHAS).counts]
    gone, kept = [], []
    for alpha, count in zip(ALPHAS, counts, strict=True):
        report = unlearn.dampen_(model, forget=important, retain=everything, alpha=alpha) if count else None
        gone.append(digits.accuracy(model, *task.rows(task.held, True)))
        kept.append(digits.accuracy(model, *task.rows(task.held, False)))
        if report is not None:
            report.undo(model)
    best = max(range(len(ALPHAS)), key=lambda i: (round(kept[i] - gone[i], 9), ALPHAS[i]))
    curve = {"alpha": list(ALPHAS), "selected": [float(n) for n in counts], "held_forget": gone, "held_rest": kept}
    return ALPHAS[best], curve


def outcome(model: nn.Module, task: Task, seconds: float) -> Outcome:
    """Accuracy on both sides of the test data and the membership score of the forgotten training samples."""
    return Outcome(
        digits.accuracy(model, *task.rows(task.test, True)),
        digits.accuracy(model, *task.rows(task.test, False)),
        entropy_mia(
            digits.probabilities(model, task.rows(task.train, False)[0]),
            digits.probabilities(model, task.rows(task.test, False)[0]),
            digits.probabilities(model, task.rows(task.train, True)[0]),
        ),
        seconds,
    )


def class_accuracies(model: nn.Module, task: Task) -> list[float]:
    """Test accuracy of each digit."""
    y = task.y[task.test]
    return [digits.accuracy(model, task.x[task.test][y == c], y[y == c]) for c in range(10)]


def entropy(model: nn.Module, task: Task) -> list[float]:
    """Entropy in nats of the predictions for the forget class's training samples."""
    p = digits.probabilities(model, task.rows(task.train, True)[0])
    return [float(v) for v in -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)]


def section(trials: list[Trial], parameters: int) -> Section:
    """Tables, pictures and numbers."""
    shown = trials[CLASS]
    rows = [("original", shown.original), ("dampened", shown.dampened), ("retrained without it", shown.retrained)]
    main = Table(
        f"Digit {CLASS}, test data",
        ("model", f"accuracy on {CLASS}", "accuracy on the rest", "taken for members", "seconds"),
        [
            (name, f"{o.forget_accuracy:.3f}", f"{o.rest_accuracy:.3f}", f"{o.membership:.2f}", f"{o.seconds:.3f}")
            for name, o in rows
        ],
        note="Taken for members: share of the digit's training samples that an entropy attack calls training data; the "
        "goal is the retrained model's value. Seconds: training, or both importance passes and the search for alpha.",
        accent=1,
    )
    every = Table(
        "Each digit in turn",
        ("digit", "alpha", "selected", "on it", "on the rest", "members", "retrained: rest", "members"),
        [
            (
                str(c), f"{t.alpha:g}", str(t.selected), f"{t.dampened.forget_accuracy:.3f}",
                f"{t.dampened.rest_accuracy:.3f}", f"{t.dampened.membership:.2f}", f"{t.retrained.rest_accuracy:.3f}",
                f"{t.retrained.membership:.2f}",
            )
            for c, t in enumerate(trials)
        ],
        note=f"Selected: of {parameters} weights. Alpha is chosen on 200 held-out training images, never on the test "
        "images.",
    )  # fmt: skip
    d, o, r = shown.dampened, shown.original, shown.retrained
    worst = min(t.dampened.rest_accuracy - t.retrained.rest_accuracy for t in trials)
    left = [t.dampened.forget_accuracy for t in trials]
    findings = [
        f"Accuracy on digit {CLASS} falls from {o.forget_accuracy:.3f} to {d.forget_accuracy:.3f}; on the rest it is "
        f"{d.rest_accuracy:.3f} (original {o.rest_accuracy:.3f}, retrained {r.rest_accuracy:.3f}).",
        f"Both importance passes, the search for alpha and the dampening took {d.seconds:.2f} s, retraining "
        f"{r.seconds:.2f} s; {shown.selected} of {parameters} weights changed.",
        f"Over all ten digits the class keeps at most {max(left):.3f} accuracy, and the rest is never more than "
        f"{max(0.0, -worst):.3f} below retraining.",
    ]
    numbers = {
        "class": CLASS,
        "parameters": parameters,
        "trials": {str(c): asdict(t) for c, t in enumerate(trials)},
    }
    return Section("forget", TITLE, LEAD, findings, [main, every], [draw_effect(shown), draw_choice(shown)], numbers)


def draw_effect(t: Trial) -> Any:
    """Accuracy of each digit, and the entropies that the attack reads."""
    figure, (left, right) = axes(2)
    for i, (name, colour) in enumerate((("original", GREY), ("dampened", TEAL), ("retrained", ORANGE))):
        left.bar(np.arange(10) + (i - 1) * 0.27, t.per_class[name], 0.25, color=colour, label=name)
        right.hist(t.entropies[name], bins=np.linspace(0, 2.31, 32).tolist(), color=colour, alpha=0.75, label=name)
    left.set(xticks=range(10), xlabel="digit", ylabel="test accuracy", ylim=(0, 1.22))
    left.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
    right.set(xlabel="entropy of the prediction (nats)", ylabel=f"training images of digit {CLASS}")
    right.legend(frameon=False, fontsize=8)
    return picture(
        figure,
        f"Left: only digit {CLASS} is lost. Right: the dampened network is at least as unsure of it as one that "
        "never saw it.",
    )


def draw_choice(t: Trial) -> Any:
    """The curve of selected counts and the held-out accuracies that chose alpha."""
    figure, (left, right) = axes(2)
    alpha = t.curve["alpha"]
    chosen = np.array(t.curve["selected"])
    left.loglog(np.array(alpha)[chosen > 0], chosen[chosen > 0], color=TEAL, marker="o", ms=3)
    left.set(xlabel="alpha", ylabel="weights selected", title="one pass over the importances")
    right.semilogx(alpha, t.curve["held_rest"], color=TEAL, marker="o", ms=3, label="held-out rest")
    right.semilogx(alpha, t.curve["held_forget"], color=RED, marker="o", ms=3, label=f"held-out digit {CLASS}")
    right.set(xlabel="alpha", ylabel="accuracy", ylim=(-0.05, 1.05))
    right.legend(frameon=False, fontsize=8, loc="center left")
    for ax in (left, right):
        ax.axvline(t.alpha, color=GREY, lw=1, ls="--")
    return picture(
        figure, f"Choosing alpha: the dashed line is the gentlest value with the best trade (alpha = {t.alpha:g})."
    )
