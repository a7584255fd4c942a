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

from ..errors import ArgumentError, DegenerateError, DeviceError, DTypeError, LayoutError, NonFiniteError, ShapeError

#: Kernel name to the torch form that computes on the tensor's own device.
DEVICE_PATHS: dict[str, Callable[..., Any]] = {}


def _token_logprobs(logits: Any, labels: Any, *, ignore_index: int, shift: bool) -> Any:
    labels = labels.to(logits.device)
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    counted = labels != ignore_index
    index = torch.where(counted, labels, torch.zeros_like(labels))
    token = wide.gather(-1, index[..., None])[..., 0] - torch.logsumexp(wide, -1)
    return torch.where(counted, token, torch.zeros_like(token))


DEVICE_PATHS["token_logprobs"] = _token_logprobs


# directions


def _edit_operands(plan: Any, x: Any) -> tuple[Any, Any, Any, Any]:
    """left, right, origin coefficients and shift of an edit, as tensors beside ``x``; kept for the next call."""
    import numpy as np

    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    key = (x.device, accumulate)
    if key not in plan.tensors:

        def tensor(values: Any) -> Any:
            return None if values is None else torch.from_numpy(np.array(values)).to(accumulate).to(x.device)

        origin = None if plan.origin is None or plan.left is None else plan.left @ plan.origin
        right = plan.left if plan.right is None else plan.right
        with torch.inference_mode(False):  # they outlive this call, and autograd refuses inference tensors
            plan.tensors[key] = (tensor(plan.left), tensor(right), tensor(origin), tensor(plan.shift))
    return plan.tensors[key]  # type: ignore[no-any-return]


def edit_coefficients(x: Any, plan: Any) -> Any:
    """Torch form of ``Edit.coefficients``."""
    left, _, origin, _ = _edit_operands(plan, x)
    found = x.to(left.dtype) @ left.T
    return found if origin is None else found - origin


def edit(x: Any, plan: Any) -> Any:
    """Torch form of ``Edit.apply``; autograd goes through it."""
    left, right, _, shift = _edit_operands(plan, x)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(accumulate)
    y = wide
    if left is not None:
        y = y - (edit_coefficients(x, plan) * plan.scale) @ right
    if shift is not None:
        y = y + shift
    if plan.preserve_norm:
        before, after = (t.norm(dim=-1, keepdim=True) for t in (wide, y))
        y = y * torch.where(after > 1e-6 * before, before / after, 1.0)
    return y.to(x.dtype)


def edit_(x: Any, plan: Any) -> Any:
    """Torch form of ``Edit.apply_``."""
    return x.copy_(edit(x, plan))


def differentiable_edit(x: Any, plan: Any) -> Any:
    """The kernel's result with a gradient: the adjoint of the edit swaps its left and right vectors."""
    if plan.preserve_norm:
        return edit(x, plan)

    class EditFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return plan.apply(x.detach())

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            if plan.left is None:
                return grad
            right = plan.left if plan.right is None else plan.right
            adjoint = type(plan)(plan.width, right, right=plan.left, scale=plan.scale)
            return adjoint.apply(grad)

    return EditFunction.apply(x)  # type: ignore[no-untyped-call]


def orthogonalize_(weight: Any, basis: Any, axis: int, scale: float, norm_preserving: str | None) -> Any:
    """Torch form of ``abjure.refuse.orthogonalize_``, after its checks; ``basis`` is orthonormal, float64 NumPy."""
    from ..errors import NonFiniteError
    from ..refuse.weights import WeightReport

    accumulate = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        q = torch.from_numpy(basis).to(accumulate).to(weight.device)
        stored = weight.detach().movedim(axis, -1)
        w = stored.to(accumulate)
        if not bool(w.isfinite().all()):
            raise NonFiniteError("weight: a NaN or an infinity")
        before = (w @ q.T).double().norm().item()
        # Lengths along the residual axis ("in"), or across inputs (the row forms).
        across = -1 if norm_preserving == "in" or w.ndim == 1 else -2
        old = w.norm(dim=across, keepdim=True)
        if norm_preserving in ("row", "row_pre"):
            w = torch.where(old > 0, w / old, 0.0)
        y = w - scale * (w @ q.T) @ q
        unrestored = 0
        if norm_preserving == "row_pre":
            y = y * old
        elif norm_preserving is not None:
            new = y.norm(dim=across, keepdim=True)
            reference = torch.where(old > 0, 1.0, 0.0) if norm_preserving == "row" else old
            kept = new > 1e-6 * reference
            unrestored = int(((reference > 0) & ~kept).sum().item())
            y = torch.where(kept, y * (old / new), y * old if norm_preserving == "row" else y)
        stored.copy_(y)
        after = (stored.to(accumulate) @ q.T).double().norm().item()
    return WeightReport(len(basis), before, after, unrestored)


