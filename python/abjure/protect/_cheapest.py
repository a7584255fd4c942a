"""The cheapest step, in weighted L1 or L2, that satisfies a few linear inequalities within a box: interior points.

Cuts are few and columns may be many, so each iteration factors a matrix of the size of the cuts alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

#: Residuals and complementarity of a solution, in units of the scaled problem.
TOLERANCE = 1e-10
ITERATIONS = 150


def cheapest_step(cuts: Array, need: Array, weights: Array, low: Array, high: Array, norm: str) -> tuple[Array, float]:
    """``δ`` of least ``Σ w|δ|`` (or ``Σ (wδ)²``) with ``cuts @ δ >= need`` and ``low <= δ <= high``.

    Returns:
        ``δ``, and by how much the worst cut falls short: 0 where all can be met, else ``δ`` is the point of the box
        with the least such shortfall.
    """
    # δ = base + p - q with p, q >= 0 and base the point of the box nearest to 0.
    base = np.clip(0.0, low, high)
    columns = np.concatenate([cuts / weights, -cuts / weights], axis=1)
    top = np.concatenate([(high - base) * weights, (base - low) * weights])
    # Where the base is not 0, only one side costs; stepping back towards 0 is outside the box there.
    start = np.concatenate([np.where(base >= 0, base, 0), np.where(base <= 0, -base, 0)])
    start = start * np.concatenate([weights, weights])
    free = top > 0
    rest = need - cuts @ base

    def step(z: Array) -> Array:
        full = np.zeros(len(free))
        full[free] = z[: free.sum()]
        d = len(base)
        return np.asarray(np.clip(base + (full[:d] - full[d:]) / weights, low, high))

    if (rest <= 0).all():
        return base, 0.0
    if not free.any():
        return base, float(rest.max())
    g = columns[:, free]
    length = np.abs(g).max(axis=1)
    usable = length > 0
    if (rest[~usable] > 0).any():
        # No column moves such a cut; the others are met as well as they can.
        found, _ = cheapest_step(cuts[usable], need[usable], weights, low, high, norm) if usable.any() else (base, 0.0)
        return found, float((need - cuts @ found).max())
    g, b = g[usable] / length[usable, None], rest[usable] / length[usable]
    scale = float(b.max())
    linear = np.ones(g.shape[1]) if norm == "l1" else start[free] / scale
    square = np.zeros(g.shape[1]) if norm == "l1" else np.ones(g.shape[1])
    z, solved = _interior(square, linear, g, b / scale, top[free] / scale)
    if not solved:
        # One more column lets every cut fall short by the same amount, which is then made least.
        more = np.concatenate([g * length[usable, None], np.ones((len(b), 1))], axis=1)
        size = float(rest.max())
        cost = np.zeros(more.shape[1])
        cost[-1] = 1.0
        high_z = np.concatenate([np.minimum(top[free] / size, 1e6), [np.inf]])
        z, _ = _interior(np.zeros(len(cost)), cost, more, rest[usable] / size, high_z)
        found = step(z * size)
        return found, max(float((need - cuts @ found).max()), 0.0)
    return step(z * scale), 0.0


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def _interior(square: Array, linear: Array, g: Array, b: Array, top: Array) -> tuple[Array, bool]:
    """Mehrotra's predictor and corrector: min ½ z·(square z) + linear·z, g z >= b, 0 <= z <= top."""
    m, n = g.shape
    bounded = np.isfinite(top)
    u = np.where(bounded, top, 1.0)
    z = np.minimum(np.ones(n), np.where(bounded, u / 2, 1.0))
    s = np.maximum(g @ z - b, 1.0)
    lam, mu = np.ones(m), np.ones(n)
    r, nu = np.where(bounded, u - z, 1.0), np.where(bounded, 1.0, 0.0)
    count = m + n + int(bounded.sum())
    for _ in range(ITERATIONS):
        dual = square * z + linear - g.T @ lam - mu + nu
        primal = g @ z - s - b
        box = np.where(bounded, z + r - u, 0.0)
        gap = (lam @ s + mu @ z + nu @ r) / count
        if max(np.abs(dual).max(), np.abs(primal).max(), np.abs(box).max()) < TOLERANCE and gap < TOLERANCE:
            return z, True
        if not np.isfinite(gap) or lam.max() > 1e14:
            return z, False
        theta = square + mu / z + nu / r
        left = g / theta
        try:
            factor = np.linalg.inv(np.diag(s / lam) + left @ g.T)
        except np.linalg.LinAlgError:
            return z, False
        direction = partial(_direction, (z, s, r), (lam, mu, nu), (dual, primal, box), g, theta, left, factor, bounded)
        dz, ds, dr, dlam, dmu, dnu = direction(mu * z, lam * s, nu * r)
        ap = min(_length(z, dz), _length(s, ds), _length(r, dr))
        ad = min(_length(lam, dlam), _length(mu, dmu), _length(nu, dnu))
        after = (
            (lam + ad * dlam) @ (s + ap * ds) + (mu + ad * dmu) @ (z + ap * dz) + (nu + ad * dnu) @ (r + ap * dr)
        ) / count
        t = gap * (max(after, 0.0) / gap) ** 3
        dz, ds, dr, dlam, dmu, dnu = direction(
            mu * z + dmu * dz - t, lam * s + dlam * ds - t, np.where(bounded, nu * r + dnu * dr - t, 0.0)
        )
        ap = 0.995 * min(_length(z, dz), _length(s, ds), _length(r, dr))
        ad = 0.995 * min(_length(lam, dlam), _length(mu, dmu), _length(nu, dnu))
        if square.any():
            # With curvature the two residuals shrink together only under one length.
            ap = ad = min(ap, ad)
        new = z + ap * dz, s + ap * ds, r + ap * dr, lam + ad * dlam, mu + ad * dmu, nu + ad * dnu
        if not all(np.isfinite(v).all() and (v >= 0).all() for v in new):
            break
        z, s, r, lam, mu, nu = new
    return z, bool(gap < 1e-7 and np.abs(primal).max() < 1e-7 and np.abs(dual).max() < 1e-7)


def _direction(
    state: tuple[Array, Array, Array],
    prices: tuple[Array, Array, Array],
    residuals: tuple[Array, Array, Array],
    g: Array,
    theta: Array,
    left: Array,
    factor: Array,
    bounded: Array,
    rz: Array,
    rs: Array,
    rr: Array,
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Newton's direction for the complementarities ``rz``, ``rs``, ``rr``, by the identity of Woodbury."""
    (z, s, r), (lam, mu, nu), (dual, primal, box) = state, prices, residuals
    # The prices come first: with the steps first, what is at its bound would drown the rest in rounding.
    h = -dual - rz / z + (rr - nu * box) / r
    dlam = factor @ (-rs / lam - primal - left @ h)
    dz = (h + g.T @ dlam) / theta
    ds = (-rs - s * dlam) / lam
    dr = np.where(bounded, -box - dz, 0.0)
    return dz, ds, dr, dlam, (-rz - mu * dz) / z, (-rr - nu * dr) / r


def _length(v: Array, dv: Array) -> float:
    down = dv < 0
    return min(1.0, float((-v[down] / dv[down]).min())) if down.any() else 1.0
