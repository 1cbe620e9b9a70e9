"""The standardisation as the engine needs it: block by block, in float32, on the device of the model.

A block is a run of coordinates that is handled at once: a parameter, or some rows of one. With V = m / b,

    u = (g - a) V      and      ||u||^2 = sum_j V_j^2 (g_j - a_j)^2.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.exceptions import MessageError

# Beyond these, squares of standardised gradients leave the range of float32.
_SMALLEST_SCALE = 1e-12
_LARGEST_SCALE = 1e12


@dataclass(frozen=True)
class Block:
    """Standardisation of a run of coordinates.

    Args:
        inverse_scale: V = m / b, float32 of the block's shape; zero where the mask is False.
        mean: a, float32 of the same shape; None where it is zero.
    """

    inverse_scale: Tensor
    mean: Tensor | None

    @cached_property
    def weights(self) -> Tensor:
        """V^2."""
        return self.inverse_scale.square()

    @cached_property
    def weighted_mean(self) -> Tensor:
        """V^2 a; only where there is a mean."""
        assert self.mean is not None  # noqa: S101  # callers ask for it only then
        return self.weights * self.mean

    @cached_property
    def offset(self) -> Tensor:
        """Sum of V^2 a^2, a float64 number: the squared norm of a record without gradient."""
        if self.mean is None:
            return torch.zeros((), dtype=torch.float64, device=self.inverse_scale.device)
        return (self.inverse_scale * self.mean).double().square().sum()

    @cached_property
    def underflow(self) -> Tensor:
        """What a sum of V^2 y over 0 <= y <= 1 can lose to numbers too small for float32, a float64 number."""
        return self.weights.amax().double() * (self.weights.numel() * 2.0**-124)

    @cached_property
    def common_weight(self) -> float | None:
        """The one value of V^2, if there is only one and no mean; None otherwise, and on an accelerator."""
        if self.mean is not None or self.inverse_scale.device.type != "cpu":
            return None
        low, high = torch.aminmax(self.weights)
        return float(low) if bool(low == high) else None


@dataclass(frozen=True)
class Transform:
    """Standardisation of all coordinates.

    Args:
        inverse_scale: V = m / b, float32 [d].
        mean: a, float32 [d], zero where the mask is False; None if it is zero everywhere.
        retained: m, bool [d], on the CPU.
    """

    inverse_scale: Tensor
    mean: Tensor | None
    retained: Tensor

    @classmethod
    def of(cls, standardisation: Standardisation, device: torch.device) -> "Transform":
        """Prepare a standardisation.

        Raises:
            MessageError: A retained coordinate has a scale out of range, or a mean that is not finite.
        """
        mask = standardisation.mask
        inverse = mask / standardisation.scale
        # out of range, or not a number: only where the mask is False it may be anything
        inside = (inverse >= 1 / _LARGEST_SCALE) & (inverse <= 1 / _SMALLEST_SCALE)
        if not torch.equal(inside & mask, mask):
            text = f"gradient-scale: must lie between {_SMALLEST_SCALE:g} and {_LARGEST_SCALE:g} where retained"
            raise MessageError(text, text)
        inverse = torch.where(mask, inverse, 0.0)
        mean = None
        if standardisation.mean.any():
            mean = torch.where(mask, standardisation.mean, 0.0)
            if not bool(torch.isfinite((inverse * mean).double().square().sum())):
                text = "gradient-mean: must be finite where retained"
                raise MessageError(text, text)
        return cls(inverse.to(device), None if mean is None else mean.to(device), mask)

    @cached_property
    def standardised_mean(self) -> Tensor | None:
        """A V, float32 [d]; None if it is zero."""
        return None if self.mean is None else self.mean * self.inverse_scale

    def block(self, start: int, shape: tuple[int, ...]) -> Block:
        """View a run of coordinates in the shape of a parameter."""
        stop = start + torch.Size(shape).numel()
        return Block(
            self.inverse_scale[start:stop].view(shape), None if self.mean is None else self.mean[start:stop].view(shape)
        )

    def retains(self, start: int, size: int) -> bool:
        """Whether any coordinate of a run is retained."""
        return bool(self.retained[start : start + size].any())
