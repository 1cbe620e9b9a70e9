"""The client decides by its own plan how much noise a round gets, whatever it is asked."""

import pytest

from adadpigu_core.accounting import Event, NoiseSchedule, epsilon
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


def test_a_round_out_of_order_gets_no_less_noise_than_the_last(scheduled):
    node, _, training = scheduled
    assert isinstance(node.train(round=900, steps=2), TrainReply)
    assert noise(node) == pytest.approx([training / 2], abs=2e-4)


def test_asking_for_the_quiet_rounds_alone_does_not_exceed_the_budget(scheduled):
    """The server skips to the last stage and goes on asking: the ledger ends that at the client's target."""
    node, _, _ = scheduled
    for number in range(5, 200):
        reply = node.train(round=number, steps=8)
        if isinstance(reply, Refusal):
            break
    assert isinstance(reply, Refusal)
    assert reply.code == "budget"
    spent = [Event(*row[4:8]) for row in node.rows("charges")]
    assert epsilon(spent, 1e-5) <= 8.0


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
