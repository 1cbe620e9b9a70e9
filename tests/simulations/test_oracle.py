"""The oracle is a control of simulations, and nobody else's."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from adadpigu_core.configuration import parse
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.models import ModelSpec, build
from adadpigu_core.parameters import flatten
from simulations.display import introduce
from simulations.oracle import oracle_scores
from simulations.pooled import run
from simulations.simulate import prepare, simulate


@pytest.fixture
def settings(tmp_path):
    """Two classes that differ in the last of four inputs alone."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        arrays[f"y_{split}"] = np.arange(200) % 2
        arrays[f"x_{split}"] = generator.normal(size=(200, 4)).astype(np.float32)
        arrays[f"x_{split}"][:, 3] += 2 * arrays[f"y_{split}"]
    np.savez(tmp_path / "task.npz", **arrays)
    return {
        "task.dataset": f"npz:{tmp_path / 'task.npz'}",
        "task.model": "linear",
        "optimiser.local-learning-rate": 0.1,
        "pretraining.ranking": "oracle",
        "runtime.output": str(tmp_path / "run"),
    }


@pytest.mark.parametrize("measure", ["magnitude", "energy", "drift"])
def test_it_finds_what_matters_and_leaves_the_model_alone(settings, measure):
    model = build(ModelSpec("linear", "relu", "none", (4,), 2), seed=0)
    start = flatten(model)
    scores = oracle_scores(parse({**settings, "pretraining.measure": measure}), model, 0.1)
    assert torch.equal(flatten(model), start)
    assert set(torch.argsort(scores[:8], descending=True)[:2].tolist()) == {3, 7}


def test_flowers_engine_refuses_it_before_anything_runs(settings):
    with pytest.raises(ConfigurationError, match="in-process engine only"):
        simulate(prepare(settings), "flower", lambda _: None)


def test_whoever_starts_or_reads_a_run_is_told(settings):
    output = io.StringIO()
    introduce(Console(file=output), parse(settings), [100], done=0)
    assert "NOT PRIVATE" in output.getvalue()
    output = io.StringIO()
    introduce(Console(file=output), parse({**settings, "pretraining.ranking": "random"}), [100], done=0)
    assert "NOT PRIVATE" not in output.getvalue()


def test_it_follows_the_rate_of_the_plan(settings, monkeypatch):
    """In a simulation as among equal clients that are simulated as one."""
    seen = []

    def watched(configuration, model, rate):
        seen.append(rate)
        return oracle_scores(configuration, model, rate)

    monkeypatch.setattr("simulations.simulate.oracle_scores", watched)
    settings |= {"optimiser.local-learning-rate": 0.0, "federation.num-clients": 2, "federation.num-rounds": 3}
    settings |= {"pretraining.round-share": 0.0, "retention.initial-ratio": 0.5, "retention.schedule": "constant"}
    result = simulate(prepare(settings), "in-process", lambda _: None)
    assert seen == [result["learning_rate"]]
    monkeypatch.setattr("simulations.pooled.oracle_scores", watched)
    pooled = run(parse(settings))
    assert seen[1:] == [pooled["learning_rate"]]
    assert seen[1] == pytest.approx(seen[0])
