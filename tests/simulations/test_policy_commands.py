"""``adadpigu policy``: what it writes can be used, what it refuses is named."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from adadpigu_core.models import ModelSpec, fingerprint
from client.policy import load
from simulations.command_line import app


@pytest.fixture
def policy(monkeypatch):
    """Run the command; gives exit status and output."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        result = CliRunner().invoke(app, ["policy", *map(str, arguments)], catch_exceptions=False)
        return result.exit_code, result.output

    return run


@pytest.fixture
def written(policy, tmp_path):
    path = tmp_path / "policy.toml"
    status, output = policy("init", path, "--data-set", "patients", "--epsilon", 4, "--delta", 1e-6)
    assert status == 0
    assert f'policy="{path}"' in output
    return path


def test_what_init_writes_passes_check(policy, written):
    assert load(written).of("patients").target.epsilon == 4.0
    status, output = policy("check", written, "--data-set", "patients")
    assert status == 0
    assert "epsilon 4 at delta 1e-06, over all time" in output


def test_init_overwrites_nothing(policy, written):
    before = written.read_text()
    status, output = policy("init", written, "--data-set", "others", "--epsilon", 100)
    assert (status, written.read_text()) == (2, before)
    assert "exists; change it" in output


@pytest.mark.parametrize("arguments", [("--epsilon", "-1"), ("--epsilon", "4", "--delta", "2")])
def test_init_refuses_what_is_no_budget(policy, tmp_path, arguments):
    assert policy("init", tmp_path / "p.toml", "--data-set", "x", *arguments)[0] == 2
    assert not (tmp_path / "p.toml").exists()


def test_check_names_what_is_wrong(policy, written):
    written.write_text(written.read_text().replace("epsilon = 4.0", "epsilon = -4.0"))
    status, output = policy("check", written)
    assert status == 2
    assert "epsilon: must be a number above 0, got -4.0" in output


def test_check_names_a_data_set_without_a_budget(policy, written):
    status, output = policy("check", written, "--data-set", "others")
    assert status == 2
    assert "no budget for the data set 'others'" in output


def test_check_notices_an_upgrade(policy, written):
    written.write_text(written.read_text().replace('code = ["0.', 'code = ["9.'))
    status, output = policy("check", written)
    assert status == 2
    assert "this node will refuse every request" in output


def test_model_names_a_model(policy):
    expected = fingerprint(ModelSpec("mnist-cnn", "relu", "group", (1, 28, 28), 10))
    assert policy("model", "mnist-cnn", "--input-shape", "1,28,28", "--num-classes", 10) == (0, expected + "\n")
    seen = ModelSpec("linear", "relu", "none", (1, 28, 28), 10, "scattering")
    linear = ("model", "linear", "--input-shape", "1,28,28", "--num-classes", 10)
    assert policy(*linear, "--features", "scattering") == (0, fingerprint(seen) + "\n")
    assert policy(*linear, "--normalisation", "group") == policy(*linear, "--features", "raw")
    assert policy(*linear, "--features", "wavelets")[0] == 2
    assert policy("model", "mnist-cnn", "--input-shape", "1x28", "--num-classes", 10)[0] == 2
    assert policy("model", "gpt", "--input-shape", "4", "--num-classes", 10)[0] == 2


def test_help_loads_no_torch():
    code = "import sys, simulations.command_line; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
