"""Noise for many budgets at once: levels so close to each other that hardly anything is wasted.

How noise falls with the budget is a smooth curve. It is looked at in a few places, and what lies between is guessed;
then each level, from the smallest budget on, is checked by a bound of its epsilon, so that a wrong guess costs a
second look and never privacy. A budget gets the level below it, or a new one if that would waste more than a level.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adadpigu_core.accounting import Plan, PlanShape, first_guess, search_noise, smallest_noise
from adadpigu_core.exceptions import BudgetError
from adadpigu_core.quick_accounting import quick_epsilon, quick_epsilons

LEVEL = 1.008  # noise of a budget over what it needs, at most, but for what the bound and the guess are off
_GUESS = 1.0005
_MOST_TRIALS = 20


@dataclass(frozen=True)
class NoiseCurve:
    """Noise multipliers of the first training round, as a guess.

    Args:
        log_budgets: Natural logarithms of epsilons, ascending.
        log_noises: Of the noise multipliers that they need.
    """

    log_budgets: NDArray[np.float64]
    log_noises: NDArray[np.float64]

    def noise(self, budget: float) -> float:
        """Guess between the budgets that were looked at, by the parabola through the closest three."""
        if len(self.log_budgets) < 3:
            return math.exp(float(np.interp(math.log(budget), self.log_budgets, self.log_noises)))
        start = int(np.argmin(np.abs(self.log_budgets - math.log(budget)))) - 1
        start = min(max(start, 0), len(self.log_budgets) - 3)
        x, y = self.log_budgets[start : start + 3] - math.log(budget), self.log_noises[start : start + 3]
        shares = [x[j] * x[k] / ((x[i] - x[j]) * (x[i] - x[k])) for i, j, k in ((0, 1, 2), (1, 0, 2), (2, 0, 1))]
        return math.exp(float(np.dot(shares, y)))


def noise_curve(shape: PlanShape, budgets: Sequence[float], delta: float, most: int) -> NoiseCurve:
    """Look at some budgets, at most so many: those that are given, or some that are spread over their range.

    Raises:
        BudgetError: If no amount of noise is enough for one of them.
    """
    low, high = min(budgets), max(budgets)
    few = sorted(set(budgets)) if len(set(budgets)) <= most else [float(one) for one in np.geomspace(low, high, most)]
    noises = [quick_noise(shape, budget, delta) for budget in few]
    return NoiseCurve(np.log(few), np.log(noises))


def quick_noise(shape: PlanShape, budget: float, delta: float) -> float:
    """The noise multiplier of the first training round with which a plan just meets a budget, by the quick bound.

    Raises:
        BudgetError: If no amount of noise is enough.
    """
    smallest = smallest_noise(shape)
    start = first_guess(shape, budget, delta, (), smallest)
    found = search_noise(lambda noise: quick_epsilon(shape.plan(noise).events, delta), 0.0, budget, start, smallest)
    if found is None:
        raise BudgetError(f"no amount of noise fits these steps into epsilon {budget:g} at delta {delta:g}")
    return found


def level_plans(
    shape: PlanShape, budgets: Sequence[float], delta: float, curve: NoiseCurve, points: Sequence[int]
) -> dict[float, tuple[Plan, list[float]]]:
    """A plan for each budget, whose epsilon is within it, and its epsilons on the way.

    Args:
        shape: Of all plans.
        budgets: Positive.
        delta: Of all budgets.
        curve: Where to look for noise.
        points: Numbers of the rounds after which epsilon is wanted, ascending, the last round among them.
    """
    found: dict[float, tuple[Plan, list[float]]] = {}
    level: tuple[Plan, list[float]] | None = None
    for budget in sorted(set(budgets)):
        wanted = curve.noise(budget)
        if level is None or level[0].training.noise_multiplier > wanted * LEVEL:
            level = _level(shape, budget, delta, wanted * _GUESS, points)
        found[budget] = level
    return found


def _level(
    shape: PlanShape, budget: float, delta: float, noise: float, points: Sequence[int]
) -> tuple[Plan, list[float]]:
    for _ in range(_MOST_TRIALS):
        plan = shape.plan(noise)
        epsilons = epsilons_after(plan, points, delta)
        if epsilons[-1] <= budget:
            return plan, epsilons
        noise *= max(min(epsilons[-1] / budget, 1.1), _GUESS)
    plan = shape.plan(quick_noise(shape, budget, delta))
    return plan, epsilons_after(plan, points, delta)


def epsilons_after(plan: Plan, points: Sequence[int], delta: float) -> list[float]:
    """Bounds of epsilon after some rounds, each of them never too small.

    Args:
        plan: Of one client.
        points: Numbers of rounds from 1, ascending.
        delta: In (0, 1).
    """
    events = plan.events
    rounds = np.array([event.count // plan.steps_per_round for event in events])
    starts = np.cumsum(rounds) - rounds
    done = np.clip(np.asarray(points)[:, None] - starts[None, :], 0, rounds[None, :])
    return quick_epsilons(events, done * plan.steps_per_round, delta)
