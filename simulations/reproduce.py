"""The tables of the README, each made again by one command.

A table is one settings file, some budgets, and two methods at every budget: AdaDPIGU as configured, and plain DP-FedSGD
(everything retained from the start, no pretraining, no adaptive clipping) with the same accounting, rounds and clipping
norm. Accuracy is that of the last iterate on test data. A run that is there already is not run again, so that an
interrupted table goes on where it stopped.
"""

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adadpigu_core.configuration import Value
from adadpigu_core.exceptions import ConfigurationError
from server.run_folder import CONFIGURATION, RESULT
from simulations.display import Progressing
from simulations.simulate import prepare, read_settings, resume, simulate

Watch = Callable[[int, int], AbstractContextManager[Progressing]]

_EXPERIMENTS = Path(__file__).parent / "experiments"

PLAIN: dict[str, Value] = {
    "pretraining.round-share": 0.0,
    "retention.initial-ratio": 1.0,
    "adaptive-clipping.rule": "none",
}


@dataclass(frozen=True)
class Table:
    """What a table compares.

    Args:
        title: For the heading.
        settings: Name of the settings file in ``experiments/``.
        budgets: For each epsilon what differs from the file, for both methods.
    """

    title: str
    settings: str
    budgets: dict[float, dict[str, Value]]


TABLES = {
    "digits": Table("Digits, 10 clients, IID", "digits.toml", {8.0: {}, 2.0: {"optimiser.local-learning-rate": 0.05}}),
    "mnist": Table(
        "MNIST, 10 clients, IID", "mnist.toml", {8.0: {}, 4.0: {}, 1.0: {"optimiser.local-learning-rate": 0.2}}
    ),
}


@dataclass(frozen=True)
class WeightsTable:
    """What the table of ways to weight clients compares.

    Args:
        name: On the command line.
        title: For the heading.
        settings: Name of the settings file in ``experiments/``.
        kinds: For each kind of weight what differs from the file.
    """

    name: str
    title: str
    settings: str
    kinds: dict[str, dict[str, Value]]


WEIGHTS = WeightsTable(
    "heterogeneous",
    "Digits, 10 clients with 60 to 240 records and budgets from epsilon 0.5 to 8",
    "heterogeneous.toml",
    {"precision": {}, "records": {}, "uniform": {}},
)
METHODS: dict[str, tuple[str, dict[str, Value]]] = {"adadpigu": ("AdaDPIGU", {}), "dp-fedsgd": ("DP-FedSGD", PLAIN)}


def reproduce(name: str, seeds: int, output: Path, watch: Watch, say: Callable[[str], None]) -> str:
    """Run what is missing of a table and write it as Markdown, which is returned.

    Args:
        name: Key of ``TABLES``.
        seeds: Runs of each entry, with seeds from 0.
        output: Folder of the runs.
        watch: Shows the progress of a run, given its rounds and how many are done.
        say: Told which run begins.

    Raises:
        ConfigurationError: If there is no such table.
    """
    if name == WEIGHTS.name:
        return _reproduce_weights(seeds, output, watch, say)
    if name not in TABLES:
        raise ConfigurationError(f"there is no table {name!r}; choose {', '.join((*TABLES, WEIGHTS.name))}")
    table = TABLES[name]
    results: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for epsilon in table.budgets:
        for method in METHODS:
            runs = [
                _run(
                    _settings(table, method, epsilon, seed),
                    output / f"{method}-epsilon-{epsilon:g}-seed-{seed}",
                    f"{METHODS[method][0]}, epsilon {epsilon:g}, seed {seed}",
                    watch,
                    say,
                )
                for seed in range(seeds)
            ]
            results[epsilon, method] = runs
    text = _markdown(table, results, name, seeds)
    (output / "table.md").write_text(text, encoding="utf-8")
    return text


def _settings(table: Table, method: str, epsilon: float, seed: int) -> dict[str, Value]:
    return {
        **read_settings(_EXPERIMENTS / table.settings),
        **METHODS[method][1],
        **table.budgets[epsilon],
        "privacy.target-epsilon": epsilon,
        **_seeded(seed),
    }


def _seeded(seed: int) -> dict[str, Value]:
    return {"seed": seed, "federation.partition-seed": seed}


