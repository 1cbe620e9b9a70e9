"""From Flower's records to the project's messages and back: the last inch, and all that the server knows of records."""

from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues, RecordDict

from adadpigu_core.exceptions import MessageError
from adadpigu_core.messages import Wire, WireValue
from adadpigu_core.printable import printable


def to_content(wire: Wire) -> RecordDict:
    """Put a message into Flower's records."""
    arrays = ArrayRecord({name: Array(value) for name, value in wire.arrays.items()})
    values = ConfigRecord({name: cast(ConfigRecordValues, value) for name, value in wire.values.items()})
    return RecordDict({"arrays": arrays, "values": values})


def readdressed(content: RecordDict, wire: Wire) -> RecordDict:
    """Make a message with the values of another and the very arrays of one that was made already, held once."""
    values = to_content(Wire({}, wire.values)).config_records["values"]
    return RecordDict({"arrays": content.array_records["arrays"], "values": values})


def from_content(content: RecordDict) -> Wire:
    """Take a message out of Flower's records.

    Raises:
        MessageError: If the records are not the two that ``to_content`` makes.
    """
    arrays, values = content.array_records.get("arrays"), content.config_records.get("values")
    if arrays is None or values is None or len(content) != 2:
        text = printable(f"message: expected the records 'arrays' and 'values', got {sorted(content)}", 300)
        raise MessageError(text, text)
    try:
        unpacked = {name: array.numpy() for name, array in arrays.items()}
    except Exception as error:  # numpy and zipfile raise a dozen types on bytes that somebody else made
        raise MessageError("message: an array is damaged", "message: an array is damaged") from error
    if not all(isinstance(array, np.ndarray) for array in unpacked.values()):  # numpy opens archives as well
        raise MessageError("message: an array is an archive", "message: an array is an archive")
    return Wire(unpacked, cast(dict[str, WireValue], dict(values)))
