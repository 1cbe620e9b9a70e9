"""Plans: what a client will release in one run, and the noise with which it meets a target.

A plan is fixed before its first release: steps and noise of both phases, and how the noise moves from round to round.
``calibrate`` finds the noise with which everything together, including what was spent before, meets a target. Where it
starts to look follows from a closed form; what it returns was checked with PLD accounting.

What releases cost is in ``privacy_loss``; its names are the ones to import from here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from adadpigu_core.exceptions import BudgetError, ConfigurationError
from adadpigu_core.noise_schedule import CONSTANT, NoiseSchedule
from adadpigu_core.privacy_loss import (
    LEAST_NOISE_MULTIPLIER,
    MOST_COMPOSED,
    PHASES,
    PRETRAINING,
    ROUNDING,
    TRAINING,
    Event,
    check_delta,
    epsilon,
    fits,
    merge,
    work,
)

_LARGEST_NOISE_MULTIPLIER = 1e5
# Calibration is content when it leaves no more than this share of the remaining epsilon, or of the noise, on the table.
_EPSILON_TOLERANCE = 1e-3
_NOISE_TOLERANCE = 2e-4


@dataclass(frozen=True)
class Plan:
    """What a client will release in one run.

    Args:
        pretraining: All pretraining steps of the run (count 0 if there are none).
        training: All training steps of the run, with the noise multiplier of the first round.
        noise_schedule: How the noise of training moves from there.
        steps_per_round: Private steps of a round, by which rounds are told apart.
    """

    pretraining: Event
    training: Event
    noise_schedule: NoiseSchedule = CONSTANT
    steps_per_round: int = 1

    @property
    def events(self) -> tuple[Event, ...]:
        """The events of both phases, in the order of time."""
        stages = self.noise_schedule.stages(self._rounds(TRAINING))
        training = [self._training(factor, rounds * self.steps_per_round) for factor, rounds in stages]
        return tuple(event for event in (self.pretraining, *training) if event.count)

    def event(self, phase: str) -> Event:
        """The event of one phase; of training, as if all rounds had the noise of the first."""
        return self.pretraining if phase == PRETRAINING else self.training

    def step_event(self, phase: str, round_number: int) -> Event:
        """One private step of a round.

        Args:
            phase: ``pretraining`` or ``training``.
            round_number: From 1, over both phases. A training round before the first or after the last has the noise of
                that one.
        """
        if phase == PRETRAINING:
            one = self.pretraining
            return Event(PRETRAINING, one.noise_multiplier, one.sampling_probability)
        index = round_number - 1 - self._rounds(PRETRAINING)
        return self._training(self.noise_schedule.factor(index, self._rounds(TRAINING)), 1)

    def round_event(self, round_number: int) -> Event:
        """All private steps of a round, from 1 over both phases.

        Raises:
            ConfigurationError: If the plan has no such round.
        """
        pretraining = self._rounds(PRETRAINING)
        rounds = pretraining + self._rounds(TRAINING)
        if not 1 <= round_number <= rounds:
            raise ConfigurationError(f"round: the plan of this run has rounds 1 to {rounds}, not {round_number}")
        phase = PRETRAINING if round_number <= pretraining else TRAINING
        return replace(self.step_event(phase, round_number), count=self.steps_per_round)

    @property
    def rounds(self) -> tuple[Event, ...]:
        """The event of every round, in the order of time."""
        last = self._rounds(PRETRAINING) + self._rounds(TRAINING)
        return tuple(self.round_event(number) for number in range(1, last + 1))

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """Undo ``to_dict``; a plan that was written before there were schedules has none.

        Raises:
            ConfigurationError, KeyError, TypeError or ValueError: If the values make no sense.
        """
        phases = {phase: Event(**values[phase]) for phase in PHASES}
        schedule = NoiseSchedule(**values.get("noise_schedule", {}))
        return cls(**phases, noise_schedule=schedule, steps_per_round=int(values.get("steps_per_round", 1)))

    def _rounds(self, phase: str) -> int:
        return self.event(phase).count // self.steps_per_round

    def _training(self, factor: float, count: int) -> Event:
        one = self.training
        noise_multiplier = one.noise_multiplier if factor == 1 else _round_up(one.noise_multiplier * factor)
        return Event(TRAINING, noise_multiplier, one.sampling_probability, count)


@dataclass(frozen=True)
class PlanShape:
    """A plan without its noise.

    Args:
        sampling_probability: Of both phases, in (0, 1].
        pretraining_steps: Number of private steps for importance.
        training_steps: Number of private steps under the mask.
        pretraining_share: Share of the budget, in terms of inverse noise variance, that pretraining takes; in (0, 1),
            without effect if either phase has no steps.
        noise_schedule: How the noise of training moves from round to round.
        steps_per_round: Private steps of a round.
    """

    sampling_probability: float
    pretraining_steps: int
    training_steps: int
    pretraining_share: float
    noise_schedule: NoiseSchedule = CONSTANT
    steps_per_round: int = 1

    @property
    def noise_ratio(self) -> float:
        """Noise multiplier of pretraining over that of the first training round."""
        if not self.pretraining_steps or not self.training_steps:
            return 1.0
        # share = (T_p / s_p^2) / (T_p / s_p^2 + sum_t 1 / s_t^2), solved for s_p / s_1 with s_t = f_t s_1
        odds = (1 - self.pretraining_share) / self.pretraining_share
        stages = self.noise_schedule.stages(self.training_steps // self.steps_per_round)
        training_steps = self.steps_per_round * sum(rounds / factor**2 for factor, rounds in stages)
        return math.sqrt(odds * self.pretraining_steps / training_steps)

    @property
    def smallest_factor(self) -> float:
        """The smallest noise multiplier of the run over that of the first training round."""
        stages = self.noise_schedule.stages(self.training_steps // self.steps_per_round)
        return min([self.noise_ratio, *(factor for factor, _ in stages)])

    def plan(self, noise_multiplier: float) -> Plan:
        """Fill in the noise: ``noise_multiplier`` for training, and what follows from the share for pretraining."""
        return self.with_noise(_round_up(noise_multiplier * self.noise_ratio), _round_up(noise_multiplier))

    def with_noise(self, pretraining: float, training: float) -> Plan:
        """Fill in the noise multipliers of pretraining and of the first training round."""
        return Plan(
            Event(PRETRAINING, pretraining, self.sampling_probability, self.pretraining_steps),
            Event(TRAINING, training, self.sampling_probability, self.training_steps),
            self.noise_schedule,
            self.steps_per_round,
        )


def pretraining_rounds(num_rounds: int, share: float) -> int:
    """Rounds of pretraining: at least one if any share is given, but always one is left to train."""
    return min(max(1, round(share * num_rounds)), num_rounds - 1) if share > 0 else 0


def _round_up(noise_multiplier: float) -> float:
    """Round to four decimals, towards more noise, so that a printed noise multiplier is the one that was used."""
    return math.ceil(noise_multiplier * 1e4) / 1e4


def calibrate(
    shape: PlanShape,
    target_epsilon: float,
    target_delta: float,
    spent: Sequence[Event] = (),
    *,
    near: float | None = None,
) -> Plan:
    """Find the smallest noise with which a plan, after what was spent before, meets a target.

    Privacy:
        epsilon(spent + plan, target_delta) <= target_epsilon, checked on the plan that is returned.

    Args:
        shape: Steps, sampling probability and phase split.
        target_epsilon: Budget over everything, before and in this plan.
        target_delta: In (0, 1).
        spent: Events of the past on the same data set.
        near: A noise multiplier that is expected to be close, to save time; of no effect on what is guaranteed.

    Raises:
        BudgetError: If the past alone has used up the target, or no amount of noise is enough.
        ConfigurationError: For values out of range.
    """
    check_target(shape, target_epsilon, target_delta, spent)
    plan = _calibrate(shape, target_epsilon, target_delta, merge(spent), near)
    if not fits((*spent, *plan.events), target_epsilon, target_delta):  # never seen; worth knowing if it happens
        raise BudgetError(f"calibration failed: {plan} does not meet epsilon {target_epsilon}")
    return plan


def check_target(shape: PlanShape, target_epsilon: float, target_delta: float, spent: Sequence[Event]) -> None:
    """Refuse what cannot be calibrated.

    Raises:
        ConfigurationError: Naming the value that is out of range.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ConfigurationError(f"target_epsilon: must be positive and finite, got {target_epsilon}")
    check_delta(target_delta, "target_delta")
    if not 0 < shape.sampling_probability <= 1:
        raise ConfigurationError(f"sampling_probability: must be in (0, 1], got {shape.sampling_probability}")
    if not isinstance(shape.pretraining_steps, int) or shape.pretraining_steps < 0:
        raise ConfigurationError(f"pretraining_steps: must be a number from 0, got {shape.pretraining_steps}")
    if not isinstance(shape.training_steps, int) or shape.training_steps < 1:
        raise ConfigurationError(f"training_steps: must be a number from 1, got {shape.training_steps}")
    steps_per_round = shape.steps_per_round
    if not isinstance(steps_per_round, int) or steps_per_round < 1:
        raise ConfigurationError(f"steps_per_round: must be a number from 1, got {steps_per_round}")
    if shape.pretraining_steps % steps_per_round or shape.training_steps % steps_per_round:
        raise ConfigurationError(f"steps_per_round: {steps_per_round} must divide the steps of both phases")
    if shape.pretraining_steps and not 1e-6 <= shape.pretraining_share <= 1 - 1e-6:
        raise ConfigurationError(f"pretraining_share: must be in (0, 1), got {shape.pretraining_share}")
    steps = shape.pretraining_steps + shape.training_steps + sum(event.count for event in spent)
    if steps > MOST_COMPOSED:
        raise ConfigurationError(f"training_steps: with all others these are {steps} steps, more than {MOST_COMPOSED}")
    if ROUNDING * steps >= target_delta:
        raise ConfigurationError(
            f"target_delta: {target_delta} cannot be certified over {steps} steps; it is too small"
        )


