"""The command ``adadpigu``.

Whatever needs torch is imported by the commands that need it, so that help and mistakes answer at once.
"""

import logging
import shlex
import sys
import time
import tomllib
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from adadpigu_core.exceptions import AdaDPIGUError, ConfigurationError
from simulations import (
    doctor_commands,
    explore_command,
    figure_command,
    ledger_commands,
    node_commands,
    plan_command,
    policy_commands,
    report_command,
    reproduce_command,
    tune_command,
)
from simulations.benchmarks.command_line import app as benchmark
from simulations.console import Console
from simulations.failure import failed

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    help="Federated learning on Flower in which every client's records are protected by differential privacy.",
)
app.add_typer(policy_commands.app, name="policy")
app.add_typer(ledger_commands.app, name="ledger")
node_commands.register(app)
doctor_commands.register(app)
app.add_typer(benchmark, name="benchmark")

_SIMULATE = """Run a whole federation on this machine: the real clients and the real server, one ledger a client.

[bold]Examples[/bold]

  adadpigu simulate
      ten clients on handwritten digits, epsilon 8 each

  adadpigu simulate -c privacy.target-epsilon=2 -c federation.num-clients=20
      a smaller budget, more clients

  adadpigu simulate --config simulations/experiments/mnist.toml --output runs/mnist
      settings from a file; nested tables, e.g. \\[privacy] target-epsilon = 4.0

  adadpigu simulate -c task.dataset=npz:mine.npz
      your own arrays x_train, y_train, x_test, y_test

  adadpigu simulate --resume runs/mnist
      go on with a run that was interrupted

  adadpigu simulate --resume runs/mnist --stop-after 9
      go on for 9 minutes at most, where programs may not run longer

[bold]adadpigu settings[/bold] lists every key, its default and its meaning.
"""


@app.callback()
def _main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


@app.command(help=_SIMULATE)
def simulate(
    config: Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("-c", metavar="KEY=VALUE", help="One setting; wins over the file.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="in-process: fast, repeatable. flower: through 'flwr run' and Ray.")
    ] = "in-process",
    ray_address: Annotated[
        str | None, typer.Option(help="With --engine flower: a Ray cluster that runs already; also RAY_ADDRESS.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write; must be new or empty.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a run to go on with.")] = None,
    stop_after: Annotated[
        float | None,
        typer.Option(metavar="MINUTES", min=0, help="End before the round that would take longer; --resume goes on."),
    ] = None,
) -> None:
    """Run a simulation and print its outcome."""
    console = Console()
    deadline = None if stop_after is None else time.monotonic() + 60 * stop_after  # what is imported below counts too
    try:
        _simulate(console, config, override or [], engine, ray_address, output, resume, deadline)
    except AdaDPIGUError as error:
        raise failed(error) from error


def _simulate(
    console: Console,
    config: Path | None,
    overrides: list[str],
    engine: str,
    ray_address: str | None,
    output: Path | None,
    resume: Path | None,
    deadline: float | None,
) -> None:
    from simulations import simulate as engines
    from simulations.display import introduce, progressing, say, show_result

    if engine not in engines.ENGINES:
        raise ConfigurationError(f"--engine: {engine!r} is none of {', '.join(engines.ENGINES)}")
    if deadline is not None and engine != "in-process":
        raise ConfigurationError("--stop-after: only runs of the in-process engine can end between two rounds")
    if resume is not None:
        if config is not None or overrides or output is not None:
            raise ConfigurationError(
                "--resume: a run goes on with its own settings; leave out --config, -c and --output"
            )
        simulation = engines.resume(resume)
    else:
        flat = {**(engines.read_settings(config) if config else {}), **parse_overrides(overrides)}
        if output is not None:
            flat["runtime.output"] = str(output)
        simulation = engines.prepare(flat)
    introduce(console, simulation.configuration, simulation.records, simulation.done)
    configuration = simulation.configuration
    go_on = f"Go on with: adadpigu simulate --resume {shlex.quote(str(simulation.folder.path))}"
    stop_after = None if deadline is None else engines.StopAfter(deadline)
    try:
        with progressing(console, configuration.federation.num_rounds, simulation.done) as progress:
            result = engines.simulate(simulation, engine, progress.show, ray_address, stop_after=stop_after)
    except KeyboardInterrupt:
        say(console, f"Interrupted. {go_on}")
        raise typer.Exit(130) from None
    except engines.StoppedError as stopped:
        say(console, f"{stopped} {go_on}")
        return
    show_result(console, result)
    say(console, f"The run is in {simulation.folder.path}")


def parse_overrides(overrides: list[str]) -> dict[str, bool | int | float | str]:
    """Read settings that were given as KEY=VALUE."""
    flat: dict[str, bool | int | float | str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigurationError(f"-c {text}: expected key=value, for example -c privacy.target-epsilon=4")
        flat[key.strip()] = _parse_value(value.strip())
    return flat


def _parse_value(text: str) -> bool | int | float | str:
    """Read a number, a boolean or a quoted string as TOML does; anything else is a string."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


app.command("reproduce", help=reproduce_command.HELP)(reproduce_command.reproduce)
app.command("plan", help=plan_command.HELP)(plan_command.plan)
app.command("report", help=report_command.HELP)(report_command.report)
app.command("explore", help=explore_command.HELP)(explore_command.explore)
app.command("figure", help=figure_command.HELP)(figure_command.figure)
app.command("tune", help=tune_command.HELP)(tune_command.tune)


@app.command("settings")
def list_settings() -> None:
    """List every setting, its default, the values that it may have, and its meaning."""
    from adadpigu_core.configuration import settings

    table = Table(show_lines=False)
    for heading in ("setting", "default", "values", "meaning"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "setting")
    for key, default, allowed, meaning in settings():
        table.add_row(key, str(default).lower() if isinstance(default, bool) else repr(default), allowed, meaning)
    Console().print(table)


if __name__ == "__main__":
    app()
