"""What runs inside a worker process of the in-process engine.

A worker loads the ClientApp once and answers one message at a time, for all simulated nodes that are pinned
to it. Its only link to the outside is the socket that it finds as its standard input: a setup comes first,
then serialised messages, and each is answered by one serialised message. Everything that Flower gives a
ClientApp is here: a context per node whose state lasts from message to message, the task's identity, and the
error codes of a failing app.

A worker lives exactly as long as its socket: when the other end closes, because the grid was closed or
because its process died, the worker exits, even in the middle of a message. ``START`` makes it ignore Ctrl-C,
which a terminal sends to every process in the foreground: the parent alone decides what happens then.

This module imports little, since every worker pays for it before its first answer.
"""

import contextlib
import importlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeAlias
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfigValue
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity

START = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from simulations.worker import serve; serve()"
"""The program of a worker process, for ``python -c``. Signals come first: the imports take a while."""

READY = b"ready"
"""The first frame that a worker sends: from here on it answers every message, if only with an error."""

Identity: TypeAlias = tuple[int | None, int | None, int | None]
"""Which (task, run, node) this process is to Flower; None where nothing is set."""

_EXIT_GRACE_S = 0.5
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker must know before its first message.

    Args:
        client_app: Import path of the ClientApp, for example ``client.app:app``.
        run_id: The run that every context belongs to.
        run_config: The run's configuration, the same for all nodes.
        node_configs: Configuration of each node that this worker serves, by node id.
    """

    client_app: str
    run_id: int
    run_config: Mapping[str, UserConfigValue]
    node_configs: Mapping[int, Mapping[str, UserConfigValue]]


def encode(message: Message) -> bytes:
    """Serialise a message as Flower does on the network."""
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def decode(data: bytes) -> Message:
    """Invert :func:`encode`."""
    return message_from_proto(ProtoMessage.FromString(data))


def assign_message_id(message: Message) -> None:
    """Give a message a fresh id, as a SuperLink does on arrival; Flower offers no setter."""
    message.metadata.__dict__["_message_id"] = str(uuid4())


def set_task_identity(identity: Identity) -> Identity:
    """Tell Flower who creates messages in this process, and return what was set before.

    ``Message(...)`` reads these process-wide values. Writing the fields behind Flower's properties is the
    only way to restore "not set".
    """
    previous = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    for field, value in zip(("_task_id", "_run_id", "_node_id"), identity, strict=True):
        setattr(TaskIdentity, field, value)
    return previous


def serve() -> None:
    """Answer messages until the parent closes the socket; the entry point of the process."""
    connection = _claim_standard_streams()
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    # The parent may leave at any moment; there is nobody to tell then.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        setup: WorkerSetup = connection.recv()
        threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
        nodes = _Nodes(setup)
        connection.send_bytes(READY)
        for request in iter(requests.get, None):
            connection.send_bytes(nodes.answer(request))
    # An orderly exit of an interpreter that has imported torch takes a second, and the caller waits for it.
    os._exit(0)


def _claim_standard_streams() -> Connection:
    """Take the socket away from standard input, and keep standard output for the parent's own results."""
    connection = Connection(os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    with contextlib.suppress(OSError):  # standard error may be closed
        os.dup2(2, 1)
    sys.stdout = sys.stderr
    return connection


def _receive(connection: Connection, requests: "queue.SimpleQueue[bytes | None]") -> None:
    """Hand requests to the main thread; end the process when no more can come.

    An idle main thread leaves at once and tidily. A busy one would go on computing for nobody, so it is cut
    off.
    """
    try:
        while True:
            requests.put(connection.recv_bytes())
    except (EOFError, OSError):
        requests.put(None)
    time.sleep(_EXIT_GRACE_S)
    os._exit(1)


class _Nodes:
    """The nodes pinned to this worker: one ClientApp, one context each."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._contexts = {
            node_id: Context(setup.run_id, node_id, dict(config), RecordDict(), dict(setup.run_config))
            for node_id, config in setup.node_configs.items()
        }
        self._app: ClientApp | None = None
        self._load_error = ""
        try:
            self._app = _load(setup.client_app)
        except Exception as error:
            _logger.exception("Cannot load the ClientApp %s", setup.client_app)
            self._load_error = f"Cannot load the ClientApp {setup.client_app}: {_describe(error)}"

    def answer(self, request: bytes) -> bytes:
        """Run the app on a serialised message; whatever it raises becomes an error reply."""
        message = decode(request)
        context = self._contexts[message.metadata.dst_node_id]
        set_task_identity((context.node_id, context.run_id, context.node_id))
        if self._app is None:
            return _error_reply(message, ErrorCode.LOAD_CLIENT_APP_EXCEPTION, self._load_error)
        try:
            reply = self._app(message, context)
            if not isinstance(reply, Message):
                raise TypeError(f"the ClientApp returned a {type(reply).__name__}, not a Message")
            assign_message_id(reply)
            return encode(reply)
        except Exception as error:
            _logger.exception("The ClientApp raised an exception on node %d", context.node_id)
            return _error_reply(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _describe(error))


def _load(client_app: str) -> ClientApp:
    """Import the ClientApp, and make sure that it computes on one thread."""
    module, _, attribute = client_app.partition(":")
    app = getattr(importlib.import_module(module), attribute)
    if not isinstance(app, ClientApp):
        raise TypeError(f"{client_app} is a {type(app).__name__}, not a ClientApp")
    # An app that does not use torch should not pay seconds for importing it.
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return app


def _describe(error: Exception) -> str:
    """Name an exception in the words that Flower uses."""
    return f"{type(error)}:<'{error}'>"


def _error_reply(message: Message, code: int, reason: str) -> bytes:
    reply = Message(Error(code=code, reason=reason), reply_to=message)
    assign_message_id(reply)
    return encode(reply)