@lru_cache(maxsize=1024)
def _calibrate(
    shape: PlanShape, target_epsilon: float, target_delta: float, spent: tuple[Event, ...], near: float | None
) -> Plan:
    used = epsilon(spent, target_delta)
    if used >= target_epsilon:
        text = (
            f"the privacy budget of this data set is spent: epsilon {used:.4f} of {target_epsilon:g} "
            f"at delta {target_delta:g}; nothing is left to train with"
        )
        raise BudgetError(text, text)

    def total(noise_multiplier: float) -> float:
        return epsilon((*spent, *shape.plan(noise_multiplier).events), target_delta)

    smallest = smallest_noise(shape)
    start = max(near, smallest) if near else first_guess(shape, target_epsilon, target_delta, spent, smallest)
    noise_multiplier = search_noise(total, used, target_epsilon, start, smallest)
    if noise_multiplier is None:
        text = (
            f"too little of the privacy budget is left: epsilon {used:.4f} of {target_epsilon:g} at delta "
            f"{target_delta:g} is spent, and no amount of noise fits these steps into the rest"
        )
        raise BudgetError(text, text)
    return shape.plan(noise_multiplier)


def smallest_noise(shape: PlanShape) -> float:
    """The least noise multiplier of the first training round with which no round has less than calibration allows."""
    return LEAST_NOISE_MULTIPLIER / min(1.0, shape.smallest_factor)


def first_guess(
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


def search_noise(
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


__all__ = [
    "LEAST_NOISE_MULTIPLIER",
    "PHASES",
    "PRETRAINING",
    "TRAINING",
    "Event",
    "NoiseSchedule",
    "Plan",
    "PlanShape",
    "calibrate",
    "check_target",
    "epsilon",
    "first_guess",
    "fits",
    "merge",
    "pretraining_rounds",
    "search_noise",
    "smallest_noise",
    "work",
]
