"""Runs through the real ``flwr run`` and Ray, with a toy app."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import tomllib
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adadpigu_core
from simulations import flower_engine, process_tree
from simulations.flower_engine import FlowerRunError

DEFAULTS = {"out": "", "text": "", "privacy.number": 1.0, "count": 1, "flag": False, "fail": "", "sleep": 0.0}

SERVER = """
import json, time
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    if context.run_config["fail"]:
        raise ValueError(context.run_config["fail"])
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for node in grid.get_node_ids()])
    facts = [json.loads(reply.content["facts"]["json"]) for reply in replies]
    with open(context.run_config["out"], "w") as file:
        json.dump({"server": __file__, "config": dict(context.run_config), "clients": facts}, file)
"""

CLIENT = """
import json, os, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message, context):
    if context.run_config["sleep"]:
        open(context.run_config["out"], "w").close()
        time.sleep(context.run_config["sleep"])
    names = ("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED")
    facts = {
        "file": __file__,
        "node": dict(context.node_config),
        "files here": os.listdir(),
        "environment": [os.environ.get(name) for name in names],
    }
    return Message(RecordDict({"facts": ConfigRecord({"json": json.dumps(facts)})}), reply_to=message)
"""


@pytest.fixture
def toy_app(tmp_path):
    """An app with the shape of ours and other code in it."""
    app = tmp_path / "app"
    for package, source in {"server": SERVER, "client": CLIENT}.items():
        (app / package).mkdir(parents=True)
        (app / package / "__init__.py").touch()
        (app / package / "app.py").write_text(source)
    config = "".join(f"{key} = {json.dumps(value)}\n" for key, value in DEFAULTS.items())
    (app / "pyproject.toml").write_text(flower_engine._APP_TOML.format(version='"1.0"', config=config))
    return app


@pytest.fixture
def mark(monkeypatch):
    """An environment variable that every process of the run inherits."""
    value = f"ADADPIGU_TEST_MARK={uuid.uuid4()}"
    monkeypatch.setenv(*value.split("="))
    return value.encode()


def processes_with(mark):
    """Command lines by process id, without those that have ended and wait to be collected."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
    return found


class TestWriteApp:
    def test_app_is_complete_and_declares_its_configuration(self, tmp_path):
        config = {"a": 1, "privacy.target-epsilon": 2.5, "name": 'a "b" \\ c', "on": True}
        app = flower_engine.write_app(tmp_path / "new" / "app", config)
        project = tomllib.loads((app / "pyproject.toml").read_text())
        assert project["project"]["name"] == "adadpigu"
        assert project["project"]["version"] == adadpigu_core.__version__
        assert project["project"]["dependencies"] == []
        assert project["tool"]["flwr"]["app"]["publisher"] == "adadpigu"
        assert project["tool"]["flwr"]["app"]["config"] == config
        for package in ("adadpigu_core", "client", "server"):
            source = Path(adadpigu_core.__file__).parents[1] / package
            copied = {path.relative_to(app / package) for path in (app / package).rglob("*") if path.is_file()}
            assert copied == {path.relative_to(source) for path in source.rglob("*.py")}

    def test_nothing_is_overwritten(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(FileExistsError, match="not empty"):
            flower_engine.write_app(tmp_path, {})

    def test_another_package_of_the_same_name_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "server").mkdir()
        (tmp_path / "server" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "server", raising=False)
        with pytest.raises(FlowerRunError, match="another hides it"):
            flower_engine.write_app(tmp_path / "app", {})


scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
texts = st.text(st.characters(exclude_categories=["Cs"]))


class TestConfiguration:
    @given(st.dictionaries(texts, scalars | texts, max_size=4))
    def test_toml_says_what_was_meant(self, values):
        read = tomllib.loads(flower_engine._toml_table(values))
        assert read == values
        assert [type(value) for value in read.values()] == [type(value) for value in values.values()]

    def test_undeclared_keys_are_named(self, toy_app):
        with pytest.raises(FlowerRunError, match=r"\['privacy.missing'\]"):
            flower_engine.run(toy_app, {"privacy.missing": 1, "privacy.number": 2.0}, num_clients=2)

    def test_folder_without_app_is_refused(self, tmp_path):
        with pytest.raises(FlowerRunError, match="not a Flower app"):
            flower_engine.run(tmp_path, {}, num_clients=2)

    @pytest.mark.parametrize(("clients", "cpus"), [(0, 1), (2, 0), (2, 0.5)])
    def test_impossible_numbers_are_refused(self, toy_app, clients, cpus):
        with pytest.raises(ValueError, match="whole numbers"):
            flower_engine.run(toy_app, {}, num_clients=clients, cpus_per_client=cpus)

    def test_ray_cluster_that_does_not_answer_is_named(self, toy_app):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{unused.getsockname()[1]}"
            with pytest.raises(FlowerRunError, match=f"no Ray cluster answers at {address}"):
                flower_engine.run(toy_app, {}, num_clients=2, ray_address=address)


