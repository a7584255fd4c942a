"""The whole importance pass over a data loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from ..errors import ArgumentError, DegenerateError, DTypeError
from .fisher import Fisher

#: Bytes of per-example gradients held at a time.
_STACK_BYTES = 256 << 20


def importance(
    model: Any,
    loader: Iterable[Any],
    loss: Callable[[Any, Any], Any],
    per_sample: bool | Literal["loop"] = False,
    *,
    dtype: str = "float32",
    progress: bool = True,
) -> Fisher:
    """Fisher importance of every parameter of a torch model over a loader's batches.

    The model is put into eval mode and its modes are restored, whatever happens; ``.grad`` is neither read nor written.

    Args:
        model: a torch module. Parameters that do not require grad, or that the loss does not reach, get 0.
        loader: yields batches; any iterable. Every batch counts as one, a ragged last one too, as published.
        loss: ``loss(model, batch)``, a scalar: the mean cross-entropy with the true labels, as published. It moves the
            batch to the model's device itself.
        per_sample: exact squares per example (unit ``"sample"``) instead of squares of each batch's gradient (unit
            ``"batch"``). Every tensor in a batch then has a leading axis of examples, and ``loss`` is called with
            batches of one under ``torch.func.vmap`` and with a stand-in for the model that is called like it.
            ``"loop"`` does the same example by example, for models and losses that vmap cannot trace.
        dtype: of the sums, ``"float32"`` or ``"float64"``.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        The accumulated :class:`Fisher`.

    Raises:
        DegenerateError: the loader yields nothing.
        ArgumentError: the loss is not a scalar, or a batch has no common leading axis.
        NonFiniteError: a gradient is NaN or infinite; the parameter is named.

    Source: arXiv 2308.07707, section 3; the published code divides the sum over batches by their number.
    """
    if not hasattr(model, "named_parameters"):
        raise DTypeError(f"model: expected a torch module, got {type(model).__name__}")
    if per_sample not in (False, True, "loop"):
        raise ArgumentError(f"per_sample: expected False, True or 'loop', got {per_sample!r}")
    from tqdm.auto import tqdm

    parameters = dict(model.named_parameters())
    fisher = Fisher("sample" if per_sample else "batch", dtype)
    fisher._begin(parameters)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trained:
        raise ArgumentError("model: expected a parameter that requires grad, got none")
    step = {False: _batch, True: _stacked, "loop": _one_by_one}[per_sample]
    with _evaluating(model):
        for batch in tqdm(loader, desc="importance", unit="batch", disable=None if progress else True):
            for gradients, stacked in step(model, trained, loss, batch):
                fisher.update(dict.fromkeys(parameters) | gradients, stacked=stacked)
    if not fisher.count:
        raise DegenerateError("loader: expected at least one batch, got none")
    return fisher


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode (and gradients enabled) inside; each submodule's own mode restored after."""
    import torch

    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():  # type: ignore[no-untyped-call]
            yield
    finally:
        for m, training in modes:
            m.training = training


def _scalar(value: Any) -> Any:
    shape = getattr(value, "shape", None)
    if shape is None or tuple(shape) != ():
        raise ArgumentError(f"loss: expected a scalar tensor, got {f'shape {tuple(shape)}' if shape else type(value)}")
    return value


def _batch(model: Any, trained: dict[str, Any], loss: Any, batch: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    import torch

    value = _scalar(loss(model, batch))
    gradients = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    yield dict(zip(trained, gradients, strict=True)), False


def _examples(batch: Any) -> tuple[int, list[Any], Callable[[list[Any]], Any]]:
    """Number of examples, the tensors of a batch, and what puts tensors back in their places."""
    import torch
    from torch.utils._pytree import tree_flatten, tree_unflatten

    leaves, spec = tree_flatten(batch)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    lengths = {tuple(leaves[i].shape[:1]) for i in places}
    if len(lengths) != 1 or () in lengths:
        raise ArgumentError(f"loader: expected tensors with one leading axis of examples, got {sorted(lengths)}")

    def rebuild(tensors: list[Any]) -> Any:
        new = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            new[i] = tensor
        return tree_unflatten(new, spec)

    return next(iter(lengths))[0], [leaves[i] for i in places], rebuild


def _one_by_one(model: Any, trained: dict[str, Any], loss: Any, batch: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    n, tensors, rebuild = _examples(batch)
    for i in range(n):
        yield from _batch(model, trained, loss, rebuild([t[i : i + 1] for t in tensors]))


class _StandIn:
    """The model with other tensors in the places of its parameters."""

    def __init__(self, model: Any, tensors: dict[str, Any]) -> None:
        self._model, self._tensors = model, tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        return torch.func.functional_call(self._model, self._tensors, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _stacked(model: Any, trained: dict[str, Any], loss: Any, batch: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    import torch

    n, tensors, rebuild = _examples(batch)

    def one(values: dict[str, Any], *example: Any) -> Any:
        return _scalar(loss(_StandIn(model, values), rebuild([t.unsqueeze(0) for t in example])))

    gradient = torch.func.vmap(torch.func.grad(one), in_dims=(None, *(0 for _ in tensors)), randomness="different")
    values = {name: p.detach() for name, p in trained.items()}
    size = sum(p.numel() * p.element_size() for p in values.values())
    step = max(1, _STACK_BYTES // max(size, 1))
    for start in range(0, n, step):
        yield gradient(values, *(t[start : start + step] for t in tensors)), True
