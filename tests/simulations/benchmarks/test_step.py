"""The command ``adadpigu benchmark step``: its rows, its file, its limits and its refusals."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from simulations.benchmarks import command_line, memory
from simulations.benchmarks import step as step_module
from simulations.benchmarks.plan import (
    ADADPIGU,
    BOUNDS,
    GHOST,
    HOOKS,
    METHODS,
    NAIVE,
    PLAIN,
    STANDARDISED,
    Layout,
    Plan,
    Task,
)
from simulations.benchmarks.step import Measured, rows
from simulations.benchmarks.table import tables
from simulations.benchmarks.worker import LeftOutError, Sample, Worker, serve
from simulations.command_line import app

KEYS = {
    "model",
    "method",
    "layout",
    "batch",
    "median_ms",
    "cpu_ms",
    "min_ms",
    "max_ms",
    "repetitions",
    "ratio",
    "cpu_ratio",
    "peak_mb",
    "peak_ratio",
    "speedup_over_opacus",
    "note",
}


def task(method=PLAIN, layout=None, batch=4, limit_gb=10.0):
    return Task("mnist-cnn", method, layout or Layout(), batch, 0.6, "cpu", 1, limit_gb)


def measured(plan):
    return [row for found in step_module.measure(plan, lambda _: None) for row in found]


def invoke(*arguments):
    return CliRunner().invoke(app, ["benchmark", "step", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(autouse=True)
def _threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


# ---- the whole command


@pytest.mark.slow
def test_the_command_measures_and_writes(tmp_path):
    file = tmp_path / "step.json"
    options = ("--models", "mlp", "--methods", "adadpigu,", "--batch", "4", "--repetitions", "2", "--least-s", "0")
    result = invoke(*options, "--json", str(file))
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert [row["method"] for row in written["rows"]] == [PLAIN, "plain-default", ADADPIGU]
    for row in written["rows"]:
        assert set(row) >= KEYS
        assert (row["model"], row["batch"], row["repetitions"], row["note"]) == ("mlp", 4, 2, "")
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["peak_mb"] > 0
        assert row["method"] in result.output
    plain, _, ours = written["rows"]
    assert (plain["ratio"], plain["peak_ratio"], plain["layout"]) == (1, 1, "default")
    assert ours["ratio"] == pytest.approx(ours["median_ms"] / plain["median_ms"])
    assert ours["peak_ratio"] == pytest.approx(ours["peak_mb"] / plain["peak_mb"])
    assert ours["ratio_pass"] == BOUNDS["mlp"].time
    assert {"cpu", "torch", "allocator", "commit"} <= set(written["machine"])
    assert (written["settings"]["threads"], written["settings"]["retention"]) == (1, 0.6)
    assert "against its bounds" not in result.output, "they are for another batch"


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("--models", "resnet"), "resnet"),
        (("--models", ","), "nothing"),
        (("--methods", "plain,jax"), "jax"),
        (("--batch", "0"), "--batch"),
        (("--repetitions", "0"), "--repetitions"),
        (("--threads", "0"), "--threads"),
        (("--retention", "1.5"), "--retention"),
        (("--limit-s", "nan"), "--limit-s"),
        (("--least-s", "-1"), "--least-s"),
        (("--limit-gb", "0"), "--limit-gb"),
        (("--device", "tpu9"), "tpu9"),
        (("--device", "meta"), "meta"),
        (("--json", "/there/is/no/such/folder/step.json"), "folder"),
        (("--json", "/"), "--json"),
    ],
)
def test_bad_arguments_are_refused_by_name_before_anything_runs(monkeypatch, arguments, culprit):
    monkeypatch.setattr(step_module, "measure", lambda *_: pytest.fail("it ran"))
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert culprit in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_said():
    result = invoke("--device", "cuda")
    assert result.exit_code == 2
    assert "no CUDA device" in result.output


def test_without_opacus_its_methods_say_how_to_get_it(monkeypatch):
    monkeypatch.setattr(command_line, "has_opacus", lambda: False)
    monkeypatch.setattr(step_module, "measure", lambda *_: pytest.fail("it ran"))
    result = invoke("--methods", "opacus-ghost")
    assert result.exit_code == 2
    assert "pip install -e '.[benchmark]'" in result.output


def test_without_opacus_everything_else_is_measured_by_default(monkeypatch):
    monkeypatch.setattr(step_module, "has_opacus", lambda: False)
    monkeypatch.setattr(step_module, "Worker", FakeWorker)
    found = {row["method"]: row for row in measured(Plan(("mlp",), repetitions=1, least_s=0))}
    assert set(METHODS) <= set(found)
    assert found[GHOST]["median_ms"] is None
    assert "pip install" in found[GHOST]["note"]
    assert found[ADADPIGU]["speedup_over_opacus"] is None


def test_help_needs_no_torch():
    code = "import sys, simulations.command_line; sys.exit('torch' in sys.modules or 'opacus' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- turns and rows


class FakeWorker:
    """Takes 10 ms, ghost clipping 20; fails when it is told to. Notes whose turn it was."""

    turns: list[str] = []  # noqa: RUF012 - emptied by the tests
    failing = ""

    def __init__(self, given, limit_s):
        self.given = given

    def step(self):
        self.turns.append(self.given.name)
        if self.given.name == self.failing:
            raise LeftOutError("it broke")
        return Sample(20.0 if self.given.method == GHOST else 10.0, 9.0, 5.0)

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(step_module, "Worker", FakeWorker)
    monkeypatch.setattr(step_module, "has_opacus", lambda: True)
    monkeypatch.setattr(FakeWorker, "turns", [])
    return FakeWorker


def test_methods_take_turns_from_another_first_one_in_every_repetition(fake):
    measured(Plan(("mlp",), (ADADPIGU, NAIVE), batch=8, repetitions=3, least_s=0))
    assert fake.turns == [PLAIN, ADADPIGU, NAIVE, ADADPIGU, NAIVE, PLAIN, NAIVE, PLAIN, ADADPIGU]


def test_networks_are_repeated_until_they_have_taken_long_enough(fake, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(step_module.time, "monotonic", lambda: float(next(clock)))
    measured(Plan(("mlp",), (PLAIN,), batch=8, repetitions=2, least_s=5))
    assert len(fake.turns) == 6  # two that are asked for, then one a second until the fifth


def test_a_method_that_breaks_on_the_way_has_no_figures_and_the_others_do(fake, monkeypatch):
    monkeypatch.setattr(fake, "failing", NAIVE)
    found = {row["method"]: row for row in measured(Plan(("mlp",), (GHOST, NAIVE), batch=8, least_s=0))}
    assert (found[NAIVE]["median_ms"], found[NAIVE]["peak_mb"], found[NAIVE]["repetitions"]) == (None, None, 0)
    assert found[NAIVE]["note"] == "it broke"
    assert fake.turns.count(NAIVE) == 1
    assert (found[GHOST]["ratio"], found[GHOST]["repetitions"]) == (2, 5)


def seen(method, *milliseconds, layout=None, peak_mb=1.0):
    return Measured(task(method, layout), [Sample(ms, ms, peak_mb) for ms in milliseconds])


def test_plain_is_the_fastest_layout_and_memory_is_compared_with_the_default():
    found = {
        row["method"]: row
        for row in rows(
            [
                seen(PLAIN, 20.0, 30.0, 40.0, peak_mb=100.0),
                seen(PLAIN, 10.0, 90.0, 10.0, layout=Layout(True, 2), peak_mb=10.0),
                seen(ADADPIGU, 15.0, peak_mb=200.0),
                seen(STANDARDISED, 60.0),
                seen(NAIVE, 75.0),
            ]
        )
    }
    assert list(found) == [PLAIN, "plain-default", "plain-channels-last-batch-2", ADADPIGU, STANDARDISED, NAIVE]
    assert (found[PLAIN]["layout"], found[PLAIN]["median_ms"]) == ("channels-last-batch-2", 10)
    assert found["plain-default"]["ratio"] == 3
    ours = found[ADADPIGU]
    assert (ours["ratio"], ours["peak_ratio"], ours["speedup_over_opacus"]) == (1.5, 2, 4)
    assert ours["speedup_over_naive"] == 5


def test_plain_layouts_are_those_that_differ():
    names = [each.name for each in Plan(batch=50).tasks("mnist-cnn") if each.method == PLAIN]
    assert names == [PLAIN, "plain-batch-32", "plain-channels-last", "plain-channels-last-batch-32"]
    assert [each.name for each in Plan(("mlp",), (PLAIN,), batch=32).tasks("mlp")] == [PLAIN]


def test_bounds_are_shown_where_they_apply(fake):
    plan = Plan(("mlp",), (ADADPIGU, STANDARDISED, HOOKS), least_s=0)
    found = measured(plan)
    assert [table.row_count for table in tables(found, plan)] == [len(found), 1]
    assert len(tables(found, Plan(("mlp",), (ADADPIGU,), threads=2))) == 1


# ---- processes


@pytest.mark.slow
def test_a_worker_steps_until_a_step_takes_too_long_and_ends():
    worker = Worker(task(batch=512), 60)
    sample = worker.step()
    assert sample.elapsed_ms > 0
    assert sample.cpu_ms > 0
    assert sample.peak_mb > 0
    worker._limit_s = 1e-3
    with pytest.raises(LeftOutError, match=r"more than 0\.001 s"):
        worker.step()
    worker.close()
    worker.close()
    assert not worker._process.is_alive()


class FakePipe:
    """Asks for a number of steps and keeps the answers."""

    def __init__(self, steps):
        self.steps, self.answers = steps, []

    def recv(self):
        self.steps -= 1
        if self.steps < 0:
            raise EOFError

    def send(self, answer):
        self.answers.append(answer)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (task(HOOKS, limit_gb=1e-6), "the gradients that it keeps would take 0.000416 GB, more than 1e-06"),
        (task(layout=Layout(physical_batch=-1)), "RuntimeError: "),
    ],
)
def test_a_method_that_fails_says_so(given, reason):
    pipe = FakePipe(1)
    serve(given, pipe)
    assert len(pipe.answers) == 1
    assert pipe.answers[0].startswith(reason)


def test_steps_are_served_until_the_other_side_is_gone():
    pipe = FakePipe(2)
    serve(task(), pipe)
    assert pipe.answers[0] is None
    assert len(pipe.answers) == 3
    assert all(sample.elapsed_ms > 0 for sample in pipe.answers[1:])


def test_the_peak_is_of_tensors_that_live_at_the_same_time():
    earlier = torch.ones(4_000_000)

    def work():
        for _ in range(3):
            torch.ones(2_000_000)
        kept = torch.ones(1_000_000)
        return kept + earlier[:1_000_000]

    result, peak = memory.peak_of(work, "cpu")
    assert len(result) == 1_000_000
    assert peak == pytest.approx(8.0, rel=0.01)  # 8 MB at a time, three times; then twice 4 MB
