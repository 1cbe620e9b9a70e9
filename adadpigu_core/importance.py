"""Importance of coordinates, from released gradients only.

During pretraining every step releases a noisy mean gradient ghat. Three scores can be accumulated from it:

* ``magnitude``, the paper's: the mean of |ghat_j| (arXiv 2507.06525, section IV);
* ``energy``: the mean of ghat_j^2 minus the variance of the noise, an unbiased estimate of the squared signal.

* ``drift``: the square of the sum of all releases, put together before it is squared, so that noise averages out over
  clients and rounds alike and only what pulls one way round after round is seen. Its energy has 1 / (rounds clients) of
  the noise of one release's; a mean of energies has one over the root of that.

The first two are scores of one release, which a client computes and sends; ``drift`` is made of the updates themselves,
by whoever adds them up. Importance is a function of released values and costs no privacy. What clients send is added up
with public weights, so that their independent noise averages out, and ranked once; whether the coordinates are ranked
anew during training, by the drift of all releases, is for the server to decide.
"""

import torch
from torch import Tensor

from adadpigu_core.exceptions import ConfigurationError

MEASURES = ("magnitude", "energy")
DRIFT = "drift"


def importance_of(released_gradient: Tensor, noise_stddev: Tensor | float, measure: str) -> Tensor:
    """Score one released gradient.

    Args:
        released_gradient: Noisy mean gradient, [d].
        noise_stddev: Standard deviation of the noise in it, [d] or one number, same unit.
        measure: ``magnitude`` or ``energy``.

    Returns:
        Scores [d]; an energy may be negative where noise dominates.

    Raises:
        ConfigurationError: For an unknown measure.
    """
    if measure == "magnitude":
        return released_gradient.abs()
    if measure == "energy":
        return released_gradient.square() - noise_stddev**2
    raise ConfigurationError(f"importance.measure: unknown value {measure!r}; use one of {', '.join(MEASURES)}")


def rank(importance: Tensor) -> Tensor:
    """Order the coordinates from most to least important; ties keep index order.

    Returns:
        Permutation of coordinate indices, int64 [d].
    """
    return torch.argsort(importance, descending=True, stable=True)
