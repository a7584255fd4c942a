"""Exact conditional tests of 2 × 2 tables in strata: hypergeometric counts, convolved."""

from __future__ import annotations

import functools
import math

import numpy as np

from .._arrays import Floats, Ints

#: Strata and items above which log-factorials are no longer kept in a table.
_TABLE = 1 << 22


@functools.lru_cache(maxsize=4)
def _log_factorials(n: int) -> Floats:
    found: Floats = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1, dtype=np.float64)))])
    return found


def hypergeometric(total: int, marked: int, drawn: int) -> tuple[int, Floats]:
    """Probabilities of the marked among ``drawn`` of ``total``: the least possible number, and one value from it on."""
    lf = _log_factorials(max(total, 1))
    low, high = max(0, marked + drawn - total), min(marked, drawn)
    x = np.arange(low, high + 1)
    logs = lf[marked] - lf[x] - lf[marked - x] + lf[total - marked] - lf[drawn - x] - lf[total - marked - drawn + x]
    p: Floats = np.exp(logs - (lf[total] - lf[drawn] - lf[total - drawn]))
    return low, p / p.sum()


def upper_tail(seen: int, totals: Ints, marked: Ints, drawn: Ints) -> float:
    """Chance of ``seen`` marked items or more among those drawn, summed over strata.

    Within a stratum ``drawn`` of ``totals`` items are taken at random, ``marked`` of them count. With one stratum this
    is Fisher's exact test, one-sided; with several the exact conditional test of Gart (1970), a common odds ratio of 1.
    """
    start, p = 0, np.ones(1)
    for t, m, d in zip(totals.tolist(), marked.tolist(), drawn.tolist(), strict=True):
        if m and d:
            low, q = hypergeometric(t, m, d)
            start, p = start + low, np.convolve(p, q)
    at = seen - start
    return 1.0 if at <= 0 else 0.0 if at >= len(p) else min(1.0, float(p[at:].sum()))


def score(seen: Floats, totals: Ints, marked: Ints, drawn: Ints) -> Floats:
    """Cochran-Mantel-Haenszel z of many tables: ``seen`` ``(m,)``, ``drawn`` ``(m, strata)``; 0 without variance."""
    n = np.maximum(totals, 1).astype(np.float64)
    expected = (drawn * (marked / n)).sum(axis=1)
    scale = marked * (totals - marked) / (n * n * np.maximum(n - 1, 1))
    variance = (drawn * (totals - drawn) * scale).sum(axis=1)
    z: Floats = np.where(variance > 0, (seen - expected) / np.sqrt(np.where(variance > 0, variance, 1.0)), 0.0)
    return z


def best_case(totals: Ints, marked: Ints, drawn: Ints) -> float:
    """Log of the smallest p-value a table with these margins can have."""
    found = 0.0
    for t, m, d in zip(totals.tolist(), marked.tolist(), drawn.tolist(), strict=True):
        if m and d:
            found += math.log(max(float(hypergeometric(t, m, d)[1][-1]), 1e-300))
    return found
