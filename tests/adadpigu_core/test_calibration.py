import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adadpigu_core import accounting, privacy_loss
from adadpigu_core.accounting import PRETRAINING, TRAINING, Event, Plan, PlanShape, calibrate, epsilon
from adadpigu_core.exceptions import BudgetError, ConfigurationError

DELTA = 1e-5
SHAPES = [
    (PlanShape(0.05, 10, 90, 0.1), 8.0),
    (PlanShape(0.05, 10, 90, 0.5), 0.1),
    (PlanShape(0.01, 0, 10_000, 0.1), 1.0),
    (PlanShape(1.0, 0, 1, 0.1), 2.0),
    (PlanShape(0.5, 20, 5, 0.9), 4.0),
    (PlanShape(0.02, 0, 1, 0.5), 10.0),
    (PlanShape(0.2, 30, 300, 0.02), 0.01),
]


@pytest.mark.parametrize(("shape", "target"), SHAPES)
def test_calibration_meets_the_target_and_wastes_little(shape, target):
    plan = calibrate(shape, target, DELTA)
    assert 0.99 * target <= epsilon(plan.events, DELTA) <= target
    assert (plan.pretraining.count, plan.training.count) == (shape.pretraining_steps, shape.training_steps)
    assert {one.sampling_probability for one in plan.events} == {shape.sampling_probability}
    assert plan.event(PRETRAINING) is plan.pretraining
    assert plan.event(TRAINING) is plan.training
    for one in plan.events:  # what is printed is what was used
        assert float(f"{one.noise_multiplier:.4f}") == one.noise_multiplier


def test_both_phases_compose_to_one_target():
    shape, target = PlanShape(0.05, 50, 50, 0.5), 4.0
    plan = calibrate(shape, target, DELTA)
    parts = [epsilon([one], DELTA) for one in plan.events]
    assert all(part < target * 0.9 for part in parts)
    assert sum(parts) > target  # composition is better than adding up
    alone = calibrate(PlanShape(0.05, 0, 50, 0.5), target, DELTA)
    assert plan.training.noise_multiplier > alone.training.noise_multiplier


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_pretraining_takes_its_share(share):
    plan = calibrate(PlanShape(0.05, 20, 200, share), 3.0, DELTA)
    pretraining, training = (one.count / one.noise_multiplier**2 for one in (plan.pretraining, plan.training))
    assert pretraining / (pretraining + training) == pytest.approx(share, rel=2e-3)


def test_noise_is_never_below_the_smallest_in_either_phase():
    for share in (0.05, 0.95):
        plan = calibrate(PlanShape(0.001, 5, 50, share), 1000.0, DELTA)
        assert min(one.noise_multiplier for one in plan.events) == 0.3
        assert epsilon(plan.events, DELTA) <= 1000.0


@pytest.mark.parametrize("left", [1.05, 1.5, 4.0])
def test_calibration_goes_on_from_what_was_spent(left):
    spent = [Event(PRETRAINING, 1.3, 0.05, 20), Event(TRAINING, 2.0, 0.05, 50)]
    used = epsilon(spent, DELTA)
    target, shape = used * left, PlanShape(0.05, 10, 90, 0.1)
    plan = calibrate(shape, target, DELTA, spent)
    total = epsilon([*spent, *plan.events], DELTA)
    assert used + 0.99 * (target - used) <= total <= target
    assert plan.training.noise_multiplier > calibrate(shape, target, DELTA).training.noise_multiplier
    assert calibrate(shape, target, DELTA, spent[::-1]) == plan


def test_nothing_left_is_said():
    spent = [Event(TRAINING, 1.0, 0.1, 100)]
    used = epsilon(spent, DELTA)
    for target in (used / 2, used):
        with pytest.raises(BudgetError, match="nothing is left") as caught:
            calibrate(PlanShape(0.1, 0, 1, 0.5), target, DELTA, spent)
        assert caught.value.public_message == str(caught.value)


def test_too_little_left_is_said():
    spent = [Event(TRAINING, 74.0, 1.0, 1)]
    with pytest.raises(BudgetError, match="too little of the privacy budget is left") as caught:
        calibrate(PlanShape(1.0, 0, 10**5, 0.5), 0.039, DELTA, spent)
    assert caught.value.public_message == str(caught.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"target_epsilon": 0.0}, "target_epsilon"),
        ({"target_epsilon": -1.0}, "target_epsilon"),
        ({"target_epsilon": math.nan}, "target_epsilon"),
        ({"target_epsilon": math.inf}, "target_epsilon"),
        ({"target_delta": 0.0}, "target_delta"),
        ({"target_delta": 1.0}, "target_delta"),
        ({"target_delta": math.nan}, "target_delta"),
        ({"target_delta": 1e-15}, "target_delta"),
        ({"pretraining_steps": -1}, "pretraining_steps"),
        ({"pretraining_steps": 0.5}, "pretraining_steps"),
        ({"training_steps": 0}, "training_steps"),
        ({"training_steps": 2.0}, "training_steps"),
        ({"training_steps": 10**12}, "training_steps"),
        ({"pretraining_share": 0.0}, "pretraining_share"),
        ({"pretraining_share": 1.0}, "pretraining_share"),
        ({"pretraining_share": 5e-324}, "pretraining_share"),
        ({"pretraining_share": math.nan}, "pretraining_share"),
    ],
)
def test_absurd_inputs_are_refused_by_name(changes, field):
    shape = {"sampling_probability": 0.1, "pretraining_steps": 10, "training_steps": 100, "pretraining_share": 0.1}
    target = {"target_epsilon": 1.0, "target_delta": DELTA}
    shape |= {name: value for name, value in changes.items() if name in shape}
    target |= {name: value for name, value in changes.items() if name in target}
    with pytest.raises(ConfigurationError, match=field):
        calibrate(PlanShape(**shape), **target)


def test_a_plan_without_pretraining_ignores_the_share():
    plan = calibrate(PlanShape(0.1, 0, 10, math.nan), 1.0, DELTA)
    assert plan.events == (plan.training,)
    assert plan == Plan(Event(PRETRAINING, plan.training.noise_multiplier, 0.1, 0), plan.training)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([0.005, 0.1, 1.0]),
    st.integers(0, 30),
    st.integers(1, 300),
    st.floats(0.01, 0.99),
    st.floats(0.05, 20),
)
def test_any_plan_meets_its_target(sampling_probability, pretraining, training, share, target):
    plan = calibrate(PlanShape(sampling_probability, pretraining, training, share), target, DELTA)
    spent = epsilon(plan.events, DELTA)
    assert spent <= target
    assert spent >= 0.99 * target or min(one.noise_multiplier for one in plan.events) <= 0.2001


def test_calibration_takes_few_evaluations(monkeypatch):
    evaluations = []
    evaluate = privacy_loss._pld_epsilon
    monkeypatch.setattr(privacy_loss, "_pld_epsilon", lambda *args: evaluations.append(args) or evaluate(*args))
    accounting._calibrate.cache_clear()
    for shape, target in SHAPES:
        calibrate(shape, target, DELTA)
    assert len(evaluations) <= 10 * len(SHAPES)
