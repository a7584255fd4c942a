"""Losses that :func:`importance` differentiates: the cross-entropy with the true labels, and the label-free ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ArgumentError

_IGNORED = -100


class Criterion:
    """A loss ``criterion(model, batch) -> scalar`` that knows its name and the power its gradients are summed with.

    A batch is ``(inputs, labels, ...)``, a mapping with ``"labels"`` as transformers models take, or, where no labels
    are needed, the inputs alone. Tensors are moved to the model's device.
    """

    def __init__(self, name: str, power: int, compute: Callable[[Any, Any], Any], doc: str) -> None:
        self.name = self.__name__ = name
        #: 2: the Fisher information; 1: means of absolute gradients.
        self.power = power
        self.__doc__ = doc
        self._compute = compute

    def __call__(self, model: Any, batch: Any) -> Any:
        return self._compute(model, batch)

    def __repr__(self) -> str:
        return f"<loss {self.name}>"


def _moved(model: Any, batch: Any) -> tuple[Any, Any]:
    """Inputs and labels (None if there are none) on the model's device."""
    import torch

    parameter = next(iter(model.parameters()), None)

    def to(x: Any) -> Any:
        return x.to(parameter.device) if isinstance(x, torch.Tensor) and parameter is not None else x

    if isinstance(batch, Mapping):
        moved = {k: to(v) for k, v in batch.items()}
        return moved, moved.pop("labels", None)
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ArgumentError("loader: expected batches of inputs or (inputs, labels), got an empty one")
        return to(batch[0]), to(batch[1]) if len(batch) > 1 else None
    return to(batch), None


def _outputs(model: Any, inputs: Any) -> Any:
    import torch

    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    found = found if isinstance(found, torch.Tensor) else getattr(found, "logits", found)
    if not isinstance(found, torch.Tensor) or found.dim() < 1:
        raise ArgumentError(f"model: expected outputs that are a tensor or have .logits, got {type(found).__name__}")
    return found


def _cross_entropy(model: Any, batch: Any) -> Any:
    import torch

    inputs, labels = _moved(model, batch)
    if not isinstance(labels, torch.Tensor):
        raise ArgumentError(f"loader: expected batches with labels, got {type(labels).__name__} in their place")
    logits = _outputs(model, inputs)
    if isinstance(inputs, dict) and logits.dim() == 3:  # a language model: position t predicts token t + 1
        logits, labels = logits[:, :-1], labels[:, 1:]
    classes = logits.shape[-1]
    if tuple(labels.shape) != tuple(logits.shape[:-1]):
        raise ArgumentError(f"labels: expected shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    if not getattr(model, "is_traced", False):  # under vmap values cannot be looked at; torch raises on its own there
        bad = labels[(labels != _IGNORED) & ((labels < 0) | (labels >= classes))]
        if bad.numel():
            raise ArgumentError(f"labels: expected 0 to {classes - 1} or {_IGNORED}, got {int(bad.flatten()[0])}")
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, classes).float() if logits.dtype.itemsize < 4 else logits.reshape(-1, classes),
        labels.reshape(-1),
        ignore_index=_IGNORED,
    )


def _squares(model: Any, batch: Any) -> Any:
    """Squared 2-norm of each example's outputs, in float32 or better; padded positions do not count."""
    import torch

    inputs, _ = _moved(model, batch)
    outputs = _outputs(model, inputs)
    squares = (outputs.float() if outputs.dtype.itemsize < 4 else outputs).square()
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    if mask is not None and squares.dim() == 3 and tuple(mask.shape) == tuple(squares.shape[:2]):
        squares = torch.where(mask.bool()[..., None], squares, 0.0)
    return squares.flatten(1).sum(1) if squares.dim() > 1 else squares


def _squared_output_norm(model: Any, batch: Any) -> Any:
    return _squares(model, batch).mean()


def _output_norm(model: Any, batch: Any) -> Any:
    import torch

    squares = _squares(model, batch)
    # The derivative of the square root is infinite at 0: there the norm's gradient is defined as 0.
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0).mean()


cross_entropy = Criterion(
    "cross_entropy",
    2,
    _cross_entropy,
    """Mean cross-entropy with the true labels, as Selective Synaptic Dampening takes it (arXiv 2308.07707).

    Labels of -100 do not count; language models (batches that are mappings) predict the next token, and the mean is
    over the batch's counted tokens.

    Raises:
        ArgumentError: a label outside the classes, or of another shape than the outputs without their last axis.
    """,
)
squared_output_norm = Criterion(
    "squared_output_norm",
    1,
    _squared_output_norm,
    """Mean over the batch of the squared 2-norm of the outputs: loss-free, label-free dampening (arXiv 2402.19308).

    Its importance is the mean over batches of the *absolute* gradient (``power=1``), so that an alpha of 10 cuts about
    where one of 100 would on squares. An example's norm is over all of its outputs, padded positions left out.
    """,
)
output_norm = Criterion(
    "output_norm",
    1,
    _output_norm,
    """Mean over the batch of the 2-norm of the outputs, not squared: the importance of Potion (arXiv 2406.09173).

    Less drawn to outliers than :data:`squared_output_norm`, whose gradient grows with the outputs. ``power=1``; the
    gradient where all outputs are 0 is 0.
    """,
)
