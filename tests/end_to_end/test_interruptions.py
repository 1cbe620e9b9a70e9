"""A run that is interrupted goes on as if nothing had happened, and no round is paid for twice."""

import numpy as np
import pytest

from server import run_folder
from server.run_folder import RunFolder

# Messages 0 to 2 are descriptions; then come four rounds of three.
POINTS = [(0, "before"), (1, "after"), (3, "before"), (3, "after"), (7, "after"), (8, "after"), (14, "after")]


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def check(whole):
    """An interrupted and resumed run is as good as a whole one."""

    def check(run):
        np.testing.assert_array_equal(run.weights, whole.weights, strict=True)
        assert [line["round"] for line in run.metrics] == [1, 2, 3, 4]
        assert [line["accuracy"] for line in run.metrics] == [line["accuracy"] for line in whole.metrics]
        for rows in run.ledgers().values():
            assert [(number, count) for _, number, count in rows] == [(1, 1), (2, 1), (3, 1), (4, 1)]
        for ours, theirs in zip(run.json()["clients"], whole.json()["clients"], strict=True):
            for key in ("id", "epsilon", "events", "releases", "warnings"):
                assert ours[key] == theirs[key], key

    return check


def interrupted_at(number, moment):
    def on_message(count, now):
        if (count, now) == (number, moment):
            raise KeyboardInterrupt

    return on_message


@pytest.mark.parametrize(("number", "moment"), POINTS)
def test_at_any_message(adadpigu, tiny, run_in, folder, check, number, moment):
    result = adadpigu("--output", folder, settings=tiny, on_message=interrupted_at(number, moment))
    assert result.exit_code == 130
    assert f"Interrupted. Go on with: adadpigu simulate --resume {folder}\n" in result.stdout
    assert "Traceback" not in result.output
    resumed = adadpigu("--resume", folder)
    assert resumed.exit_code == 0, resumed.output
    check(run_in(folder))


@pytest.mark.parametrize("name", ["metrics", "privacy.json", "checkpoint.npz", "result.json"])
def test_before_any_file_is_written(adadpigu, tiny, run_in, folder, check, monkeypatch, name):
    """Killed in the middle of the second round's files, or of the last file of all."""
    written = []
    replace, add_metrics = RunFolder._replace, RunFolder.add_metrics

    def count(self, file, act):
        written.append(file)
        if file == name and (name == "result.json" or written.count(file) == 2):
            raise KeyboardInterrupt
        act()

    with monkeypatch.context() as patch:
        patch.setattr(
            RunFolder, "_replace", lambda self, file, data: count(self, file, lambda: replace(self, file, data))
        )
        patch.setattr(
            RunFolder, "add_metrics", lambda self, line: count(self, "metrics", lambda: add_metrics(self, line))
        )
        assert adadpigu("--output", folder, settings=tiny).exit_code == 130
    assert written[-1] == name
    assert adadpigu("--resume", folder).exit_code == 0
    check(run_in(folder))


def test_in_pieces_that_end_by_the_clock(adadpigu, tiny, run_in, folder, check, monkeypatch):
    """Each is one round, for which there is no time at all; checkpoints lie in several files."""
    monkeypatch.setattr(run_folder, "LARGEST_PIECE", 4000)
    result = adadpigu("--output", folder, "--stop-after", 0, settings=tiny)
    run = run_in(folder)
    for number in (1, 2, 3):
        assert result.exit_code == 0, result.output
        said = f"Stopped after round {number} of 4. Go on with: adadpigu simulate --resume {folder}\n"
        assert said in result.stdout
        assert run.checkpoint[1]["round"] == number
        assert {len(rows) for rows in run.ledgers().values()} == {number}  # what was charged was released
        assert not (folder / "result.json").exists()
        result = adadpigu("--resume", folder, "--stop-after", 0)
    assert result.exit_code == 0, result.output
    assert "Stopped" not in result.stdout
    assert len(list(folder.glob("checkpoint-*"))) > 1
    check(run)


def test_time_enough_is_no_stop(adadpigu, tiny, run_in, folder, check):
    result = adadpigu("--output", folder, "--stop-after", 9, settings=tiny)
    assert result.exit_code == 0
    assert "Stopped" not in result.stdout
    check(run_in(folder))
