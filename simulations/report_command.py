"""The command ``adadpigu report``: runs as one HTML file."""

import time
from pathlib import Path
from typing import Annotated

import typer

from adadpigu_core.exceptions import AdaDPIGUError
from simulations.console import Console

HELP = """Write runs as one HTML file that opens from disk and needs no network.

Several runs are shown side by side. While one of them is still going on the page loads itself again; the folder of a
run has a report.html that is kept up to date, and --watch does the same for any selection of runs.

[bold]Examples[/bold]

  adadpigu report runs/digits-20261123-120000

  adadpigu report runs/one runs/other --output both.html --watch
"""
_SECONDS_BETWEEN = 2.0


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; default: report.html in the folder of a single run, or here.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Write it again and again until all runs are over.")] = False,
) -> None:
    """Write a report of runs."""
    from simulations.report import FILE, write_report
    from simulations.status import working

    target = output or (runs[0] / FILE if len(runs) == 1 else Path(FILE))
    try:
        with working(f"{'Watching' if watch else 'Reading'} {len(runs)} run(s)"):
            while not write_report(runs, target) and watch:
                time.sleep(_SECONDS_BETWEEN)
    except AdaDPIGUError as error:
        message = Console(stderr=True)
        message.print("[red]Error:[/red]", end=" ")
        message.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    Console().print(f"The report is {target}", markup=False, highlight=False, soft_wrap=True)
