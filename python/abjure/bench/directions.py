"""Directions beside the torch forms of the published code: activations of 8192 × 4096, weights of 4096 × 4096."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import _native, refuse
from . import plain
from .timing import Row, compare


def rows(scale: float = 1.0) -> Iterator[Row]:
    """Comparisons; ``scale`` shrinks the number of rows, not their length."""
    import torch

    count, width = max(16, int(8192 * scale)), 4096
    rng = np.random.default_rng(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        x = torch.randn(count, width, dtype=torch.float32).to(dtype)
        q = rng.standard_normal((16, width))
        size = x.numel() * x.element_size()
        yield _ablation(x, q[:1], name, size)
        if dtype != torch.float16:
            yield _steering(x, q[0], name, size)
            yield _projection(x, q[0], name, size)
            yield _ablation(x, q, name, size)
            yield _means(x, name, size)
            if dtype == torch.bfloat16:
                yield _reading(max(16, int(4096 * scale)), 2048)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(max(64, int(4096 * scale)), 4096).to(dtype)
        yield _weights(weight, rng.standard_normal(len(weight)), str(dtype).removeprefix("torch."))
    yield _covariance(max(64, int(4096 * scale)), 2048)
    yield _experts(max(64, int(262144 * scale)))
    yield _probe(max(64, int(20000 * scale)), max(16, int(2048 * scale)))


def _ablation(x: Any, q: Any, name: str, size: int) -> Row:
    """In place against the hook of the published code, which makes the direction unit in the activations' dtype."""
    import torch

    basis = torch.from_numpy(refuse.orthonormal_basis(q)).to(x.dtype)
    ours, theirs = compare(lambda: refuse.ablate_(x, q), lambda: plain.ablate(x, basis))
    form = "x - (x@r)[:,None]*r" if len(basis) == 1 else "x - (x@Q.T)@Q"
    return Row("ablate_", f"{len(x)}x{x.shape[1]} {name}, k={len(q)}", ours, f"torch {form}", theirs, 2 * size)


def _steering(x: Any, v: Any, name: str, size: int) -> Row:
    import torch

    vector = torch.from_numpy(v).to(x.dtype)
    ours, theirs = compare(lambda: refuse.steer_(x, v, 1e-3), lambda: x + 1e-3 * vector)
    return Row("steer_", f"{len(x)}x{x.shape[1]} {name}", ours, "torch x + s*v", theirs, 2 * size)


def _projection(x: Any, q: Any, name: str, size: int) -> Row:
    import torch

    r = torch.from_numpy(refuse.orthonormal_basis(q)[0]).to(x.dtype)
    ours, theirs = compare(lambda: refuse.project(x, q), lambda: x @ r)
    return Row("project", f"{len(x)}x{x.shape[1]} {name}", ours, "torch x @ r", theirs, size)


def _means(x: Any, name: str, size: int) -> Row:
    ours, theirs = compare(lambda: refuse.Contrast().update(x, 1), lambda: x.double().mean(0))
    return Row("Contrast.update", f"{len(x)}x{x.shape[1]} {name}", ours, "torch x.double().mean(0)", theirs, size)


def _reading(n: int, d: int) -> Row:
    """Against a sum of as many bytes of float32, which takes no more than reading them."""
    import torch

    x, words = torch.randn(n, d).bfloat16(), torch.randn(n, d // 2)
    ours, theirs = compare(lambda: refuse.Contrast().update(x, 1), words.sum, repeats=21)
    return Row("Contrast.update", f"{n}x{d} bfloat16", ours, "torch sum of as many bytes", theirs, 2 * x.numel())


def _covariance(n: int, d: int) -> Row:
    """Against the f32 matrix product that a covariance is at least, on rows that are already f32 and centred."""
    import torch

    wide = torch.randn(n, d)
    x = wide.bfloat16()
    ours, theirs = compare(lambda: refuse.Contrast(covariance=True).update(x, 1), lambda: wide.T @ wide)
    return Row(
        "Contrast.update", f"{n}x{d} bfloat16, covariance", ours, "torch f32 x.T @ x", theirs, flops=2 * n * d * d
    )


def _experts(tokens: int, k: int = 8, experts: int = 128, prompts: int = 64) -> Row:
    import torch

    ids, gates = torch.randint(experts, (tokens, k)), torch.rand(tokens, k).bfloat16()
    owners = torch.arange(tokens) * prompts // tokens
    tables = (ids.numpy(), gates, owners.numpy(), prompts, experts)
    ours, theirs = compare(
        lambda: _native.count_experts(*tables), lambda: plain.count_experts(ids, gates, owners, prompts, experts)
    )
    case = f"{tokens} tokens, {k} of {experts} experts, {prompts} prompts"
    return Row("count_experts", case, ours, "torch bincount", theirs, ids.numel() * 10)


def _weights(weight: Any, q: Any, name: str) -> Row:
    """Against the published form, which transposes the weight and back."""
    import torch

    r = torch.from_numpy(refuse.orthonormal_basis(q)[0]).to(weight.dtype)
    ours, theirs = compare(lambda: refuse.orthogonalize_(weight, q, 0), lambda: plain.orthogonalize(weight, r))
    case = f"{weight.shape[0]}x{weight.shape[1]} {name}, axis 0"
    # Read for the products, read and written by the update, read for the report.
    size = 4 * weight.numel() * weight.element_size()
    return Row("orthogonalize_", case, ours, "torch, transposed copies", theirs, size)


def _probe(n: int, d: int) -> Row:
    """A logistic fit of float32 rows against scikit-learn's Newton solver on the same rows in float64.

    Its default solver, L-BFGS, is still 1e-3 above this loss after minutes. The case says how the two losses differ.
    """
    from sklearn.linear_model import LogisticRegression

    x, y = _activations(n, d)
    exact, sign = x.astype(np.float64), 2.0 * y - 1

    def loss(w: Any, b: float) -> float:
        return float(0.5 * w @ w + np.logaddexp(0, -sign * (exact @ w + b)).sum())

    probe, model = refuse.RefusalProbe(), LogisticRegression(solver="newton-cholesky", tol=1e-6)
    ours, theirs = compare(lambda: probe.fit(x, y), lambda: model.fit(exact, y), repeats=1)
    gap = loss(probe.coef, probe.intercept) / loss(model.coef_[0], float(model.intercept_[0])) - 1
    case = f"{n}x{d} float32, loss {gap:+.0e}"
    return Row("RefusalProbe.fit", case, ours, "scikit-learn newton-cholesky, float64", theirs)


def _activations(n: int, d: int) -> tuple[Any, Any]:
    """Overlapping classes (Mahalanobis distance 2.2) with a decaying spectrum in mixed coordinates and an offset."""
    rng = np.random.default_rng(0)
    scale = 8 / np.sqrt(np.arange(1, d + 1))
    y = (rng.random(n) < 0.5).astype(np.int64)
    shift = rng.standard_normal(d)
    z = rng.standard_normal((n, d)) + (y[:, None] - 0.5) * shift * (2.2 / np.linalg.norm(shift))
    mixed = (z * scale) @ np.linalg.qr(rng.standard_normal((d, d)))[0]
    return (mixed + rng.standard_normal(d)).astype(np.float32), y
