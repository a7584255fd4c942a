"""Directions beside the torch forms of the published code: activations of 8192 × 4096, weights of 4096 × 4096."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import refuse
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
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(max(64, int(4096 * scale)), 4096).to(dtype)
        yield _weights(weight, rng.standard_normal(len(weight)), str(dtype).removeprefix("torch."))


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


def _weights(weight: Any, q: Any, name: str) -> Row:
    """Against the published form, which transposes the weight and back."""
    import torch

    r = torch.from_numpy(refuse.orthonormal_basis(q)[0]).to(weight.dtype)
    ours, theirs = compare(lambda: refuse.orthogonalize_(weight, q, 0), lambda: plain.orthogonalize(weight, r))
    case = f"{weight.shape[0]}x{weight.shape[1]} {name}, axis 0"
    # Read for the products, read and written by the update, read for the report.
    size = 4 * weight.numel() * weight.element_size()
    return Row("orthogonalize_", case, ours, "torch, transposed copies", theirs, size)
