"""The search, with a stand-in for the simulation whose outcome is a formula."""

import math
import sys
from types import SimpleNamespace

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event, rdp
from scipy import optimize
from typer.testing import CliRunner

from adadpigu_core.accounting import PlanShape, calibrate
from adadpigu_core.configuration import parse
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.sampling import SeededRandomness
from adadpigu_core.settings_file import read_toml
from simulations import command_line, simulate, tune
from simulations.selection_cost import RandomTrials
from simulations.tune import Point, front

RATE = "optimiser.local-learning-rate"
secrets = []  # whether the noise of each trial was
QUICK = ("-c", "federation.num-rounds=4", "-c", "federation.num-clients=2", "-c", "privacy.target-epsilon=2")


@pytest.fixture
def ran(monkeypatch):
    """Settings of every trial; accuracy is best at rate 0.1 and grows with epsilon."""
    seen = []
    secrets.clear()

    def prepare(flat):
        return SimpleNamespace(configuration=parse(flat))

    def simulate(simulation, engine, show, *, secret_noise=False):
        configuration = simulation.configuration
        seen.append(configuration)
        secrets.append(secret_noise)
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
        figure = (folder / "front.svg").read_text()
        assert figure.startswith("<svg")
        assert 2 < figure.count("<circle") <= 24  # those that were not stopped
        assert figure.count("<polyline") == 1

    def test_all_may_be_searched_and_only_what_is_named_is(self, ran, tmp_path):
        assert run("--output", tmp_path / "all", "--trials", 6, *QUICK).exit_code == 0
        assert len({c.privacy.sampling_probability for c in ran}) > 1
        ran.clear()
        assert run("--output", tmp_path / "one", "--trials", 6, "--search", RATE, *QUICK).exit_code == 0
        assert {c.privacy.sampling_probability for c in ran} == {0.5}

    def test_an_interrupted_search_goes_on_with_the_trial_that_was_cut_off(self, ran, tmp_path, monkeypatch):
        folder, simulate, calls = tmp_path / "search", tune.simulate, []

        def killed(simulation, engine, show, *, secret_noise=False):
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

        def simulate(simulation, engine, show, *, secret_noise=False):
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
        def simulate(*_, **__):
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

    def test_trials_are_independent(self, ran, tmp_path, monkeypatch):
        monkeypatch.setattr(RandomTrials, "draw", lambda *_: 3)
        assert run("--output", tmp_path / "private", *self.ASK, "--yes", *QUICK).exit_code == 0
        assert secrets == [True] * 3
        secrets.clear()
        assert run("--output", tmp_path / "public", "--trials", 2, "--search", RATE, *QUICK).exit_code == 0
        assert secrets == [False] * 2

    def test_how_many_trials_there_are_is_not_shown(self, ran, tmp_path, monkeypatch):
        outputs = []
        for number in (2, 5):
            monkeypatch.setattr(RandomTrials, "draw", lambda *_, number=number: number)
            result = run("--output", tmp_path / str(number), *self.ASK, "--yes", *QUICK)
            outputs.append(len(result.output.splitlines()))
            assert len(ran) == number
            ran.clear()
            assert "trial 1" not in result.output
            assert "round" not in result.output
        assert outputs[0] == outputs[1]

    def test_trials_that_fail_count_and_are_not_spoken_of(self, ran, tmp_path, monkeypatch):
        monkeypatch.setattr(RandomTrials, "draw", lambda *_: 5)
        simulate, calls = tune.simulate, []

        def sometimes(*args, **kwargs):
            calls.append(0)
            if len(calls) != 3:
                raise ConfigurationError("a record was strange")
            return simulate(*args, **kwargs)

        monkeypatch.setattr(tune, "simulate", sometimes)
        result = run("--output", tmp_path / "s", *self.ASK, "--yes", *QUICK)
        assert result.exit_code == 0, result.output
        assert len(calls) == 5
        assert "strange" not in result.output
        assert "best-epsilon-2.toml" in result.output

    def test_a_search_in_which_everything_fails_has_no_best(self, ran, tmp_path, monkeypatch):
        def simulate(*_, **__):
            raise ConfigurationError("a record was strange")

        monkeypatch.setattr(tune, "simulate", simulate)
        monkeypatch.setattr(RandomTrials, "draw", lambda *_: 5)
        result = run("--output", tmp_path / "s", *self.ASK, "--yes", *QUICK)
        assert result.exit_code == 0, result.output
        assert "There is no best trial" in result.output

    @pytest.mark.parametrize("changed", [("--trials", 2), ("--distribution", "poisson"), ("--epsilons", "2,4")])
    def test_a_search_does_not_go_on_at_another_cost(self, ran, tmp_path, monkeypatch, changed):
        def simulate(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(tune, "simulate", simulate)
            patch.setattr(RandomTrials, "draw", lambda *_: 4)
            assert run("--output", tmp_path / "s", *self.ASK, "--yes", *QUICK).exit_code == 130
        result = run("--output", tmp_path / "s", *self.ASK, "--yes", *QUICK, *changed)
        assert result.exit_code == 2
        assert "holds another search" in " ".join(result.output.split())
        assert ran == []

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
        assert "There is no best trial" in result.output


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
        (("-c", "privacy.ledger-dir=x", "--data", "private"), "cannot hold a selection"),
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


def renyi_divergence(events, order):
    """Of one trial at a whole order, by the binomial series of Mironov, Talwar, Zhang (2019)."""
    total = 0.0
    for one in events:
        q, sigma = one.sampling_probability, one.noise_multiplier
        terms = [
            math.log(math.comb(order, k))
            + k * math.log(q)
            + (order - k) * math.log1p(-q)
            + (k * k - k) / (2 * sigma**2)
            for k in range(order + 1)
        ]
        top = max(terms)
        total += one.count * (top + math.log(sum(math.exp(term - top) for term in terms))) / (order - 1)
    return total


def epsilon_of(divergences, delta):
    """The conversion of Canonne, Kamath, Steinke (2020), proposition 12."""
    return min(
        value + math.log1p(-1 / order) - math.log(delta * order) / (order - 1) for order, value in divergences.items()
    )


def delta_of(divergences, epsilon):
    return min(
        math.exp(min((order - 1) * (value - epsilon), 700)) / order * (1 - 1 / order) ** (order - 1)
        for order, value in divergences.items()
    )


def selection(events, mean, distribution):
    """Theorems 2 and 6 of Papernot and Steinke (2021), written down once more."""
    once = {order: renyi_divergence(events, order) for order in range(2, 129)}
    if distribution == "poisson":
        return {
            order: value + mean * min(1.0, delta_of(once, math.log1p(1 / (order - 1)))) + math.log(mean) / (order - 1)
            for order, value in once.items()
        }
    gamma = 1 / mean
    if distribution == "logarithmic":
        gamma = optimize.brentq(lambda g: (1 / g - 1) / -math.log(g) - mean, 1e-9, 1 - 1e-9)
    factor = 2 if distribution == "geometric" else 1
    constant = factor * min((1 - 1 / order) * value - math.log(gamma) / order for order, value in once.items())
    return {order: value + math.log(mean) / (order - 1) + constant for order, value in once.items()}


@pytest.mark.parametrize("distribution", ["geometric", "logarithmic", "poisson"])
def test_the_cost_of_a_search_is_that_of_the_theorems(distribution):
    plan = calibrate(PlanShape(0.5, 1, 9, 0.1), 2.0, 1e-5)
    trials = RandomTrials(distribution, 10.0)
    divergences = selection(plan.events, 10.0, distribution)
    one = trials.epsilon([plan.events], 1e-5)
    assert one == pytest.approx(epsilon_of(divergences, 1e-5), rel=0.02)
    # two searches at one delta cost more than one, and their epsilons at that delta must not be added up
    two = trials.epsilon([plan.events, plan.events], 1e-5)
    assert two == pytest.approx(epsilon_of({order: 2 * value for order, value in divergences.items()}, 1e-5), rel=0.02)
    assert two > one


@pytest.mark.parametrize(("distribution", "shape"), [("geometric", 1.0), ("logarithmic", 0.0), ("poisson", math.inf)])
class TestRandomTrials:
    def test_a_search_costs_more_than_a_trial_and_less_than_the_same_number_of_them(self, distribution, shape):
        plan = calibrate(PlanShape(0.5, 1, 9, 0.1), 2.0, 1e-5)
        whole = RandomTrials(distribution, 10.0).epsilon([plan.events], 1e-5)
        once = dp_accounting.ComposedDpEvent([event.dp_event() for event in plan.events])
        accountant = rdp.RdpAccountant()
        accountant.compose(dp_event.RepeatAndSelectDpEvent(once, 10.0, shape))
        exact = accountant.get_epsilon(1e-5)
        assert exact * 0.9999 <= whole <= exact * 1.1
        assert 2.0 < whole < 20.0
        assert RandomTrials(distribution, 20.0).epsilon([plan.events], 1e-5) > whole

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


@pytest.mark.parametrize("secret", [True, False])
def test_secret_noise_is_asked_of_every_client(tmp_path, monkeypatch, secret):
    asked = []

    class StoppedError(Exception):
        pass

    def grid(_app, nodes, *_, **__):
        asked.extend(nodes)
        raise StoppedError

    monkeypatch.setattr(simulate, "InProcessGrid", grid)
    simulation = simulate.prepare({"federation.num-clients": 3, "runtime.output": str(tmp_path / "run")})
    with pytest.raises(StoppedError):
        simulate.simulate(simulation, "in-process", print, secret_noise=secret)
    assert [node.get("unseeded", False) for node in asked] == [secret] * 3
