"""Find, watch, remove, add or gate refusal in a language model."""

from __future__ import annotations

from .architectures import ARCHITECTURES, Architecture, Writer, residual_writers
from .blocks import decoder_blocks
from .calibrate import Threshold, calibrate_bias, calibrate_threshold
from .cliff import (
    Cliff,
    CliffRanking,
    MeanCurve,
    cliff_score,
    rank_by_cliff,
    refusal_cliff,
    refusal_scores_by_position,
)
from .conditional import (
    ConditionGate,
    ConditionThreshold,
    condition_similarity,
    condition_threshold,
    conditional_steering,
)
from .contrast import Contrast, Eraser, difference_components
from .data import (
    Budgets,
    RefusalAwareSplit,
    answer_confidence,
    answer_entropy,
    certainty,
    difficulty_budgets,
    refusal_aware_split,
    sureness,
    verdict_tokens,
)
from .directions import (
    Direction,
    ablate,
    ablate_,
    affine_ablate_,
    orthonormal_basis,
    project,
    steer_,
)
from .heads import Head, HeadAttribution, ablating_heads, attribute_heads, head_contributions
from .hooks import Recording, ablating, recording, steering
from .latent_guard import Beliefs, LatentGuard
from .model_edit import ModelEditReport, orthogonalize_model_
from .phrases import ForbiddenPhrases
from .prompts import Prompt, Prompts
from .record import Activations, Contrasts, record_prompts, record_to_disk
from .select import Candidate, DirectionSelection, refusal_scores, select_direction
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
from .weights import WeightReport, orthogonalize_

__all__ = [
    "ARCHITECTURES",
    "Activations",
    "Architecture",
    "Beliefs",
    "Budgets",
    "Candidate",
    "Cliff",
    "CliffRanking",
    "ConditionGate",
    "ConditionThreshold",
    "Contrast",
    "Contrasts",
    "Direction",
    "DirectionSelection",
    "Eraser",
    "ForbiddenPhrases",
    "Head",
    "HeadAttribution",
    "LatentGuard",
    "MeanCurve",
    "ModelEditReport",
    "Prompt",
    "Prompts",
    "Recording",
    "RefusalAwareSplit",
    "RefusalTokens",
    "Threshold",
    "WeightReport",
    "Writer",
    "ablate",
    "ablate_",
    "ablating",
    "ablating_heads",
    "affine_ablate_",
    "answer_confidence",
    "answer_entropy",
    "attribute_heads",
    "bias_",
    "bias_for_probability",
    "bias_to_threshold",
    "calibrate_bias",
    "calibrate_threshold",
    "certainty",
    "cliff_score",
    "condition_similarity",
    "condition_threshold",
    "conditional_steering",
    "decoder_blocks",
    "difference_components",
    "difficulty_budgets",
    "force_",
    "head_contributions",
    "logit",
    "orthogonalize_",
    "orthogonalize_model_",
    "orthonormal_basis",
    "project",
    "rank_by_cliff",
    "record_prompts",
    "record_to_disk",
    "recording",
    "refusal_aware_split",
    "refusal_cliff",
    "refusal_scores",
    "refusal_scores_by_position",
    "residual_writers",
    "row_lse",
    "row_margin",
    "row_max_gap",
    "select_direction",
    "steer_",
    "steering",
    "sureness",
    "threshold_to_bias",
    "verdict_tokens",
]
