"""Token log-probabilities, forward and backward, and the divergence to a reference, against torch's log-softmax.

``python -m abjure.bench.logprobs`` prints the peak extra memory and the accuracy of each form.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..forget import kl_retain, token_logprobs
from . import plain
from .timing import Row, compare

#: (batch, tokens, vocabulary) at scale 1.
SHAPE = (4, 512, 49152)


def data(dtype: Any, scale: float = 1.0) -> tuple[Any, Any]:
    """Logits of standard deviation 3, and labels."""
    import torch

    b, t, v = SHAPE
    t, v = max(int(t * scale**0.5), 4), max(int(v * scale**0.5), 64)
    g = torch.Generator().manual_seed(0)
    logits = torch.empty((b, t, v), dtype=dtype)
    for row in logits.view(-1, v):  # one by one: the peak of memory is to be the measured call's
        row.copy_(torch.randn(v, generator=g).mul_(3))
    return logits.requires_grad_(), torch.randint(0, v, (b, t), generator=g)


def published(logits: Any, labels: Any) -> Any:
    """What training code writes: log-softmax in the logits' dtype, then gather."""
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


#: Name to form; the widened one is the accurate baseline for half precision.
FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "abjure": token_logprobs,
    "log_softmax + gather": published,
    "float(), log_softmax + gather": plain.token_logprobs,
}


def train(form: Callable[[Any, Any], Any], logits: Any, labels: Any) -> None:
    """Forward and backward of the summed log-probabilities; the gradient is dropped."""
    form(logits, labels).sum().backward()
    logits.grad = None


def _divergence(logits: Any, ref: Any, labels: Any) -> None:
    kl_retain(logits, ref, labels, shift=False).backward()  # type: ignore[no-untyped-call]
    logits.grad = None


def _plain_divergence(logits: Any, ref: Any) -> None:
    import torch

    p, q = logits.flatten(0, 1).log_softmax(-1), ref.flatten(0, 1).log_softmax(-1)
    loss = torch.nn.functional.kl_div(p, q, reduction="batchmean", log_target=True)
    loss.backward()  # type: ignore[no-untyped-call]
    logits.grad = None


def rows(scale: float = 1.0) -> Iterator[Row]:
    """Comparisons of this group; ``scale`` shrinks the (4, 512, 49152) logits."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        logits, labels = data(dtype, scale)
        size = logits.numel() * logits.element_size()
        b, t, v = logits.shape
        case = f"{b}x{t}x{v} {str(dtype).removeprefix('torch.')}"
        for name in list(FORMS)[1 : 2 if dtype == torch.float32 else 3]:
            ours, theirs = compare(
                lambda x=logits, y=labels: train(token_logprobs, x, y),  # type: ignore[misc]
                lambda x=logits, y=labels, form=FORMS[name]: train(form, x, y),  # type: ignore[misc]
                repeats=3,
            )
            # Read forward, read and written backward.
            yield Row("token_logprobs fwd+bwd", case, ours, f"torch, {name}", theirs, bytes=3 * size)
        if dtype == torch.float32:
            ref = logits.detach() + 0.1
            ours, theirs = compare(
                lambda x=logits, r=ref, y=labels: _divergence(x, r, y),  # type: ignore[misc]
                lambda x=logits, r=ref: _plain_divergence(x, r),  # type: ignore[misc]
                repeats=3,
            )
            yield Row("kl_retain fwd+bwd", case, ours, "torch, two log_softmax", theirs, bytes=5 * size)


def _status(field: str) -> float:
    """A memory figure of this process, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def peak_memory(name: str, dtype: str, scale: float = 1.0) -> float:
    """MiB by which forward and backward of a form exceed the logits at their peak. For a process of its own (Linux)."""
    import torch

    logits, labels = data(getattr(torch, dtype), scale)
    train(FORMS[name], logits[:1, :2].detach().clone().requires_grad_(), labels[:1, :2])
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = _status("VmRSS")
    train(FORMS[name], logits, labels)
    return _status("VmHWM") - before


def worst_error(name: str, dtype: str, count: int = 64) -> float:
    """Largest absolute error of a form's log-probabilities against f64 arithmetic on the same logits."""
    import torch

    logits, labels = data(getattr(torch, dtype), count / (SHAPE[0] * SHAPE[1]))
    exact = plain.token_logprobs(logits.detach().double(), labels)
    return float((FORMS[name](logits.detach(), labels).double() - exact).abs().max())


def main() -> None:
    """Prints a line per form and dtype, each measured in a new process."""
    for dtype in ("float32", "bfloat16"):
        for name in FORMS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak, error = pool.apply(peak_memory, (name, dtype)), pool.apply(worst_error, (name, dtype))
            print(f"{dtype:<9} {name:<30} peak extra memory {peak:7.0f} MiB, worst error {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
