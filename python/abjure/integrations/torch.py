"""Torch forms of the kernels: what runs for tensors on other devices, and the oracle of the tests.

Each wing's kernels have one entry here under the kernel's public name, written in plain torch operations with the
kernel's own precision rules (half storage, f32 arithmetic, one rounding at the store).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ArgumentError

#: Kernel name to the torch form that computes on the tensor's own device.
DEVICE_PATHS: dict[str, Callable[..., Any]] = {}

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
    total = 0.0
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
