"""Arrays and plain values in one block of bytes, without pickle.

Releases, what a client remembers between rounds, and the server's checkpoints are all of this form: NumPy's ``npz``,
with the values as JSON inside. Bytes that are not what ``pack`` made, be they cut short, damaged or made to harm, are
refused with a ``DataError`` and nothing else.
"""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adadpigu_core.exceptions import DataError

_VALUES = "values.json"
# names that numpy.savez takes for its own arguments, or that are taken
_RESERVED = frozenset({_VALUES, "file", "allow_pickle"})


def pack(arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> bytes:
    """Pack arrays and JSON-able values.

    Raises:
        ValueError: For arrays of Python objects, and for names that an archive cannot have.
    """
    for name, array in arrays.items():
        if not name.isprintable() or not name or name in _RESERVED:
            raise ValueError(f"an archive cannot hold an array named {name!r}")
        if array.dtype.hasobject:
            raise ValueError(f"an archive cannot hold the Python objects of {name!r}")
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(dict(values)).encode(), dtype=np.uint8)
    np.savez(buffer, **{_VALUES: text}, **arrays)  # type: ignore[arg-type]  # its stub claims every keyword
    return buffer.getvalue()


def unpack(data: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Unpack what ``pack`` made.

    Raises:
        DataError: If the bytes are damaged.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise TypeError("a member is not an array")
        values = json.loads(arrays.pop(_VALUES).tobytes())
        if not isinstance(values, dict):
            raise TypeError(f"{_VALUES} holds a {type(values).__name__}")
    except Exception as error:  # zipfile, zlib, numpy and json raise a dozen types on damaged bytes
        raise DataError(f"an archive is damaged ({type(error).__name__}: {error})") from error
    return arrays, values
