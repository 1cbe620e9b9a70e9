"""Putting released updates together with public weights.

A weight is a function of what a client declares, see ``adadpigu_core.weights``. A client that is absent changes the
weights and never the noise.

What a client declares also bounds what it can honestly release, ``largest_norm``: clipping bounds the signal, and noise
of a known size is hardly ever much longer than expected. Left out: everything else against clients that lie.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adadpigu_core.weights import public_weight

# Honest releases stay within their bound by this much: a declared number of records may be rounded, and the number of
# records drawn varies.
_SLACK = 10


@dataclass(frozen=True)
class Contribution:
    """The released update of one client.

    Args:
        update: Change of the retained weights, float32 [k].
        mask: Which coordinates these are, bool [d].
        weight: Public and positive.
        noise_stddev: Of the client's mean standardised gradient over the round, public.
    """

    update: Tensor
    mask: Tensor
    weight: float
    noise_stddev: float


def largest_norm(
    *, clipping_norm: float, sampling_probability: float, noise_stddev: float, num_retained: int, scale: float
) -> float:
    """Norm that one released gradient can reach before its mean is added: b (C n / B + ||noise||), with slack.

    Args:
        clipping_norm: C.
        sampling_probability: q = B / n.
        noise_stddev: Of each coordinate of the standardised gradient.
        num_retained: Number of coordinates with noise.
        scale: Largest gradient scale b.
    """
    return _SLACK * scale * (clipping_norm / sampling_probability + noise_stddev * (math.sqrt(num_retained) + 1))


@dataclass(frozen=True)
class Aggregate:
    """Weighted mean of updates.

    Args:
        update: float32 [d]; zero where nobody retained.
        mask: Coordinates that somebody retained, bool [d].
        noise_stddev: Of the mean standardised gradient behind each coordinate, float32 [d].
    """

    update: Tensor
    mask: Tensor
    noise_stddev: Tensor


def aggregate(contributions: Sequence[Contribution]) -> Aggregate:
    """Average every coordinate over the clients that retained it.

    Args:
        contributions: At least one.
    """
    d = contributions[0].mask.numel()
    total, weights, variance = (torch.zeros(d, dtype=torch.float64) for _ in range(3))
    for item in contributions:
        total[item.mask] += item.weight * item.update.double()
        weights[item.mask] += item.weight
        variance[item.mask] += (item.weight * item.noise_stddev) ** 2
    mask = weights > 0
    safe = torch.where(mask, weights, 1.0)
    return Aggregate((total / safe).float(), mask, (variance.sqrt() / safe).float())


__all__ = ["Aggregate", "Contribution", "aggregate", "largest_norm", "public_weight"]
