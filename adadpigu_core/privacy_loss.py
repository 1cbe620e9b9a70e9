"""Events and epsilon: what releases cost, through dp_accounting.

An ``Event`` says what one kind of private step did and how often. The guarantee is record-level, add-or-remove-one;
``epsilon`` composes any events with privacy loss distributions (PLD), whose discretisation errs on the safe side.

Left out: amplification by shuffling, by a secret choice of clients, or by anything else than Poisson sampling.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from adadpigu_core.exceptions import ConfigurationError

if TYPE_CHECKING:
    import dp_accounting

PRETRAINING = "pretraining"
TRAINING = "training"
PHASES = (PRETRAINING, TRAINING)

# dp_accounting spreads each privacy loss over the neighbouring points of a grid, which never under-states epsilon. The
# grid is a share of the loss's standard deviation, so that epsilon is over-stated by about this much, be the steps many
# or few, noisy or not. A fixed grid of 1e-3 would double epsilon for 10,000 steps of noise 40 at sampling 0.01.
_OVERSTATEMENT = 1e-3
_COARSEST_GRID = 1e-2
_FINEST_GRID = 1e-6  # below this, dp_accounting's differences of probabilities lose their digits
_MOST_POINTS = 2e4  # of one step, to bound the time; only extreme events reach it, and pay with a coarser grid

# A distribution that is composed n times by Fourier transforms has rounding errors in proportion to n, of either sign.
# This much a step is taken off delta; observed are errors of up to 6e-18 a step.
ROUNDING = 1e-16

_MOST_BY_POWERS = 32

_WORK_OF_A_KIND = 2e3

# Beyond these the accounting is slow and the privacy void, so that epsilon counts as infinite. Noise ends where float64
# does, at 10.3 standard deviations; with less than this the end would be seen more often than once in 10^11 numbers. At
# delta 1e-5 a single such release has epsilon 19 without sampling; the largest variance of the loss means thousands.
LEAST_NOISE_MULTIPLIER = 0.3
_LARGEST_LOSS_VARIANCE = 1e4
MOST_COMPOSED = 10**6


@dataclass(frozen=True, order=True)
class Event:
    """So many Poisson-sampled Gaussian releases.

    Privacy:
        Only for Poisson sampling, a fresh coin flip for each record at each release. Batches of fixed size, shuffled
        or not, are not amplified: they are events with sampling probability 1.

    Args:
        phase: ``pretraining`` or ``training``; no meaning for the guarantee.
        noise_multiplier: Noise standard deviation over clipping norm; less than 0.3 counts as no privacy at all.
        sampling_probability: In (0, 1].
        count: How many releases of this kind.
    """

    phase: str
    noise_multiplier: float
    sampling_probability: float
    count: int = 1

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ConfigurationError(f"event.phase: unknown value {self.phase!r}; use one of {PHASES}")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ConfigurationError(
                f"event.noise_multiplier: must be finite and at least 0, got {self.noise_multiplier}"
            )
        if not 0 < self.sampling_probability <= 1:
            raise ConfigurationError(f"event.sampling_probability: must be in (0, 1], got {self.sampling_probability}")
        if not isinstance(self.count, int) or self.count < 0:
            raise ConfigurationError(f"event.count: must be a whole number and at least 0, got {self.count}")

    def dp_event(self) -> "dp_accounting.DpEvent":
        """Translate to dp_accounting's terms."""
        import dp_accounting  # noqa: PLC0415 - imports all of SciPy

        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(self.sampling_probability, gaussian)
        return dp_accounting.SelfComposedDpEvent(sampled, self.count)

    def loss_variance(self) -> float:
        """Roughly the variance of the total privacy loss, for a noise multiplier of at least 0.3.

        For nearly Gaussian losses this is the Renyi divergence of order 2, log(1 + q^2 (exp(1 / sigma^2) - 1)). Where
        rare large losses dominate that, twice the Kullback-Leibler divergence, at most q / sigma^2, is the better size.
        """
        inverse_square = self.noise_multiplier**-2
        renyi_divergence = math.log1p(self.sampling_probability**2 * math.expm1(inverse_square))
        return self.count * min(renyi_divergence, self.sampling_probability * inverse_square)

    def largest_loss(self) -> float:
        """Roughly the largest privacy loss of one release that has any probability to speak of."""
        return 0.5 / self.noise_multiplier**2 + 10 / self.noise_multiplier + math.log(self.sampling_probability)


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """Add up the counts of equal events; the result does not depend on their order."""
    counts: dict[tuple[str, float, float], int] = {}
    for event in events:
        key = (event.phase, event.noise_multiplier, event.sampling_probability)
        counts[key] = counts.get(key, 0) + event.count
    return tuple(sorted(Event(*key, count) for key, count in counts.items() if count))


