"""Unlearn a subset or a class of the training data.

Importance of every parameter for the forget set and for the rest (:class:`Fisher`, :func:`importance`), and Selective
Synaptic Dampening by it (:func:`dampen_`, :func:`dampen_array_`, :func:`selection_curve`).
"""

from __future__ import annotations

from .dampen import DampenReport, Selection, SelectionCurve, dampen_, dampen_array_, selection_curve
from .estimate import importance
from .fisher import Fisher

__all__ = [
    "DampenReport",
    "Fisher",
    "Selection",
    "SelectionCurve",
    "dampen_",
    "dampen_array_",
    "importance",
    "selection_curve",
]
