"""Tables of results: their files, their runs, their figures."""

import json
import math
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adadpigu_core.configuration import parse
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.settings_file import read_toml
from server.run_folder import CONFIGURATION, METRICS, RESULT
from simulations import process_tree, table_report, tables
from simulations.command_line import app
from simulations.reproduce import JSON, reproduce, runs
from simulations.simulate import prepare, read_settings

SETTINGS = """
[task]
dataset = "digits"
model = "linear"
[federation]
num-clients = 1
num-rounds = 2
[privacy]
sampling-probability = 0.1
"""
TABLE = """
title = "Small"
methods = ["adadpigu", "dp-sgd"]
[[rows]]
label = "one client"
settings = "small.toml"
changes.dp-sgd = {"optimiser.local-learning-rate" = 0.2}
"""


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.toml").write_text(SETTINGS)
    (tmp_path / "table.toml").write_text(TABLE)
    return str(tmp_path / "table.toml")


@contextmanager
def unseen(rounds, done):
    class Progress:
        def show(self, metrics):
            pass

    yield Progress()


@pytest.mark.parametrize("name", tables.names())
def test_every_table_names_rows_and_methods_that_can_be_run(name):
    table = tables.load(name)
    for run in runs(table, 1, Path("runs")):
        parse(run.flat)
    folders = [run.folder for run in runs(table, 3, Path("runs"))]
    assert len(set(folders)) == len(folders) == 3 * len(table.rows) * len(table.methods)


@pytest.mark.parametrize("path", sorted(tables.EXPERIMENTS.glob("*.toml")), ids=lambda path: path.name)
def test_every_row_can_be_run_by_itself(path):
    if path.name != "methods.toml":
        parse(read_settings(path))


def test_a_method_changes_a_row_and_what_was_tuned_for_it_wins(small):
    flat = {run.method: run.flat for run in runs(tables.load(small), 1, Path("runs"))}
    assert "retention.initial-ratio" not in flat["adadpigu"]
    assert parse(flat["dp-sgd"]).retention.initial_ratio == 1.0
    assert flat["dp-sgd"]["optimiser.local-learning-rate"] == 0.2
    assert flat["adadpigu"]["task.model"] == flat["dp-sgd"]["task.model"] == "linear"


def test_what_the_user_changes_is_changed_in_all_runs_and_said(small, tmp_path):
    changed = replace(tables.load(small), changes={"federation.num-rounds": 1, "optimiser.local-learning-rate": 0.3})
    reproduce(changed, 1, 1, tmp_path / "out", unseen, lambda _: None)
    found = json.loads((tmp_path / "out" / JSON).read_text())
    assert found["rounds"] == [1]
    assert found["command"].endswith("-c federation.num-rounds=1 -c optimiser.local-learning-rate=0.3")
    kept = [parse(read_toml(run.folder / CONFIGURATION)) for run in runs(changed, 1, tmp_path / "out")]
    assert {each.optimiser.local_learning_rate for each in kept} == {0.3}, "even what a method tunes"


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        (TABLE.replace("dp-sgd", "dpsgd"), "dpsgd"),
        (TABLE.replace("title", "titel", 1), "titel"),
        (TABLE.replace("changes.dp-sgd", "changes.random-mask"), "random-mask"),
        (TABLE.replace("label", "labell"), "labell"),
        ("title = 1 2", "TOML"),
        ('title = "x"\nmethods = []\nrows = []', "needs a row"),
    ],
)
def test_a_wrong_table_is_refused_by_name(small, broken, names):
    Path(small).write_text(broken)
    with pytest.raises(ConfigurationError, match=names):
        tables.load(small)


def test_an_unknown_table_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match="digits, "):
        tables.load("nothing")


@pytest.mark.slow
def test_a_table_is_made_goes_on_and_keeps_what_is_there(small, tmp_path):
    table, output = tables.load(small), tmp_path / "runs"
    said = []
    text = reproduce(table, 1, 1, output, unseen, said.append)
    assert said == ["one client, AdaDPIGU, seed 0", "one client, DP-SGD, seed 0"]
    assert "| one client |" in text
    assert "in brackets: averaged weights" in text
    assert "DP-SGD" in text
    (output / "small-dp-sgd-seed-0" / RESULT).unlink()
    kept = (output / "small-adadpigu-seed-0" / RESULT).stat().st_mtime_ns
    assert reproduce(table, 1, 1, output, unseen, said.append) == text
    assert said[2:] == ["one client, DP-SGD, seed 0"]
    assert (output / "small-adadpigu-seed-0" / RESULT).stat().st_mtime_ns == kept
    found = json.loads((output / JSON).read_text())
    assert found["rows"][0]["methods"]["dp-sgd"]["largest_epsilon"] <= 8
    # another row's settings under the same names
    (tmp_path / "small.toml").write_text(SETTINGS.replace("num-rounds = 2", "num-rounds = 3"))
    with pytest.raises(ConfigurationError, match="num-rounds"):
        reproduce(table, 1, 1, output, unseen, said.append)


