"""Clients with different budgets and sizes in one federation."""

import shutil

import pytest

CLIENTS = {"north": (200, 0.5), "south": (60, 2.0), "west": (400, 8.0)}


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / "mine.csv"
    rows = [f"{name},{records},{target}" for name, (records, target) in CLIENTS.items()]
    path.write_text("id,records,target_epsilon\n" + "\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize("kind", ["precision", "records", "uniform"])
def test_every_client_is_calibrated_to_its_own_budget(finished, folder, listed, kind):
    run = finished(folder, federation__clients=listed, federation__aggregation=kind, privacy__target_epsilon=5.0)
    clients = {client["id"]: client for client in run.json()["clients"]}
    assert clients.keys() == CLIENTS.keys()
    for name, (records, target) in CLIENTS.items():
        asked = min(target, 5.0)  # the server may ask for less
        assert clients[name]["num_records"] == records
        assert clients[name]["target_epsilon"] == asked
        assert 0.95 * asked < clients[name]["epsilon"] <= asked
        assert clients[name]["warnings"] == []


def test_a_run_goes_on_without_the_original_list_and_from_another_place(adadpigu, tiny, run_in, folder, listed):
    def stop(count, moment):
        if (count, moment) == (8, "after"):
            raise KeyboardInterrupt

    result = adadpigu("--output", folder, settings={**tiny, "federation.clients": listed}, on_message=stop)
    assert result.exit_code == 130
    assert "its own budget, from epsilon 0.5 to 8," in result.stdout
    listed.unlink()
    moved = folder.with_name("moved")
    shutil.move(folder, moved)
    result = adadpigu("--resume", moved)
    assert result.exit_code == 0, result.output
    assert {client["target_epsilon"] for client in run_in(moved).json()["clients"]} == {0.5, 2.0, 8.0}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"federation.num-clients": 4}, "federation.num-clients: is 4, but"),
        ({"federation.partition": "dirichlet"}, "federation.partition: must be iid beside federation.clients"),
        ({"federation.clients": "nowhere.csv"}, "nowhere.csv: cannot be read"),
    ],
)
def test_lists_that_do_not_fit_are_refused(adadpigu, tiny, folder, listed, settings, problem):
    result = adadpigu("--output", folder, settings={**tiny, "federation.clients": listed, **settings})
    assert result.exit_code == 2
    assert problem in " ".join(result.output.split())
    assert not folder.exists()


def test_a_list_is_looked_for_beside_the_settings_that_name_it(adadpigu, tiny, run_in, folder, listed):
    toml = listed.with_name("mine.toml")
    toml.write_text('[federation]\nclients = "mine.csv"\n')
    result = adadpigu("--config", toml, "--output", folder, settings=tiny)
    assert result.exit_code == 0, result.output
    assert len(run_in(folder).json()["clients"]) == 3


def test_lasting_ledgers_belong_to_one_list_of_sizes(adadpigu, tiny, folder, listed, tmp_path):
    lasting = {**tiny, "privacy.ledger-dir": tmp_path / "ledgers"}
    assert adadpigu("--output", folder, settings={**lasting, "federation.clients": listed}).exit_code == 0
    listed.write_text(listed.read_text().replace("60", "61"))
    result = adadpigu("--output", tmp_path / "other", settings={**lasting, "federation.clients": tmp_path / "mine.csv"})
    assert result.exit_code == 2
    assert "belong to clients with" in " ".join(result.output.split())
