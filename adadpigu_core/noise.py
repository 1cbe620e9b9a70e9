"""The Gaussian mechanism on a sum of bounded vectors.

The noise is drawn and added in float64 and rounded to float32 once, at the end, so that the low bits of the sampler,
by which a floating-point Gaussian can be recognised (Mironov 2012), never leave the step.
"""

import torch
from torch import Tensor

from adadpigu_core.sampling import Randomness


def add_gaussian_noise(values: Tensor, noise_stddev: float, randomness: Randomness) -> Tensor:
    """Add independent noise N(0, noise_stddev^2) to every value.

    Args:
        values: Retained coordinates of a sum of clipped vectors, [k].
        noise_stddev: Noise multiplier times clipping norm; 0 adds nothing.
        randomness: Private source of the noise.

    Returns:
        Noisy values, float64 [k].
    """
    if not noise_stddev > 0:
        return values.double()
    noise = torch.from_numpy(randomness.normal(values.numel()))
    return noise.mul_(noise_stddev).add_(values)
