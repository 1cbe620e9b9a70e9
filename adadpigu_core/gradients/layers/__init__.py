"""Rules for the layers that torch has; importing this package registers them."""

from adadpigu_core.gradients.layers import (
    attention,
    convolution,
    elementwise,
    embedding,
    linear,
    normalisation,
    recurrent,
)

__all__ = ["attention", "convolution", "elementwise", "embedding", "linear", "normalisation", "recurrent"]
