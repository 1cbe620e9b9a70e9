"""``adadpigu supernode``: what it becomes."""

import os
import subprocess
from importlib import import_module

import pytest
from typer.testing import CliRunner

from client import launcher
from simulations.command_line import app


@pytest.fixture
def become(monkeypatch):
    """Run the command; gives the command line and the environment of the SuperNode that it becomes."""

    def run(*arguments):
        found = []
        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: None)
        monkeypatch.setattr(os, "execvpe", lambda *given: found.append(given))
        result = CliRunner().invoke(app, ["supernode", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        ((name, command, environment),) = found
        assert name == command[0] == "flower-supernode"
        return command[1:], environment

    return run


def test_options_are_flowers_own(become):
    options = ["--superlink", "server:1", "--node-config", 'dataset="npz:/x.npz" num-classes=2']
    command, environment = become(*options)
    assert command[:4] == options
    assert environment["PATH"].startswith(str(launcher.PROGRAMS))


@pytest.mark.parametrize("asked", [["--isolation", "process"], ["--isolation=process"], ["--iso", "process"], []])
def test_clients_are_started_by_this_node_only(become, asked):
    """A SuperExec that somebody starts elsewhere would run bundles from the network."""
    parser = import_module("flwr.supernode.cli.flower_supernode")._parse_args_run_supernode()
    assert not asked or parser.parse_args(asked).isolation == "process"  # the control
    command, _ = become(*asked)
    assert parser.parse_args(command).isolation == "subprocess"
