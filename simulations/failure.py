"""How the command line says that something went wrong, and the exit status that goes with it."""

import typer

from adadpigu_core.exceptions import AdaDPIGUError, ConfigurationError
from simulations.console import Console


def failed(error: AdaDPIGUError) -> typer.Exit:
    """Say what is wrong; 2 is the status of a wrong command or file of settings, 1 that of what failed."""
    console = Console(stderr=True)
    console.print("[red]Error:[/red]", end=" ")
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(2 if isinstance(error, ConfigurationError) else 1)
