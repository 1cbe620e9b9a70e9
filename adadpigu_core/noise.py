"""The Gaussian mechanism on a sum of bounded vectors.

The noise is drawn and added in float64. Its variates are floating-point numbers, of which there are few near zero and
far outside, so that their low bits would tell from which sum they were reached (Mironov 2012). So what is released is
rounded to a grid of 2^-16 of the noise, the same everywhere: to each of its points lead billions of variates.
"""

import math

import torch
from torch import Tensor

from adadpigu_core.sampling import Randomness

_GRID = 2.0**-16  # of the standard deviation, to whose square it adds 2e-11
_TO_WHOLE = 1.5 * 2.0**52  # added to a float64 and taken off again, it leaves a whole number


def add_gaussian_noise(values: Tensor, retained: Tensor, noise_stddev: float, randomness: Randomness) -> Tensor:
    """Add independent noise N(0, noise_stddev^2) to the retained values, in place, and round to a grid.

    Args:
        values: Part of a sum of clipped vectors, float64 [n].
        retained: Indices of the values that are released, int64 [k], each once.
        noise_stddev: Noise multiplier times clipping norm; 0 adds nothing.
        randomness: Private source of the noise.

    Returns:
        ``values``.
    """
    if noise_stddev > 0:
        values.index_add_(0, retained, torch.from_numpy(randomness.normal(len(retained))), alpha=noise_stddev)
        _, exponent = math.frexp(noise_stddev * _GRID)
        shift = math.ldexp(_TO_WHOLE, exponent - 1)
        values.add_(shift).sub_(shift)
    return values
