"""Budgets over several runs: they add up, and when they are spent, that is the end."""

import json

import pytest

import client.site
from adadpigu_core.accounting import TRAINING, Event, epsilon
from adadpigu_core.ledger import Ledger, Round, Target

SETTINGS = {"federation.num-rounds": 3}


@pytest.fixture(scope="module")
def lasting(adadpigu, tiny, run_in, tmp_path_factory):
    """Three runs on one folder of ledgers: two have budgets, the third finds nothing left."""
    top = tmp_path_factory.mktemp("lasting")
    ledgers = top / "ledgers"
    results, runs = [], []
    for number, target in enumerate([2.0, 4.0, 4.0]):
        folder = top / f"run-{number}"
        settings = {**tiny, **SETTINGS, "privacy.ledger-dir": ledgers, "privacy.target-epsilon": target}
        with pytest.MonkeyPatch.context() as patch:
            streams = watched(patch)
            results.append(adadpigu("--output", folder, settings=settings))
        runs.append((run_in(folder), streams))
    return ledgers, results, [run for run, _ in runs], [streams for _, streams in runs]


def watched(patch):
    """Note the streams of random numbers that clients draw from."""
    streams = []
    real = client.site.SeededRandomness
    patch.setattr(client.site, "SeededRandomness", lambda *key: streams.append(key) or real(*key))
    return streams


class TestLastingLedgers:
    def test_two_runs_compose(self, lasting, recomputed):
        _, results, (first, second, _), _ = lasting
        assert [result.exit_code for result in results[:2]] == [0, 0]
        for early, late in zip(first.json()["clients"], second.json()["clients"], strict=True):
            assert early["data_set"] == late["data_set"]
            assert early["epsilon"] <= 2.0 < 3.9 < late["epsilon"] <= 4.0
            assert all(event in late["events"] for event in early["events"])
            assert sum(event["count"] for event in late["events"]) == 6
            assert late["releases"] == 3
            assert recomputed(late["events"], 1e-5) == pytest.approx(late["epsilon"], abs=1e-2)
            assert late["warnings"] == []

    def test_the_second_run_says_that_the_first_counts(self, lasting):
        ledgers, results, *_ = lasting
        assert f"Ledgers: {ledgers}; what was spent there before counts.\n" in results[1].stdout

    def test_the_third_is_refused(self, lasting):
        _, results, runs, _ = lasting
        assert results[2].exit_code == 1
        assert "Error: no client takes part: the privacy budget of this data set is spent" in results[2].stderr
        assert "Traceback" not in results[2].output
        assert not (runs[2].folder / "result.json").exists()

    def test_the_ledgers_hold_both(self, lasting):
        ledgers, _, runs, _ = lasting
        for rows in runs[0].ledgers(ledgers).values():
            assert [number for _, number, _ in rows] == [1, 2, 3, 1, 2, 3]
            assert len({run for run, _, _ in rows}) == 2
        assert not (runs[0].folder / "ledgers").exists()

    def test_no_noise_is_drawn_twice(self, lasting):
        """Both runs have the same seed, so that only the ledger keeps their noise apart."""
        first, second, third = lasting[3]
        assert (len(first), len(second), len(third)) == (9, 9, 0)
        assert len({*first, *second}) == 18

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("federation.num-clients", 4),
            ("federation.partition", "dirichlet"),
            ("federation.partition-seed", 1),
        ],
    )
    def test_another_partition_is_refused(self, lasting, adadpigu, tiny, folder, key, value):
        ledgers, _, runs, _ = lasting
        before = runs[0].ledgers(ledgers)
        result = adadpigu("--output", folder, settings={**tiny, "privacy.ledger-dir": ledgers, key: value})
        assert result.exit_code == 2
        assert "privacy.ledger-dir" in result.stderr
        assert key in result.stderr
        assert not folder.exists()
        assert runs[0].ledgers(ledgers) == before

    def test_a_larger_budget_lets_the_run_go_on(self, lasting, adadpigu, tiny, folder, run_in):
        ledgers, *_ = lasting
        settings = {**tiny, **SETTINGS, "privacy.ledger-dir": ledgers, "privacy.target-epsilon": 6.0}
        assert adadpigu("--output", folder, settings=settings).exit_code == 0
        assert all(4.0 < client["epsilon"] <= 6.0 for client in run_in(folder).json()["clients"])


class TestOneSpentClient:
    def spend(self, path, data_set, epsilon_target):
        """Charge a ledger for a past in which all of a budget was used."""
        count = 1
        while epsilon([Event(TRAINING, 1.0, 0.3, 2 * count)], 1e-5) < epsilon_target:
            count *= 2
        with Ledger(path, data_set, "records that were once there") as ledger:
            ledger.charge(Round("past", 1), Event(TRAINING, 1.0, 0.3, 2 * count), Target(float("inf"), 1e-5))

    def test_is_left_out_and_the_others_go_on(self, adadpigu, tiny, folder, run_in, tmp_path):
        ledgers = tmp_path / "ledgers"
        self.spend(ledgers / "digits-1-of-3.sqlite", "digits/1-of-3", 8.0)
        settings = {**tiny, **SETTINGS, "privacy.ledger-dir": ledgers}
        result = adadpigu("--output", folder, settings=settings)
        assert result.exit_code == 0, result.output
        run = run_in(folder)
        outcome = run.json()
        assert [client["id"] for client in outcome["clients"]] == ["client-0", "client-2"]
        (refusal,) = outcome["refused"]
        assert refusal["code"] == "budget"
        assert "the privacy budget of this data set is spent" in refusal["message"]
        assert f"node {refusal['node']} did not take part: the privacy budget" in result.stdout
        assert [line["clients"] for line in run.metrics] == [2, 2, 2]
        assert [len(rows) for rows in run.ledgers(ledgers).values()] == [3, 1, 3]

    def test_is_missed_in_the_middle_of_a_run(self, adadpigu, tiny, folder, run_in, tmp_path):
        """Somebody else uses the same records meanwhile, and was faster."""
        ledgers = tmp_path / "ledgers"

        def on_message(count, moment):
            if (count, moment) == (6, "before"):  # the second round begins
                self.spend(ledgers / "digits-1-of-3.sqlite", "digits/1-of-3", 8.0)

        settings = {**tiny, **SETTINGS, "privacy.ledger-dir": ledgers}
        result = adadpigu("--output", folder, settings=settings, on_message=on_message)
        assert result.exit_code == 0, result.output
        run = run_in(folder)
        assert [line["clients"] for line in run.metrics] == [3, 2, 2]
        assert [refusal["code"] for refusal in run.json()["refused"]] == ["budget"]
        assert [len(rows) for rows in run.ledgers(ledgers).values()] == [3, 2, 3]
        spent = {client["id"]: client["epsilon"] for client in run.json()["clients"]}
        assert spent["client-0"] == spent["client-2"] <= 8.0 < spent["client-1"]


def test_a_damaged_partition_file_is_named(adadpigu, tiny, folder, tmp_path):
    (tmp_path / "ledgers").mkdir()
    (tmp_path / "ledgers" / "partition.json").write_text("{")
    result = adadpigu("--output", folder, settings={**tiny, "privacy.ledger-dir": tmp_path / "ledgers"})
    assert result.exit_code == 2
    assert "privacy.ledger-dir" in result.stderr
    assert "partition.json" in result.stderr


def test_the_partition_is_written_down(lasting):
    deal = json.loads((lasting[0] / "partition.json").read_text())
    assert deal["federation.num-clients"] == 3
    assert deal["task.dataset"] == "digits"
