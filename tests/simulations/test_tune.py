"""The search, with a stand-in for the simulation whose outcome is a formula."""

import math
import sys
from types import SimpleNamespace

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event, rdp
from typer.testing import CliRunner

from adadpigu_core.accounting import PlanShape, calibrate
from adadpigu_core.configuration import parse
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.sampling import SeededRandomness
from adadpigu_core.settings_file import read_toml
from simulations import command_line, tune
from simulations.selection_cost import RandomTrials
from simulations.tune import Point, front

RATE = "optimiser.local-learning-rate"
QUICK = ("-c", "federation.num-rounds=4", "-c", "federation.num-clients=2", "-c", "privacy.target-epsilon=2")


@pytest.fixture
def ran(monkeypatch):
    """Settings of every trial; accuracy is best at rate 0.1 and grows with epsilon."""
    seen = []

    def prepare(flat):
        return SimpleNamespace(configuration=parse(flat))

    def simulate(simulation, engine, show):
        configuration = simulation.configuration
        seen.append(configuration)
        fit = 1 - abs(math.log10(configuration.optimiser.local_learning_rate / 0.1)) / 4
        accuracy = fit * (1 - 0.1 / configuration.privacy.target_epsilon)
        for number in range(1, configuration.federation.num_rounds + 1):
            show({"round": number, "phase": "training", "epsilon": 1.0, "accuracy": accuracy})
        return {"accuracy": accuracy, "clients": [{"epsilon": configuration.privacy.target_epsilon * 0.999}]}

    monkeypatch.setattr(tune, "prepare", prepare)
    monkeypatch.setattr(tune, "simulate", simulate)
    monkeypatch.setenv("COLUMNS", "160")
    return seen


def run(*arguments, **kwargs):
    return CliRunner().invoke(command_line.app, ["tune", *map(str, arguments)], catch_exceptions=False, **kwargs)


class TestOnPublicData:
    def test_the_best_is_found_and_can_be_simulated(self, ran, tmp_path):
        folder = tmp_path / "search"
        result = run("--output", folder, "--trials", 12, "--search", RATE, "--epsilons", "8,1", *QUICK)
        assert result.exit_code == 0, result.output
        assert len(ran) == 24
        for target in (1, 8):
            rates = [c.optimiser.local_learning_rate for c in ran if c.privacy.target_epsilon == target]
            best = parse(read_toml(folder / f"best-epsilon-{target}.toml"))
            assert best.optimiser.local_learning_rate == min(rates, key=lambda rate: abs(math.log10(rate / 0.1)))
            assert best.privacy.target_epsilon == target
            assert best.runtime.output == ""
        assert "trials that no other beats" in result.output
        assert (folder / "front.svg").read_text().startswith("<svg")

    def test_all_may_be_searched_and_only_what_is_named_is(self, ran, tmp_path):
        assert run("--output", tmp_path / "all", "--trials", 6, *QUICK).exit_code == 0
        assert len({c.privacy.sampling_probability for c in ran}) > 1
        ran.clear()
        assert run("--output", tmp_path / "one", "--trials", 6, "--search", RATE, *QUICK).exit_code == 0
        assert {c.privacy.sampling_probability for c in ran} == {0.5}

    def test_an_interrupted_search_goes_on_with_the_trial_that_was_cut_off(self, ran, tmp_path, monkeypatch):
        folder, simulate, calls = tmp_path / "search", tune.simulate, []

        def killed(simulation, engine, show):
            calls.append(simulation.configuration.optimiser.local_learning_rate)
            if len(calls) == 3:
                monkeypatch.setattr(tune.optuna.Study, "tell", lambda *_, **__: None)  # as if the process were gone
                raise KeyboardInterrupt
            return simulate(simulation, engine, show)

        with monkeypatch.context() as patch:
            patch.setattr(tune, "simulate", killed)
            original = tune.optuna.Study.tell
            assert run("--output", folder, "--trials", 5, "--search", RATE, *QUICK).exit_code == 130
            monkeypatch.setattr(tune.optuna.Study, "tell", original)
        ran.clear()
        assert run("--output", folder, "--trials", 5, "--search", RATE, *QUICK).exit_code == 0
        assert len(ran) == 3
        assert ran[0].optimiser.local_learning_rate == calls[2]
        # another search has no business here
        assert run("--output", folder, "--trials", 5, *QUICK).exit_code == 2

    def test_bad_trials_are_stopped_early(self, ran, tmp_path, monkeypatch):
        rounds = []

        def simulate(simulation, engine, show):
            good = len(rounds) < 6
            rounds.append(0)
            for number in range(1, 11):
                rounds[-1] = number
                show({"round": number, "phase": "training", "epsilon": 1.0, "accuracy": 0.9 if good else 0.1})
            return {"accuracy": 0.9, "clients": [{"epsilon": 2.0}]}

        monkeypatch.setattr(tune, "simulate", simulate)
        result = run("--output", tmp_path / "s", "--trials", 8, "--search", RATE, *QUICK)
        assert result.exit_code == 0, result.output
        assert rounds[:6] == [10] * 6
        assert max(rounds[6:]) < 10

    def test_trials_that_fail_end_the_search_after_a_few(self, ran, tmp_path, monkeypatch):
        def simulate(*_):
            raise ConfigurationError("it cannot be")

        monkeypatch.setattr(tune, "simulate", simulate)
        result = run("--output", tmp_path / "s", "--trials", 8, "--search", RATE, *QUICK)
        assert result.exit_code == 2
        assert "trial 1 failed: it cannot be" in result.output


