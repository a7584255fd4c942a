"""Just-in-time unlearning by Lipschitz regularisation (arXiv 2402.01401): from the forget set alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .._modes import evaluating
from ..errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from .params import chosen, listed


@dataclass(frozen=True)
class JitReport:
    """What :func:`jit_` did."""

    #: ``K`` of each batch before its step: the sum over the batch of the mean local Lipschitz quotient.
    constants: list[float]
    lr: float
    noise_std: float
    copies: int
    _old: dict[str, Any] | None = field(repr=False, default=None)

    def undo(self, model: Any) -> None:
        """Copies the parameters as they were back into ``model``.

        Raises:
            ArgumentError: the report was made with ``undo=False``, or a parameter is missing.
            ShapeError: a parameter has another shape.
        """
        import torch

        if self._old is None:
            raise ArgumentError("undo: expected a report of jit_(..., undo=True)")
        parameters = dict(model.named_parameters())
        missing = [n for n in self._old if n not in parameters]
        if missing:
            raise ArgumentError(f"model: expected parameters {listed(missing)}, got {listed(parameters)}")
        for name, old in self._old.items():
            if parameters[name].shape != old.shape:
                found = tuple(parameters[name].shape)
                raise ShapeError(f"model: {name!r}: expected shape {tuple(old.shape)}, got {found}")
        with torch.no_grad():
            for name, old in self._old.items():
                parameters[name].copy_(old)

    def __str__(self) -> str:
        first, last = self.constants[0], self.constants[-1]
        return (
            f"{len(self.constants)} steps of rate {self.lr:g}, {self.copies} noisy copies of deviation "
            f"{self.noise_std:g}: K went from {first:.4g} (first batch) to {last:.4g} (last)"
        )

    def plot(self, ax: Any = None) -> Any:
        """``K`` of each batch; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        ax.plot(self.constants, marker=".")
        ax.set_xlabel("batch")
        ax.set_ylabel("K (sum of Lipschitz quotients)")
        return ax


def jit_(
    model: Any,
    loader: Iterable[Any],
    *,
    lr: float = 3e-4,
    noise_std: float = 0.5,
    copies: int = 25,
    inputs: Callable[[Any], Any] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    seed: int = 0,
    undo: bool = True,
    progress: bool = True,
) -> JitReport:
    """Smooths the model around the samples to forget: one gradient step per batch, no labels and no other data.

    ``K = (1/N) Σ_k Σ_i ‖f(x_i) - f(x_i + e_ki)‖₂ / ‖e_ki‖₂`` over ``N`` copies with Gaussian noise that were clamped to
    the range of the batch; ``e`` is what the clamp left of the noise. The noisy branch has no gradient. ``K`` is a sum
    over the batch and not a mean, as published: ``lr`` belongs to a batch size. A sample that the clamp left as it was,
    and one whose output does not move, add nothing.

    The model is put into eval mode and its modes are restored; ``.grad`` and buffers are not touched.

    Args:
        model: a torch module that maps a batch of inputs to logits (or any rows); the parameters are modified.
        loader: batches of the samples to forget; each is used once, in order.
        lr: learning rate. Published for a whole class: 3e-4 (VGG-16), 1.5 (ViT).
        noise_std: deviation of the noise. Published for a whole class: 0.5 (VGG-16), 0.8 (ViT).
        copies: noisy copies of each batch, ``N``.
        inputs: takes a batch to the tensor that the model is called with; by default the batch itself or its
            first item.
        include: patterns with shell wildcards; only parameters that match one are changed.
        exclude: patterns of parameters to leave alone.
        seed: of the noise.
        undo: keep a copy of the parameters for :meth:`JitReport.undo`.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        The constants, and what undoes the steps.

    Raises:
        ArgumentError: a number out of range, or no parameter that requires grad.
        DegenerateError: the loader yields nothing.
        DTypeError: inputs that are not a floating-point tensor.
        NonFiniteError: ``K`` or a gradient is not finite; the batch is named.
        After any error and after Ctrl-C the parameters are as they were.

    Source: arXiv 2402.01401 and its code.
    """
    if not hasattr(model, "named_parameters"):
        raise DTypeError(f"model: expected a torch module, got {type(model).__name__}")
    for name, value in (("lr", lr), ("noise_std", noise_std)):
        if not 0 < value < float("inf"):
            raise ArgumentError(f"{name}: expected a finite number above 0, got {value}")
    if copies < 1:
        raise ArgumentError(f"copies: expected 1 or more, got {copies}")
    import torch
    from tqdm.auto import tqdm

    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    parameters = {n: parameters[n] for n in chosen(parameters, include, exclude)}
    if not parameters:
        raise ArgumentError("model: expected a parameter that requires grad, got none")
    old = {n: p.detach().clone() for n, p in parameters.items()}
    constants: list[float] = []
    generators: dict[Any, Any] = {}
    with evaluating(model):
        try:
            for batch in tqdm(loader, desc="jit", unit="batch", disable=None if progress else True):
                x = _inputs(batch, inputs)
                noise = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(seed))
                with torch.enable_grad():  # type: ignore[no-untyped-call]
                    k = _constant(model, x, noise_std, copies, noise)
                    if not k.requires_grad:
                        raise ArgumentError("model: expected outputs that depend on the parameters to change, got none")
                    gradients = torch.autograd.grad(k, list(parameters.values()), allow_unused=True)
                good = k.isfinite() & torch.stack([g.isfinite().all() for g in gradients if g is not None]).all()
                if not bool(good):
                    raise NonFiniteError(
                        f"model: batch {len(constants)}: expected a finite K and gradient, got K = {k.item()}"
                    )
                with torch.no_grad():
                    for p, g in zip(parameters.values(), gradients, strict=True):
                        if g is not None:
                            p.sub_(g, alpha=lr)
                constants.append(k.item())
            if not constants:
                raise DegenerateError("loader: expected at least one batch, got none")
        except BaseException:
            with torch.no_grad():
                for n, p in parameters.items():
                    p.copy_(old[n])
            raise
    return JitReport(constants, lr, noise_std, copies, old if undo else None)


def _inputs(batch: Any, inputs: Callable[[Any], Any] | None) -> Any:
    import torch

    x = inputs(batch) if inputs is not None else batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim < 2:
        found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise DTypeError(f"loader: expected a floating-point tensor with a leading axis of samples, got {found}")
    return x.detach()


def _constant(model: Any, x: Any, noise_std: float, copies: int, generator: Any) -> Any:
    """``K`` of one batch, with its gradient through the clean branch."""
    import torch

    out = model(x)
    low, high = x.min(), x.max()
    total = torch.zeros((), dtype=torch.float64 if out.dtype == torch.float64 else torch.float32, device=out.device)
    for _ in range(copies):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        other = (x + noise_std * noise).clamp(low, high)
        with torch.no_grad():
            moved = model(other)
        step = (other - x).flatten(1).to(total.dtype).norm(dim=1)
        change = (out - moved).flatten(1).to(total.dtype).norm(dim=1)
        total = total + torch.where(step > 0, change / torch.where(step > 0, step, 1.0), 0.0).sum()
    return total / copies
