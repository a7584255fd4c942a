"""Corrective unlearning of a backdoor: Fashion-MNIST, a small ResNet, 10 % to 100 % of the poisoned samples known.

    python examples/forget/corrective.py --data DIR [--out DIR]     # minutes on two idle cores
    python examples/forget/corrective.py --quick                    # scikit-learn's digits, seconds

DIR holds Fashion-MNIST's four ``*-ubyte.gz`` files, for example those of Debian's package ``dataset-fashion-mnist``
(``apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb . ``, then
``--data usr/share/datasets/fashion-mnist``).

Three methods: Selective Synaptic Dampening with a search over alpha and lambda / alpha, retraining without the known
samples (EU), and further training without them (CF). All choices are made on held-out data with clean labels and on the
known samples; no method sees test data.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from abjure.forget import (
    CorrectiveReport,
    CorrectiveTask,
    corrective_benchmark,
    dampen_,
    importance,
    poison,
    selection_curve,
)

ALPHAS = (0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
RATIOS = (0.1, 0.5, 1.0)
#: Held-out accuracy that the search may give up.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Setting:
    """Sizes of one run."""

    train: int
    held: int
    poisoned: int
    epochs: int
    fractions: tuple[float, ...]
    width: int


FULL = Setting(12_000, 2_000, 500, 8, tuple(round(0.1 * i, 1) for i in range(1, 11)), 32)
QUICK = Setting(1_000, 200, 100, 12, (0.2, 1.0), 16)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.short = nn.Sequential()
        if stride != 1 or inside != outside:
            self.short = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(y + self.short(x))


def resnet(width: int) -> nn.Module:
    """A small ResNet for one-channel images: a strided stem, two blocks, batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def fit(model: nn.Module, x: Tensor, y: Tensor, epochs: float, seed: int, rate: float = 3e-3) -> nn.Module:
    """Adam with a linearly falling rate."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    steps = round(epochs * -(-len(x) // 128))
    order: list[Tensor] = []
    model.train()
    for step in range(steps):
        order = order or list(torch.randperm(len(x), generator=generator).split(128))
        rows = order.pop()
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimiser.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
    return model.eval()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy with the labels as collected."""
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(x: Tensor, y: Tensor, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    return sum(int((model(a).argmax(1) == b).sum()) for a, b in batches(x, y, 512)) / len(y)


def dampened(task: CorrectiveTask) -> nn.Module:
    """SSD: one pair of importances, then a search over alpha and lambda / alpha.

    Of the points that keep held-out accuracy within ``TOLERANCE``, the one at which the known samples follow their
    given label least; of equal ones, the gentlest.
    """
    model = task.model
    forget = importance(model, batches(task.x[task.flagged], task.y[task.flagged]), loss, progress=False)
    retain = importance(model, batches(task.x[task.kept], task.y[task.kept]), loss, progress=False)
    counts = selection_curve(forget, retain, ALPHAS).counts
    limit = accuracy(model, *task.held) - TOLERANCE
    known = task.x[task.flagged], task.y[task.flagged]
    best: tuple[float, int, float, float] | None = None
    for (alpha, count), ratio in itertools.product(zip(ALPHAS, counts, strict=True), RATIOS):
        if count == 0:
            continue
        report = dampen_(model, forget, retain, alpha, ratio=ratio)
        if accuracy(model, *task.held) >= limit:
            point = (accuracy(model, *known), int(count), alpha, ratio)
            best = point if best is None else min(best, point)
        report.undo(model)
    if best is not None:
        dampen_(model, forget, retain, best[2], ratio=best[3], undo=False)
    return model


def main(arguments: list[str] | None = None) -> CorrectiveReport:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's *-ubyte.gz files")
    parser.add_argument("--out", type=Path, default=Path("corrective-out"), help="folder for report.json and plot.png")
    parser.add_argument("--quick", action="store_true", help="scikit-learn's digits, two fractions")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if not given.quick and given.data is None:
        parser.error("--data is needed (or --quick)")
    torch.set_num_threads(1 if given.quick else 2)
    setting = QUICK if given.quick else FULL
    (x, y), test = digits() if given.quick else fashion(given.data)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(given.seed))
    rows, held_rows = order[: setting.train], order[setting.train : setting.train + setting.held]
    manipulation = poison(x[rows], y[rows], setting.poisoned, seed=given.seed)

    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return resnet(setting.width)

    def retrained(task: CorrectiveTask) -> nn.Module:
        return fit(fresh(given.seed + 1), task.x[task.kept], task.y[task.kept], setting.epochs, given.seed + 1)

    def finetuned(task: CorrectiveTask) -> nn.Module:
        return fit(task.model, task.x[task.kept], task.y[task.kept], setting.epochs / 4, given.seed + 2, 1e-3)

    original = fit(fresh(given.seed), manipulation.x, manipulation.y, setting.epochs, given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    report = corrective_benchmark(
        manipulation,
        original,
        {"SSD, searched": dampened, "retrain without S_f": retrained, "finetune without S_f": finetuned},
        test,
        fractions=setting.fractions,
        held=(x[held_rows], y[held_rows]),
        path=given.out / "report.json",
    )
    print(report)
    draw(report, given.out / "plot.png")
    return report


def draw(report: CorrectiveReport, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    report.plot(figure.subplots(1, 2, sharey=True))
    figure.savefig(path, dpi=140)


def fashion(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Train and test parts, images ``(n, 1, 28, 28)`` normalised."""

    def read(name: str, offset: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=offset).copy()

    parts = []
    for part in ("train", "t10k"):
        images = torch.from_numpy(read(f"{part}-images-idx3-ubyte.gz", 16)).float().view(-1, 1, 28, 28)
        labels = torch.from_numpy(read(f"{part}-labels-idx1-ubyte.gz", 8)).long()
        parts.append(((images / 255 - 0.286) / 0.353, labels))
    return parts[0], parts[1]


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's 8x8 digits, 1,200 to train on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = torch.tensor(data.data[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(data.target[order])
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


if __name__ == "__main__":
    main()
