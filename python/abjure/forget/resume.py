"""Long passes that can be stopped: what identifies a pass, its checkpoint, and Ctrl-C between its steps."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from .. import _native
from .._interop import is_torch
from ..errors import ArgumentError
from .fisher import Fisher
from .params import listed, named


def _digest(x: Any) -> bytes:
    """Hash of an array's dtype, shape and values, wherever it is."""
    if is_torch(x):
        import torch

        dtype, shape = str(x.dtype).removeprefix("torch."), tuple(x.shape)
        x = x.detach().cpu().resolve_conj().resolve_neg().contiguous()
        content = x.view(-1).view(torch.uint8).numpy() if x.numel() else b""
    else:
        x = np.ascontiguousarray(x).reshape(np.shape(x))
        dtype, shape = str(x.dtype), x.shape
        content = x.reshape(-1).view(np.uint8) if x.size else b""
    found = hashlib.sha256(f"{dtype} {shape} ".encode())
    found.update(content)
    return found.digest()


def parameter_hash(model: Any) -> str:
    """SHA-256 over names, dtypes, shapes and values of a model's parameters (a module's, or a mapping's arrays).

    What :func:`importance` notes in ``Fisher.provenance["parameters"]``, to tell whether it still belongs to a model.

    Raises:
        DTypeError: ``model`` is neither.
    """
    parameters = named(model)
    found = hashlib.sha256()
    for name, p in parameters.items():
        found.update(json.dumps(name).encode() + _digest(p))
    return "sha256:" + found.hexdigest()


class Data:
    """Running hash and counts of the batches seen, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.batches = 0

    def update(self, batch: Any) -> None:
        from torch.utils._pytree import tree_flatten

        leaves, _ = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        for leaf in leaves:
            if is_torch(leaf) or isinstance(leaf, np.ndarray):
                self._hash.update(_digest(leaf))
            elif leaf is None or isinstance(leaf, (bool, int, float, str, bytes)):
                self._hash.update(repr(leaf).encode())
            else:
                self._hash.update(type(leaf).__qualname__.encode())
        self._hash.update(b"batch")
        self.batches += 1

    def hexdigest(self) -> str:
        return "sha256:" + self._hash.hexdigest()


def loss_name(loss: Any) -> str:
    """How a loss is called in files: a criterion's name, a function's module and name, an object's class."""
    name = getattr(loss, "name", None)
    if isinstance(name, str):
        return name
    inner = getattr(loss, "func", loss)  # functools.partial
    found = getattr(inner, "__qualname__", None)
    return f"{inner.__module__}.{found}" if found else f"{type(inner).__module__}.{type(inner).__qualname__}"


def provenance(model: Any, parameters: Mapping[str, Any], loss: Any, notes: Any) -> dict[str, Any]:
    """What is known of a pass before it starts.

    Raises:
        ArgumentError: the notes are not JSON.
    """
    try:
        notes = json.loads(json.dumps(notes))
    except (TypeError, ValueError) as err:
        raise ArgumentError(f"notes: expected what JSON can hold, got {type(notes).__name__} ({err})") from err
    libraries = ("torch", "numpy", "transformers", "peft")
    versions = {"abjure": _native.__version__, "python": platform.python_version()}
    versions |= {n: str(sys.modules[n].__version__) for n in libraries if hasattr(sys.modules.get(n), "__version__")}
    found: dict[str, Any] = {"model": f"{type(model).__module__}.{type(model).__qualname__}"}
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    if isinstance(name, str) and name:
        found["name"] = name
    found |= {
        "parameters": parameter_hash(parameters),
        "loss": loss_name(loss),
        "mode": "eval",
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return found | ({} if notes is None else {"notes": notes})


class Checkpoint:
    """The state of a pass at the end of a step, in a Fisher file: sums, and how many batches they have seen.

    Args:
        path: the file.
        every: steps between two writes.
        identity: what a pass must have in common with the one that wrote the file.

    Raises:
        ArgumentError: ``every`` is not a positive whole number, or the folder of the path is not there.
    """

    def __init__(self, path: str | os.PathLike[str], every: int, identity: Mapping[str, Any]) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"every: expected a whole number of 1 or more, got {every!r}")
        if not Path(path).parent.is_dir():
            raise ArgumentError(f"checkpoint: expected a path in an existing folder, got {os.fspath(path)!r}")
        self.path, self._every, self._identity = Path(path), every, json.loads(json.dumps(identity))
        self._done: dict[str, Any] = {}
        self._steps = 0
        self._unsaved = False

    def read(self, fisher: Fisher, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Continues ``fisher`` from the file, if there is one, and says where it stood.

        Raises:
            ArgumentError: the file is no checkpoint, or one of another pass; ``fisher`` is as it was.
        """
        if not self.path.exists():
            return {}
        found, metadata = Fisher._load(self.path)
        if "checkpoint" not in metadata:
            raise ArgumentError(
                f"checkpoint: expected a checkpoint or no file at {str(self.path)!r}, got a Fisher file"
            )
        state: dict[str, Any] = json.loads(metadata["checkpoint"])
        shapes = {n: tuple(p.shape) for n, p in parameters.items()}
        if found._sums.keys() != shapes.keys():
            differing = listed(found._sums.keys() ^ shapes.keys())
            raise ArgumentError(f"checkpoint: expected the model's parameter names, got a difference in {differing}")
        for name, s in found._sums.items():
            if s.shape != shapes[name]:
                raise ArgumentError(f"checkpoint: {name!r}: expected shape {shapes[name]}, got {s.shape}")
        for what, mine in self._identity.items():
            theirs = state["identity"].get(what)
            if theirs != mine:
                raise ArgumentError(f"checkpoint: expected {what} {mine!r}, got {theirs!r} in {str(self.path)!r}")
        fisher._continue(found)
        self._done = state
        return state

    def ended(self, fisher: Fisher, data: Data, examples: int, *, last: bool = False) -> None:
        """A step is complete; writes the file where it is due."""
        self._done = {"batches": data.batches, "examples": examples, "data": data.hexdigest(), "complete": last}
        self._steps += 1
        self._unsaved = True
        if last or self._steps % self._every == 0:
            self.write(fisher)

    def write(self, fisher: Fisher) -> None:
        """The state as of the last complete step, unless the file has it already."""
        if self._unsaved:
            state = self._done | {"identity": self._identity}
            fisher._save(self.path, {"checkpoint": json.dumps(state)})
            self._unsaved = False


class Uninterrupted:
    """Holds a Ctrl-C that comes inside :meth:`step` back until the step is complete; a second one is not held back.

    Outside of the main thread, and where SIGINT has a handler of the caller's own, nothing is held back.
    """

    def __init__(self) -> None:
        self._inside = self._asked = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._inside or self._asked:
            raise KeyboardInterrupt
        self._asked = True

    @contextmanager
    def installed(self) -> Iterator[None]:
        mine = threading.current_thread() is threading.main_thread()
        if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def step(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
        if self._asked:
            self._asked = False
            raise KeyboardInterrupt
