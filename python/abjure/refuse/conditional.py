"""Steering that acts only on prompts whose hidden state matches a condition (CAST, arXiv 2409.05907)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._interop import integers
from ..errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from .blocks import Layers, select_modules
from .directions import Direction, Vector, _to_numpy, single_vector, steering_edit
from .hooks import _attached, _check_width, _on_input

if TYPE_CHECKING:
    from torch import nn

FireWhen = Literal["sim>θ", "sim<θ"]


def condition_similarity(x: Any, condition: Any, *, compat: Literal["cast"] | None = None) -> Vector:
    """Cosine between states and a condition direction, ``cos(h, c)``, whose sign says which way a state lies.

    With ``compat="cast"`` the published ``cos(h, tanh(P h))``, P the projection on c: a reversed state scores as the
    state itself, up to what the hyperbolic tangent makes of the scale of the activations.

    Args:
        x: ``(..., d)`` states, for instance means over the tokens of a prompt.
        condition: ``(d,)``, of any length.
        compat: None or ``"cast"``.

    Returns:
        ``(...)`` float64; 0 where a state (or its projection) is zero.

    Raises:
        ShapeError: widths differ. ArgumentError: an unknown ``compat``. NonFiniteError: a value is not finite.
        DegenerateError: the condition is zero.
    """
    if compat not in (None, "cast"):
        raise ArgumentError(f"compat: expected None or 'cast', got {compat!r}")
    h, c = _to_numpy(x, "x"), _one(condition)
    if h.ndim == 0 or h.shape[-1] != len(c):
        raise ShapeError(f"x: expected a last axis of {len(c)}, got shape {h.shape}")
    if not np.isfinite(h).all():
        raise NonFiniteError("x: expected finite states")
    unit = c / np.linalg.norm(c)
    projected = np.tanh((h @ unit)[..., None] * unit) if compat == "cast" else np.broadcast_to(unit, h.shape)
    lengths = np.linalg.norm(h, axis=-1) * np.linalg.norm(projected, axis=-1)
    products = (h * projected).sum(-1)
    return np.asarray(np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0))


def _one(condition: Any) -> Vector:
    found = single_vector(condition, "condition")
    if not np.isfinite(found).all():
        raise NonFiniteError("condition: expected finite values")
    if not found.any():
        raise DegenerateError("condition: every element is zero")
    return found


@dataclass(frozen=True)
class ConditionThreshold:
    """A threshold chosen on labelled prompts.

    Attributes:
        threshold: fires above or below it.
        fire_when: ``"sim>θ"`` or ``"sim<θ"``.
        f1: of the label 1 on those prompts.
    """

    threshold: float
    fire_when: FireWhen
    f1: float


def condition_threshold(similarity: Any, labels: Any) -> ConditionThreshold:
    """The threshold and direction with the largest F1 of label 1, over every cut between two similarities.

    A grid, as published, finds the best of its own points only. Among equals the widest gap wins, then the smaller
    threshold.

    Args:
        similarity: ``(n,)``, from :func:`condition_similarity`.
        labels: ``(n,)`` of 0 and 1.

    Raises:
        ShapeError, NonFiniteError, ArgumentError: the arguments do not fit.
        DegenerateError: one of the classes is empty.
    """
    s, y = np.asarray(_to_numpy(similarity, "similarity")), integers(np.asarray(labels), "labels")
    if s.ndim != 1 or s.shape != y.shape:
        raise ShapeError(f"labels: expected one per similarity {s.shape}, got {y.shape}")
    if not np.isfinite(s).all():
        raise NonFiniteError("similarity: expected finite values")
    if not np.isin(y, (0, 1)).all():
        raise ArgumentError("labels: expected 0 and 1")
    if y.min(initial=1) == y.max(initial=0):
        raise DegenerateError("labels: expected both classes")
    order = np.argsort(s, kind="stable")
    values, hits = s[order], np.cumsum(y[order])
    cuts = np.flatnonzero(np.diff(values) > 0)  # cut behind element i
    if not len(cuts):
        raise DegenerateError("similarity: all are equal, so no threshold separates them")
    total = int(hits[-1])
    best: tuple[float, float, float, FireWhen] | None = None
    for i in cuts:
        low, high = values[i], values[i + 1]
        threshold, below = float(low + (high - low) / 2), int(hits[i])
        sides: tuple[tuple[FireWhen, int, int], ...] = (
            ("sim>θ", total - below, len(values) - 1 - int(i)),
            ("sim<θ", below, int(i) + 1),
        )
        for way, true, fired in sides:
            found = (2 * true / (fired + total), float(high - low), -threshold, way)
            if best is None or found[:3] > best[:3]:
                best = found
    assert best is not None
    return ConditionThreshold(-best[2], best[3], best[0])


@dataclass
class ConditionGate:
    """What the condition said of the prompts of the current generation.

    Attributes:
        similarity: ``(batch,)`` float64 of the last prompts seen; None before the first.
        fired: ``(batch,)`` booleans, which of them are steered.
    """

    similarity: Vector | None = None
    fired: Any = None
    _mask: Any = field(default=None, repr=False)
    _prompt: bool = field(default=True, repr=False)


@contextmanager
def conditional_steering(
    model: nn.Module,
    v: Any,
    condition: Any,
    threshold: float,
    *,
    condition_layer: int | None = None,
    layers: Layers = None,
    fire_when: FireWhen = "sim>θ",
    scale: float = 1.0,
    over: Literal["mean", "last"] = "mean",
    compat: Literal["cast"] | None = None,
    blocks: str | None = None,
) -> Iterator[ConditionGate]:
    """Adds ``scale · v`` to the stream of those sequences whose prompt meets a condition.

    The condition is tested once per sequence, on the pass that reads the prompt (nothing in the cache yet); then the
    sequence is steered or not to its end. On the prompt's own pass only blocks from ``condition_layer`` on are
    steered, since the others have run by then. State is kept per ``with`` block and per row of the batch. Without a
    cache every pass reads a prompt, and the condition is tested on each.

    Args:
        model: a Hugging Face decoder.
        v: a :class:`Direction` or ``(d,)`` to add, at its length.
        condition: a :class:`Direction` or ``(d,)``.
        threshold: θ in [-1, 1].
        condition_layer: block at whose input the condition is tested; None for the layer of a :class:`Direction`.
        layers: blocks at whose input ``v`` is added; None for the layer of a :class:`Direction`.
        fire_when: ``"sim>θ"`` or ``"sim<θ"`` (published code calls the latter "larger", after the threshold).
        scale: multiples of ``v``.
        over: test the mean over the prompt's tokens, padding left out, or the last token.
        compat: as in :func:`condition_similarity`.
        blocks: dotted name of the list of blocks, for models the table does not know.

    Yields:
        A :class:`ConditionGate`.

    Raises:
        ArgumentError, DTypeError, ShapeError, NonFiniteError, DegenerateError: an argument does not fit the model.
    """
    if fire_when not in ("sim>θ", "sim<θ"):
        raise ArgumentError(f"fire_when: expected 'sim>θ' or 'sim<θ', got {fire_when!r}")
    if over not in ("mean", "last"):
        raise ArgumentError(f"over: expected 'mean' or 'last', got {over!r}")
    if compat not in (None, "cast"):
        raise ArgumentError(f"compat: expected None or 'cast', got {compat!r}")
    if math.isnan(threshold) or not -1 <= threshold <= 1:
        raise ArgumentError(f"threshold: expected a number in [-1, 1], got {threshold}")
    layers = _layer_of(v, "layers") if layers is None else layers
    at = _layer_of(condition, "condition_layer") if condition_layer is None else condition_layer
    c = _one(condition)
    added = single_vector(v, "v")
    _check_width(model, len(added), "v")
    _check_width(model, len(c), "condition")
    edit = steering_edit(added, len(added), scale)
    gate = ConditionGate()
    [tested] = select_modules(model, [at], blocks).values()

    def test(hidden: Any) -> None:
        if not gate._prompt:
            return
        gate._prompt = False
        gate.similarity = condition_similarity(_summary(hidden, gate._mask, over), c, compat=compat)
        gate.fired = gate.similarity > threshold if fire_when == "sim>θ" else gate.similarity < threshold

    def steer(hidden: Any) -> Any:
        if gate._prompt or gate.fired is None or not gate.fired.any():
            return None
        if len(gate.fired) != hidden.shape[0]:
            raise ShapeError(
                f"hidden state: expected {len(gate.fired)} sequences as in the prompt, got {hidden.shape[0]}"
            )
        if gate.fired.all():
            return edit.apply(hidden)
        import torch

        rows = torch.from_numpy(gate.fired.nonzero()[0]).to(hidden.device)
        return hidden.index_copy(0, rows, edit.apply(hidden.index_select(0, rows)))

    attach: list[Callable[[], Any]] = [
        lambda: model.register_forward_pre_hook(_begin(model, gate), with_kwargs=True),
        lambda: _on_input(tested, test),
    ]
    attach += [lambda m=m: _on_input(m, steer) for m in select_modules(model, layers, blocks).values()]  # type: ignore[misc]
    with _attached(attach):
        yield gate


def _layer_of(direction: Any, arg: str) -> int:
    if isinstance(direction, Direction) and direction.layer is not None:
        return direction.layer
    raise ArgumentError(f"{arg}: expected a layer, since the vector does not say where it was estimated")


def _begin(model: nn.Module, gate: ConditionGate) -> Callable[..., None]:
    """Before each pass: whether it reads prompts, and which of their positions are padding."""
    signature = inspect.signature(model.forward)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        past = given.get("past_key_values")
        length = getattr(past, "get_seq_length", None)
        gate._prompt = past is None or (callable(length) and int(length()) == 0)
        if gate._prompt:
            mask = given.get("attention_mask")
            gate._mask = mask if mask is not None and mask.ndim == 2 else None
            gate.fired = None

    return hook


def _summary(hidden: Any, mask: Any, over: str) -> Any:
    """Mean over the prompt's tokens, or its last token, ``(batch, d)`` float64."""
    import torch

    wide = hidden.detach().double()
    if mask is None or mask.shape != hidden.shape[:2]:
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    mask = mask.to(hidden.device).bool()
    if over == "last":
        last = hidden.shape[1] - 1 - mask.int().flip(1).argmax(1)
        return wide[torch.arange(len(wide), device=wide.device), last].cpu()
    total = torch.where(mask[..., None], wide, torch.zeros_like(wide)).sum(1)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).cpu()
