"""The parent's handle on one worker process of the in-process engine.

The handle hides that processes die: it starts the process, exchanges one serialised message at a time with
it, and when the process ends without answering it says how, and starts a successor. The successor knows
nothing of what its predecessor kept in memory, as after a crash on a real node.

A plain subprocess is used rather than ``multiprocessing``, because the latter would import the caller's main
module again in every worker, and with it a command line and whatever a script does at its top level. The
socket is the worker's standard input: that needs no inherited descriptor numbers, and works when this process
has no standard input.
"""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection

from simulations import worker

_MAX_EARLY_DEATHS = 3
_EXIT_TIMEOUT_S = 2.0
# The system grants what it allows. A model that fits in the buffer crosses over twice as fast.
_BUFFER_BYTES = 4 << 20


# The last two tell glibc to keep the memory of one message for the next one. Handing megabytes back to the
# system and faulting them in again was seen to take most of the time of a message.
_WORKER_DEFAULTS = {
    "FLWR_LOG_LEVEL": "WARNING",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}


def worker_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Environment of the workers: they import what this process would, quietly and on one thread."""
    paths = [extra["PYTHONPATH"]] if extra.get("PYTHONPATH") else []
    paths += [entry or os.getcwd() for entry in sys.path]
    defaults = {**_WORKER_DEFAULTS, **os.environ, "OMP_NUM_THREADS": "1"}
    return {**defaults, **extra, "PYTHONPATH": os.pathsep.join(paths)}


class WorkerDiedError(Exception):
    """The worker process ended without answering."""


class WorkerProcess:
    """A worker process, and its successors when it dies.

    One thread calls :meth:`introduce` once and :meth:`exchange` from then on; any thread may hang up and
    reap.

    Args:
        setup: What the worker must know.
        environment: All environment variables of the worker.
    """

    def __init__(self, setup: worker.WorkerSetup, environment: Mapping[str, str]) -> None:
        self._setup = setup
        self._environment = environment
        self._lock = threading.Lock()
        self._early_deaths = 0
        self.hung_up = False
        self._start()

    @property
    def pid(self) -> int:
        """Process id of the present worker."""
        return self._process.pid

    def introduce(self) -> None:
        """Send the setup. Apart from the start, because it may have to wait until the worker can read."""
        with contextlib.suppress(OSError):  # a worker that is dead already is noticed at the first exchange
            self._connection.send(self._setup)

    def exchange(self, request: bytes, kill_after: float | None = None) -> bytes:
        """Send a request and wait for the answer.

        Args:
            request: A serialised message.
            kill_after: Kill the process that many seconds after sending, or when its answer is there.

        Raises:
            WorkerDiedError: If the process ended without an answer, and when too many could not even start.
        """
        if self._died_idle():
            self._replace()
        if self._early_deaths >= _MAX_EARLY_DEATHS:
            raise WorkerDiedError(f"{self._early_deaths} worker processes in a row ended while starting")
        try:
            self._await_ready()
            self._connection.send_bytes(request)
            if kill_after is not None:
                self._connection.poll(None if math.isinf(kill_after) else kill_after)
                self._process.kill()
                raise EOFError
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            raise WorkerDiedError(self._replace()) from None

    def hang_up(self) -> None:
        """Close the line: the worker ends, and an exchange in progress fails."""
        with self._lock:
            self.hung_up = True
            # Closing the descriptor would not wake a thread that is reading from it.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def reap(self) -> int:
        """Wait until the process has ended, kill it if it takes too long, and return its status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_TIMEOUT_S)
        self._process.kill()
        return self._process.wait()

    def release(self) -> None:
        """Free the descriptors, when no thread uses them any more."""
        self._connection.close()
        self._socket.close()

    def _start(self) -> None:
        with self._lock:
            if self.hung_up:
                raise WorkerDiedError("the grid was closed")
            self._socket, theirs = socket.socketpair()
            for end in (self._socket, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            with theirs:
                command = [sys.executable, "-P", "-c", worker.START]
                self._process = subprocess.Popen(command, stdin=theirs.fileno(), env=dict(self._environment))
            self._connection = Connection(os.dup(self._socket.fileno()))
            self._ready = False

    def _await_ready(self) -> None:
        if not self._ready:
            self._connection.recv_bytes()
            self._ready = True
            self._early_deaths = 0

    def _died_idle(self) -> bool:
        # A worker that is ready and was not asked has nothing to say: input can only be the end of the line.
        # It comes a little before the process can be waited for.
        return self._process.poll() is not None or (self._ready and self._connection.poll())

    def _replace(self) -> str:
        """Put a successor in the place of a dead process, and say how that one ended."""
        pid, status = self.pid, self.reap()
        ending = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        moment = "" if self._ready else f" while it was loading {self._setup.client_app}"
        self._early_deaths += not self._ready
        if self._early_deaths < _MAX_EARLY_DEATHS:
            self.release()
            self._start()
            self.introduce()
        return f"worker process {pid} {ending}{moment}"
