"""The command ``adadpigu reproduce``: tables of results, made again."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adadpigu_core.exceptions import AdaDPIGUError, ConfigurationError
from simulations.console import Console
from simulations.failure import failed

if TYPE_CHECKING:
    from simulations import tables

HELP = """Make a table of results again: every row with every method, over several seeds.

An interrupted table goes on where it stopped. Features of a front end are computed once and kept beside the runs, or in
the folder that ADADPIGU_FEATURES_DIR names (1.1 GB for MNIST under scattering). Without a name, the tables are listed.

[bold]Examples[/bold]

  adadpigu reproduce

  adadpigu reproduce digits --seeds 5

  adadpigu reproduce mnist --seeds 5 --jobs 4 --output runs/mnist
      four runs side by side; each takes memory of its own

  adadpigu reproduce cifar10-central -c task.dataset=npz:my_copy_of_cifar10.npz
      with one setting changed in all runs

  adadpigu reproduce cifar10-wrn --seeds 1 --stop-after 8
      in pieces of eight minutes, for a batch queue say: the same command again and again, until the table is printed

  adadpigu reproduce my_table.toml
      a table of your own, written like those in simulations/experiments/tables
"""


def reproduce(
    table: Annotated[str, typer.Argument(help="Name of a table, or a TOML file; without it, tables are listed.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each entry, with seeds from 0.")] = 3,
    jobs: Annotated[
        int,
        typer.Option(
            min=0,
            help="Runs side by side, each with one worker process; 1: one after the other, each with a worker a core; "
            "0: one a core, but 1 with --stop-after or a GPU.",
        ),
    ] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder of the runs; runs that are there are kept.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("-c", metavar="KEY=VALUE", help="One setting, in all runs.")
    ] = None,
    stop_after: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES", min=0, help="End before the round that would take longer; call again to go on."
        ),
    ] = None,
) -> None:
    """Make a table, or list what there is."""
    deadline = None if stop_after is None else time.monotonic() + 60 * stop_after  # what is imported below counts too
    from simulations import tables
    from simulations.command_line import parse_overrides

    console = Console()
    try:
        if table:
            changed = replace(tables.load(table), changes=parse_overrides(override or []))
            _make(console, changed, seeds, jobs, output, deadline)
        else:
            _list(console, [tables.load(name) for name in tables.names()])
    except AdaDPIGUError as error:
        raise failed(error) from error
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on with the table.")
        raise typer.Exit(130) from None


def _make(
    console: Console, table: "tables.Table", seeds: int, jobs: int, output: Path | None, deadline: float | None
) -> None:
    from simulations.display import progressing
    from simulations.reproduce import reproduce as make
    from simulations.simulate import StopAfter, StoppedError

    if deadline is not None and jobs > 1:
        raise ConfigurationError("--stop-after: runs side by side are not stopped between two rounds; leave out --jobs")
    folder = output or Path("runs") / f"table-{table.name}"
    watch, say = partial(progressing, console), partial(console.print, highlight=False)
    try:
        text = make(table, seeds, jobs, folder, watch, say, None if deadline is None else StopAfter(deadline))
    except StoppedError as stopped:
        console.print(f"{stopped} The same command goes on with the table.", highlight=False)
        return
    console.print(text, markup=False, soft_wrap=True, highlight=False)


def _list(console: Console, known: "list[tables.Table]") -> None:
    for table in known:
        methods = ", ".join(method.title for method in table.methods)
        console.print(f"[bold]{table.name}[/bold]  {table.title}: {len(table.rows)} rows; {methods}", soft_wrap=True)
