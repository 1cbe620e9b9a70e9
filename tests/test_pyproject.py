"""What pyproject.toml says to Flower is what the code says."""

import tomllib
from pathlib import Path

import pytest

from adadpigu_core.configuration import Configuration, flatten, parse

ROOT = Path(__file__).resolve().parent.parent
FLOWER = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"].get("flwr", {}).get("app", {})


def flat(table, prefix=""):
    found = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@pytest.fixture
def config():
    if "config" not in FLOWER:
        pytest.fail(
            "pyproject.toml has no table [tool.flwr.app.config]: 'flwr run' knows no settings, and refuses every one "
            "that is given to it. Add it with the defaults of adadpigu_core.configuration.Configuration"
        )
    return flat(FLOWER["config"])


def test_flower_knows_every_setting_with_its_default(config):
    """A default of another value would hold under ``flwr run`` and nowhere else."""
    defaults = flatten(Configuration())
    assert sorted(set(defaults) - set(config)) == [], "missing in [tool.flwr.app.config]"
    assert sorted(set(config) - set(defaults)) == [], "no such setting"
    different = {key: (config[key], value) for key, value in defaults.items() if config[key] != value}
    assert different == {}, "pyproject.toml says the first, the code the second"
    # Flower refuses an override of another type than the default's
    assert {key: type(value) for key, value in config.items()} == {key: type(value) for key, value in defaults.items()}


def test_flower_gives_back_the_defaults(config):
    assert parse(config) == Configuration()


@pytest.mark.parametrize(("component", "path"), [("serverapp", "server.app:app"), ("clientapp", "client.app:app")])
def test_flower_finds_the_apps(component, path):
    assert FLOWER["components"][component] == path
    module = ROOT / (path.partition(":")[0].replace(".", "/") + ".py")
    assert "app = " in module.read_text(encoding="utf-8")


def test_there_are_no_federations():
    """With that table, flwr rewrites the user's own file of connections."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "federations" not in tomllib.loads(text)["tool"]["flwr"]
