"""Which attention heads write a direction to the residual stream, and what happens without them (arXiv 2510.06036).

A head's part of the attention output is ``W_O[:, block] z_j``, so its contribution along a unit vector ŵ is
``z_j · (W_Oᵀ ŵ)_j``: one product with the output projection serves all heads and all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ..errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from .architectures import architecture, residual_writers, text_config
from .blocks import Layers, attribute, select_modules
from .cliff import _mean_and_error, probe_vector, share_count
from .directions import Vector, _finite, _to_numpy, orthonormal_basis
from .hooks import Positions, _at, _attached, _on_input, _position_index
from .prompts import Prompts
from .record import _index, run_hooked

if TYPE_CHECKING:
    from torch import nn

#: Token mixers that the table lists beside attention and that have no softmax heads.
_HEADLESS = ("linear_attn", "mamba", "conv")


class Head(NamedTuple):
    """One head's contribution: mean over prompts and its standard error."""

    layer: int
    head: int
    mean: float
    standard_error: float


@dataclass(frozen=True)
class _Projection:
    """The output projection of one block's attention."""

    layer: int
    module: Any
    weight: Any
    bias: Any
    axis: int
    heads: int
    #: The norm that the attention's output passes before it is added, and its gain.
    norm: Any = None
    gain: Any = None


