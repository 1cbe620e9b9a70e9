"""Events, epsilon and calibration: every number about privacy comes from here, through dp_accounting.

An ``Event`` says what one kind of private step did and how often. The guarantee is record-level, add-or-remove-one;
``epsilon`` composes any events with privacy loss distributions (PLD), whose discretisation errs on the safe side.
``calibrate`` finds one noise multiplier per phase such that everything together, including what was spent before, meets
a target. Where it starts to look follows from a closed form; what it returns was checked with PLD accounting.

Left out: amplification by shuffling, by a secret choice of clients, or by anything else than Poisson sampling.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import dp_accounting
import numpy as np
from dp_accounting import pld

from adadpigu_core.exceptions import BudgetError, ConfigurationError

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
_ROUNDING = 1e-16

# Beyond these the accounting is slow and the privacy void, so that epsilon counts as infinite: at delta 1e-5, a single
# release at the least noise has epsilon 92 without sampling, and the largest variance of the loss means thousands.
_LEAST_NOISE_MULTIPLIER = 0.1
_LARGEST_LOSS_VARIANCE = 1e4
_MOST_STEPS = 10**6
# Calibration stops here, and adds more noise than the target needs.
_SMALLEST_NOISE_MULTIPLIER = 0.2
_LARGEST_NOISE_MULTIPLIER = 1e5
# Calibration is content when it leaves no more than this share of the remaining epsilon, or of the noise, on the table.
_EPSILON_TOLERANCE = 1e-3
_NOISE_TOLERANCE = 2e-4


@dataclass(frozen=True, order=True)
class Event:
    """So many Poisson-sampled Gaussian releases.

    Privacy:
        Only for Poisson sampling, a fresh coin flip for each record at each release. Batches of fixed size, shuffled
        or not, are not amplified: they are events with sampling probability 1.

    Args:
        phase: ``pretraining`` or ``training``; no meaning for the guarantee.
        noise_multiplier: Noise standard deviation over clipping norm; less than 0.1 counts as no privacy at all.
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

    def dp_event(self) -> dp_accounting.DpEvent:
        """Translate to dp_accounting's terms."""
        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(self.sampling_probability, gaussian)
        return dp_accounting.SelfComposedDpEvent(sampled, self.count)

    def loss_variance(self) -> float:
        """Roughly the variance of the total privacy loss, for a noise multiplier of at least 0.1.

        For nearly Gaussian losses this is the Renyi divergence of order 2, log(1 + q^2 (exp(1 / sigma^2) - 1)). Where
        rare large losses dominate that, twice the Kullback-Leibler divergence, at most q / sigma^2, is the better size.
        """
        inverse_square = self.noise_multiplier**-2
        renyi_divergence = math.log1p(self.sampling_probability**2 * math.expm1(inverse_square))
        return self.count * min(renyi_divergence, self.sampling_probability * inverse_square)


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """Add up the counts of equal events; the result does not depend on their order."""
    counts: dict[tuple[str, float, float], int] = {}
    for event in events:
        key = (event.phase, event.noise_multiplier, event.sampling_probability)
        counts[key] = counts.get(key, 0) + event.count
    return tuple(sorted(Event(*key, count) for key, count in counts.items() if count))


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
    _check_delta(delta, "delta")
    return _pld_epsilon(tuple(sorted((*key, count) for key, count in _counts(events).items())), delta)


def fits(events: Iterable[Event], target_epsilon: float, delta: float) -> bool:
    """Whether a composition stays within a target; an infinite target epsilon is no limit.

    Part of a composition that fits also fits, so that the rounds of a calibrated plan need no accounting of their own.

    Raises:
        ConfigurationError: If the target is out of range or not a number.
    """
    _check_delta(delta, "delta")
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


def _check_delta(delta: float, name: str) -> None:
    if not 0 < delta < 1:
        raise ConfigurationError(f"{name}: must be in (0, 1), got {delta}")


@lru_cache(maxsize=4096)
def _pld_epsilon(kinds: tuple[tuple[float, float, int], ...], delta: float) -> float:
    events = [Event(TRAINING, *kind) for kind in kinds]
    if not events:
        return 0.0
    steps = sum(event.count for event in events)
    certain_delta = delta - _ROUNDING * steps
    if certain_delta <= 0 or steps > _MOST_STEPS or min(kinds)[0] < _LEAST_NOISE_MULTIPLIER:
        return math.inf
    if sum(event.loss_variance() for event in events) > _LARGEST_LOSS_VARIANCE:
        return math.inf
    accountant = pld.PLDAccountant(value_discretization_interval=_grid(events))
    for event in events:
        accountant.compose(event.dp_event())
    with np.errstate(over="ignore"):  # an epsilon above 700 may come out as infinite
        return float(accountant.get_epsilon(certain_delta))


