"""The arithmetic of a federation's budget before anything is trained: no data, no model, no releases.

Clients, rounds, sampling and phase split hang together by one equation, epsilon(rounds, noise, sampling) = target. The
functions here solve it for any one of them: ``plan_noise``, ``plan_epsilon``, ``most_rounds``, ``smallest_sampling``.

Clients with the same budget share its accounting. Where budgets are few, their noise is what the clients themselves
will calibrate. Where that would take too long, noise comes in levels (``noise_levels``), each of them accounted for,
and a client gets one that meets its target: at most about 1 % more noise than it needs, and never less. Epsilon on the
way is a bound (``quick_accounting``); if there are many rounds it is known after some of them only, and stands for the
rounds before too. So everything that is said errs on the safe side.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from adadpigu_core.accounting import (
    PRETRAINING,
    TRAINING,
    Event,
    NoiseSchedule,
    Plan,
    PlanShape,
    calibrate,
    check_target,
    epsilon,
    fits,
    pretraining_rounds,
    work,
)
from adadpigu_core.client_list import ClientEntry
from adadpigu_core.exceptions import BudgetError, ConfigurationError
from adadpigu_core.noise_levels import LEVEL, NoiseCurve, epsilons_after, level_plans, noise_curve
from adadpigu_core.quick_accounting import quick_epsilon
from adadpigu_core.weights import noise_of_mean, public_weight

MOST_ROUNDS = 100_000
# What keeps an answer within seconds: budgets that are calibrated by dp_accounting, and the work of one look at all of
# them; places in which the curve of noise over budgets is looked at; and epsilons on the way.
_MOST_CALIBRATED = 16
_MOST_WORK = 8e4
_KNOTS = 16
_KNOTS_OF_A_SEARCH = 5
_MOST_EPSILONS = 480
_FEWEST_POINTS = 8
_MOST_TRIALS = 16
_SMALLEST_SAMPLING = 1e-6
_NOISE_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Terms:
    """What all clients of a federation have in common.

    Args:
        num_rounds: Rounds in all, pretraining included.
        local_steps: Private steps of a round.
        sampling_probability: Chance of a record to enter a step, in (0, 1].
        pretraining_round_share: Share of the rounds for pretraining; 0 leaves it out.
        pretraining_share: Share of the budget for pretraining, in terms of inverse noise variance.
        noise_schedule: How the noise of training moves from round to round.
        target_delta: In (0, 1).
    """

    num_rounds: int
    local_steps: int
    sampling_probability: float
    pretraining_round_share: float
    pretraining_share: float
    noise_schedule: NoiseSchedule
    target_delta: float

    def __post_init__(self) -> None:
        checks = {
            "num_rounds": 1 <= self.num_rounds <= MOST_ROUNDS,
            "local_steps": self.local_steps >= 1,
            "sampling_probability": 0 < self.sampling_probability <= 1,
            "pretraining_round_share": 0 <= self.pretraining_round_share < 1,
            "pretraining_share": 0 < self.pretraining_share < 1,
            "target_delta": 0 < self.target_delta < 1,
        }
        for name, holds in checks.items():
            if not holds:
                raise ConfigurationError(f"{name}: {getattr(self, name)} is out of range")

    @property
    def pretraining_rounds(self) -> int:
        """Rounds of pretraining."""
        return pretraining_rounds(self.num_rounds, self.pretraining_round_share)

    @property
    def shape(self) -> PlanShape:
        """The plan of every client, but for its noise."""
        first = self.pretraining_rounds * self.local_steps
        return PlanShape(
            self.sampling_probability,
            first,
            self.num_rounds * self.local_steps - first,
            self.pretraining_share,
            self.noise_schedule,
            self.local_steps,
        )


@dataclass(frozen=True)
class ClientPlan:
    """What one client will release and spend.

    Args:
        client: Who.
        plan: Its events.
        epsilons: What is spent after each of ``FederationPlan.points``.
    """

    client: ClientEntry
    plan: Plan
    epsilons: tuple[float, ...]

    @property
    def epsilon(self) -> float:
        """What the whole plan spends."""
        return self.epsilons[-1]


@dataclass(frozen=True)
class FederationPlan:
    """The plans of all clients.

    Args:
        terms: What they have in common.
        points: Numbers of the rounds after which epsilon is known, the last one included.
        clients: In the order of the list.
        in_levels: Whether noise comes in levels, so that clients get a little more than they need.
    """

    terms: Terms
    points: tuple[int, ...]
    clients: tuple[ClientPlan, ...]
    in_levels: bool = False


def plan_noise(clients: Sequence[ClientEntry], terms: Terms) -> FederationPlan:
    """Find the smallest noise with which every client meets its target.

    Raises:
        BudgetError: If no amount of noise is enough for some client.
        ConfigurationError: For values out of range.
    """
    budgets = sorted({client.target_epsilon for client in clients})
    check_target(terms.shape, budgets[0], terms.target_delta, ())
    curve = noise_curve(terms.shape, budgets, terms.target_delta, _KNOTS)
    if not _in_levels(budgets, terms, curve):
        plans = {budget: calibrate(terms.shape, budget, terms.target_delta) for budget in budgets}
        return _federation(clients, terms, [plans[client.target_epsilon] for client in clients])
    at = _points(terms, len(budgets))
    found = level_plans(terms.shape, budgets, terms.target_delta, curve, at)
    made = (
        ClientPlan(client, found[client.target_epsilon][0], tuple(found[client.target_epsilon][1]))
        for client in clients
    )
    return FederationPlan(terms, at, tuple(made), in_levels=True)


def _in_levels(budgets: Sequence[float], terms: Terms, curve: NoiseCurve) -> bool:
    """Whether there is no time to calibrate every budget as the clients will."""
    if len(budgets) > _MOST_CALIBRATED:
        return True
    return sum(work(terms.shape.plan(curve.noise(budget)).events) for budget in budgets) > _MOST_WORK


def plan_epsilon(clients: Sequence[ClientEntry], terms: Terms, noise_multiplier: float) -> FederationPlan:
    """Find the epsilon that every client spends with a given noise multiplier in the first training round."""
    _check_noise(noise_multiplier)
    plan = terms.shape.plan(noise_multiplier)
    return _federation(clients, terms, [plan] * len(clients))


def most_rounds(clients: Sequence[ClientEntry], terms: Terms, noise_multiplier: float) -> FederationPlan:
    """Find the largest number of rounds that every client can afford with a given noise multiplier.

    Raises:
        BudgetError: If not even one round fits.
    """
    _check_noise(noise_multiplier)
    target = min(client.target_epsilon for client in clients)

    def events(num_rounds: int) -> tuple[Event, ...]:
        return replace(terms, num_rounds=num_rounds).shape.plan(noise_multiplier).events

    def surely(num_rounds: int) -> bool:
        return quick_epsilon(events(num_rounds), terms.target_delta) <= target

    def affordable(num_rounds: int) -> bool:
        return fits(events(num_rounds), target, terms.target_delta)

    if not affordable(1):
        raise BudgetError(f"with noise multiplier {noise_multiplier:g} a single round exceeds epsilon {target:g}")
    most = MOST_ROUNDS // terms.local_steps
    # the quick bound is a little above what counts, so that a few more rounds may be affordable
    good = _last_true(surely, 1, most)
    good = _last_true(affordable, good if affordable(good) else 1, most, stride=max(1, good // 100))
    # phases are whole rounds, so that the cost of one more round is a little uneven
    while good < most and (affordable(good + 1) or affordable(min(good + 2, most))):
        good += 1 if affordable(good + 1) else 2
    return plan_epsilon(clients, replace(terms, num_rounds=min(good, most)), noise_multiplier)


def smallest_sampling(
    clients: Sequence[ClientEntry], terms: Terms, aggregation: str, noise_ratio: float
) -> FederationPlan:
    """Find the smallest sampling probability, and with it the smallest expected batches, that makes a noise small.

    Quick bounds in a few places say which; the plan that is returned was accounted for like any other.

    Args:
        clients: Who takes part.
        terms: Of the federation; its sampling probability is what is looked for.
        aggregation: Weights of the clients.
        noise_ratio: Largest acceptable noise of the noisiest training round, see ``noise_to_clipping``.

    Returns:
        A plan with that noise, or a little less.

    Raises:
        BudgetError: If not even the whole data in every step are enough.
    """
    if not (math.isfinite(noise_ratio) and noise_ratio > 0):
        raise ConfigurationError(f"noise_ratio: must be positive and finite, got {noise_ratio}")
    many = len({client.target_epsilon for client in clients}) > _MOST_CALIBRATED
    wanted = noise_ratio * (1 - 2 * _NOISE_TOLERANCE) / (LEVEL if many else 1)
    for _ in range(_MOST_TRIALS):
        probability = _sampling(clients, terms, aggregation, wanted, noise_ratio)
        plan = plan_noise(clients, replace(terms, sampling_probability=probability))
        found = _most_noise(plan, aggregation)
        if found <= noise_ratio:
            return plan
        if probability == 1:
            raise _too_noisy(found, noise_ratio)
        wanted *= (noise_ratio / found) * (1 - _NOISE_TOLERANCE / 4)
    raise BudgetError(f"no sampling probability was found at which the noise is {noise_ratio:g}")


def _too_noisy(found: float, noise_ratio: float) -> BudgetError:
    return BudgetError(
        f"with all records in every step the noise is {found:.4g} of the clipping norm, more than {noise_ratio:g}: "
        "allow more noise, plan fewer rounds or larger budgets, or find more clients"
    )


def _sampling(
    clients: Sequence[ClientEntry], terms: Terms, aggregation: str, wanted: float, noise_ratio: float
) -> float:
    """Guess the sampling probability at which the noise is a little less than what is wanted."""

    def excess(log_sampling: float) -> float:
        at = replace(terms, sampling_probability=math.exp(log_sampling))
        return math.log(_most_noise(_guessed(clients, at), aggregation) / wanted)

    low, high = math.log(_SMALLEST_SAMPLING), 0.0
    low_excess, high_excess = excess(low), excess(high)
    if high_excess > 0:
        if high_excess > 0.02:  # more than guesses are off by
            raise _too_noisy(wanted * math.exp(high_excess), noise_ratio)
        return 1.0
    if low_excess <= 0:
        return _SMALLEST_SAMPLING
    return math.exp(_root(excess, (low, low_excess), (high, high_excess)))


def _root(excess: Callable[[float], float], low: tuple[float, float], high: tuple[float, float]) -> float:
    """Where a falling function is a little below 0, between a place where it is above and one where it is below.

    By false position, with the value of an end that stays halved (the Illinois method).
    """
    sides: dict[bool, tuple[float, float]] = {True: low, False: high}  # above (True) or not
    best, last_side = high, None
    for _ in range(_MOST_TRIALS):
        (x, above), (y, below) = sides[True], sides[False]
        if best[1] >= -_NOISE_TOLERANCE or y - x < _NOISE_TOLERANCE:
            break
        place = x + (y - x) * (above + _NOISE_TOLERANCE / 2) / (above - below)
        value = excess(place)
        side = value > 0
        best = best if side else (place, value)
        if side == last_side:
            other = sides[not side]
            sides[not side] = (other[0], other[1] / 2)
        sides[side], last_side = (place, value), side
    return best[0]


def _guessed(clients: Sequence[ClientEntry], terms: Terms) -> FederationPlan:
    """A plan whose noise is a guess and whose epsilon nobody knows."""
    budgets = [client.target_epsilon for client in clients]
    curve = noise_curve(terms.shape, budgets, terms.target_delta, _KNOTS_OF_A_SEARCH)
    plans = {budget: terms.shape.plan(curve.noise(budget)) for budget in set(budgets)}
    made = (ClientPlan(client, plans[client.target_epsilon], (math.inf,)) for client in clients)
    return FederationPlan(terms, (terms.num_rounds,), tuple(made))


def _most_noise(plan: FederationPlan, aggregation: str) -> float:
    """Noise of the noisiest training round, which is the first or the last."""
    numbers = dict.fromkeys((plan.terms.pretraining_rounds + 1, plan.terms.num_rounds))
    return max(noise_to_clipping(plan, aggregation, number) for number in numbers)


def releases(plan: FederationPlan, aggregation: str, round_number: int) -> tuple[list[float], list[float]]:
    """Weights of the clients in a round, and the noise of each one's mean gradient, in units of the clipping norm."""
    terms = plan.terms
    phase = PRETRAINING if round_number <= terms.pretraining_rounds else TRAINING
    weights, noise_stddevs = [], []
    for one in plan.clients:
        event = one.plan.step_event(phase, round_number)
        batch = event.sampling_probability * one.client.records
        noise_stddevs.append(event.noise_multiplier / batch / math.sqrt(terms.local_steps))
        weights.append(
            public_weight(
                aggregation,
                num_records=one.client.records,
                noise_multiplier=event.noise_multiplier,
                sampling_probability=event.sampling_probability,
            )
        )
    return weights, noise_stddevs


