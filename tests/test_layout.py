"""Imports point one way, and files stay small.

    adadpigu_core  <-  client, server  <-  simulations

The files are parsed, not imported, so that an import inside a function counts too.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMAND_LINE = {"typer", "rich"}
FORBIDDEN = {
    "adadpigu_core": {"flwr", "flwr_datasets", "client", "server", "simulations", "ray"} | COMMAND_LINE,
    "client": {"server", "simulations"} | COMMAND_LINE,
    "server": {"client", "simulations"} | COMMAND_LINE,
    "simulations": set(),
}
SHAPELESS = {"utils", "util", "common", "helpers", "helper", "misc"}
MOST_LINES = 400


def sources(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(code):
    """Top-level packages that a source imports, by statement or by name through import_module."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                found.add(str(node.args[0].value))
    return {name if name.startswith(".") else name.split(".")[0] for name in found}


def violations(package, code):
    """Imports that the package must not have. Relative ones could point anywhere, so they are out as well."""
    found = imported(code)
    return {name for name in found if name in FORBIDDEN[package] or name.startswith(".")}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    assert sources(package), f"there is no package {package}"
    found = {str(path.relative_to(ROOT)): violations(package, path.read_text()) for path in sources(package)}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("package", "code", "culprit"),
    [
        ("adadpigu_core", "import flwr", "flwr"),
        ("adadpigu_core", "import os, flwr.common as c", "flwr"),
        ("adadpigu_core", "def f():\n    from flwr.app import Message", "flwr"),
        ("adadpigu_core", "from client import partitions", "client"),
        ("adadpigu_core", "try:\n    import rich\nexcept ImportError:\n    pass", "rich"),
        ("client", "from server.strategy import Strategy", "server"),
        ("client", "import importlib\nimportlib.import_module('simulations.engine')", "simulations"),
        ("server", "__import__('client')", "client"),
        ("server", "if TYPE_CHECKING:\n    import typer", "typer"),
        ("server", "from ..client import policy", "..client"),
        ("simulations", "from . import engine", "."),
    ],
)
def test_a_violation_would_be_found(package, code, culprit):
    assert violations(package, code) == {culprit}


def test_what_is_allowed_is_not_reported():
    code = "import torch\nfrom adadpigu_core.exceptions import DataError\nimport flwrx\nprint('flwr')"
    assert violations("adadpigu_core", code) == set()
    assert violations("client", "from flwr.clientapp import ClientApp") == set()
    assert violations("simulations", "import client, server, typer, rich") == set()


def test_no_file_is_too_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(*FORBIDDEN, "tests")}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_modules_say_what_they_are_about():
    paths = sources(*FORBIDDEN)
    assert [path for path in paths if SHAPELESS & {part.removesuffix(".py") for part in path.parts[-3:]}] == []
    assert [path for path in paths if not ast.get_docstring(ast.parse(path.read_text()))] == []
