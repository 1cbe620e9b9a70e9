"""Mistakes of the published code that the server could make as well: each with the mistake put in, to be found."""

import json

import numpy as np
import pytest

import server.app
from adadpigu_core import archive
from adadpigu_core.configuration import parse
from adadpigu_core.messages import TrainRequest, decode
from server.evaluation import Evaluation
from server.run_folder import CHECKPOINT, RESULT, RunFolder
from server.wire import from_content


@pytest.fixture
def run(kit, npz, tmp_path):
    """A run in which half of the coordinates stay frozen after pretraining."""

    def start():
        configuration = parse(
            {
                **kit.SETTINGS,
                "task.dataset": npz,
                "task.model": "linear",
                "retention.schedule": "constant",
                "runtime.output": str(tmp_path / "run"),
            }
        )
        grid, folder = kit.RealGrid(configuration), RunFolder(tmp_path / "run")
        server.app.run(grid, configuration, folder, wait=lambda *_: None)
        return grid, folder

    return start


class TestDefect6:
    """The published code evaluates with frozen weights zeroed, and trains with them in place."""

    @pytest.fixture
    def evaluated(self, monkeypatch):
        """Weights that were evaluated, in order."""
        real, seen = server.app.evaluator, []

        def recording(model, test):
            evaluate = real(model, test)
            return lambda weights: seen.append(weights.numpy().copy()) or evaluate(weights)

        monkeypatch.setattr(server.app, "evaluator", recording)
        return seen

    def check(self, run, evaluated):
        grid, folder = run()
        messages = [m for m in grid.pushed if m.metadata.message_type == "train" and m.metadata.dst_node_id == 10]
        trained = [decode(from_content(message.content), TrainRequest).weights for message in messages]
        final = archive.unpack((folder.path / CHECKPOINT).read_bytes())[0]["weights"]
        assert len(evaluated) == 6  # before the first round, after each of four, and for the result
        for weights, expected in zip(evaluated, [*trained, final, final], strict=True):
            np.testing.assert_array_equal(weights, expected)
        frozen = trained[2] == trained[1]  # in the round before
        assert frozen.sum() == 4
        assert (evaluated[-1][frozen] != 0).all()

    def test_weights_are_evaluated_as_they_are_trained(self, run, evaluated):
        self.check(run, evaluated)

    @pytest.mark.parametrize("where", ["arrays", "evaluator"])
    def test_the_check_finds_it(self, run, evaluated, monkeypatch, where):
        def zeroed(weights):
            weights = weights.clone()
            weights[:4] = 0
            return weights

        if where == "arrays":
            real = server.strategy.assign
            monkeypatch.setattr(server.strategy, "assign", lambda model, weights: real(model, zeroed(weights)))
        else:
            inner = server.app.evaluator
            monkeypatch.setattr(server.app, "evaluator", lambda *task: lambda weights: inner(*task)(zeroed(weights)))
        with pytest.raises(AssertionError):
            self.check(run, evaluated)


class TestDefect8:
    """The published code reports its best test epoch, at the epsilon of one run without selection."""

    @pytest.fixture(autouse=True)
    def getting_worse(self, monkeypatch):
        """The more rounds, the lower the accuracy."""
        order = {}

        def evaluator(model, test):
            def evaluate(weights):
                place = order.setdefault(weights.numpy().tobytes(), len(order))
                return Evaluation(1.0 / (1 + place), 1.0 + place)

            return evaluate

        monkeypatch.setattr(server.app, "evaluator", evaluator)

    def check(self, run):
        _, folder = run()
        result, lines = json.loads((folder.path / RESULT).read_text()), folder.metrics()
        assert [line["accuracy"] for line in lines] == pytest.approx([1 / 2, 1 / 3, 1 / 4, 1 / 5])
        assert (result["accuracy"], result["loss"]) == (lines[-1]["accuracy"], lines[-1]["loss"])
        assert result["accuracy"] == pytest.approx(1 / 5)

    def test_the_last_iterate_is_reported(self, run):
        self.check(run)

    def test_the_check_finds_it(self, run, monkeypatch):
        real = RunFolder.write_json

        def best(folder, name, value):
            if name == RESULT:
                value = {**value, "accuracy": max(line["accuracy"] for line in folder.metrics())}
            real(folder, name, value)

        monkeypatch.setattr(RunFolder, "write_json", best)
        with pytest.raises(AssertionError):
            self.check(run)
