"""The Bayes error and the ascent against the same formulas in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..protect import bayes_error_gradient, maximize_bayes_error
from .timing import Row, compare

CLASSES = 10
FEATURES = 784
BANDWIDTH = 2.0
Array = np.ndarray[Any, Any]


def _images(n: int, seed: int = 0) -> tuple[Array, Array]:
    """Ten blurred patterns with noise, of the size and spread of small grey images."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, n)
    patterns = rng.uniform(0, 1, size=(CLASSES, 7, 7)).repeat(4, 1).repeat(4, 2).reshape(CLASSES, FEATURES)
    x = patterns[y] + rng.normal(size=(n, FEATURES)) * 0.15
    return np.clip(x, 0, 1).astype(np.float32), y


def _published_torch(x: Array, y: Array) -> Callable[[], object]:
    """Objective and hand-derived gradient with two matrix products and the n × n matrices in memory."""
    import torch

    points, onehot = torch.from_numpy(x), torch.nn.functional.one_hot(torch.from_numpy(y), CLASSES).float()

    def run() -> object:
        z = points - points.mean(0)
        norms = (z * z).sum(1)
        exponent = (norms[:, None] + norms[None] - 2 * (z @ z.T)).clamp_(min=0).mul_(-0.5 / BANDWIDTH**2)
        exponent.fill_diagonal_(-torch.inf)
        shift = exponent.max(1, keepdim=True).values
        kernel = (exponent - shift).exp_()
        sums = kernel @ onehot
        counts = onehot.sum(0)
        p = (sums.log() + shift + (counts / len(z)).log() - (counts - onehot).log()).softmax(1)
        squares = (p * p).sum(1, keepdim=True)
        slope = -2 * p * (p - squares) / len(z)
        weights = kernel * ((slope / sums.clamp(min=1e-30)) @ onehot.T)
        pulls = weights + weights.T
        return (1 - squares).mean(), (pulls @ z - pulls.sum(1, keepdim=True) * z) / BANDWIDTH**2

    return run


def _steps_torch(x: Array, y: Array, per: str, queries: int, centres: int, steps: int) -> Callable[[], object]:
    """The same projected ascent against clean queries by autograd."""
    import torch

    points, labels = torch.from_numpy(x), torch.from_numpy(y)
    epsilon = 8 / 255
    alpha = 3 * epsilon / steps

    def run() -> object:
        draw = torch.Generator().manual_seed(0)
        delta = torch.zeros((CLASSES if per == "class" else len(x)), FEATURES)
        for _ in range(steps):
            rows = torch.randperm(len(x), generator=draw)[:queries]
            own = torch.randperm(len(x), generator=draw)[:centres]
            leaf = delta.clone().requires_grad_(True)
            z = (points[own] + (leaf[labels[own]] if per == "class" else leaf[own])).clamp(0, 1)
            q = points[rows]
            squared = ((q * q).sum(1)[:, None] + (z * z).sum(1)[None] - 2 * (q @ z.T)).clamp(min=0)
            exponent = (squared * (-0.5 / BANDWIDTH**2)).masked_fill(rows[:, None] == own[None], -torch.inf)
            onehot = torch.nn.functional.one_hot(labels[own], CLASSES).float()
            shift = exponent.max(1, keepdim=True).values.detach()
            joint = ((exponent - shift).exp() @ onehot + 1e-30).log()
            value = (1 - joint.softmax(1).gather(1, labels[rows][:, None])).mean()
            (gradient,) = torch.autograd.grad(value, leaf)
            delta = (delta + alpha * gradient.sign()).clamp(-epsilon, epsilon)
        return delta

    return run


def rows(scale: float = 1.0) -> Iterator[Row]:
    """Objective and gradient of the published reading, and steps of the ascent; sizes shrink with ``scale``."""
    n = max(int(10_000 * scale), 200)
    x, y = _images(n)
    ours, theirs = compare(lambda: bayes_error_gradient(x, y, bandwidth=BANDWIDTH), _published_torch(x, y), repeats=3)
    yield Row(
        "bayes_error_gradient",
        f"published, {n} × {FEATURES}, f32",
        ours,
        "torch, n × n matrices, gradient by hand",
        theirs,
        flops=4.0 * n * n * FEATURES,
    )
    batch = (max(int(2000 * scale), 50), max(int(4000 * scale), 100))
    steps = 20
    for per in ("class", "sample"):

        def run(per: Any = per) -> object:
            return maximize_bayes_error(
                x, y, epsilon=8 / 255, per=per, steps=steps, bandwidth=BANDWIDTH, batch=batch, certificate_rows=64
            )

        ours, theirs = compare(run, _steps_torch(x, y, per, *batch, steps), repeats=3)
        yield Row(
            "maximize_bayes_error",
            f"{steps} steps per {per}, {n} × {FEATURES}, batches {batch[0]} × {batch[1]}, f32",
            ours,
            "torch autograd",
            theirs,
            flops=steps * (2.0 if per == "class" else 4.0) * batch[0] * batch[1] * FEATURES,
        )
