"""kill -9 anywhere in a round: the ledger stays readable, is never behind, and a request has one answer."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SEED = 20


@pytest.fixture(scope="module")
def long(request):
    return request.config.getoption("--long")


@pytest.fixture(scope="module")
def diary(tmp_path_factory, long):
    """What happened to the processes of a node, in order."""
    rounds = 12 if long else 2
    conftest = ROOT / "tests" / "client" / "conftest.py"
    program = Path(__file__).with_name("killed_client.py")
    command = [sys.executable, program, conftest, tmp_path_factory.mktemp("node"), str(rounds), str(SEED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def stage(entry):
    """How far the round had come when its process was killed: 0 nothing, 1 charged, 2 stored."""
    number = entry["killed"]
    return (number in [row[0] for row in entry["charges"]]) + (str(number) in entry["stored"])


def test_processes_died_at_every_stage(diary, long):
    """A process that was done before its end had come, because its release was stored already, has lived."""
    kills = [entry for entry in diary if entry["status"] == -signal.SIGKILL]
    assert {entry["status"] for entry in diary} <= {-signal.SIGKILL, 0}
    assert {stage(entry) for entry in kills} == {0, 1, 2}
    assert len(kills) >= (50 if long else 8)


def test_the_ledger_is_always_readable_and_never_behind(diary):
    answered = 0
    for entry in diary:
        assert entry["whole"] == "ok"
        answered = max(answered, entry.get("round", 0))
        rounds = [row[0] for row in entry["charges"]]
        assert rounds == sorted(set(rounds)), "a round was charged twice"
        assert set(range(1, answered + 1)) <= set(rounds)


def test_a_request_has_one_answer(diary):
    for entry in diary:
        if "round" in entry:
            first, second = entry["hashes"]
            assert first == second
    hashes = [entry["hashes"][0] for entry in diary if "round" in entry]
    assert len(set(hashes)) == len(hashes)


def test_what_was_stored_before_a_kill_is_the_answer(diary):
    """It may have left; so nothing else may leave under its charge."""
    stored = {}
    for entry in diary:
        for number, digest in entry["stored"].items():
            assert stored.setdefault(number, digest) == digest
    assert set(stored) == {str(entry["round"]) for entry in diary if "round" in entry}
