"""The ranking that nobody can have: by gradients without noise, of all clients' records together.

It bounds what any ranking can bring, and is measured before a better ranking is looked for. It reads records that no
budget is charged for, so a run with it protects nobody. A simulation owns all records, which are public, and hands this
function to the server in the same process. There is no message by which a server could ask a client for it, and a
server that Flower starts refuses the setting.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adadpigu_core import datasets
from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.configuration import Configuration
from adadpigu_core.gradients import clipped_sum, cross_entropy
from adadpigu_core.importance import DRIFT, importance_of
from adadpigu_core.kept_features import public_features
from adadpigu_core.parameters import assign, flatten
from client.partitions import Deal, deal
from server.optimiser import momentum_of

_STEPS = 15


def oracle_scores(configuration: Configuration, model: nn.Module, rate: float) -> Tensor:
    """Score coordinates along some steps of training without noise on all records.

    Args:
        configuration: Of the run: data set, clipping norm and the measure of importance.
        model: At its first weights, where it is left.
        rate: Of a client's steps.

    Returns:
        Scores, float64 [d]. Not private.
    """
    data = datasets.evaluated_on(datasets.load(configuration.task.dataset), configuration.task.evaluate_on)
    records = public_features(configuration.task.features, data.train).select(_held(configuration, data))
    momentum, measure = momentum_of(configuration), configuration.pretraining.measure
    rate *= configuration.optimiser.server_learning_rate
    start = flatten(model)
    weights, velocity = start.clone(), torch.zeros_like(start)
    scores = torch.zeros(len(start), dtype=torch.float64)
    everything = Standardisation.identity(len(start))
    for _ in range(_STEPS):
        assign(model, weights)
        total = clipped_sum(model, cross_entropy, records, everything, configuration.privacy.clipping_norm).total
        gradient = total / len(records)
        scores += gradient.double() if measure == DRIFT else importance_of(gradient, 0.0, measure).double()
        velocity = momentum * velocity + gradient
        weights = weights - rate * velocity
    assign(model, start)
    return scores.square() if measure == DRIFT else scores


def _held(configuration: Configuration, data: datasets.DataSet) -> NDArray[np.int64]:
    """Which records the clients have; where they come from a list, that may be few of all."""
    federation = configuration.federation
    how = Deal(federation.partition, federation.dirichlet_alpha, federation.partition_seed, federation.clients)
    return np.sort(np.concatenate(deal(data.train.labels.numpy(), federation.num_clients, how)))