def test_a_run_of_other_clients_is_not_taken_for_the_tables_own(small, tmp_path):
    (tmp_path / "small.toml").write_text(SETTINGS.replace("num-rounds = 2", 'num-rounds = 2\nclients = "clients.csv"'))
    clients = tmp_path / "clients.csv"
    clients.write_text("id,records,target_epsilon\nnorth,500,8\n")
    table, output = tables.load(small), tmp_path / "runs"
    begun = runs(table, 1, output)[0]
    prepare({**begun.flat, "runtime.output": str(begun.folder)})
    clients.write_text("id,records,target_epsilon\nnorth,500,4\n")
    with pytest.raises(ConfigurationError, match=r"federation\.clients"):
        reproduce(table, 1, 1, output, unseen, lambda _: None)


@pytest.mark.slow
def test_by_default_runs_go_side_by_side_as_cores_allow(small, tmp_path, monkeypatch):
    table, said = tables.load(small), []
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    text = reproduce(table, 1, 0, tmp_path / "runs", unseen, said.append)
    assert sorted(line.partition(" ")[0] for line in said) == ["1/2", "2/2"]
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    again = reproduce(table, 1, 0, tmp_path / "again", unseen, said.append)
    assert again == text.replace("2 cores", "1 cores")
    assert said[2:] == ["one client, AdaDPIGU, seed 0", "one client, DP-SGD, seed 0"]
    assert "commit" in text
    for run in runs(table, 1, tmp_path / "runs"):
        changed = {**json.loads((run.folder / RESULT).read_text()), "code": "another"}
        (run.folder / RESULT).write_text(json.dumps(changed))
    of_other_code = reproduce(table, 1, 0, tmp_path / "runs", unseen, said.append)
    assert "code another" in of_other_code
    assert "commit" not in of_other_code, "the commit of now is not theirs"


@pytest.mark.slow
def test_a_table_in_pieces_is_the_same_table(small, tmp_path):
    command = ["reproduce", small, "--seeds", "1", "--output", str(tmp_path / "pieces"), "--stop-after", "0"]
    pieces = [CliRunner().invoke(app, command) for _ in range(4)]
    assert [piece.exit_code for piece in pieces] == [0] * 4
    stops = ["after round 1 of 2", "between two runs", "after round 1 of 2"]
    for piece, where in zip(pieces, stops, strict=False):
        assert f"Stopped {where}. The same command goes on with the table." in " ".join(piece.output.split())
    assert reproduce(tables.load(small), 1, 1, tmp_path / "whole", unseen, lambda _: None).strip() in pieces[-1].output
    assert CliRunner().invoke(app, [*command, "--jobs", "2"]).exit_code == 2


@pytest.mark.slow
def test_runs_side_by_side_give_the_same_table(small, tmp_path):
    table, said = tables.load(small), []
    beside = reproduce(table, 1, 2, tmp_path / "beside", unseen, said.append)
    assert sorted(line.partition(" ")[0] for line in said) == ["1/2", "2/2"]
    assert beside == reproduce(table, 1, 1, tmp_path / "one-by-one", unseen, said.append)


@pytest.mark.slow
def test_nothing_goes_on_when_the_command_is_killed(small, tmp_path):
    (tmp_path / "small.toml").write_text(SETTINGS.replace("num-rounds = 2", "num-rounds = 100000"))
    command = [sys.executable, "-m", "simulations.command_line", "reproduce", small, "--seeds", "1", "--jobs", "2"]
    with subprocess.Popen([*command, "--output", str(tmp_path / "runs")], stdout=subprocess.DEVNULL) as parent:
        metrics = [tmp_path / "runs" / f"small-{method}-seed-0" / METRICS for method in ("adadpigu", "dp-sgd")]
        _wait_until(lambda: all(file.exists() for file in metrics))
        family = process_tree.descendants(parent.pid) - {parent.pid}
        parent.kill()
    assert len(family) >= 4, "two runs and a worker of each"
    _wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))


