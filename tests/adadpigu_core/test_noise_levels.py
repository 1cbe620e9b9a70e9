import numpy as np
import pytest

from adadpigu_core.accounting import NoiseSchedule, PlanShape, calibrate, epsilon
from adadpigu_core.exceptions import BudgetError
from adadpigu_core.noise_levels import level_plans, noise_curve, quick_noise

DELTA = 1e-5
SHAPES = [
    PlanShape(0.5, 10, 90, 0.1),
    PlanShape(0.01, 0, 1000, 0.1),
    PlanShape(0.1, 6, 54, 0.3, NoiseSchedule("linear", 0.5), 2),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_levels_are_within_budgets_and_within_one_percent_of_the_noise_they_need(shape):
    budgets = [float(budget) for budget in np.geomspace(0.1, 10, 400)]
    curve = noise_curve(shape, budgets, DELTA, 16)
    found = level_plans(shape, budgets, DELTA, curve, [1, 10, 30])
    assert len({plan for plan, _ in found.values()}) > 100
    for budget in budgets[::57]:
        plan, epsilons = found[budget]
        assert epsilon(plan.events, DELTA) <= budget
        assert epsilons[-1] <= budget
        needed = calibrate(shape, budget, DELTA).training.noise_multiplier
        assert plan.training.noise_multiplier <= 1.01 * needed + 1e-4


def test_a_wrong_guess_costs_a_second_look_and_no_privacy():
    shape = SHAPES[0]
    curve = noise_curve(shape, [0.5, 1.0, 2.0], DELTA, 3)
    wrong = type(curve)(curve.log_budgets, curve.log_noises - 0.05)
    for budget, (plan, epsilons) in level_plans(shape, [0.5, 1.0, 2.0], DELTA, wrong, [100]).items():
        assert epsilons[-1] <= budget
        assert epsilon(plan.events, DELTA) <= budget


def test_the_quick_noise_is_a_little_more_than_the_calibrated_one():
    for shape in SHAPES:
        exact = calibrate(shape, 2.0, DELTA).training.noise_multiplier
        assert exact * 0.999 <= quick_noise(shape, 2.0, DELTA) <= exact * 1.005


def test_noise_that_does_not_exist_is_said():
    with pytest.raises(BudgetError, match="no amount of noise fits"):
        quick_noise(PlanShape(1.0, 0, 10**6, 0.5), 1e-4, DELTA)
