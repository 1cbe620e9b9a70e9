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

from adadpigu_core.configuration import Value, read_toml
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.provenance import code_fingerprint
from server.run_folder import CONFIGURATION, RESULT
from simulations.display import Progressing
from simulations.simulate import prepare, resume, simulate

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
    if name not in TABLES:
        raise ConfigurationError(f"there is no table {name!r}; choose {', '.join(TABLES)}")
    table = TABLES[name]
    results: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for epsilon in table.budgets:
        for method in METHODS:
            runs = [
                _run(table, method, epsilon, seed, output / f"{method}-epsilon-{epsilon:g}-seed-{seed}", watch, say)
                for seed in range(seeds)
            ]
            results[epsilon, method] = runs
    text = _markdown(table, results, name, seeds)
    (output / "table.md").write_text(text, encoding="utf-8")
    return text


def _run(
    table: Table, method: str, epsilon: float, seed: int, folder: Path, watch: Watch, say: Callable[[str], None]
) -> dict[str, Any]:
    if not (folder / RESULT).exists():
        say(f"{METHODS[method][0]}, epsilon {epsilon:g}, seed {seed}")
        flat = {
            **read_toml(_EXPERIMENTS / table.settings),
            **METHODS[method][1],
            **table.budgets[epsilon],
            "privacy.target-epsilon": epsilon,
            "seed": seed,
            "federation.partition-seed": seed,
            "runtime.output": str(folder),
        }
        simulation = resume(folder) if (folder / CONFIGURATION).exists() else prepare(flat)
        with watch(simulation.configuration.federation.num_rounds, simulation.done) as progress:
            return simulate(simulation, "in-process", progress.show)
    return dict(json.loads((folder / RESULT).read_text(encoding="utf-8")))


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
    rounds = {run["rounds"] for runs in results.values() for run in runs}
    lines += [
        "",
        f"`adadpigu reproduce {name} --seeds {seeds}`; seeds 0 to {seeds - 1}, {'/'.join(map(str, sorted(rounds)))} "
        f"rounds; commit {_commit()}, code {code_fingerprint()}; {os.cpu_count()} cores {platform.machine()}, no GPU.",
        "",
    ]
    return "\n".join(lines)


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
