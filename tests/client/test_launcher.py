"""A node runs its own installed client, whatever bundle comes over the network."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
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
    (tmp_path / "flwr-clientapp").write_text("#!/bin/sh\n")
    with pytest.raises(ConfigurationError, match=r"cannot be executed.* chmod"):
        launcher.environment(os.environ, tmp_path)
    (tmp_path / "flwr-clientapp").chmod(0o755)
    launcher.environment(os.environ, tmp_path)


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