def work(events: Sequence[Event]) -> float:
    """Roughly what ``epsilon`` costs, if nothing of it is known, in points of a loss's grid: some 10 us each."""
    grid = _grid(events)
    return sum(_WORK_OF_A_KIND + max(event.largest_loss() / grid, 0.0) for event in events)


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Epsilon of a composition at a delta, by PLD accounting: never too small, and too large by about 0.1 %.

    Privacy:
        Holds for noise, sampling and counts that are fixed in advance, as they are in a plan, which may be stopped at
        any time. Plans of later runs are treated as if they had been fixed in advance too.

    Args:
        events: In any order.
        delta: In (0, 1).

    Returns:
        0 for no events; infinity if any event has no noise, for more than a million releases, if epsilon would be in
        the thousands, or if delta is too small for double precision.

    Raises:
        ConfigurationError: If delta is out of range.
    """
    check_delta(delta, "delta")
    return _pld_epsilon(tuple(sorted((*key, count) for key, count in _counts(events).items())), delta)


def fits(events: Iterable[Event], target_epsilon: float, delta: float) -> bool:
    """Whether a composition stays within a target; an infinite target epsilon is no limit.

    Part of a composition that fits also fits, so that the rounds of a calibrated plan need no accounting of their own.

    Raises:
        ConfigurationError: If the target is out of range or not a number.
    """
    check_delta(delta, "delta")
    if not target_epsilon > 0:  # also refuses NaN, with which any comparison would be false
        raise ConfigurationError(f"target_epsilon: must be positive, got {target_epsilon}")
    wanted = _counts(events)
    safe = _safe.setdefault((target_epsilon, delta), [])
    if any(all(known.get(kind, 0) >= count for kind, count in wanted.items()) for known in safe):
        return True
    if not epsilon((Event(TRAINING, *kind, count) for kind, count in wanted.items()), delta) <= target_epsilon:
        return False
    safe.append(wanted)
    del safe[:-_MOST_SAFE]
    return True


# Compositions that are known to fit a target (epsilon, delta): facts about mathematics, not about any data set.
_safe: dict[tuple[float, float], list[dict[tuple[float, float], int]]] = {}
_MOST_SAFE = 64


def _counts(events: Iterable[Event]) -> dict[tuple[float, float], int]:
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.noise_multiplier, event.sampling_probability)
        counts[key] = counts.get(key, 0) + event.count
    return {key: count for key, count in counts.items() if count}


def check_delta(delta: float, name: str) -> None:
    """Refuse a delta that is none, under the name of its setting."""
    if not 0 < delta < 1:
        raise ConfigurationError(f"{name}: must be in (0, 1), got {delta}")


@lru_cache(maxsize=4096)
def _pld_epsilon(kinds: tuple[tuple[float, float, int], ...], delta: float) -> float:
    events = [Event(TRAINING, *kind) for kind in kinds]
    if not events:
        return 0.0
    certain_delta = delta - ROUNDING * sum(event.count for event in events)
    if certain_delta <= 0 or is_void(events):
        return math.inf
    grid = _grid(events)
    pieces = [_composed(*kind, grid) for kind in kinds]
    return _epsilon_of(reduce(lambda one, other: one.compose(other), pieces), certain_delta)


def is_void(events: Sequence[Event]) -> bool:
    """Whether a composition protects so little, or is so long, that its epsilon counts as infinite."""
    if sum(event.count for event in events) > MOST_COMPOSED:
        return True
    if min(event.noise_multiplier for event in events) < LEAST_NOISE_MULTIPLIER:
        return True
    return sum(event.loss_variance() for event in events) > _LARGEST_LOSS_VARIANCE


@lru_cache(maxsize=128)
def _composed(noise_multiplier: float, sampling_probability: float, count: int, grid: float) -> Any:
    """Loss distribution of equal releases. Kept, because from round to round hardly any part of a sum changes."""
    powers = _powers(noise_multiplier, sampling_probability, grid)
    if count > _MOST_BY_POWERS:
        return powers[0].self_compose(count)
    while len(powers) < count.bit_length():
        powers.append(powers[-1].compose(powers[-1]))
    needed = [power for bit, power in enumerate(powers) if count >> bit & 1]
    return reduce(lambda one, other: one.compose(other), needed)


@lru_cache(maxsize=32)
def _powers(noise_multiplier: float, sampling_probability: float, grid: float) -> list[Any]:
    """Loss distributions of 1, 2, 4, 8, ... releases, as far as they were needed yet.

    dp_accounting's own way to compose n equal releases looks for the bounds of the result first, which takes longer
    than to compose a few.
    """
    from dp_accounting.pld import privacy_loss_distribution  # noqa: PLC0415 - imports all of SciPy, and plans do without

    return [
        privacy_loss_distribution.from_gaussian_mechanism(
            noise_multiplier, value_discretization_interval=grid, sampling_prob=sampling_probability
        )
    ]


def _epsilon_of(losses: Any, delta: float) -> float:
    with np.errstate(over="ignore"):  # an epsilon above 700 may come out as infinite
        return float(losses.get_epsilon_for_delta(delta))


def _grid(events: Sequence[Event]) -> float:
    return loss_grid(events, _OVERSTATEMENT, _MOST_POINTS)


def loss_grid(events: Sequence[Event], overstatement: float, most_points: float) -> float:
    """Distance of the points to which privacy losses are rounded.

    Rounding to a grid of width h adds a variance of up to h^2 / 6 to each loss, and epsilon goes with the root of the
    total variance: with a mean variance of v, h^2 / (12 v) is the relative error of epsilon.

    Args:
        events: At least one.
        overstatement: Relative error of epsilon that is wanted.
        most_points: Of the loss of one step; matters more than the error.
    """
    total = sum(event.loss_variance() for event in events)
    mean = total / sum(event.count for event in events)
    wanted = min(math.sqrt(12 * overstatement * mean), _COARSEST_GRID)
    grid = max(wanted, max(event.largest_loss() for event in events) / most_points, _FINEST_GRID)
    # from a fixed list, so that distributions are of use to more than one composition; rounded to the finer side
    return max(float(2.0 ** (math.floor(2 * math.log2(grid)) / 2)), _FINEST_GRID)
