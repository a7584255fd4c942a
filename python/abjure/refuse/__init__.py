"""Find, watch, remove, add or gate refusal in a language model."""

from .contrast import Contrast, Eraser
from .directions import (
    Direction,
    ablate,
    ablate_,
    affine_ablate_,
    orthonormal_basis,
    project,
    steer_,
)
from .hooks import Recording, ablating, decoder_blocks, recording, steering
from .weights import WeightReport, orthogonalize_

__all__ = [
    "Contrast",
    "Direction",
    "Eraser",
    "Recording",
    "WeightReport",
    "ablate",
    "ablate_",
    "ablating",
    "affine_ablate_",
    "decoder_blocks",
    "orthogonalize_",
    "orthonormal_basis",
    "project",
    "recording",
    "steer_",
    "steering",
]
