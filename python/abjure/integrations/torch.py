"""Torch forms of the kernels: what runs for tensors on other devices, and the oracle of the tests.

Each wing's kernels have one entry here under the kernel's public name, written in plain torch operations with the
kernel's own precision rules (half storage, f32 arithmetic, one rounding at the store).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError

#: Kernel name to the torch form that computes on the tensor's own device.
DEVICE_PATHS: dict[str, Callable[..., Any]] = {}


# decoding


def _poisoned(values: Any) -> Any:
    return values.isnan() | (values == math.inf)


def _expect_sound(values: Any, what: str) -> None:
    bad = _poisoned(values).flatten()
    if bool(bad.any()):
        at = int(bad.to(torch.int8).argmax())
        raise NonFiniteError(f"{what}: non-finite value {float(values.flatten()[at])} at flat index {at}")


def _expect_ids(ids: Any, width: int, arg: str) -> None:
    outside = [int(i) for i in ids if not 0 <= i < width]
    if outside:
        raise ArgumentError(f"{arg}: expected token ids from 0 to {width - 1}, got {outside[0]}")


def _expect_batch(logits: Any) -> None:
    if logits.dim() != 2:
        raise ShapeError(f"logits: expected shape (batch, vocabulary), got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise DTypeError(f"logits: expected dtype float64, float32, float16 or bfloat16, got {logits.dtype}")


def _expect_left(alive: Any) -> None:
    if not bool(alive.all()):
        row = int((~alive).to(torch.int8).argmax())
        raise DegenerateError(f"logits: row {row} has no token left that could be generated")


def _wide(logits: Any) -> Any:
    """Logits in the type reductions use: float64, or float32 on a device without it."""
    return logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)


def _entries(rows: int, ids: Any, bias: Any, indptr: Any) -> tuple[Any, Any, Any]:
    """CSR lists as (row, id, bias) triples, the biases of an id given twice in a row added."""
    if len(ids) != len(bias):
        raise ShapeError(f"bias: expected {len(ids)} values, got {len(bias)}")
    if np.isnan(bias).any() or (bias == np.inf).any():
        raise ArgumentError("bias: expected finite numbers or -inf, got NaN or +inf")
    if indptr is None:
        row, ids, bias = np.repeat(np.arange(rows), len(ids)), np.tile(ids, rows), np.tile(bias, rows)
    else:
        if len(indptr) != rows + 1:
            raise ShapeError(f"indptr: expected {rows + 1} entries (rows + 1), got {len(indptr)}")
        if indptr[0] != 0 or indptr[-1] != len(ids) or (np.diff(indptr) < 0).any():
            raise ArgumentError(f"indptr: expected a non-decreasing list from 0 to {len(ids)}, got another")
        row = np.repeat(np.arange(rows), np.diff(indptr))
    pairs, where = np.unique(np.stack([row, ids]), axis=1, return_inverse=True)
    total = np.zeros(pairs.shape[1])
    np.add.at(total, where.reshape(-1), bias)
    return pairs[0], pairs[1], total


def _biased(values: Any, bias: Any) -> Any:
    """``values + bias`` in the arithmetic type, rounded once; overflow is an error."""
    _expect_sound(values, "logits")
    exact = torch.float64 if values.dtype == torch.float64 else torch.float32
    bias = torch.as_tensor(bias, device=values.device).to(exact)
    result = torch.where(bias == 0, values, (values.to(exact) + bias).to(values.dtype))
    if bool((result.isinf() & ~values.isinf() & bias.isfinite()).any()):
        raise ArgumentError(f"bias: expected sums within the range of {values.dtype}")
    return result


def _alive_after(logits: Any, row: Any, ids: Any, gone: Any) -> Any:
    """Whether each row keeps an entry above -inf once those of the triples that are ``gone`` are removed."""
    left = (logits > -math.inf).sum(dim=1)
    lost = ((logits[row, ids] > -math.inf) & gone).to(left.dtype)
    return left.index_add(0, row, -lost) > 0


def _bias_(logits: Any, ids: Any, bias: Any, indptr: Any = None) -> None:
    _expect_batch(logits)
    _expect_ids(ids, logits.shape[1], "ids")
    row, token, total = (torch.as_tensor(v, device="cpu") for v in _entries(logits.shape[0], ids, bias, indptr))
    row, token = row.to(logits.device), token.to(logits.device)
    result = _biased(logits[row, token], total)
    gone = (total == -math.inf).to(logits.device)
    if bool(gone.any()):
        alive = _alive_after(logits, row, token, gone)
        alive[~torch.isin(torch.arange(len(alive), device=alive.device), row[gone])] = True
        _expect_left(alive)
    logits[row, token] = result


def _force_(logits: Any, ids: Any) -> None:
    _expect_batch(logits)
    if len(ids) != logits.shape[0]:
        raise ShapeError(f"ids: expected {logits.shape[0]} (one per row), got {len(ids)}")
    _expect_ids(ids[ids >= 0], logits.shape[1], "ids")
    row = torch.as_tensor(np.flatnonzero(ids >= 0), device=logits.device)
    token = torch.as_tensor(ids[ids >= 0], device=logits.device)
    kept = logits[row, token]
    _expect_sound(kept, "logits")
    logits[row] = -math.inf
    logits[row, token] = torch.where(kept.isfinite(), kept, torch.zeros_like(kept))


def _reducible(logits: Any, temperature: float) -> Any:
    _expect_batch(logits)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ArgumentError(f"temperature: expected a positive finite number, got {temperature}")
    _expect_sound(logits, "logits")
    _expect_left((logits > -math.inf).any(dim=1))
    return _wide(logits) / temperature


def _row_lse(logits: Any, temperature: float = 1.0) -> Any:
    return torch.logsumexp(_reducible(logits, temperature), dim=1)


def _per_group(z: Any, groups: list[list[int]], reduce: Callable[[Any], Any]) -> Any:
    """``reduce`` of each group minus ``reduce`` of all others."""
    columns = []
    for group in groups:
        _expect_ids(group, z.shape[1], "groups")
        others = z.clone()
        others[:, group] = -math.inf
        columns.append(reduce(z[:, group]) - reduce(others))
    return torch.stack(columns, dim=1)


def _row_margin(logits: Any, groups: list[list[int]], temperature: float = 1.0) -> Any:
    return _per_group(_reducible(logits, temperature), groups, lambda z: torch.logsumexp(z, dim=1))


def _row_max_gap(logits: Any, groups: list[list[int]]) -> Any:
    return _per_group(_reducible(logits, 1.0), groups, lambda z: z.amax(dim=1))


def _forbid_(scores: Any, indptr: Any, ids: Any, values: Any, dead_end: int | None) -> None:
    """Adds what an automaton says; rows without a token left are forced to ``dead_end`` where there is one."""
    if dead_end is None:
        return _bias_(scores, ids, values, indptr)
    _expect_batch(scores)
    _expect_ids([*ids, dead_end], scores.shape[1], "phrases")
    row = np.repeat(np.arange(scores.shape[0]), np.diff(indptr))
    on_device = [torch.as_tensor(v, device=scores.device) for v in (row, ids, np.isneginf(values))]
    dead = ~_alive_after(scores, *on_device).cpu().numpy() & np.bincount(
        row[values == -np.inf], minlength=len(scores)
    ).astype(bool)
    stays = ~dead[row]
    counts = np.bincount(row[stays], minlength=len(scores))
    forced = np.where(dead, dead_end, -1)
    _expect_sound(scores[torch.as_tensor(dead, device=scores.device)][:, dead_end], "logits")
    _bias_(scores, ids[stays], values[stays], np.concatenate([[0], np.cumsum(counts)]))
    _force_(scores, forced)
    return None


def _excess(margin: float, threshold: float) -> float:
    if threshold == -math.inf:
        return math.inf
    return 0.0 if margin == threshold else margin - threshold


def _verdict(own: Any, margins: Any, mass: float, gate: Any) -> int:
    """Category that fires, or why none does, from each category's log-sum and margin and the margin of their mass."""
    top = int(np.argmax(own))
    if gate.rule == "mass":
        return top if _excess(mass, gate.threshold[0]) >= 0 else -1
    asked = range(len(own)) if gate.rule == "ratio" else [top]
    if gate.rule == "argmax_then_threshold" and gate.threshold[top] is None:
        return -2
    excess = {k: _excess(margins[k], gate.threshold[k]) for k in asked if gate.threshold[k] is not None}
    best = max(excess, key=lambda k: excess[k])
    return best if excess[best] >= 0 else -1


