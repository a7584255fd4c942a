"""Find, watch, remove, add or gate refusal in a language model."""

# decoding
from .calibrate import Threshold, calibrate_bias, calibrate_threshold
from .phrases import ForbiddenPhrases
from .tokens import (
    RefusalTokens,
    bias_,
    bias_for_probability,
    bias_to_threshold,
    force_,
    logit,
    row_lse,
    row_margin,
    row_max_gap,
    threshold_to_bias,
)

__all__ = [
    "ForbiddenPhrases",
    "RefusalTokens",
    "Threshold",
    "bias_",
    "bias_for_probability",
    "bias_to_threshold",
    "calibrate_bias",
    "calibrate_threshold",
    "force_",
    "logit",
    "row_lse",
    "row_margin",
    "row_max_gap",
    "threshold_to_bias",
]
