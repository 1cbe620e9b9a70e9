"""Find and end the processes that a process of ours has started, and theirs.

A detached child starts a session of its own, so ending one process group is not enough, and a grandchild whose parent
has gone cannot be found any more. Hence the order: list the descendants while their ancestor lives, then end the
groups that they lead. A group's number is not reused while a member lives, so nobody else is hit.
"""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

_POLL_S = 0.1


class _Process(NamedTuple):
    pid: int
    parent: int
    group: int
    state: str


def descendant_groups(pid: int) -> set[int]:
    """Process groups that are led by a process or by one of its descendants."""
    table = _processes()
    family = _family(pid, table)
    return {process.group for process in table if process.pid in family} & family


def descendants(pid: int) -> set[int]:
    """A process and everything that comes from it."""
    return _family(pid, _processes())


def _family(pid: int, table: list[_Process]) -> set[int]:
    family = {pid}
    while grown := {process.pid for process in table if process.parent in family} - family:
        family |= grown
    return family


def end_groups(groups: set[int], patience: float) -> None:
    """Ask all members of process groups to end, and kill those that have not after ``patience`` seconds."""
    _send(groups, signal.SIGTERM)
    deadline = time.monotonic() + patience
    while _living(groups) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    _send(groups, signal.SIGKILL)


def _send(groups: set[int], number: signal.Signals) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)


def _living(groups: set[int]) -> bool:
    return any(process.group in groups and not process.state.startswith("Z") for process in _processes())


def _processes() -> list[_Process]:
    """List the processes of this machine: from /proc, which small containers have, or from ``ps``, which others do."""
    if Path("/proc/self/stat").exists():
        return [process for entry in Path("/proc").glob("[0-9]*") if (process := _read(entry))]
    command = ["ps", "-axo", "pid=,ppid=,pgid=,stat="]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split() for line in lines]
    return [_Process(int(pid), int(parent), int(group), state) for pid, parent, group, state in rows]


def _read(entry: Path) -> _Process | None:
    try:
        # The second field is the program's name in parentheses, and may hold spaces and parentheses itself.
        state, parent, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return None
    return _Process(int(entry.name), int(parent), int(group), state)
