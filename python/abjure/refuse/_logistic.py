"""Logistic regression with an L2 penalty, for targets that may be fractions."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError


def fit_logistic(x: Any, targets: Any, C: float = 1.0) -> tuple[Any, float]:
    """Minimiser of ``½‖w‖² + C Σ BCE(x_i · w + b, t_i)``, the intercept b free, by L-BFGS in float64.

    Args:
        x: ``(n, d)``.
        targets: ``(n,)`` in [0, 1].
        C: inverse strength of the penalty, above 0 and finite: without one separable data have no minimiser.

    Returns:
        w ``(d,)`` float64 and b.

    Raises:
        ShapeError, NonFiniteError, ArgumentError: the arguments do not fit.
        DegenerateError: all targets are equal and 0 or 1, so that b has no finite minimiser.
    """
    import torch

    rows, t = np.asarray(x, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape or t.shape != rows.shape[:1]:
        raise ShapeError(f"x, targets: expected (n, d) and (n,), got {rows.shape} and {t.shape}")
    if not np.isfinite(rows).all():
        raise NonFiniteError(f"x: non-finite in row {int((~np.isfinite(rows).all(1)).argmax())}")
    if not ((t >= 0) & (t <= 1)).all():
        raise ArgumentError("targets: expected values in [0, 1]")
    if not 0 < C < float("inf"):
        raise ArgumentError(f"C: expected a finite number above 0, got {C}")
    if t.max() == 0 or t.min() == 1:
        raise DegenerateError(f"targets: expected both classes, got {t[0]:g} only")
    # About the mean the intercept and the weights hardly interact; the free intercept takes the shift up exactly.
    mean = rows.mean(0)
    a, y = (torch.from_numpy(np.ascontiguousarray(v)) for v in (rows - mean, t))
    with torch.enable_grad():  # type: ignore[no-untyped-call]
        w = torch.zeros(a.shape[1], dtype=torch.float64, requires_grad=True)
        b = torch.zeros((), dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS(
            [w, b],
            max_iter=2000,
            max_eval=4000,
            history_size=20,
            tolerance_grad=1e-11,
            tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Any:
            search.zero_grad()
            each = torch.nn.functional.binary_cross_entropy_with_logits(a @ w + b, y, reduction="none")
            value = w.dot(w) / (2 * len(y)) + C * each.mean()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        search.step(loss)  # type: ignore[no-untyped-call]
    found = np.append(w.detach().numpy(), float(b.detach()))
    if len(found) <= 512:
        found = _polished(found, np.column_stack([rows - mean, np.ones(len(t))]), t, C)
    return found[:-1], float(found[-1] - found[:-1] @ mean)


def _polished(found: Any, a: Any, t: Any, C: float) -> Any:
    """Newton steps from where the line search can no longer tell two losses apart."""
    ridge = np.append(np.ones(len(found) - 1), 0.0)
    for _ in range(3):
        p = 0.5 + 0.5 * np.tanh(a @ found / 2)
        hessian = (a * (C * p * (1 - p))[:, None]).T @ a + np.diag(ridge)
        found = found - np.linalg.lstsq(hessian, ridge * found + a.T @ (C * (p - t)), rcond=None)[0]
    return found
