"""Similarity, resampling and text overlap against plain forms of the same work."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..measure import bootstrap_mean, cka, rouge_l
from . import plain
from .timing import Row, compare

ROWS, FEATURES = 50_000, 2048
DRAWN, RESAMPLES = 100_000, 10_000


def rows(scale: float = 1.0) -> Iterator[Row]:
    """CKA beside its matrix products, resampling beside NumPy's; sizes shrink with ``scale``."""
    import torch

    generator = torch.Generator().manual_seed(0)
    n = max(int(ROWS * scale), 200)
    d = max(int(FEATURES * min(1.0, 4 * scale)), 64)
    x, y = (torch.randn(n, d, generator=generator) for _ in range(2))
    ours, theirs = compare(lambda: cka(x, y), lambda: plain.cka_products(x, y), repeats=1)
    yield Row("cka", f"linear, {n} × {d}, f32", ours, "its three products in torch", theirs, flops=4.0 * n * d * d)
    del x, y
    n, d = max(int(6000 * scale), 200), 256
    x, y = (torch.randn(n, d, generator=generator) for _ in range(2))
    sigma = float(2 * d) ** 0.5
    ours, theirs = compare(
        lambda: cka(x, y, True, kernel="rbf", sigma=sigma), lambda: plain.rbf_cka(x, y, sigma), repeats=3
    )
    yield Row("cka", f"RBF, unbiased, {n} × {d}, f32", ours, "torch, n × n matrices", theirs, flops=2.0 * n * n * d)
    drawn, resamples = max(int(DRAWN * scale), 500), max(int(RESAMPLES * scale), 50)
    draw = np.random.default_rng(0)
    continuous = draw.standard_normal(drawn)
    for name, values in (("any values", continuous), ("0 and 1", (continuous > 1).astype(np.float64))):

        def run(values: np.ndarray[tuple[int], np.dtype[np.float64]] = values) -> object:
            return bootstrap_mean(values, resamples=resamples)

        def form(values: np.ndarray[tuple[int], np.dtype[np.float64]] = values) -> object:
            return plain.bootstrap_means(values, resamples)

        ours, theirs = compare(run, form, repeats=1)
        yield Row("bootstrap_mean", f"{resamples} resamples of {drawn} rows, {name}", ours, "NumPy", theirs)
    words = [f"w{i}" for i in range(400)]
    texts = [" ".join(draw.choice(words, 100)) for _ in range(2 * max(int(200 * scale), 10))]
    half = len(texts) // 2
    ours, theirs = compare(
        lambda: rouge_l(texts[:half], texts[half:]),
        lambda: [
            plain.common_subsequence(a.split(), b.split()) for a, b in zip(texts[:half], texts[half:], strict=True)
        ],
        repeats=3,
    )
    yield Row("rouge_l", f"{half} pairs of 100 words", ours, "Python, table of lengths", theirs)
