"""scikit-learn's 8x8 digits and the small networks trained on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 64


@contextmanager
def one_thread() -> Iterator[None]:
    """Networks this small lose more to waiting for torch's other threads than they gain from them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images ``(n, 64)`` f32 in [0, 1] and their labels ``(n,)`` int64."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy((images / 16).astype(np.float32)), torch.from_numpy(labels.astype(np.int64))


def split(labels: Tensor, sizes: tuple[int, ...], seed: int) -> list[Tensor]:
    """Random index sets of the given sizes; the last one takes the rest."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(torch.tensor(sizes).cumsum(0)))


def cnn() -> nn.Module:
    """38 thousand parameters on flat 8x8 images."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(x: Tensor, y: Tensor, seed: int, epochs: int = 15) -> nn.Module:
    """A fresh network trained with Adam; label smoothing keeps gradients alive after every sample is fitted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cnn()
        optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            order = torch.randperm(len(x))
            for start in range(0, len(x), BATCH):
                rows = order[start : start + BATCH]
                optimiser.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.1).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    return model.eval()


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The rows in order, in batches."""
    return [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of rows classified as labelled."""
    return float((model(x).argmax(1) == y).double().mean())


@torch.no_grad()
def probabilities(model: nn.Module, x: Tensor) -> Any:
    """Softmax outputs in f64, as NumPy."""
    return model(x).double().softmax(1).numpy()
