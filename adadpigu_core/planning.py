"""The arithmetic of a federation's budget before anything is trained: no data, no model, no releases.

Clients, rounds, sampling and phase split hang together by one equation, epsilon(rounds, noise, sampling) = target. The
functions here solve it for any one of them: ``plan_noise``, ``plan_epsilon``, ``most_rounds``, ``smallest_sampling``.

Clients with the same budget share its accounting. If there are very many different budgets, noise comes in levels, each
of them accounted for, and a client gets the least that meets its target: more than it needs and never less. Likewise
epsilon is accounted for after some rounds only, if there are many, and stands for the rounds before too. So everything
that is said was checked with PLD accounting and errs on the safe side.
"""

import bisect
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
    epsilons,
    fits,
    pretraining_rounds,
)
from adadpigu_core.client_list import ClientEntry
from adadpigu_core.exceptions import BudgetError, ConfigurationError
from adadpigu_core.weights import noise_of_mean, public_weight

MOST_ROUNDS = 100_000
# What keeps an answer within seconds: budgets that are calibrated one by one, levels of noise for more than those, and
# epsilons on the way there for all of them.
_MOST_BUDGETS = 16
_NOISE_LEVELS = 48
_LEVELS_OF_A_SEARCH = 8
_MOST_EPSILONS = 480
_FEWEST_POINTS = 10
_MOST_TRIALS = 8
_SMALLEST_SAMPLING = 1e-6
_NOISE_TOLERANCE = 0.02


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
    return _noise_plan(clients, terms, _NOISE_LEVELS)


def _noise_plan(
    clients: Sequence[ClientEntry], terms: Terms, most_levels: int, *, points: bool = True
) -> FederationPlan:
    budgets = sorted({client.target_epsilon for client in clients})
    if len(budgets) <= _MOST_BUDGETS:
        plans = {budget: calibrate(terms.shape, budget, terms.target_delta) for budget in budgets}
        return _federation(clients, terms, [plans[client.target_epsilon] for client in clients], points=points)
    levels = _levels(budgets, terms, most_levels)
    at = _points(terms, len(levels)) if points else (terms.num_rounds,)
    known = [(plan, _epsilons_at(at, plan, terms.target_delta)) for plan in levels]
    spent = [epsilons[-1] for _, epsilons in known]  # ascending
    made = []
    for client in clients:
        plan, epsilons = known[max(bisect.bisect_right(spent, client.target_epsilon) - 1, 0)]
        made.append(ClientPlan(client, plan, epsilons))
    return FederationPlan(terms, at, tuple(made), in_levels=True)