# forget


_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
_UNSIGNED = {torch.int64: np.uint64, torch.int32: np.uint32, torch.int16: np.uint16}


class TorchPatch:
    """Flat indices and old bits of the weights that changed in a tensor on another device."""

    def __init__(self, shape: Any, dtype: Any, indices: Any, old: Any) -> None:
        self.shape, self.torch_dtype, self.indices, self.old = tuple(shape), dtype, indices, old

    @classmethod
    def between(cls, selected: Any, old: Any, new: Any) -> TorchPatch:
        """Of the places that ``selected`` marks, those where ``old`` and ``new`` differ in bits."""
        bits = _BITS[old.dtype]
        moved = old.view(bits) != new.view(bits)
        indices = selected.reshape(-1).nonzero()[:, 0][moved]
        return cls(selected.shape, old.dtype, indices, old[moved].view(bits))

    @classmethod
    def of(cls, patch: Any, device: Any) -> TorchPatch:
        """The same as a patch in CPU memory."""
        indices, old = patch.entries()
        dtype = getattr(torch, patch.dtype)
        signed = torch.from_numpy(old.view(old.dtype.str.replace("u", "i")))
        return cls(patch.shape, dtype, torch.from_numpy(indices.astype(np.int64)).to(device), signed.to(device))

    @property
    def dtype(self) -> str:
        return str(self.torch_dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        return int(self.indices.nbytes + self.old.nbytes)

    def __len__(self) -> int:
        return int(self.old.numel())

    def entries(self) -> tuple[Any, Any]:
        old = self.old.cpu().numpy()
        return self.indices.cpu().numpy().astype(np.uint64), old.view(_UNSIGNED[self.old.dtype])

    def check(self, weights: Any) -> None:
        if tuple(weights.shape) != self.shape:
            raise ShapeError(f"weights: expected shape {self.shape}, got {tuple(weights.shape)}")
        if weights.dtype != self.torch_dtype:
            raise DTypeError(f"weights: expected dtype {self.dtype}, got {weights.dtype}")

    def restore(self, weights: Any) -> None:
        self.check(weights)
        places = torch.unravel_index(self.indices.to(weights.device), self.shape) if self.shape else ()
        old = self.old.to(weights.device).view(self.torch_dtype)
        if self.shape:
            weights[places] = old
        elif len(self):
            weights.copy_(old[0])


def _expect_importances(forget: Any, retain: Any, shape: Any, device: Any) -> None:
    for arg, x in (("forget", forget), ("retain", retain)):
        if not isinstance(x, torch.Tensor) or x.device != device:
            raise DeviceError(f"{arg}: expected a tensor on {device}, got {getattr(x, 'device', type(x).__name__)}")
        if x.shape != shape:
            raise ShapeError(f"{arg}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != forget.dtype:
            raise DTypeError(f"{arg}: expected dtype float32 or float64, the same for both, got {x.dtype}")
        if bool(x.isnan().any()):
            raise NonFiniteError(f"{arg}: non-finite value NaN")
        if bool((x < 0).any()):
            raise ArgumentError(f"{arg}: expected importances of 0 or more, got {float(x.min())}")
    if bool((forget.isinf() & retain.isinf()).any()):
        raise ArgumentError("forget: expected a finite importance where retain is infinite, got inf")


def _expect_numbers(numbers: dict[str, float]) -> None:
    for arg, v in numbers.items():
        if not (math.isfinite(v) and v >= 0):
            raise ArgumentError(f"{arg}: expected a finite number, 0 or more, got {v}")
    if numbers.get("min_factor", 0.0) > numbers.get("max_factor", 1.0):
        raise ArgumentError(f"max_factor: expected min_factor or more, got {numbers['max_factor']}")


def _dampen_array_(
    weights: Any,
    forget: Any,
    retain: Any,
    alpha: float,
    lam: float,
    exponent: float,
    max_factor: float,
    min_factor: float,
    forget_count: float = 1.0,
    retain_count: float = 1.0,
    *,
    record: bool = False,
    dry_run: bool = False,
) -> tuple[tuple[int, int, int], TorchPatch | None]:
    _expect_numbers(
        {"alpha": alpha, "lam": lam, "exponent": exponent, "max_factor": max_factor, "min_factor": min_factor}
    )
    if weights.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise DTypeError(f"weights: expected dtype float64, float32, float16 or bfloat16, got {weights.dtype}")
    if weights.requires_grad and torch.is_grad_enabled():
        raise LayoutError("weights: the tensor requires grad; write under torch.no_grad() or pass tensor.detach()")
    weights = weights.detach()
    _expect_importances(forget, retain, weights.shape, weights.device)
    # Division by 1 is exact, and a tensor divisor is divided by rather than multiplied with the reciprocal of.
    f = forget.detach() / torch.tensor(forget_count, dtype=forget.dtype, device=forget.device)
    d = retain.detach() / torch.tensor(retain_count, dtype=forget.dtype, device=forget.device)
    selected = f > alpha * d
    factor = d[selected] * lam / f[selected]
    if exponent != 1.0:
        factor = factor.pow(exponent)
    factor = torch.where(factor < max_factor, factor, max_factor)
    factor = torch.where(factor > min_factor, factor, min_factor)
    arithmetic = torch.float64 if weights.dtype == torch.float64 else torch.float32
    old = weights[selected]
    new = (old.to(arithmetic) * factor.to(arithmetic)).to(weights.dtype)
    changed = (new != old) & ~old.isnan()
    counts = int(selected.sum()), int(changed.sum()), int((changed & (new == 0)).sum())
    if dry_run:
        return counts, None
    weights[selected] = new
    return counts, TorchPatch.between(selected, old, new) if record else None


def _fisher_accumulate(sums: Any, grad: Any, weights: list[float], power: int, *, check_only: bool = False) -> None:
    if not isinstance(sums, torch.Tensor) or sums.device != grad.device:
        raise DeviceError(f"grad: expected a gradient on {getattr(sums, 'device', 'the CPU')}, got {grad.device}")
    stack = grad.detach().reshape(-1, *sums.shape)
    total = sums.clone() if check_only else sums
    for g, weight in zip(stack, weights * len(stack) if len(weights) == 1 else weights, strict=True):
        g = g.to(sums.dtype)
        total += (g.square() if power == 2 else g.abs()).mul_(weight)
    if check_only and not bool(grad.isfinite().all()):
        raise NonFiniteError("grad: non-finite value")
    if check_only and not bool(total.isfinite().all()):
        what = "squares" if power == 2 else "absolute values"
        raise NonFiniteError(f"the sum of {what}: non-finite value inf")


def _fisher_combine(sums: Any, other: Any, subtract: bool, *, check_only: bool = False) -> None:
    if not isinstance(other, torch.Tensor) or other.device != sums.device:
        raise DeviceError(f"other: expected sums on {sums.device}, got {getattr(other, 'device', 'the CPU')}")
    total = sums.double() + (-1.0 if subtract else 1.0) * other.double()
    if not check_only:
        sums.copy_(total.clamp_(min=0.0))
        return
    slack = 1e-3 if sums.dtype == torch.float32 else 1e-9
    if not bool((total >= -slack * other.double()).all()):
        raise ArgumentError("other: expected sums of part of the same data, got a negative difference")
    if not bool(total.to(sums.dtype).isfinite().all()):
        raise NonFiniteError("the sum of squares: non-finite value inf")


def _selection_curve(
    forget: Any, retain: Any, alphas: list[float], forget_count: float, retain_count: float
) -> list[int]:
    for alpha in alphas:
        _expect_numbers({"alpha": alpha})
    _expect_importances(forget, retain, forget.shape, forget.device)
    f = forget / torch.tensor(forget_count, dtype=forget.dtype, device=forget.device)
    d = retain / torch.tensor(retain_count, dtype=forget.dtype, device=forget.device)
    return [int((f > alpha * d).sum()) for alpha in alphas]


def _ratio_percentile(
    forget: list[Any], retain: list[Any], percentile: float, forget_count: float, retain_count: float
) -> tuple[float, int, int, int]:
    first, ratios = forget[0], []
    for a, b in zip(forget, retain, strict=True):
        if a.dtype != first.dtype:
            raise DTypeError(f"forget: expected dtype {first.dtype}, got {a.dtype}")
        _expect_importances(a, b, a.shape, first.device)
        f = a.detach() / torch.tensor(forget_count, dtype=a.dtype, device=a.device)
        d = b.detach() / torch.tensor(retain_count, dtype=a.dtype, device=a.device)
        ratios.append((f / d).reshape(-1))
    pooled = torch.cat(ratios)
    infinite, undefined = int(pooled.isinf().sum()), int(pooled.isnan().sum())
    ordered = pooled[pooled.isfinite()].sort().values
    if not len(ordered):
        return math.nan, 0, infinite, undefined
    at = (len(ordered) - 1) * (percentile / 100.0)
    low = min(int(at), len(ordered) - 1)
    a, b, t = float(ordered[low]), float(ordered[min(low + 1, len(ordered) - 1)]), at - int(at)
    return a + (b - a) * t if t < 0.5 else b - (b - a) * (1 - t), len(ordered), infinite, undefined


DEVICE_PATHS.update(
    {
        "ratio_percentile": _ratio_percentile,
        "edit": edit,
        "edit_": edit_,
        "edit_coefficients": edit_coefficients,
        "orthogonalize_": orthogonalize_,
        "dampen_array_": _dampen_array_,
        "fisher_accumulate": _fisher_accumulate,
        "fisher_combine": _fisher_combine,
        "selection_curve": _selection_curve,
    }
)


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


# protect


def kde_objective_torch(
    centres: Any,
    labels: Any,
    classes: int,
    bandwidths: Any,
    *,
    queries: Any = None,
    query_labels: Any = None,
    query_rows: Any = None,
    objective: str = "gini",
    leave_one_out: str = "corrected",
    priors: Any = None,
    tau: float = 1.0,
) -> Any:
    """The kernel density objective of :mod:`abjure.protect` in plain, differentiable torch, on the tensors' device.

    Holds the n × n distances, so it is for small data and as an oracle. ``centres`` is ``(n, d)``, ``labels`` ``(n,)``
    codes 0..C-1; ``query_rows`` gives each query's own row of the centres or -1. Returns a 0-d tensor.
    """
    import torch

    own = torch.arange(len(centres), device=centres.device) if queries is None else query_rows
    at = centres if queries is None else queries
    target = labels if queries is None else query_labels
    squared = ((at[:, None, :] - centres[None, :, :]) ** 2).sum(-1)
    masked = torch.zeros_like(squared, dtype=torch.bool)
    if leave_one_out != "none" and own is not None:
        seen = own >= 0
        masked[torch.arange(len(at), device=at.device)[seen], own[seen]] = True
    members = torch.nn.functional.one_hot(labels, classes).to(centres.dtype).sum(0)
    prior = (
        members / members.sum()
        if priors is None
        else torch.as_tensor(priors, dtype=centres.dtype, device=centres.device)
    )
    counts = members.expand(len(at), classes)
    if leave_one_out == "corrected":
        rows = masked.to(centres.dtype) @ torch.nn.functional.one_hot(labels, classes).to(centres.dtype)
        counts = counts - rows
    total: Any = 0.0
    for h in bandwidths:
        exponent = (-squared / (2 * h * h)).masked_fill(masked, -torch.inf)
        sums = [torch.logsumexp(exponent.masked_fill(labels != c, -torch.inf), 1) for c in range(classes)]
        joint = torch.stack(sums, 1) + prior.log() - counts.log()
        log_p = torch.log_softmax(joint, 1)
        p = log_p.exp()
        own_p = log_p.gather(1, target[:, None])[:, 0]
        if objective == "plugin":
            value = 1 - p.amax(1)
        elif objective == "gini":
            value = 1 - (p * p).sum(1)
        elif objective == "softmax_tau":
            value = 1 - (torch.softmax(joint / tau, 1) * p).sum(1)
        elif objective == "entropy":
            value = -torch.xlogy(p, p).sum(1)
        elif objective == "soft":
            value = 1 - own_p.exp()
        elif objective == "soft_capped":
            value = (1 - own_p.exp()).clamp(max=1 - 1 / classes)
        elif objective == "nll":
            value = -own_p
        else:
            raise ArgumentError(f"objective: expected a name of abjure.protect.bayes_error, got {objective!r}")
        total = total + value.mean() / len(bandwidths)
    return total
