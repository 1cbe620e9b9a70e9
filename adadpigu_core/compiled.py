"""Whether inner loops run as machine code.

They do where Numba is installed, which the extra ``fast`` brings. The environment variable ``ADADPIGU_COMPILED=0``
switches them off. Results are the same but for rounding.
"""

import importlib.util
import os
from functools import cache
from types import ModuleType

VARIABLE = "ADADPIGU_COMPILED"


@cache
def loops() -> ModuleType | None:
    """Give the compiled loops, or None: the caller then goes on in torch."""
    if os.environ.get(VARIABLE) == "0" or importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module("adadpigu_core.loops")