class TestOnPrivateData:
    ASK = ("--data", "private", "--trials", 5, "--search", RATE)

    def test_the_cost_is_shown_before_anything_runs(self, ran, tmp_path):
        result = run("--output", tmp_path / "s", *self.ASK, *QUICK, input="n\n")
        assert result.exit_code == 1
        assert "Epsilon of the search" in result.output
        assert ran == []
        assert not (tmp_path / "s").exists()

    def test_only_the_best_is_shown_or_kept(self, ran, tmp_path, monkeypatch):
        monkeypatch.setattr(RandomTrials, "draw", lambda *_: 4)
        folder = tmp_path / "s"
        result = run("--output", folder, *self.ASK, "--yes", *QUICK)
        assert result.exit_code == 0, result.output
        assert len(ran) == 4
        assert sorted(path.name for path in folder.iterdir()) == [
            "best-epsilon-2.toml",
            "front.svg",
            "over",
            "search.json",
        ]
        accuracies = {f"{(1 - abs(math.log10(c.optimiser.local_learning_rate / 0.1)) / 4) * 0.95:.4f}" for c in ran}
        assert len([text for text in accuracies if text in result.output]) == 1
        assert "search in" in run("--output", folder, *self.ASK, "--yes", *QUICK).output

    def test_no_trial_is_stopped_and_none_learns_from_another(self, ran, tmp_path, monkeypatch):
        monkeypatch.setattr(RandomTrials, "draw", lambda *_: 3)
        samplers = []
        create = tune.optuna.create_study
        monkeypatch.setattr(tune.optuna, "create_study", lambda **kwargs: samplers.append(kwargs) or create(**kwargs))
        assert run("--output", tmp_path / "s", *self.ASK, "--yes", *QUICK).exit_code == 0
        assert type(samplers[0]["sampler"]).__name__ == "RandomSampler"
        assert type(samplers[0]["pruner"]).__name__ == "NopPruner"

    def test_there_may_be_no_trial_at_all(self, ran, tmp_path, monkeypatch):
        monkeypatch.setattr(RandomTrials, "draw", lambda *_: 0)
        result = run("--output", tmp_path / "s", *self.ASK, "--distribution", "poisson", "--yes", *QUICK)
        assert result.exit_code == 0
        assert "No trial was run" in result.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("-c", "task.dataset=npz:mine.npz"), "--data: say whether"),
        (("--data", "secret"), "neither public nor private"),
        (("--search", "seed"), "--search: seed cannot be searched"),
        (("--data", "private", "--search", "privacy.sampling-probability"), "changes what a trial costs"),
        (("--epsilons", "one"), "--epsilons: 'one' must be numbers"),
        (("--epsilons", "-1"), "privacy.target-epsilon"),
        (("-c", "privacy.ledger-dir=x"), "privacy.ledger-dir: trials have ledgers of their own"),
        (("--data", "private", "--distribution", "uniform"), "--distribution: 'uniform' is none of"),
        (("--data", "private", "--trials", "1"), "--trials: the mean must be above 1"),
    ],
)
def test_mistakes_are_named(ran, tmp_path, arguments, problem):
    result = run("--output", tmp_path / "s", *QUICK, *arguments)
    assert result.exit_code == 2
    assert problem in " ".join(result.output.split())
    assert ran == []


def test_the_front_holds_what_no_other_beats():
    points = [Point(2, 1.9, 0.5, {}), Point(1, 0.9, 0.6, {}), Point(8, 7.9, 0.7, {}), Point(8, 7.8, 0.65, {})]
    assert front(points) == [points[1], points[2]]


@pytest.mark.parametrize(("distribution", "shape"), [("geometric", 1.0), ("logarithmic", 0.0), ("poisson", math.inf)])
class TestRandomTrials:
    def test_a_search_costs_more_than_a_trial_and_less_than_the_same_number_of_them(self, distribution, shape):
        plan = calibrate(PlanShape(0.5, 1, 9, 0.1), 2.0, 1e-5)
        whole = RandomTrials(distribution, 10.0).epsilon(plan.events, 1e-5)
        once = dp_accounting.ComposedDpEvent([event.dp_event() for event in plan.events])
        accountant = rdp.RdpAccountant()
        accountant.compose(dp_event.RepeatAndSelectDpEvent(once, 10.0, shape))
        exact = accountant.get_epsilon(1e-5)
        assert exact * 0.9999 <= whole <= exact * 1.1
        assert 2.0 < whole < 20.0
        assert RandomTrials(distribution, 20.0).epsilon(plan.events, 1e-5) > whole

    def test_numbers_have_the_distribution_that_is_accounted_for(self, distribution, shape):
        trials, randomness = RandomTrials(distribution, 4.0), SeededRandomness(1)
        drawn = np.array([trials.draw(randomness) for _ in range(4000)])
        assert drawn.mean() == pytest.approx(4.0, abs=0.45)
        assert drawn.min() == (0 if distribution == "poisson" else 1)
        ones = {"geometric": 0.25, "poisson": 4 * math.exp(-4)}
        if distribution in ones:
            assert np.mean(drawn == 1) == pytest.approx(ones[distribution], abs=0.03)
        assert sum(trials._probability(number) for number in range(2000)) == pytest.approx(1.0, abs=1e-6)


def test_optuna_is_named_if_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "simulations.tune", None)
    result = run("--output", tmp_path / "s", *QUICK)
    assert result.exit_code == 2
    assert "pip install 'adadpigu" in result.output
