"""Runs in real processes: killed, stopped, interrupted, and none the worse for it.

A stopped worker holds a run in the middle of a round, where it can be killed at leisure.
"""

import contextlib
import os
import signal

import numpy as np
import pytest

pytestmark = pytest.mark.slow
ROUNDS = 12


@pytest.fixture(scope="module")
def settings(tiny, make_npz):
    """The user's own arrays, because processes that read them start faster."""
    return {**tiny, "federation.num-rounds": ROUNDS, "task.dataset": f"npz:{make_npz()}"}


def until_inside_a_round(process, run):
    """Stop a worker after a round, and wait until the other one's client has done its part of the next."""
    process.until(lambda: run.rounds > 0)
    stopped = process.children[0]
    os.kill(stopped, signal.SIGSTOP)

    def uneven():
        return len({len(rows) for rows in run.ledgers().values()}) > 1

    process.until(uneven, seconds=30)
    return stopped


@contextlib.contextmanager
def no_child_is_left(process):
    children = process.children
    assert children
    yield
    assert [pid for pid in children if alive(pid)] == []


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def check_rounds(run):
    for rows in run.ledgers().values():
        assert [(number, count) for _, number, count in rows] == [(number, 1) for number in range(1, ROUNDS + 1)]
    assert [line["round"] for line in run.metrics] == list(range(1, ROUNDS + 1))


def test_kill_9_in_a_round_and_between_rounds(start, adadpigu, run_in, settings, folder, tmp_path):
    """The end is computed in this process, and so is what all should come to: it does not depend on workers either."""
    run, whole = run_in(folder), run_in(tmp_path / "whole")
    process = start("--output", folder, settings=settings)
    until_inside_a_round(process, run)
    process.kill()
    inside = run.ledgers()
    assert not (folder / "result.json").exists()

    process = start("--resume", folder)
    process.until(lambda: run.rounds >= ROUNDS // 2)
    process.kill()
    assert "Going on after round " in process.output
    assert all(rows[: len(inside[name])] == inside[name] for name, rows in run.ledgers().items())
    assert run.rounds < ROUNDS

    assert adadpigu("--resume", folder).exit_code == 0
    assert adadpigu("--output", whole.folder, settings=settings).exit_code == 0
    np.testing.assert_array_equal(run.weights, whole.weights, strict=True)
    check_rounds(run)
    assert [client["epsilon"] for client in run.json()["clients"]] == [
        client["epsilon"] for client in whole.json()["clients"]
    ]


def test_ctrl_c(start, run_in, settings, folder):
    run = run_in(folder)
    process = start("--output", folder, settings={**settings, "runtime.workers": 1})
    process.until(lambda: run.rounds > 0)
    with no_child_is_left(process):
        process.interrupt()
        assert process.wait(20) == 130
    assert process.output.endswith(f"Interrupted. Go on with: adadpigu simulate --resume {folder}\n")
    assert "Traceback" not in process.output


def test_a_killed_worker(start, run_in, settings, folder):
    run = run_in(folder)
    process = start("--output", folder, settings=settings)
    killed = until_inside_a_round(process, run)
    os.kill(killed, signal.SIGKILL)
    with no_child_is_left(process):
        assert process.wait() == 0, process.output
    assert "SIGKILL" in process.output
    assert "Traceback" not in process.output
    assert run.rounds == ROUNDS
    missing = [line["missing"] for line in run.metrics]
    assert 1 <= sum(missing) <= 2
    for client, rows in zip(run.json()["clients"], run.ledgers().values(), strict=True):
        numbers = [number for _, number, _ in rows]
        assert sorted(set(numbers)) == numbers
        spent = sum(count for _, _, count in rows)
        assert client["releases"] <= spent <= ROUNDS
        assert sum(event["count"] for event in client["events"]) <= spent
        assert client["epsilon"] <= client["target_epsilon"]
        assert client["warnings"] == []
    assert sum(client["releases"] for client in run.json()["clients"]) == 3 * ROUNDS - sum(missing)
