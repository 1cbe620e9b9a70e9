"""Programs are killed in the middle of a run; it goes on, and the tally is what the ledgers say."""

import contextlib
import os
import signal
import time

import pytest

from simulations import process_tree

pytestmark = [pytest.mark.slow]
ROUNDS = 4


def rounds_done(output):
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_superlink_and_server_die_and_the_run_is_resumed(fragile, tmp_path):
    """The checkpoint is in the run folder: a new run with the same folder goes on where the old one was."""
    output = tmp_path / "run"
    changes = {"federation.num-rounds": ROUNDS}
    fragile.submit(output, **changes)
    fragile.until(lambda: rounds_done(output) >= 1, 240)
    fragile.until(lambda: len(fragile.sites["node0"].charges()) > rounds_done(output), 60)  # inside a round
    fragile.link.kill()
    done = rounds_done(output)
    assert done < ROUNDS
    fragile.start_link()
    fragile.submit(output, **changes)
    result = fragile.await_result(output, 400)
    assert result["rounds"] == ROUNDS
    for name, site in fragile.sites.items():
        charges = site.charges()
        assert [row[0] for row in charges] == [*range(1, ROUNDS + 1)], name
    fragile.check_tally(output)


@pytest.mark.long
def test_a_supernode_dies_for_good(fragile, tmp_path):
    output = tmp_path / "run"
    fragile.submit(output, **{"federation.num-rounds": ROUNDS, "federation.round-timeout": 90.0})
    fragile.until(lambda: rounds_done(output) >= 1, 240)
    fragile.sites["node1"].program.kill()
    result = fragile.await_result(output, 600)
    assert result["rounds"] == ROUNDS
    assert len(fragile.sites["node0"].charges()) == ROUNDS
    assert len(fragile.sites["node1"].charges()) < ROUNDS
    known = sum(event["count"] for event in fragile.tally(output)["node1"]["events"])
    assert known <= len(fragile.sites["node1"].charges())


@pytest.mark.long
def test_a_supernode_comes_back_at_once(fragile, tmp_path):
    """Flower forgets the message that it was working on; the round's time-out ends the wait, and the node is back."""
    output = tmp_path / "run"
    fragile.submit(output, **{"federation.num-rounds": 40, "federation.round-timeout": 60.0})
    fragile.until(lambda: rounds_done(output) >= 1, 240)
    fragile.sites["node1"].program.kill()
    before = len(fragile.sites["node1"].charges())
    time.sleep(1)
    fragile.until(lambda: restarted(fragile, "node1"), 180, pause=2)
    fragile.await_result(output, 900)
    numbers = [row[0] for row in fragile.sites["node1"].charges()]
    assert numbers == sorted(set(numbers))
    assert len(numbers) > before + 1
    fragile.check_tally(output)


def restarted(federation, name):
    """Start a node again until it is let in: as long as its old heartbeat lasts, it is turned away."""
    site = federation.sites[name]
    if site.program.process.poll() is not None:
        federation.start_node(name)
    return site.output.count("SuperNode ID: ") > 1


@pytest.mark.long
def test_a_client_process_is_killed_over_flower(fragile, tmp_path):
    """Flower tells the server after a minute; the round goes on without it, and the next one with it."""
    output = tmp_path / "run"
    fragile.submit(output, **{"federation.num-rounds": ROUNDS})
    fragile.until(lambda: rounds_done(output) >= 1, 240)
    signal_all(wait_for_client(fragile, "node1"), signal.SIGKILL)
    result = fragile.await_result(output, 600)
    assert result["rounds"] == ROUNDS
    numbers = [row[0] for row in fragile.sites["node1"].charges()]
    assert numbers == sorted(set(numbers))
    known = sum(event["count"] for event in fragile.tally(output)["node1"]["events"])
    assert ROUNDS - 1 <= known <= len(numbers)


def wait_for_client(federation, name):
    """Processes that answer the next message of a node: the copies that its warm process makes."""
    node = federation.sites[name].program.process.pid
    found = []

    def running():
        family = [pid for pid in process_tree.descendants(node) if b"client.warm" in command_line(pid)]
        found[:] = [pid for pid in family if parent(pid) != node]
        return len(found) > 1

    federation.until(running, 120, pause=0.02)
    return found


def parent(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def signal_all(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


@pytest.mark.long
def test_a_slow_clients_late_reply_counts_in_the_tally(fragile, tmp_path):
    output = tmp_path / "run"
    fragile.submit(output, **{"federation.num-rounds": ROUNDS, "federation.round-timeout": 45.0})
    fragile.until(lambda: rounds_done(output) >= 1, 240)
    slow = wait_for_client(fragile, "node1")
    signal_all(slow, signal.SIGSTOP)
    now = rounds_done(output)
    fragile.until(lambda: rounds_done(output) > now, 120)
    signal_all(slow, signal.SIGCONT)
    result = fragile.await_result(output, 400)
    assert result["rounds"] == ROUNDS
    fragile.check_tally(output)
