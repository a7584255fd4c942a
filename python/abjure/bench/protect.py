"""The Bayes error and the ascent against the same formulas in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..protect import bayes_error_gradient, maximize_bayes_error
from . import plain
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


def rows(scale: float = 1.0) -> Iterator[Row]:
    """Objective and gradient of the published reading, and steps of the ascent; sizes shrink with ``scale``."""
    import torch

    n = max(int(10_000 * scale), 200)
    x, y = _images(n)
    points, labels = torch.from_numpy(x), torch.from_numpy(y)
    ours, theirs = compare(
        lambda: bayes_error_gradient(x, y, bandwidth=BANDWIDTH),
        lambda: plain.bayes_error_gradient(points, labels, CLASSES, BANDWIDTH),
        repeats=3,
    )
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

        def form(per: str = per) -> object:
            return plain.ascend(points, labels, CLASSES, BANDWIDTH, per, batch, 8 / 255, steps)

        ours, theirs = compare(run, form, repeats=3)
        yield Row(
            "maximize_bayes_error",
            f"{steps} steps per {per}, {n} × {FEATURES}, batches {batch[0]} × {batch[1]}, f32",
            ours,
            "torch autograd",
            theirs,
            flops=steps * (2.0 if per == "class" else 4.0) * batch[0] * batch[1] * FEATURES,
        )
