"""Copies of a process that has imported everything: each does what the program would, and ends with it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client import launcher

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")]
ROOT = Path(__file__).resolve().parents[2]
# stands in for Flower's program: says what it was given, and waits if it is asked to
PROBE = """
import os, sys, time
import client.warm, client.launcher

def main():
    print("out", *sys.argv[1:], flush=True)
    if "draw" in sys.argv:
        from adadpigu_core.sampling import SystemRandomness
        print(*SystemRandomness().normal(2), flush=True)
    print("err", "torch" in sys.modules, file=sys.stderr, flush=True)
    if "wait" in sys.argv:
        open(sys.argv[-1], "w").write(str(os.getpid()))
        time.sleep(60)
    sys.exit(3)

client.warm.main = main
client.warm._IMPORTED = ("torch", "adadpigu_core.sampling")
client.warm.serve(client.warm.Path(os.environ["ADADPIGU_WARM_SOCKET"]), int(sys.argv[1]))
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environment of a node whose warm process is there."""
    path = tmp_path_factory.mktemp("warm") / "socket"
    # as the command starts it: NumPy would start threads, which no copy has
    environment = {**launcher.environment(os.environ), launcher.SOCKET_VARIABLE: str(path), "OPENBLAS_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, "-c", PROBE, str(os.getpid())], env=environment, cwd=ROOT)
    until(path.exists)
    yield environment
    server.kill()
    server.wait()


def program(environment, *arguments):
    command = [launcher.PROGRAMS / "flwr-clientapp", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_copy_does_the_work(environment):
    for _ in range(2):
        process = program(environment, "--token", "a b")
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output, errors) == (3, "out --token a b\n", "err True\n")


def test_copies_do_not_share_their_noise(environment):
    draws = {program(environment, "draw").communicate(timeout=60)[0].splitlines()[1] for _ in range(4)}
    assert len(draws) == 4


def test_a_copy_ends_with_the_program(environment, tmp_path):
    mark = tmp_path / "pid"
    process = program(environment, "wait", str(mark))
    until(lambda: mark.exists() and mark.read_text())
    copy = int(mark.read_text())
    assert copy != process.pid
    process.send_signal(signal.SIGKILL)
    process.communicate()
    until(lambda: not alive(copy), 10)


def test_without_one_the_program_does_it_itself(environment, tmp_path):
    alone = {**environment, launcher.SOCKET_VARIABLE: str(tmp_path / "nobody")}
    process = program(alone, "--help")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "--runtime-api-address" in output


def test_nonsense_on_the_socket_does_no_harm(environment):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(environment[launcher.SOCKET_VARIABLE])
        connection.sendall(b"nonsense")
        assert connection.recv(1) in (b"", b"\x01")
    process = program(environment)
    assert process.communicate(timeout=60)[0] == "out\n"


def test_it_goes_when_its_node_has_gone(tmp_path):
    environment = {**launcher.environment(os.environ), launcher.SOCKET_VARIABLE: str(tmp_path / "socket")}
    node = (
        "import os, subprocess, sys; "
        "print(subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())], stdout=subprocess.DEVNULL).pid)"
    )
    command = [sys.executable, "-c", node, PROBE]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    until(lambda: not alive(int(done.stdout)), 60)


def test_it_gives_up_if_an_import_starts_threads(tmp_path):
    (tmp_path / "threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    )
    environment = {**launcher.environment(os.environ), launcher.SOCKET_VARIABLE: str(tmp_path / "socket")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", PROBE.replace('("torch", ', '("threads", '), str(os.getpid())]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "an import has started threads" in done.stderr
