"""A node runs its own installed client, whatever bundle comes over the network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flwr
import pytest
from flwr.supercore import constant
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND
from flwr.supernode.runtime import run_clientapp

from adadpigu_core.exceptions import ConfigurationError
from client import launcher
from client.app import app


def test_flower_finds_our_program_before_its_own():
    inner = launcher.environment({"PATH": os.pathsep.join(["/usr/bin"]), "HOME": "/home/alice"})
    found = shutil.which("flwr-clientapp", path=inner["PATH"])
    assert found == str(launcher.PROGRAMS / "flwr-clientapp")
    assert inner["HOME"] == "/home/alice"
    assert inner["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


def test_without_our_program_no_node_is_started(tmp_path):
    """Flower's own would be found in its place, and run what the network sends."""
    for name in TASK_TYPE_TO_COMMAND.values():
        (tmp_path / name).write_text("#!/bin/sh\n")
        with pytest.raises(ConfigurationError, match=r"cannot be executed.* chmod"):
            launcher.environment(os.environ, tmp_path)
        (tmp_path / name).chmod(0o755)
    launcher.environment(os.environ, tmp_path)


OTHERS = sorted({*TASK_TYPE_TO_COMMAND.values()} - {"flwr-clientapp"})


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_that_a_server_may_ask_for_is_run(name):
    """A SuperLink says what kind of app a run is, and a SuperNode starts the program of that kind by its name."""
    folders = [Path(sys.executable).parent, Path(flwr.__file__).parents[4] / "bin"]
    assert shutil.which(name, path=os.pathsep.join(map(str, folders)))  # the control: Flower's would be found
    inner = launcher.environment(os.environ)
    done = subprocess.run([name, "--help"], env=inner, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert f"adadpigu: {name} is not started" in done.stderr


def test_a_flower_that_starts_more_programs_stops_the_node(monkeypatch):
    monkeypatch.setattr(constant, "TASK_TYPE_TO_COMMAND", {**TASK_TYPE_TO_COMMAND, "new": "flwr-newapp"})
    with pytest.raises(ConfigurationError, match=r"also starts flwr-newapp.* install a release"):
        launcher.environment(os.environ)
    monkeypatch.delattr(constant, "TASK_TYPE_TO_COMMAND")
    with pytest.raises(ConfigurationError, match="does not say which programs it starts"):
        launcher.environment(os.environ)


def test_the_program_is_flowers_own_but_for_the_bundle():
    done = subprocess.run(
        [launcher.PROGRAMS / "flwr-clientapp", "--help"],
        env=launcher.environment(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--runtime-api-address" in done.stdout


def test_what_is_loaded_is_the_installed_app():
    names = ("install_from_fab", "install_app_dependencies", "get_load_client_app_fn")
    runtime = SimpleNamespace(**{name: getattr(run_clientapp, name) for name in names})
    launcher.guard(runtime)
    assert runtime.install_from_fab(b"not even a bundle", skip_prompt=True) is None
    assert runtime.install_app_dependencies("/nowhere", launch_id="x") is None
    load = runtime.get_load_client_app_fn(default_app_ref="evil:app", app_path=None, multi_app=True)
    assert load("evil/app", "1.0.0", "hash") is app


def test_an_unknown_flower_stops_the_node():
    with pytest.raises(SystemExit, match="no get_load_client_app_fn"):
        launcher.guard(SimpleNamespace(install_from_fab=print, install_app_dependencies=print))


def test_starting_it_loads_no_torch():
    code = "import sys, client.launcher; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
