"""Torch forms of the kernels: what runs for tensors on other devices, and the oracle of the tests.

Each wing's kernels have one entry here under the kernel's public name, written in plain torch operations with the
kernel's own precision rules (half storage, f32 arithmetic, one rounding at the store).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


DEVICE_PATHS.update(
    {
        "edit": edit,
        "edit_": edit_,
        "edit_coefficients": edit_coefficients,
        "orthogonalize_": orthogonalize_,
    }
)
