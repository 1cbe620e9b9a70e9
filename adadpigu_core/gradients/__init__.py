"""Sums of clipped per-record gradients, behind one function."""

from adadpigu_core.gradients.clipping import (
    DEFAULTS,
    PRECISIONS,
    Augmentation,
    ClippedSum,
    GradientOptions,
    Loss,
    cross_entropy,
)
from adadpigu_core.gradients.engine import clipped_sum
from adadpigu_core.gradients.guards import check_model, check_outputs, check_precision, check_rounding

__all__ = [
    "DEFAULTS",
    "PRECISIONS",
    "Augmentation",
    "ClippedSum",
    "GradientOptions",
    "Loss",
    "check_model",
    "check_outputs",
    "check_precision",
    "check_rounding",
    "clipped_sum",
    "cross_entropy",
]
