"""A federation of real processes on loopback: SuperLink with TLS and node keys, SuperNodes, the app between them."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import flwr
import numpy as np
import pytest

from adadpigu_core.accounting import Event, epsilon, merge
from adadpigu_core.configuration import Configuration, flatten
from adadpigu_core.ledger import Target
from adadpigu_core.provenance import code_fingerprint
from client.policy import template
from simulations import process_tree
from simulations.flower_engine import write_app

collect_ignore = ["rounds.py", "opacus_example"]  # a benchmark, and what it runs: no tests, nor their examples
BIN = Path(sys.executable).parent
EXTENSIONS = """\
subjectAltName=DNS:localhost,IP:127.0.0.1
extendedKeyUsage=serverAuth
"""
TINY = {
    "task.model": "linear",
    "federation.num-clients": 2,
    "federation.num-rounds": 3,
    "federation.start-timeout": 60.0,
    "pretraining.round-share": 0.3,
}


def command(*arguments, folder, seconds=120, **environment):
    """Run a program to its end; gives the finished process."""
    return subprocess.run(
        [str(argument) for argument in arguments],
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def openssl(folder, *arguments):
    done = command("openssl", *arguments, folder=folder)
    assert done.returncode == 0, done.stderr


def make_authority(folder, name):
    """Make a certificate authority, as the guide does."""
    extensions = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key")
    openssl(folder, "req", "-x509", *key, "-days", "30", "-out", f"{name}.crt", "-subj", f"/CN={name}", *extensions)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A folder with ca.crt, the server's certificate, keys of nodes, and another authority that signed nothing."""
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, "node0", "node1", "stranger")
    make_authority(folder, "other")
    return folder


