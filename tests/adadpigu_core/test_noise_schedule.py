import pytest
from hypothesis import given
from hypothesis import strategies as st

from adadpigu_core.accounting import (
    PRETRAINING,
    TRAINING,
    NoiseSchedule,
    Plan,
    PlanShape,
    calibrate,
    epsilon,
    pretraining_rounds,
)
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.noise_schedule import NOISE_SCHEDULES

DELTA = 1e-5
ALL = st.builds(NoiseSchedule, st.sampled_from(NOISE_SCHEDULES), st.floats(0.1, 10))


@given(ALL, st.integers(1, 500))
def test_stages_are_the_factors_of_all_rounds_in_turn(schedule, num_rounds):
    factors = [schedule.factor(index, num_rounds) for index in range(num_rounds)]
    stages = schedule.stages(num_rounds)
    assert [factor for factor, count in stages for _ in range(count)] == factors
    assert all(count > 0 for _, count in stages)
    assert factors[0] == 1.0
    assert schedule.factor(-3, num_rounds) == 1.0
    assert schedule.factor(10**9, num_rounds) == factors[-1]
    if schedule.kind != "constant" and num_rounds > 1:
        assert factors[-1] == pytest.approx(schedule.final_ratio)
        assert sorted(factors, reverse=schedule.final_ratio < 1) == factors


def test_schedules_differ_in_shape():
    middle = {kind: NoiseSchedule(kind, 0.5).factor(20, 100) for kind in NOISE_SCHEDULES}
    assert middle["constant"] == 1.0
    assert middle["step"] == 1.0
    assert middle["linear"] < middle["cosine"] < 1.0
    assert len(NoiseSchedule("step", 0.4).stages(100)) == 4


@pytest.mark.parametrize(("kind", "ratio", "field"), [("zigzag", 1.0, "kind"), ("linear", 0.01, "final_ratio")])
def test_absurd_schedules_are_refused(kind, ratio, field):
    with pytest.raises(ConfigurationError, match=field):
        NoiseSchedule(kind, ratio)


@pytest.mark.parametrize("kind", NOISE_SCHEDULES)
@pytest.mark.parametrize("ratio", [0.4, 2.5])
def test_a_schedule_is_calibrated_as_a_whole(kind, ratio):
    shape = PlanShape(0.1, 20, 80, 0.2, NoiseSchedule(kind, ratio), 2)
    plan = calibrate(shape, 3.0, DELTA)
    assert 2.97 <= epsilon(plan.events, DELTA) <= 3.0
    # round by round it is the same composition
    assert len(plan.rounds) == 50
    assert epsilon(plan.rounds, DELTA) == epsilon(plan.events, DELTA)
    parts = {
        phase: sum(one.count / one.noise_multiplier**2 for one in plan.rounds if one.phase == phase)
        for phase in (PRETRAINING, TRAINING)
    }
    assert parts[PRETRAINING] / sum(parts.values()) == pytest.approx(0.2, rel=2e-3)
    if kind != "constant":
        first, last = plan.rounds[10], plan.rounds[-1]
        assert last.noise_multiplier == pytest.approx(first.noise_multiplier * ratio, abs=2e-4)
        # negative control: the noise of the noisiest round alone would not meet the target
        quietest = max(plan.rounds, key=lambda one: -one.noise_multiplier)
        assert epsilon([quietest.__class__(TRAINING, quietest.noise_multiplier, 0.1, 100)], DELTA) > 3.0


def test_a_plan_without_pretraining_has_a_schedule_too():
    plan = calibrate(PlanShape(0.1, 0, 30, 0.2, NoiseSchedule("linear", 0.5)), 2.0, DELTA)
    assert {one.phase for one in plan.rounds} == {TRAINING}
    assert epsilon(plan.rounds, DELTA) <= 2.0


def test_the_noise_is_never_below_the_smallest_in_any_round():
    plan = calibrate(PlanShape(0.001, 5, 50, 0.1, NoiseSchedule("linear", 0.1)), 1000.0, DELTA)
    assert min(one.noise_multiplier for one in plan.rounds) == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("steps_per_round", [0, 3, 1.0])
def test_rounds_must_divide_the_steps(steps_per_round):
    with pytest.raises(ConfigurationError, match="steps_per_round"):
        calibrate(PlanShape(0.1, 2, 8, 0.1, NoiseSchedule(), steps_per_round), 1.0, DELTA)


def test_a_plan_survives_json_and_one_from_before_schedules_is_read():
    plan = calibrate(PlanShape(0.1, 2, 8, 0.1, NoiseSchedule("step", 0.5), 2), 1.0, DELTA)
    assert Plan.from_dict(plan.to_dict()) == plan
    old = {phase: plan.to_dict()[phase] for phase in (PRETRAINING, TRAINING)}
    assert Plan.from_dict(old) == Plan(plan.pretraining, plan.training)


@pytest.mark.parametrize(("rounds", "share", "expected"), [(100, 0.1, 10), (4, 0.01, 1), (1, 0.9, 0), (10, 0.0, 0)])
def test_rounds_are_split(rounds, share, expected):
    assert pretraining_rounds(rounds, share) == expected
