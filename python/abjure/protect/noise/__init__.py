"""Noise that others publish data with: the protections that :func:`~abjure.protect.maximize_bayes_error` is compared
to.

All but one are shortcuts: the noise itself tells the class, a model learns it and little else, and the Bayes error of
the published data *falls*. :func:`class_mean_shift`, :func:`linearly_separable`, :func:`autoregressive`,
:func:`convolutional` and :func:`one_pixel` need one or two passes over the data; :func:`error_minimizing` and
:func:`adversarial_poison` train a network (torch), :func:`text_conditioned` adds what a generator makes of captions.
"""

from __future__ import annotations

from .onepass import (
    autoregressive,
    autoregressive_filters,
    class_mean_shift,
    convolutional,
    linearly_separable,
    one_pixel,
)
from .result import Budget, Noised
from .surrogate import adversarial_poison, error_minimizing
from .text import ContrastivePair, NoiseGenerator, TextGenerator, text_conditioned, train_text_generator

__all__ = [
    "Budget",
    "ContrastivePair",
    "NoiseGenerator",
    "Noised",
    "TextGenerator",
    "adversarial_poison",
    "autoregressive",
    "autoregressive_filters",
    "class_mean_shift",
    "convolutional",
    "error_minimizing",
    "linearly_separable",
    "one_pixel",
    "text_conditioned",
    "train_text_generator",
]
