"""Sums of clipped per-record gradients, behind one function."""

from adadpigu_core.gradients.clipping import Augmentation, ClippedSum, GradientOptions, Loss, cross_entropy
from adadpigu_core.gradients.engine import clipped_sum
from adadpigu_core.gradients.rounding import check_rounding

__all__ = [
    "Augmentation",
    "ClippedSum",
    "GradientOptions",
    "Loss",
    "check_rounding",
    "clipped_sum",
    "cross_entropy",
]
