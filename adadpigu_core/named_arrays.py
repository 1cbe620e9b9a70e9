"""Arrays by name, as users give them: in an archive of numpy's, or from a function of their own."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adadpigu_core.exceptions import DataError
from adadpigu_core.factories import is_factory


def of_archive(path: Path, *choices: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Read the first choice of keys that an archive has. It is not trusted: nothing in it is unpickled.

    Raises:
        DataError: If it is missing or damaged, or does not hold numbers under these keys.
    """
    arrays: dict[str, NDArray[Any]] = {}
    key = "the file"
    try:
        # Opened here, because numpy forgets to close a file that it cannot make sense of.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            present = list(archive.files)
            for key in next((keys for keys in choices if set(keys) <= set(present)), ()):
                arrays[key] = archive[key]
    except FileNotFoundError as error:
        raise DataError("there is no such file") from error
    except Exception as error:  # zipfile and numpy raise a dozen types on damaged files
        reason = str(error) or type(error).__name__
        raise DataError(f"{key} cannot be read ({reason}); write numeric arrays with numpy.savez") from error
    return _numeric(arrays, present, choices, "the file holds", "write it with numpy.savez")


def of_function(path: str, *choices: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Call the user's function, without arguments, for arrays or tensors under the first choice of keys.

    It is found as a model by an import path is: installed, or on PYTHONPATH. Several processes call it, and it must
    give the same to all of them. Importing runs code, and who may name it is decided elsewhere: in a simulation whoever
    starts it, on a node its owner and no server.

    Args:
        path: ``package.module:function``.
        choices: Keys.

    Raises:
        DataError: If there is no such function, or it fails, or does not give numbers under these keys.
    """
    if not is_factory(path):
        raise DataError("must be an import path, as in python:package.module:function")
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the user's own code
        text = f"cannot be imported ({error}); install its package, or set PYTHONPATH to its folder"
        raise DataError(text) from error
    try:
        found = {str(key): np.asarray(value) for key, value in function().items()}
    except Exception as error:  # it is the user's own code
        text = f"the function must give arrays by name, without arguments; it failed ({type(error).__name__}: {error})"
        raise DataError(text) from error
    chosen = next((keys for keys in choices if set(keys) <= set(found)), ())
    return _numeric({key: found[key] for key in chosen}, [*found], choices, "the function gives", "give arrays")


def _numeric(
    arrays: dict[str, NDArray[Any]], present: list[str], choices: Sequence[tuple[str, ...]], found: str, remedy: str
) -> dict[str, NDArray[Any]]:
    """Require arrays of numbers under one choice of keys."""
    if not arrays:
        wanted = " or ".join(", ".join(keys) for keys in reversed(choices))
        raise DataError(f"{found} {present}; {remedy} under the keys {wanted}")
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise DataError(f"{name} holds {array.dtype} values; store numbers")
    return arrays
