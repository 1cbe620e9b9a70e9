"""The command ``adadpigu explore``: equal clients simulated as one, over rates and seeds, for finding settings."""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from adadpigu_core.exceptions import AdaDPIGUError
from simulations.failure import failed

HELP = """Look quickly at what settings are worth: equal clients are simulated as one, in seconds a run.

The models have the same distribution as those of 'adadpigu simulate', whose messages, ledgers and folder are left out.
Seeds start at 100, so that results with the seeds from 0 were not what the settings were chosen by.

[bold]Example[/bold]

  adadpigu explore --config simulations/experiments/wide_table_10_eps4.toml --rates 0.1,0.2,0.4 -c shrinkage.rule=drift
"""


def explore(
    config: Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")] = None,
    override: Annotated[list[str] | None, typer.Option("-c", metavar="KEY=VALUE", help="One setting.")] = None,
    rates: Annotated[str, typer.Option(help="Local learning rates to try; empty: the one that is set.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each rate.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of the first.")] = 100,
) -> None:
    """Run and print mean and standard deviation for each rate."""
    try:
        _explore(config, override or [], rates, range(first_seed, first_seed + seeds))
    except AdaDPIGUError as error:
        raise failed(error) from error


def _explore(config: Path | None, overrides: list[str], rates: str, seeds: range) -> None:
    from adadpigu_core.configuration import not_private, parse
    from simulations.command_line import parse_overrides
    from simulations.pooled import run
    from simulations.simulate import read_settings

    flat = {**(read_settings(config) if config else {}), **parse_overrides(overrides)}
    configuration = parse(flat)
    console = Console()
    if warning := not_private(configuration):
        console.print(f"[red]{warning}[/red]")
    tried = [float(rate) for rate in rates.split(",")] if rates else [configuration.optimiser.local_learning_rate]
    for rate in tried:
        results = [
            run(
                replace(
                    configuration,
                    seed=seed,
                    federation=replace(configuration.federation, partition_seed=seed),
                    optimiser=replace(configuration.optimiser, local_learning_rate=rate),
                )
            )
            for seed in seeds
        ]
        shown = [
            f"{name.replace('_', ' ')} {_spread([100 * result[name] for result in results])}"
            for name in ("accuracy", "area_under_curve")
            if name in results[0]
        ]
        each = " ".join(f"{100 * result['accuracy']:.2f}" for result in results)
        sent = f"{results[0]['bytes_up'] / 1e6:.3g} MB up"
        used = f"{results[0]['learning_rate']:.3g}"
        console.print(f"rate {used}  {'  '.join(shown)}  {sent}  (accuracy by seed: {each})", highlight=False)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"
