"""Oracle, drift, groups, soft masks and whole methods, as the server carries them out."""

import numpy as np
import pytest
import torch

from adadpigu_core.configuration import Configuration, flatten, not_private, parse, to_toml
from adadpigu_core.exceptions import ConfigurationError
from server import app
from server.run_folder import RunFolder
from server.schedule import Importance


class TestOracle:
    def test_a_server_without_one_refuses_before_anything_is_asked(self, tmp_path, npz, configure, kit):
        configuration = configure(task__dataset=npz, task__model="linear", pretraining__ranking="oracle")
        grid = kit.RealGrid(configuration)
        with pytest.raises(ConfigurationError, match="not private"):
            app.run(grid, configuration, RunFolder(tmp_path / "run"))
        assert grid.pushed == []

    def test_it_ranks_and_the_outcome_says_so(self, tmp_path, npz, configure, kit):
        output = tmp_path / "run"
        settings = {"task__dataset": npz, "task__model": "linear", "runtime__output": str(output)}
        configuration = configure(**settings, pretraining__ranking="oracle")
        grid = kit.RealGrid(configuration)
        result = app.run(grid, configuration, RunFolder(output), oracle=lambda *_: torch.arange(8.0))
        assert result["not_private"].startswith("NOT PRIVATE")
        plain = configure(**{**settings, "runtime__output": str(tmp_path / "other")})
        grid = kit.RealGrid(plain)
        # an oracle that nobody asks for is not looked at
        result = app.run(grid, plain, RunFolder(tmp_path / "other"), oracle=lambda *_: 1 / 0)
        assert result["not_private"] == ""

    def test_what_clients_release_does_not_change_its_ranking(self):
        importance = Importance("oracle", 4, seed=0)
        importance.reveal(torch.tensor([0.0, 3.0, 2.0, 1.0]))
        importance.add("a", torch.tensor([9.0, 0.0, 0.0, 0.0]), 1.0)
        assert importance.mask("a", 0.5).tolist() == [False, True, True, False]

    def test_only_the_oracle_is_not_private(self):
        for ranking in ("consensus", "local", "random"):
            assert not_private(parse({"pretraining.ranking": ranking})) == ""


class TestDrift:
    def test_updates_are_summed_over_rounds_and_clients_before_they_are_squared(self):
        importance = Importance("consensus", 3, seed=0, signed=True)
        for sign in (1.0, -1.0):
            importance.add("a", torch.tensor([sign * 5.0, 1.0, 0.1]), 1.0)
            importance.add("b", torch.tensor([0.0, 1.0, 0.0]), 2.0)
        assert importance.mask("a", 0.34).tolist() == [False, True, False]

    def test_clients_send_no_scores(self, kit):
        clients = [kit.Client(f"client-{index}") for index in range(2)]
        federation = kit.Federation(clients, pretraining__measure="drift")
        federation.run()
        assert {request.importance_measure for request in clients[0].requests} == {""}
        assert federation.state.importance.scores[""].abs().sum() > 0
        assert 0 < int(clients[0].masks[clients[0].requests[-1].mask_id].sum()) <= kit.D

    def test_a_drift_in_either_direction_counts(self):
        importance = Importance("consensus", 2, seed=0, signed=True)
        importance.add("a", torch.tensor([-2.0, 1.0]), 1.0)
        assert importance.mask("a", 0.5).tolist() == [True, False]


class TestGroups:
    def test_whole_columns_are_asked_for(self, kit):
        clients = [kit.Client(f"client-{index}") for index in range(2)]
        kit.Federation(clients, retention__granularity="column", retention__schedule="constant").run()
        mask = clients[0].masks[clients[0].requests[-1].mask_id]
        weight = mask[:6].reshape(2, 3)
        assert np.array_equal(weight[0], weight[1])
        assert int(mask.sum()) == 4


class TestShrinkage:
    def test_it_is_part_of_a_checkpoint(self, kit):
        seen = []
        federation = kit.Federation(
            [kit.Client()], observer=lambda _: seen.append(federation.state.dump()), shrinkage__rule="drift"
        )
        federation.run()
        arrays, values = seen[2]
        resumed = kit.Federation([kit.Client()], checkpoint=(arrays, values), shrinkage__rule="drift")
        assert torch.equal(resumed.state.shrinkage.drift.total, torch.from_numpy(arrays["shrinkage.total"]))
        assert resumed.state.shrinkage.drift.rounds.max() == 2  # the first of three rounds was pretraining

    def test_without_it_the_checkpoint_is_what_it_was(self, kit):
        arrays, _ = kit.Federation([kit.Client()]).state.dump()
        assert not [name for name in arrays if name.startswith("shrinkage")]


class TestMethods:
    def test_one_word_is_the_paper(self):
        configuration = parse({"method": "paper", "retention.initial-ratio": 0.9})
        assert configuration.adaptive_clipping.rule == "paper"
        assert configuration.pretraining.measure == "magnitude"
        assert configuration.retention.initial_ratio == 0.6
        assert parse(flatten(configuration)) == configuration
        assert 'method = "paper"' in to_toml(configuration)

    def test_one_word_is_plain_training(self, kit):
        clients = [kit.Client(f"client-{index}") for index in range(2)]
        federation = kit.Federation(clients, method="dp-fedsgd")
        federation.run()
        assert federation.configuration.pretraining_rounds == 0
        assert {request.phase for request in clients[0].requests} == {"training"}
        assert {request.mask_id for request in clients[0].requests} == {""}

    def test_by_default_nothing_is_decided(self):
        assert parse({"method": "as-set"}) == Configuration()

    def test_there_is_no_other(self):
        with pytest.raises(ConfigurationError, match="method"):
            parse({"method": "papre"})
