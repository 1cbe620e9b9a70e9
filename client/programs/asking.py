"""How the program that Flower starts asks for a copy of a process that has imported everything: see ``client.warm``.

One message goes over a Unix socket: the command line as JSON, with the descriptors of the program's output. One byte
comes back: the exit status.
"""

import json
import os
import socket
from collections.abc import Sequence

_MOST_BYTES = 65536
_TIMEOUT_SECONDS = 5.0


def ask(path: str, arguments: Sequence[str]) -> int | None:
    """Have a copy do the work of this program.

    Returns:
        Its exit status, or None if there is nobody to ask, so that this program must do it.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_TIMEOUT_SECONDS)
        try:
            connection.connect(path)
        except OSError:
            return None
        socket.send_fds(connection, [json.dumps([*arguments]).encode()], [1, 2])
        connection.settimeout(None)
        status = connection.recv(1)
        # without a status the copy was killed, after it may have answered
        return status[0] if status else 1


def receive(connection: socket.socket) -> tuple[list[str], list[int]]:
    """Take such a message.

    Raises:
        ValueError: If it is something else.
    """
    text, descriptors, _, _ = socket.recv_fds(connection, _MOST_BYTES, 2)
    arguments = json.loads(text)
    if len(descriptors) != 2 or not isinstance(arguments, list):
        for descriptor in descriptors:
            os.close(descriptor)
        raise ValueError("this is no command line with two descriptors")
    return [str(argument) for argument in arguments], [*descriptors]
