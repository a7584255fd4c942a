"""Watch, ablate and steer a running decoder: context managers that attach to a model and always detach.

Blocks are found in Hugging Face decoders by a table of attribute paths, or named by the caller. The residual stream is
read and edited where a block takes it in (``site="pre"``) and where it hands it on (``site="post"``); ``hidden_states``
of the model's output are never used, because their last entry lies behind the final norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import ArgumentError, DeviceError, DTypeError, ShapeError
from .architectures import ARCHITECTURES, branch_modules, text_config
from .blocks import Layers, select_modules
from .directions import Direction, Edit, Site, _vector, orthonormal_basis, single_vector, steering_edit
from .weights import gained_basis

if TYPE_CHECKING:
    import torch
    from torch import nn

Positions = int | slice | Sequence[int] | Literal["last"] | None

#: What the branches of a block are called where the family is not in the table.
ATTENTION = ("self_attn", "attention", "attn", "self_attention", "linear_attn")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")


def _branches(model: nn.Module, blocks: Iterable[nn.Module], site: str) -> list[tuple[nn.Module, Any]]:
    """The modules of every block whose output a branch adds to the stream, each with the gain of the norm behind it.

    By the table of architectures where the family is in it, else by the usual names of the branches.

    Raises:
        ArgumentError: a block has none: it would stay unedited.
    """
    blocks = list(blocks)
    if getattr(text_config(model), "model_type", None) in ARCHITECTURES:
        return [
            branch for block in blocks for branch in branch_modules(model, block, "attn" if site == "attn" else "mlp")
        ]
    found = []
    for block in blocks:
        names = ATTENTION if site == "attn" else MLP
        branch = next((b for name in names if (b := getattr(block, name, None)) is not None), None)
        if branch is None:
            children = [name for name, _ in block.named_children()]
            raise ArgumentError(f"sites: {type(block).__name__} has no known {site} branch among {children}")
        found.append((branch, None))
    return found


class _Slot:
    """Reads and replaces the hidden state among a module's arguments or results."""

    @staticmethod
    def of_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str | None]:
        if args:
            return args[0], None
        name = next(iter(inspect.signature(module.forward).parameters))
        return kwargs.get(name), name

    @staticmethod
    def of_output(output: Any) -> Any:
        return output[0] if isinstance(output, (tuple, list)) else output

    @staticmethod
    def with_output(output: Any, hidden: Any) -> Any:
        if isinstance(output, tuple):
            rest = (hidden, *output[1:])
            return type(output)(*rest) if hasattr(output, "_fields") else rest
        if isinstance(output, list):
            return [hidden, *output[1:]]
        return hidden


def _expect_hidden(hidden: Any, module: nn.Module) -> None:
    import torch

    if not isinstance(hidden, torch.Tensor) or not hidden.is_floating_point():
        raise DTypeError(f"{type(module).__name__}: expected a hidden state, got {type(hidden).__name__}")


def _on_input(module: nn.Module, change: Callable[[Any], Any]) -> Any:
    def hook(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, name = _Slot.of_input(m, args, kwargs)
        _expect_hidden(hidden, m)
        changed = change(hidden)
        if changed is None:
            return None
        if name is None:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, name: changed}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _on_output(module: nn.Module, change: Callable[[Any], Any]) -> Any:
    def hook(m: nn.Module, args: Any, output: Any) -> Any:
        hidden = _Slot.of_output(output)
        _expect_hidden(hidden, m)
        changed = change(hidden)
        return None if changed is None else _Slot.with_output(output, changed)

    return module.register_forward_hook(hook)


@contextmanager
def _attached(attach: Iterable[Callable[[], Any]]) -> Iterator[None]:
    """Registers hooks, and removes every one of them whatever happens."""
    with ExitStack() as stack:
        for register in attach:
            stack.callback(register().remove)
        yield


def check_site(site: str) -> None:
    if site not in ("pre", "post"):
        raise ArgumentError(f'site: expected "pre" or "post", got {site!r}')


def _position_index(positions: Positions) -> Any:
    if positions is None:
        return None
    if isinstance(positions, str):
        if positions != "last":
            raise ArgumentError(f'positions: expected "last", a slice or integers, got {positions!r}')
        return slice(-1, None)
    if isinstance(positions, slice):
        return positions
    if isinstance(positions, (int, np.integer)):
        return [int(positions)]
    return [int(p) for p in positions]


