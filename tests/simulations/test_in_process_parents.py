"""Programs that hold an in-process grid, and how they end."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest


class TestParents:
    """The grid inside other programs than pytest."""

    SCRIPT = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background of a shell
    from flwr.app import ConfigRecord, Message, RecordDict
    from simulations.in_process import InProcessGrid
    grid = InProcessGrid("toy_app:app", [{}] * 2, {}, 2, environment={"PYTHONPATH": sys.argv[1]})
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for node in grid.get_node_ids()])
    assert all(reply.has_content() for reply in replies), replies
    print(*grid.worker_pids, flush=True)
    content = RecordDict({"config": ConfigRecord({"seconds": 60.0, "code": "print('from the app')"})})
    grid.send_and_receive([Message(content, 1000, "query.faulty")])
    """

    def start(self, apps, tmp_path, ending, **options):
        script = tmp_path / "a_script_without_suffix"
        script.write_text(textwrap.dedent(self.SCRIPT) + ending + "\n")
        command = [sys.executable, str(script), apps["PYTHONPATH"]]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)

    @pytest.mark.parametrize("ending", ["grid.close()", "pass", "raise SystemExit(0)"])
    def test_program_without_main_guard_and_standard_input(self, apps, wait_for_end, tmp_path, ending):
        process = self.start(apps, tmp_path, ending, preexec_fn=lambda: os.close(0))
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "from the app" not in output, "standard output belongs to the parent"
        assert wait_for_end(list(map(int, output.split()))) == []

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_busy_workers_do_not_outlive_the_parent(self, apps, wait_for_end, tmp_path, number):
        busy = 'grid.push_messages([Message(content, 1000, "query.slow")]); time.sleep(60)'
        process = self.start(apps, tmp_path, busy, stderr=subprocess.DEVNULL)
        with process:
            pids = list(map(int, process.stdout.readline().split()))
            time.sleep(0.3)
            process.send_signal(number)
            process.wait(10)
        assert len(pids) == 2
        assert wait_for_end(pids) == []
