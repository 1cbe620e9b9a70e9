"""What a server learns from a round: weights, statistics of releases, signal and noise. Post-processing, all of it."""

import logging
from collections.abc import Sequence

from torch import Tensor

from adadpigu_core.accounting import TRAINING
from adadpigu_core.configuration import Configuration
from server.aggregation import Contribution, aggregate
from server.state import ServerState

log = logging.getLogger("adadpigu.server")


def learn(
    state: ServerState,
    contributions: Sequence[Contribution],
    scale: Tensor,
    configuration: Configuration,
    *,
    phase: str,
    round_number: int,
    statistics: bool,
) -> bool:
    """Move the weights, and learn from the releases that moved them.

    Args:
        state: Of the run; changed in place.
        contributions: Of the round, at least one.
        scale: Gradient scale under which they were released, [d].
        configuration: All settings.
        phase: Of the round.
        round_number: From 1.
        statistics: Whether the server keeps gradient statistics.

    Returns:
        Whether the weights moved. Nothing is learnt from a step that leads beyond all numbers.
    """
    combined = aggregate(contributions)
    steps, rate = configuration.federation.local_steps, state.learning_rate
    gradient, noise_stddev = -combined.update / (rate * steps), combined.noise_stddev * scale
    update, shrinkage = combined.update, state.shrinkage
    if phase == TRAINING:
        shrinkage = shrinkage.updated(gradient, noise_stddev, combined.mask)
        update = update * shrinkage.factors(combined.mask)
    if not state.optimiser.step(update, combined.mask, round_number):
        log.warning("round %d: the step leads beyond all numbers; the model stays as it is", round_number)
        return False
    state.shrinkage = shrinkage
    if phase == TRAINING and statistics:
        state.statistics = state.statistics.updated(gradient, noise_stddev, combined.mask)
    return True
