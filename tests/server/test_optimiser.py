"""The server's step against torch's own, and what must not move."""

import numpy as np
import pytest
import torch

from adadpigu_core.configuration import OptimiserSettings, parse
from server.optimiser import ServerOptimiser, momentum_of

EVERYTHING = torch.ones(4, dtype=torch.bool)


def optimiser(**settings):
    return ServerOptimiser(OptimiserSettings(**{"momentum": 0.9, **settings}), torch.zeros(4))


class TestStep:
    def test_without_momentum_the_model_moves_by_the_update(self):
        server = optimiser(momentum=0.0, server_learning_rate=0.5)
        assert server.step(torch.tensor([1.0, 2.0, 3.0, 4.0]), EVERYTHING, 1)
        assert server.weights.tolist() == [0.5, 1.0, 1.5, 2.0]

    def test_momentum_by_hand(self):
        server = optimiser(momentum=0.5)
        for number in (1, 2, 3):
            server.step(torch.ones(4), EVERYTHING, number)
        assert server.weights.tolist() == [1 + 1.5 + 1.75] * 4

    def test_adam_by_hand(self):
        server, update = optimiser(name="adam", momentum=0.9, server_learning_rate=0.1), np.array([1.0, -2.0, 0.5, 0.0])
        first, second, weights = np.zeros(4), np.zeros(4), np.zeros(4)
        for number in (1, 2, 3):
            step = update * number
            first, second = 0.9 * first + 0.1 * step, 0.99 * second + 0.01 * step**2
            weights += 0.1 * (first / (1 - 0.9**number)) / (np.sqrt(second / (1 - 0.99**number)) + 1e-4)
            server.step(torch.tensor(step, dtype=torch.float32), EVERYTHING, number)
        np.testing.assert_allclose(server.weights, weights, rtol=1e-5)

    def test_warm_up_rises_to_the_rate_and_stays(self):
        server, seen = optimiser(momentum=0.0, warmup_rounds=3, server_learning_rate=2.0), []
        for number in range(1, 7):
            before = server.weights
            server.step(torch.ones(4), EVERYTHING, number)
            seen.append(float((server.weights - before)[0]))
        assert seen == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]

    @pytest.mark.parametrize("name", ["sgd", "adam"])
    def test_what_is_frozen_does_not_move_though_the_optimiser_remembers_a_direction(self, name):
        server = optimiser(name=name, momentum=0.9)
        server.step(torch.ones(4), EVERYTHING, 1)
        before, mask = server.weights, torch.tensor([True, False, True, False])
        server.step(torch.where(mask, 1.0, 0.0), mask, 2)
        moved = server.weights - before
        assert torch.equal(moved != 0, mask)
        # and the memory is there: a plain step would have moved them
        before = server.weights
        server.step(torch.zeros(4), EVERYTHING, 3)
        assert bool((server.weights != before).all())

    def test_what_comes_back_is_moved_by_a_memory_that_has_faded(self):
        """Left out for three rounds: a direction of 1 counts an eighth of what it did when it was left out."""
        server, without_first = optimiser(momentum=0.5), torch.tensor([False, True, True, True])
        server.step(torch.ones(4), EVERYTHING, 1)
        for number in (2, 3, 4):
            server.step(torch.tensor([0.0, 1.0, 1.0, 1.0]), without_first, number)
        assert server.weights[0] == 1.0
        server.step(torch.tensor([3.0, 1.0, 1.0, 1.0]), EVERYTHING, 5)
        assert server.weights[0] == 1.0 + 3.0 + 0.5**4

    def test_adam_moves_what_comes_back_no_further_than_its_rate(self):
        server, without_first = (
            optimiser(name="adam", server_learning_rate=0.1),
            torch.tensor([False, True, True, True]),
        )
        server.step(torch.ones(4), EVERYTHING, 1)
        before = server.weights[0]
        for number in range(2, 200):
            server.step(torch.tensor([0.0, 1.0, 1.0, 1.0]), without_first, number)
        assert server.weights[0] == before
        server.step(torch.full((4,), 5.0), EVERYTHING, 200)
        assert 0 < server.weights[0] - before < 0.12

    def test_weights_are_a_copy(self):
        server = optimiser()
        server.weights.fill_(9)
        assert server.weights.tolist() == [0.0] * 4

    def test_a_reset_forgets_everything(self):
        server, fresh = optimiser(), optimiser()
        server.step(torch.ones(4), EVERYTHING, 1)
        for each in (server, fresh):
            each.reset(torch.full((4,), 3.0))
            each.step(torch.ones(4), EVERYTHING, 1)
        assert torch.equal(server.weights, fresh.weights)


class TestNumbersBeyondAll:
    @pytest.mark.parametrize("name", ["sgd", "adam"])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
    def test_are_not_taken_and_leave_no_trace(self, name, bad):
        server, twin = (optimiser(name=name, server_learning_rate=3.0) for _ in range(2))
        for each in (server, twin):
            each.step(torch.ones(4), EVERYTHING, 1)
        assert not server.step(torch.tensor([1.0, bad, 1.0, 1.0]), EVERYTHING, 2)
        assert torch.equal(server.weights, twin.weights)
        for each in (server, twin):
            assert each.step(torch.ones(4), EVERYTHING, 3)
        for name, value in twin.state().items():
            assert torch.equal(server.state()[name], value)

    def test_on_the_very_first_step(self):
        server, twin = optimiser(), optimiser()
        assert not server.step(torch.full((4,), float("inf")), EVERYTHING, 1)
        for each in (server, twin):
            each.step(torch.ones(4), EVERYTHING, 1)
        assert torch.equal(server.weights, twin.weights)


class TestRestore:
    @pytest.mark.parametrize("settings", [{}, {"momentum": 0.0}, {"name": "adam"}, {"name": "adam", "momentum": 0.0}])
    @pytest.mark.parametrize("steps", [0, 1, 3])
    def test_goes_on_bit_by_bit(self, settings, steps):
        one, other = optimiser(**settings), optimiser(**settings)
        for number in range(1, steps + 1):
            one.step(torch.randn(4, generator=torch.Generator().manual_seed(number)), EVERYTHING, number)
        other.restore({name: torch.from_numpy(np.array(value.numpy())) for name, value in one.state().items()})
        for each in (one, other):
            each.step(torch.linspace(-1, 1, 4), EVERYTHING, steps + 1)
        assert torch.equal(one.weights, other.weights)


@pytest.mark.parametrize(("rounds", "expected"), [(1, 0.7), (20, 0.7), (50, 0.8), (80, 0.875), (100, 0.9), (600, 0.9)])
def test_momentum_follows_from_the_rounds_unless_it_is_set(rounds, expected):
    assert momentum_of(parse({"federation.num-rounds": rounds})) == pytest.approx(expected)
    assert momentum_of(parse({"federation.num-rounds": rounds, "optimiser.momentum": 0.0})) == 0
    moved = ServerOptimiser.of(parse({"federation.num-rounds": rounds}), torch.zeros(1))
    for number in (1, 2):
        moved.step(torch.ones(1), torch.ones(1, dtype=torch.bool), number)
    assert moved.weights.item() == pytest.approx(1 + 1 + expected)