def make_certificates(folder, *nodes):
    """Make an authority, the server's certificate, and a key for each node."""
    make_authority(folder, "ca")
    (folder / "extensions").write_text(EXTENSIONS)
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "server.key")
    openssl(folder, "req", *key, "-out", "server.csr", "-subj", "/CN=localhost")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30", "-extfile", "extensions")
    openssl(folder, "x509", "-req", "-in", "server.csr", *signed, "-out", "server.pem")
    for name in nodes:
        done = command("ssh-keygen", "-t", "ecdsa", "-b", "384", "-N", "", "-f", name, folder=folder)
        assert done.returncode == 0, done.stderr


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Program:
    """A program in a session of its own, with its output in a file."""

    def __init__(self, arguments, log, environment, folder):
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [str(argument) for argument in arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.groups = set()

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    def note_groups(self):
        self.groups |= process_tree.descendant_groups(self.process.pid)

    def kill(self):
        """Kill the program and whatever it has started, without any goodbye."""
        self.note_groups()
        for group in self.groups | {self.process.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.process.wait()


@dataclass
class Site:
    """A node's own files."""

    folder: Path
    data: Path
    ledger: Path
    policy: Path
    program: Program | None = None

    def charges(self):
        """Rounds charged, read without the ledger's code."""
        if not self.ledger.exists():
            return []
        with contextlib.closing(sqlite3.connect(f"file:{self.ledger}?mode=ro", uri=True, timeout=30)) as connection:
            return connection.execute(
                "SELECT round, phase, noise_multiplier, count FROM charges ORDER BY id"
            ).fetchall()

    @property
    def output(self):
        return self.program.output if self.program else ""


@dataclass
class Federation:
    """The processes and files of one federation."""

    folder: Path
    certificates: Path
    port: int = field(default_factory=free_port)
    link: Program | None = None
    sites: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("home", "empty"):
            (self.folder / name).mkdir()
        self.address = f"127.0.0.1:{self.port}"
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(self.folder / "home"),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "PYTHONWARNINGS": "",
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(BIN), str(Path(self.flower("flwr")).parent), os.environ["PATH"]]),
        }
        (self.folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "dep"\n[superlink.dep]\naddress = "{self.address}"\n'
            f'root-certificates = "{self.certificates / "ca.crt"}"\n'
        )

    @staticmethod
    def flower(name):
        """Path of one of Flower's programs."""
        beside = BIN / name
        return str(beside if beside.exists() else Path(flwr.__file__).parents[4] / "bin" / name)

    def start_link(self):
        certificate = [f"--ssl-{kind}file={self.certificates / name}" for kind, name in CERTIFICATE.items()]
        options = ["--enable-supernode-auth", "--host", "127.0.0.1", "--port", self.port]
        options += ["--database", self.folder / "state.db", "--disable-runtime-dependency-installation"]
        arguments = [self.flower("flower-superlink"), *certificate, *options]
        self.link = Program(arguments, self.folder / "link.log", self.environment, self.folder / "empty")
        self.until(self._answers, 60)

    def _answers(self):
        assert self.link.process.poll() is None, self.link.output
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def flwr(self, *arguments):
        done = command(
            self.flower("flwr"), *arguments, "--format", "json", folder=self.folder / "empty", **self.environment
        )
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = {"success": False}
        assert answer.get("success"), (done.stdout, done.stderr)
        return answer

    def register(self, name):
        self.flwr("supernode", "register", self.certificates / f"{name}.pub", "dep")

    def site(self, name, epsilon=8.0):
        """Make a node's files."""
        if name not in self.sites:
            folder = self.folder / name
            folder.mkdir()
            site = self.sites[name] = Site(
                folder, folder / "site.npz", folder / "ledger.sqlite", folder / "policy.toml"
            )
            generator = np.random.default_rng(len(self.sites))
            labels = np.arange(60) % 2
            np.savez(site.data, x=generator.normal(size=(60, 5)) + 2 * labels[:, None], y=labels)
            site.policy.write_text(template("records", Target(epsilon, 1e-5), code_fingerprint()))
        return self.sites[name]

    def start_node(self, name, *, key=None, authority="ca", plain=False, **changes):
        """Start a SuperNode as the guide says, or as plain Flower does."""
        site = self.site(name)
        (site.folder / "node.log").touch()
        config = {"dataset": f"npz:{site.data}", "ledger": str(site.ledger), "policy": str(site.policy)}
        config |= {"data-set-name": "records", "name": name, **changes}
        text = " ".join(f'{entry}="{value}"' for entry, value in config.items())
        options = ["--superlink", self.address, "--root-certificates", self.certificates / f"{authority}.crt"]
        options += ["--auth-supernode-private-key", self.certificates / (key or name), "--port", free_port()]
        program = [self.flower("flower-supernode")] if plain else [BIN / "adadpigu", "supernode"]
        site.program = Program(
            [*program, *options, "--node-config", text],
            site.folder / "node.log",
            self.environment,
            self.folder / "empty",
        )
        return site

    def tally(self, output):
        """Rounds and epsilon of each client in what a run has written, and its warnings."""
        clients = json.loads((output / "privacy.json").read_text())["clients"]
        return {entry["id"]: entry for entry in clients}

    def check_tally(self, output):
        """The tally is what the ledgers say, to the last digit."""
        for name, entry in self.tally(output).items():
            with contextlib.closing(sqlite3.connect(self.sites[name].ledger)) as connection:
                query = "SELECT phase, noise_multiplier, sampling_probability, count FROM charges"
                events = merge(Event(*row) for row in connection.execute(query))
            assert merge(Event(**event) for event in entry["events"]) == events
            assert entry["epsilon"] == epsilon(events, entry["delta"])

    def submit(self, output, app=None, **changes):
        """Start a run; gives its id."""
        app = app or write_app(self.folder / f"app-{time.monotonic_ns()}", flatten(Configuration()))
        overrides = self.folder / f"run-{time.monotonic_ns()}.toml"
        test = np.random.default_rng(9)
        task = self.folder / "task.npz"
        labels = np.arange(20) % 2
        features = test.normal(size=(20, 5)) + 2 * labels[:, None]
        np.savez(task, x_train=features, y_train=labels, x_test=features, y_test=labels)
        settings = {**TINY, "task.dataset": f"npz:{task}", "runtime.output": str(output), **changes}
        overrides.write_text("".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in settings.items()))
        return self.flwr("run", app, "dep", "--run-config", overrides)["run-id"]

    def status(self, run_id):
        (state,) = self.flwr("ls", "dep", "--run-id", run_id)["runs"]
        return state["status"]

    def await_result(self, output, seconds=240):
        """Wait for what a run writes in the end; asking Flower would start an interpreter each time."""
        self.until((output / "result.json").exists, seconds)
        return json.loads((output / "result.json").read_text())

    def until(self, condition, seconds, pause=0.2):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.logs()
            for program in self.programs:
                program.note_groups()
            time.sleep(pause)

    @property
    def programs(self):
        found = [self.link, *(site.program for site in self.sites.values())]
        return [program for program in found if program is not None]

    def logs(self):
        return "\n".join(f"== {program.log}\n{program.output[-4000:]}" for program in self.programs)

    def end(self):
        for program in reversed(self.programs):
            program.kill()


CERTIFICATE = {"ca-cert": "ca.crt", "cert": "server.pem", "key": "server.key"}


@pytest.fixture(scope="module")
def federation(tmp_path_factory, certificates):
    """A SuperLink and two nodes that it knows."""
    yield from started(tmp_path_factory, certificates)


@pytest.fixture
def fragile(tmp_path_factory, certificates):
    """Another, to be broken by one test."""
    yield from started(tmp_path_factory, certificates)


def started(tmp_path_factory, certificates):
    federation = Federation(tmp_path_factory.mktemp("federation"), certificates)
    try:
        federation.start_link()
        for name in ("node0", "node1"):
            federation.register(name)
            federation.start_node(name)
        yield federation
    finally:
        federation.end()
