"""One round on one client: some private steps, and what they add up to.

Between the steps the client moves its own copy of the weights along the released gradients. The update is the sum of
these moves and the importance a mean of scores of the released gradients, so both are post-processing of releases.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adadpigu_core.adaptive_clipping import Standardisation, Statistics
from adadpigu_core.datasets import Records
from adadpigu_core.gradients import DEFAULTS, Augmentation, GradientOptions, Loss
from adadpigu_core.importance import importance_of
from adadpigu_core.parameters import descend, flatten
from adadpigu_core.private_step import Charge, Mechanism, private_step
from adadpigu_core.sampling import Randomness


@dataclass(frozen=True)
class LocalUpdate:
    """What one client contributes to one round.

    Args:
        update: Change of the weights, float32 [d], zero where the mask is False.
        importance: Mean score of the released gradients, float32 [d]; None if none was asked for.
        statistics: Statistics after the round.
    """

    update: Tensor
    importance: Tensor | None
    statistics: Statistics


def train_round(
    model: nn.Module,
    loss: Loss,
    records: Records,
    mechanism: Mechanism,
    mask: Tensor,
    statistics: Statistics,
    randomness: Randomness,
    charge: Charge,
    *,
    steps: int,
    learning_rate: float,
    importance_measure: str | None = None,
    guard: Callable[[Standardisation], None] | None = None,
    options: GradientOptions = DEFAULTS,
    augmentation: Augmentation | None = None,
    failed: Callable[[BaseException], None] | None = None,
) -> LocalUpdate:
    """Take private steps from the weights that the model holds; the model is left at the new weights.

    Args:
        model: Starts at the weights of the round.
        loss: Loss of one record.
        records: All records of the client.
        mechanism: The same for all steps.
        mask: Retained coordinates, bool [d].
        statistics: Gradient mean and scale at the start.
        randomness: Private.
        charge: Called once a step, before it releases.
        steps: How many, at least 1.
        learning_rate: Of the local moves.
        importance_measure: Score to accumulate, if any.
        guard: Looks at the weights in ``model`` and at mask, mean and scale before every step, and raises to stop: a
            large learning rate can lead to weights that nobody would have accepted.
        options: How gradients are computed.
        augmentation: Random views of a record.
        failed: Told if gradients of drawn records cannot be computed, see `private_step`.
    """
    start = flatten(model).cpu()
    importance = torch.zeros_like(start) if importance_measure else None
    for _ in range(steps):
        if guard is not None:
            guard(statistics.standardisation(mask))
        release, statistics, _event = private_step(
            model, loss, records, mechanism, mask, statistics, randomness, charge, options, augmentation, failed
        )
        descend(model, release.gradient, learning_rate)
        if importance is not None and importance_measure:
            importance += importance_of(release.gradient, release.noise_stddev, importance_measure) / steps
    return LocalUpdate(flatten(model).cpu() - start, importance, statistics)
