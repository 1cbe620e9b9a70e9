"""What every way of computing a clipped sum has in common: its arguments, its result, and the clipping factors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adadpigu_core.exceptions import ConfigurationError, ModelError

Loss = Callable[[Tensor, Tensor], Tensor]
"""Losses of records, [n], from their outputs [n, ...] and labels [n]."""

Augmentation = Callable[[Tensor], Tensor]
"""Random views of records: features [n, *shape] to [n, K, *shape], drawn with torch's default generator."""

PRECISIONS = ("float32", "bfloat16")

# Rounding must not let a record contribute more than the clipping norm: norms are enlarged by this much before they
# decide, which covers that a norm and the sum that it bounds come from different kernels.
_MARGIN = 4e-6
# Multiplied by less, output gradients may leave the normal numbers of float32, among which alone rounding is relative.
_LEAST_FACTOR = 2.0**-60


@dataclass(frozen=True)
class ClippedSum:
    """Sum over records of clipped standardised gradients: private, to be noised before anyone sees it.

    Args:
        total: Float32 [d], exactly zero where the mask is False.
        norms: Standardised norm of each record before clipping, float64 [n]; diagnostics, never released.
    """

    total: Tensor
    norms: Tensor


@dataclass(frozen=True)
class GradientOptions:
    """How gradients are computed; what they are does not depend on it, but for rounding.

    Args:
        memory_limit: Bytes that one physical batch may take; None = chosen for the device.
        precision: ``float32``, or ``bfloat16`` for the layers' own products. Norms and sums are always float32.

    Raises:
        ConfigurationError: A value is unknown or out of range.
    """

    memory_limit: int | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.memory_limit is not None and self.memory_limit < 1:
            raise ConfigurationError(f"memory_limit: must be at least 1 byte, got {self.memory_limit}")
        if self.precision not in PRECISIONS:
            raise ConfigurationError(f"precision: unknown value {self.precision!r}; use one of {PRECISIONS}")


DEFAULTS = GradientOptions()


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each record, [n], from logits [n, classes] and labels [n]."""
    return F.cross_entropy(outputs, labels, reduction="none")


def losses_of(loss: Loss, outputs: Tensor, labels: Tensor) -> Tensor:
    """Evaluate a loss, and refuse one that has added up its records.

    Raises:
        ModelError: The loss does not give one value for each record.
    """
    losses = loss(outputs, labels)
    if losses.shape != labels.shape:
        text = f"the loss gives {[*losses.shape]} for {len(labels)} records; it must give one value for each of them"
        raise ModelError(text, text)
    return losses


def clipping_factors(norms: Tensor, clipping_norm: float, slack: Tensor | float = 0.0) -> Tensor:
    """Factors min(1, C / ||u_i||), float32 [n], rounded down; zero for a norm that is not finite or 1e18 times C.

    Args:
        norms: Standardised norms, float64 [n].
        clipping_norm: C; may be infinite.
        slack: By how much a norm may be under-estimated, or its contribution over-estimated, at most.
    """
    factors = (clipping_norm / (norms * (1 + _MARGIN) + slack)).clamp(max=1.0)
    factors = torch.where(torch.isfinite(norms) & (factors >= _LEAST_FACTOR), factors, 0.0)
    rounded = factors.float()
    return torch.where(rounded > factors, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)
