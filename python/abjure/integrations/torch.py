"""Torch forms of the kernels: what runs for tensors on other devices, and the oracle of the tests.

Each wing's kernels have one entry here under the kernel's public name, written in plain torch operations with the
kernel's own precision rules (half storage, f32 arithmetic, one rounding at the store).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..errors import ArgumentError, DeviceError, DTypeError, LayoutError, NonFiniteError, ShapeError

#: Kernel name to the torch form that computes on the tensor's own device.
DEVICE_PATHS: dict[str, Callable[..., Any]] = {}


def _token_logprobs(logits: Any, labels: Any, *, ignore_index: int, shift: bool) -> Any:
    import torch

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
    import torch

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
    import torch

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
    import torch

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
    import torch

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


class _TorchPatch:
    """Old values of the selected weights of a tensor on another device."""

    def __init__(self, selected: Any, old: Any) -> None:
        self.selected, self.old = selected, old

    def restore(self, weights: Any) -> None:
        if weights.shape != self.selected.shape:
            raise ShapeError(f"weights: expected shape {tuple(self.selected.shape)}, got {tuple(weights.shape)}")
        if weights.dtype != self.old.dtype:
            raise DTypeError(f"weights: expected dtype {self.old.dtype}, got {weights.dtype}")
        weights[self.selected] = self.old

    def __len__(self) -> int:
        return int(self.old.numel())


def _expect_importances(forget: Any, retain: Any, shape: Any, device: Any) -> None:
    import torch

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
) -> tuple[tuple[int, int, int], _TorchPatch | None]:
    import torch

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
    return counts, _TorchPatch(selected, old) if record else None


def _fisher_accumulate(sums: Any, grad: Any, weight: float, *, check_only: bool = False) -> None:
    import torch

    if not isinstance(sums, torch.Tensor) or sums.device != grad.device:
        raise DeviceError(f"grad: expected a gradient on {getattr(sums, 'device', 'the CPU')}, got {grad.device}")
    stack = grad.detach().reshape(-1, *sums.shape)
    total = sums.clone() if check_only else sums
    for g in stack:
        total += g.to(sums.dtype).square_().mul_(weight)
    if check_only and not bool(grad.isfinite().all()):
        raise NonFiniteError("grad: non-finite value")
    if check_only and not bool(total.isfinite().all()):
        raise NonFiniteError("the sum of squares: non-finite value inf")


def _fisher_combine(sums: Any, other: Any, subtract: bool, *, check_only: bool = False) -> None:
    import torch

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
    import torch

    for alpha in alphas:
        _expect_numbers({"alpha": alpha})
    _expect_importances(forget, retain, forget.shape, forget.device)
    f = forget / torch.tensor(forget_count, dtype=forget.dtype, device=forget.device)
    d = retain / torch.tensor(retain_count, dtype=forget.dtype, device=forget.device)
    return [int((f > alpha * d).sum()) for alpha in alphas]


DEVICE_PATHS.update(
    {
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
