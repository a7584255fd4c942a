"""Protect the digits by Bayes-error ascent and train fresh models on the result."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import protect as guard
from . import digits
from .plot import GREY, RED, TEAL, axes, image_grid, picture
from .section import Section, Table

TITLE = "Protect: data from which models do not learn"
LEAD = (
    "Each digit class is moved, within a stated budget, to where the best rule that can be learnt from the published "
    "images is wrong about the clean ones. No network is used to find it; three kinds of fresh model then try to learn."
)
BUDGET = 64
EPSILON = BUDGET / 255
#: What is usual on photographs.
UNSEEN_BUDGET = 8
BANDWIDTH = 1.0
STEPS = 60
MODEL_SEEDS = 3
LEARNERS = ("logistic regression", "MLP", "CNN")

Images = npt.NDArray[np.float32]


@dataclass
class Data:
    """Clean training images ``(n, 64)`` in [0, 1] with labels, and clean test images."""

    x: Images
    y: npt.NDArray[np.int64]
    test_x: Images
    test_y: npt.NDArray[np.int64]


@digits.one_thread()
def run(seed: int, say: Callable[[str], None]) -> Section:
    """Protects, reads both Bayes errors, and trains on every variant."""
    x, y = digits.digits()
    train, test = digits.split(y, (1200,), seed)
    data = Data(x[train].numpy(), y[train].numpy(), x[test].numpy(), y[test].numpy())
    say("Bayes-error ascent")
    start = time.perf_counter()
    protected = ascend(data, EPSILON, seed)
    seconds = time.perf_counter() - start
    published = np.asarray(protected.x, dtype=np.float32)
    variants = training_sets(data, published, seed)
    unseen = np.asarray(ascend(data, UNSEEN_BUDGET / 255, seed).x, dtype=np.float32)
    variants[f"protected, only {UNSEEN_BUDGET}/255"] = (unseen, data.y)
    accuracy = {}
    for name, (images, labels) in variants.items():
        say(f"training on {name}")
        accuracy[name] = learn(images, labels, data, seed)
    readings = {"before": bayes_errors(data, data.x), "after": bayes_errors(data, published)}
    return section(data, published, protected, accuracy, readings, variants, seconds)


def ascend(data: Data, epsilon: float, seed: int) -> Any:
    """The protected images and the trace of the ascent."""
    return guard.maximize_bayes_error(
        data.x, data.y, epsilon=epsilon, norm="linf", steps=STEPS, against="clean", per="class", objective="soft",
        bandwidth=BANDWIDTH, box=(0.0, 1.0), seed=seed, progress=False,
    )  # fmt: skip


def training_sets(data: Data, published: Images, seed: int) -> dict[str, tuple[Images, npt.NDArray[np.int64]]]:
    """What somebody may train on: protected images, controls of the same size, a mixture, a budget nobody sees."""
    draw = np.random.default_rng(seed)

    def moved(shift: npt.NDArray[Any]) -> Images:
        return np.clip(data.x + EPSILON * shift, 0, 1).astype(np.float32)

    means = np.stack([data.x[data.y == c].mean(axis=0) for c in range(10)])
    toward_next = np.sign(np.roll(means, -1, axis=0) - means)
    half = draw.permutation(len(data.x)) < len(data.x) // 2
    return {
        "clean": (data.x, data.y),
        "protected": (published, data.y),
        "random noise, per image": (moved(draw.choice([-1.0, 1.0], size=data.x.shape)), data.y),
        "random noise, per class": (moved(draw.choice([-1.0, 1.0], size=(10, 64))[data.y]), data.y),
        "class moved to the next mean": (moved(toward_next[data.y]), data.y),
        "half protected, half clean": (np.where(half[:, None], published, data.x), data.y),
        "the clean half alone": (data.x[~half], data.y[~half]),
    }


def learn(images: Images, labels: npt.NDArray[np.int64], data: Data, seed: int) -> dict[str, list[float]]:
    """Clean test accuracy of fresh models, one per learner and model seed (logistic regression has no seed)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    test_x, test_y = torch.from_numpy(data.test_x), torch.from_numpy(data.test_y)
    found: dict[str, list[float]] = {name: [] for name in LEARNERS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a model that cannot fit protected data is the point
        found["logistic regression"].append(
            float(LogisticRegression(max_iter=1000).fit(images, labels).score(data.test_x, data.test_y))
        )
        for i in range(MODEL_SEEDS):
            net = MLPClassifier((64,), max_iter=200, random_state=(seed + i) % 2**32).fit(images, labels)
            found["MLP"].append(float(net.score(data.test_x, data.test_y)))
            found["CNN"].append(digits.accuracy(digits.train(x, y, seed + i), test_x, test_y))
    return found


def bayes_errors(data: Data, images: Images) -> dict[str, float]:
    """Two readings: of the images themselves (leave-one-out), and on clean queries of what they teach."""
    own = guard.bayes_error(images, data.y, bandwidth="perplexity", objective="gini")
    # Without labels of their own, queries are the clean places of the rows of ``images``, each blind to its own row.
    taught = guard.bayes_error(images, data.y, queries=data.x, bandwidth=BANDWIDTH, objective="soft")
    return {
        "published_gini": float(own.gini),
        "published_plugin": float(own.plugin),
        "published_bandwidth": float(own.bandwidth[0]),
        "clean_queries_soft": float(taught.value),
        "clean_queries_own_label": float(taught.own_label_error),
    }


def section(
    data: Data,
    published: Images,
    protected: Any,
    accuracy: dict[str, dict[str, list[float]]],
    readings: dict[str, dict[str, float]],
    variants: dict[str, tuple[Images, npt.NDArray[np.int64]]],
    seconds: float,
) -> Section:
    """Tables, pictures and numbers."""
    largest = float(protected.certificate.largest_change)
    names = list(accuracy)
    learned = Table(
        "Clean test accuracy of fresh models, by what they were trained on",
        ("trained on", *LEARNERS),
        [(name, *(spread(accuracy[name][learner]) for learner in LEARNERS)) for name in names],
        note=f"MLP and CNN: mean of {MODEL_SEEDS} initial weights ± standard deviation. Every perturbation but "
        f"the last has the same budget, {BUDGET}/255 per pixel. Chance is 0.1.",
        accent=names.index("protected"),
    )
    before, after = readings["before"], readings["after"]
    errors = Table(
        "Bayes error, two readings",
        ("of", "before", "after"),
        [
            (
                "the published images themselves, gini",
                f"{before['published_gini']:.3f}",
                f"{after['published_gini']:.3f}",
            ),
            ("the same, plug-in", f"{before['published_plugin']:.3f}", f"{after['published_plugin']:.3f}"),
            (
                "clean images, by a rule learnt from the published ones",
                f"{before['clean_queries_soft']:.3f}",
                f"{after['clean_queries_soft']:.3f}",
            ),
            (
                "the same, share whose likeliest class is wrong",
                f"{before['clean_queries_own_label']:.3f}",
                f"{after['clean_queries_own_label']:.3f}",
            ),
        ],
        note="The third reading is the one that is raised, and with the fourth foretells the table above. Low values "
        "in the "
        "first two mean that the published images look like easy data. Before the ascent the third is high already "
        f"because its bandwidth, {BANDWIDTH:g}, is wide: the likeliest class is right, but not by much.",
        accent=2,
    )
    mean = {name: {k: float(np.mean(v)) for k, v in row.items()} for name, row in accuracy.items()}
    worst = max(mean["protected"].values())
    mixed, alone = mean["half protected, half clean"], mean["the clean half alone"]
    benefit = [mixed[k] - alone[k] for k in LEARNERS]
    unseen = min(mean[f"protected, only {UNSEEN_BUDGET}/255"].values())
    findings = [
        f"Budget: at most {BUDGET}/255 = {EPSILON:.3f} per pixel (largest change made: {largest:.3f}). On 8x8 digits "
        "that "
        f"is plainly visible; {UNSEEN_BUDGET}/255, usual on photographs, leaves every model at {unseen:.2f} or more.",
        f"Trained on the protected images, no model passes {worst:.2f} on clean digits (clean training: "
        f"{min(mean['clean'].values()):.2f} and more). The ascent took {seconds:.1f} s.",
        f"Mixing is the limit: beside a clean half, the protected half changes what that half alone teaches by only "
        f"{min(benefit):+.3f} to {max(benefit):+.3f}.",
    ]
    numbers: dict[str, Any] = {
        "epsilon": EPSILON,
        "largest_change": largest,
        "bandwidth": BANDWIDTH,
        "steps": STEPS,
        "ascent_seconds": seconds,
        "accuracy": accuracy,
        "bayes_error": readings,
        "trace": [float(v) for v in protected.trace.steps],
    }
    pictures = [draw_images(data, published, variants), draw_learning(mean, numbers["trace"])]
    return Section("protect", TITLE, LEAD, findings, [learned, errors], pictures, numbers)


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation where there is more than one value."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def draw_images(data: Data, published: Images, variants: dict[str, tuple[Images, npt.NDArray[np.int64]]]) -> Any:
    """One image of each class: clean, protected, what was added, and noise of the same size."""
    first = [int(np.flatnonzero(data.y == c)[0]) for c in range(10)]
    noise = variants["random noise, per image"][0]

    def squares(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return images[first].reshape(10, 8, 8)

    grid = image_grid(
        [
            ("clean", 1 - squares(data.x), "gray"),
            ("protected", 1 - squares(published), "gray"),
            ("change", squares(published - data.x) / EPSILON, "RdBu"),
            ("random noise", 1 - squares(noise), "gray"),
        ]
    )
    return picture(grid, f"One image per class. The change is drawn from -{BUDGET}/255 (red) to +{BUDGET}/255 (blue).")


def draw_learning(mean: dict[str, dict[str, float]], trace: list[float]) -> Any:
    """Accuracies as bars and the objective as it climbs."""
    figure, (left, right) = axes(2)
    shown = list(mean)[::-1]
    for i, (learner, colour) in enumerate(zip(LEARNERS, (GREY, TEAL, RED), strict=True)):
        left.barh(
            np.arange(len(shown)) - (i - 1) * 0.27, [mean[n][learner] for n in shown], 0.25, color=colour, label=learner
        )
    left.set(yticks=range(len(shown)), yticklabels=shown, xlim=(0, 1), xlabel="accuracy on clean test images")
    left.axvline(0.1, color=GREY, lw=1, ls="--")
    left.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    right.plot(trace, color=TEAL)
    right.set(xlabel="step", ylabel="error on clean queries", ylim=(0, 1))
    return picture(figure, "Left: what fresh models learn (dashed: chance). Right: the objective during the ascent.")
