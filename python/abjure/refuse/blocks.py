"""Where the decoder blocks of a Hugging Face model are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArgumentError, DTypeError

if TYPE_CHECKING:
    from torch import nn

Layers = int | str | Sequence[int | str] | None

#: Where the decoder blocks of the known families are.
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


def attribute(module: Any, path: str) -> Any:
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
        if (inner := attribute(model, prefix)) is not None:
            roots[f"{prefix}."] = inner
    paths = BLOCKS if blocks is None else (blocks,)
    for prefix, root in roots.items():
        for path in paths:
            found = attribute(root, path)
            if isinstance(found, nn.ModuleList) and len(found) > 0:
                return prefix + path, found
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    wanted = "a known decoder" if blocks is None else f"a module list named {blocks!r}"
    raise ArgumentError(f"model: expected {wanted}, got {type(model).__name__}; its module lists are {lists or 'none'}")


def select_modules(model: nn.Module, layers: Layers, blocks: str | None) -> dict[int | str, nn.Module]:
    """Layer keys, as the caller gave them, to modules."""
    if isinstance(layers, (str, int, np.integer)):
        layers = [layers]
    if layers is not None and all(isinstance(name, str) for name in layers):
        modules = dict(model.named_modules())
        unknown = [name for name in layers if name not in modules]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), modules, 8, 0.0)
            raise ArgumentError(f"layers: expected names of modules, such as {near}, got {unknown[0]!r}")
        return {name: modules[str(name)] for name in layers}
    path, found = decoder_blocks(model, blocks)
    if layers is None:
        return dict(enumerate(found))
    selected: dict[int | str, nn.Module] = {}
    for layer in layers:
        if isinstance(layer, str):
            selected.update(select_modules(model, layer, blocks))
            continue
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
            raise DTypeError(f"layers: expected integers or module names, got {layer!r}")
        if not -len(found) <= layer < len(found):
            known = f"-{len(found)} to {len(found) - 1} ({path} has the blocks 0 to {len(found) - 1})"
            raise ArgumentError(f"layers: expected {known}, got {layer}")
        selected[int(layer) % len(found)] = found[int(layer)]
    return selected
