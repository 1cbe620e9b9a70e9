"""A SuperLink of our own, for one run in Flower's simulation.

Flower's command line starts a local SuperLink on a fixed port by itself, and leaves it there. It takes any other that
it is told about, so this one listens on a free port, and a private Flower home tells only our commands about it.

The SuperLink starts a SuperExec, that starts the simulation, and that starts Ray. When the SuperLink ends, the
simulation was seen to go on without it; therefore all descendants are ended here, whatever the reason for leaving.

The port is open to everybody on this machine while the run lasts, as that of Flower's own local SuperLink is.
"""

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adadpigu_core.exceptions import AdaDPIGUError
from simulations import process_tree

_CONNECTION = "adadpigu"
_START_TIMEOUT_S = 60.0
_COMMAND_TIMEOUT_S = 120.0
_END_PATIENCE_S = 5.0
_TICK_S = 0.25
_LONGEST_LOOK_INTERVAL_S = 10.0
_MAX_FAILED_LOOKS = 3
_TAIL_LINES = 30


class FlowerRunError(AdaDPIGUError):
    """A run through Flower could not be started, failed, or took too long."""

    code = "flower-run"


@contextlib.contextmanager
def start(folder: Path, environment: Mapping[str, str]) -> Iterator["SuperLink"]:
    """Run a SuperLink of our own, and end it with all that it started."""
    address = _free_address()
    for name in ("home", "empty"):
        (folder / name).mkdir()
    connection = f'[superlink]\ndefault = "{_CONNECTION}"\n[superlink.{_CONNECTION}]\n'
    (folder / "home" / "config.toml").write_text(
        f'{connection}address = "{address[0]}:{address[1]}"\ninsecure = true\n'
    )
    command = ["flower-superlink", "--insecure", "--simulation", "--host", address[0], "--port", str(address[1])]
    with (folder / "superlink.log").open("wb") as log:
        process = _launch(command, folder, environment, log.fileno())
    link = SuperLink(process, folder, environment)
    try:
        link.await_start(address)
        yield link
    finally:
        link.note_groups()
        process_tree.end_groups(link.groups, _END_PATIENCE_S)
        process.wait()


def _launch(command: list[str], folder: Path, environment: Mapping[str, str], log: int) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(
            command,
            cwd=folder / "empty",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us: we end it in order
        )
    except FileNotFoundError as error:
        raise FlowerRunError(f"{command[0]} was not found beside {sys.executable} or on PATH") from error


def _free_address() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host, port = probe.getsockname()
        return host, port


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink, asked through Flower's command line.

    Args:
        process: The SuperLink itself.
        folder: Where its log is, and the empty folder that all processes start in.
        environment: Of the SuperLink and of the commands.
        groups: Process groups that were seen to come from it.
    """

    process: "subprocess.Popen[bytes]"
    folder: Path
    environment: Mapping[str, str]
    groups: set[int] = field(default_factory=set)

    def note_groups(self) -> None:
        """Remember who comes from the SuperLink. Should it be killed, they could not be found any more."""
        self.groups.update(process_tree.descendant_groups(self.process.pid))

    def await_start(self, address: tuple[str, int]) -> None:
        """Wait until the server answers."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            self._check_alive()
            with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
                return
            time.sleep(_TICK_S)
        raise self._error(f"the SuperLink did not start within {_START_TIMEOUT_S:.0f} s")

    def submit(self, app_directory: Path, overrides: Path, federation: str) -> str:
        """Start a run, with the run configuration in a TOML file, and return the run's id."""
        options = ["--run-config", str(overrides), "--federation-config", federation]
        return str(self._ask("run", str(app_directory), _CONNECTION, *options)["run-id"])

    def await_end(self, run_id: str, on_poll: Callable[[], None], deadline: float) -> None:
        """Wait until the run has ended; raise unless it has completed."""
        start = next_look = time.monotonic()
        while True:
            on_poll()
            self._check_alive()
            if time.monotonic() > deadline:
                raise self._error("the run did not end in time", run_id)
            if time.monotonic() >= next_look:
                self.note_groups()
                status, details = self._look(run_id)
                if status == "finished:completed":
                    return
                if status.startswith("finished"):
                    raise self._error(f"the run ended as {status}: {details}", run_id)
                # Each look starts an interpreter, which is taken from the clients' time.
                interval = 0.1 * (time.monotonic() - start)
                next_look = time.monotonic() + min(max(2.0, interval), _LONGEST_LOOK_INTERVAL_S)
            time.sleep(_TICK_S)

    def _look(self, run_id: str) -> tuple[str, str]:
        """Ask for the state of a run. A machine under load may fail to answer now and then."""
        for _ in range(_MAX_FAILED_LOOKS - 1):
            with contextlib.suppress(FlowerRunError):
                return self._state(run_id)
        return self._state(run_id)

    def _state(self, run_id: str) -> tuple[str, str]:
        (state,) = self._ask("ls", _CONNECTION, "--run-id", run_id)["runs"]
        return state["status"], state["status-details"]

    def _ask(self, *arguments: str) -> dict[str, Any]:
        """Run a ``flwr`` command that answers in JSON. Its exit status says nothing."""
        done = self._flwr(*arguments, "--format", "json")
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            answer = {"error-message": f"{done.stdout}\n{done.stderr}"}
        if not answer.get("success"):
            raise self._error(f"flwr {arguments[0]} failed: {answer.get('error-message', answer)}")
        return answer

    def _flwr(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        try:
            return subprocess.run(
                ["flwr", *arguments],  # noqa: S607 - the environment's PATH begins with this interpreter's folder
                cwd=self.folder / "empty",
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=_COMMAND_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise self._error(f"flwr {arguments[0]} did not return within {_COMMAND_TIMEOUT_S:.0f} s") from error

    def _check_alive(self) -> None:
        if (status := self.process.poll()) is not None:
            raise self._error(f"the SuperLink ended with status {status}")

    def _error(self, message: str, run_id: str | None = None) -> FlowerRunError:
        """Make an error that carries the end of the run's log, or of the SuperLink's when there is no run."""
        if run_id is None:
            log = (self.folder / "superlink.log").read_text(errors="replace")
        else:
            log = self._flwr("log", run_id, _CONNECTION, "--show").stdout
        lines = re.sub(r"\x1b\[[0-9;]*m", "", log).strip().splitlines()[-_TAIL_LINES:]
        return FlowerRunError("\n".join([message, "Last lines of the log:", *("    " + line for line in lines)]))
