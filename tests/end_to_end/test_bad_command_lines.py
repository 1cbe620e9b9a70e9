"""Mistakes on the command line: named at once, all together, before anything is written or charged."""

import subprocess
import sys

import numpy as np
import pytest

from simulations import command_line


@pytest.fixture
def fails(adadpigu, tiny, folder, tmp_path):
    """Run a command that must fail, and give what it says."""

    def run(*arguments, settings=None, output=folder, status=2):
        where = ["--output", output] if output is not None else []
        result = adadpigu(*where, *arguments, settings={**(tiny if where else {}), **(settings or {})})
        assert result.exit_code == status, result.output
        assert result.stderr.startswith("Error: ")
        assert "Traceback" not in result.output
        assert result.stdout == ""
        assert list(tmp_path.rglob("*.sqlite")) == []
        assert output != folder or not folder.exists()
        return result.stderr

    return run


class TestSettings:
    def test_an_unknown_key(self, fails):
        said = fails("-c", "privacy.target-epsilonn=4")
        assert "privacy.target-epsilonn: there is no such setting; did you mean privacy.target-epsilon?" in said

    def test_several_mistakes_at_once(self, fails):
        said = fails(
            settings={
                "privacy.target-epsilon": -1,
                "privacy.target-delta": 2,
                "federation.num-rounds": "many",
                "retention.schedule": "[slow]",
                "task.colour": "red",
            }
        )
        assert "5 setting(s) cannot be used" in said
        for problem in (
            "privacy.target-epsilon: -1.0 is out of range",
            "privacy.target-delta: 2.0 is out of range",
            "federation.num-rounds: expected int, got 'many'",
            "retention.schedule: '[slow]' is none of",
            "task.colour: there is no such setting",
        ):
            assert f"* {problem}" in said

    def test_settings_that_contradict_each_other(self, fails):
        assert "retention.final-ratio" in fails(settings={"retention.final-ratio": 0.5})
        assert "pretraining.round-share" in fails(settings={"pretraining.round-share": 0})

    @pytest.mark.parametrize("text", ["privacy.target-epsilon", "=4", "", "[/red]"])
    def test_an_override_that_is_none(self, fails, text):
        assert f"-c {text}: expected key=value" in fails("-c", text)

    @pytest.mark.parametrize("value", ["nan", "inf", "true", "'8'", "[8.0]", "1e999"])
    def test_a_budget_that_is_none(self, fails, value):
        assert "privacy.target-epsilon: " in fails("-c", f"privacy.target-epsilon={value}")

    def test_an_unknown_data_set(self, fails):
        assert "imagenet" in fails(settings={"task.dataset": "imagenet"})

    @pytest.mark.parametrize("model", ["gpt", "mnist-cnn"])
    def test_a_model_that_does_not_fit(self, fails, model):
        assert model in fails(settings={"task.model": model})

    def test_more_clients_than_records(self, fails):
        assert "2000 clients" in fails(settings={"federation.num-clients": 2000})


