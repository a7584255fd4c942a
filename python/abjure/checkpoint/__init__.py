"""Checkpoints on disk: which stored tensors an edit touches, and what it does to them.

Nothing here imports torch, or loads a model. An edit is a list of ops (:class:`Ablate`, :class:`Scale`,
:class:`Dampen`); :func:`resolve` tells from ``config.json`` and the tensors' names what an op touches; a
:class:`Recipe` writes ops down. :func:`diff` compares two checkpoints, :func:`from_gguf` reads GGUF files.
"""

from __future__ import annotations

from .diff import CheckpointDiff, TensorDiff, diff
from .gguf import GGUF, from_gguf
from .layout import Resolution, Target, TensorInfo, resolution, resolve
from .ops import Ablate, Dampen, Op, Scale
from .recipe import Recipe

__all__ = [
    "GGUF",
    "Ablate",
    "CheckpointDiff",
    "Dampen",
    "Op",
    "Recipe",
    "Resolution",
    "Scale",
    "Target",
    "TensorDiff",
    "TensorInfo",
    "diff",
    "from_gguf",
    "resolution",
    "resolve",
]
