"""Small networks and their training, for surrogates and for judging what fresh models learn; needs torch.

Every random number comes from the seeds given: torch's global generator is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, int, int]
Factory = Callable[[Shape, int], nn.Module]


def cnn(shape: Shape, classes: int, width: int = 16, norm: bool = False) -> nn.Module:
    """Three 3 × 3 convolutions of ``width``, 2 ``width``, 4 ``width`` channels and one linear layer on all they leave.

    Images of 16 pixels and more are halved twice, smaller ones once.
    """
    small = min(shape[1:]) < 16
    layers: list[nn.Module] = []
    inside, side = shape[0], (shape[1], shape[2])
    for outside, stride in ((width, 1 if small else 2), (2 * width, 1), (4 * width, 2)):
        layers.append(nn.Conv2d(inside, outside, 3, stride, 1, bias=not norm))
        layers += [nn.BatchNorm2d(outside)] if norm else []
        layers.append(nn.ReLU())
        inside, side = outside, (-(-side[0] // stride), -(-side[1] // stride))
    # Of large images only a grid of means is looked at.
    grid = (min(side[0], 8), min(side[1], 8))
    pool = [] if grid == side else [nn.AdaptiveAvgPool2d(grid)]
    return nn.Sequential(*layers, *pool, nn.Flatten(), nn.Linear(inside * grid[0] * grid[1], classes))


def mlp(shape: Shape, classes: int, hidden: int = 128) -> nn.Module:
    """One hidden layer on all values of the image."""
    size = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, classes))


class _Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.short = nn.Conv2d(inside, outside, 1, stride, bias=False) if (inside, stride) != (outside, 1) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(y + (x if self.short is None else self.short(x)))


def resnet(shape: Shape, classes: int, width: int = 16) -> nn.Module:
    """A small residual network with batch normalisation: a strided stem, two blocks, the means of the quarters."""
    return nn.Sequential(
        nn.Conv2d(shape[0], width, 3, 2 if min(shape[1:]) >= 16 else 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _Block(width, width, 1),
        _Block(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )


def fresh(factory: Factory, shape: Shape, classes: int, seed: int) -> nn.Module:
    """A model whose weights are drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory(shape, classes)


def shuffled(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of row numbers, each row once; a last batch of one row, which batch normalisation cannot take, is left
    out."""
    order = torch.randperm(n, generator=generator)
    for rows in torch.split(order, size):
        if len(rows) > 1 or n == 1:
            yield rows


def crop_and_flip(x: Tensor, generator: torch.Generator, pad: int = 2, flip: bool = True) -> Tensor:
    """Every image moved by up to ``pad`` pixels (its edge repeated) and, every other one, mirrored."""
    n, channels, height, width = x.shape
    pad = min(pad, height - 1, width - 1)
    wide = F.pad(x, (pad, pad, pad, pad), mode="replicate")
    moves = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    lines = moves[0][:, None] + torch.arange(height)
    columns = moves[1][:, None] + torch.arange(width)
    if flip:
        mirrored = torch.rand(n, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    every = torch.arange(n)[:, None, None, None]
    plane = torch.arange(channels)[None, :, None, None]
    return wide[every, plane, lines[:, None, :, None], columns[:, None, None, :]]


def attack(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, steps: int, box: tuple[float, float]) -> Tensor:
    """Projected sign ascent of the loss within L∞ ``epsilon`` (Madry et al. 2018), steps of 2.5 ``epsilon`` /
    ``steps``."""
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x + delta), y), delta)
        with torch.no_grad():
            delta = (delta + 2.5 * epsilon / steps * gradient.sign()).clamp(-epsilon, epsilon)
            delta = (x + delta).clamp(*box) - x
    return (x + delta).detach()


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    seed: int,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    harden: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    step: Callable[[], object] | None = None,
) -> nn.Module:
    """Adam with a rate that falls linearly to zero; returns the model in eval mode.

    ``augment`` changes every batch, ``harden`` turns it into one that the model as it stands gets wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    total, done = epochs * max(-(-len(x) // batch_size), 1), 0
    for _ in range(epochs):
        for rows in shuffled(len(x), batch_size, generator):
            images, labels = x[rows], y[rows]
            if augment is not None:
                images = augment(images, generator)
            if harden is not None:
                model.eval()
                images = harden(model, images, labels)
            model.train()
            optimiser.param_groups[0]["lr"] = learning_rate * (1 - done / total)
            optimiser.zero_grad()
            F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            done += 1
            if step is not None:
                step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 512) -> float:
    """Share of rows whose largest output is their label."""
    model.eval()
    hits = 0
    for a, b in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        hits += int((model(a).argmax(1) == b).sum())
    return hits / max(len(y), 1)