def noise_to_clipping(plan: FederationPlan, aggregation: str, round_number: int) -> float:
    """Noise of each coordinate of a round's aggregated gradient over the clipping norm."""
    return noise_of_mean(*releases(plan, aggregation, round_number))


def _check_noise(noise_multiplier: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise ConfigurationError(f"noise_multiplier: must be positive and finite, got {noise_multiplier}")


def _last_true(holds: Callable[[int], bool], good: int, most: int, *, stride: int = 1) -> int:
    """The last number up to which something holds, which holds for ``good``; looks ahead by doubled strides."""
    bad = good + stride
    while bad <= most and holds(bad):
        good, bad, stride = bad, bad + 2 * stride, 2 * stride
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


def _federation(clients: Sequence[ClientEntry], terms: Terms, plans: Sequence[Plan]) -> FederationPlan:
    different = dict.fromkeys(plans)
    at = _points(terms, len(different))
    known = {plan: _path(plan, at, terms.target_delta) for plan in different}
    made = (ClientPlan(client, plan, known[plan]) for client, plan in zip(clients, plans, strict=True))
    return FederationPlan(terms, at, tuple(made))


def _path(plan: Plan, points: Sequence[int], delta: float) -> tuple[float, ...]:
    """Epsilon on the way: bounds, none of them above the epsilon of the whole plan, which is accounted for."""
    whole = epsilon(plan.events, delta)
    return (*(min(bound, whole) for bound in epsilons_after(plan, points[:-1], delta)), whole)


def _points(terms: Terms, num_plans: int) -> tuple[int, ...]:
    """Rounds after which epsilon is accounted for: all, or as many as time allows."""
    wanted = max(_MOST_EPSILONS // num_plans, _FEWEST_POINTS)
    if terms.num_rounds <= wanted:
        return tuple(range(1, terms.num_rounds + 1))
    spread = {max(1, round(terms.num_rounds * part / wanted)) for part in range(1, wanted + 1)}
    return tuple(sorted(spread | {terms.pretraining_rounds or 1}))


__all__ = [
    "ClientPlan",
    "FederationPlan",
    "Terms",
    "most_rounds",
    "noise_to_clipping",
    "plan_epsilon",
    "plan_noise",
    "releases",
    "smallest_sampling",
]
