"""A backup that was put back between two runs: the first run's tally knows better than the ledger."""

import json
import shutil

import pytest

import server.app
from adadpigu_core.accounting import Event
from adadpigu_core.configuration import parse
from server.earlier_runs import known_charges
from server.run_folder import METRICS, PRIVACY, RunFolder

BUDGETS = {"zeroth": 2.0, "first": 4.0, "second": 8.0}


def tally(folder, *events, data_set="id"):
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        {"phase": phase, "noise_multiplier": 1.0, "sampling_probability": 0.1, "count": n} for phase, n in events
    ]
    (folder / PRIVACY).write_text(json.dumps({"clients": [{"data_set": data_set, "events": entries}]}))


def test_the_largest_counts_of_all_runs_are_known(tmp_path):
    tally(tmp_path / "one", ("training", 3), ("pretraining", 2))
    tally(tmp_path / "two", ("training", 5))
    tally(tmp_path / "three", ("training", 1), data_set="other")
    found = known_charges(tmp_path / "four")
    assert set(found["id"]) == {Event("training", 1.0, 0.1, 5), Event("pretraining", 1.0, 0.1, 2)}
    assert found["other"] == (Event("training", 1.0, 0.1, 1),)


@pytest.mark.parametrize("damage", ["", "[]", '{"clients": [{"data_set": "id"}]}', '{"clients": [3]}'])
def test_what_cannot_be_read_hides_nothing_else(tmp_path, damage, caplog):
    tally(tmp_path / "one", ("training", 3))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / PRIVACY).write_text(damage)
    assert known_charges(tmp_path / "three") == {"id": (Event("training", 1.0, 0.1, 3),)}
    assert f"{tmp_path / 'two' / PRIVACY}: what this run has seen cannot be read" in caplog.text


def test_a_ledger_put_back_between_two_runs_is_refused(kit, npz, tmp_path):
    ledgers = tmp_path / "ledgers"

    def run(name):
        settings = {**kit.SETTINGS, "task.dataset": npz, "task.model": "linear"}
        settings |= {"runtime.output": str(tmp_path / "runs" / name), "privacy.ledger-dir": str(ledgers)}
        configuration = parse({**settings, "privacy.target-epsilon": BUDGETS[name]})
        folder = RunFolder(server.app.run_folder(configuration, 1))
        server.app.run(kit.RealGrid(configuration), configuration, folder, wait=lambda *_: None)
        report = json.loads((folder.path / PRIVACY).read_text())
        lines = [json.loads(line) for line in (folder.path / METRICS).read_text().splitlines()]
        return report["clients"], [line["refused"] for line in lines]

    run("zeroth")
    shutil.copytree(ledgers, tmp_path / "backup")
    clients, refused = run("first")
    assert (sum(refused), [client["warnings"] for client in clients]) == (0, [[]] * len(clients))
    victim = min(path for path in ledgers.iterdir() if path.suffix == ".sqlite")
    shutil.copy(tmp_path / "backup" / victim.name, victim)
    clients, refused = run("second")
    flagged = [client for client in clients if client["warnings"]]
    assert len(flagged) == 1
    assert "was a backup restored?" in flagged[0]["warnings"][0]
    assert sum(refused) > 0
    assert flagged[0]["releases"] == 0
