"""The folder of a run: its own, one process's at a time, and made only for what can begin."""

import pytest

from adadpigu_core.exceptions import AdaDPIGUError, ConfigurationError
from simulations import simulate
from simulations.failure import failed
from simulations.simulate import prepare, resume

SETTINGS = {"federation.num-clients": 2, "federation.num-rounds": 1, "task.model": "linear"}


def test_runs_that_begin_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(simulate, "_default_output", lambda _: "runs/digits-now")
    names = [prepare(SETTINGS).folder.path.name for _ in range(3)]
    assert names == ["digits-now", "digits-now-2", "digits-now-3"]


def test_a_run_is_one_process_s_at_a_time(tmp_path):
    output = tmp_path / "run"
    begun = prepare({**SETTINGS, "runtime.output": str(output)})
    with pytest.raises(ConfigurationError, match="another process is working on the run"):
        resume(output)
    begun.claim.close()
    again = resume(output)
    with pytest.raises(ConfigurationError, match="another process is working on the run"):
        resume(output)
    done = simulate.simulate(again, "in-process", lambda _: None)
    assert done["rounds"] == 1
    resume(output).claim.close()


def test_a_folder_with_nothing_but_a_claim_is_empty(tmp_path):
    (tmp_path / ".lock").touch()
    assert prepare({**SETTINGS, "runtime.output": str(tmp_path)}).folder.path == tmp_path


@pytest.mark.parametrize(
    "wrong", [{"task.model": "no_such_module:net"}, {"task.model": "mnist-cnn"}, {"task.weights": "none.npz"}]
)
def test_what_cannot_begin_leaves_no_folder(tmp_path, wrong):
    output = tmp_path / "run"
    with pytest.raises(AdaDPIGUError):
        prepare({**SETTINGS, **wrong, "runtime.output": str(output)})
    assert not output.exists()


def test_what_is_wrong_is_said_as_it_is(capsys):
    failed(ConfigurationError("python:wave:load: [bold]cannot[/bold] be imported"))
    assert "python:wave:load: [bold]cannot[/bold] be imported" in capsys.readouterr().err
