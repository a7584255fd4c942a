"""Per-token log-probabilities of labels, fused forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .. import _interop, _native
from ..errors import ShapeError

__all__ = ["token_logprobs"]


def token_logprobs(logits: Any, labels: Any, ignore_index: int = -100, shift: bool = False) -> Any:
    """Log-probability, in nats, of each label under its row of logits; 0 where the label is ``ignore_index``.

    One read of the logits forward and one backward; no softmax is ever stored, so the only array of the logits' size
    is their
    gradient. Rows that do not count are not read. Half-precision logits are widened, the result is not rounded back:
    f32 for
    f32, f16 and bf16 logits, f64 for f64. Absolute error against f64 arithmetic on the same logits: below 1e-6 plus
    one rounding
    of the result.

    Args:
        logits: ``(..., T, V)`` torch tensor (differentiable) or NumPy array, f64, f32, f16 or bf16. On another device
        the plain
            torch form runs there.
        labels: ``(..., T)`` integer token ids in ``[0, V)`` or ``ignore_index``.
        ignore_index: label that is skipped.
        shift: logits at ``t`` predict the label at ``t + 1``, as in causal models of transformers; the result then
        has shape
            ``(..., T − 1)``.

    Returns:
        Tensor or array of the labels' shape (one shorter in T with ``shift``).

    Raises:
        ShapeError: logits without a vocabulary axis, or labels of another shape.
        ArgumentError: a label out of range.
        NonFiniteError: a counted row holds a NaN or +∞, or nothing but −∞.

    Source: the log-likelihood every language-model unlearning loss is built on; online log-sum-exp.
    """
    labels = labels if hasattr(labels, "shape") else np.asarray(labels)
    shape, found = _interop.shape(logits, "logits"), _interop.shape(labels, "labels")
    if len(shape) < 2 or found != shape[:-1]:
        raise ShapeError(f"labels: expected shape {shape[:-1]} for logits {shape}, got {found}")
    if (path := _interop.device_path(logits, "token_logprobs")) is not None:
        return path(logits, labels, ignore_index=ignore_index, shift=shift)
    ids = _interop.integers(labels, "labels")
    if shift:
        moved = np.full_like(ids, ignore_index)
        moved[..., :-1] = ids[..., 1:]
        ids = moved
    if _interop.is_torch(logits):
        out = _function()(logits, ids.reshape(-1), ignore_index)
    else:
        values, _ = _forward(_interop.source(logits, "logits"), ids.reshape(-1), ignore_index)
        dtype = np.float64 if logits.dtype == np.float64 else np.float32
        out = values.astype(dtype).reshape(shape[:-1])
    return out[..., :-1] if shift else out


def _forward(logits: Any, labels: np.ndarray[Any, Any], ignore: int) -> tuple[Any, Any]:
    out, lse = np.empty(labels.size), np.empty(labels.size)
    _native.token_logprobs(logits, labels, ignore, out, lse)
    return out, lse


def _empty(shape: Any, dtype: Any) -> Any:
    """A torch tensor in NumPy's memory: NumPy asks for huge pages, and first touching a gradient of hundreds of
    megabytes in small pages takes longer than computing it."""
    import torch

    width = torch.empty((), dtype=dtype).element_size()
    return torch.from_numpy(np.empty(tuple(shape), dtype=f"i{width}")).view(dtype)


@functools.cache
def _function() -> Any:
    """The autograd function, made on first use so that importing the wing does not import torch."""
    import torch

    class TokenLogprobs(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Any, labels: Any, ignore: int) -> Any:
            plain = _interop.source(logits, "logits")
            values, lse = _forward(plain, labels, ignore)
            ctx.save_for_backward(logits)
            ctx.labels, ctx.lse, ctx.ignore = labels, lse, ignore
            dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
            return torch.from_numpy(values).to(dtype).reshape(logits.shape[:-1])

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, upstream: Any) -> Any:
            (logits,) = ctx.saved_tensors
            grad = _empty(logits.shape, logits.dtype)
            u = upstream.detach().double().contiguous().reshape(-1).numpy()
            plain = _interop.source(logits, "logits")
            _native.token_logprobs_backward(plain, ctx.labels, ctx.lse, u, grad, ctx.ignore)
            return grad, None, None

    return TokenLogprobs.apply
