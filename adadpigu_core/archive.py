"""Arrays and plain values in one block of bytes, without pickle.

Releases, what a client remembers between rounds, and the server's checkpoints are all of this form: NumPy's ``npz``,
with the values as JSON inside.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adadpigu_core.exceptions import DataError

_VALUES = "values.json"


def pack(arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> bytes:
    """Pack arrays and JSON-able values."""
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
        values = json.loads(arrays.pop(_VALUES).tobytes())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"an archive is damaged ({error})") from error
    return arrays, values
