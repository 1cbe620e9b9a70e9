"""What a command says while it works and has no rounds to count."""

from collections.abc import Iterator
from contextlib import contextmanager

from simulations.console import Console


@contextmanager
def working(text: str) -> Iterator[None]:
    """Say what is being done: as long as it takes on a terminal, once anywhere else; apart from what was asked for."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{text} ...", markup=False, highlight=False, soft_wrap=True)
        yield
        return
    with console.status(text):
        yield
