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
        "dampen_array_": _dampen_array_,
        "fisher_accumulate": _fisher_accumulate,
        "fisher_combine": _fisher_combine,
        "selection_curve": _selection_curve,
    }
)