class TestFiles:
    def test_a_config_file_that_is_missing(self, fails, tmp_path):
        said = fails("--config", tmp_path / "none.toml")
        assert "none.toml: cannot be read (No such file or directory)" in said

    @pytest.mark.parametrize("text", ["[privacy", "a = ", "\x00", "privacy = 3 4"])
    def test_a_config_file_that_is_no_toml(self, fails, tmp_path, text):
        (tmp_path / "broken.toml").write_text(text)
        assert "broken.toml: is not TOML" in fails("--config", tmp_path / "broken.toml")

    def test_a_config_file_with_wrong_settings(self, fails, tmp_path):
        (tmp_path / "wrong.toml").write_text('[privacy]\ntarget-epsilon = "8"\n[no.such]\ntable = [1, 2]\n')
        said = fails("--config", tmp_path / "wrong.toml")
        assert "privacy.target-epsilon: expected float" in said
        assert "no.such.table: there is no such setting" in said

    def test_an_output_that_holds_something(self, fails, tmp_path):
        taken = tmp_path / "taken"
        taken.mkdir()
        (taken / "thesis.tex").write_text("x")
        said = fails(output=taken)
        assert f"runtime.output: {taken} is not empty" in said
        assert f"--resume {taken}" in said
        assert [path.name for path in taken.iterdir()] == ["thesis.tex"]

    def test_an_output_that_is_a_file(self, fails, tmp_path):
        (tmp_path / "file").write_text("x")
        assert "runtime.output" in fails(output=tmp_path / "file")
        assert "runtime.output" in fails(output=tmp_path / "file" / "below")

    def test_a_resume_of_nothing(self, fails, tmp_path):
        assert "--resume" in fails("--resume", tmp_path / "none", output=None)
        assert "holds no run" in fails("--resume", tmp_path, output=None)

    def test_a_resume_with_other_settings(self, fails, tmp_path):
        assert "a run goes on with its own settings" in fails("--resume", tmp_path, "-c", "seed=1", output=None)

    def test_a_resume_of_a_damaged_checkpoint(self, finished, adadpigu, folder):
        finished(folder)
        (folder / "checkpoint.npz").write_bytes(b"PK\x03\x04 damaged")
        result = adadpigu("--resume", folder)
        assert result.exit_code == 1
        assert "checkpoint.npz: the checkpoint is damaged" in result.stderr

    def test_an_unknown_engine(self, fails):
        assert "--engine: 'spark' is none of in-process, flower" in fails("--engine", "spark")

    def test_an_engine_that_does_not_stop_between_rounds(self, fails):
        assert "--stop-after: only runs of the in-process engine" in fails("--engine", "flower", "--stop-after", 1)


class TestOwnArrays:
    def fails(self, fails, path, **options):
        return fails(settings={"task.dataset": f"npz:{path}"}, status=1, **options)

    def test_missing(self, fails, tmp_path):
        assert f"{tmp_path}/none.npz: there is no such file" in self.fails(fails, tmp_path / "none.npz")

    def test_damaged(self, fails, make_npz, tmp_path):
        path = make_npz(tmp_path)
        path.write_bytes(path.read_bytes()[:200])
        assert f"{path}: " in self.fails(fails, path)

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"y_train": np.arange(90) % 2 - 1}, "x_train, y_train: the label of record 0 is -1"),
            ({"num_classes": 2, "y_test": np.full(30, 2)}, "x_test, y_test: the label of record 0 is 2"),
            ({"y_train": np.zeros(89)}, "x_train, y_train: "),
            ({"x_train": np.full((90, 5), np.nan)}, "x_train, y_train: record 0 has a feature that is not a finite"),
            ({"y_train": np.full(90, 0.5)}, "y_train[0] is 0.5; store whole numbers"),
            ({"x_test": np.zeros((30, 4))}, "x_test, y_test: records have shape [4], the task wants [5]"),
        ],
    )
    def test_that_make_no_sense(self, fails, make_npz, tmp_path, changes, text):
        path = make_npz(tmp_path, **changes)
        said = self.fails(fails, path)
        assert f"{path}: " in said
        assert text in said

    def test_without_a_name(self, fails):
        assert "npz: needs a path" in fails(settings={"task.dataset": "npz:"})

    def test_with_a_name_that_looks_like_markup(self, fails, tmp_path):
        assert "[/red]" in self.fails(fails, "[/red].npz")


@pytest.mark.slow
def test_a_real_process_says_it_in_the_same_way(tmp_path):
    command = [sys.executable, "-m", "simulations.command_line", "simulate", "-c", "privacy.target-epsilon=-1"]
    folder = command_line.__file__.rpartition("/simulations/")[0]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "* privacy.target-epsilon: -1.0 is out of range; it must be above 0" in done.stderr
    assert "Traceback" not in done.stderr
