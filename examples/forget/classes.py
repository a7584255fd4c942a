"""Forgetting a class, a subclass and random samples: Fashion-MNIST, a small ResNet, nine methods, three seeds.

    python examples/forget/classes.py --data DIR [--out DIR]     # about 20 minutes on two cores
    python examples/forget/classes.py --quick                    # scikit-learn's digits, seconds

DIR holds Fashion-MNIST's four ``*-ubyte.gz`` files, for example those of Debian's package ``dataset-fashion-mnist``
(``apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb . ``, then
``--data usr/share/datasets/fashion-mnist``).

The yardstick is a network retrained without the samples to forget, in every column: its accuracy on them is what
generalises from the others, and its membership score is what an attack says of samples that were never seen. SSD, ASSD
and LFSSD run with their published constants. "Searched" methods choose alpha (dampening) or the rate (ascent, JiT) by
one rule: of the settings that cost at most one point of accuracy on held-out data of what is kept, the one with the
lowest accuracy on the samples to forget. No method sees test data.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corrective import accuracy, batches, digits, fashion, fit, resnet
from torch import Tensor, nn
from torch.nn import functional as F

from abjure.errors import NonFiniteError
from abjure.forget import (
    Fisher,
    cross_entropy,
    dampen_,
    importance,
    jit_,
    search_dampening,
    squared_output_norm,
)
from abjure.measure.membership import entropy_mia

Data = tuple[Tensor, Tensor]
#: Held-out accuracy on what is kept that a search may give up.
TOLERANCE = 0.01
ALPHAS = (1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0, 30.0, 50.0, 100.0, 300.0, 1000.0)
#: Test images looked at.
TEST = 4_000
TASKS = ("class", "subclass", "random")
COLUMNS = ("forget", "retain", "test_forget", "test_rest", "membership", "seconds")
HEADS = ("on F (train)", "on R (train)", "on F's kind (test)", "on the rest (test)", "taken for members", "seconds")


@dataclass(frozen=True)
class Setting:
    """Sizes and labels of one run."""

    train: int
    held: int
    epochs: int
    width: int
    seeds: int
    #: The class to forget.
    label: int
    #: Coarse label of each fine one, and the fine one to forget.
    coarse: tuple[int, ...]
    fine: int
    #: Random samples to forget.
    random: int


#: Coarse: tops and dresses, shoes, the others (trousers, bags). Forgotten: sandals; trousers.
FULL = Setting(6_000, 1_500, 10, 16, 3, 5, (0, 2, 0, 0, 0, 1, 0, 1, 2, 1), 1, 120)
#: Digits: drawn with a closed loop or without.
QUICK = Setting(1_000, 200, 10, 16, 1, 3, (0, 1, 1, 1, 0, 1, 0, 1, 0, 0), 8, 40)


@dataclass
class Task:
    """One request to forget, for one trained network."""

    name: str
    model: nn.Module
    forget: Data
    retain: Data
    #: Held out of the training data, what is to be forgotten left out.
    held: Data
    test_forget: Data
    test_rest: Data
    epochs: int
    fresh: Callable[[], nn.Module]
    seed: int

    @property
    def everything(self) -> Data:
        """All the data in two pieces and not shuffled, as the published loader has it: batches do not mix the two."""
        return torch.cat([self.forget[0], self.retain[0]]), torch.cat([self.forget[1], self.retain[1]])


def tasks(setting: Setting, train: Data, test: Data, seed: int) -> list[Task]:
    """Trains the two networks (fine and coarse labels) of one seed, and states the three requests."""
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
    rows, held = order[: setting.train], order[setting.train : setting.train + setting.held]
    x, y = train[0][rows], train[1][rows]
    coarse = torch.tensor(setting.coarse)

    def fresh(offset: int) -> nn.Module:
        torch.manual_seed(seed + offset)
        return resnet(setting.width)

    def task(name: str, model: nn.Module, labels: Tensor | None, flagged: Tensor, kind: int | None) -> Task:
        def given(fine: Tensor) -> Tensor:
            return fine if labels is None else labels[fine]

        def part(data: Data, of_kind: bool) -> Data:
            chosen = (data[1] == kind) == of_kind if kind is not None else torch.ones(len(data[1]), dtype=torch.bool)
            return data[0][chosen], given(data[1][chosen])

        held_data = train[0][held], train[1][held]
        forget, retain = (x[flagged], given(y[flagged])), (x[~flagged], given(y[~flagged]))
        kept, kin, rest = part(held_data, False), part(test, True), part(test, False)
        return Task(name, model, forget, retain, kept, kin, rest, setting.epochs, lambda: fresh(100), seed)

    fine_model = fit(fresh(0), x, y, setting.epochs, seed)
    coarse_model = fit(fresh(0), x, coarse[y], setting.epochs, seed)
    some = torch.zeros(len(y), dtype=torch.bool)
    some[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed + 1))[: setting.random]] = True
    return [
        task(TASKS[0], fine_model, None, y == setting.label, setting.label),
        task(TASKS[1], coarse_model, coarse, y == setting.fine, setting.fine),
        task(TASKS[2], fine_model, None, some, None),
    ]


# The methods: each changes, or replaces, a copy of the trained network.


def retrained(task: Task) -> nn.Module:
    return fit(task.fresh(), *task.retain, task.epochs, task.seed + 100)


def finetuned(task: Task) -> nn.Module:
    return fit(task.model, *task.retain, task.epochs / 4, task.seed + 2, 1e-3)


def searched(task: Task, changes: list[Callable[[nn.Module], None]]) -> nn.Module:
    """Applies the change that the rule above prefers; the network as it is where none costs little enough."""
    limit = accuracy(task.model, *task.held) - TOLERANCE
    found = [(accuracy(task.model, *task.forget), task.model)]
    for change in changes:
        other = copy.deepcopy(task.model)
        try:
            change(other)
        except NonFiniteError:  # a rate at which the steps diverge
            continue
        if accuracy(other, *task.held) >= limit:
            found.append((accuracy(other, *task.forget), other))
    return min(found, key=lambda pair: pair[0])[1]


def ascended(task: Task) -> nn.Module:
    """Gradient ascent on the samples to forget, one pass of SGD, statistics of batch normalisation left alone."""

    def change(rate: float) -> Callable[[nn.Module], None]:
        def climb(model: nn.Module) -> None:
            optimiser = torch.optim.SGD(model.parameters(), lr=rate)
            for a, b in batches(*task.forget):
                optimiser.zero_grad()
                (-F.cross_entropy(model.eval()(a), b)).backward()
                optimiser.step()

        return climb

    return searched(task, [change(rate) for rate in (1e-4, 3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2)])


def smoothed(task: Task) -> nn.Module:
    """JiT at the noise and number of copies published for a whole class, at several rates."""

    def change(rate: float) -> Callable[[nn.Module], None]:
        return lambda model: void(jit_(model, batches(*task.forget), lr=rate, undo=False, progress=False))

    return searched(task, [change(rate) for rate in (3e-5, 1e-4, 3e-4)])


def void(_: object) -> None:
    return None


def measured(model: nn.Module, data: Data, loss: Any = cross_entropy) -> Fisher:
    return importance(model, batches(*data), loss, progress=False)


def ssd(task: Task) -> nn.Module:
    dampen_(task.model, measured(task.model, task.forget), full=measured(task.model, task.everything), undo=False)
    return task.model


def ssd_searched(task: Task) -> nn.Module:
    model = task.model
    forget, retain = measured(model, task.forget), measured(model, task.retain)

    def evaluate(model: Any) -> tuple[float, float]:
        return accuracy(model, *task.forget), accuracy(model, *task.held)

    found = search_dampening(model, forget, retain, evaluate, ALPHAS, progress=False)
    gentle = [p for p in found.points if p.retain >= found.before.retain - TOLERANCE]
    if gentle:
        best = min(gentle, key=lambda p: (p.forget, p.changed))
        dampen_(model, forget, retain, best.alpha, undo=False)
    return model


def assd(task: Task) -> nn.Module:
    sizes = {"forget_size": len(task.forget[1]), "total_size": len(task.everything[1])}
    forget, retain = measured(task.model, task.forget), measured(task.model, task.retain)
    dampen_(task.model, forget, retain, "adaptive", undo=False, **sizes)
    return task.model


def lfssd(task: Task) -> nn.Module:
    forget = measured(task.model, task.forget, squared_output_norm)
    dampen_(task.model, forget, full=measured(task.model, task.everything, squared_output_norm), undo=False)
    return task.model


def lfssd_adaptive(task: Task) -> nn.Module:
    sizes = {"forget_size": len(task.forget[1]), "total_size": len(task.everything[1])}
    forget = measured(task.model, task.forget, squared_output_norm)
    retain = measured(task.model, task.retain, squared_output_norm)
    dampen_(task.model, forget, retain, "adaptive", undo=False, **sizes)
    return task.model


METHODS: dict[str, Callable[[Task], nn.Module]] = {
    "original": lambda task: task.model,
    "retrained": retrained,
    "finetuned": finetuned,
    "gradient ascent, searched": ascended,
    "SSD": ssd,
    "SSD, searched": ssd_searched,
    "ASSD": assd,
    "LFSSD": lfssd,
    "LFSSD, adaptive": lfssd_adaptive,
    "JiT, searched": smoothed,
}


@torch.no_grad()
def probabilities(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model.eval()(a).softmax(1) for a in x.split(512)])


def outcome(model: nn.Module, task: Task, seconds: float) -> dict[str, float]:
    """The columns of the table for one network."""
    retain = task.retain[0][:2000], task.retain[1][:2000]
    members = (probabilities(model, part[0]) for part in (retain, task.test_rest, task.forget))
    return {
        "forget": accuracy(model, *task.forget),
        "retain": accuracy(model, *retain),
        "test_forget": accuracy(model, *task.test_forget),
        "test_rest": accuracy(model, *task.test_rest),
        "membership": entropy_mia(*members),
        "seconds": seconds,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds, median seconds."""
    lines = []
    for name in dict.fromkeys(r["task"] for r in results):
        lines += [f"\n| {name} | " + " | ".join(HEADS) + " |", "|---" * (len(HEADS) + 1) + "|"]
        for method in METHODS:
            rows = [r for r in results if (r["task"], r["method"]) == (name, method)]
            cells = []
            for column in COLUMNS:
                values = np.array([r[column] for r in rows])
                mean, spread = values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
                # Other work on the machine now and then stretches one of the times: their median.
                time_taken = column == "seconds"
                cells.append(f"{np.median(values):.1f}" if time_taken else f"{100 * mean:.1f} ± {100 * spread:.1f}")
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy on the forget set and on the rest of the test data, one panel per task, retraining marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["task"] for r in results))
    figure = Figure(figsize=(4.2 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for k, method in enumerate(METHODS):
            rows = [r for r in results if (r["task"], r["method"]) == (name, method)]
            marker = {"original": "x", "retrained": "*"}.get(method, "o")
            forget, rest = ([100 * r[c] for r in rows] for c in ("forget", "test_rest"))
            ax.scatter(forget, rest, marker=marker, color=f"C{k}", label=method)
        ax.set(title=name, xlabel="accuracy on the forget set (%)", ylabel="test accuracy on the rest (%)")
    ax.legend(fontsize=7)
    figure.savefig(path, dpi=140)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's *-ubyte.gz files")
    parser.add_argument("--out", type=Path, default=Path("classes-out"), help="folder for results.json and plot.png")
    parser.add_argument("--quick", action="store_true", help="scikit-learn's digits, one seed")
    parser.add_argument("--seeds", type=int, nargs="*", help="those seeds only; a later run adds to results.json")
    given = parser.parse_args(arguments)
    if not given.quick and given.data is None:
        parser.error("--data is needed (or --quick)")
    torch.set_num_threads(1 if given.quick else 2)
    setting = QUICK if given.quick else FULL
    train, test = digits() if given.quick else fashion(given.data)
    test = test[0][:TEST], test[1][:TEST]
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "results.json"
    results: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    done = {(r["task"], r["seed"]) for r in results}
    for seed in range(setting.seeds) if given.seeds is None else given.seeds:
        if all((name, seed) in done for name in TASKS):
            continue
        for task in tasks(setting, train, test, seed):
            if (task.name, seed) in done:
                continue
            trained = task.model
            for method, change in METHODS.items():
                task.model = copy.deepcopy(trained)
                start = time.perf_counter()
                model = change(task)
                found = outcome(model, task, time.perf_counter() - start)
                results.append({"task": task.name, "method": method, "seed": seed, **found})
                print(f"seed {seed} {task.name:<9}{method:<26}", *(f"{found[c]:8.3f}" for c in COLUMNS), flush=True)
            file.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    draw(results, given.out / "plot.png")
    return results


if __name__ == "__main__":
    main()
