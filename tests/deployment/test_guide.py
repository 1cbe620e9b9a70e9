"""docs/deploy.md, tried: its commands run as they stand, on this machine alone, with other addresses and folders."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flwr
import numpy as np
import pytest

from adadpigu_core.configuration import settings
from adadpigu_core.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")]
ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
FLOWER = Path(flwr.__file__).parents[4] / "bin"


def blocks(section):
    """Commands of a section of the guide, block by block."""
    text = re.search(rf"^##+ {re.escape(section)}$(.*?)(?=^##+ |\Z)", GUIDE, re.M | re.S).group(1)
    found = re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", text, re.M)
    return [re.sub(r"^    ", "", block, flags=re.M) for block in found]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Run a block of the guide; gives what it prints."""
    folder = tmp_path_factory.mktemp("machine")
    (folder / "home").mkdir()
    np.savez(folder / "site.npz", x=np.zeros((30, 3)), y=np.arange(30) % 2)
    path = os.pathsep.join([str(BIN), str(FLOWER), os.environ["PATH"]])

    def run(block, status=0):
        for old, new in {
            "/etc/adadpigu": f"{folder}/etc",
            "/var/lib/adadpigu": f"{folder}/var",
            "/data/site.npz": f"{folder}/site.npz",
            "server.example.org": "localhost",
        }.items():
            block = block.replace(old, new)
        done = subprocess.run(
            ["bash", "-eu", "-c", block],
            cwd=folder / "home",
            env={**os.environ, "HOME": str(folder / "home"), "PATH": path, "COLUMNS": "250", "PYTHONWARNINGS": ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, (block, done.stdout, done.stderr)
        return done.stdout

    run.folder = folder
    return run


def test_certificates_keys_policy_and_ledger(machine):
    make, look = blocks("1. The server's certificate")
    machine(make)
    found = machine(f"cd ~/federation\n{look}")
    assert "was signed by the authority" in found
    assert "does not name 127.0.0.1" not in found
    machine("""cd ~/federation && sed s/,IP:127.0.0.1// server.ext > other.ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -days 365 -extfile other.ext -out other.pem""")
    assert "does not name 127.0.0.1" in machine(f"cd ~/federation\n{look.replace('server.pem', 'other.pem')}")
    (key,) = blocks("2. A key for each node")
    machine(key)
    shutil.copy(machine.folder / "home" / "federation" / "ca.crt", machine.folder / "etc")
    policy, check, ledger = blocks("4. The policy and the ledger of a node")
    machine(policy)
    assert "epsilon 4 at delta 1e-06, over all time" in machine(check)
    machine(ledger)
    Ledger(machine.folder / "var" / "ledger.sqlite", "patients", "content").close()
    show, *_ = blocks("7. The ledger")
    assert "patients: epsilon 0.0000 of 4 at delta 1e-06, 4.0000 left" in machine(show)
    assert (machine.folder / "home" / "ledger.json").exists()
    doctor, _start = blocks("5. A node")
    output = machine(doctor, status=1)  # everything is in order but for the server, which is not there
    assert "cannot be reached" in output
    faults = [line for line in output.splitlines() if "fault" in line and "tmpfs" not in line and "overlay" not in line]
    assert len(faults) == 1


@pytest.mark.parametrize(
    ("section", "program"),
    [
        ("3. The SuperLink", "flower-superlink"),
        ("3. The SuperLink", "flwr supernode register"),
        ("5. A node", "flower-supernode"),
        ("5. A node", "adadpigu doctor"),
        ("6. A run", "flwr run"),
        ("6. A run", "adadpigu policy model"),
        ("7. The ledger", "adadpigu ledger reconcile"),
    ],
)
def test_options_exist(machine, section, program):
    """Of programs that would go on for ever, or need a server."""
    text = "\n".join(blocks(section)).replace("adadpigu supernode", "flower-supernode")
    commands = re.split(r"\n(?=\S)", text)
    options = {
        option
        for command in commands
        if command.startswith(program)
        for option in re.findall(r"(?<=\s)--[a-z-]+", command)
    }
    assert options
    known = machine(f"{program} --help")
    assert [option for option in sorted(options) if option not in known] == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
@pytest.mark.parametrize(("old", "new", "complaint"), [("", "", ""), ("RestartSec", "RestartSecs", "Unknown key")])
def test_the_unit_is_one(tmp_path, old, new, complaint):
    """A file that systemd takes, and, as a control, one with a wrong key."""
    (tmp_path / "start-node").write_text("#!/bin/sh\n")
    (tmp_path / "start-node").chmod(0o755)
    unit = tmp_path / "adadpigu.service"
    (text,) = blocks("Under systemd")
    unit.write_text(text.replace("/etc/adadpigu", str(tmp_path)).replace(old or "\0", new))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stderr.splitlines() if "adadpigu.service" in line]
    assert (not found) if not complaint else any(complaint in line for line in found)


def test_every_setting_of_the_run_exists():
    known = {key for key, *_ in settings()}
    run = next(block for block in blocks("6. A run") if "flwr run" in block)
    assert set(re.findall(r"([a-z-]+\.[a-z-]+)=", run)) <= known
