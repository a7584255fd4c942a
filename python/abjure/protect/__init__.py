"""Publish data that a model cannot learn from: Bayes error, its gradient, and the ascent along it."""

from __future__ import annotations

from .ascent import Certificate, Protected, maximize_bayes_error
from .bayes import BayesError, Gradient, bandwidth, bayes_error, bayes_error_gradient

__all__ = [
    "BayesError",
    "Certificate",
    "Gradient",
    "Protected",
    "bandwidth",
    "bayes_error",
    "bayes_error_gradient",
    "maximize_bayes_error",
]
