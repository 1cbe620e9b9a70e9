"""A learning rate from the plan alone: what clients declare says how noisy the run is, before it has begun.

Over T steps at rate r with momentum m the noise moves the weights by a random walk whose expected length is

    r / (1 - m) * sqrt(T d) * (standard deviation of the mean gradient's noise)

for d parameters. Rates that were found by search, from epsilon 1 to 8, for 2,000 to 26,000 parameters, one client or
ten, made this length about the same, between 6 and 12, although the rates themselves differed by a factor of twelve.
So the length is fixed here and gives the rate. Where most inputs are zero, as in bags of words, most of that walk
reaches no output, and such a rate is ten times too small. How far outputs move when every weight moves by noise of
unit variance is measured on public test records, and the rate may rise until the walk moves them by 1: rates found by
search moved them by 0.4 to 2.5. Where there is next to no noise both would be too large: a step then moves by the
clipping norm, and r C / (1 - m) is bounded as well: by 6, or where outputs hardly follow the weights, by 20 over their
gain, which is at most 20.

Everything is post-processing of public facts. Left out: what depends on the curvature of the loss, and rates that fall
during training, which lost accuracy wherever they were tried (simulations/LOG.md).
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from adadpigu_core.configuration import Configuration
from adadpigu_core.parameters import assign, flatten
from adadpigu_core.weights import noise_of_mean, public_weight
from server.optimiser import momentum_of

_LENGTH = 8.0
_OUTPUTS = 1.0
_LARGEST_STEP, _LARGEST_OUTPUTS = 6.0, 20.0
# How outputs are probed: so many records, and weights moved so far, so many times.
_PROBED, _NUDGE, _NUDGES = 500, 1e-3, 8


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


def output_gain(model: nn.Module, features: Tensor) -> float:
    """How far noise of unit variance on every weight moves an output, root mean square, to first order.

    Args:
        model: At its first weights, where it is left.
        features: Of public records, [n, ...]; the first 500 are used.

    Returns:
        The gain; what moves all outputs of a record alike does not count, since it changes no class.
    """
    weights, noise = flatten(model), torch.Generator().manual_seed(0)
    features, training = features[:_PROBED], model.training
    model.eval()
    with torch.no_grad():
        before, squares = model(features), []
        for _ in range(_NUDGES):
            assign(model, weights + _NUDGE * torch.randn(len(weights), generator=noise))
            moved = (model(features) - before) / _NUDGE
            squares.append(float((moved - moved.mean(dim=1, keepdim=True)).double().square().mean()))
    assign(model, weights)
    model.train(training)
    return math.sqrt(sum(squares) / _NUDGES)


def automatic(configuration: Configuration, clients: Sequence[Declared], num_parameters: int, gain: float) -> float:
    """Rate of a client's private steps that fits the noise, the momentum and the number of steps of a run.

    Args:
        configuration: Of the run.
        clients: What those who take part have declared; at least one.
        num_parameters: d.
        gain: Of the outputs, as ``output_gain`` measures it.
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
    momentum = momentum_of(configuration) if optimiser.name == "sgd" else 0.0
    # how far a unit of movement has carried the weights by the end, begun in the last round, the one before, ...
    carried = [(1 - momentum**rounds) / (1 - momentum) for rounds in range(1, federation.num_rounds + 1)]
    walk = math.sqrt(federation.local_steps) * math.hypot(*carried) * noise_of_mean(weights, noise)
    in_outputs = 1 / gain if gain > 0 else 0.0
    step = max(_LARGEST_STEP, _LARGEST_OUTPUTS * min(1.0, in_outputs))
    largest = step / (privacy.clipping_norm * federation.local_steps * carried[-1])
    if walk > 0:
        wanted = max(_LENGTH / math.sqrt(num_parameters), _OUTPUTS * in_outputs)
        largest = min(largest, wanted / walk)
    return largest / optimiser.server_learning_rate