def _grid(events: Sequence[Event]) -> float:
    """Distance of the points to which privacy losses are rounded.

    Rounding to a grid of width h adds a variance of up to h^2 / 6 to each loss, and epsilon goes with the root of the
    total variance: with a mean variance of v, h^2 / (12 v) is the relative error of epsilon.
    """
    total = sum(event.loss_variance() for event in events)
    mean = total / sum(event.count for event in events)
    wanted = min(math.sqrt(12 * _OVERSTATEMENT * mean), _COARSEST_GRID)
    largest_loss = max(
        0.5 / event.noise_multiplier**2 + 10 / event.noise_multiplier + math.log(event.sampling_probability)
        for event in events
    )
    return max(wanted, largest_loss / _MOST_POINTS, _FINEST_GRID)


@dataclass(frozen=True)
class Plan:
    """What a client will release in one run.

    Args:
        pretraining: All pretraining steps of the run (count 0 if there are none).
        training: All training steps of the run.
    """

    pretraining: Event
    training: Event

    @property
    def events(self) -> tuple[Event, ...]:
        """The events of both phases."""
        return tuple(event for event in (self.pretraining, self.training) if event.count)

    def event(self, phase: str) -> Event:
        """The event of one phase."""
        return self.pretraining if phase == PRETRAINING else self.training


@dataclass(frozen=True)
class PlanShape:
    """A plan without its noise.

    Args:
        sampling_probability: Of both phases, in (0, 1].
        pretraining_steps: Number of private steps for importance.
        training_steps: Number of private steps under the mask.
        pretraining_share: Share of the budget, in terms of inverse noise variance, that pretraining takes; in (0, 1),
            without effect if either phase has no steps.
    """

    sampling_probability: float
    pretraining_steps: int
    training_steps: int
    pretraining_share: float

    @property
    def noise_ratio(self) -> float:
        """Noise multiplier of pretraining over that of training."""
        if not self.pretraining_steps or not self.training_steps:
            return 1.0
        # share = (T_p / s_p^2) / (T_p / s_p^2 + T_t / s_t^2), solved for s_p / s_t
        odds = (1 - self.pretraining_share) / self.pretraining_share
        return math.sqrt(odds * self.pretraining_steps / self.training_steps)

    def plan(self, noise_multiplier: float) -> Plan:
        """Fill in the noise: ``noise_multiplier`` for training, and what follows from the share for pretraining."""
        pretraining, training = _round_up(noise_multiplier * self.noise_ratio), _round_up(noise_multiplier)
        return Plan(
            Event(PRETRAINING, pretraining, self.sampling_probability, self.pretraining_steps),
            Event(TRAINING, training, self.sampling_probability, self.training_steps),
        )


def _round_up(noise_multiplier: float) -> float:
    """Round to four decimals, towards more noise, so that a printed noise multiplier is the one that was used."""
    return math.ceil(noise_multiplier * 1e4) / 1e4


def calibrate(shape: PlanShape, target_epsilon: float, target_delta: float, spent: Sequence[Event] = ()) -> Plan:
    """Find the smallest noise with which a plan, after what was spent before, meets a target.

    Privacy:
        epsilon(spent + plan, target_delta) <= target_epsilon, checked on the plan that is returned.

    Args:
        shape: Steps, sampling probability and phase split.
        target_epsilon: Budget over everything, before and in this plan.
        target_delta: In (0, 1).
        spent: Events of the past on the same data set.

    Raises:
        BudgetError: If the past alone has used up the target, or no amount of noise is enough.
        ConfigurationError: For values out of range.
    """
    _check_target(shape, target_epsilon, target_delta, spent)
    plan = _calibrate(shape, target_epsilon, target_delta, merge(spent))
    if not fits((*spent, *plan.events), target_epsilon, target_delta):  # never seen; worth knowing if it happens
        raise BudgetError(f"calibration failed: {plan} does not meet epsilon {target_epsilon}")
    return plan