def _levels(budgets: Sequence[float], terms: Terms, most: int) -> list[Plan]:
    """Plans from the noise of the smallest budget, which is calibrated, down to that of the largest."""
    most = max(2 * most // (1 + len(terms.noise_schedule.stages(terms.num_rounds))), 4)
    largest, smallest = (
        calibrate(terms.shape, budget, terms.target_delta).training.noise_multiplier
        for budget in (budgets[0], budgets[-1])
    )
    # the first is within every target, as calibration has checked
    inner = [largest * (smallest / largest) ** (index / (most - 1)) for index in range(1, most)]
    return [terms.shape.plan(noise) for noise in (largest, *inner)]


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

    def affordable(num_rounds: int) -> bool:
        events = replace(terms, num_rounds=num_rounds).shape.plan(noise_multiplier).events
        return fits(events, target, terms.target_delta)

    if not affordable(1):
        raise BudgetError(f"with noise multiplier {noise_multiplier:g} a single round exceeds epsilon {target:g}")
    most = MOST_ROUNDS // terms.local_steps
    good = _last_true(affordable, 1, most)
    # phases are whole rounds, so that the cost of one more round is a little uneven
    while good < most and (affordable(good + 1) or affordable(min(good + 2, most))):
        good += 1 if affordable(good + 1) else 2
    return plan_epsilon(clients, replace(terms, num_rounds=min(good, most)), noise_multiplier)


def smallest_sampling(
    clients: Sequence[ClientEntry], terms: Terms, aggregation: str, noise_ratio: float
) -> FederationPlan:
    """Find the smallest sampling probability, and with it the smallest expected batches, that makes a noise small.

    A closed form says how the noise moves with sampling; calibrated plans say how far it is off.

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
    probability, correction = _sampling_guess(clients, terms, aggregation, noise_ratio), 1.0
    best: FederationPlan | None = None
    for _ in range(_MOST_TRIALS):
        at = replace(terms, sampling_probability=probability)
        plan = _noise_plan(clients, at, _LEVELS_OF_A_SEARCH, points=False)
        found = max(
            noise_to_clipping(plan, aggregation, number) for number in (at.pretraining_rounds + 1, at.num_rounds)
        )
        if found <= noise_ratio:
            best = plan if best is None or probability < best.terms.sampling_probability else best
            if found >= noise_ratio * (1 - _NOISE_TOLERANCE) or probability <= _SMALLEST_SAMPLING:
                break
        elif probability == 1:
            raise BudgetError(
                f"with all records in every step the noise is {found:.4g} of the clipping norm, more than "
                f"{noise_ratio:g}: allow more noise, plan fewer rounds or larger budgets, or find more clients"
            )
        correction = found / _noise_guess(clients, at, aggregation)
        probability = _sampling_guess(
            clients, terms, aggregation, noise_ratio * (1 - _NOISE_TOLERANCE / 2) / correction
        )
    if best is None:
        raise BudgetError(f"no sampling probability was found at which the noise is {noise_ratio:g}")
    return _noise_plan(clients, best.terms, _LEVELS_OF_A_SEARCH)


def _sampling_guess(clients: Sequence[ClientEntry], terms: Terms, aggregation: str, noise_ratio: float) -> float:
    low, high = math.log(_SMALLEST_SAMPLING), 0.0
    for _ in range(40):
        middle = (low + high) / 2
        noise = _noise_guess(clients, replace(terms, sampling_probability=math.exp(middle)), aggregation)
        low, high = (low, middle) if noise <= noise_ratio else (middle, high)
    return 1.0 if high > -1e-6 else math.exp(high)


def _noise_guess(clients: Sequence[ClientEntry], terms: Terms, aggregation: str) -> float:
    """Roughly the noise of the aggregate: as if losses were Gaussian, pretraining like training, and noise constant."""
    steps, sampling = terms.num_rounds * terms.local_steps, terms.sampling_probability
    log_delta = 2 * math.log(1 / terms.target_delta)
    weights, noise_stddevs = [], []
    for client in clients:
        variance = (math.sqrt(log_delta + 2 * client.target_epsilon) - math.sqrt(log_delta)) ** 2 / steps
        noise = 1 / math.sqrt(max(math.log1p(math.expm1(min(variance, 500)) / sampling**2), variance / sampling))
        weights.append(
            public_weight(
                aggregation,
                num_records=client.records,
                noise_multiplier=noise,
                sampling_probability=sampling,
            )
        )
        noise_stddevs.append(noise / (sampling * client.records))
    return noise_of_mean(weights, noise_stddevs)


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


def _last_true(holds: Callable[[int], bool], good: int, most: int) -> int:
    """The last number up to which something holds, which holds for ``good``."""
    bad = good * 2
    while bad <= most and holds(bad):
        good, bad = bad, bad * 2
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


def _federation(
    clients: Sequence[ClientEntry], terms: Terms, plans: Sequence[Plan], *, points: bool = True
) -> FederationPlan:
    different = dict.fromkeys(plans)
    at = _points(terms, len(different)) if points else (terms.num_rounds,)
    known = {plan: _epsilons_at(at, plan, terms.target_delta) for plan in different}
    made = (ClientPlan(client, plan, known[plan]) for client, plan in zip(clients, plans, strict=True))
    return FederationPlan(terms, at, tuple(made))


def _points(terms: Terms, num_plans: int) -> tuple[int, ...]:
    """Rounds after which epsilon is accounted for: all, or as many as time allows."""
    wanted = max(_MOST_EPSILONS // num_plans, _FEWEST_POINTS)
    if terms.num_rounds <= wanted:
        return tuple(range(1, terms.num_rounds + 1))
    spread = {max(1, round(terms.num_rounds * part / wanted)) for part in range(1, wanted + 1)}
    return tuple(sorted(spread | {terms.pretraining_rounds or 1}))


def _epsilons_at(points: Sequence[int], plan: Plan, delta: float) -> tuple[float, ...]:
    events: list[Event] = []
    ends: list[int] = []
    for number, event in enumerate(plan.rounds, 1):
        if events and (not ends or len(events) > ends[-1]) and replace(events[-1], count=event.count) == event:
            events[-1] = replace(event, count=events[-1].count + event.count)
        else:
            events.append(event)
        if len(ends) < len(points) and number == points[len(ends)]:
            ends.append(len(events))
    found = epsilons(events, delta)
    return tuple(found[end - 1] for end in ends)


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
