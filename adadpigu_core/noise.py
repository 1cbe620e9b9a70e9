"""The Gaussian mechanism on a sum of bounded vectors.

The noise is drawn and added in float64 and rounded to float32 once, at the end, so that the low bits of the sampler,
by which a floating-point Gaussian can be recognised (Mironov 2012), never leave the step.
"""

import torch
from torch import Tensor

from adadpigu_core.sampling import Randomness


def add_gaussian_noise(values: Tensor, retained: Tensor, noise_stddev: float, randomness: Randomness) -> Tensor:
    """Add independent noise N(0, noise_stddev^2) to the retained values, in place.

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
    return values
