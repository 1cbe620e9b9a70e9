"""A search for good settings: trials of the real simulation, kept in a database, at one budget or several.

On public or synthetic data a search is free: it may learn from its trials and stop bad ones early. On private data it
is not, see ``selection_cost``: trials are drawn blindly, none is stopped, their number is random, and only the best of
each budget is shown or kept.

Left out: charging a search to lasting ledgers. What a ledger holds are Poisson-sampled Gaussian releases, composed by
their losses. A selection among a random number of runs is no composition of such, and only its Renyi divergence is
known: there are no events that a ledger could add up, and whose epsilon everybody could recompute, that stand for it.
So a search with lasting ledgers is refused, and what a private search spent is taken off the budgets by hand, see
docs/sharp-edges.md.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from adadpigu_core.accounting import Event, calibrate
from adadpigu_core.configuration import Value, parse, to_toml
from adadpigu_core.datasets import TEST, is_own
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.sampling import SystemRandomness
from server.run_folder import RunFolder
from simulations.display import Progressing
from simulations.search_space import space
from simulations.selection_cost import RandomTrials
from simulations.simulate import prepare, resolved, simulate

Watch = Callable[[int, int], AbstractContextManager[Progressing]]
_STORAGE, _SEARCH, _OVER = "study.db", "search.json", "over"
_WARM_UP_SHARE = 0.2  # of the rounds, in which no trial is stopped
_FAILURES = 3
_FAILED = -1.0  # the accuracy of a private trial that failed: below every other, so that it is never the best
_NO_LEDGERS = {
    False: "trials have ledgers of their own, and are not charged to lasting ones",
    True: "a ledger composes Gaussian releases and cannot hold a selection, and trials one by one would cost more than "
    "the search does; its cost is shown: take it off the budgets of these data before it starts",
}


@dataclass(frozen=True)
class Search:
    """What is searched.

    Args:
        flat: Settings of all trials.
        epsilons: Budgets, each with a search of its own.
        trials: Trials at each budget; on private data None, see ``random_trials``.
        keys: Settings to search; empty = all that may be.
        random_trials: On private data, how many trials there are.
        output: Folder of the search; an interrupted one goes on where it stopped.
    """

    flat: dict[str, Value]
    epsilons: tuple[float, ...]
    trials: int | None
    keys: tuple[str, ...]
    random_trials: RandomTrials | None
    output: Path

    @property
    def private(self) -> bool:
        """Whether results must not be looked at for free."""
        return self.random_trials is not None


@dataclass(frozen=True)
class Point:
    """One finished trial."""

    target: float
    epsilon: float
    accuracy: float
    settings: dict[str, Value]


def check(search: Search, data: str) -> None:
    """Refuse a search that cannot be run or would not be counted rightly.

    Args:
        search: What is asked for.
        data: ``public``, ``private``, or empty if that was not said.

    Raises:
        ConfigurationError: With the reason.
    """
    space(search.keys, private=search.private)
    configuration = parse(search.flat)
    if not data and is_own(configuration.task.dataset):
        raise ConfigurationError(
            "--data: say whether these records are public or private; on private data a search costs privacy"
        )
    if search.private and configuration.task.evaluate_on != TEST:
        raise ConfigurationError(
            "task.evaluate-on: validation records are taken from the private ones, and comparing trials on them would "
            "reveal them; use test data, which must be public"
        )
    if configuration.privacy.ledger_dir:
        raise ConfigurationError(f"privacy.ledger-dir: {_NO_LEDGERS[search.private]}; leave it out of a search")
    if configuration.federation.clients:
        raise ConfigurationError("federation.clients: a search is for one budget of all clients; leave it out")
    for target in search.epsilons:
        parse({**search.flat, "privacy.target-epsilon": target})


def cost(search: Search, target: float) -> tuple[float, float]:
    """Epsilon of one trial, and of the whole search at one budget."""
    return target, target if search.random_trials is None else search.random_trials.epsilon(
        [_events(search, target)], _delta(search)
    )


def total_cost(search: Search) -> float:
    """Epsilon of a private search at all its budgets together, at the same delta."""
    if search.random_trials is None:
        return 0.0
    return search.random_trials.epsilon([_events(search, target) for target in search.epsilons], _delta(search))


def _delta(search: Search) -> float:
    return parse(search.flat).privacy.target_delta


def _events(search: Search, target: float) -> tuple[Event, ...]:
    configuration = parse({**search.flat, "privacy.target-epsilon": target})
    return calibrate(configuration.plan_shape, target, configuration.privacy.target_delta).events


def run(search: Search, watch: Watch, say: Callable[[str], None]) -> list[Point]:
    """Run what is missing of a search; gives the best trial of each budget on private data, else all that finished."""
    search.output.mkdir(parents=True, exist_ok=True)
    _claim(search)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = []
    for target in search.epsilons:
        points = _run_budget(search, target, watch, say)
        if points:
            best = max(points, key=lambda point: point.accuracy)
            _write_best(search.output, best, search.flat)
            found += [best] if search.private else points
    if search.private:
        (search.output / _OVER).touch()
        (search.output / _STORAGE).unlink(missing_ok=True)  # it knows the trials that are not the best
    return found


def front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in both accuracy and budget, in the order of budgets."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (one.target, -one.accuracy)):
        if not kept or point.accuracy > kept[-1].accuracy:
            kept.append(point)
    return kept


def _claim(search: Search) -> None:
    """Tie the folder to one search, so that it does not go on as another."""
    asked = {"settings": search.flat, "keys": search.keys, "private": search.private}
    if search.random_trials is not None:  # what was shown as the cost of the search
        asked |= {"random-trials": asdict(search.random_trials), "epsilons": search.epsilons}
    wanted = json.loads(json.dumps(asked))
    path = search.output / _SEARCH
    if (search.output / _OVER).exists():
        raise ConfigurationError(f"--output: the search in {search.output} is over, and another one costs anew")
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != wanted:
            raise ConfigurationError(f"--output: {search.output} holds another search; choose another folder")
    elif any(search.output.iterdir()):
        raise ConfigurationError(f"--output: {search.output} is not empty and holds no search; choose another folder")
    else:
        path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _run_budget(search: Search, target: float, watch: Watch, say: Callable[[str], None]) -> list[Point]:
    configuration = parse(search.flat)
    rounds, seed = configuration.federation.num_rounds, configuration.seed
    study = optuna.create_study(
        storage=f"sqlite:///{search.output.absolute() / _STORAGE}",
        study_name=f"epsilon-{target:g}",
        direction="maximize",
        load_if_exists=True,
        # independent trials are what private accounting is for
        sampler=optuna.samplers.RandomSampler() if search.private else optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.NopPruner()
        if search.private
        else optuna.pruners.MedianPruner(n_warmup_steps=round(_WARM_UP_SHARE * rounds)),
    )
    _give_up_interrupted(study)
    wanted = _wanted(study, search)
    failures = 0
    while (done := _done(study)) < wanted:
        if not search.private:  # whose number of trials is nobody's to know
            say(f"epsilon {target:g}: trial {done + 1} of {wanted}")
        trial = study.ask()
        try:
            study.tell(trial, _trial(search, target, trial, rounds, watch))
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
        except Exception as error:
            if search.private:
                # it counts as any other: to try again, or to say so, would tell of a trial that is not the best
                study.tell(trial, _FAILED)
                continue
            study.tell(trial, state=TrialState.FAIL)
            failures += 1
            if failures >= _FAILURES:
                raise
            say(f"trial {trial.number} failed: {error}")
        except BaseException:
            study.tell(trial, state=TrialState.FAIL)
            raise
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [
        Point(target, one.user_attrs["epsilon"], float(one.value or 0.0), one.user_attrs["settings"])
        for one in complete
        if one.value != _FAILED
    ]


def _wanted(study: optuna.Study, search: Search) -> int:
    """Number of trials; a random one is drawn once and stays when a search goes on."""
    if search.random_trials is None:
        return search.trials or 0
    if "trials" not in study.user_attrs:
        study.set_user_attr("trials", search.random_trials.draw(SystemRandomness()))
    return int(study.user_attrs["trials"])


def _done(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def _give_up_interrupted(study: optuna.Study) -> None:
    """Trials that a killed search has left behind run again from the start, with the settings that they had."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)


