"""The command ``adadpigu figure``: a table of results as a picture."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from adadpigu_core.exceptions import AdaDPIGUError
from simulations.failure import failed

HELP = """Draw accuracy against bytes sent from the table.json of a table.

[bold]Example[/bold]

  adadpigu reproduce wide-table --seeds 5
  adadpigu figure runs/table-wide-table/table.json --output docs/wide-table.png
"""


def figure(
    table: Annotated[Path, typer.Argument(help="The table.json that 'adadpigu reproduce' has written.")],
    output: Annotated[Path, typer.Option(help="Picture to write; its ending names the format.")] = Path("table.png"),
) -> None:
    """Draw a table."""
    from simulations.table_figure import draw, read

    try:
        draw(read(table), output)
    except AdaDPIGUError as error:
        raise failed(error) from error
    Console().print(f"The figure is {output}", markup=False, highlight=False, soft_wrap=True)
