"""Checkpoints on disk: which stored tensors an edit touches, and what it does to them.

Nothing here imports torch, or loads a model. An edit is a list of ops (:class:`Ablate`, :class:`Scale`,
:class:`Dampen`); :func:`resolve` tells from ``config.json`` and the tensors' names what an op touches.
"""

from __future__ import annotations

from .gguf import GGUF, from_gguf
from .layout import Resolution, Target, TensorInfo, resolution, resolve
from .ops import Ablate, Dampen, Op, Scale
from .recipe import Recipe

__all__ = [
    "GGUF",
    "Ablate",
    "Dampen",
    "Op",
    "Recipe",
    "Resolution",
    "Scale",
    "Target",
    "TensorInfo",
    "from_gguf",
    "resolution",
    "resolve",
]
