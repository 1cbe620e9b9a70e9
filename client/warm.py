"""Client processes that need not start from nothing.

Flower starts a process for each message, and importing PyTorch takes longer than most rounds. So ``adadpigu supernode``
keeps one process that has imported everything and does nothing; the program that Flower starts asks it for a copy of
itself, which answers the message and ends. Each message still meets a process of its own: what is shared is imported
code, never records, and the generator behind noise is the operating system's, which a copy cannot repeat.

The one that is copied must not compute, because threads do not survive copying; should an import have started one, it
gives up. Its folder is its user's alone. If it is not there, the program answers by itself. When the program is killed,
so is the copy that works for it.
"""

import contextlib
import os
import secrets
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from client.launcher import SOCKET_VARIABLE, main
from client.programs import asking

# What answering imports.
_IMPORTED = (
    "flwr.supernode.runtime.run_clientapp",
    "flwr.supernode.cli",
    "client.app",
    "dp_accounting.pld.privacy_loss_distribution",
)
_TICK_SECONDS = 0.05
_LOOK_SECONDS = 2.0


def serve(path: Path, parent: int) -> None:
    """Make copies of this process until its parent is gone.

    Args:
        path: Of the socket to listen at, in a folder that is this user's alone.
        parent: Process id of the SuperNode.
    """
    for name in _IMPORTED:
        import_module(name)
    # of the code that was imported: what lies on the disk may be upgraded under a running node
    import_module("adadpigu_core.provenance").code_fingerprint()
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("adadpigu: an import has started threads; each message will start its process anew, which is slower")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the copies here
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        while os.getppid() == parent:
            if select.select([listener], [], [], _LOOK_SECONDS)[0]:
                connection = listener.accept()[0]
                if os.fork() == 0:
                    listener.close()
                    _attend(connection)
                connection.close()
    path.unlink(missing_ok=True)


def _attend(connection: socket.socket) -> None:
    """Let a copy of this copy answer, and say how it ended; never returns."""
    status = 1
    with contextlib.suppress(OSError, ValueError):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        arguments, descriptors = asking.receive(connection)
        worker = os.fork()
        if worker == 0:
            _answer(arguments, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        status = _await(worker, connection)
        connection.sendall(bytes([status]))
    os._exit(status)


def _await(worker: int, connection: socket.socket) -> int:
    while True:
        process, status = os.waitpid(worker, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status) & 0xFF
        if select.select([connection], [], [], _TICK_SECONDS)[0] and not connection.recv(1):
            os.kill(worker, signal.SIGKILL)  # whoever asked was killed
            os.waitpid(worker, 0)
            os._exit(1)


def _answer(arguments: Sequence[str], descriptors: Sequence[int]) -> None:
    """Do what the program was started for; never returns."""
    status = 1
    try:
        for descriptor, standard in zip(descriptors, (1, 2), strict=True):
            os.dup2(descriptor, standard)
        sys.argv = [*arguments]
        # a model of the user's own may draw from torch's generator, as dropout does
        import_module("torch").manual_seed(secrets.randbits(63))
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status & 0xFF)


if __name__ == "__main__":
    serve(Path(os.environ[SOCKET_VARIABLE]), int(sys.argv[1]))
