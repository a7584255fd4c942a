"""The Bayes error and the ascent against the same formulas in plain torch; deletions and trees against NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..protect import DeletionModel, bayes_error_gradient, maximize_bayes_error, noise
from ..protect._trees import grow
from . import plain
from .timing import Row, compare

CLASSES = 10
FEATURES = 784
BANDWIDTH = 2.0
#: Part of the centres that a truncated step looks at.
SHARE = 0.125
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
    yield from _noise_rows(scale)
    yield from _full_steps(x, y, n)
    yield from _deletions(scale)
    yield _tree(scale)


def _deletions(scale: float) -> Iterator[Row]:
    n, d = max(int(2000 * scale), 100), 30
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d))
    y = (x[:, :5].sum(axis=1) + rng.normal(size=n) * 2 > 0).astype(np.float64)
    model = DeletionModel(x, y, penalty=1.0, intercept=None)
    theta, records = model.coef, list(range(min(n, 50)))
    ours, theirs = compare(
        lambda: [model.without([i]) for i in records], lambda: plain.refit_without(x, y, 1.0, theta, records), repeats=3
    )
    case = f"{len(records)} refits without one record, logistic, {n} × {d}"
    yield Row("DeletionModel.without", case, ours, "NumPy, Newton", theirs)


def _tree(scale: float) -> Row:
    n, d, codes = max(int(50_000 * scale), 500), 30, 64
    rng = np.random.default_rng(0)
    x = rng.integers(0, codes, size=(n, d)).astype(np.uint16)
    y = (x[:, 0] + x[:, 1] // 2 + rng.integers(0, 40, n) > 68).astype(np.int64)
    s = (x[:, 2] + rng.integers(0, 40, n) > 52).astype(np.int64)
    ours, theirs = compare(
        lambda: grow(x, [y, s], [2, 2], alpha=0.7, max_leaf_nodes=20, min_samples_leaf=20),
        lambda: plain.grow_tree(x, [y, s], [2, 2], 0.7, 20, 20),
        repeats=3,
    )
    return Row("privacy-aware tree", f"20 leaves, {n} × {d} codes below {codes}", ours, "NumPy, bincount", theirs)


def _full_steps(x: Array, y: Array, n: int) -> Iterator[Row]:
    """A step of all rows: how it grows with their number, and what centres near their queries alone save."""

    def seconds(rows: int, truncate: float | None) -> float:
        def run(steps: int) -> object:
            return maximize_bayes_error(
                x[:rows],
                y[:rows],
                epsilon=8 / 255,
                steps=steps,
                step_size=1e-3,
                bandwidth=BANDWIDTH,
                batch=None,
                truncate=truncate,
                certificate_rows=64,
                certificate_subsamples=0,
                certificate_draws=2,
            )

        # What a run does beside its steps, above all the pass that picks the centres, is in both.
        long, short = compare(lambda: run(4), lambda: run(1), repeats=1)
        return max(long - short, 1e-9) / 3

    whole, half, near = seconds(n, None), seconds(n // 2, None), seconds(n, SHARE)
    flops = 2.0 * n * n * FEATURES
    yield Row(
        "maximize_bayes_error",
        f"a step of all {n} rows, f32",
        whole,
        "half of the rows (0.25 is n²)",
        half,
        flops=flops,
    )
    yield Row(
        "maximize_bayes_error, truncate",
        f"a step of all {n} rows, {SHARE} of the centres, f32",
        near,
        "all centres",
        whole,
        flops=SHARE * flops,
    )


def _noise_rows(scale: float) -> Iterator[Row]:
    """Noise in one pass over images of one size, written to an array that is there."""
    import torch
    from torch.nn import functional as F

    n = max(int(50_000 * scale), 512)
    x, y = _images(n)
    x = x.reshape(n, 28, 28)
    out = np.empty_like(x)
    points, labels, target = torch.from_numpy(x), torch.from_numpy(y), torch.empty(n, 28, 28)
    kernels = torch.rand(CLASSES, 1, 3, 3)
    filters = noise.autoregressive_filters(CLASSES, channels=1, size=(28, 28))
    taps = torch.from_numpy(filters)[labels, 0].T.contiguous()
    corners = torch.randn(CLASSES, 49).sign() * 10

    def means() -> object:
        sums = torch.zeros(CLASSES, FEATURES).index_add_(0, labels, points.reshape(n, -1))
        moved = (sums.roll(-1, 0) - sums).sign().reshape(CLASSES, 28, 28) / 32
        return torch.clamp(points + moved[labels], 0, 1, out=target)

    def patches() -> object:
        features = corners[labels] + torch.randn(n, 49)
        tiles = (features / features.norm(dim=1, keepdim=True) / 4).reshape(n, 7, 7)
        spread = tiles.repeat_interleave(4, 1).repeat_interleave(4, 2)
        return torch.clamp(points + spread, 0, 1, out=target)

    def processes() -> object:
        plane = torch.randn(32, 32, n)
        for i in range(2, 32):
            for j in range(2, 32):
                window = plane[i - 2 : i + 1, j - 2 : j + 1].reshape(9, n)[:8]
                plane[i, j] = (window * taps).sum(0)
        made = plane[4:, 4:].permute(2, 0, 1)
        made = made / made.flatten(1).norm(dim=1)[:, None, None]
        return torch.clamp(points + made, 0, 1, out=target)

    def filtered() -> object:
        for c in range(CLASSES):
            own = labels == c
            sums = F.conv2d(points[own][:, None], kernels[c : c + 1], padding=1)[:, 0]
            target[own] = sums / sums.amax((1, 2), keepdim=True)
        return target

    def dots() -> object:
        target.copy_(points)
        target[torch.arange(n), labels, labels] = 1.0
        return target

    moved = 2 * x.nbytes
    cases: list[tuple[str, Any, Any, int]] = [
        # Means are a pass of their own, and so are the sums that pixels are chosen by.
        ("class_mean_shift", lambda: noise.class_mean_shift(x, y, out=out), means, moved + x.nbytes),
        ("linearly_separable", lambda: noise.linearly_separable(x, y, patch=4, out=out), patches, moved),
        ("autoregressive", lambda: noise.autoregressive(x, y, filters=filters, out=out), processes, moved),
        ("convolutional", lambda: noise.convolutional(x, y, out=out), filtered, moved),
        ("one_pixel", lambda: noise.one_pixel(x, y, out=out), dots, moved + x.nbytes),
    ]
    for name, run, form, size in cases:
        ours, theirs = compare(run, form, repeats=3)
        yield Row(f"noise.{name}", f"{n} × 28 × 28, f32", ours, "torch", theirs, bytes=size)
