"""Events, epsilon and calibration: every number about privacy comes from here, through dp_accounting.

An ``Event`` says what one kind of private step did and how often. The guarantee is record-level, add-or-remove-one;
``epsilon`` composes any events with privacy loss distributions (PLD), whose discretisation errs on the safe side.
``calibrate`` finds one noise multiplier per phase such that everything together, including what was spent before, meets
a target. Renyi accounting is only used to find the neighbourhood in which PLD accounting searches.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import dp_accounting
from dp_accounting import pld, rdp

from adadpigu_core.exceptions import BudgetError, ConfigurationError

PRETRAINING = "pretraining"
TRAINING = "training"
PHASES = (PRETRAINING, TRAINING)

# dp_accounting rounds losses up to this grid: a coarser grid is faster and never under-states epsilon. At 1e-3, epsilon
# is over-stated by about 1e-4.
_GRID = 1e-3
# Below this the accounting is slow and the privacy void; calibration adds more noise than needed instead.
_SMALLEST_NOISE_MULTIPLIER = 0.2
_LARGEST_NOISE_MULTIPLIER = 1e5


@dataclass(frozen=True, order=True)
class Event:
    """So many Poisson-sampled Gaussian releases.

    Args:
        phase: ``pretraining`` or ``training``; no meaning for the guarantee.
        noise_multiplier: Noise standard deviation over clipping norm; 0 means no privacy.
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
        if self.count < 0:
            raise ConfigurationError(f"event.count: must be at least 0, got {self.count}")

    def dp_event(self) -> dp_accounting.DpEvent:
        """Translate to dp_accounting's terms."""
        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(self.sampling_probability, gaussian)
        return dp_accounting.SelfComposedDpEvent(sampled, self.count)


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """Add up the counts of equal events; the result does not depend on their order."""
    counts: dict[tuple[str, float, float], int] = {}
    for event in events:
        key = (event.phase, event.noise_multiplier, event.sampling_probability)
        counts[key] = counts.get(key, 0) + event.count
    return tuple(sorted(Event(*key, count) for key, count in counts.items() if count))


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Epsilon of a composition at a delta, by PLD accounting.

    Returns:
        0 for no events, infinity if any event has no noise.
    """
    return _pld_epsilon(tuple(sorted((*key, count) for key, count in _counts(events).items())), delta)


def fits(events: Iterable[Event], target_epsilon: float, delta: float) -> bool:
    """Whether a composition stays within a target.

    Part of a composition that fits also fits, so that the rounds of a calibrated plan need no accounting of their own.
    """
    wanted = _counts(events)
    safe = _safe.setdefault((target_epsilon, delta), [])
    if any(all(known.get(kind, 0) >= count for kind, count in wanted.items()) for known in safe):
        return True
    if epsilon(events, delta) > target_epsilon:
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


@lru_cache(maxsize=4096)
def _pld_epsilon(kinds: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not kinds:
        return 0.0
    if any(noise_multiplier == 0 for noise_multiplier, _, _ in kinds):
        return math.inf
    events = [Event(TRAINING, *kind) for kind in kinds]
    return float(_accountant().compose(_composed(events)).get_epsilon(delta))


def _accountant() -> pld.PLDAccountant:
    return pld.PLDAccountant(value_discretization_interval=_GRID)


def _composed(events: Sequence[Event]) -> dp_accounting.DpEvent:
    return dp_accounting.ComposedDpEvent([event.dp_event() for event in events])


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

    def plan(self, noise_multiplier: float) -> Plan:
        """Fill in the noise: ``noise_multiplier`` for training, and what follows from the share for pretraining."""
        ratio = 1.0
        if self.pretraining_steps and self.training_steps:
            # share = (T_p / s_p^2) / (T_p / s_p^2 + T_t / s_t^2), solved for s_p / s_t
            odds = (1 - self.pretraining_share) / self.pretraining_share
            ratio = math.sqrt(odds * self.pretraining_steps / self.training_steps)
        pretraining = _round_up(noise_multiplier * ratio)
        return Plan(
            Event(PRETRAINING, pretraining, self.sampling_probability, self.pretraining_steps),
            Event(TRAINING, _round_up(noise_multiplier), self.sampling_probability, self.training_steps),
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
    _check_target(shape, target_epsilon, target_delta)
    plan = _calibrate(shape, target_epsilon, target_delta, merge(spent))
    if not fits((*spent, *plan.events), target_epsilon, target_delta):  # never seen; worth knowing if it happens
        raise BudgetError(f"calibration failed: {plan} does not meet epsilon {target_epsilon}")
    return plan


def _check_target(shape: PlanShape, target_epsilon: float, target_delta: float) -> None:
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ConfigurationError(f"target_epsilon: must be positive and finite, got {target_epsilon}")
    if not 0 < target_delta < 1:
        raise ConfigurationError(f"target_delta: must be in (0, 1), got {target_delta}")
    if shape.pretraining_steps < 0 or shape.training_steps < 1:
        raise ConfigurationError("a plan needs at least one training step and no negative number of steps")
    if shape.pretraining_steps and not 0 < shape.pretraining_share < 1:
        raise ConfigurationError(f"pretraining_share: must be in (0, 1), got {shape.pretraining_share}")


@lru_cache(maxsize=1024)
def _calibrate(shape: PlanShape, target_epsilon: float, target_delta: float, spent: tuple[Event, ...]) -> Plan:
    used = epsilon(spent, target_delta)
    if used >= target_epsilon:
        text = (
            f"the privacy budget of this data set is spent: epsilon {used:.4f} of {target_epsilon:g} "
            f"at delta {target_delta:g}; nothing is left to train with"
        )
        raise BudgetError(text, text)

    def gap(noise_multiplier: float) -> float:
        events = (*spent, *shape.plan(noise_multiplier).events)
        return epsilon(events, target_delta) - target_epsilon

    upper = _enough_noise(shape, target_epsilon, target_delta, spent)
    while gap(upper) > 0:
        upper *= 2
        if upper > _LARGEST_NOISE_MULTIPLIER:
            text = f"too little of the budget is left: epsilon {used:.4f} of {target_epsilon:g} is spent"
            raise BudgetError(text, text)
    lower = upper
    while lower > _SMALLEST_NOISE_MULTIPLIER and gap(lower) <= 0:
        upper, lower = lower, max(lower / 1.25, _SMALLEST_NOISE_MULTIPLIER)
    if gap(lower) <= 0:
        return shape.plan(lower)
    noise_multiplier = dp_accounting.calibrate_dp_mechanism(
        _accountant,
        lambda noise_multiplier: _composed((*spent, *shape.plan(noise_multiplier).events)),
        target_epsilon,
        target_delta,
        dp_accounting.ExplicitBracketInterval(lower, upper),
        tol=1e-4 * upper,
    )
    return shape.plan(noise_multiplier)


def _enough_noise(shape: PlanShape, target_epsilon: float, target_delta: float, spent: tuple[Event, ...]) -> float:
    """A noise multiplier that is enough by Renyi accounting, which is fast and a little pessimistic."""
    noise_multiplier = 0.5
    while noise_multiplier < _LARGEST_NOISE_MULTIPLIER:
        accountant = rdp.RdpAccountant(orders=range(2, 256))
        accountant.compose(_composed((*spent, *shape.plan(noise_multiplier).events)))
        if accountant.get_epsilon(target_delta) <= target_epsilon:
            return noise_multiplier
        noise_multiplier *= 1.25
    return 1.0
