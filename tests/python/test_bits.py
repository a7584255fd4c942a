"""Streaming kernels return the same bits on every instruction set and for every number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import abjure
from abjure import _native, forget, refuse

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LEVELS = ("baseline", "avx2", "avx512")
#: Neither a multiple of a vector nor too small to be cut for several threads.
ROWS, WIDTH = 61, 5003


@pytest.fixture
def settings():
    threads, level = abjure.get_num_threads(), _native.simd_level()[0]
    yield
    abjure.set_num_threads(threads)
    _native.set_simd_level(level)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dampening(x):
    wide = torch.promote_types(x.dtype, torch.float32)
    f, d = (draw(seed, ROWS, WIDTH).abs().to(wide) for seed in (1, 2))
    forget.dampen_array_(x, f, d, 1.5, 0.7, exponent=0.5)
    return [x, torch.as_tensor(forget.selection_curve(f, d, [0.5, 2.0]).counts)]


def importance(x):
    return [torch.as_tensor(forget.Fisher().update({"w": x}, 0.3).update({"w": x})["w"])]


def log_probabilities(x):
    x.requires_grad_()
    found = forget.token_logprobs(x, torch.arange(ROWS) * 7)
    found.sum().backward()
    return [found.detach(), x.grad]


def edits(x):
    q = np.random.default_rng(0).normal(size=(3, WIDTH))
    found = [refuse.project(x, q), refuse.ablate(x, q), refuse.affine_ablate_(x.clone(), q, q[0], shift=q[1])]
    return [*found, refuse.ablate_(x.clone(), q[0], preserve_norm=True), refuse.steer_(x.clone(), q[0], 0.1)]


def weights(x):
    q = np.random.default_rng(0).normal(size=(2, ROWS))
    found = []
    for keep in (None, "in", "row"):
        w = x.clone()
        report = refuse.orthogonalize_(w, q, 0, norm_preserving=keep)
        found += [w, torch.tensor([report.residual_before, report.residual_after])]
    return found


def means(x):
    contrast = refuse.Contrast().update(x, torch.arange(ROWS) % 2)
    return [torch.as_tensor(m) for m in contrast.means]


def reductions(x):
    margins = refuse.row_margin(x, [17])
    return [torch.as_tensor(r) for r in (refuse.row_lse(x), refuse.row_max_gap(x, [17]), margins)]


def decoding(x):
    ids = torch.arange(ROWS)[:, None] % 5 + torch.arange(4)
    gated = refuse.RefusalTokens({"a": 3, "b": [5, 9]}, threshold=-9.0, prompt_length=4)(ids, x.clone())
    phrases = [[i % 5, i % 5 + 1, i] for i in range(40)]
    guard = refuse.ForbiddenPhrases(phrases, WIDTH, mode="prefix", penalty=2.0, scope="all")
    return [gated, guard(ids, x.clone()), refuse.bias_(x.clone(), [1, 5], [0.3, -2.0]), refuse.force_(x, [9] * ROWS)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kernel", [dampening, importance, log_probabilities, edits, weights, means, reductions, decoding]
)
def test_same_bits(kernel, dtype, settings):
    def run() -> list[torch.Tensor]:
        return kernel(draw(0, ROWS, WIDTH).to(dtype))

    abjure.set_num_threads(1)
    _native.set_simd_level("baseline")
    expected = run()
    assert expected
    for level in LEVELS:
        _native.set_simd_level(level)
        for threads in (1, 2, 5):
            abjure.set_num_threads(threads)
            for a, b in zip(expected, run(), strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b), (level, threads)