def _gate_(scores: Any, positions: Any, gate: Any) -> Any:
    """What :class:`abjure.refuse.RefusalTokens` does to rows at their gate (1) or to be masked (2); the verdicts."""
    _expect_batch(scores)
    categories = list(gate.categories.values())
    union = [i for ids in categories for i in ids]
    _expect_ids(union, scores.shape[1], "categories")
    if not isinstance(gate.on_no_fire, str):
        _expect_ids([gate.on_no_fire], scores.shape[1], "on_no_fire")
    verdicts = np.full(len(positions), -3, dtype=np.int64)
    at_gate = torch.as_tensor(np.flatnonzero(positions == 1), device=scores.device)
    work = scores[torch.as_tensor(np.flatnonzero(positions != 0), device=scores.device)]
    asked = positions[positions != 0] == 1
    rows = work[torch.as_tensor(asked, device=scores.device)]
    rows[:, union] = _biased(rows[:, union], [b for b, ids in zip(gate.bias, categories, strict=True) for _ in ids])
    found = np.full(len(rows), -1, dtype=np.int64)
    if len(rows) and any(t is not None for t in gate.threshold):
        z = _reducible(rows, gate.temperature)
        own = torch.stack([torch.logsumexp(z[:, ids], dim=1) for ids in categories], dim=1).cpu().numpy()
        margins = _row_margin(rows, categories, gate.temperature).cpu().numpy()
        mass = _row_margin(rows, [union], gate.temperature).cpu().numpy()[:, 0]
        found = np.array([_verdict(o, m, t, gate) for o, m, t in zip(own, margins, mass, strict=True)])
    verdicts[positions == 1] = found
    forced, freed = np.full(len(found), -1, dtype=np.int64), np.zeros(len(found), dtype=bool)
    for i, v in enumerate(found):
        if v >= 0:
            ids = sorted(categories[v])
            forced[i] = ids[int(np.argmax(rows[i, ids].double().cpu().numpy()))]
        elif v == -1 and gate.on_no_fire == "free":
            freed[i] = True
        elif v == -1 and gate.on_no_fire != "keep":
            forced[i] = gate.on_no_fire
    masked = torch.as_tensor(np.flatnonzero(positions == 2), device=scores.device)
    _expect_sound(scores[masked][:, union], "logits")
    removed = torch.cat([at_gate[torch.as_tensor(freed, device=scores.device)], masked])
    alive = scores[removed].clone()
    alive[:, union] = -math.inf
    _expect_left((alive > -math.inf).any(dim=1))
    _force_(rows, forced)
    scores[at_gate] = rows
    scores[removed[:, None], torch.as_tensor(union, device=scores.device)] = -math.inf
    return verdicts


DEVICE_PATHS.update(
    {
        "bias_": _bias_,
        "force_": _force_,
        "forbid_": _forbid_,
        "gate_": _gate_,
        "row_lse": _row_lse,
        "row_margin": _row_margin,
        "row_max_gap": _row_max_gap,
    }
)
