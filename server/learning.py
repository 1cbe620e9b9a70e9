"""What a server learns from a round: weights, statistics of releases, signal and noise. Post-processing, all of it.

Of rounds in both phases, what pulls one way in each coordinate is added up as gradients, update / -(rate * steps), so
that whatever rate and steps were, they have one unit; the ranking can be made anew from that. The noise that is taken
off is the server's to know: where clients keep statistics of their own, it counts as if their scale were 1.
"""

import logging
from collections.abc import Sequence

from torch import Tensor

from adadpigu_core.accounting import TRAINING
from adadpigu_core.configuration import Configuration
from server.aggregation import Contribution, aggregate
from server.schedule import Schedule
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
    update, shrinkage, drift = combined.update, state.shrinkage, state.drift
    if configuration.retention.rerank_every:
        drift = drift.updated(gradient, noise_stddev, combined.mask)
    if phase == TRAINING:
        shrinkage = shrinkage.updated(gradient, noise_stddev, combined.mask)
        update = update * shrinkage.factors(combined.mask)
    if not state.optimiser.step(update, combined.mask, round_number):
        log.warning("round %d: the step leads beyond all numbers; the model stays as it is", round_number)
        return False
    state.shrinkage, state.drift = shrinkage, drift
    if phase == TRAINING and statistics:
        state.statistics = state.statistics.updated(gradient, noise_stddev, combined.mask)
    return True


def rerank(state: ServerState, schedule: Schedule, round_number: int) -> None:
    """Rank the coordinates anew before a round, if it is time and anything was released by then.

    A coordinate that was left out keeps what was known of it, and its weight. Of two that look alike, the one that was
    released in fewer rounds comes first, so that none is left out for ever by the noise of a few rounds.
    """
    if schedule.reranks(round_number) and bool(state.drift.known.any()):
        state.importance.rerank(state.drift.upper_bound(state.importance.group))
