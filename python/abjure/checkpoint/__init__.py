"""Checkpoints on disk: larger than memory, edited as they stream by, crash-safe, and back bit for bit.

Nothing here imports torch, or loads a model. An edit is a list of ops (:class:`Ablate`, :class:`Scale`,
:class:`Dampen`); :func:`resolve` tells from ``config.json`` and the tensors' names what an op touches; a
:class:`Recipe` writes ops down. :func:`edit` does them, :func:`undo` takes them back, :func:`verify` checks every
tensor by its hash. :func:`diff` compares two checkpoints, :func:`from_gguf` reads GGUF files.
"""

from __future__ import annotations

from .diff import CheckpointDiff, TensorDiff, diff
from .editing import CheckpointInfo, EditReport, VerifyReport, edit, info, recover, undo, verify
from .gguf import GGUF, from_gguf
from .layout import Resolution, Target, TensorInfo, resolution, resolve
from .ops import Ablate, Dampen, Op, Scale
from .plan import Plan
from .recipe import Recipe

__all__ = [
    "GGUF",
    "Ablate",
    "CheckpointDiff",
    "CheckpointInfo",
    "Dampen",
    "EditReport",
    "Op",
    "Plan",
    "Recipe",
    "Resolution",
    "Scale",
    "Target",
    "TensorDiff",
    "TensorInfo",
    "VerifyReport",
    "diff",
    "edit",
    "from_gguf",
    "info",
    "recover",
    "resolution",
    "resolve",
    "undo",
    "verify",
]
