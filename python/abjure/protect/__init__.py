"""Publish data that a model cannot learn from, and less data; keep promises when records are deleted."""

from __future__ import annotations

from .ascent import Protected, maximize_bayes_error
from .bayes import BayesError, Gradient, bandwidth, bayes_error, bayes_error_gradient, cover_hart
from .bounds import (
    Bound,
    SmoothedError,
    bayes_error_bounds,
    bhattacharyya_bound,
    henze_penrose_bound,
    nearest_neighbour_bound,
    smoothed_error,
)
from .certificate import Certificate, Verification, fingerprint
from .features import FeatureMap
from .recourse import (
    DeletionModel,
    Recourse,
    robust_recourse,
)

__all__ = [
    "BayesError",
    "Bound",
    "Certificate",
    "DeletionModel",
    "FeatureMap",
    "Gradient",
    "Protected",
    "Recourse",
    "SmoothedError",
    "Verification",
    "bandwidth",
    "bayes_error",
    "bayes_error_bounds",
    "bayes_error_gradient",
    "bhattacharyya_bound",
    "cover_hart",
    "fingerprint",
    "henze_penrose_bound",
    "maximize_bayes_error",
    "nearest_neighbour_bound",
    "robust_recourse",
    "smoothed_error",
]
