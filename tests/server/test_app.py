"""Whole runs with the project's own clients: what is written, and what happens after a crash."""

import json
import shutil
import tomllib
from typing import ClassVar

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld

import server.app
from adadpigu_core import archive
from adadpigu_core.configuration import parse
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.settings_file import read_toml
from server.run_folder import CHECKPOINT, CONFIGURATION, METRICS, PRIVACY, RESULT, RunFolder


@pytest.fixture
def settings(npz, tmp_path, kit):
    return {
        **kit.SETTINGS,
        "task.dataset": npz,
        "task.model": "linear",
        "privacy.target-epsilon": 4.0,
        "runtime.output": str(tmp_path / "run"),
    }


class TestFolder:
    RESULTS: ClassVar = {}

    @pytest.fixture
    def settings(self, settings, tmp_path_factory):
        """All tests here look at one and the same run."""
        if not self.RESULTS:
            shared = tmp_path_factory.mktemp("shared")
            shutil.copy(settings["task.dataset"].removeprefix("npz:"), shared / "task.npz")
            changes = {"task.dataset": f"npz:{shared / 'task.npz'}", "runtime.output": str(shared / "run")}
            self.RESULTS["settings"] = {**settings, **changes}
        return self.RESULTS["settings"]

    @pytest.fixture
    def result(self, run, settings):
        if "result" not in self.RESULTS:
            self.RESULTS["result"] = run(settings)
        return self.RESULTS["result"]

    @pytest.fixture
    def folder(self, settings, result):
        return RunFolder(server.app.run_folder(parse(settings), 1))

    def test_holds_the_configuration_as_resolved(self, folder, settings):
        assert parse(read_toml(folder.path / CONFIGURATION)) == parse(settings)
        assert tomllib.loads((folder.path / CONFIGURATION).read_text())["privacy"]["target-epsilon"] == 4.0

    def test_holds_a_line_a_round(self, folder, result):
        lines = folder.metrics()
        assert [line["round"] for line in lines] == [1, 2, 3, 4]
        assert lines[-1]["accuracy"] == result["accuracy"]
        assert [line["epsilon"] for line in lines] == sorted(line["epsilon"] for line in lines)

    def test_holds_the_result_that_is_returned(self, folder, result):
        assert json.loads((folder.path / RESULT).read_text()) == result
        assert (result["rounds"], result["parameters"], result["refused"]) == (4, 8, [])
        privacy = json.loads((folder.path / PRIVACY).read_text())
        assert privacy == {key: result[key] for key in privacy}

    def test_anyone_can_recompute_epsilon_from_the_events(self, result):
        for client in result["clients"]:
            accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
            for event in client["events"]:
                gaussian = dp_accounting.GaussianDpEvent(event["noise_multiplier"])
                sampled = dp_accounting.PoissonSampledDpEvent(event["sampling_probability"], gaussian)
                accountant.compose(sampled, event["count"])
            assert client["epsilon"] == pytest.approx(accountant.get_epsilon(client["delta"]), rel=5e-3)
            assert 0.98 * 4 < client["epsilon"] <= client["target_epsilon"] == 4
            assert sum(event["count"] for event in client["events"]) == client["releases"] == 4
            assert client["warnings"] == []

    def test_nothing_of_it_is_about_single_records(self, result):
        """Names of what may stand in a result; whatever is added must be looked at by a person."""
        public = {
            "accuracy",
            "loss",
            "rounds",
            "seconds",
            "bytes_up",
            "bytes_down",
            "seed",
            "code",
            "parameters",
            "learning_rate",  # follows from what clients declare
            "unit",
            "diverged",  # of public test data, too
            "area_under_curve",  # of public test data
            "not_private",  # follows from the settings
        }
        assert set(result) == public | {"clients", "refused"}
        account = {
            "id",
            "data_set",
            "num_records",
            "target_epsilon",
            "delta",
            "epsilon",
            "releases",
            "events",
            "warnings",
        }
        assert {key for client in result["clients"] for key in client} == account


class TestResume:
    def test_gives_the_same_model_at_the_same_price(self, kit, run, settings, tmp_path):
        whole = run({**settings, "runtime.output": str(tmp_path / "whole")})
        for crash_in in (0, 1, 3, 4):
            with pytest.raises(kit.KilledError):
                run(settings, crash_in=crash_in)
        again = run(settings)
        same = ("accuracy", "loss", "rounds")
        assert {key: again[key] for key in same} == {key: whole[key] for key in same}
        spent = [[(client["epsilon"], client["releases"]) for client in result["clients"]] for result in (again, whole)]
        assert spent[0] == spent[1]
        lines = RunFolder(tmp_path / "run").metrics()
        assert [line["round"] for line in lines] == [1, 2, 3, 4]
        one, other = (archive.unpack((tmp_path / name / CHECKPOINT).read_bytes())[0] for name in ("run", "whole"))
        for name, value in other.items():
            np.testing.assert_array_equal(one[name], value, strict=True)

    def test_a_run_that_is_over_is_not_run_again(self, run, settings):
        first = run(settings)
        again = run(settings)
        assert {**again, "seconds": 0} == {**first, "seconds": 0}

    def test_another_model_is_refused(self, run, settings):
        run(settings)
        with pytest.raises(ConfigurationError, match=r"run: .*task\.model = 'linear'"):
            run({**settings, "task.model": "mlp", "task.normalisation": "none"})

    def test_lines_without_a_checkpoint_are_forgotten(self, run, settings, tmp_path):
        RunFolder(tmp_path / "run").add_metrics({"round": 1, "from": "long ago"})
        run(settings)
        assert [line["round"] for line in RunFolder(tmp_path / "run").metrics()] == [1, 2, 3, 4]
        assert "long ago" not in (tmp_path / "run" / METRICS).read_text()
