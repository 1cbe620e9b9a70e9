"""One private step: the only place where anything that depends on records comes out.

The formula, for records drawn by Poisson sampling with probability q, and B = q n:

    u_i  = m (g_i - a) / b
    S    = sum_i u_i min(1, C / ||u_i||)
    ghat = m (a + b (S + N(0, (sigma C)^2)) / B)

The event is charged before the noise is drawn, by a function that the caller hands in and that raises when it refuses;
release, new statistics and event then come out of one call, so that no release can exist without its event.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from adadpigu_core.accounting import Event
from adadpigu_core.adaptive_clipping import Standardisation, Statistics
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.gradients import DEFAULTS, Augmentation, GradientOptions, Loss, clipped_sum
from adadpigu_core.noise import add_gaussian_noise
from adadpigu_core.sampling import Randomness, poisson_sample, seeded

_FAILURES = (Exception, SystemExit)  # what a model may raise
Charge = Callable[[Event], None]


@dataclass(frozen=True)
class Mechanism:
    """The public numbers of a private step.

    Args:
        phase: ``pretraining`` or ``training``.
        clipping_norm: C, positive; infinite only without noise.
        noise_multiplier: sigma, at least 0; 0 gives no privacy.
        sampling_probability: q in (0, 1].
        num_records: Declared number of records n, at least 1.
    """

    phase: str
    clipping_norm: float
    noise_multiplier: float
    sampling_probability: float
    num_records: int

    def __post_init__(self) -> None:
        if not self.clipping_norm > 0 or (math.isinf(self.clipping_norm) and self.noise_multiplier > 0):
            raise ConfigurationError(f"clipping_norm: must be positive and finite, got {self.clipping_norm}")
        if self.num_records < 1:
            raise ConfigurationError(f"num_records: must be at least 1, got {self.num_records}")
        _ = self.event  # the event checks the other numbers

    @property
    def event(self) -> Event:
        """What one step costs."""
        return Event(self.phase, self.noise_multiplier, self.sampling_probability)

    @property
    def expected_batch_size(self) -> float:
        """B = q n; the drawn number is private and never used."""
        return self.sampling_probability * self.num_records

    @property
    def sum_noise_stddev(self) -> float:
        """Standard deviation of the noise on the clipped sum."""
        return self.noise_multiplier * self.clipping_norm if self.noise_multiplier > 0 else 0.0

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on the standardised mean gradient."""
        return self.sum_noise_stddev / self.expected_batch_size


@dataclass(frozen=True, eq=False)
class Release:
    """What a private step lets out.

    Args:
        gradient: Noisy mean gradient ghat, float32 [d], exactly zero where the mask is False.
        standardisation: Under which the noise was added.
        standardised_noise_stddev: Standard deviation of the noise on the standardised mean gradient.
    """

    gradient: Tensor
    standardisation: Standardisation
    standardised_noise_stddev: float

    @cached_property
    def noise_stddev(self) -> Tensor:
        """Known standard deviation of the noise in the gradient, float32 [d], zero where the mask is False."""
        given = self.standardisation
        return torch.where(given.mask, given.scale.double() * self.standardised_noise_stddev, 0.0).float()


def private_step(
    model: nn.Module,
    loss: Loss,
    records: Records,
    mechanism: Mechanism,
    mask: Tensor,
    statistics: Statistics,
    randomness: Randomness,
    charge: Charge,
    options: GradientOptions = DEFAULTS,
    augmentation: Augmentation | None = None,
    failed: Callable[[BaseException], None] | None = None,
) -> tuple[Release, Statistics, Event]:
    """Draw, clip, charge, noise and release once.

    Privacy:
        The release satisfies record-level add-or-remove-one privacy as the event states it, for any model, mask and
        statistics that do not depend on these records other than through earlier releases. ``randomness`` must be
        unknown to whoever sees the release.

    Args:
        model: Current weights; not changed.
        loss: Loss of one record.
        records: All records of the data set.
        mechanism: Clipping, noise and sampling.
        mask: Retained coordinates, bool [d].
        statistics: Gradient mean and scale.
        randomness: Source of the sample and the noise.
        charge: Called with the event before any noise is drawn; raises to refuse.
        options: How gradients are computed.
        augmentation: Random views of a record, drawn from ``randomness``.
        failed: Told if the model fails on drawn records. Those on which it does count as zero, and no others, so that a
            record still moves the sum by C at most and that it failed shows nowhere. None: the error is raised.

    Returns:
        The release, the statistics that have learnt from it, and the event.
    """
    standardisation = statistics.standardisation(mask)
    drawn = records.select(torch.from_numpy(poisson_sample(len(records), mechanism.sampling_probability, randomness)))
    with seeded(randomness.torch_seed(), next(model.parameters()).device):
        norm = mechanism.clipping_norm

        def sum_of(some: Records) -> Tensor:
            found = clipped_sum(model, loss, some, standardisation, norm, options=options, augmentation=augmentation)
            return found.total

        try:
            total = sum_of(drawn)
        except _FAILURES:
            if failed is None:
                raise
            sum_of(drawn.select([]))  # what fails without any record fails for all alike, and is no secret
            total = _by_halves(sum_of, drawn, failed, standardisation)
    charge(mechanism.event)
    release = _release(total, standardisation, mechanism, randomness)
    if statistics.learn:
        statistics = statistics.updated(release.gradient, release.noise_stddev, mask)
    return release, statistics, mechanism.event


def _by_halves(
    sum_of: Callable[[Records], Tensor], some: Records, failed: Callable[[BaseException], None], given: Standardisation
) -> Tensor:
    """Sum over the records on which a model does not fail, which are found by halves."""
    try:
        return sum_of(some)
    except _FAILURES as error:
        if len(some) <= 1:
            failed(error)
            return torch.zeros_like(given.scale)
    middle = len(some) // 2
    halves = (some.select(list(range(middle))), some.select(list(range(middle, len(some)))))
    first, second = (_by_halves(sum_of, half, failed, given) for half in halves)
    return first + second


def _release(total: Tensor, given: Standardisation, mechanism: Mechanism, randomness: Randomness) -> Release:
    """Add the noise and map back, in place and inside the cache; frozen coordinates may have any mean and scale."""
    for part, retained in given.pieces():
        noisy = add_gaussian_noise(total[part].double(), retained, mechanism.sum_noise_stddev, randomness)
        noisy.mul_(given.scale_of(part) / mechanism.expected_batch_size)
        if given.centred:
            noisy.index_add_(0, retained, given.mean[part].index_select(0, retained).double())
        total[part].copy_(noisy)
    return Release(total, given, mechanism.noise_stddev)
