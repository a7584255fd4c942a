"""What models say about the batches of a loader: probabilities, losses and features, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .._modes import evaluating
from ..errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from ._arrays import Floats, Ints, class_labels, host

__all__ = ["Forward", "Outputs", "inferring", "labelled", "outputs"]

#: ``forward(model, batch) -> (logits (b, classes), labels (b,))``.
Forward = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Outputs:
    """What one model says about n examples."""

    #: Class probabilities ``(n, classes)``, f64.
    probabilities: Floats
    #: Cross-entropy of each example in nats, from logits in f64.
    losses: Floats
    labels: Ints
    #: Features ``(n, d)`` by layer, in the model's dtype or f32.
    features: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def correct(self) -> Any:
        """Whether each example is classified as labelled."""
        return self.probabilities.argmax(axis=1) == self.labels

    @property
    def accuracy(self) -> float:
        """Share of examples classified as labelled."""
        return float(self.correct.mean())


def labelled(model: Any, batch: Any) -> tuple[Any, Any]:
    """Logits and labels of a batch ``(inputs, labels)`` or of a mapping with ``labels``, moved to the model's device.

    Raises:
        DTypeError: a batch of another form.
    """
    device = next((p.device for p in model.parameters()), None)

    def moved(value: Any) -> Any:
        return value.to(device) if hasattr(value, "to") and device is not None else value

    if isinstance(batch, Mapping) and "labels" in batch:
        found = model(**{k: moved(v) for k, v in batch.items() if k != "labels"})
        labels = batch["labels"]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        found, labels = model(moved(batch[0])), batch[1]
    else:
        kind = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise DTypeError(f"expected batches (inputs, labels) or mappings with 'labels', got {kind}; see forward=")
    return getattr(found, "logits", found), labels


@contextmanager
def inferring(*models: Any) -> Iterator[None]:
    """Eval mode without gradients inside; each submodule's own mode is restored after, whatever happens."""
    import torch

    with evaluating(*models), torch.no_grad():
        yield


def outputs(
    models: Mapping[str, Any],
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    layers: Sequence[str] = (),
    name: str = "loader",
) -> dict[str, Outputs]:
    """Runs several models over a loader in one pass, so that shuffled or augmented rows are the same for all.

    Models run in eval mode without gradients; their modes are restored.

    Args:
        models: torch modules by name.
        loader: batches ``(inputs, labels)``, or mappings with ``labels`` whose other entries are keyword arguments.
        forward: ``forward(model, batch) -> (logits (b, classes), labels (b,))`` for batches of any other form.
        layers: names of submodules (of every model) whose output is kept, one row per example; axes after the second
            are averaged (the pooled features of a convolution).
        name: the argument named in errors.

    Returns:
        Outputs of each model, rows in the loader's order.

    Raises:
        DegenerateError: the loader yields nothing.
        ShapeError: logits that are not ``(b, classes)``, or labels that are not ``(b,)``.
        ArgumentError: labels out of range, an unknown layer, or one that was not reached exactly once per batch.
        NonFiniteError: NaN or infinite logits; the model and the batch are named.
    """
    forward = forward or labelled
    found: dict[str, tuple[list[Any], ...]] = {m: ([], [], []) for m in models}
    kept: dict[str, dict[str, list[Any]]] = {m: {layer: [] for layer in layers} for m in models}
    # Hooks may leave a note for the batch at hand only.
    notes: dict[str, dict[str, list[Any]]] = {m: {layer: [] for layer in layers} for m in models}
    # The name whose forward pass runs: one module may stand under several names, or share submodules with another.
    running: list[str] = []
    with ExitStack() as stack:
        for m, model in models.items():
            if not hasattr(model, "named_modules"):
                raise DTypeError(f"{m}: expected a torch module, got {type(model).__name__}")
            modules = dict(model.named_modules())
            for layer in layers:
                if layer not in modules:
                    raise ArgumentError(f"layers: expected submodules of {m}, got {layer!r}")
                handle = modules[layer].register_forward_hook(_note(notes[m][layer], m, running))
                stack.callback(handle.remove)
        stack.enter_context(inferring(*models.values()))
        for i, batch in enumerate(loader):
            for m, model in models.items():
                running[:] = [m]
                try:
                    logits, labels = forward(model, batch)
                except DTypeError as err:
                    raise DTypeError(f"{name}: batch {i}: {m}: {err}") from None
                p, losses, y = _rows(logits, labels, f"{name}: batch {i}: {m}")
                for column, values in zip(found[m], (p, losses, y), strict=True):
                    column.append(values)
                for layer, seen in notes[m].items():
                    if len(seen) != 1 or seen[0].ndim < 2 or len(seen[0]) != len(y):
                        what = f"outputs of shape {[tuple(s.shape) for s in seen]}"
                        raise ArgumentError(f"layers: expected one output of {len(y)} rows from {layer!r}, got {what}")
                    kept[m][layer].append(host(_pooled(seen.pop()).float()).astype(np.float32))
    if not all(column[0] for column in found.values()):
        raise DegenerateError(f"{name}: expected at least one batch, got none")
    return {
        m: Outputs(
            np.concatenate(p),
            np.concatenate(losses),
            np.concatenate(y),
            {k: np.concatenate(v) for k, v in kept[m].items()},
        )
        for m, (p, losses, y) in found.items()
    }


def _note(notes: list[Any], name: str, running: list[str]) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        if running == [name]:
            notes.append((output[0] if isinstance(output, tuple) else output).detach())

    return hook


def _pooled(features: Any) -> Any:
    return features.flatten(2).mean(2) if features.ndim > 2 else features


def _rows(logits: Any, labels: Any, where: str) -> tuple[Floats, Floats, Ints]:
    z = np.asarray(host(logits), dtype=np.float64)
    if z.ndim != 2 or z.shape[1] < 1:
        raise ShapeError(f"{where}: expected logits of shape (b, classes), got {z.shape}")
    y = class_labels(labels, f"{where}: labels", len(z), z.shape[1])
    if not np.isfinite(z).all():
        raise NonFiniteError(f"{where}: expected finite logits, got NaN or infinity")
    if not len(z):
        return z, np.empty(0), y
    z = z - z.max(axis=1, keepdims=True)
    logs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return np.exp(logs), -logs[np.arange(len(y)), y], y
