"""Where data sets are looked for."""

import os
from pathlib import Path

DATA_DIR_VARIABLE = "ADADPIGU_DATA_DIR"


def located(path: str) -> Path:
    """Find a file or folder: an absolute path.

    A relative one starts at the current directory, or if there is no such thing, in the folder that ADADPIGU_DATA_DIR
    names: settings that name a well-known file serve on every machine.
    """
    here = Path(path).expanduser().absolute()
    folder = os.environ.get(DATA_DIR_VARIABLE)
    if folder and not here.exists() and not Path(path).expanduser().is_absolute():
        there = Path(folder).expanduser().absolute() / path
        if there.exists():
            return there
    return here