def _wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_p_value_is_that_of_the_paired_test():
    # by hand: differences 1, 2, 3 have mean 2 and standard deviation 1, so that t = 2 sqrt(3) with 2 degrees of freedom
    found = table_report.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert found["mean"] == 2
    assert found["p_value"] == pytest.approx(1 - t / math.sqrt(2 + t * t))


@pytest.mark.parametrize(("first", "second"), [([1.0], [2.0]), ([1.0, 2.0], [1.5, 2.5]), ([1.0, 2.0], [1.0, 2.0])])
def test_there_is_no_p_value_without_a_test(first, second):
    assert table_report.paired(first, second)["p_value"] is None


def result(accuracy, epsilon=1.0, **more):
    clients = [{"epsilon": epsilon, "target_epsilon": 2.0}]
    return {"accuracy": accuracy, "clients": clients, "bytes_up": 1, "rounds": 2, "code": "c", **more}


def test_what_is_not_private_diverged_or_unbounded_is_marked(small):
    Path(small).write_text(TABLE.replace('"dp-sgd"]', '"peek"]\n').replace("changes.dp-sgd = {", "changes.peek = {"))
    with Path(small).open("a") as file:
        file.write('[own.peek]\ntitle = "oracle"\nprivate = false\n')
    table = tables.load(small)
    averages = {"average": {"accuracy": 0.75}}
    results = {
        ("small", "adadpigu"): [result(0.5, **averages), result(0.7, **averages)],
        ("small", "peek"): [result(0.9, None, diverged=True), result(0.95, None)],
    }
    machine = {"commit": "c", "cpu": "a CPU", "cores": 2, "gpu": None}
    text = table_report.markdown(table_report.summary(table, results, 2, machine))
    assert "oracle (not private)" in text
    assert "60.00 ± 14.14 (75.00) | 92.50 ± 3.54, 1 diverged | -32.50" in text
    assert "unbounded" in text


def test_another_quality_is_compared(small):
    Path(small).write_text('quality = "area_under_curve"\n' + TABLE)
    table = tables.load(small)
    results = {
        ("small", "adadpigu"): [result(0.9, area_under_curve=0.95)],
        ("small", "dp-sgd"): [result(0.9, area_under_curve=0.85)],
    }
    found = table_report.summary(table, results, 1, {"commit": "c", "cpu": "a CPU", "cores": 2, "gpu": None})
    assert found["rows"][0]["methods"]["dp-sgd"]["difference"]["mean"] == pytest.approx(10)
    assert found["rows"][0]["target_epsilon"] == 2
    assert "area under the curve on test data" in table_report.markdown(found)


def test_an_unknown_quality_is_refused(small):
    Path(small).write_text('quality = "luck"\n' + TABLE)
    with pytest.raises(ConfigurationError, match="'luck' is none of accuracy, area_under_curve"):
        tables.load(small)


def test_many_methods_stand_one_below_the_other(small):
    names = ["one", "two", "three", "four"]
    own = "".join(f'[own.{name}]\ntitle = "{name}"\nprivate = {str(name != "four").lower()}\n' for name in names)
    Path(small).write_text(
        f'title = "Four"\nmethods = {names}\n[[rows]]\nlabel = "a row"\nsettings = "small.toml"\n{own}'
    )
    table = tables.load(small)
    results = {
        ("small", name): [
            result(0.5 + 0.1 * number, epsilon, bytes_up=2_500_000),
            result(0.6, epsilon, bytes_up=2_500_000),
        ]
        for number, (name, epsilon) in enumerate(zip(names, (1.0, 1.5, 2.0, None), strict=True))
    }
    machine = {"commit": "c", "cpu": "a CPU", "cores": 2, "gpu": None}
    lines = table_report.markdown(table_report.summary(table, results, 2, machine)).splitlines()
    assert lines[2] == "|  |  | accuracy | one minus it | sent by all clients, MB | largest epsilon spent |"
    assert lines[4] == "| a row | one | 55.00 ± 7.07 |  | 2.5 | 1.000 |"
    assert lines[5] == "|  | two | 60.00 ± 0.00 | -5.00 ± 7.07, p 0.50 | 2.5 | 1.500 |"
    assert lines[7] == "|  | four (not private) | 70.00 ± 14.14 | -15.00 ± 21.21, p 0.50 | 2.5 | unbounded |"
