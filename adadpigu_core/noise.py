"""The Gaussian mechanism on a sum of bounded vectors.

The noise is drawn and added in float64 and rounded to float32 once, at the end, so that the low bits of the sampler,
by which a floating-point Gaussian can be recognised (Mironov 2012), never leave the step.
"""

import torch
from torch import Tensor

from adadpigu_core.sampling import Randomness


def add_gaussian_noise(total: Tensor, noise_stddev: float, mask: Tensor, randomness: Randomness) -> Tensor:
    """Add independent noise N(0, noise_stddev^2) to every retained coordinate.

    Args:
        total: Sum of clipped vectors, [d]; zero wherever the mask is False.
        noise_stddev: Noise multiplier times clipping norm; 0 adds nothing.
        mask: Retained coordinates, bool [d].
        randomness: Private source of the noise.

    Returns:
        Noisy sum, float64 [d], exactly zero on coordinates that are not retained.
    """
    noisy = torch.zeros(total.shape, dtype=torch.float64)
    retained = total[mask].double().cpu()
    if noise_stddev > 0:
        retained = retained + noise_stddev * torch.from_numpy(randomness.normal(retained.numel()))
    noisy[mask.cpu()] = retained
    return noisy
