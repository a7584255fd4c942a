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

from ..errors import ArgumentError, DTypeError, ShapeError
from .directions import Direction, Edit, Site, _vectors, orthonormal_basis, steering_edit

if TYPE_CHECKING:
    import torch
    from torch import nn

Layers = int | str | Sequence[int | str] | None
Positions = int | slice | Sequence[int] | Literal["last"] | None

#: Where the decoder blocks of the known families are, and what their branches are called.
BLOCKS = (
    "model.layers",  # Llama, Mistral, Qwen, Phi, Gemma, OLMo, DeepSeek, Mixtral, gpt-oss
    "model.language_model.layers",  # multimodal wrappers
    "language_model.model.layers",
    "model.decoder.layers",  # OPT
    "transformer.h",  # GPT-2, Falcon, Bloom
    "transformer.blocks",  # MPT
    "gpt_neox.layers",  # GPT-NeoX, Pythia
    "layers",  # the bare decoders inside the above
    "decoder.layers",
    "h",
)
ATTENTION = ("self_attn", "attention", "attn", "self_attention", "linear_attn")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def decoder_blocks(model: nn.Module, blocks: str | None = None) -> tuple[str, nn.ModuleList]:
    """The model's decoder blocks and the name of the list that holds them.

    Args:
        model: a Hugging Face decoder, a wrapper around one (PEFT), or any module when ``blocks`` is given.
        blocks: dotted name of the ``nn.ModuleList``, for models that the table does not know.

    Raises:
        DTypeError: ``model`` is not a torch module.
        ArgumentError: no list of blocks is known; the message lists every module list of the model.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise DTypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    roots = {"": model}
    for prefix in ("base_model.model", "module", "_orig_mod"):
        if (inner := _attribute(model, prefix)) is not None:
            roots[f"{prefix}."] = inner
    paths = BLOCKS if blocks is None else (blocks,)
    for prefix, root in roots.items():
        for path in paths:
            found = _attribute(root, path)
            if isinstance(found, nn.ModuleList) and len(found) > 0:
                return prefix + path, found
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    wanted = "a known decoder" if blocks is None else f"a module list named {blocks!r}"
    raise ArgumentError(f"model: expected {wanted}, got {type(model).__name__}; its module lists are {lists or 'none'}")


def _select(model: nn.Module, layers: Layers, blocks: str | None) -> dict[int | str, nn.Module]:
    """Layer keys, as the caller gave them, to modules."""
    if isinstance(layers, (str, int, np.integer)):
        layers = [layers]
    if layers is not None and all(isinstance(name, str) for name in layers):
        modules = dict(model.named_modules())
        unknown = [name for name in layers if name not in modules]
        if unknown:
            raise ArgumentError(f"layers: expected names of modules, got {unknown[0]!r}")
        return {name: modules[str(name)] for name in layers}
    path, found = decoder_blocks(model, blocks)
    if layers is None:
        return dict(enumerate(found))
    selected: dict[int | str, nn.Module] = {}
    for layer in layers:
        if isinstance(layer, str):
            selected.update(_select(model, layer, blocks))
            continue
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
            raise DTypeError(f"layers: expected integers or module names, got {layer!r}")
        if not -len(found) <= layer < len(found):
            raise ArgumentError(f"layers: expected -{len(found)} to {len(found) - 1} ({path}), got {layer}")
        selected[int(layer) % len(found)] = found[int(layer)]
    return selected


def _branches(blocks: Iterable[nn.Module], names: Sequence[str], site: str) -> list[nn.Module]:
    """The attention or MLP module of every block.

    Raises:
        ArgumentError: a block has none under a known name: it would stay unedited.
    """
    found = []
    for block in blocks:
        branch = next((b for name in names if (b := getattr(block, name, None)) is not None), None)
        if branch is None and site == "mlp" and getattr(block, "fc2", None) is not None:
            branch = block.fc2  # OPT keeps its MLP in the block itself
        if branch is None:
            children = [name for name, _ in block.named_children()]
            raise ArgumentError(f"sites: {type(block).__name__} has no known {site} branch among {children}")
        found.append(branch)
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


def _check_site(site: str) -> None:
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
    """
    _check_site(site)
    if keep not in ("last", "all"):
        raise ArgumentError(f'keep: expected "last" or "all", got {keep!r}')
    index = _position_index(positions)
    record = Recording(site, keep)
    attach = _on_input if site == "pre" else _on_output

    def watch(layer: int | str) -> Callable[[Any], None]:
        return lambda hidden: record._store(layer, _at(hidden.detach(), index).clone())

    modules = _select(model, layers, blocks)
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
        sites: any of ``"pre"``, ``"attn"``, ``"mlp"``, ``"post"``. Where a norm follows a branch (Gemma 2 and 3) the
            branch's own output is not what enters the stream: there add ``"post"``.
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
    edit = Edit(basis.shape[1], basis, scale=scale)
    change = _edited(edit, _position_index(positions))
    modules = list(_select(model, layers, blocks).values())
    _check_width(model, edit.width)
    attach: list[Callable[[], Any]] = []
    for site in sites:
        if site in ("pre", "post"):
            register, targets = (_on_input if site == "pre" else _on_output), modules
        else:
            register, targets = _on_output, _branches(modules, ATTENTION if site == "attn" else MLP, site)
        attach += [lambda m=m, register=register: register(m, change) for m in targets]  # type: ignore[misc]
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
    _check_site(site)
    vectors = _vectors(v, "v")
    if len(vectors) != 1:
        raise ShapeError(f"v: expected shape (d,), got {vectors.shape}")
    edit = steering_edit(vectors[0], vectors.shape[1], scale, unit=unit)
    change = _edited(edit, _position_index(positions))
    attach = _on_input if site == "pre" else _on_output
    modules = _select(model, layers, blocks)
    _check_width(model, edit.width, "v")
    with _attached([lambda m=m: attach(m, change) for m in modules.values()]):  # type: ignore[misc]
        yield


def _check_width(model: nn.Module, width: int, arg: str = "q") -> None:
    """Refuses a direction of another model before any token is computed, where the configuration tells."""
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    if isinstance(hidden, int) and hidden != width:
        raise ShapeError(f"{arg}: expected vectors of {hidden}, the model's hidden size, got {width}")
