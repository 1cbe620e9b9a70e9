"""Runs of the whole program: the real command, server and clients, in this process or in processes of their own."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import pld
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid
from typer.testing import CliRunner

from client.app import app as client_app
from server.run_folder import RunFolder
from simulations import command_line, simulate, worker

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "federation.num-clients": 3,
    "federation.num-rounds": 4,
    "runtime.workers": 2,
    "task.model": "linear",
}


class DirectGrid(Grid):
    """Stands in for the in-process grid without its processes: clients answer at once, in this process.

    Messages are serialised as they would be. ``on_message`` is called with the number of each message, counted over the
    run, before and after the client has worked; what it raises hits the server in the middle of a round.
    """

    on_message = None

    def __init__(self, app, node_configs, run_config, num_workers):
        assert app == "client.app:app"
        self._contexts = {
            1000 + index: Context(1, 1000 + index, dict(config), RecordDict(), dict(run_config))
            for index, config in enumerate(node_configs)
        }
        self._replies = {}
        self._count = 0

    def __enter__(self):
        self._outer = worker.set_task_identity((1, 1, 1))
        return self

    def __exit__(self, *_):
        worker.set_task_identity(self._outer)

    def _notice(self, moment):
        if DirectGrid.on_message is not None:
            DirectGrid.on_message(self._count, moment)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            worker.assign_message_id(message)
            self._notice("before")
            self._replies[message.metadata.message_id] = self._answer(worker.encode(message))
            self._notice("after")
            self._count += 1
            ids.append(message.metadata.message_id)
        return ids

    def _answer(self, data):
        message = worker.decode(data)
        node = message.metadata.dst_node_id
        outer = worker.set_task_identity((node, 1, node))
        try:
            reply = client_app(message, self._contexts[node])
        finally:
            worker.set_task_identity(outer)
        worker.assign_message_id(reply)
        return worker.decode(worker.encode(reply))

    def pull_messages(self, message_ids):
        return [self._replies.pop(key) for key in list(message_ids) if key in self._replies]

    def wait(self, message_ids, timeout=None):
        return True

    def get_node_ids(self):
        return list(self._contexts)

    def create_message(self, *_, **__):
        raise AssertionError("nothing here may ask Flower for this")

    def send_and_receive(self, *_, **__):
        raise AssertionError("nothing here may ask Flower for this")

    def set_run(self, run):
        raise AssertionError("nothing here may ask Flower for this")

    @property
    def run(self):
        raise AssertionError("nothing here may ask Flower for this")


@dataclass(frozen=True)
class Run:
    """What a run has left on the disk."""

    folder: Path

    def json(self, name="result.json"):
        return json.loads((self.folder / name).read_text())

    @property
    def metrics(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def rounds(self):
        """Lines of metrics so far; also of a run that has hardly begun."""
        path = self.folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    @property
    def checkpoint(self):
        return RunFolder(self.folder).load_checkpoint()

    @property
    def weights(self):
        return self.checkpoint[0]["weights"]

    def ledgers(self, folder=None):
        return {path.name: charges(path) for path in sorted((folder or self.folder / "ledgers").glob("*.sqlite"))}


def charges(path):
    """Rounds that a ledger was charged for, with their counts, read without the ledger's code."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)) as connection:
        return connection.execute("SELECT run, round, count FROM charges ORDER BY id").fetchall()


def flags(settings):
    return [text for key, value in settings.items() for text in ("-c", f"{key}={value}")]


@pytest.fixture(scope="session")
def adadpigu():
    """Run the command in this process; gives exit status and output."""

    def run(*arguments, settings=None, on_message=None):
        torch.set_num_threads(1)  # as in a worker
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simulate, "InProcessGrid", DirectGrid)
            patch.setattr(DirectGrid, "on_message", staticmethod(on_message) if on_message else None)
            patch.setenv("COLUMNS", "200")
            return CliRunner().invoke(
                command_line.app, ["simulate", *map(str, arguments), *flags(settings or {})], catch_exceptions=False
            )

    return run


@pytest.fixture(scope="session")
def finished(adadpigu):
    """Run a simulation that must succeed, and give what it wrote."""

    def run(folder, **settings):
        named = {**TINY, **{key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}}
        result = adadpigu("--output", folder, settings=named)
        assert result.exit_code == 0, result.output
        return Run(folder)

    return run


@pytest.fixture(scope="session")
def tiny():
    """Settings of a run that is over in a moment."""
    return TINY


@pytest.fixture(scope="session")
def run_in():
    """Read what a run has left in a folder."""
    return Run


@pytest.fixture
def folder(tmp_path):
    """Of a run that is yet to be."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def make_npz(tmp_path_factory):
    """Write a user's own arrays: 90 training and 30 test records of two blobs that a line separates."""

    def make(folder=None, **changes):
        generator = np.random.default_rng(0)
        arrays = {}
        for split, size in (("train", 90), ("test", 30)):
            labels = np.arange(size) % 2
            arrays[f"y_{split}"] = labels
            arrays[f"x_{split}"] = generator.normal(size=(size, 5)) + 4 * labels[:, None]
        path = (folder or tmp_path_factory.mktemp("own")) / "own.npz"
        np.savez(path, **{**arrays, **changes})
        return path

    return make


@pytest.fixture(scope="session")
def recomputed():
    """Recompute an epsilon without this project's accounting."""

    @cache
    def epsilon(kinds, delta):
        accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
        for noise_multiplier, sampling_probability, count in kinds:
            gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
            sampled = dp_accounting.PoissonSampledDpEvent(sampling_probability, gaussian)
            accountant.compose(dp_accounting.SelfComposedDpEvent(sampled, count))
        return accountant.get_epsilon(delta)

    columns = ("noise_multiplier", "sampling_probability", "count")
    return lambda events, delta: epsilon(tuple(tuple(event[key] for key in columns) for event in events), delta)


@contextlib.contextmanager
def heeding_ctrl_c():
    """Let children heed Ctrl-C even if these tests run in the background of a shell, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Process:
    """The command in a process group of its own, with its output in files."""

    def __init__(self, arguments, log, settings=None):
        self.log = log
        command = [sys.executable, "-m", "simulations.command_line", "simulate", *map(str, arguments)]
        with log.open("wb") as file, heeding_ctrl_c():
            self._process = subprocess.Popen(
                [*command, *flags(settings or {})],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "COLUMNS": "200", "PYTHONWARNINGS": ""},
            )
        self.pid = self._process.pid

    @property
    def output(self):
        return self.log.read_text()

    @property
    def children(self):
        return [pid for pid, (parent, state) in processes().items() if parent == self.pid and state != "Z"]

    def until(self, condition, seconds=120.0):
        """Wait for a condition while the process runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, f"ended too soon:\n{self.output}"
            assert time.monotonic() < end, f"took too long:\n{self.output}"
            time.sleep(0.004)

    def wait(self, seconds=120.0):
        """Wait for the end; gives the exit status."""
        return self._process.wait(seconds)

    def interrupt(self):
        """Press Ctrl-C, which reaches every process in the foreground."""
        os.killpg(self.pid, signal.SIGINT)

    def kill(self):
        """Kill the process and its workers at once, without any goodbye."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def processes():
    """Parent and state of every process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            found[int(path.parent.name)] = (int(parent), state)
    return found


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start the command in processes of its own; all are gone after the tests."""
    started = []

    def launch(*arguments, settings=None):
        log = tmp_path_factory.mktemp("log") / "output.txt"
        started.append(Process(arguments, log, settings))
        return started[-1]

    yield launch
    for process in started:
        process.kill()
