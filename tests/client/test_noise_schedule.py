"""The client decides by its own plan how much noise a round gets, whatever it is asked."""

import pytest

from adadpigu_core.accounting import NoiseSchedule, epsilon
from adadpigu_core.messages import Refusal, TrainReply


@pytest.fixture
def scheduled(node):
    reply = node.describe(
        pretraining_steps=2, training_steps=8, noise_schedule=NoiseSchedule("step", 0.5), steps_per_round=2
    )
    return node, reply.pretraining_noise_multiplier, reply.training_noise_multiplier


def noise(node):
    """Noise multiplier charged in each round."""
    return [row[5] for row in node.rows("charges")]


def test_every_round_is_charged_with_its_own_noise(scheduled):
    node, pretraining, training = scheduled
    assert isinstance(node.train(round=1, phase="pretraining", steps=2, importance_measure="energy"), TrainReply)
    for number in range(2, 6):
        reply = node.train(round=number, steps=2)
        assert isinstance(reply, TrainReply)
    expected = [pretraining, training, *(training * factor for factor in (5 / 6, 4 / 6, 0.5))]
    assert noise(node) == pytest.approx(expected, abs=2e-4)
    assert sorted(one.noise_multiplier for one in reply.spent) == sorted(noise(node))
    assert 7.9 < epsilon(reply.spent, 1e-5) <= 8.0


@pytest.mark.parametrize("number", [6, 900])
def test_a_round_that_is_not_in_the_plan_is_refused(scheduled, number):
    node, _, _ = scheduled
    assert "round: " in node.train(round=number, steps=2).message
    assert noise(node) == []


@pytest.mark.parametrize(
    ("number", "phase", "steps", "problem"),
    [
        (1, "training", 2, "phase: the plan of this run has pretraining in round 1"),
        (2, "pretraining", 2, "phase: the plan of this run has training in round 2"),
        (3, "training", 1, "steps: a round of this run's plan has 2, not 1"),
        (3, "training", 8, "steps: a round of this run's plan has 2, not 8"),
    ],
)
def test_the_server_cannot_choose_what_a_round_costs(scheduled, number, phase, steps, problem):
    """A choice that follows from what was released would cost more than the plan, whose order is fixed."""
    node, _, _ = scheduled
    measure = "energy" if phase == "pretraining" else ""
    assert node.train(round=number, phase=phase, steps=steps, importance_measure=measure).message == problem
    assert noise(node) == []


def test_rounds_may_be_left_out_and_cost_nothing_then(scheduled):
    node, _, training = scheduled
    assert isinstance(node.train(round=3, steps=2), TrainReply)
    assert isinstance(node.train(round=5, steps=2), TrainReply)
    assert noise(node) == pytest.approx([training * 5 / 6, training / 2], abs=2e-4)


@pytest.mark.parametrize("changes", [{"noise-schedule.final-ratio": 1e-9}, {"noise-schedule.kind": "none"}])
def test_an_absurd_schedule_is_refused(node, requests, changes):
    reply = node.ask(requests.describe(), changes)
    assert isinstance(reply, Refusal)
    assert "noise_schedule" in reply.message
    assert node.charged() == ([], [])


def test_rounds_that_do_not_divide_the_steps_are_refused(node):
    reply = node.describe(pretraining_steps=1, training_steps=3, steps_per_round=2)
    assert isinstance(reply, Refusal)
    assert "steps_per_round" in reply.message