def _projections(model: nn.Module, layers: Layers, blocks: str | None) -> dict[int, _Projection]:
    """By layer, the output projection of every attention; layers whose mixer has no heads are left out.

    Raises:
        ArgumentError: a named layer has no heads, or the configuration does not say how many there are.
        ShapeError: the projection is not a multiple of the heads wide. As :func:`residual_writers` besides.
    """
    known = architecture(model)
    heads = getattr(text_config(model), "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        raise ArgumentError(f"model: expected a configuration with num_attention_heads, got {heads!r}")
    found: dict[int, dict[str, Any]] = {}
    for writer in residual_writers(model, layers, blocks=blocks):
        path, _, kind = writer.name.rpartition(".")
        if writer.component != "attention" or writer.layer is None:
            continue
        if path.split(".")[-2] in _HEADLESS:
            continue
        found.setdefault(writer.layer, {"path": path, "gain": writer.gain})[kind] = (writer.tensor, writer.axis)
    wanted = select_modules(model, layers, blocks)
    if layers is not None and (missing := [layer for layer in wanted if layer not in found]):
        raise ArgumentError(f"layers: expected layers with attention heads, got {missing[0]}, which has none")
    if not found:
        raise ArgumentError("model: expected attention heads, got none in any block")
    projections = {}
    for layer, parts in found.items():
        weight, axis = parts["weight"]
        if weight.shape[1 - axis] % heads:
            raise ShapeError(f"model: {parts['path']} takes {weight.shape[1 - axis]} values, not {heads} equal heads")
        norm = None if parts["gain"] is None else attribute(wanted[layer], str(known.post_attention))
        bias = parts.get("bias", (None,))[0]
        module = attribute(model, parts["path"])
        projections[layer] = _Projection(layer, module, weight, bias, axis, heads, norm, parts["gain"])
    return projections


def head_contributions(z: Any, weight: Any, direction: Any, heads: int, *, axis: int = 0) -> Vector:
    """Contribution of every head to the attention output along a direction: ``s_j = z_j · (W_Oᵀ ŵ)_j``.

    Args:
        z: ``(..., heads · width)``, what the output projection takes: the heads' outputs side by side.
        weight: the output projection, ``(d, heads · width)`` with ``axis=0`` (``nn.Linear``) or
            ``(heads · width, d)`` with ``axis=1`` (GPT-2's ``Conv1D``).
        direction: a :class:`Direction`, a probe (its ``coef``) or ``(d,)``; normalised.
        heads: number of heads (of queries: grouped keys and values change nothing).
        axis: which axis of ``weight`` lies along the stream.

    Returns:
        ``(..., heads)`` float64; with the bias along ŵ their sum is the attention output along ŵ.

    Raises:
        ShapeError: the shapes do not fit each other. ArgumentError: ``axis`` or ``heads`` outside its domain.
        NonFiniteError, DegenerateError: ``direction`` is not finite, or zero.
    """
    rows, unit = _to_numpy(z, "z"), orthonormal_basis(probe_vector(direction, "direction"))[0]
    if rows.ndim == 0 or isinstance(heads, bool) or not isinstance(heads, (int, np.integer)) or heads < 1:
        raise ArgumentError(f"z, heads: expected rows and 1 or more heads, got {rows.shape} and {heads!r}")
    reader = _reader(_to_numpy(weight, "weight"), unit, axis)
    if rows.shape[-1] != len(reader) or len(reader) % heads:
        raise ShapeError(f"z: expected rows of {len(reader)}, a multiple of {heads} heads, got {rows.shape}")
    return _by_head(rows, reader, int(heads))


def _reader(weight: Any, vector: Vector, axis: int) -> Vector:
    """``W_Oᵀ v``: what a value of the heads' output adds along ``v``."""
    if axis not in (0, 1):
        raise ArgumentError(f"axis: expected 0 or 1, got {axis!r}")
    if weight.ndim != 2 or weight.shape[axis] != len(vector):
        raise ShapeError(
            f"direction: expected the hidden size, axis {axis} of a projection {tuple(weight.shape)}, got {len(vector)}"
        )
    return np.asarray(vector @ weight if axis == 0 else weight @ vector)


def _by_head(rows: Any, reader: Vector, heads: int) -> Vector:
    return np.asarray((rows * reader).reshape(*rows.shape[:-1], heads, -1).sum(-1))


@dataclass(frozen=True, eq=False)
class HeadAttribution:
    """What every attention head adds to the residual stream along a direction.

    Attributes:
        contributions: ``(prompts, layers, heads)`` float64, in units of the stream.
        bias: ``(prompts, layers)``, what the bias of the output projection adds, which is no head's.
        layers: index of the block of every row.
        position: where it was read.
    """

    contributions: Vector = field(repr=False)
    bias: Vector = field(repr=False)
    layers: list[int]
    position: Any

    @property
    def mean(self) -> Vector:
        """Mean over prompts, ``(layers, heads)``."""
        return np.asarray(_mean_and_error(self.contributions)[0])

    @property
    def standard_error(self) -> Vector:
        """Of :attr:`mean`, across prompts; NaN for a single prompt."""
        return np.asarray(_mean_and_error(self.contributions)[1])

    def rows(self) -> list[Head]:
        """A row per head, in order of layer and head."""
        mean, error = self.mean, self.standard_error
        return [
            Head(layer, j, float(mean[i, j]), float(error[i, j]))
            for i, layer in enumerate(self.layers)
            for j in range(mean.shape[1])
        ]

    def _ranked(self, largest: bool) -> list[Head]:
        return sorted(self.rows(), key=lambda h: -h.mean if largest else h.mean)

    def lowest(self, share: float = 0.03) -> list[tuple[int, int]]:
        """The heads that suppress the direction most, as (layer, head): ``ceil(share · heads)``, lowest mean first.

        Raises:
            ArgumentError: a share outside (0, 1].
        """
        rows = self._ranked(largest=False)
        return [(h.layer, h.head) for h in rows[: share_count(share, len(rows))]]

    def highest(self, share: float = 0.03) -> list[tuple[int, int]]:
        """The heads that write the direction most, highest mean first; as :meth:`lowest`."""
        rows = self._ranked(largest=True)
        return [(h.layer, h.head) for h in rows[: share_count(share, len(rows))]]

    def __str__(self) -> str:
        ranked = self._ranked(largest=False)
        shown = ranked if len(ranked) <= 20 else ranked[:10] + ranked[-10:]
        lines = ["layer  head  contribution  standard error"]
        lines += [f"{h.layer:5d}  {h.head:4d}  {h.mean:12.5g}  {h.standard_error:14.2g}" for h in shown]
        if len(ranked) > len(shown):
            lines.insert(11, f"  ... {len(ranked) - len(shown)} between ...")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        mean, error = self.mean, self.standard_error
        header = "".join(f"<th>{j}</th>" for j in range(mean.shape[1]))
        body = "".join(
            f"<tr><th>{layer}</th>"
            + "".join(f"<td>{m:.3g} ± {e:.1g}</td>" for m, e in zip(mean[i], error[i], strict=True))
            + f"<td>{self.bias[:, i].mean():.3g}</td></tr>"
            for i, layer in enumerate(self.layers)
        )
        caption = f"Contribution of heads over {len(self.contributions)} prompts ± standard error"
        return f"<table><caption>{caption}</caption><tr><th>layer</th>{header}<th>bias</th></tr>{body}</table>"

    def plot(self, ax: Any = None) -> Any:
        """Mean contributions, a row per layer and a column per head, blue below zero. Returns the axes."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        mean = self.mean
        top = float(np.abs(mean).max()) or 1.0
        image = ax.imshow(mean, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto", origin="lower")
        ax.set(xlabel="head", ylabel="layer")
        ax.set_yticks(range(len(self.layers)), [str(layer) for layer in self.layers])
        ax.figure.colorbar(image, ax=ax, label="contribution along the direction")
        return ax


def attribute_heads(
    model: nn.Module,
    prompts: Prompts,
    direction: Any,
    layers: Layers = None,
    position: Any = "last",
    *,
    batch_size: int = 8,
    blocks: str | None = None,
    progress: bool = True,
) -> HeadAttribution:
    """How much every attention head adds along a direction (arXiv 2510.06036, section 4).

    Per head ``z_j · (W_Oᵀ ŵ)_j`` with the unit vector ŵ; the same ŵ for all layers. The bias of the projection, which
    the published code counts once per head, is no head's and is reported apart. Where a norm follows the attention
    (Gemma 2 and 3, OLMo 2, GLM-4), the contribution is to what enters the stream: the head's output is scaled as the
    norm scales the sum, and passes the norm's gain. A constant that a family multiplies its branches by (Granite) is
    not applied.

    Args:
        model: a Hugging Face decoder of a family in :data:`ARCHITECTURES`.
        prompts: a :class:`Prompts`.
        direction: a :class:`Direction`, a probe (its ``coef``) or ``(d,)``.
        layers: indices of blocks; None for all that have attention heads.
        position: as in :func:`record_prompts`; of several tokens a prompt counts with their mean.
        batch_size: prompts per forward pass.
        blocks: dotted name of the list of blocks, where it is not found by itself.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        A :class:`HeadAttribution`, 8 bytes per prompt and head.

    Raises:
        ArgumentError: an unknown family, layer or position. ShapeError: another hidden size.
        NonFiniteError: a head's output is not finite; the layer and the prompt are named.
        DegenerateError: the direction is zero.
    """
    if not isinstance(prompts, Prompts):
        raise DTypeError(f"prompts: expected Prompts, got {type(prompts).__name__}")
    unit = orthonormal_basis(probe_vector(direction, "direction"))[0]
    keys = prompts.position_keys(position)
    found = _projections(model, layers, blocks)
    rows = {layer: i for i, layer in enumerate(found)}
    heads = next(iter(found.values())).heads
    total = np.zeros((len(prompts), len(found), heads))
    bias = np.zeros((len(prompts), len(found)))
    counts = np.zeros((len(prompts), len(found)))
    batch: dict[str, Any] = {}

    def begin(chosen: list[int], mask: Any) -> None:
        import torch

        at = [_index(prompts, chosen, key, mask) for key in keys]
        batch["at"] = torch.cat([r for r, _ in at]), torch.cat([c for _, c in at])
        batch["owners"] = np.array(chosen)[batch["at"][0].numpy()]

    def picked(hidden: Any) -> Any:
        row, column = batch["at"]
        return hidden.detach()[row.to(hidden.device), column.to(hidden.device)].cpu().double().numpy()

    def add(layer: int, parts: Vector, constant: Any) -> None:
        owners = batch["owners"]
        if not np.isfinite(parts).all():
            bad = int(owners[int((~np.isfinite(parts).all(-1)).argmax())])
            text = prompts[bad].text[:60]
            raise NonFiniteError(f"layer {layer}: non-finite output of a head at prompt {bad} ({text!r})")
        np.add.at(total[:, rows[layer]], owners, parts)
        np.add.at(bias[:, rows[layer]], owners, constant)
        np.add.at(counts[:, rows[layer]], owners, 1)

    hooks: list[Callable[[], Any]] = []
    for p in found.values():
        hooks += _watching(p, unit, picked, add)
    run_hooked(model, prompts, hooks, begin, batch_size, progress)
    if not counts.all():
        layer = list(found)[int((counts == 0).any(0).argmax())]
        raise ArgumentError(f"model: the attention of layer {layer} does not call its output projection")
    return HeadAttribution(total / counts[..., None], bias / counts, list(found), position)


def _watching(
    p: _Projection, unit: Vector, picked: Callable[[Any], Any], add: Callable[[int, Vector, Any], None]
) -> list[Callable[[], Any]]:
    """Hooks of one layer: on what its projection takes, and on the norm behind it where there is one."""
    vector = unit
    if p.gain is not None:
        gain = _to_numpy(p.gain, "model")
        if gain.shape != unit.shape:
            raise ShapeError(f"direction: expected {gain.size} values, the hidden size, got {unit.size}")
        vector = unit * gain
    reader = _reader(_to_numpy(p.weight.detach(), "weight"), vector, p.axis)
    constant = 0.0 if p.bias is None else float(_to_numpy(p.bias.detach(), "bias") @ vector)
    if p.norm is None:
        return [lambda: _on_input(p.module, lambda z: add(p.layer, _by_head(picked(z), reader, p.heads), constant))]
    held: list[Vector] = []

    def hold(z: Any) -> None:
        held[:] = [_by_head(picked(z), reader, p.heads)]

    def finish(module: Any, args: tuple[Any, ...], output: Any) -> None:
        # The norm multiplies a token's whole output by one number, which its own result tells: no epsilon is guessed.
        gained, normed = picked(args[0]) * gain, picked(output)
        square = (gained * gained).sum(-1)
        scale = np.divide((gained * normed).sum(-1), square, out=np.zeros_like(square), where=square > 0)
        add(p.layer, held[0] * scale[:, None], constant * scale)

    return [lambda: _on_input(p.module, hold), lambda: p.norm.register_forward_hook(finish)]


def _chosen_heads(heads: Any, found: dict[int, _Projection], depth: int) -> dict[int, list[int]]:
    """Heads by layer, checked."""
    count = next(iter(found.values())).heads
    known = f"layers {list(found)} and heads 0 to {count - 1}"
    if isinstance(heads, str) or not isinstance(heads, Iterable):
        raise DTypeError(f"heads: expected (layer, head) pairs, got {type(heads).__name__}")
    chosen: dict[int, set[int]] = {}
    for pair in heads:
        if not isinstance(pair, (tuple, list)) or (len(pair) != 2 and not isinstance(pair, Head)):
            raise DTypeError(f"heads: expected (layer, head) pairs, got {pair!r}")
        layer, head = pair[:2]
        if any(isinstance(v, bool) or not isinstance(v, (int, np.integer)) for v in (layer, head)):
            raise DTypeError(f"heads: expected integers, got {pair!r}")
        at = int(layer) + depth if layer < 0 else int(layer)
        if at not in found or not 0 <= head < count:
            raise ArgumentError(f"heads: expected {known}, got {(int(layer), int(head))}")
        chosen.setdefault(at, set()).add(int(head))
    if not chosen:
        raise ArgumentError(f"heads: expected some of {known}, got none")
    return {layer: sorted(found) for layer, found in chosen.items()}


@contextmanager
def ablating_heads(
    model: nn.Module,
    heads: Sequence[tuple[int, int]],
    gamma: float = 0.0,
    *,
    compat: Literal["refusal_cliff"] | None = None,
    positions: Positions = None,
    blocks: str | None = None,
) -> Iterator[None]:
    """Scales the output of attention heads in every forward pass inside the ``with`` block.

    The head's values are multiplied by ``gamma`` before the output projection, which for 0 equals zeroing the head's
    columns of it; a bias of the projection stays.

    Args:
        model: a Hugging Face decoder of a family in :data:`ARCHITECTURES`.
        heads: (layer, head) pairs, or rows of :meth:`HeadAttribution.rows`; negative layers count from the end.
            :meth:`HeadAttribution.lowest` chooses some.
        gamma: 0 removes, 1 changes nothing.
        compat: ``"refusal_cliff"`` then rescales the heads' whole output to the Frobenius norm it had, over all
            tokens, heads and sequences of the batch (as published: what a sequence gets then depends on the others).
        positions: token positions to edit, counted in each forward pass; None for all.
        blocks: dotted name of the list of blocks, where it is not found by itself.

    Raises:
        ArgumentError: a head that does not exist (the message lists those that do), an unknown ``compat`` or family,
            ``gamma`` not finite. DTypeError: not pairs of integers.
    """
    import torch

    if compat not in (None, "refusal_cliff"):
        raise ArgumentError(f"compat: expected None or 'refusal_cliff', got {compat!r}")
    factor = _finite(gamma, "gamma")
    index = _position_index(positions)
    found = _projections(model, None, blocks)
    chosen = _chosen_heads(heads, found, len(select_modules(model, None, blocks)))

    def scaled(z: Any, mine: list[int], count: int) -> Any:
        changed = z.clone()
        rows = _at(changed, slice(None) if index is None else index)
        parts = rows.unflatten(-1, (count, -1)).clone()
        parts[..., mine, :] *= factor
        changed[..., slice(None) if index is None else index, :] = parts.flatten(-2)
        if compat is None:
            return changed
        wide = torch.promote_types(z.dtype, torch.float32)
        before, after = (torch.linalg.vector_norm(x, dtype=wide) for x in (z, changed))
        return changed if not after else (changed * (before / after)).to(z.dtype)

    hooks = [
        lambda p=found[layer], mine=mine: _on_input(p.module, lambda z: scaled(z, mine, p.heads))
        for layer, mine in chosen.items()
    ]
    with _attached(hooks):
        yield
