"""Sums of clipped per-record gradients, behind one function."""

from adadpigu_core.gradients.rounding import check_rounding
from adadpigu_core.gradients.simple import ClippedSum, Loss, clipped_sum

__all__ = ["ClippedSum", "Loss", "check_rounding", "clipped_sum"]