def _at(hidden: Any, index: Any) -> Any:
    """``hidden`` at token positions (axis -2); a view where the positions are a slice."""
    if index is None:
        return hidden
    count = hidden.shape[-2]
    if isinstance(index, list) and not all(-count <= p < count for p in index):
        raise ShapeError(f"positions: expected -{count} to {count - 1}, got {index}")
    return hidden[..., index, :]


class Recording(dict[int | str, Any]):
    """Recorded residual streams, by layer: the tensor of the last forward pass, or with ``keep="all"`` a list."""

    def __init__(self, site: Site, keep: Literal["last", "all"]) -> None:
        super().__init__()
        self.site, self.keep = site, keep

    def _store(self, layer: int | str, hidden: Any) -> None:
        if self.keep == "all":
            self.setdefault(layer, []).append(hidden)
        else:
            self[layer] = hidden


@contextmanager
def recording(
    model: nn.Module,
    layers: Layers = None,
    *,
    site: Site = "pre",
    positions: Positions = None,
    keep: Literal["last", "all"] = "last",
    blocks: str | None = None,
) -> Iterator[Recording]:
    """Records the residual stream of every forward pass inside the ``with`` block.

    Args:
        model: a Hugging Face decoder, or any module with ``blocks`` or named ``layers``.
        layers: block indices (negative from the end), module names, or None for every block.
        site: ``"pre"`` for the input of a block, ``"post"`` for its output.
        positions: token positions to keep (``"last"``, integers, a slice); None keeps all. Mind the padding side.
        keep: ``"last"`` forward pass only, or ``"all"`` in a list.
        blocks: dotted name of the list of blocks, for models the table does not know.

    Yields:
        A :class:`Recording`: layer to detached tensor ``(batch, tokens, d)``, a copy, on the model's device.

    Raises:
        ArgumentError, DTypeError: an argument does not fit the model. ShapeError: a position outside the sequence.
        DeviceError: the model is on ``meta``, where activations have no values.
    """
    check_site(site)
    if keep not in ("last", "all"):
        raise ArgumentError(f'keep: expected "last" or "all", got {keep!r}')
    index = _position_index(positions)
    record = Recording(site, keep)
    attach = _on_input if site == "pre" else _on_output

    def watch(layer: int | str) -> Callable[[Any], None]:
        def keep_copy(hidden: torch.Tensor) -> None:
            if hidden.device.type == "meta":
                raise DeviceError(f"model: expected activations with memory in layer {layer}, got device 'meta'")
            record._store(layer, _at(hidden.detach(), index).clone())

        return keep_copy

    modules = select_modules(model, layers, blocks)
    with _attached([lambda m=m, k=k: attach(m, watch(k)) for k, m in modules.items()]):  # type: ignore[misc]
        yield record


