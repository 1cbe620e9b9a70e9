"""What is printed to: Rich's console, but for its emoji, which would change paths and names such as ``x:wave:y``."""

from typing import Any

import rich.console


class Console(rich.console.Console):
    """A console that prints colons and what stands between them as they are."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(emoji=False, **settings)
