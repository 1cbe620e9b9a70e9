"""``adadpigu ledger``: what it says is what was charged, and what is wrong has a status and a remedy."""

import json
import shutil
import sqlite3
from contextlib import closing

import pytest
from typer.testing import CliRunner

from adadpigu_core.accounting import Event, Plan, epsilon
from adadpigu_core.ledger import Ledger, Round, Target
from client.policy import template
from simulations.command_line import app

TARGET = Target(8.0, 1e-5)
STEP = Event("training", 2.0, 0.5, 1)


@pytest.fixture
def command(monkeypatch):
    """Run the command; gives exit status and output."""
    monkeypatch.setenv("COLUMNS", "250")

    def run(*arguments):
        result = CliRunner().invoke(app, ["ledger", *map(str, arguments)], catch_exceptions=False)
        return result.exit_code, result.output

    return run


def charge(path, rounds, data_set="patients"):
    plan = Plan(Event("pretraining", 2.0, 0.5, 0), Event("training", 2.0, 0.5, 9))
    with Ledger(path, data_set, data_set) as ledger:
        ledger.record_plan("run-1", plan, TARGET)
        for number in rounds:
            ledger.charge(Round("run-1", number, "code"), STEP, TARGET)
        return ledger.id


@pytest.fixture
def path(tmp_path):
    charge(tmp_path / "ledger.sqlite", (1, 2))
    charge(tmp_path / "ledger.sqlite", (1,), "others")
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(template("patients", Target(4.0, 1e-6), "0.1.0+0123456789ab"))
    path.chmod(0o644)
    return path


def test_show(command, path):
    status, output = command("show", path)
    assert status == 0
    spent = epsilon([Event("training", 2.0, 0.5, 2)], 1e-5)
    assert f"patients: epsilon {spent:.4f} at delta 1e-05" in output
    assert "run-1" in output
    assert "others: epsilon" in output


def test_what_is_left_needs_a_policy(command, path, policy):
    status, output = command("show", path, "--policy", policy, "--json")
    assert status == 0
    patients, others = json.loads(output)
    spent = epsilon([Event("training", 2.0, 0.5, 2)], 1e-6)
    assert patients["budget"] == {"epsilon": 4.0, "delta": 1e-6}
    assert (patients["epsilon"], patients["epsilon_left"]) == pytest.approx((spent, 4.0 - spent))
    assert patients["runs"][0]["epsilon_with_all_before"] == pytest.approx(spent)
    assert others["problems"] == ["the policy has no budget for this data set"]


def test_verify_passes_what_adds_up(command, path):
    status, output = command("verify", path)
    assert (status, "Everything adds up." in output) == (0, True)


def test_verify_finds_what_is_beyond_the_policy(command, path, policy):
    policy.write_text(policy.read_text().replace("epsilon = 4.0", "epsilon = 0.5"))
    status, output = command("verify", path, "--policy", policy)
    assert status == 1
    assert "patients: epsilon is beyond the budget of the policy, 0.5 at delta 1e-06" in output


def test_verify_finds_a_row_that_was_added_by_hand(command, path):
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "INSERT INTO charges (data_set, run, round, phase, noise_multiplier, sampling_probability, count, code, "
            "time) VALUES ('patients', 'run-1', 1000, 'training', 0.3, 1.0, 40, '', 1.0)"
        )
    status, output = command("verify", path)
    assert status == 1
    assert "above its target 8" in output
    assert "charged a day before" in output


def test_export_holds_every_row_and_no_release(command, path, tmp_path):
    output = tmp_path / "export.json"
    assert command("export", path, "-o", output)[0] == 0
    patients, others = json.loads(output.read_text())
    assert [(row["run"], row["round"]) for row in patients["charges"]] == [("run-1", 1), ("run-1", 2)]
    assert len(others["charges"]) == 1
    assert "payload" not in output.read_text()
    assert json.loads(command("export", path)[1]) == json.loads(output.read_text())


@pytest.mark.parametrize("name", ["show", "verify", "export"])
class TestBadLedgers:
    def test_missing(self, command, tmp_path, name):
        status, output = command(name, tmp_path / "none.sqlite")
        assert status == 1
        assert "there is no ledger here; correct the path" in output
        assert not (tmp_path / "none.sqlite").exists()

    def test_no_ledger(self, command, tmp_path, name):
        (tmp_path / "x.sqlite").write_bytes(b"x" * 5000)
        status, output = command(name, tmp_path / "x.sqlite")
        assert (status, "it is not a ledger" in output) == (1, True)

    def test_newer(self, command, path, name):
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA user_version = 99")
        status, output = command(name, path)
        assert (status, "version 99" in output, "update the software" in output) == (1, True, True)

    def test_damaged(self, command, path, name):
        content = bytearray(path.read_bytes())
        content[4096:8192] = b"\x00" * 4096
        path.write_bytes(content)
        status, output = command(name, path)
        assert (status, "restore a backup" in output) == (1, True)


def test_reconcile_makes_up_for_a_backup(command, path, tmp_path):
    shutil.copy(path, tmp_path / "backup.sqlite")
    identity = charge(path, (3, 4))
    events = [{"phase": "training", "noise_multiplier": 2.0, "sampling_probability": 0.5, "count": 4}]
    tally = tmp_path / "privacy.json"
    tally.write_text(json.dumps({"clients": [{"data_set": identity, "events": events}]}))
    shutil.copy(tmp_path / "backup.sqlite", path)
    status, output = command("reconcile", path, "--tally", tally, "--yes")
    assert status == 0
    assert "count=2" in output
    with Ledger(path, "patients", "patients") as ledger:
        assert ledger.events() == (Event("training", 2.0, 0.5, 4),)
    assert "nothing is missing" in command("reconcile", path, "--tally", tally, "--yes")[1]


def test_reconcile_asks_first(command, path, tmp_path):
    identity = charge(path, ())
    events = [{"phase": "training", "noise_multiplier": 2.0, "sampling_probability": 0.5, "count": 9}]
    tally = tmp_path / "privacy.json"
    tally.write_text(json.dumps({"clients": [{"data_set": identity, "events": events}]}))
    assert command("reconcile", path, "--tally", tally)[0] == 1
    with Ledger(path, "patients", "patients") as ledger:
        assert ledger.events() == (Event("training", 2.0, 0.5, 2),)
    tally.write_text("{}")
    assert command("reconcile", path, "--tally", tally)[0] == 2