def _trial(search: Search, target: float, trial: optuna.Trial, rounds: int, watch: Watch) -> float:
    chosen = {key: suggest(trial, key) for key, suggest in space(search.keys, private=search.private).items()}
    folder = search.output / f"epsilon-{target:g}-trial-{trial.number}"
    shutil.rmtree(folder, ignore_errors=True)
    settings = {**search.flat, **chosen, "privacy.target-epsilon": target}
    simulation = prepare({**settings, "runtime.output": str(folder)})
    with watch(rounds, 0) as progress:

        def show(metrics: dict[str, Any]) -> None:
            # how a trial is doing is for nobody to see where only the best may be seen
            progress.show({**metrics, "accuracy": math.nan} if search.private else metrics)
            if "accuracy" in metrics:
                trial.report(metrics["accuracy"], metrics["round"])
                if trial.should_prune():
                    raise optuna.TrialPruned

        try:
            # repeated noise would make trials dependent, and who knows a seed can take its noise off
            result = simulate(simulation, "in-process", show, secret_noise=search.private)
        finally:
            if search.private:
                shutil.rmtree(folder, ignore_errors=True)  # nobody may look at a trial, however it ended
    trial.set_user_attr("epsilon", max(client["epsilon"] for client in result["clients"]))
    trial.set_user_attr("settings", {key: value for key, value in settings.items() if key != "runtime.output"})
    return float(result["accuracy"])


def _write_best(folder: Path, best: Point, flat: dict[str, Value]) -> None:
    settings = {**flat, **best.settings, "runtime.output": "", "task.evaluate-on": "test"}
    RunFolder(folder).write_text(f"best-epsilon-{best.target:g}.toml", to_toml(resolved(parse(settings))))


__all__ = ["Point", "Search", "check", "cost", "front", "run", "total_cost"]
