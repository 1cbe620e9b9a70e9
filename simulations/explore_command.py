"""The command ``adadpigu explore``: equal clients simulated as one, over rates and seeds, for finding settings."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adadpigu_core.exceptions import AdaDPIGUError, ConfigurationError
from simulations.console import Console
from simulations.failure import failed

if TYPE_CHECKING:
    from adadpigu_core.configuration import Configuration

HELP = """Look quickly at what settings are worth: equal clients are simulated as one, in seconds a run.

The models have the same distribution as those of 'adadpigu simulate', whose messages, ledgers and folder are left out.
Seeds start at 100, so that results with the seeds from 0 were not what the settings were chosen by.

[bold]Examples[/bold]

  adadpigu explore --config simulations/experiments/wide_table_10_eps4.toml --rates 0.1,0.2,0.4 -c shrinkage.rule=drift

  adadpigu explore --config simulations/experiments/digits_10_iid_eps2.toml --seeds 20 --against method=dp-fedsgd
      and how much better than DP-SGD that is, paired by seed
"""


def explore(
    config: Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")] = None,
    override: Annotated[list[str] | None, typer.Option("-c", metavar="KEY=VALUE", help="One setting.")] = None,
    rates: Annotated[str, typer.Option(help="Local learning rates to try; empty: the one that is set.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each rate.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of the first.")] = 100,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Compare with the same seeds and this setting changed as well."),
    ] = None,
) -> None:
    """Run and print mean and standard deviation for each rate."""
    try:
        _explore(config, override or [], rates, range(first_seed, first_seed + seeds), against or [])
    except AdaDPIGUError as error:
        raise failed(error) from error


def _explore(config: Path | None, overrides: list[str], rates: str, seeds: range, against: list[str]) -> None:
    from adadpigu_core.configuration import not_private, parse
    from simulations.command_line import parse_overrides
    from simulations.simulate import read_settings

    flat = {**(read_settings(config) if config else {}), **parse_overrides(overrides)}
    tried = [("", parse(flat))]
    if against:
        tried.append((", ".join(against), parse({**flat, **parse_overrides(against)})))
    console = Console(soft_wrap=True)
    for warning in dict.fromkeys(not_private(configuration) for _, configuration in tried):
        if warning:
            console.print(f"[red]{warning}[/red]")
    for chosen in rates.split(",") if rates else [None]:
        found = [_runs(_with_rate(configuration, chosen), seeds, name) for name, configuration in tried]
        for (name, _), results in zip(tried, found, strict=True):
            console.print(f"{name}: {_line(results)}" if name else _line(results), highlight=False)
            failed_runs = [result["diverged"] for result in results if result["diverged"]]
            if failed_runs:
                console.print(
                    f"[yellow]{len(failed_runs)} of {len(results)} runs: {failed_runs[0]}[/yellow]", highlight=False
                )
        if against:
            console.print(f"difference: {_difference(*found)}", highlight=False)


def _with_rate(configuration: "Configuration", rate: str | None) -> "Configuration":
    if rate is None:
        return configuration
    try:
        value = float(rate)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"--rates: {rate!r} is no rate; give positive numbers, as in 0.1,0.2")
    return replace(configuration, optimiser=replace(configuration.optimiser, local_learning_rate=value))


def _runs(configuration: "Configuration", seeds: range, name: str) -> list[dict[str, Any]]:
    """Give what each seed comes to, and say meanwhile how far it is."""
    from simulations.pooled import run

    results: list[dict[str, Any]] = []
    with Console(stderr=True).status("") as status:
        for seed in seeds:
            status.update(f"{name or 'settings'}: run {len(results) + 1} of {len(seeds)}")
            federation = replace(configuration.federation, partition_seed=seed)
            results.append(run(replace(configuration, seed=seed, federation=federation)))
    return results


def _line(results: list[dict[str, Any]]) -> str:
    from simulations.table_report import spread

    shown = []
    for name in _qualities(results):
        found = spread([100 * result[name] for result in results])
        shown.append(f"{name.replace('_', ' ')} {found['mean']:.2f} ± {found['stddev']:.2f}")
    each = " ".join(f"{100 * result['accuracy']:.2f}" for result in results)
    sent = f"{results[0]['bytes_up'] / 1e6:.3g} MB up"
    used = f"{results[0]['learning_rate']:.3g}"
    return f"rate {used}  {'  '.join(shown)}  {sent}  (accuracy by seed: {each})"


def _difference(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    """Write down first minus second, paired by seed: mean, deviation, standard error of the mean, p value."""
    from simulations.table_report import difference, paired

    shown = []
    for name in _qualities(first):
        found = paired(*([100 * result[name] for result in results] for results in (first, second)))
        text = f"{name.replace('_', ' ')} {difference(found)}"
        if len(first) > 1:
            text += f", standard error {(found['stddev'] or 0.0) / len(first) ** 0.5:.2f}"
        shown.append(text)
    return "  ".join(shown)


def _qualities(results: list[dict[str, Any]]) -> list[str]:
    return [name for name in ("accuracy", "area_under_curve") if name in results[0]]