class TestProcessTree:
    def test_detached_grandchild_is_found_and_killed(self, tmp_path):
        script = tmp_path / "parent.py"
        script.write_text(
            textwrap.dedent(
                """
                import subprocess, sys, time
                stubborn = (
                    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                    "print(1, flush=True); time.sleep(60)"
                )
                command = [sys.executable, "-c", stubborn]
                child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
                child.stdout.readline()
                print(child.pid, flush=True)
                time.sleep(60)
                """
            )
        )
        command = [sys.executable, str(script)]
        with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True) as parent:
            child = int(parent.stdout.readline())
            groups = process_tree.descendant_groups(parent.pid)
            assert groups == {parent.pid, child}
            process_tree.end_groups(groups, 0.3)
        assert parent.returncode == -signal.SIGTERM
        time.sleep(0.2)
        assert not process_tree._living(groups)

    def test_group_of_the_caller_is_left_alone(self):
        with subprocess.Popen(["sleep", "60"]) as child:
            assert process_tree.descendant_groups(child.pid) == set()
            child.kill()


@pytest.mark.slow
class TestRun:
    def test_success(self, toy_app, tmp_path, monkeypatch, mark):
        rogue = tmp_path / "here" / "client"
        rogue.mkdir(parents=True)
        (rogue / "app.py").write_text("raise RuntimeError('the wrong code')")
        monkeypatch.chdir(rogue.parent)
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        overrides = {
            "out": str(tmp_path / "out.json"),
            "text": 'it\'s "quoted" = \\ ü 😀\n second line',
            "privacy.number": 1e-05,
            "count": 2**40,
            "flag": True,
        }
        polls = []
        with socket.socket() as busy:
            with contextlib.suppress(OSError):  # an own local SuperLink serves as well
                busy.bind(("127.0.0.1", 39091))
                busy.listen()
            flower_engine.run(toy_app, overrides, num_clients=2, on_poll=lambda: polls.append(1), timeout=180)
        result = json.loads((tmp_path / "out.json").read_text())
        assert result["config"] == DEFAULTS | overrides
        assert sorted(client["node"]["partition-id"] for client in result["clients"]) == [0, 1]
        assert all(client["node"]["num-partitions"] == 2 for client in result["clients"])
        assert all(client["environment"] == ["1", "0", "0"] for client in result["clients"])
        bundle = Path(result["server"]).parents[1]
        assert bundle.parent.name == "apps", "Flower runs the bundle that it has installed in its home"
        assert {client["file"] for client in result["clients"]} == {str(bundle / "client" / "app.py")}
        assert all(client["files here"] == [] for client in result["clients"])
        assert polls, "a run is watched while it works"
        assert processes_with(mark) == {}
        assert not bundle.exists()

    def test_failing_server_is_an_error_with_its_log(self, toy_app, mark):
        with pytest.raises(FlowerRunError, match="finished:failed") as caught:
            flower_engine.run(toy_app, {"fail": "a reason to fail"}, num_clients=2, timeout=180)
        assert "ValueError: a reason to fail" in str(caught.value)
        assert "server/app.py" in str(caught.value), "the log holds the traceback"
        assert "\x1b" not in str(caught.value)
        assert processes_with(mark) == {}

    def test_run_that_flower_refuses_is_an_error(self, toy_app, mark):
        project = toy_app / "pyproject.toml"
        project.write_text(project.read_text().replace("publisher", "publishers"))
        with pytest.raises(FlowerRunError, match="publisher"):
            flower_engine.run(toy_app, {}, num_clients=2, timeout=180)
        assert processes_with(mark) == {}

    @pytest.mark.parametrize("superlink_dies", [False, True])
    def test_run_that_is_cut_off_leaves_no_process(self, toy_app, tmp_path, mark, superlink_dies):
        out = tmp_path / "started"

        def cut_off_when_busy():
            found = processes_with(mark)
            if not out.exists() or not any(b"ClientAppActor" in command for command in found.values()):
                return
            if not superlink_dies:
                raise KeyboardInterrupt
            for pid in (pid for pid, command in found.items() if b"flower-superlink" in command):
                os.kill(pid, signal.SIGKILL)

        config = {"sleep": 100.0, "out": str(out)}
        with pytest.raises(FlowerRunError if superlink_dies else KeyboardInterrupt):
            flower_engine.run(toy_app, config, num_clients=2, on_poll=cut_off_when_busy, timeout=180)
        assert out.exists()
        end = time.monotonic() + 20  # on a busy machine, processes take their time to be gone
        while processes_with(mark) and time.monotonic() < end:
            time.sleep(0.1)
        assert processes_with(mark) == {}

    def test_timeout_is_an_error(self, toy_app, mark):
        with pytest.raises(FlowerRunError, match="did not end in time"):
            flower_engine.run(toy_app, {}, num_clients=2, timeout=0)
        assert processes_with(mark) == {}
