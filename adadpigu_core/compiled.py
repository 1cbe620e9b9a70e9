"""Whether inner loops can run as machine code.

They can where Numba is installed and works, which the extra ``fast`` brings. The environment variable
``ADADPIGU_COMPILED=0`` switches them off. Results are the same but for rounding.
"""

import importlib
import os
from functools import cache
from types import ModuleType

VARIABLE = "ADADPIGU_COMPILED"


@cache
def loops() -> ModuleType | None:
    """Give the compiled loops, or None: the caller then goes on in torch. Their first use takes most of a second."""
    if os.environ.get(VARIABLE) == "0":
        return None
    try:
        return importlib.import_module("adadpigu_core.loops")
    except ImportError:  # Numba is not there, or not for this version of NumPy
        return None
