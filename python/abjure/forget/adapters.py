"""Adapters of the ``peft`` library: a view of the base weights with the adapters merged into them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ArgumentError


def _layers(model: Any) -> dict[str, Any]:
    """Name to adapter layer; empty where peft has not been imported, since then there can be none."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return {}
    return {name: m for name, m in model.named_modules() if isinstance(m, tuners.BaseTunerLayer)}


def merged_names(model: Any) -> dict[str, str]:
    """Names of the base parameters, to the names they have after ``merge_and_unload()``; adapters are left out.

    Raises:
        ArgumentError: the model has no adapter layers.
    """
    layers = _layers(model)
    if not layers:
        raise ArgumentError("merged: expected a model with peft adapters, got one without")
    found = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        owners = [n for n in range(len(parts)) if ".".join(parts[:n]) in layers]
        if any(parts[n] != "base_layer" for n in owners) or "original_module" in parts:
            continue
        kept = [p for n, p in enumerate(parts) if n not in owners]
        if "modules_to_save" in kept:  # .modules_to_save.<adapter>. stands for the module itself
            at = kept.index("modules_to_save")
            kept = kept[:at] + kept[at + 2 :]
        shown = ".".join(kept)
        prefix = "base_model.model."
        found[name] = shown.removeprefix(prefix) if hasattr(model, "peft_config") else shown
    return found


@contextmanager
def merging(model: Any) -> Iterator[None]:
    """The active adapters merged into their base layers inside; bit for bit as before after.

    ``unmerge()`` subtracts what ``merge()`` added, which rounds: the base weights are kept meanwhile.

    Raises:
        ArgumentError: an adapter is merged already, or cannot be.
    """
    import torch

    layers = _layers(model)
    for name, layer in layers.items():
        if layer.merged:
            raise ArgumentError(f"merged: expected adapters that are not merged yet, got {name!r} merged")
    kept = [[(p, p.detach().clone()) for p in layer.get_base_layer().parameters()] for layer in layers.values()]
    begun = []
    try:
        for name, layer in layers.items():
            begun.append(layer)
            try:
                layer.merge()
            except (NotImplementedError, AttributeError, ValueError) as err:
                raise ArgumentError(f"merged: expected adapters that can be merged, got {name!r} ({err})") from err
        yield
    finally:
        for layer in begun:
            if layer.merged:
                layer.unmerge()
        with torch.no_grad():
            for originals in kept:
                for p, original in originals:
                    p.copy_(original)
