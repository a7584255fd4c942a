"""The old bits of what dampening changed: small, exact, and kept in a file if wanted."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import _native
from .._files import write_atomically
from .._interop import device_path, is_torch, target
from ..errors import AbjureError, ArgumentError
from .params import listed, named

_FORMAT = "abjure.patch.1"
_OLD, _INDEX = "old:", "index:"


class Interrupt:
    """Whether Ctrl-C was pressed in a section that holds it back."""

    def __init__(self) -> None:
        self.pending = False


@contextmanager
def held_interrupt() -> Iterator[Interrupt]:
    """Holds Ctrl-C back until the end of the section, which raises it then; does nothing outside the main thread."""
    held = Interrupt()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield held
        return

    def note(number: int, frame: Any) -> None:
        held.pending = True

    signal.signal(signal.SIGINT, note)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)
        if held.pending:
            before(signal.SIGINT, None)


class DampenPatch:
    """The places and old bits of every weight that a dampening changed, and nothing else.

    Where few weights of a stretch changed it holds their offsets (4 bytes each), elsewhere a bit per weight; and the
    old values in the dtype of the weights.
    """

    def __init__(self, patches: Mapping[str, Any]) -> None:
        self._patches = dict(patches)

    @property
    def names(self) -> list[str]:
        """Parameters that were looked at, in order."""
        return list(self._patches)

    def __len__(self) -> int:
        return sum(len(p) for p in self._patches.values())

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(int(p.nbytes) for p in self._patches.values())

    def entries(self, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Flat indices (uint64, ascending) of what changed in a parameter, and the bits of the old values.

        The bits are unsigned integers of the width of the weights.

        Raises:
            ArgumentError: no such parameter.
        """
        if name not in self._patches:
            raise ArgumentError(f"name: expected one of {listed(self._patches)}, got {name!r}")
        indices, old = self._patches[name].entries()
        return indices, old

    def restore(self, model: Any) -> None:
        """Puts the old bits back into ``model``; everything else stays as it is.

        Ctrl-C is held back until all of it is done.

        Args:
            model: a torch module or a mapping of name to array with these names, shapes and dtypes.

        Raises:
            ArgumentError: a name is missing.
            ShapeError, DTypeError, LayoutError: a tensor has another shape or dtype than the one that was dampened.
            Nothing has been modified then.
        """
        parameters = named(model)
        missing = [n for n in self._patches if n not in parameters]
        if missing:
            raise ArgumentError(f"model: expected parameters {listed(missing)}, got {listed(parameters)}")
        for name, patch in self._patches.items():
            try:
                _visit(patch, parameters[name], "check")
            except AbjureError as err:
                raise type(err)(f"{name!r}: {err}") from None
        with held_interrupt():
            for name, patch in self._patches.items():
                _visit(patch, parameters[name], "restore")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: for each parameter the indices (32 bits where they suffice) and the old bits.

        The file appears complete or not at all.

        Raises:
            ArgumentError: the path cannot be written.
        """
        from safetensors.numpy import save

        arrays, layout = {}, {}
        for name, patch in self._patches.items():
            indices, old = patch.entries()
            narrow = int(np.prod(patch.shape, dtype=np.uint64)) <= 2**32
            arrays[_INDEX + name] = indices.astype(np.uint32) if narrow else indices
            arrays[_OLD + name] = old
            layout[name] = [list(patch.shape), patch.dtype]
        metadata = {"format": _FORMAT, "abjure": _native.__version__, "parameters": json.dumps(layout)}
        write_atomically(path, save(arrays, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DampenPatch:
        """Reads what :meth:`save` wrote.

        Raises:
            ArgumentError: the file cannot be read, is not a patch file, or contradicts itself.
        """
        from safetensors import SafetensorError, safe_open

        patches = {}
        try:
            with safe_open(os.fspath(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ArgumentError(f"path: expected a file of format {_FORMAT!r}, got {metadata.get('format')!r}")
                for name, (shape, dtype) in json.loads(metadata["parameters"]).items():
                    indices = file.get_tensor(_INDEX + name).astype(np.uint64)
                    patches[name] = _native.Patch.from_entries(shape, dtype, indices, file.get_tensor(_OLD + name))
        except AbjureError:
            raise
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as err:
            raise ArgumentError(f"path: expected a readable patch file, got {os.fspath(path)!r} ({err})") from err
        return cls(patches)

    def __repr__(self) -> str:
        return f"DampenPatch({len(self):,} weights of {len(self._patches)} tensors, {self.nbytes:,} bytes)"


def _visit(patch: Any, weights: Any, action: str) -> None:
    """Restores one tensor (``"restore"``), or checks whether that would succeed (``"check"``)."""
    if is_torch(weights):
        weights = weights.detach()
    if device_path(weights, "dampen_array_") is not None:
        from ..integrations.torch import TorchPatch

        patch = patch if isinstance(patch, TorchPatch) else TorchPatch.of(patch, weights.device)
        getattr(patch, action)(weights)
        return
    if not isinstance(patch, _native.Patch):
        indices, old = patch.entries()
        patch = _native.Patch.from_entries(list(patch.shape), patch.dtype, indices, old)
    with target(weights, "weights") as w:
        getattr(patch, action)(w)
