"""Publish data that a model cannot learn from, and less data; keep promises when records are deleted."""

from __future__ import annotations

from . import noise
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
from .disagreement import (
    OpenSetScore,
    disagreement,
    disagreement_heads,
    disagreement_loss,
    head_information,
    open_set_score,
)
from .features import FeatureMap
from .images import (
    ClassPerturbation,
    ImageFolder,
    ProtectedFolder,
    protect_images,
    read_folder,
)
from .minimize import (
    Buckets,
    ColumnMinimizer,
    Front,
    MinimizationReport,
    Minimized,
    anonymity,
    evaluate_release,
    minimization_front,
    minimize_columns,
)
from .recourse import (
    DeletionModel,
    Recourse,
    robust_recourse,
)
from .survival import StressReport, stress

__all__ = [
    "BayesError",
    "Bound",
    "Buckets",
    "Certificate",
    "ClassPerturbation",
    "ColumnMinimizer",
    "DeletionModel",
    "FeatureMap",
    "Front",
    "Gradient",
    "ImageFolder",
    "MinimizationReport",
    "Minimized",
    "OpenSetScore",
    "Protected",
    "ProtectedFolder",
    "Recourse",
    "SmoothedError",
    "StressReport",
    "Verification",
    "anonymity",
    "bandwidth",
    "bayes_error",
    "bayes_error_bounds",
    "bayes_error_gradient",
    "bhattacharyya_bound",
    "cover_hart",
    "disagreement",
    "disagreement_heads",
    "disagreement_loss",
    "evaluate_release",
    "fingerprint",
    "head_information",
    "henze_penrose_bound",
    "maximize_bayes_error",
    "minimization_front",
    "minimize_columns",
    "nearest_neighbour_bound",
    "noise",
    "open_set_score",
    "protect_images",
    "read_folder",
    "robust_recourse",
    "smoothed_error",
    "stress",
]
