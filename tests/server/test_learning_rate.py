"""The rate that follows from the plan: what it fixes, what it leaves alone, and that a run uses it."""

import math
from dataclasses import replace

import pytest
import torch

from adadpigu_core.configuration import parse
from adadpigu_core.messages import Description
from adadpigu_core.models import ModelSpec, build
from adadpigu_core.parameters import flatten
from server.learning_rate import automatic, output_gain


def client(noise=2.0, records=1000):
    return Description("a", "cpu", "d", records, 8.0, 1e-5, noise, noise, ())


def rate(clients=None, parameters=10_000, gain=1e6, **settings):
    flat = {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    return automatic(parse({"federation.num-rounds": 100, **flat}), clients or [client()], parameters, gain)


def test_noise_moves_the_weights_by_the_same_length_whatever_the_plan():
    # 100 steps of noise 2 / 500 on each of 10,000 parameters, ten times as far with momentum 0.9, but for the last ones
    assert rate(optimiser__momentum=0.0) == pytest.approx(8 / (math.sqrt(100 * 10_000) * 2 / 500))
    base = rate()
    assert base == pytest.approx(8 / (math.sqrt(100 * 10_000) * 2 / 500 * 10), rel=0.08)
    assert rate([client(noise=4.0)]) == pytest.approx(base / 2)
    assert rate(parameters=40_000) == pytest.approx(base / 2)
    assert rate(federation__num_rounds=400) == pytest.approx(base / 2, rel=0.08)
    assert rate(optimiser__momentum=0.8) == pytest.approx(base * 2, rel=0.08)
    assert rate(optimiser__server_learning_rate=2.0) == pytest.approx(base / 2)
    assert rate(privacy__clipping_norm=0.5) == pytest.approx(base * 2)


@pytest.mark.parametrize("rounds", [1, 3, 10, 40])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_noise_has_that_length_in_short_runs_too(rounds, momentum):
    """By the server's own optimiser, with releases that are noise of the plan and nothing else."""
    given = rate(federation__num_rounds=rounds, optimiser__momentum=momentum)
    weights = torch.nn.Parameter(torch.zeros(10_000))
    optimiser = torch.optim.SGD([weights], lr=1.0, momentum=momentum)
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        weights.grad = given * 2 / 500 * torch.randn(10_000, generator=generator)
        optimiser.step()
    bounded = given * (1 - momentum**rounds) / (1 - momentum)
    assert float(weights.detach().norm()) == pytest.approx(8, rel=0.05) or bounded == pytest.approx(6)


def test_where_outputs_hardly_feel_it_noise_may_move_the_weights_further():
    """Until it moves the outputs by 1: 8 over the root of 10,000 parameters is 0.08 a weight, a gain of 12.5."""
    assert rate(gain=12.6) == rate()
    assert rate(gain=6.25) == pytest.approx(2 * rate())
    assert rate(gain=0.0) == rate()


def test_where_outputs_hardly_follow_the_weights_a_step_may_be_longer():
    quiet = [client(noise=0.3, records=10**8)]
    assert rate(quiet, gain=10.0) == pytest.approx(0.6, rel=1e-4)
    assert rate(quiet, gain=2.5) == pytest.approx(0.8, rel=1e-4)
    assert rate(quiet, gain=1.0) == rate(quiet, gain=1e-9) == pytest.approx(2.0, rel=1e-4)


class TestOutputGain:
    FEATURES = torch.randn(300, 20, generator=torch.Generator().manual_seed(3)) * torch.arange(20.0)

    def test_of_a_linear_layer_is_the_length_of_its_inputs(self):
        """With a bias, and without the part that all of three classes share."""
        model = build(ModelSpec("linear", "relu", "none", (20,), 3), seed=0)
        expected = math.sqrt(float((self.FEATURES.square().sum(1) + 1).mean()) * (1 - 1 / 3))
        assert output_gain(model, self.FEATURES) == pytest.approx(expected, rel=0.2)

    def test_inputs_that_are_zero_add_nothing(self):
        sparse = self.FEATURES * (torch.arange(20) < 2)
        model = build(ModelSpec("linear", "relu", "none", (20,), 3), seed=0)
        assert output_gain(model, sparse) < output_gain(model, self.FEATURES) / 10

    def test_leaves_the_model_as_it_was(self):
        model = build(ModelSpec("linear", "relu", "none", (20,), 3), seed=0).train()
        before = flatten(model).clone()
        assert output_gain(model, self.FEATURES) == output_gain(model, self.FEATURES)
        assert torch.equal(flatten(model), before)
        assert model.training


def test_more_clients_bring_less_noise_and_a_noisy_one_does_not_spoil_it():
    assert rate([client()] * 4) == pytest.approx(2 * rate())
    assert rate([client(), client(noise=1000.0)]) == pytest.approx(rate(), rel=1e-3)
    assert rate([client(), client(noise=1000.0)], federation__aggregation="uniform") < rate() / 100


def test_without_noise_a_step_is_bounded_by_the_clipping_norm():
    assert rate([client(noise=0.3, records=10**9)]) == pytest.approx(0.6, rel=1e-4)
    assert rate([client(noise=0.3, records=10**9)], federation__local_steps=3) == pytest.approx(0.2, rel=1e-4)


@pytest.mark.parametrize(
    ("parameters", "records", "noise", "clients", "rounds", "found"),
    [(1954, 143, 3.1, 10, 100, 0.1), (26010, 60000, 1.0, 1, 586, 0.6)],
)
def test_it_is_near_rates_that_were_found_by_search(parameters, records, noise, clients, rounds, found):
    probability = 0.5 if clients == 10 else 2048 / 60000
    given = rate(
        [client(noise, records)] * clients,
        parameters,
        federation__num_rounds=rounds,
        privacy__sampling_probability=probability,
    )
    assert 0.5 < given / found < 2


def test_a_client_that_is_described_otherwise_changes_it():
    assert rate([replace(client(), num_records=2000)]) == pytest.approx(2 * rate())