def _edited(edit: Edit, index: Any) -> Callable[[Any], Any]:
    """A hook's body: a new tensor, always: the module's own result may be needed for a gradient, or be shared."""

    def change(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[-1] != edit.width:
            raise ShapeError(f"q: expected vectors of {hidden.shape[-1]}, the model's hidden size, got {edit.width}")
        if index is None:
            return edit.apply(hidden)
        changed = hidden.clone()
        changed[..., index, :] = edit.apply(_at(hidden, index))
        return changed

    return change


@contextmanager
def ablating(
    model: nn.Module,
    q: Any,
    layers: Layers = None,
    *,
    scale: float = 1.0,
    origin: Any = None,
    preserve_norm: bool = False,
    sites: Sequence[str] = ("pre", "attn", "mlp"),
    positions: Positions = None,
    blocks: str | None = None,
) -> Iterator[None]:
    """Removes ``q`` from the residual stream of every forward pass inside the ``with`` block.

    The default edits the input of each block and what its attention and MLP add (Arditi et al. 2024, §2.4), so the
    stream holds no component along ``q`` anywhere, whatever the embedding, the biases or the experts write.

    Args:
        model: a Hugging Face decoder, or any module with ``blocks``.
        q: a :class:`Direction`, ``(d,)`` or ``(k, d)``.
        layers: as in :func:`recording`; None for every block.
        scale: 1 removes, 2 reflects, negative values amplify.
        origin: ``(d,)``, the point whose component along ``q`` the stream gets instead of none (affine concept
            editing, Marshall et al. 2024, with the mean of the negative class). Applies where the stream itself is
            edited, ``"pre"`` and ``"post"``; what the branches add has no component then.
        preserve_norm: rescale every edited row to the length it had.
        sites: any of ``"pre"``, ``"attn"``, ``"mlp"``, ``"post"``. Where a norm follows a branch (Gemma 2 and 3,
            OLMo 2, GLM-4), the branch is made orthogonal to ``q`` times that norm's gain, so that what enters the
            stream is orthogonal to ``q``, as :func:`orthogonalize_model_` does in the weights.
        positions: token positions to edit, counted in each forward pass; None for all.
        blocks: dotted name of the list of blocks, for models the table does not know.

    Raises:
        ArgumentError, DTypeError, ShapeError: an argument does not fit the model.
        NonFiniteError, DegenerateError: ``q`` is not finite, or spans nothing.
    """
    sites = (sites,) if isinstance(sites, str) else tuple(sites)
    known = ("pre", "attn", "mlp", "post")
    if not sites or any(s not in known for s in sites):
        raise ArgumentError(f"sites: expected some of {known}, got {sites}")
    basis = orthonormal_basis(q)
    width = basis.shape[1]
    start = None if origin is None else _vector(origin, "origin", width)
    index = _position_index(positions)
    modules = list(select_modules(model, layers, blocks).values())
    _check_width(model, width)
    stream = _edited(Edit(width, basis, origin=start, scale=scale, preserve_norm=preserve_norm), index)
    added = _edited(Edit(width, basis, scale=scale, preserve_norm=preserve_norm), index)
    attach: list[Callable[[], Any]] = []
    for site in sites:
        if site in ("pre", "post"):
            register = _on_input if site == "pre" else _on_output
            attach += [lambda m=m, register=register: register(m, stream) for m in modules]  # type: ignore[misc]
            continue
        for branch, gain in _branches(model, modules, site):
            change = added
            if gain is not None:
                scaled = gained_basis(basis, gain, width)
                change = _edited(Edit(width, scaled, scale=scale, preserve_norm=preserve_norm), index)
            attach.append(lambda m=branch, change=change: _on_output(m, change))  # type: ignore[misc]
    with _attached(attach):
        yield


@contextmanager
def steering(
    model: nn.Module,
    v: Any,
    layers: Layers = None,
    *,
    scale: float = 1.0,
    unit: bool = False,
    site: Site | None = None,
    positions: Positions = None,
    blocks: str | None = None,
) -> Iterator[None]:
    """Adds ``scale · v`` to the residual stream in every forward pass inside the ``with`` block.

    Args:
        model: a Hugging Face decoder, or any module with ``blocks`` or named ``layers``.
        v: a :class:`Direction` or ``(d,)``, not normalised unless ``unit``.
        layers: as in :func:`recording`; None for the layer of a :class:`Direction`, which must then have one.
        scale: multiples of ``v``; negative steers away.
        unit: divide ``v`` by its length first.
        site: ``"pre"`` or ``"post"``; None for the site of a :class:`Direction`, else ``"pre"``.
        positions: token positions to edit, counted in each forward pass (``"last"`` is the newest token while
            decoding); None for all.
        blocks: dotted name of the list of blocks, for models the table does not know.

    Raises:
        ArgumentError, DTypeError, ShapeError: an argument does not fit the model.
        NonFiniteError: ``v`` is not finite.
    """
    if layers is None:
        layers = v.layer if isinstance(v, Direction) else None
        if layers is None:
            raise ArgumentError("layers: expected layers, since v does not say where it was estimated")
    if site is None:
        site = v.site if isinstance(v, Direction) else "pre"
    check_site(site)
    vector = single_vector(v, "v")
    edit = steering_edit(vector, len(vector), scale, unit=unit)
    change = _edited(edit, _position_index(positions))
    attach = _on_input if site == "pre" else _on_output
    modules = select_modules(model, layers, blocks)
    _check_width(model, edit.width, "v")
    with _attached([lambda m=m: attach(m, change) for m in modules.values()]):  # type: ignore[misc]
        yield


def _check_width(model: nn.Module, width: int, arg: str = "q") -> None:
    """Refuses a direction of another model before any token is computed, where the configuration tells."""
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    if isinstance(hidden, int) and hidden != width:
        raise ShapeError(f"{arg}: expected vectors of {hidden}, the model's hidden size, got {width}")