def _check_target(shape: PlanShape, target_epsilon: float, target_delta: float, spent: Sequence[Event]) -> None:
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ConfigurationError(f"target_epsilon: must be positive and finite, got {target_epsilon}")
    _check_delta(target_delta, "target_delta")
    if not 0 < shape.sampling_probability <= 1:
        raise ConfigurationError(f"sampling_probability: must be in (0, 1], got {shape.sampling_probability}")
    if not isinstance(shape.pretraining_steps, int) or shape.pretraining_steps < 0:
        raise ConfigurationError(f"pretraining_steps: must be a number from 0, got {shape.pretraining_steps}")
    if not isinstance(shape.training_steps, int) or shape.training_steps < 1:
        raise ConfigurationError(f"training_steps: must be a number from 1, got {shape.training_steps}")
    if shape.pretraining_steps and not 1e-6 <= shape.pretraining_share <= 1 - 1e-6:
        raise ConfigurationError(f"pretraining_share: must be in (0, 1), got {shape.pretraining_share}")
    steps = shape.pretraining_steps + shape.training_steps + sum(event.count for event in spent)
    if steps > _MOST_STEPS:
        raise ConfigurationError(f"training_steps: with all others these are {steps} steps, more than {_MOST_STEPS}")
    if _ROUNDING * steps >= target_delta:
        raise ConfigurationError(
            f"target_delta: {target_delta} cannot be certified over {steps} steps; it is too small"
        )


@lru_cache(maxsize=1024)
def _calibrate(shape: PlanShape, target_epsilon: float, target_delta: float, spent: tuple[Event, ...]) -> Plan:
    used = epsilon(spent, target_delta)
    if used >= target_epsilon:
        text = (
            f"the privacy budget of this data set is spent: epsilon {used:.4f} of {target_epsilon:g} "
            f"at delta {target_delta:g}; nothing is left to train with"
        )
        raise BudgetError(text, text)

    def total(noise_multiplier: float) -> float:
        return epsilon((*spent, *shape.plan(noise_multiplier).events), target_delta)

    smallest = _SMALLEST_NOISE_MULTIPLIER / min(1.0, shape.noise_ratio)
    start = _first_guess(shape, target_epsilon, target_delta, spent, smallest)
    noise_multiplier = _search(total, used, target_epsilon, start, smallest)
    if noise_multiplier is None:
        text = (
            f"too little of the privacy budget is left: epsilon {used:.4f} of {target_epsilon:g} at delta "
            f"{target_delta:g} is spent, and no amount of noise fits these steps into the rest"
        )
        raise BudgetError(text, text)
    return shape.plan(noise_multiplier)


def _first_guess(
    shape: PlanShape, target_epsilon: float, target_delta: float, spent: Sequence[Event], smallest: float
) -> float:
    """Noise multiplier at which the loss varies as much as that of a Gaussian mechanism that about meets the target."""
    log_delta = 2 * math.log(1 / target_delta)
    wanted = (math.sqrt(log_delta + 2 * target_epsilon) - math.sqrt(log_delta)) ** 2
    noise_multiplier = smallest
    while noise_multiplier < _LARGEST_NOISE_MULTIPLIER:
        events = (*spent, *shape.plan(noise_multiplier).events)
        if sum(event.loss_variance() for event in events) <= wanted:
            return noise_multiplier
        noise_multiplier *= 1.1
    return _LARGEST_NOISE_MULTIPLIER


def _search(
    total: Callable[[float], float], used: float, target_epsilon: float, noise_multiplier: float, smallest: float
) -> float | None:
    """Find a noise multiplier whose total epsilon is just within the target; None if there is none.

    Interpolates between the logarithms of noise and of epsilon beyond ``used``, in which they are almost linear, and
    halves the value of an end that stays (the Illinois method).
    """
    left = target_epsilon - used
    ends: dict[bool, tuple[float, float]] = {}  # too little noise (True) or enough (False): noise, excess
    last_side, stride = None, 1.02
    while noise_multiplier <= _LARGEST_NOISE_MULTIPLIER:
        unused = target_epsilon - total(noise_multiplier)
        if unused >= 0 and (unused <= _EPSILON_TOLERANCE * left or noise_multiplier <= smallest):
            return noise_multiplier
        share = min(max(1 - unused / left, 1e-6), 1e6)
        excess = math.log(share / (1 - _EPSILON_TOLERANCE / 2))
        side = unused < 0
        if side == last_side and (not side) in ends:
            ends[not side] = (ends[not side][0], ends[not side][1] / 2)
        ends[side], last_side = (noise_multiplier, excess), side
        if len(ends) == 2:
            (low, low_excess), (high, high_excess) = ends[True], ends[False]
            if high <= low * (1 + _NOISE_TOLERANCE):
                return high
            noise_multiplier = low * (high / low) ** (low_excess / (low_excess - high_excess))
            continue
        factor = max(min(math.exp(abs(excess)), 4.0), stride)
        noise_multiplier = noise_multiplier * factor if side else max(noise_multiplier / factor, smallest)
        stride = min(stride**2, 4.0)
    return None
