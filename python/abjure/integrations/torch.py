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
