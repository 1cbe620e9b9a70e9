"""What is said of a run's end: the average beside the last iterate, and that training went astray."""

import pytest
import torch

from adadpigu_core.configuration import OptimiserSettings
from adadpigu_core.datasets import Records
from server.evaluation import Evaluation
from server.optimiser import ServerOptimiser
from server.outcome import Watch, best_accuracy, outcome

TEST = Records(torch.zeros(10, 1), torch.tensor([0] * 3 + [1] * 3 + [2] * 4))
EVERYTHING = torch.ones(2, dtype=torch.bool)


def said(accuracy, loss=1.0, before=(), decay=0.0):
    optimiser = ServerOptimiser(OptimiserSettings(momentum=0.9, average_decay=decay), torch.zeros(2))
    lines = [{"round": number, "accuracy": value} for number, value in enumerate(before)]
    return outcome(optimiser, lambda _: Evaluation(accuracy, loss), TEST, [*lines, {"round": 99}])


@pytest.mark.parametrize(
    ("accuracy", "loss", "before", "words"),
    [
        (0.9, 0.3, (0.2, 0.95), ""),
        (0.41, 9.0, (), ""),
        (0.4, 2.0, (), "commonest"),
        (0.9, float("nan"), (), "not a number"),
        (0.6, 5.0, (0.3, 0.8), "was 0.8000 and is 0.6000"),
    ],
)
def test_divergence_is_noticed_and_nothing_else_is(accuracy, loss, before, words):
    found = said(accuracy, loss, before)["diverged"]
    assert (words in found) if words else found == ""
    assert not found or "local-learning-rate" in found


def test_it_is_said_once_while_the_run_goes_on():
    watch = Watch()
    seen = [watch.see(metrics) for metrics in ({"accuracy": 0.8, "loss": 1.0}, {}, {"accuracy": 0.75, "loss": 1.0})]
    assert seen == ["", "", ""]
    low = {"accuracy": 0.65, "loss": 3.0}
    assert [watch.see(low) for _ in range(4)] == [""] * 4
    assert watch.see({"accuracy": 0.75, "loss": 1.0}) == ""  # it has recovered
    assert [watch.see(low) for _ in range(4)] == [""] * 4
    assert "accuracy was 0.8000 and is 0.6500 now" in watch.see(low)
    assert watch.see({"accuracy": 0.1, "loss": float("nan")}) == ""


def test_a_run_that_goes_on_knows_what_was_before():
    lines = [{"accuracy": 0.5}, {"round": 2}, {"accuracy": 0.9}, {"accuracy": None}]
    assert best_accuracy(lines) == 0.9
    watch = Watch(best_accuracy(lines))
    assert "was 0.9000" in [watch.see({"accuracy": 0.2, "loss": 1.0}) for _ in range(5)][-1]
    assert best_accuracy([]) == 0
    assert "not a number" in Watch().see({"accuracy": 0.1, "loss": float("inf")})


def test_the_average_stands_beside_the_last_iterate():
    assert "average" not in said(0.9)
    assert said(0.9, decay=0.5)["average"] == {"accuracy": 0.9, "loss": 1.0}


def averaged(decay, rounds, momentum=0.0):
    server = ServerOptimiser(OptimiserSettings(momentum=momentum, average_decay=decay), torch.zeros(2))
    server.reset(torch.full((2,), 100.0))
    for number in range(1, rounds + 1):
        server.step(torch.ones(2), EVERYTHING, number)
    return server


def test_the_average_is_exponential_and_soon_forgets_the_start():
    assert averaged(0.9, 1).average.tolist() == [101, 101]
    # decays 0, 1/3, 2/4, and from then on 0.5
    average = 101.0
    for number, decay in ((2, 1 / 3), (3, 0.5), (4, 0.5)):
        average = decay * average + (1 - decay) * (100 + number)
    assert averaged(0.5, 4).average.tolist() == pytest.approx([average] * 2)


def test_weights_do_not_depend_on_the_average_and_a_checkpoint_keeps_it():
    with_average, without = averaged(0.9, 5, momentum=0.9), averaged(0.0, 5, momentum=0.9)
    assert with_average.weights.tolist() == without.weights.tolist()
    assert without.average is None
    restored = ServerOptimiser(OptimiserSettings(momentum=0.9, average_decay=0.9), torch.zeros(2))
    restored.restore(with_average.state())
    for server in (with_average, restored):
        server.step(torch.ones(2), EVERYTHING, 6)
    assert restored.average.tolist() == with_average.average.tolist()


def test_a_step_that_is_not_taken_is_not_averaged():
    server = averaged(0.5, 3)
    before = server.average.tolist()
    assert not server.step(torch.tensor([float("inf"), 0.0]), EVERYTHING, 4)
    assert server.average.tolist() == before
