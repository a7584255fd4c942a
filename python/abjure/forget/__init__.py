"""Unlearn a subset or a class of the training data.

Importance of every parameter for the forget set and for the rest (:class:`Fisher`, :func:`importance`), and Selective
Synaptic Dampening by it (:func:`dampen_`, :func:`dampen_array_`, :func:`selection_curve`). For language models, fused
:func:`token_logprobs` and the unlearning losses on them. Without labels, :func:`label_agnostic_forget`.

What to forget, and whether it worked: :func:`worst_case_forget_set`, :func:`evaluate_unlearning`, :func:`relearn_time`,
and :func:`corrective_benchmark` where only a part of the bad data is known.
"""

from __future__ import annotations

from .._policy import Policy, permitted
from .adaptive import AdaptiveAlpha, adaptive_alpha
from .corrective import (
    CorrectiveCell,
    CorrectiveReport,
    CorrectiveTask,
    Manipulation,
    PatchTrigger,
    corrective_benchmark,
    poison,
    shuffle_labels,
    swap_classes,
)
from .criteria import Criterion, cross_entropy, output_norm, squared_output_norm
from .dampen import DampenReport, Selection, SelectionCurve, dampen_, dampen_array_, selection_curve
from .estimate import importance
from .evaluate import Evaluation, Measure, evaluate_unlearning
from .fisher import Fisher
from .jit import JitReport, jit_
from .label_agnostic import LAF_PRESETS, LAFReport, label_agnostic_forget
from .labelled import LabelledFisher
from .logprobs import token_logprobs
from .losses import (
    DIVERGENCES,
    PRESETS,
    SequenceLogprobs,
    dpo,
    flat,
    ga,
    grad_diff,
    idk,
    idk_dpo,
    kl_retain,
    nll,
    npo,
    prompt_decouple,
    redi,
    rmu,
    sequence_logprobs,
    simnpo,
)
from .patch import DampenPatch
from .presets import DAMPENING_PRESETS, DampenPreset, unlearn_
from .relearn import Relearning, relearn_time
from .removal import RemovalCheck, RemovalReport, linear_probe, quantized_, removal_report
from .resume import parameter_hash
from .retrieval import Found, PermittedIndex
from .search import DampenSearch, PotionReport, SearchPoint, potion_, search_dampening
from .worst_case import SignUnlearning, WorstCase, worst_case_forget_set

__all__ = [
    "DAMPENING_PRESETS",
    "DIVERGENCES",
    "LAF_PRESETS",
    "PRESETS",
    "AdaptiveAlpha",
    "CorrectiveCell",
    "CorrectiveReport",
    "CorrectiveTask",
    "Criterion",
    "DampenPatch",
    "DampenPreset",
    "DampenReport",
    "DampenSearch",
    "Evaluation",
    "Fisher",
    "Found",
    "JitReport",
    "LAFReport",
    "LabelledFisher",
    "Manipulation",
    "Measure",
    "PatchTrigger",
    "PermittedIndex",
    "Policy",
    "PotionReport",
    "Relearning",
    "RemovalCheck",
    "RemovalReport",
    "SearchPoint",
    "Selection",
    "SelectionCurve",
    "SequenceLogprobs",
    "SignUnlearning",
    "WorstCase",
    "adaptive_alpha",
    "corrective_benchmark",
    "cross_entropy",
    "dampen_",
    "dampen_array_",
    "dpo",
    "evaluate_unlearning",
    "flat",
    "ga",
    "grad_diff",
    "idk",
    "idk_dpo",
    "importance",
    "jit_",
    "kl_retain",
    "label_agnostic_forget",
    "linear_probe",
    "nll",
    "npo",
    "output_norm",
    "parameter_hash",
    "permitted",
    "poison",
    "potion_",
    "prompt_decouple",
    "quantized_",
    "redi",
    "relearn_time",
    "removal_report",
    "rmu",
    "search_dampening",
    "selection_curve",
    "sequence_logprobs",
    "shuffle_labels",
    "simnpo",
    "squared_output_norm",
    "swap_classes",
    "token_logprobs",
    "unlearn_",
    "worst_case_forget_set",
]
