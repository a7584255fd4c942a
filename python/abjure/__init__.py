"""Study and change what a model refuses, what it forgets, and what can be learned from protected data.

The wings are imported on first use: :mod:`abjure.forget`, :mod:`abjure.refuse`, :mod:`abjure.protect`,
:mod:`abjure.measure`, and :mod:`abjure.checkpoint` for models on disk. Importing abjure never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._native import __version__, get_num_threads, set_num_threads
from .errors import (
    AbjureError,
    ArgumentError,
    CheckpointError,
    DegenerateError,
    DeviceError,
    DTypeError,
    LayoutError,
    NonFiniteError,
    ShapeError,
)

if TYPE_CHECKING:
    from . import checkpoint, forget, measure, protect, refuse

__all__ = [
    "AbjureError",
    "ArgumentError",
    "CheckpointError",
    "DTypeError",
    "DegenerateError",
    "DeviceError",
    "LayoutError",
    "NonFiniteError",
    "ShapeError",
    "__version__",
    "checkpoint",
    "forget",
    "get_num_threads",
    "measure",
    "protect",
    "refuse",
    "set_num_threads",
]

_WINGS = ("forget", "refuse", "protect", "measure", "checkpoint", "integrations")


def __getattr__(name: str) -> Any:
    if name in _WINGS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
