"""The command ``adadpigu plan``, as people and programs meet it."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from typer.testing import CliRunner

from adadpigu_core.accounting import TRAINING, Event, epsilon
from simulations import command_line
from simulations.rounding import up

HEADING = "id,records,target_epsilon\n"
FEW = HEADING + "north,1200,8\nsouth,300,0.5\n"
QUICK = ("--rounds", "20", "--sampling-probability", "0.1", "--parameters", "1000")


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments):
        return CliRunner().invoke(command_line.app, ["plan", *map(str, arguments)], catch_exceptions=False)

    return run


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "clients.csv"
    path.write_text(FEW)
    return path


def test_everything_is_in_the_json(plan, csv, tmp_path):
    target = tmp_path / "plan.json"
    result = plan("--clients", csv, "--json", target, *QUICK)
    assert result.exit_code == 0, result.output
    answer = json.loads(target.read_text())
    assert answer["rounds"] == 20
    assert answer["epsilon_rounds"] == list(range(1, 21))
    assert [row["coordinates"] for row in answer["noise_to_clipping"]["retained"]] == list(range(100, 1001, 100))
    north, south = answer["clients"]
    assert (north["id"], north["records"], north["target_epsilon"]) == ("north", 1200, 8.0)
    assert 0.49 < south["epsilon"] <= 0.5
    assert south["epsilons"][-1] == south["epsilon"]
    assert south["releases"] == 20
    assert south["training_noise_multiplier"] > north["training_noise_multiplier"]
    assert north["weight_share"] + south["weight_share"] == pytest.approx(1)
    assert 0 < south["marginal_value"] < north["marginal_value"]
    for text in (
        "north",
        "south",
        "Noise multipliers of training",
        "Epsilon after",
        "100%",
        "add-or-remove",
    ):
        assert text in result.output


def test_it_says_what_it_is_doing_apart_from_the_answer(plan, csv):
    result = plan("--clients", csv, *QUICK)
    assert result.stderr == "Accounting for 2 clients ...\n"
    assert "Accounting" not in result.stdout


def test_printed_numbers_are_on_the_safe_side(plan, csv):
    result = plan("--clients", csv, "--pretraining-round-share", 0, *QUICK)
    shown = {}
    for name, target in (("north", 8.0), ("south", 0.5)):
        (line,) = [text for text in result.output.splitlines() if f" {name} " in text and " of " in text]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        shown[name] = (float(cells[2]), float(cells[3].split(" of ")[0]))
        spent = epsilon([Event(TRAINING, shown[name][0], 0.1, 20)], 1e-5)
        assert spent <= shown[name][1] <= target
    assert f"{up(shown['north'][0], 3)}" in result.output


def test_flags_say_the_same_as_a_file(plan, csv, tmp_path):
    files = [tmp_path / "one.json", tmp_path / "other.json"]
    assert plan("--clients", csv, "--json", files[0], *QUICK).exit_code == 0
    given = ("--client", "north,1200,8", "--client", "south, 300, 0.5")
    assert plan(*given, "--json", files[1], *QUICK).exit_code == 0
    assert files[0].read_text() == files[1].read_text()


def test_every_unknown_is_solved_for(plan, csv):
    answers = {
        "epsilon": ("--noise-multiplier", 3, "Every client spends epsilon"),
        "rounds": ("--noise-multiplier", 5, "All clients can afford"),
        "batch": ("--noise-ratio", 0.02, "Expected batches of"),
    }
    for solve, (flag, value, text) in answers.items():
        result = plan("--clients", csv, "--solve", solve, flag, value, *QUICK)
        assert result.exit_code == 0, result.output
        assert text in result.output


def test_schedules_and_plans_without_pretraining(plan, csv):
    result = plan("--clients", csv, "--noise-schedule", "step", "--final-noise-ratio", 0.5, *QUICK)
    assert result.exit_code == 0
    assert "in the last round" in result.output
    result = plan("--clients", csv, "--pretraining-round-share", 0, *QUICK)
    assert "0 rounds of pretraining, 20 of training" in result.output


def test_the_figure_has_a_line_for_each_client(plan, csv, tmp_path):
    figure = tmp_path / "plan.svg"
    assert plan("--clients", csv, "--figure", figure, *QUICK).exit_code == 0
    names = {element.get("id", "") for element in ET.parse(figure).iter()}
    assert any(name.startswith("legend") for name in names)
    assert plan("--clients", csv, "--figure", tmp_path / "plan.png", *QUICK).exit_code == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--client", "a,b,c"), "client 'a,b,c', records: must be a whole number"),
        (("--client", "a,1"), "must be id,records,target_epsilon"),
        (("--client", "a,1,1", "--client", "a,1,1"), "an id of its own"),
        (("--target-epsilon", "-1"), "target_epsilon: must be positive"),
        (("--target-epsilon", "nan"), "target_epsilon"),
        (("--solve", "everything"), "--solve: 'everything' is none of"),
        (("--solve", "rounds"), "--noise-multiplier: is needed with --solve rounds"),
        (("--noise-multiplier", "3"), "--noise-multiplier: has no part with --solve noise"),
        (("--aggregation", "fair"), "--aggregation: 'fair' is none of"),
        (("--sampling-probability", "1.5"), "sampling_probability: 1.5 is out of range"),
        (("--noise-schedule", "zigzag"), "noise_schedule.kind"),
        (("--rounds", "1000000"), "num_rounds"),
        (("--clients", "nowhere.csv"), "nowhere.csv: cannot be read"),
        (("--figure", "plan.txt"), "plan.txt: cannot be written"),
        (("--json", "/nowhere/plan.json"), "cannot be written"),
    ],
)
def test_mistakes_are_named(plan, arguments, problem):
    result = plan(*arguments, *(() if "--rounds" in arguments else ("--rounds", "3")))
    assert result.exit_code == 2
    assert problem in " ".join(result.output.split())


def test_a_bad_file_names_line_and_column(plan, csv):
    csv.write_text(FEW + "west,many,1\n")
    result = plan("--clients", csv)
    assert result.exit_code == 2
    assert "line 4, column records" in result.output


def test_a_thousand_clients_take_seconds_and_no_torch(tmp_path):
    csv = tmp_path / "clients.csv"
    rows = [f"site-{i},{50 + 13 * i},{0.1 * 1.0046**i:.6f}" for i in range(1000)]
    csv.write_text(HEADING + "\n".join(rows) + "\n")
    target = tmp_path / "plan.json"
    code = (
        "import resource, sys; from simulations.command_line import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'dp_accounting'} & set(sys.modules)\n"
        "print('CPU', resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    )
    command = [sys.executable, "-c", code, "plan", "--clients", str(csv), "--json", str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(target.read_text())
    assert len(answer["clients"]) == 1000
    assert all(client["epsilon"] <= client["target_epsilon"] * (1 + 1e-9) for client in answer["clients"])
    # the answer is promised within 5 s on an idle machine; here others may be at work
    assert float(done.stdout.rpartition("CPU")[2]) < 10.0
