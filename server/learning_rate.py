"""A learning rate from the plan alone: what clients declare says how noisy the run is, before it has begun.

Over T steps at rate r with momentum m the noise moves the weights by a random walk whose expected length is

    r / (1 - m) * sqrt(T d) * (standard deviation of the mean gradient's noise)

for d parameters. Rates that were found by search, from epsilon 1 to 8, for 2,000 to 26,000 parameters, one client or
ten, made this length about the same, between 6 and 12, although the rates themselves differed by a factor of twelve. So
the length is fixed here and gives the rate. Where there is next to no noise it would be too large: a step then moves by
the clipping norm, and r C / (1 - m) is bounded as well.

Everything is post-processing of public facts. Left out: schedules, and what depends on the curvature of the loss.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from adadpigu_core.configuration import Configuration
from adadpigu_core.weights import noise_of_mean, public_weight

_LENGTH = 8.0
_LARGEST_STEP = 6.0


class Declared(Protocol):
    """What a client has declared of itself."""

    @property
    def num_records(self) -> int:
        """How many records it has."""
        ...

    @property
    def training_noise_multiplier(self) -> float:
        """Of its steps."""
        ...


def automatic(configuration: Configuration, clients: Sequence[Declared], num_parameters: int) -> float:
    """Rate of a client's private steps that fits the noise, the momentum and the number of steps of a run.

    Args:
        configuration: Of the run.
        clients: What those who take part have declared; at least one.
        num_parameters: d.
    """
    privacy, federation, optimiser = configuration.privacy, configuration.federation, configuration.optimiser
    weights, noise = [], []
    for client in clients:
        multiplier, probability = client.training_noise_multiplier, privacy.sampling_probability
        weights.append(
            public_weight(
                federation.aggregation,
                num_records=client.num_records,
                noise_multiplier=multiplier,
                sampling_probability=probability,
            )
        )
        noise.append(multiplier * privacy.clipping_norm / (probability * client.num_records))
    amplified = optimiser.server_learning_rate / (1 - (optimiser.momentum if optimiser.name == "sgd" else 0.0))
    steps = federation.num_rounds * federation.local_steps
    walk = math.sqrt(steps * num_parameters) * noise_of_mean(weights, noise)
    bounds = [_LARGEST_STEP / (privacy.clipping_norm * federation.local_steps)]
    if walk > 0:
        bounds.append(_LENGTH / walk)
    return min(bounds) / amplified