def _run(flat: dict[str, Value], folder: Path, title: str, watch: Watch, say: Callable[[str], None]) -> dict[str, Any]:
    if not (folder / RESULT).exists():
        say(title)
        begun = (folder / CONFIGURATION).exists()
        simulation = resume(folder) if begun else prepare({**flat, "runtime.output": str(folder)})
        with watch(simulation.configuration.federation.num_rounds, simulation.done) as progress:
            return simulate(simulation, "in-process", progress.show)
    return dict(json.loads((folder / RESULT).read_text(encoding="utf-8")))


def _reproduce_weights(seeds: int, output: Path, watch: Watch, say: Callable[[str], None]) -> str:
    """The table of ways to weight clients with different budgets: the same clients, plans and seeds for all."""
    results: dict[str, list[dict[str, Any]]] = {}
    for kind, changes in WEIGHTS.kinds.items():
        fixed = {**read_settings(_EXPERIMENTS / WEIGHTS.settings), **changes, "federation.aggregation": kind}
        results[kind] = [
            _run({**fixed, **_seeded(seed)}, output / f"{kind}-seed-{seed}", f"{kind} weights, seed {seed}", watch, say)
            for seed in range(seeds)
        ]
    text = _weights_markdown(results, seeds)
    (output / "table.md").write_text(text, encoding="utf-8")
    return text


def _weights_markdown(results: dict[str, list[dict[str, Any]]], seeds: int) -> str:
    accuracies = {kind: [100 * run["accuracy"] for run in runs] for kind, runs in results.items()}
    lines = [
        f"**{WEIGHTS.title}** (accuracy on test data in %, last iterate, mean ± standard deviation over {seeds} seeds)",
        "",
        "| weights | accuracy | precision minus these, paired | largest share of a client's budget spent |",
        "|---|---|---|---|",
    ]
    for kind, values in accuracies.items():
        differences = [best - value for best, value in zip(accuracies["precision"], values, strict=True)]
        gain = "" if kind == "precision" else _spread(differences, sign="+")
        shares = [client["epsilon"] / client["target_epsilon"] for run in results[kind] for client in run["clients"]]
        lines.append(f"| {kind} | {_spread(values)} | {gain} | {max(shares):.4f} |")
    return "\n".join([*lines, "", _origin(WEIGHTS.name, seeds, [run for runs in results.values() for run in runs]), ""])


def _markdown(table: Table, results: dict[tuple[float, str], list[dict[str, Any]]], name: str, seeds: int) -> str:
    lines = [
        f"**{table.title}** (accuracy on test data in %, last iterate, mean ± standard deviation over {seeds} seeds)",
        "",
        "| epsilon | AdaDPIGU | DP-FedSGD | difference, paired | largest epsilon spent |",
        "|---|---|---|---|---|",
    ]
    for epsilon in table.budgets:
        ours, plain = ([100 * run["accuracy"] for run in results[epsilon, method]] for method in METHODS)
        differences = [mine - theirs for mine, theirs in zip(ours, plain, strict=True)]
        runs = results[epsilon, "adadpigu"] + results[epsilon, "dp-fedsgd"]
        epsilons = [client["epsilon"] for run in runs for client in run["clients"]]
        spent = math.inf if None in epsilons else max(epsilons)
        lines.append(
            f"| {epsilon:g} | {_spread(ours)} | {_spread(plain)} | {_spread(differences, sign='+')} | {spent:.3f} |"
        )
    return "\n".join([*lines, "", _origin(name, seeds, [run for runs in results.values() for run in runs]), ""])


def _origin(name: str, seeds: int, runs: list[dict[str, Any]]) -> str:
    """Say how a table was made."""
    rounds = "/".join(str(number) for number in sorted({run["rounds"] for run in runs}))
    codes = "/".join(sorted({run["code"] for run in runs}))
    return (
        f"`adadpigu reproduce {name} --seeds {seeds}`; seeds 0 to {seeds - 1}, {rounds} rounds; "
        f"commit {_commit()}, code {codes}; {os.cpu_count()} cores {platform.machine()}, no GPU."
    )


def _spread(values: list[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.2f} ± {deviation:.2f}"


def _commit() -> str:
    """Short hash of the checkout that this code lies in, if it lies in one."""
    command = ["git", "-C", str(_EXPERIMENTS), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
