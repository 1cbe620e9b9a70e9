"""What a run writes, that it says the truth about privacy, and that it can be repeated."""

import numpy as np
import pytest

from adadpigu_core.configuration import flatten, parse
from adadpigu_core.settings_file import read_toml

NAMES = {
    ".lock",
    "config.toml",
    "metrics.jsonl",
    "privacy.json",
    "checkpoint.npz",
    "model.npz",
    "result.json",
    "report.html",
    "ledgers",
}


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def output(adadpigu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output") / "a [bold] name"
    from_file = folder.parent / "settings.toml"
    from_file.write_text('[task]\nmodel = "linear"\n[federation]\nnum-clients = 3\nnum-rounds = 4\n')
    result = adadpigu("--config", from_file, "--output", folder, "-c", "federation.num-rounds=3")
    assert result.exit_code == 0, result.output
    return result.stdout, folder


class TestFolder:
    def test_holds_what_is_documented(self, run):
        assert {path.name for path in run.folder.iterdir()} == NAMES

    def test_settings_are_complete_and_can_be_used_again(self, run):
        written = read_toml(run.folder / "config.toml")
        assert flatten(parse(written)) == written
        assert written["federation.num-clients"] == 3
        assert written["task.model"] == "linear"
        assert written["runtime.output"] == str(run.folder)

    def test_metrics_have_a_line_a_round(self, run):
        lines = run.metrics
        assert [line["round"] for line in lines] == [1, 2, 3, 4]
        assert [line["phase"] for line in lines] == ["pretraining", "training", "training", "training"]
        for line in lines:
            assert line.keys() == {
                *("round", "phase", "clients", "missing", "refused", "retained", "epsilon"),
                *("bytes_up", "bytes_down", "seconds", "accuracy", "loss", "retained_by_layer", "epsilons", "stages"),
            }
            assert (line["clients"], line["missing"], line["refused"]) == (3, 0, 0)
            assert max(line["epsilons"].values()) == line["epsilon"]
            assert len(line["epsilons"]) == 3
            assert sum(line["stages"].values()) <= line["seconds"]
            assert all(0 <= share <= 1 for share in line["retained_by_layer"].values())
        retained = [line["retained"] for line in lines]
        assert retained[0] == 1.0
        assert 0.59 < retained[1] <= retained[2] <= retained[3] == 1.0
        epsilons = [line["epsilon"] for line in lines]
        assert epsilons == sorted(epsilons)
        assert 0 < epsilons[0] < epsilons[-1] <= 8.0

    def test_result_says_everything(self, run):
        result = run.json()
        assert result.keys() == {
            *("accuracy", "loss", "rounds", "seconds", "bytes_up", "bytes_down", "seed", "code", "parameters"),
            *("unit", "clients", "refused", "learning_rate", "diverged", "not_private"),
        }
        assert (result["rounds"], result["seed"], result["parameters"], result["refused"]) == (4, 0, 650, [])
        assert "one record of one client" in result["unit"]
        assert result["accuracy"] == run.metrics[-1]["accuracy"]
        assert [client["id"] for client in result["clients"]] == ["client-0", "client-1", "client-2"]
        for client in result["clients"]:
            assert client.keys() == {
                *("id", "data_set", "num_records", "target_epsilon", "delta", "epsilon", "releases", "events"),
                "warnings",
            }
            assert (client["num_records"], client["releases"], client["warnings"]) == (479, 4, [])
        assert run.json("privacy.json") == {key: result[key] for key in ("unit", "clients", "refused")}

    def test_ledgers_hold_each_round_once(self, run):
        ledgers = run.ledgers()
        assert list(ledgers) == [f"digits-{index}-of-3.sqlite" for index in range(3)]
        for rows in ledgers.values():
            assert [(number, count) for _, number, count in rows] == [(1, 1), (2, 1), (3, 1), (4, 1)]
        assert len({row[0] for rows in ledgers.values() for row in rows}) == 1

    def test_epsilon_is_what_dp_accounting_says(self, run, recomputed):
        for client in run.json()["clients"]:
            assert {event["phase"]: event["count"] for event in client["events"]} == {"pretraining": 1, "training": 3}
            exact = recomputed(client["events"], client["delta"])
            assert client["epsilon"] == pytest.approx(exact, abs=1e-2)
            assert exact <= client["target_epsilon"] == 8.0
            assert 7.9 < client["epsilon"] <= 8.0

    def test_checkpoint_is_the_end(self, run):
        arrays, values = run.checkpoint
        assert arrays["weights"].shape == (650,)
        assert arrays["weights"].dtype == np.float32
        assert values["round"] == 4


class TestRepetition:
    def test_the_same_seed_gives_the_same_weights(self, run, finished, folder):
        again = finished(folder)
        np.testing.assert_array_equal(again.weights, run.weights, strict=True)
        assert again.json()["clients"][0]["events"] == run.json()["clients"][0]["events"]
        strip = {"seconds", "stages"}
        assert [{k: v for k, v in line.items() if k not in strip} for line in again.metrics] == [
            {k: v for k, v in line.items() if k not in strip} for line in run.metrics
        ]

    def test_another_seed_does_not(self, run, finished, folder):
        other = finished(folder, seed=1)
        assert np.abs(other.weights - run.weights).min() > 0


class TestOutput:
    def test_says_what_is_about_to_happen(self, output):
        first_line = output[0].splitlines()[0]
        for text in ("3 clients", "479", "records of digits", "epsilon 8 at delta 1e-05", "3 rounds"):
            assert text in first_line

    def test_shows_the_first_and_the_last_round(self, output):
        assert "pretraining round 1/3  accuracy 0." in output[0]
        assert "training    round 3/3  accuracy 0." in output[0]

    def test_shows_what_each_client_has_spent(self, output):
        lines = [line for line in output[0].splitlines() if "client-" in line]
        assert len(lines) == 3
        assert all("479" in line and "of 8" in line for line in lines)

    def test_says_where_the_run_is_so_that_it_can_be_copied(self, output):
        assert output[0].splitlines()[-1] == f"The run is in {output[1]}"

    def test_a_finished_run_can_be_gone_on_with_to_no_effect(self, output, adadpigu):
        before = {path: path.read_bytes() for path in output[1].glob("*.*") if path.suffix in (".npz", ".jsonl")}
        result = adadpigu("--resume", output[1])
        assert result.exit_code == 0, result.output
        assert "Going on after round 3 of 3." in result.stdout
        assert {path: path.read_bytes() for path in before} == before
