"""The command ``adadpigu figure``: a table of results as a picture."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from adadpigu_core.exceptions import AdaDPIGUError
from simulations.console import Console
from simulations.failure import failed


class Against(StrEnum):
    """What a figure draws quality against."""

    BYTES = "bytes"
    EPSILON = "epsilon"


HELP = """Draw accuracy against bytes sent, or against epsilon, from the table.json of a table.

[bold]Example[/bold]

  adadpigu reproduce wide-table --seeds 5
  adadpigu figure runs/table-wide-table/table.json --output docs/wide-table.png
  adadpigu figure runs/table-mnist-ten/table.json --against epsilon --output docs/mnist-ten.png
"""


def figure(
    table: Annotated[Path, typer.Argument(help="The table.json that 'adadpigu reproduce' has written.")],
    output: Annotated[Path, typer.Option(help="Picture to write; its ending names the format.")] = Path("table.png"),
    against: Annotated[Against, typer.Option(help="What runs across.")] = Against.BYTES,
) -> None:
    """Draw a table."""
    from simulations.table_figure import draw, read

    try:
        draw(read(table), output, against.value)
    except AdaDPIGUError as error:
        raise failed(error) from error
    Console().print(f"The figure is {output}", markup=False, highlight=False, soft_wrap=True)
